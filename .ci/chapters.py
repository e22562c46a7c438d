#!/usr/bin/env python
"""Writes what follows from the chapters' folders: the list of modules in each chapter's index, and the sidebar.

python .ci/chapters.py           write nbs/*/index.ipynb and _quarto.yml where they are stale
python .ci/chapters.py --check   write nothing; exit 1 and name what is stale
"""

import argparse
import json
import re
import sys
from pathlib import Path

import structure
from structure import NBS, ROOT

CELL_ID = "modules"  # of the cell in each index that this script writes
SIDEBAR = re.compile(r"(?<=    contents:\n      - index\.ipynb\n).*\Z", re.DOTALL)


def chapter_folders() -> list[Path]:
    "The chapters in reading order."
    return sorted(folder for folder in NBS.iterdir() if folder.is_dir() and re.match(r"\d\d_", folder.name))


def chapter_notebooks(folder: Path) -> list[Path]:
    "The notebooks of a chapter in reading order, without its index."
    return sorted(path for path in folder.glob("*.ipynb") if path.name != "index.ipynb")


def title_and_subtitle(path: Path) -> tuple[str, str]:
    "The H1 of a notebook, and the line below it, which is the module's docstring."
    text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    title, subtitle = re.search(r"^# (.+)$", text, re.MULTILINE), re.search(r"^> (.+)$", text, re.MULTILINE)
    if not title or not subtitle:
        raise SystemExit(f"{path.relative_to(ROOT)}: the first cell must hold '# Title' and '> one line'")
    return title[1].strip(), subtitle[1].strip()


def module_of(path: Path) -> str | None:
    "The module that a notebook exports."
    return next((module.name for module in structure.exported_modules() if module.notebook == path), None)


def diagram(folder: Path) -> str:
    "The imports between the modules of a chapter, and the chapters that it uses, as a Mermaid graph."
    modules = [module for module in structure.exported_modules() if module.notebook.parent == folder]
    own = {module.name for module in modules}
    inside, outside = set(), set()
    for module in modules:
        for _, target in structure.imported_modules(module.path.read_text(encoding="utf-8"), module.name):
            if target in own:
                inside.add((target.split(".")[-1], module.name.split(".")[-1]))
            elif "." in target:
                outside.add(target.split(".")[0])
    if len(modules) < 2:
        return ""
    names = [f"    {module.name.split('.')[-1]}" for module in modules]
    arrows = [f"    {a} --> {b}" for a, b in sorted(inside)]
    order = {chapter.name.split("_", 1)[1]: chapter.name for chapter in chapter_folders()}
    used = sorted(outside & set(order), key=order.__getitem__)
    below = (
        "\n\nIt builds on " + ", ".join(f"[{name}](../{order[name]}/index.ipynb)" for name in used) + "."
        if used
        else ""
    )
    return "\n\n```mermaid\ngraph LR\n" + "\n".join([*names, *arrows]) + "\n```" + below


def modules_text(folder: Path) -> str:
    "The cell of a chapter's index that lists its notebooks."
    rows = []
    for path in chapter_notebooks(folder):
        title, subtitle = title_and_subtitle(path)
        module = module_of(path)
        rows.append(f"| [{title}]({path.name}) | {f'`{module}`' if module else '-'} | {subtitle} |")
    table = "\n".join(["| notebook | module | what it is for |", "|---|---|---|", *rows])
    return f"## Notebooks, in reading order\n\n{table}{diagram(folder)}"


def index_text(path: Path) -> str:
    "The index notebook of a chapter as it should be."
    nb = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in nb["cells"] if cell["id"] == CELL_ID]
    if len(cells) != 1:
        raise SystemExit(
            f"{path.relative_to(ROOT)}: one Markdown cell with the id {CELL_ID!r} is needed, for the list of modules"
        )
    cells[0]["source"] = modules_text(path.parent).splitlines(keepends=True)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def sidebar_text() -> str:
    "_quarto.yml as it should be."
    lines = ["      - overview.ipynb"]
    tutorials = sorted((NBS / "tutorials").glob("*.ipynb"))
    sections = [("Tutorials", tutorials)] + [
        (title_and_subtitle(folder / "index.ipynb")[0], [folder / "index.ipynb", *chapter_notebooks(folder)])
        for folder in chapter_folders()
    ]
    for title, paths in sections:
        lines += [f"      - section: {title}", "        contents:"]
        lines += [f"          - {path.relative_to(NBS).as_posix()}" for path in paths]
    return SIDEBAR.sub(
        "\n".join(lines).replace("\\", "\\\\") + "\n", (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    )


def wanted_files() -> dict[Path, str]:
    missing = [folder.name for folder in chapter_folders() if not (folder / "index.ipynb").exists()]
    if missing:
        raise SystemExit(f"these chapters have no index.ipynb: {', '.join(missing)}")
    return {ROOT / "_quarto.yml": sidebar_text()} | {
        folder / "index.ipynb": index_text(folder / "index.ipynb") for folder in chapter_folders()
    }


def main() -> int:  # the exit code
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is stale")
    check = parser.parse_args().check
    stale = [path for path, text in wanted_files().items() if path.read_text(encoding="utf-8") != text]
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run python .ci/chapters.py")
        return 1 if stale else 0
    for path, text in wanted_files().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
