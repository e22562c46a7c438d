"""Where requests go: a local server or a RunPod endpoint, as plain descriptions of HTTP calls that know no network."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from .errors import NotOffered, UnexpectedAnswer, raise_for_status
from .models import ErrorCode, ErrorDetail, Job, JobState, OpResult, OpStatus, Phase, ProgressEvent

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
_ENDED = {OpStatus.success: JobState.succeeded, OpStatus.cancelled: JobState.cancelled}


@dataclass(frozen=True)
class Call(Generic[T]):
    """One HTTP request, and how its answer is read."""

    method: str
    path: str  # below the target's base
    read: Callable[[httpx.Response], T]
    body: dict[str, Any] | None = None
    safe: bool = True  # whether sending it twice does no harm
    waits: bool = False  # whether the answer comes when the work is done


class Batch(NamedTuple):
    """What a poll of a stream brought."""

    events: list[ProgressEvent]
    ended: bool


def parse_answer(model: type[Model], response: httpx.Response) -> Model:
    """The answer as one of the API's types; an `UnexpectedAnswer` where it is none."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError:
        start = response.text[:200]
        raise UnexpectedAnswer(
            f"{response.request.url} answered {response.status_code}, and not with a {model.__name__}: {start!r}"
        ) from None


def ended_job(job_id: str, result: OpResult) -> Job:
    """A job with its result."""
    return Job(id=job_id, state=_ENDED.get(result.status, JobState.failed), result=result)


def failed_result(status: OpStatus, message: str) -> OpResult:
    """A result for a failure that the server tells in its own words."""
    code = ErrorCode(status.value) if status.value in ErrorCode.__members__ else ErrorCode.internal_error
    return OpResult(status=status, message=message, errors=[ErrorDetail(code=code, message=message)])


def bearer(secret: str | None, name: str) -> dict[str, str]:
    """The header that carries a secret; a ValueError that does not repeat it where no header can."""
    secret = (secret or "").strip()
    for index, character in enumerate(secret):
        if not "!" <= character <= "~":
            raise ValueError(
                f"{name}: character {index + 1} (U+{ord(character):04X}) cannot be sent in a header; "
                "allowed: visible ASCII characters; copy it again"
            )
    return {"Authorization": f"Bearer {secret}"} if secret else {}


@dataclass(frozen=True)
class Server:
    """A server that `diffusion-workers serve` runs."""

    url: str = "http://127.0.0.1:8000"
    token: str | None = field(default_factory=lambda: os.environ.get("DIFFUSION_WORKERS_TOKEN"), repr=False)

    @property
    def base(self) -> str:
        """The address below which the calls are."""
        return self.url.rstrip("/")

    @property
    def headers(self) -> dict[str, str]:
        """What every call carries."""
        return bearer(self.token, "token")

    def run(self, body: dict[str, Any]) -> Call[Job]:
        """Make images and wait for them."""
        read = lambda response: ended_job("-", parse_answer(OpResult, response))
        return Call("POST", "/generate", read, body, safe=False, waits=True)

    def submit(self, body: dict[str, Any]) -> Call[Job]:
        """Queue a request."""
        return Call("POST", "/jobs", _checked(Job), body, safe=False)

    def job(self, job_id: str) -> Call[Job]:
        """How a job stands."""
        return Call("GET", f"/jobs/{job_id}", _checked(Job))

    def cancel(self, job_id: str) -> Call[Job]:
        """Stop a job."""
        return Call("DELETE", f"/jobs/{job_id}", _checked(Job))

    def ask(self, method: str, path: str, model: type[Model], body: dict[str, Any] | None = None) -> Call[Model]:
        """Any other operation; none of them changes anything."""
        return Call(method, path, _checked(model), body)


def _checked(
    model: type[Model],
) -> Callable[[httpx.Response], Model]:  # an answer that is a failure is raised where another type is expected
    def read(response: httpx.Response) -> Model:
        if model is not OpResult and not response.is_success:
            try:
                refused = OpResult.model_validate_json(response.content)
            except ValidationError:  # /ready answers 503 with a Health
                return parse_answer(model, response)
            raise_for_status(refused)
        return parse_answer(model, response)

    return read


# --- RunPod -----------------------------------------------------------------

_RUNPOD_STATES = {
    "IN_QUEUE": JobState.queued,
    "IN_PROGRESS": JobState.running,
    "COMPLETED": JobState.succeeded,
    "FAILED": JobState.failed,
    "CANCELLED": JobState.cancelled,
    "TIMED_OUT": JobState.failed,
}
_RUNPOD_FAILURES = {"FAILED": OpStatus.internal_error, "CANCELLED": OpStatus.cancelled, "TIMED_OUT": OpStatus.timed_out}


def output_event(output: Any) -> ProgressEvent | None:
    """What a worker sent, an event or a result, as an event; None where it is neither."""
    if not isinstance(output, dict):
        return None
    try:
        if "phase" in output:
            return ProgressEvent.model_validate_json(json.dumps(output))
        result = OpResult.model_validate_json(json.dumps(output))
    except ValidationError:
        return None
    return ProgressEvent(
        phase={OpStatus.success: Phase.done, OpStatus.cancelled: Phase.cancelled}.get(result.status, Phase.failed),
        message=result.message,
        result=result,
    )


def output_result(output: Any) -> OpResult | None:
    """The result in what a worker returned: a result, an event that carries one, or a list that ends with one."""
    for item in reversed(output if isinstance(output, list) else [output]):
        event = output_event(item)
        if event is not None and event.result is not None:
            return event.result
    return None


def error_result(error: Any) -> OpResult | None:
    """The result that a failed job keeps as JSON text in its error; None where the error is something else."""
    try:
        return OpResult.model_validate_json(error) if isinstance(error, str) else None
    except ValidationError:
        return None


def runpod_job(response: httpx.Response) -> Job:
    """A job in RunPod's words, as one of ours."""
    if response.status_code in (401, 403):
        raise_for_status(failed_result(OpStatus.unauthorized, "RunPod does not take this API key; see RUNPOD_API_KEY"))
    if response.status_code == 404:
        raise_for_status(failed_result(OpStatus.not_found, "RunPod knows no such endpoint or job"))
    if response.status_code == 429:
        raise_for_status(failed_result(OpStatus.queue_full, "RunPod takes no more requests at the moment"))
    told = _told(response)
    status = told.get("status")
    if not isinstance(told.get("id"), str) or status not in _RUNPOD_STATES:
        raise UnexpectedAnswer(
            f"{response.request.url} answered {response.status_code} and no job: {response.text[:200]!r}"
        )
    result = output_result(told.get("output")) or (error_result(told.get("error")) if status == "FAILED" else None)
    if result is None and status in _RUNPOD_FAILURES:
        result = failed_result(_RUNPOD_FAILURES[status], str(told.get("error") or f"RunPod says {status}")[:1000])
    if result is None and status == "COMPLETED":
        raise UnexpectedAnswer(
            f"the worker of this endpoint returned something that is not an OpResult: {str(told.get('output'))[:200]!r}"
        )
    return (
        ended_job(told["id"], result)
        if result is not None and status not in ("IN_QUEUE", "IN_PROGRESS")
        else Job(id=told["id"], state=_RUNPOD_STATES[status])
    )


def _told(response: httpx.Response) -> dict[str, Any]:
    try:
        told = response.json()
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise UnexpectedAnswer(
            f"{response.request.url} answered {response.status_code} and no JSON object: {response.text[:200]!r}"
        )
    return told


def runpod_batch(response: httpx.Response) -> Batch:
    """The items that a stream had ready."""
    if not response.is_success:
        runpod_job(response)
    told = _told(response)
    items = [item.get("output") for item in told.get("stream") or [] if isinstance(item, dict)]
    return Batch(
        [event for event in map(output_event, items) if event is not None],
        told.get("status") not in ("IN_QUEUE", "IN_PROGRESS"),
    )


@dataclass(frozen=True)
class RunPod:
    """A serverless endpoint whose workers run this project's image."""

    endpoint_id: str
    api_key: str | None = field(default_factory=lambda: os.environ.get("RUNPOD_API_KEY"), repr=False)
    url: str = field(default_factory=lambda: os.environ.get("RUNPOD_ENDPOINT_BASE_URL") or "https://api.runpod.ai/v2")

    @property
    def base(self) -> str:
        """The address below which the calls are."""
        return f"{self.url.rstrip('/')}/{self.endpoint_id}"

    @property
    def headers(self) -> dict[str, str]:
        """What every call carries."""
        return bearer(self.api_key, "api_key")

    def run(self, body: dict[str, Any]) -> Call[Job]:
        """Make images; the answer may come before they are done."""
        return Call("POST", "/runsync", runpod_job, {"input": body}, safe=False, waits=True)

    def submit(self, body: dict[str, Any]) -> Call[Job]:
        """Queue a request."""
        return Call("POST", "/run", runpod_job, {"input": body}, safe=False)

    def job(self, job_id: str) -> Call[Job]:
        """How a job stands."""
        return Call("GET", f"/status/{job_id}", runpod_job)

    def cancel(self, job_id: str) -> Call[Job]:
        """Stop a job."""
        return Call("POST", f"/cancel/{job_id}", runpod_job)

    def stream(self, job_id: str) -> Call[Batch]:
        """The events that are ready."""
        return Call("GET", f"/stream/{job_id}", runpod_batch)

    def ask(self, method: str, path: str, model: type[Model], body: dict[str, Any] | None = None) -> Call[Model]:
        """What only a server of one's own can be asked."""
        raise NotOffered(f"a RunPod endpoint has no {path}; ask a server, or look at the endpoint's page")
