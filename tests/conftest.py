"""The command line options of the test run, its share of the processors, and the server that several tests share."""

import os
from collections.abc import Iterator

import pytest

# Workers that run side by side share the processors: more threads than processors slow each other down many times over.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(THREADS)

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
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    "The address of a running server."
    if given := request.config.getoption("--server"):
        yield given
        return
    with running_server() as url:
        yield url
