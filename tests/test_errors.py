"""Request validation errors: their codes and hints."""

from typing import Any

import pytest

from diffusion_workers.request.errors import RENAMED_FIELDS, RequestError, parse
from ez_diffusion_client.models import ErrorDetail, GenerationRequest


def mistakes(data: Any) -> dict[str | None, ErrorDetail]:
    "The errors of a request by field."
    try:
        parse(GenerationRequest, data)
    except RequestError as refused:
        return {error.field: error for error in refused.errors}
    return {}


@pytest.mark.parametrize(
    ("fields", "codes"),
    [
        ({"width": 512, "seeds": [1, 2]}, {}),
        ({"wdith": 512}, {"wdith": "unknown_field"}),
        ({"prompt": "x" * 100_000}, {"prompt": "too_long"}),
        ({"num_images": 65, "width": 513}, {"num_images": "out_of_range", "width": "not_a_multiple"}),
        ({"width": 512.5, "strength": float("inf")}, {"width": "wrong_type", "strength": "not_a_finite_number"}),
        ({"loras": [{"name": "x", "weight": 1}]}, {"loras[0].weight": "unknown_field"}),
        ({"seeds": [1, -1]}, {"seeds[1]": "out_of_range"}),
    ],
)
def test_each_error_has_its_code(fields: dict, codes: dict) -> None:
    assert {field: error.code.value for field, error in mistakes({"prompt": "a"} | fields).items()} == codes


@pytest.mark.parametrize("text", ["{not json", '{"prompt": ' + "[" * 100_000])
def test_malformed_json_is_one_error(text: str) -> None:
    assert [error.code.value for error in mistakes(text).values()] == ["malformed_json"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("wdith", "did you mean width?"),
        ("steps", "use num_inference_steps"),
        ("stepz", "use num_inference_steps"),
        ("Sampler-Name", "use scheduler"),
        ("mask", "use mask_image"),
    ],
)
def test_unknown_fields_suggest_the_right_name(name: str, hint: str) -> None:
    assert mistakes({"prompt": "a", name: 1})[name].hint == hint


def test_errors_suggest_a_valid_value() -> None:
    found = mistakes({"prompt": "a", "width": 130, "scheduler": "eular"})
    assert found["width"].hint == "use 128 or 136"
    assert found["scheduler"].hint == "did you mean euler?"


def test_renamed_fields_suggest_their_new_name() -> None:
    old = {"deepcache": {}, "acceleration": {"compute_dtype": "bfloat16", "step_cache": "mag", "batch_size": 1}}
    found = mistakes({"prompt": "a"} | old)
    assert set(found) == {"deepcache", *(f"acceleration.{name}" for name in old["acceleration"])}
    for field, error in found.items():
        assert error.hint == f"it was renamed: use {RENAMED_FIELDS[field]}"
