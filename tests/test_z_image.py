"""Z-Image through the service: each task, ControlNets, LoRA layouts, guidance, files, previews."""

from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from diffusion_workers.families.zimage import zimage_original_names
from diffusion_workers.lora.files import LoraName, fits
from diffusion_workers.lora.keys import module_shapes
from diffusion_workers.lora.layers import _rows, load_lora
from diffusion_workers.models.weight_headers import read_header
from diffusion_workers.models.weight_kinds import identify
from diffusion_workers.pipeline.loading import quiet_libraries
from diffusion_workers.pipeline.tiny_files import save_gguf, save_weights
from diffusion_workers.pipeline.tiny_models import tiny_controlnet, tiny_pipeline, write_tiny_model
from diffusion_workers.service.preparation import Prepared
from diffusion_workers.service.previews import preview_maker
from diffusion_workers.service.render import pipeline_arguments
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import ModelFamily, OpStatus

ROUNDING = 1  # of 255: a batch adds in another order than an image alone
COMMON = {"model": "zimage", "prompt": "a red circle on a white background", "num_inference_steps": 3, "width": 64}


def photo(width: int = 64, height: int = 64) -> Image.Image:
    "A blue rectangle and a red disc."
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((8, 8, 40, 30), fill="blue")
    draw.ellipse((24, 24, 60, 60), fill="red")
    return image.resize((width, height))


def half() -> Image.Image:
    "A mask of the right half."
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask


CANNY = {"model": "canny", "image": photo(), "preprocessing": {"name": "canny"}}
UNION = CANNY | {"model": "all"}
MASKED = {"image": photo(), "mask_image": half()}
TASKS = {
    "text to image": ({}, "ZImagePipeline", 3),
    "image to image": ({"image": photo(), "strength": 0.5}, "ZImageImg2ImgPipeline", 2),
    "inpainting": (MASKED, "ZImageInpaintPipeline", 3),
    "ControlNet": ({"controlnets": [CANNY]}, "ZImageControlNetPipeline", 3),
    "union ControlNet": ({"controlnets": [UNION]}, "ZImageControlNetPipeline", 3),
    "ControlNet and inpainting": (MASKED | {"controlnets": [CANNY]}, "ZImageControlNetInpaintPipeline", 3),
}


def original_weights(transformer) -> dict[str, torch.Tensor]:
    "The weights of a transformer in the original names, as ComfyUI's files have them."
    weights = {f"model.diffusion_model.{name}": tensor.clone() for name, tensor in transformer.state_dict().items()}
    for row in zimage_original_names(transformer, module_shapes(transformer)):
        for kind in ("weight", "bias"):
            taken = [weights.pop(f"model.diffusion_model.{path}.{kind}", None) for path in row.paths]
            if taken[0] is not None:
                weights[f"model.diffusion_model.{row.name}.{kind}"] = torch.cat(taken)
    return weights | {"model.diffusion_model.norm_final.weight": torch.ones(32)}


def write_files(folder: Path) -> None:
    "The transformer and the ControlNet of the tiny model in single files, with manifests."
    with quiet_libraries():
        transformer = diffusers.ZImageTransformer2DModel.from_pretrained(folder / "zimage" / "transformer")
        net = diffusers.ZImageControlNetModel.from_pretrained(folder / "zimage-canny")
    weights = original_weights(transformer)
    assert "model.diffusion_model.layers.0.attention.qkv.weight" in weights
    save_weights(weights, folder / "original.safetensors")
    save_weights(transformer.state_dict(), folder / "own.safetensors")
    save_weights(net.state_dict(), folder / "control.safetensors")
    save_gguf({name.removeprefix("model.diffusion_model."): t for name, t in weights.items()}, folder / "packed.gguf")
    for name in ("original.safetensors", "own.safetensors", "packed.gguf"):
        (folder / f"file-{name.partition('.')[0]}.yaml").write_text(
            "family: zimage\nsource: {folder: zimage}\ndefaults: {width: 64, height: 64, guidance_scale: 2.0}\n"
            f"components: {{transformer: {{source: {{file: {name}, config: {{folder: zimage/transformer}}}}}}}}\n"
            "controlnets: {canny: {source: {file: control.safetensors, config: {folder: zimage-canny}}, union: true}}\n"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A tiny model whose LoRAs a request names by their files, and others with parts of it in single files."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.zimage, changes={"lora_folders": [{"folder": "loras"}]})
    (folder / "loras").mkdir()
    write_files(folder)
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
    together = pixels(service, seeds=[1, 2, 3], negative_prompt="blurry", **fields)
    assert difference(*together[:2]) > ROUNDING
    for seed, image in zip((1, 2, 3), together):
        assert difference(pixels(service, seed=seed, negative_prompt="blurry", **fields)[0], image) <= ROUNDING


def test_requests_with_prompts_of_other_lengths_share_a_batch(service: DiffusionService) -> None:
    "Each draws what it draws alone, and no list of the caller is written to."
    prompts = ["a cat", "a dog in the rain, under a red umbrella, at night"]
    requests = [COMMON | {"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
    alone = [pixels(service, **request)[0] for request in requests]
    handles = [service.submit(request) for request in requests]
    for handle, wanted in zip(handles, alone):
        result = handle.result(timeout=120)
        assert difference(np.asarray(result.image).astype(int), wanted) <= ROUNDING
    texts = {"prompt": list(prompts), "negative_prompt": ["", "blurry"]}
    arguments = pipeline_arguments(service.plan(**COMMON).plan, [1, 2], Prepared(), texts)
    with torch.no_grad():
        service.factory(service.manifest("zimage")).load()(**arguments | {"num_inference_steps": 1})
    assert arguments["prompt"] != prompts and texts == {"prompt": prompts, "negative_prompt": ["", "blurry"]}


def test_it_draws_what_diffusers_draws(service: DiffusionService) -> None:
    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.zimage)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=COMMON["prompt"],
        negative_prompt="blurry",
        num_inference_steps=3,
        guidance_scale=2.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(6),
    ).images[0]
    ours = pixels(service, seed=6, negative_prompt="blurry")[0]
    assert difference(ours, np.asarray(theirs).astype(int)) <= ROUNDING


def test_guidance_is_on_above_zero(service: DiffusionService) -> None:
    "At 0.5 a negative prompt counts; at 0 it does nothing, which a warning says, and each step has one half."
    request = COMMON | {"negative_prompt": "blurry", "seed": 1}
    assert (
        difference(pixels(service, guidance_scale=0.5, **request)[0], pixels(service, guidance_scale=0, seed=1)[0]) > 0
    )
    result = service.generate(**request, guidance_scale=0)
    messages = ["a negative prompt does nothing while guidance_scale is not above 0"]
    assert [note.message for note in result.warnings] == messages
    assert service.plan(**request, guidance_scale=0.5).warnings is None


def test_guidance_can_end_early(service: DiffusionService) -> None:
    "Without guidance in the later steps the image is another one, with guidance in all of them the same."
    for fields in ({}, {"controlnets": [CANNY]}):
        guided = {"seed": 5, "guidance_scale": 9.0} | fields
        ends = (1.0, 0.4, 0.0)
        whole, part, none = (pixels(service, acceleration={"guidance_end": end}, **guided)[0] for end in ends)
        plain, unguided = pixels(service, **guided)[0], pixels(service, **guided | {"guidance_scale": 0.0})[0]
        assert difference(whole, plain) == 0 and difference(part, plain) > ROUNDING
        assert difference(none, unguided) <= ROUNDING


def test_controls_count_and_leave_nothing_behind(service: DiffusionService) -> None:
    "Scale 0, an empty window and a mask of black are the plain image; a mask of white is the control without one."
    plain, full = pixels(service, seed=3)[0], pixels(service, seed=3, controlnets=[CANNY])[0]
    assert difference(full, plain) > ROUNDING
    black, white = (Image.new("L", (64, 64), level) for level in (0, 255))
    draw = lambda **changes: pixels(service, seed=3, controlnets=[CANNY | changes])[0]
    assert difference(draw(conditioning_scale=0), plain) == 0
    assert difference(draw(guidance_start=0.4, guidance_end=0.5), plain) == 0
    assert difference(draw(mask_image=black), plain) == 0
    assert difference(draw(mask_image=white), full) == 0
    assert difference(draw(mask_image=half()), full) > ROUNDING
    assert difference(draw(guidance_end=0.4), full) > ROUNDING and difference(draw(guidance_end=0.4), plain) > ROUNDING
    assert difference(pixels(service, seed=3)[0], plain) == 0


def test_a_controlnet_draws_what_diffusers_draws_with_it_and_keeps_its_own_parts(service: DiffusionService) -> None:
    "Diffusers puts parts of the transformer into the ControlNet for good; the service's stays as it was loaded."
    net = service.factory(service.manifest("zimage")).controlnet("canny")
    names = list(net.state_dict())
    ours = pixels(service, seed=3, controlnets=[CANNY | {"conditioning_scale": 0.7, "preprocessing": None}])[0]
    assert list(net.state_dict()) == names and net.t_scale is None
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"true_cfg_scale": 2.0}, "has no use for true_cfg_scale"),
        ({"prompt_2": "a dog"}, "has no use for prompt_2"),
        ({"clip_skip": 1}, "has no use for clip_skip"),
        ({"scheduler": "ddim"}, "allowed: flow_match_euler"),
        ({"step_cache": {"method": "first_block"}}, "cannot use this method"),
        ({"step_cache": {"method": "deepcache"}}, "cannot use this method"),
        ({"seamless": "both"}, "has no use for seamless"),
        ({"guider": {"method": "apg"}}, "zimage has no apg"),
        ({"guider": {"method": "cfg_zero_star"}}, "zimage has no cfg_zero_star"),
        ({"acceleration": {"dtype": "bfloat16"}}, "computes in the dtype of its weights alone"),
        ({"image": photo(), "controlnets": [CANNY]}, "no pipeline for single control with image_to_image"),
        ({"controlnets": [CANNY, UNION]}, "Z-Image takes 1 ControlNet at a time"),
        ({"controlnets": [UNION | {"control_mode": "prompt"}]}, "no control mode"),
        (MASKED | {"controlnets": [CANNY], "strength": 0.5}, "starts from noise alone"),
        (MASKED | {"controlnets": [UNION]}, "not trained for inpainting: its control_in_dim is 16"),
    ],
)
def test_what_does_not_fit_is_refused(service: DiffusionService, fields: dict, message: str) -> None:
    result = service.generate(**COMMON | fields)
    assert result.status == OpStatus.unsupported_combination and message in result.message


def test_sizes_are_kept_and_images_of_other_sizes_fitted(service: DiffusionService) -> None:
    result = service.generate(**COMMON | {"width": 96, "height": 80}, image=photo(100, 70), strength=0.6, seed=1)
    assert result.image.size == (96, 80)
    rounded = service.generate(**COMMON | {"width": 88, "height": 64}, seed=1)
    assert [(note.field, note.given, note.used) for note in rounded.warnings] == [("width", "88", "96")]


def test_a_long_prompt_is_cut_off_behind_the_template(service: DiffusionService) -> None:
    "The chat template takes tokens from the prompt's, one for each letter; unused ones change nothing."
    template = len("<user\n<\n<assistant\n")  # with a token for each of the three markers
    for letters, warned in ((64 - template, False), (65 - template, True)):
        result = service.generate(**COMMON | {"prompt": "a" * letters}, seed=1, max_sequence_length=64)
        assert bool(result.warnings) == warned, result.warnings
    assert result.warnings[0].field == "prompt" and f"takes {64 - template} tokens" in result.warnings[0].message
    assert difference(pixels(service, seed=1)[0], pixels(service, seed=1, max_sequence_length=128)[0]) == 0


def test_previews(service: DiffusionService) -> None:
    "The preview after the last step is the image, smaller or as a JPEG."
    vae, seen = service.factory(service.manifest("zimage")).load().vae, []
    result = service.generate(**COMMON, seed=1, on_step=lambda step: seen.append(step.latents))
    shown = preview_maker(vae, (64, 64)).picture(seen[-1][0], (64, 64))
    assert seen[-1].shape == (1, 16, 8, 8)
    if float(seen[-1].std()) <= 1:  # a preview of stronger latents is scaled down
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(result.image)).mean() < 2


def lora_matrices(pipe, rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    "A and B for layers of every kind, by the path of the module."
    generator, made = torch.Generator().manual_seed(0), {}
    ends = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "adaLN_modulation.0", "all_x_embedder.2-1")
    for name, module in pipe.transformer.named_modules():
        if name.endswith(ends) and hasattr(module, "in_features"):
            down = torch.randn(rank, module.in_features, generator=generator) * 0.3
            made[name] = down, torch.randn(module.out_features, rank, generator=generator) * 0.3
    return made


def original(matrices: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    "The same deltas in the original names: query, key and value side by side, in one matrix of three times the rank."
    made = {}
    for name, (down, up) in matrices.items():
        if name.endswith(("to_k", "to_v")):
            continue
        if name.endswith("to_q"):
            parts = [matrices[name[:-1] + letter] for letter in "qkv"]
            down, up = torch.cat([part[0] for part in parts]), torch.block_diag(*[part[1] for part in parts])
            name = name.replace("to_q", "qkv")
        made[name.replace("to_out.0", "out").replace("all_x_embedder.2-1", "x_embedder")] = down, up
    return made


def peft(start: str) -> Callable[[dict], dict[str, torch.Tensor]]:
    def written(matrices: dict) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, (down, up) in matrices.items():
            tensors |= {f"{start}{name}.lora_A.weight": down, f"{start}{name}.lora_B.weight": up}
        return tensors

    return written


def kohya(start: str, dots: bool = False) -> Callable[[dict], dict[str, torch.Tensor]]:
    "With an alpha of twice the rank, and matrices that make up for it."

    def written(matrices: dict) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, (down, up) in matrices.items():
            key = start + (name if dots else name.replace(".", "_"))
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up / 2}
            tensors[f"{key}.alpha"] = torch.tensor(2.0 * len(down))
        return tensors

    return written


LAYOUTS = {
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_adds_the_same_in_every_layout(service: DiffusionService, tmp_path: Path, layout: str) -> None:
    "What each layer gets is B A of its file, to fp32 rounding, and no layer of the file is left out."
    pipe = service.factory(service.manifest("zimage")).load()
    matrices, (write, in_original_names) = lora_matrices(pipe), LAYOUTS[layout]
    save_file(write(original(matrices) if in_original_names else matrices), tmp_path / "lora.safetensors")
    loaded = load_lora(tmp_path / "lora.safetensors", LoraName("lora"))
    assert loaded.header.family == ModelFamily.zimage
    fit = fits(loaded.header, pipe)
    assert not fit.unknown and not fit.wrong
    added = {}
    for index, places in fit.places.items():
        for place in places:
            part = _rows(loaded.weights[index], place)
            added[place.path] = part.scaling * part.up @ part.down
    assert added.keys() == matrices.keys()
    for path, (down, up) in matrices.items():
        torch.testing.assert_close(added[path], up @ down, rtol=1e-5, atol=1e-6)


def test_a_lora_draws_what_diffusers_draws_with_it(service: DiffusionService, folder: Path) -> None:
    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.zimage)
    matrices = lora_matrices(pipe)
    for name, tensors in {
        "own": peft("transformer.")(matrices),
        "orig": kohya("lora_unet_")(original(matrices)),
    }.items():
        save_file(tensors, folder / "loras" / f"{name}.safetensors")
    ours, theirs_names = (
        pixels(service, seed=6, loras=[{"name": f"{name}.safetensors", "scale": 0.8}])[0] for name in ("own", "orig")
    )
    assert difference(ours, pixels(service, seed=6)[0]) > ROUNDING and difference(ours, theirs_names) <= ROUNDING
    pipe.set_progress_bar_config(disable=True)
    with quiet_libraries():
        pipe.load_lora_weights(peft("transformer.")(matrices), adapter_name="a")
        pipe.set_adapters("a", 0.8)
        theirs = pipe(
            prompt=COMMON["prompt"],
            num_inference_steps=3,
            guidance_scale=2.0,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(6),
        ).images[0]
    assert difference(ours, np.asarray(theirs).astype(int)) <= ROUNDING


def test_a_lora_of_another_family_is_refused(service: DiffusionService, folder: Path) -> None:
    for name, module, width, title in (
        ("flux", "double_blocks_0_img_attn_qkv", 3072, "Flux"),
        ("lumina", "layers_0_attention_qkv", 2304, "Lumina 2"),
    ):
        tensors = {f"lora_unet_{module}.lora_down.weight": torch.zeros(2, width)}
        tensors[f"lora_unet_{module}.lora_up.weight"] = torch.zeros(3 * width, 2)
        save_file(tensors, folder / "loras" / f"{name}.safetensors")
        result = service.generate(**COMMON, seed=1, loras=[{"name": f"{name}.safetensors"}])
        assert f"made for {title}, the model is Z-Image" in result.message


@pytest.mark.parametrize("name", ["original", "own"])
def test_a_single_file_is_the_same_model(service: DiffusionService, folder: Path, name: str) -> None:
    assert identify(read_header(folder / f"{name}.safetensors")).what == "a transformer of Z-Image"
    assert difference(pixels(service, seed=1, model=f"file-{name}")[0], pixels(service, seed=1)[0]) == 0
    unit = CANNY | {"model": "canny"}
    controlled = pixels(service, seed=1, model=f"file-{name}", controlnets=[unit])[0]
    assert difference(controlled, pixels(service, seed=1, controlnets=[unit])[0]) == 0


def test_a_gguf_file_is_nearly_the_same_model(service: DiffusionService) -> None:
    ours, plain = pixels(service, seed=1, model="file-packed")[0], pixels(service, seed=1)[0]
    assert 0 < np.abs(ours - plain).mean() < 4  # eight bits for each weight


def test_the_file_of_a_union_controlnet_is_recognised(folder: Path) -> None:
    kind = identify(read_header(folder / "control.safetensors"))
    assert (kind.role, kind.what) == ("union_controlnet", "a union ControlNet for Z-Image")


def test_every_step_is_computed_in_bfloat16(folder: Path) -> None:
    "Latents stay in float32 between the steps, as in diffusers; each task runs with weights in bfloat16."
    (folder / "half.yaml").write_text((folder / "zimage.yaml").read_text() + "dtype: bfloat16\n")
    with DiffusionService(Settings(model_folders=(folder,)), device="cpu") as service:
        for fields, *_ in TASKS.values():
            assert service.generate(**COMMON | {"model": "half"} | fields, seed=1).status == OpStatus.success


def test_a_new_controlnet_changes_nothing() -> None:
    "The layers that are random in a tiny one are those that a new one has at zero."
    with quiet_libraries():
        net = tiny_controlnet(ModelFamily.zimage)
        fresh = type(net).from_config(net.config)
    zero = [name for name, parameter in fresh.named_parameters() if not parameter.any()]
    changed = dict(net.named_parameters())
    assert zero and all(changed[name].any() for name in zero if "proj" in name)
