"""A real JupyterLab in its own process, and functions to open and run a notebook in it."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Page
from server_process import PATIENCE

QUIET = {"fetchNews": "false", "checkForUpdates": False}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def running(
    command: list[str],
    folder: Path,
    url: str,
    kernel: Sequence[str] = (sys.executable, "-m", "ipykernel_launcher"),  # the command that starts a kernel
) -> Iterator[None]:
    "Start a server in a folder, and wait until `url` responds."
    spec = {"argv": [*kernel, "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    place = folder / ".jupyter" / "kernels" / "python3"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec))
    with (folder / "server.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=os.environ | {"JUPYTER_PATH": str(folder / ".jupyter")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not answers(url):
                output = (folder / "server.log").read_text()
                assert process.poll() is None, f"{command[0]} exited at startup:\n{output}"
                assert time.monotonic() < deadline, f"{command[0]} is not ready after {PATIENCE} s:\n{output}"
                time.sleep(0.3)
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def running_lab(folder: Path, **options: Sequence[str]) -> Iterator[str]:  # a URL template with {} for the notebook
    "Run JupyterLab in a folder, without news notifications."
    settings = folder / ".settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET))
    port, token = free_port(), secrets.token_hex(16)
    command = [
        "jupyterlab",
        "--allow-root",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        f"--LabApp.user_settings_dir={folder / '.settings'}",
        f"--LabApp.workspaces_dir={folder / '.workspaces'}",
        "--LabApp.expose_app_in_browser=True",
    ]
    base = f"http://127.0.0.1:{port}"
    with running(command, folder, f"{base}/api/status?token={token}", **options):
        yield f"{base}/doc/tree/{{}}?token={token}"


def write_notebook(path: Path, *cells: str) -> None:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, path)


def open_notebook(page: Page, address: str) -> None:
    "Open a notebook and wait until its kernel is ready."
    page.goto(address)
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
    page.evaluate("""async () => {
        const {context, sessionContext} = window.jupyterapp.shell.currentWidget;
        await context.ready;
        await sessionContext.ready;
    }""")


def run_all(page: Page) -> None:
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")


def save(page: Page) -> None:
    "Save the notebook: a reloaded page shows what was saved."
    page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save'); }")
