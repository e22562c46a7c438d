"""Errors about missing packages contain the command that installs them."""

import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
from PIL import Image
from project import ROOT

from diffusion_workers.request.errors import EXTRAS, RequestError, failure
from ez_diffusion_client.models import ErrorCode, OpResult, OpStatus

COMMAND = "from diffusion_workers.cli.main import main; sys.exit(main({!r}))"
BLOCK = """\
import sys
package = {!r}
blocked = [package, *(name for name in sys.modules if name.startswith(package + "."))]
sys.modules.update(dict.fromkeys(blocked))
"""
WORKER = "from diffusion_workers.worker.handler import main; sys.exit(main())"
BUCKET = (
    "import os; os.environ.update(BUCKET_ENDPOINT_URL='http://minio:9000/a', BUCKET_ACCESS_KEY_ID='a', "
    "BUCKET_SECRET_ACCESS_KEY='b'); "
)


def without(
    package: str,
    code: str,
    python: Sequence[str] = (sys.executable,),  # the command that runs Python
) -> subprocess.CompletedProcess[str]:
    "Run code in a process that cannot import a package."
    blocked = BLOCK.format(package)
    return subprocess.run([*python, "-c", blocked + code], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "package, code, line",
    [
        ("runpod", WORKER, "pip install 'diffusion-workers[worker]'"),
        ("runpod", COMMAND.format(["worker", "--test_input", "{}"]), "pip install 'diffusion-workers[worker]'"),
        ("boto3", BUCKET + WORKER, "pip install 'diffusion-workers[worker]'"),
        ("uvicorn", COMMAND.format(["serve", "--port", "0"]), "pip install --upgrade diffusion-workers"),
        ("fastapi", COMMAND.format(["serve", "--port", "0"]), "pip install --upgrade diffusion-workers"),
    ],
)
def test_commands_print_the_install_command_without_traceback(
    package: str, code: str, line: str, quick_python: tuple[str, ...]
) -> None:
    done = without(package, code, quick_python)
    assert done.returncode not in (0, 1)
    assert line in done.stderr and package in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr


@pytest.mark.parametrize("name", ["GenerationPanel", "grid", "MaskCanvas", "ControlPanel"])
@pytest.mark.parametrize("package", ["ipywidgets", "anywidget"])
def test_panel_import_errors_name_the_notebook_extra(name: str, package: str) -> None:
    done = without(package, code=f"from diffusion_workers import {name}")
    if done.returncode == 0:
        assert (name, package) in [("ControlPanel", "anywidget")]  # needs only ipywidgets
        return
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError") and package in last, done.stderr
    assert "pip install 'diffusion-workers[notebook]'" in last


@pytest.mark.parametrize("module", ["panel", "grid", "history"])
@pytest.mark.parametrize("package", ["ipywidgets", "anywidget"])
def test_panel_module_import_errors_name_the_notebook_extra(module: str, package: str) -> None:
    done = without(package, code=f"import diffusion_workers.panel.{module}")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: a panel in a notebook needs the package") and package in last, done.stderr
    assert "pip install 'diffusion-workers[notebook]'" in last


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    "package, need",
    [
        ("pandas", lambda: __import__("ez_diffusion_client.frames").frames.to_dataframe([])),
        ("pandas", lambda: __import__("diffusion_workers.sweep.run").sweep.run.sweep_table([])),
        ("ray", lambda: __import__("diffusion_workers.sweep.ray").sweep.ray.import_ray()),
    ],
)
def test_python_calls_name_the_missing_package(
    package: str, need: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    __import__("diffusion_workers.sweep.ray")
    hide(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"pip install '?(diffusion-workers\[(notebook|ray)\]|{package})"):
        need()


def test_benchmark_plot_and_table_name_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_workers.benchmark.benchmark import BenchmarkResult, plot_result

    empty = BenchmarkResult.__new__(BenchmarkResult)
    hide(monkeypatch, "matplotlib.pyplot")
    hide(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match=r"diffusion-workers\[notebook\]"):
        plot_result(empty, "quality")
    hide(monkeypatch, "pandas")
    with pytest.raises(ImportError, match="pip install pandas"):
        BenchmarkResult.to_dataframe(empty)


@pytest.mark.parametrize(
    "package, need, line",
    [
        ("gguf", "diffusion_workers.checkpoints.layouts:require_gguf", "diffusion-workers[quantization]"),
        ("bitsandbytes", "diffusion_workers.pipeline.weights:require_package", "diffusion-workers[quantization]"),
        ("torchao", "diffusion_workers.pipeline.weights:require_package", "diffusion-workers[quantization]"),
        ("cv2", "diffusion_workers.control.preprocessors:opencv", "pip install opencv-python-headless"),
    ],
)
def test_models_and_preprocessors_name_the_missing_package(
    package: str, need: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = need.partition(":")
    call = getattr(__import__(module, fromlist=[name]), name)
    hide(monkeypatch, package)
    with pytest.raises(RequestError, match=line.replace("[", r"\[")) as refused:
        call(package, "this model") if name == "require_package" else call()
    assert refused.value.errors[0].code == ErrorCode.missing_dependency


def test_preprocessing_without_controlnet_aux_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_workers.service.service import DiffusionService

    hide(monkeypatch, "controlnet_aux")
    with DiffusionService(device="cpu") as service:
        result = service.preprocess(image=Image.new("RGB", (64, 64)), preprocessing={"name": "hed"})
    assert (result.status, result.errors[0].code) == ("missing_dependency", "missing_dependency")
    assert "pip install controlnet-aux" in result.errors[0].hint


def test_upload_without_boto3_warns_and_keeps_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_workers.worker.delivery import Bucket, deliver
    from ez_diffusion_client.models import ControlMap

    hide(monkeypatch, "boto3")
    result = OpResult(
        status=OpStatus.success, control_map=ControlMap(image="aGVsbG8=", preprocessor="canny", width=8, height=8)
    )
    sent = deliver(result, "job", 10_000_000, Bucket("http://minio:9000", "a", "b", "c"), upload_all=True)
    assert sent.control_map == result.control_map
    assert "pip install 'diffusion-workers[worker]'" in sent.warnings[0].message


@pytest.mark.parametrize("package", EXTRAS)
def test_missing_extras_become_missing_dependency_errors(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, package)
    try:
        __import__(package)
    except ImportError as exc:
        result = failure(exc)
    assert result.status == OpStatus.missing_dependency
    assert f"diffusion-workers[{EXTRAS[package]}]" in result.errors[0].hint


def test_extras_are_declared_in_settings_ini() -> None:
    text = (ROOT / "settings.ini").read_text()
    for package, extra in EXTRAS.items():
        assert f"{extra}_requirements" in text, package


def test_missing_own_modules_are_internal_errors() -> None:
    try:
        import diffusion_workers.nothing  # noqa: F401
    except ImportError as exc:
        assert failure(exc).status == OpStatus.internal_error
