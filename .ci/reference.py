"""The pages of the reference, made from the code: environment variables, command line, manifests and requests.

Each page is a function that returns Markdown. A row without a description raises `SystemExit`, which stops the build.
"""

import argparse
import ast
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum

from pydantic import BaseModel


def table(
    page: str,  # for errors
    titles: list[str],
    rows: Iterable[list[str]],  # the first cell is a name, the last one a description
) -> str:
    "A Markdown table; SystemExit where a row has no description."
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        if not row[-1].strip():
            raise SystemExit(f"reference of {page}: {row[0]} has no description")
        cells = (" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def environment_page() -> str:
    from diffusion_workers.settings.table import variable_rows

    rows = [[f"`{r.name}`", r.used_by, r.default, r.allowed, r.description] for r in variable_rows()]
    titles = ["variable", "used by", "default", "allowed", "what it decides"]
    return (
        "# Environment variables\n\nAll settings of the service, the server, the worker and the clients.\n\n"
        + table("environment variables", titles, rows)
    )


def option_rows(parser: argparse.ArgumentParser) -> Iterable[list[str]]:
    "A row for each argument and option that the help lists."
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
        value = "" if action.nargs == 0 or not action.option_strings else str(action.metavar or action.dest.upper())
        yield [names, value, (action.help or "").replace("%%", "%")]


def command_line_page() -> str:
    from diffusion_workers.cli.commands import EXIT_CODES
    from diffusion_workers.cli.main import COMMANDS, command_parsers, make_parser

    parser = make_parser(show_all=True)
    parts = ["# Command line", "`diffusion-workers COMMAND`, with every option of every command."]
    parts.append(table("diffusion-workers", ["option", "value", "what it does"], option_rows(parser)))
    for name, own in command_parsers(parser).items():
        rows = table(name, ["option", "value", "what it does"], option_rows(own))
        examples = f"\n\n```sh\n{inspect.cleandoc(own.epilog.removeprefix('examples:'))}\n```" if own.epilog else ""
        parts.append(f"## {name}\n\n{COMMANDS[name].help[0].upper()}{COMMANDS[name].help[1:]}.{examples}\n\n{rows}")
    codes = table(
        "exit codes", ["exit code", "status"], ([str(code), f"`{s.value}`"] for s, code in EXIT_CODES.items())
    )
    return "\n\n".join([*parts, "## Exit codes", codes]) + "\n"


def trailing_comments(cls: type) -> dict[str, str]:
    "The comments behind the fields of a class, which are their documentation."
    source = inspect.cleandoc("\n" + inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            lines = range(node.lineno, node.end_lineno + 1)
            found[ast.unparse(node.target)] = " ".join(comments[line] for line in lines if line in comments)
    return found


def models_in(annotation: typing.Any) -> list[type[BaseModel]]:
    "The models in a type, at any depth."
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def type_text(annotation: typing.Any) -> str:
    "A type as people write it."
    if annotation is types.NoneType:
        return "none"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part) for part in parts if part is not types.NoneType)
    if origin is typing.Annotated:
        return type_text(parts[0])
    if origin is dict:
        return f"mapping of names to {type_text(parts[1])}"
    if origin in (tuple, list):
        return f"list of {type_text(parts[0])}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), "any value"
    )


def default_text(field: typing.Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ({}, ()) or isinstance(value, BaseModel):
        return "-"
    if isinstance(value, tuple):
        return ", ".join(str(getattr(part, "value", part)) for part in value)
    return f"`{getattr(value, 'value', value)}`"


def manifest_page() -> str:
    from diffusion_workers.models.manifest import ModelManifest
    from ez_diffusion_client.models import GenerationRequest

    parts = [
        "# Manifest",
        "A manifest is a YAML file that offers a model. Fields that have the name of a request field are its default, "
        "or its value in a profile.",
    ]
    pending, seen = [ModelManifest], []
    while pending:
        model = pending.pop(0)
        if model in seen:
            continue
        seen.append(model)
        comments = {name: text for cls in reversed(model.__mro__) if issubclass(cls, BaseModel) and cls is not BaseModel
                    for name, text in trailing_comments(cls).items() if text}  # fmt: skip
        rows = []
        for name, field in model.model_fields.items():
            same = GenerationRequest.model_fields.get(name)
            about = field.description or comments.get(name) or (same.description if same else "") or ""
            rows.append([f"`{field.alias or name}`", type_text(field.annotation), default_text(field), about])
            pending += models_in(field.annotation)
        summary = inspect.cleandoc(model.__doc__ or "")
        parts += [f"## {model.__name__}", summary]
        parts.append(table(f"manifests, {model.__name__}", ["field", "type", "default", "what it decides"], rows))
    return "\n\n".join(parts) + "\n"


def request_page() -> str:
    from diffusion_workers.request.schema import schema_fields
    from ez_diffusion_client.models import ControlNetUnit, GenerationRequest, Lora, PreprocessRequest

    titles = ["field", "type", "allowed", "what it decides"]
    parts = ["# Request", "Every field of a request, from the specification of the API."]
    intros = {
        GenerationRequest: "The body of `POST /generate` and `POST /plan`, the input of a RunPod job, the arguments of "
        "`DiffusionService.generate`.",
        ControlNetUnit: "An entry of `controlnets`.",
        Lora: "An entry of `loras`.",
        PreprocessRequest: "The body of `POST /preprocess`.",
    }
    for model, intro in intros.items():
        fields = schema_fields(model, objects=True)
        rows = [[f"`{f.name}`", " or ".join(f.kinds), f.allowed, f.description] for f in fields]
        parts += [f"## {model.__name__}", intro, table(f"requests, {model.__name__}", titles, rows)]
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "environment.md": environment_page,
    "command-line.md": command_line_page,
    "manifest.md": manifest_page,
    "request.md": request_page,
}
