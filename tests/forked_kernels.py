"""Kernels and programs that start faster: they are forked from a process that has imported the large libraries.

The nursery imports third-party libraries, runs nothing, and forks a child for every kernel or program. Namespaces,
modules of this project and library state are as fresh in a child as in a newly started process. Run as a program, this
file is the nursery (`serve SOCKET`), the process that Jupyter starts as a kernel (`run SOCKET -f FILE`), or a stand-in
for Python (`run SOCKET -m MODULE ARGUMENTS` and `run SOCKET -c CODE ARGUMENTS`). The latter two request a child,
forward signals to it, and end with it.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "peft",
    "scipy.stats",
    "matplotlib.pyplot",
    "ipywidgets",
    "anywidget",
    "IPython",
    "ipykernel.kernelapp",
    "fastcore.all",
    "pydantic_settings",
    "cachetools",
    "httpx",
    "fastapi",
    "uvicorn",
)
CLASSES = (
    "StableDiffusionPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "FluxControlNetPipeline",
    "Flux2KleinPipeline",
    "ZImagePipeline",
    "QwenImagePipeline",
    "ChromaPipeline",
    "AdaptiveProjectedGuidance",
)  # diffusers imports its modules on first use
FORWARDED = (signal.SIGINT, signal.SIGTERM)


def _as_asked(connection: socket.socket, streams: list[int]) -> dict:  # in a child
    "Adopt streams, environment and working directory of the requesting process; return what it requests."
    asked = json.loads(connection.makefile("rb", buffering=0).readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    for name in ("random", "numpy.random"):  # a fork has its parent's state
        sys.modules[name].seed()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    return asked


# --- kernels ----------------------------------------------------------------


def _forward_interrupts(connection: socket.socket) -> None:  # in a child
    "Interrupt this kernel on request, and end it when the process that requested it ends."
    while connection.recv(1) == bytes([signal.SIGINT]):
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(1)


def _be_kernel(connection: socket.socket, arguments: list[str]) -> None:  # in a child; does not return
    os.setsid()
    sys.argv = ["ipykernel_launcher", *arguments]
    threading.Thread(target=_forward_interrupts, args=[connection], daemon=True).start()
    from ipykernel.kernelapp import IPKernelApp

    try:
        IPKernelApp.launch_instance(argv=arguments)
    finally:
        sys.stdout.flush()
        os._exit(0)


# --- programs ---------------------------------------------------------------


def _run_program(arguments: list[str]) -> int:  # in a child
    "Run `-m MODULE` or `-c CODE` like Python; return the exit status."
    way, program, *rest = arguments
    sys.argv = [way, *rest]
    sys.path.insert(0, os.getcwd() if way == "-m" else "")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
    status = 0
    try:
        if way == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    return status


def _be_program(connection: socket.socket, arguments: list[str]) -> None:  # in a child; does not return
    "Run the program in a child, forward signals, report its exit status, and kill it if the requester disconnects."
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, interrupted)
        for number in (ended, wakes, connection.detach()):
            os.close(number)
        os._exit(_run_program(arguments) & 0xFF)
    for number in (0, 1, 2):  # readers of the program's output must not wait for this process
        os.close(number)
    while True:
        ready = select.select([connection, ended], [], [])[0]
        if ended in ready:
            os.read(ended, 64)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                connection.sendall(b"%d" % os.waitstatus_to_exitcode(status))
                os._exit(0)
        if connection in ready:
            wanted = connection.recv(1)
            os.kill(child, wanted[0] if wanted else signal.SIGKILL)
            if not wanted:
                os.waitpid(child, 0)
                os._exit(1)


# --- the nursery and its clients --------------------------------------------


def serve(path: str) -> None:
    "Import the libraries, and fork a kernel or a program for each connection, until standard input ends."
    gc.disable()
    sys.path.pop(0)  # this folder
    for name in LIBRARIES:
        importlib.import_module(name)
    diffusers = sys.modules["diffusers"]
    for name in CLASSES:
        getattr(diffusers, name)
    assert threading.active_count() == 1, f"a thread does not survive a fork: {threading.enumerate()}"
    gc.collect()
    gc.freeze()  # children do not scan imported objects for garbage again and again
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        if os.fork() == 0:
            listener.close()
            arguments = _as_asked(connection, streams)["arguments"]
            (_be_program if arguments[0] in ("-m", "-c") else _be_kernel)(connection, arguments)
        connection.close()
        for stream in streams:
            os.close(stream)


def run(path: str, arguments: list[str]) -> int:
    "Request a kernel or a program from the nursery, act as its process, and return the exit status."
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    for number in FORWARDED:
        signal.signal(number, lambda got, _: connection.send(bytes([got])))
    environment = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}
    asked = {"arguments": arguments, "cwd": os.getcwd(), "env": environment}
    socket.send_fds(connection, [b" "], [0, 1, 2])
    connection.sendall(json.dumps(asked).encode() + b"\n")
    said = b""
    try:
        while part := connection.recv(16):
            said += part
    except ConnectionResetError:  # the child was killed before it had read everything
        pass
    status = int(said or 0)
    if status < 0:  # by a signal
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


@contextmanager
def nursery(environment: dict[str, str]) -> Iterator[type]:  # the environment of every kernel
    "A class of kernel managers whose kernels are forked; its `python` is a command that runs programs in forks."
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
            python = (sys.executable, "-S", "-E", __file__, "run", path)
            kernel_spec = KernelSpec(
                argv=[*python, "-f", "{connection_file}"],
                env={"QUICK_PYTHON": shlex.join(python)},  # for programs that notebooks start with test helpers
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
        sys.exit(run(socket_path, rest))
