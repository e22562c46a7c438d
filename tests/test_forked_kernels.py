"""Programs in forked processes behave as in new processes: streams, exit status and signals."""

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
def test_forked_programs_match_new_processes(
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


def test_errors_in_forked_programs_are_reported(quick_python: tuple[str, ...]) -> None:
    done = subprocess.run([*quick_python, "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_forked_programs(number: signal.Signals, quick_python: tuple[str, ...]) -> None:
    "Nothing of them is left, even if the process that represents them cannot forward the signal."
    with subprocess.Popen([*quick_python, "-c", WAIT], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.stdout.read() == ""  # returns when the program has exited
        assert process.wait() == -number
