"Command-line output: name templates, overwrite protection, prompt batches, JSON, and the same commands on a server."

import io
import json
import os
from pathlib import Path

import pytest
from live_server import live_server
from PIL import Image

from diffusion_workers.cli import commands
from diffusion_workers.cli.main import main
from diffusion_workers.request.metadata import read_metadata
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import OpResult

QUICK = ["--steps", "2", "--sampler", "Euler a"]
RED = "a red circle on a white background"


@pytest.fixture(scope="module")
def shared() -> DiffusionService:
    with DiffusionService(device="cpu", log_failures=False) as service:
        yield service


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: DiffusionService) -> Path:
    "The working directory of the test; all of its commands share one service."

    class Kept:
        def __enter__(self) -> DiffusionService:
            return shared

        def __exit__(self, *exc_info) -> None:
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "make_service", lambda arguments: Kept())
    return tmp_path


def test_output_templates_folders_and_default_names(here: Path, capsys: pytest.CaptureFixture) -> None:
    "Templates are filled in, files in a folder get generated names, and without -o no file is ever overwritten."
    assert main(["generate", RED, *QUICK, "-n", "2", "--seed", "5", "-o", "{model}/{index:02}-{seed}.webp"]) == 0
    assert sorted(path.name for path in Path("shapes-sd15").iterdir()) == ["01-5.webp", "02-6.webp"]
    assert Image.open("shapes-sd15/01-5.webp").format == "WEBP"
    assert main(["generate", "A red circle!", *QUICK, "--seed", "5", "-o", "images/"]) == 0
    assert main(["generate", "A red circle!", *QUICK, "--seed", "5", "-o", "images"]) == 0
    assert sorted(path.name for path in Path("images").iterdir()) == ["a-red-circle-5-2.png", "a-red-circle-5.png"]
    for _ in range(2):
        assert main(["generate", RED, *QUICK]) == 0
    assert Path("out.png").exists() and Path("out-2.png").exists()
    plan = read_metadata(Path("out.png")).plan
    assert (plan.num_inference_steps, plan.scheduler.name) == (2, "euler_ancestral")
    capsys.readouterr()


def test_generated_names_use_the_requested_format(here: Path, capsys: pytest.CaptureFixture) -> None:
    "Generated names end in .webp for WebP; a typed extension overrides a request file, but not --output-format."
    webp = ["--output-format", "webp"]
    assert main(["generate", "A star", *QUICK, "--seed", "5", *webp, "-o", "images/"]) == 0
    assert main(["generate", RED, *QUICK, *webp]) == 0
    assert [Image.open(path).format for path in ("images/a-star-5.webp", "out.webp")] == ["WEBP", "WEBP"]
    Path("recipe.json").write_text(json.dumps({"prompt": RED, "output": {"format": "webp"}}))
    assert main(["generate", "--request", "recipe.json", *QUICK, "-o", "a.png"]) == 0
    assert read_metadata(Path("a.png")).plan.output.format == "png"
    capsys.readouterr()
    assert main(["generate", RED, *QUICK, *webp, "-o", "b.png"]) == 4
    assert "--output-format: the extension of the output file means png; given 'webp'" in capsys.readouterr().err


def test_files_are_overwritten_only_by_force_and_inputs_never(here: Path, capsys: pytest.CaptureFixture) -> None:
    "An existing file is refused before generation; --force overwrites it, unless the request reads it."
    Image.new("RGB", (128, 128), "white").save("start.png")
    before = Path("start.png").read_bytes()
    arguments = ["generate", RED, *QUICK, "-o", "start.png"]
    assert main(arguments) == 2
    assert "-o: the file exists; given 'start.png'; --force overwrites it" in capsys.readouterr().err
    assert main([*arguments, "--image", "start.png", "--force"]) == 2
    assert "the request reads this file" in capsys.readouterr().err
    assert Path("start.png").read_bytes() == before
    assert main([*arguments, "-f"]) == 0 and Path("start.png").read_bytes() != before


def test_standard_output_gets_only_the_image(here: Path, capfdbinary: pytest.CaptureFixture) -> None:
    assert main(["generate", RED, *QUICK, "-o", "-"]) == 0
    written = capfdbinary.readouterr().out
    assert Image.open(io.BytesIO(written)).format == "PNG" and not list(here.iterdir())


def test_images_are_kept_elsewhere_when_the_disk_is_full(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    "The error names the folder that holds the images instead."
    save, failed = OpResult.save, []

    def full(self: OpResult, path: str | Path) -> list[Path]:
        if Path(path).parent == Path(".") and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device")
        return save(self, path)

    monkeypatch.setattr(OpResult, "save", full)
    assert main(["generate", RED, *QUICK, "-n", "2", "-o", "out.png"]) == 2
    told = capsys.readouterr().err
    assert failed and "No space left on device" in told
    folder = Path(told.rpartition("the images are in ")[2].strip())
    assert [Image.open(path).size for path in sorted(folder.iterdir())] == [(128, 128)] * 2


def test_a_batch_of_prompts_is_resumed(here: Path, capsys: pytest.CaptureFixture) -> None:
    "Each CSV row is a request, an error in any row is found first, and a second run generates nothing."
    Path("wrong.csv").write_text("prompt,steps\na red circle,2\na blue square,many\n")
    assert main(["generate", "--prompts", "wrong.csv", "-o", "images"]) == 2
    assert "entry 2 of wrong.csv: num_inference_steps" in capsys.readouterr().err
    Path("table.csv").write_text("prompt,seed,cfg_scale\na red circle,5,1\na blue square,6,2\n")
    assert main(["generate", "--prompts", "table.csv", *QUICK, "-o", "images"]) == 0
    files = capsys.readouterr().out.splitlines()
    plans = [read_metadata(Path(file)).plan for file in files]
    assert [(plan.seeds[0], plan.guidance_scale, plan.num_inference_steps) for plan in plans] == [(5, 1, 2), (6, 2, 2)]
    assert main(["generate", "--prompts", "table.csv", *QUICK, "-o", "images"]) == 0
    done = capsys.readouterr()
    assert done.out == "" and "2 of 2 are done already" in done.err


def test_json_output_of_success_and_failure(here: Path, capsys: pytest.CaptureFixture) -> None:
    "Standard output is one JSON value: file names instead of image data, or errors that name the option."
    assert main(["generate", RED, *QUICK, "--seed", "5", "-o", "a.png", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    image = made["generation"]["images"][0]
    assert (made["status"], image["image"], image["seed"]) == ("success", "a.png", 5)
    assert main(["generate", RED, "--steps", "0", "--json"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["errors"][0]["field"] == "--steps" and told.err == ""


def test_commands_work_the_same_on_a_server(
    here: Path, shared: DiffusionService, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    "plan, models, preprocessors, preprocess, generate and replay take --url; --server auto finds a local server."
    Image.new("RGB", (128, 128), "white").save("white.png")
    image = Image.open("white.png")
    image.paste("red", (30, 30, 90, 90))
    image.save("square.png")

    def shown(*arguments: str) -> str:
        assert main([*arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    with live_server(shared) as (url, _):
        remote = ["--url", url]
        local_plan = json.loads(shown("plan", RED, "--seed", "1", *QUICK, "--json"))
        assert json.loads(shown("plan", RED, "--seed", "1", *QUICK, "--json", *remote)) == local_plan
        assert "shapes-sd15" in shown("models", *remote) and "canny" in shown("preprocessors", *remote)
        for target in ([], remote):
            shown("preprocess", "square.png", "--preprocessor", "canny", "-o", f"map{len(target)}.png", *target)
        assert Path("map0.png").read_bytes() == Path("map2.png").read_bytes()
        shown("generate", RED, *QUICK, "--seed", "3", "-o", "far.png", *remote)
        assert shown("replay", "far.png", *remote) == "the same pixels\n"
        monkeypatch.setenv("DIFFUSION_WORKERS_PORT", url.rpartition(":")[2])
        monkeypatch.setattr(commands, "make_service", pytest.fail)
        shown("generate", RED, *QUICK, "--seed", "3", "-o", "auto.png", "--server", "auto")
        assert Image.open("auto.png").tobytes() == Image.open("far.png").tobytes()
    assert os.listdir(here).count("auto.png") == 1
