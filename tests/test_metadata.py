"""Settings of other programs in PNG, JPEG and WebP files: restored ones can be planned, the rest is listed as lost."""

import gzip
import io
import json
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from diffusion_workers import DiffusionService
from diffusion_workers.cli.main import main
from diffusion_workers.models.manifest import builtin_path
from diffusion_workers.planning.replay import from_plan, restore
from diffusion_workers.planning.translate import from_parameters
from diffusion_workers.request.errors import RequestError
from diffusion_workers.request.metadata import parameters_line, read_metadata
from ez_diffusion_client.models import GenerationPlan, ModelInfo, ModelList, RestoredRequest

PROMPT = "a red circle on a white background"
LINE = (
    f"{PROMPT}\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1234, "
    "Size: 128x128, Model hash: abcdef1234, Model: other"
)
LINE_REQUEST = {
    "prompt": PROMPT,
    "negative_prompt": "blurry",
    "num_inference_steps": 20,
    "scheduler": "dpmpp_2m",
    "use_karras_sigmas": True,
    "guidance_scale": 7.0,
    "seed": 1234,
    "width": 128,
    "height": 128,
}


# --- files ------------------------------------------------------------------


def blank_image(mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (64, 64), "red")


def png(kind: str = "tEXt", **texts: str) -> bytes:
    "A PNG with these text chunks of one kind: tEXt, zTXt or iTXt."
    info, buffer = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        if kind == "iTXt":
            info.add_itxt(key, text, zip=True)
        else:
            info.add_text(key, text, zip=kind == "zTXt")
    blank_image().save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def with_exif(kind: str, tags: dict[int, Any], inner: bool = True) -> bytes:
    "A JPEG or WebP with EXIF tags, in the Exif sub-IFD or in the main IFD."
    exif, buffer = Image.Exif(), io.BytesIO()
    block = exif.get_ifd(ExifTags.IFD.Exif) if inner else exif
    for tag, value in tags.items():
        block[tag] = value
    blank_image().save(buffer, kind, exif=exif.tobytes())
    return buffer.getvalue()


def with_comment(kind: str, comment: bytes | str) -> bytes:
    return with_exif(kind, {ExifTags.Base.UserComment: comment})


def with_chunk(name: bytes, content: bytes) -> bytes:
    "A PNG with a chunk inserted after its header."
    data = png()
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:33] + chunk + data[33:]


def hidden(text: bytes, signature: bytes = b"stealth_pngcomp") -> bytes:
    "A PNG with text hidden in the lowest bits of its alpha channel, column by column."
    payload = signature + (8 * len(text)).to_bytes(4, "big") + text
    alpha = np.full(256 * 256, 254, np.uint8)
    alpha[: 8 * len(payload)] |= np.unpackbits(np.frombuffer(payload, np.uint8))
    image = Image.new("RGBA", (256, 256), "red")
    image.putalpha(Image.fromarray(alpha.reshape(256, 256).T.copy()))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    with DiffusionService() as started:
        started.log_failures = False
        yield started


def runnable(service: DiffusionService, data: bytes | str) -> RestoredRequest:
    "The restored request, after planning it unchanged."
    result = service.restore(parameters=data) if isinstance(data, str) else service.restore(data)
    assert result.ok, result.errors
    assert not result.restored.missing_images
    planned = service.plan(**result.restored.request)
    assert planned.ok, planned.errors
    return result.restored


def lost(restored: RestoredRequest) -> dict[str, str | None]:
    return {entry.name: entry.given for entry in restored.lost or []}


# --- text chunks, EXIF comments and their encodings -------------------------


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_png_text_chunks(service: DiffusionService, kind: str) -> None:
    assert runnable(service, png(kind, parameters=LINE)).request == LINE_REQUEST


COMMENTS = {
    "UTF-8": b"UNICODE\0" + LINE.encode(),
    "UTF-16, big endian": b"UNICODE\0" + LINE.encode("utf-16-be"),
    "UTF-16, little endian": b"UNICODE\0" + LINE.encode("utf-16-le"),
    "UTF-16 with a mark": b"UNICODE\0" + LINE.encode("utf-16"),
    "ASCII": b"ASCII\0\0\0" + LINE.encode(),
    "UTF-8 declared as ASCII": b"ASCII\0\0\0" + LINE.replace("red", "größer").encode(),
    "undefined": bytes(8) + LINE.encode(),
    "no encoding": LINE.encode(),
    "zero at the end": b"UNICODE\0" + LINE.encode() + b"\0",
}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("comment", COMMENTS.values(), ids=COMMENTS)
def test_exif_user_comments(kind: str, comment: bytes) -> None:
    request = restore(with_comment(kind, comment)).request
    assert request["prompt"] in (PROMPT, PROMPT.replace("red", "größer"))
    assert (request["seed"], request["negative_prompt"]) == (1234, "blurry")


@pytest.mark.parametrize("prompt", ["größer", "円と四角", "круг", "🔴 circle"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-be", "utf-16-le", "utf-16"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_unicode_prompts_in_user_comments(kind: str, encoding: str, prompt: str) -> None:
    text = f"{prompt}\nSteps: 3, Seed: 5"
    assert restore(with_comment(kind, b"UNICODE\0" + text.encode(encoding))).request["prompt"] == prompt


def test_user_comment_in_the_main_ifd() -> None:
    "Fooocus writes the UserComment of a JPEG as plain text in the main IFD, without an encoding prefix."
    data = with_exif(
        "JPEG", {0x9286: json.dumps({"prompt": "a cat", "steps": 9, "seed": "4"}), 0x927C: "fooocus"}, False
    )
    assert restore(data).request == {"prompt": "a cat", "num_inference_steps": 9, "seed": 4}


@pytest.mark.parametrize("comment", [b"ASCII\0\0\0A day at the sea", b"UNICODE\0" + b"Ferien, Tag 1: am Meer"])
def test_ordinary_user_comments_are_ignored(comment: bytes) -> None:
    assert restore(with_comment("JPEG", comment)).source == "none"


# --- layouts of the parameters text -----------------------------------------

LAYOUTS = {
    "line break at the end": LINE + "\n",
    "Windows": LINE.replace("\n", "\r\n"),
    "Windows, at the end": LINE.replace("\n", "\r\n") + "\r\n\r\n",
    "old Macintosh": LINE.replace("\n", "\r"),
    "further lines": LINE + "\nTemplate: a {red|blue} circle, small\nNegative Template: blurry",
    "further lines, Windows": (LINE + "\nTemplate: a {red|blue} circle\nNegative Template: blurry").replace(
        "\n", "\r\n"
    ),
    "line break in quotes": LINE + ', Note: "a\nb"',
    "settings on two lines": LINE.replace(", Seed", "\nSeed"),
    "another order": LINE.replace("Steps: 20, ", "").replace("Size: 128x128", "Size: 128x128, Steps: 20"),
    "separators |": LINE.replace("Steps: 20, ", "Steps: 20 | ")
    .replace(", S", " | S")
    .replace(", C", " | C")
    .replace(", M", " | M"),
    "without line breaks": LINE.replace("\n", " "),
    "JSON in a value": LINE + ', Civitai resources: [{"type":"checkpoint","modelVersionId":1}], Civitai metadata: {}',
    "white space before": LINE.replace("\nSteps", "\n  Steps"),
}


@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_the_parameters_text(service: DiffusionService, text: str) -> None:
    restored = runnable(service, png(parameters=text))
    assert restored.request == LINE_REQUEST
    assert lost(restored)["Model"] == "other"


def test_unknown_entries_are_listed_as_lost() -> None:
    given = lost(restore(LAYOUTS["further lines"]))
    assert (given["Template"], given["Negative Template"]) == ("a {red|blue} circle, small", "blurry")
    assert lost(restore(LAYOUTS["line break in quotes"]))["Note"] == "a\nb"
    assert lost(restore(LAYOUTS["JSON in a value"]))["Civitai resources"].startswith('[{"type"')


# --- values -----------------------------------------------------------------


def with_value(old: str, new: str) -> str:
    assert old in LINE
    return LINE.replace(old, new)


@pytest.mark.parametrize(
    ("text", "changed", "named"),
    [
        (with_value("1234,", "-1,"), {"seed": None}, {"Seed": "-1"}),
        (with_value("1234,", "6687881544318117707,"), {"seed": None}, {"Seed": "6687881544318117707"}),
        (with_value("1234,", "18446744073709551615,"), {"seed": None}, {"Seed": "18446744073709551615"}),
        (with_value("1234,", "9007199254740991,"), {"seed": 9007199254740991}, {}),
        (with_value("1234,", "1234.0,"), {"seed": 1234}, {}),
        (with_value("128x128", "123x131"), {"width": 120, "height": 128}, {"Size": "123x131"}),
        (with_value("128x128", "128 x 64"), {"width": 128, "height": 64}, {}),
        (with_value("128x128", "9000x9000"), {"width": None, "height": None}, {"Size": "9000x9000"}),
        (with_value("128x128", "8192x8192"), {"width": None, "height": None}, {"width and height": "8192 x 8192"}),
        (with_value("Steps: 20", "Steps: "), {"num_inference_steps": None}, {"Steps": None}),
        (with_value("CFG scale: 7", "CFG scale: 1e9"), {"guidance_scale": None}, {"CFG scale": "1e9"}),
        (with_value("CFG scale: 7", "CFG scale: nan"), {"guidance_scale": None}, {"CFG scale": "nan"}),
        (LINE + ", Denoising strength: 0.5, Hires upscale: 2", {}, {"Denoising strength": "0.5", "Hires upscale": "2"}),
        (LINE + ", Denoising strength: 0.5, First pass size: 64x64", {}, {"Denoising strength": "0.5"}),
        (LINE + ", Clip skip: 2", {"clip_skip": 1}, {}),
        (LINE + ", Clip skip: 1", {"clip_skip": 0}, {}),
        (LINE + ", ENSD: 31337, RNG: NV", {}, {"ENSD": "31337", "RNG": "NV"}),
    ],
)
def test_parameter_values(service: DiffusionService, text: str, changed: dict[str, Any], named: dict[str, str]) -> None:
    restored = runnable(service, text)
    expected = {key: value for key, value in (LINE_REQUEST | changed).items() if value is not None}
    assert restored.request == expected
    assert named.items() <= lost(restored).items()


@pytest.mark.parametrize(
    ("sampler", "scheduler", "karras", "named"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", True, None),
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpmpp_2m", True, None),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", True, None),
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "dpmpp_2m", False, None),
        ("Sampler: DPM++ 2M", "dpmpp_2m", False, None),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", None, None),
        ("Sampler: Euler, Schedule type: SGM Uniform", "euler", None, None),
        ("Sampler: Euler a, Schedule type: Karras", "euler_ancestral", None, "Schedule type"),
        ("Sampler: DDIM, Schedule type: Automatic", "ddim", None, None),
        ("Sampler: PLMS", "pndm", None, None),
        ("Sampler: UniPC", "unipc", False, None),
        ("Sampler: LCM", "lcm", None, None),
        ("Sampler: DPM2 a Karras", "kdpm2_ancestral", True, None),
        ("Sampler: DPM++ SDE Karras", None, None, "Sampler"),
        ("Sampler: DPM++ 2S a", None, None, "Sampler"),
        ("Sampler: Restart", None, None, "Sampler"),
    ],
)
def test_samplers(
    service: DiffusionService, sampler: str, scheduler: str | None, karras: bool | None, named: str | None
) -> None:
    restored = runnable(service, with_value("Sampler: DPM++ 2M Karras", sampler))
    assert restored.request.get("scheduler") == scheduler
    assert restored.request.get("use_karras_sigmas") == karras
    assert set(lost(restored)) - {"Model"} == ({named} if named else set())


def test_image_to_image_and_inpainting(service: DiffusionService) -> None:
    "Metadata does not contain the images, so they are listed as missing; with them, the request can be planned."
    image = service.restore(parameters=LINE + ", Denoising strength: 0.5").restored
    assert (image.request["strength"], image.missing_images) == (0.5, ["image"])
    outside = restore(LINE + ", Denoising strength: 0.5, Mask mode: Inpaint not masked, Masked content: original")
    assert (outside.request["inpaint"], len(outside.lost)) == ({"invert": True}, 2)
    painted = service.restore(parameters=LINE + ", Denoising strength: 0.5, Mask blur: 4.0").restored
    assert (painted.request["inpaint"], painted.missing_images) == ({"mask_blur": 4}, ["image", "mask_image"])
    assert {"image", "mask_image"} <= set(lost(painted))
    images = {"image": blank_image(), "mask_image": Image.new("L", (64, 64), 255)}
    assert service.plan(**image.request, image=blank_image()).ok
    assert service.plan(**painted.request, **images).ok


def test_loras_in_prompts(service: DiffusionService) -> None:
    offered = next(model for model in service.list_models().models if model.name == "shapes-sd15").loras
    name = offered[0]
    tags = f"<lora:{name}:0.8> <lora:missing:0.5:1> <lora:{name}:0.3>"
    restored = runnable(service, LINE.replace("a red circle", f"a red circle {tags}"))
    assert restored.request["prompt"] == PROMPT
    assert restored.request["loras"] == [{"name": name, "scale": 0.8}]
    reasons = [entry.reason for entry in restored.lost if entry.name == "LoRA"]
    assert reasons == ["the model offers no such LoRA", "it is given twice, the first one is kept"]
    both = restore("a cat <lora:ink:0.5:1> <lora:folder/line.safetensors:te=0.2:unet=0.4>").request["loras"]
    assert both[0] == {"name": "ink", "scale": 1.0, "text_encoder_scale": 0.5}
    assert (both[1]["scale"], both[1]["text_encoder_scale"]) == (0.4, 0.2)


def test_loras_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A tag names a file without its extension; the file is used if it is in a folder that the operator allows."
    source = builtin_path("shapes-sd15") / "loras" / "outline.safetensors"
    (tmp_path / "ink").mkdir()
    (tmp_path / "ink" / "line.safetensors").write_bytes(source.read_bytes())
    monkeypatch.setenv("DIFFUSION_WORKERS_LORAS", str(tmp_path))
    with DiffusionService() as service:
        name = f"{LINE.replace(PROMPT, PROMPT + ' <lora:ink/line:0.5> <lora:ink/other:1>')}, Model: shapes-sd15"
        restored = runnable(service, name)
        assert restored.request["loras"] == [{"name": "ink/line.safetensors", "scale": 0.5}]
        assert lost(restored)["LoRA"] == "ink/other: 1"


def test_command_line_shows_the_restored_request(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "`replay --show-request` prints the restored request as JSON, and the lost settings to stderr."
    path = tmp_path / "image.png"
    path.write_bytes(png(parameters=LINE + ", ENSD: 31337"))
    assert main(["replay", str(path)]) != 0
    assert "--show-request" in capsys.readouterr().err
    assert main(["replay", str(path), "--show-request"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == LINE_REQUEST
    assert "lost: ENSD 31337" in shown.err
    path.write_bytes(png())
    assert main(["replay", str(path), "--show-request"]) == 1
    assert main(["replay", str(tmp_path / "none.png"), "--show-request"]) != 0


def test_a1111_prompt_syntax_is_restored() -> None:
    "Weights, BREAK and prompt editing are kept; a prompt with AND stays plain, and its syntax is listed as lost."
    line = "a (red:1.3) cat BREAK [blue:green:0.5]\nSteps: 3, Seed: 1"
    restored = restore(line)
    assert restored.request["prompt"] == "a (red:1.3) cat BREAK [blue:green:0.5]"
    assert (restored.request["prompt_syntax"], restored.request["prompt_weighting"]) == ("a1111", "a1111")
    assert not restored.lost
    joined = restore(line.replace("cat", "cat AND a dog"))
    assert "prompt_syntax" not in joined.request
    assert [entry.given for entry in joined.lost] == ["(red:1.3)", "AND", "BREAK", "[blue:green:0.5]"]
    assert "prompt_syntax" not in restore("a red cat\nSteps: 3, Seed: 1").request


# --- models -----------------------------------------------------------------


def test_forge_flux_parameters(service: DiffusionService) -> None:
    "Forge writes `Sampler: Euler` and a distilled CFG scale; a Flux model is chosen, and the request can be planned."
    line = (
        f"{PROMPT}\nSteps: 10, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, "
        "Seed: 5, Size: 128x128, Model: my-flux, Version: f2.0.1"
    )
    flux = ModelInfo(name="my-other-flux", family="flux", source="builtin:shapes-flux", loaded=False)
    plain = ModelInfo(name="plain", family="sd15", source="builtin:shapes-sd15", loaded=False)
    chosen = restore(line, ModelList(default="plain", models=[plain, flux]))
    assert chosen.request["model"] == "my-other-flux"
    assert (chosen.request["guidance_scale"], chosen.request["scheduler"]) == (3.5, "flow_match_euler")
    assert "true_cfg_scale" not in chosen.request
    assert "my-other-flux" in next(entry.reason for entry in chosen.lost if entry.name == "Model")
    alone = restore(line, ModelList(default="plain", models=[plain]))
    assert (alone.request["guidance_scale"], alone.request["scheduler"]) == (1.0, "euler")
    assert lost(alone)["Distilled CFG Scale"] == "3.5"
    named = runnable(service, line.replace("my-flux", "shapes-flux"))
    assert named.request["model"] == "shapes-flux"
    assert service.plan(named.request).plan.guidance_scale == 3.5
    ancestral = restore(
        line.replace("Euler", "Euler a").replace("my-flux", "my-other-flux"), ModelList(default="plain", models=[flux])
    )
    assert lost(ancestral)["Sampler"] == "Euler a"
    odd = runnable(service, line.replace("my-flux", "shapes-flux").replace("128x128", "136x120"))
    assert (odd.request["width"], odd.request["height"]) == (144, 128)


def test_clip_skip_of_sdxl() -> None:
    "1 and 2 both select the layer that SDXL uses by default; lines of this project's own images read back the same."
    for family, skip, expected in (("sdxl", 1, 0), ("sdxl", 2, 0), ("sdxl", 3, 1), ("sd15", 1, 0), ("sd15", 2, 1)):
        models = ModelList(default="m", models=[ModelInfo(name="m", family=family, source="hub:a/b", loaded=False)])
        assert restore(f"a cat\nSteps: 3, Clip skip: {skip}", models).request["clip_skip"] == expected


def test_own_parameters_lines_round_trip(service: DiffusionService) -> None:
    for model in ("shapes-sd15", "shapes-sdxl", "shapes-flux"):
        plan = service.plan(model=model, prompt=PROMPT, seed=3, num_inference_steps=4).plan
        restored = runnable(service, parameters_line(plan))
        assert restored.lost is None
        again = service.plan(restored.request).plan
        keep = {"prompt", "seeds", "width", "height", "num_inference_steps", "guidance_scale", "model", "clip_skip"}
        assert again.model_dump(include=keep) == plan.model_dump(include=keep)
    skipping = service.plan(model="shapes-sdxl", prompt=PROMPT, clip_skip=1).plan
    assert "Clip skip: 3" in parameters_line(skipping)
    assert runnable(service, parameters_line(skipping)).request["clip_skip"] == 1


def test_invalid_embedded_plans_fall_back_to_parameters(service: DiffusionService) -> None:
    "An untrusted file may contain a plan with out-of-range numbers."
    plan = service.plan(prompt=PROMPT, seed=3).plan
    text = plan.model_dump(mode="json", exclude_none=True) | {"seeds": [2**60], "image_index": 7}
    restored = restore(png(diffusion_workers=json.dumps(text), parameters=LINE))
    assert restored.lost[0].name == "plan"
    assert restored.request["seed"] == 1234


# --- other programs ---------------------------------------------------------

FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)",
    "base_model": "juggernautXL",
    "base_model_hash": "aa",
    "full_prompt": ["a red circle"],
    "guidance_scale": 4.0,
    "loras": [["heart.safetensors", 0.5, "bb"], ["offset.safetensors", 0.1, "cc"]],
    "metadata_scheme": "fooocus",
    "negative_prompt": "blurry",
    "performance": "Speed",
    "prompt": "a red circle",
    "refiner_model": "None",
    "resolution": "(128, 192)",
    "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "seed": "4711",
    "sharpness": 2.0,
    "steps": 30,
    "styles": "['Fooocus V2']",
    "vae": "Default (model)",
    "version": "Fooocus v2.5.0",
}
DRAW_THINGS = {
    "c": "a red circle",
    "uc": "blurry",
    "seed": 11,
    "steps": 12,
    "scale": 4.5,
    "size": "128x192",
    "model": "sd_v1.5_f16.ckpt",
    "sampler": "DPM++ 2M Karras",
    "strength": 1,
    "mask_blur": 1.5,
    "seed_mode": "Scale Alike",
    "lora": [{"model": "heart.ckpt", "weight": 0.6}],
    "v2": {"width": 128, "height": 192, "clipSkip": 1},
    "profile": {},
}
NOVELAI = {
    "prompt": "a red circle",
    "uc": "blurry",
    "steps": 28,
    "height": 192,
    "width": 128,
    "scale": 5.0,
    "seed": 4294967295,
    "sampler": "k_dpmpp_2m",
    "noise_schedule": "karras",
    "cfg_rescale": 0.2,
    "n_samples": 1,
    "sm": True,
    "sm_dyn": False,
    "strength": 0.7,
    "noise": 0.2,
    "request_type": "PromptGenerateRequest",
    "signed_hash": "x",
}
INVOKE = {
    "generation_mode": "txt2img",
    "positive_prompt": "a red circle",
    "negative_prompt": "blurry",
    "width": 128,
    "height": 192,
    "seed": 7,
    "cfg_scale": 6.5,
    "steps": 15,
    "scheduler": "dpmpp_2m_k",
    "clip_skip": 1,
    "cfg_rescale_multiplier": 0.0,
    "model": {"key": "k", "name": "dreamshaper", "base": "sd-1", "type": "main"},
    "loras": [{"model": {"name": "heart"}, "weight": 0.75}],
    "app_version": "5.0.0",
    "rand_device": "cpu",
    "vae": {"name": "mse"},
    "controlnets": [],
}
SWARM = {
    "sui_image_params": {
        "prompt": "a red circle",
        "negativeprompt": "blurry",
        "model": "Official/sd_xl",
        "seed": 9,
        "steps": 14,
        "cfgscale": 3.5,
        "width": 128,
        "height": 192,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "loras": ["heart", "none"],
        "loraweights": ["0.8", "1"],
        "swarm_version": "0.9",
        "variationseed": 4,
    },
    "sui_extra_data": {"date": "2025-01-01"},
}
EASY = {
    "prompt": "a red circle",
    "negative_prompt": "blurry",
    "seed": "42",
    "num_inference_steps": "25",
    "guidance_scale": "7.5",
    "width": "128",
    "height": "192",
    "sampler_name": "euler_a",
    "use_stable_diffusion_model": "sd-v1-5",
    "use_lora_model": "heart",
    "lora_alpha": "0.5",
    "use_face_correction": "GFPGANv1.4",
    "use_upscale": "None",
    "upscale_amount": "4",
    "clip_skip": "True",
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description><exif:UserComment><rdf:Alt>'
    '<rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></exif:UserComment></rdf:Description></rdf:RDF></x:xmpmeta>'
)
escaped = json.dumps(DRAW_THINGS).replace("&", "&amp;").replace('"', "&quot;")
PROGRAMS = {
    "Fooocus": (png(parameters=json.dumps(FOOOCUS), fooocus_scheme="fooocus"), "dpmpp_2m_sde", 4711, 0.5, "sharpness"),
    "Fooocus, JPEG": (with_exif("JPEG", {0x9286: json.dumps(FOOOCUS)}, False), "dpmpp_2m_sde", 4711, 0.5, "styles"),
    "Draw Things": (
        with_comment("JPEG", b"ASCII\0\0\0" + json.dumps(DRAW_THINGS).encode()),
        "dpmpp_2m",
        11,
        0.6,
        "model",
    ),
    "Draw Things, XMP": (png("iTXt", **{"XML:com.adobe.xmp": XMP.format(escaped)}), "dpmpp_2m", 11, 0.6, "model"),
    "NovelAI": (
        png(Comment=json.dumps(NOVELAI), Software="NovelAI", Source="NovelAI Diffusion V3"),
        "dpmpp_2m",
        4294967295,
        None,
        "sm",
    ),
    "NovelAI, hidden": (
        hidden(
            gzip.compress(json.dumps({"Software": "NovelAI", "Source": "V3", "Comment": json.dumps(NOVELAI)}).encode())
        ),
        "dpmpp_2m",
        4294967295,
        None,
        "Source",
    ),
    "InvokeAI": (png("iTXt", invokeai_metadata=json.dumps(INVOKE)), "dpmpp_2m", 7, 0.75, "vae"),
    "SwarmUI": (png(parameters=json.dumps(SWARM)), "dpmpp_2m", 9, 0.8, "variationseed"),
    "SwarmUI, JPEG": (
        with_comment("JPEG", b"UNICODE\0" + json.dumps(SWARM).encode("utf-16-le")),
        "dpmpp_2m",
        9,
        0.8,
        "variationseed",
    ),
    "Easy Diffusion": (png(**EASY), "euler_ancestral", 42, 0.5, "use_face_correction"),
    "Easy Diffusion, WebP": (
        with_comment("WEBP", b"UNICODE\0" + json.dumps(EASY).encode("utf-16-be")),
        "euler_ancestral",
        42,
        0.5,
        "use_face_correction",
    ),
}


@pytest.mark.parametrize(("data", "scheduler", "seed", "scale", "named"), PROGRAMS.values(), ids=PROGRAMS)
def test_settings_of_other_programs(
    service: DiffusionService, data: bytes, scheduler: str, seed: int, scale: float | None, named: str
) -> None:
    restored = runnable(service, data)
    request = restored.request
    assert (request["prompt"], request["negative_prompt"]) == ("a red circle", "blurry")
    assert (request["seed"], request["scheduler"]) == (seed, scheduler)
    assert (request["width"], request["height"]) == (128, 192)
    assert {"num_inference_steps", "guidance_scale"} <= set(request)
    assert request.get("use_karras_sigmas", False) is (scheduler != "euler_ancestral")
    assert request.get("loras") == (None if scale is None else [{"name": "heart", "scale": scale}])
    assert named in lost(restored)


def test_unsupported_settings_are_listed_as_lost(service: DiffusionService) -> None:
    names = lost(runnable(service, PROGRAMS["Fooocus"][0]))
    assert names["adm_guidance"] == "(1.5, 0.8, 0.3)"
    assert {"performance", "styles", "vae", "sharpness", "base_model", "loras"} <= set(names)
    assert lost(runnable(service, json.dumps(NOVELAI)))["sm"] == "true"


@pytest.mark.parametrize("ending", ["json", "txt"])
def test_easy_diffusion_settings_files(tmp_path: Path, ending: str) -> None:
    labels = {
        "Width": 512,
        "Height": 768,
        "Seed": 42,
        "Steps": 25,
        "Guidance Scale": 7.5,
        "Sampler": "euler_a",
        "Negative Prompt": "blurry",
        "Stable Diffusion model": "sd-v1-5",
    }
    lines = "".join(f"\r\n{name}: {value}" for name, value in labels.items())
    path = tmp_path / f"image.{ending}"
    path.write_bytes((json.dumps(EASY) if ending == "json" else f"a red circle{lines}").encode())
    request = restore(path).request
    assert (request["prompt"], request["negative_prompt"], request["seed"]) == ("a red circle", "blurry", 42)
    assert (request["scheduler"], request["guidance_scale"]) == ("euler_ancestral", 7.5)


def test_legacy_invokeai_metadata(service: DiffusionService) -> None:
    image = {
        "prompt": [{"prompt": "a red circle [blurry]", "weight": 1.0}],
        "steps": 9,
        "cfg_scale": 7.5,
        "threshold": 0,
        "perlin": 0,
        "height": 192,
        "width": 128,
        "seed": 3,
        "seamless": False,
        "hires_fix": False,
        "type": "txt2img",
        "postprocessing": None,
        "sampler": "k_euler_a",
        "variations": [],
    }
    metadata = {"model": "stable diffusion", "model_weights": "sd-1.5", "app_id": "invoke-ai/InvokeAI", "image": image}
    dream = '"a red circle [blurry]" -s 9 -S 3 -W 128 -H 192 -C 7.5 -A k_euler_a'
    for data in (png(**{"sd-metadata": json.dumps(metadata)}), png(Dream=dream)):
        request = runnable(service, data).request
        assert (request["prompt"], request["negative_prompt"], request["scheduler"]) == (
            "a red circle",
            "blurry",
            "euler_ancestral",
        )
        assert (request["num_inference_steps"], request["seed"], request["height"]) == (9, 3, 192)


def test_image_to_image_of_other_programs() -> None:
    for data, missing in (
        ({**INVOKE, "generation_mode": "img2img", "strength": 0.6}, ["image"]),
        ({**INVOKE, "generation_mode": "inpaint", "strength": 0.6}, ["image", "mask_image"]),
        ({**NOVELAI, "request_type": "Img2ImgRequest", "strength": 0.6}, ["image"]),
        ({**NOVELAI, "request_type": "NativeInfillingRequest", "strength": 0.6}, ["image", "mask_image"]),
        ({**DRAW_THINGS, "strength": 0.6}, ["image"]),
    ):
        restored = restore(json.dumps(data))
        assert (restored.request["strength"], sorted(restored.missing_images)) == (0.6, missing)


# --- ComfyUI ----------------------------------------------------------------


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(**changes: Any) -> dict[str, Any]:
    "The default graph of ComfyUI, with some nodes replaced or added."
    nodes = {
        "3": node(
            "KSampler",
            seed=156680208700286,
            steps=20,
            cfg=8.0,
            sampler_name="dpmpp_2m",
            scheduler="karras",
            denoise=1.0,
            model=["4", 0],
            positive=["6", 0],
            negative=["7", 0],
            latent_image=["5", 0],
        ),
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5.safetensors"),
        "5": node("EmptyLatentImage", width=128, height=192, batch_size=1),
        "6": node("CLIPTextEncode", text="a red circle", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="x", images=["8", 0]),
    }
    return nodes | {name.removeprefix("n"): value for name, value in changes.items()}


def sampler(kind: str = "KSampler", **changes: Any) -> dict[str, Any]:
    inputs = graph()["3"]["inputs"] | changes
    return node(kind, **{name: value for name, value in inputs.items() if value is not None})


EXPECTED = {
    "prompt": "a red circle",
    "negative_prompt": "blurry",
    "seed": 156680208700286,
    "num_inference_steps": 20,
    "guidance_scale": 8.0,
    "scheduler": "dpmpp_2m",
    "use_karras_sigmas": True,
    "width": 128,
    "height": 192,
}
CUSTOM = {
    "n3": node(
        "SamplerCustomAdvanced",
        noise=["30", 0],
        guider=["31", 0],
        sampler=["32", 0],
        sigmas=["33", 0],
        latent_image=["5", 0],
    ),
    "n30": node("RandomNoise", noise_seed=156680208700286),
    "n31": node("CFGGuider", model=["4", 0], positive=["6", 0], negative=["7", 0], cfg=8.0),
    "n32": node("KSamplerSelect", sampler_name="dpmpp_2m"),
    "n33": node("BasicScheduler", model=["4", 0], scheduler="karras", steps=20, denoise=1.0),
}
GRAPHS = {
    "default": graph(),
    "advanced": graph(
        n3=sampler(
            "KSamplerAdvanced",
            seed=None,
            noise_seed=156680208700286,
            add_noise="enable",
            start_at_step=0,
            end_at_step=10000,
        )
    ),
    "custom advanced": graph(**CUSTOM),
    "custom": graph(
        **{
            **CUSTOM,
            "n3": node(
                "SamplerCustom",
                add_noise=True,
                noise_seed=156680208700286,
                cfg=8.0,
                model=["4", 0],
                positive=["6", 0],
                negative=["7", 0],
                sampler=["32", 0],
                sigmas=["33", 0],
                latent_image=["5", 0],
            ),
        }
    ),
    "karras scheduler": graph(
        **{**CUSTOM, "n33": node("KarrasScheduler", steps=20, sigma_max=14.6, sigma_min=0.03, rho=7.0)}
    ),
    "texts through links": graph(
        n6=node("CLIPTextEncode", text=["60", 0], clip=["4", 1]),
        n60=node("StringConcatenate", string_a="a red", string_b=["61", 0], delimiter=" "),
        n61=node("PrimitiveString", value="circle"),
    ),
    "numbers through links": graph(
        n3=sampler(seed=["30", 0], steps=["31", 0]),
        n30=node("Seed (rgthree)", seed=156680208700286),
        n31=node("PrimitiveInt", value=20),
        n5=node("EmptyLatentImage", width=["51", 0], height=192),
        n51=node("INTConstant", value=128),
    ),
    "random text with its result": graph(
        n6=node("CLIPTextEncode", text=["60", 0], clip=["4", 1]),
        n60=node("ShowText|pysssh", text=["61", 0], text_0="a red circle"),
        n61=node("DPRandomGenerator", text="a {red|blue} circle", seed=3),
    ),
    "reroute": graph(
        n3=sampler(model=["40", 0], positive=["41", 0]),
        n40=node("Reroute", **{"": ["4", 0]}),
        n41=node("Reroute", **{"": ["6", 0]}),
    ),
    "sdxl texts": graph(
        n6=node(
            "CLIPTextEncodeSDXL", width=1024, height=1024, text_g="a red circle", text_l="a red circle", clip=["4", 1]
        )
    ),
    "later pass": graph(
        n8=node("VAEDecode", samples=["21", 0], vae=["4", 2]),
        n20=node("LatentUpscaleBy", samples=["3", 0], scale_by=1.5),
        n21=sampler(seed=5, steps=8, denoise=0.5, latent_image=["20", 0]),
    ),
}


@pytest.mark.parametrize("nodes", GRAPHS.values(), ids=GRAPHS)
def test_comfyui_graphs(service: DiffusionService, nodes: dict[str, Any]) -> None:
    restored = runnable(service, png(prompt=json.dumps(nodes), workflow=json.dumps({"nodes": [], "links": []})))
    assert restored.request == EXPECTED
    assert "v1-5.safetensors" in lost(restored).values()


def test_comfyui_graph_in_webp_exif(service: DiffusionService) -> None:
    "WebP has no text chunks, so ComfyUI writes to the EXIF camera tags Make and Model."
    texts = {ExifTags.Base.Model: "prompt:" + json.dumps(graph()), ExifTags.Base.Make: "workflow:{}"}
    assert runnable(service, with_exif("WEBP", texts, inner=False)).request == EXPECTED


def test_later_sampler_passes_are_listed_as_lost() -> None:
    given = lost(restore(json.dumps(GRAPHS["later pass"])))
    assert "denoise: 0.5" in given["KSampler 21"]


def test_loras_in_comfyui_graphs(service: DiffusionService) -> None:
    loras = {
        "n3": sampler(model=["11", 0]),
        "n10": node(
            "LoraLoader",
            lora_name="sd15\\heart.safetensors",
            strength_model=0.6,
            strength_clip=0.4,
            model=["4", 0],
            clip=["4", 1],
        ),
        "n11": node("LoraLoaderModelOnly", lora_name="other.safetensors", strength_model=1.0, model=["10", 0]),
        "n6": node("CLIPTextEncode", text="a red circle", clip=["12", 0]),
        "n12": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["10", 1]),
    }
    restored = runnable(service, json.dumps(graph(**loras)))
    assert restored.request["loras"] == [{"name": "heart", "scale": 0.6, "text_encoder_scale": 0.4}]
    assert restored.request["clip_skip"] == 1
    assert lost(restored)["lora_name"] == "other.safetensors: 1.0"
    power = node(
        "Power Lora Loader (rgthree)",
        lora_1={"on": True, "lora": "heart.safetensors", "strength": 0.5},
        lora_2={"on": False, "lora": "b", "strength": 1},
        model=["4", 0],
        clip=["4", 1],
    )
    assert runnable(service, json.dumps(graph(n3=sampler(model=["10", 0]), n10=power))).request["loras"] == [
        {"name": "heart", "scale": 0.5}
    ]


def test_image_to_image_in_comfyui_graphs() -> None:
    start = {"n3": sampler(denoise=0.6, latent_image=["5", 0]), "n15": node("LoadImage", image="a.png")}
    plain = restore(json.dumps(graph(**start, n5=node("VAEEncode", pixels=["15", 0], vae=["4", 2]))))
    assert (plain.request["strength"], plain.missing_images) == (0.6, ["image"])
    for latent in (
        {"n5": node("VAEEncodeForInpaint", pixels=["15", 0], mask=["15", 1], vae=["4", 2], grow_mask_by=6)},
        {
            "n5": node("SetLatentNoiseMask", samples=["16", 0], mask=["15", 1]),
            "n16": node("VAEEncode", pixels=["15", 0], vae=["4", 2]),
        },
        {
            "n5": node(
                "InpaintModelConditioning",
                positive=["6", 0],
                negative=["7", 0],
                pixels=["15", 0],
                mask=["15", 1],
                vae=["4", 2],
            )
        },
    ):
        painted = restore(json.dumps(graph(**start, **latent)))
        assert (painted.request["strength"], painted.missing_images) == (0.6, ["image", "mask_image"])


@pytest.mark.parametrize("kind", ["ControlNetApply", "ControlNetApplyAdvanced"])
def test_controlnets_in_comfyui_graphs(service: DiffusionService, kind: str) -> None:
    positive = (
        {"conditioning": ["6", 0]}
        if kind == "ControlNetApply"
        else {"positive": ["6", 0], "negative": ["7", 0], "start_percent": 0.1, "end_percent": 0.8}
    )
    negative = ["7", 0] if kind == "ControlNetApply" else ["20", 1]
    changes = {
        "n3": sampler(positive=["20", 0], negative=negative),
        "n20": node(kind, strength=0.7, control_net=["21", 0], image=["22", 0], **positive),
        "n21": node("ControlNetLoader", control_net_name="canny"),
        "n22": node("LoadImage", image="edges.png"),
    }
    restored = service.restore(parameters=json.dumps(graph(**changes))).restored
    assert (restored.request["prompt"], restored.request["negative_prompt"]) == ("a red circle", "blurry")
    unit = restored.request["controlnets"][0]
    assert (unit["model"], unit["conditioning_scale"]) == ("canny", 0.7)
    assert restored.missing_images == ["controlnets[0].image"]
    if kind == "ControlNetApplyAdvanced":
        assert (unit["guidance_start"], unit["guidance_end"]) == (0.1, 0.8)
    unit["image"] = blank_image()
    assert service.plan(**restored.request).ok


def test_flux_comfyui_graph(service: DiffusionService) -> None:
    flux = graph(
        n3=node(
            "SamplerCustomAdvanced",
            noise=["30", 0],
            guider=["31", 0],
            sampler=["32", 0],
            sigmas=["33", 0],
            latent_image=["5", 0],
        ),
        n30=node("RandomNoise", noise_seed=18446744073709551615),
        n31=node("BasicGuider", model=["34", 0], conditioning=["35", 0]),
        n32=node("KSamplerSelect", sampler_name="euler"),
        n33=node("BasicScheduler", model=["34", 0], scheduler="simple", steps=20, denoise=1),
        n34=node("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=128, height=192, model=["4", 0]),
        n35=node("FluxGuidance", guidance=3.5, conditioning=["6", 0]),
        n4=node("UNETLoader", unet_name="shapes-flux.safetensors"),
        n6=node("CLIPTextEncodeFlux", clip_l="a circle", t5xxl="a red circle", guidance=2.0, clip=["40", 0]),
        n40=node("DualCLIPLoader"),
        n5=node("EmptySD3LatentImage", width=128, height=192, batch_size=1),
    )
    restored = runnable(service, png(prompt=json.dumps(flux)))
    request = restored.request
    assert (request["model"], request["guidance_scale"], request["scheduler"]) == (
        "shapes-flux",
        3.5,
        "flow_match_euler",
    )
    assert (request["prompt"], request["prompt_2"], request["num_inference_steps"]) == ("a circle", "a red circle", 20)
    given = lost(restored)
    assert given["noise_seed"] == "18446744073709551615"
    assert "max_shift: 1.15" in given["ModelSamplingFlux"]
    assert given["scheduler"] == "simple"


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("FaceDetailer", {"image": ["8", 0], "steps": 20, "denoise": 0.4}),
        ("ImageUpscaleWithModel", {"image": ["8", 0], "upscale_model": ["21", 0]}),
        ("ImageScaleBy", {"image": ["8", 0], "scale_by": 2.0}),
    ],
)
def test_comfyui_postprocessing_nodes_are_listed_as_lost(kind: str, inputs: dict[str, Any]) -> None:
    "Nodes that change the image are listed, before the first output or not; those that only decode or save are not."
    behind = {"n20": node(kind, **inputs), "n21": node("UpscaleModelLoader", model_name="4x.pth")}
    for ends in ({"n9": node("SaveImage", images=["20", 0])}, {"n19": node("SaveImage", images=["20", 0])}):
        restored = restore(json.dumps(graph(**behind, **ends)))
        [setting] = [setting for setting in restored.lost if "changes the image" in setting.reason]
        assert setting.name == f"{kind} 20"
    assert not [setting for setting in restore(json.dumps(graph())).lost or [] if "changes the image" in setting.reason]


def test_comfyui_graphs_without_a_usable_sampler() -> None:
    for text in ('{"3": {"class_type": "KSampler"}}', '{"3": {"class_type": "VideoMaker", "inputs": {}}}', '{"3": {}}'):
        restored = restore(png(prompt=text, workflow="{}"))
        assert restored.request == {}
        assert restored.lost


# --- bounded time and memory ------------------------------------------------


def peak_memory(data: bytes | str) -> int:  # bytes
    tracemalloc.start()
    try:
        restore(data)
    except RequestError:
        pass
    finally:
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return memory


UNITS = [
    " ",
    "\n",
    "\r\n",
    "a",
    "a: ",
    "a: b, ",
    'a: "',
    'a: "\\", ',
    "Steps: 1\n",
    "Steps: 20, a: [{",
    'a: [["',
    "Steps:",
    "Negative prompt:\n",
    "<lora:",
    "<lora:a:1>",
    "<lora:a:1:",
    "(a:1",
    "((",
    "[a|",
    "[a:b:",
    "<",
    "x\n",
    "Loras: a: 1, ",
    "Steps: 1| a: ",
    "Width: 5\nHeight: 5\n",
    "[",
    '{"a":',
    '{"1":[',
    '"',
    "ControlNet 0: ",
    "-s 5 ",
    "&quot;",
]


@pytest.mark.parametrize("head", ["", "a cat\nSteps: 20, Seed: 5, ", '"a', "{"])
@pytest.mark.parametrize("unit", UNITS)
def test_long_texts_yield_bounded_results(unit: str, head: str) -> None:
    "A parser with quadratic time would need hours for the longest text."
    for size in (10_000, 100_000, 1_000_000):
        restored = from_parameters(head + (unit * (size // len(unit) + 1))[:size])
        assert len(restored.lost or []) <= 201
        assert all(len(entry.given or "") <= 1003 for entry in restored.lost or [])


def test_large_and_deeply_nested_values_use_bounded_memory() -> None:
    deep = "[" * 900 + "]" * 900
    wide = {
        str(i): node(
            "KSampler",
            steps=1,
            cfg=1,
            latent_image=[str((i * 7 + 1) % 4000), 0],
            model=[str((i * 3 + 1) % 4000), 0],
            positive=[str(i), 1],
            text=[str((i + 1) % 4000), 0],
        )
        for i in range(4000)
    }
    joins = {str(i): node("TextConcatenate", **{f"t{j}": [str((i + j) % 60), 0] for j in range(30)}) for i in range(60)}
    joins["s"] = sampler(positive=["e", 0])
    joins["e"] = node("CLIPTextEncode", text=["0", 0], clip=["c", 0])
    many = {"1": node("KSampler", steps=1, cfg=1, **{f"x{i}": ["1", 0] for i in range(100_000)})}
    cases = [
        json.dumps({"prompt": "a", "steps": 3, "deep": json.loads(deep)}),
        json.dumps(wide),
        json.dumps(joins),
        json.dumps(many),
        json.dumps(
            {
                "nodes": [{"id": i, "type": "KSampler"} for i in range(50_000)],
                "links": [[i, i, 0, i, 0] for i in range(50_000)],
            }
        ),
        json.dumps({"c": "a", "uc": "b", **{f"k{i}": i for i in range(100_000)}}),
        json.dumps({"prompt": "a", "seed": 10**4000, "steps": 1}),
        '{"prompt": "a", "seed": 1' + "0" * 1_000_000 + "}",
        "[" * 1_000_000,
        '{"a":' * 200_000,
    ]
    for text in cases:
        assert peak_memory(text) < 300 * 2**20
        assert len(from_parameters(text).lost or []) <= 201


def test_decompression_bombs_use_bounded_memory() -> None:
    "Files whose text decompresses to a huge size are refused or read without it, and memory stays bounded."
    bomb = zlib.compress(bytes(200 * 2**20), 9)
    for data in (
        with_chunk(b"zTXt", b"parameters\0\0" + bomb),
        with_chunk(b"iTXt", b"parameters\0\1\0\0\0" + bomb),
        hidden(gzip.compress(bytes(4 * 2**20))),
        hidden(b"", b"stealth_pnginfo"),
        png(parameters="a" * 5_000_000),
    ):
        assert peak_memory(data) < 100 * 2**20


def test_corrupted_metadata_raises_only_request_errors() -> None:
    "Random bytes in the metadata lead to a request, an empty result, or a RequestError for the field `image`."
    random = np.random.default_rng(0)
    for data in (value[0] for value in PROGRAMS.values()):
        start = 40
        for _ in range(25):
            broken = bytearray(data)
            place = start + int(random.integers(0, max(1, min(len(data) - 60, 1500))))
            broken[place : place + 8] = random.bytes(8)
            try:
                restore(bytes(broken))
            except RequestError as refused:
                assert refused.errors[0].field == "image"


def test_metadata_is_read_from_opened_images(service: DiffusionService) -> None:
    "Metadata is also read from an image that Pillow has already opened."
    image = Image.open(io.BytesIO(png(parameters=LINE)))
    assert restore(image).request == LINE_REQUEST | {"model": "other"}
    plan = service.plan(prompt=PROMPT, seed=3).plan
    assert isinstance(plan, GenerationPlan)
    assert from_plan(plan).request["seed"] == 3
    assert read_metadata(png(parameters=LINE)).parameters == LINE
