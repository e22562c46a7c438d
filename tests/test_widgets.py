"""The panels in JupyterLab in Chromium, with the built-in model."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from jupyter_lab import open_notebook, run_all, running_lab, save, write_notebook
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from server_process import PATIENCE, needs

from diffusion_workers.request.metadata import read_metadata
from diffusion_workers.shapes.scenes import read_scene

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

PROMPT = "a red circle on a white background"
SETUP = """\
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.panel.panel import GenerationPanel
service = DiffusionService()
panel = GenerationPanel(service)
panel
"""
GRID = """\
from diffusion_workers.panel.grid import grid
images = grid({"prompt": "a red circle on a white background", "seed": 1, "num_inference_steps": 4},
                x=("guidance_scale", [1.0, 1.5, 3.0]), y=("scheduler", ["ddim", "euler", "dpmpp_2m"]), generate=service)
images
"""

EDITS = """\
from pathlib import Path
from diffusion_workers.panel.panel import GenerationPanel
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import ModelFamily
write_tiny_model(Path("models"), ModelFamily.flux2)
service = DiffusionService(Settings(model_folders=(Path("models"),)), device="cpu")
request = {"prompt": "put the disc of image 2 into image 1", "model": "flux2", "num_inference_steps": 2}
panel = GenerationPanel(service, request)
panel
"""
DROP = """(place, files) => {
    const data = new DataTransfer();
    for (const [name, bytes] of files) {
        const array = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
        data.items.add(new File([array], name, { type: "image/png" }));
    }
    place.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
FULL_HISTORY = """\
import json
from pathlib import Path
from PIL import Image
full = Path({folder!r})
full.mkdir()
about = {{"favorite": False, "seconds": 1.0, "files": {{}}}}
square = full / "square"
Image.new("RGB", (1024, 1024), "firebrick").save(square, "PNG")
for index in range(1000):
    (full / f"20260301-101500-{{index:06}}-0000.png").hardlink_to(square)
    prompt = "a star" if index % 2 else "a disc"
    own = {{"created": "2026-03-01T10:15:00", "seed": index, "request": {{"prompt": prompt}}}}
    (full / f"20260301-101500-{{index:06}}-0000.json").write_text(json.dumps(about | own))
"""
PAINTED = """(layer) => {
    const { data } = layer.getContext("2d").getImageData(0, 0, layer.width, layer.height);
    return data.filter((value, at) => at % 4 === 3 && value > 127).length;
}"""

BEYOND = """() => {  // what sticks out of the notebook, is cut, or lies on something else
    const place = document.querySelector(".dw-panel").closest(".jp-OutputArea-output").getBoundingClientRect();
    const paper = document.querySelector(".jp-WindowedPanel-outer, .jp-Notebook").getBoundingClientRect();
    const found = [];
    const parts = ":is(button, label, input, select, textarea, img, .dw-hint)";
    for (const part of document.querySelectorAll(`.dw-panel ${parts}`)) {
        const box = part.getBoundingClientRect();
        if (!box.width || !box.height || getComputedStyle(part).visibility === "hidden") continue;
        const name = part.className || part.tagName;
        const right = Math.min(place.right, paper.right);
        if (box.left < place.left - 1 || box.right > right + 1) found.push(`outside: ${name}`);
        const isCut = part.matches("button, label") && part.scrollWidth > part.clientWidth + 1;
        if (isCut) found.push(`cut: ${part.innerText}`);
    }
    const fields = [...document.querySelectorAll(".dw-panel :is(input:not([type=checkbox]), select, textarea)")];
    const boxes = fields.map((field) => field.getBoundingClientRect()).filter((box) => box.width && box.height);
    boxes.forEach((one, at) => boxes.slice(at + 1).forEach((other) => {
        const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
        const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
        if (across > 2 && down > 2) found.push(`overlap at ${Math.round(one.top)}`);
    }));
    return found;
}"""


AUTOMATIC1111 = f"""{PROMPT}, easynegative <lora:heart:0.8> <lora:gone:0.5>
Negative prompt: blurry
Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Exponential, CFG scale: 7, Seed: 42, Size: 128x96, Clip skip: 2, \
Model: dreamshaper_8, Denoising strength: 0.5, Hires upscale: 2, Hires upscaler: Latent, Version: v1.10.1"""
INVOKE = {
    "generation_mode": "txt2img",
    "positive_prompt": "a green square",
    "negative_prompt": "dark",
    "seed": 7,
    "width": 128,
    "height": 128,
    "steps": 12,
    "cfg_scale": 3.5,
    "scheduler": "euler_a",
    "vae": {"name": "sdxl-vae"},
    "app_version": "4.2.0",
}
COMFY = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "other.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a blue star"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "noise"}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": 128, "batch_size": 1}},
    "5": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["1", 0],
            "positive": ["2", 0],
            "negative": ["3", 0],
            "latent_image": ["4", 0],
            "seed": 9,
            "steps": 15,
            "cfg": 2.5,
            "sampler_name": "ddim",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    },
    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
    "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "made"}},
}
FOREIGN = {  # program: its PNG metadata, expected field values, settings listed as lost
    "AUTOMATIC1111": (
        {"parameters": AUTOMATIC1111},
        {
            "negative_prompt": "blurry",
            "num_inference_steps": "20",
            "scheduler": "DPM++ 2M SDE",
            "sigma_schedule": "exponential",
            "guidance_scale": "7.0",
            "seed": "42",
            "width": "128",
            "height": "96",
            "clip_skip": "1",
        },
        ["dreamshaper_8", "gone", "Denoising strength", "Hires upscale", "Hires upscaler"],
    ),
    "InvokeAI": (
        {"invokeai_metadata": json.dumps(INVOKE)},
        {
            "prompt": "a green square",
            "negative_prompt": "dark",
            "num_inference_steps": "12",
            "scheduler": "Euler a",
            "guidance_scale": "3.5",
            "seed": "7",
            "sigma_schedule": re.compile("default"),  # the value of the previous image is cleared
            "clip_skip": "",
        },
        ["vae"],
    ),
    "ComfyUI": (
        {"prompt": json.dumps(COMFY)},
        {
            "prompt": "a blue star",
            "negative_prompt": "noise",
            "num_inference_steps": "15",
            "scheduler": "DDIM",
            "guidance_scale": "2.5",
            "seed": "9",
            "width": "96",
        },
        ["other.safetensors"],
    ),
}


def png_of(texts: dict[str, str]) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def browser():
    from test_web import CHROMIUM, FLAGS

    needs(CHROMIUM, "Chromium is not installed: apt-get install -y chromium")
    expect.set_options(timeout=PATIENCE / 2 * 1000)
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def lab(quick_kernel: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("lab")
    with running_lab(folder, kernel=quick_kernel) as address:
        yield address, folder


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    context.set_default_timeout(PATIENCE * 1000)
    yield context.new_page()
    context.close()


def kept(folder: Path) -> list[Path]:
    "The images saved in the session, oldest first."
    return sorted((folder / "generated").glob("*.png"))


def field(page, name: str):
    return page.locator(f".dw-field-{name}").locator("input, textarea, select").first


def choose_file(page, place: str, name: str, data: bytes) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(f"{place} .dw-drop-zone").first.click()
    chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": data})


def unfold(page, title: str) -> None:
    page.locator(
        ".widget-accordion .lm-AccordionPanel-title, .jupyter-widget-Collapse-header", has_text=title
    ).first.click()


def paint(page, layer, start: tuple[float, float], end: tuple[float, float]) -> None:
    "Paint a stroke between points relative to the image size; repeat it if the page moved while loading."
    expect(layer).to_be_visible()
    for _ in range(5):
        layer.scroll_into_view_if_needed()
        box = layer.bounding_box()
        places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
        page.mouse.move(*places[0])
        page.mouse.down()
        page.mouse.move(*places[1], steps=8)
        page.mouse.up()
        if layer.bounding_box() == box:
            return
        page.locator(".dw-mask button", has_text="Clear").click()
    raise AssertionError("the page does not come to rest")


def test_a_session_in_jupyterlab(page, lab: tuple[str, Path]) -> None:
    address, folder = lab
    write_notebook(folder / "session.ipynb", SETUP, GRID)
    open_notebook(page, address.format("session.ipynb"))
    run_all(page)
    panel = page.locator(".dw-panel").first
    expect(panel).to_be_visible()

    # the 3 x 3 grid in the cell below is completed
    expect(page.locator(".jp-OutputArea td img")).to_have_count(9)

    # the models of the service can be selected
    page.locator(".dw-field-model select").select_option(label="shapes-sd15")

    # an invalid width is reported at its field
    field(page, "prompt").fill(PROMPT)
    field(page, "width").fill("130")
    expect(page.locator(".dw-error", has_text="multiple of 8")).to_be_visible()
    field(page, "width").fill("")
    expect(page.locator(".dw-error", has_text="multiple of 8")).to_have_count(0)

    # a preview is shown, and the generation can be stopped
    field(page, "num_inference_steps").fill("150")
    page.locator("button.dw-generate").click()
    expect(page.locator("img.dw-emerging")).to_be_visible()
    expect(page.locator(".dw-status")).to_have_text(re.compile(r"step [1-9]\d* of 150"))
    page.locator("button.dw-stop").click()
    expect(page.locator(".dw-status")).to_have_text(re.compile("cancelled"))
    assert kept(folder) == []

    # the preview at the stop can be kept and deleted; the deletion can be undone
    page.locator("button.dw-keep").click()
    expect(page.locator(".dw-gallery li .dw-gallery-label")).to_have_text(re.compile(r"stopped, step \d+ of 150"))
    [partial] = (folder / "generated").glob("*.jpeg")
    page.locator(".dw-gallery-open").press("Delete")
    expect(page.locator(".dw-gallery li")).to_have_count(0)
    assert not partial.exists()
    page.locator(".dw-gallery:not(.dw-batch) button.dw-gallery-restore").click()
    expect(page.locator(".dw-gallery li")).to_have_count(1)
    assert partial.exists()
    page.locator(".dw-gallery-open").press("Delete")
    expect(page.locator(".dw-gallery li")).to_have_count(0)

    # a typed seed is used, and the image matches the prompt
    field(page, "num_inference_steps").fill("25")
    page.locator(".dw-field-seed input").fill("2")
    expect(page.locator(".dw-panel .widget-toggle-button.mod-active")).to_have_text("locked")
    page.locator("button.dw-generate").click()
    expect(page.locator(".dw-gallery li")).to_have_count(1)
    first = kept(folder)[0]
    assert read_metadata(first).plan.seeds == [2]
    reading = read_scene(Image.open(first))
    circle = reading.objects[0]
    assert (reading.background, [(found.color, found.shape) for found in reading.objects]) == (
        "white",
        [("red", "circle")],
    )

    # after a page reload, the panel still has its form and images
    save(page)
    page.reload()
    open_notebook(page, address.format("session.ipynb"))
    expect(page.locator(".dw-gallery li")).to_have_count(1)
    expect(field(page, "prompt")).to_have_value(PROMPT)

    # paint a mask and inpaint: nothing changes outside the mask
    page.locator(".dw-gallery .dw-gallery-open").click()
    page.locator("button.dw-send-to-inpaint").click()
    paint(page, page.locator(".dw-mask-layer"), (0.55, circle.y / 128), (0.85, circle.y / 128))
    field(page, "prompt").fill("a blue square on a white background")
    page.locator("button.dw-generate").click()
    expect(page.locator(".dw-gallery li")).to_have_count(2)
    second = kept(folder)[1]
    assert read_metadata(second).plan.task.value == "inpainting"
    before, after = (np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in (first, second))
    changed = np.abs(before - after).max(axis=-1) > 0
    row = int(circle.y)
    assert changed[row - 5 : row + 5, 75:105].mean() > 0.1, "the stroke came to nothing"
    rows, columns = (
        np.flatnonzero(changed.any(axis=1)),
        np.flatnonzero(changed.any(axis=0)),
    )  # a brush of 21 pixels, blurred by 4
    assert row - 30 < rows.min() and rows.max() < row + 30 and columns.min() > 40, (row, rows, columns)

    # restore the request from the first image; the previous form is cleared
    unfold(page, "Restore from an image")
    choose_file(page, ".dw-restore", "first.png", first.read_bytes())
    expect(field(page, "prompt")).to_have_value(PROMPT)
    expect(page.locator(".dw-field-seed input")).to_have_value(str(read_metadata(first).plan.seeds[0]))
    unfold(page, "Start image")
    expect(page.locator(".dw-mask-layer:visible")).to_have_count(0)

    # a ControlNet unit offers every preprocessor, with its parameters
    unfold(page, "ControlNet")
    page.locator("button.dw-add-control").click()
    preprocessor = page.locator(".dw-field-preprocessing-name select")
    expect(preprocessor.locator("option", has_not_text="──")).to_have_count(30)  # 29 preprocessors, and none
    preprocessor.select_option(label="scribble xdog")
    expect(page.locator(".dw-panel .widget-slider:visible").first).to_be_visible()

    # a file that is not an image is rejected, and the form is unchanged
    unfold(page, "Restore from an image")
    choose_file(page, ".dw-restore", "letter.png", b"a letter")
    expect(page.locator(".dw-restore .dw-error")).to_contain_text("image: ")
    expect(field(page, "prompt")).to_have_value(PROMPT)


def test_stop_works_while_a_cell_is_running(page, lab: tuple[str, Path]) -> None:
    address, folder = lab
    asked = f'panel.request = {{"prompt": "{PROMPT}", "num_inference_steps": 150}}'
    waits = f'{asked}\npanel.generate()\nprint("it was", panel.wait().status.value)'
    write_notebook(folder / "busy.ipynb", SETUP, waits)
    open_notebook(page, address.format("busy.ipynb"))
    run_all(page)
    expect(page.locator(".dw-status")).to_have_text(re.compile(r"step [1-9]\d* of 150"))
    page.locator("button.dw-stop").click()
    expect(page.locator(".dw-status")).to_have_text(re.compile("cancelled"))
    expect(page.locator(".jp-OutputArea-output", has_text="it was cancelled").first).to_be_visible()


def until(page, holds: Callable[[], bool], what: str) -> None:
    "Wait until a condition holds; for example, masks are decoded and drawn after the click returns."
    for _ in range(100):
        if holds():
            return
        page.wait_for_timeout(100)
    pytest.fail(f"waited in vain: {what}")


def test_panel_keys_do_not_trigger_notebook_shortcuts(page, lab: tuple[str, Path]) -> None:
    address, folder = lab
    write_notebook(folder / "keys.ipynb", SETUP, "'a cell that is cut'", "'another one'")
    open_notebook(page, address.format("keys.ipynb"))
    run_all(page)
    expect(page.locator(".dw-panel")).to_be_visible()
    field(page, "prompt").fill(PROMPT)
    field(page, "num_inference_steps").fill("4")
    field(page, "num_images").fill("4")

    # Ctrl+Enter generates; the batch is a grid with the seed of each image
    field(page, "prompt").press("Control+Enter")
    expect(page.locator(".dw-batch li img[src]")).to_have_count(4)
    labels = page.locator(".dw-batch .dw-gallery-label").all_inner_texts()
    assert len({re.search(r"seed (\d+)", label)[1] for label in labels}) == 4
    assert all("4 steps" in label for label in labels)

    # with the focus inside the panel, the notebook shortcuts x (cut) and d d (delete) have no effect
    page.locator("button.dw-send-to-inpaint").click()
    layer = page.locator(".dw-mask-layer")
    expect(layer).to_be_visible()
    count = page.locator(".jp-Cell").count()
    toggle = page.locator(".dw-panel .widget-toggle-button").first
    places = [page.locator(".dw-gallery-open").first, page.locator("button.dw-generate"), toggle, layer]
    places += [page.locator(".dw-mask button", has_text="Erase"), page.locator("select").first]
    for place in places:
        place.focus()
        for key in "xddmy":
            page.keyboard.press(key)
    assert page.locator(".jp-Cell").count() == count

    # mask strokes can be undone and redone
    paint(page, layer, (0.4, 0.5), (0.6, 0.5))
    undo, redo = (page.locator(".dw-mask button", has_text=text) for text in ("Undo", "Redo"))
    expect(redo).to_be_disabled()
    painted = layer.evaluate(PAINTED)
    assert painted > 0
    undo.click()
    until(page, lambda: layer.evaluate(PAINTED) < painted, "undo removes the stroke")
    redo.click()
    until(page, lambda: layer.evaluate(PAINTED) == painted, "redo brings it back")

    # zooming in keeps the width of the stage
    before = page.locator(".dw-mask-stage").bounding_box()["width"]
    page.locator(".dw-mask button", has_text="+").click()
    assert layer.bounding_box()["width"] > before
    assert page.locator(".dw-mask-stage").bounding_box()["width"] == before

    # Generate stays visible; pressing it again queues a request, which can be removed
    page.locator(".dw-use-mask input").uncheck()
    field(page, "num_images").fill("1")
    field(page, "num_inference_steps").fill("150")
    for _ in range(3):
        page.locator("button.dw-generate").click()
    expect(page.locator(".dw-queued")).to_have_count(2)
    page.locator(".dw-queued button").last.click()
    expect(page.locator(".dw-queued")).to_have_count(1)
    page.locator(".dw-panel").evaluate(
        "(panel) => panel.lastElementChild.lastElementChild.scrollIntoView({block: 'end'})"
    )
    expect(page.locator("button.dw-generate")).to_be_in_viewport()
    field(page, "prompt").press("Escape")
    expect(page.locator(".dw-queued")).to_have_count(0)
    expect(page.locator(".dw-status")).to_have_text(re.compile(r"step [1-9]\d* of \d+"))
    field(page, "prompt").press("Escape")
    expect(page.locator(".dw-status")).to_have_text(re.compile("cancelled"))


def test_history_with_a_thousand_images(page, lab: tuple[str, Path]) -> None:
    address, folder = lab
    make = FULL_HISTORY.format(folder=str(folder / "full"))
    panel = "panel = GenerationPanel(service, history=full)\npanel"
    write_notebook(folder / "full.ipynb", SETUP.rpartition("panel = ")[0] + make + panel)
    open_notebook(page, address.format("full.ipynb"))
    run_all(page)
    gallery = page.locator(".dw-gallery:not(.dw-batch)")
    expect(gallery.locator("li img[src]")).to_have_count(48)
    expect(gallery.locator(".dw-gallery-count").first).to_have_text("1000 images")
    gallery.locator(".dw-gallery-next").click()
    expect(gallery.locator("li .dw-gallery-label").first).to_have_text("951")
    gallery.locator("input").fill("star 17")
    expect(gallery.locator(".dw-gallery-count").first).to_have_text("1 of 1000")
    gallery.locator("li").hover()
    gallery.locator(".dw-gallery-star").click()
    gallery.locator("input").fill("")
    gallery.locator(".dw-gallery-starred").click()
    expect(gallery.locator("li .dw-gallery-label")).to_have_text("17")


PROMPTING = """\
panel.form.main.fields["prompt"].control.names = [
    {"kind": "trigger", "text": "heartfelt", "note": "trigger word of heart"},
    {"kind": "embedding", "text": "easynegative", "note": "embedding"},
    {"kind": "lora", "text": "heart", "note": "LoRA"},
]
"""


def test_prompt_token_count_highlighting_and_completion(page, lab: tuple[str, Path]) -> None:
    address, folder = lab
    write_notebook(folder / "prompt.ipynb", SETUP, PROMPTING)
    open_notebook(page, address.format("prompt.ipynb"))
    run_all(page)
    prompt = field(page, "prompt")
    shown = page.locator(".dw-field-prompt")
    expect(prompt).to_be_visible()

    # tokens are counted, and a prompt that is too long shows where it is truncated
    prompt.fill("a red circle on a white background")
    expect(shown.locator(".dw-prompt-count")).to_have_text("7 of 30 tokens")
    prompt.fill("a red circle, " * 9)
    expect(shown.locator(".dw-prompt-count")).to_contain_text("cut off")
    expect(shown.locator(".dw-prompt-border")).to_have_count(1)

    # a weight is literal text in a plain prompt, and is parsed with the a1111 syntax
    prompt.fill("a red circle")
    prompt.press("End")
    prompt.press("Control+ArrowUp")
    prompt.press("Control+ArrowUp")
    expect(prompt).to_have_value("a red (circle:1.2)")
    expect(shown.locator("mark")).to_have_text("(circle:1.2)")
    expect(shown.locator(".dw-prompt-mistake")).to_contain_text("drawn as text")
    unfold(page, "More")
    page.locator(".dw-field-prompt_syntax select").select_option(label="a1111")
    expect(shown.locator("mark")).to_have_count(0)
    prompt.press("Control+ArrowDown")
    prompt.press("Control+ArrowDown")
    expect(prompt).to_have_value("a red circle")
    prompt.press("Control+z")
    expect(prompt).to_have_value("a red (circle:1.1)")

    # a syntax error is reported at its character
    prompt.fill("a red) circle")
    expect(shown.locator(".dw-prompt-mistake")).to_contain_text("character 6:")
    shown.locator(".dw-prompt-mistake").click()
    assert prompt.evaluate("(area) => [area.selectionStart, area.selectionEnd]") == [5, 6]

    # names are completed with the keyboard; Escape closes the menu
    prompt.fill("")
    prompt.press_sequentially("a hear")
    expect(shown.locator("[role=option]")).to_have_count(2)
    prompt.press("Escape")
    expect(shown.locator("[role=option]:visible")).to_have_count(0)
    prompt.press_sequentially("t")
    prompt.press("ArrowDown")
    prompt.press("Enter")
    expect(prompt).to_have_value("a heartfelt")
    prompt.press_sequentially(", hear")
    prompt.press("ArrowUp")
    prompt.press("Enter")  # the LoRA is added to the request
    expect(prompt).to_have_value("a heartfelt, ")
    expect(page.locator(".dw-panel")).to_contain_text("LoRA: heart 1")
    prompt.press_sequentially("<lora:he")
    prompt.press("Tab")
    expect(prompt).to_have_value("a heartfelt, <lora:heart:1>")

    # the trigger words of a LoRA are buttons
    unfold(page, "LoRA")
    prompt.fill("a circle")
    page.locator(".dw-trigger-words button").click()
    expect(prompt).to_have_value("a circle, heart")


@pytest.mark.slow
def test_images_of_other_programs_are_restored(page, lab: tuple[str, Path]) -> None:
    address, folder = lab
    write_notebook(folder / "foreign.ipynb", SETUP)
    open_notebook(page, address.format("foreign.ipynb"))
    run_all(page)
    expect(page.locator(".dw-panel")).to_be_visible()
    for program, (texts, fields, lost) in FOREIGN.items():
        unfold(page, "Restore from an image")
        choose_file(page, ".dw-restore", f"{program}.png", png_of(texts))
        listed = page.locator(".dw-restore .dw-error")
        for name in lost:
            expect(listed).to_contain_text(name)
        unfold(page, "More")
        for name, shown in fields.items():
            control = page.locator(".dw-field-seed input") if name == "seed" else field(page, name)
            expect(control, f"{program}: {name}").to_be_visible()
            expect(control, f"{program}: {name}").to_have_value(shown)
        if program == "AUTOMATIC1111":
            expect(field(page, "prompt")).to_have_value(re.compile(f"^{PROMPT}, easynegative"))
            expect(page.locator(".dw-panel")).to_contain_text("LoRA: heart 0.8")
            page.locator("button.dw-generate").click()  # the restored request can be generated
            expect(page.locator(".dw-gallery li")).to_have_count(1)
            plan = read_metadata(kept(folder)[-1]).plan
            assert (plan.seeds, plan.width, plan.height, plan.clip_skip) == ([42], 128, 96, 1)
            assert [lora.name for lora in plan.loras] == ["heart"]


def square(color: str, side: int = 96) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_reference_images_are_added_reordered_and_used(page, lab: tuple[str, Path]) -> None:
    address, folder = lab
    write_notebook(folder / "edits.ipynb", EDITS)
    earlier = kept(folder)
    open_notebook(page, address.format("edits.ipynb"))
    run_all(page)
    unfold(page, "Reference images")
    place = page.locator(".dw-references")
    items = place.locator("li")
    shown = lambda: items.locator("img").evaluate_all("all => all.map(image => image.alt)")
    named = lambda *sides: [
        f"Reference image {at}, {side} \N{MULTIPLICATION SIGN} {side}" for at, side in enumerate(sides, 1)
    ]

    # drop several files, one of which is not an image; choose several, one of which is over the limit
    files = [("red.png", square("red", 64)), ("letter.png", b"a letter"), ("blue.png", square("blue", 80))]
    place.evaluate(DROP, [[name, base64.b64encode(data).decode()] for name, data in files])
    expect(items).to_have_count(2)
    expect(page.locator(".dw-error", has_text="letter.png")).to_be_visible()
    chosen = [
        {"name": f"{side}.png", "mimeType": "image/png", "buffer": square("gold", side)} for side in (96, 112, 128)
    ]
    with page.expect_file_chooser() as chooser:
        place.locator(".dw-references-add").click()
    chooser.value.set_files(chosen)
    expect(page.locator(".dw-error", has_text="128.png was not added: this model takes at most 4")).to_be_visible()
    expect(place.locator(".dw-references-add")).to_be_disabled()
    assert shown() == named(64, 80, 96, 112)

    # reorder by drag and keyboard; the focus follows the image
    items.nth(3).drag_to(items.nth(0))
    until(page, lambda: shown() == named(112, 64, 80, 96), "the dragged image comes first")
    place.get_by_role("button", name="Move later: reference image 1").press("Enter")
    until(page, lambda: shown() == named(64, 112, 80, 96), "the first image is the second")
    focused = page.evaluate("() => document.activeElement.getAttribute('aria-label')")
    assert focused == "Move later: reference image 2"
    for number in (4, 2):
        place.get_by_role("button", name=f"Remove: reference image {number}").press("Enter")
    until(page, lambda: shown() == named(64, 80), "two are removed")

    # edit without a start image, and use the result as a reference
    page.locator("button.dw-generate").click()
    expect(page.locator(".dw-gallery li")).to_have_count(len(earlier) + 1)
    plan = read_metadata(kept(folder)[-1]).plan
    sizes = [(image.width, image.height) for image in plan.reference_images]
    assert (plan.task.value, sizes, plan.width) == ("edit", [(64, 64), (80, 80)], 64)
    page.locator("button.dw-send-to-references").click()
    until(page, lambda: shown() == named(64, 80, 64), "the result is a reference")
    page.locator("button.dw-show-code").click()
    expect(page.locator(".dw-code")).to_contain_text("reference_images=[Path(")

    # the section is hidden for models without reference images
    for number in (3, 2, 1):
        place.get_by_role("button", name=f"Remove: reference image {number}").press("Enter")
    page.locator(".dw-field-model select").select_option(label="shapes-sd15")
    expect(page.get_by_text("Reference images", exact=True)).to_have_count(0)
    expect(page.locator("button.dw-send-to-references")).to_be_disabled()


def test_layout_fits_narrow_widths_and_both_themes(page, lab: tuple[str, Path]) -> None:
    address, folder = lab
    write_notebook(folder / "narrow.ipynb", SETUP)
    open_notebook(page, address.format("narrow.ipynb"))
    run_all(page)
    expect(page.locator(".dw-panel")).to_be_visible()
    unfold(page, "ControlNet")
    page.locator("button.dw-add-control").click()
    expect(page.locator(".dw-field-preprocessing-name select")).to_be_visible()
    for width in (1400, 900, 640, 390):  # 390: the width left by an open sidebar at 640
        page.set_viewport_size({"width": width, "height": 1000})
        until(page, lambda: page.evaluate(BEYOND) == [], f"fits into {width} pixels")
    lefts = page.locator(".dw-field-prompt, .dw-gallery:visible, .widget-accordion").evaluate_all(
        "(parts) => parts.map((part) => part.getBoundingClientRect().left)"
    )
    assert max(lefts) - min(lefts) < 40, "one column"

    # surfaces follow the notebook theme
    surface = "(part) => Math.max(...getComputedStyle(part).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number))"
    light = page.locator(".dw-controls").evaluate(surface)
    page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab Dark' })")
    until(page, lambda: page.locator(".dw-controls").evaluate(surface) < 60 < light, "a dark surface")
    until(page, lambda: page.evaluate(BEYOND) == [], "fits in the dark")
