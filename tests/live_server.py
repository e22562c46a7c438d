"""A server on a free local port, in a thread of the test process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from diffusion_workers.server.app import create_app
from diffusion_workers.server.process import address_of, listening_socket, patient_protocol
from diffusion_workers.settings.server import ServerSettings

PATIENCE = 300  # seconds until something counts as stuck; never a measure of speed
INPUTS = sorted((Path(__file__).resolve().parent.parent / "diffusion_workers" / "test_inputs").glob("*.json"))


class KeptOpen:
    "A service that several applications share in turn; closing an application does not close it."

    def __init__(self, service):
        self._service = service

    def __getattr__(self, name: str):
        return getattr(self._service, name)

    def close(self) -> None:
        pass


@contextmanager
def serving(app: FastAPI, head_seconds: float = 60.0) -> Iterator[str]:  # the address
    "Serve an ASGI application on a real socket."
    with listening_socket("127.0.0.1", 0) as listening:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=patient_protocol(head_seconds),
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=60,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield address_of(listening)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server does not stop"


@contextmanager
def live_server(service, **settings) -> Iterator[tuple[str, FastAPI]]:  # the address, and the application
    "Run the server for a service, with these settings."
    app = create_app(KeptOpen(service), ServerSettings(**{"warm_up": False} | settings))
    with serving(app, settings.get("receive_timeout", 60.0)) as url:
        yield url, app
