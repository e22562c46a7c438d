"""Stable Diffusion 3.5 in the service: three text encoders, multiple ControlNets, LoRA layouts, previews."""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import family_checks
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from family_checks import CANNY, ROUNDING, SMALL, TILE, difference, photo, quiet_pipeline, serving
from safetensors.torch import save_file

from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.families.sd35 import sd35_original_names
from diffusion_workers.lora.files import LoraName, fits
from diffusion_workers.lora.keys import module_shapes
from diffusion_workers.lora.layers import _rows, load_lora
from diffusion_workers.pipeline.loading import quiet_libraries
from diffusion_workers.pipeline.tiny_models import tiny_pipeline, write_tiny_model
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ModelFamily, OpStatus

COMMON = SMALL | {"model": "sd35"}


def pixels(service: DiffusionService, **fields) -> list[np.ndarray]:
    "The pixels of the images of a request."
    return family_checks.pixels(service, **COMMON | fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a tiny model and a folder for LoRA files."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.sd35, changes={"lora_folders": [{"folder": "loras"}]})
    (folder / "loras").mkdir()
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[DiffusionService]:
    with serving(folder) as service:
        yield service


def test_progress_counts_the_steps_left_by_strength(service: DiffusionService) -> None:
    "Diffusers rounds down the number of steps that strength skips: of 3 steps at 0.5, 2 are run."
    events = []
    service.generate(**COMMON, image=photo(), strength=0.5, seed=1, on_progress=events.append)
    assert max(event.step or 0 for event in events) == 2


def test_both_of_two_controlnets_affect_the_image(service: DiffusionService) -> None:
    "Each unit changes the image; with scale 0 or an empty guidance window it does not."
    plain = pixels(service, seed=3)[0]
    off = [CANNY | {"conditioning_scale": 0}, TILE | {"guidance_start": 0.4, "guidance_end": 0.5}]
    assert difference(pixels(service, seed=3, controlnets=off)[0], plain) == 0
    one, two = (pixels(service, seed=3, controlnets=units)[0] for units in ([CANNY], [CANNY, TILE]))
    assert min(difference(one, plain), difference(two, one)) > ROUNDING


def test_text_options_affect_the_image(service: DiffusionService) -> None:
    "Negative prompt, CLIP skip, second prompt and T5 sequence length change the image; truncation is a warning."
    plain = pixels(service, seed=4)[0]
    for fields in ({"negative_prompt": "blurry"}, {"clip_skip": 1}, {"prompt_2": "a dog"}, {"max_sequence_length": 8}):
        assert difference(pixels(service, seed=4, **fields)[0], plain) > ROUNDING, fields
    result = service.generate(**COMMON, seed=4, max_sequence_length=8)
    assert [(note.field, note.message) for note in result.warnings] == [
        ("prompt", "the text encoder takes 7 tokens; the rest was cut off")
    ]


def test_preview_color_map_has_sixteen_channels(service: DiffusionService) -> None:
    "The linear map to RGB has as many inputs as the VAE has latent channels, and a bias."
    from diffusion_workers.service.previews import color_map, mapped

    vae = service.factory(service.manifest("sd35")).load().vae
    with torch.no_grad():
        matrix = color_map(vae)
    assert matrix.shape == (17, 3) and mapped(torch.randn(16, 8, 8), matrix).shape == (3, 8, 8)
    events = []
    service.generate(**COMMON, seed=1, preview_interval=1, on_progress=events.append)
    assert events[-1].phase == "done"


def test_controlnet_without_position_embedding_matches_diffusers() -> None:
    "Stability AI's ControlNets use the transformer's position embedding; diffusers copies it, the service shares it."
    from diffusion_workers.pipeline.controlnets import joint_token_view

    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.sd35)
    config = dict(FAMILIES[ModelFamily.sd35].tiny.controlnet.config) | {"joint_attention_dim": None}
    torch.manual_seed(0)
    controlnet = diffusers.SD3ControlNetModel(**config, use_pos_embed=False).eval()
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    call = {
        "hidden_states": torch.randn(2, 16, 8, 8),
        "controlnet_cond": torch.randn(2, 16, 8, 8),
        "conditioning_scale": 0.7,
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([500.0, 500.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        lent = joint_token_view(controlnet, None, None, pipe.transformer)(**call)[0]
        assert controlnet.pos_embed is None
        controlnet.pos_embed = controlnet._get_pos_embed_from_transformer(pipe.transformer)
        grafted = controlnet(**call)[0]
    for ours, theirs in zip(lent, grafted, strict=True):
        assert torch.equal(ours, theirs)


def test_kohya_layer_names_match_the_diffusers_conversion(tmp_path: Path) -> None:
    "The LoRA delta of each layer equals the weight in a checkpoint converted by diffusers."
    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.sd35)
    shapes, generator = module_shapes(pipe.transformer), torch.Generator().manual_seed(0)
    tensors, checkpoint = {}, {"pos_embed": torch.zeros(1, 4, 16)}
    for row in sd35_original_names(pipe.transformer, list(shapes)):
        if not all(path in shapes for path in row.paths):
            continue
        outputs, inputs = sum(shapes[path][0] for path in row.paths), shapes[row.paths[0]][1]
        checkpoint[f"{row.name}.bias"] = torch.zeros(outputs)
        checkpoint[f"{row.name}.weight"] = torch.zeros(outputs, *shapes[row.paths[0]][1:])
        if len(shapes[row.paths[0]]) == 2:
            down, up = (torch.randn(*size, generator=generator) for size in ((4, inputs), (outputs, 4)))
            key = f"lora_unet_{row.name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
            checkpoint[f"{row.name}.weight"] = 0.5 * up @ down
    save_file(tensors, tmp_path / "kohya.safetensors")
    loaded = load_lora(tmp_path / "kohya.safetensors", LoraName("kohya"))
    assert (loaded.header.family, loaded.header.layout) == (ModelFamily.sd35, "kohya")
    fit = fits(loaded.header, pipe)
    assert not fit.unknown and not fit.wrong
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    compared = 0
    for index, places in fit.places.items():
        for place in places:
            part = _rows(loaded.weights[index], place)
            added = part.scaling * part.up @ part.down
            torch.testing.assert_close(added, converted[f"{place.path}.weight"], rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == len([path for path, shape in shapes.items() if len(shape) == 2])


def test_kohya_loras_apply_to_all_three_text_encoders(service: DiffusionService, folder: Path) -> None:
    "Keys start with lora_te1_, lora_te2_ and lora_te3_ (T5)."
    pipe, generator = quiet_pipeline(ModelFamily.sd35), torch.Generator().manual_seed(0)
    tensors = {}
    for number, encoder in enumerate((pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3), start=1):
        for name, module in encoder.named_modules():
            if name.endswith(("q_proj", "SelfAttention.q")):
                start = "text_model_" if number < 3 and not name.startswith("text_model") else ""
                key = f"lora_te{number}_{start}{name.replace('.', '_')}"
                tensors[f"{key}.lora_down.weight"] = torch.randn(2, module.in_features, generator=generator)
                tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 2, generator=generator)
    save_file(tensors, folder / "loras" / "words.safetensors")
    result = service.generate(**COMMON, seed=7, loras=[{"name": "words.safetensors"}])
    assert result.status == OpStatus.success and not result.warnings
    header = load_lora(folder / "loras" / "words.safetensors", LoraName("words")).header
    assert header.targets == ("text_encoder", "text_encoder_2", "text_encoder_3")
    changed = np.asarray(result.image).astype(int)
    assert difference(changed, pixels(service, seed=7)[0]) > ROUNDING
    for number in (1, 2, 3):
        part = {key: value for key, value in tensors.items() if key.startswith(f"lora_te{number}_")}
        save_file(part, folder / "loras" / f"words-{number}.safetensors")
        alone = pixels(service, seed=7, loras=[{"name": f"words-{number}.safetensors"}])[0]
        assert difference(alone, pixels(service, seed=7)[0]) > 0, number


def test_lora_of_another_family_is_rejected(service: DiffusionService, folder: Path) -> None:
    keys = {"double_blocks_0_img_attn_qkv": 3072}
    tensors = {f"lora_unet_{name}.lora_down.weight": torch.zeros(2, width) for name, width in keys.items()}
    tensors |= {f"lora_unet_{name}.lora_up.weight": torch.zeros(3 * width, 2) for name, width in keys.items()}
    save_file(tensors, folder / "loras" / "flux.safetensors")
    result = service.generate(**COMMON, seed=1, loras=[{"name": "flux.safetensors"}])
    assert "made for Flux, the model is Stable Diffusion 3.5" in result.message


def test_model_without_t5_generates(tmp_path: Path) -> None:
    "Without T5, the limit of the prompt length is that of CLIP."
    manifest = write_tiny_model(tmp_path, ModelFamily.sd35)
    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.sd35)
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        pipe.save_pretrained(tmp_path / manifest.name)
    with serving(tmp_path) as service:
        result = service.generate(**COMMON | {"prompt": "a red circle " * 20}, seed=1)
    assert result.status == OpStatus.success, result.message
    assert [note.field for note in result.warnings] == ["prompt"]
