"""Errors of the client: a failed request is an `OpResult` or a `RequestFailed`, anything else another `ClientError`."""

from .models import ErrorDetail, OpResult, OpStatus


class ClientError(Exception):
    """The base of everything that this client raises on purpose."""


class ServerUnreachable(ClientError):
    """No connection came about; nothing was sent."""


class ConnectionLost(ClientError):
    """The connection broke after the request was sent: whether it was carried out is not known."""


class WaitTimeout(ClientError):
    """The caller's time was up before there was a result; the work was told to stop."""


class UnexpectedAnswer(ClientError):
    """What came back is not what this API answers: another program at that address, or another version of it."""


class NotOffered(ClientError):
    """The target has no such operation: a RunPod endpoint makes images and nothing else."""


class RequestFailed(ClientError):
    """The answer is a refusal or a failure; `result` is all of it."""

    def __init__(self, result: OpResult):
        self.result = result
        super().__init__(result.message or result.status.value)

    @property
    def status(self) -> OpStatus:
        """How it ended."""
        return self.result.status

    @property
    def errors(self) -> list[ErrorDetail]:
        """What exactly was wrong, each with its field, what was given and what is allowed."""
        return self.result.errors or []


class InvalidRequest(RequestFailed):
    """Fields are missing, unknown, of the wrong type or out of range."""


class UnknownModel(RequestFailed):
    """There is no such model."""


class UnsupportedCombination(RequestFailed):
    """The model cannot do these things together."""


class BadImage(RequestFailed):
    """An image of the request cannot be read, or is not allowed."""


class LoraNotFound(RequestFailed):
    """The model offers no such LoRA."""


class ControlnetNotFound(RequestFailed):
    """The model offers no such ControlNet."""


class MissingDependency(RequestFailed):
    """The server lacks a package."""


class ModelUnavailable(RequestFailed):
    """The weights cannot be had, or the server is not up yet."""


class OutOfMemory(RequestFailed):
    """The device's memory was not enough."""


class Cancelled(RequestFailed):
    """Somebody stopped it."""


class TimedOut(RequestFailed):
    """The request's own deadline, or the server's, passed."""


class QueueFull(RequestFailed):
    """Too many wait already."""


class Unauthorized(RequestFailed):
    """The token is missing or wrong."""


class NotFound(RequestFailed):
    """There is no such job or address."""


class InternalError(RequestFailed):
    """The server or the worker failed."""


FAILURES: dict[OpStatus, type[RequestFailed]] = {
    OpStatus.invalid_request: InvalidRequest,
    OpStatus.unknown_model: UnknownModel,
    OpStatus.unsupported_combination: UnsupportedCombination,
    OpStatus.bad_image: BadImage,
    OpStatus.lora_not_found: LoraNotFound,
    OpStatus.controlnet_not_found: ControlnetNotFound,
    OpStatus.missing_dependency: MissingDependency,
    OpStatus.model_unavailable: ModelUnavailable,
    OpStatus.out_of_memory: OutOfMemory,
    OpStatus.cancelled: Cancelled,
    OpStatus.timed_out: TimedOut,
    OpStatus.queue_full: QueueFull,
    OpStatus.unauthorized: Unauthorized,
    OpStatus.not_found: NotFound,
    OpStatus.internal_error: InternalError,
}


def raise_for_status(result: OpResult) -> OpResult:
    """The result itself where it succeeded, else the `RequestFailed` of its status."""
    if result.status == OpStatus.success:
        return result
    raise FAILURES[result.status](result)
