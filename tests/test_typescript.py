"""The TypeScript client and the web page are up to date, and the client works with a real server and worker."""

import configparser
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from project import ROOT
from runpod_queue import API_KEY, ENDPOINT, QueueServer, running_worker
from server_process import needs

CLIENT = ROOT / "openapi" / "client_libs" / "typescript"


@pytest.fixture(autouse=True)
def node() -> None:
    needs(shutil.which("npm"), "Node with npm is not installed")


def run(*command: str, **variables: str) -> None:
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


@pytest.mark.parametrize("part", ["typescript", "page"])
def test_generated_files_are_up_to_date(part: str) -> None:
    run(str(ROOT / "build.sh"), "check", part)


def test_client_works_with_server_and_worker(server: str, quick_python: tuple[str, ...], tmp_path: Path) -> None:
    "Run the same client tests against both; the worker runs RunPod's SDK behind a local queue."
    run(str(ROOT / "build.sh"), "packages", "typescript")
    settings = {"DIFFUSION_WORKERS_STREAM": "1", "DIFFUSION_WORKERS_PROGRESS_SECONDS": "0.05"}
    with QueueServer() as queue, running_worker(queue, "only", tmp_path / "log.txt", quick_python, **settings):
        run(
            "npm",
            "test",
            "--prefix",
            str(CLIENT),
            DIFFUSION_WORKERS_URL=server,
            RUNPOD_URL=queue.url,
            RUNPOD_ENDPOINT=ENDPOINT,
            RUNPOD_KEY=API_KEY,
        )
        assert set(queue.asked) == {"run", "status", "stream", "cancel"}


def test_client_package_has_the_required_files(tmp_path: Path) -> None:
    run(str(ROOT / "build.sh"), "packages", "typescript")
    run("npm", "pack", str(CLIENT), "--pack-destination", str(tmp_path))
    listed = subprocess.run(
        ["tar", "tzf", *map(str, tmp_path.glob("*.tgz"))], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"package/dist/index.js", "package/dist/index.d.ts", "package/package.json", "package/README.md"} <= set(
        listed
    )


def test_package_metadata_matches_settings_ini() -> None:
    package = json.loads((CLIENT / "package.json").read_text())
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    told = settings["DEFAULT"]
    assert package["repository"]["url"] == f"git+{told['git_url']}.git"
    assert package["repository"]["directory"] == CLIENT.relative_to(ROOT).as_posix()
    assert package["homepage"] == told["doc_host"] + told["doc_baseurl"]
    assert (package["license"], told["license"]) == ("Apache-2.0", "apache2")


# Every regular expression of the page and the client, with a matching text. Add new ones here.
PATTERNS = {
    r"/^(?=.)/gm": "a\nb",
    r"/(^|\.|\[)[^.[]*$/": "a.b[0]",
    r"/\s+/": " a",
    r"/[^\p{L}\p{N}]+/gu": " -a",
    r"/[,\n]/": ",",
    r"/^data:([^;]+)/": "data:a;",
    r"/token/": "token",
    r"/\[(\d+)\]|[^.[\]]+/g": "a[12].b",
    r"/^(environment|image_index|warnings|seeds)/": "seeds",
    r"/\/$/": "a/",
    r"/^SSE failed: 4(?!08|29)/": "SSE failed: 404",
    r"/^\/jobs\/([^/]+)(\/events)?$/": "/jobs/a/events",
}


def linear_time(samples: dict[str, str], tmp_path: Path, *files: Path) -> dict:
    "The regular expressions of source files, and those that take more than linear time."
    run(str(ROOT / "build.sh"), "packages", "typescript")
    given = tmp_path / "samples.json"
    given.write_text(json.dumps(samples))
    compiler = CLIENT / "node_modules" / "typescript" / "lib" / "typescript.js"
    script = ROOT / "tests" / "linear_time.mjs"
    done = subprocess.run(["node", script, compiler, given, *files], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_regular_expressions_run_in_linear_time(tmp_path: Path) -> None:
    sources = [*(ROOT / "web_gen_client" / "src").glob("*.ts*"), *(CLIENT / "src").glob("*.ts")]
    found = linear_time(PATTERNS, tmp_path, *sorted(sources))
    assert set(found["found"]) == set(PATTERNS)
    assert not found["slow"]


def test_linear_time_check_detects_slow_patterns(tmp_path: Path) -> None:
    source = tmp_path / "slow.ts"
    source.write_text("export const slow = /\\/+$/; export const built = new RegExp('a');")
    found = linear_time({r"/\/+$/": "/"}, tmp_path, source)
    assert found["found"] == [r"/\/+$/", "new RegExp('a')"]
    assert list(found["slow"]) == [r"/\/+$/"]
