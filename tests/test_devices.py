"""Errors for unusable devices, before any weights are read: service, command line, worker."""

import platform
from pathlib import Path

import pytest
import torch

from diffusion_workers.request.errors import RequestError
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.worker import WorkerSettings
from diffusion_workers.worker.startup import StartupClock, StartupError, start_service

UNUSABLE = {"cuda:99": "GPU", "gpu0": "unknown device"}
if not torch.cuda.is_available():
    UNUSABLE["cuda"] = "GPU" if torch.backends.cuda.is_built() else "without CUDA"
if platform.system() == "Linux":
    UNUSABLE["mps"] = "without MPS"


@pytest.mark.parametrize("device", UNUSABLE)
def test_the_service_explains_an_unusable_device(device: str) -> None:
    with pytest.raises(RequestError) as refused:
        DiffusionService(device=device)
    error = refused.value.errors[0]
    assert error.field == "device" and UNUSABLE[device] in error.message
    assert error.allowed.startswith("auto, cpu")


@pytest.mark.parametrize("device", UNUSABLE)
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_commands_explain_an_unusable_device(
    command: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from diffusion_workers.cli.main import main

    own = {"generate": ["a red circle", "-o", str(tmp_path / "image.png")], "serve": ["--port", "0"]}[command]
    assert main([command, *own, "--device", device]) not in (0, 1)
    said = capsys.readouterr().err
    assert "device" in said.lower() and device in said
    assert "the files are there" not in said and "Traceback" not in said
    assert not (tmp_path / "image.png").exists()


@pytest.mark.parametrize("device", [device for device in UNUSABLE if device != "gpu0"])
def test_the_worker_explains_an_unusable_device(device: str) -> None:
    with pytest.raises(StartupError, match=UNUSABLE[device]):
        start_service(WorkerSettings(device=device), StartupClock())
