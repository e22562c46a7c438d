"""Untrusted text is read in linear time (no ReDoS): every regular expression, and every function that reads text.

Times are compared only with each other, never with absolute limits: the same call on a text eight times as long may
take a few times eight as long. Quadratic work takes 64 times as long.
"""

import ast
import functools
import importlib
import io
import itertools
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ez_diffusion_client.models import GenerationRequest, RestoreRequest

re_parser = importlib.import_module("re._parser")
PACKAGES = {"diffusion_workers": "diffusion_workers", "ez_diffusion_client": "ez_diffusion_client"}
SHORT, FACTOR = 512, 8
SLOWER = 3  # tolerance on FACTOR for the time of the longer text: a shared machine is noisy
NOISE = 2e-4  # seconds that an interruption may add to a call


def seconds(call: Callable, text, rounds: int) -> float:
    "The shortest of several rounds, in CPU time of the thread: other processes do not count."
    best = float("inf")
    for _ in range(rounds):
        started = time.thread_time()
        call(text)
        best = min(best, time.thread_time() - started)
    return best


def repeated(beginning: str, unit: str, end: str = "") -> Callable[[int], str]:
    "Builds a text of about `n` characters."
    return lambda n: beginning + unit * (n // len(unit) + 1) + end


def grows(call: Callable, build: Callable[[int], object], short: int = SHORT) -> bool:
    "Whether a call takes more than linear time on the texts that `build` makes."
    few, many = build(short), build(short * FACTOR)
    for rounds in (1, 3, 7):
        before, after = seconds(call, few, rounds), seconds(call, many, rounds)
        if after <= SLOWER * FACTOR * before + NOISE:
            return False
    return True


@pytest.fixture(autouse=True)
def guard():
    "Fail after 240 seconds: an expression with exponential time would never return."

    def fail(*_):
        raise TimeoutError("this text is read for ever")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 240)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# --- every regular expression

METHODS = ("match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")
# Compiled expressions assigned at module level, each with a text that it matches. A new expression needs a line here.
EXPRESSIONS = {
    "server.middleware._REQUEST_ID": "a:b",
    "server.jobs._URL": " https://",
    "service.outputs._ID": "20261129T131207000000-0a1b2c-0",
    "worker.handler._REQUEST_ID": "a:b",
    "worker.baking._WEIGHTS": "diffusion_pytorch_model.fp16-1-of-2.safetensors",
    "worker.baking._WHOLE": "diffusion_pytorch_model-1-of-2.safetensors",
    "worker.baking._INDEX": "model.safetensors.index.fp16.json",
    "prompt.vocabulary._WORD": "a 3 stars",
    "request.other_programs._COMBINED": "lora_combined_1",
    "request.other_programs._BRACKETS": "[a]",
    "request.other_programs._DREAM_OPTION": ' -s 5 -C7.5"',
    "request.other_programs._EASY_LINE": "Steps: 5",
    "request.images._SCHEME": "https://data:",
    "request.images._PATH": "C:\\a/b.png",
    "request.schema._STEP": "a.b[0]",
    "request.metadata._SETTINGS_LINE": " \tSteps:",
    "request.metadata._CERTAIN_LINE": " \tSteps: 20.0 ,",
    "request.metadata._INLINE": " Steps: 20, A",
    "request.metadata._PAIR[,]": ' a: "b\\" c" ,',
    "request.metadata._PAIR[|]": ' a: "b\\" c" |',
    "request.metadata._BREAK[,]": "a,\n",
    "request.metadata._BREAK[|]": "a|\n",
    "request.metadata._FURTHER_LINE": " \tName: b",
    "request.metadata._JSON_VALUE": ' \ta b: [{"',
    "request.foreign_settings._SUFFIX": " karras",
    "request.foreign_settings._LORA_TAG": " <lora:a:1>",
    "request.foreign_settings._NUMBER": "+12.5",
    "request.foreign_settings._SYNTAX": "(a:1.3) [a:b:0.5] [a|b] <lora:a> embedding:a BREAK",
    "request.foreign_settings._WINDOW": "starting/ending: (0.1, 0.9)",
    "request.comfyui._JOINING": "concat",
    "request.comfyui._OUTPUTS": "save",
    "request.comfyui._DIMENSIONS": " 64 x 64",
    "request.comfyui._SILENT": "vaedecode",
    "request.comfyui._PLAIN_ENDS": "vaedecode",
    "pipeline.tiny_files._LEVEL": "down_blocks.0.resnets.1.a",
    "checkpoints.layouts._FOUR_BIT": "a.quant_state.bitsandbytes__nf4",
    "checkpoints.layouts._MARKERS": "a.scaled_fp8",
    "checkpoints.layouts._FLUX_BLOCK": "double_blocks.1.a.weight",
    "checkpoints.layouts._HINT": "input_hint_block.0.weight",
    "checkpoints.layouts._IN_ATTENTION": "attentions.0.query.",
    "checkpoints.layouts.NEVER_USED": "model_ema.a.num_batches_tracked",
    "checkpoints.layouts._IN_APPROXIMATOR": "distilled_guidance_layer.layers.0.in_layer.",
    "checkpoints.layouts._NORM_OF_APPROXIMATOR": "distilled_guidance_layer.norms.0.scale",
    "models.weight_kinds._QWEN": "transformer_blocks.0.img_mod.",
    "models.weight_kinds._CROSS_ATTENTION": ".attn2.to_k.weight",
    "models.distilled._STEPS": "8 steps",
    "prompt.embeddings._CALLED": "embedding:a",
    "prompt.tags._EMBEDDING": "embedding:a",
    "prompt.tags._INVOKE": ")1.5 +++",
    "prompt.syntax._TOKENS": "\\(<lora:a> __a_b__ BREAK (a)",
    "prompt.syntax._TOKENS_WITHOUT_TAGS": "\\(<lora:a> __a_b__ BREAK (a)",
    "prompt.syntax._NUMBER": " +1.5e5 ",
    "prompt.syntax._FACTOR": " +1.5 ",
    "prompt.syntax._COUNT": " 1-2 $$ a$$",
    "prompt.syntax._SHARE": " 1.5::",
    "prompt.weights._SIGNS": "\\( a: 1.5 )",
    "prompt.weights._BREAK": "BREAK",
    "prompt.schedules._AND": "AND",
    "prompt.schedules._PART_WEIGHT": "+1.5",
}


def modules() -> Iterator[tuple[str, Path]]:
    for name in PACKAGES:
        folder = Path(importlib.import_module(name).__file__).parent
        for path in sorted(folder.rglob("*.py")):
            yield ".".join((name, *path.relative_to(folder).with_suffix("").parts)), path


def assigned(tree: ast.Module) -> Iterator[str]:
    "Names to which a module assigns a value built with `re.compile`."
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if value is not None and any(_calls_re(inner, ("compile",)) for inner in ast.walk(value)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _calls_re(node: ast.AST, names: tuple[str, ...]) -> bool:
    function = getattr(node, "func", None)
    at_re = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "re"
    return at_re and function.attr in names


@functools.cache
def expressions() -> dict[str, tuple[re.Pattern, frozenset[str]]]:
    "Every compiled expression of the modules, and the methods called on it."
    found = {}
    sources = {name: path.read_text() for name, path in modules()}
    calls = rf"\b(_?[A-Z][A-Z_]*)(?:\[[^\]]*\])?\.({'|'.join(METHODS)})\("
    used = set(re.findall(calls, "".join(sources.values())))
    for name, source in sources.items():
        for variable in assigned(ast.parse(source)):
            value = getattr(importlib.import_module(name), variable)
            methods = frozenset(method for name_used, method in used if name_used == variable)
            entries = value.items() if isinstance(value, dict) else [(None, value)]
            for key, pattern in entries:
                label = f"{name.removeprefix('diffusion_workers.')}.{variable}" + ("" if key is None else f"[{key}]")
                found[label] = (pattern, methods or frozenset(["search"]))
    return found


def literals() -> list[tuple[str, re.Pattern, str]]:
    "Every expression written inline in a call of `re`: (place, expression, method)."
    found = []
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if _calls_re(node, METHODS) and isinstance(node.args[0], ast.Constant):
                pattern = re.compile(node.args[0].value)
                found.append((f"{name}:{node.lineno}", pattern, node.func.attr))
    return found


ANY = [" ", "a", "1", "\n"]


def alphabet(pattern: re.Pattern) -> list[str]:
    "Characters that an expression distinguishes."
    found: list[str] = []

    def walk(items) -> None:
        for item in items:
            if isinstance(item, re_parser.SubPattern | list | tuple):
                walk(item)
            elif isinstance(item, int) and 9 <= item < 127 and type(item) is int:
                found.append(chr(item))

    walk(re_parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG))
    letters = [letter for letter in dict.fromkeys(found) if letter.isalpha()][:2]
    return list(dict.fromkeys([*ANY, *letters, *(letter for letter in found if not letter.isalnum())]))[:14]


def attacks(pattern: re.Pattern, sample: str) -> Iterator[tuple[str, str, str]]:
    "Texts that may cause catastrophic backtracking, as (beginning, repeated unit, end)."
    letters = alphabet(pattern)
    units = [*letters, *map("".join, itertools.permutations(letters, 2)), *ANY]
    beginnings = [sample[:cut] for cut in range(len(sample) + 1)]
    for unit in letters:
        for beginning in beginnings:
            yield beginning, unit, "\0"
    for unit in units:
        yield "", unit, "\0"
    for cut in range(1, len(sample) + 1):
        yield "", sample[:cut], "\0"
        yield "", sample[:cut] + " ", "\0"


def slow_attack(pattern: re.Pattern, method: str, sample: str = "") -> str | None:
    "A text on which an expression takes more than linear time."
    replaced = method in ("sub", "subn")

    def call(text: str) -> None:
        found = getattr(pattern, method)(*(("", text) if replaced else (text,)))
        if method == "finditer":
            for _ in found:
                pass

    for beginning, unit, end in dict.fromkeys(attacks(pattern, sample)):
        if grows(call, repeated(beginning, unit, end)):
            return f"{method} on {beginning!r} + {unit!r} * n + {end!r}"
    return None


def test_every_regular_expression_is_listed():
    found = expressions()
    assert set(found) == set(EXPRESSIONS)
    for name, (pattern, _) in found.items():
        assert pattern.search(EXPRESSIONS[name]), f"the sample of {name} does not match"


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_take_linear_time(name: str):
    pattern, methods = expressions()[name]
    slow = [found for method in methods if (found := slow_attack(pattern, method, EXPRESSIONS[name]))]
    assert not slow


def test_inline_expressions_take_linear_time():
    slow = {
        place: (pattern.pattern, found)
        for place, pattern, method in literals()
        if (found := slow_attack(pattern, method))
    }
    assert not slow


def tables() -> Iterator[str]:
    "Expressions in tables, which match tensor names of weight files."
    kinds = importlib.import_module("diffusion_workers.models.weight_kinds")
    for rows in (kinds.ADAPTERS, kinds.CONTROLNETS, kinds.FOREIGN, kinds.PARTS):
        yield from (row.pattern for row in rows)
    yield from (pattern for pattern, *_ in kinds.QUANTIZED_WEIGHTS)
    yield from importlib.import_module("diffusion_workers.lora.keys")._PARTS.values()
    yield from (pattern for pattern, _ in importlib.import_module("diffusion_workers.lora.keys")._COMPONENTS)
    yield from importlib.import_module("diffusion_workers.lora.files")._LAYOUTS.values()
    for layout in importlib.import_module("diffusion_workers.checkpoints.layouts").LAYOUTS.values():
        yield from (layout.anchor, layout.unused)


def test_expressions_in_tables_take_linear_time():
    slow = {
        pattern: found
        for pattern in dict.fromkeys(tables())
        if (found := slow_attack(re.compile(pattern, re.MULTILINE), "search"))
    }
    assert not slow


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"\s*\)", r"^a*.*b$", r"(a|a)*c"])
def test_measurement_detects_slow_expressions(pattern: str):
    short = 8 if pattern.startswith("(") else SHORT
    call = re.compile(pattern).search
    if short == 8:  # exponential: a little longer is enough
        assert seconds(call, "a" * 20 + "!", 1) > 50 * seconds(call, "a" * 10 + "!", 3)
    else:
        assert slow_attack(re.compile(pattern), "search", "aab )")


# --- every function that reads text from outside


def quiet(call: Callable) -> Callable:
    "Wrap a call so that refusing the text is not an error."

    def run(text) -> None:
        try:
            call(text)
        except Exception as exc:
            if type(exc).__name__ not in ("RequestError", "PromptError", "ValueError", "WeightFileError", "HttpError"):
                raise

    return run


def lazily(place: str) -> Callable:
    module, _, name = place.rpartition(".")
    return lambda *given: getattr(importlib.import_module(f"diffusion_workers.{module}"), name)(*given)


def png_with(text: str) -> bytes:
    info = PngInfo()
    info.add_text("parameters", text, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def graph_of(text: str) -> dict:
    "A ComfyUI graph as long as a text: a chain in which every node has several links to the next one."
    nodes = {"0": {"class_type": "KSampler", "inputs": {"steps": 5, "cfg": 7, "positive": ["1", 0], "model": ["1", 0]}}}
    for index in range(1, len(text) // 64):
        link = [str(index + 1), 0]
        inputs = {"text": link, "string": link, "conditioning": link, "model": link, "clip": link, "value": link}
        nodes[str(index)] = {"class_type": "ConcatText", "inputs": inputs}
    return nodes


def embedded_names(text: str) -> None:
    names = ("a", "ab", "a b", "style")
    lazily("prompt.embeddings.split_at_names")(text, names)
    lazily("prompt.embeddings.unknown_names")(text, names)


def draws(text: str) -> None:
    lazily("prompt.variants.draw_prompt")(text, 1)


def request_of(text: str) -> None:
    lazily("request.errors.parse")(GenerationRequest, text)


def unknown_fields(text: str) -> None:
    request_of(json.dumps({"prompt": "a"} | {f"x{index}": index for index in range(len(text) // 8)}))


def long_name(text: str) -> None:
    request_of(json.dumps({"prompt": "a", "scheduler": text, text: 1}))


def host_of(text: str) -> None:
    headers = importlib.import_module("starlette.datastructures").Headers(raw=[(b"host", text.encode())])
    settings = importlib.import_module("diffusion_workers.settings.server").ServerSettings()
    lazily("server.middleware.check_host")(headers, settings)


def restored(text: str) -> None:
    lazily("planning.replay.restore_request")(RestoreRequest(parameters=text))


def tensor_names(text: str) -> None:
    for key in ("lora_unet_" + text + ".lora_up.weight", text, text + "_processor_" + text):
        lazily("lora.keys._split").__call__(key)


def schema_path(text: str) -> None:
    lazily("request.schema.split_path")(text)


def told_format(text: str) -> None:
    lazily("request.images.sniff_format")(text.encode())


BY_LENGTH = ("a ComfyUI graph", "unknown fields")  # only the length of the text matters
READERS: dict[str, Callable] = {
    "the format of a file": told_format,
    "an image in a request": lazily("request.images.image_bytes"),
    "the metadata of an image": lambda text: lazily("planning.replay.restore_result")(png_with(text)),
    "a text of parameters": lazily("request.metadata.parse_parameters"),
    "settings to restore": restored,
    "settings of another program": lazily("request.foreign_settings.from_text"),
    "tags in a prompt": lazily("request.foreign_settings.split_loras"),
    "syntax in a prompt": lazily("request.foreign_settings.prompt_syntax"),
    "a Dream command line": lazily("request.other_programs.from_dream"),
    "a text file of Easy Diffusion": lazily("request.other_programs.easy_text"),
    "JSON of another program": lambda text: lazily("request.other_programs.from_json_settings")(
        {"prompt": text, "loras": text, "lora_combined_1": text}
    ),
    "a ComfyUI graph": lambda text: lazily("request.comfyui.from_graph")(graph_of(text)),
    "a sampler's name": lazily("request.foreign_settings.scheduler_of"),
    "a prompt": lazily("prompt.syntax.parse"),
    "weights": lazily("prompt.weights.weigh"),
    "variants": draws,
    "styles": lazily("prompt.variants.read_styles"),
    "parts": lazily("prompt.schedules.split_parts"),
    "a schedule": lambda text: lazily("prompt.schedules.text_schedule")(text, 8),
    "LoRA tags": lazily("prompt.tags.take_loras"),
    "syntax drawn as text": lazily("prompt.tags.drawn_as_text"),
    "names of embeddings": embedded_names,
    "a request": request_of,
    "unknown fields": unknown_fields,
    "long names": long_name,
    "a field's path": schema_path,
    "a Host header": host_of,
    "an Accept header": lazily("server.routes.wanted_image"),
    "a line of the log": lazily("server.middleware.escape_controls"),
    "keys of a LoRA": tensor_names,
    "the name of a model": lazily("models.distilled.name_words"),
    "an image in a result": lazily("request.images.to_image_string"),
}
UNITS = (  # repeated units: openings of every syntax that is read, without their ends
    "a", " ", "\n", "\\", '"', ",", ":", "(", "[", "{", "<", "((a", "[a:", "[a|", "{a|b}", "{a|", "(a:1.1)",
    "(a)", "[a]", "[a:b:5]", "a:1 ", ": 1 ", ":1", ":.1", "<lora:", "<lora:a:1>", "<a", "__", "__a", "__a__",
    "_a", "$$", "1::", "BREAK", "BREAK ", " AND ", "AND", "embedding:", "embedding:a ", "Steps:", "\nSteps:",
    "Steps: 1,", "\nSteps: 1, ", "a: ", 'a: "', 'a: "b', "a: b, ", "a: [{", 'a: {"', "a,", "\na", "\nA: b",
    " -", " -s 5", "--a", "[[", "]", ")", "}", "])", "<!---->", "<!-- -->", "<?xml>", "%PDF", "q=0.5,",
    "image/png;q=0.1,", ";", "a.b", "[0]", ".a", "\x1b[", "\u2028", "Negative prompt:", "\nNegative prompt: ",
    "lora: 1, ", 'ControlNet 0: "', "\\(", "\\\\(", "é", "https://", "data:", "a" * 60 + " ", "é" * 20 + ",",
    "x]", "&amp;", "processor_", "_processor", "+++", ")+",
)  # fmt: skip
SECTIONS = ("", "a prompt\nSteps: 1, Sampler: Euler, a: ", '{"a": "')


@pytest.mark.parametrize("reader", READERS)
def test_readers_take_linear_time(reader: str):
    call = quiet(READERS[reader])
    call("a")
    slow = [
        (beginning, unit)
        for unit in (UNITS[:1] if reader in BY_LENGTH else UNITS)
        for beginning in SECTIONS
        if grows(call, repeated(beginning, unit), short=400)
    ]
    assert not slow
