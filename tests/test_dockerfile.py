"""The Dockerfile without a container engine: a linter, its COPY sources, and its RUN lines in a clean environment."""

import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from project import ROOT

from diffusion_workers.settings.worker import WorkerSettings

BIN = Path(sys.executable).parent
FINAL = 1  # the stage that becomes the image; stage 0 only installs uv


def instructions() -> list[list[tuple[str, str]]]:
    "The instructions of each stage, with their lines joined."
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [tuple(line.split(" ", 1)) for line in joined.splitlines() if line.strip()]
    starts = [i for i, (name, _) in enumerate(found) if name == "FROM"]
    return [found[start:end] for start, end in zip(starts, [*starts[1:], None])]


def arguments(name: str, stage: int = FINAL) -> list[str]:
    "What an instruction is given, each time."
    return [text for instruction, text in instructions()[stage] if instruction == name]


def test_hadolint_passes() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bases_are_pinned_and_for_one_platform() -> None:
    for stage in instructions():
        assert re.fullmatch(r"--platform=linux/amd64 nvidia/cuda:[\d.]+-runtime-ubuntu[\d.]+( AS uv)?", stage[0][1])


def test_code_comes_after_what_is_large() -> None:
    "A code change invalidates no layer with torch, the other packages or a model."
    texts = [f"{name} {text}" for name, text in instructions()[FINAL]]
    at = lambda part: next(i for i, text in enumerate(texts) if part in text)
    assert at("torch==") < at("requirements.txt") < at("snapshot_download") < at("COPY diffusion_workers")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [part for text in arguments("COPY") for part in text.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists() and source in allowed, source
    assert (ROOT / "diffusion_workers" / "builtin_models" / "shapes-sd15" / "model_index.json").exists()


def test_nobody_is_root_and_health_is_checked() -> None:
    assert arguments("USER") == ["10001"]
    health = re.search(r'CMD \["test", "-f", "([^"]+)"\]', arguments("HEALTHCHECK")[0])
    assert f"DIFFUSION_WORKERS_READY_FILE={health[1]}" in arguments("ENV")[-1]


def test_torch_is_the_one_of_ci() -> None:
    pinned = re.search(r"torch==[\d.]+", (ROOT / ".ci" / "run").read_text())[0]
    assert any(pinned in text for text in arguments("RUN"))


def test_requirements_are_read_from_settings(tmp_path: Path) -> None:
    "The line that lists the packages, as it stands, names all of settings.ini but the client."
    line = next(text for text in arguments("RUN") if "requirements.txt" in text)
    command = re.sub(r"^--mount=\S+ +", "", line).split(" && ")[0]
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    written = [text.strip() for text in (tmp_path / "requirements.txt").read_text().splitlines() if text.strip()]
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    named = [
        text.strip()
        for key in ("requirements", "worker_requirements")
        for text in settings["DEFAULT"][key].splitlines()
        if text.strip()
    ]
    assert sorted(written) == sorted({*named, "httpx"} - {"ez-diffusion-client"})


@pytest.mark.slow
def test_its_lines_install_a_worker_that_works(tmp_path: Path) -> None:
    "Every RUN line except those of apt, in order, in folders of this test; then the CMD."
    places = {
        "/opt/uv": tmp_path / "uv",
        "/opt/venv": tmp_path / "venv",
        "/opt/models": tmp_path / "models",
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
    env |= {"HUB_MODEL": "", "HUB_REVISION": "main", "HUB_WEIGHTS": "*.safetensors"} | dict(
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
            if name == "COPY":
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


def test_the_hub_form_asks_for_variables_that_are_read() -> None:
    "Each field is a variable of the worker or of the Hub's library, and its default is the worker's."
    config = hub("hub.json")["config"]
    keys = [entry["key"] for entry in config["env"]]
    known = {WorkerSettings.variable(name) for name in WorkerSettings.model_fields} | {"HF_TOKEN"}
    assert set(keys) <= known and len(set(keys)) == len(keys)
    defaults = {entry["key"]: str(entry["input"]["default"]) for entry in config["env"]}
    assert WorkerSettings.from_environment(defaults) == WorkerSettings()
    from diffusion_workers.models.store import load_manifests

    for preset in config["presets"]:
        chosen = WorkerSettings.from_environment(
            defaults | {key: str(value) for key, value in preset["defaults"].items()}
        )
        assert chosen.default_model in load_manifests()
