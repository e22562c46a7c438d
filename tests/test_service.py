"""Integration tests of the service with tiny models: options have an effect, and only on their own request."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.planning.plan import request_from_plan
from diffusion_workers.service.render import largest_difference
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import ModelKind, OpResult

PROMPT = "a red circle"
FAMILIES = ("sd15", "sdxl", "flux")


def scene() -> Image.Image:
    "A red disc and a green rectangle on white."
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((12, 40, 60, 88), fill="red")
    draw.rectangle((76, 40, 116, 88), fill="green")
    return image


def half() -> Image.Image:
    "A mask of the left half."
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    return mask


CANNY = {"model": "canny", "image": scene(), "preprocessing": {"name": "canny"}, "return_map": True}
TILE = {"model": "tile", "image": scene()}
UNION = {"model": "all", "image": scene(), "union_mode": "depth"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionService]:
    "Tiny models of three families, SDXL with refiners, and the Fill and Control models of Flux."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, "sd15")
    write_tiny_model(folder, "sdxl", changes={"refiner": {"source": {"folder": "sdxl"}}})
    write_tiny_model(folder, "sdxl", "refiner", seed=1)
    write_tiny_model(folder, "sdxl", "other", changes={"refiner": {"source": {"folder": "refiner"}}})
    write_tiny_model(folder, "flux")
    write_tiny_model(folder, "flux", "fill", ModelKind.fill)
    write_tiny_model(folder, "flux", "edges", ModelKind.control, changes={"control_preprocessors": ["canny"]})
    with DiffusionService(Settings(model_folders=(folder,)), device="cpu", log_failures=False) as service:
        yield service


@pytest.fixture(scope="module")
def shapes() -> Iterator[DiffusionService]:
    "The built-in model."
    with DiffusionService(device="cpu", log_failures=False) as service:
        yield service


def made(service: DiffusionService, **fields: Any) -> OpResult:
    "Run a request, which must succeed, and return its result."
    asked = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 1, "width": 64, "height": 64} | fields
    result = service.generate(**asked)
    assert result.ok, result.message
    return result


def pixels(service: DiffusionService, **fields: Any) -> bytes:
    "The pixels of the first image of a request."
    return made(service, **fields).image.tobytes()


OPTIONS: dict[str, tuple[dict, ...]] = {
    "sd15": ({"clip_skip": 1}, {"negative_prompt": "a dog"}),
    "sdxl": (
        {"prompt_2": "a dog"},
        {"size_conditioning": {"original_width": 32, "original_height": 32}},
        {"size_conditioning": {"crop_left": 16}},
        {"clip_skip": 1},
        {"negative_prompt_2": "a dog"},
    ),
    "flux": (
        {"prompt_2": "a dog"},
        {"true_cfg_scale": 3.0, "negative_prompt": "a dog"},
        {"true_cfg_scale": 3.0, "negative_prompt_2": "a dog"},
        {"guidance_scale": 7.0},
        {"max_sequence_length": 4},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_options_affect_only_their_own_request(tiny: DiffusionService, family: str) -> None:
    plain = pixels(tiny, model=family)
    for change in OPTIONS[family]:
        assert pixels(tiny, model=family, **change) != plain, change
    assert pixels(tiny, model=family) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_controlnets_work_with_every_task(tiny: DiffusionService, family: str) -> None:
    "One and two units in text to image, image to image and inpainting; maps are returned on request."
    two = TILE if family == "sd15" else UNION
    for images in ({}, {"image": scene()}, {"image": scene(), "mask_image": half()}):
        for units in ([CANNY], [two, two | {"guidance_end": 0.5}]):
            result = made(tiny, model=family, num_images=2, controlnets=units, **images)
            assert len(result.images) == 2
            assert [m.unit for m in result.generation.control_maps or []] == ([0] if units == [CANNY] else [])


def test_refiner_with_base_weights_matches_the_base_image(tiny: DiffusionService) -> None:
    half_way = {"refiner": {"switch_at": 0.5}, "num_inference_steps": 4}
    plain = pixels(tiny, model="sdxl", num_inference_steps=4)
    assert pixels(tiny, model="sdxl", **half_way) == plain
    assert pixels(tiny, model="other", **half_way) != pixels(tiny, model="other", num_inference_steps=4)


def test_inpainting_controlnet_uses_its_mask(tiny: DiffusionService) -> None:
    hole = {"model": "canny", "image": scene(), "preprocessing": {"name": "inpaint_mask"}}
    masks = (half(), half().rotate(180))
    first, second = (pixels(tiny, model="sd15", controlnets=[hole | {"mask_image": mask}]) for mask in masks)
    assert first != second


def test_flux_fill_and_control_models(tiny: DiffusionService) -> None:
    assert pixels(tiny, model="fill", image=scene(), mask_image=half())
    unit = {"image": scene(), "preprocessing": {"name": "canny"}}
    images: tuple[dict, ...] = ({}, {"image": scene()}, {"image": scene(), "mask_image": half()})
    drawn = [pixels(tiny, model="edges", controlnets=[unit], **given) for given in images]
    assert len(set(drawn)) == 3
    assert pixels(tiny, model="edges", controlnets=[{"image": half()}]) != drawn[0]
    assert "needs a control map" in tiny.plan(prompt="a", model="edges").message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"controlnets": [CANNY | {"model": "nope"}]}, "controlnets[0].model"),
        ({"controlnets": [CANNY | {"image": "???"}]}, "controlnets[0].image"),
        ({"controlnets": [{"model": "canny"}]}, "controlnets[0].image"),
        ({"controlnets": [CANNY | {"conditioning_scale": -1}]}, "controlnets[0].conditioning_scale"),
        ({"loras": [{"name": "nope"}]}, "loras[0].name"),
        ({"loras": [{"name": "a"}] * 50}, "loras"),
    ],
)
def test_errors_in_lists_name_the_entry(tiny: DiffusionService, fields: dict, field: str) -> None:
    result = tiny.plan(prompt="a", model="sdxl", **fields)
    assert not result.ok and result.errors[0].field == field


def test_small_memory_budget_keeps_one_model_loaded(tmp_path: Path) -> None:
    names = ("tiny-sd15", "tiny-sdxl")
    for family, name in zip(FAMILIES, names, strict=False):
        write_tiny_model(tmp_path, family, name)
    small = {"num_inference_steps": 1, "width": 64, "height": 64}
    with DiffusionService(Settings(model_folders=(tmp_path,), memory_budget=1), device="cpu") as service:
        for name in (*names, names[0]):
            assert made(service, model=name, num_inference_steps=1).ok
            assert service.health().loaded_models == [name]
        waiting = [service.submit("a", model=name, **small) for name in names]
        assert all(job.result().ok for job in waiting)
    with DiffusionService(Settings(model_folders=(tmp_path,)), device="cpu") as service:
        for name in names:
            made(service, model=name, num_inference_steps=1)
        assert set(service.health().loaded_models) == set(names)


# --- images -------------------------------------------------------------------


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    "Encode an image as a file in memory."
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(image: Image.Image) -> bytes:
    "A JPEG with an EXIF orientation."
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(image, "JPEG", exif=exif)


def sixteen_bits(image: Image.Image) -> bytes:
    "A 16-bit grayscale image."
    return file_of(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257))


UNUSUAL: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "CMYK": (lambda image: file_of(image.convert("CMYK"), "TIFF"), "converted from CMYK"),
    "palette, transparent": (lambda image: file_of(image.quantize(8), transparency=0), "laid over white"),
    "gray with alpha": (lambda image: file_of(image.convert("LA")), "repeated in three channels"),
    "16 bits": (sixteen_bits, "scaled to 8 bits"),
    "rotated": (rotated, "turned upright"),
    "animated": (lambda image: file_of(image, "GIF", save_all=True, append_images=[half()]), "only the first frame"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_accepted_with_a_warning(shapes: DiffusionService, name: str) -> None:
    write, said = UNUSUAL[name]
    result = made(shapes, image=write(scene()), strength=0.5)
    assert any(said in note.message for note in result.warnings)


def test_image_as_path_bytes_pil_or_array_is_equivalent(shapes: DiffusionService, tmp_path: Path) -> None:
    path = tmp_path / "start.png"
    scene().save(path)
    ways = [path, path.read_bytes(), scene(), np.asarray(scene())]
    assert len({pixels(shapes, image=way) for way in ways}) == 1
    wrong = (7, np.zeros(3, dtype=int), Path("nowhere.png"))
    codes = [shapes.plan(prompt="a", image=way).errors[0].code.value for way in wrong]
    assert codes == ["wrong_type", "wrong_type", "not_an_image"]


def test_inverted_mask_with_invert_selects_the_same_region(shapes: DiffusionService) -> None:
    small = Image.new("L", (128, 128))
    small.paste(255, (64, 32, 124, 96))
    region = {"image": scene(), "width": 128, "height": 128}
    inpaint = {"only_masked": True, "padding": 0, "mask_blur": 2}
    plain = pixels(shapes, mask_image=small, inpaint=inpaint, **region)
    inverse = Image.eval(small, lambda value: 255 - value)
    assert pixels(shapes, mask_image=inverse, inpaint=inpaint | {"invert": True}, **region) == plain


# --- memory and speed ---------------------------------------------------------


def test_out_of_memory_is_retried_with_memory_savings(shapes: DiffusionService) -> None:
    "The next request starts with the savings that worked; if none suffices, the status is `out_of_memory`."

    def small_device(module: torch.nn.Module, inputs: tuple) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    def no_device(module: torch.nn.Module, inputs: tuple) -> None:
        raise torch.OutOfMemoryError("always")

    ask = {"num_images": 3, "num_inference_steps": 3}
    exact = made(shapes, **ask)
    with DiffusionService(device="cpu", log_failures=False) as tight:
        first_layer = tight.factory(tight.manifest()).load().unet.conv_in
        hook = first_layer.register_forward_pre_hook(small_device)
        result = made(tight, **ask)
        assert any("images were made one at a time" in note.message for note in result.warnings)
        assert result.generation.plan.memory.batch_size == 1
        assert len(tight.executor.fallbacks.taken["shapes-sd15"]) == 2
        assert all(largest_difference(a, b) <= 2 for a, b in zip(result.images, exact.images, strict=True))
        again = made(tight, **ask)
        assert [a.tobytes() for a in again.images] == [a.tobytes() for a in result.images]
        hook.remove()
        hook = first_layer.register_forward_pre_hook(no_device)
        result = tight.generate("a", num_inference_steps=1)
        hook.remove()  # the service shares the built-in weights
        assert result.status.value == "out_of_memory"


ACCELERATED: tuple[dict, ...] = (
    {"profile": "fast"},
    {"step_cache": {"method": "deepcache", "interval": 2}},
    {"acceleration": {"dtype": "bfloat16"}},
)


def test_acceleration_affects_only_its_request_and_is_replayed(shapes: DiffusionService) -> None:
    usual = {"num_inference_steps": 4}
    plain = pixels(shapes, **usual)
    for fields in ACCELERATED:
        quick = made(shapes, **usual, **fields)
        assert pixels(shapes, **usual) == plain
        replayed = shapes.generate(request_from_plan(quick.generation.plan))
        assert replayed.image.tobytes() == quick.image.tobytes()
    assert shapes.plan(prompt="a", profile="swift").errors[0].field == "profile"
    result = shapes.generate("a", num_inference_steps=4, step_cache={"method": "deepcache", "branch": 2})
    assert result.errors[0].field == "step_cache.branch"


@pytest.mark.parametrize("method", ["preprocess", "restore"])
def test_failed_calls_raise_with_raise_errors(method: str) -> None:
    from ez_diffusion_client.errors import RequestFailed

    given = {"restore": (3,), "preprocess": ()}[method]
    with DiffusionService(device="cpu", raise_errors=True) as strict, pytest.raises(RequestFailed):
        getattr(strict, method)(*given)
