"""Prompt syntax compared with AUTOMATIC1111's parser, and weighted embeddings and images of the built-in models."""

import json
from pathlib import Path

import pytest

from diffusion_workers.prompt.chunks import make_chunks
from diffusion_workers.prompt.schedules import text_schedule
from diffusion_workers.prompt.weights import weigh

VECTORS = json.loads((Path(__file__).parent / "data" / "prompt_vectors.json").read_text(encoding="utf-8"))


def in_reference_form(prompt: str) -> list[list]:
    "Words and weights in the reference's form: BREAK is a word with the weight -1, multiplied by its brackets."
    return [["BREAK", -span.weight] if span.is_break else [span.text, span.weight] for span in weigh(prompt)]


@pytest.mark.parametrize(("prompt", "expected"), VECTORS["weights"], ids=[row[0] for row in VECTORS["weights"]])
def test_weights(prompt: str, expected: list | None) -> None:
    if expected is None:  # the reference raises a ValueError at a number such as 1.2.3; here it is text
        expected = [["a:1.2.3", 1.1], [" b", 1.0]]
    assert in_reference_form(prompt) == expected


@pytest.mark.parametrize(("prompt", "steps", "second_pass_steps", "expected"), VECTORS["schedules"])
def test_schedules(prompt: str, steps: int, second_pass_steps: int | None, expected: list) -> None:
    "Vectors with `second_pass_steps` describe a second pass that follows a first pass of `steps`."
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
    "Embeddings match those of each weighting rule's reference implementation, which are stored with six decimals."
    from diffusion_workers.pipeline.encoding import EncodingOptions, PromptTexts, encode_prompts

    found = encode_prompts(shapes, "clip", [PromptTexts(row["prompt"])], EncodingOptions(rule))[0].embeds[0]
    expected = row[rule]
    # the reference divides two means near 0 in single precision, which costs it a digit
    tolerance = {"rel": 1.5e-6, "abs": 1e-6} if rule == "a1111" else {"abs": 1.1e-6}
    assert found[2, :3].tolist() == pytest.approx(expected["at"], **tolerance)
    assert float(found.mean()) == pytest.approx(expected["mean"], abs=1e-6)
    assert float(found.std()) == pytest.approx(expected["std"], abs=1e-5)


@pytest.fixture(scope="module")
def service():
    from diffusion_workers import DiffusionService

    with DiffusionService() as service:
        yield service


def pixels(result) -> list:
    import numpy as np

    return [np.asarray(image).astype(int) for image in result.raise_for_status().images]


RED = {"prompt": "a red circle on a white background", "seed": 3, "num_inference_steps": 6, "num_images": 2}


@pytest.mark.parametrize("model", ["shapes-sd15", "shapes-sdxl", "shapes-flux"])
def test_plain_words_give_the_same_image_in_both_syntaxes(service, model: str) -> None:
    "Bit-identical, with and without a negative prompt or `clip_skip`."
    guided = {"negative_prompt": "blue"} | ({"true_cfg_scale": 2.0} if model == "shapes-flux" else {})
    for fields in ({}, guided, {"clip_skip": 1} if model == "shapes-sd15" else {}):
        plain, read = (service.generate(RED, model=model, prompt_syntax=s, **fields) for s in ("plain", "a1111"))
        for a, b in zip(pixels(plain), pixels(read), strict=True):
            assert (a == b).all()
        assert plain.generation.plan.prompt_syntax is None and read.generation.plan.prompt_syntax == "a1111"


@pytest.mark.parametrize("model", ["shapes-sd15", "shapes-sdxl"])
def test_prompt_schedules_switch_at_the_given_step(service, model: str) -> None:
    def at(when: int) -> list:
        prompt = f"a [red:blue:{when}] circle on a white background"
        return pixels(service.generate(RED, model=model, prompt=prompt, prompt_syntax="a1111"))

    red = pixels(service.generate(RED, model=model))
    blue = pixels(service.generate(RED, model=model, prompt="a blue circle on a white background"))
    never, always, early, late = at(6), at(0), at(1), at(5)
    for i in range(2):
        assert (never[i] == red[i]).all() and (always[i] == blue[i]).all()
        assert abs(early[i] - blue[i]).mean() < abs(early[i] - red[i]).mean()
        assert abs(late[i] - red[i]).mean() < abs(early[i] - red[i]).mean()  # color is decided late in these models
        assert (late[i] != red[i]).any()


def test_variants_are_regenerated_from_the_plan(service, tmp_path: Path) -> None:
    "The plan holds the written and the resolved prompt, and a replay does not resolve it again."
    from diffusion_workers.planning.plan import request_from_plan

    written = "a {red|blue|green} ({circle|square}:1.2) [on:in front of:3] a white background"
    made = service.generate(RED, prompt=written, prompt_syntax="a1111", prompt_weighting="a1111", seed=11)
    plan = made.generation.plan
    assert plan.written_prompt == written and "{" not in plan.prompt
    again = service.generate(request_from_plan(plan))
    for a, b in zip(pixels(made), pixels(again), strict=True):
        assert (a == b).all()


def test_prompt_syntax_leaves_no_state_behind(service) -> None:
    "A plain request gives the same pixels before and after requests that use the syntax, including invalid ones."
    before = pixels(service.generate(RED))
    for prompt in ("a [red|blue] (circle:1.4) BREAK x, " * 8, "a <lora:none:1>", "a __none__", "(a:1000)", "a AND b"):
        service.generate(RED, prompt=prompt, prompt_syntax="a1111")
    for a, b in zip(before, pixels(service.generate(RED)), strict=True):
        assert (a == b).all()


def test_prompt_syntax_encodes_beyond_the_token_limit(service) -> None:
    "A plain prompt is truncated at the text encoder's length; with the syntax, the end still sets the background."
    import numpy as np

    filler = "a red circle, " * 8
    fields = {
        "num_inference_steps": 12,
        "num_images": 8,
        "seed": 100,
        "prompt": filler + "a red circle on a navy background",
    }
    plain, read = (pixels(service.generate(fields, prompt_syntax=syntax)) for syntax in ("plain", "a1111"))
    navy = np.array([0, 0, 128])

    def share(images: list) -> float:
        corners = [image[2, 2] for image in images]
        return float(np.mean([abs(corner - navy).max() < 60 for corner in corners]))

    assert share(read) > share(plain) + 0.3


LONG = "a red circle and a blue square and a green star " * 5


@pytest.mark.parametrize(
    ("written", "for_compel"),
    [
        ("a (red:1.4) circle on a (navy:1.2) background", "a (red)1.4 circle on a (navy)1.2 background"),
        ("a (red circle:1.5) on a navy background", "a (red circle)1.5 on a navy background"),
        (LONG, LONG),
        (f"({LONG}:1.3)", f"({LONG})1.3"),
    ],
    ids=["words", "phrase", "long", "long and weighted"],
)
def test_weighted_embeddings_match_compel(written: str, for_compel: str) -> None:
    "Weights above 1 and chunks, against another implementation of the rule: scale the distance to an empty prompt."
    import torch
    from compel import Compel
    from diffusers import StableDiffusionPipeline

    from diffusion_workers.models.manifest import builtin_path
    from diffusion_workers.pipeline.encoding import EncodingOptions, PromptTexts, encode_prompts

    pipe = StableDiffusionPipeline.from_pretrained(builtin_path("shapes-sd15"), variant="fp16", dtype=torch.float32)
    theirs = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, truncate_long_prompts=False)(for_compel)
    ours = encode_prompts(pipe, "clip", [PromptTexts(written)], EncodingOptions("comfy"))[0].embeds
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) < 1e-5
