"""The Python client against a live server and a RunPod endpoint: the same calls, synchronous and asynchronous."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from live_server import PATIENCE, live_server, serving
from PIL import Image
from project import ROOT
from runpod_endpoint import API_KEY, Endpoint, endpoint_app

from diffusion_workers.cli.main import main
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.request.metadata import read_metadata
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client import AsyncClient, Client, Retries, RunPod, Server, image_bytes, pil_images, raise_for_status
from ez_diffusion_client.display import failure_text
from ez_diffusion_client.errors import (
    FAILURES,
    ConnectionLost,
    NotFound,
    NotOffered,
    QueueFull,
    ServerUnreachable,
    Unauthorized,
    UnexpectedAnswer,
    UnknownModel,
    WaitTimeout,
)
from ez_diffusion_client.models import ErrorCode, ErrorDetail, OpResult, OpStatus, ProgressEvent

SMALL = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}
ENDLESS = {"prompt": "a red circle", "num_inference_steps": 150, "num_images": 16, "width": 256, "height": 256}
QUICK = Retries(attempts=3, first_pause=0.001, longest_pause=0.01)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionService]:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, "sd15", "tiny")
    with DiffusionService(Settings(model_folders=(folder,), default_model="tiny"), device="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def url(service: DiffusionService) -> Iterator[str]:
    with live_server(service, token="correct-horse") as (address, _):
        yield address


@pytest.fixture(scope="module")
def endpoint(service: DiffusionService) -> Iterator[tuple[str, Endpoint]]:
    made = Endpoint(service)
    with serving(endpoint_app(made)) as address:
        yield f"{address}/v2", made


@pytest.fixture(params=["server", "runpod"])
def target(request: pytest.FixtureRequest) -> Server | RunPod:
    "A server and a RunPod endpoint; each test with this fixture runs against both."
    if request.param == "server":
        return Server(request.getfixturevalue("url"), token="correct-horse")
    return RunPod("tested", api_key=API_KEY, url=request.getfixturevalue("endpoint")[0])


# --- the same calls for both ------------------------------------------------


def test_generate(target: Server | RunPod) -> None:
    "The image as bytes and as PIL, the same with and without progress events, synchronous and asynchronous."
    with Client(target) as client:
        alone = client.generate(SMALL)
        events: list[ProgressEvent] = []
        watched = client.generate(**SMALL, on_progress=events.append)

    async def awaited() -> tuple[OpResult, OpResult, list[ProgressEvent]]:
        told: list[ProgressEvent] = []

        async def tell(event: ProgressEvent) -> None:
            told.append(event)

        async with AsyncClient(target) as client:
            return await client.generate(SMALL), await client.generate(SMALL, on_progress=tell), told

    first, second, told = asyncio.run(awaited())
    assert {image_bytes(result)[0] for result in (alone, watched, first, second)} == {image_bytes(alone)[0]}
    assert pil_images(alone)[0].size == (64, 64)
    for seen in (events, told):
        assert seen[-1].phase == "done" and seen[-1].result is not None


def test_a_panel_generates_saves_and_stops_remotely(
    target: Server | RunPod, service: DiffusionService, tmp_path: Path
) -> None:
    "A panel shows and saves the image that the service generates, and a stop ends the remote job."
    from diffusion_workers.panel.panel import GenerationPanel

    with Client(target) as client:
        panel = GenerationPanel(client, SMALL, history=tmp_path)
        panel.generate()
        result = panel.wait(PATIENCE)
        assert result.status == "success", result.message
        assert pil_images(result)[0].tobytes() == service.generate(SMALL).images[0].tobytes()
        assert len(list(tmp_path.glob("*.png"))) == 1
        panel.request = ENDLESS
        run, deadline = panel.generate(), time.monotonic() + PATIENCE
        while not run.event.step:
            assert time.monotonic() < deadline and not run.done, run.event
            time.sleep(0.02)
        panel.stop()
        assert panel.wait(PATIENCE).status == "cancelled"
        panel.close()
        assert service.generate(SMALL).ok  # at once: no job is left there


def test_failed_requests_return_a_result(target: Server | RunPod) -> None:
    "It names the field, and `raise_for_status` raises the matching exception with the errors."
    with Client(target) as client:
        for result in (
            client.generate(SMALL, model="nobody"),
            client.generate(SMALL, model="nobody", on_progress=lambda event: None),
        ):
            assert (result.status, result.errors[0].field) == ("unknown_model", "model")
            with pytest.raises(UnknownModel) as caught:
                raise_for_status(result)
            assert caught.value.errors[0].given == "'nobody'"


def test_submit_poll_and_cancel(target: Server | RunPod, service: DiffusionService) -> None:
    "A job is followed by its id until it is cancelled; the service is free again afterwards."
    with Client(target) as client:
        job = client.submit(ENDLESS)
        assert client.job(job.id).result is None
        assert client.cancel(job.id).id == job.id
        last = list(client.events(job.id))[-1]
        assert (last.phase, last.result.status) == ("cancelled", "cancelled")
        assert client.generate(SMALL).status == "success"


def test_a_job_can_be_awaited_later_by_its_id(target: Server | RunPod) -> None:
    "Another client waits for a submitted job; giving up the wait leaves the job running."
    with Client(target) as client:
        job = client.submit(SMALL | {"num_inference_steps": 10})
        with pytest.raises(WaitTimeout):
            client.result(job.id, timeout=0.001)
    with Client(target) as other:
        result = other.result(job.id)
        assert result.status == "success" and len(image_bytes(result)) == 1
        with pytest.raises(NotFound):
            other.result("no-such-job")

    async def awaited() -> OpResult:
        async with AsyncClient(target) as client:
            job = await client.submit(SMALL | {"num_inference_steps": 150, "num_images": 8})
            waiting = asyncio.ensure_future(client.result(job.id))
            await asyncio.sleep(0.3)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await client.job(job.id)).result is None
            with pytest.raises(WaitTimeout):
                await client.result(job.id, timeout=0.1)
            await client.cancel(job.id)
            return await client.result(job.id)

    assert asyncio.run(awaited()).status == "cancelled"


def test_a_timeout_stops_the_job(target: Server | RunPod) -> None:
    "With and without progress events, synchronous and asynchronous; no job goes on."
    with Client(target) as client:
        with pytest.raises(WaitTimeout):
            client.generate(ENDLESS, timeout=0.5)
        with pytest.raises(WaitTimeout):
            client.generate(ENDLESS, timeout=0.5, on_progress=lambda event: None)

    async def awaited() -> None:
        async with AsyncClient(target) as client:
            for on_progress in (None, lambda event: None):
                with pytest.raises(WaitTimeout):
                    await client.generate(ENDLESS, timeout=0.5, on_progress=on_progress)
            assert (await client.generate(SMALL)).status == "success"  # would wait for minutes behind a running job

    asyncio.run(awaited())


def test_callback_errors_and_task_cancellation_stop_the_job(target: Server | RunPod) -> None:
    "Both cancel the remote job."

    def broken(event: ProgressEvent) -> None:
        if event.step:
            raise KeyboardInterrupt

    with Client(target) as client:
        with pytest.raises(KeyboardInterrupt):
            client.generate(ENDLESS, on_progress=broken)
        assert client.generate(SMALL).status == "success"

    async def cancelled() -> None:
        async with AsyncClient(target) as client:
            running = asyncio.Event()
            task = asyncio.ensure_future(
                client.generate(ENDLESS, on_progress=lambda event: running.set() if event.step else None)
            )
            await running.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.generate(SMALL)).status == "success"

    asyncio.run(cancelled())


def test_wrong_credentials_are_refused_and_not_shown(target: Server | RunPod) -> None:
    wrong = (
        Server(target.url, token="battery-staple")
        if isinstance(target, Server)
        else RunPod("tested", api_key="wrong", url=target.url)
    )
    with Client(wrong) as client, pytest.raises(Unauthorized) as refused:
        client.submit(SMALL)
    told = f"{refused.value} {refused.value!r}"
    assert "battery-staple" not in told and "correct-horse" not in told
    if isinstance(target, Server):
        with Client(Server(target.url)) as client, pytest.raises(Unauthorized) as missing:
            client.submit(SMALL)
        assert "the token is wrong" in told and "a token is needed" in str(missing.value)


@pytest.mark.parametrize("secret", ["secret-12\nSet-Cookie: x", "secret-12é", "secret-12\0", "secret-12 3"])
def test_secrets_invalid_in_headers_are_refused_and_not_shown(secret: str) -> None:
    for kind in (Server("http://127.0.0.1:9", token=secret), RunPod("tested", api_key=secret)):
        with pytest.raises(ValueError, match="character 10 ") as refused:
            Client(kind)
        assert "secret" not in str(refused.value) and "secret" not in repr(kind)


def test_the_cli_names_the_variable_of_an_invalid_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for variable, where in (
        ("DIFFUSION_WORKERS_TOKEN", ("--url", "http://127.0.0.1:9")),
        ("RUNPOD_API_KEY", ("--runpod", "x")),
    ):
        monkeypatch.setenv(variable, "secret-12é")
        assert main(["generate", "x", *where]) != 0
        told = capsys.readouterr().err
        assert f"{variable}: character 10 " in told and "secret-12" not in told


def test_the_cli_generates_on_a_server_or_runpod(
    target: Server | RunPod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    "The file holds the image with its receipt; an error has its exit code."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_WORKERS_TOKEN", "correct-horse")
    monkeypatch.setenv("RUNPOD_API_KEY", API_KEY)
    monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", target.url)
    where = ["--url", target.url] if isinstance(target, Server) else ["--runpod", target.endpoint_id]
    assert main(["generate", "a red circle", "--seed", "1", "--num-inference-steps", "2", *where, "-o", "out.png"]) == 0
    assert read_metadata(tmp_path / "out.png").plan.seeds == [1]
    assert main(["generate", "a red circle", "--model", "nobody", *where]) == 3
    assert "there is no such model" in capsys.readouterr().err


# Characters that str.splitlines takes for line breaks and that JSON does not escape.
SEPARATORS = "a red\u2028circle\u2029on\u0085white"


def test_line_separators_in_a_prompt_survive_the_stream(target: Server | RunPod) -> None:
    "The plan in the last event holds the prompt as it was sent, synchronous and asynchronous."
    with Client(target) as client:
        watched = client.generate(SMALL, prompt=SEPARATORS, on_progress=lambda event: None)

    async def awaited() -> list[ProgressEvent]:
        async with AsyncClient(target) as client:
            job = await client.submit(SMALL, prompt=SEPARATORS)
            return [event async for event in client.events(job.id)]

    result = asyncio.run(awaited())[-1].result
    assert watched.generation.plan.prompt == SEPARATORS
    assert result is not None and result.generation.plan.prompt == SEPARATORS


def test_line_separators_in_a_prompt_survive_the_command_line(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "With progress shown, which is what streams the events; the receipt in the file has the prompt."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_WORKERS_TOKEN", "correct-horse")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sent = ["generate", SEPARATORS, "--seed", "1", "--num-inference-steps", "2", "--url", url, "-o", "out.png"]
    assert main(sent) == 0
    assert read_metadata(tmp_path / "out.png").plan.prompt == SEPARATORS


# --- server only ------------------------------------------------------------


def test_server_only_operations(url: str) -> None:
    "Plan, control map, models, memory and health; input images as bytes and as PIL images."
    with Client(Server(url, "correct-horse")) as client:
        red = Image.new("RGB", (64, 64), "red")
        buffer = io.BytesIO()
        red.save(buffer, "PNG")
        hashes = {client.plan(SMALL, image=given).plan.image.sha256 for given in (red, buffer.getvalue())}
        assert len(hashes) == 1
        assert client.preprocess(image=red, preprocessing={"name": "canny"}).control_map.width == 64
        assert client.models().default == "tiny"
        assert client.memory_info().process_bytes > 0
        assert client.health().state == "ready"
    with Client(RunPod("tested", api_key=API_KEY)) as client, pytest.raises(NotOffered):
        client.models()


def test_broken_event_streams_are_reopened(service: DiffusionService) -> None:
    "A stream that breaks is opened again, and the result arrives."
    with live_server(service) as (url, _), Client(url, retries=QUICK) as client:
        job = client.submit(SMALL | {"num_inference_steps": 40})
        broken, send = [], client._http._transport.handle_request

        def breaking(request: httpx.Request) -> httpx.Response:
            response = send(request)
            if request.url.path.endswith("/events") and not broken:
                broken.append(request)
                response.close()
                raise httpx.ReadError("the cable was pulled", request=request)
            return response

        client._http._transport.handle_request = breaking
        events = list(client.events(job.id))
        assert broken and events[-1].result.status == "success"


# --- retries ----------------------------------------------------------------


def answering(*answers: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    "A mock transport that gives these responses in turn, and the requests that it got."
    left, got = list(answers), []

    def handle(request: httpx.Request) -> httpx.Response:
        got.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return httpx.MockTransport(handle), got


def refusal(http_status: int, status: str, retryable: bool = False) -> httpx.Response:
    result = {"status": status, "errors": [{"code": status, "message": "so it is", "retryable": retryable}]}
    return httpx.Response(http_status, json=result, headers={"Retry-After": "0"})


DONE = {"status": "success"}
HEALTHY = {"state": "ready", "version": "0"}
generate: Callable[[Client], object] = lambda client: client.generate(SMALL)
health: Callable[[Client], object] = lambda client: client.health()


@pytest.mark.parametrize(
    "call, first, last, sent",
    [
        (generate, httpx.ConnectError("refused"), DONE, 2),  # was never sent
        (generate, refusal(429, "queue_full", True), DONE, 2),  # was never begun
        (generate, refusal(503, "cancelled", True), DONE, 2),  # waited while the server stopped
        (health, httpx.ReadError("broke"), HEALTHY, 2),
        (health, httpx.Response(502, text="bad gateway"), HEALTHY, 2),
    ],
)
def test_requests_that_are_safe_to_repeat_are_retried(call, first, last, sent: int) -> None:
    transport, got = answering(first, httpx.Response(200, json=last))
    with Client(retries=QUICK, transport=transport) as client:
        call(client)
    assert len(got) == sent


@pytest.mark.parametrize(
    "call, first, error",
    [
        (generate, httpx.ReadError("broke"), ConnectionLost),  # may have been carried out
        (generate, httpx.ReadTimeout("slow"), WaitTimeout),
        (generate, httpx.Response(502, text="bad gateway"), UnexpectedAnswer),
        (health, httpx.Response(200, text="<html>another program</html>"), UnexpectedAnswer),
        (health, httpx.ReadTimeout("slow"), WaitTimeout),
    ],
)
def test_other_failures_raise_without_a_retry(call, first, error: type[Exception]) -> None:
    transport, got = answering(first)
    with Client(retries=QUICK, transport=transport) as client, pytest.raises(error):
        call(client)
    assert len(got) == 1


def test_final_errors_are_returned_without_a_retry() -> None:
    "No request is retried where a retry cannot help."
    for answer in (
        refusal(503, "cancelled"),
        refusal(422, "unknown_model"),
        refusal(503, "out_of_memory", True),
        refusal(500, "internal_error"),
    ):
        transport, got = answering(answer)
        with Client(retries=QUICK, transport=transport) as client:
            assert client.generate(SMALL).status != "success"
        assert len(got) == 1


def test_retries_end_after_the_last_attempt() -> None:
    "The error then names the server, or says that the queue is full."
    transport, got = answering(*[httpx.ConnectError("refused")] * 3)
    with (
        Client("http://127.0.0.1:9", retries=QUICK, transport=transport) as client,
        pytest.raises(ServerUnreachable, match=r"http://127\.0\.0\.1:9"),
    ):
        client.generate(SMALL)
    assert len(got) == 3
    transport, got = answering(*[refusal(429, "queue_full", True)] * 3)
    with Client(retries=QUICK, transport=transport) as client, pytest.raises(QueueFull):
        client.submit(SMALL)


def test_every_failure_status_has_an_exception() -> None:
    assert set(FAILURES) == set(OpStatus) - {OpStatus.success}


def test_threads_can_share_a_client(url: str) -> None:
    results: list[OpResult] = []
    with Client(Server(url, "correct-horse")) as client:
        threads = [
            threading.Thread(target=lambda seed=seed: results.append(client.generate(SMALL, seed=seed)))
            for seed in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(result.generation.images[0].seed for result in results) == [0, 1, 2, 3]


# --- types and images -------------------------------------------------------

PROGRAM = """\
from ez_diffusion_client import Client, RequestFailed, RunPod, save_images

with Client("http://127.0.0.1:8000") as client:
    result = client.generate(prompt="a red circle", seed=3, num_images=2)
    save_images(result, "a.png")
"""


def test_request_fields_are_typed_for_mypy_strict(tmp_path: Path) -> None:
    "README's import passes `mypy --strict`; a misspelled field does not."
    (tmp_path / "right.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(PROGRAM.replace("seed=3", "sede=3"))
    source = ROOT / "openapi" / "client_libs" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "right.py", "wrong.py"]
    done = subprocess.run(
        command, env=os.environ | {"MYPYPATH": str(source)}, cwd=tmp_path, capture_output=True, text=True
    )
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(found) == 1 and found[0].startswith("wrong.py"), done.stdout + done.stderr
    assert 'Unexpected keyword argument "sede"' in found[0]


@contextmanager
def bucket_address(data: bytes) -> Iterator[str]:
    "The URL of an image, up to its signature; the web server requires it and accepts no key."

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/image.png?signature=right" and "authorization" not in self.headers
            self.send_response(200 if found else 403)
            self.end_headers()
            self.wfile.write(data if found else b"<Error>AccessDenied</Error>")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/image.png?signature="
        server.shutdown()


def test_images_as_base64_data_uri_or_url(tmp_path: Path) -> None:
    "All three give the same bytes and the same file; an unreadable image raises and writes nothing."
    from ez_diffusion_client import ClientError, image_bytes, pil_images, save_images
    from ez_diffusion_client.models import ControlMap, GeneratedImage, GenerationResponse
    from ez_diffusion_client.receipts import save_map

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    data = buffer.getvalue()
    encoded = base64.b64encode(data).decode()

    def result(image: str) -> OpResult:
        made = {"image": image, "seed": 1, "format": "png", "width": 8, "height": 8}
        images = [GeneratedImage.model_validate_json(json.dumps(made))]
        generation = GenerationResponse.model_construct(images=images)  # the plan does not matter
        return OpResult.model_construct(status=OpStatus.success, generation=generation)

    with bucket_address(data) as address:
        for number, image in enumerate([encoded, f"data:image/png;base64,{encoded}", address + "right"]):
            assert image_bytes(result(image)) == [data]
            assert pil_images(result(image))[0].getpixel((0, 0)) == (255, 0, 0)
            assert save_images(result(image), tmp_path / f"{number}.png")[0].read_bytes() == data
            found = ControlMap(image=image, preprocessor="canny", width=8, height=8)
            assert save_map(found, tmp_path / f"map{number}.png").read_bytes() == data
        for image in (address + "expired", "http://127.0.0.1:1/a.png", "not an image!"):
            with pytest.raises(ClientError) as raised:
                save_images(result(image), tmp_path / "never.png")
            assert "expired" not in str(raised.value), "the signature of an address is not shown"
        assert not (tmp_path / "never.png").exists()


def test_failure_text_is_wrapped_and_names_each_error_once() -> None:
    "No line is wider than a notebook cell, and nothing is cut off."
    long = "this LoRA does not fit this model: none of its modules is in it " * 3
    detail = ErrorDetail(code=ErrorCode.unsupported_combination, field="loras[0].name", message=long.strip())
    text = failure_text("generate", OpResult(status=OpStatus.unsupported_combination, errors=[detail]))
    assert max(map(len, text.splitlines())) <= 100
    assert " ".join(text.split()).count(f"loras[0].name: {long.strip()}") == 1


def test_read_prompt_on_a_server(url: str) -> None:
    "Tokens, chunk borders and marked syntax errors of a prompt, synchronous and asynchronous."
    with Client(Server(url, token="correct-horse")) as client:
        report = client.read_prompt("a red circle AND a (ring", prompt_syntax="a1111")
        assert (report.tokens, report.chunks, report.borders) == (5, 2, [17])
        assert [(mark.start, mark.end) for mark in report.marks] == [(19, 20)]
        with pytest.raises(UnknownModel, match="there is no such model"):
            client.read_prompt("a", model="none")

    async def by_async() -> int | None:
        async with AsyncClient(Server(url, token="correct-horse")) as client:
            return (await client.read_prompt("a red circle")).tokens

    assert asyncio.run(by_async()) == 3
