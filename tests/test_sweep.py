"""Sweeps: each request is executed exactly once, even if the sweeping process is interrupted."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from live_server import live_server
from PIL import Image
from runpod_queue import ENDPOINT, PATIENCE, QueueServer, running_worker

import diffusion_workers.sweep.folder as folder_module
import diffusion_workers.sweep.run as sweep_module
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.request.errors import RequestError
from diffusion_workers.request.metadata import read_metadata
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from diffusion_workers.sweep.folder import request_product
from diffusion_workers.sweep.run import Sweep
from ez_diffusion_client import Retries, RunPod, Server
from ez_diffusion_client.errors import ConnectionLost, ServerUnreachable, Unauthorized

PROMPTS = [
    "a red circle on a white background",
    "a blue square on a white background",
    "a green star on a black background",
    "a yellow ring",
]
TWELVE = request_product({"seed": 1, "num_inference_steps": 4}, prompt=PROMPTS, guidance_scale=[1.0, 3.0, 7.0])
QUICK = Retries(attempts=2, first_pause=0.01, longest_pause=0.05)
SWEEPING = """
import asyncio, json, sys
from diffusion_workers.sweep.run import Sweep
from ez_diffusion_client import RunPod

endpoint = RunPod("endpoint", api_key="stand-in", url=sys.argv[3])
asyncio.run(Sweep(sys.argv[1], json.loads(sys.argv[2])).run(endpoint, concurrency=4))
"""


def endpoint(queue: QueueServer) -> RunPod:
    return RunPod(ENDPOINT, api_key="stand-in", url=queue.url)


def run(folder: Path, requests: list | None, target: RunPod | Server | str, **more: Any) -> Sweep:
    return asyncio.run(Sweep(folder, requests).run(target, **more))


def times_carried_out(queue: QueueServer) -> Counter:
    "How often each request was executed, according to the queue."
    return Counter(json.dumps(job.input, sort_keys=True) for job in queue.jobs.values() for _ in job.taken or [None])


# --- an endpoint that answers immediately -----------------------------------


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    "The output of a worker for a successful request."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, "sd15", "tiny")
    with DiffusionService(Settings(model_folders=(folder,), default_model="tiny"), device="cpu") as service:
        return service.generate(prompt="a red circle", seed=1, num_inference_steps=1).model_dump(
            mode="json", exclude_none=True
        )


class Instant(QueueServer):
    "A queue that completes jobs immediately."

    answer: dict[str, Any]

    def submit(self, given: Any, sync: bool = False) -> str:
        job_id = super().submit(given, sync)
        self.waiting.remove(job_id)
        job = self.jobs[job_id]
        job.status, job.output = "COMPLETED", self.answer
        return job_id


@pytest.fixture
def instant(answer: dict[str, Any]) -> Iterator[Instant]:
    with Instant() as queue:
        queue.answer = answer
        yield queue


class PowerCut(BaseException):
    "A simulated crash of the process."


def cut_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    "Raise PowerCut before the nth write, counted from 1; the returned list collects the completed writes."
    written: list[str] = []

    def before(what: str) -> None:
        if len(written) + 1 >= number:
            raise PowerCut
        written.append(what)

    append, whole = folder_module.append_lines, folder_module.write_whole
    monkeypatch.setattr(
        sweep_module, "append_lines", lambda path, *lines: (before(lines[0]["event"]), append(path, *lines))
    )
    monkeypatch.setattr(folder_module, "write_whole", lambda path, data: (before(path.suffix), whole(path, data)))
    return written


ONE_REQUEST = ["sending", "job", ".png", ".json"]  # the writes for one request


def test_saved_images_keep_their_receipts(instant: Instant, tmp_path: Path) -> None:
    sweep = run(tmp_path / "sweep", TWELVE[:1], endpoint(instant))
    made = sweep.images(sweep.items[0])[0]
    stored = read_metadata(next((tmp_path / "sweep").rglob("*.png")).read_bytes()).plan
    for name in ("copy.png", "copy.jpg", "copy.webp"):
        made.save(tmp_path / name)
        plan = read_metadata((tmp_path / name).read_bytes()).plan
        assert plan is not None and plan == stored, name


@pytest.mark.parametrize("number", range(1, 2 + 3 * len(ONE_REQUEST)))
def test_crash_before_any_write_loses_nothing(
    number: int, instant: Instant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "With three requests and a crash before each write, only a request whose job id was not yet written runs twice."
    with monkeypatch.context() as patched:
        written = cut_at(number, patched)
        with pytest.raises(PowerCut):
            run(tmp_path, TWELVE[:3], endpoint(instant), concurrency=1)
    assert written == (["request"] + ONE_REQUEST * 3)[: number - 1]
    sweep = run(tmp_path, None, endpoint(instant)) if written else run(tmp_path, TWELVE[:3], endpoint(instant))
    assert sweep.counts() == {"done": 3} and all(sweep.images(item) for item in sweep.items)
    in_the_gap = bool(written) and written[-1] == "sending"
    assert sorted(times_carried_out(instant).values()) == ([1, 1, 2] if in_the_gap else [1, 1, 1])
    assert sorted(sweep.table()["sent"]) == sorted(times_carried_out(instant).values())


def test_truncated_journal_line_is_ignored(instant: Instant, tmp_path: Path) -> None:
    run(tmp_path, TWELVE[:2], endpoint(instant))
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"key": "0123", "event": "jo')
    sweep = run(tmp_path, TWELVE[:3], endpoint(instant))
    assert sweep.counts() == {"done": 3} and len(instant.jobs) == 3


def test_cancelled_run_keeps_its_job_ids(instant: Instant, tmp_path: Path) -> None:
    "If the run is cancelled while requests are being sent, their job ids are still written to the folder."

    async def stopped() -> None:
        instant.faults["run"].extend([0.5] * 4)
        task = asyncio.ensure_future(Sweep(tmp_path, TWELVE).run(endpoint(instant), concurrency=4))
        while instant.met["run"] < 4:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stopped())
    assert Sweep(tmp_path).counts() == {"sent": 4, "waiting": 8}
    assert run(tmp_path, None, endpoint(instant)).counts() == {"done": 12}
    assert set(times_carried_out(instant).values()) == {1}


@pytest.mark.parametrize(
    "route, faults", [("run", [429, 429, 429]), ("status", [500, 502]), ("status", ["drop", 429, 429, 429])], ids=str
)
def test_transient_endpoint_errors_do_not_duplicate_jobs(
    route: str, faults: list, instant: Instant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "After 429, 500, 502 or dropped connections, within one run or the next, each request is executed once."
    monkeypatch.setattr(sweep_module, "_PAUSE", 0.05)
    instant.faults[route].extend(faults)
    for _ in range(len(faults) + 1):
        try:
            sweep = run(tmp_path, TWELVE[:4], endpoint(instant), concurrency=2, retries=QUICK)
            break
        except Exception as exc:
            assert type(exc).__name__ in ("UnexpectedAnswer", "ConnectionLost"), exc
    assert sweep.counts() == {"done": 4} and set(sweep.table()["sent"]) == {1}
    assert set(times_carried_out(instant).values()) == {1}


def test_connection_lost_while_sending_ends_the_run(instant: Instant, tmp_path: Path) -> None:
    "Whether the request arrived is unknown: the run raises, the journal records it, and the next run resends it."
    instant.faults["run"].append("drop")
    with pytest.raises(ConnectionLost):
        run(tmp_path, TWELVE[:1], endpoint(instant), retries=QUICK)
    assert Sweep(tmp_path).counts() == {"sending": 1}
    assert run(tmp_path, None, endpoint(instant)).items[0].sent == 2


def test_unreachable_or_unauthorized_target_ends_the_run(tmp_path: Path, instant: Instant) -> None:
    "With no server or an invalid API key nothing counts as sent or failed, and the next run continues."
    with pytest.raises(ServerUnreachable):
        run(tmp_path, TWELVE[:2], "http://127.0.0.1:9", retries=QUICK)
    instant.faults["run"].extend([401, 401])
    with pytest.raises(Unauthorized):
        run(tmp_path, None, endpoint(instant), concurrency=1)
    assert Sweep(tmp_path).counts() == {"waiting": 2}
    instant.faults["run"].clear()
    sweep = run(tmp_path, None, endpoint(instant))
    assert sweep.counts() == {"done": 2} and set(sweep.table()["sent"]) == {1}


def test_expired_jobs_are_resubmitted(instant: Instant, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path, TWELVE[:2], endpoint(instant), concurrency=1, on_result=stop)
    sweep = Sweep(tmp_path)
    with sweep.writing():
        sweep.note(sweep.items[1], "sending")
        sweep.note(sweep.items[1], "job", job="expired", target=endpoint(instant).base)
    sweep = run(tmp_path, None, endpoint(instant))
    assert [item.sent for item in sweep.items] == [1, 2] and len(instant.jobs) == 2


def stop(sweep: Sweep, item: Any) -> None:
    raise RuntimeError("enough")


def test_invalid_requests_are_rejected_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"requests\[1\]\.width"):
        Sweep(tmp_path / "new", [TWELVE[0], {**TWELVE[1], "width": 100}])
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="at least 1"):
        run(tmp_path, TWELVE[:1], "http://127.0.0.1:9", concurrency=0)


# --- a server ---------------------------------------------------------------


def test_sweep_runs_on_a_server(tmp_path: Path) -> None:
    "Two requests succeed and one fails; the failed one is resent only with `retry_failed`."
    folder = tmp_path / "models"
    folder.mkdir()
    write_tiny_model(folder, "sd15", "tiny")
    requests = [
        *request_product({"num_inference_steps": 2, "num_images": 2}, prompt=["a red circle"], seed=[1, 2]),
        {"prompt": "a red circle", "model": "nobody"},
    ]
    requests[0]["image"] = Image.new("RGB", (64, 64), "red")
    with (
        DiffusionService(Settings(model_folders=(folder,), default_model="tiny"), device="cpu") as service,
        live_server(service) as (url, _),
    ):
        told = []
        sweep = run(tmp_path / "sweep", requests, url, on_result=lambda sweep, item: told.append(item.state))
        assert sorted(told) == ["done", "done", "failed"] and sweep.counts() == {"done": 2, "failed": 1}
        assert [len(sweep.images(item)) for item in sweep.items] == [2, 2, 0]
        assert "no such model" in sweep.table()["error"].iloc[2]
        assert read_metadata(tmp_path / "sweep" / sweep.items[1].result.generation.images[0].image).plan.seeds == [2, 3]
        assert sweep.contact_sheet(side=64).width > 64
        told.clear()
        assert (
            run(
                tmp_path / "sweep",
                requests,
                url,
                retry_failed=True,
                on_result=lambda sweep, item: told.append(item.state),
            )
            .items[2]
            .sent
            == 2
        )
        assert told == ["failed"]


# --- two worker processes, and a killed sweeping process --------------------


@pytest.fixture(scope="module")
def workers(quick_python: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueServer]:
    "A queue with two worker processes."
    logs = tmp_path_factory.mktemp("workers")
    start = lambda name: running_worker(queue, name, logs / f"{name}.txt", quick_python)
    with ExitStack() as stack:
        queue = stack.enter_context(QueueServer())
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: stack.enter_context(start(name)), ("first", "second")))
        yield queue


def kill_when(queue: QueueServer, folder: Path, requests: list, results: int) -> None:
    "Kill a sweeping process once it has enough results and all of its job ids are in the journal."
    process = subprocess.Popen([sys.executable, "-c", SWEEPING, str(folder), json.dumps(requests), queue.url])
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            if len(list(folder.glob("results/*.json"))) >= results:
                process.send_signal(signal.SIGSTOP)  # freeze it between this check and the kill
                ids = {
                    line["job"] for line in folder_module.read_lines(folder / "journal.jsonl") if line["event"] == "job"
                }
                time.sleep(0.1)  # requests in flight arrive
                if ids == set(queue.jobs):
                    return
                process.send_signal(signal.SIGCONT)
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(60)


def kill_and_resume(queue: QueueServer, folder: Path, requests: list, results: int) -> None:
    queue.jobs.clear()
    kill_when(queue, folder, requests, results)
    left = Sweep(folder)
    assert results <= left.counts()["done"] < len(requests), left
    sweep = run(folder, requests, endpoint(queue))
    assert sweep.counts() == {"done": len(requests)}
    assert len(times_carried_out(queue)) == len(requests) and set(times_carried_out(queue).values()) == {1}
    assert {job.status for job in queue.jobs.values()} == {"COMPLETED"} and {
        job.taken[0] for job in queue.jobs.values()
    } == {"first", "second"}
    for item in sweep.items:
        plan = read_metadata(folder / item.result.generation.images[0].image).plan
        assert (plan.prompt, plan.guidance_scale) == (item.request["prompt"], item.request["guidance_scale"])


def test_killed_sweep_resumes(workers: QueueServer, tmp_path: Path) -> None:
    "According to the queue, two workers execute each request exactly once."
    kill_and_resume(workers, tmp_path, TWELVE, 3)


@pytest.mark.slow
def test_large_killed_sweep_resumes(workers: QueueServer, tmp_path: Path) -> None:
    "200 prompts with three guidance scales each."
    prompts = [
        f"a {color} {shape} on a {ground} background, number {number}"
        for number in range(10)
        for color in ("red", "blue", "green", "yellow", "orange")
        for shape in ("circle", "square")
        for ground in ("white", "black")
    ]
    kill_and_resume(
        workers,
        tmp_path,
        request_product({"seed": 1, "num_inference_steps": 2}, prompt=prompts, guidance_scale=[1.0, 3.0, 7.0]),
        200,
    )


def test_folder_in_use_is_locked_for_other_processes(workers: QueueServer, tmp_path: Path) -> None:
    "While one process writes, a sweep of another process on the same folder fails."
    sweep = Sweep(tmp_path, TWELVE)
    with sweep.writing():
        done = subprocess.run(
            [sys.executable, "-c", SWEEPING, str(tmp_path), json.dumps(TWELVE), workers.url],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1 and "another run is sweeping" in done.stderr


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "0123456789abcdef/../../secret", ""])
def test_untrusted_sweep_folder_cannot_escape(name: str, tmp_path: Path) -> None:
    "Keys with path traversal are ignored, and a result that is a symlink to an outside file is rejected."
    request = {"prompt": "a red circle"}
    secret = tmp_path / "secret.json"
    secret.write_text('{"status": "internal_error"}')
    folder = tmp_path / "sweep"
    (folder / "results").mkdir(parents=True)
    lines = [
        {"key": name, "event": "request", "request": request},
        {"key": "0" * 16, "event": "request", "request": request},
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sweep = Sweep(folder)
    assert [item.key for item in sweep.items] == ["0" * 16]
    sweep.pending(retry_failed=True)
    assert secret.exists()
    (folder / "results" / f"{'0' * 16}.json").symlink_to(secret)
    with pytest.raises(ValueError, match="outside of its folder"):
        Sweep(folder)
