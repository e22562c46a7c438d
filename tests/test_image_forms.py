"""Result images as base64 text, data URI or bucket URL: everything that reads one accepts all three."""

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from diffusion_workers.models.store import load_manifests
from diffusion_workers.planning.inputs import plan_request
from ez_diffusion_client.models import (
    ControlMap,
    GeneratedImage,
    GenerationRequest,
    GenerationResponse,
    OpResult,
    OpStatus,
    OutputFormat,
    ProgressEvent,
)

FORMS = ("base64", "base64 with line breaks", "URL-safe base64", "data URI", "URL")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 50).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


FILE = png()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    "The presigned URL of the file in a bucket."

    class Bucket(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(FILE)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/0.png?X-Amz-Signature=secret"
    server.shutdown()


@pytest.fixture(params=FORMS)
def text(request: pytest.FixtureRequest, bucket: str) -> str:
    encoded = base64.b64encode(FILE).decode()
    return {
        "base64": encoded,
        "base64 with line breaks": "\n".join(encoded[at : at + 76] for at in range(0, len(encoded), 76)),
        "URL-safe base64": encoded.replace("+", "-").replace("/", "_").rstrip("="),
        "data URI": f"data:image/png;base64,{encoded}",
        "URL": bucket,
    }[request.param]


def generation(text: str) -> OpResult:
    image = GeneratedImage(image=text, format=OutputFormat.png, width=48, height=32, seed=7)
    request = GenerationRequest(prompt="a red circle", seed=7)
    plan = plan_request(request, load_manifests().find()).plan
    return OpResult(status=OpStatus.success, generation=GenerationResponse(images=[image], plan=plan), plan=plan)


def control_map(text: str) -> OpResult:
    found = ControlMap(image=text, preprocessor="canny", width=48, height=32)
    return OpResult(status=OpStatus.success, control_map=found)


def test_the_client_reads_every_image_form(text: str, tmp_path: Path):
    result = generation(text)
    assert result.image.size == (48, 32)
    result.save(tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").size == (48, 32)
    shown = result._repr_html_()
    assert text in shown if text.startswith("http") else "data:image/png;base64," in shown


def test_the_cli_saves_every_image_form(text: str, tmp_path: Path):
    from diffusion_workers.cli.outputs import Output, write_images
    from ez_diffusion_client.receipts import save_map

    paths = write_images(generation(text), [tmp_path / "image.png"], Output(str(tmp_path / "image.png")))
    assert Image.open(paths[0]).size == (48, 32)
    assert Image.open(save_map(control_map(text).control_map, tmp_path / "map.png")).size == (48, 32)


def test_the_server_returns_every_image_form(text: str):
    from diffusion_workers.server.routes import image_answer

    answer = image_answer(generation(text))
    assert (answer.body, answer.media_type, answer.headers["X-Seed"]) == (FILE, "image/png", "7")


def test_the_worker_delivers_every_image_form(text: str):
    from diffusion_workers.worker.delivery import fitted, uploaded
    from diffusion_workers.worker.worker_sdxl import to_worker_sdxl

    stored = {}

    class Bucket:
        def client(self):
            return None

        def upload(self, key, data, kind, client):
            stored[key] = data
            return f"https://bucket.example/{key}"

    sent = uploaded(generation(text), Bucket(), "job").generation.images[0].image
    assert stored == ({} if text.startswith("http") else {"job/0.png": FILE})
    assert sent.startswith("http")
    smaller = fitted(generation(text), 10_000_000).generation.images[0].image
    assert smaller == text or Image.open(io.BytesIO(base64.b64decode(smaller))).size == (48, 32)
    address = to_worker_sdxl(generation(text))["image_url"]
    assert address.count("data:") == (0 if text.startswith("http") else 1)


def test_a_sweep_saves_every_image_form(text: str, tmp_path: Path):
    from diffusion_workers.sweep.folder import write_result

    result = asyncio.run(write_result(tmp_path, "0" * 16, generation(text)))
    assert (tmp_path / result.generation.images[0].image).read_bytes() == FILE


def test_the_panel_reads_every_image_form(text: str, tmp_path: Path):
    from diffusion_workers.panel.addon_forms import MapPreview, file_of
    from diffusion_workers.panel.history import ImageHistory
    from diffusion_workers.panel.stage import Stage

    request = GenerationRequest(prompt="a red circle", image=text, strength=0.5)
    history = ImageHistory(tmp_path / "history")
    entry = history.add(request, generation(text))[0]
    assert Image.open(entry.path).size == (48, 32)
    assert file_of(text) == (text if text.startswith("http") else FILE)
    stage = Stage()
    stage.show_event(ProgressEvent(phase="denoise", step=1, total_steps=2, preview=text))
    assert stage.partial == FILE
    stage._show_success(generation(text))
    assert stage.image.value == FILE
    preview = MapPreview(lambda request: control_map(text), dict)
    preview.show(control_map(text))
    assert preview.map.value == FILE


def test_download_errors_do_not_show_the_signature(tmp_path: Path):
    from ez_diffusion_client.errors import ConnectionLost

    gone = "http://127.0.0.1:9/0.png?X-Amz-Signature=secret"
    with pytest.raises(ConnectionLost) as refused:
        generation(gone).save(tmp_path / "image.png")
    assert "secret" not in str(refused.value)
