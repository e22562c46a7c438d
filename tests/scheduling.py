"""pytest-xdist scheduling: a module stays on one worker, with what it starts; the longest modules run first."""

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
    "Sort key: the longest modules, notebooks, then short modules, so that all workers finish at about the same time."
    return FIRST.index(path.name) if path.name in FIRST else len(FIRST)


class LongestFirst(LoadScopeScheduling):
    "Give an idle worker the next module in test order, or the next notebook."

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return nodeid if module.endswith(NOTEBOOKS) else module
