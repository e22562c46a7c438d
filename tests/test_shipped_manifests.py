"""Every shipped manifest loads, lists only existing preprocessors, and plans every task with every ControlNet."""

from itertools import product

import pytest

from diffusion_workers.control.preprocessors import PREPROCESSORS
from diffusion_workers.models.manifest import ModelManifest
from diffusion_workers.models.store import load_manifests
from diffusion_workers.planning.controls import ControlFacts, learned_modes
from diffusion_workers.planning.plan import make_plan
from ez_diffusion_client.models import ControlKind, GenerationRequest, PlannedImage, Task

STORE = load_manifests()
FACT = PlannedImage(sha256="0" * 64, width=1024, height=1024)
IMAGE = "aGVsbG8="


def offers(manifest: ModelManifest) -> list[list[dict]]:
    "Unit lists: empty, each ControlNet with each mode and preprocessor, and two units of each union ControlNet."
    if manifest.kind == "control":
        return [[{}], *([{"preprocessing": {"name": name}}] for name in manifest.control_preprocessors)]
    found = [[]]
    for name, controlnet in manifest.controlnets.items():
        modes = list(learned_modes(controlnet, manifest.family)) if controlnet.union else []
        units = [{"model": name, "union_mode": mode} for mode in modes] or [{"model": name}]
        found += [[unit] for unit in units] + ([units[:2]] if len(units) > 1 else [])
        found += [
            [{"model": name, "preprocessing": {"name": preprocessor}}] for preprocessor in controlnet.preprocessors
        ]
    return found


def test_all_manifests_load() -> None:
    assert not STORE.errors, STORE.errors
    assert {"shapes-sd15", "sdxl-base-1.0", "flux1-schnell", "flux1-dev", "stable-diffusion-v1-5"} <= set(STORE)
    assert {"stable-diffusion-3.5-medium", "z-image", "z-image-turbo", "flux2-klein-4b", "qwen-image"} <= set(STORE)


@pytest.mark.parametrize("name", list(STORE))
def test_every_task_and_controlnet_can_be_planned(name: str) -> None:
    manifest = STORE[name]
    for entry in manifest.controlnets.values():
        assert set(entry.preprocessors) <= set(PREPROCESSORS)
    for task, units in product(manifest.tasks, offers(manifest)):
        union = any(manifest.controlnets[unit["model"]].union for unit in units if "model" in unit)
        if union and manifest.record.call(task, ControlKind.union, manifest.kind) is None:
            continue
        images = {"image": FACT} if task in (Task.image_to_image, Task.inpainting) else {}
        images |= {"mask_image": FACT} if task == Task.inpainting else {}
        references = {"reference_images": [FACT]} if task == Task.edit else {}
        given = dict.fromkeys(images, IMAGE) | {key: [IMAGE] for key in references}
        given |= {"controlnets": [unit | {"image": IMAGE} for unit in units]} if units else {}
        request = GenerationRequest(prompt="a", **given)
        plan = make_plan(
            request, manifest, **references, **images, controls=ControlFacts(dict.fromkeys(range(len(units)), FACT))
        )
        assert plan.task == task and len(plan.controlnets or []) == len(units)
        assert plan.width % manifest.record.size_multiple == 0
