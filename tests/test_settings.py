"""Settings passed as arguments take precedence over environment variables."""

import ast
import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile

import pytest
from live_server import live_server

from diffusion_workers.models.manifest import package_folder
from diffusion_workers.models.store import load_manifests
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from diffusion_workers.settings.table import variable_rows
from diffusion_workers.settings.worker import WorkerSettings
from diffusion_workers.worker.handler import Worker
from diffusion_workers.worker.placement import config_facts, config_lines

PACKAGE = package_folder(".").resolve()
WITH_LORA = {"prompt": "a red heart", "num_inference_steps": 1, "loras": [{"name": "mine.safetensors"}]}


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    "A folder with one LoRA, mine.safetensors."
    folder = tmp_path / "loras"
    folder.mkdir()
    copyfile(PACKAGE / "builtin_models/shapes-sd15/loras/heart.safetensors", folder / "mine.safetensors")
    return folder


@pytest.fixture
def misleading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    "An environment that sets every setting of the service to a valid value different from what the tests pass."
    other = tmp_path / "other"
    other.mkdir()
    builtin = "family: sd15\nsource: {builtin: shapes-sd15}\n"
    (other / "shapes-sd15.yaml").write_text(f"{builtin}title: From the environment\n")
    (other / "elsewhere.yaml").write_text(builtin)
    values = {
        "DIFFUSION_WORKERS_MODELS": str(other),
        "DIFFUSION_WORKERS_DEFAULT_MODEL": "elsewhere",
        "DIFFUSION_WORKERS_DEVICE": "cuda:7",
        "DIFFUSION_WORKERS_DTYPE": "float16",
        "DIFFUSION_WORKERS_MEMORY_BUDGET": "1KB",
        "DIFFUSION_WORKERS_ANNOTATORS": str(other),
        "DIFFUSION_WORKERS_LORAS": str(other),
        "DIFFUSION_WORKERS_EMBEDDINGS": str(other),
        "DIFFUSION_WORKERS_WILDCARDS": str(other),
        "DIFFUSION_WORKERS_STYLES": str(other),
        "DO_TORCH_COMPILE": "1",
    }
    assert values.keys() == {Settings.variable(name) for name in Settings.model_fields}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    yield other


def test_service_settings_override_the_environment(loras: Path, misleading: Path) -> None:
    "Models, LoRAs, device, dtype, memory budget, compilation and preprocessors ignore the environment."
    with DiffusionService(Settings(device="cpu", lora_folders=(loras,))) as service:
        manifest = service.manifest()
        factory = service.factory(manifest)
        planned = service.plan(WITH_LORA)
        assert (manifest.name, manifest.title) == ("shapes-sd15", load_manifests()["shapes-sd15"].title)
        assert "elsewhere" not in service.models and service.device.type == "cpu"
        assert [folder.location() for folder in manifest.lora_folders] == [loras]
        assert str(factory.dtype) == "torch.float32" and not factory.torch_compile
        assert service.pool.budget(manifest) is None
        assert planned.ok, planned.message
        assert str(misleading) not in repr(vars(service.preprocessors))


def test_service_without_settings_reads_the_environment(
    loras: Path, misleading: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Model folder, default model, memory budget and LoRA folder come from environment variables."
    monkeypatch.setenv("DIFFUSION_WORKERS_LORAS", str(loras))
    with DiffusionService(device="cpu") as service:
        manifest = service.manifest()
        assert manifest.name == "elsewhere" and service.pool.budget(manifest) == 1000
        assert service.models["shapes-sd15"].title == "From the environment"
        assert service.plan(WITH_LORA).ok


def test_lora_is_rejected_without_its_folder(misleading: Path) -> None:
    "The LoRA of these tests is found only through `lora_folders`."
    with DiffusionService(Settings(device="cpu")) as service:
        refused = service.plan(WITH_LORA)
        assert not refused.ok and "mine" in refused.message


def test_server_settings_override_the_environment(loras: Path, misleading: Path) -> None:
    "A request can use a LoRA from the configured folder."
    given = {"device": "cpu", "lora_folders": (loras,)}
    with DiffusionService(Settings(**given)) as service, live_server(service, **given) as (url, _):
        body = json.dumps(WITH_LORA).encode()
        asked = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as response:
            answer = json.load(response)
        with urllib.request.urlopen(f"{url}/models") as response:
            models = json.load(response)
    assert answer["status"] == "success" and models["default"] == "shapes-sd15"


def test_worker_settings_override_the_environment(loras: Path, misleading: Path) -> None:
    "A job can use a LoRA from the configured folder, and --check-config lists the same settings."
    settings = WorkerSettings(device="cpu", lora_folders=(loras,))
    worker = Worker(settings)
    try:
        answer = asyncio.run(worker.handle({"id": "job-1", "input": {**WITH_LORA}}))
    finally:
        worker.close()
    assert answer["status"] == "success"
    assert worker.service.models.default == "shapes-sd15" and "elsewhere" not in worker.service.models
    lines = config_lines(config_facts(settings, {}))
    assert not any("elsewhere" in line for line in lines) and any(str(loras) in line for line in lines)


def test_worker_loads_models_from_its_configured_folders(tmp_path: Path) -> None:
    "A non-default model whose Hub repository is on the volume is not downloaded."
    write_tiny_model(tmp_path / "volume" / "someone", "sd15", "tiny")
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "placed.yaml").write_text(
        "family: sd15\nsource: {hub: someone/tiny}\ndefaults: {width: 64, height: 64}\n"
    )
    settings = WorkerSettings(device="cpu", model_folders=manifests, hub_folders=tmp_path / "volume")
    worker = Worker(settings)
    request = {"prompt": "a red circle", "model": "placed", "num_inference_steps": 1}
    try:
        answer = asyncio.run(worker.handle({"id": "job-1", "input": request}))
    finally:
        worker.close()
    assert answer["status"] == "success", answer


def test_only_settings_modules_read_environment_variables() -> None:
    "Modules outside `settings` do not access `os.environ`; only `cli/worker.py` does, to pass it to the settings."
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("settings/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_environ = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
            if is_environ or (isinstance(node, ast.ImportFrom) and node.module == "os"):
                found.append(f"{name}:{node.lineno}")
    assert [place for place in found if not place.startswith("cli/worker.py")] == []


def test_mentioned_environment_variables_exist() -> None:
    "Variables in README, notebooks, Dockerfile, scripts, package and RunPod's JSON files are in the settings table."
    import re

    root = Path(__file__).resolve().parent.parent
    known = {row.name for row in variable_rows()}
    tests_only = {"DIFFUSION_WORKERS_NO_SKIPS", "DIFFUSION_WORKERS_URL"}
    texts = [root / "README.md", root / "Dockerfile", root / "run_server.sh", *root.glob(".runpod/*.json")]
    for path in [*texts, *root.glob("nbs/*/*.ipynb"), *PACKAGE.rglob("*.py")]:
        mentioned = set(re.findall(r"\bDIFFUSION_WORKERS_[A-Z]+(?:_[A-Z]+)*\b", path.read_text(encoding="utf-8")))
        assert mentioned <= known | tests_only, path
