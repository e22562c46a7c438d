"""Chroma through the service: guidance, padding, TaylorSeer, LoRAs of its own and of FLUX.1."""

from collections.abc import Iterator
from pathlib import Path

import family_checks
import numpy as np
import pytest
import torch
from family_checks import NEGATIVE, SMALL, difference, photo, serving
from safetensors.torch import save_file

from diffusion_workers.lora.files import LoraName
from diffusion_workers.lora.layers import load_lora
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ModelFamily, OpStatus

COMMON = SMALL | {"model": "chroma", "height": 64, "seed": 3}


def pixels(service: DiffusionService, **fields) -> np.ndarray:
    "The first image of a request."
    return family_checks.pixels(service, **COMMON | fields)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.chroma, changes={"lora_folders": [{"folder": "loras"}]})
    (folder / "loras").mkdir()
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[DiffusionService]:
    with serving(folder) as service:
        yield service


def test_guidance_is_real(service: DiffusionService) -> None:
    "A negative prompt counts while guidance is on, and a warning says where it does nothing."
    plain = pixels(service)
    assert difference(pixels(service, **NEGATIVE), plain) > 0
    off = pixels(service, guidance_scale=1.0)
    assert difference(off, plain) > 0 and difference(pixels(service, guidance_scale=1.0, **NEGATIVE), off) == 0
    result = service.generate(**COMMON | {"guidance_scale": 1.0} | NEGATIVE)
    assert "a negative prompt does nothing" in result.warnings[0].message


def test_padding_counts_so_the_length_stands_in_the_plan(service: DiffusionService) -> None:
    assert service.plan(**COMMON).plan.max_sequence_length == 512
    assert difference(pixels(service, max_sequence_length=64), pixels(service)) > 0
    result = service.generate(**COMMON | {"prompt": "a" * 100}, max_sequence_length=64)
    assert [note.field for note in result.warnings] == ["prompt"]


def test_taylorseer_runs_twice_alike_and_leaves_nothing_behind(service: DiffusionService) -> None:
    for fields in (NEGATIVE, {"image": photo(), "strength": 0.9}):
        request = {"num_inference_steps": 8} | fields
        plain = pixels(service, **request)
        cache = {"method": "taylorseer", "interval": 3}
        first, second = (pixels(service, step_cache=cache, **request) for _ in range(2))
        assert difference(first, second) == 0 and difference(first, plain) > 0
        assert difference(pixels(service, **request), plain) == 0


@pytest.mark.parametrize("method", ["apg", "cfg_zero_star"])
def test_guiders_refine_its_guidance(service: DiffusionService, method: str) -> None:
    plain = pixels(service, guidance_scale=5.0)
    assert difference(pixels(service, guidance_scale=5.0, guider={"method": method}), plain) > 0
    assert difference(pixels(service, guidance_scale=5.0), plain) == 0


def lora(folder: Path, names: list[str], inputs: int, outputs: int, metadata: dict[str, str] | None = None) -> Path:
    "A LoRA of rank 1 in kohya's layout."
    tensors = {}
    for name in names:
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.full((1, inputs), 0.5)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.full((outputs, 1), 0.5)
    save_file(tensors, folder / "loras" / "probe.safetensors", metadata)
    return folder / "loras" / "probe.safetensors"


def test_a_lora_is_told_by_its_layers_or_by_its_metadata(folder: Path) -> None:
    "Attention alone has the names and widths of FLUX.1."
    attention = [f"double_blocks_{i}_img_attn_proj" for i in range(19)]
    told = lambda *args: load_lora(lora(folder, *args), LoraName("probe")).header.family
    assert told(["distilled_guidance_layer_layers_0_in_layer"], 5120, 5120) == ModelFamily.chroma
    assert told(attention, 3072, 3072) == ModelFamily.flux
    assert told(attention, 3072, 3072, {"modelspec.architecture": "chroma/lora"}) == ModelFamily.chroma


def test_a_lora_for_flux_fits_as_far_as_the_layers_are_the_same(service: DiffusionService, folder: Path) -> None:
    "One for another family is refused."
    lora(folder, ["double_blocks_0_img_attn_proj"], 32, 32, {"modelspec.architecture": "flux-1-dev/lora"})
    plain = pixels(service)
    assert difference(pixels(service, loras=[{"name": "probe.safetensors"}]), plain) > 0
    lora(folder, ["layers_0_attention_out"], 3840, 3840)
    result = service.generate(**COMMON, loras=[{"name": "probe.safetensors"}])
    assert result.status != OpStatus.success and "made for Z-Image, the model is Chroma" in result.message
