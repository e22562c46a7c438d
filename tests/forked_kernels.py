"""Kernels that are forked from a process with the large libraries imported, so that each notebook starts faster.

The nursery imports third-party libraries, runs nothing, and forks a child for every kernel. Names, modules of this
project and the state of the libraries are as new as in a kernel that was started by itself. Run as a program, this
file is the nursery (`serve SOCKET`), or the process that Jupyter starts as a kernel (`run SOCKET -f FILE`). The latter
requests a child, forwards signals to it, and ends with it.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "peft",
    "matplotlib.pyplot",
    "ipywidgets",
    "anywidget",
    "IPython",
    "ipykernel.kernelapp",
    "fastcore.all",
)
CLASSES = (
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLControlNetPipeline",
    "FluxControlNetPipeline",
)  # diffusers imports its modules on first use
INTERRUPT = b"i"


def _forward_interrupts(connection: socket.socket) -> None:  # in a child
    "Interrupt this kernel on request, and end it when the process that requested it ends."
    while connection.recv(1) == INTERRUPT:
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(1)


def _be_kernel(connection: socket.socket, outputs: list[int]) -> None:  # in a child; does not return
    os.setsid()
    asked = json.loads(connection.makefile("rb", buffering=0).readline())
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(output, number)
        os.close(output)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = ["ipykernel_launcher", *asked["arguments"]]
    for name in ("random", "numpy.random"):  # a fork has its parent's state
        sys.modules[name].seed()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Thread(target=_forward_interrupts, args=[connection], daemon=True).start()
    from ipykernel.kernelapp import IPKernelApp

    try:
        IPKernelApp.launch_instance(argv=asked["arguments"])
    finally:
        sys.stdout.flush()
        os._exit(0)


def serve(path: str) -> None:
    "Import the libraries, and fork a kernel for each connection, until standard input ends."
    import importlib

    sys.path.pop(0)  # this folder
    for name in LIBRARIES:
        importlib.import_module(name)
    diffusers = sys.modules["diffusers"]
    for name in CLASSES:
        getattr(diffusers, name)
    assert threading.active_count() == 1, f"a thread does not survive a fork: {threading.enumerate()}"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
        if os.fork() == 0:
            listener.close()
            _be_kernel(connection, outputs)
        connection.close()
        for output in outputs:
            os.close(output)


def run(path: str, arguments: list[str]) -> None:
    "Request a kernel from the nursery and act as its process."
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    signal.signal(signal.SIGINT, lambda *_: connection.send(INTERRUPT))
    environment = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}
    asked = {"arguments": arguments, "cwd": os.getcwd(), "env": environment}
    socket.send_fds(connection, [b" "], [1, 2])
    connection.sendall(json.dumps(asked).encode() + b"\n")
    while connection.recv(1):
        pass


@contextmanager
def nursery(environment: dict[str, str]) -> Iterator[type]:  # the environment of every kernel
    "A class of kernel managers whose kernels are forked."
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "nursery")
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", path],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        class ForkedKernelManager(AsyncKernelManager):
            kernel_spec = KernelSpec(
                argv=[sys.executable, "-S", "-E", __file__, "run", path, "-f", "{connection_file}"],
                display_name="Python 3 (forked)",
                language="python",
            )

        try:
            assert process.stdout.readline() == "ready\n", "the process that forks kernels did not start"
            yield ForkedKernelManager
        finally:
            process.communicate("", timeout=60)


if __name__ == "__main__":
    _, command, socket_path, *rest = sys.argv
    if command == "serve":
        serve(socket_path)
    else:
        run(socket_path, rest)
