"""Every scheduler, with and without Karras noise levels, draws what the prompt says."""

import pytest
from diffusers import EulerDiscreteScheduler, SchedulerMixin

from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.pipeline.factory import make_scheduler
from diffusion_workers.planning.plan import KARRAS_SCHEDULERS, SCHEDULERS
from diffusion_workers.prompt.sigmas import (
    ays_sigmas,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    sgm_uniform_sigmas,
    trained_sigmas,
)
from diffusion_workers.request.metadata import parameters_line
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.shapes.scenes import Scene, ShapeObject, matches, read_scene
from ez_diffusion_client.models import PlannedScheduler, SchedulerName

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


SCHEDULES = ("karras", "exponential", "beta", "sgm_uniform", "ays")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scheduler", ["euler", pytest.param("heun", marks=pytest.mark.slow), "dpmpp_2m"])
def test_a_noise_schedule_draws_and_is_restored(service: DiffusionService, scheduler: str, schedule: str) -> None:
    prompt = "a large red circle in the center on a white background"
    result = service.generate(prompt, seed=3, scheduler=scheduler, sigma_schedule=schedule, num_inference_steps=10)
    assert matches(read_scene(result.image), SCENE)
    assert result.generation.plan.denoiser_calls == (19 if scheduler == "heun" else 10)
    restored = service.restore(result.image).restored.request
    again = service.plan(restored).plan
    assert again.scheduler == result.generation.plan.scheduler
    line = service.restore(parameters=parameters_line(result.generation.plan)).restored
    assert service.plan(line.request).plan.scheduler == again.scheduler, line.lost


def levels(planned: PlannedScheduler, steps: int, own: SchedulerMixin) -> list[float]:
    "The noise levels that a scheduler stops at."
    scheduler = make_scheduler(own, planned)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def test_noise_schedules_have_the_levels_of_their_papers(service: DiffusionService) -> None:
    own = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    trained = trained_sigmas()
    smallest, largest = trained[0], trained[-1]
    wanted = {
        "karras": karras_sigmas(10, smallest, largest),
        "exponential": exponential_sigmas(10, smallest, largest),
        "beta": beta_sigmas(10, smallest, largest),
        "ays": ays_sigmas("sd1", 10),
    }
    asked = {"prompt": "a red circle", "scheduler": "euler", "num_inference_steps": 10}
    for schedule, sigmas in wanted.items():
        planned = service.plan(**asked, sigma_schedule=schedule).plan.scheduler
        found = levels(planned, 10, own)
        assert found == pytest.approx([*sigmas, 0.0], rel=2e-2), schedule  # diffusers' levels begin at a timestep
    uniform = levels(service.plan(**asked, sigma_schedule="sgm_uniform").plan.scheduler, 10, own)
    assert uniform == pytest.approx([*sgm_uniform_sigmas(10, trained), 0.0], rel=2e-2)


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"scheduler": "euler", "use_karras_sigmas": True, "sigma_schedule": "beta"}, "sigma_schedule", "another"),
        ({"scheduler": "ddim", "sigma_schedule": "beta"}, "sigma_schedule", "ddim has no such noise levels"),
        ({"scheduler": "lms", "sigma_schedule": "ays"}, "sigma_schedule", "lms has no such noise levels"),
        ({"timestep_spacing": "leading", "sigma_schedule": "sgm_uniform"}, "sigma_schedule", "another"),
        ({"model": "shapes-flux", "sigma_schedule": "ays"}, "sigma_schedule", "the family flux has no such schedule"),
        ({"scheduler": "euler", "sigma_schedule": "simple"}, "sigma_schedule", "not one of the known values"),
    ],
)
def test_a_noise_schedule_that_is_not_there_is_refused(
    service: DiffusionService, fields: dict, field: str, said: str
) -> None:
    refused = service.plan(prompt="a red circle", **fields)
    assert [error.field for error in refused.errors] == [field] and said in refused.errors[0].message


@pytest.mark.parametrize(
    "sampler, schedule, wanted",
    [
        ("DPM++ 2M SDE", "Exponential", "exponential"),
        ("DPM++ 2M", "Beta", "beta"),
        ("Euler", "SGM Uniform", "sgm_uniform"),
        ("Euler", "Align Your Steps", "ays"),
        ("DPM++ 2M SDE", "Automatic", "exponential"),
    ],
)
def test_the_schedules_of_other_programs(service: DiffusionService, sampler: str, schedule: str, wanted: str) -> None:
    settings = f"Steps: 10, Sampler: {sampler}, Schedule type: {schedule}, CFG scale: 2, Seed: 3, Size: 128x128"
    restored = service.restore(parameters=f"a red circle\n{settings}, Model: shapes-sd15").restored
    assert restored.request["sigma_schedule"] == wanted
    assert not restored.lost
    assert service.plan(restored.request).ok
