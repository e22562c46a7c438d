"""The command line options of the test run, its share of the processors, and what several tests share."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest

# Workers that run side by side share the processors: more threads than processors slow each other down many times over.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(THREADS)

from forked_kernels import nursery
from scheduling import LongestFirst, by_length
from server_process import running_server


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("diffusion_workers")
    group.addoption("--slow", action="store_true", help="run the tests marked slow too")
    group.addoption(
        "--nb-flags",
        default="",
        metavar="FLAGS",
        help='also run notebook cells with these flags: slow, gpu, network (such as --nb-flags "slow gpu")',
    )
    group.addoption(
        "--server",
        metavar="URL",
        help="where a test wants a server of its own process, use this one, which runs already",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: by_length(item.path))
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LongestFirst:
    return LongestFirst(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave what is imported out of garbage collection: it stays.

    The search for garbage, of which each unloaded model makes one, takes a third of a second with it, and nothing
    without it.
    """
    gc.disable()
    found = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return found


@pytest.fixture(scope="session")
def forked_kernels() -> Iterator[type]:
    with nursery({**os.environ, "IN_TEST": "1", "HF_HUB_OFFLINE": "1"}) as manager_class:
        yield manager_class


@pytest.fixture(scope="session")
def quick_python(request: pytest.FixtureRequest) -> tuple[str, ...]:
    "A command that runs `-m MODULE` or `-c CODE` as Python does, in a process that is forked with libraries imported."
    if sys.platform != "linux":  # libraries of macOS do not survive a fork
        return (sys.executable,)
    return request.getfixturevalue("forked_kernels").python


@pytest.fixture(scope="session")
def quick_kernel(quick_python: tuple[str, ...]) -> tuple[str, ...]:
    "A command that starts a kernel in the same way."
    return quick_python if len(quick_python) > 1 else (*quick_python, "-m", "ipykernel_launcher")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, quick_python: tuple[str, ...]) -> Iterator[str]:
    "The address of a running server."
    if given := request.config.getoption("--server"):
        yield given
        return
    with running_server(quick_python) as url:
        yield url
