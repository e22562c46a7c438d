"""Conversion of text from forms and command-line options to typed values, and access to nested fields by path."""

from typing import Any

import pytest

from diffusion_workers.request.errors import RequestError
from diffusion_workers.request.schema import (
    field_at,
    get_value,
    parse_text,
    schema_fields,
    set_value,
    split_path,
    typed_value,
)
from ez_diffusion_client.models import ControlNetUnit, GenerationRequest, Lora


def test_schema_fields_match_the_specification() -> None:
    fields = {info.name: info for info in schema_fields(GenerationRequest)}
    assert fields["prompt"].required and fields["prompt"].is_long_text
    assert fields["image"].is_image and not fields["image"].is_long_text
    assert fields["resize_mode"].choices == ("just_resize", "crop_and_resize", "resize_and_fill")
    assert (fields["resize_mode"].default, fields["inpaint.mask_blur"].default) == ("just_resize", 4)
    assert (fields["seeds"].item_kinds, fields["loras"].item_kinds) == (("integer",), ("object",))
    unit = {info.name: info for info in schema_fields(ControlNetUnit)}
    assert unit["union_mode"].kinds == ("string", "integer")
    assert {info.name for info in schema_fields(Lora)} == {"name", "scale", "text_encoder_scale", "block_scales"}


@pytest.mark.parametrize("path", ["", ".", "a..b", "a.", "[0]", "a[x]", "a[0]b", "a[", "a[-1]"])
def test_invalid_field_paths_are_rejected(path: str) -> None:
    with pytest.raises(RequestError, match="not the path of a field"):
        split_path(path)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("guidance_scale", " 3 ", 3.0),
        ("guidance_scale", "1_0", "1_0"),
        ("seed", "9007199254740991", 9007199254740991),
        ("seed", "1_000", "1_000"),
        ("seed", "9" * 5000, "9" * 5000),  # exceeds Python's limit for integer conversion
        ("controlnets[0].union_mode", "3", 3),
        ("prompt", " 1 ", " 1 "),
        ("use_karras_sigmas", "yes", "yes"),
        ("seeds", "[1, 2]", [1, 2]),
        ("seeds", "1, two", [1, "two"]),
        ("loras", '{"name": "style"}', [{"name": "style"}]),
        ("inpaint", "[]", "[]"),
        ("inpaint", "[" * 100_000, "[" * 100_000),
    ],
)
def test_text_is_converted_to_the_field_type(path: str, text: str, value: Any) -> None:
    assert typed_value(field_at(GenerationRequest, path), text) == value


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("width", "512", 512),
        ("scheduler", "euler", "euler"),
        ("controlnets[1].guidance_end", "0.5", 0.5),
        ("prompt", "", ""),
    ],
)
def test_valid_text_is_parsed(path: str, text: str, value: Any) -> None:
    assert parse_text(GenerationRequest, path, text) == value


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("width", "tall", "width: input should be a valid integer"),
        ("scheduler", "eular", r"did you mean euler\?"),
        ("controlnets[1].guidance_end", "2", "from 0 to 1"),
        ("guidance_scale", "nan", "finite"),
        ("use_karras_sigmas", "yes", "use_karras_sigmas"),
        ("controlnets[0].guidance_stop", "1", "guidance_start"),
        ("width[0]", "1", "there is no such field"),
        ("width.x", "1", "there is no such field"),
    ],
)
def test_invalid_text_is_rejected_with_a_reason(path: str, text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        parse_text(GenerationRequest, path, text)


def test_get_and_set_values_by_path() -> None:
    values: dict[str, Any] = {"loras": [{"name": "style", "scale": 0.5}], "inpaint": {"mask_blur": 8}, "seeds": [1, 2]}
    assert get_value(values, ("inpaint", "mask_blur")) == 8
    assert (get_value(values, "loras[1].scale"), get_value({"inpaint": None}, "inpaint.mask_blur")) == (None, None)
    set_value(values, "seeds[1]", 7)
    assert values["seeds"] == [1, 7]


@pytest.mark.parametrize("path", ["loras[1].scale", "prompt.x", "seeds[2]", "controlnets[0].guidance_end"])
def test_setting_a_missing_path_is_rejected(path: str) -> None:
    values: dict[str, Any] = {"prompt": "a", "loras": [{"name": "style"}], "seeds": [1, 7]}
    with pytest.raises(RequestError, match="the request has nothing at this place"):
        set_value(values, path, 1)
    assert values == {"prompt": "a", "loras": [{"name": "style"}], "seeds": [1, 7]}
