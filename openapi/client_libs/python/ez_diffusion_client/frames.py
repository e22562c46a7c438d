"""Results as a table: one row for each image, with every setting of its plan. Needs pandas."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .models import GenerationPlan, OpResult, Timings

if TYPE_CHECKING:
    from pandas import DataFrame

_NOT_A_COLUMN = frozenset({"plan_version", "seeds", "image_index", "environment", "warnings", "manifest_sha256"})
_RENAMED = {"image": "input_image"}  # the image of a row is the one that was made
_NAMED = {"loras": ("name", "scale"), "controlnets": ("model", "conditioning_scale"), "custom": ("kind", "name")}


def plan_columns(
    plan: GenerationPlan,
    index: int = 0,  # of the image in the plan
) -> dict[str, Any]:
    """Every setting of a plan by column; a section such as `inpaint` becomes one column for each of its fields."""
    told = plan.model_dump(mode="json", exclude=set(_NOT_A_COLUMN))
    columns: dict[str, Any] = {}
    for name, value in told.items():
        name = _RENAMED.get(name, name)
        if name == "scheduler":
            columns["scheduler"] = value["name"] or value["class_name"]
            columns["scheduler_options"] = value["options"]
        elif name in _NAMED:
            columns[name] = _listed(value, *_NAMED[name])
            columns[f"{name}_settings"] = value
        elif isinstance(value, Mapping):
            columns |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            columns[name] = value
    columns["seed"] = plan.seeds[index]
    columns["warnings"] = "; ".join(note.message for note in plan.warnings or [])
    if plan.environment is not None:
        columns |= {"device": plan.environment.device, "dtype": plan.environment.dtype}
    return columns


def _listed(entries: list[dict[str, Any]] | None, name: str, value: str) -> str:  # such as "watercolor 0.8; ink 0.5"
    return "; ".join(f"{entry[name]} {entry[value]}" for entry in entries or [])


def timing_columns(timings: Timings | None) -> dict[str, Any]:
    """The seconds of each phase."""
    return {} if timings is None else timings.model_dump()


def result_rows(result: OpResult) -> list[dict[str, Any]]:
    """The rows of a result: one for each image, or one that says why there is none."""
    status = {"status": result.status.value, "message": result.message}
    made = result.generation
    if made is None:
        return [status | (plan_columns(result.plan) if result.plan else {}) | {"image": None}]
    images: list[Any] = [*result.images] or [None] * len(made.plan.seeds)  # none where latents were asked for
    shared = timing_columns(made.timings)
    return [status | plan_columns(made.plan, i) | shared | {"image": image} for i, image in enumerate(images)]


def to_dataframe(
    results: Iterable[OpResult],
) -> "DataFrame":  # one row for each image, in the order of the results
    """A table of results: status, every setting of the plan, timings and the image; `ImportError` without pandas."""
    pandas = import_pandas()
    return pandas.DataFrame([row for result in results for row in result_rows(result)])


def import_pandas() -> Any:  # the module
    """pandas, imported when a table is asked for."""
    try:
        import pandas
    except ImportError:
        raise ImportError("a table of results needs pandas: pip install pandas") from None
    return pandas
