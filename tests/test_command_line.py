"""The command line: files, standard output and standard error, exit codes, help and completion."""

import argparse
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_workers.cli.main import COMMANDS, command_parsers, main, make_parser
from diffusion_workers.request.metadata import read_metadata
from ez_diffusion_client.models import OpResult

COMMAND = str(Path(sys.executable).parent / "diffusion-workers")
PROGRAM = "import sys; from diffusion_workers.cli.main import main; sys.exit(main())"  # what COMMAND runs
FIELDS = {"prompt": "a red circle on a white background", "seed": 7, "num_inference_steps": 2, "scheduler": "euler"}
PATIENCE = 300  # seconds until a process counts as stuck; never a measure of speed
TRACEBACK = "Traceback (most recent call last)"


def environment() -> dict[str, str]:
    "The environment of a process: CPU, no network, only the models of the package."
    own = {key: value for key, value in os.environ.items() if not key.startswith(("DIFFUSION_WORKERS_", "DO_TORCH_"))}
    return own | {"HF_HUB_OFFLINE": "1", "DIFFUSION_WORKERS_DEVICE": "cpu"}


def run(
    *arguments: str,
    cwd: Path,
    stdin: str = "",
    command: Sequence[str] = (COMMAND,),
) -> subprocess.CompletedProcess:
    "Run the command to its end, with its output as text."
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def assert_fails(done: subprocess.CompletedProcess, code: int, *said: str) -> None:
    "Assert exit code `code`, the reason on standard error without a traceback, and no standard output."
    assert (done.returncode, done.stdout) == (code, ""), done.stdout + done.stderr
    assert TRACEBACK not in done.stderr
    missing = [part for part in said if part not in done.stderr]
    assert not missing, f"{missing} not in:\n{done.stderr}"


# --- images -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("command")


@pytest.fixture(scope="module")
def written(folder: Path) -> tuple[Path, subprocess.CompletedProcess]:
    "An image generated with options, in a folder that did not exist, and the process that wrote it."
    path = folder / "not" / "there" / "out.png"
    options = [
        part
        for name, value in FIELDS.items()
        if name != "prompt"
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return path, run("generate", FIELDS["prompt"], *options, "-o", str(path), cwd=folder)


def test_generate_writes_a_png(written) -> None:
    "The file is at the requested path, standard output names it, and the plan inside has the options."
    path, done = written
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and done.stdout.startswith(f"{path}  128 x 128, seed 7")
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (128, 128))
    plan = read_metadata(path).plan
    assert {name: getattr(plan, name) for name in ("prompt", "num_inference_steps")} == {
        name: FIELDS[name] for name in ("prompt", "num_inference_steps")
    }
    assert (plan.seeds, plan.scheduler.name) == ([7], "euler")


def test_replay_gives_the_same_pixels(written, folder: Path, quick_python: tuple[str, ...]) -> None:
    "The metadata of an image is enough to reproduce it."
    path, _ = written
    done = run("replay", str(path), "-o", "replayed.png", cwd=folder, command=[*quick_python, "-c", PROGRAM])
    assert (done.returncode, done.stdout) == (0, "the same pixels\n"), done.stderr
    np.testing.assert_array_equal(*(np.asarray(Image.open(name)) for name in (path, folder / "replayed.png")))


def test_json_requests_on_standard_input(written, folder: Path, quick_python: tuple[str, ...]) -> None:
    "JSON on standard input gives the same pixels as options; several images are numbered; --quiet prints nothing."
    path, _ = written
    done = run(
        "generate",
        "--request",
        "-",
        "--num-images",
        "2",
        "--quiet",
        "-o",
        "several.png",
        cwd=folder,
        stdin=json.dumps(FIELDS),
        command=[*quick_python, "-c", PROGRAM],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    first, second = (np.asarray(Image.open(folder / f"several-{number}.png")).astype(int) for number in (1, 2))
    assert abs(first - np.asarray(Image.open(path))).max() <= 1  # a batch of two may sum in another order
    assert read_metadata(folder / "several-2.png").plan.seeds == [7, 8]
    assert second.shape == first.shape


# --- controls and LoRAs -----------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a tiny SDXL model that has plain ControlNets and a union ControlNet."
    from diffusion_workers.pipeline.tiny_models import write_tiny_model

    path = tmp_path_factory.mktemp("models")
    write_tiny_model(path, "sdxl")
    return path


@pytest.fixture
def tiny(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "The working directory of the test, with a photo; the tiny model is available and the default."
    photo = Image.new("RGB", (96, 64), "white")
    photo.paste("red", (20, 10, 70, 50))
    photo.save(tmp_path / "photo, red.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_WORKERS_MODELS", str(models))
    monkeypatch.setenv("DIFFUSION_WORKERS_DEFAULT_MODEL", "sdxl")
    monkeypatch.setenv("DIFFUSION_WORKERS_DEVICE", "cpu")
    return tmp_path


def test_control_maps_and_replay_with_control_images(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    "The returned map is the same as from preprocess, and a replay accepts only the original control images."
    control = (
        "model=canny,image=photo, red.png,preprocessor=canny,param.low_threshold=50,scale=0.8,end=0.75,return_map=true"
    )
    assert (
        main(
            [
                "generate",
                "a red circle",
                "--seed",
                "1",
                "--controlnet",
                control,
                "--control",
                "tile:photo, red.png",
                "-o",
                "out.png",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "out-map0.png  64 x 64, the map of control 0" in shown and not Path("out-map1.png").exists()
    drawing = ["--preprocessor", "canny", "--parameter", "low_threshold=50", "--width", "64", "--height", "64"]
    assert main(["preprocess", "photo, red.png", *drawing]) == 0
    np.testing.assert_array_equal(*(np.asarray(Image.open(name)) for name in ("out-map0.png", "map.png")))
    assert main(["replay", "out.png"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in said] == [" --control-image 0=FILE", " --control-image 1=FILE"]
    assert (
        main(["replay", "out.png", "--control-image", "0=photo, red.png", "--control-image", "1=photo, red.png"]) == 0
    )
    assert main(["replay", "out.png", "--control-image", "0=map.png", "--control-image", "1=photo, red.png"]) == 13
    assert "--control-image 0=FILE: this is not the image that was used" in capsys.readouterr().err


def test_lists_of_models_and_preprocessors(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    "Models list their ControlNets, union ControlNets their modes, and preprocessors the bounds of their parameters."
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert "ControlNets: all (union: openpose, depth, " in listed
    rows = {line[2:].split()[0]: line for line in listed.splitlines() if not line.startswith("    ")}
    assert rows["sdxl-base-1.0"].endswith(("Stable Diffusion XL 1.0, missing", "1.0, download, about 7 GB"))
    assert rows["shapes-flux"].endswith("Shapes (Flux)")
    assert main(["preprocessors", "--json"]) == 0
    canny = json.loads(capsys.readouterr().out)[0]
    assert (canny["name"], canny["union_modes"], canny["needs_weights"]) == ("canny", ["canny"], False)
    assert canny["parameters"][0] == {
        "name": "low_threshold",
        "default": 100,
        "allowed": "an integer from 0 to 255",
        "low": 0,
        "high": 255,
        "meaning": "gradient above which an edge continues",
    }


PHOTO = "photo, red.png"


@pytest.mark.parametrize("arguments, code, said", [
    (["plan", "x", "--controlnet", "scael=0.8"], 2, ["--controlnet: unknown key", "did you mean scale?"]),
    (["plan", "x", "--controlnet", "scale=1,scale=2"], 2, ["--controlnet: scale is given twice"]),
    (["plan", "x", "--control", "photo.png"], 2, ["--control", "NAME:FILE"]),
    (["plan", "x", "--control", "canny:missing.png"], 5, ["--control canny:missing.png: image: cannot be read"]),
    (["plan", "x", "--control", f"cany:{PHOTO}"], 7, ["--control cany:", ": the model offers", "did you mean canny?"]),
    (
        ["plan", "x", "--controlnet", f"model=canny,image={PHOTO},scale=much"],
        2,
        ["--controlnet model=canny", ": conditioning_scale: ", "'much'"],
    ),
    (["plan", "x", "--controlnet", f"model=canny,image={PHOTO},preprocessor=canny,param.low_threshold=999"], 2,
     [": preprocessing.parameters.low_threshold: ", "an integer from 0 to 255"]),
    (["plan", "x", "--controlnet", f"model=all,image={PHOTO}"], 2, [": union_mode: ", "depth (1)"]),
    (["plan", "x", "--controlnets", "[{}", "--control", f"canny:{PHOTO}"], 2, ["controlnets", "a list"]),
    (["plan", "x", "--lora", "nobody:0.8"], 6, ["--lora nobody:0.8: the model offers no such LoRA"]),
    (["plan", "x", "--lora", "nobody:much"], 2, ["--lora nobody:much: scale: ", "'much'"]),
    (["plan", "x", "--lora", "nobody,blocks=1"], 2, ["--lora: unknown key", "'blocks'"]),
    (["plan", "x", "--refiner"], 4, ["--refiner: the manifest of this model names no refiner"]),
    (["plan", "x", "--max-sequence-length", "64"], 4, ["--max-sequence-length"]),
    (["plan", "x", "--loar", "style"], 2, ["did you mean --lora?"]),
    (["preprocess", PHOTO], 2, ["--preprocessor"]),
    (["preprocess", "text.png", "--preprocessor", "canny"], 5, ["IMAGE: this file is not an image", "text.png"]),
    (["preprocess", "missing.png", "--preprocessor", "canny"], 5, ["IMAGE: cannot be read", "missing.png"]),
    (["preprocess", PHOTO, "--preprocessor", "cany"], 2, ["--preprocessor: ", "did you mean canny?"]),
    (
        ["preprocess", PHOTO, "--preprocessor", "canny", "--parameter", "low_threshold=many"],
        2,
        ["--parameter low_threshold: ", "'many'"],
    ),
    (
        ["preprocess", PHOTO, "--preprocessor", "canny", "--parameter", "low_threshold"],
        2,
        ["--parameter", "NAME=VALUE"],
    ),
    (["preprocess", PHOTO, "--preprocessor", "canny", "--width", "60"], 2, ["width", "a multiple of 8"]),
    (["preprocess", PHOTO, "--preprocessor", "inpaint_mask"], 2, ["--mask"]),
    (["preprocess", PHOTO, "--preprocessor", "canny", "-o", "map.jpg"], 2, ["-o", "a name that ends in .png"]),
])  # fmt: skip
def test_control_and_lora_errors_name_the_field(
    arguments: list[str],
    code: int,
    said: list[str],
    tiny: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    "Errors are reported before a model is loaded, and no file is written."
    Path("text.png").write_text("no image")
    assert_fails(call(arguments, "", capsys, monkeypatch), code, *said)
    assert {path.name for path in tiny.iterdir()} == {PHOTO, "text.png"}


# --- planning without torch --------------------------------------------------


def test_cli_plans_match_service_plans(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    "The command line and the service make the same plan with the same warnings, except for the random seed."
    from diffusion_workers.service.service import DiffusionService

    Image.open(PHOTO).convert("CMYK").save("print.tiff")
    options = [
        "--image",
        "print.tiff",
        "--negative-prompt",
        "blue",
        "--guidance-scale",
        "1",
        "--width",
        "104",
        "--json",
    ]
    plans = []
    for _ in range(2):
        assert main(["plan", "a red circle", *options]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["seeds"] != plans[1]["seeds"]
    with DiffusionService() as service:
        result = service.plan(
            prompt="a red circle", image=Path("print.tiff"), negative_prompt="blue", guidance_scale=1.0, width=104
        )
    told = result.plan.model_dump(mode="json", exclude_none=True)
    assert len(told["warnings"]) >= 3  # the negative prompt, the size, the conversion of the image
    for plan in (*plans, told):
        plan.pop("seeds")
    assert plans[0] == plans[1] == told


REFUSED = [  # arguments that planning refuses
    ["generate", "x", "--model", "nobody"],
    ["generate", "x", "--lora", "nobody"],
    ["generate", "x", "--lora", "gone"],
    ["generate", "x", "--image", "missing.png"],
    ["generate", "x", "--image", "text.png"],
    ["generate", "x", "--control", f"nobody:{PHOTO}"],
    ["generate", "x", "--width", "4096"],
    ["generate", "x", "--num-inference-steps", "0"],
    ["generate", "x", "--scheduler", "eular"],
    ["generate", "x", "--profile", "nobody"],
    ["generate", "x", "--device", "tpu"],
    ["generate", "x", "-o", "out.bmp"],
    ["plan", "x", "--model", "nobody"],
    ["plan", "x", "--lora", "nobody"],
    ["plan", "x", "--image", "missing.png"],
    ["plan", "x", "--guidance-scale", "-1"],
    ["preprocess", "missing.png", "--preprocessor", "canny"],
    ["preprocess", PHOTO, "--preprocessor", "cany"],
    ["preprocess", PHOTO, "--preprocessor", "midas"],  # its weights are not on this machine
    ["preprocess", PHOTO, "--preprocessor", "canny", "--parameter", "low_threshold=999"],
    ["preprocess", PHOTO, "--preprocessor", "inpaint_mask"],
    ["preprocess", PHOTO, "--preprocessor", "canny", "--width", "60"],
    ["replay", "missing.png"],
    ["replay", PHOTO],
]


def test_planning_errors_do_not_import_torch(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    "A wrong name, path or value is reported without the seconds that torch and diffusers take to import."
    Path("text.png").write_text("no image")
    models = tmp_path_factory.mktemp("lora")
    gone = {"gone": {"source": {"file": str(models / "gone.safetensors")}}}
    (models / "lora.yaml").write_text(
        json.dumps({"family": "sd15", "source": {"builtin": "shapes-sd15"}, "loras": gone})
    )
    program = """
import json, sys
from diffusion_workers.cli.main import main, make_parser
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    print(json.dumps([arguments, code, "torch" in sys.modules or "diffusers" in sys.modules]))
"""
    env = environment() | {"DIFFUSION_WORKERS_MODELS": str(models), "DIFFUSION_WORKERS_DEFAULT_MODEL": "lora"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(REFUSED)], cwd=tiny, env=env, capture_output=True, text=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [arguments for arguments, _, _ in lines] == REFUSED, done.stderr
    assert [arguments for arguments, code, _ in lines if code == 0] == []
    assert [arguments for arguments, _, imported in lines if imported] == []


def test_replay_reports_a_changed_lora(tiny: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    "The receipt has the hash of a LoRA file, so a replay with another file of that name reports the change."
    import hashlib

    from diffusion_workers.models.manifest import builtin_path

    styles = tiny / "styles"
    styles.mkdir()
    source, other = (builtin_path("shapes-sd15") / "loras" / f"{name}.safetensors" for name in ("outline", "night"))
    (styles / "style.safetensors").write_bytes(source.read_bytes())
    monkeypatch.setenv("DIFFUSION_WORKERS_LORAS", str(styles))
    arguments = ["--model", "shapes-sd15", "--lora", "style.safetensors", "--num-inference-steps", "2", "--seed", "1"]
    assert main(["generate", "a red circle", *arguments, "-o", "styled.png"]) == 0
    planned = read_metadata(Path("styled.png")).plan.loras[0]
    assert planned.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert planned.source == "file:style.safetensors"
    assert main(["replay", "styled.png"]) == 0
    assert "has changed" not in capsys.readouterr().err
    (styles / "style.safetensors").write_bytes(other.read_bytes())
    assert main(["replay", "styled.png"]) == 1
    said = capsys.readouterr().err
    assert "loras[0].name: the file of this LoRA has changed since the image was made" in said


# --- interrupting -----------------------------------------------------------


def read_terminal(terminal: int, until: str | None = None) -> str:
    "Read the output of a terminal, up to a text or to its end."
    shown, give_up = "", time.monotonic() + PATIENCE
    while until is None or until not in shown:
        assert time.monotonic() < give_up, f"waited in vain for {until or 'the end'}:\n{shown}"
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError as error:  # on Linux, when the process has closed its end
            assert error.errno == errno.EIO
            data = b""
        if not data:
            break
        shown += data.decode(errors="replace")
    return shown


def test_ctrl_c_stops_a_long_generation(folder: Path) -> None:
    "Ctrl-C during 150 steps of many images: one final line, exit code 130 within a minute, no file."
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    arguments = ["generate", "a red circle", "--num-inference-steps", "150", "--num-images", "32", "-o", "never.png"]
    accept_interrupts = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a test run in the background of a shell ignores interrupts
    process = subprocess.Popen(
        [COMMAND, *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        preexec_fn=accept_interrupts,
    )
    try:
        os.close(theirs)
        assert "denoising" in read_terminal(ours, until="denoising")
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


# --- errors -----------------------------------------------------------------


def test_device_errors_name_the_option(capsys: pytest.CaptureFixture) -> None:
    "A well-formed device name that does not exist on any machine."
    assert main(["generate", "x", "--device", "cuda:99"]) != 0
    said = capsys.readouterr().err
    assert "--device" in said and "diffusion-workers: device" not in said


def options_with_values(command: str) -> dict[str, argparse.Action]:
    "Every option of a command that takes a value, under all of its names, including hidden ones."
    return {
        name: action
        for action in command_parsers(make_parser())[command]._actions
        for name in action.option_strings
        if action.nargs != 0 and not name.startswith("--no-")
    }


FREE_TEXT = {  # options that take any text or an output path
    "negative_prompt",
    "prompt_2",
    "negative_prompt_2",
    "out",
    "force",
    "verbose",
    "quiet",
    "json",
    "save_plan",
}


def checked_options(command: str) -> list[str]:
    "The options whose values are validated."
    found = options_with_values(command)
    return sorted(name for name, action in found.items() if action.dest.removeprefix("field.") not in FREE_TEXT)


@pytest.mark.parametrize("name", checked_options("plan"))
def test_value_errors_name_the_option_as_typed(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    "The error names the option, not the path of the field that it sets."
    asked = call(["plan", "a red circle", name, "no/such:thing"], "", capsys, monkeypatch)
    named = [f"diffusion-workers: {name}:", f"diffusion-workers: {name} no/such:thing:"]
    assert asked.returncode != 0 and any(text in asked.stderr for text in named), asked.stderr


@pytest.mark.parametrize("arguments, stdin, code, said", [
    (["generate", "x", "--stepz", "3"], "", 2, ["there is no such option", "--stepz"]),
    (["plan", "--request", "-"], '{"prompt": "x", "num-images": 3}', 2, ["num-images", "there is no such field"]),
    (["plan", "x", "--image", "missing.png"], "", 5, ["image", "missing.png"]),
])  # fmt: skip
def test_errors_are_reported_on_standard_error(
    arguments: list[str], stdin: str, code: int, said: list[str], tmp_path: Path
) -> None:
    "A process that fails explains the error in words, and writes nothing to standard output."
    assert_fails(run(*arguments, cwd=tmp_path, stdin=stdin), code, *said)


def call(
    arguments: list[str], stdin: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> subprocess.CompletedProcess:
    "Like `run`, but in this process, which saves the startup time."
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    try:
        code = main(arguments)
    except SystemExit as done:
        code = done.code
    return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())


@pytest.mark.parametrize("arguments, stdin, code, said", [
    ([], "", 2, ["usage: diffusion-workers", "COMMAND"]),
    (["paint", "a circle"], "", 2, ["there is no such command", "'paint'"]),
    (["genrate", "a circle"], "", 2, ["did you mean generate?"]),
    (["--versoin"], "", 2, ["--versoin: there is no such option", "did you mean --version?"]),
    (["serve", "--prot", "80"], "", 2, ["--prot", "did you mean --port?"]),
    (["models", "--modles", "x"], "", 2, ["--modles", "did you mean --models?"]),
    (["replay", "x.png", "--show-requst"], "", 2, ["did you mean --show-request?"]),
    (["worker", "--chek-config"], "", 2, ["did you mean --check-config?"]),
    (["plan", "x", "--mask-blur", "3"], "", 2, ["did you mean --inpaint-mask-blur?"]),
    (["generate"], "", 2, ["PROMPT", "a prompt is needed"]),
    (["generate", "x", "-o", "out.bmp"], "", 2, ["-o", ".png, .jpg, .jpeg, .webp"]),
    (["generate", "x", "-o", "file/out.png"], "", 2, ["-o", "file/out.png"]),
    (["generate", "x", "-o", "taken.png"], "", 2, ["-o", "the file exists", "--force overwrites it"]),
    (["generate", "x", "-o", "{sede}.png"], "", 2, ["-o", "did you mean {seed}?"]),
    (["generate", "x", "--image", "taken.png", "-o", "taken.png", "-f"], "", 5, ["--image", "not an image"]),
    (["generate", "x", "-o", "-", "-n", "2"], "", 4, ["-o", "standard output takes one image"]),
    (["generate", "x", "--url", "http://127.0.0.1:9", "--device", "cpu"], "", 4, ["--device"]),
    (["generate", "--prompts", "missing.txt"], "", 2, ["--prompts", "missing.txt"]),
    (["plan", "x", "--steps", "0"], "", 2, ["--steps", "from 1 to"]),
    (["plan", "x", "--cfg-scale", "much"], "", 2, ["--cfg-scale", "'much'"]),
    (["plan", "x", "--width", "many"], "", 2, ["width", "'many'", "a multiple of 8"]),
    (["plan", "x", "--scheduler", "eular"], "", 2, ["scheduler", "did you mean euler?"]),
    (["plan", "x", "--model", "shapes-sd51"], "", 3, ["there is no such model", "did you mean shapes-sd15?"]),
    (["plan", "--request", "-"], '{"prompt": ', 2, ["not valid JSON"]),
    (
        ["plan", "--request", "-"],
        '{"prompt": "x", "promt": 3}',
        2,
        ["promt", "there is no such field", "did you mean prompt?"],
    ),
    (["plan", "--request", "-"], '{"prompt": ' + "[" * 100_000, 2, ["JSON"]),
    (["plan", "--request", "missing.json"], "", 2, ["--request", "missing.json"]),
    (["replay", "missing.png"], "", 5, ["missing.png"]),
    (["models", "--models", "missing"], "", 2, ["--models: there is no such folder"]),
    (["train-shapes"], "", 2, ["--out", "a folder is needed"]),
    (["train-shapes", "--part", "shapes-flx", "--out", "x"], "", 2, ["--part", "did you mean shapes-flux?"]),
    (["bench", "--adherence", "0"], "", 2, ["--adherence", "given 0", "at least 1"]),
    (["bench", "--fresh", "--plot", "speed.png"], "", 4, ["--plot", "leave out --plot or --fresh"]),
    (["bench", "--model", "dreamshaper-8", "--adherence", "4"], "", 4, ["--adherence", "shapes-sd15", "--model"]),
    (
        ["train-shapes", "--part", "shapes-flux", "--out", "x", "--minutes", "3"],
        "",
        4,
        ["--part", "belong to shapes-sd15"],
    ),
])  # fmt: skip
def test_each_kind_of_error_has_its_exit_code(
    arguments: list[str],
    stdin: str,
    code: int,
    said: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    "The exit code and standard error name the error; an unwritable output is found before generation."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken.png").write_text("a file that exists")
    monkeypatch.setattr(
        "diffusion_workers.cli.commands.make_service", pytest.fail
    )  # none of these errors may load a model
    assert_fails(call(arguments, stdin, capsys, monkeypatch), code, *said)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda command: "".join(command) or "all")
def test_help_fits_on_a_screen(
    command: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Help goes to standard output, in at most 40 lines of 100 columns, with examples at the end."
    monkeypatch.setenv("COLUMNS", "100")
    done = call([*command, "--help"], "", capsys, monkeypatch)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: diffusion-workers " + "".join(command))
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100, done.stdout
    assert "examples:" in lines and any(f"  diffusion-workers {''.join(command)}" in line for line in lines[-12:])


@pytest.mark.parametrize("command", ["generate", "plan", "preprocess", "serve"])
def test_help_all_lists_every_option(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    "`--help-all` lists every option that has a name of its own, and the values that enumerations accept."
    done = call([command, "--help-all"], "", capsys, monkeypatch)
    parser = command_parsers(make_parser(show_all=True))[command]
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert all(name in done.stdout for action in shown for name in action.option_strings)
    if command in ("generate", "plan"):
        assert {"--inpaint-mask-blur", "--use-karras-sigmas"} <= {name for one in shown for name in one.option_strings}
        assert "dpmpp_2m_sde" in done.stdout


def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    "The printed completion script includes uncommon options."
    script = run("--print-completion", "bash", cwd=tmp_path).stdout

    def completed(*words: str) -> set[str]:
        line = " ".join(["diffusion-workers", *words])
        lines = (
            f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_diffusion_workers; printf '%s\\n' ${{COMPREPLY[@]}}"
        )
        asked = subprocess.run(["bash", "-c", f"{script}\n{lines}"], cwd=tmp_path, capture_output=True, text=True)
        return set(asked.stdout.split())

    (tmp_path / "photo.png").touch()
    assert completed("pre") == {"preprocess", "preprocessors"}
    assert "--use-karras-sigmas" in completed("generate", "--use-k")
    assert completed("plan", "--scheduler", "dpmpp_3") == {"dpmpp_3m", "dpmpp_3m_sde"}
    assert completed("generate", "--image", "pho") == {"photo.png"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts_of_other_shells(
    shell: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = call(["--print-completion", shell], "", capsys, monkeypatch)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(text in done.stdout for text in ("preprocessors", "use-karras-sigmas", "dpmpp_3m_sde"))


@pytest.mark.parametrize(
    "arguments, field",
    [
        (["generate", "x", "--stepz", "3"], "--stepz"),
        (["serve", "--prot", "8"], "--prot"),
        (["models", "--server", "maybe"], "--server"),
        (["preprocess"], None),
        (["genrate"], None),
        (["plan", "x", "--steps", "0"], "--steps"),
        (["replay", "missing.png"], "IMAGE"),
        (["bench", "--rounds", "0"], "--rounds"),
        (["train-shapes", "--part", "nothing", "--out", "x"], "--part"),
        (["worker", "--chek-config"], "--chek-config"),
    ],
)  # fmt: skip
def test_errors_are_json_on_request(
    arguments: list[str],
    field: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    "With `--json` an error of any kind is a result on standard output, and standard error is empty."
    monkeypatch.chdir(tmp_path)
    done = call([*arguments, "--json"], "", capsys, monkeypatch)
    result = OpResult.model_validate_json(done.stdout)
    assert done.returncode > 0 and done.stderr == ""
    assert (result.ok, result.errors[0].field) == (False, field)


def test_settings_errors_are_json_on_request(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_WORKERS_DEVICE", "abacus")
    done = call(["models", "--json"], "", capsys, monkeypatch)
    assert (done.returncode, done.stderr) == (2, "")
    assert "DIFFUSION_WORKERS_DEVICE" in OpResult.model_validate_json(done.stdout).errors[0].message


def test_train_shapes_and_worker_print_json_on_request(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    "The parts that can be trained, and the configuration of the worker."
    parts = json.loads(call(["train-shapes", "--part", "list", "--json"], "", capsys, monkeypatch).stdout)
    assert "shapes-sd15" in parts and "shapes-sdxl/canny" in parts
    monkeypatch.setenv("DIFFUSION_WORKERS_DEVICE", "cpu")
    facts = json.loads(call(["worker", "--check-config", "--json"], "", capsys, monkeypatch).stdout)
    assert facts["settings"]["DIFFUSION_WORKERS_DEVICE"] == {"value": "cpu", "from": "environment"}
    assert facts["default_model"] in facts["models"] and "weights" in facts["sources"]


def test_replay_reports_changed_weights(tiny: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    "The receipt has the hash of each component's weights, so a replay names the component that has changed."
    import hashlib
    import shutil

    from safetensors.torch import load_file, save_file

    from diffusion_workers.models.manifest import builtin_path

    shutil.copytree(builtin_path("shapes-sd15"), tiny / "model")
    manifest = {
        "family": "sd15",
        "source": {"folder": "model"},
        "variant": "fp16",
        "defaults": {"width": 128, "height": 128},
    }
    (tiny / "own.yaml").write_text(json.dumps(manifest))
    monkeypatch.setenv("DIFFUSION_WORKERS_MODELS", str(tiny))
    monkeypatch.setenv("DIFFUSION_WORKERS_DEFAULT_MODEL", "own")
    arguments = ["--model", "own", "--num-inference-steps", "2", "--seed", "1"]
    assert main(["generate", "a red circle", *arguments, "-o", "own.png"]) == 0
    environment = read_metadata(Path("own.png")).plan.environment
    unet = tiny / "model" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    assert {*environment.weights} == {"unet", "vae", "text_encoder"}
    assert environment.weights["unet"] == hashlib.sha256(unet.read_bytes()).hexdigest()
    assert main(["replay", "own.png"]) == 0
    assert "have changed" not in capsys.readouterr().err
    save_file({name: tensor * 1.05 for name, tensor in load_file(unet).items()}, unet)
    assert main(["replay", "own.png"]) == 1
    said = capsys.readouterr().err
    assert "note: model: the weights of the unet have changed since the image was made" in said
    assert "vae" not in said


@pytest.mark.parametrize(("prompt", "told"), [("a blue square", False), ("two blue squares", True)])
def test_plan_warns_about_prompts_with_too_many_shapes(prompt: str, told: bool, capsys, monkeypatch) -> None:
    "A model that draws at most four shapes warns if numbers and nouns in the prompt ask for five."
    done = call(["plan", f"three red circles and {prompt}", "--model", "shapes-flux"], "", capsys, monkeypatch)
    assert done.returncode == 0
    assert ("draws at most 4 shapes" in done.stderr) == told
