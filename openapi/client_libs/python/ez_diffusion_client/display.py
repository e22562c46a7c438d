"""How responses look in a notebook and on a terminal, and what can be done with them.

The generated classes of `models` inherit from the classes below, so that their methods are known to editors and type
checkers wherever a response comes from: a service in this process, a server or a worker.
"""

import base64
import html
import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, PrivateAttr

if TYPE_CHECKING:
    from pandas import DataFrame

    from .models import (
        ControlMap,
        ControlNetInfo,
        DeviceMemory,
        ErrorDetail,
        GeneratedImage,
        GenerationPlan,
        GenerationResponse,
        MemoryReport,
        ModelInfo,
        ModelMemory,
        OpResult,
        OpStatus,
        RequestWarning,
    )
    from .receipts import ReceiptImage

DISPLAY_PIXELS = 768  # longest side of an image in a cell; the image itself keeps its size
_INLINE_BYTES = 128 * 1024  # a file up to this size is shown as it is
_MIME = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_NO_HELP = frozenset(
    {
        *("construct", "copy", "dict", "from_orm", "json", "parse_file", "parse_obj", "parse_raw", "schema"),
        *("schema_json", "update_forward_refs", "validate"),
    }
)  # deprecated by pydantic


def error_line(
    error: "ErrorDetail",
) -> str:  # one line, for logs and terminals
    """An error in one sentence: field, message, what was given, hint, what is allowed."""
    parts = [
        f"{error.field}: {error.message}" if error.field else error.message,
        f"given {error.given}" if error.given else "",
        error.hint or "",
        f"allowed: {error.allowed}" if error.allowed else "",
    ]
    return "; ".join(part for part in parts if part)


def _wrapped(text: str) -> str:  # at most 100 columns, but for words that are longer
    return textwrap.fill(
        text, 100, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def failure_text(
    operation: str,  # such as generate
    result: "OpResult",  # that failed
) -> str:  # a few lines, for a terminal or the standard error of a cell
    """A failed call in readable lines: each error once, and long lists of what is allowed left out."""
    lines = [f"{operation} failed: {result.status.value}"]
    for error in result.errors or []:
        short = error.allowed and len(error.allowed) <= 100
        lines.append(_wrapped(error_line(error if short else error.model_copy(update={"allowed": None}))))
    if not result.errors and result.message:
        lines.append(_wrapped(result.message))
    lines.append("  (result.errors has the details; result.raise_for_status() raises)")
    return "\n".join(lines)


# --- tables ------------------------------------------------------------------


def plan_rows(
    plan: "GenerationPlan",
) -> list[tuple[str, str]]:  # field, value in words
    """The decisions of a plan, for a table; fields without a value are left out."""
    hidden = ("plan_version", "manifest_sha256", "warnings")
    values = [(name, getattr(plan, name)) for name in type(plan).model_fields if name not in hidden]
    return [(name, _in_words(value)) for name, value in values if value is not None]


def _in_words(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_in_words, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(getattr(value, "value", value))


def _html_table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _markdown_table(rows: Iterable[tuple[str, str]]) -> str:
    cells = ("| {} | {} |".format(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows)
    return "\n".join(["| | |", "|---|---|", *cells])


def megabytes(count: int | None) -> str:
    """A number of bytes in MB."""
    return "" if count is None else f"{count / 1e6:,.0f} MB"


def _names(items: Sequence[Any] | None) -> str:
    return ", ".join(getattr(item, "name", item) for item in items or ())


# --- images ------------------------------------------------------------------


def _shown_image(text: str, mime: str, width: int, height: int) -> tuple[str, int]:  # data URI, width in pixels
    """An image for a cell: the file itself where it is small, else a WebP of at most `DISPLAY_PIXELS`."""
    encoded = text.rpartition(",")[2]
    small = max(width, height) <= DISPLAY_PIXELS and len(encoded) * 3 // 4 <= _INLINE_BYTES
    shown = max(128, min(width, 512))
    if small or text.startswith(("http://", "https://")):
        return (text if text.startswith("http") else f"data:{mime};base64,{encoded}"), shown
    try:
        from PIL import Image
    except ImportError:  # without Pillow only the file itself can be shown
        return f"data:{mime};base64,{encoded}", shown
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        preview = image.convert("RGBA" if "A" in image.getbands() else "RGB")
    preview.thumbnail((DISPLAY_PIXELS, DISPLAY_PIXELS))
    buffer = io.BytesIO()
    preview.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", shown


def _figure(image: "GeneratedImage | ControlMap") -> str:  # HTML
    file_format = getattr(image, "format", None)
    mime = _MIME[file_format.value] if file_format else "image/png"
    source, width = _shown_image(image.image, mime, image.width, image.height)
    seed = getattr(image, "seed", None)
    title = f"seed {seed}" if file_format else getattr(image, "preprocessor", None) or "map"
    caption = html.escape(f"{title}, {image.width} x {image.height}")
    return (
        f'<figure style="margin:0"><img src="{source}" width="{width}" alt="{caption}">'
        f'<figcaption style="font-size:smaller">{caption}</figcaption></figure>'
    )


def _error_block(error: "ErrorDetail") -> str:  # HTML
    """An error as a block: the field and what is wrong, then what to do; a long list of what is allowed is folded."""
    head = (
        f"<b>{html.escape(error.field)}</b>: {html.escape(error.message)}"
        if error.field
        else html.escape(error.message)
    )
    lines = [head]
    if error.given:
        lines[0] += f" (given {html.escape(error.given)})"
    if error.hint:
        lines.append(html.escape(error.hint))
    if error.allowed:
        allowed = html.escape(error.allowed)
        if len(error.allowed) > 100:
            lines.append(f"<details><summary>allowed</summary>{allowed}</details>")
        else:
            lines.append(f"allowed: {allowed}")
    return f"<li>{'<br>'.join(lines)}</li>"


# --- base classes of the generated models ------------------------------------


class CompactModel(BaseModel):
    """The base of every generated class: fields that are None are left out of its repr."""

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, value) for name, value in super().__repr_args__() if value is not None]


class ResultMethods(CompactModel):
    """What can be done with an `OpResult`, whichever front end it came from."""

    if TYPE_CHECKING:
        status: OpStatus
        message: str | None
        errors: list[ErrorDetail] | None
        warnings: list[RequestWarning] | None
        generation: GenerationResponse | None
        plan: GenerationPlan | None
        control_map: ControlMap | None
        memory: MemoryReport | None

    _latents: Any = PrivateAttr(default=None)  # a torch.Tensor, of a service in this process

    @property
    def ok(self) -> bool:
        """Whether the operation succeeded."""
        return self.status.value == "success"

    def raise_for_status(self) -> Self:
        """The result itself if it succeeded, else a `RequestFailed` that carries it (see `errors.FAILURES`)."""
        from .errors import raise_for_status

        raise_for_status(self)  # type: ignore[arg-type]  # every instance is an OpResult
        return self

    @property
    def images(self) -> "list[ReceiptImage]":
        """The generated images for PIL, which keep their receipt when saved; raises `RequestFailed` after a failure."""
        from .images import pil_images

        return pil_images(self.raise_for_status())  # type: ignore[arg-type]

    @property
    def image(self) -> "ReceiptImage":
        """The first generated image; raises `RequestFailed` after a failure, `ValueError` if there is no image."""
        images = self.images
        if not images:
            hint = "; result.latents has the latents" if self._latents is not None else ""
            raise ValueError(f"this result has no image: {self!r}{hint}")
        return images[0]

    @property
    def latents(self) -> Any:
        """Of a call with `output_type="latent"`: a float32 tensor on the CPU, (images, channels, height/8, width/8).

        They are scaled as inside the pipeline, (x - shift_factor) * scaling_factor; `service.decode` makes images of
        them. Raises `RequestFailed` after a failure, `ValueError` for a result without latents.
        """
        self.raise_for_status()
        if self._latents is None:
            raise ValueError('this result has no latents: call generate(..., output_type="latent") of a service')
        return self._latents

    def to_dataframe(self) -> "DataFrame":
        """One row for each image: every setting of its plan, its seed, the timings and the image; needs pandas."""
        from .frames import to_dataframe

        return to_dataframe([self])  # type: ignore[list-item]  # every instance is an OpResult

    def save(
        self,
        path: str | Path,  # ends in .png, .jpg, .jpeg or .webp; for several images it may hold {index} and {seed}
    ) -> list[Path]:  # the files, in the order of the images
        """Write the images with their receipts, or the control map; raises `RequestFailed` after a failure."""
        from .receipts import save_images, save_map

        self.raise_for_status()
        if self.control_map is not None:
            return [save_map(self.control_map, path)]
        return save_images(self, path)  # type: ignore[arg-type]

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in _NO_HELP]

    def _repr_html_(self) -> str:
        lines = []
        if not self.ok:
            lines.append(f"<p><b>{self.status.value}</b></p>")
            if self.errors:
                lines.append(f"<ul>{''.join(map(_error_block, self.errors))}</ul>")
            elif self.message:
                lines.append(f"<p>{html.escape(self.message)}</p>")
        shown: list[Any] = [self.control_map] if self.control_map else []
        if self.generation:
            shown = [*self.generation.images, *(self.generation.control_maps or [])]
        if shown:
            figures = "".join(map(_figure, shown))
            lines.append(f'<div style="display:flex;flex-wrap:wrap;gap:8px">{figures}</div>')
        notes = [
            f"<li>{html.escape(f'{note.field}: ' if note.field else '')}{html.escape(note.message)}</li>"
            for note in self.warnings or []
        ]
        if notes:
            lines.append(f"<ul>{''.join(notes)}</ul>")
        if self.plan and not self.generation:
            lines.append(_html_table(plan_rows(self.plan)))
        if self.memory:
            lines.append(_html_table((name, _in_words(value)) for name, value in self.memory if value is not None))
        return "".join(lines) or f"<p>{self.status.value}</p>"

    def __str__(self) -> str:
        count = f", {len(self.generation.images)} image(s)" if self.generation else ""
        return f"OpResult({self.status.value}{count}{': ' + self.message if self.message else ''})"

    def __repr__(self) -> str:
        return str(self)


class PlanMethods(CompactModel):
    """A plan as a table in a notebook."""

    if TYPE_CHECKING:
        warnings: list[RequestWarning] | None

    def _repr_markdown_(self) -> str:
        notes = [
            ("warning", f"{note.field}: {note.message} ({note.given} -> {note.used})") for note in self.warnings or []
        ]
        return _markdown_table([*plan_rows(self), *notes])  # type: ignore[arg-type]  # every instance is a plan


class MemoryReportMethods(CompactModel):
    """A memory report as a table in a notebook."""

    if TYPE_CHECKING:
        host_total_bytes: int
        host_available_bytes: int
        process_bytes: int
        process_peak_bytes: int | None
        devices: list[DeviceMemory]
        models: list[ModelMemory]

    def _repr_markdown_(self) -> str:
        host = f"{megabytes(self.host_total_bytes)}, {megabytes(self.host_available_bytes)} free"
        lines = ["| | in use | of | peak |", "|---|---|---|---|"]
        lines.append(
            f"| host, this process | {megabytes(self.process_bytes)} | {host} | {megabytes(self.process_peak_bytes)} |"
        )
        for device in self.devices:
            if device.total_bytes:
                used, total = megabytes(device.allocated_bytes), megabytes(device.total_bytes)
                lines.append(f"| {device.name or device.device} | {used} | {total} | {megabytes(device.peak_bytes)} |")
        for model in self.models:
            parts = ", ".join(f"{name} {megabytes(used)}" for name, used in (model.components or {}).items())
            lines.append(f"| {model.model} on {model.device}, {model.dtype} | {megabytes(model.bytes)} | {parts} | |")
        return "\n".join(lines)


def availability_note(
    info: "ModelInfo | ControlNetInfo",
) -> str:  # empty where the weights are there, or where nobody knows
    "What stands between a model and its first image: a download (with its size, where known), or missing files."
    if info.availability == "download":
        size = getattr(info, "download_gb", None)
        return f"download, about {size:g} GB" if size else "download"
    return "missing" if info.availability == "missing" else ""


class ModelListMethods(CompactModel):
    """A list of models as a table in a notebook."""

    if TYPE_CHECKING:
        models: list[ModelInfo]
        default: str | None

    def __repr__(self) -> str:
        names = ", ".join(info.name for info in self.models)
        return f"ModelList({len(self.models)} models: {names}; default: {self.default})"

    def _repr_markdown_(self) -> str:
        lines = ["| model | family | size | steps | ControlNets | LoRAs | profiles |", "|---|---|---|---|---|---|---|"]
        for info in self.models:
            marks = " (default)" if info.name == self.default else ""
            if info.loaded:
                marks += ", loaded"
            if note := availability_note(info):
                marks += f", {note}"
            size = f"{info.width} x {info.height} | {info.num_inference_steps}"
            addons = f"{_names(info.controlnets)} | {_names(info.loras)} | {_names(info.profiles)}"
            lines.append(f"| **{info.name}**{marks} | {info.family.value} | {size} | {addons} |")
        return "\n".join(lines)
