"""Textual inversion embeddings, wildcards, styles, LoRA tags and AND in prompts, compared with equivalent requests."""

import asyncio
import json
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from live_server import live_server
from PIL import Image
from safetensors.numpy import save_file

from diffusion_workers import DiffusionService
from diffusion_workers.cli.main import main
from diffusion_workers.models.manifest import builtin_path
from diffusion_workers.models.store import find_manifest
from diffusion_workers.planning.plan import make_plan, request_from_plan
from diffusion_workers.request.errors import RequestError
from diffusion_workers.request.metadata import read_metadata
from diffusion_workers.settings.service import Settings
from diffusion_workers.settings.worker import WorkerSettings
from diffusion_workers.shapes.scenes import read_scene
from diffusion_workers.sweep.folder import checked_requests, request_product
from diffusion_workers.worker.handler import Worker
from ez_diffusion_client import pil_images
from ez_diffusion_client.models import GenerationRequest

RED = {"prompt": "a red circle on a white background", "seed": 3, "num_inference_steps": 4}
READ = RED | {"prompt_syntax": "a1111"}


def rows(model: str, words: str, number: str = "") -> np.ndarray:  # (tokens, width) float32
    "The token embeddings of words in a text encoder of a built-in model."
    import torch
    from safetensors import safe_open
    from transformers import CLIPTokenizer

    folder = builtin_path(model)
    ids = CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}")(words, add_special_tokens=False).input_ids
    (file,) = (folder / f"text_encoder{number}").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        name = next(key for key in list(weights.keys()) if key.endswith("token_embedding.weight"))
        return weights.get_tensor(name)[torch.tensor(ids)].float().numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with embeddings in every file layout, wildcards and styles."
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("embeddings/sub", "wildcards/warm", "styles"):
        (folder / name).mkdir(parents=True)
    files = {
        "sub/my-red": {"emb_params": rows("shapes-sd15", "red")},
        "red circle": {"<red-circle>": rows("shapes-sd15", "red circle").astype(np.float16)},
        "single": {"blue": rows("shapes-sd15", "blue")[0]},
        "xl-red": {"clip_l": rows("shapes-sdxl", "red"), "clip_g": rows("shapes-sdxl", "red", "_2")},
        "wide": {"emb_params": np.ones((1, 7), np.float32)},
    }
    for name, tensors in files.items():
        save_file(tensors, folder / "embeddings" / f"{name}.safetensors")
    (folder / "embeddings" / "old.pt").write_bytes(b"a pickle")
    (folder / "wildcards" / "color.txt").write_text("red\nblue\n3::__warm/*__\n")
    (folder / "wildcards" / "warm" / "yellow.txt").write_text("yellow\n")
    (folder / "styles" / "mine.yaml").write_text(
        'white: "{prompt} on a white background"\ndrawn: {prompt: "a {red|blue} {prompt}", negative_prompt: green}\n'
    )
    (folder / "styles" / "shared.csv").write_text('name,prompt,negative_prompt\nnavy,"on a navy background",\n')
    return folder


def settings_of(folder: Path) -> dict[str, Path]:
    return {f"{name}_folders": folder / f"{name}s" for name in ("embedding", "wildcard", "style")}


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[DiffusionService]:
    with DiffusionService(Settings(device="cpu", **settings_of(folder))) as made:
        yield made


def pixels(result) -> np.ndarray:
    return np.asarray(result.raise_for_status().images[0]).astype(int)


def same(a, b) -> bool:
    return bool((pixels(a) == pixels(b)).all())


# --- embeddings -------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "prompt"),
    [
        ("shapes-sd15", "a my-red circle on a white background"),
        ("shapes-sd15", "a <My-Red> circle on a white background"),
        ("shapes-sd15", "a embedding:my-red.safetensors circle on a white background"),
        ("shapes-sd15", "a red circle on a white background"),  # `red circle` is an embedding of two vectors
        ("shapes-sdxl", "a xl-red circle on a white background"),
    ],
)
def test_embedding_of_a_word_gives_the_image_of_the_word(service: DiffusionService, model: str, prompt: str) -> None:
    "In every file layout, for one and two text encoders, and for whole-word names in any case."
    made = service.generate(READ, model=model, prompt=prompt)
    assert same(made, service.generate(RED, model=model)) and made.generation.plan.embeddings


def test_embeddings_in_the_negative_prompt(service: DiffusionService) -> None:
    fields = {"guidance_scale": 4.0, "negative_prompt": "single, my-red"}
    made = service.generate(READ, **fields)
    assert same(made, service.generate(READ, **fields | {"negative_prompt": "blue, red"}))
    assert [each.name for each in made.generation.plan.embeddings] == ["red circle", "single", "my-red"]


def test_embedding_names_inside_words_are_ignored(service: DiffusionService) -> None:
    plan = service.plan(READ, prompt="my-reds amy-red singles").plan
    assert plan.embeddings is None


def test_embeddings_leave_the_pipeline_unchanged(service: DiffusionService) -> None:
    "Tokenizer, text encoder and encoder cache stay unchanged, also after a refused request."
    pipe = service.pipeline("shapes-sd15")
    table = pipe.text_encoder.get_input_embeddings()
    before, size, state = service.generate(RED), len(pipe.tokenizer), table.weight.clone()
    service.generate(READ, prompt="a (my-red:1.3) [single|my-red] circle")
    refused = service.generate(READ, prompt="a wide my-red circle")
    assert not refused.ok and "its vectors have 7 numbers, and clip_l of this model takes 128" in refused.message
    assert same(before, service.generate(RED))
    assert len(pipe.tokenizer) == size and (table.weight == state).all()
    assert not table._forward_hooks and not hasattr(table, "injected_vectors")


def test_changed_embedding_files_are_reloaded(service: DiffusionService, folder: Path) -> None:
    "With the same name and the same token ids, neither the file nor the cached encoder output is stale."
    file = folder / "embeddings" / "changing.safetensors"
    prompt = "a changing circle on a white background"
    for word in ("red", "blue"):
        save_file({"emb_params": rows("shapes-sd15", word)}, file)
        made = service.generate(READ, prompt=prompt)
        assert same(made, service.generate(RED, prompt=prompt.replace("changing", word)))


def test_plans_pin_their_embeddings(service: DiffusionService, folder: Path) -> None:
    "A replay gives the same image after another embedding was added to the folder; an unknown name is refused."
    made = service.generate(READ, prompt="a my-red square on a white background")
    (planned,) = made.generation.plan.embeddings
    assert (planned.source, len(planned.sha256)) == ("file:my-red.safetensors", 64)
    again = request_from_plan(made.generation.plan)
    new = folder / "embeddings" / "square.safetensors"
    save_file({"emb_params": rows("shapes-sd15", "circle")}, new)
    try:
        assert same(made, service.generate(again))
        assert not same(made, service.generate(READ, prompt="a my-red square on a white background"))
    finally:
        new.unlink()
    gone = service.plan(again, embeddings=["my-rde"])
    assert gone.errors[0].code == "unknown_embedding" and "did you mean my-red?" in gone.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "old"}, "torch.load('NAME.pt', weights_only=True)"),
        ({"prompt": "xl-red"}, "it has vectors for two text encoders, and this model has one"),
        ({"prompt": "my-red", "model": "shapes-sdxl"}, "it has vectors for one text encoder, and this model has two"),
        ({"prompt": "wide"}, "its vectors have 7 numbers, and clip_l of this model takes 128"),
        ({"prompt": "wide", "model": "shapes-flux"}, "its vectors have 7 numbers, and clip_l of this model takes"),
        ({"prompt": "a", "negative_prompt": "old"}, "negative_prompt: the embedding old cannot be used"),
        ({"prompt": "a", "prompt_syntax": "plain", "embeddings": ["my-red"]}, "embeddings does nothing with a plain"),
    ],
)
def test_unusable_embeddings_are_refused_during_planning(service: DiffusionService, fields: dict, message: str) -> None:
    assert message in service.plan(READ, **fields).message


def test_embedding_names_read_as_words_produce_warnings(service: DiffusionService) -> None:
    (missing,) = service.plan(READ, prompt="a circle, embedding:my-rde").warnings
    assert "did you mean my-red?" in missing.message and missing.given == "'my-rde'"
    (plain,) = service.plan(RED, prompt="a my-red circle").warnings
    assert "set prompt_syntax: a1111" in plain.message
    flux = service.plan(READ, prompt="a my-red circle", model="shapes-flux").warnings
    assert any("T5 reads their names as words" in note.message for note in flux)


def test_encode_supports_the_prompt_syntax(service: DiffusionService) -> None:
    "Embeddings from `encode` give the same image as the prompt, with weights and textual inversions."
    prompt = "a (my-red:1.4) circle BREAK on a white background"
    embeds = service.encode(READ, prompt=prompt)
    fields = {name: value for name, value in RED.items() if name != "prompt"}
    assert same(service.generate(fields, prompt_embeds=embeds), service.generate(READ, prompt=prompt))
    with pytest.raises(RequestError, match="changes from step to step"):
        service.encode(READ, prompt="a [red:blue:0.5] circle")


def test_replay_reports_a_changed_embedding_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "toy.safetensors"
    save_file({"emb_params": rows("shapes-sd15", "red")}, file)
    monkeypatch.setenv("DIFFUSION_WORKERS_EMBEDDINGS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = ["--prompt-syntax", "a1111", "--num-inference-steps", "2", "--seed", "1"]
    assert main(["generate", "a toy circle", *options, "-o", "made.png"]) == 0
    assert main(["replay", "made.png"]) == 0
    assert "has changed" not in capsys.readouterr().err
    save_file({"emb_params": rows("shapes-sd15", "blue")}, file)
    assert main(["replay", "made.png"]) == 1
    assert "embeddings[0]: the file of this embedding has changed" in capsys.readouterr().err


# --- wildcards and styles ---------------------------------------------------


def test_wildcards_and_variants_are_drawn_from_the_seed(service: DiffusionService) -> None:
    "The plan holds the written and the resolved prompt, so a replay needs no wildcard or style files."
    fields = {"prompt": "circle", "styles": ["drawn", "white"], "negative_prompt": "a __color__ square"}
    plans = [service.plan(READ, **fields, seed=seed).plan for seed in range(12)]
    assert {plan.prompt for plan in plans} == {f"a {c} circle on a white background" for c in ("red", "blue")}
    drawn = {"a red square, green", "a blue square, green", "a yellow square, green"}
    assert {plan.negative_prompt for plan in plans} == drawn
    made = service.generate(READ, **fields, guidance_scale=3.0)
    plan = made.generation.plan
    assert (plan.written_prompt, plan.written_negative_prompt) == ("circle", "a __color__ square")
    assert plan.styles == ["drawn", "white"]
    with DiffusionService(device="cpu") as bare:
        assert same(made, bare.generate(request_from_plan(plan)))


def test_wildcards_in_a_manifest_negative_prompt_are_resolved(service: DiffusionService) -> None:
    "With and without a style; a plain prompt uses it unchanged, and an unknown wildcard in it is refused."
    manifest = service.manifest("shapes-sd15")
    defaults = manifest.defaults.model_copy(update={"negative_prompt": "a __color__ square"})
    manifest = manifest.model_copy(update={"defaults": defaults})
    asked = GenerationRequest(prompt="a circle", prompt_syntax="a1111", seed=4, guidance_scale=3.0)
    plan = make_plan(asked, manifest)
    assert plan.negative_prompt in {"a red square", "a blue square", "a yellow square"}
    assert plan.written_negative_prompt == "a __color__ square"
    styled = make_plan(asked.model_copy(update={"styles": ["white"]}), manifest)
    assert styled.negative_prompt == plan.negative_prompt
    assert make_plan(request_from_plan(plan), manifest).negative_prompt == plan.negative_prompt
    plain = make_plan(asked.model_copy(update={"prompt_syntax": None}), manifest)
    assert (plain.negative_prompt, plain.written_negative_prompt) == ("a __color__ square", None)
    given = make_plan(asked.model_copy(update={"negative_prompt": "green"}), manifest)
    assert (given.negative_prompt, given.written_negative_prompt) == ("green", None)
    wrong = defaults.model_copy(update={"negative_prompt": "a __nowhere__ square"})
    with pytest.raises(RequestError, match="negative_prompt"):
        make_plan(asked, manifest.model_copy(update={"defaults": wrong}))


def test_styles_apply_to_plain_prompts(service: DiffusionService) -> None:
    made = service.generate(RED, prompt="a red circle", styles=["white"])
    assert same(made, service.generate(RED)) and made.generation.plan.written_prompt == "a red circle"
    assert service.plan(RED, prompt="a circle", styles=["navy"]).plan.prompt == "a circle, on a navy background"
    unknown = service.plan(RED, styles=["white", "wihte"])
    assert unknown.errors[0].code == "unknown_style" and "styles[1]" in unknown.message
    assert "did you mean white?" in unknown.message


@pytest.mark.parametrize("name", ["../embeddings/old", "/etc/hostname", "warm/../color", "..", "nothing"])
def test_wildcard_and_style_names_are_not_paths(service: DiffusionService, name: str) -> None:
    assert "there is no wildcard" in service.plan(READ, prompt=f"__{name}__").message
    assert service.plan(READ, styles=[name]).errors[0].code == "unknown_style"


def test_styles_are_axes_of_sweeps_and_grids(service: DiffusionService) -> None:
    "Each seed draws one variant, the same for every style."
    axes = {"styles": [[], ["white"]], "seed": [1, 2, 3, 4]}
    requests = checked_requests(request_product(READ | {"prompt": "a {red|blue} circle"}, **axes)).values()
    plans = [service.plan(request).plan for request in requests]
    drawn = [plan.prompt.split()[1] for plan in plans]
    assert set(drawn) == {"red", "blue"} and drawn[:4] == drawn[4:]
    assert [plan.prompt.endswith("on a white background") for plan in plans] == [False] * 4 + [True] * 4

    from diffusion_workers.panel.grid import Axis, make_cells

    given = GenerationRequest(**READ)
    by_style = Axis("styles", ([], ["white", "drawn"]))
    assert [cell.request.styles for cell in make_cells(given, [by_style])] == [[], ["white", "drawn"]]
    assert [by_style.label(value) for value in by_style.values] == ["styles none", "styles white, drawn"]


def test_server_worker_and_command_line_use_the_prompt_folders(
    service: DiffusionService,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    request = READ | {"prompt": "my-red circle", "styles": ["white"], "num_inference_steps": 1}
    with live_server(service) as (url, _):
        asked = urllib.request.Request(
            f"{url}/plan", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as response:
            planned = json.load(response)["plan"]
        with urllib.request.urlopen(f"{url}/models") as response:
            listed = json.load(response)["models"][0]
    assert planned["prompt"] == "my-red circle on a white background" and planned["embeddings"][0]["name"] == "my-red"
    assert "my-red" in listed["embeddings"] and listed["styles"] == ["drawn", "navy", "white"]
    assert listed["wildcards"] == ["color", "warm/yellow"]
    worker = Worker(WorkerSettings(device="cpu", **settings_of(folder)))
    try:
        answer = asyncio.run(worker.handle({"id": "job-1", "input": request}))
    finally:
        worker.close()
    assert answer["generation"]["plan"]["embeddings"] == planned["embeddings"]
    for name in ("EMBEDDINGS", "WILDCARDS", "STYLES"):
        monkeypatch.setenv(f"DIFFUSION_WORKERS_{name}", str(folder / name.lower()))
    monkeypatch.chdir(tmp_path)
    options = ["--prompt-syntax", "a1111", "--styles", "white", "--num-inference-steps", "1", "--seed", "3"]
    assert main(["generate", "my-red circle", *options, "-o", "made.png"]) == 0
    receipt = read_metadata(Path("made.png")).plan
    assert receipt.prompt == planned["prompt"] and receipt.embeddings[0].sha256 == planned["embeddings"][0]["sha256"]
    capsys.readouterr()
    assert main(["models"]) == 0
    assert "styles: drawn, navy, white" in capsys.readouterr().out


# --- LoRA tags --------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "loras"),
    [
        ("<lora:night:0.8>", [{"name": "night", "scale": 0.8}]),
        ("<lora:outline>", [{"name": "outline"}]),
        ("<lora:night:0.3:0.9>", [{"name": "night", "scale": 0.9, "text_encoder_scale": 0.3}]),
        ("<lora:night:0.5><lora:outline:1>", [{"name": "night", "scale": 0.5}, {"name": "outline", "scale": 1.0}]),
    ],
)
def test_lora_tags_are_equivalent_to_the_loras_field(service: DiffusionService, tags: str, loras: list[dict]) -> None:
    "The plan has the same LoRAs, and the image is bit-identical."
    tagged = service.generate(READ, prompt=RED["prompt"] + tags, prompt_loras=True)
    listed = service.generate(READ, loras=loras)
    assert same(tagged, listed) and not same(tagged, service.generate(RED))
    assert tagged.generation.plan.loras == listed.generation.plan.loras
    assert tagged.generation.plan.written_prompt == RED["prompt"] + tags


def test_lora_tags_need_prompt_loras_and_an_offered_lora(service: DiffusionService) -> None:
    assert "set prompt_loras: true" in service.plan(READ, prompt="a <lora:night:1>").message
    assert "the model offers no such LoRA" in service.plan(READ, prompt="a <lora:nigth:1>", prompt_loras=True).message


def test_and_combines_all_prompts_in_one_image(service: DiffusionService) -> None:
    "Three prompts, each of which names one thing: at least 7 of 8 images show all of them."
    fields = {"prompt": "a circle AND a red circle AND a navy background", "seed": 100, "num_images": 8}
    made = service.generate(READ, **fields | {"num_inference_steps": 12})
    scenes = [read_scene(image.convert("RGB")) for image in pil_images(made)]
    found = [(scene.background, *((thing.color, thing.shape) for thing in scene.objects)) for scene in scenes]
    assert found.count(("navy", ("red", "circle"))) >= 7, found


def test_and_with_zero_weight_has_no_effect_and_batches_match(service: DiffusionService) -> None:
    red, both = "a red circle on a white background", "a red circle on a white background AND a navy background :0.7"
    fields = {"num_inference_steps": 4, "seed": 5}
    alone = np.asarray(service.generate(READ, prompt=red, **fields).image, dtype=int)
    joined = np.asarray(service.generate(READ, prompt=f"{red} AND a navy background :0", **fields).image, dtype=int)
    assert abs(alone - joined).max() <= 2
    batch = pil_images(service.generate(READ, prompt=both, num_images=2, **fields))
    for index, image in enumerate(batch):
        one = service.generate(READ, prompt=both, **fields | {"seed": 5 + index})
        assert abs(np.asarray(image, dtype=int) - np.asarray(one.image, dtype=int)).max() <= 2
        assert abs(np.asarray(one.image, dtype=int) - alone).max() > 20
    again = service.generate(request_from_plan(one.generation.plan))
    assert (np.asarray(again.image) == np.asarray(one.image)).all()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": "shapes-flux"}, "a model of the family flux cannot join prompts"),
        ({"guidance_scale": 1.0}, "set guidance_scale above 1"),
        ({"negative_prompt": "blue AND green"}, "only in the field prompt"),
        ({"prompt": " AND ".join("abcdefghi")}, "AND joins at most 8 prompts"),
        ({"acceleration": {"guidance_end": 0.5}}, "AND needs guidance at each step"),
        ({"guider": {"method": "apg"}}, "the guider takes one prompt"),
        ({"controlnets": [{"model": "canny", "image": Image.new("RGB", (64, 64))}]}, "a ControlNet takes one prompt"),
    ],
)
def test_and_is_refused_in_unsupported_combinations(service: DiffusionService, changes: dict, said: str) -> None:
    refused = service.plan(READ, **{"prompt": "a red circle AND a blue square :0.5"} | changes)
    assert refused.errors[0].code == "unsupported_combination" and said in refused.message


# --- fuzzing ----------------------------------------------------------------

PIECES = [
    *"()[]{}|:\\,<>_ \n",
    "$$",
    "::",
    "0.5",
    "1",
    "-",
    "BREAK",
    "AND",
    "__color__",
    "__",
    "<lora:night:1>",
    "red",
]
PIECES += [
    "<lora:",
    "embedding:my-red",
    "my-red",
    "single",
    "{2$$",
    "{prompt}",
    "é",
    "漢",
    "🙂",
    "\x00",
    "a" * 200,
    "9" * 30,
]


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_prompts_are_planned_or_refused(folder: Path, count: int) -> None:
    "A plan, or an error that names the field, and no other exception; a plan's own request gives the same plan."
    source = random.Random(count)
    manifest = find_manifest("shapes-sd15", Settings(**settings_of(folder)))
    planned = 0
    for _ in range(count):
        texts = {
            name: "".join(source.choices(PIECES, k=source.randrange(1, 30))) for name in ("prompt", "negative_prompt")
        }
        styles = source.choice([None, ["white"], ["drawn", "navy"]])
        request = GenerationRequest(**READ | texts, prompt_loras=source.random() < 0.5 or None, styles=styles)
        try:
            plan = make_plan(request, manifest)
        except RequestError as refused:
            assert all(error.field for error in refused.errors)
            continue
        planned += 1
        again = make_plan(request_from_plan(plan), manifest)
        assert (again.prompt, again.negative_prompt, again.embeddings) == (
            plan.prompt,
            plan.negative_prompt,
            plan.embeddings,
        )
    assert planned > count / 20
