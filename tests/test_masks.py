"""Inpainting masks on the built-in models: thin strokes, faint masks, alpha channels, empty prompts."""

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from diffusion_workers.planning.inputs import as_request
from diffusion_workers.request.masks import cover_cells
from diffusion_workers.service.preparation import prepare_inputs
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ErrorCode, GenerationRequest, OpResult

SIZE = 128


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    with DiffusionService(device="cpu") as made:
        yield made


def photo() -> Image.Image:
    "Random noise, so that every change shows."
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(40, 215, (SIZE, SIZE, 3), dtype=np.uint8))


def box(*corners: int, value: int = 255) -> Image.Image:
    "A mask with a painted rectangle."
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(value, corners)
    return mask


def paint(service: DiffusionService, mask, seed: int = 1, **fields) -> OpResult:
    "Inpaint with hard edges, in few steps."
    options = {"prompt": "a blue square", "num_inference_steps": 2, "inpaint": {"mask_blur": 0}} | fields
    return service.generate(image=photo(), mask_image=mask, seed=seed, **options)


def moved(result: OpResult, other: OpResult | Image.Image) -> np.ndarray:
    "The largest channel difference of two images at each pixel."
    assert result.ok, result.message
    image = other if isinstance(other, Image.Image) else other.image
    return np.abs(np.asarray(result.image, int) - np.asarray(image, int)).max(axis=-1)


def told(result: OpResult) -> str:
    "The warnings of a result as one text."
    return " ".join(f"{note.field}: {note.message}" for note in result.warnings or [])


# --- thin strokes ------------------------------------------------------------


@pytest.mark.parametrize("model", ["shapes-sd15", "shapes-sdxl", "shapes-flux"])
def test_strokes_missing_a_cells_first_pixel_are_inpainted(service: DiffusionService, model: str) -> None:
    stroke = box(57, 16, 64, 112)
    first, second = (paint(service, stroke, seed, model=model) for seed in (1, 2))
    inside = np.asarray(stroke) > 0
    assert moved(first, second)[inside].mean() > 5, "two seeds draw the same: it was not painted"
    assert moved(first, photo())[~inside].max() == 0
    filled = paint(service, cover_cells(stroke), 1, model=model)
    assert moved(first, filled)[inside].max() == 0  # the same latents are regenerated


def test_strokes_are_inpainted_with_controlnet_or_only_masked(service: DiffusionService) -> None:
    stroke = box(57, 41, 64, 88)
    inside = np.asarray(stroke) > 0
    unit = {"model": "canny", "image": photo(), "preprocessing": {"name": "canny"}}
    for fields in ({"controlnets": [unit]}, {"inpaint": {"mask_blur": 0, "only_masked": True, "padding": 4}}):
        first, second = (paint(service, stroke, seed, **fields) for seed in (1, 2))
        assert moved(first, second)[inside].mean() > 5, fields
        assert moved(first, photo())[~inside].max() == 0


def test_thin_strokes_survive_mask_downscaling(service: DiffusionService) -> None:
    large = Image.new("L", (SIZE * 4, SIZE * 4))
    large.paste(255, (201, 100, 202, 400))  # one pixel wide, a quarter of a pixel at the generation's size
    assert "fainter" not in told(paint(service, large))
    made = service.prepare(service_request(large))
    used = np.asarray(prepare_inputs(made.plan, made.inputs).mask)
    assert (used[25:100, 50] == 255).all()


def service_request(mask: Image.Image | np.ndarray) -> GenerationRequest:
    "An inpainting request like that of `paint`."
    fields = {"prompt": "a", "image": photo(), "mask_image": mask, "seed": 1, "inpaint": {"mask_blur": 0}}
    return as_request(fields, {})


# --- faint masks -------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 100, 127])
def test_a_faint_mask_is_refused_with_its_brightness(service: DiffusionService, value: int) -> None:
    mask = box(32, 32, 96, 96, value=value)
    mask.putpixel((0, 0), 2)  # so that it is not read as a mask of zeros and ones
    result = paint(service, mask)
    assert [(error.code, error.field) for error in result.errors] == [(ErrorCode.out_of_range, "mask_image")]
    assert f"brightest value is {max(value, 2)} of 255" in result.errors[0].given and "128" in result.errors[0].allowed
    assert service.plan(service_request(mask)).errors[0].code == ErrorCode.out_of_range


def test_a_faint_stroke_and_an_empty_mask_are_refused(service: DiffusionService) -> None:
    stroke = Image.new("RGBA", (SIZE, SIZE))
    stroke.paste((255, 45, 85, 120), (32, 32, 96, 96))
    assert "120 of 255" in paint(service, stroke).errors[0].given
    assert paint(service, Image.new("L", (SIZE, SIZE))).errors[0].message == "nothing is masked"
    assert paint(service, Image.new("L", (SIZE, SIZE), 255), inpaint={"invert": True}).errors[0].field == "mask_image"


def test_partly_faint_masks_produce_a_warning(service: DiffusionService) -> None:
    mask = box(0, 0, 64, SIZE)
    mask.paste(90, (96, 0, SIZE, SIZE))
    assert "33% of the masked area is fainter than 128" in told(paint(service, mask))
    assert "fainter" not in told(paint(service, box(0, 0, 64, SIZE), inpaint={"mask_blur": 4}))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool, np.float32, np.uint16])
def test_arrays_of_zeros_and_ones_are_binary_masks(service: DiffusionService, dtype: type) -> None:
    mask = box(32, 32, 96, 96)
    result = service.prepare(service_request((np.asarray(mask) // 255).astype(dtype)))
    assert result.inputs.mask_image.image.tobytes() == mask.tobytes()


# --- alpha -------------------------------------------------------------------


def test_erased_areas_and_painted_strokes_are_inpainted(service: DiffusionService) -> None:
    hole = box(32, 32, 96, 96)
    alpha = hole.point(lambda value: 255 - value)
    erased, sheet, strokes = (
        photo().convert("RGBA"),
        Image.new("RGBA", hole.size, "white"),
        Image.new("RGBA", hole.size),
    )
    erased.putalpha(alpha)
    sheet.putalpha(alpha)
    strokes.paste((255, 45, 85, 255), (32, 32, 96, 96))
    plain = paint(service, hole)
    for mask in (erased, sheet, strokes):
        result = paint(service, mask)
        assert moved(result, plain).max() == 0
        assert "repainted" in told(result)
    assert moved(plain, photo())[np.asarray(hole) == 0].max() == 0


def test_transparent_control_maps_are_composited_over_black(service: DiffusionService) -> None:
    lines = Image.new("RGBA", (SIZE, SIZE))
    lines.paste((255, 255, 255, 255), (30, 30, 98, 33))
    options = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}
    on_black = Image.new("RGB", lines.size)
    on_black.paste(lines, mask=lines)
    bare, opaque = (
        service.generate(**options, controlnets=[{"model": "canny", "image": image}]) for image in (lines, on_black)
    )
    assert moved(bare, opaque).max() == 0
    assert "controlnets[0].image: transparent parts are laid over black" in told(bare)
    black = Image.new("RGBA", (SIZE, SIZE))
    black.paste((0, 0, 0, 255), (30, 30, 98, 33))
    assert "nothing is left" in told(service.plan(**options, controlnets=[{"model": "canny", "image": black}]))


def test_empty_prompts_require_a_mask_or_control_mode_control(service: DiffusionService) -> None:
    assert paint(service, box(32, 32, 96, 96), prompt="").ok
    unit = {"model": "canny", "image": photo(), "preprocessing": {"name": "canny"}}
    ask = {"prompt": "", "seed": 1, "num_inference_steps": 2}
    assert service.generate(**ask, controlnets=[unit | {"control_mode": "control"}]).ok
    for fields in ({}, {"image": photo()}, {"controlnets": [unit]}):
        assert service.generate(**ask, **fields).errors[0].code == ErrorCode.empty_prompt, fields
