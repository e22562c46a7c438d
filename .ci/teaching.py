#!/usr/bin/env python
"""Counts of how each notebook explains what it exports, and a ratchet on them.

python .ci/teaching.py             print the table; exit 1 where a notebook or chapter is over its limit
python .ci/teaching.py --tighten   the same, and lower the limits of .ci/teaching.json to what is there now

Words are those of Markdown cells outside of code blocks. Exported lines are those of `#| export` cells, without blank
lines, directives and imports. A live cell is a visible code cell that is not exported and shows an output.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, LIMITS = ROOT / "nbs", Path(__file__).with_suffix(".json")
MAX_RUN = 60  # exported lines without a live cell, in a notebook without an entry in the limits
ENOUGH_WORDS = 4.0  # for each exported line: no chapter has to have more
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)", re.MULTILINE)
EXPORTS, HIDDEN = {"export", "exports", "exporti"}, {"hide", "hide_output", "default_exp"}


@dataclass(frozen=True)
class Counts:
    "How one notebook explains what it exports."

    notebook: str  # path below nbs/, without the ending
    words: int  # of prose
    exported: int  # lines
    longest_run: int  # exported lines without a live cell
    before_first: int  # exported lines before the first live cell

    @property
    def words_per_line(self) -> float:
        return self.words / self.exported if self.exported else 0.0

    @property
    def chapter(self) -> str:
        return self.notebook.partition("/")[0]


def prose_words(text: str) -> int:
    "The words of a Markdown cell, outside of its code blocks."
    return len(re.findall(r"[^\W_][\w'\u2019-]*", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)))


def is_import(node: ast.stmt) -> bool:
    "An import, or an `if TYPE_CHECKING:` that holds imports."
    guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return guarded or isinstance(node, ast.Import | ast.ImportFrom)


def exported_lines(source: str) -> int:
    "The lines of an exported cell that are to be explained: no blank lines, no directives, no imports."
    imports = {
        number
        for node in ast.parse(source).body
        if is_import(node)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return sum(
        bool(line.strip()) and not line.startswith("#|")
        for number, line in enumerate(source.splitlines(), start=1)
        if number not in imports
    )


def count_notebook(
    cells: list[dict],  # of the notebook's JSON
    name: str = "",
) -> Counts:
    "Count one notebook."
    words = exported = run = longest = 0
    before_first = None
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += prose_words(source)
            continue
        if cell["cell_type"] != "code":
            continue
        directives = set(DIRECTIVE.findall(source))
        if directives & EXPORTS:
            lines = exported_lines(source)
            exported, run = exported + lines, run + lines
            longest = max(longest, run)
        elif cell.get("outputs") and not directives & HIDDEN:
            before_first = exported if before_first is None else before_first
            run = 0
    return Counts(name, words, exported, longest, exported if before_first is None else before_first)


def all_counts(nbs: Path = NBS) -> Iterator[Counts]:
    "The counts of every notebook, in reading order."
    for path in sorted(nbs.rglob("*.ipynb")):
        below = path.relative_to(nbs)
        if not any(part.startswith((".", "_")) for part in below.parts):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            yield count_notebook(cells, below.with_suffix("").as_posix())


def chapter_words(counts: list[Counts]) -> dict[str, float]:
    "Words for each exported line, of each chapter that exports something; its index, which is generated, is left out."
    totals: dict[str, list[int]] = {}
    for one in counts:
        if one.notebook.endswith("/index"):
            continue
        words, exported = totals.setdefault(one.chapter, [0, 0])
        totals[one.chapter] = [words + one.words, exported + one.exported]
    return {chapter: words / exported for chapter, (words, exported) in totals.items() if exported}


def rounded_down(words: float) -> float:
    return min(ENOUGH_WORDS, int(words * 10) / 10)


def too_much(counts: list[Counts], limits: dict[str, dict]) -> list[str]:
    "What is over a limit, and limits that are not needed any more."
    runs, words, found = limits["longest_run"], limits["words_per_line"], []
    present = {one.notebook: one for one in counts}
    for one in counts:
        limit = max(MAX_RUN, runs.get(one.notebook, 0))
        if one.longest_run > limit:
            found.append(f"{one.notebook}: {one.longest_run} exported lines without a live cell, the limit is {limit}")
    for chapter, ratio in chapter_words(counts).items():
        limit = words.get(chapter, ENOUGH_WORDS)
        if ratio < limit:
            found.append(f"{chapter}: {ratio:.2f} words for each exported line, the limit is {limit}")
    for name in runs:
        if name not in present or present[name].longest_run <= MAX_RUN:
            found.append(f"{name}: needs no limit of its own, run python .ci/teaching.py --tighten")
    return found


def tightened(counts: list[Counts], limits: dict[str, dict]) -> dict[str, dict]:
    "The limits, none of them looser than before, as tight as the notebooks allow."
    longest = {one.notebook: one.longest_run for one in counts}
    runs = {name: min(limit, longest.get(name, 0)) for name, limit in limits["longest_run"].items()}
    words = {
        chapter: max(rounded_down(ratio), limits["words_per_line"].get(chapter, ENOUGH_WORDS))
        for chapter, ratio in chapter_words(counts).items()
    }
    return {
        "longest_run": {name: limit for name, limit in sorted(runs.items()) if limit > MAX_RUN},
        "words_per_line": {chapter: limit for chapter, limit in sorted(words.items()) if limit < ENOUGH_WORDS},
    }


def table(counts: list[Counts]) -> str:
    "The counts as aligned text: every notebook, then the chapters."
    width = max(len(one.notebook) for one in counts)
    rows = [f"{'notebook':{width}}  words  exported  words/line  longest run  before first"]
    for one in counts:
        ratio = f"{one.words_per_line:10.1f}" if one.exported else f"{'-':>10}"
        figures = f"{one.words:5}  {one.exported:8}  {ratio}  {one.longest_run:11}  {one.before_first:12}"
        rows.append(f"{one.notebook:{width}}  {figures}")
    rows.append(f"\n{'chapter':{width}}  words/line")
    rows += [f"{chapter:{width}}  {ratio:10.1f}" for chapter, ratio in chapter_words(counts).items()]
    return "\n".join(rows)


def main() -> int:  # the exit code
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tighten", action="store_true", help="lower the limits to what is there now")
    tighten = parser.parse_args().tighten
    limits, counts = json.loads(LIMITS.read_text(encoding="utf-8")), list(all_counts())
    print(table(counts))
    if tighten:
        limits = tightened(counts, limits)
        LIMITS.write_text(json.dumps(limits, indent=2) + "\n", encoding="utf-8")
    found = too_much(counts, limits)
    print("", *found, f"notebooks and chapters over a limit: {len(found)}", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
