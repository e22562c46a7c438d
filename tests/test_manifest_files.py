"Error messages of `load_manifest`, one for each mistake."

import os
from pathlib import Path

import pytest

from diffusion_workers.models.files import ManifestError, load_manifest

GOOD = "family: sdxl\nsource: {folder: mine}\n"
FAMILIES = "sd15, sdxl, flux, sd35, zimage, flux2, qwen, chroma"


def refusal(folder: Path, text: str) -> str:
    "The error for a file with this content, without its folder."
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(ManifestError) as refused:
        load_manifest(folder / "mine.yaml")
    return str(refused.value).replace(f"{folder}{os.sep}", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "limits: {max_num_images: 99}", "3: limits.max_num_images: given 99; allowed: an integer from 1 to 64"),
        ("family: sdxl", "1: source: missing; give a value"),
        ("family:\nsource: {folder: mine}", f"1: family: missing; give one of {FAMILIES}"),
        (GOOD + "loras: {ink: 0.8}", "3: loras.ink: given 0.8; allowed: a mapping, name: value"),
        (
            GOOD + "components:\n  scheduler:\n    class: DDIMScheduler\n    options: {steps_offset: [1]}",
            "6: components.scheduler.options.steps_offset: given [1]; text, a finite number, true or false is needed",
        ),
        (
            GOOD + "defaults: {guidance_scale: .inf}",
            "3: defaults.guidance_scale: given inf; allowed: a number from 0 to 100",
        ),
        (
            GOOD + "controlnets: {'my map': {source: {folder: a}}}",
            "3: controlnets.my map: given 'my map'; allowed: a name of up to 64 letters, digits, '.', '_' and '-'",
        ),
        (GOOD + "name: mine", "3: name: a model is named by its file, here mine; leave it out"),
        (GOOD + "? !!str [a]\n: b", "3: ?: a name must be text; put it in quotes"),
        (GOOD + "title: ''", "3: title: given ''; allowed: text of 1 to 2000 characters"),
    ],
)
def test_errors_of_single_fields(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == f"mine.yaml:{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "family: sd15\nsource: {folder: a, hub: b/c}",
            "2: source: given {'folder': 'a', 'hub': 'b/c'}; exactly one of builtin, folder, file, hub is needed",
        ),
        (
            "family: sd15\nsource: {folder: a, revison: main}",
            "2: source.revison: there is no such field; allowed: folder, subfolder",
        ),
        (
            GOOD + "defaults: {width: 1024}\nlimits: {max_width: 512}",
            "3: defaults.width: given 1024; allowed: from 64 to 512, by limits.min_width and limits.max_width",
        ),
        (
            "family: sd15\nsource: {folder: a}\ncontrolnets:\n  every:\n    source: {folder: e}\n    union: true",
            "6: controlnets.every.union: there is no union ControlNet for sd15",
        ),
        (
            "family: sd15\nvariant: fp16\nsource: {file: a.safetensors}",
            "2: variant: a single file has no variants; leave it out",
        ),
        (
            GOOD + "defaults: {scheduler: flow_match_euler}",
            "3: defaults.scheduler: given flow_match_euler, which does not fit sdxl; leave it out for the model's own",
        ),
        (
            GOOD + "tasks: []",
            "3: tasks: at least one is needed; allowed: text_to_image, image_to_image, inpainting, edit",
        ),
        (
            GOOD + "memory: {quantization: torchao_int8, storage_dtype: float8_e5m2}",
            "3: memory.storage_dtype: cannot be combined with quantization, which decides how the weights are stored;"
            " leave out one of them",
        ),
        (
            GOOD + "memory: {offload: modell}",
            "3: memory.offload: given 'modell'; allowed: one of none, model, group; did you mean model?",
        ),
        (
            GOOD + "memory: {offlaod: model}",
            "3: memory.offlaod: there is no such field; did you mean offload?",
        ),
    ],
)
def test_errors_of_sources_sections_and_combinations(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == f"mine.yaml:{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("family: sd15\nsource:\n  file: old.ckpt", "3: source.file: given 'old.ckpt'"),
        (
            GOOD + "components:\n  vae: {source: {file: vae.gguf}}",
            "4: components.vae.source.file: a .gguf file can only be unet of a model of SDXL",
        ),
    ],
)
def test_errors_of_weight_files(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).split("; ")[0] == f"mine.yaml:{message}"
