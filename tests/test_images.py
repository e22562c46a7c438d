"""Color profiles, bit depths, arrays, NumPy and PyTorch numbers and seeds as inputs of `DiffusionService`."""

import base64
import io
import random
import struct
from collections.abc import Iterator

import hostile_bodies
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffusion_workers.models.store import load_manifests
from diffusion_workers.planning.inputs import as_request, plan_request
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


def colors() -> Image.Image:
    "Smooth saturated colors."
    ramp = np.linspace(30, 225, SIZE).astype(np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1))


def opened(result: OpResult) -> Image.Image:
    "The file of the first image."
    assert result.ok, result.message
    return Image.open(io.BytesIO(base64.b64decode(result.generation.images[0].image)))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_display_p3_is_converted_to_srgb_without_output_profile(service: DiffusionService, kind: str) -> None:
    profile, buffer = wide_profile(), io.BytesIO()
    stored = ImageCms.profileToProfile(colors(), SRGB, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    stored.save(buffer, "PNG", icc_profile=profile)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, 40, 40))
    result = service.generate(**FEW, image=buffer.getvalue(), mask_image=mask, output={"format": kind, "quality": 100})
    assert "icc_profile" not in opened(result).info
    outside = np.abs(np.asarray(opened(result).convert("RGB"), int) - np.asarray(colors(), int))[60:, 60:]
    assert outside.max() <= 2
    assert any("converted to sRGB" in note.message for note in result.warnings)


def test_srgb_and_broken_profiles_do_not_change_the_image(service: DiffusionService) -> None:
    texts = {}
    for name, profile in {"none": None, "own": ImageCms.ImageCmsProfile(SRGB).tobytes(), "broken": b"?" * 200}.items():
        buffer = io.BytesIO()
        colors().save(buffer, "PNG", icc_profile=profile)
        planned = service.plan(**FEW, image=buffer.getvalue())
        texts[name] = (planned.plan.image.sha256, " ".join(note.message for note in planned.warnings or []))
    assert texts["own"] == texts["none"]
    assert texts["broken"][0] == texts["none"][0] and "not applied" in texts["broken"][1]


def profile_of(space: bytes, connection: bytes, tags: dict[bytes, bytes], device: bytes) -> bytes:
    "A hand-built ICC v4 profile: Pillow creates none for gray or CMYK."
    name = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 8, 28) + "Test".encode("utf-16-be")
    white = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1, 0.8249)))
    tags = {b"desc": name, b"cprt": name, b"wtpt": b"XYZ " + bytes(4) + white} | tags
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x04300000, device, space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def gray_profile() -> bytes:
    "A gray profile of linear light (gamma 1)."
    return profile_of(b"GRAY", b"XYZ ", {b"kTRC": b"curv" + bytes(4) + struct.pack(">IHH", 1, 256, 0)}, b"mntr")


def cmyk_profile() -> bytes:
    "A CMYK profile in which only black ink prints, from white paper to black; the other three inks have no effect."
    straight = bytes(range(256))
    corners = b"".join(bytes([0 if index & 1 else 255, 128, 128]) for index in range(16))  # Lab; black varies fastest
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + straight * 4 + corners + straight * 3
    return profile_of(b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table}, b"prtr")


def decoded_of(image: Image.Image, kind: str, profile: bytes) -> tuple[tuple[int, int, int], str]:
    "The pixel at (64, 0) of a file after decoding for a request, and the warnings."
    buffer = io.BytesIO()
    image.save(buffer, kind, icc_profile=profile)
    planned = plan_request(request_of(image=buffer.getvalue()), load_manifests().find())
    return planned.inputs.image.image.getpixel((64, 0)), " ".join(w.message for w in planned.plan.warnings or [])


def test_gray_and_cmyk_profiles_are_applied() -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1)))
    expected = round(255 * (1.055 * (64 / 255) ** (1 / 2.4) - 0.055))  # the curve of sRGB
    for image in (ramp, ramp.convert("LA")):
        pixel, said = decoded_of(image, "PNG", gray_profile())
        assert pixel == (expected,) * 3 and "converted to sRGB from the color profile Test" in said
    inks = Image.merge("CMYK", [Image.new("L", ramp.size, 255), *[Image.new("L", ramp.size)] * 2, ramp])
    pixel, said = decoded_of(inks, "TIFF", cmyk_profile())
    assert np.ptp(pixel) <= 3 and 150 < pixel[0] < 220 and "converted to sRGB" in said  # gray: cyan does not print


def test_profiles_for_another_color_mode_are_not_applied() -> None:
    for image, profile in ((colors(), gray_profile()), (colors().convert("CMYK"), wide_profile())):
        assert "not applied" in decoded_of(image, "TIFF", profile)[1]


def test_high_bit_depth_grayscale_is_scaled_to_8_bits(service: DiffusionService) -> None:
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
def test_invalid_arrays_and_images_are_refused_with_a_reason(service: DiffusionService, array, reason: str) -> None:
    error = service.generate(**FEW, image=array).errors[0]
    assert (error.code, error.field) == (ErrorCode.wrong_type, "image") and reason in error.message


def test_numpy_and_torch_numbers_are_accepted(service: DiffusionService) -> None:
    plain = service.generate(prompt="a red circle", seed=3, width=128, guidance_scale=3.0, num_inference_steps=2)
    numbers = {"seed": np.int64(3), "width": np.int32(128), "guidance_scale": np.float32(3)}
    made = service.generate(prompt="a red circle", num_inference_steps=torch.tensor(2), **numbers)
    assert made.ok and made.image.tobytes() == plain.image.tobytes()
    assert service.plan(prompt="a", seeds=np.arange(2)).plan.seeds == [0, 1]
    assert service.plan(prompt="a", width=np.float64(128)).errors[0].field == "width"
    assert service.plan({"prompt": "a", "seed": np.uint8(7)}).plan.seeds == [7]


def test_seed_minus_one_picks_a_random_seed_recorded_in_the_plan(service: DiffusionService) -> None:
    made = [service.plan(prompt="a", seed=-1, num_images=2).plan.seeds for _ in range(2)]
    assert made[0] != made[1] and all(seeds[1] == seeds[0] + 1 and seeds[0] >= 0 for seeds in made)
    result = service.generate(**FEW | {"seed": -1})
    assert result.ok and result.generation.images[0].seed == result.generation.plan.seeds[0] >= 0
    assert service.plan(prompt="a", seed=-2).errors[0].code == ErrorCode.out_of_range
    assert service.plan(prompt="a", seeds=[-1]).errors[0].code == ErrorCode.out_of_range


def test_palette_images_without_a_palette_are_refused(service: DiffusionService) -> None:
    "Pillow opens the file and fails only when it converts the pixels."
    file = hostile_bodies.FILES["a palette without colors"](random.Random(0))
    result = service.generate(prompt="a", image=base64.b64encode(file).decode())
    assert (result.status, result.errors[0].field) == ("bad_image", "image")
    assert "the PNG file is cut off or damaged" in result.message
