"""Qwen-Image and Qwen-Image-Edit through the service: guidance, references, ControlNets, caches, previews, sizes."""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import family_checks
import numpy as np
import pytest
import torch
from family_checks import CANNY, NEGATIVE, ONE, ROUNDING, SMALL, TILE, TWO, difference, photo, quiet_pipeline, serving
from safetensors.torch import save_file

from diffusion_workers.lora.files import LoraName
from diffusion_workers.lora.layers import load_lora
from diffusion_workers.pipeline.controlnets import steady_vae
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.service.batching import sharing_key
from diffusion_workers.service.previews import color_map, mapped, preview_maker, scaled_latents, vae_latents
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ModelFamily, ModelKind

COMMON = SMALL | {"model": "qwen"}


@pytest.fixture(scope="module", autouse=True)
def small_references() -> Iterator[None]:
    with family_checks.small_references():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "An ordinary model, and its twins that edit."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.qwen, changes={"lora_folders": [{"folder": "loras"}]})
    write_tiny_model(folder, ModelFamily.qwen, "edit", ModelKind.edit)
    write_tiny_model(folder, ModelFamily.qwen, "plus", ModelKind.edit_plus)
    (folder / "loras").mkdir()
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[DiffusionService]:
    with serving(folder) as service:
        yield service


def pixels(service: DiffusionService, **fields) -> np.ndarray:
    "The first image of a request."
    return family_checks.pixels(service, **COMMON | {"height": 64, "seed": 3} | fields)[0]


def test_guidance_needs_no_negative_prompt(service: DiffusionService) -> None:
    "Diffusers would leave it out without one; a space stands for none, as in the examples of its authors."
    plain = pixels(service, guidance_scale=9.0)
    assert difference(pixels(service, guidance_scale=9.0, negative_prompt=" "), plain) == 0
    assert difference(pixels(service, guidance_scale=9.0, **NEGATIVE), plain) > 0
    assert difference(pixels(service, guidance_scale=1.0), plain) > 0
    result = service.generate(**COMMON | {"guidance_scale": 1.0} | NEGATIVE, seed=1)
    assert "does nothing while guidance_scale is not above 1" in result.warnings[0].message


def test_one_step_makes_an_image(service: DiffusionService) -> None:
    "The schedule of diffusers divides 0 by 0 there."
    assert pixels(service, num_inference_steps=1).shape == (64, 64, 3)
    assert difference(pixels(service, num_inference_steps=1, seed=4), pixels(service, num_inference_steps=1)) > 0


@pytest.mark.parametrize("model", ["edit", "plus"])
def test_a_reference_is_seen_in_its_own_proportions(service: DiffusionService, model: str) -> None:
    "The plan says in which size; without a size the result has that one."
    with family_checks.small_references(128 * 128):
        result = service.generate(model=model, prompt="a", num_inference_steps=1, reference_images=[photo(96, 48)])
    planned = result.generation.plan.reference_images[0]
    assert (planned.used_width, planned.used_height) == result.image.size == (192, 96)
    assert [(note.field, note.used) for note in result.warnings] == [("reference_images[0]", "'192 x 96'")]


def test_the_real_sizes_of_references() -> None:
    "A megapixel, in multiples of 32."
    with DiffusionService(device="cpu") as service, pytest.MonkeyPatch.context() as patch:
        from diffusion_workers.families.qwen import QWEN
        from diffusion_workers.families.registry import FAMILIES

        patch.setitem(FAMILIES, ModelFamily.qwen, QWEN)
        plan = service.plan("a", model="qwen-image-edit-2509", reference_images=[photo(90, 60), photo()]).plan
    assert [(row.used_width, row.used_height) for row in plan.reference_images] == [(1248, 832), (1024, 1024)]
    assert (plan.width, plan.height, plan.guidance_scale, plan.num_inference_steps) == (1248, 832, 4.0, 50)


def test_each_reference_and_their_order_count(service: DiffusionService) -> None:
    one, two = TWO["reference_images"]
    draw = lambda *images: pixels(service, model="plus", reference_images=list(images))
    made = [draw(one), draw(two), draw(one, two), draw(two, one)]
    for index, image in enumerate(made):
        assert all(difference(image, other) > 0 for other in made[:index])
    assert difference(draw(one, two), made[2]) == 0


def test_edits_with_other_prompts_share_no_batch(service: DiffusionService) -> None:
    "Their pipelines take one prompt; ordinary requests share one."
    key = lambda **fields: sharing_key(service.plan(**COMMON | fields).plan)
    assert key(prompt="a") == key(prompt="b")
    assert key(model="plus", prompt="a", **ONE) != key(model="plus", prompt="b", **ONE)
    assert key(model="plus", prompt="a", seed=1, **ONE) == key(model="plus", prompt="a", seed=2, **ONE)


def test_a_long_instruction_is_not_cut_off(service: DiffusionService) -> None:
    "The pipelines that edit take prompts of any length; the others cut them at 512 tokens, with a warning."
    for model, more, warned in (("qwen", {}, True), ("plus", {"reference_images": [photo()]}, False)):
        result = service.generate(**COMMON | {"model": model, "prompt": "a" * 600, "num_inference_steps": 1} | more)
        assert any(note.field == "prompt" for note in result.warnings or ()) == warned


def test_a_controlnet_draws_what_diffusers_draws_with_it(service: DiffusionService, folder: Path) -> None:
    "But the map is encoded without random numbers, of which diffusers draws some before the noise."
    unit = {"model": "canny", "image": photo(), "conditioning_scale": 0.7}
    ours = pixels(service, controlnets=[unit], **NEGATIVE)
    pipe = quiet_pipeline(ModelFamily.qwen)
    controlnet = diffusers.QwenImageControlNetModel.from_pretrained(folder / "qwen-canny")
    pipe = diffusers.QwenImageControlNetPipeline(**pipe.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae = steady_vae(pipe.vae, 1)
    common = {"prompt": COMMON["prompt"], "true_cfg_scale": 2.0, "num_inference_steps": 3, "width": 64, "height": 64}
    control = {"control_image": photo(), "controlnet_conditioning_scale": 0.7}
    theirs = pipe(**common | control | NEGATIVE, generator=torch.Generator().manual_seed(3)).images[0]
    assert difference(ours, np.asarray(theirs)) <= ROUNDING


def test_residuals_of_several_controlnets_are_added(service: DiffusionService) -> None:
    "Each counts; a seed makes the same pixels again, and those off are left out."
    one, two = (pixels(service, controlnets=units) for units in ([CANNY], [CANNY, TILE]))
    assert difference(one, two) > ROUNDING and difference(pixels(service, controlnets=[CANNY, TILE]), two) == 0
    off = TILE | {"conditioning_scale": 0}
    assert difference(pixels(service, controlnets=[CANNY, off]), one) == 0
    plain = pixels(service)
    assert difference(pixels(service, controlnets=[off, off]), plain) == 0


@pytest.mark.parametrize(
    "cache", [{"method": "taylorseer", "interval": 3}, {"method": "first_block", "threshold": 0.5}]
)
def test_step_caches_run_twice_alike_and_leave_nothing_behind(service: DiffusionService, cache: dict) -> None:
    for fields in (NEGATIVE, {"model": "plus"} | TWO):
        request = {"num_inference_steps": 8} | fields
        plain = pixels(service, **request)
        first, second = (pixels(service, step_cache=cache, **request) for _ in range(2))
        assert difference(first, second) == 0
        assert difference(pixels(service, **request), plain) == 0


def test_a_lora_of_attention_alone_is_told_by_its_blocks(folder: Path) -> None:
    "Flux has layers of the same names and widths, but not sixty blocks."
    tensors = {}
    for i in range(60):
        tensors[f"transformer.transformer_blocks.{i}.attn.to_q.lora_A.weight"] = torch.zeros(1, 3072)
        tensors[f"transformer.transformer_blocks.{i}.attn.to_q.lora_B.weight"] = torch.zeros(3072, 1)
    save_file(tensors, folder / "loras" / "probe.safetensors")
    header = load_lora(folder / "loras" / "probe.safetensors", LoraName("probe")).header
    assert header.family == ModelFamily.qwen


def test_previews_of_a_vae_for_video(service: DiffusionService) -> None:
    "By the decoder and by the linear map; scaling and its reverse are exact."
    vae, seen = service.factory(service.manifest("qwen")).load().vae, []
    result = service.generate(**COMMON, seed=1, height=64, on_step=lambda step: seen.append(step.latents))
    shown = preview_maker(vae, (64, 64)).image(seen[-1][0], (64, 64))
    if float(seen[-1].std()) <= 1:  # a preview of stronger latents is scaled down
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(result.image)).mean() < 2
    with torch.no_grad():
        assert mapped(torch.randn(16, 8, 8), color_map(vae)).shape == (3, 8, 8)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled_latents(vae, vae_latents(vae, latents)), latents, rtol=1e-5, atol=1e-6)
