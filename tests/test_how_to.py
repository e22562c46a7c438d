"""The examples of the how-to guides run as they stand, in a new folder for each page."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import live_server
from project import ROOT

from diffusion_workers.cli.main import main
from diffusion_workers.service.service import DiffusionService

PAGES = sorted(path for path in (ROOT / "docs" / "how-to").glob("*.md") if path.name != "index.md")
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^\n]+ -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"|^<!-- run\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)


def run_shell(code: str) -> None:
    "Run the lines of a block: plain CLI calls in this process, which saves the startup time, others in bash."
    for line in code.strip().splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "export":
            os.environ |= dict(word.split("=", 1) for word in words[1:])
        elif words[0] == "diffusion-workers" and not {"|", ">", "&"} & set(words):
            assert main(words[1:]) == 0, line
        else:
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            done = subprocess.run(
                ["bash", "-uo", "pipefail", "-c", line],
                env=dict(os.environ) | {"PATH": path},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_how_to_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Blocks run in order; one that cannot run here has a comment with the reason."
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    names: dict = {"Path": Path, "__name__": "how_to"}
    ran = 0
    try:
        os.environ["DIFFUSION_WORKERS_DEVICE"] = "cpu"
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if block["skip"]:
                continue
            ran += 1
            if block["hidden"] or block["language"] == "python":
                exec(compile(block["hidden"] or block["code"], page.name, "exec"), names)
            else:
                assert block["language"] == "sh", block["language"]
                run_shell(block["code"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert ran or "<!-- not run: " in page.read_text(encoding="utf-8"), "the page has no example"


@pytest.mark.parametrize(("page", "written"), [("progress", 0), ("two-gpus", 4)])
def test_how_to_examples_that_need_servers(
    page: str,
    written: int,  # images
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    "The blocks that talk to servers run against two on this machine, with few requests."
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    blocks = [
        block["code"] for block in BLOCK.finditer(text) if re.search(r"not run: needs .*server", block["skip"] or "")
    ]
    assert len(blocks) == 1
    with (
        DiffusionService(device="cpu") as service,
        live_server(service) as (first, _),
        live_server(service) as (second, _),
    ):
        code = blocks[0].replace("http://127.0.0.1:8000", first).replace("http://127.0.0.1:8001", second)
        code = code.replace("range(100)", "range(4)").replace('"seed": n}', '"seed": n, "num_inference_steps": 2}')
        exec(compile(code, page, "exec"), {"__name__": "how_to"})
    assert len([*tmp_path.rglob("*.png")]) == written


def test_every_how_to_is_listed() -> None:
    index = (ROOT / "docs" / "how-to" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"({page.name})" not in index] == []
