"""The panel as a Voilà app: `nbs/tutorials/panel.ipynb` generates an image in Chromium."""

import base64
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from project import NBS
from server_process import PATIENCE, needs

from diffusion_workers.request.metadata import read_metadata
from diffusion_workers.shapes.scenes import read_scene

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("voila")
from jupyter_lab import free_port, running

expect = playwright.expect

PROMPT = "a green star in the center on a black background"
SHOWN_FILE = """async (image) => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return btoa(String.fromCharCode(...bytes));
}"""


@contextmanager
def running_voila(notebook: Path, **options: Sequence[str]) -> Iterator[str]:  # the URL of the app
    "Run Voilà with a notebook on a free local port."
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [
        "voila",
        notebook.name,
        "--no-browser",
        "--Voila.ip=127.0.0.1",
        f"--port={port}",
        "--Voila.port_retries=0",
    ]
    static = f"{base}/voila/templates/base/static/voila.js"  # requesting the app itself would start a kernel
    with running(command, notebook.parent, static, **options):
        yield base


@pytest.fixture(scope="module")
def app(quick_kernel: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    notebook = tmp_path_factory.mktemp("voila") / "panel.ipynb"
    shutil.copy(NBS / "tutorials" / "panel.ipynb", notebook)
    with running_voila(notebook, kernel=quick_kernel) as address:
        yield address


@pytest.fixture
def page():
    from test_web import CHROMIUM, FLAGS

    needs(CHROMIUM, "Chromium is not installed: apt-get install -y chromium")
    expect.set_options(timeout=PATIENCE / 2 * 1000)
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        shown = opened.new_page(viewport={"width": 1200, "height": 1000})
        shown.set_default_timeout(PATIENCE * 1000)
        yield shown
        opened.close()


def shown_file(page) -> bytes:
    "The displayed image file."
    return base64.b64decode(page.locator("img.dw-image").evaluate(SHOWN_FILE))


def test_voila_app_generates_an_image(page, app: str) -> None:
    page.goto(app)
    expect(page.locator(".dw-panel")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Shapes")
    assert page.locator("pre, .jp-InputArea-editor").count() == 0  # code cells are hidden

    page.locator(".dw-field-prompt textarea").fill(PROMPT)
    page.locator("button.dw-generate").click()
    expect(page.locator(".dw-gallery li")).to_have_count(1)
    expect(page.locator(".dw-status")).to_contain_text("done, 1 image")
    expect(page.locator("img.dw-image.dw-emerging")).to_have_count(0)  # the preview has been replaced

    data = shown_file(page)
    reading = read_scene(Image.open(io.BytesIO(data)))
    assert read_metadata(data).plan.prompt == PROMPT
    assert (reading.background, [(found.color, found.shape) for found in reading.objects]) == (
        "black",
        [("green", "star")],
    )
