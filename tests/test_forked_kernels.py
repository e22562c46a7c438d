"""A program in a forked process is what it is in a process of its own: its streams, its end, and signals to it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = "import os, sys; print(sys.argv, os.getcwd(), sys.path[0], __name__, sys.stdin.read(), os.environ['GIVEN'])"
WAIT = "import time; print('up', flush=True); time.sleep(600)"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", SHOW, "a", "b c"],
        ["-m", "json.tool", "--compact"],
        ["-c", "import sys; sys.exit('a reason')"],
        ["-c", "import sys; sys.exit(7)"],
        ["-c", "import atexit; atexit.register(print, 'at the end')"],
        ["-c", "import os; os.kill(os.getpid(), 9)"],
        ["-m", "json.tool", "--no-such-option"],
    ],
    ids=lambda arguments: arguments[1][-24:],
)
def test_a_forked_program_does_and_says_the_same(
    arguments: list[str], quick_python: tuple[str, ...], tmp_path: Path
) -> None:
    own, forked = (
        subprocess.run(
            [*python, *arguments],
            cwd=tmp_path,
            env=os.environ | {"GIVEN": "a variable"},
            input='{"a": 1}',
            capture_output=True,
            text=True,
        )
        for python in ((sys.executable,), quick_python)
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (own.returncode, own.stdout, own.stderr)


def test_an_error_in_a_forked_program_is_told(quick_python: tuple[str, ...]) -> None:
    done = subprocess.run([*quick_python, "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_forked_program(number: signal.Signals, quick_python: tuple[str, ...]) -> None:
    "Nothing of it is left, even where the process that stands for it cannot pass the signal on."
    with subprocess.Popen([*quick_python, "-c", WAIT], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.stdout.read() == ""  # returns when the program has gone
        assert process.wait() == -number
