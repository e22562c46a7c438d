"""The installed command as a process of its own: what it writes, what it says on which stream, and how it exits."""
import errno
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_workers.cli import main
from diffusion_workers.image_metadata import read_metadata

COMMAND = str(Path(sys.executable).parent / "diffusion-workers")
FIELDS = {"prompt": "a red circle on a white background", "seed": 7, "num_inference_steps": 2, "scheduler": "euler"}
PATIENCE = 300  # seconds until a process counts as stuck; never a measure of speed
TRACEBACK = "Traceback (most recent call last)"


def environment() -> dict[str, str]:
    "What a process gets: the CPU, no network, no models but those of the package."
    own = {key: value for key, value in os.environ.items() if not key.startswith(("DIFFUSION_WORKERS_", "DO_TORCH_"))}
    return own | {"HF_HUB_OFFLINE": "1", "DIFFUSION_WORKERS_DEVICE": "cpu"}


def run(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    "The finished command, with its output as text."
    return subprocess.run([COMMAND, *arguments], cwd=cwd, env=environment(), input=stdin, capture_output=True, text=True, timeout=PATIENCE)


def assert_fails(done: subprocess.CompletedProcess, code: int, *said: str) -> None:
    "It exits with `code`, says why on standard error without a traceback, and nothing on standard output."
    assert (done.returncode, done.stdout) == (code, ""), done.stdout + done.stderr
    assert TRACEBACK not in done.stderr
    missing = [part for part in said if part not in done.stderr]
    assert not missing, f"{missing} not in:\n{done.stderr}"


# --- pictures ---------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("command")


@pytest.fixture(scope="module")
def written(folder: Path) -> tuple[Path, subprocess.CompletedProcess]:
    "A picture made with options, in a folder that is not there yet, and the process that wrote it."
    path = folder / "not" / "there" / "out.png"
    options = [part for name, value in FIELDS.items() if name != "prompt" for part in (f"--{name.replace('_', '-')}", str(value))]
    return path, run("generate", FIELDS["prompt"], *options, "-o", str(path), cwd=folder)


def test_generate_writes_a_png(written) -> None:
    "The file is where it was wanted, standard output names it, and the plan inside says what was asked for."
    path, done = written
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and done.stdout.startswith(f"{path}  128 x 128, seed 7")
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (128, 128))
    plan = read_metadata(path).plan
    assert {name: getattr(plan, name) for name in ("prompt", "num_inference_steps")} == {name: FIELDS[name] for name in ("prompt", "num_inference_steps")}
    assert (plan.seeds, plan.scheduler.name) == ([7], "euler")


def test_replay_gives_the_same_pixels(written, folder: Path) -> None:
    "What a picture says about itself is enough to make it again."
    path, _ = written
    done = run("replay", str(path), "-o", "replayed.png", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "the same pixels\n"), done.stderr
    np.testing.assert_array_equal(*(np.asarray(Image.open(name)) for name in (path, folder / "replayed.png")))


def test_a_request_on_standard_input_is_the_same_request(written, folder: Path) -> None:
    "JSON on standard input makes the pixels that options make; several images are numbered, and --quiet says nothing."
    path, _ = written
    done = run("generate", "--request", "-", "--num-images", "2", "--quiet", "-o", "several.png", cwd=folder, stdin=json.dumps(FIELDS))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    first, second = (np.asarray(Image.open(folder / f"several-{number}.png")).astype(int) for number in (1, 2))
    assert abs(first - np.asarray(Image.open(path))).max() <= 1  # a batch of two may round its sums in another order
    assert read_metadata(folder / "several-2.png").plan.seeds == [7, 8]
    assert second.shape == first.shape


# --- interrupting -----------------------------------------------------------

def read_terminal(terminal: int, until: str | None = None) -> str:
    "What appears on a terminal, up to a text or to its end."
    shown, give_up = "", time.monotonic() + PATIENCE
    while until is None or until not in shown:
        assert time.monotonic() < give_up, f"waited in vain for {until or 'the end'}:\n{shown}"
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError as error:  # Linux says so when the other side is closed
            assert error.errno == errno.EIO
            data = b""
        if not data:
            break
        shown += data.decode(errors="replace")
    return shown


def test_an_interrupt_ends_a_long_generation(folder: Path) -> None:
    "Ctrl-C in the middle of 150 steps and many images: one line, exit code 130, no file, and that soon."
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    arguments = ["generate", "a red circle", "--num-inference-steps", "150", "--num-images", "32", "-o", "never.png"]
    process = subprocess.Popen([COMMAND, *arguments], cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs)
    try:
        os.close(theirs)
        assert "denoise" in read_terminal(ours, until="denoise")
        process.send_signal(signal.SIGINT)
        shown = read_terminal(ours)
        assert process.wait(timeout=60) == 130, shown
        said = shown.replace("\r", "\n").strip().splitlines()[-1]
        assert said.endswith("diffusion-workers: cancelled") and TRACEBACK not in shown
        assert process.stdout.read() == b""
        assert not list(folder.glob("never*"))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(ours)


# --- mistakes ---------------------------------------------------------------

@pytest.mark.parametrize("arguments, stdin, code, said", [
    (["generate", "x", "--stepz", "3"], "", 2, ["there is no such option", "--stepz"]),
    (["plan", "--request", "-"], '{"prompt": "x", "num-images": 3}', 2, ["num-images", "there is no such field"]),
    (["plan", "x", "--image", "missing.png"], "", 5, ["image", "missing.png"]),
])  # fmt: skip
def test_a_mistake_is_told_on_standard_error(arguments: list[str], stdin: str, code: int, said: list[str], tmp_path: Path) -> None:
    "A process that fails says why in words, and nothing goes to standard output."
    assert_fails(run(*arguments, cwd=tmp_path, stdin=stdin), code, *said)


def call(arguments: list[str], stdin: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess:
    "The same as `run`, in this process, which spares a start."
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    try:
        code = main(arguments)
    except SystemExit as done:
        code = done.code
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())


@pytest.mark.parametrize("arguments, stdin, code, said", [
    ([], "", 2, ["usage: diffusion-workers", "COMMAND"]),
    (["paint", "a circle"], "", 2, ["invalid choice: 'paint'"]),
    (["generate"], "", 2, ["PROMPT", "a prompt is needed"]),
    (["generate", "x", "-o", "out.bmp"], "", 2, ["-o", ".png, .jpg, .jpeg, .webp"]),
    (["generate", "x", "-o", "file/out.png"], "", 2, ["-o", "file/out.png"]),
    (["generate", "x", "-o", "folder.png"], "", 2, ["-o", "folder.png"]),
    (["plan", "x", "--width", "many"], "", 2, ["width", "'many'", "a multiple of 8"]),
    (["plan", "x", "--scheduler", "eular"], "", 2, ["scheduler", "did you mean euler?"]),
    (["plan", "x", "--model", "shapes-sd51"], "", 3, ["there is no such model", "did you mean shapes-sd15?"]),
    (["plan", "--request", "-"], '{"prompt": ', 2, ["this is no JSON"]),
    (["plan", "--request", "-"], '{"prompt": "x", "promt": 3}', 2, ["promt", "there is no such field", "did you mean prompt?"]),
    (["plan", "--request", "-"], '{"prompt": ' + "[" * 100_000, 2, ["JSON"]),
    (["plan", "--request", "missing.json"], "", 2, ["--request", "missing.json"]),
    (["replay", "missing.png"], "", 5, ["missing.png"]),
    (["models", "--models", "missing"], "", 2, ["missing is no folder"]),
])  # fmt: skip
def test_each_kind_of_mistake_has_its_exit_code(
    arguments: list[str], stdin: str, code: int, said: list[str],
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:
    "The exit code and standard error say what is wrong; a place that cannot be written is found before a picture is made."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("diffusion_workers.cli._service", pytest.fail)  # no mistake here is worth loading a model
    assert_fails(call(arguments, stdin, capsys, monkeypatch), code, *said)


@pytest.mark.parametrize("command", [[], ["generate"], ["plan"], ["models"], ["replay"], ["train-shapes"]], ids=lambda command: command[0] if command else "all")
def test_help(command: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    "Help goes to standard output and is no mistake."
    done = call([*command, "--help"], "", capsys, monkeypatch)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: " + " ".join(["diffusion-workers", *command]))
