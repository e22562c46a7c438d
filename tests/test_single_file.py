"""Single-file checkpoints in the original layout are equivalent to the model folder that they were made from."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from diffusion_workers.models.manifest import builtin_path
from diffusion_workers.pipeline.tiny_files import original_checkpoint, save_weights
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import ErrorCode, OpStatus

REQUEST = {
    "prompt": "a red circle left of a blue square",
    "seed": 5,
    "num_inference_steps": 3,
    "width": 64,
    "height": 64,
}
MANIFEST = "family: sd15\nsource: {source}\ndefaults: {{width: 64, height: 64, scheduler: ddim}}\n"
MODELS = ("builtin", "other")
BROKEN = (
    "cut-off",
    "no-weights",
    "empty",
    "pointer",
    "of-a-lora",
    "without-vae",
    "without-text-encoder",
    "half-a-unet",
    "not-there",
)


def other_sizes(folder: Path) -> None:
    "Save a model folder with different depth and widths than the built-in model, and attention in the VAE."
    torch.manual_seed(0)
    base = StableDiffusionPipeline.from_pretrained(builtin_path("shapes-sd15"), variant="fp16", dtype=torch.float32)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=base.text_encoder.config.hidden_size,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    parts = base.components | {"unet": unet, "vae": vae}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder, safe_serialization=True)


def write_broken(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    "Write incomplete or invalid .safetensors files; not-there.safetensors is not written."
    whole = (folder / "builtin.safetensors").read_bytes()
    (folder / "cut-off.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "no-weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 4265380512\n")
    save_weights({"lora_unet_mid_block.lora_down.weight": torch.zeros(4, 4)}, folder / "of-a-lora.safetensors")
    for name, prefix in (
        ("without-vae", "first_stage_model."),
        ("without-text-encoder", "cond_stage_model."),
        ("half-a-unet", "model.diffusion_model.output_blocks."),
    ):
        save_weights(
            {key: value for key, value in weights.items() if not key.startswith(prefix)}, folder / f"{name}.safetensors"
        )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionService]:
    "A service with two models, each as a folder and as a single file, and with broken files."
    folder = tmp_path_factory.mktemp("models")
    other_sizes(folder / "other")
    sources = {"builtin-folder": "{builtin: shapes-sd15}", "other-folder": "{folder: other}"}
    sources |= {"builtin-file": "{file: builtin.safetensors, config: {builtin: shapes-sd15}}"}
    sources |= {"other-file": "{file: other.safetensors, config: {folder: other}}"}
    sources |= {name: f"{{file: {name}.safetensors, config: {{builtin: shapes-sd15}}}}" for name in BROKEN}
    sources |= {"no-config": "{file: builtin.safetensors}"}
    for name, source in sources.items():
        variant = "variant: fp16\n" if name == "builtin-folder" else ""
        (folder / f"{name}.yaml").write_text(MANIFEST.format(source=source) + variant)
    with DiffusionService(Settings(model_folders=(folder,)), device="cpu") as service:
        for name in MODELS:
            weights = original_checkpoint(service.factory(service.manifest(f"{name}-folder")).load())
            save_weights(weights, folder / f"{name}.safetensors")
            if name == "builtin":
                write_broken(folder, weights)
        yield service


@pytest.mark.parametrize("name", MODELS)
def test_single_file_weights_equal_the_folder(service: DiffusionService, name: str) -> None:
    "No weight is lost, transposed or swapped in the conversion to a single file and back."
    folder, file = (service.factory(service.manifest(f"{name}-{kind}")).load() for kind in ("folder", "file"))
    for part in ("unet", "vae", "text_encoder"):
        expected, found = getattr(folder, part).state_dict(), getattr(file, part).state_dict()
        assert expected.keys() == found.keys()
        wrong = [key for key in expected if not torch.equal(expected[key], found[key])]
        assert not wrong, f"{part}: {len(wrong)} of {len(expected)} differ, such as {wrong[0]}"
    assert dict(folder.scheduler.config) == dict(file.scheduler.config)


@pytest.mark.parametrize("name", MODELS)
def test_single_file_images_equal_the_folder(service: DiffusionService, name: str) -> None:
    "A request generates identical pixels from a folder and from a single file."
    images = [service.generate(REQUEST, model=f"{name}-{kind}").image for kind in ("folder", "file")]
    np.testing.assert_array_equal(*map(np.asarray, images))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_errors_omit_the_path(service: DiffusionService, name: str) -> None:
    "The status is `model_unavailable`; the response has the file name but no folder."
    result = service.generate(REQUEST, model=name)
    assert (result.status, [error.code for error in result.errors]) == (
        OpStatus.model_unavailable,
        [ErrorCode.model_unavailable],
    )
    assert f"{name}.safetensors" in result.message
    folder = service.settings.model_folders[0]
    assert not [
        part for part in (str(folder), str(folder.parent), os.path.expanduser("~")) if part in result.model_dump_json()
    ]


def test_repaired_file_loads_without_restart(service: DiffusionService) -> None:
    "The same service loads the file once it is valid, and the other models are not affected."
    folder = service.settings.model_folders[0]
    before = service.generate(REQUEST, model="builtin-folder").image
    assert service.generate(REQUEST, model="not-there").status == OpStatus.model_unavailable
    os.link(folder / "builtin.safetensors", folder / "not-there.safetensors")
    after = [service.generate(REQUEST, model=name).image for name in ("builtin-folder", "not-there")]
    for image in after:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(before))


def test_file_without_config_needs_the_hub(service: DiffusionService, monkeypatch: pytest.MonkeyPatch) -> None:
    "Without `config` the configuration is loaded from the Hub; offline, the status is `model_unavailable`."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert service.generate(REQUEST, model="no-config").status == OpStatus.model_unavailable
