"""Variation seeds, seamless images and guiders: pixels, metadata and restoring of requests."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_workers.cli.main import main
from diffusion_workers.request.metadata import parameters_line
from diffusion_workers.service.render import largest_difference
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.shapes.scenes import Scene, ShapeObject, matches, read_scene
from ez_diffusion_client.models import OpResult

SCENE = Scene((ShapeObject("red", "circle"),), "white", place="center", size="large")
PROMPT = "a large red circle in the center on a white background"
QUICK = {"scheduler": "euler", "num_inference_steps": 4, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def service():
    with DiffusionService(device="cpu") as service:
        yield service


@pytest.fixture(scope="module")
def start(service: DiffusionService) -> Image.Image:
    return service.generate("a blue square on a white background", seed=5, **QUICK).image


def made(service: DiffusionService, **fields) -> OpResult:
    result = service.generate(PROMPT, **(QUICK | fields))
    result.raise_for_status()
    return result


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


def mask() -> Image.Image:
    image = Image.new("L", (64, 64))
    image.paste(255, (16, 16, 48, 48))
    return image


TASKS = {"text": {}, "image": {"strength": 0.75}, "inpainting": {"strength": 0.75}}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "model, scheduler",
    [
        ("shapes-sd15", "euler"),
        ("shapes-sd15", "euler_ancestral"),
        pytest.param("shapes-sdxl", "dpmpp_2m_sde", marks=pytest.mark.slow),
        ("shapes-flux", "flow_match_euler"),
    ],
)
def test_variation_strength_interpolates_between_two_seeds(
    service: DiffusionService, start: Image.Image, task: str, model: str, scheduler: str
) -> None:
    fields = {"model": model, "scheduler": scheduler} | TASKS[task]
    fields |= {"image": start} if task != "text" else {}
    fields |= {"mask_image": mask()} if task == "inpainting" else {}
    images = {share: made(service, seed=3, subseed=8, subseed_strength=share, **fields).image for share in (0, 0.1, 1)}
    assert images[0].tobytes() == made(service, seed=3, **fields).image.tobytes()
    assert images[1].tobytes() == made(service, seed=8, **fields).image.tobytes()
    near, far = (mean_difference(images[0], images[share]) for share in (0.1, 1))
    assert 0 < near < far


def test_distance_grows_with_variation_strength(service: DiffusionService) -> None:
    fields = {"seed": 3, "output_type": "latent"}
    plain, shares = made(service, **fields).latents, (0.05, 0.1, 0.2, 0.4, 0.7, 1)
    found = [
        float((made(service, **fields, subseed=8, subseed_strength=share).latents - plain).square().mean())
        for share in shares
    ]
    assert found == sorted(found)


def test_variation_batch_increments_only_the_variation_seed(service: DiffusionService) -> None:
    result = made(service, seed=3, subseed=8, subseed_strength=0.2, num_images=3)
    plan = result.generation.plan
    assert (plan.seeds, plan.subseeds) == ([3, 3, 3], [8, 9, 10])
    alone = made(service, seed=3, subseed=10, subseed_strength=0.2)
    assert largest_difference(result.images[2], alone.image) <= 2
    restored = service.restore(result.images[2]).restored.request
    assert (restored["seed"], restored["subseed"], restored["subseed_strength"]) == (3, 10, 0.2)
    line = service.restore(parameters=parameters_line(plan, 2)).restored
    assert (line.request["subseed"], line.request["subseed_strength"], line.lost) == (10, 0.2, None)
    several = made(service, seeds=[3, 4], subseed=8, subseed_strength=0.2)
    assert (several.generation.plan.seeds, several.generation.plan.subseeds) == ([3, 4], [8, 9])


def test_variation_toward_the_same_seed_changes_nothing(service: DiffusionService) -> None:
    images = made(service, seed=8, subseed=7, subseed_strength=0.3, num_images=2).images
    assert largest_difference(images[1], made(service, seed=8).image) <= 2
    assert images[0].tobytes() != images[1].tobytes()


def test_automatic1111_variation_seeds_are_restored(service: DiffusionService) -> None:
    settings = "Steps: 4, Sampler: Euler, CFG scale: 2, Seed: 3, Size: 64x64, Model: shapes-sd15, "
    settings += "Variation seed: 8, Variation seed strength: 0.2, Tiling: True"
    restored = service.restore(parameters=f"{PROMPT}\n{settings}").restored
    assert (restored.request["subseed"], restored.request["subseed_strength"]) == (8, 0.2)
    assert restored.request["seamless"] == "both" and restored.lost is None


def test_variation_seed_planning_and_validation(service: DiffusionService) -> None:
    plan = service.plan(prompt=PROMPT, subseed_strength=0.5).plan
    assert plan.subseeds != plan.seeds
    unused = service.plan(prompt=PROMPT, subseed=4)
    assert unused.plan.subseeds is None and [note.field for note in unused.warnings] == ["subseed"]
    refused = service.generate(PROMPT, **QUICK, latents=torch.zeros(1, 4, 8, 8), seed=3, subseed_strength=0.5)
    assert [error.field for error in refused.errors] == ["subseed_strength"]


# --- seamless ---


@pytest.mark.parametrize("model", ["shapes-sd15", pytest.param("shapes-sdxl", marks=pytest.mark.slow)])
def test_seamless_generation_is_shift_equivariant(service: DiffusionService, model: str) -> None:
    size = {"width": 128, "height": 128, "model": model}
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    plain = made(service, **size, latents=noise).image

    def rolled(axes: str | None, axis: int) -> int:
        images = [
            made(service, **size, latents=latents, seamless=axes).image for latents in (noise, noise.roll(8, axis))
        ]
        return largest_difference(Image.fromarray(np.roll(np.asarray(images[0]), 64, axis - 2)), images[1])

    assert rolled("both", 3) <= 1 and rolled("x", 3) <= 1 and rolled("y", 2) <= 1
    assert rolled(None, 3) > 20 and rolled("y", 3) > 20
    assert made(service, **size, latents=noise).image.tobytes() == plain.tobytes()


def test_seamless_images_tile_and_are_restored(service: DiffusionService) -> None:
    def seam(image: Image.Image) -> float:
        pixels = np.asarray(image, dtype=float)
        return float(np.abs(pixels[:, 0] - pixels[:, -1]).mean())

    def inner(image: Image.Image) -> float:
        pixels = np.asarray(image, dtype=float)
        return float(np.abs(np.diff(pixels, axis=1)).mean(axis=(0, 2)).max())

    image = made(service, seed=3, seamless="x", width=128, height=128).image
    assert seam(image) <= inner(image)
    restored = service.restore(image).restored.request
    assert made(service, **{k: v for k, v in restored.items() if k != "prompt"}).image.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"model": "shapes-flux", "seamless": "x"}, "seamless", "has no use for seamless"),
        ({"seamless": "x", "memory": {"vae_tiling": True}}, "seamless", "each of its tiles"),
        ({"seamless": "x", "acceleration": {"torch_compile": True}}, "seamless", "compiled"),
        ({"seamless": "z"}, "seamless", "not one of the known values"),
        ({"subseed": 2**53 - 1, "subseed_strength": 0.1, "num_images": 2}, "subseed", "too large"),
        ({"subseed_strength": 1.5}, "subseed_strength", "less than or equal to 1"),
        ({"guider": {"method": "apg"}, "guidance_scale": 1}, "guider", "no guidance to refine"),
        ({"guider": {"method": "cfg_zero_star"}, "guidance_scale": 1}, "guider", "no guidance to refine"),
        ({"guider": {"method": "apg"}, "guidance_rescale": 0.5}, "guider", "guidance_rescale"),
        ({"guider": {"method": "apg", "scale": 2}}, "guider.scale", "does not use scale"),
        (
            {"guider": {"method": "freeu"}, "step_cache": {"method": "deep_features"}},
            "guider",
            "FreeU would have no effect",
        ),
        ({"guider": {"method": "pag"}, "step_cache": {"method": "deepcache"}}, "guider", "perturbed"),
        ({"guider": {"method": "pag"}, "acceleration": {"torch_compile": True}}, "guider", "compiled"),
        ({"model": "shapes-flux", "guider": {"method": "pag"}}, "guider", "has no pag"),
        ({"model": "shapes-flux", "guider": {"method": "freeu"}}, "guider", "has no freeu"),
        ({"model": "shapes-flux", "guider": {"method": "apg"}, "true_cfg_scale": 3}, "guider", "negative prompt"),
    ],
)
def test_conflicting_or_unsupported_options_are_rejected(
    service: DiffusionService, fields: dict, field: str, said: str
) -> None:
    refused = service.plan(prompt=PROMPT, **fields)
    assert refused.errors and refused.errors[0].field == field and said in refused.errors[0].message, refused.errors


# --- guiders ---

NEUTRAL = {
    "apg": {"eta": 1},
    "pag": {"scale": 0},
    "freeu": {"backbone_1": 1, "backbone_2": 1, "skip_1": 1, "skip_2": 1},
}


@pytest.mark.parametrize("model", ["shapes-sd15", pytest.param("shapes-sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["apg", "cfg_zero_star", "pag", "freeu"])
def test_guiders_match_the_prompt_and_are_restored(service: DiffusionService, model: str, method: str) -> None:
    usual = {"model": model, "seed": 3, "width": 128, "height": 128, "num_inference_steps": 12}
    plain = made(service, **usual).image
    if method in NEUTRAL:
        neutral = made(service, **usual, guider={"method": method} | NEUTRAL[method]).image
        assert largest_difference(neutral, plain) <= 1
    result = made(service, **usual, guider={"method": method})
    assert matches(read_scene(result.image), SCENE)
    assert mean_difference(result.image, plain) > 0.02
    again = service.generate(service.restore(result.image).restored.request)
    assert again.generation.plan == result.generation.plan and again.image.tobytes() == result.image.tobytes()
    assert made(service, **usual).image.tobytes() == plain.tobytes()


@pytest.mark.parametrize("method", ["apg", "cfg_zero_star"])
def test_guiders_work_with_true_cfg_of_flux(service: DiffusionService, method: str) -> None:
    usual = {"model": "shapes-flux", "seed": 3, "scheduler": None, "negative_prompt": "blue", "true_cfg_scale": 2.5}
    plain = made(service, **usual).image
    neutral = {"eta": 1} if method == "apg" else {"zero_init_steps": 0}
    same = made(service, **usual, guider={"method": method} | neutral).image
    assert (largest_difference(same, plain) <= 1) == (method == "apg")


def test_perturbed_attention_works_without_guidance(service: DiffusionService) -> None:
    plain = made(service, seed=3, guidance_scale=1).image
    moved = made(service, seed=3, guidance_scale=1, guider={"method": "pag", "scale": 2}).image
    assert plain.tobytes() != moved.tobytes()


def test_guiders_give_the_same_images_in_a_batch(service: DiffusionService) -> None:
    for method in ("apg", "cfg_zero_star", "pag", "freeu"):
        both = made(service, seed=3, num_images=2, guider={"method": method}).images
        alone = made(service, seed=4, guider={"method": method}).image
        assert largest_difference(both[1], alone) <= 2, method


def test_command_line_file_names_include_the_variation_seed(tmp_path: Path) -> None:
    command = ["generate", "a red circle", "--model", "shapes-sd15", "--steps", "1", "--seed", "3", "--num-images", "2"]
    command += ["--subseed", "8", "--subseed-strength", "0.2", "-o", str(tmp_path)]
    assert main(command) == 0
    assert sorted(path.stem[-2:] for path in tmp_path.glob("*.png")) == ["-8", "-9"]


def test_variations_work_with_a_vae_encoded_control_map(service: DiffusionService, start: Image.Image) -> None:
    control = {"model": "canny", "image": start, "preprocessing": {"name": "canny"}}
    fields = {"model": "shapes-flux", "scheduler": None, "controlnets": [control], "image": start, "strength": 0.8}
    shares = (0, 0.1, 1)
    images = [made(service, seed=3, subseed=8, subseed_strength=share, **fields).image for share in shares]
    assert images[0].tobytes() == made(service, seed=3, **fields).image.tobytes()
    assert images[2].tobytes() == made(service, seed=8, **fields).image.tobytes()
    assert images[0].tobytes() != images[1].tobytes() != images[2].tobytes()
