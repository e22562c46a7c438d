"""Decoding of images in requests: refused paths and URLs, base64, SVG detection, Pillow modes, sRGB profiles."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusion_workers.request.errors import RequestError
from diffusion_workers.request.images import (
    decode_bytes,
    decode_image,
    image_bytes,
    pixel_sha256,
    sniff_format,
    to_image_string,
)
from ez_diffusion_client.models import ErrorCode

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
PATHS = (
    "/etc/passwd",
    "/etc/passwd1",
    "./a.png",
    "../../a.png",
    "~/a.png",
    "~root",
    "C:\\x.png",
    "c:/x.png",
    "\\\\host\\share\\x.png",
    "a.png",
    "images/cat.jpeg",
    "file:///etc/passwd",
    "file:a.png",
    "FILE://host/a.png",
)


def gradient() -> Image.Image:
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    red, green = np.meshgrid(ramp, ramp[:24])
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1))


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("path", PATHS)
def test_file_paths_are_refused(path: str) -> None:
    with pytest.raises(RequestError) as caught:
        image_bytes(path, field="controlnets[0].image")
    detail = caught.value.errors[0]
    assert (detail.code, detail.field) == (ErrorCode.file_path_not_allowed, "controlnets[0].image")


@pytest.mark.parametrize("url", ["http://169.254.169.254/a.png", "https://2130706433/a.png", "ftp://host/a.png"])
def test_disallowed_urls_are_refused(url: str) -> None:
    with pytest.raises(RequestError) as caught:
        image_bytes(url)
    assert caught.value.errors[0].code == ErrorCode.url_not_allowed


def test_base64_that_starts_like_a_path_is_decoded() -> None:
    jpeg = file_of(gradient(), "JPEG")
    text = base64.b64encode(jpeg).decode()
    assert text.startswith("/9j/") and image_bytes(text) == jpeg


def test_svg_is_detected_after_comments_and_a_doctype() -> None:
    assert sniff_format(b" <!-- a --> <!-- <svg> -->\n<!DOCTYPE svg SYSTEM ''><svg>") == "SVG"


@pytest.mark.parametrize("mode", MODES)
def test_images_in_any_pillow_mode_are_decoded(mode: str) -> None:
    source = gradient()
    if mode in ("RGBa", "PA"):
        source = source.convert("RGBA")
    if mode in ("La", "LA"):
        source = source.convert("LA")
    assert decode_image(to_image_string(source.convert(mode))).image.size == (32, 24)


def test_boolean_arrays_become_black_and_white() -> None:
    decoded = decode_image(to_image_string(np.asarray(gradient())[..., 0] > 99))
    assert decoded.image.getextrema() == ((0, 255),) * 3


def test_an_srgb_profile_is_not_applied_in_any_format() -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind, options in {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}.items():
        decoded = decode_bytes(file_of(gradient(), kind, icc_profile=own, **options))
        assert (decoded.sha256, decoded.warnings, decoded.image.info) == (pixel_sha256(gradient()), (), {})
