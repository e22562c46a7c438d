"""The server on a real socket: it conforms to its specification, handles invalid input and cancels abandoned work."""

import base64
import io
import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from live_server import PATIENCE, live_server
from load_server import figures
from PIL import Image
from project import ROOT
from prometheus_client.parser import text_string_to_metric_families

from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import Job, OpResult, ProgressEvent

SMALL = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}
ENDLESS = {
    "model": "patient",
    "prompt": "a red circle",
    "num_inference_steps": 150,
    "num_images": 16,
    "width": 256,
    "height": 256,
}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionService]:
    "A service with two tiny untrained models: one with tight limits, and one without for long generations."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(
        folder,
        "sd15",
        "tiny",
        changes={
            "limits": {"max_width": 64, "max_height": 64, "max_num_images": 2, "max_num_inference_steps": 2},
            "defaults": {"width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 1.0},
        },
    )
    write_tiny_model(folder, "sd15", "patient")
    with DiffusionService(Settings(model_folders=(folder,), default_model="tiny"), device="cpu") as made:
        assert made.generate(prompt="x").status == "success"
        yield made


@pytest.fixture(scope="module")
def url(service: DiffusionService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_server(service, outputs=tmp_path_factory.mktemp("outputs")) as (address, _):
        yield address


def small_image(url: str, **headers: str) -> str:
    "Generate a small image, which must succeed, and return it."
    response = httpx.post(f"{url}/generate", json=SMALL, headers=headers, timeout=PATIENCE)
    assert response.status_code == 200, response.text
    return OpResult.model_validate_json(response.text).generation.images[0].image


def wait_until(true: Callable[[], object], what: str) -> None:
    "Poll until a condition holds."
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up, f"waited in vain until {what}"
        time.sleep(0.01)


# --- the contract -----------------------------------------------------------

contract = schemathesis.openapi.from_path(ROOT / "openapi" / "ez_diffusion_api.yaml")
contract.config.update(base_url="http://127.0.0.1")  # each call passes the actual URL
LEFT_OUT = [
    schemathesis.checks.not_a_server_error,  # 503 and 504 are valid responses; 500 is checked below
    schemathesis.specs.openapi.checks.positive_data_acceptance,  # a valid request may name an unknown model
]


@contract.parametrize()
@settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_responses_conform_to_the_openapi_specification(case: schemathesis.Case, url: str) -> None:
    "Schemathesis sends 100 valid and invalid requests per operation."
    response = case.call(base_url=url, timeout=PATIENCE)
    case.validate_response(response, excluded_checks=LEFT_OUT)
    assert response.status_code not in (500, 502), response.text
    if response.status_code >= 400 and "json" in response.headers.get("content-type", "") and case.path != "/ready":
        OpResult.model_validate_json(response.text)


def test_server_still_generates_after_the_contract_tests(url: str) -> None:
    "Generation is deterministic and /ready returns 200."
    assert small_image(url) == small_image(url)
    assert httpx.get(f"{url}/ready").status_code == 200


# --- the output folder --------------------------------------------------------


def test_outputs_are_paginated_and_reject_path_traversal(url: str) -> None:
    "Pages continue where the previous one ended; paths from clients cannot leave the folder or cause a 5xx."
    for _ in range(2):
        small_image(url)
    wait_until(lambda: httpx.get(f"{url}/outputs").json()["total"] >= 2, "both images are in the folder")
    first = httpx.get(f"{url}/outputs", params={"limit": 1}).json()
    second = httpx.get(f"{url}/outputs", params={"limit": 1, "before": first["next"]}).json()
    newest, older = first["outputs"][0]["id"], second["outputs"][0]["id"]
    assert newest > older
    assert httpx.get(f"{url}/outputs/{newest}").content[:4] == b"\x89PNG"
    for path in (
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        f"deleted%2f{newest}",
        f"{newest}.json",
        f"{newest}%00",
        "x" * 5000,
    ):
        assert httpx.get(f"{url}/outputs/{path}").status_code == 404, path
        assert httpx.post(f"{url}/outputs/{path}", json={"deleted": True}).status_code == 404, path
    for query in ("limit=0", "limit=201", "limit=x", "before=../x", "starred=perhaps", "query=" + "x" * 257, "page=2"):
        assert httpx.get(f"{url}/outputs?{query}").status_code == 422, query
    total = httpx.get(f"{url}/outputs").json()["total"]
    assert httpx.post(f"{url}/outputs/{newest}", json={"deleted": True}).status_code == 200
    assert httpx.get(f"{url}/outputs").json()["total"] == total - 1
    assert httpx.post(f"{url}/outputs/{newest}", content=b"deleted=true").status_code == 415


# --- hostile bodies ---------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HUGE_PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
).decode()
BODIES = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a word": b'"prompt"',
    "a number": b"1",
    "half an object": b'{"prompt": "x"',
    "deep lists": b'{"prompt": ' + b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "closed deep lists": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a huge integer": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "an endless float": b'{"prompt": "x", "guidance_scale": 1e999}',
    "NaN": b'{"prompt": "x", "guidance_scale": NaN}',
    "minus infinity": b'{"prompt": "x", "strength": -Infinity}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a pair": b'{"prompt": "\\ud800"}',
    "a zero byte": b'{"prompt": "\0"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a name twice": b'{"prompt": "x", "prompt": 1}',
    "many unknown names": json.dumps({f"field{i}": i for i in range(20_000)}).encode(),
    "many seeds": json.dumps({"prompt": "x", "seeds": [1] * 100_000}).encode(),
    "many controls": json.dumps({"prompt": "x", "controlnets": [{"image": "AAAA"}] * 10_000}).encode(),
    "50 MB of prompt": b'{"prompt": "' + b"x" * 50_000_000 + b'"}',
    "50 MB of image": b'{"prompt": "x", "image": "' + b"A" * 50_000_000 + b'"}',
    "an image of 30,000 x 30,000": json.dumps({"prompt": "x", "image": HUGE_PNG}).encode(),
    "a file path": b'{"prompt": "x", "image": "/etc/passwd"}',
    "an image of XML comments": json.dumps(
        {"prompt": "x", "image": base64.b64encode(b"<!---->" * 70).decode()}
    ).encode(),
    "a private address": b'{"prompt": "x", "image": "http://127.0.0.1:1/a.png"}',
    "a class name": b'{"prompt": "x", "scheduler": "os.system"}',
}  # fmt: skip


@pytest.mark.parametrize("path", ["/generate", "/jobs", "/plan", "/preprocess"])
def test_hostile_bodies_are_rejected_with_a_message(url: str, path: str) -> None:
    "Each gets a 4xx and an OpResult with a reason, and the server still generates the same image."
    before, wrong = small_image(url), []
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        for name, body in BODIES.items():
            if path != "/generate" and name.startswith("50 MB"):
                continue
            response = client.post(path, content=body, headers=JSON)
            result = OpResult.model_validate_json(response.text)
            if not 400 <= response.status_code < 500 or not result.errors or not result.errors[0].message:
                wrong.append(f"{name}: {response.status_code} {response.text[:200]}")
            if len(response.content) > 100_000:
                wrong.append(f"{name}: the answer has {len(response.content)} bytes")
    assert not wrong, "\n".join(wrong)
    assert small_image(url) == before


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/png", "json"],
)
def test_other_content_types_are_rejected(url: str, kind: str) -> None:
    "Requests without a JSON content type could be cross-site requests of any web page (CSRF)."
    response = httpx.post(
        f"{url}/generate", content=json.dumps(SMALL).encode(), headers={"Content-Type": kind}, timeout=PATIENCE
    )
    assert response.status_code == 415
    assert OpResult.model_validate_json(response.text).errors[0].field == "Content-Type"


def raw(url: str, data: bytes, wait: bool = True) -> bytes:
    "Send raw bytes over a socket and return the response."
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(data)
        return connection.recv(65536) if wait else b""


def test_malformed_http_does_not_affect_the_server(url: str) -> None:
    "Garbage, an incomplete body, an invalid Content-Length or chunk size, an oversized header."
    head = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    assert b"400" in raw(url, b"\x00\x01\x02 not HTTP\r\n\r\n").split(b"\r\n")[0]
    assert b"400" in raw(url, head + b"Content-Length: many\r\n\r\n").split(b"\r\n")[0]
    assert b"400" in raw(url, head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n").split(b"\r\n")[0]
    assert raw(url, head + b"X-Long: " + b"x" * 200_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 4")
    for cut in (head, head + b"Content-Length: 100\r\n\r\n", head + b"Content-Length: 100\r\n\r\n{"):
        raw(url, cut, wait=False)
    assert small_image(url) == small_image(url)


def test_slow_request_body_times_out(service: DiffusionService) -> None:
    "A client that stops in the middle of the body gets a 408; meanwhile other requests are answered."
    with live_server(service, receive_timeout=0.3) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as slow:
            slow.sendall(
                b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            assert small_image(url)
            answer = slow.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"no data for 0.3 seconds" in answer + b""


def test_connections_with_partial_headers_are_closed(service: DiffusionService) -> None:
    "On a new connection and on a keep-alive connection; afterwards the server still generates."
    head = b"POST /plan HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    whole = head + b"Content-Length: 15\r\n\r\n" + b'{"prompt": "a"}'
    with live_server(service, receive_timeout=0.5) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        for before in (b"", whole):
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as slow:
                slow.sendall(before)
                if before:
                    assert slow.recv(65536).startswith(b"HTTP/1.1 200")
                slow.sendall(head[:30])
                assert slow.recv(65536) == b"", "the server closes the connection"
        assert small_image(url)


@pytest.mark.parametrize("path", ["/generate", "/plan", "/jobs", "/preprocess", "/restore", "/prompt"])
@pytest.mark.parametrize("kind", ["unknown fields", "entries", "objects in a list", "a long text of commas"])
def test_bodies_with_too_many_values_are_rejected(url: str, path: str, kind: str) -> None:
    "Validating 13 MB of unknown fields would block the server for seconds, so the number of values is limited first."
    many = {
        "unknown fields": ",".join(f'"field{index}":1' for index in range(1_000_000)),
        "entries": f'"loras":[{",".join(["1"] * 1_000_000)}]',
        "objects in a list": f'"controlnets":[{",".join(["{}"] * 100_000)}]',
        "a long text of commas": f'"prompt":"{"," * 1_000_000}"',
    }[kind]
    response = httpx.post(f"{url}{path}", content=f'{{"prompt":"a",{many}}}', headers=JSON, timeout=PATIENCE)
    assert response.status_code == 422
    error = response.json()["errors"][0]
    assert (error["code"], "10,000 fields" in error["message"]) == ("too_long", True), error


# --- disconnects, cancellation, event streams -------------------------------


@pytest.fixture
def recorded(service: DiffusionService, monkeypatch: pytest.MonkeyPatch) -> list[ProgressEvent]:
    "Record every progress event of the service."
    events, submit = [], service.submit

    def recording(request, *, on_progress):
        def both(event: ProgressEvent) -> None:
            events.append(event)
            on_progress(event)

        return submit(request, on_progress=both)

    monkeypatch.setattr(service, "submit", recording, raising=False)
    return events


def steps(events: list[ProgressEvent]) -> int:
    return max((event.step or 0 for event in list(events)), default=0)


def test_client_disconnect_cancels_the_generation(service: DiffusionService, recorded: list[ProgressEvent]) -> None:
    "After the server has detected the disconnect, at most the current step is completed."
    with live_server(service) as (url, app):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(ENDLESS).encode()
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        wait_until(lambda: steps(recorded) >= 2, "it runs")
        job = app.state.server.queue.open[0]
        connection.close()
        wait_until(lambda: job.cancel_requested, "the server notices")
        noticed = steps(recorded)
        wait_until(lambda: job.result is not None, "the work stops")
        assert job.result.status == "cancelled"
        assert steps(recorded) <= noticed + 1
        assert small_image(url)


def test_jobs_stream_events_and_can_be_cancelled(service: DiffusionService, recorded: list[ProgressEvent]) -> None:
    "One job runs, one is queued and reports its position; both are cancelled, and both streams get a final event."
    with live_server(service) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        jobs = [Job.model_validate_json(client.post("/jobs", json=ENDLESS).text) for _ in range(2)]
        assert jobs[0].state in ("queued", "running") and jobs[1].state == "queued"
        seen: dict[str, list[ProgressEvent]] = {job.id: [] for job in jobs}

        def follow(job_id: str) -> None:
            with httpx.stream("GET", f"{url}/jobs/{job_id}/events", timeout=PATIENCE) as stream:
                assert stream.headers["content-type"].startswith("text/event-stream")
                for line in stream.iter_lines():
                    if line.startswith("data: "):
                        seen[job_id].append(ProgressEvent.model_validate_json(line[6:]))

        watchers = [threading.Thread(target=follow, args=(job.id,)) for job in jobs]
        for watcher in watchers:
            watcher.start()
        wait_until(lambda: steps(seen[jobs[0].id]) >= 2 and bool(seen[jobs[1].id]), "both are watched")
        assert seen[jobs[1].id][0].queue_position == 1
        assert Job.model_validate_json(client.delete(f"/jobs/{jobs[1].id}").text).state == "cancelled"
        client.delete(f"/jobs/{jobs[0].id}")
        asked = steps(recorded)
        for watcher in watchers:
            watcher.join(PATIENCE)
        assert [seen[job.id][-1].phase for job in jobs] == ["cancelled"] * 2
        assert steps(recorded) <= asked + 1
        assert [Job.model_validate_json(client.get(f"/jobs/{job.id}").text).state for job in jobs] == ["cancelled"] * 2
        assert small_image(url)


def test_full_queue_returns_429_with_retry_after(service: DiffusionService) -> None:
    "One job runs, one is queued, and the third request gets a 429; once both are cancelled, requests are accepted."
    with live_server(service, max_queue=1) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        jobs = [client.post("/jobs", json=ENDLESS).json()["id"] for _ in range(2)]
        refused = client.post("/generate", json=SMALL)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        error = OpResult.model_validate_json(refused.text).errors[0]
        assert (error.code, error.retryable, error.allowed) == ("queue_full", True, "1 waiting")
        for job_id in jobs:
            client.delete(f"/jobs/{job_id}")
        wait_until(lambda: client.post("/generate", json=SMALL).status_code == 200, "there is place again")


def test_server_deadline_overrides_the_request_timeout(service: DiffusionService) -> None:
    "Requests with a longer timeout than the server's deadline are stopped, whether running or queued."
    with live_server(service, deadline=1.0) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        jobs = [client.post("/jobs", json=ENDLESS | {"timeout_seconds": 600}).json()["id"] for _ in range(2)]
        ends = lambda: [Job.model_validate_json(client.get(f"/jobs/{job_id}").text).result for job_id in jobs]
        wait_until(lambda: all(ends()), "both are stopped")
        assert [result.status for result in ends()] == ["timed_out"] * 2


def test_metrics_count_requests_and_generations(service: DiffusionService) -> None:
    "The response is in the Prometheus text format."
    with live_server(service) as (url, _):
        small_image(url)
        httpx.post(f"{url}/generate", json={"prompt": ""})
        text = httpx.get(f"{url}/metrics").text
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["diffusion_workers_generations_total", "success"] == 1
    assert samples["diffusion_workers_images_total", "tiny"] == 1
    assert samples["diffusion_workers_http_requests_total", "200", "generate"] == 1
    assert samples["diffusion_workers_http_requests_total", "422", "generate"] == 1
    assert samples["diffusion_workers_phase_seconds_count", "denoise"] == 1
    assert samples["diffusion_workers_model_memory_bytes", "tiny"] > 0


def test_web_page_is_served_when_it_is_built(service: DiffusionService, tmp_path: Path) -> None:
    "With its assets; when it is not built, a 404 explains how to build it, and the API works."
    from live_server import KeptOpen, serving

    from diffusion_workers.server.app import create_app
    from diffusion_workers.settings.server import ServerSettings

    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<title>the page</title>")
    (tmp_path / "assets" / "page.js").write_text("1")
    for folder, expected in (
        (tmp_path, [(200, "the page"), (200, "1")]),
        (tmp_path / "not there", [(404, "npm run build"), (404, "not_found")]),
    ):
        with serving(
            create_app(KeptOpen(service), ServerSettings(warm_up=False, token="correct-horse"), web=folder)
        ) as url:
            for path, (status, text) in zip(("/", "/assets/page.js"), expected):
                response = httpx.get(url + path)
                assert (response.status_code, text in response.text) == (status, True), response.text
            assert httpx.get(f"{url}/models").status_code == 401


# --- memory, errors and log lines -------------------------------------------


def test_finished_jobs_release_timer_and_images(service: DiffusionService) -> None:
    "Neither the timer of a long timeout nor the input image is kept once the result is available."
    with live_server(service) as (url, app):
        body = SMALL | {"model": "tiny", "image": small_image(url), "timeout_seconds": 3600}
        job_id = httpx.post(f"{url}/jobs", json=body, timeout=PATIENCE).json()["id"]
        job = app.state.server.queue.store.get(job_id)
        wait_until(lambda: job.result is not None and job.size, "it is done")
        assert job.result.status == "success", job.result.message
        assert (job.expiry, job.generation, job.request.image) == (None, None, None)


def test_unread_results_are_kept_and_block_new_requests(service: DiffusionService) -> None:
    "A result over the memory budget can be fetched; until then new requests get a 429, afterwards they are accepted."
    with live_server(service, keep_bytes=1000) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        job_id = client.post("/jobs", json=SMALL).json()["id"]
        wait_until(lambda: client.get("/health").json()["queue_length"] == 0, "nothing waits")
        wait_until(lambda: client.head(f"/jobs/{job_id}").status_code == 200, "it is known")
        refusals = []

        def refused() -> bool:
            response = client.post("/jobs", json=SMALL)
            refusals.append(response)
            return response.status_code == 429

        wait_until(refused, "the budget is used up")
        error = OpResult.model_validate_json(refusals[-1].text).errors[0]
        assert error.retryable and "DIFFUSION_WORKERS_KEEP_BYTES" in error.allowed
        taken = [response.json()["id"] for response in refusals if response.status_code == 202]
        for known in (job_id, *taken):
            wait_until(
                lambda known=known: Job.model_validate_json(client.get(f"/jobs/{known}").text).result, "it has a result"
            )
        wait_until(lambda: client.post("/jobs", json=SMALL).status_code == 202, "there is room again")
        gone = client.get(f"/jobs/{job_id}")
        assert gone.status_code == 404 and "dropped" in gone.text


def test_decoded_images_of_queued_jobs_count_toward_the_budget(service: DiffusionService) -> None:
    "A small file that decodes to a large image uses up the memory budget while its job is queued."
    white = io.BytesIO()
    Image.new("RGB", (1000, 1000), "white").save(white, "PNG")
    large = SMALL | {"model": "patient", "image": base64.b64encode(white.getvalue()).decode()}
    with live_server(service, keep_bytes=4_000_000) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        jobs = [client.post("/jobs", json=ENDLESS).json()["id"]]
        answers = [client.post("/jobs", json=large) for _ in range(3)]
        assert [response.status_code for response in answers] == [202, 202, 429]
        for job_id in (*jobs, answers[0].json()["id"], answers[1].json()["id"]):
            client.delete(f"/jobs/{job_id}")


def test_unexpected_errors_return_500_with_id_and_cors_headers(
    service: DiffusionService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    "Check the response, the log and the metrics."

    def broken() -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(service, "list_models", broken)
    monkeypatch.setattr(logging.getLogger("diffusion_workers"), "propagate", True)
    origin = "https://example.org"
    with live_server(service, origins=(origin,)) as (url, _), caplog.at_level(logging.INFO):
        response = httpx.get(f"{url}/models", headers={"X-Request-ID": "mine", "Origin": origin})
        metrics = httpx.get(f"{url}/metrics").text
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["access-control-allow-origin"] == origin
    assert OpResult.model_validate_json(response.text).errors[0].code == "internal_error"
    assert 'http_requests_total{http_status="500",operation="listModels"} 1.0' in metrics
    assert any("GET /models 500" in record.getMessage() for record in caplog.records)


def test_exceptions_cannot_inject_log_lines(
    service: DiffusionService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    "Text from clients in tracebacks is escaped, in the logs of the server and of a worker."
    from diffusion_workers.server import middleware
    from diffusion_workers.worker import handler

    def broken(request):
        raise ValueError(f"no file for {request.prompt}")

    monkeypatch.setattr(service, "plan", broken)
    forged = "x\n2026-01-01 00:00:00,000 INFO diffusion_workers: all is well\r\x1b[2Kfine\u2028INFO: fine"
    levels = {name: logging.getLogger(name) for name in ("diffusion_workers", "uvicorn.error", "")}
    before = {name: (log.handlers[:], log.propagate, log.level) for name, log in levels.items()}
    try:
        middleware.set_up_logging(as_json=False)
        with live_server(service) as (url, _):
            assert httpx.post(f"{url}/plan", json={"prompt": forged}, timeout=PATIENCE).status_code == 500
        levels["diffusion_workers"].handlers = []
        levels["diffusion_workers"].propagate = True
        for level in ("INFO", "DEBUG"):
            handler.set_up_logging(level)
            try:
                raise ValueError(forged)
            except ValueError:
                logging.getLogger("diffusion_workers").error("failed: %s", forged, exc_info=True)
    finally:
        for name, (handlers, propagate, level) in before.items():
            levels[name].handlers, levels[name].propagate = handlers, propagate
            levels[name].setLevel(level)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "all is well" in line]) >= 4
    for line in lines:
        assert line.isprintable()
        assert line.startswith("    ") or re.match(
            r"(\d{4}-\S+ \S+ )?(INFO|WARNING|ERROR|DEBUG) (diffusion_workers|uvicorn)", line
        ), line
        assert not re.match(r"(2026-01-01 00:00:00,000 )?INFO:? (diffusion_workers: all|fine)", line)


def test_request_paths_cannot_inject_log_lines(url: str, caplog: pytest.LogCaptureFixture) -> None:
    "Control characters and line separators are escaped."
    with caplog.at_level(logging.INFO, "diffusion_workers.server"):
        httpx.get(url + "/x%0aERROR%1b[31m%e2%80%a8%c2%85y")
        found = lambda: [record.getMessage() for record in caplog.records if "ERROR" in record.getMessage()]
        wait_until(found, "the request is logged")
        lines = found()
    assert all(line.isprintable() for line in lines), lines


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/models", "/metrics", "/docs", "/openapi.yaml"])
def test_head_returns_the_status_of_get(url: str, path: str) -> None:
    "The response has the same status and an empty body."
    asked, head = httpx.get(url + path), httpx.head(url + path)
    assert (head.status_code, head.content) == (asked.status_code, b"")


def test_readiness_reflects_device_failures(service: DiffusionService, monkeypatch: pytest.MonkeyPatch) -> None:
    "/ready returns 503 after a device failure followed by a failed test image, and 200 after a successful generation."
    generate = service.generate
    broken = lambda *_: OpResult(status="internal_error", message="the device is lost")
    submit = service.submit

    def failing(request, *, on_progress):
        raised = submit({"prompt": 1}, on_progress=None)
        result = broken()
        on_progress(ProgressEvent(phase="failed", result=result))
        return raised

    with live_server(service) as (url, _):
        assert httpx.get(f"{url}/ready").status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(service, "submit", failing)
            patch.setattr(service, "generate", broken)
            assert httpx.post(f"{url}/generate", json=SMALL).status_code == 500
            wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503, "the server is not ready")
            assert "the device is lost" in httpx.get(f"{url}/health").json()["message"]
        assert service.generate == generate
        assert small_image(url)
        assert httpx.get(f"{url}/ready").status_code == 200


def test_event_stream_resumes_after_last_event_id(url: str) -> None:
    "The final event is always sent, even if the client states that it has received it."
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        job_id = client.post("/jobs", json=SMALL).json()["id"]
        first = client.get(f"/jobs/{job_id}/events").text
        last_id = re.findall(r"^id: (\d+)$", first, re.MULTILINE)[-1]
        again = client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": last_id}).text
        assert again.count("data: ") == 1 and '"result"' in again


# --- the process ------------------------------------------------------------


def start(port: int, stderr, **variables: str) -> subprocess.Popen:
    "Start run_server.sh in a separate process."
    own = {key: value for key, value in os.environ.items() if not key.startswith("DIFFUSION_WORKERS_")}
    env = (
        own
        | {"HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
        | {f"DIFFUSION_WORKERS_{name}": value for name, value in variables.items()}
    )
    return subprocess.Popen(
        [ROOT / "run_server.sh", "--port", str(port), "--device", "cpu"],
        cwd="/",
        env=env,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def is_ready(url: str, process: subprocess.Popen) -> bool:
    assert process.poll() is None, "the server has ended"
    try:
        return httpx.get(f"{url}/ready", timeout=PATIENCE).status_code == 200
    except httpx.ConnectError:
        return False


def test_sigterm_shuts_down_gracefully(tmp_path: Path) -> None:
    "run_server.sh serves, a second server on its port fails; on SIGTERM all clients get a response, exit status 0."
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as stderr:
        process = start(port, stderr, JSON_LOGS="1", GRACE="0.2")
        try:
            wait_until(lambda: is_ready(url, process) or time.sleep(0.5), "the server is ready")
            assert small_image(url, **{"X-Request-ID": "my-image"})
            second = start(port, subprocess.PIPE)
            said = second.communicate(timeout=PATIENCE)[1].decode()
            assert second.returncode == 2 and f"cannot listen on 127.0.0.1 port {port}" in said, said
            answers: list[httpx.Response] = []
            long = {"prompt": "a red circle", "num_inference_steps": 150, "num_images": 32}
            clients = [
                threading.Thread(
                    target=lambda: answers.append(httpx.post(f"{url}/generate", json=long, timeout=PATIENCE))
                )
                for _ in range(3)
            ]
            for client in clients:
                client.start()
            for _ in range(2):  # two may be queued for a moment before the third arrives
                wait_until(lambda: httpx.get(f"{url}/health").json()["queue_length"] == 2, "one runs and two wait")
                time.sleep(1)
            half = b"POST /plan HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            half += b"Content-Length: 99\r\n\r\n{"
            with (
                socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as with_half_a_body,
                socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as with_half_a_head,
            ):
                with_half_a_body.sendall(half)
                with_half_a_head.sendall(half[:20])
                wait_until(lambda: httpx.get(f"{url}/health").is_success, "both have arrived")
                process.send_signal(signal.SIGTERM)
                assert with_half_a_body.recv(65536).startswith(b"HTTP/1.1 503")  # at once; a timeout would be 408
                assert with_half_a_head.recv(65536) == b""
            for client in clients:
                client.join(PATIENCE)
            assert process.wait(timeout=PATIENCE) == 0  # after the current step
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    results = [OpResult.model_validate_json(answer.text) for answer in answers]
    assert [result.status for result in results] == ["cancelled"] * 3
    assert all(error.retryable for result in results for error in result.errors)
    assert {answer.status_code for answer in answers} == {503}
    first, *lines = log.read_text().splitlines()
    assert first == f"diffusion-workers: starting on {url}, documentation at {url}/docs"
    logged = [json.loads(line) for line in lines]
    made = [line for line in logged if line.get("request_id") == "my-image"]
    assert [(line["path"], line["status"], line["outcome"]) for line in made] == [("/generate", 200, "success")]
    assert all(re.fullmatch(r"\d{4}-.*\+00:00", line["time"]) and line["level"] and line["logger"] for line in logged)


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"PORT": "many"}, "DIFFUSION_WORKERS_PORT"),
        ({"TOKEN": "short"}, "DIFFUSION_WORKERS_TOKEN"),
        ({"DEFAULT_MODEL": "nobody"}, "nobody"),
    ],
)
def test_invalid_settings_exit_with_status_2(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    "The error output names the variable, or the value in the case of the model."
    from diffusion_workers.cli.main import main

    for name, value in variables.items():
        monkeypatch.setenv(f"DIFFUSION_WORKERS_{name}", value)
    assert main(["serve", "--port", "0"] if "PORT" not in variables else ["serve"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("typed", [["--port", "99999"], ["--device", "gpu0"]])
def test_invalid_option_errors_name_the_option_as_typed(typed: list[str], capsys: pytest.CaptureFixture) -> None:
    "The error does not name the equivalent environment variable."
    from diffusion_workers.cli.main import main

    assert main(["serve", "--port", "0", *typed]) == 2
    said = capsys.readouterr().err
    assert f"{typed[0]}: given '{typed[1]}'" in said and "DIFFUSION_WORKERS_" not in said


# --- concurrency ------------------------------------------------------------


def test_32_concurrent_clients(url: str) -> None:
    "Every client gets its own images in FIFO order, and memory stays bounded."
    found = figures(url, clients=32, requests=3)
    assert found["answered"] == found["requests"] == found["expected"] == found["right_seed"] == 96, found
    assert found["out_of_order"] == 0, found
    assert found["process_mb_after"] < found["process_mb_before"] + 50, (
        found
    )  # 48 results of a few kilobytes are kept for a while
