"""Which worker of the test run gets what: a module, with what it starts, stays whole; long ones go first."""

from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

NOTEBOOKS = "test_notebooks.py"
FIRST = (  # modules that take longest on one processor
    "test_worker.py",
    "test_web.py",
    "test_widgets.py",
    "test_hooks.py",
    "test_server.py",
    "test_typescript.py",
    "test_families.py",
    "test_command_line.py",
    "test_sweep.py",
    "test_steps.py",
    "test_how_to.py",
    "test_adapters.py",
    "test_receipts.py",
    "test_service.py",
    "test_state.py",
    "test_voila.py",
    "test_kernels.py",
    NOTEBOOKS,
)


def by_length(path: Path) -> int:
    "Sorts tests: the longest modules, the notebooks, and then the short modules, with which workers end together."
    return FIRST.index(path.name) if path.name in FIRST else len(FIRST)


class LongestFirst(LoadScopeScheduling):
    "Gives a worker that has nothing left the next module in the order of the tests, or the next notebook."

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return nodeid if module.endswith(NOTEBOOKS) else module
