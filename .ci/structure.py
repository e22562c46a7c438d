#!/usr/bin/env python
"""Counts what the structure forbids, prints each place, and exits 1 if a count is not zero.

python .ci/structure.py            all checks
python .ci/structure.py NAME ...   some of: imports, families, patches, lines, terms
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "diffusion_workers"
MAX_LINE = 120
EXPORTED_TO = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.MULTILINE)
FAMILY_FREE_CHAPTERS = ("families", "shapes")  # these may name a family
# Classes of our own that may be extended where a notebook tells its story: none of them is public.
PUBLIC_MODULE = "diffusion_workers/__init__.py"


@dataclass(frozen=True)
class Module:
    "An exported module, and where its notebook stands in the reading order."

    name: str  # without the package, such as "request.images"
    notebook: Path
    path: Path
    order: tuple["Number", "Number"]  # of the chapter's folder, and of the notebook in it


Number = tuple[int, str]  # 4 and "a" of 04a_schedulers


def leading_number(text: str) -> Number:
    "The number that a folder or notebook begins with, and the letter behind it."
    found = re.match(r"(\d+)([a-z]?)_", text)
    if not found:
        raise ValueError(f"{text}: the name of a chapter's folder and of its notebooks begins with a number")
    return int(found[1]), found[2]


def source_lines(cell: dict) -> str:
    return "".join(cell["source"])


@cache
def exported_modules() -> list[Module]:
    "Every module in reading order: by its chapter's folder, then by its notebook's number."
    found = []
    for notebook in NBS.rglob("*.ipynb"):
        if any(part.startswith((".", "_")) for part in notebook.relative_to(NBS).parts):
            continue
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        names = [
            m[1] for cell in cells if cell["cell_type"] == "code" for m in EXPORTED_TO.finditer(source_lines(cell))
        ]
        for name in names:
            path = PACKAGE / (name.replace(".", "/") + ".py")
            found.append(
                Module(name, notebook, path, (leading_number(notebook.parent.name), leading_number(notebook.name)))
            )
    return sorted(found, key=lambda module: module.order)


def imported_modules(source: str, name: str) -> Iterator[tuple[int, str]]:
    "The line and name of each module of this package that the code of module `name` imports, at any depth."
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                (node.lineno, a.name.partition(".")[2]) for a in node.names if a.name.startswith("diffusion_workers.")
            )
        elif isinstance(node, ast.ImportFrom):
            full = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, full]) if full else ".".join(above)
            elif full == "diffusion_workers" or full.startswith("diffusion_workers."):
                base = full.partition(".")[2]
            else:
                continue
            for alias in node.names:
                joined = f"{base}.{alias.name}" if base else alias.name
                yield node.lineno, joined if module_path(joined) else base


def module_path(name: str) -> Path | None:
    path = PACKAGE / (name.replace(".", "/") + ".py")
    return path if path.exists() else None


def upward_imports(modules: list[Module] | None = None) -> list[str]:
    "Imports of a module that stands later in the reading order, with file and line."
    modules = exported_modules() if modules is None else modules
    order = {module.name: module.order for module in modules}
    found = []
    for module in modules:
        for line, target in imported_modules(module.path.read_text(encoding="utf-8"), module.name):
            if target in order and order[target] >= module.order:
                found.append(f"{place(module.path, line)}: {module.name} imports {target}, which comes later in nbs/")
    return found


def place(path: Path, line: int) -> str:
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{shown.as_posix()}:{line}"


def family_names() -> set[str]:
    "The names of the model families, as they stand in the specification."
    text = (ROOT / "openapi" / "ez_diffusion_api.yaml").read_text(encoding="utf-8")
    block = re.search(r"^    ModelFamily:\n((?:      .*\n)+)", text, re.MULTILINE)[1]
    return set(re.findall(r"[\w.-]+", re.search(r"enum: \[([^\]]*)\]", block)[1]))


def family_comparisons() -> list[str]:
    "Uses of `ModelFamily.x`, and of a family's name as a constant, outside of the chapters that may name one."
    names, found = family_names(), []
    for module in exported_modules():
        if module.name.split(".")[0] in FAMILY_FREE_CHAPTERS:
            continue
        for node in ast.walk(ast.parse(module.path.read_text(encoding="utf-8"))):
            member = (
                isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ModelFamily"
            )
            constant = isinstance(node, ast.Constant) and node.value in names
            if member or constant:
                shown = f"ModelFamily.{node.attr}" if member else repr(node.value)
                found.append(f"{place(module.path, node.lineno)}: {shown}")
    return found


def public_classes() -> set[str]:
    "The classes that users create or hold."
    return {
        "DiffusionService",
        "Generation",
        "GenerationPanel",
        "Sweep",
        "ControlPanel",
        "Grid",
        "PipelineFactory",
        "Settings",
        "ManifestStore",
        "ModelManifest",
        "MaskCanvas",
        "History",
        "Worker",
        "JobQueue",
    }


def is_patch(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("patch" in ast.unparse(decorator) for decorator in node.decorator_list)


def assigned_class(node: ast.AST) -> str | None:
    "The class in a statement `Class.method = f`."
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
        return ast.unparse(node.targets[0].value)
    return None


def patched_classes() -> list[str]:
    "Methods that are added to a public class from outside: `@patch`, and `Class.method = f` for any class."
    public, found = public_classes(), []
    for module in exported_modules():
        tree = ast.parse(module.path.read_text(encoding="utf-8"))
        classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for node in ast.walk(tree):
            at = place(module.path, getattr(node, "lineno", 0))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_patch(node):
                target = ast.unparse(node.args.args[0].annotation)
                if target in public:
                    found.append(f"{at}: {target}.{node.name} is patched: write it in the class")
            elif node in tree.body and assigned_class(node) in classes | public:
                found.append(f"{at}: {ast.unparse(node.targets[0])} is assigned: write it in the class")
    return found


def written_lines(path: Path) -> list[str]:
    "The lines of a file; the `__all__` that nbdev writes is empty, because no notebook can change its layout."
    text = path.read_text(encoding="utf-8")
    return re.sub(
        r"(?<=^# %% auto #0\n)__all__ = \[[^]]*\]", lambda m: "\n" * m[0].count("\n"), text, flags=re.M
    ).splitlines()


def long_lines() -> list[str]:
    "Lines of the exported package and of the tests that have more than 120 columns."
    paths = (
        [module.path for module in exported_modules()]
        + sorted((ROOT / "tests").glob("*.py"))
        + sorted((ROOT / ".ci").glob("*.py"))
    )
    return [
        f"{place(path, number)}: {len(line)} columns"
        for path in paths
        for number, line in enumerate(written_lines(path), start=1)
        if len(line) > MAX_LINE
    ]


# Replaced term, as a pattern -> the term to use.
# Exported modules, the prose of notebooks and `WRITTEN_FILES` are searched.
REPLACED_TERMS = {
    r"(?<!\"whole )(?<!`first_)(?<![a-z])pictures?(?![a-z])": "image",  # a label elsewhere; a name that changed
    r"(?<![-\w.\"'`])nets?(?![\w=.\"'`-])": "ControlNet",
    r"number formats?": "dtype",
    r"(?<![a-z])at[ _]hand(?![a-z])": "available",
    r"\bwhoever\b": "the caller",
    r"^#+ .*\b(?:tried|trying)\b": "examples",
    r"times as fast": "speedup",
    r"\b(?:rungs?|ladders?)\b": "fallbacks",
    r"(?<!there )(?<!there, )\b(?:is|are) no (?!longer\b|more\b)": "is not",
    r"\bcomes? off\b": "removed",
    r"\bthe other side\b": "the server",
    r"\b(?:hears?(?!\")|heard|deaf)\b": "works, or is ignored",  # not 'heart' as it is typed
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bnonsense\b": "invalid",
    r"generating elsewhere": "remote generation",
    r"speaks against|everything that is wrong": "validation errors",
    r"worth a word": "a warning",
    r"\bcannot be told\b": "ambiguous",
    r"told to come back|come back in \d": "retry after",
    r"there is nothing here": "not found",
    r"server has another name": "Host header not allowed",
    r"encoders that remember": "encoder output cache",
    r"gate of the server": "middleware",
    r"table of cells": "every family, task and control",
    r"\babsent(?:,|:| takes| follows| is)": "default:",
    r"numbers? that (?:is|are) not finite": "NaN or infinite values",
    r"used longest ago": "least recently used",
    r"made in one batch with": "batched with",
    r"says about itself": "its metadata",
    # British spellings; a string of exactly that word is data.
    r"(?<![\"'])(?:colour|favourite|neighbour|behaviour|catalogue|centre|licence|learnt|labelled)": "American spelling",
    r"spelt\b": "spelled",
    r"(?:quanti|normali|recogni|initiali|optimi|organi|seriali|summari|generali)s(?:e[ds]?|ing|ations?)\b": "-ize",
    r"(?:minimi|maximi|visuali|speciali|synchroni)s(?:e[ds]?|ing|ations?)\b": "-ize",
}


# What is written by hand beside the notebooks. test_project.py has replaced terms as its examples.
WRITTEN_FILES = (
    "README.md",
    "CHANGELOG.md",
    "docs/**/*.md",
    "openapi/*.yaml",
    "openapi/client_libs/python/**/*.py",
    "openapi/client_libs/typescript/src/*.ts",
    "web_gen_client/src/*.ts*",
    "tests/*.py",
)


def written_files() -> list[Path]:
    "The files of `WRITTEN_FILES`."
    found = {path for pattern in WRITTEN_FILES for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.name != "test_project.py")


def prose_lines() -> Iterator[tuple[str, str]]:
    "The place and text of each line of exported code, of notebook prose, and of what is written beside them."
    for path in written_files():
        for number, line in enumerate(written_lines(path), start=1):
            yield place(path, number), line
    for module in exported_modules():
        for number, line in enumerate(written_lines(module.path), start=1):
            yield place(module.path, number), line
    for notebook in sorted(NBS.rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in notebook.relative_to(NBS).parts):
            continue
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "markdown":
                at = f"{notebook.relative_to(ROOT).as_posix()}, cell {number}"
                yield from ((at, line) for line in source_lines(cell).splitlines())


def terms_to_replace(line: str) -> list[tuple[str, str]]:
    "The replaced terms in a line, each with the term to use."
    return [
        (match[0], instead)
        for pattern, instead in REPLACED_TERMS.items()
        if (match := re.search(pattern, line, re.IGNORECASE))
    ]


def replaced_terms() -> list[str]:
    "Terms that were replaced."
    return [
        f"{at}: {term!r}, write {instead!r}" for at, line in prose_lines() for term, instead in terms_to_replace(line)
    ]


CHECKS = {
    "imports": ("upward imports", upward_imports),
    "families": ("family comparisons outside families", family_comparisons),
    "patches": ("public classes patched", patched_classes),
    "terms": ("replaced terms", replaced_terms),
    "lines": (f"lines over {MAX_LINE} columns", long_lines),
}


def main(names: list[str]) -> int:  # the exit code
    failed = False
    for name in names or CHECKS:
        title, check = CHECKS[name]
        found = check()
        print(f"{title}: {len(found)}")
        print(*(f"  {line}" for line in found[:40]), sep="\n" if found else "")
        failed = failed or bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
