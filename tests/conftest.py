"""Pytest options, CPU thread limits, test order, and shared fixtures."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest

# pytest-xdist workers share the CPU cores; more threads than cores slow each other down many times over.
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
    """Exclude imported objects from garbage collection with `gc.freeze`, as they are never freed.

    Each unloaded model runs a collection, which takes a third of a second with them and next to nothing without them.
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
    "A command that runs `-m MODULE` or `-c CODE` like Python, in a forked process with the libraries already imported."
    if sys.platform != "linux":  # macOS system libraries are not fork-safe
        return (sys.executable,)
    return request.getfixturevalue("forked_kernels").python


@pytest.fixture(scope="session")
def quick_kernel(quick_python: tuple[str, ...]) -> tuple[str, ...]:
    "A command that starts a Jupyter kernel in the same way."
    return quick_python if len(quick_python) > 1 else (*quick_python, "-m", "ipykernel_launcher")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, quick_python: tuple[str, ...]) -> Iterator[str]:
    "The URL of a running server: the one given by --server, or a new one."
    if given := request.config.getoption("--server"):
        yield given
        return
    with running_server(quick_python) as url:
        yield url
