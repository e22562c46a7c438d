"""A local RunPod serverless endpoint with one worker: /run, /runsync, /status, /stream, /cancel.

Only RunPod's own part is simulated. A `DiffusionService` generates the images, and the endpoint streams and returns
what the worker sends: events as they occur, and the result.
"""

import asyncio
import contextlib
import json
from itertools import count

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ez_diffusion_client.models import ProgressEvent

API_KEY = "rpa_of-a-test"
SYNC_SECONDS = 0.2  # after which /runsync responds without a result; RunPod waits 90 seconds


class Endpoint:
    "One endpoint and its jobs."

    def __init__(self, service):
        self.service = service
        self.numbers = count(1)
        self.jobs: dict[str, dict] = {}
        self.seen: list[str] = []  # method and path of each request

    def begin(self, request: dict) -> dict:
        job = {
            "id": f"job-{next(self.numbers)}",
            "status": "IN_PROGRESS",
            "events": [],
            "streamed": 0,
            "done": asyncio.Event(),
        }
        loop = asyncio.get_running_loop()

        def report(event: ProgressEvent) -> None:
            loop.call_soon_threadsafe(self.take, job, event)

        self.jobs[job["id"]] = job
        job["generation"] = self.service.submit(request, on_progress=report)
        return job

    def take(self, job: dict, event: ProgressEvent) -> None:
        job["events"].append({"output": event.model_dump(mode="json", exclude_none=True)})
        if event.result is not None:
            if job["status"] == "IN_PROGRESS":
                job["status"] = "COMPLETED"
                job["output"] = event.result.model_dump(mode="json", exclude_none=True)
            job["done"].set()

    def response_for(self, job: dict, *more: str) -> Response:
        return JSONResponse({name: job[name] for name in ("id", "status", *more) if name in job})


def endpoint_app(endpoint: Endpoint) -> Starlette:
    "The routes under https://api.runpod.ai/v2/ENDPOINT_ID."

    async def handle(request: Request) -> Response:
        action, job_id = request.path_params["action"], request.path_params.get("job_id")
        endpoint.seen.append(f"{request.method} {action}")
        if request.headers.get("authorization") != f"Bearer {API_KEY}":
            return Response(status_code=401)
        if action in ("run", "runsync"):
            job = endpoint.begin(json.loads(await request.body())["input"])
            if action == "runsync":
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(job["done"].wait(), SYNC_SECONDS)
            return endpoint.response_for(job, "output")
        if job_id not in endpoint.jobs:
            return JSONResponse({"error": "job not found"}, 404)
        job = endpoint.jobs[job_id]
        if action == "stream":
            fresh = job["events"][job["streamed"] :]
            job["streamed"] = len(job["events"])
            return JSONResponse({"status": job["status"], "stream": fresh})
        if action == "cancel" and job["status"] == "IN_PROGRESS":
            job["status"] = "CANCELLED"
            job["generation"].cancel()
        return endpoint.response_for(job, "output")

    return Starlette(
        routes=[
            Route(f"/v2/tested/{path}", handle, methods=["GET", "POST"]) for path in ("{action}", "{action}/{job_id}")
        ]
    )
