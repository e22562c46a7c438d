"""Unresponsive image hosts: only the requests that name them wait, and never beyond their own deadline."""

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_server import PATIENCE, live_server
from PIL import Image

from diffusion_workers.request.images import ImagePolicy
from diffusion_workers.service.service import DiffusionService

FEW = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    "A host that accepts connections and never responds."
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        taken = []

        def take() -> None:
            while True:
                try:
                    taken.append(listening.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def service(host: str) -> Iterator[DiffusionService]:
    policy = ImagePolicy(allowed_hosts=frozenset({host}), timeout_seconds=60, idle_seconds=60, request_seconds=3)
    with DiffusionService(device="cpu", image_policy=policy) as made:
        assert made.generate(FEW).ok
        yield made


def test_image_downloads_count_toward_the_deadline(service: DiffusionService, host: str):
    started = time.monotonic()
    result = service.generate(FEW, image=f"http://{host}/a.png", timeout_seconds=0.5)
    assert result.status == "timed_out"
    assert time.monotonic() - started < 2.5  # the host would be waited for 3 s


def test_image_urls_of_a_request_share_one_time_limit(service: DiffusionService, host: str):
    units = [{"model": "canny", "image": f"http://{host}/{index}.png"} for index in range(8)]
    started = time.monotonic()
    result = service.plan(FEW, controlnets=units, image=f"http://{host}/a.png")
    assert result.errors[0].code == "url_unreachable"
    assert time.monotonic() - started < 16  # one after the other, they would take 27 s


def test_other_requests_do_not_wait_for_an_unresponsive_host(service: DiffusionService, host: str):
    slow = f"http://{host}/a.png"
    with (
        live_server(service) as (url, _),
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
        ThreadPoolExecutor(40) as pool,
    ):
        hanging = [
            pool.submit(client.post, path, json=body)
            for path, body in [
                *[("/plan", FEW | {"image": slow})] * 10,
                *[("/restore", {"image": slow})] * 10,
                *[("/preprocess", {"image": slow, "preprocessing": {"name": "canny"}})] * 10,
                *[("/generate", FEW | {"image": slow, "timeout_seconds": 1})] * 4,
            ]
        ]
        time.sleep(0.3)
        sent = time.monotonic()
        assert client.get("/metrics").status_code == 200
        assert client.get("/memory-info").status_code == 200
        made = client.post("/preprocess", json={"image": png(), "preprocessing": {"name": "canny"}})
        assert made.json()["status"] == "success"
        assert client.post("/plan", json=FEW).json()["status"] == "success"
        assert client.post("/restore", json={"image": png()}).json()["status"] == "success"
        assert client.post("/generate", json=FEW).json()["status"] == "success"
        assert not any(answer.done() for answer in hanging[:30]), f"{time.monotonic() - sent:.1f} s have passed"
        assert {answer.result().json()["status"] for answer in hanging[30:]} == {"timed_out"}
        assert {answer.result().json()["status"] for answer in hanging[:30]} == {"bad_image"}


def test_the_queue_limit_also_applies_to_restore_requests(service: DiffusionService, host: str):
    slow = {"image": f"http://{host}/a.png"}
    with live_server(service, max_queue=1) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        with ThreadPoolExecutor(4) as pool:
            statuses = sorted(
                answer.status_code for answer in pool.map(lambda _: client.post("/restore", json=slow), range(4))
            )
        assert statuses == [422, 422, 429, 429]
