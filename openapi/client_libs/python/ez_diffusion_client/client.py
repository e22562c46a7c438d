"""One call for a local server and for a RunPod endpoint, synchronous or with `await`."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, Unpack

import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from .errors import (
    ClientError,
    ConnectionLost,
    RequestFailed,
    ServerUnreachable,
    UnexpectedAnswer,
    WaitTimeout,
    raise_for_status,
)
from .fields import PreprocessFields, RequestFields
from .images import request_body, restore_body
from .models import (
    GenerationRequest,
    Health,
    Job,
    JobState,
    MemoryReport,
    ModelList,
    OpResult,
    OpStatus,
    Phase,
    PreprocessRequest,
    ProgressEvent,
    PromptReport,
    PromptSyntax,
)
from .targets import Call, RunPod, Server, parse_answer

T = TypeVar("T")
Request = GenerationRequest | dict[str, Any] | str | bytes | None
OnProgress = Callable[[ProgressEvent], Any]


@dataclass(frozen=True)
class Retries:
    """How often a call that may be sent again is sent again, and after how long."""

    attempts: int = 4  # in all
    first_pause: float = 0.5  # seconds; doubled each time
    longest_pause: float = 20.0  # seconds; also what a Retry-After counts for at most


_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_PASSING = (429, 502, 503, 504)  # HTTP statuses that may be others a moment later


def _not_done(response: httpx.Response) -> bool:  # whether the answer says that the request was turned away or dropped
    try:
        told = OpResult.model_validate_json(response.content)
    except ValueError:
        return response.status_code == 429
    return told.status == OpStatus.queue_full or (
        told.status == OpStatus.cancelled and any(error.retryable for error in told.errors or [])
    )


def next_pause(
    call: Call,
    attempt: int,  # how often it was sent, counted from 1
    outcome: httpx.Response | httpx.TransportError,
    retries: Retries,
) -> float | None:  # seconds to wait before it is sent again; None is never
    """Whether to send a call again: always if it was never sent or was refused, else if sending it twice is safe."""
    if attempt >= retries.attempts:
        return None
    pause = min(retries.longest_pause, retries.first_pause * 2 ** (attempt - 1))
    if isinstance(outcome, httpx.TransportError):
        return (
            pause
            if isinstance(outcome, _NEVER_SENT) or (call.safe and not isinstance(outcome, httpx.TimeoutException))
            else None
        )
    if outcome.status_code not in _PASSING or not (call.safe or _not_done(outcome)):
        return None
    asked = outcome.headers.get("retry-after", "")
    return min(retries.longest_pause, max(pause, float(asked))) if asked.isdecimal() else pause


def _told_error(exc: httpx.TransportError, url: str) -> ClientError:
    if isinstance(exc, httpx.TimeoutException) and not isinstance(exc, _NEVER_SENT):
        return WaitTimeout(f"{url} did not answer in time")
    kind = ServerUnreachable if isinstance(exc, _NEVER_SENT) else ConnectionLost
    return kind(f"{url}: {exc or type(exc).__name__}")


def _timeout(call: Call, seconds: float | None) -> httpx.Timeout:
    return httpx.Timeout(seconds if call.waits or seconds is not None else 60.0, connect=10.0)


_STREAM_TIMEOUT = httpx.Timeout(60.0, connect=10.0)


def failures_so_far(
    failures: int,  # before
    seen: int,  # events of the stream that has ended
    broke: httpx.TransportError | None,  # why it ended, if not by itself
    retries: Retries,
    url: str,
) -> int:
    """How many streams in a row have brought nothing new; raises when they are too many."""
    failures = 1 if seen > 1 else failures + 1  # the first event of a stream repeats the last one
    if failures >= retries.attempts:
        raise (
            _told_error(broke, url)
            if broke is not None
            else ConnectionLost(f"{url} ends the events of the job without a result")
        )
    return failures


def progress_event(message: ServerSentEvent) -> ProgressEvent | None:
    """The event in a message of a stream; None where the message carries none, such as a sign of life."""
    if not message.data:
        return None
    try:
        return ProgressEvent.model_validate_json(message.data)
    except ValueError:
        raise UnexpectedAnswer(f"this is not a ProgressEvent: {message.data[:200]!r}") from None


class _UntilDeadline(httpx.SyncByteStream):
    """A response body that is given up once the time is up: a server sends at least a comment every 15 seconds."""

    def __init__(self, stream: httpx.SyncByteStream, check: Callable[[], Any]):
        self._stream = stream
        self._check = check

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            self._check()
            yield part

    def close(self) -> None:
        self._stream.close()


class _Base:
    _polls = (0.25, 0.5, 1.0, 2.0)  # seconds between looks at a job, the last one from then on

    def __init__(
        self,
        target: str | Server | RunPod = "http://127.0.0.1:8000",  # the address of a server, or what says more
        *,
        retries: Retries = Retries(),
    ):
        self.target = Server(target) if isinstance(target, str) else target
        self.retries = retries

    def _poll(self, looks: int) -> float:
        return self._polls[min(looks, len(self._polls) - 1)]

    def _left(self, deadline: float | None) -> float | None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise WaitTimeout("the time for this request is up")
        return left

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


class Client(_Base):
    """A client that waits. Use it in a `with` block, or close it."""

    def __init__(
        self,
        target: str | Server | RunPod = "http://127.0.0.1:8000",
        *,
        retries: Retries = Retries(),
        transport: httpx.BaseTransport | None = None,
    ):
        super().__init__(target, retries=retries)
        self._http = httpx.Client(base_url=self.target.base, headers=self.target.headers, transport=transport)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def _do(self, call: Call[T], timeout: float | None = None) -> T:
        for attempt in range(1, self.retries.attempts + 1):
            try:
                outcome: Any = self._http.request(
                    call.method, call.path, json=call.body, timeout=_timeout(call, timeout)
                )
            except httpx.TransportError as exc:
                outcome = exc
            pause = next_pause(call, attempt, outcome, self.retries)
            if pause is None:
                break
            time.sleep(pause)
        if isinstance(outcome, httpx.TransportError):
            raise _told_error(outcome, self.target.base) from outcome
        return call.read(outcome)

    def generate(
        self,
        request: Request = None,  # as an object, a dict or JSON
        *,
        on_progress: OnProgress | None = None,  # called with each event
        timeout: float | None = None,  # seconds after which the work is told to stop and `WaitTimeout` is raised
        **fields: Unpack[RequestFields],  # of the request; images may be bytes, paths or PIL images
    ) -> OpResult:
        """Make images and wait for them; the answer is returned, whatever its status."""
        body, deadline = request_body(request, {**fields}), _deadline(timeout)
        if on_progress is not None:
            return self._watched(body, on_progress, deadline)
        alone = timeout is None or isinstance(
            self.target, Server
        )  # a server notices when the connection is closed; RunPod has to be told, by the job's id
        job, looks = self._do(self.target.run(body) if alone else self.target.submit(body), timeout), 0
        while job.result is None:
            self._wait_or_cancel(job.id, self._poll(looks), deadline)
            job, looks = self._do(self.target.job(job.id)), looks + 1
        return job.result

    def _wait_or_cancel(self, job_id: str, pause: float, deadline: float | None) -> None:
        try:
            self._left(deadline)
            time.sleep(pause)
        except BaseException:
            with suppress(ClientError):
                self.cancel(job_id)
            raise

    def _watched(self, body: dict[str, Any], on_progress: OnProgress, deadline: float | None) -> OpResult:
        try:
            job = self._do(self.target.submit(body))
        except RequestFailed as exc:
            return exc.result
        try:
            for event in self._events(job.id, deadline):
                on_progress(event)
                if event.result is not None:
                    return event.result
        except BaseException:
            with suppress(ClientError):
                self.cancel(job.id)
            raise
        raise ConnectionLost("the events ended without a result")

    def submit(self, request: Request = None, **fields: Unpack[RequestFields]) -> Job:
        """Queue a request and return at once; a `RequestFailed` where it is refused."""
        return self._do(self.target.submit(request_body(request, {**fields})))

    def job(self, job_id: str) -> Job:
        """How a job stands, with its result once there is one."""
        return self._do(self.target.job(job_id))

    def result(
        self,
        job_id: str,  # of a job that was submitted, by this client or another
        *,
        timeout: float | None = None,  # seconds after which `WaitTimeout` is raised
    ) -> OpResult:
        """Wait for a job that was submitted before; a caller that stops waiting leaves the work as it is."""
        deadline, looks = _deadline(timeout), 0
        while (result := self.job(job_id).result) is None:
            left = self._left(deadline)
            time.sleep(self._poll(looks) if left is None else min(self._poll(looks), left))
            looks += 1
        return result

    def cancel(self, job_id: str) -> Job:
        """Stop a job; a running one stops within one step."""
        return self._do(self.target.cancel(job_id))

    def events(self, job_id: str) -> Iterator[ProgressEvent]:
        """The events of a job as they come, the last one with the result; a broken connection is taken up again."""
        return self._events(job_id, None)

    def _events(self, job_id: str, deadline: float | None) -> Iterator[ProgressEvent]:
        if isinstance(self.target, RunPod):
            return self._polled(self.target, job_id, deadline)
        return self._streamed(job_id, deadline)

    def _streamed(self, job_id: str, deadline: float | None = None) -> Iterator[ProgressEvent]:
        failures = 0
        while True:
            seen, broke = 0, None
            try:
                with self._http.stream("GET", f"/jobs/{job_id}/events", timeout=_STREAM_TIMEOUT) as response:
                    if not response.is_success:
                        response.read()
                        raise_for_status(parse_answer(OpResult, response))
                    body = response.stream
                    assert isinstance(body, httpx.SyncByteStream)
                    response.stream = _UntilDeadline(body, lambda: self._left(deadline))
                    for message in EventSource(response).iter_sse():
                        event = progress_event(message)
                        if event is None:
                            continue
                        seen += 1
                        yield event
                        if event.result is not None:
                            return
            except SSEError as exc:
                raise UnexpectedAnswer(f"{self.target.base} does not stream events: {exc}") from None
            except httpx.TransportError as exc:
                broke = exc
            failures = failures_so_far(failures, seen, broke, self.retries, self.target.base)
            time.sleep(self.retries.first_pause)

    def _polled(self, target: RunPod, job_id: str, deadline: float | None) -> Iterator[ProgressEvent]:
        looks = 0
        while True:
            self._left(deadline)
            batch = self._do(target.stream(job_id))
            yield from batch.events
            if any(event.result is not None for event in batch.events):
                return
            if batch.ended:
                job = self.job(job_id)
                if job.result is None:
                    raise UnexpectedAnswer("the job has ended without a result")
                yield ended_event(job)
                return
            time.sleep(self._poll(looks))
            looks = 0 if batch.events else looks + 1

    def plan(self, request: Request = None, **fields: Unpack[RequestFields]) -> OpResult:
        """What a request would do, without doing it."""
        return self._do(self.target.ask("POST", "/plan", OpResult, request_body(request, {**fields})))

    def preprocess(
        self, request: PreprocessRequest | dict[str, Any] | None = None, **fields: Unpack[PreprocessFields]
    ) -> OpResult:
        """The control map of an image."""
        return self._do(self.target.ask("POST", "/preprocess", OpResult, request_body(request, {**fields})))

    def read_prompt(
        self, prompt: str, *, model: str | None = None, prompt_syntax: PromptSyntax | str | None = None
    ) -> PromptReport:
        """The tokens of a prompt, the borders of its chunks, and its mistakes."""
        query = {"prompt": prompt, "model": model, "prompt_syntax": prompt_syntax}
        given = {name: value for name, value in query.items() if value is not None}
        return self._do(self.target.ask("POST", "/prompt", PromptReport, given))

    def restore(
        self,
        image: Any = None,  # an image file: bytes, a path, base64 text or a URL
        *,
        parameters: str | None = None,  # prompt, negative prompt and settings as other programs write them
    ) -> OpResult:  # its `restored` holds the request
        """Restore the request that made an image from the image's metadata."""
        return self._do(self.target.ask("POST", "/restore", OpResult, restore_body(image, parameters)))

    def models(self) -> ModelList:
        """The models that the server offers."""
        return self._do(self.target.ask("GET", "/models", ModelList))

    def memory_info(self) -> MemoryReport:
        """Memory of the server, of its devices and of each loaded model."""
        return self._do(self.target.ask("GET", "/memory-info", MemoryReport))

    def health(self) -> Health:
        """How the server is."""
        return self._do(self.target.ask("GET", "/health", Health))


def ended_event(job: Job) -> ProgressEvent:
    """The last event of a job that has ended."""
    phase = {JobState.succeeded: Phase.done, JobState.cancelled: Phase.cancelled}.get(job.state, Phase.failed)
    message = None if job.result is None else job.result.message
    return ProgressEvent(phase=phase, job_id=job.id, message=message, result=job.result)


class AsyncClient(_Base):
    """The same calls with `await`. Use it in an `async with` block, or close it."""

    def __init__(
        self,
        target: str | Server | RunPod = "http://127.0.0.1:8000",
        *,
        retries: Retries = Retries(),
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        super().__init__(target, retries=retries)
        self._http = httpx.AsyncClient(base_url=self.target.base, headers=self.target.headers, transport=transport)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc_info) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def _do(self, call: Call[T]) -> T:
        for attempt in range(1, self.retries.attempts + 1):
            try:
                outcome: Any = await self._http.request(
                    call.method, call.path, json=call.body, timeout=_timeout(call, None)
                )
            except httpx.TransportError as exc:
                outcome = exc
            pause = next_pause(call, attempt, outcome, self.retries)
            if pause is None:
                break
            await asyncio.sleep(pause)
        if isinstance(outcome, httpx.TransportError):
            raise _told_error(outcome, self.target.base) from outcome
        return call.read(outcome)

    async def generate(
        self,
        request: Request = None,  # as an object, a dict or JSON
        *,
        on_progress: OnProgress | None = None,  # called with each event; may be a coroutine function
        timeout: float | None = None,  # seconds after which the work is told to stop and `WaitTimeout` is raised
        **fields: Unpack[RequestFields],  # of the request; images may be bytes, paths or PIL images
    ) -> OpResult:
        """Make images and wait for them; a task that is cancelled cancels the work on the server too."""
        body = request_body(request, {**fields})
        try:
            async with asyncio.timeout(timeout):
                return await (self._run(body) if on_progress is None else self._watched(body, on_progress))
        except TimeoutError:
            raise WaitTimeout("the time for this request is up") from None

    async def _run(self, body: dict[str, Any]) -> OpResult:
        by_id = isinstance(
            self.target, RunPod
        )  # a server notices when the connection is closed; RunPod has to be told, by the job's id
        job, looks = await self._do(self.target.submit(body) if by_id else self.target.run(body)), 0
        try:
            while job.result is None:
                await asyncio.sleep(self._poll(looks))
                job, looks = await self._do(self.target.job(job.id)), looks + 1
        except BaseException:
            await self._drop(job.id)
            raise
        return job.result

    async def _watched(self, body: dict[str, Any], on_progress: OnProgress) -> OpResult:
        try:
            job = await self._do(self.target.submit(body))
        except RequestFailed as exc:
            return exc.result
        try:
            async for event in self.events(job.id):
                if isinstance(told := on_progress(event), Awaitable):
                    await told
                if event.result is not None:
                    return event.result
        except BaseException:
            await self._drop(job.id)
            raise
        raise ConnectionLost("the events ended without a result")

    async def _drop(self, job_id: str) -> None:
        with suppress(ClientError):
            await asyncio.shield(self.cancel(job_id))

    async def submit(self, request: Request = None, **fields: Unpack[RequestFields]) -> Job:
        """Queue a request and return at once; a `RequestFailed` where it is refused."""
        return await self._do(self.target.submit(request_body(request, {**fields})))

    async def job(self, job_id: str) -> Job:
        """How a job stands, with its result once there is one."""
        return await self._do(self.target.job(job_id))

    async def result(
        self,
        job_id: str,  # of a job that was submitted, by this client or another
        *,
        timeout: float | None = None,  # seconds after which `WaitTimeout` is raised
    ) -> OpResult:
        """Wait for a job that was submitted before; a cancelled wait leaves the work as it is."""
        deadline, looks = _deadline(timeout), 0
        while (result := (await self.job(job_id)).result) is None:
            left = self._left(deadline)
            await asyncio.sleep(self._poll(looks) if left is None else min(self._poll(looks), left))
            looks += 1
        return result

    async def cancel(self, job_id: str) -> Job:
        """Stop a job; a running one stops within one step."""
        return await self._do(self.target.cancel(job_id))

    def events(self, job_id: str) -> AsyncIterator[ProgressEvent]:
        """The events of a job as they come, the last one with the result; a broken connection is taken up again."""
        if isinstance(self.target, RunPod):
            return self._polled(self.target, job_id)
        return self._streamed(job_id)

    async def _streamed(self, job_id: str) -> AsyncIterator[ProgressEvent]:
        failures = 0
        while True:
            seen, broke = 0, None
            try:
                async with self._http.stream("GET", f"/jobs/{job_id}/events", timeout=_STREAM_TIMEOUT) as response:
                    if not response.is_success:
                        await response.aread()
                        raise_for_status(parse_answer(OpResult, response))
                    async with aclosing(EventSource(response).aiter_sse()) as messages:
                        async for message in messages:
                            event = progress_event(message)
                            if event is None:
                                continue
                            seen += 1
                            yield event
                            if event.result is not None:
                                return
            except SSEError as exc:
                raise UnexpectedAnswer(f"{self.target.base} does not stream events: {exc}") from None
            except httpx.TransportError as exc:
                broke = exc
            failures = failures_so_far(failures, seen, broke, self.retries, self.target.base)
            await asyncio.sleep(self.retries.first_pause)

    async def _polled(self, target: RunPod, job_id: str) -> AsyncIterator[ProgressEvent]:
        looks = 0
        while True:
            batch = await self._do(target.stream(job_id))
            for event in batch.events:
                yield event
                if event.result is not None:
                    return
            if batch.ended:
                job = await self.job(job_id)
                if job.result is None:
                    raise UnexpectedAnswer("the job has ended without a result")
                yield ended_event(job)
                return
            await asyncio.sleep(self._poll(looks))
            looks = 0 if batch.events else looks + 1

    async def plan(self, request: Request = None, **fields: Unpack[RequestFields]) -> OpResult:
        """What a request would do, without doing it."""
        return await self._do(self.target.ask("POST", "/plan", OpResult, request_body(request, {**fields})))

    async def preprocess(
        self, request: PreprocessRequest | dict[str, Any] | None = None, **fields: Unpack[PreprocessFields]
    ) -> OpResult:
        """The control map of an image."""
        return await self._do(self.target.ask("POST", "/preprocess", OpResult, request_body(request, {**fields})))

    async def read_prompt(
        self, prompt: str, *, model: str | None = None, prompt_syntax: PromptSyntax | str | None = None
    ) -> PromptReport:
        """The tokens of a prompt, the borders of its chunks, and its mistakes."""
        query = {"prompt": prompt, "model": model, "prompt_syntax": prompt_syntax}
        given = {name: value for name, value in query.items() if value is not None}
        return await self._do(self.target.ask("POST", "/prompt", PromptReport, given))

    async def restore(
        self,
        image: Any = None,  # an image file: bytes, a path, base64 text or a URL
        *,
        parameters: str | None = None,  # prompt, negative prompt and settings as other programs write them
    ) -> OpResult:  # its `restored` holds the request
        """Restore the request that made an image from the image's metadata."""
        return await self._do(self.target.ask("POST", "/restore", OpResult, restore_body(image, parameters)))

    async def models(self) -> ModelList:
        """The models that the server offers."""
        return await self._do(self.target.ask("GET", "/models", ModelList))

    async def memory_info(self) -> MemoryReport:
        """Memory of the server, of its devices and of each loaded model."""
        return await self._do(self.target.ask("GET", "/memory-info", MemoryReport))

    async def health(self) -> Health:
        """How the server is."""
        return await self._do(self.target.ask("GET", "/health", Health))
