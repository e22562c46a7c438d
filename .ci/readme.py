#!/usr/bin/env python
"""Makes README.md from nbs/index.ipynb: its visible cells and outputs, with links that hold from the top level.

python .ci/readme.py           write README.md and the images it shows
python .ci/readme.py --check   write nothing; exit 1 and show a diff where README.md is stale
"""

import argparse
import base64
import difflib
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
INDEX = "nbs/index.ipynb"
IMAGES = "nbs/readme_files"  # not at the top level, which stays small
HEADER = f"<!-- made from {INDEX} by .ci/readme.py: edit the notebook -->\n\n"
DIRECTIVE = re.compile(r"^#\s*\|\s*(.+?)\s*$\n?", re.MULTILINE)
PRIORITY = ["image/png", "image/jpeg", "image/svg+xml", "text/markdown", "text/html", "text/latex", "text/plain"]
HIDING = {"hide", "include: false"}
EMBEDDED = re.compile(r"data:image/([a-z]+);base64,([A-Za-z0-9+/=]+)")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")


def is_hidden(cell: nbformat.NotebookNode) -> bool:
    return bool({re.sub(r"\s*:\s*", ": ", said) for said in DIRECTIVE.findall(cell.source)} & HIDING)


def from_top_level(match: re.Match) -> str:
    "A link of the notebook, as it reads from the top level."
    return f"]({posixpath.normpath(posixpath.join(posixpath.dirname(INDEX), match[1]))})"


def visible(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The notebook without hidden cells, `#|` lines and what was written to stderr."
    nb.cells = [cell for cell in nb.cells if not is_hidden(cell)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = DIRECTIVE.sub("", cell.source)
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        else:
            cell.source = LINK.sub(from_top_level, cell.source)
    nb.metadata.language_info = {"name": "python"}
    return nb


def embedded_to_files(text: str, files: dict[str, bytes]) -> str:
    "The text with images in `files` where it held them as data URIs, which code hosts do not show."

    def to_file(match: re.Match) -> str:
        path = f"{IMAGES}/readme_embedded_{len(files)}.{match[1]}"
        files[path] = base64.b64decode(match[2])
        return path

    return EMBEDDED.sub(to_file, text)


def readme_files() -> dict[str, bytes]:
    "What the notebook makes: README.md and its images, by their path."
    nb = visible(nbformat.read(ROOT / INDEX, as_version=4))
    exporter = MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": PRIORITY}}))
    text, resources = exporter.from_notebook_node(nb, resources={"output_files_dir": IMAGES, "unique_key": "readme"})
    files = dict(resources["outputs"])
    text = embedded_to_files(text, files)
    text = re.sub(r"\n[ \n]*\n", "\n\n", text).strip() + "\n"
    return {"README.md": (HEADER + text).encode(), **files}


def present_files() -> dict[str, bytes]:
    paths = [
        ROOT / "README.md",
        *sorted((ROOT / IMAGES).glob("readme*")),
    ]  # beside them lie images of other origin, such as screenshots
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths if path.exists()}


def show_difference(made: dict[str, bytes], present: dict[str, bytes]) -> None:
    for path in sorted({*made, *present}):
        if made.get(path) == present.get(path):
            continue
        print(f"{path} is not in step with {INDEX}: run `python .ci/readme.py`")
        if path == "README.md":
            old, new = (side.get(path, b"").decode().splitlines() for side in (present, made))
            print(*difflib.unified_diff(old, new, "README.md", "README.md (expected)", lineterm="", n=1), sep="\n")


def write(made: dict[str, bytes], present: dict[str, bytes]) -> None:
    for path in set(present) - set(made):
        (ROOT / path).unlink()
    for path, data in made.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where README.md is stale")
    made, present = readme_files(), present_files()
    if not parser.parse_args().check:
        write(made, present)
        return 0
    show_difference(made, present)
    return int(made != present)


if __name__ == "__main__":
    sys.exit(main())
