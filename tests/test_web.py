"""The web page in Chromium, with a real server and the built-in model."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageChops, ImageDraw
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Page, expect, sync_playwright
from project import ROOT
from server_process import PATIENCE, needs, running_server

from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.request.images import PARAMETERS_KEY, PLAN_KEY, encode_image
from diffusion_workers.request.metadata import read_metadata
from ez_diffusion_client import Client, image_bytes
from ez_diffusion_client.models import ModelFamily, ModelKind

CHROMIUM = (
    os.environ.get("CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROMPT = "a red circle left of a blue square on a white background"
RECEIPTS = ROOT / "tests" / "receipts_v1"  # images of an earlier version


# --- browser helpers --------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    needs(CHROMIUM, "Chromium is not installed: apt-get install -y chromium")
    expect.set_options(timeout=PATIENCE / 2 * 1000)
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, server: str) -> Iterator[Page]:
    "The page with empty browser storage; uncaught JavaScript errors fail the test."
    context = browser.new_context(
        viewport={"width": 1280, "height": 860}, permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(PATIENCE * 1000)
    shown, complaints = context.new_page(), []
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    open_page(shown, server)
    yield shown
    context.close()
    assert not complaints


def open_page(page: Page, server: str) -> None:
    page.goto(server)
    page.wait_for_selector("html[data-ready]", state="attached")


def fill(page: Page, **fields: object) -> None:
    for name, value in fields.items():
        field = page.locator(f'[data-path="{name}"]')
        field.evaluate("field => { const section = field.closest('details'); if (section) section.open = true }")
        field.fill(str(value))


def unfold(page: Page, title: str) -> None:
    section = page.locator("details.section").filter(has=page.locator("summary", has_text=title))
    section.evaluate("section => { section.open = true }")


def choose_image(page: Page, path: str, image: Image.Image) -> None:
    page.set_input_files(f'[data-image="{path}"]', {"name": "image.png", "mimeType": "image/png", "buffer": png(image)})


def generate(page: Page, count: int = 1) -> bytes:
    "Press Generate, wait until the gallery has `count` images, and return the displayed file."
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".thumbs li")).to_have_count(count)
    return shown_file(page)


def shown_file(page: Page) -> bytes:
    "The file of the image displayed on the stage."
    expect(page.locator(".frame > img[src^='blob:']")).to_be_visible()
    read = """async image => {
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        return btoa(String.fromCharCode(...bytes));
    }"""
    return base64.b64decode(page.locator(".frame > img").evaluate(read))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=int)


def scene() -> Image.Image:
    "A red circle on white, left of the middle."
    image = Image.new("RGB", (128, 128), (245, 245, 245))
    ImageDraw.Draw(image).ellipse((20, 48, 52, 80), fill=(220, 30, 30))
    return image


# --- main features ----------------------------------------------------------


def test_generate_shows_preview_and_image(page: Page, server: str) -> None:
    "A prompt gives a live preview and an image that matches it; image and form survive a reload."
    fill(page, prompt=PROMPT, num_inference_steps=150, seed=3, preview_interval=1)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".frame img[alt^='Preview']")).to_be_visible()
    expect(page.locator(".progress .state")).to_have_text(re.compile(r"Step \d+ of 150"))
    expect(page.locator(".thumbs li")).to_have_count(1)
    plan = read_metadata(shown_file(page)).plan
    assert (plan.prompt, plan.seeds, plan.num_inference_steps) == (PROMPT, [3], 150)
    made = pixels(shown_file(page))
    red, blue = [(made[..., own] > made[..., other] + 60).nonzero()[1] for own, other in ((0, 2), (2, 0))]
    assert red.size > 100 and blue.size > 100 and red.mean() < blue.mean(), "no red thing left of a blue one"

    page.reload()
    expect(page.locator(".thumbs li")).to_have_count(1)
    expect(page.locator("[data-path=prompt]")).to_have_value(PROMPT)
    page.locator(".thumbs button").click()
    assert read_metadata(shown_file(page)).plan == plan


def test_escape_cancels_a_generation(page: Page) -> None:
    fill(page, prompt=PROMPT, num_inference_steps=150, num_images=8)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".progress .state")).to_have_text(re.compile(r"Step \d+ of 150"))
    page.keyboard.press("Escape")
    expect(page.locator(".status")).to_have_text("Cancelled.")
    expect(page.locator(".progress")).to_have_count(0)
    expect(page.locator(".thumbs li")).to_have_count(0)
    fill(page, num_inference_steps=2, num_images=1)
    assert read_metadata(generate(page)).plan.num_inference_steps == 2


def test_inpainting_changes_only_the_painted_mask(page: Page) -> None:
    fill(page, prompt=PROMPT, num_inference_steps=20, seed=1)
    unfold(page, "Image and mask")
    choose_image(page, "image", scene())
    page.get_by_role("button", name="Paint mask").click()
    box = page.locator(".mask-image canvas").bounding_box()
    page.locator(".brush input").fill("30")
    across = [box["x"] + box["width"] * part for part in (0.7, 0.75, 0.8)]
    page.mouse.move(across[0], box["y"] + box["height"] * 0.35)
    page.mouse.down()
    for x in across:
        page.mouse.move(x, box["y"] + box["height"] * 0.65, steps=4)
        page.mouse.move(x, box["y"] + box["height"] * 0.35, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Done").click()
    mask = page.locator("img[alt^='Mask']")
    painted = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask.get_attribute("src").split(",")[1]))).convert("L"))
    assert painted.shape == (128, 128) and painted[64, 96] == 255 and painted[64, 30] == 0
    fill(page, **{"inpaint.mask_blur": 0})
    file = generate(page)
    assert read_metadata(file).plan.task == "inpainting"
    changed = np.abs(pixels(file) - np.asarray(scene(), dtype=int)).max(axis=2)
    assert changed[painted == 0].max() == 0, "what was not painted has changed"
    assert changed[painted == 255].mean() > 20, "what was painted has not changed"


def test_control_map_is_previewed_and_guides_the_image(page: Page) -> None:
    "The control map is displayed before generation, and the circle is generated where the map has it."
    fill(page, prompt="a red circle on a white background", num_inference_steps=20, seed=1)
    unfold(page, "ControlNet")
    page.get_by_role("button", name="Add a control").click()
    offered = page.get_by_label("Preprocessor", exact=True)
    assert offered.locator("option").count() == 30, "29 preprocessors and none"
    choose_image(page, "controlnets[0].image", scene())
    shown = page.get_by_alt_text("Control map by canny")
    expect(shown).to_be_visible()
    edges = pixels(base64.b64decode(shown.get_attribute("src").split(",")[1]))
    assert set(np.unique(edges)) == {0, 255} and 50 < (edges[..., 0] > 0).sum() < 1000
    plan = read_metadata(generate(page)).plan
    assert (plan.control_kind, plan.controlnets[0].preprocessing.name) == ("single", "canny")
    made = pixels(shown_file(page))
    red = (made[..., 0] > made[..., 2] + 60) & (made[..., 0] > made[..., 1] + 60)
    wanted = np.asarray(scene(), dtype=int)[..., 1] < 100
    assert (red & wanted).sum() / max((red | wanted).sum(), 1) > 0.5, "the circle is not where the map has it"


BRING = """([way, kind, data]) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    const carried = new DataTransfer();
    const type = kind.includes('/') ? kind : 'image/' + kind;
    carried.items.add(new File([bytes], 'star.' + type.split('/')[1], { type }));
    const options = { bubbles: true, cancelable: true };
    const event = way === 'drop'
        ? new DragEvent('drop', { dataTransfer: carried, ...options })
        : new ClipboardEvent('paste', { clipboardData: carried, ...options });
    (way === 'drop' ? document.querySelector('.stage') : document.body).dispatchEvent(event);
}"""


def bring(page: Page, data: bytes, kind: str = "png", way: str = "drop") -> None:
    "Drop or paste an image file on the page."
    page.evaluate(BRING, [way, kind, base64.b64encode(data).decode()])


@pytest.mark.parametrize(("kind", "way"), [("png", "drop"), ("jpeg", "paste"), ("webp", "drop")])
def test_dropped_or_pasted_image_restores_its_settings(page: Page, server: str, kind: str, way: str) -> None:
    "After an image from the API is dropped or pasted, the page generates the same pixels."
    with Client(server) as client:
        asked = dict(
            prompt="a green star on a navy background",
            seed=9007199254740991,
            num_inference_steps=7,
            guidance_scale=2.5,
            scheduler="euler",
            output={"format": kind},
        )
        original = image_bytes(client.generate(**asked))[0]
    bring(page, original, kind, way)
    expect(page.locator(".status")).to_have_text("Settings restored.")
    for name, value in {
        "prompt": "a green star on a navy background",
        "seed": "9007199254740991",
        "num_inference_steps": "7",
        "guidance_scale": "2.5",
        "scheduler": "euler",
    }.items():
        expect(page.locator(f'[data-path="{name}"]')).to_have_value(value)
    made = generate(page)
    assert Image.open(io.BytesIO(made)).format == kind.upper()
    assert (pixels(made) == pixels(original)).all()


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_image_of_an_earlier_version_restores_its_settings(page: Page, kind: str) -> None:
    "Renamed settings are restored to the current fields, and the request uses the current schema."
    bring(page, (RECEIPTS / f"everything_unet.{kind}").read_bytes(), kind, "drop")
    expect(page.locator(".status")).to_have_text("Settings restored.")
    values = {
        "seed": "4",
        "step_cache.method": "deep_features",
        "step_cache.interval": "2",
        "acceleration.dtype": "bfloat16",
        "acceleration.vae_dtype": "bfloat16",
        "memory.batch_size": "2",
    }
    for name, value in values.items():
        expect(page.locator(f'[data-path="{name}"]')).to_have_value(value)
    plan = read_metadata(generate(page)).plan
    assert (plan.step_cache.method.value, plan.memory.vae_tiling) == ("deep_features", True)


def test_image_of_a_newer_version_shows_an_error(page: Page) -> None:
    "The status explains why its settings are not restored."
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(PLAN_KEY, '{"plan_version": 99, "prompt": "a"}')
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    bring(page, buffer.getvalue(), "png", "drop")
    expect(page.locator(".status")).to_contain_text("newer version of diffusion_workers: plan_version is 99")


def test_form_stored_by_an_earlier_version_is_migrated(page: Page) -> None:
    "After an update, settings stored in the browser are converted to the current fields."
    fill(page, prompt=PROMPT)
    old = {
        "prompt": PROMPT,
        "deepcache": {"cache_interval": 2},
        "acceleration": {"vae_precision": "bf16", "batch_size": 1},
    }
    store = """(form) => new Promise((resolve, reject) => {
        const opened = indexedDB.open('diffusion-workers');
        opened.onerror = () => reject(opened.error);
        opened.onsuccess = () => {
            const change = opened.result.transaction('settings', 'readwrite');
            change.objectStore('settings').put({ key: 'form', value: form });
            change.oncomplete = resolve;
            change.onabort = () => reject(change.error);
        };
    })"""
    page.evaluate(store, old)
    page.reload()
    for name, value in {
        "step_cache.method": "deepcache",
        "step_cache.interval": "2",
        "acceleration.vae_dtype": "bfloat16",
        "memory.batch_size": "1",
    }.items():
        expect(page.locator(f'[data-path="{name}"]')).to_have_value(value)


def test_settings_of_another_program_replace_the_form(page: Page) -> None:
    "Previous settings are cleared, and settings that cannot be restored are listed."
    fill(page, prompt=PROMPT, negative_prompt="blurry")
    unfold(page, "LoRA")
    page.get_by_role("button", name="Add a LoRA").or_(page.get_by_role("button", name="+ other")).first.click()
    page.locator('[data-path="loras[0].name"]').first.wait_for()
    unfold(page, "Image and mask")
    choose_image(page, "image", scene())
    text = (
        "a green star\nSteps: 7, Sampler: Euler, CFG scale: 2.5, Seed: 18446744073709551615, Size: 128x128, ENSD: 31337"
    )
    bring(page, encode_image(scene(), metadata={PARAMETERS_KEY: text}))
    status = page.locator(".status")
    expect(status).to_contain_text("Seed 18446744073709551615")
    expect(status).to_contain_text("ENSD 31337")
    values = {"prompt": "a green star", "negative_prompt": "", "seed": "", "num_inference_steps": "7"}
    for name, value in values.items():
        expect(page.locator(f'[data-path="{name}"]')).to_have_value(value)
    expect(page.locator('[data-path="loras[0].name"]')).to_have_count(0)
    plan = read_metadata(generate(page)).plan
    assert (plan.task.value, plan.scheduler.name, plan.negative_prompt, plan.loras) == (
        "text_to_image",
        "euler",
        None,
        None,
    )


SETTINGS = (
    "a green star\nNegative prompt: grain\nSteps: 7, Sampler: DPM++ 2M Karras, CFG scale: 2.5, "
    "Seed: 6687881544318117707, Size: 123x131"
)


def foreign_file(kind: str) -> bytes:
    "An image file with the settings as other programs write them."
    buffer, exif = io.BytesIO(), Image.Exif()
    if kind == "png":
        settings = {"prompt": "a green star", "negative_prompt": "grain", "steps": 7, "guidance_scale": 2.5}
        settings |= {"seed": "6687881544318117707", "sampler": "dpmpp_2m", "scheduler": "karras"}
        settings |= {"resolution": "(123, 131)", "performance": "Speed"}
        info = PngInfo()
        info.add_text("parameters", json.dumps(settings))
        scene().save(buffer, "PNG", pnginfo=info)
    else:
        body = SETTINGS.replace("\n", "\r\n").encode("utf-8" if kind == "jpeg" else "utf-16-le")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + body
        scene().save(buffer, kind.upper(), exif=exif.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
def test_foreign_metadata_resets_the_previous_form(page: Page, kind: str) -> None:
    "With each file type, previous LoRAs, controls and negative prompt are cleared, and large seeds keep every digit."
    fill(page, prompt=PROMPT, negative_prompt="blurry", num_inference_steps=30, clip_skip=1)
    unfold(page, "LoRA")
    page.get_by_role("button", name="Add a LoRA").or_(page.get_by_role("button", name="+ other")).first.click()
    unfold(page, "ControlNet")
    page.get_by_role("button", name="Add a control").click()
    page.locator('[data-image="controlnets[0].image"]').wait_for(state="attached")
    bring(page, foreign_file(kind), kind)
    status = page.locator(".status")
    expect(status).to_contain_text("6687881544318117707")
    expect(status).to_contain_text("width is rounded to 120")
    values = {"prompt": "a green star", "negative_prompt": "grain", "num_inference_steps": "7", "guidance_scale": "2.5"}
    values |= {"scheduler": "dpmpp_2m", "seed": "", "width": "120", "height": "128", "clip_skip": ""}
    for name, value in values.items():
        expect(page.locator(f'[data-path="{name}"]')).to_have_value(value)
    expect(page.locator('[data-path="loras[0].name"]')).to_have_count(0)
    expect(page.locator('[data-image="controlnets[0].image"]')).to_have_count(0)
    plan = read_metadata(generate(page)).plan
    assert (plan.negative_prompt, plan.loras, plan.controlnets, plan.width) == ("grain", None, None, 120)
    bring(page, encode_image(scene(), metadata={PARAMETERS_KEY: "a blue square\nSteps: 5, Seed: 9007199254740991"}))
    expect(status).to_have_text("Settings restored.")
    for name, value in {"negative_prompt": "", "scheduler": "", "seed": "9007199254740991"}.items():
        expect(page.locator(f'[data-path="{name}"]')).to_have_value(value)


def test_unsupported_comfyui_graph_leaves_the_form_unchanged(page: Page) -> None:
    "The status says that no settings were restored, and the form is unchanged."
    fill(page, prompt=PROMPT)
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("prompt", '{"3": {"class_type": "VideoMaker", "inputs": {}}}')
    scene().save(buffer, "PNG", pnginfo=info)
    bring(page, buffer.getvalue())
    expect(page.locator(".status")).to_contain_text("No settings restored: prompt VideoMaker")
    expect(page.locator("[data-path=prompt]")).to_have_value(PROMPT)


def test_seed_beyond_the_javascript_limit_is_not_rounded(page: Page) -> None:
    "A seed that JavaScript cannot represent exactly is rejected and keeps all its digits."
    fill(page, prompt=PROMPT, num_inference_steps=2, seed="18446744073709551615")
    page.get_by_role("button", name="Generate").click()
    seed = page.locator("[data-path=seed]")
    expect(seed).to_have_attribute("aria-invalid", "true")
    expect(seed).to_have_value("18446744073709551615")


def test_page_asks_for_the_server_token(browser: Browser, quick_python: tuple[str, ...], tmp_path) -> None:
    "With a valid token the page, its API documentation and the server folder work; invalid tokens get an error."
    variables = {"DIFFUSION_WORKERS_TOKEN": "a-secret-word", "DIFFUSION_WORKERS_OUTPUTS": str(tmp_path)}
    with running_server(quick_python, **variables) as url:
        shown = browser.new_context().new_page()
        shown.set_default_timeout(PATIENCE * 1000)
        shown.goto(url)
        expect(shown.locator("[role=status]").first).to_have_text("The server requires a token.")
        for word, answer in (
            ("a-secret-wörd", re.compile(r"^The token: character 11 \(U\+00F6\) cannot be sent in a header")),
            ("another-word", "Invalid token."),
            ("a-secret-word", re.compile("ready")),
        ):
            shown.get_by_label("Token").fill(word)
            shown.get_by_role("button", name="Connect").click()
            expect(shown.locator("[role=status]").first).to_have_text(answer)
            assert word not in shown.locator("body").inner_text()
        fill(shown, prompt=PROMPT, num_inference_steps=2)
        made = generate(shown)
        with shown.expect_popup() as opened:
            shown.get_by_role("link", name="API").click()
        expect(opened.value.locator("#operations-generation-generate")).to_be_visible()
        check_folder(shown, made)
        shown.context.close()


def check_folder(page: Page, made: bytes) -> None:
    "The server folder lists the image, which can be found, starred, deleted, restored and downloaded."
    page.get_by_role("button", name="Server folder").click()
    thumbs = page.locator(".thumbs li")
    expect(thumbs).to_have_count(1)
    expect(page.locator(".thumbs img")).to_be_visible()
    page.get_by_label("Search the prompts").fill("no such word")
    expect(thumbs).to_have_count(0)
    page.get_by_label("Search the prompts").fill("blue SQUARE")
    thumbs.locator("button").click()
    assert shown_file(page) == made
    expect(page.locator(".facts")).to_contain_text("ddim")
    page.get_by_role("button", name="Star this image").click()
    page.get_by_role("button", name="Only starred images").click()
    expect(thumbs).to_have_count(1)
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(thumbs).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(thumbs).to_have_count(1)
    page.get_by_role("button", name="More gallery actions").click()
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Download the image as ZIP").click()
    with zipfile.ZipFile(downloaded.value.path()) as archive:
        assert [archive.read(name) for name in archive.namelist()] == [made]


def test_profile_is_recorded_in_the_metadata(page: Page) -> None:
    "A profile of the model can be selected, and its settings are in the image metadata."
    fill(page, prompt=PROMPT)
    page.locator("[data-path=profile]").select_option("fast")
    plan = read_metadata(generate(page)).plan
    assert (plan.profile, plan.num_inference_steps, plan.acceleration.vae_dtype.value) == ("fast", 2, "bfloat16")


def test_errors_are_shown_at_their_field(page: Page) -> None:
    "An error is linked to its field for screen readers, moves the focus there, and disappears once fixed."
    fill(page, prompt=PROMPT, num_inference_steps=2, width=100)
    unfold(page, "Image and mask")
    page.get_by_role("button", name="Generate").click()
    width = page.locator("[data-path=width]")
    expect(width).to_have_attribute("aria-invalid", "true")
    expect(width).to_be_focused()
    told = [page.locator(f"id={name}").inner_text() for name in width.get_attribute("aria-describedby").split()]
    assert any("multiple of 8" in text for text in told), told
    expect(page.locator("[aria-invalid=true]")).to_have_count(1)
    fill(page, width=96)
    expect(width).to_have_attribute("aria-invalid", "false")
    assert Image.open(io.BytesIO(generate(page))).size == (96, 128)


def test_prompt_token_count_highlighting_and_completion(page: Page) -> None:
    "Tokens are counted by the model's tokenizer; completed LoRA names are added to the form; Ctrl+Up weights a word."
    prompt, note = page.get_by_label("Prompt", exact=True), page.locator(".dw-prompt-note").first
    prompt.fill("a (red:1.2) circle")
    expect(note).to_contain_text("9 of 30 tokens")
    note.get_by_role("button", name="character 3: a weight is drawn as text").click()
    assert prompt.evaluate("area => area.value.slice(area.selectionStart, area.selectionEnd)") == "(red:1.2)"
    prompt.fill("a red circle " * 20)
    expect(note).to_contain_text("those beyond 30 are cut off")
    prompt.fill("a red circle, outl")
    prompt.press("i")
    expect(page.locator(".dw-prompt-menu li:visible")).to_have_count(1)
    prompt.press("Escape")
    expect(page.locator(".dw-prompt-menu li:visible")).to_have_count(0)
    prompt.press("n")
    prompt.press("Tab")
    expect(prompt).to_have_value("a red circle, ")
    unfold(page, "LoRA")
    expect(page.locator('[data-path="loras[0].name"]')).to_have_value("outline")
    prompt.fill("a red circle")
    prompt.press("Control+ArrowUp")
    expect(prompt).to_have_value("a red (circle:1.1)")


def test_example_prompts_fill_the_prompt(page: Page) -> None:
    "Example prompts come from the manifest of the model and disappear once another prompt is typed."
    fill(page, prompt="")
    examples = page.get_by_role("group", name="Example prompts").get_by_role("button")
    expect(examples).to_have_count(4)
    examples.nth(1).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile("yellow star"))
    expect(examples.nth(1)).to_have_attribute("aria-pressed", "true")
    fill(page, prompt=PROMPT + " and a star")
    expect(examples).to_have_count(0)


def test_xy_grid_and_image_comparison(page: Page) -> None:
    "A grid of two parameters uses one seed; a slider compares two images and a table lists the differences."
    fill(page, prompt=PROMPT)
    page.get_by_role("button", name="X/Y grid").click()
    page.get_by_label("Values of the X axis").fill("2:4:2")
    page.get_by_label("Values of the Y axis").fill("1, 3")
    page.get_by_role("button", name="Generate grid").click()
    expect(page.locator("button.cell")).to_have_count(4)
    expect(page.locator(".status")).to_have_text("The grid is complete.")
    page.locator("button.cell").first.click()
    first = read_metadata(shown_file(page)).plan
    assert (first.num_inference_steps, first.guidance_scale) == (2, 1)
    page.get_by_role("button", name="More for this image").click()
    page.get_by_role("button", name="Compare").click()
    page.locator(".thumbs button:not([aria-pressed=true])").first.click()
    rows = page.locator(".differences tbody th").all_inner_texts()
    varied = {"Steps", "Denoising steps", "Denoiser calls", "Guidance"}
    assert "Seed" not in rows and set(rows) <= varied and rows
    slider = page.get_by_label("How much of the left image is shown")
    slider.fill("25")
    clip = page.locator(".pair .over").evaluate("image => getComputedStyle(image).clipPath")
    assert "75%" in clip, clip
    before = page.locator(".frame.compare").screenshot()
    slider.fill("100")
    assert ImageChops.difference(
        Image.open(io.BytesIO(before)).convert("RGB"),
        Image.open(io.BytesIO(page.locator(".frame.compare").screenshot())).convert("RGB"),
    ).getbbox()


def test_copied_requests_reproduce_the_image(page: Page, server: str, tmp_path) -> None:
    "Requests copied as JSON, curl and Python generate the same pixels as the page."
    fill(page, prompt='a "red" circle, it\'s on a white background', num_inference_steps=3, seed=5)
    wanted = pixels(generate(page))
    copied = {}
    for name in ("JSON", "curl", "Python"):
        page.get_by_role("button", name="More form actions").click()
        page.get_by_role("form").get_by_role("button", name=f"Copy as {name}").click()
        expect(page.locator(".status")).to_have_text(f"Copied as {name}.")
        copied[name] = page.evaluate("navigator.clipboard.readText()")
    with Client(server) as client:
        assert (pixels(image_bytes(client.generate(json.loads(copied["JSON"])))[0]) == wanted).all()
    needs(shutil.which("curl"), "curl is not installed")
    answer = subprocess.run(["bash", "-c", copied["curl"]], capture_output=True, check=True).stdout
    assert (pixels(base64.b64decode(json.loads(answer)["generation"]["images"][0]["image"])) == wanted).all()
    subprocess.run([sys.executable, "-c", copied["Python"]], cwd=tmp_path, check=True)
    assert (pixels((tmp_path / "image-0.png").read_bytes()) == wanted).all()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout_fits_a_narrow_screen(browser: Browser, server: str, scheme: str) -> None:
    "At 400 pixels nothing overflows, Generate is visible, controls have names, and text has a contrast of at least 7."
    context = browser.new_context(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    open_page(page, server)
    page.evaluate("document.querySelectorAll('details').forEach(section => { section.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.get_by_role("button", name="Generate").bounding_box()["y"] < 800
    unnamed = page.locator("input, select, textarea, button").evaluate_all(
        "all => all.filter(one => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())"
        ".map(one => one.outerHTML)"
    )
    assert not unnamed, f"no name for screen readers: {unnamed}"
    colors = page.evaluate(
        "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name]"
        ".match(/[0-9.]+/g).slice(0, 3).map(Number))"
    )
    assert contrast(*colors) >= 7, colors
    context.close()


def contrast(first: list[float], second: list[float]) -> float:
    "The WCAG 2 contrast ratio of two sRGB colors."
    linear = [
        [part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in color]
        for color in (first, second)
    ]
    light, dark = sorted((0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# --- the form ------------------------------------------------------------------


def test_preprocessor_parameters_have_sliders(page: Page) -> None:
    "A parameter with bounds has a slider with the server's bounds, which updates the field."
    fill(page, prompt=PROMPT)
    unfold(page, "ControlNet")
    page.get_by_role("button", name="Add a control").click()
    slider = page.get_by_label("Low threshold, slider")
    assert [slider.get_attribute(name) for name in ("min", "max", "step")] == ["0", "255", "1"]
    slider.fill("40")
    expect(page.locator('[data-path="controlnets[0].preprocessing.parameters.low_threshold"]')).to_have_value("40")


def test_missing_required_fields_are_marked_only_on_generate(page: Page) -> None:
    "A new control without an image is not marked as an error until Generate is pressed."
    fill(page, prompt=PROMPT)
    unfold(page, "ControlNet")
    page.get_by_role("button", name="Add a control").click()
    with page.expect_response("**/plan"):
        fill(page, num_inference_steps=3)
    expect(page.locator("details.section .badge.wrong")).to_have_count(0)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("details.section .badge.wrong")).to_have_text("1 error")
    page.get_by_role("button", name="Remove control 1").click()
    expect(page.locator("details.section .badge.wrong")).to_have_count(0)


def test_lora_names_are_suggested_but_not_restricted(page: Page) -> None:
    "LoRA names are suggested, but any can be typed; a click on a trigger word adds it to the prompt."
    fill(page, prompt=PROMPT)
    unfold(page, "LoRA")
    page.get_by_role("button", name="+ heart").click()
    page.get_by_role("button", name="heart", exact=True).click()
    expect(page.locator("[data-path=prompt]")).to_have_value(f"{PROMPT}, heart")
    name = page.locator('[data-path="loras[0].name"]')
    suggested = page.locator(f"id={name.get_attribute('list')}").locator("option")
    assert suggested.evaluate_all("all => all.map(one => one.value)") == ["outline", "night", "heart"]
    name.fill("someone/another-lora")
    page.get_by_role("button", name="Generate").click()
    expect(name).to_have_attribute("aria-invalid", "true")
    expect(name).to_have_value("someone/another-lora")
    unfold(page, "ControlNet")
    page.get_by_role("button", name="Add a control").click()
    page.locator('[data-path="controlnets[0].model"]').fill("someone/another-controlnet")


def test_size_presets_and_swap(page: Page) -> None:
    "Presets keep the model's default area, Swap exchanges width and height, and the active preset is marked."
    page.get_by_role("button", name="4:3").click()
    width, height = (page.locator(f"[data-path={name}]") for name in ("width", "height"))
    expect(width).to_have_value("144")
    expect(height).to_have_value("112")
    page.get_by_role("button", name="Swap width and height").click()
    expect(width).to_have_value("112")
    expect(page.get_by_role("button", name="3:4")).to_have_attribute("aria-pressed", "true")


def test_form_shows_only_fields_of_the_model(page: Page) -> None:
    "Fields without effect on the selected model are hidden, unless they have a value."
    fill(page, clip_skip=1)
    page.locator("[data-path=model]").select_option("shapes-flux")
    unfold(page, "All parameters")
    expect(page.locator("[data-path=true_cfg_scale]")).to_have_count(1)
    expect(page.locator("[data-path=clip_skip]")).to_have_count(1)
    page.locator("[data-path=clip_skip]").fill("")
    expect(page.locator("[data-path=clip_skip]")).to_have_count(0)
    page.locator("[data-path=model]").select_option("shapes-sd15")
    expect(page.locator("[data-path=true_cfg_scale]")).to_have_count(0)


def test_models_not_downloaded_show_size_and_license(page: Page) -> None:
    "The model list shows the download, and the note above Generate also shows the license."
    page.locator("[data-path=model]").select_option("sdxl-base-1.0")
    expect(page.locator(".weights")).to_contain_text(re.compile("downloads about 7 GB|not on the server"))
    expect(page.locator(".weights")).to_contain_text("License: CreativeML Open RAIL++-M")
    assert re.search("download 7 GB|not on server", page.locator("option[value='sdxl-base-1.0']").inner_text())


# --- reference images -----------------------------------------------------------

TIMES = "\N{MULTIPLICATION SIGN}"
DROP_FILES = """(place, files) => {
    const data = new DataTransfer();
    for (const [name, bytes] of files)
        data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type: "image/png" }));
    place.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def editing_server(quick_python: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "A server with a tiny instruction-based editing model and a tiny Redux model."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.flux2)
    write_tiny_model(folder, ModelFamily.flux, "redux", ModelKind.redux)
    with running_server(quick_python, DIFFUSION_WORKERS_MODELS=str(folder)) as url:
        yield url


def test_reference_images_workflow(browser: Browser, editing_server: str) -> None:
    "Add by drop and file chooser, reorder by drag and keyboard, reload, reuse a result, restore an edit, set weights."
    needs(AXE.is_file(), "axe-core is not installed: ./build.sh packages page")
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme="light")
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    open_page(page, editing_server)
    section = page.locator("details.section").filter(has=page.locator("summary", has_text="Reference images"))
    expect(section).to_have_count(0)
    page.locator("[data-path=model]").select_option("flux2")
    fill(page, prompt="put the square of image 2 into image 1", num_inference_steps=2, seed=3)
    unfold(page, "Reference images")
    expect(section.locator("summary")).to_contain_text("0 of at most 4")
    place, items = page.locator(".references"), page.locator(".references ol > li")
    bring(page, png(Image.new("RGB", (64, 64), "gold")))  # this model does not support a start image
    expect(page.locator(".status")).to_have_text("The image is reference image 1 now.")
    place.get_by_role("button", name="Remove: reference image 1").click()
    expect(items).to_have_count(0)
    file = lambda side: png(Image.new("RGB", (side, side), "seagreen"))
    files = [("64.png", file(64)), ("letter.png", b"a letter"), ("80.png", file(80)), ("96.png", file(96))]
    place.evaluate(DROP_FILES, [[name, base64.b64encode(data).decode()] for name, data in files])
    expect(items).to_have_count(3)
    expect(place.get_by_role("alert")).to_contain_text("letter.png: this is not an image")
    chosen = [{"name": f"{side}.png", "mimeType": "image/png", "buffer": file(side)} for side in (112, 128)]
    page.set_input_files('[data-image="reference_images"]', chosen)
    expect(place.get_by_role("alert")).to_contain_text("128.png was not added: this model takes at most 4")
    order = lambda *sides: (
        expect(items.locator("img")).to_have_count(len(sides))
        or [
            expect(items.nth(at).locator("img")).to_have_attribute(
                "alt", f"Reference image {at + 1}, {side} {TIMES} {side}"
            )
            for at, side in enumerate(sides)
        ]
    )
    order(64, 80, 96, 112)

    items.nth(3).drag_to(items.nth(0))
    order(112, 64, 80, 96)
    place.get_by_role("button", name="Move later: reference image 1").press("Enter")
    order(64, 112, 80, 96)
    expect(place.get_by_role("button", name="Move later: reference image 2")).to_be_focused()
    found = {"four": violations(page)}
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 400, "height": 800})
    found["dark and narrow"] = violations(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.set_viewport_size({"width": 1280, "height": 860})
    place.get_by_role("button", name="Remove: reference image 4").press("Enter")
    place.get_by_role("button", name="Remove: reference image 2").press("Enter")
    order(64, 80)

    page.reload()
    order(64, 80)
    plan = read_metadata(generate(page)).plan
    sizes = [(image.width, image.height) for image in plan.reference_images]
    assert (plan.task.value, sizes, plan.width) == ("edit", [(64, 64), (80, 80)], 64)
    page.get_by_role("button", name="Use as reference").click()
    expect(page.locator(".status")).to_have_text("The image is reference image 3 now.")
    order(64, 80, 64)
    page.get_by_role("button", name="Reuse settings").click()
    order(64, 80)
    page.locator(".thumbs button").drag_to(place.locator(".drop"))
    order(64, 80, 64)

    small = {"name": "small.png", "mimeType": "image/png", "buffer": file(32)}
    page.set_input_files('[data-image="reference_images"]', small)
    page.get_by_role("button", name="Generate").click()
    expect(items.nth(3).locator(".errors li")).to_contain_text("allowed: sides of at least 64 pixels")
    found["an error at an image"] = violations(page)
    page.locator("[data-path=model]").select_option("shapes-sd15")
    page.get_by_role("button", name="Generate").click()
    expect(place.locator("> .errors > li")).to_contain_text("take a model of the families")
    for _ in range(4):
        place.get_by_role("button", name="Remove: reference image 1").click()
    expect(section).to_have_count(0)

    # restore an edit: rejected without its references, same pixels with them, text to image on request
    with Client(editing_server) as client:
        asked = {"model": "flux2", "prompt": "blue", "num_inference_steps": 2}
        asked["reference_images"] = [file(80), file(64)]
        original, other = [image_bytes(client.generate(**asked, seed=seed))[0] for seed in (9, 10)]
    bring(page, original)
    missing = place.locator(".missing")
    expect(missing).to_contain_text(f"image 1 (80 {TIMES} 80, sha256 ")
    expect(section.locator("summary")).to_contain_text("2 of 2 missing")
    found["missing images"] = violations(page)
    page.locator("button.primary").click()
    expect(section.locator(".badge.wrong")).to_have_text("1 error")
    expect(page.locator(".thumbs li")).to_have_count(1)
    chosen = [{"name": f"{side}.png", "mimeType": "image/png", "buffer": file(side)} for side in (80, 64)]
    page.set_input_files('[data-image="reference_images"]', chosen)
    expect(missing).to_have_count(0)
    assert (pixels(generate(page, 2)) == pixels(original)).all()
    bring(page, other)
    page.get_by_role("button", name="Generate without them").click()
    expect(missing).to_have_count(0)
    assert read_metadata(generate(page, 3)).plan.task == "text_to_image"

    # weights for a model that blends its references
    page.locator("[data-path=model]").select_option("redux")
    fill(page, width=64, height=64)
    page.set_input_files('[data-image="reference_images"]', chosen)
    place.get_by_label("Weight of reference image 1").fill("0.8")
    place.get_by_label("Weight of reference image 1").press("Tab")
    found["weights"] = violations(page)
    place.get_by_role("button", name="Move later: reference image 1").press("Enter")
    expect(place.get_by_label("Weight of reference image 2")).to_have_value("0.8")
    planned = read_metadata(generate(page, 4)).plan.reference_images
    assert [(image.width, image.weight) for image in planned] == [(64, 0.5), (80, 0.8)]
    context.close()
    assert not any(found.values()), json.dumps(found, indent=1)


# --- multiple tabs -------------------------------------------------------------


def test_tabs_share_the_gallery_but_not_the_form(page: Page, server: str) -> None:
    "Each tab has its own form; galleries are synchronized; deleting an image keeps it as an input in another tab."
    other = page.context.new_page()
    open_page(other, server)
    fill(page, prompt=PROMPT, num_inference_steps=2)
    fill(other, prompt="a green star")
    generate(page)
    expect(other.locator(".thumbs li")).to_have_count(1)
    other.locator(".thumbs button").click()
    other.get_by_role("button", name="Use as start image").click()
    expect(other.locator("img[alt^='Start image']")).to_be_attached()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(other.locator(".thumbs li")).to_have_count(0)
    for shown, prompt in ((page, PROMPT), (other, "a green star")):
        shown.reload()
        expect(shown.locator("[data-path=prompt]")).to_have_value(prompt)
    expect(other.locator("img[alt^='Start image']")).to_be_attached()
    expect(page.locator("img[alt^='Start image']")).to_have_count(0)


def test_deletions_can_be_undone(page: Page) -> None:
    "Restore one image with Ctrl+Z, and all images and the form with the Undo button."
    fill(page, prompt=PROMPT, num_inference_steps=2, num_images=2)
    page.keyboard.press("Control+Enter")
    thumbs = page.locator(".thumbs li")
    expect(thumbs).to_have_count(2)
    page.locator(".thumbs button").first.click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(thumbs).to_have_count(1)
    page.keyboard.press("Control+z")
    expect(thumbs).to_have_count(2)
    page.get_by_role("button", name="More gallery actions").click()
    page.get_by_role("button", name="Delete all 2").click()
    expect(thumbs).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(thumbs).to_have_count(2)
    page.get_by_role("button", name="More form actions").click()
    page.get_by_role("button", name="Clear the form").click()
    expect(page.locator("[data-path=prompt]")).to_have_value("")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("[data-path=prompt]")).to_have_value(PROMPT)


# --- the stage -------------------------------------------------------------------


def test_batch_grid_viewer_search_and_zip_download(page: Page, tmp_path) -> None:
    "Batch images can be zoomed, panned, starred and found; those that match are downloaded as a ZIP file."
    fill(page, prompt=PROMPT, num_inference_steps=2, num_images=2, seed=4)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".batch img")).to_have_count(2)
    page.locator(".batch button").first.click()
    image = page.locator(".viewer > img")
    before = image.bounding_box()["width"]
    page.locator(".viewer").focus()
    page.keyboard.press("+")
    assert abs(image.bounding_box()["width"] / before - 1.25) < 0.01
    page.keyboard.press("ArrowRight")
    assert "translate(-40px" in image.get_attribute("style")
    page.keyboard.press("0")
    assert abs(image.bounding_box()["width"] - before) < 1
    box = page.locator(".viewer").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -100)
    expect(page.locator(".viewer.zoomed")).to_be_visible()
    page.keyboard.press("f")
    page.wait_for_function("document.fullscreenElement?.classList.contains('viewer')")
    page.evaluate("document.exitFullscreen()")
    page.get_by_role("button", name="Star this image").click()
    page.get_by_role("button", name="Only starred images").click()
    expect(page.locator(".thumbs li")).to_have_count(1)
    page.get_by_label("Search the prompts").fill("square RED")
    expect(page.locator(".thumbs li")).to_have_count(1)
    page.get_by_role("button", name="More gallery actions").click()
    with page.expect_download() as downloaded:
        page.get_by_role("button", name="Download the image as ZIP").click()
    with zipfile.ZipFile(downloaded.value.path()) as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 1
        assert read_metadata(archive.read(archive.namelist()[0])).plan.prompt == PROMPT
    page.get_by_label("Search the prompts").fill("star")
    expect(page.locator(".thumbs li")).to_have_count(0)
    page.get_by_role("button", name="Batch of 2").click()
    expect(page.locator(".batch img")).to_have_count(2)


def test_rejected_request_keeps_the_displayed_image(page: Page) -> None:
    fill(page, prompt=PROMPT, num_inference_steps=2)
    made = generate(page)
    fill(page, width=100)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-path=width]")).to_have_attribute("aria-invalid", "true")
    assert shown_file(page) == made


def test_dropped_file_that_is_not_an_image_shows_an_error(page: Page) -> None:
    bring(page, b"some notes", "text/plain")
    expect(page.locator(".status")).to_have_text("star.plain is not an image: drop a PNG, JPEG or WebP file.")
    bring(page, b"not really a PNG")
    expect(page.locator(".status")).to_contain_text("image")


def test_cancel_all(page: Page) -> None:
    fill(page, prompt=PROMPT, num_inference_steps=150, num_images=8)
    for _ in range(3):
        page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Cancel all 3").click()
    expect(page.locator(".progress")).to_have_count(0)
    expect(page.locator(".thumbs li")).to_have_count(0)


def test_page_reconnects_to_an_unreachable_server(page: Page) -> None:
    "The page shows the lost connection without user action, and recovers when the server is back."
    fill(page, prompt=PROMPT)
    page.context.set_offline(True)
    expect(page.get_by_role("alert")).to_have_text("Server not responding. Retrying …")
    expect(page.locator("[role=status]").first).to_contain_text("Server not responding")
    page.context.set_offline(False)
    expect(page.locator("[role=status]").first).to_contain_text("ready")
    expect(page.locator(".banner")).to_have_count(0)


def test_grid_with_prompt_search_and_replace_and_z_axis(page: Page) -> None:
    "Search and replace inserts each value into the prompt; captions show the Z value."
    fill(page, prompt=PROMPT, num_inference_steps=2)
    page.get_by_role("button", name="X/Y grid").click()
    page.get_by_label("Parameter of the X axis").select_option(label="Prompt: search and replace")
    page.get_by_label("Values of the X axis").fill("pink, green")
    page.get_by_label("Parameter of the Y axis").select_option(label="none")
    page.get_by_label("Parameter of the Z axis").select_option(label="Steps")
    page.get_by_label("Values of the Z axis").fill("1, 2")
    page.get_by_role("button", name="Generate grid").click()
    expect(page.locator(".axis.wrong")).to_contain_text("the prompt does not contain “pink”")
    page.get_by_label("Values of the X axis").fill("red, green")
    page.get_by_role("button", name="Generate grid").click()
    expect(page.locator("button.cell")).to_have_count(4)
    assert page.locator("table.grid caption").all_inner_texts() == ["Steps 1", "Steps 2"]
    last = page.locator("button.cell").last
    assert last.bounding_box()["width"] > 250, "the cells use the stage"
    last.click()
    plan = read_metadata(shown_file(page)).plan
    assert (plan.prompt, plan.num_inference_steps) == (PROMPT.replace("red", "green"), 2)


def test_mask_editor_works_with_the_keyboard(page: Page) -> None:
    "Open, paint, fill, undo, redo, change the mask color and finish without a mouse."
    fill(page, prompt=PROMPT)
    unfold(page, "Image and mask")
    choose_image(page, "image", scene())
    page.get_by_role("button", name="Paint mask").focus()
    page.keyboard.press("Enter")
    canvas = page.locator(".mask-image canvas")
    expect(canvas).to_be_focused()
    alpha = lambda x, y: canvas.evaluate(
        "(canvas, [x, y]) => canvas.getContext('2d').getImageData(x, y, 1, 1).data[3]", [x, y]
    )
    page.keyboard.down("Space")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.keyboard.up("Space")
    assert [alpha(x, 64) for x in (64, 80, 20)] == [255, 255, 0]
    page.keyboard.press("Control+z")
    assert alpha(80, 64) == 0
    page.keyboard.press("Control+Shift+z")
    assert alpha(80, 64) == 255
    page.keyboard.press("f")
    for _ in range(40):
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    assert [alpha(x, y) for x, y in ((2, 2), (120, 120), (80, 64))] == [255, 255, 255]
    page.keyboard.press("Control+z")
    page.locator("input[type=color]").fill("#00ff00")
    color = "document.querySelector('.mask-image canvas').getContext('2d').getImageData(80, 64, 1, 1).data"
    page.wait_for_function(f"String({color}.slice(0, 3)) === '0,255,0'")  # redrawn in the next frame
    page.get_by_role("button", name="Done").focus()
    page.keyboard.press("Enter")
    mask = page.locator("img[alt^='Mask']")
    painted = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask.get_attribute("src").split(",")[1]))).convert("L"))
    assert painted[64, 80] == 255 and painted[2, 2] == 0


def test_mask_editor_works_with_touch_and_pen(browser: Browser, server: str) -> None:
    "One finger paints, a second one undoes that stroke and zooms, and light pen pressure makes a smaller dab."
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True)
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    open_page(page, server)
    unfold(page, "Image and mask")
    choose_image(page, "image", scene())
    page.get_by_role("button", name="Paint mask").tap()
    canvas = page.locator(".mask-image canvas")
    painted = lambda: canvas.evaluate(
        "canvas => canvas.getContext('2d').getImageData(0, 0, 128, 128).data.filter((_, i) => i % 4 === 3)"
        ".reduce((sum, alpha) => sum + (alpha > 127), 0)"
    )
    box = canvas.bounding_box()
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    page.touchscreen.tap(middle["x"], middle["y"])
    dab = painted()
    assert 150 < dab < 250, "a circle with a diameter of 16"
    browser_session = context.new_cdp_session(page)
    send = lambda kind, *points: browser_session.send(
        "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"id": i, **point} for i, point in points]}
    )
    shifted = lambda by: {"x": middle["x"] + by, "y": middle["y"] + by}
    send("touchStart", (0, shifted(-60)))
    send("touchStart", (0, shifted(-60)), (1, shifted(60)))
    send("touchMove", (0, shifted(-60)), (1, shifted(120)))
    send("touchEnd")
    assert painted() == dab
    zoom = page.get_by_role("group", name="Zoom").locator("output")
    assert int(zoom.inner_text().split()[0]) > 120
    page.get_by_role("button", name="Clear").click()
    assert painted() == 0
    box = canvas.bounding_box()
    pen = {
        "x": box["x"] + 60,
        "y": box["y"] + 60,
        "button": "left",
        "clickCount": 1,
        "pointerType": "pen",
        "force": 0.2,
    }
    browser_session.send("Input.dispatchMouseEvent", pen | {"type": "mousePressed"})
    browser_session.send("Input.dispatchMouseEvent", pen | {"type": "mouseReleased"})
    assert 0 < painted() < dab / 2
    context.close()


# --- accessibility ------------------------------------------------------------

AXE = ROOT / "web_gen_client" / "node_modules" / "axe-core" / "axe.min.js"


def violations(page: Page) -> list[str]:
    "The violations that axe-core finds in the current state of the page."
    if not page.evaluate("'axe' in window"):
        page.add_script_tag(path=AXE)
    found = page.evaluate("async () => (await axe.run({ resultTypes: ['violations'] })).violations")
    return [
        f"{rule['id']}: {node['html'][:160]} {node['failureSummary'][:200]}" for rule in found for node in rule["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_accessibility_violations(browser: Browser, server: str, scheme: str) -> None:
    "Check the main states of the page in both color schemes."
    needs(AXE.is_file(), "axe-core is not installed: ./build.sh packages page")
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE * 1000)
    page, found = context.new_page(), {}
    open_page(page, server)
    found["start"] = violations(page)
    fill(page, prompt=PROMPT, num_inference_steps=2, num_images=2)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".batch img")).to_have_count(2)
    found["batch"] = violations(page)
    page.locator(".batch button").first.click()
    page.get_by_role("button", name="More for this image").click()
    found["image and menu"] = violations(page)
    page.get_by_role("button", name="Compare with another").click()
    page.locator(".thumbs button").last.click()
    found["comparison"] = violations(page)
    unfold(page, "ControlNet")
    page.get_by_role("button", name="Add a control").click()
    unfold(page, "LoRA")
    page.get_by_role("button", name="+ heart").click()
    unfold(page, "Image and mask")
    choose_image(page, "image", scene())
    fill(page, width=100)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-path=width]")).to_have_attribute("aria-invalid", "true")
    page.evaluate("document.querySelectorAll('details').forEach(section => { section.open = true })")
    found["form with errors"] = violations(page)
    page.get_by_role("button", name="Paint mask").click()
    found["mask"] = violations(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Remove control 1").click()
    fill(page, width=96)
    page.get_by_role("button", name="X/Y grid").click()
    page.get_by_label("Values of the X axis").fill("1, 2")
    page.get_by_label("Values of the Y axis").fill("1, none")
    page.get_by_role("button", name="Generate grid").click()
    found["grid with an error"] = violations(page)
    page.get_by_label("Values of the Y axis").fill("1")
    page.get_by_role("button", name="Generate grid").click()
    expect(page.locator("button.cell")).to_have_count(1)
    expect(page.locator(".cell.failed")).to_have_count(1)  # with a start image, one step leaves none to run
    found["grid"] = violations(page)
    page.set_viewport_size({"width": 400, "height": 800})
    found["narrow"] = violations(page)
    context.set_offline(True)
    expect(page.get_by_role("alert").first).to_contain_text("Server not responding")
    found["no server"] = violations(page)
    context.close()
    assert not any(found.values()), json.dumps(found, indent=1)
