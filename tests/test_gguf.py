"""A .gguf file with the key names of the original Flux implementation, as in published files, at the real width."""

from pathlib import Path

import gguf
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

from diffusion_workers.models.manifest import FileSource
from diffusion_workers.pipeline.loading import Target, load_network, quiet_libraries
from diffusion_workers.pipeline.tiny_files import original_flux
from diffusion_workers.pipeline.weights import module_bytes

Q8 = gguf.GGMLQuantizationType.Q8_0


def write_gguf(path: Path, weights: dict[str, torch.Tensor]) -> None:
    "Write matrices as Q8_0, vectors unchanged."
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in weights.items():
        array = tensor.float().numpy()
        if tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_gguf_files_with_original_flux_names_are_loaded(tmp_path: Path) -> None:
    "One block of each kind at the width of FLUX.1, half a billion weights: all loaded, one byte each in memory."
    with torch.device("meta"):
        empty = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    empty.save_config(tmp_path / "config")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float16)
        for name, tensor in empty.state_dict().items()
    }
    write_gguf(tmp_path / "flux.gguf", original_flux(weights))
    source = FileSource.model_validate(
        {"file": "flux.gguf", "config": {"folder": "config"}}, context={"folder": tmp_path}
    )
    with quiet_libraries():
        loaded = load_network(
            "FluxTransformer2DModel", source, None, Target(torch.device("cpu"), torch.float32), role="denoiser"
        )
    found = dict(loaded.named_parameters())
    assert found.keys() == weights.keys()
    for name, wanted in weights.items():
        value = dequantize_gguf_tensor(found[name]) if isinstance(found[name], GGUFParameter) else found[name]
        assert value.shape == wanted.shape, name
        assert (value.float() - wanted).abs().max() < 0.05, name  # 127 steps from 0 to about 5
    assert module_bytes(loaded) < 1.1 * sum(tensor.numel() for tensor in weights.values())
