"""Runs every notebook in its own kernel, as a reader would: in its folder, from top to bottom."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from project import name, notebooks

CELL_TIMEOUT_S = 900
FLAGS = {"slow", "gpu", "network"}  # tst_flags of settings.ini
SKIP_TAG = "skip-execution"
DIRECTIVE = re.compile(r"^#\s*\|\s*(.+?)\s*$", re.MULTILINE)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def directives(source: str) -> set[str]:
    "The directives in a cell's `#|` lines, such as {'export', 'slow'} or {'eval: false'}."
    return {re.sub(r"\s*:\s*", ": ", found) for found in DIRECTIVE.findall(source)}


def is_skipped(source: str, wanted: set[str]) -> bool:
    "Whether a cell is skipped: its flag was not requested, or it has `eval: false`."
    found = directives(source)
    return "eval: false" in found or bool((found & FLAGS) - wanted)


def kernel_env(wanted: set[str]) -> dict[str, str]:
    "The environment of the kernel: nbdev_export() does nothing, and there is no network unless requested."
    return {**os.environ, "IN_TEST": "1"} | ({} if "network" in wanted else {"HF_HUB_OFFLINE": "1"})


def report(path: Path, index: int, cell: nbformat.NotebookNode, error: Exception) -> str:
    "Which cell failed, with its source and traceback."
    tracebacks = ["\n".join(out.traceback) for out in cell.get("outputs", []) if out.output_type == "error"]
    details = ANSI.sub("", "\n".join(tracebacks)) or str(error)
    return f"{name(path)}: cell {index} (id {cell.get('id')}) failed\n\n{cell.source}\n\n{details}"


def run_notebook(
    path: Path,
    wanted: set[str],
    **options: object,  # further options of NotebookClient, such as `kernel_manager_class`
) -> None:
    "Run the notebook at `path`; fail the test with a report of the first failing cell."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code" and is_skipped(cell.source, wanted):
            cell.metadata.setdefault("tags", []).append(SKIP_TAG)
    at = {"index": 0}
    failure = None
    client = NotebookClient(
        nb,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        skip_cells_with_tag=SKIP_TAG,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=lambda cell, cell_index: at.update(index=cell_index),
        **options,
    )
    try:
        client.execute(env=kernel_env(wanted))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        failure = report(path, at["index"], nb.cells[at["index"]], error)
    if failure:  # outside of the except block, so that the error is not reported twice
        pytest.fail(failure, pytrace=False)


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_notebook(path: Path, request: pytest.FixtureRequest) -> None:
    wanted = set(request.config.getoption("--nb-flags").split())
    if unknown := wanted - FLAGS:
        pytest.fail(f"--nb-flags knows {sorted(FLAGS)}, not {sorted(unknown)}", pytrace=False)
    if wanted or sys.platform != "linux":  # macOS libraries are not fork-safe
        run_notebook(path, wanted)
    else:
        run_notebook(
            path,
            wanted,
            kernel_manager_class=request.getfixturevalue("forked_kernels"),
            shutdown_kernel="immediate",  # a forked kernel has no cleanup to do, and a graceful shutdown takes 0.3 s
        )


@pytest.mark.parametrize("path", [path for path in notebooks() if path.parent.name == "tutorials"], ids=name)
def test_tutorials_have_no_flagged_cells(path: Path) -> None:
    "Readers press Run All: a cell that needs a GPU, the Hub or a lot of time must skip itself, not rely on a flag."
    cells = nbformat.read(path, as_version=4).cells
    flagged = [
        cell.id for cell in cells if cell.cell_type == "code" and directives(cell.source) & (FLAGS | {"eval: false"})
    ]
    assert not flagged, (
        f"{name(path)}: the cells {flagged} have flags: let them skip themselves, with the reason as output"
    )


def write_notebook(folder: Path, *sources: str) -> Path:
    path = folder / "made.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]), path)
    return path


def test_failing_cells_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_notebooks.name", lambda path: path.name)
    path = write_notebook(
        tmp_path,
        "import os, pathlib",
        "#| slow\nraise ValueError",
        "#| eval: false\nraise ValueError",
        "assert os.environ['IN_TEST'] == '1'\nassert pathlib.Path('made.ipynb').exists()",
        "x = 1 / 0",
    )
    with pytest.raises(pytest.fail.Exception) as caught:
        run_notebook(path, wanted=set())
    for part in ("made.ipynb: cell 4 (id ", "x = 1 / 0", "ZeroDivisionError: division by zero"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "source, wanted, skipped",
    [
        ("1 + 1", "", False),
        ("#| slow\n1 + 1", "", True),
        ("#| slow\n1 + 1", "slow", False),
        ("#|gpu\n#| slow\n1 + 1", "slow", True),
        ("#| eval:false\n1 + 1", "slow gpu network", True),
        ("#| export\nslow = 1", "", False),
    ],
)
def test_cells_are_skipped_by_their_flags(source: str, wanted: str, skipped: bool) -> None:
    assert is_skipped(source, set(wanted.split())) == skipped
