"""The panel without a browser: requests in its form, reference images, prompts, and results that arrive late."""

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion_workers.panel.addon_forms import ControlUnit
from diffusion_workers.panel.form import START_IMAGE, request_sections
from diffusion_workers.panel.panel import GenerationPanel
from diffusion_workers.panel.runs import backend_of
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.prompt.tokens import count_tokens, tokenizer_of
from diffusion_workers.request.schema import FieldInfo, get_value, set_value
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import GenerationRequest, ModelFamily, OpResult, OpStatus, PreprocessRequest, Task

PROMPT = "a red circle on a white background"
FIELDS = [(title, info) for title, infos in request_sections().items() for info in infos if info.name != "model"]


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    with DiffusionService(device="cpu") as started:
        started.log_failures = False
        yield started


@pytest.fixture
def panel(service: DiffusionService) -> Iterator[GenerationPanel]:
    opened = GenerationPanel(service, history=None)
    yield opened
    opened.close()


def test_settings_of_other_programs_are_shown_or_listed_as_lost(panel: GenerationPanel) -> None:
    from test_widgets import FOREIGN, png_of  # the same files as the browser test drops

    for program, (texts, fields, lost) in FOREIGN.items():
        panel.restore(png_of(texts))
        listed = panel.form.drop.message.value
        assert [name for name in lost if name not in listed] == [], (program, listed)
        assert str(panel.request.seed) == fields["seed"] and panel.request.num_inference_steps == int(
            fields["num_inference_steps"]
        )


# --- requests in the form ----------------------------------------------------


def samples(info: FieldInfo) -> list[Any]:
    "Valid values of a field, including its bounds."
    if info.choices:
        return list(info.choices)
    if "boolean" in info.kinds:
        return [True, False]
    if {"integer", "number"} & set(info.kinds):
        return [value for value in (info.minimum, info.maximum, info.default) if value is not None]
    if "array" in info.kinds:
        return [[1, 2]] if "integer" in info.item_kinds else [["ink", "pastel"]]
    return ["a text", ""] if info.is_long_text else ["a-name"]


@pytest.mark.parametrize("model", ["shapes-sd15", "shapes-sdxl", "shapes-flux"])
def test_request_values_are_shown_or_listed_as_lost(panel: GenerationPanel, model: str) -> None:
    for title, info in FIELDS:
        for value in samples(info):
            given: dict[str, Any] = {"prompt": PROMPT, "model": model}
            set_value(given, info.path, value)
            lost = [found.name for found in panel._show_values(given)]
            held = panel.form.values()
            if title == START_IMAGE and info.name == "inpaint.mask_blur":
                assert panel.form.start.canvas.feather == value
            elif lost:
                assert (info.name, lost) == ("profile", ["profile"]), (model, info.name, value, lost)
            else:
                form = panel.form.start.form if title == START_IMAGE else panel.form.forms[title]
                assert get_value(held, info.path) == value, (model, info.name)
                assert form.fields[info.name].layout.display is None, f"{info.name} is hidden for {model}"
                if title:
                    shown = panel.form.sections.titles[panel.form.section_names.index(title)]
                    assert info.name.rpartition(".")[2].replace("_", " ") in shown, shown


def test_unavailable_models_and_parameters_are_listed(panel: GenerationPanel) -> None:
    unit = {
        "image": "",
        "model": "gone",
        "preprocessing": {"name": "canny", "parameters": {"low_threshold": 9, "old": 1}},
    }
    lora = {"name": "heart", "scale": 0.5, "text_encoder_scale": 0.2}
    panel.request = {"prompt": PROMPT, "model": "gone", "loras": [lora]}
    assert "model gone: it is not available here" in panel.stage.message.value
    assert panel.form.loras.values() == [lora]
    assert panel.form.loras.rows[0].note.value == "text_encoder_scale 0.2"
    panel.request = {"prompt": PROMPT, "loras": [lora]}
    assert panel.stage.message.value == ""
    lost = panel._show_values({"prompt": PROMPT, "model": "shapes-sd15", "controlnets": [unit]})
    assert [found.name for found in lost] == ["controlnets[0].model", "controlnets[0].preprocessing.parameters.old"]


def test_large_mask_blur_is_restored(panel: GenerationPanel) -> None:
    assert panel._show_values({"prompt": PROMPT, "inpaint": {"mask_blur": 100}}) == []
    assert panel.form.start.canvas.feather == 100


# --- reference images ---------------------------------------------------------


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionService]:
    "A service with a tiny instruction-based editing model."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.flux2)
    with DiffusionService(Settings(model_folders=(folder,)), device="cpu") as started:
        started.log_failures = False
        yield started


def image(color: str, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), color)


def test_edits_keep_their_reference_images(editor: DiffusionService, tmp_path: Path) -> None:
    "In the history, the generated code and when reused; a receipt alone lists the missing images."
    asked = {"prompt": PROMPT, "model": "flux2", "num_inference_steps": 1, "seed": 3}
    panel = GenerationPanel(editor, asked | {"reference_images": [image("red"), image("blue", 80)]}, history=tmp_path)
    wanted = panel.request.reference_images
    panel.generate()
    made = panel.wait(60).image
    assert panel.last.generation.plan.task == Task.edit
    again = GenerationPanel(editor, history=tmp_path)
    again.gallery.selected = [again.history[0].id]
    again.reuse_all()
    assert again.request.reference_images == wanted
    again.generate()
    assert again.wait(60).image.tobytes() == made.tobytes()
    scope: dict[str, Any] = {"service": editor}
    code = again.history[0].code.replace("service = DiffusionService()", "").rpartition("\nresult")[0]
    exec(code, scope)
    assert scope["result"].image.tobytes() == made.tobytes()
    found = again.restore(again.history[0].path)
    assert found.missing_images == ["reference_images[0]", "reference_images[1]"]
    assert "made with 2 reference images" in again.form.references.message.value
    assert again.form.references.values() == []
    sizes = ("image 1 (64 \u00d7 64, sha256 ", "image 2 (80 \u00d7 80, sha256 ")
    assert all(size in again.form.references.message.value for size in sizes)
    again.generate()
    assert again.wait(60).status == OpStatus.invalid_request and again.form.opened == "Reference images"
    for each in (image("red"), image("blue", 80)):
        again.form.references.add(each)
    again.generate()
    assert again.wait(60).image.tobytes() == made.tobytes()
    again.restore(again.history[0].path)
    again.form.references.without.click()
    again.generate()
    assert again.wait(60).generation.plan.task == Task.text_to_image
    for opened in (panel, again):
        opened.close()


def test_reference_errors_appear_beside_the_references(editor: DiffusionService) -> None:
    asked = {"prompt": PROMPT, "model": "flux2", "reference_images": [image("red"), image("blue", 32)]}
    panel = GenerationPanel(editor, asked, history=None)
    panel.generate()
    assert panel.wait(60).status == OpStatus.invalid_request
    assert "image 2: the image is too small" in panel.form.references.message.value
    assert panel.form.opened == "Reference images"
    asked["reference_images"] = [image("red")] * 5
    panel.request = asked
    assert len(panel.request.reference_images) == 5
    panel.generate()
    panel.wait(60)
    assert "allowed: at most 4" in panel.form.references.message.value
    panel.request = {"prompt": PROMPT, "model": "shapes-sd15", "reference_images": [image("red")]}
    panel.generate()
    panel.wait(60)
    assert "take a model of the families" in panel.form.references.message.value
    panel.close()


# --- prompts -----------------------------------------------------------------

TEXTS = [
    "a (red:1.3) circle, [blue] square BREAK a \\(white\\) background",
    "one, " * 60 + "((two)) three four five, " * 9,
    "AND a" + " word" * 200,
    "[cat:dog:0.5] on a [red|green] hill",
    "",
]


@pytest.mark.parametrize("model", ["shapes-sd15", "shapes-sdxl", "shapes-flux"])
def test_token_counts_match_the_text_encoder(service: DiffusionService, model: str) -> None:
    from diffusion_workers.pipeline.encoding import _LAYOUTS, EncodingOptions, _TextEncoder
    from diffusion_workers.prompt.schedules import split_parts, text_schedule

    manifest = service.manifest(model)
    rows = _LAYOUTS[manifest.record.text_layout]
    row = rows[1] if manifest.record.text_layout == "clip_t5" else rows[0]
    pipe = service.pipeline(model)
    found = tokenizer_of(manifest)
    assert found is not None
    encoder = _TextEncoder(pipe, row, EncodingOptions(), found.size + 1)
    assert found.size == encoder.length - (2 if row.part else 1)
    for text in TEXTS:
        parts = split_parts(text_schedule(text, 1)[0][1])
        chunks = [chunk for part in parts for chunk in encoder.chunks(part.text)]
        count = count_tokens(text, found.tokenize, found.size, with_syntax=True)
        assert (count.tokens, count.chunks) == (sum(len(chunk.tokens) for chunk in chunks), len(chunks)), text


def test_chunk_borders_never_fall_on_whitespace() -> None:
    def by_words(text: str) -> list[tuple[int, int]]:
        return [(hash(found[0]), found.start()) for found in re.finditer(r"\w+|[^\w\s]", text)]

    for text in TEXTS[:2]:
        for place in count_tokens(text, by_words, 10, with_syntax=True).borders:
            assert text[place].isalnum() or text[place] == "\\" or text[place] in ",()", (
                place,
                text[place - 5 : place + 5],
            )


# --- late results ------------------------------------------------------------


def test_results_keep_errors_of_fields_edited_meanwhile(service: DiffusionService) -> None:
    began, may_end = threading.Event(), threading.Event()

    def generate(request: GenerationRequest) -> OpResult:
        began.set()
        assert may_end.wait(60)
        return service.plan(request).model_copy(update={"status": "success"})

    backend = replace(backend_of(service), generate=generate, submit=None, plan=None)
    panel = GenerationPanel(backend, {"prompt": PROMPT, "seed": 1}, history=None)
    panel.generate()
    assert began.wait(60)
    width = panel.form.main.fields["width"]
    width.control.value = "130"
    assert "multiple of 8" in width.error
    may_end.set()
    assert panel.wait(60) is not None
    assert "multiple of 8" in width.error
    panel.close()


def test_outdated_control_maps_are_not_shown(service: DiffusionService) -> None:
    began, may_end = threading.Event(), threading.Event()

    def preprocess(request: PreprocessRequest) -> OpResult:
        began.set()
        assert may_end.wait(60)
        return service.preprocess(request)

    unit = ControlUnit(preprocess=preprocess)
    unit.image.set(Image.new("RGB", (64, 64), "red"))
    unit.form.fields["preprocessing.name"].show("gray")
    running = unit.preview.run()
    assert began.wait(60)
    unit.form.fields["preprocessing.name"].show("blur")
    may_end.set()
    running.join(60)
    assert unit.preview.map.layout.display == "none" and "have changed" in unit.preview.message.value
    unit.preview.run().join(60)
    assert unit.preview.map.layout.display is None and unit.preview.message.value == ""


def test_closed_panels_ignore_late_plans(service: DiffusionService) -> None:
    began, may_end = threading.Event(), threading.Event()

    def plan(request: GenerationRequest) -> OpResult:
        began.set()
        assert may_end.wait(60)
        return service.plan(request)

    panel = GenerationPanel(replace(backend_of(service), plan=plan), history=None)
    panel.form.main.fields["prompt"].control.value = PROMPT
    assert began.wait(60)
    [asking] = [each for each in threading.enumerate() if getattr(each, "function", None) == panel._show_plan]
    panel.close()
    may_end.set()
    asking.join(60)
    assert panel.stage.outlook.value == ""


def test_clicking_an_example_fills_the_prompt(panel: GenerationPanel) -> None:
    "The examples come from the model's manifest and disappear once another prompt is typed."
    examples, prompt = panel.form.examples, panel.form.main.fields["prompt"].control
    assert examples.layout.display is None
    assert [button.description for button in examples.children] == panel.form.model.example_prompts
    examples.children[2].click()
    assert panel.request.prompt == prompt.value == panel.form.model.example_prompts[2]
    prompt.value = "a star"
    assert examples.layout.display == "none"


def test_prompts_joined_by_and_are_counted_separately(service: DiffusionService) -> None:
    found = tokenizer_of(service.manifest("shapes-sd15"))
    count = count_tokens("a star AND a ring", found.tokenize, found.size, with_syntax=True)
    assert (count.tokens, count.chunks, count.borders) == (4, 2, (11,))
