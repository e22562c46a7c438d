"""The Dockerfile without a container engine: a linter, its COPY sources, and its RUN lines in a clean environment."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin
from urllib.parse import urlsplit

import pytest
from PIL import Image
from project import ROOT

from diffusion_workers.models.store import load_manifests
from diffusion_workers.planning.loras import lora_file
from diffusion_workers.settings.worker import WorkerSettings
from diffusion_workers.worker.placement import placed_models

BIN = Path(sys.executable).parent


def instructions() -> list[list[tuple[str, str]]]:
    "The instructions of each stage, with continuation lines joined."
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [tuple(line.split(" ", 1)) for line in joined.splitlines() if line.strip()]
    starts = [i for i, (name, _) in enumerate(found) if name == "FROM"]
    return [found[start:end] for start, end in zip(starts, [*starts[1:], None])]


def arguments(name: str) -> list[str]:
    "The arguments of each occurrence of an instruction, in all stages."
    return [text for stage in instructions() for instruction, text in stage if instruction == name]


def test_hadolint_passes() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_base_images_are_pinned_to_a_version_and_platform() -> None:
    cuda = r"--platform=linux/amd64 nvidia/cuda:13\.0\.[\d.]+-runtime-ubuntu[\d.]+ AS (uv|packages)"
    for stage in instructions():
        assert re.fullmatch(rf"{cuda}|scratch AS manifests|packages( AS models)?", stage[0][1]), stage[0]
    assert hub("hub.json")["config"]["allowedCudaVersions"] == [
        "13.0"
    ]  # the CUDA version of torch's wheels and the base image


def test_code_is_copied_after_the_large_layers() -> None:
    "A code change invalidates no layer with torch, the other packages or a model."
    stages = [[f"{name} {text}" for name, text in stage] for stage in instructions()]
    at = lambda texts, part: next(i for i, text in enumerate(texts) if part in text)
    packages, final = stages[2], stages[-1]
    assert at(packages, "gcc") < at(packages, "torch==") < at(packages, "requirements.txt")
    assert not any("COPY" in text for text in packages if "settings.ini" not in text)
    assert at(final, "COPY --from=models") < at(final, "COPY diffusion_workers")


def test_a_c_compiler_is_installed_for_torch_compile() -> None:
    "Triton compiles its launchers with a C compiler and Python's headers."
    [installed] = [text for text in arguments("RUN") if "apt-get" in text and "python3-venv" not in text]
    assert {"gcc", "libc6-dev", "python3-dev"} <= set(installed.split())


def test_the_hf_token_is_a_build_secret() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "--mount=type=secret,id=hf_token" in text
    named = [value for name in ("ARG", "ENV") for value in arguments(name) if "TOKEN" in value]
    assert not named
    from diffusion_workers.worker.baking import SECRET

    assert Path("/run/secrets/hf_token") == SECRET


def test_copied_files_exist_and_are_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [text for text in arguments("COPY") if not text.startswith("--from=")]
    sources = [part for text in copies for part in text.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists() and source in allowed, source
    assert (ROOT / "diffusion_workers" / "builtin_models" / "shapes-sd15" / "model_index.json").exists()


def test_the_container_is_not_root_and_has_a_health_check() -> None:
    assert arguments("USER") == ["10001"]
    health = re.search(r'CMD \["test", "-f", "([^"]+)"\]', arguments("HEALTHCHECK")[0])
    assert f"DIFFUSION_WORKERS_READY_FILE={health[1]}" in arguments("ENV")[-1]


def test_the_torch_version_matches_ci() -> None:
    pinned = re.search(r"torch==[\d.]+", (ROOT / ".ci" / "run").read_text())[0]
    assert any(pinned in text for text in arguments("RUN"))


@pytest.mark.parametrize("extras", [(), ("controlnet", "quantization")])
def test_requirements_are_read_from_settings(tmp_path: Path, extras: tuple[str, ...]) -> None:
    "The unchanged RUN line lists the packages of settings.ini and of the extras, except the client."
    line = next(text for text in arguments("RUN") if "requirements.txt" in text)
    command = re.sub(r"^--mount=\S+ +", "", line).split(" && ")[0]
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "EXTRAS": " ".join(extras)},
    )
    written = [text.strip() for text in (tmp_path / "requirements.txt").read_text().splitlines() if text.strip()]
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    named = [
        text.strip()
        for key in ("requirements", "worker_requirements", *(f"{extra}_requirements" for extra in extras))
        for text in settings["DEFAULT"][key].splitlines()
        if text.strip()
    ]
    assert sorted(written) == sorted({*named, "httpx"} - {"ez-diffusion-client"})


@pytest.mark.slow
def test_the_run_lines_install_a_working_worker(tmp_path: Path) -> None:
    "Every RUN line except those with apt-get, in order, in folders of this test; then the CMD."
    places = {
        "/opt/uv": tmp_path / "uv",
        "/opt/venv": tmp_path / "venv",
        "/opt/models": tmp_path / "models",
        "/opt/manifests": tmp_path / "manifests",
        "/src": tmp_path / "src",
    }
    moved = lambda text: re.sub("|".join(places), lambda found: str(places[found[0]]), text)
    (tmp_path / "src").mkdir()
    foreign = ("PYTHON", "VIRTUAL_ENV", "DIFFUSION_WORKERS_", "RUNPOD_", "BUCKET_", "UV_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    env |= {
        "VIRTUAL_ENV": str(places["/opt/venv"]),
        "PATH": f"{places['/opt/venv'] / 'bin'}:{BIN}:{env['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    env |= {"MODELS": "", "PARTS": "", "EXTRAS": ""} | dict(
        pair.split("=") for pair in arguments("ENV")[0].split() if pair.startswith("UV_")
    )

    def run(text: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=tmp_path / "src",
            env=env,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"

    for stage in instructions():
        for name, text in stage:
            if name == "COPY" and not text.startswith("--from="):
                *sources, target = text.split()
                for source in sources:
                    to = tmp_path / "src" / (source if target == "./" else target)
                    if (ROOT / source).is_dir():
                        shutil.copytree(ROOT / source, to, dirs_exist_ok=True)
                    else:
                        shutil.copy(ROOT / source, to)
            elif name == "RUN" and "apt-get" not in text:
                run(moved(re.sub(r"^(--mount=\S+ +)+", "", text)))
    job = json.dumps({"input": {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}})
    command = json.loads(arguments("CMD")[0])
    done = subprocess.run(
        [*command, "--test_input", job], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0 and "completed successfully" in done.stdout, done.stdout + done.stderr


# --- RunPod Hub -------------------------------------------------------------


def hub(name: str) -> dict:
    return json.loads((ROOT / ".runpod" / name).read_text())


def test_the_hub_form_fields_are_variables_that_are_read() -> None:
    "Each field is a variable of the worker or HF_TOKEN, and its default is the worker's."
    config = hub("hub.json")["config"]
    keys = [entry["key"] for entry in config["env"]]
    known = {WorkerSettings.variable(name) for name in WorkerSettings.model_fields} | {"HF_TOKEN"}
    folders = {"DIFFUSION_WORKERS_ANNOTATORS", "DIFFUSION_WORKERS_LORAS", "DIFFUSION_WORKERS_MODELS"}
    assert folders <= set(keys)
    assert set(keys) <= known and len(set(keys)) == len(keys)
    defaults = {entry["key"]: str(entry["input"]["default"]) for entry in config["env"]}
    assert WorkerSettings.from_environment(defaults) == WorkerSettings()
    for preset in config["presets"]:
        chosen = WorkerSettings.from_environment(
            defaults | {key: str(value) for key, value in preset["defaults"].items()}
        )
        assert chosen.default_model in load_manifests()


def test_the_hub_form_options_are_the_allowed_values() -> None:
    "A field whose variable has a fixed set of values lists exactly these."
    for entry in hub("hub.json")["config"]["env"]:
        names = [name for name in WorkerSettings.model_fields if WorkerSettings.variable(name) == entry["key"]]
        options = [option["value"] for option in entry["input"].get("options", ())]
        for name in names:
            kind = WorkerSettings.model_fields[name].annotation
            choices = list(get_args(kind)) if get_origin(kind) is Literal else []
            assert choices == options, entry["key"]


def test_the_hub_listing_has_a_square_png_icon() -> None:
    address = hub("hub.json")["iconUrl"]
    assert address.startswith("https://") and address.endswith("/.runpod/icon.png")
    with Image.open(ROOT / ".runpod" / "icon.png") as icon:
        assert icon.format == "PNG" and icon.width == icon.height >= 256


# --- models in the image ----------------------------------------------------


MANIFEST = """\
family: sd15
source: {hub: owner/tiny}
variant: fp16
loras:
  ink: {source: {hub: owner/tiny, subfolder: loras}, weight_name: ink.safetensors}
"""


class Hub(BaseHTTPRequestHandler):
    "A stand-in for the Hugging Face Hub with one repository, as far as its library needs it."

    files: ClassVar[dict[str, bytes]] = {
        "model_index.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": b"whole",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "text_encoder/model.safetensors": b"text",
        "everything.safetensors": b"a second copy of it all",
        "loras/ink.safetensors": b"a LoRA",
    }
    commit = "0123456789abcdef0123456789abcdef01234567"
    tokens: ClassVar[set[str | None]] = set()

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        if "owner/tiny" in path:
            self.tokens.add(self.headers.get("Authorization"))
        listed = [{"type": "file", "path": name, "size": len(data), "oid": ""} for name, data in self.files.items()]
        about = {"id": "owner/tiny", "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}
        known = listed if "/tree/" in path else about if path.startswith("/api/models/") else {}
        data = json.dumps(known).encode()
        if "/resolve/" in path:
            data = self.files[path.partition("/resolve/")[2].partition("/")[2]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, *ignored: object) -> None:
        pass


def test_baked_models_are_found_by_the_worker(tmp_path: Path) -> None:
    "Bake with the Dockerfile's command and a server in place of the Hub; the worker finds the files without a network."
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "tiny.yaml").write_text(MANIFEST)
    into = tmp_path / "models"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "DIFFUSION_WORKERS_MODELS": str(tmp_path / "manifests"),
    }
    command = [sys.executable, "-m", "diffusion_workers.worker.baking", "tiny", "--parts", "--into", str(into)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert Hub.tokens == {"Bearer hf_secret"} and "hf_secret" not in done.stdout + done.stderr
    settings = WorkerSettings(model_folders=(tmp_path / "manifests",), hub_folders=(into,))
    found = placed_models(load_manifests(settings), settings.hub_folders)["tiny"]
    place = Path(found.source.location())
    assert place.is_relative_to(into)
    files = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert files == set(Hub.files) - {"unet/diffusion_pytorch_model.safetensors", "everything.safetensors"}
    assert (place / "unet" / "diffusion_pytorch_model.fp16.safetensors").read_bytes() == b"half"
    lora = lora_file(found.loras["ink"])
    assert lora == place / "loras" / "ink.safetensors" and lora.read_bytes() == b"a LoRA"
