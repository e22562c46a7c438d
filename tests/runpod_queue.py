"""A local RunPod: the queue for the worker's SDK and the endpoint for clients, with fault injection."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

HOLD = 0.5  # seconds that a request for jobs is held open when there are none
PATIENCE = 300  # seconds until something counts as stuck; never a measure of speed
ENDED = ("COMPLETED", "FAILED", "CANCELLED")
ENDPOINT, API_KEY, WORKER_FILE = "endpoint", "stand-in", "diffusion_workers.handler"


@dataclass
class QueuedJob:
    "A job, and everything that workers sent about it."

    id: str
    input: Any
    status: str = "IN_QUEUE"
    output: Any = None
    error: str | None = None
    updates: list[Any] = field(default_factory=list)  # progress
    stream: list[Any] = field(default_factory=list)  # items that a client has not fetched yet
    streamed: list[Any] = field(default_factory=list)  # all items
    taken: list[str] = field(default_factory=list)  # names of the workers that took it
    stop_pod: bool = False  # whether the worker requested its replacement
    answer_bytes: int = 0

    @property
    def client_view(self) -> dict[str, Any]:
        "The response to a client. RunPod keeps the error of a failed job, but not its output."
        shown = {"id": self.id, "status": self.status}
        if self.status == "FAILED":
            return shown | {"error": self.error}
        if self.status == "COMPLETED":
            return shown | {"output": self.output}
        if self.updates:
            return shown | {"output": self.updates[-1]}
        return shown


class QueueServer:
    "A server on a free local port in its own thread, inside a `with` block."

    def __init__(self):
        self.jobs: dict[str, QueuedJob] = {}
        self.waiting: deque[str] = deque()
        self.stopping: deque[str] = deque()
        self.pings: list[dict[str, str]] = []
        self.faults: dict[str, deque] = defaultdict(deque)  # route -> a status, "drop", or seconds to wait
        self.met: dict[str, int] = defaultdict(int)  # route -> how many faults were served
        self.takes: dict[str, int] = defaultdict(int)  # worker -> how often it requested jobs
        self.asked: list[str] = []  # the operations that clients requested, in order
        self._changed = threading.Condition()

    # --- the worker's side ---

    @web.middleware
    async def _faulty(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        route = request.match_info.route.name
        while route and self.faults[route]:
            fault = self.faults[route].popleft()
            self.met[route] += 1
            if fault == "drop":
                request.transport.abort()
                return web.Response()
            if isinstance(fault, float):
                await asyncio.sleep(fault)
                continue
            return web.Response(status=fault)
        return await handler(request)

    async def _take(self, request: web.Request) -> web.Response:
        worker, until = request.match_info["worker"], time.monotonic() + HOLD
        wanted = int(request.query.get("batch_size", 1))
        self._change(lambda: self.takes.update({worker: self.takes[worker] + 1}))
        while not self.waiting and time.monotonic() < until:
            await asyncio.sleep(0.02)
        taken = [self.jobs[self.waiting.popleft()] for _ in range(min(wanted, len(self.waiting)))]
        if not taken:
            return web.Response(status=204)
        for job in taken:
            job.taken.append(worker)
            job.status = "IN_PROGRESS"
        assigned = [{"id": job.id, "input": job.input} for job in taken]
        return web.json_response(assigned if "job-take-batch" in request.path else assigned[0])

    async def _done(self, request: web.Request) -> web.Response:
        job, body = self.jobs[request.match_info["job"]], await request.text()
        message = json.loads(body, parse_constant=_no_constants)

        def note() -> None:
            if job.status in ENDED:  # an update may arrive late
                return
            if message.get("status") == "IN_PROGRESS":
                job.updates.append(message["output"])
                return
            job.answer_bytes = len(body.encode())
            job.stop_pod = bool(message.get("stopPod"))
            job.output = message.get("output")
            job.error = message.get("error")
            job.status = "FAILED" if job.error else "COMPLETED"

        self._change(note)
        return web.json_response({"status": "ok"})

    async def _stream(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["job"]]
        message = json.loads(await request.text(), parse_constant=_no_constants)

        def note() -> None:
            job.stream.append(message["output"])
            job.streamed.append(message["output"])

        self._change(note)
        return web.json_response({"status": "ok"})

    async def _stop(self, request: web.Request) -> web.Response:
        until = time.monotonic() + HOLD
        while not self.stopping and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if not self.stopping:
            return web.Response(status=204)
        return web.json_response({"jobsToStop": [self.stopping.popleft() for _ in range(len(self.stopping))]})

    async def _ping(self, request: web.Request) -> web.Response:
        self._change(lambda: self.pings.append(dict(request.query)))
        return web.json_response({"status": "ok"})

    # --- the client's side ---

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Callable) -> web.StreamResponse:
        name = request.path.removeprefix(f"/v2/{ENDPOINT}/").split("/")[0]
        if name in ("run", "runsync", "status", "stream", "cancel"):
            if request.headers.get("Authorization") != f"Bearer {API_KEY}":
                return web.Response(status=401)
            self.asked.append(name)
        return await handler(request)

    async def _run(self, request: web.Request) -> web.Response:
        job_id = self.submit((await request.json())["input"])
        return web.json_response({"id": job_id, "status": "IN_QUEUE"})

    async def _runsync(self, request: web.Request) -> web.Response:
        job = self.jobs[self.submit((await request.json())["input"], sync=True)]
        until = time.monotonic() + int(request.query.get("wait", 90_000)) / 1000
        while job.status not in ENDED and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return web.json_response(job.client_view)

    async def _known(self, request: web.Request) -> QueuedJob:
        job = self.jobs.get(request.match_info["job"])
        if job is None:
            raise web.HTTPNotFound(text="{}")
        return job

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response((await self._known(request)).client_view)

    async def _fetch(self, request: web.Request) -> web.Response:
        job, until = await self._known(request), time.monotonic() + HOLD
        while not job.stream and job.status not in ENDED and time.monotonic() < until:
            await asyncio.sleep(0.02)
        items = job.stream
        job.stream = []
        return web.json_response(
            {"status": job.status if not items else "IN_PROGRESS", "stream": [{"output": item} for item in items]}
        )

    async def _cancel(self, request: web.Request) -> web.Response:
        job = await self._known(request)
        self.stop(job.id)
        return web.json_response(job.client_view)

    # --- calls from tests ---

    def submit(self, given: Any, sync: bool = False) -> str:  # the job's id
        "Queue a job."
        job = QueuedJob(("sync-" if sync else "") + uuid.uuid4().hex, given)
        self.jobs[job.id] = job
        self.waiting.append(job.id)
        return job.id

    def stop(self, job_id: str) -> None:
        "Cancel a job as RunPod does: its worker is notified, and later messages from it are ignored."
        job = self.jobs[job_id]
        if job.status in ENDED:
            return
        if job_id in self.waiting:
            self.waiting.remove(job_id)
        else:
            self.stopping.append(job_id)
        self._change(lambda: setattr(job, "status", "CANCELLED"))

    def until(self, holds: Callable[[], Any], what: str) -> Any:
        "Wait until something holds."
        with self._changed:
            if not self._changed.wait_for(holds, PATIENCE):
                raise TimeoutError(f"{what} did not happen within {PATIENCE} s")
            return holds()

    def ended(self, job_id: str) -> QueuedJob:
        "Wait until a job has ended, and return it."
        job = self.jobs[job_id]
        self.until(lambda: job.status in ENDED, f"the end of {job.input!r:.100}")
        return job

    def answers(self, *inputs: Any) -> list[QueuedJob]:
        "Queue jobs and wait for all of them."
        return [self.ended(job_id) for job_id in [self.submit(given) for given in inputs]]

    def _change(self, change: Callable[[], Any]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    # --- the server ---

    @property
    def url(self) -> str:
        "The base URL of the API for clients."
        return f"http://127.0.0.1:{self.port}/v2"

    def environment(self, worker: str) -> dict[str, str]:
        "The variables that RunPod gives a worker."
        base, tail = f"{self.url}/{ENDPOINT}", "?gpu=none"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID{tail}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID{tail}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID{tail}",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": API_KEY,
            "RUNPOD_POD_ID": worker,
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def __enter__(self) -> "QueueServer":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def serve() -> None:
            app = web.Application(client_max_size=2**28, middlewares=[self._guarded, self._faulty])
            at = f"/v2/{ENDPOINT}"
            app.router.add_get(at + "/job-take/{worker}", self._take, name="take")
            app.router.add_get(at + "/job-take-batch/{worker}", self._take, name="take_batch")
            app.router.add_get(at + "/job-stop/{worker}", self._stop, name="stop")
            app.router.add_post(at + "/job-done/{worker}/{job}", self._done, name="done")
            app.router.add_post(at + "/job-stream/{worker}/{job}", self._stream, name="stream")
            app.router.add_get(at + "/ping/{worker}", self._ping)
            app.router.add_post(at + "/run", self._run, name="run")
            app.router.add_post(at + "/runsync", self._runsync)
            app.router.add_get(at + "/status/{job}", self._status, name="status")
            app.router.add_get(at + "/stream/{job}", self._fetch)
            app.router.add_post(at + "/cancel/{job}", self._cancel)
            self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            started.set()

        self._loop.create_task(serve())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(self, *exc_info) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# --- worker processes -------------------------------------------------------


def worker_environment(**more: str) -> dict[str, str]:
    "The environment of a worker process: CPU, no network, and no settings of the user who runs the tests."
    foreign = ("DIFFUSION_WORKERS_", "DO_TORCH_", "RUNPOD_", "BUCKET_")
    own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return own | {"HF_HUB_OFFLINE": "1", "DIFFUSION_WORKERS_DEVICE": "cpu", "PYTHONUNBUFFERED": "1"} | more


@contextmanager
def running_worker(
    queue: QueueServer,
    name: str,
    log: Path,
    python: Sequence[str] = (),  # the command that runs Python; default: QUICK_PYTHON, or that of this process
    **more: str,  # further variables
) -> Iterator[subprocess.Popen]:
    "A worker process that has requested its first job; terminated on exit if it is still running."
    with log.open("w") as file:
        python = python or shlex.split(os.environ.get("QUICK_PYTHON", shlex.quote(sys.executable)))
        command = [*python, "-m", WORKER_FILE]
        process = subprocess.Popen(
            command, env=worker_environment(**queue.environment(name), **more), stdout=file, stderr=file, cwd=log.parent
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not queue.takes[name]:
                assert process.poll() is None, f"the worker ended with {process.returncode}:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"the worker does not request jobs:\n{log.read_text()}"
                time.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(60)
