"""Planning: refused requests, every combination of family, task and control, and requests rebuilt from plans."""

from typing import Any

import pytest

from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.models.manifest import ModelManifest
from diffusion_workers.models.store import find_manifest
from diffusion_workers.planning.controls import ControlFacts
from diffusion_workers.planning.plan import make_plan, request_from_plan
from diffusion_workers.planning.task import LARGEST_SEED
from diffusion_workers.request.errors import RequestError
from ez_diffusion_client.models import GenerationPlan, GenerationRequest, PlannedImage, Task

IMAGE = "aGVsbG8="
UNITS = {
    "none": [],
    "single": [("canny", None)],
    "multiple": [("canny", None), ("tile", None)],
    "union": [("all", "depth"), ("all", "canny")],
}
Size = tuple[int, int] | None


def fact(size: tuple[int, int] = (1024, 1024)) -> PlannedImage:
    return PlannedImage(sha256="0" * 64, width=size[0], height=size[1])


def planned(image: Size = None, mask: Size = None, **fields: Any) -> GenerationPlan:
    "A plan for the built-in model; `image` and `mask` are sizes."
    facts = {name: fact(size) for name, size in (("image", image), ("mask_image", mask)) if size}
    request = GenerationRequest(**{"prompt": "a red circle"} | dict.fromkeys(facts, IMAGE) | fields)
    return make_plan(request, find_manifest("shapes-sd15"), **facts)


def offering(family: str) -> ModelManifest:
    "A manifest with two plain ControlNets and, where the family has them, a union ControlNet."
    record = FAMILIES[family]
    plain = {name: {"source": {"folder": name}, "preprocessors": [name]} for name in ("canny", "tile")}
    union = {"all": {"source": {"folder": "all"}, "union": True}} if record.controls.union_class else {}
    controlnets = (plain if record.has_controlnets else {}) | union
    return ModelManifest.model_validate(
        {"name": family, "family": family, "source": {"folder": family}, "controlnets": controlnets}
    )


def plan_of(family: str, task: Task, kind: str, **fields: Any) -> GenerationPlan:
    "The plan for one family, task and kind of control."
    chosen = UNITS[kind][:1] if kind == "union" and FAMILIES[family].controls.max_units == 1 else UNITS[kind]
    units = [{"model": name, "image": IMAGE} | ({"union_mode": mode} if mode else {}) for name, mode in chosen]
    facts: dict[str, Any] = {}
    if task in (Task.image_to_image, Task.inpainting):
        facts["image"] = fact()
    if task == Task.inpainting:
        facts["mask_image"] = fact()
    given: dict[str, Any] = dict.fromkeys(facts, IMAGE)
    if task == Task.edit:
        facts["reference_images"], given["reference_images"] = [fact()], [IMAGE]
    if units:
        given["controlnets"] = units
    controls = ControlFacts(dict.fromkeys(range(len(units)), fact()))
    return make_plan(GenerationRequest(prompt="a", **given, **fields), offering(family), **facts, controls=controls)


@pytest.mark.parametrize(
    "fields, codes",
    [
        ({"prompt": "  \n"}, {"prompt": "empty_prompt"}),
        ({"prompt": "", "image": (128, 128)}, {"prompt": "empty_prompt"}),
        ({"strength": 0.5}, {"strength": "strength_without_image"}),
        ({"inpaint": {"mask_blur": 3}}, {"inpaint": "inpaint_without_mask"}),
        ({"mask": (64, 64)}, {"mask_image": "mask_without_image"}),
        ({"width": 4096, "height": 2048}, {"width": "size_over_limit", "height": "size_over_limit"}),
        ({"seed": 1, "seeds": [1, 2], "num_images": 3}, {"seed": "seed_conflict", "num_images": "seed_conflict"}),
        ({"seed": LARGEST_SEED, "num_images": 2}, {"seed": "out_of_range"}),
        ({"image": (128, 128), "strength": 0.01}, {"strength": "out_of_range"}),
        ({"image": (128, 128), "strength": 5e-324}, {"strength": "out_of_range"}),
        ({"scheduler": "lcm", "num_inference_steps": 51}, {"num_inference_steps": "out_of_range"}),
        ({"scheduler": "ddim", "use_karras_sigmas": True}, {"use_karras_sigmas": "unsupported_combination"}),
        ({"scheduler": "flow_match_euler"}, {"scheduler": "unsupported_combination"}),
        ({"image": (128, 128), "guidance_rescale": 0.5}, {"guidance_rescale": "unsupported_combination"}),
        ({"loras": [{"name": "no-such"}]}, {"loras[0].name": "unknown_lora"}),
        ({"prompt_2": "x", "profile": "swift"}, {"prompt_2": "unsupported_combination", "profile": "not_one_of"}),
        (
            {"step_cache": {"method": "deepcache", "start": 0.6, "end": 0.5, "threshold": 0.1}},
            {"step_cache.start": "out_of_range", "step_cache.threshold": "unsupported_combination"},
        ),
        (
            {"prompt": "a __nowhere__", "prompt_syntax": "a1111", "width": 8000},
            {"prompt": "unsupported_combination", "width": "size_over_limit"},
        ),
        ({"prompt": "a", "prompt_loras": True}, {"prompt_loras": "unsupported_combination"}),
    ],
)
def test_all_validation_errors_are_reported_by_field(fields: dict, codes: dict[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        planned(**fields)
    assert {error.field: error.code.value for error in caught.value.errors} == codes


def test_inpainting_accepts_an_empty_prompt() -> None:
    assert planned(prompt="", image=(128, 128), mask=(128, 128)).prompt == ""


def test_ordinary_brackets_produce_no_warnings() -> None:
    assert planned(prompt="a red circle (the large) on a beige background").warnings is None


def test_resolved_prompts_are_not_resolved_again() -> None:
    drawn = planned(prompt="a ({red|blue}:1.2) [circle|square]", prompt_syntax="a1111", seed=3)
    once = planned(prompt=drawn.prompt, prompt_syntax="a1111", seed=3)
    assert (once.prompt, once.written_prompt) == (drawn.prompt, None)


def test_every_supported_combination_is_planned() -> None:
    count = 0
    for family, record in FAMILIES.items():
        for kind in UNITS:
            for task in Task:
                call = record.call(task, kind)
                if call is None:
                    with pytest.raises(RequestError):
                        plan_of(family, task, kind, seed=1)
                else:
                    assert plan_of(family, task, kind, seed=1).pipeline_class == call.class_name
                    count += 1
    assert count == 56


def test_pipeline_specific_fields_are_planned() -> None:
    text = Task.text_to_image
    assert plan_of("flux", text, "none", width=1000, height=1000).width == 1008  # a multiple of 16
    assert [control.union_mode for control in plan_of("flux", text, "union").controlnets] == [2, 0]
    assert [control.union_mode for control in plan_of("sdxl", text, "union").controlnets] == [1, 3]
    assert plan_of("flux", text, "single", true_cfg_scale=2, negative_prompt="b").true_cfg_scale == 2.0
    assert plan_of("sdxl", text, "none", guidance_rescale=0.7, prompt_2="b").prompt_2 == "b"


@pytest.mark.parametrize(
    "family, task, kind, fields",
    [
        ("flux", Task.image_to_image, "single", {"true_cfg_scale": 2.0}),
        ("sdxl", Task.text_to_image, "single", {"guidance_rescale": 0.5}),
        ("flux", Task.inpainting, "single", {"negative_prompt": "b"}),
        ("sdxl", Task.text_to_image, "none", {"refiner": {}}),
        ("flux", Task.text_to_image, "none", {"clip_skip": 1}),
        ("sd15", Task.text_to_image, "none", {"size_conditioning": {}}),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(family: str, task: Task, kind: str, fields: dict) -> None:
    with pytest.raises(RequestError) as caught:
        plan_of(family, task, kind, **fields)
    assert [error.field for error in caught.value.errors] == list(fields)


@pytest.mark.parametrize("family, kind", [("flux", "union"), ("sdxl", "multiple"), ("sd15", "single")])
def test_plans_with_controls_round_trip_through_requests(family: str, kind: str) -> None:
    once = plan_of(family, Task.text_to_image, kind, seed=5)
    facts = ControlFacts({index: control.image for index, control in enumerate(once.controlnets)})
    again = request_from_plan(once, controls={index: {"image": IMAGE} for index in facts.images})
    assert make_plan(again, offering(family), controls=facts) == once
    with pytest.raises(RequestError, match="hand in the image of the control again"):
        request_from_plan(once)


def test_inpainting_plans_round_trip_through_requests() -> None:
    once = planned(image=(96, 96), mask=(96, 96), inpaint={"invert": True})
    again = request_from_plan(once, image=IMAGE, mask_image=IMAGE)
    model = find_manifest("shapes-sd15")
    assert make_plan(again, model, image=once.image, mask_image=once.mask_image) == once
