"""Helpers of the model family tests: images, LoRA layouts, weights under original names, one table row per family."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image, ImageDraw

from diffusion_workers.families.record import OriginalName, References
from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.lora.files import LoraName, fits
from diffusion_workers.lora.keys import module_shapes
from diffusion_workers.lora.layers import _rows, load_lora
from diffusion_workers.pipeline.loading import quiet_libraries
from diffusion_workers.pipeline.tiny_files import save_gguf, save_weights
from diffusion_workers.pipeline.tiny_models import tiny_pipeline, tiny_reference_encoder, write_tiny_model
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import ModelFamily, ModelKind, OpStatus

ROUNDING = 1  # out of 255: a batch sums in another order than a single image
PROMPT = "a red circle on a white background"
SMALL = {"prompt": PROMPT, "num_inference_steps": 3, "width": 64}


def photo(width: int = 64, height: int = 64, disc: str = "red") -> Image.Image:
    "A blue rectangle and a disc on a white background."
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((8, 8, 40, 30), fill="blue")
    draw.ellipse((24, 24, 60, 60), fill=disc)
    return image.resize((width, height))


def half() -> Image.Image:
    "A mask of the right half."
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask


NEGATIVE = {"negative_prompt": "blurry"}
CANNY = {"model": "canny", "image": photo(), "preprocessing": {"name": "canny"}}
TILE = {"model": "tile", "image": photo()}
UNION = CANNY | {"model": "all"}
MASKED = {"image": photo(), "mask_image": half()}
ONE = {"reference_images": [photo(disc="green")]}
TWO = {"reference_images": [photo(), photo(96, 80, "green")]}
THREE = {"reference_images": [photo(), photo(disc="green"), photo(disc="black")]}


@dataclass(frozen=True)
class Ran:
    "The expected plan of a request."

    fields: Mapping[str, Any]  # of the request
    task: str
    class_name: str  # in diffusers
    steps: int = 3  # denoising steps that are computed


@dataclass(frozen=True)
class FamilyCheck:
    "A table row for one family and kind: what the shared tests need to know about it."

    family: ModelFamily
    tasks: Mapping[str, Ran]
    refused: tuple[tuple[dict, str], ...]  # fields of a request, a part of the message
    guidance: Mapping[str, Any]  # request fields for strong guidance
    unguided: Mapping[str, Any]  # overrides that turn guidance off
    kind: ModelKind = ModelKind.standard
    batch: Mapping[str, Any] = field(default_factory=dict)  # additional fields of the requests in batch tests
    theirs: Mapping[str, Any] = field(default_factory=dict)  # additional arguments of the diffusers pipeline
    ours: Mapping[str, Any] = field(default_factory=dict)  # equivalent fields of the request
    guided_tasks: tuple[str, ...] = ("text to image",)  # tasks that are tested with guidance_end
    original_names: Callable[[Any, Iterable[str]], Iterable[OriginalName]] | None = None
    lora_ends: tuple[str, ...] = ()  # name suffixes of the layers that a LoRA changes; empty skips the LoRA tests
    lora_untold: bool = False  # whether the family of a tiny LoRA may be unknown: only real widths identify it
    no_layouts: tuple[str, ...] = ()  # entries of LORA_LAYOUTS that do not exist for the family
    transformer: str = ""  # its class; empty skips the single-file tests
    file_title: str = ""  # what its file is recognized as
    changed_weights: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict  # under original names
    gguf_architecture: str | None = None
    controlnets: bool = False  # whether plain ControlNets are written beside the model

    @property
    def name(self) -> str:
        "The name of the row and of its tiny model."
        return self.family.value if self.kind == ModelKind.standard else f"{self.family.value}-{self.kind.value}"

    def pixels(self, service: DiffusionService, **fields: Any) -> list[np.ndarray]:
        "The images of a request."
        return pixels(service, **SMALL | {"model": self.name} | fields)

    def their_pixels(self, seed: int, pipe: Any = None, **arguments: Any) -> np.ndarray:
        "The image that diffusers generates."
        pipe = pipe or quiet_pipeline(self.family, self.kind)
        common = {"prompt": PROMPT, "num_inference_steps": 3, "width": 64, "height": 64}
        common |= self.theirs | arguments
        if self.kind in FAMILIES[self.family].reference_encoders:
            common |= mixed_by_diffusers(pipe, self.family, self.kind, common.pop("image"), common.pop("prompt"))
        made = pipe(**common, generator=torch.Generator().manual_seed(seed))
        return np.asarray(made.images[0]).astype(int)


SMALL_AREA = 64 * 64
_DIMENSIONS = {
    module: module.calculate_dimensions for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus)
}
SMALL_SIZES = ((48, 96), (64, 64), (96, 64))


@contextmanager
def small_references(small_area: int = SMALL_AREA) -> Iterator[None]:
    "Scale reference images to small sizes for models that scale them to sizes of their own."
    with pytest.MonkeyPatch.context() as patch:
        for name, record in list(FAMILIES.items()):
            patch.setitem(
                FAMILIES,
                name,
                replace(record, references={k: _small(v, small_area) for k, v in record.references.items()}),
            )
        for module, own in _DIMENSIONS.items():
            patch.setattr(module, "calculate_dimensions", lambda area, ratio, own=own: own(small_area, ratio))
        yield


def _small(limits: References, area: int) -> References:
    if limits.sizes:
        return replace(limits, sizes=SMALL_SIZES)
    return limits if limits.area is None else replace(limits, area=area)


def quiet_pipeline(family: ModelFamily, kind: ModelKind = ModelKind.standard) -> diffusers.DiffusionPipeline:
    "The tiny pipeline with its own weights, in eval mode, without a progress bar."
    with quiet_libraries():
        pipe = tiny_pipeline(family, kind)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mixed_by_diffusers(
    pipe: Any, family: ModelFamily, kind: ModelKind, images: list[Image.Image], prompt: str
) -> dict[str, torch.Tensor]:
    "Embeddings of a prompt and reference images in equal shares, from diffusers' own prior pipeline."
    texts = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    with quiet_libraries():
        encoder = tiny_reference_encoder(family, kind)
        prior = type(encoder)(**encoder.components | texts)
        shares = [1 / len(images)] * len(images)
        made = prior(images, prompt=prompt, prompt_embeds_scale=shares, pooled_prompt_embeds_scale=shares)
    return {"prompt_embeds": made.prompt_embeds, "pooled_prompt_embeds": made.pooled_prompt_embeds}


def pixels(service: DiffusionService, **fields: Any) -> list[np.ndarray]:
    "The images of a request."
    result = service.generate(**fields)
    assert result.status == OpStatus.success, result.message
    return [np.asarray(image).astype(int) for image in result.images]


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


# LoRA files


def lora_matrices(denoiser: Any, ends: tuple[str, ...], rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    "LoRA matrices A and B for layers of every kind, by module path."
    generator, made = torch.Generator().manual_seed(0), {}
    for name, module in denoiser.named_modules():
        if name.endswith(ends) and hasattr(module, "in_features"):
            down = torch.randn(rank, module.in_features, generator=generator) * 0.3
            made[name] = down, torch.randn(module.out_features, rank, generator=generator) * 0.3
    return made


def in_original_names(
    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]], names: Iterable[OriginalName]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    "The same deltas under original names: query, key and value fused into one matrix of three times the rank."
    made, left = {}, dict(matrices)
    for row in names:
        parts = [left.pop(path) for path in row.paths if path in left]
        if not parts:
            continue
        assert len(parts) == len(row.paths), f"the LoRA holds a part of {row.name} alone"
        down, up = torch.cat([part[0] for part in parts]), torch.block_diag(*[part[1] for part in parts])
        made[row.name] = down, torch.cat(up.chunk(2)[::-1]) if row.halves_swapped else up
    return made | left  # layers with the same name in both


def peft(start: str) -> Callable[[dict], dict[str, torch.Tensor]]:
    def written(matrices: dict) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, (down, up) in matrices.items():
            tensors |= {f"{start}{name}.lora_A.weight": down, f"{start}{name}.lora_B.weight": up}
        return tensors

    return written


def kohya(start: str, dots: bool = False) -> Callable[[dict], dict[str, torch.Tensor]]:
    "The kohya layout, with an alpha of twice the rank that the matrices compensate for."

    def written(matrices: dict) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, (down, up) in matrices.items():
            key = start + (name if dots else name.replace(".", "_"))
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up / 2}
            tensors[f"{key}.alpha"] = torch.tensor(2.0 * len(down))
        return tensors

    return written


LORA_LAYOUTS = {  # writer function, whether it uses original names
    "diffusers": (peft("transformer."), False),
    "no prefix": (peft(""), False),
    "peft": (peft("base_model.model."), False),
    "ComfyUI, names of diffusers": (peft("diffusion_model."), False),
    "ComfyUI, original names": (peft("diffusion_model."), True),
    "ComfyUI, original names and alpha": (kohya("diffusion_model.", dots=True), True),
    "kohya, names of diffusers": (kohya("lora_unet_"), False),
    "kohya, original names": (kohya("lora_unet_"), True),
    "OneTrainer": (kohya("lora_transformer_"), False),
}


def added_by(file: Path, pipe: Any, families: Iterable[ModelFamily | None]) -> dict[str, torch.Tensor]:
    "The delta of a LoRA file for each layer; its family must be one of `families`, and all layers known."
    loaded = load_lora(file, LoraName("lora"))
    assert loaded.header.family in families
    fit = fits(loaded.header, pipe)
    assert not fit.unknown and not fit.wrong
    added = {}
    for index, places in fit.places.items():
        for place in places:
            part = _rows(loaded.weights[index], place)
            added[place.path] = part.scaling * part.up @ part.down
    return added


# single files of transformers


def original_weights(transformer: Any, names: Iterable[OriginalName]) -> dict[str, torch.Tensor]:
    "The weights of a transformer under their original names."
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    for row in names:
        for kind in ("weight", "bias"):
            taken = [weights.pop(f"{path}.{kind}", None) for path in row.paths]
            if taken[0] is None:
                continue
            whole = torch.cat(taken)
            weights[f"{row.name}.{kind}"] = torch.cat(whole.chunk(2)[::-1]) if row.halves_swapped else whole
    return weights


def norm_scales(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    "Norm weights under the names of Black Forest Labs and of the authors of Chroma."
    named = {}
    for name, tensor in weights.items():
        ends = re.search(r"norm\.(?:query|key)_norm\.weight$|_guidance_layer\.norms\.\d+\.weight$", name)
        named[name.removesuffix("weight") + "scale" if ends else name] = tensor
    return named


FILES = ("original.safetensors", "prefixed.safetensors", "own.safetensors", "packed.gguf")


def write_files(folder: Path, check: FamilyCheck) -> None:
    "Write the transformer of the tiny model as single files, with manifests."
    with quiet_libraries():
        transformer = getattr(diffusers, check.transformer).from_pretrained(folder / check.name / "transformer")
    names = check.original_names(transformer, module_shapes(transformer)) if check.original_names else ()
    weights = check.changed_weights(original_weights(transformer, names))
    save_weights(weights, folder / "original.safetensors")
    save_weights(
        {f"model.diffusion_model.{n}": tensor for n, tensor in weights.items()}, folder / "prefixed.safetensors"
    )
    save_weights(transformer.state_dict(), folder / "own.safetensors")
    packed = {} if check.gguf_architecture is None else {"architecture": check.gguf_architecture}
    save_gguf(weights, folder / "packed.gguf", **packed)
    text = (folder / f"{check.name}.yaml").read_text()
    for file in FILES:
        source = f"{{file: {file}, config: {{folder: {check.name}/transformer}}}}"
        own = f"components: {{transformer: {{source: {source}}}}}\n"
        (folder / f"file-{file.partition('.')[0]}.yaml").write_text(text + own)


def write_models(folder: Path, check: FamilyCheck) -> None:
    "Write the tiny model of a row, a bfloat16 variant, a LoRA folder, and single files of its transformer."
    write_tiny_model(folder, check.family, check.name, check.kind, changes={"lora_folders": [{"folder": "loras"}]})
    (folder / "loras").mkdir()
    (folder / "half.yaml").write_text((folder / f"{check.name}.yaml").read_text() + "dtype: bfloat16\n")
    if check.transformer:
        write_files(folder, check)


def serving(folder: Path) -> DiffusionService:
    return DiffusionService(Settings(model_folders=(folder,)), device="cpu")
