"""FLUX.2 Klein through the service: drawing, editing with reference images, inpainting, LoRA layouts, files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from diffusion_workers.cli.main import main
from diffusion_workers.families.flux2 import flux2_original_names
from diffusion_workers.lora.files import LoraName, fits
from diffusion_workers.lora.keys import module_shapes
from diffusion_workers.lora.layers import _rows, load_lora
from diffusion_workers.models.weight_headers import read_header
from diffusion_workers.models.weight_kinds import identify
from diffusion_workers.pipeline.loading import quiet_libraries
from diffusion_workers.pipeline.tiny_files import save_gguf, save_weights
from diffusion_workers.pipeline.tiny_models import tiny_pipeline, write_tiny_model
from diffusion_workers.planning.plan import request_from_plan
from diffusion_workers.request.errors import RequestError
from diffusion_workers.request.images import to_image_string
from diffusion_workers.server.jobs import Job, request_bytes, request_images
from diffusion_workers.service.previews import scaled_latents, vae_latents
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import GenerationRequest, ModelFamily, OpStatus

ROUNDING = 1  # of 255: a batch adds in another order than an image alone
COMMON = {"model": "flux2", "prompt": "a red circle on a white background", "num_inference_steps": 3, "width": 64}


def photo(width: int = 64, height: int = 64, disc: str = "red") -> Image.Image:
    "A blue rectangle and a disc."
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


TWO = {"reference_images": [photo(), photo(96, 80, "green")]}
MASKED = {"image": photo(), "mask_image": half()}
TASKS = {
    "text to image": ({}, "text_to_image", "Flux2KleinPipeline", 3),
    "edit": ({"reference_images": [photo()]}, "edit", "Flux2KleinPipeline", 3),
    "edit with two references": (TWO, "edit", "Flux2KleinPipeline", 3),
    "edit with three references": (
        {"reference_images": [photo(), photo(disc="green"), photo(disc="black")]},
        "edit",
        "Flux2KleinPipeline",
        3,
    ),
    "inpainting": (MASKED | {"strength": 0.5}, "inpainting", "Flux2KleinInpaintPipeline", 2),
    "inpainting with a reference": (
        MASKED | {"reference_images": [photo(disc="green")]},
        "inpainting",
        "Flux2KleinInpaintPipeline",
        3,
    ),
}


def original_weights(transformer) -> dict[str, torch.Tensor]:
    "The weights of a transformer in the original names."
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    for row in flux2_original_names(transformer, module_shapes(transformer)):
        taken = [weights.pop(f"{path}.weight", None) for path in row.paths]
        if taken[0] is None:
            continue
        whole = torch.cat(taken)
        name = (
            f"{row.name}.scale"
            if "norm.query_norm" in row.name or "norm.key_norm" in row.name
            else f"{row.name}.weight"
        )
        weights[name] = torch.cat(whole.chunk(2)[::-1]) if row.halves_swapped else whole
    return weights


def write_files(folder: Path) -> None:
    "The transformer of the tiny model in single files, with manifests."
    with quiet_libraries():
        transformer = diffusers.Flux2Transformer2DModel.from_pretrained(folder / "flux2" / "transformer")
    weights = original_weights(transformer)
    assert "double_blocks.0.img_attn.qkv.weight" in weights and "single_blocks.0.linear1.weight" in weights
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    save_weights(weights, folder / "original.safetensors")
    save_weights(prefixed, folder / "prefixed.safetensors")
    save_weights(transformer.state_dict(), folder / "own.safetensors")
    save_gguf(weights, folder / "packed.gguf", "flux")
    for name in ("original.safetensors", "prefixed.safetensors", "own.safetensors", "packed.gguf"):
        (folder / f"file-{name.partition('.')[0]}.yaml").write_text(
            "family: flux2\nsource: {folder: flux2}\ndefaults: {width: 64, height: 64, guidance_scale: 2.0}\n"
            f"components: {{transformer: {{source: {{file: {name}, config: {{folder: flux2/transformer}}}}}}}}\n"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A tiny base model, its distilled twin, and others with parts of it in single files."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.flux2, changes={"lora_folders": [{"folder": "loras"}]})
    with quiet_libraries():
        pipe = diffusers.Flux2KleinPipeline.from_pretrained(folder / "flux2")
        diffusers.Flux2KleinPipeline(**pipe.components, is_distilled=True).save_pretrained(folder / "distilled")
    defaults = "{width: 64, height: 64, guidance_scale: 1.0}"
    (folder / "distilled.yaml").write_text(f"family: flux2\nsource: {{folder: distilled}}\ndefaults: {defaults}\n")
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
    "Also where there are as many images as references: a reference is for all images, and not for one of them."
    fields, task, class_name, steps = TASKS[name]
    plan = service.plan(**COMMON | fields).plan
    assert (plan.task.value, plan.pipeline_class, plan.denoising_steps) == (task, class_name, steps)
    together = pixels(service, seeds=[1, 2, 3], **fields)
    assert difference(*together[:2]) > ROUNDING
    for seed, image in zip((1, 2, 3), together):
        assert difference(pixels(service, seed=seed, **fields)[0], image) <= ROUNDING


def their_pixels(seed: int, distilled: bool = False, **fields) -> np.ndarray:
    "What diffusers draws."
    with quiet_libraries():
        pipe = tiny_pipeline(ModelFamily.flux2)
    pipe.register_to_config(is_distilled=distilled)
    pipe.set_progress_bar_config(disable=True)
    common = {"prompt": COMMON["prompt"], "num_inference_steps": 3, "guidance_scale": 2.0, "width": 64, "height": 64}
    image = pipe(**common | fields, generator=torch.Generator().manual_seed(seed)).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("references", [[], [photo()], TWO["reference_images"], [photo(130, 70)]])
def test_it_draws_what_diffusers_draws(service: DiffusionService, references: list) -> None:
    "Without and with references, whose sides are cut to multiples of 16 in the same way."
    ours = pixels(service, seed=6, height=64, **({"reference_images": references} if references else {}))[0]
    assert difference(ours, their_pixels(6, image=references or None)) <= ROUNDING


def test_a_large_reference_is_scaled_as_in_diffusers(service: DiffusionService) -> None:
    "Above a million pixels; the plan and a warning say so."
    large = photo(1400, 1100)
    result = service.generate(**COMMON, height=64, seed=1, num_images=1, reference_images=[large])
    planned = result.generation.plan.reference_images[0]
    assert (planned.width, planned.height, planned.used_width, planned.used_height) == (1400, 1100, 1152, 896)
    assert [(note.field, note.used) for note in result.warnings] == [("reference_images[0]", "'1152 x 896'")]
    assert difference(np.asarray(result.image).astype(int), their_pixels(1, image=[large])) <= ROUNDING


def test_an_edit_in_another_size_than_its_reference_says_so(service: DiffusionService) -> None:
    small = {"model": "flux2-klein-4b", "reference_images": [photo(128, 96)]}
    planned = service.plan("a", **small)
    assert (planned.plan.width, planned.plan.height) != (128, 96)
    used = f"'{planned.plan.width} x {planned.plan.height}'"
    assert [(note.field, note.used) for note in planned.warnings] == [("reference_images[0]", used)]
    assert not service.plan("a", **small, width=256, height=256).warnings
    assert not service.plan(**COMMON, height=64, reference_images=[photo(96, 80)]).warnings


def test_each_reference_and_their_order_count(service: DiffusionService) -> None:
    one, two = TWO["reference_images"]
    draw = lambda *images: pixels(service, seed=2, height=64, reference_images=list(images))[0]
    made = [draw(one), draw(two), draw(one, two), draw(two, one)]
    for index, image in enumerate(made):
        assert all(difference(image, other) > 0 for other in made[:index])
    assert difference(draw(one, two), made[2]) == 0
    plain = pixels(service, seed=2, height=64)[0]
    assert difference(plain, made[0]) > 0 and difference(pixels(service, seed=2, height=64)[0], plain) == 0


def test_sizes(service: DiffusionService) -> None:
    "As asked for, else that of the first reference; an inpainted image keeps its size."
    size = lambda **fields: (
        service.generate(**{"model": "flux2", "prompt": "a", "num_inference_steps": 1} | fields).image.size
    )
    assert size(reference_images=[photo(96, 80), photo()]) == (96, 80)
    assert size(reference_images=[photo(96, 80)], width=64, height=128) == (64, 128)
    assert size(reference_images=[photo(96, 64)], width=192) == (192, 128)
    assert size(image=photo(96, 80), mask_image=half()) == (96, 80)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"negative_prompt": "blurry"}, "flux2 has no use for negative_prompt"),
        ({"negative_prompt": "blurry"}, "say in the prompt what the image shows"),
        ({"image": photo(), "strength": 0.5}, "flux2 is not offered for image_to_image; put it into reference_images"),
        ({"strength": 0.5}, "put the image into reference_images"),
        ({"controlnets": [{"image": photo()}]}, "flux2 has no use for controlnets"),
        ({"seamless": "both"}, "has no use for seamless"),
        ({"guider": {"method": "apg"}}, "flux2 has no apg"),
        ({"guider": {"method": "cfg_zero_star"}}, "flux2 has no cfg_zero_star"),
        ({"true_cfg_scale": 2.0}, "flux2 has no use for true_cfg_scale"),
        ({"scheduler": "ddim"}, "allowed: flow_match_euler"),
        ({"step_cache": {"method": "first_block"}}, "allowed: taylorseer"),
        ({"step_cache": {"method": "mag"}}, "allowed: taylorseer"),
        ({"reference_images": [photo()] * 5}, "FLUX.2 Klein takes fewer reference images for edit; given '5 images'"),
        ({"reference_images": [photo(), photo(40, 64)]}, "reference_images[1]: the image is too small"),
        ({"reference_images": [photo(640, 64)]}, "sides of at most 8 to 1"),
        (MASKED | TWO, "fewer reference images for inpainting; given '2 images'; allowed: at most 1"),
        ({"model": "distilled", "guidance_scale": 4.0}, "distilled, and ignores guidance"),
        ({"model": "shapes-sd15", "reference_images": [photo()]}, "sd15 has no use for reference_images"),
        (
            {"model": "shapes-sd15", "reference_images": [photo()]},
            "image and strength, or take a model of the families",
        ),
    ],
)
def test_what_does_not_fit_is_refused(service: DiffusionService, fields: dict, message: str) -> None:
    result = service.generate(**COMMON | fields)
    assert result.status != OpStatus.success and message in result.message + str(result.errors)


def test_a_reference_that_is_no_image_is_named(service: DiffusionService) -> None:
    result = service.generate(**COMMON, reference_images=[to_image_string(photo()), "aGVsbG8="])
    assert [error.field for error in result.errors] == ["reference_images[1]"]


def test_an_inpainted_image_may_not_be_larger_than_the_pipeline_takes() -> None:
    "Diffusers would shrink it."
    with DiffusionService(device="cpu") as service:
        result = service.plan("a", model="flux2-klein-4b", image=photo(1200, 1200), mask_image=half())
    assert "at most 1048576 pixels" in result.message


def test_the_distilled_model_stays_distilled(service: DiffusionService) -> None:
    "In every pipeline that is made of its parts; the base model is guided against an empty prompt."
    draw = lambda model, **fields: pixels(service, model=model, seed=3, height=64, **fields)[0]
    assert difference(draw("distilled"), their_pixels(3, distilled=True)) <= ROUNDING
    assert difference(draw("flux2"), draw("distilled")) > ROUNDING
    for fields in (TWO, MASKED):
        assert difference(draw("distilled", **fields), draw("flux2", guidance_scale=1.0, **fields)) == 0


def test_guidance_can_end_early(service: DiffusionService) -> None:
    for fields in ({}, TWO):
        guided = {"seed": 5, "guidance_scale": 9.0, "height": 64} | fields
        whole, none = (pixels(service, acceleration={"guidance_end": end}, **guided)[0] for end in (1.0, 0.0))
        plain, unguided = (pixels(service, **guided | {"guidance_scale": scale})[0] for scale in (9.0, 1.0))
        assert difference(whole, plain) == 0 and difference(plain, unguided) > 0
        assert difference(none, unguided) <= ROUNDING


def test_taylorseer_runs_twice_alike_and_leaves_nothing_behind(service: DiffusionService) -> None:
    for fields in ({}, TWO):
        request = {"seed": 5, "num_inference_steps": 8, "height": 64} | fields
        plain = pixels(service, **request)[0]
        first, second = (
            pixels(service, step_cache={"method": "taylorseer", "interval": 3}, **request)[0] for _ in range(2)
        )
        assert difference(first, second) == 0
        assert difference(pixels(service, **request)[0], plain) == 0


def test_padding_counts_so_the_length_stands_in_the_plan(service: DiffusionService) -> None:
    assert service.plan(**COMMON).plan.max_sequence_length == 512
    short, usual = (pixels(service, seed=1, **fields)[0] for fields in ({"max_sequence_length": 64}, {}))
    assert difference(short, usual) > 0
    result = service.generate(**COMMON | {"prompt": "a" * 100}, seed=1, max_sequence_length=64)
    assert [note.field for note in result.warnings] == ["prompt"]


def test_latents_are_those_of_the_decoder(service: DiffusionService) -> None:
    "What a step sees decodes to the image, and scaling and its reverse are exact."
    seen = []
    result = service.generate(**COMMON, seed=1, on_step=seen.append)
    assert seen[-1].latents.shape == (1, 32, 8, 8)
    assert difference(np.asarray(seen[-1].decode()[0]).astype(int), np.asarray(result.image).astype(int)) <= ROUNDING
    vae = service.factory(service.manifest("flux2")).load().vae
    latents = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled_latents(vae, vae_latents(vae, latents)), latents, rtol=1e-5, atol=1e-6)


def test_an_edit_is_regenerated_from_its_receipt(service: DiffusionService) -> None:
    "The receipt holds hashes; with the same images it makes the same pixels."
    result = service.generate(**COMMON, seed=4, **TWO)
    plan = result.generation.plan
    with pytest.raises(RequestError, match="2 reference images"):
        request_from_plan(plan)
    again = request_from_plan(plan, reference_images=[to_image_string(image) for image in TWO["reference_images"]])
    assert difference(np.asarray(service.generate(again).image), np.asarray(result.image)) == 0
    restored = service.restore(result.image).restored
    assert restored.missing_images == ["reference_images[0]", "reference_images[1]"]
    assert restored.request["prompt"] == COMMON["prompt"] and "reference_images" not in restored.request


def test_the_command_line_takes_references_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "first.png", tmp_path / "second.png"]
    for file, image in zip(files, TWO["reference_images"]):
        image.save(file)
    options = [text for file in files for text in ("--reference", str(file))]
    assert main(["plan", "put the disc of image 2 into image 1", "--model", "flux2-klein-4b", *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["task"] == "edit"
    sizes = [(image["width"], image["height"]) for image in plan["reference_images"]]
    assert sizes == [image.size for image in TWO["reference_images"]]
    assert main(["plan", "a", "--model", "flux2-klein-4b", "--reference", str(tmp_path / "missing.png")]) != 0
    assert f"--reference {str(tmp_path)[:20]}" in capsys.readouterr().err


def test_a_server_counts_and_drops_reference_images() -> None:
    "They are part of the size of a request, may be URLs, and a job that has ended does not hold them."
    texts = [to_image_string(image) for image in TWO["reference_images"]]
    request = GenerationRequest(prompt="a", reference_images=[*texts, "https://example.org/a.png"])
    assert request_images(request)[2:] == [*texts, "https://example.org/a.png"]
    assert request_bytes(request) > sum(map(len, texts))
    job = Job(request)
    job.release()
    assert job.request.reference_images is None and job.request.prompt == "a"


def lora_matrices(pipe, rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    "A and B for layers of every kind, by the path of the module."
    generator, made = torch.Generator().manual_seed(0), {}
    ends = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "attn.to_out")
    ends += ("linear_in", "to_qkv_mlp_proj", "double_stream_modulation_img.linear", "norm_out.linear")
    for name, module in pipe.transformer.named_modules():
        if name.endswith(ends) and hasattr(module, "in_features"):
            down = torch.randn(rank, module.in_features, generator=generator) * 0.3
            made[name] = down, torch.randn(module.out_features, rank, generator=generator) * 0.3
    return made


def original(pipe, matrices: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    "The same deltas in the original names: query, key and value in one matrix of three times the rank."
    made = {}
    for row in flux2_original_names(pipe.transformer, list(module_shapes(pipe.transformer))):
        parts = [matrices[path] for path in row.paths if path in matrices]
        if not parts:
            continue
        down, up = torch.cat([part[0] for part in parts]), torch.block_diag(*[part[1] for part in parts])
        made[row.name] = down, torch.cat(up.chunk(2)[::-1]) if row.halves_swapped else up
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
    "ComfyUI, original names": (peft("diffusion_model."), True),
    "ComfyUI, original names and alpha": (kohya("diffusion_model.", dots=True), True),
    "kohya, names of diffusers": (kohya("lora_unet_"), False),
    "kohya, original names": (kohya("lora_unet_"), True),
    "OneTrainer": (kohya("lora_transformer_"), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_adds_the_same_in_every_layout(service: DiffusionService, tmp_path: Path, layout: str) -> None:
    "What each layer gets is B A of its file, to fp32 rounding, and no layer of the file is left out."
    pipe = service.factory(service.manifest("flux2")).load()
    matrices, (write, in_original_names) = lora_matrices(pipe), LAYOUTS[layout]
    save_file(write(original(pipe, matrices) if in_original_names else matrices), tmp_path / "lora.safetensors")
    loaded = load_lora(tmp_path / "lora.safetensors", LoraName("lora"))
    assert loaded.header.family == ModelFamily.flux2
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
        pipe = tiny_pipeline(ModelFamily.flux2)
    tensors = peft("transformer.")(lora_matrices(pipe))
    save_file(tensors, folder / "loras" / "own.safetensors")
    ours = pixels(service, seed=6, height=64, loras=[{"name": "own.safetensors", "scale": 0.8}])[0]
    assert difference(ours, pixels(service, seed=6, height=64)[0]) > ROUNDING
    pipe.set_progress_bar_config(disable=True)
    with quiet_libraries():
        pipe.load_lora_weights(tensors, adapter_name="a")
        pipe.set_adapters("a", 0.8)
        common = {
            "prompt": COMMON["prompt"],
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "width": 64,
            "height": 64,
        }
        theirs = pipe(**common, generator=torch.Generator().manual_seed(6)).images[0]
    assert difference(ours, np.asarray(theirs).astype(int)) <= ROUNDING


def test_files_of_klein_at_its_real_width_are_told_from_others(folder: Path) -> None:
    "By single blocks, by feed-forward layers, and by attention alone where every block is there."
    blocks = [f"double_blocks_{i}_img_attn_proj" for i in range(5)] + [f"single_blocks_{i}_linear2" for i in range(20)]
    files = {
        "linear1": {"single_blocks_0_linear1": (3072, 27648)},
        "9B": {"double_blocks_0_img_attn_proj": (4096, 4096)},
        "whole": {name: (12288 if "linear2" in name else 3072, 3072) for name in blocks},
    }
    for title, modules in files.items():
        tensors = {}
        for name, (inputs, outputs) in modules.items():
            tensors[f"lora_unet_{name}.lora_down.weight"] = torch.zeros(1, inputs)
            tensors[f"lora_unet_{name}.lora_up.weight"] = torch.zeros(outputs, 1)
        save_file(tensors, folder / "loras" / "probe.safetensors")
        assert load_lora(folder / "loras" / "probe.safetensors", LoraName("probe")).header.family == "flux2", title


@pytest.mark.parametrize("name", ["original", "prefixed", "own"])
def test_a_single_file_is_the_same_model(service: DiffusionService, folder: Path, name: str) -> None:
    assert identify(read_header(folder / f"{name}.safetensors")).what == "a transformer of FLUX.2"
    assert difference(pixels(service, seed=1, model=f"file-{name}")[0], pixels(service, seed=1)[0]) == 0


def test_a_gguf_file_is_nearly_the_same_model(service: DiffusionService) -> None:
    ours, plain = pixels(service, seed=1, model="file-packed")[0], pixels(service, seed=1)[0]
    assert 0 < np.abs(ours - plain).mean() < 4  # eight bits for each weight


def test_every_task_runs_in_bfloat16(folder: Path) -> None:
    (folder / "half.yaml").write_text((folder / "flux2.yaml").read_text() + "dtype: bfloat16\n")
    with DiffusionService(Settings(model_folders=(folder,)), device="cpu") as service:
        for fields, *_ in TASKS.values():
            assert service.generate(**COMMON | {"model": "half"} | fields, seed=1).status == OpStatus.success
