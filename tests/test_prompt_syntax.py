"Edge cases of the prompt parser: unbalanced or nested brackets, tags, and keywords inside words."

import pytest

from diffusion_workers.prompt.syntax import parse, read_factor


def kinds(text: str, **options: bool) -> str:
    "The classes of the nodes of a prompt."
    return " ".join(type(node).__name__ for node in parse(text, **options).nodes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("a [red:blue:0.5", "Text"),
        ("a [red:blue:x] c", "Text Weight Text"),
        (r"a \[red:blue:0.5\] c", "Text"),
        ("aBREAKb break ANDy", "Text"),
        ("[|a]", "Alternation"),
        ("[(a:b:1.2):c:0.5]", "Text Weight Text"),
        ("{[a|b]|c}", "Variant"),
        ("<lora:x> <b> <:x> <lora:>", "LoraTag Text"),
    ],
)
def test_node_types(text: str, expected: str) -> None:
    assert kinds(text) == expected


@pytest.mark.parametrize("text", ["{a|b}", "__a__"])
def test_variants_can_be_disabled(text: str) -> None:
    assert kinds(text, variants=False) == "Text"


@pytest.mark.parametrize(("text", "count"), [("{(a|b)}", 1), ("{[a|b}", 2)])
def test_number_of_variant_options(text: str, count: int) -> None:
    (variant,) = parse(text).nodes
    assert len(variant.options) == count


def test_lora_tag_arguments() -> None:
    assert parse("<lora:a:0.5:te=1>").nodes[0].arguments == ("a", "0.5", "te=1")


def test_a_factor_with_two_dots_is_not_a_number() -> None:
    assert read_factor("1.2.3") is None
