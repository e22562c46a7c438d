"""The Stop button with ipykernel releases other than the installed one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import NBS
from server_process import needs
from test_notebooks import run_notebook

OTHERS = ("6.31.0", "7.0.1")  # handles messages on the main thread; the first release with subshells


@pytest.mark.parametrize("version", [OTHERS[0], pytest.param(OTHERS[1], marks=pytest.mark.slow)])
def test_stop_works_while_a_cell_is_running(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        f"--target={tmp_path}",
        f"ipykernel=={version}",
    ]
    found = subprocess.run(install, capture_output=True, text=True)
    needs(found.returncode == 0, f"ipykernel {version} cannot be installed here: {found.stderr[-500:]}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    said = subprocess.run(
        [sys.executable, "-c", "import ipykernel; print(ipykernel.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.strip() == version
    run_notebook(NBS / "73_panel" / "03_stop_button.ipynb", set())
