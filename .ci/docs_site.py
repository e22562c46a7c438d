#!/usr/bin/env python
"""Builds the documentation site from the notebooks, docs/ and the code, and fails on a broken link.

python .ci/docs_site.py [FOLDER]   FOLDER gets the site; default: _docs/site

Notebooks are not run: their committed outputs are shown. The pages of the reference are made from the classes that read
the settings, the command line, manifests and requests. Something that has no description stops the build.
"""

import argparse
import configparser
import html
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import nbformat
import reference
import yaml
from chapters import ROOT, chapter_folders, chapter_notebooks, title_and_subtitle
from nbconvert import MarkdownExporter
from pygments.formatters import HtmlFormatter

NBS, DOCS, SOURCE = ROOT / "nbs", ROOT / "docs", ROOT / "_docs" / "source"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
HIDDEN = re.compile(r"^#\|\s*(?:hide|default_exp)\b", re.MULTILINE)
DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MERMAID = "11.17.2"  # version on npm
FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.MULTILINE | re.DOTALL)


def repository() -> str:
    "The address of the files of this repository, for links to what is not a page."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}"


def site_path(path: Path) -> PurePosixPath | None:
    "Where a file of the repository is on the site; None for one that is not there."
    if path == ROOT / "CHANGELOG.md":
        return PurePosixPath("CHANGELOG.md")
    if path.is_relative_to(DOCS):
        return PurePosixPath(path.relative_to(DOCS).as_posix())
    if path.is_relative_to(NBS) and path.suffix == ".ipynb":
        return PurePosixPath(path.relative_to(NBS).with_suffix(".md").as_posix())
    if path.is_relative_to(NBS) and path.suffix in (".png", ".svg", ".jpg", ".webp"):
        return PurePosixPath(path.relative_to(NBS).as_posix())
    return None


def with_site_links(
    text: str,
    page: Path,  # in the repository
    own_files: Collection[str] = (),  # links that stay as they are
) -> str:
    "The text of a page, with its links to files of the repository as links on the site, outside of code blocks."

    def replaced(match: re.Match) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or target in own_files or re.match(r"[a-z]+:|/|attachment:", target):
            return match[0]
        path = Path(os.path.normpath(page.parent / target))
        on_site = site_path(path)
        if on_site is None:
            if not path.exists() or not path.is_relative_to(ROOT):
                raise SystemExit(f"{page.relative_to(ROOT)}: the link to {match[2]} leads nowhere")
            return f"{match[1]}{repository()}/{path.relative_to(ROOT).as_posix()}{match[3]}"
        own = site_path(page)
        shown = os.path.relpath(on_site, own.parent if own else ".")
        return f"{match[1]}{shown}{'#' + anchor if anchor else ''}{match[3]}"

    parts = FENCE.split(text)
    return "".join(part if index % 2 else LINK.sub(replaced, part) for index, part in enumerate(parts))


def with_diagrams(text: str) -> str:
    "The text of a page, with its diagrams as Mermaid looks for them."
    return DIAGRAM.sub(lambda found: f'<pre class="mermaid">\n{html.escape(found[1])}</pre>', text)


def mermaid() -> Path | None:
    "The script that draws diagrams, downloaded once; None where npm cannot."
    script = ROOT / "_docs" / f"mermaid-{MERMAID}.js"
    if not script.exists():
        script.parent.mkdir(exist_ok=True)
        try:
            subprocess.run(
                ["npm", "pack", "--silent", f"mermaid@{MERMAID}"],
                cwd=script.parent,
                check=True,
                capture_output=True,
                timeout=120,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        package = script.parent / f"mermaid-{MERMAID}.tgz"
        with tarfile.open(package) as packed:
            content = packed.extractfile("package/dist/mermaid.min.js")
            if content is None:
                return None
            script.write_bytes(content.read())
        package.unlink()
    return script


def add_assets(config: dict) -> None:
    "Colors for code, tables that wrap, and the script for diagrams."
    (SOURCE / "assets").mkdir()
    style = HtmlFormatter(style="default").get_style_defs(".highlight")
    layout = (
        ".wy-nav-content {max-width: 1000px} .wy-table-responsive table td {white-space: normal} "
        ".rst-content .highlight pre {border: 0; margin: 0}"
    )
    (SOURCE / "assets" / "site.css").write_text(f"{style}\n{layout}\n", encoding="utf-8")
    config["extra_css"] = ["assets/site.css"]
    script = mermaid()
    if script is None:
        print("npm could not download mermaid: diagrams are shown as text", file=sys.stderr)
        return
    shutil.copy(script, SOURCE / "assets" / "mermaid.js")
    start = 'mermaid.initialize({startOnLoad: true, securityLevel: "strict"});'
    (SOURCE / "assets" / "diagrams.js").write_text(start, encoding="utf-8")
    config["extra_javascript"] = ["assets/mermaid.js", "assets/diagrams.js"]


def write_notebook(path: Path, export: MarkdownExporter) -> None:
    "The Markdown page of a notebook, without hidden cells and directives."
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [c for c in notebook.cells if not (c.cell_type == "code" and HIDDEN.search(c.source))]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    page = SOURCE / site_path(path)
    files = f"{page.stem}_files"
    body, resources = export.from_notebook_node(
        notebook, {"output_files_dir": files, "unique_key": page.stem, "metadata": {"name": page.stem}}
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, data in resources["outputs"].items():
        (page.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (page.parent / name).write_bytes(data)
    text = with_site_links(body, path, resources["outputs"])
    page.write_text(with_diagrams(text), encoding="utf-8")


def navigation() -> list[dict]:
    "The pages in reading order."

    def entry(path: Path) -> dict:
        return {title_and_subtitle(path)[0]: str(site_path(path))}

    how_tos = sorted((DOCS / "how-to").glob("*.md"))
    first = [DOCS / "how-to" / "index.md"]
    tutorials = sorted((NBS / "tutorials").glob("*.ipynb"))
    chapters = [
        {title_and_subtitle(f / "index.ipynb")[0]: [entry(path) for path in (f / "index.ipynb", *chapter_notebooks(f))]}
        for f in chapter_folders()
    ]
    return [
        {"Home": "index.md"},
        {"Overview": "overview.md"},
        {"Tutorials": [entry(path) for path in tutorials]},
        {"How-to": [str(site_path(path)) for path in first + [path for path in how_tos if path not in first]]},
        {"Reference": [f"reference/{name}" for name in reference.PAGES]},
        {"How it is built": chapters},
        {"Changelog": "CHANGELOG.md"},
    ]


def write_source() -> None:
    "The Markdown files that the site is built from."
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    export = MarkdownExporter()
    for path in sorted(NBS.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
        if hidden or not path.is_file() or site_path(path) is None:
            continue
        if path.suffix == ".ipynb":
            write_notebook(path, export)
            continue
        (SOURCE / site_path(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, SOURCE / site_path(path))
    for path in [*DOCS.rglob("*.md"), ROOT / "CHANGELOG.md"]:
        (SOURCE / site_path(path)).parent.mkdir(parents=True, exist_ok=True)
        text = re.sub(r"^<!--.*?-->\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        (SOURCE / site_path(path)).write_text(with_diagrams(with_site_links(text, path)), encoding="utf-8")
    for name, make in reference.PAGES.items():
        (SOURCE / "reference").mkdir(exist_ok=True)
        (SOURCE / "reference" / name).write_text(make(), encoding="utf-8")


def main() -> int:  # the exit code
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_docs" / "site")
    folder = parser.parse_args().folder.absolute()
    write_source()
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8")) | {"nav": navigation()}
    config |= {"docs_dir": str(SOURCE), "site_dir": str(folder)}
    add_assets(config)
    made = ROOT / "_docs" / "mkdocs.yml"
    made.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    # Not --quiet: it drops the warnings before --strict counts them.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        print(f"{len(list(folder.rglob('*.html')))} pages in {folder}")
    else:
        print(done.stdout + done.stderr, file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
