"""The specification is valid OpenAPI, and its schemas follow the rules of the project."""

from collections.abc import Iterator

import pytest
import yaml
from openapi_spec_validator import validate
from project import ROOT

SPEC = yaml.safe_load((ROOT / "openapi" / "ez_diffusion_api.yaml").read_text(encoding="utf-8"))
SCHEMAS = SPEC["components"]["schemas"]


def reachable(name: str, seen: set[str]) -> set[str]:
    "The schemas that a schema references directly or indirectly, including itself."
    if name in seen:
        return seen
    seen.add(name)
    for reference in references(SCHEMAS[name]):
        reachable(reference.rsplit("/", 1)[1], seen)
    return seen


def references(node: object) -> Iterator[str]:
    "Every $ref below a node."
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_specification_is_valid_openapi() -> None:
    "For example, an unquoted comma in a description would start another keyword, which is invalid."
    validate(SPEC)


@pytest.mark.parametrize("name", [name for name, schema in SCHEMAS.items() if schema.get("type") == "object"])
def test_schemas_forbid_additional_properties(name: str) -> None:
    assert SCHEMAS[name].get("additionalProperties") is False, f"{name}: say additionalProperties: false"


@pytest.mark.parametrize("name", sorted(reachable("GenerationRequest", set()) | reachable("PreprocessRequest", set())))
def test_numbers_in_requests_are_bounded(name: str) -> None:
    fields = SCHEMAS[name].get("properties", {})
    unbounded = [
        field
        for field, schema in fields.items()
        if schema.get("type") in ("integer", "number") and not {"minimum", "maximum"} <= schema.keys()
    ]
    assert not unbounded, f"{name}: give minimum and maximum of {', '.join(unbounded)}"


def test_operation_ids_exist_and_are_unique() -> None:
    operations = [
        operation
        for path in SPEC["paths"].values()
        for method, operation in path.items()
        if method in ("get", "post", "delete")
    ]
    names = [operation["operationId"] for operation in operations]
    assert names and len(names) == len(set(names))
