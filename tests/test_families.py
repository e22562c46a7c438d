"""Table-driven tests of all model families: tasks, batches, refusals, LoRA layouts, single files, dtypes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import family_checks
import numpy as np
import pytest
import torch
from family_checks import (
    CANNY,
    LORA_LAYOUTS,
    MASKED,
    NEGATIVE,
    ONE,
    ROUNDING,
    SMALL,
    THREE,
    TILE,
    TWO,
    UNION,
    FamilyCheck,
    Ran,
    added_by,
    difference,
    in_original_names,
    lora_matrices,
    norm_scales,
    peft,
    photo,
    quiet_pipeline,
    serving,
    write_models,
)
from PIL import Image
from safetensors.torch import save_file

from diffusion_workers.families.chroma import chroma_original_names
from diffusion_workers.families.flux import flux_original_names
from diffusion_workers.families.flux2 import flux2_original_names
from diffusion_workers.families.sd35 import sd35_original_names
from diffusion_workers.families.zimage import zimage_original_names
from diffusion_workers.lora.keys import module_shapes
from diffusion_workers.models.weight_headers import read_header
from diffusion_workers.models.weight_kinds import identify
from diffusion_workers.pipeline.loading import quiet_libraries
from diffusion_workers.service.preparation import Prepared
from diffusion_workers.service.render import pipeline_arguments
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ModelFamily, ModelKind, OpStatus

ATTENTION = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0")
FLOW_ONLY = ({"scheduler": "ddim"}, "allowed: flow_match_euler")
QWEN_LORA = {
    "lora_ends": (*ATTENTION, "img_mlp.net.2", "img_mod.1"),
    "no_layouts": tuple(name for name in LORA_LAYOUTS if "original" in name),  # same names as in diffusers
}
QWEN_REFUSED = (
    FLOW_ONLY,
    ({"true_cfg_scale": 2.0}, "qwen has no use for true_cfg_scale"),
    ({"true_cfg_scale": 2.0}, "set guidance_scale"),
    ({"prompt_2": "a dog"}, "has no use for prompt_2"),
    ({"clip_skip": 1}, "has no use for clip_skip"),
    ({"seamless": "both"}, "has no use for seamless"),
    ({"guider": {"method": "apg"}}, "qwen has no apg"),
    ({"step_cache": {"method": "mag"}}, "allowed: first_block, taylorseer"),
)
CHECKS = [
    FamilyCheck(
        ModelFamily.sd35,
        tasks={
            "text to image": Ran({}, "text_to_image", "StableDiffusion3Pipeline"),
            "image to image": Ran(
                {"image": photo(), "strength": 0.5}, "image_to_image", "StableDiffusion3Img2ImgPipeline", 2
            ),
            "inpainting": Ran(MASKED, "inpainting", "StableDiffusion3InpaintPipeline"),
            "ControlNet": Ran({"controlnets": [CANNY]}, "text_to_image", "StableDiffusion3ControlNetPipeline"),
            "two ControlNets": Ran(
                {"controlnets": [CANNY, TILE]}, "text_to_image", "StableDiffusion3ControlNetPipeline"
            ),
        },
        refused=(
            FLOW_ONLY,
            ({"true_cfg_scale": 2.0}, "has no use for true_cfg_scale"),
            ({"step_cache": {"method": "deepcache"}}, "cannot use this method"),
            ({"step_cache": {"method": "first_block"}}, "cannot use this method"),
            ({"image": photo(), "controlnets": [CANNY]}, "no pipeline for single control with image_to_image"),
            ({"controlnets": [CANNY | {"union_mode": "canny"}]}, "no union ControlNet"),
            ({"controlnets": [CANNY | {"control_mode": "prompt"}]}, "no control mode"),
        ),
        guidance={"guidance_scale": 20.0},
        unguided={"guidance_scale": 1.0},
        theirs={"guidance_scale": 2.0, "max_sequence_length": 256},
        original_names=sd35_original_names,
        lora_ends=(*ATTENTION, "norm_out.linear"),
        lora_untold=True,
        controlnets=True,
    ),
    FamilyCheck(
        ModelFamily.flux,
        kind=ModelKind.edit,
        tasks={
            "text to image": Ran({}, "text_to_image", "FluxKontextPipeline"),
            "edit": Ran(ONE, "edit", "FluxKontextPipeline"),
            "inpainting": Ran(MASKED | {"strength": 0.5}, "inpainting", "FluxKontextInpaintPipeline", 2),
            "inpainting with a reference": Ran(MASKED | ONE, "inpainting", "FluxKontextInpaintPipeline"),
        },
        refused=(
            FLOW_ONLY,
            ({"clip_skip": 1}, "flux has no use for clip_skip"),
            (TWO, "Flux takes fewer reference images for edit; given '2 images'; allowed: at most 1"),
            ({"image": photo()}, "not offered for image_to_image; put it into reference_images"),
            ({"controlnets": [{"image": photo()}]}, "this model takes no control maps"),
        ),
        guidance={"true_cfg_scale": 9.0} | NEGATIVE,
        unguided={"true_cfg_scale": 1.0},
        batch={"true_cfg_scale": 2.0} | NEGATIVE,
        theirs={"guidance_scale": 2.0, "max_area": 64 * 64, "_auto_resize": False},
        guided_tasks=("text to image", "edit", "inpainting with a reference"),
        original_names=flux_original_names,
        lora_ends=(*ATTENTION, "proj_mlp", "ff.net.2", "norm_out.linear"),
        lora_untold=True,
        transformer="FluxTransformer2DModel",
        file_title="a transformer of FLUX.1",
        changed_weights=norm_scales,
        gguf_architecture="flux",
    ),
    FamilyCheck(
        ModelFamily.flux,
        kind=ModelKind.redux,
        tasks={
            "edit with two references": Ran(TWO, "edit", "FluxPipeline"),
            "text to image": Ran({}, "text_to_image", "FluxPipeline"),
            "edit with weights": Ran(THREE | {"reference_weights": [0.5, 0.3, 0.1]}, "edit", "FluxPipeline"),
            "image to image with a reference": Ran(
                {"image": photo(), "strength": 0.5} | ONE, "image_to_image", "FluxImg2ImgPipeline", 2
            ),
            "inpainting with two references": Ran(MASKED | TWO, "inpainting", "FluxInpaintPipeline"),
        },
        refused=(
            ({"reference_weights": [1]}, "given '1 weights for 0 images'; leave it out"),
            (
                TWO | {"reference_weights": [0.5]},
                "one weight for each of reference_images; given '1 weights for 2 images'",
            ),
            (TWO | {"reference_weights": [0, 0]}, "no reference image has an effect"),
            (TWO | {"reference_weights": [0.5, -0.5]}, "reference_weights[1]"),
            (TWO | {"reference_weights": [0.5, 11]}, "reference_weights[1]"),
            (TWO | {"reference_weights": [0.5, float("nan")]}, "reference_weights[1]"),
            ({"clip_skip": 1}, "flux has no use for clip_skip"),
            ({"controlnets": [{"image": photo()}]}, "this model takes no control maps"),
        ),
        guidance={"true_cfg_scale": 9.0} | NEGATIVE,
        unguided={"true_cfg_scale": 1.0},
        batch={"true_cfg_scale": 2.0} | NEGATIVE,
        theirs={"guidance_scale": 2.0, "true_cfg_scale": 30.0, "image": TWO["reference_images"]} | NEGATIVE,
        ours=TWO | {"true_cfg_scale": 30.0} | NEGATIVE,  # so strong that a tiny model reacts to the prompt
        guided_tasks=("text to image", "edit with two references", "inpainting with two references"),
    ),
    FamilyCheck(
        ModelFamily.zimage,
        tasks={
            "text to image": Ran({}, "text_to_image", "ZImagePipeline"),
            "image to image": Ran({"image": photo(), "strength": 0.5}, "image_to_image", "ZImageImg2ImgPipeline", 2),
            "inpainting": Ran(MASKED, "inpainting", "ZImageInpaintPipeline"),
            "ControlNet": Ran({"controlnets": [CANNY]}, "text_to_image", "ZImageControlNetPipeline"),
            "union ControlNet": Ran({"controlnets": [UNION]}, "text_to_image", "ZImageControlNetPipeline"),
            "ControlNet and inpainting": Ran(
                MASKED | {"controlnets": [CANNY]}, "inpainting", "ZImageControlNetInpaintPipeline"
            ),
        },
        refused=(
            FLOW_ONLY,
            ({"true_cfg_scale": 2.0}, "has no use for true_cfg_scale"),
            ({"prompt_2": "a dog"}, "has no use for prompt_2"),
            ({"clip_skip": 1}, "has no use for clip_skip"),
            ({"step_cache": {"method": "first_block"}}, "cannot use this method"),
            ({"step_cache": {"method": "deepcache"}}, "cannot use this method"),
            ({"seamless": "both"}, "has no use for seamless"),
            ({"guider": {"method": "apg"}}, "zimage has no apg"),
            ({"guider": {"method": "cfg_zero_star"}}, "zimage has no cfg_zero_star"),
            ({"acceleration": {"dtype": "bfloat16"}}, "computes only in the dtype of its weights"),
            ({"image": photo(), "controlnets": [CANNY]}, "no pipeline for single control with image_to_image"),
            ({"controlnets": [CANNY, UNION]}, "Z-Image takes 1 ControlNet at a time"),
            ({"controlnets": [UNION | {"control_mode": "prompt"}]}, "no control mode"),
            (MASKED | {"controlnets": [CANNY], "strength": 0.5}, "starts from noise only"),
            (MASKED | {"controlnets": [UNION]}, "not trained for inpainting: its control_in_dim is 16"),
        ),
        guidance={"guidance_scale": 9.0},
        unguided={"guidance_scale": 0.0},
        batch=NEGATIVE,
        theirs={"guidance_scale": 2.0} | NEGATIVE,
        ours=NEGATIVE,
        guided_tasks=("text to image", "ControlNet"),
        original_names=zimage_original_names,
        lora_ends=("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "adaLN_modulation.0", "all_x_embedder.2-1"),
        transformer="ZImageTransformer2DModel",
        file_title="a transformer of Z-Image",
        controlnets=True,
    ),
    FamilyCheck(
        ModelFamily.flux2,
        tasks={
            "text to image": Ran({}, "text_to_image", "Flux2KleinPipeline"),
            "edit": Ran({"reference_images": [photo()]}, "edit", "Flux2KleinPipeline"),
            "edit with two references": Ran(TWO, "edit", "Flux2KleinPipeline"),
            "edit with three references": Ran(THREE, "edit", "Flux2KleinPipeline"),
            "inpainting": Ran(MASKED | {"strength": 0.5}, "inpainting", "Flux2KleinInpaintPipeline", 2),
            "inpainting with a reference": Ran(MASKED | ONE, "inpainting", "Flux2KleinInpaintPipeline"),
        },
        refused=(
            FLOW_ONLY,
            (NEGATIVE, "flux2 has no use for negative_prompt"),
            (NEGATIVE, "say in the prompt what the image shows"),
            (
                {"image": photo(), "strength": 0.5},
                "flux2 is not offered for image_to_image; put it into reference_images",
            ),
            ({"strength": 0.5}, "put the image into reference_images"),
            ({"controlnets": [{"image": photo()}]}, "flux2 has no use for controlnets"),
            ({"seamless": "both"}, "has no use for seamless"),
            ({"guider": {"method": "apg"}}, "flux2 has no apg"),
            ({"guider": {"method": "cfg_zero_star"}}, "flux2 has no cfg_zero_star"),
            ({"true_cfg_scale": 2.0}, "flux2 has no use for true_cfg_scale"),
            ({"step_cache": {"method": "first_block"}}, "allowed: taylorseer"),
            ({"step_cache": {"method": "mag"}}, "allowed: taylorseer"),
            (
                {"reference_images": [photo()] * 5},
                "FLUX.2 Klein takes fewer reference images for edit; given '5 images'",
            ),
            ({"reference_images": [photo(), photo(40, 64)]}, "reference_images[1]: the image is too small"),
            ({"reference_images": [photo(640, 64)]}, "sides of at most 8 to 1"),
            (MASKED | TWO, "fewer reference images for inpainting; given '2 images'; allowed: at most 1"),
        ),
        guidance={"guidance_scale": 9.0},
        unguided={"guidance_scale": 1.0},
        theirs={"guidance_scale": 2.0},
        guided_tasks=("text to image", "edit with two references"),
        original_names=flux2_original_names,
        lora_ends=(
            *(*ATTENTION, "attn.to_out", "linear_in"),
            *("to_qkv_mlp_proj", "double_stream_modulation_img.linear", "norm_out.linear"),
        ),
        transformer="Flux2Transformer2DModel",
        file_title="a transformer of FLUX.2",
        changed_weights=norm_scales,
        gguf_architecture="flux",
    ),
    FamilyCheck(
        ModelFamily.flux2,
        kind=ModelKind.kv,
        tasks={
            "text to image": Ran({}, "text_to_image", "Flux2KleinKVPipeline"),
            "edit": Ran(ONE, "edit", "Flux2KleinKVPipeline"),
            "edit with two references": Ran(TWO, "edit", "Flux2KleinKVPipeline"),
            "edit with three references": Ran(THREE, "edit", "Flux2KleinKVPipeline"),
        },
        refused=(
            FLOW_ONLY,
            (NEGATIVE, "flux2 has no use for negative_prompt"),
            ({"guidance_scale": 4.0}, "flux2 of the kind kv has no guidance"),
            ({"step_cache": {"method": "taylorseer"}}, "flux2 of the kind kv takes no step cache"),
            (MASKED, "not offered for inpainting; put it into reference_images"),
            ({"reference_images": [photo()] * 5}, "fewer reference images for edit; given '5 images'"),
        ),
        guidance={},
        unguided={},
        theirs={"image": TWO["reference_images"]},
        ours=TWO,
        guided_tasks=(),
    ),
    FamilyCheck(
        ModelFamily.qwen,
        tasks={
            "text to image": Ran({}, "text_to_image", "QwenImagePipeline"),
            "image to image": Ran({"image": photo(), "strength": 0.5}, "image_to_image", "QwenImageImg2ImgPipeline", 2),
            "inpainting": Ran(MASKED, "inpainting", "QwenImageInpaintPipeline"),
            "ControlNet": Ran({"controlnets": [CANNY]}, "text_to_image", "QwenImageControlNetPipeline"),
            "two ControlNets": Ran({"controlnets": [CANNY, TILE]}, "text_to_image", "QwenImageControlNetPipeline"),
            "union ControlNet": Ran({"controlnets": [UNION]}, "text_to_image", "QwenImageControlNetPipeline"),
        },
        refused=(
            *QWEN_REFUSED,
            (ONE, "qwen has no use for reference_images"),
            ({"image": photo(), "controlnets": [CANNY]}, "no pipeline for single control with image_to_image"),
            ({"controlnets": [UNION | {"control_mode": "prompt"}]}, "no control mode"),
        ),
        guidance={"guidance_scale": 9.0} | NEGATIVE,
        unguided={"guidance_scale": 1.0},
        batch=NEGATIVE,
        theirs={"true_cfg_scale": 2.0} | NEGATIVE,
        ours=NEGATIVE,
        guided_tasks=("text to image", "ControlNet"),
        transformer="QwenImageTransformer2DModel",
        file_title="a transformer of Qwen-Image",
        gguf_architecture="qwen_image",
        controlnets=True,
        **QWEN_LORA,
    ),
    FamilyCheck(
        ModelFamily.qwen,
        kind=ModelKind.edit,
        tasks={"edit": Ran(ONE, "edit", "QwenImageEditPipeline")},
        refused=(
            *((ONE | fields, message) for fields, message in QWEN_REFUSED),
            ({}, "not offered for text_to_image; add reference_images; allowed: edit"),
            ({"image": photo()}, "not offered for image_to_image; put it into reference_images"),
            (TWO, "Qwen-Image takes fewer reference images for edit; given '2 images'; allowed: at most 1"),
            (ONE | {"controlnets": [{"image": photo()}]}, "this model takes no control maps"),
        ),
        guidance={"guidance_scale": 9.0} | NEGATIVE,
        unguided={"guidance_scale": 1.0},
        batch=NEGATIVE,
        theirs={"true_cfg_scale": 2.0, "image": ONE["reference_images"]} | NEGATIVE,
        ours=NEGATIVE | ONE,
        guided_tasks=("edit",),
    ),
    FamilyCheck(
        ModelFamily.qwen,
        kind=ModelKind.edit_plus,
        tasks={
            "edit": Ran(ONE, "edit", "QwenImageEditPlusPipeline"),
            "edit with two references": Ran(TWO, "edit", "QwenImageEditPlusPipeline"),
            "edit with three references": Ran(THREE, "edit", "QwenImageEditPlusPipeline"),
        },
        refused=(
            ({}, "not offered for text_to_image; add reference_images; allowed: edit"),
            ({"image": photo()}, "not offered for image_to_image; put it into reference_images"),
            ({"reference_images": [photo()] * 4}, "given '4 images'; allowed: at most 3"),
        ),
        guidance={"guidance_scale": 9.0} | NEGATIVE,
        unguided={"guidance_scale": 1.0},
        batch=NEGATIVE,
        theirs={"true_cfg_scale": 2.0, "image": TWO["reference_images"]} | NEGATIVE,
        ours=NEGATIVE | TWO,
        guided_tasks=("edit with two references",),
    ),
    FamilyCheck(
        ModelFamily.chroma,
        tasks={
            "text to image": Ran({}, "text_to_image", "ChromaPipeline"),
            "image to image": Ran({"image": photo(), "strength": 0.5}, "image_to_image", "ChromaImg2ImgPipeline", 2),
        },
        refused=(
            FLOW_ONLY,
            ({"true_cfg_scale": 2.0}, "chroma has no use for true_cfg_scale"),
            ({"true_cfg_scale": 2.0}, "set guidance_scale"),
            ({"prompt_2": "a dog"}, "has no use for prompt_2"),
            ({"clip_skip": 1}, "has no use for clip_skip"),
            ({"seamless": "both"}, "has no use for seamless"),
            ({"step_cache": {"method": "first_block"}}, "allowed: taylorseer"),
            ({"controlnets": [{"image": photo()}]}, "chroma has no use for controlnets"),
            (MASKED, "chroma is not offered for inpainting; leave mask_image out"),
            (ONE, "chroma has no use for reference_images"),
        ),
        guidance={"guidance_scale": 9.0} | NEGATIVE,
        unguided={"guidance_scale": 1.0},
        batch=NEGATIVE,
        theirs={"guidance_scale": 2.0} | NEGATIVE,
        ours=NEGATIVE,
        original_names=chroma_original_names,
        lora_ends=(*ATTENTION, "proj_mlp", "ff.net.2", "linear_1"),
        transformer="ChromaTransformer2DModel",
        file_title="a transformer of Chroma",
        changed_weights=norm_scales,
        gguf_architecture="flux",
    ),
]
NAMES = {check.name: check for check in CHECKS}
WITH_FILES = [name for name, check in NAMES.items() if check.transformer]
Serve = Callable[[FamilyCheck], DiffusionService]


@pytest.fixture(scope="module", autouse=True)
def small_references() -> Iterator[None]:
    "Scale reference images, where a model has its own sizes for them, to the small sizes of these tests."
    with family_checks.small_references():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FamilyCheck], Path]:
    "The model folder of a table row, written on first use."
    made: dict[str, Path] = {}

    def folder(check: FamilyCheck) -> Path:
        if check.name not in made:
            made[check.name] = tmp_path_factory.mktemp(check.name)
            write_models(made[check.name], check)
        return made[check.name]

    return folder


@pytest.fixture(scope="module")
def serve(folders: Callable[[FamilyCheck], Path]) -> Iterator[Serve]:
    "The service of a table row, started on first use."
    running: dict[str, DiffusionService] = {}
    with ExitStack() as stack:

        def service(check: FamilyCheck) -> DiffusionService:
            if check.name not in running:
                running[check.name] = stack.enter_context(serving(folders(check)))
            return running[check.name]

        yield service


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, check in NAMES.items() for task in check.tasks])
def test_tasks_run_and_batches_match_single_images(serve: Serve, name: str, task: str) -> None:
    "Also with as many images as references: each reference applies to all images, not to one of them."
    check, service = NAMES[name], serve(NAMES[name])
    ran = check.tasks[task]
    fields = dict(ran.fields) | check.batch
    plan = service.plan(**SMALL | {"model": name} | fields).plan
    assert (plan.task.value, plan.pipeline_class, plan.denoising_steps) == (ran.task, ran.class_name, ran.steps)
    together = check.pixels(service, seeds=[1, 2, 3], **fields)
    assert difference(*together[:2]) > ROUNDING
    for seed, image in zip((1, 2, 3), together):
        assert difference(check.pixels(service, seed=seed, **fields)[0], image) <= ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_queued_prompts_of_different_lengths_match_single_runs(serve: Serve, name: str) -> None:
    "Each image is the same as alone, and no list of the caller is modified."
    check, service = NAMES[name], serve(NAMES[name])
    prompts = ["a cat", "a dog in the rain, under a red umbrella, at night"]
    fields = dict(next(iter(check.tasks.values())).fields)
    requests = [
        SMALL | fields | {"model": name, "prompt": prompt, "seed": seed} | check.batch
        for seed, prompt in enumerate(prompts)
    ]
    alone = [check.pixels(service, **request)[0] for request in requests]
    handles = [service.submit(request) for request in requests]
    for handle, wanted in zip(handles, alone):
        assert difference(np.asarray(handle.result(timeout=120).image), wanted) <= ROUNDING
    if fields:
        return
    texts = {"prompt": list(prompts)}
    arguments = pipeline_arguments(service.plan(**SMALL, model=name).plan, [1, 2], Prepared(), texts)
    service.factory(service.manifest(name)).load()(**arguments | {"num_inference_steps": 1})
    assert texts == {"prompt": prompts}


@pytest.mark.parametrize("name", NAMES)
def test_images_match_diffusers(serve: Serve, name: str) -> None:
    check = NAMES[name]
    ours = check.pixels(serve(check), seed=6, height=64, **check.ours)[0]
    assert difference(ours, check.their_pixels(6)) <= ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_requested_sizes_are_kept(serve: Serve, name: str) -> None:
    "The requested size, with a warning if it is rounded; by default, the size of the input image."
    check, service = NAMES[name], serve(NAMES[name])
    first = next(iter(check.tasks.values())).fields
    draw = lambda **fields: service.generate(model=name, prompt="a", num_inference_steps=1, seed=1, **fields)
    rounded = draw(**first, width=88, height=64)
    assert ("width", "88", "96") in [(note.field, note.given, note.used) for note in rounded.warnings]
    assert rounded.image.size == (96, 64)
    for task, ran in check.tasks.items():
        if {"image", "mask_image"} & ran.fields.keys() and "controlnets" not in ran.fields:
            assert draw(**ran.fields | {"image": photo(96, 80)}).image.size == (96, 80), task
        if ran.task != "inpainting":
            assert draw(**ran.fields | {"width": 96, "height": 80}).image.size == (96, 80), task


@pytest.mark.parametrize(
    ("name", "index"), [(name, index) for name, check in NAMES.items() for index in range(len(check.refused))]
)
def test_unsupported_fields_are_refused(serve: Serve, name: str, index: int) -> None:
    fields, message = NAMES[name].refused[index]
    result = serve(NAMES[name]).generate(**SMALL | {"model": name} | fields)
    assert result.status != OpStatus.success and message in result.message + str(result.errors), result.message


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, c in NAMES.items() for task in c.guided_tasks])
def test_guidance_can_end_early(serve: Serve, name: str, task: str) -> None:
    "Without guidance in the later steps the image changes; guidance_end 1.0 equals the default, 0.0 no guidance."
    check, service = NAMES[name], serve(NAMES[name])
    guided = {"seed": 5, "height": 64} | dict(check.tasks[task].fields) | check.guidance
    ends = (1.0, 0.4, 0.0)
    whole, part, none = (check.pixels(service, acceleration={"guidance_end": end}, **guided)[0] for end in ends)
    plain, unguided = check.pixels(service, **guided)[0], check.pixels(service, **guided | check.unguided)[0]
    assert difference(whole, plain) == 0 and difference(part, plain) > 0
    assert difference(none, unguided) <= ROUNDING


@pytest.mark.parametrize("name", [name for name, check in NAMES.items() if check.controlnets])
def test_controlnets_change_the_image_and_leave_no_state(serve: Serve, name: str) -> None:
    "Scale 0, an empty step window and a black mask give the plain image; a white mask equals no mask."
    check, service = NAMES[name], serve(NAMES[name])
    plain, full = check.pixels(service, seed=3)[0], check.pixels(service, seed=3, controlnets=[CANNY])[0]
    assert difference(full, plain) > ROUNDING
    black, white = (Image.new("L", (64, 64), level) for level in (0, 255))
    draw = lambda **changes: check.pixels(service, seed=3, controlnets=[CANNY | changes])[0]
    assert difference(draw(conditioning_scale=0), plain) == 0
    assert difference(draw(guidance_start=0.4, guidance_end=0.5), plain) == 0
    assert difference(draw(mask_image=black), plain) == 0
    assert difference(draw(mask_image=white), full) == 0
    assert difference(draw(guidance_end=0.4), full) > 0 and difference(draw(guidance_end=0.4), plain) > 0
    assert difference(check.pixels(service, seed=3)[0], plain) == 0


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name, check in NAMES.items()
        for layout in LORA_LAYOUTS
        if check.lora_ends and layout not in check.no_layouts
    ],
)
def test_lora_deltas_are_the_same_in_every_layout(serve: Serve, tmp_path: Path, name: str, layout: str) -> None:
    "The delta of each layer is B A of its file, to fp32 rounding, and no layer of the file is left out."
    check, service = NAMES[name], serve(NAMES[name])
    pipe = service.factory(service.manifest(name)).load()
    matrices, (write, renamed) = lora_matrices(pipe.transformer, check.lora_ends), LORA_LAYOUTS[layout]
    written = matrices
    if renamed:
        written = in_original_names(
            matrices, check.original_names(pipe.transformer, list(module_shapes(pipe.transformer)))
        )
    save_file(write(written), tmp_path / "lora.safetensors")
    added = added_by(tmp_path / "lora.safetensors", pipe, [check.family, *([None] if check.lora_untold else [])])
    assert added.keys() == matrices.keys()
    for path, (down, up) in matrices.items():
        torch.testing.assert_close(added[path], up @ down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, check in NAMES.items() if check.lora_ends])
def test_lora_images_match_diffusers(serve: Serve, folders: Callable[[FamilyCheck], Path], name: str) -> None:
    check, service = NAMES[name], serve(NAMES[name])
    pipe = quiet_pipeline(check.family, check.kind)
    tensors = peft("transformer.")(lora_matrices(pipe.transformer, check.lora_ends))
    save_file(tensors, folders(check) / "loras" / "own.safetensors")
    request = {"seed": 6, "height": 64} | check.ours
    ours = check.pixels(service, loras=[{"name": "own.safetensors", "scale": 0.8}], **request)[0]
    assert difference(ours, check.pixels(service, **request)[0]) > ROUNDING
    with quiet_libraries():
        pipe.load_lora_weights(tensors, adapter_name="a")
        pipe.set_adapters("a", 0.8)
        theirs = check.their_pixels(6, pipe)
    assert difference(ours, theirs) <= ROUNDING


@pytest.mark.parametrize("file", ["original", "prefixed", "own"])
@pytest.mark.parametrize("name", WITH_FILES)
def test_single_files_give_the_same_image(
    serve: Serve, folders: Callable[[FamilyCheck], Path], name: str, file: str
) -> None:
    check, service = NAMES[name], serve(NAMES[name])
    assert identify(read_header(folders(check) / f"{file}.safetensors")).what == check.file_title
    ours, plain = (check.pixels(service, seed=1, model=model)[0] for model in (f"file-{file}", name))
    assert difference(ours, plain) <= ROUNDING  # equal weights in another memory layout round differently on some CPUs


@pytest.mark.parametrize("name", WITH_FILES)
def test_gguf_files_give_nearly_the_same_image(serve: Serve, name: str) -> None:
    check, service = NAMES[name], serve(NAMES[name])
    ours, plain = (check.pixels(service, seed=1, model=model)[0] for model in ("file-packed", name))
    assert 0 < np.abs(ours - plain).mean() < 4  # eight bits per weight


@pytest.mark.parametrize(("name", "task"), [(name, task) for name, check in NAMES.items() for task in check.tasks])
def test_every_task_runs_in_bfloat16(serve: Serve, name: str, task: str) -> None:
    check = NAMES[name]
    check.pixels(serve(check), model="half", seed=1, **check.tasks[task].fields)


@pytest.mark.parametrize("name", NAMES)
def test_step_latents_decode_to_the_image(serve: Serve, name: str) -> None:
    "Previews are decoded from the same latents."
    seen, service = [], serve(NAMES[name])
    fields = next(iter(NAMES[name].tasks.values())).fields
    result = service.generate(**SMALL | fields, height=64, model=name, seed=1, on_step=seen.append)
    assert seen[-1].latents.ndim == 4 and seen[-1].latents.shape[2:] == (8, 8)
    assert difference(np.asarray(seen[-1].decode()[0]), np.asarray(result.image)) <= ROUNDING
