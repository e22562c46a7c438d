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


def test_guidance_uses_the_negative_prompt(service: DiffusionService) -> None:
    "A negative prompt has an effect while guidance is on; otherwise a warning says that it does nothing."
    plain = pixels(service)
    assert difference(pixels(service, **NEGATIVE), plain) > 0
    off = pixels(service, guidance_scale=1.0)
    assert difference(off, plain) > 0 and difference(pixels(service, guidance_scale=1.0, **NEGATIVE), off) == 0
    result = service.generate(**COMMON | {"guidance_scale": 1.0} | NEGATIVE)
    assert "a negative prompt does nothing" in result.warnings[0].message


def test_max_sequence_length_is_planned_and_changes_the_image(service: DiffusionService) -> None:
    assert service.plan(**COMMON).plan.max_sequence_length == 512
    assert difference(pixels(service, max_sequence_length=64), pixels(service)) > 0
    result = service.generate(**COMMON | {"prompt": "a" * 100}, max_sequence_length=64)
    assert [note.field for note in result.warnings] == ["prompt"]


def test_taylorseer_is_deterministic_and_leaves_no_state(service: DiffusionService) -> None:
    for fields in (NEGATIVE, {"image": photo(), "strength": 0.9}):
        request = {"num_inference_steps": 8} | fields
        plain = pixels(service, **request)
        cache = {"method": "taylorseer", "interval": 3}
        first, second = (pixels(service, step_cache=cache, **request) for _ in range(2))
        assert difference(first, second) == 0 and difference(first, plain) > 0
        assert difference(pixels(service, **request), plain) == 0


@pytest.mark.parametrize("method", ["apg", "cfg_zero_star"])
def test_guiders_change_the_image_and_leave_no_state(service: DiffusionService, method: str) -> None:
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


def test_the_lora_family_is_inferred_from_layers_or_metadata(folder: Path) -> None:
    "Attention-only LoRAs have the names and widths of FLUX.1."
    attention = [f"double_blocks_{i}_img_attn_proj" for i in range(19)]
    told = lambda *args: load_lora(lora(folder, *args), LoraName("probe")).header.family
    assert told(["distilled_guidance_layer_layers_0_in_layer"], 5120, 5120) == ModelFamily.chroma
    assert told(attention, 3072, 3072) == ModelFamily.flux
    assert told(attention, 3072, 3072, {"modelspec.architecture": "chroma/lora"}) == ModelFamily.chroma


def test_flux_loras_apply_to_the_shared_layers(service: DiffusionService, folder: Path) -> None:
    "A LoRA for another family is refused."
    lora(folder, ["double_blocks_0_img_attn_proj"], 32, 32, {"modelspec.architecture": "flux-1-dev/lora"})
    plain = pixels(service)
    assert difference(pixels(service, loras=[{"name": "probe.safetensors"}]), plain) > 0
    lora(folder, ["layers_0_attention_out"], 3840, 3840)
    result = service.generate(**COMMON, loras=[{"name": "probe.safetensors"}])
    assert result.status != OpStatus.success and "made for Z-Image, the model is Chroma" in result.message
