"""Z-Image in the service: guidance, chat template, ControlNets and their files."""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import family_checks
import numpy as np
import pytest
import torch
from family_checks import CANNY, ROUNDING, SMALL, difference, photo, serving
from safetensors.torch import save_file

from diffusion_workers.models.weight_headers import read_header
from diffusion_workers.models.weight_kinds import identify
from diffusion_workers.pipeline.loading import quiet_libraries
from diffusion_workers.pipeline.tiny_files import save_weights
from diffusion_workers.pipeline.tiny_models import tiny_controlnet, tiny_pipeline, write_tiny_model
from diffusion_workers.service.previews import PreviewMaker
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ModelFamily

COMMON = SMALL | {"model": "zimage"}


def pixels(service: DiffusionService, **fields) -> list[np.ndarray]:
    "The pixels of the images of a request."
    return family_checks.pixels(service, **COMMON | fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a tiny model, and one whose ControlNet is a single file."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.zimage, changes={"lora_folders": [{"folder": "loras"}]})
    (folder / "loras").mkdir()
    with quiet_libraries():
        controlnet = diffusers.ZImageControlNetModel.from_pretrained(folder / "zimage-canny")
    save_weights(controlnet.state_dict(), folder / "control.safetensors")
    (folder / "filed.yaml").write_text(
        "family: zimage\nsource: {folder: zimage}\ndefaults: {width: 64, height: 64, guidance_scale: 2.0}\n"
        "controlnets: {canny: {source: {file: control.safetensors, config: {folder: zimage-canny}}, union: true}}\n"
    )
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[DiffusionService]:
    with serving(folder) as service:
        yield service


def test_guidance_is_enabled_above_zero(service: DiffusionService) -> None:
    "At 0.5 guidance with a negative prompt changes the image; at 0 a warning says that the prompt has no effect."
    request = COMMON | {"negative_prompt": "blurry", "seed": 1}
    guided = [pixels(service, guidance_scale=0.5, seed=1, negative_prompt=text)[0] for text in ("blurry", "a cat")]
    assert difference(*guided) > 0
    result = service.generate(**request, guidance_scale=0)
    messages = ["a negative prompt does nothing while guidance_scale is not above 0"]
    assert [note.message for note in result.warnings] == messages
    assert service.plan(**request, guidance_scale=0.5).warnings is None


def test_controlnet_matches_diffusers_without_being_modified(service: DiffusionService) -> None:
    "Diffusers permanently adds modules of the transformer to the ControlNet; the service leaves it as loaded."
    controlnet = service.factory(service.manifest("zimage")).controlnet("canny")
    names = list(controlnet.state_dict())
    ours = pixels(service, seed=3, controlnets=[CANNY | {"conditioning_scale": 0.7, "preprocessing": None}])[0]
    assert list(controlnet.state_dict()) == names and controlnet.t_scale is None
    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.zimage)
        fresh = diffusers.ZImageControlNetModel.from_pretrained(service.settings.model_folders[0] / "zimage-canny")
        pipe = diffusers.ZImageControlNetPipeline(**pipe.components, controlnet=fresh)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=COMMON["prompt"],
        control_image=photo(),
        controlnet_conditioning_scale=0.7,
        num_inference_steps=3,
        guidance_scale=2.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert difference(ours, np.asarray(theirs).astype(int)) <= ROUNDING
    assert len(fresh.state_dict()) > len(names)


def test_token_limit_accounts_for_the_chat_template(service: DiffusionService) -> None:
    "The chat template uses up tokens of the limit; the tiny tokenizer has one per letter. Padding has no effect."
    template = len("<user\n<\n<assistant\n")  # each of the three markers is one token
    for letters, warned in ((64 - template, False), (65 - template, True)):
        result = service.generate(**COMMON | {"prompt": "a" * letters}, seed=1, max_sequence_length=64)
        assert bool(result.warnings) == warned, result.warnings
    assert result.warnings[0].field == "prompt" and f"takes {64 - template} tokens" in result.warnings[0].message
    assert difference(pixels(service, seed=1)[0], pixels(service, seed=1, max_sequence_length=128)[0]) == 0


def test_image_and_last_preview_match_the_decoded_latents(service: DiffusionService) -> None:
    "Both are what the VAE decodes from the final latents, which a preview scales down if they are strong."
    vae, seen = service.factory(service.manifest("zimage")).load().vae, []
    result = service.generate(**COMMON, seed=1, on_step=lambda step: seen.append(step.latents))
    maker = PreviewMaker(vae, (64, 64))
    maker.decodes = True  # however slow this machine is
    shown = maker.image(seen[-1][0], (64, 64))
    assert seen[-1].shape == (1, 16, 8, 8)

    @torch.no_grad()
    def decoded(latents: torch.Tensor) -> np.ndarray:
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample[0].clamp(-1, 1)
        return (127.5 * (pixels + 1)).permute(1, 2, 0).numpy()

    scaled = seen[-1] / seen[-1].std().clamp(min=1)  # a preview of stronger latents is scaled down
    assert np.abs(np.asarray(shown) - decoded(scaled)).mean() < 2
    assert np.abs(np.asarray(result.image) - decoded(seen[-1])).mean() < 1


def test_lora_of_another_family_is_rejected(service: DiffusionService, folder: Path) -> None:
    for name, module, width, title in (
        ("flux", "double_blocks_0_img_attn_qkv", 3072, "Flux"),
        ("lumina", "layers_0_attention_qkv", 2304, "Lumina 2"),
    ):
        tensors = {f"lora_unet_{module}.lora_down.weight": torch.zeros(2, width)}
        tensors[f"lora_unet_{module}.lora_up.weight"] = torch.zeros(3 * width, 2)
        save_file(tensors, folder / "loras" / f"{name}.safetensors")
        result = service.generate(**COMMON, seed=1, loras=[{"name": f"{name}.safetensors"}])
        assert f"made for {title}, the model is Z-Image" in result.message


def test_union_controlnet_file_is_recognized(service: DiffusionService, folder: Path) -> None:
    kind = identify(read_header(folder / "control.safetensors"))
    assert (kind.role, kind.what) == ("union_controlnet", "a union ControlNet for Z-Image")
    ours, theirs = (pixels(service, seed=1, model=model, controlnets=[CANNY])[0] for model in ("filed", "zimage"))
    assert difference(ours, theirs) == 0


def test_unused_norm_in_comfyui_files_is_ignored(folder: Path) -> None:
    "ComfyUI files contain a norm_final weight that no layer uses."
    with quiet_libraries():
        transformer = diffusers.ZImageTransformer2DModel.from_pretrained(folder / "zimage" / "transformer")
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in transformer.state_dict().items()}
    save_weights(weights | {"model.diffusion_model.norm_final.weight": torch.ones(32)}, folder / "comfy.safetensors")
    (folder / "comfy.yaml").write_text(
        "family: zimage\nsource: {folder: zimage}\ndefaults: {width: 64, height: 64, guidance_scale: 2.0}\n"
        "components: {transformer: {source: {file: comfy.safetensors, config: {folder: zimage/transformer}}}}\n"
    )
    with serving(folder) as service:
        ours, plain = (pixels(service, seed=1, model=model)[0] for model in ("comfy", "zimage"))
    assert difference(ours, plain) == 0


def test_zero_initialized_layers_are_randomized_in_tiny_models() -> None:
    "A new ControlNet has zero-initialized projections, which `tiny_controlnet` fills with random values."
    with quiet_libraries():
        controlnet = tiny_controlnet(ModelFamily.zimage)
        fresh = type(controlnet).from_config(controlnet.config)
    zero = [name for name, parameter in fresh.named_parameters() if not parameter.any()]
    changed = dict(controlnet.named_parameters())
    assert zero and all(changed[name].any() for name in zero if "proj" in name)
