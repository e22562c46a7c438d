"""The sample requests of the package, at least one for every mode, run by the server and the command line."""

import base64
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
from live_server import INPUTS, PATIENCE, live_server

from diffusion_workers.cli.main import main
from diffusion_workers.models.store import load_manifests
from diffusion_workers.request.metadata import read_metadata
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import GenerationRequest, OpResult, Task


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    with DiffusionService(device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def url(service: DiffusionService) -> Iterator[str]:
    with live_server(service) as (address, _):
        yield address


def expected(request: GenerationRequest) -> Task:
    "The task of a request, from the images that it contains."
    if request.reference_images:
        return Task.edit
    return Task.inpainting if request.mask_image else Task.image_to_image if request.image else Task.text_to_image


def test_sample_requests_cover_every_mode() -> None:
    "Each task of each built-in model, one and several controls, a union ControlNet, LoRAs, and each file format."
    requests = [GenerationRequest.model_validate_json(path.read_text()) for path in INPUTS]
    built_in = [name for name in load_manifests() if name.startswith("shapes-")]
    modes = {(request.model or "shapes-sd15", expected(request)) for request in requests}
    assert {(model, task) for model in built_in for task in load_manifests()[model].tasks} <= modes
    assert {1, 2} <= {len(request.loras or []) for request in requests}
    assert {1, 2} <= {len(request.controlnets or []) for request in requests}
    assert {"png", "jpeg", "webp"} == {request.output.format.value if request.output else "png" for request in requests}


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.stem)
def test_server_and_command_line_agree_on_the_sample(
    path: Path, url: str, service: DiffusionService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "The server returns the requested images; the command line writes identical files from the same request file."
    request = GenerationRequest.model_validate_json(path.read_text())
    response = httpx.post(
        f"{url}/generate", content=path.read_bytes(), headers={"Content-Type": "application/json"}, timeout=PATIENCE
    )
    result = OpResult.model_validate_json(response.text)
    assert (response.status_code, result.status) == (200, "success"), result.message
    made = result.generation
    assert made.plan.task == expected(request)
    assert len(made.images) == (request.num_images or len(request.seeds or [1]))
    assert len(made.plan.controlnets or []) == len(request.controlnets or [])
    assert [lora.name for lora in made.plan.loras or []] == [lora.name for lora in request.loras or []]
    assert len(made.control_maps or []) == sum(unit.return_map for unit in request.controlnets or [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "diffusion_workers.cli.commands.make_service", lambda arguments: nullcontext(service)
    )  # its models are already loaded
    assert main(["generate", "--request", str(path), "--quiet", "-o", f"out.{made.images[0].format.value}"]) == 0
    written = sorted(file for file in tmp_path.iterdir() if "map" not in file.name)
    receipts = [read_metadata(file).plan for file in written]
    assert [plan.seeds[plan.image_index] for plan in receipts] == [image.seed for image in made.images]
    assert [file.read_bytes() for file in written] == [base64.b64decode(image.image) for image in made.images]


def test_curl_without_line_breaks_works(url: str) -> None:
    "`curl -d @file`, as in the README, strips line breaks from the file; the request stays the same."
    text = (INPUTS[0].parent / "test_data.json").read_text().replace("\n", "")
    response = httpx.post(
        f"{url}/generate", content=text, headers={"Content-Type": "application/json"}, timeout=PATIENCE
    )
    assert json.loads(response.text)["status"] == "success"
