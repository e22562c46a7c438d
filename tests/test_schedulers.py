"""Every scheduler, with and without Karras noise levels, draws what the prompt says."""

import pytest

from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.planning.plan import KARRAS_SCHEDULERS, SCHEDULERS
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.shapes.scenes import Scene, ShapeObject, matches, read_scene
from ez_diffusion_client.models import SchedulerName

SCENE = Scene((ShapeObject("red", "circle"),), "white", place="center", size="large")
OFTEN = ("euler", "dpmpp_2m")  # the schedulers that people use with Karras noise levels; the rest is slow
CASES = [
    pytest.param(name, karras, marks=[pytest.mark.slow] if karras and name not in OFTEN else [])
    for name in SCHEDULERS
    if name in FAMILIES["sd15"].schedulers
    for karras in (False, True)
    if not karras or name in KARRAS_SCHEDULERS
]


@pytest.fixture(scope="module")
def service():
    with DiffusionService(device="cpu") as service:
        yield service


@pytest.mark.parametrize(("scheduler", "karras"), CASES)
def test_the_picture_shows_what_was_asked_for(
    service: DiffusionService, scheduler: SchedulerName, karras: bool
) -> None:
    "A property of the trained model: the scorer reads a red circle on white back from the pixels."
    prompt = "a large red circle in the center on a white background"
    result = service.generate(
        prompt=prompt, seed=3, scheduler=scheduler.value, use_karras_sigmas=True if karras else None
    )
    assert result.ok, result
    assert matches(read_scene(result.image), SCENE), f"{scheduler.value}: {read_scene(result.image)}"
