"""Invalid requests: each gets an `OpResult` with errors, and the service keeps working."""

import base64
import inspect
import io
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from project import ROOT

from diffusion_workers.planning.plan import request_from_plan
from diffusion_workers.planning.schedules import KARRAS_SCHEDULERS
from diffusion_workers.request.errors import error_line
from diffusion_workers.request.images import ImagePolicy
from diffusion_workers.request.metadata import read_metadata
from diffusion_workers.request.schema import schema_fields
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client import models as wire
from ez_diffusion_client import pil_images
from ez_diffusion_client.fields import PreprocessFields, RequestFields

REFERENCE = {
    "prompt": "a red circle left of a blue square",
    "seed": 11,
    "num_inference_steps": 3,
    "scheduler": "ddim",
    "width": 64,
    "height": 64,
}
SMALL = {"num_inference_steps": 2, "width": 64, "height": 64}
PRIVATE = [
    text for text in (str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir(), os.getcwd()) if len(text) > 1
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from schedulers with newer versions of NumPy
FIELDS = list(wire.GenerationRequest.model_fields)
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
HOOKS = ("on_step", "latents", "output_type", *EMBEDS)  # arguments available only in Python


# --- signatures -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["generate", "submit", "plan", "preprocess"])
def test_method_signatures_match_the_request_schema(method: str) -> None:
    "Every field is a typed keyword argument, also for type checkers; its help lists bounds and choices."
    model = wire.PreprocessRequest if method == "preprocess" else wire.GenerationRequest
    typed = PreprocessFields if method == "preprocess" else RequestFields
    function = getattr(DiffusionService, method)
    parameters = inspect.signature(function).parameters
    fields = [name for name in parameters if name in model.model_fields]
    assert fields == list(model.model_fields) == list(typed.__annotations__)
    assert set(parameters) - set(fields) <= {"self", "request", "on_progress", "progress", *HOOKS}
    lines = re.sub(r"\n +", " ", function.__doc__).splitlines()
    for info in schema_fields(model, nested=False):
        parameter = parameters[info.name]
        assert parameter.kind == inspect.Parameter.KEYWORD_ONLY and parameter.default == info.default
        told = next(line for line in lines if line.startswith(f"{info.name}: "))
        assert info.is_image or info.members or info.allowed in told
        assert " ".join(info.description.split()).rstrip(".") in told
    kinds = {"width": int | None, "guidance_scale": float | None, "seeds": list[int] | None} if "seed" in fields else {}
    assert {name: parameters[name].annotation for name in kinds} == kinds


def test_keyword_arguments_of_none_are_ignored(service: DiffusionService) -> None:
    "The defaults shown in a signature can be passed explicitly."
    none = dict.fromkeys(set(FIELDS) - {"prompt"})
    assert service.plan(prompt="a", seed=1).plan == service.plan(prompt="a", **none | {"seed": 1}).plan
    assert service.plan({"prompt": "a", "width": 100}, width=None).ok
    assert service.plan(prompt=None).errors[0].code == "missing_field"


# --- saving -------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp"])
def test_saved_images_keep_their_receipt(service: DiffusionService, tmp_path: Path, ending: str) -> None:
    "Every way to save an image embeds its metadata, from which the request can be replayed."
    result = service.generate(**REFERENCE | {"num_images": 2})
    result.save(tmp_path / f"both.{ending}")
    result.save(tmp_path / f"seed-{{seed}}.{ending}")
    result.image.save(tmp_path / f"image.{ending}")
    for index, image in enumerate(result.images):
        image.save(str(tmp_path / f"copy{index}.{ending}"))
        image.copy().save(tmp_path / f"copied{index}.{ending}", quality=90)
    pil_images(result)[1].save(tmp_path / f"client.{ending}")
    places = {"both-1": 0, "both-2": 1, "seed-11": 0, "seed-12": 1, "image": 0, "client": 1}
    places |= {f"{name}{index}": index for name in ("copy", "copied") for index in (0, 1)}
    assert {path.stem for path in tmp_path.iterdir()} == set(places)
    for name, index in places.items():
        found = read_metadata(tmp_path / f"{name}.{ending}")
        assert (found.plan.image_index, found.plan.seeds) == (index, [11, 12]), name
        assert found.parameters.startswith(REFERENCE["prompt"]), name
    replayed = service.generate(request_from_plan(read_metadata(tmp_path / f"image.{ending}").plan))
    assert [image.tobytes() for image in replayed.images] == [image.tobytes() for image in result.images]


def test_saving_respects_embed_metadata_false(service: DiffusionService, tmp_path: Path) -> None:
    "With `embed_metadata: false` saving writes no metadata either."
    result = service.generate(**REFERENCE | {"output": {"embed_metadata": False}})
    result.save(tmp_path / "a.png")
    result.image.save(tmp_path / "b.jpg")
    assert [read_metadata(path).plan for path in tmp_path.iterdir()] == [None, None]


# --- what is required of a response -----------------------------------------


def faults(answer: Any, request: Any) -> list[str]:
    "Violations of the rules for a response to a request; normally an empty list."
    if not isinstance(answer, wire.OpResult):
        return [f"the answer is a {type(answer).__name__}"]
    assert wire.OpResult.model_validate(json.loads(answer.model_dump_json())).status == answer.status
    said = [
        part
        for told in (*(answer.errors or []), *(answer.warnings or []))
        for name, part in told
        if name in ("message", "allowed", "hint") and part
    ]
    found = [f"it names {path}" for path in PRIVATE for part in said if path in part]
    if answer.status == "internal_error":
        found.append(f"internal error: {answer.message}")
    if answer.status != "success" and not answer.errors:
        found.append("it fails without an error")
    for error in answer.errors or []:
        if not error.message.strip():
            found.append(f"{error.code} has no message")
        if not error.field and error.code != "malformed_json" and isinstance(request, dict):
            found.append(f"{error.code} names no field: {error_line(error)}")
        if max(len(part or "") for part in (error.field, error.given, error.message)) > 1000:
            found.append(f"{error.code} repeats a long request")
    return found


def shown(request: Any) -> str:
    "Any request as a single line for an assertion message."
    try:
        return ascii(request)[:400]
    except (ValueError, RecursionError) as error:
        return f"<{type(request).__name__} that cannot be shown: {error}>"


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    "The built-in model on the CPU; image URLs are not allowed, so the tests need no network access."
    with DiffusionService(Settings(), device="cpu", image_policy=ImagePolicy(allow_urls=False)) as service:
        yield service


def reference_pixels(service: DiffusionService) -> np.ndarray:
    return np.asarray(service.generate(REFERENCE).image)


# --- fuzzing ----------------------------------------------------------------


def image_bytes(chance: random.Random) -> bytes:
    "A small image of random pixels, in a random format and mode."
    size = chance.choice([(1, 1), (3, 200), (64, 64), (90, 70)])
    mode = chance.choice(["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I;16"])
    format = chance.choice({"CMYK": ["JPEG", "TIFF"], "I;16": ["PNG", "TIFF"]}.get(mode, ["PNG", "TIFF"]))
    width = {"RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4, "I;16": 2}.get(mode, 1)
    data = chance.randbytes(size[0] * size[1] * width)
    made = Image.frombytes("L" if mode in ("1", "P") else mode, size, data)
    buffer = io.BytesIO()
    (made.convert(mode) if mode in ("1", "P") else made).save(buffer, format)
    return buffer.getvalue()


def image_text(chance: random.Random) -> str:
    "An image as base64: intact, truncated, corrupted or not an image."
    data = image_bytes(chance)
    kind = chance.randrange(6)
    if kind == 0:
        data = data[: chance.randrange(len(data))]
    elif kind == 1:
        data = bytes(byte ^ (chance.random() < 0.02) * chance.randrange(256) for byte in data)
    elif kind == 2:
        data = chance.choice(
            [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"%PDF-1.7", b""]
        ) + chance.randbytes(chance.randrange(200))
    text = base64.b64encode(data).decode()
    return chance.choice(
        [
            text,
            text,
            "data:image/png;base64," + text,
            "data:text/plain," + text,
            text.replace("A", "\n"),
            text + "=",
            text + "é",
        ]
    )


def unicode_text(chance: random.Random) -> str:
    "Random Unicode: control characters, lone surrogates, combining marks, bidirectional controls, emoji."
    ranges = [
        (0, 32),
        (32, 127),
        (0x80, 0x2FF),
        (0x300, 0x36F),
        (0x590, 0x6FF),
        (0x2000, 0x206F),
        (0x4E00, 0x9FFF),
        (0xD800, 0xDFFF),
        (0xFFF0, 0xFFFF),
        (0x1F300, 0x1FAFF),
    ]
    return "".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(chance.choice([0, 1, 5, 60, 3000])))


def nested(chance: random.Random, depth: int) -> Any:
    "Nested lists and objects."
    if not depth:
        return junk(chance)
    inner = nested(chance, depth - 1)
    return chance.choice([[inner], {"prompt": inner}, {unicode_text(chance)[:20]: inner}, [inner, inner]])


def number(chance: random.Random) -> Any:
    "Numeric edge cases: integer limits, infinities, NaN, denormals, booleans."
    edges = [0, -1, 1, 7, 8, 63, 64, 65, 2**31, 2**53 - 1, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400, True, False]
    return chance.choice(
        [*edges, 0.0, -0.0, 5e-324, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"), 0.5, 1.5, 64.0]
    )


def junk(chance: random.Random) -> Any:
    "A value that may be invalid for a field."
    kind = chance.randrange(12)
    if kind < 4:
        return number(chance)
    if kind < 7:
        return unicode_text(chance)
    words = [
        "",
        " ",
        "null",
        "/etc/passwd",
        "../../x.png",
        "C:\\x.png",
        "file:///etc/passwd",
        "http://localhost/",
        "https://a.example/x.png",
        "a" * 20_000,
        "a.safetensors",
    ]
    return chance.choice([
        lambda: chance.choice(words), lambda: None, list, dict, lambda: image_text(chance),
        lambda: [number(chance) for _ in range(chance.choice([1, 3, 65, 5000]))],
        lambda: nested(chance, chance.randrange(1, 6)), lambda: [{} for _ in range(chance.choice([1, 9, 17]))],
        lambda: b"bytes", lambda: {1, 2}, object,
    ])()  # fmt: skip


def sensible(chance: random.Random) -> dict[str, Any]:
    "A random valid request."
    request = {"prompt": chance.choice(["a red circle", "x" * 500, "\0\t\u202e", "円"]), **SMALL}
    if chance.random() < 0.5:
        request["image"] = base64.b64encode(image_bytes(chance)).decode()
        if chance.random() < 0.5:
            request["mask_image"] = base64.b64encode(image_bytes(chance)).decode()
    options = {
        "seed": 2**53 - 3, "guidance_scale": 0, "scheduler": chance.choice(list(wire.SchedulerName)).value,
        "use_karras_sigmas": chance.random() < 0.5,
        "clip_skip": 2, "num_images": 2, "negative_prompt": "", "strength": 0.6,
        "resize_mode": chance.choice(list(wire.ResizeMode)).value,
        "inpaint": {"only_masked": True, "padding": 3, "mask_blur": 9}, "guidance_rescale": 0.5,
        "output": {"format": chance.choice(["png", "jpeg", "webp"]), "quality": 1},
    }  # fmt: skip
    return request | {name: options[name] for name in chance.sample(list(options), chance.randrange(4))}


def mangled(chance: random.Random) -> dict[str, Any]:
    "A valid request with one to three random mutations."
    request = sensible(chance)
    for _ in range(chance.randrange(1, 4)):
        accident = chance.randrange(8)
        if accident < 5:
            request[chance.choice(FIELDS)] = junk(chance)
        elif accident == 5:
            request[
                chance.choice(["Prompt", "num-images", "", "stepz", "[0]", "__class__", unicode_text(chance)[:30]])
            ] = junk(chance)
        elif accident == 6:
            request.pop(chance.choice(list(request)), None)
        else:
            request[chance.choice(["output", "inpaint", "step_cache", "memory", "refiner", "size_conditioning"])] = {
                chance.choice(["format", "quality", "mask_blur", "Padding", "x"]): junk(chance)
            }
    return request


@pytest.mark.parametrize("seed", range(8))
def test_fuzzed_requests_get_valid_responses(service: DiffusionService, seed: int) -> None:
    "Each of 50 mutated requests gets a valid response, small valid ones run, and reference pixels stay the same."
    chance = random.Random(seed)
    before, wrong = reference_pixels(service), []
    for _ in range(50):
        request = mangled(chance)
        answers = [service.plan(request)]
        plan = answers[0].plan
        if (
            plan is not None
            and plan.width * plan.height <= 128 * 128
            and plan.num_inference_steps <= 2
            and len(plan.seeds) <= 2
        ):
            answers.append(service.generate(request))
        wrong += [f"{fault}\n    {shown(request)}" for answer in answers for fault in faults(answer, request)]
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong[:10])
    np.testing.assert_array_equal(reference_pixels(service), before)


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_json_gets_valid_responses(service: DiffusionService, seed: int) -> None:
    "JSON with bytes removed, replaced or inserted, or truncated, gets a plan or an error message."
    chance, wrong = random.Random(1000 + seed), []
    for _ in range(50):
        data = bytearray(json.dumps(sensible(chance)).encode())
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(len(data))
            data[at : at + chance.choice([0, 1, 9])] = chance.choice(
                [b"", b"\0", b"\xff", b"{", b"]", b"1e999", b"NaN", b'"', b"\\ud800", chance.randbytes(3)]
            )
        for request in (bytes(data), bytes(data[: len(data) // 2]), data.decode(errors="replace")):
            wrong += [f"{fault}\n    {shown(request)}" for fault in faults(service.plan(request), request)]
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong[:10])


# --- known edge cases -------------------------------------------------------


def deep(depth: int) -> list:
    "Lists nested `depth` levels deep."
    inner: list = []
    for _ in range(depth):
        inner = [inner]
    return inner


PIXEL = base64.b64encode(image_bytes(random.Random(0))).decode()
TRAPS = {
    "capital field": {"prompt": "x", "Prompt": "y"},
    "dashed field": {"prompt": "x", "num-images": 2},
    "empty field": {"prompt": "x", "": 2},
    "half a pair as a field": {"prompt": "x", "\ud800": 2},
    "number as a field": {"prompt": "x", 3: 2},
    "dashed field inside": {"prompt": "x", "output": {"jpeg-quality": 2}},
    "half a pair as the prompt": {"prompt": "\ud800"},
    "a prompt of control characters": {"prompt": "\0\x01\x1b[2J", **SMALL},
    "the least strength": {"prompt": "x", "image": PIXEL, "strength": 5e-324},
    "a number of 5000 digits": {"prompt": "x", "seed": 10**5000},
    "a number of 5000 digits as text": '{"prompt": "x", "seed": ' + "9" * 5000 + "}",
    "numbers that are none": '{"prompt": "x", "guidance_scale": NaN, "strength": 1e999}',
    "deep lists": {"prompt": deep(100_000)},
    "deep text": '{"prompt": ' + "[" * 100_000,
    "deep text that closes": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "text of lists": "[" * 900 + "]" * 900,
    "bytes that are not text": b"\xff\xfe{",
    "no object": [1, 2, 3],
    "nothing": None,
    "a class": wire.GenerationRequest,
    "hundreds of unknown fields": {"prompt": "x", **{f"field_{i}": i for i in range(300)}},
    "many wrong entries": {
        "prompt": "x", "seeds": ["1"] * 64, "loras": [{"name": "", "scale": "1"}] * 16,
        "controlnets": [{"image": 1, "modle": 2}] * 8,
    },
    "many steps of the LCM scheduler": {
        "prompt": "x", "scheduler": "lcm", "num_inference_steps": 51, "width": 64, "height": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_invalid_edge_cases_get_helpful_errors(service: DiffusionService, name: str) -> None:
    "Edge cases that are easily overlooked: errors name the field, and none is an internal error."
    request = TRAPS[name]
    wrong = [
        fault for answer in (service.plan(request), service.generate(request)) for fault in faults(answer, request)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("depth", range(700, 1000, 20))
def test_nesting_near_the_parser_limit_gets_valid_errors(service: DiffusionService, depth: int) -> None:
    "Responses are valid on both sides of the depth that the JSON parser accepts."
    for request in (
        '{"prompt": ' + "[" * depth + "]" * depth + "}",
        '{"prompt": ' + '{"a":' * depth + "1" + "}" * depth + "}",
    ):
        assert not faults(service.plan(request), request)


# --- enum values ------------------------------------------------------------


def enum_fields() -> Iterator[tuple[tuple, list[str]]]:
    "Paths of the enum fields in a request with their values; for lists, the path of the first entry."
    schema = wire.GenerationRequest.model_json_schema()

    def walk(node: dict, path: tuple) -> Iterator[tuple[tuple, list[str]]]:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        if "enum" in node:
            yield path, node["enum"]
        for choice in node.get("anyOf", []):
            yield from walk(choice, path)
        for name, inner in node.get("properties", {}).items():
            yield from walk(inner, (*path, name))
        if "items" in node:
            yield from walk(node["items"], (*path, 0))

    yield from walk(schema, ())


def placed(path: tuple, value: Any) -> Any:
    "Nest a value in objects and lists so that it is at `path`."
    for key in reversed(path):
        value = [value] if key == 0 else {key: value}
    return value


@pytest.mark.parametrize(
    "path, words", list(enum_fields()), ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else ""
)
def test_misspelled_enum_values_get_a_suggestion(service: DiffusionService, path: tuple, words: list[str]) -> None:
    "The error is at the path of the misspelled value and suggests the most similar valid one."
    field = "".join(f"[{key}]" if key == 0 else f".{key}" for key in path)[1:]
    for word in words:
        for misspelled in (word[:-1] + word[-1] * 2, word.upper(), word + " "):
            answer = service.plan({"prompt": "x", **placed(path, misspelled)})
            error = next(error for error in answer.errors if error.field == field)
            assert (answer.status, error.code) == (
                "invalid_request",
                "unknown_scheduler" if field == "scheduler" else "not_one_of",
            )
            assert word in error.allowed and not faults(answer, {})
            assert error.hint == f"did you mean {word}?", error_line(error)


# --- valid requests ---------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler, karras",
    [
        (name.value, karras)
        for name in wire.SchedulerName
        if name != "flow_match_euler"
        for karras in (False, True)
        if not karras or name in KARRAS_SCHEDULERS
    ],
)
def test_every_scheduler_runs_with_one_and_two_steps(service: DiffusionService, scheduler: str, karras: bool) -> None:
    "Text to image with one step, image to image with two steps at strength 0.5."
    for steps, more in ((1, {}), (2, {"image": PIXEL, "strength": 0.5})):
        request = (
            SMALL
            | {
                "prompt": "x",
                "seed": 1,
                "scheduler": scheduler,
                "use_karras_sigmas": karras,
                "num_inference_steps": steps,
            }
            | more
        )
        answer = service.generate(request)
        assert answer.status == "success", f"{answer} for {shown(request)}"
