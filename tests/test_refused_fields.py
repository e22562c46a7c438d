"""Fields that a model family does not support: the error names the family and an alternative, in every interface."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import live_server
from PIL import Image

from diffusion_workers.cli.main import main
from diffusion_workers.request.images import to_image_string
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client import Client, RequestFailed
from ez_diffusion_client.errors import raise_for_status

IMAGE = "an image"  # placeholder, see `filled`
REFUSED = {
    "guidance on a distilled model": (
        {"model": "flux2-klein-4b", "guidance_scale": 4.0},
        "guidance_scale",
        ["family flux2 is distilled", "leave it out, or take the base model"],
    ),
    "a negative prompt in Klein": (
        {"model": "flux2-klein-4b", "negative_prompt": "blurry"},
        "negative_prompt",
        ["family flux2 has no use for negative_prompt", "say in the prompt what the image shows"],
    ),
    "strength in Klein": (
        {"model": "flux2-klein-base-4b", "image": IMAGE, "strength": 0.5},
        "image",
        ["family flux2 is not offered for image_to_image", "put it into reference_images"],
    ),
    "true CFG in Klein": (
        {"model": "flux2-klein-base-4b", "true_cfg_scale": 3.0},
        "true_cfg_scale",
        ["family flux2 has no use for true_cfg_scale", "use guidance_scale"],
    ),
    "references in Stable Diffusion": (
        {"model": "shapes-sd15", "reference_images": [IMAGE]},
        "reference_images",
        ["family sd15 has no use for reference_images", "flux2-klein-4b, flux2-klein-9b"],
    ),
    "references in Z-Image": (
        {"model": "z-image-turbo", "reference_images": [IMAGE]},
        "reference_images",
        ["family zimage has no use for reference_images", "image and strength", "flux2-klein-4b"],
    ),
    "two references beside a mask": (
        {"model": "flux2-klein-4b", "image": IMAGE, "mask_image": IMAGE, "reference_images": [IMAGE, IMAGE]},
        "reference_images",
        ["FLUX.2 Klein takes fewer reference images for inpainting", "at most 1"],
    ),
    "weights of references in Klein": (
        {"model": "flux2-klein-4b", "reference_images": [IMAGE], "reference_weights": [0.5]},
        "reference_weights",
        ["family flux2 has no use for reference_weights", "what to take from which image", "flux (kind redux)"],
    ),
    "weights of references in Kontext": (
        {"model": "flux1-kontext-dev", "reference_images": [IMAGE], "reference_weights": [0.5]},
        "reference_weights",
        ["family flux has no use for reference_weights", "flux (kind redux)"],
    ),
    "one weight for two references": (
        {"model": "flux1-redux-dev", "reference_images": [IMAGE, IMAGE], "reference_weights": [0.5]},
        "reference_weights",
        ["one weight for each of reference_images", "2 weights", "equal shares"],
    ),
    "an unknown way to weigh references": (
        {"model": "flux1-redux-dev", "reference_images": [IMAGE], "reference_scales": [0.5]},
        "reference_scales",
        ["no such field", "did you mean reference_images?"],
    ),
}
OPTIONS = {"reference_images": "--reference"}


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    with DiffusionService(device="cpu") as started:
        started.log_failures = False
        yield started


@pytest.fixture(scope="module")
def url(service: DiffusionService) -> Iterator[str]:
    with live_server(service) as (address, _):
        yield address


def filled(value: Any, image: Any) -> Any:  # replaces the placeholders with an image
    if isinstance(value, list):
        return [filled(item, image) for item in value]
    return image if value == IMAGE else value


@pytest.mark.parametrize("name", REFUSED)
def test_python_call_suggests_an_alternative(service: DiffusionService, name: str) -> None:
    fields, field, words = REFUSED[name]
    given = {key: filled(value, Image.new("RGB", (256, 256), "white")) for key, value in fields.items()}
    result = service.plan("a red circle", **given)
    errors = [error for error in result.errors if error.field == field]
    said = " ".join(f"{error.message} {error.allowed} {error.hint}" for error in errors)
    assert [word for word in words if word not in said] == [], result.errors


def test_unsupported_task_is_the_only_error(service: DiffusionService) -> None:
    "Errors do not mention ControlNets when the request has none."
    image = Image.new("RGB", (256, 256), "white")
    errors = service.plan("blue", model="flux1-kontext-dev", image=image, strength=0.5).errors
    assert [error.field for error in errors] == ["image"] and "put it into reference_images" in errors[0].hint


@pytest.mark.parametrize("name", REFUSED)
def test_http_request_suggests_an_alternative(url: str, name: str) -> None:
    "Check the JSON response, and the exception that the client raises."
    fields, field, words = REFUSED[name]
    image = to_image_string(Image.new("RGB", (256, 256), "white"))
    body = {"prompt": "a red circle"} | {key: filled(value, image) for key, value in fields.items()}
    answer = httpx.post(f"{url}/plan", json=body)
    assert answer.status_code == 422
    errors = [error for error in answer.json()["errors"] if error["field"] == field]
    said = " ".join(f"{error['message']} {error.get('allowed')} {error.get('hint')}" for error in errors)
    assert [word for word in words if word not in said] == [], answer.json()
    with Client(url) as client, pytest.raises(RequestFailed, match=field):
        raise_for_status(client.generate(body))


@pytest.mark.parametrize("name", [name for name in REFUSED if "unknown" not in name])
def test_command_line_suggests_an_alternative(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    fields, field, words = REFUSED[name]
    file = tmp_path / "image.png"
    Image.new("RGB", (256, 256), "white").save(file)
    options = []
    for key, value in fields.items():
        option = OPTIONS.get(key, f"--{key.replace('_', '-')}")
        for item in value if isinstance(value, list) else [value]:
            options += [option, str(filled(item, file))]
    assert main(["plan", "a red circle", *options]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert [word for word in [OPTIONS.get(field, f"--{field.replace('_', '-')}"), *words] if word not in said] == [], (
        said
    )
