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
from diffusion_workers.service.previews import PreviewMaker, color_map, mapped, scaled_latents, vae_latents
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ModelFamily, ModelKind

COMMON = SMALL | {"model": "qwen"}


@pytest.fixture(scope="module", autouse=True)
def small_references() -> Iterator[None]:
    with family_checks.small_references():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a text-to-image model and the two kinds of edit models."
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


def test_guidance_works_without_a_negative_prompt(service: DiffusionService) -> None:
    "Diffusers skips guidance without one; here a space is used instead, as in the examples of the model's authors."
    plain = pixels(service, guidance_scale=9.0)
    assert difference(pixels(service, guidance_scale=9.0, negative_prompt=" "), plain) == 0
    assert difference(pixels(service, guidance_scale=9.0, **NEGATIVE), plain) > 0
    assert difference(pixels(service, guidance_scale=1.0), plain) > 0
    result = service.generate(**COMMON | {"guidance_scale": 1.0} | NEGATIVE, seed=1)
    assert "does nothing while guidance_scale is not above 1" in result.warnings[0].message


def test_a_single_step_produces_an_image(service: DiffusionService) -> None:
    "With one step, the sigma schedule of diffusers divides 0 by 0."
    assert pixels(service, num_inference_steps=1).shape == (64, 64, 3)
    assert difference(pixels(service, num_inference_steps=1, seed=4), pixels(service, num_inference_steps=1)) > 0


@pytest.mark.parametrize("model", ["edit", "plus"])
def test_reference_images_keep_their_aspect_ratio(service: DiffusionService, model: str) -> None:
    "The plan reports the size used, which is also the default size of the result."
    with family_checks.small_references(128 * 128):
        result = service.generate(model=model, prompt="a", num_inference_steps=1, reference_images=[photo(96, 48)])
    planned = result.generation.plan.reference_images[0]
    assert (planned.used_width, planned.used_height) == result.image.size == (192, 96)
    assert [(note.field, note.used) for note in result.warnings] == [("reference_images[0]", "'192 x 96'")]


def test_references_are_resized_to_one_megapixel() -> None:
    "About one megapixel, in multiples of 32, without the small size that the other tests use."
    with DiffusionService(device="cpu") as service, pytest.MonkeyPatch.context() as patch:
        from diffusion_workers.families.qwen import QWEN
        from diffusion_workers.families.registry import FAMILIES

        patch.setitem(FAMILIES, ModelFamily.qwen, QWEN)
        plan = service.plan("a", model="qwen-image-edit-2509", reference_images=[photo(90, 60), photo()]).plan
    assert [(row.used_width, row.used_height) for row in plan.reference_images] == [(1248, 832), (1024, 1024)]
    assert (plan.width, plan.height, plan.guidance_scale, plan.num_inference_steps) == (1248, 832, 4.0, 50)


def test_each_reference_and_their_order_affect_the_image(service: DiffusionService) -> None:
    one, two = TWO["reference_images"]
    draw = lambda *images: pixels(service, model="plus", reference_images=list(images))
    made = [draw(one), draw(two), draw(one, two), draw(two, one)]
    for index, image in enumerate(made):
        assert all(difference(image, other) > 0 for other in made[:index])
    assert difference(draw(one, two), made[2]) == 0


def test_edits_share_a_batch_only_with_the_same_prompt(service: DiffusionService) -> None:
    "Edit pipelines take one prompt; text-to-image requests with different prompts share a batch."
    key = lambda **fields: sharing_key(service.plan(**COMMON | fields).plan)
    assert key(prompt="a") == key(prompt="b")
    assert key(model="plus", prompt="a", **ONE) != key(model="plus", prompt="b", **ONE)
    assert key(model="plus", prompt="a", seed=1, **ONE) == key(model="plus", prompt="a", seed=2, **ONE)


def test_long_prompts_produce_a_warning_except_in_edits(service: DiffusionService) -> None:
    "Edit pipelines take prompts of any length; the others truncate them at 512 tokens, with a warning."
    for model, more, warned in (("qwen", {}, True), ("plus", {"reference_images": [photo()]}, False)):
        result = service.generate(**COMMON | {"model": model, "prompt": "a" * 600, "num_inference_steps": 1} | more)
        assert any(note.field == "prompt" for note in result.warnings or ()) == warned


def test_controlnet_output_matches_diffusers(service: DiffusionService, folder: Path) -> None:
    "The map is encoded deterministically in both; plain diffusers draws random numbers for it before the noise."
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


def test_multiple_controlnets_all_take_effect(service: DiffusionService) -> None:
    "Each one changes the image, the result is reproducible, and ControlNets with scale 0 are skipped."
    one, two = (pixels(service, controlnets=units) for units in ([CANNY], [CANNY, TILE]))
    assert difference(one, two) > ROUNDING and difference(pixels(service, controlnets=[CANNY, TILE]), two) == 0
    off = TILE | {"conditioning_scale": 0}
    assert difference(pixels(service, controlnets=[CANNY, off]), one) == 0
    plain = pixels(service)
    assert difference(pixels(service, controlnets=[off, off]), plain) == 0


@pytest.mark.parametrize(
    "cache", [{"method": "taylorseer", "interval": 3}, {"method": "first_block", "threshold": 0.5}]
)
def test_step_caches_are_reproducible_and_leave_no_state_behind(service: DiffusionService, cache: dict) -> None:
    for fields in (NEGATIVE, {"model": "plus"} | TWO):
        request = {"num_inference_steps": 8} | fields
        plain = pixels(service, **request)
        first, second = (pixels(service, step_cache=cache, **request) for _ in range(2))
        assert difference(first, second) == 0
        assert difference(pixels(service, **request), plain) == 0


def test_attention_only_loras_are_identified_by_block_count(folder: Path) -> None:
    "Flux layers have the same names and widths, but Flux does not have 60 blocks."
    tensors = {}
    for i in range(60):
        tensors[f"transformer.transformer_blocks.{i}.attn.to_q.lora_A.weight"] = torch.zeros(1, 3072)
        tensors[f"transformer.transformer_blocks.{i}.attn.to_q.lora_B.weight"] = torch.zeros(3072, 1)
    save_file(tensors, folder / "loras" / "probe.safetensors")
    header = load_lora(folder / "loras" / "probe.safetensors", LoraName("probe")).header
    assert header.family == ModelFamily.qwen


def test_previews_work_with_a_video_vae(service: DiffusionService) -> None:
    "Image and preview match the decoded latents, the linear map has their shape, and scaling is reversible."
    vae, seen = service.factory(service.manifest("qwen")).load().vae, []
    result = service.generate(**COMMON, seed=1, height=64, on_step=lambda step: seen.append(step.latents))
    maker = PreviewMaker(vae, (64, 64))
    maker.decodes = True  # however slow this machine is
    shown = maker.image(seen[-1][0], (64, 64))
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )

    @torch.no_grad()
    def decoded(latents: torch.Tensor) -> np.ndarray:
        pixels = vae.decode((latents * deviation + mean)[:, :, None]).sample[0, :, 0].clamp(-1, 1)
        return (127.5 * (pixels + 1)).permute(1, 2, 0).numpy()

    scaled = seen[-1] / seen[-1].std().clamp(min=1)  # a preview of stronger latents is scaled down
    assert np.abs(np.asarray(shown) - decoded(scaled)).mean() < 2
    assert np.abs(np.asarray(result.image) - decoded(seen[-1])).mean() < 1
    with torch.no_grad():
        assert mapped(torch.randn(16, 8, 8), color_map(vae)).shape == (3, 8, 8)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled_latents(vae, vae_latents(vae, latents)), latents, rtol=1e-5, atol=1e-6)
