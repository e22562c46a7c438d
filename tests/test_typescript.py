"""The TypeScript client and the page are made from their sources, and the client works against the real server."""
import os
import shutil
import subprocess

import pytest

from server_process import needs
from project import ROOT

CLIENT = ROOT / "openapi" / "client_libs" / "typescript"


@pytest.fixture(autouse=True)
def node() -> None:
    needs(shutil.which("npm"), "Node with npm is not installed")


def run(*command: str, **variables: str) -> None:
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


@pytest.mark.parametrize("part", ["typescript", "page"])
def test_is_in_step_with_its_sources(part: str) -> None:
    run(str(ROOT / "build.sh"), "check", part)


def test_client_works_with_the_server(server: str) -> None:
    run(str(ROOT / "build.sh"), "packages", "typescript")
    run("npm", "test", "--prefix", str(CLIENT), DIFFUSION_WORKERS_URL=server)


def test_client_can_be_packed(tmp_path) -> None:
    run(str(ROOT / "build.sh"), "packages", "typescript")
    run("npm", "pack", str(CLIENT), "--pack-destination", str(tmp_path))
    listed = subprocess.run(["tar", "tzf", *map(str, tmp_path.glob("*.tgz"))], capture_output=True, text=True, check=True).stdout.split()
    assert {"package/dist/index.js", "package/dist/index.d.ts", "package/package.json", "package/README.md"} <= set(listed)
