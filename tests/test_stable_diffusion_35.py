"""Stable Diffusion 3.5 through the service: each task, ControlNets, LoRA layouts, previews."""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.families.sd35 import sd35_original_names
from diffusion_workers.lora.files import LoraName, fits
from diffusion_workers.lora.keys import module_shapes
from diffusion_workers.lora.layers import _rows, load_lora
from diffusion_workers.pipeline.loading import quiet_libraries
from diffusion_workers.pipeline.tiny_models import tiny_pipeline, write_tiny_model
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import ModelFamily, OpStatus

ROUNDING = 1  # of 255: a batch adds in another order than an image alone
COMMON = {"model": "sd35", "prompt": "a red circle on a white background", "num_inference_steps": 3, "width": 64}


def photo() -> Image.Image:
    "A blue rectangle and a red disc."
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((8, 8, 40, 30), fill="blue")
    draw.ellipse((24, 24, 60, 60), fill="red")
    return image


def half() -> Image.Image:
    "A mask of the right half."
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask


CANNY = {"model": "canny", "image": photo(), "preprocessing": {"name": "canny"}}
TILE = {"model": "tile", "image": photo()}
TASKS = {
    "text to image": ({}, "StableDiffusion3Pipeline", 3),
    "image to image": ({"image": photo(), "strength": 0.5}, "StableDiffusion3Img2ImgPipeline", 2),
    "inpainting": ({"image": photo(), "mask_image": half()}, "StableDiffusion3InpaintPipeline", 3),
    "ControlNet": ({"controlnets": [CANNY]}, "StableDiffusion3ControlNetPipeline", 3),
    "two ControlNets": ({"controlnets": [CANNY, TILE]}, "StableDiffusion3ControlNetPipeline", 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A tiny model whose LoRAs a request names by their files."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.sd35, changes={"lora_folders": [{"folder": "loras"}]})
    (folder / "loras").mkdir()
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[DiffusionService]:
    with DiffusionService(Settings(model_folders=(folder,)), device="cpu") as service:
        yield service


def pixels(service: DiffusionService, **fields) -> list[np.ndarray]:
    "The images of a request."
    result = service.generate(**COMMON | fields)
    assert result.status == OpStatus.success, result.message
    return [np.asarray(image).astype(int) for image in result.images]


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


@pytest.mark.parametrize("name", TASKS)
def test_each_task_runs_and_a_batch_draws_what_each_seed_draws_alone(service: DiffusionService, name: str) -> None:
    fields, class_name, steps = TASKS[name]
    plan = service.plan(**COMMON | fields).plan
    assert (plan.pipeline_class, plan.denoising_steps) == (class_name, steps)
    together = pixels(service, seeds=[1, 2], **fields)
    assert difference(*together) > ROUNDING
    for seed, image in zip((1, 2), together):
        assert difference(pixels(service, seed=seed, **fields)[0], image) <= ROUNDING


def test_the_plan_counts_the_steps_that_run(service: DiffusionService) -> None:
    "Diffusers rounds down what strength leaves out: of 3 steps at 0.5, two are left."
    events = []
    service.generate(**COMMON, image=photo(), strength=0.5, seed=1, on_progress=events.append)
    assert max(event.step or 0 for event in events) == 2


def test_controls_count_and_leave_nothing_behind(service: DiffusionService) -> None:
    "Scale 0 and an empty window are the plain image, a mask of black too; each of two maps changes the image."
    plain = pixels(service, seed=3)[0]
    off = [CANNY | {"conditioning_scale": 0}, TILE | {"guidance_start": 0.4, "guidance_end": 0.5}]
    assert difference(pixels(service, seed=3, controlnets=off)[0], plain) == 0
    black = Image.new("L", (64, 64))
    assert difference(pixels(service, seed=3, controlnets=[CANNY | {"mask_image": black}])[0], plain) == 0
    one, two = (pixels(service, seed=3, controlnets=units)[0] for units in ([CANNY], [CANNY, TILE]))
    assert min(difference(one, plain), difference(two, one)) > ROUNDING
    assert difference(pixels(service, seed=3)[0], plain) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"true_cfg_scale": 2.0}, "has no use for true_cfg_scale"),
        ({"scheduler": "ddim"}, "allowed: flow_match_euler"),
        ({"step_cache": {"method": "deepcache"}}, "cannot use this method"),
        ({"step_cache": {"method": "first_block"}}, "cannot use this method"),
        ({"image": photo(), "controlnets": [CANNY]}, "no pipeline for single control with image_to_image"),
        ({"controlnets": [CANNY | {"union_mode": "canny"}]}, "no union ControlNet"),
        ({"controlnets": [CANNY | {"control_mode": "prompt"}]}, "no control mode"),
    ],
)
def test_what_does_not_fit_is_refused(service: DiffusionService, fields: dict, message: str) -> None:
    result = service.generate(**COMMON | fields)
    assert result.status == OpStatus.unsupported_combination and message in result.message


def test_text_goes_to_three_encoders(service: DiffusionService) -> None:
    "A negative prompt, layers left out and the length of T5's text all change the image; what T5 cuts off is named."
    plain = pixels(service, seed=4)[0]
    for fields in ({"negative_prompt": "blurry"}, {"clip_skip": 1}, {"prompt_2": "a dog"}, {"max_sequence_length": 8}):
        assert difference(pixels(service, seed=4, **fields)[0], plain) > ROUNDING, fields
    result = service.generate(**COMMON, seed=4, max_sequence_length=8)
    assert [(note.field, note.message) for note in result.warnings] == [
        ("prompt", "the text encoder takes 7 tokens; the rest was cut off")
    ]


def test_guidance_can_end_early(service: DiffusionService) -> None:
    "Without guidance in the later steps the image is another one, and with guidance in all of them the same."
    draw = lambda end: pixels(service, seed=5, guidance_scale=20.0, acceleration={"guidance_end": end})[0]
    plain = pixels(service, seed=5, guidance_scale=20.0)[0]
    assert difference(draw(1.0), plain) == 0 and difference(draw(0.4), plain) > ROUNDING


def test_previews_of_sixteen_channels(service: DiffusionService) -> None:
    "The linear map fits as many channels as the VAE has."
    from diffusion_workers.service.previews import colour_map, mapped

    vae = service.factory(service.manifest("sd35")).load().vae
    with torch.no_grad():
        matrix = colour_map(vae)
    assert matrix.shape == (17, 3) and mapped(torch.randn(16, 8, 8), matrix).shape == (3, 8, 8)
    events = []
    service.generate(**COMMON, seed=1, preview_interval=1, on_progress=events.append)
    assert events[-1].phase == "done"


def test_a_controlnet_without_position_embedding_runs_as_in_diffusers() -> None:
    "Stability AI's ControlNets use the transformer's position embedding; diffusers copies it, here it is shared."
    from diffusion_workers.pipeline.controlnets import joint_token_view

    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.sd35)
    config = dict(FAMILIES[ModelFamily.sd35].tiny.controlnet.config) | {"joint_attention_dim": None}
    torch.manual_seed(0)
    net = diffusers.SD3ControlNetModel(**config, use_pos_embed=False).eval()
    for parameter in net.parameters():
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
        lent = joint_token_view(net, None, None, pipe.transformer)(**call)[0]
        assert net.pos_embed is None
        net.pos_embed = net._get_pos_embed_from_transformer(pipe.transformer)
        grafted = net(**call)[0]
    for ours, theirs in zip(lent, grafted, strict=True):
        assert torch.equal(ours, theirs)


def transformer_lora(pipe, rank: int = 2) -> dict[str, torch.Tensor]:
    "A and B for attention and feed-forward layers, in the names of diffusers."
    generator, made = torch.Generator().manual_seed(0), {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("to_q", "to_v", "add_k_proj", "to_out.0", "ff.net.2", "norm_out.linear")):
            made[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.3
            made[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.3
    return made


def tiny() -> diffusers.StableDiffusion3Pipeline:
    "The model of the service, with weights of its own."
    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.sd35)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("layout", ["diffusers", "peft", "plain"])
def test_a_lora_draws_what_diffusers_draws_with_it(service: DiffusionService, folder: Path, layout: str) -> None:
    "The layouts of diffusers and peft; without a prefix, where diffusers loads nothing and says nothing, it works too."
    pipe = tiny()
    tensors = transformer_lora(pipe)
    start = {"diffusers": "transformer.", "peft": "base_model.model.", "plain": ""}[layout]
    save_file({start + key: value for key, value in tensors.items()}, folder / "loras" / f"{layout}.safetensors")
    name = f"{layout}.safetensors"
    ours = pixels(service, seed=6, loras=[{"name": name, "scale": 0.8}])[0]
    assert difference(ours, pixels(service, seed=6)[0]) > ROUNDING
    with quiet_libraries():
        pipe.load_lora_weights({f"transformer.{key}": value for key, value in tensors.items()}, adapter_name="a")
        pipe.set_adapters("a", 0.8)
        theirs = pipe(
            prompt=COMMON["prompt"],
            num_inference_steps=3,
            guidance_scale=2.0,
            width=64,
            height=64,
            max_sequence_length=256,
            generator=torch.Generator().manual_seed(6),
        ).images[0]
    assert difference(ours, np.asarray(theirs).astype(int)) <= ROUNDING


def test_kohya_names_mean_the_layers_that_diffusers_takes_them_for(tmp_path: Path) -> None:
    "What a file in the original names adds to each layer is what diffusers' own conversion of a checkpoint puts there."
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


def test_kohya_files_reach_all_three_text_encoders(service: DiffusionService, folder: Path) -> None:
    "lora_te1_, lora_te2_ and lora_te3_, the last one T5."
    pipe, generator = tiny(), torch.Generator().manual_seed(0)
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


def test_a_lora_of_another_family_is_refused(service: DiffusionService, folder: Path) -> None:
    keys = {"double_blocks_0_img_attn_qkv": 3072}
    tensors = {f"lora_unet_{name}.lora_down.weight": torch.zeros(2, width) for name, width in keys.items()}
    tensors |= {f"lora_unet_{name}.lora_up.weight": torch.zeros(3 * width, 2) for name, width in keys.items()}
    save_file(tensors, folder / "loras" / "flux.safetensors")
    result = service.generate(**COMMON, seed=1, loras=[{"name": "flux.safetensors"}])
    assert "made for Flux, the model is Stable Diffusion 3.5" in result.message


def test_a_model_without_t5(tmp_path: Path) -> None:
    "T5 may be missing: the prompt is then measured by CLIP."
    manifest = write_tiny_model(tmp_path, ModelFamily.sd35)
    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.sd35)
        pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        pipe.save_pretrained(tmp_path / manifest.name)
    with DiffusionService(Settings(model_folders=(tmp_path,)), device="cpu") as service:
        result = service.generate(**COMMON | {"prompt": "a red circle " * 20}, seed=1)
    assert result.status == OpStatus.success, result.message
    assert [note.field for note in result.warnings] == ["prompt"]
