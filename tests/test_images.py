"""Images and numbers as Python and other programs give them, through `service.generate` on a built-in model."""

import base64
import io
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffusion_workers.planning.inputs import as_request
from diffusion_workers.request.images import to_srgb
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ErrorCode, GenerationRequest, OpResult

SIZE = 128
SRGB = ImageCms.createProfile("sRGB")
FEW = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    with DiffusionService(device="cpu") as made:
        yield made


def wide_profile() -> bytes:
    "An sRGB profile with the primaries of Display P3."
    data = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for place in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12):
        tag, start, _ = struct.unpack(">4sII", data[place : place + 12])
        if tag in primaries:
            data[start + 8 : start + 20] = struct.pack(">3i", *(round(value * 65536) for value in primaries[tag]))
    return bytes(data)


def colours() -> Image.Image:
    "Smooth saturated colours."
    ramp = np.linspace(30, 225, SIZE).astype(np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1))


def opened(result: OpResult) -> Image.Image:
    "The file of the first image."
    assert result.ok, result.message
    return Image.open(io.BytesIO(base64.b64decode(result.generation.images[0].image)))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_display_p3_photo_is_converted_and_the_result_carries_no_profile(
    service: DiffusionService, kind: str
) -> None:
    profile, buffer = wide_profile(), io.BytesIO()
    stored = ImageCms.profileToProfile(colours(), SRGB, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    stored.save(buffer, "PNG", icc_profile=profile)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, 40, 40))
    result = service.generate(**FEW, image=buffer.getvalue(), mask_image=mask, output={"format": kind, "quality": 100})
    assert "icc_profile" not in opened(result).info
    outside = np.abs(np.asarray(opened(result).convert("RGB"), int) - np.asarray(colours(), int))[60:, 60:]
    assert outside.max() <= 2
    assert any("converted to sRGB" in note.message for note in result.warnings)


def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_left_out(service: DiffusionService) -> None:
    texts = {}
    for name, profile in {"none": None, "own": ImageCms.ImageCmsProfile(SRGB).tobytes(), "broken": b"?" * 200}.items():
        buffer = io.BytesIO()
        colours().save(buffer, "PNG", icc_profile=profile)
        planned = service.plan(**FEW, image=buffer.getvalue())
        texts[name] = (planned.plan.image.sha256, " ".join(note.message for note in planned.warnings or []))
    assert texts["own"] == texts["none"]
    assert texts["broken"][0] == texts["none"][0] and "not applied" in texts["broken"][1]


def test_cmyk_and_gray_profiles(service: DiffusionService) -> None:
    gray = bytearray(ImageCms.ImageCmsProfile(SRGB).tobytes())
    for image in (colours().convert("CMYK"), colours().convert("L")):
        buffer = io.BytesIO()
        image.save(buffer, "TIFF", icc_profile=bytes(gray))
        planned = service.plan(**FEW, image=buffer.getvalue())
        assert planned.ok and planned.plan.image.width == SIZE
    kept, note = to_srgb(colours().convert("CMYK"), bytes(gray))
    assert kept.mode == "CMYK" and "not applied" in note  # a profile for RGB


def test_gray_images_of_more_than_eight_bits_are_read_as_what_they_show(service: DiffusionService) -> None:
    ramp = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE)
    forms = [
        Image.fromarray(ramp.astype(np.uint16)),
        Image.fromarray(ramp.astype(np.int32)),
        Image.fromarray((ramp / 65535).astype(np.float32)),
    ]
    for form in forms:
        decoded = service.prepare(request_of(image=form)).inputs.image.image
        assert np.abs(np.asarray(decoded, int)[..., 0] - ramp / 257).max() <= 1
        assert service.plan(**FEW, image=form).ok
    refused = service.plan(**FEW, image=Image.fromarray((ramp * 2).astype(np.int32))).errors[0]
    assert (refused.code, refused.field) == (ErrorCode.image_format_not_supported, "image")
    assert "131070" in refused.given


def request_of(**fields) -> GenerationRequest:
    "A validated request."
    return as_request(FEW, fields)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((0, 0, 3), np.uint8), "has no pixels"),
        (np.zeros((3, 64, 64), np.uint8), "move the channels last"),
        (np.zeros((1, 64, 64), np.uint8), "move the channels last"),
        (np.zeros((2, 64, 64, 3), np.uint8), "give (H, W)"),
        (np.full((64, 64), np.nan), "nan"),
        (np.full((64, 64), 300, np.int64), "ambiguous"),
        (Image.new("RGB", (0, 0)), "has no pixels"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(service: DiffusionService, array, reason: str) -> None:
    error = service.generate(**FEW, image=array).errors[0]
    assert (error.code, error.field) == (ErrorCode.wrong_type, "image") and reason in error.message


def test_numbers_of_numpy_and_torch_are_numbers(service: DiffusionService) -> None:
    plain = service.generate(prompt="a red circle", seed=3, width=128, guidance_scale=3.0, num_inference_steps=2)
    numbers = {"seed": np.int64(3), "width": np.int32(128), "guidance_scale": np.float32(3)}
    made = service.generate(prompt="a red circle", num_inference_steps=torch.tensor(2), **numbers)
    assert made.ok and made.image.tobytes() == plain.image.tobytes()
    assert service.plan(prompt="a", seeds=np.arange(2)).plan.seeds == [0, 1]
    assert service.plan(prompt="a", width=np.float64(128)).errors[0].field == "width"
    assert service.plan({"prompt": "a", "seed": np.uint8(7)}).plan.seeds == [7]


def test_seed_minus_one_draws_a_seed_that_the_plan_names(service: DiffusionService) -> None:
    made = [service.plan(prompt="a", seed=-1, num_images=2).plan.seeds for _ in range(2)]
    assert made[0] != made[1] and all(seeds[1] == seeds[0] + 1 and seeds[0] >= 0 for seeds in made)
    result = service.generate(**FEW | {"seed": -1})
    assert result.ok and result.generation.images[0].seed == result.generation.plan.seeds[0] >= 0
    assert service.plan(prompt="a", seed=-2).errors[0].code == ErrorCode.out_of_range
    assert service.plan(prompt="a", seeds=[-1]).errors[0].code == ErrorCode.out_of_range
