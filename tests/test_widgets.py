"""The panels in JupyterLab in Chromium, with the built-in model: one session, as a user goes through it."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jupyter_lab import open_notebook, run_all, running_lab, save, write_notebook
from PIL import Image
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
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("lab")
    with running_lab(folder) as address:
        yield address, folder


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    context.set_default_timeout(PATIENCE * 1000)
    yield context.new_page()
    context.close()


def kept(folder: Path) -> list[Path]:
    "The images of the session on the disk, the oldest first."
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
    "One stroke between places in shares of the image's width and height; repeated if the page moved while it loaded."
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

    # a grid of 3 x 3 fills in below
    expect(page.locator(".jp-OutputArea td img")).to_have_count(9)

    # the service's models are a list
    page.locator(".dw-field-model select").select_option(label="shapes-sd15")

    # an invalid width is reported at the width
    field(page, "prompt").fill(PROMPT)
    field(page, "width").fill("130")
    expect(page.locator(".dw-error", has_text="multiple of 8")).to_be_visible()
    field(page, "width").fill("")
    expect(page.locator(".dw-error", has_text="multiple of 8")).to_have_count(0)

    # previews, and a stop in the middle
    field(page, "num_inference_steps").fill("150")
    page.locator("button.dw-generate").click()
    expect(page.locator("img.dw-emerging")).to_be_visible()
    expect(page.locator(".dw-status")).to_have_text(re.compile(r"step [1-9]\d* of 150"))
    page.locator("button.dw-stop").click()
    expect(page.locator(".dw-status")).to_have_text(re.compile("cancelled"))
    assert kept(folder) == []

    # the image shows what the prompt says
    field(page, "num_inference_steps").fill("25")
    page.locator(".dw-panel .widget-toggle-button", has_text="locked").click()
    page.locator(".dw-field-seed input").fill("2")
    page.locator("button.dw-generate").click()
    expect(page.locator(".dw-gallery li")).to_have_count(1)
    first = kept(folder)[0]
    reading = read_scene(Image.open(first))
    circle = reading.objects[0]
    assert (reading.background, [(found.color, found.shape) for found in reading.objects]) == (
        "white",
        [("red", "circle")],
    )

    # after a reload of the page, the panel works, with its form and its images
    save(page)
    page.reload()
    open_notebook(page, address.format("session.ipynb"))
    expect(page.locator(".dw-gallery li")).to_have_count(1)
    expect(field(page, "prompt")).to_have_value(PROMPT)

    # paint over the middle of the circle and inpaint: outside of the paint nothing changes
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
    )  # brush of 21 pixels, softened over 4
    assert row - 30 < rows.min() and rows.max() < row + 30 and columns.min() > 40, (row, rows, columns)

    # drop the first image to restore its request; what the form held before is gone
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
    expect(preprocessor.locator("option", has_not_text="──")).to_have_count(30)  # 29, and none
    preprocessor.select_option(label="scribble xdog")
    expect(page.locator(".dw-panel .widget-slider:visible").first).to_be_visible()

    # a file that is not an image is refused, and the form stays
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
