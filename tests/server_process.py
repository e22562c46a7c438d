"""The real server in its own process."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from project import ROOT

NO_SKIPS = "DIFFUSION_WORKERS_NO_SKIPS"
SERVE = "import sys; from diffusion_workers.cli.main import main; sys.exit(main(sys.argv[1:]))"
PATIENCE = 600  # seconds until something counts as stuck; never a measure of speed


def needs(found: object, what: str) -> None:
    "Skip the test if a requirement is not installed; fail it if skips are not allowed."
    if found:
        return
    if os.environ.get(NO_SKIPS):
        pytest.fail(f"{what}, and {NO_SKIPS} is set")
    pytest.skip(what)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=30) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def running_server(
    python: Sequence[str] = (sys.executable,),  # the command that runs Python
    **environment: str,  # variables for the server
) -> Iterator[str]:
    "Start the server with the built-in models on a free port, and yield its address once it has generated an image."
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            [*python, "-c", SERVE, "serve", "--port", "0"],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            url = None
            while not (url and is_ready(url)):
                output = Path(log.name).read_text()  # a new handle: the server writes at the position of `log`
                assert process.poll() is None, f"the server exited at startup:\n{output}"
                assert time.monotonic() < deadline, f"the server is not ready after {PATIENCE} s:\n{output}"
                found = re.search(r"starting on (http://\S+?),", output)
                url = found and found[1]
                time.sleep(0.1)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
