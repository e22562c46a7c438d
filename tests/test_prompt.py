"""The prompt language against the answers of AUTOMATIC1111's parser, and its numbers on a built-in model."""

import json
from pathlib import Path

import pytest

from diffusion_workers.prompt.chunks import make_chunks
from diffusion_workers.prompt.schedules import text_schedule
from diffusion_workers.prompt.weights import weigh

VECTORS = json.loads((Path(__file__).parent / "data" / "prompt_vectors.json").read_text(encoding="utf-8"))


def in_reference_form(prompt: str) -> list[list]:
    "Words and weights as the reference writes them: a break is the word with the weight -1, times its brackets."
    return [["BREAK", -span.weight] if span.is_break else [span.text, span.weight] for span in weigh(prompt)]


@pytest.mark.parametrize(("prompt", "expected"), VECTORS["weights"], ids=[row[0] for row in VECTORS["weights"]])
def test_weights(prompt: str, expected: list | None) -> None:
    if expected is None:  # the reference raises a ValueError at a number such as 1.2.3; here it is text
        expected = [["a:1.2.3", 1.1], [" b", 1.0]]
    assert in_reference_form(prompt) == expected


@pytest.mark.parametrize(("prompt", "steps", "second_pass_steps", "expected"), VECTORS["schedules"])
def test_schedules(prompt: str, steps: int, second_pass_steps: int | None, expected: list) -> None:
    "A second pass of the vectors follows a first pass of `steps`."
    if second_pass_steps is None:
        found = text_schedule(prompt, steps)
    else:
        found = text_schedule(prompt, second_pass_steps, first_pass_steps=steps)
    assert [list(entry) for entry in found] == expected


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    from diffusion_workers.models.manifest import builtin_path

    return CLIPTokenizer.from_pretrained(builtin_path("shapes-sd15") / "tokenizer")


@pytest.mark.parametrize(("prompt", "expected"), VECTORS["chunks"])
def test_chunks(tokenizer, prompt: str, expected: list) -> None:
    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    found = make_chunks(weigh(prompt), tokenize, tokenize(",")[0], size=30)
    named = [[tokenizer.convert_ids_to_tokens(list(chunk.tokens)), list(chunk.weights)] for chunk in found]
    assert named == [[[token for token, _ in chunk], [weight for _, weight in chunk]] for chunk in expected]


@pytest.fixture(scope="module")
def shapes():
    import torch

    from diffusion_workers.models.store import find_manifest
    from diffusion_workers.pipeline.loading import load_pipeline

    return load_pipeline(find_manifest("shapes-sd15"), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("rule", ["comfy", "a1111", "no_norm"])
@pytest.mark.parametrize("row", VECTORS["numbers"], ids=[row["prompt"] for row in VECTORS["numbers"]])
def test_weighted_embeddings(shapes, row: dict, rule: str) -> None:
    "Tokens, weights, and numbers that the reference implementation of each rule gave; the samples have six decimals."
    from diffusion_workers.pipeline.encoding import EncodingOptions, PromptTexts, encode_prompts

    found = encode_prompts(shapes, "clip", [PromptTexts(row["prompt"])], EncodingOptions(rule))[0].embeds[0]
    expected = row[rule]
    # the reference divides two means near 0 in single precision, which costs it a digit
    tolerance = {"rel": 1.5e-6, "abs": 1e-6} if rule == "a1111" else {"abs": 1.1e-6}
    assert found[2, :3].tolist() == pytest.approx(expected["at"], **tolerance)
    assert float(found.mean()) == pytest.approx(expected["mean"], abs=1e-6)
    assert float(found.std()) == pytest.approx(expected["std"], abs=1e-5)
