"""The panel without a page: what it shows of a request, and answers that come too late."""

from collections.abc import Iterator
from typing import Any

import pytest

from diffusion_workers.panel.form import START_IMAGE, request_sections
from diffusion_workers.panel.panel import GenerationPanel
from diffusion_workers.request.schema import FieldInfo, get_value, set_value
from diffusion_workers.service.service import DiffusionService

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


def test_settings_of_another_program_are_shown_or_listed(panel: GenerationPanel) -> None:
    from test_widgets import FOREIGN, png_of  # the same files, as the test in the browser drops them

    for program, (texts, fields, lost) in FOREIGN.items():
        panel.restore(png_of(texts))
        listed = panel.form.drop.message.value
        assert [name for name in lost if name not in listed] == [], (program, listed)
        assert str(panel.request.seed) == fields["seed"] and panel.request.num_inference_steps == int(
            fields["num_inference_steps"]
        )


# --- what it shows of a request ----------------------------------------------


def samples(info: FieldInfo) -> list[Any]:
    "Valid values of a field, its bounds among them."
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
def test_a_value_of_a_request_is_shown_or_listed(panel: GenerationPanel, model: str) -> None:
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


def test_what_is_not_offered_here_is_listed(panel: GenerationPanel) -> None:
    unit = {
        "image": "",
        "model": "gone",
        "preprocessing": {"name": "canny", "parameters": {"low_threshold": 9, "old": 1}},
    }
    lora = {"name": "heart", "scale": 0.5, "text_encoder_scale": 0.2}
    panel.request = {"prompt": PROMPT, "model": "gone", "loras": [lora]}
    assert "model gone: it is not offered here" in panel.stage.message.value
    assert panel.form.loras.values() == [lora]
    assert panel.form.loras.rows[0].note.value == "text_encoder_scale 0.2"
    panel.request = {"prompt": PROMPT, "loras": [lora]}
    assert panel.stage.message.value == ""
    lost = panel._show_values({"prompt": PROMPT, "model": "shapes-sd15", "controlnets": [unit]})
    assert [found.name for found in lost] == ["controlnets[0].model", "controlnets[0].preprocessing.parameters.old"]


def test_a_mask_softer_than_the_slider_was_is_restored(panel: GenerationPanel) -> None:
    assert panel._show_values({"prompt": PROMPT, "inpaint": {"mask_blur": 100}}) == []
    assert panel.form.start.canvas.feather == 100
