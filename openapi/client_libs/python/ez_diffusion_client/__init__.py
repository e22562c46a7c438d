"""The requests and responses of diffusion_workers, and a client for its local server and its RunPod worker."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import models
from ._version import __version__

if TYPE_CHECKING:
    from .client import AsyncClient, Client, Retries
    from .errors import ClientError, RequestFailed, raise_for_status
    from .images import image_bytes, pil_images
    from .receipts import ReceiptImage, save_images
    from .targets import RunPod, Server

# A program that only builds requests does not read httpx: these come when they are first asked for.
_HOMES = {
    "AsyncClient": "client",
    "Client": "client",
    "Retries": "client",
    "ClientError": "errors",
    "RequestFailed": "errors",
    "raise_for_status": "errors",
    "image_bytes": "images",
    "pil_images": "images",
    "RunPod": "targets",
    "Server": "targets",
    "ReceiptImage": "receipts",
    "save_images": "receipts",
}
__all__ = [  # spelled out, for type checkers
    "AsyncClient",
    "Client",
    "ClientError",
    "ReceiptImage",
    "RequestFailed",
    "Retries",
    "RunPod",
    "Server",
    "__version__",
    "image_bytes",
    "models",
    "pil_images",
    "raise_for_status",
    "save_images",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
