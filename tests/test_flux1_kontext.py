"""FLUX.1 Kontext through the service: sizes of references and results, and its relation to FLUX.1."""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import family_checks
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from family_checks import MASKED, ONE, ROUNDING, SMALL, difference, photo, quiet_pipeline, serving

from diffusion_workers.families.flux import KONTEXT_SIZES
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import ModelFamily, ModelKind

COMMON = SMALL | {"model": "flux-edit"}


def pixels(service: DiffusionService, **fields) -> np.ndarray:
    "The first image of a request."
    return family_checks.pixels(service, **COMMON | fields)[0]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionService]:
    folder: Path = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.flux, "flux-edit", ModelKind.edit)
    write_tiny_model(folder, ModelFamily.flux)
    with serving(folder) as service:
        yield service


def test_reference_sizes_match_diffusers() -> None:
    assert list(KONTEXT_SIZES) == pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS


def test_references_are_scaled_as_in_diffusers(service: DiffusionService, monkeypatch: pytest.MonkeyPatch) -> None:
    "To the size with the nearest aspect ratio; the plan and a warning say so; the result keeps the requested size."
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", list(family_checks.SMALL_SIZES))
    wide = photo(130, 70)
    with family_checks.small_references():
        result = service.generate(**COMMON, height=64, seed=1, reference_images=[wide])
    planned = result.generation.plan.reference_images[0]
    assert (planned.used_width, planned.used_height) == (96, 64) and result.image.size == (64, 64)
    assert [(note.field, note.used) for note in result.warnings] == [("reference_images[0]", "'96 x 64'")]
    pipe = quiet_pipeline(ModelFamily.flux, ModelKind.edit)
    arguments = {"prompt": COMMON["prompt"], "num_inference_steps": 3, "guidance_scale": 2.0, "max_area": 64 * 64}
    arguments |= {"image": wide, "width": 64, "height": 64, "generator": torch.Generator().manual_seed(1)}
    assert difference(np.asarray(pipe(**arguments).images[0]), np.asarray(result.image)) <= ROUNDING


def test_the_default_size_is_that_of_the_scaled_reference() -> None:
    with DiffusionService(device="cpu") as service:
        plan = service.plan("a", model="flux1-kontext-dev", reference_images=[photo(130, 70)]).plan
    assert (plan.width, plan.height) == (1392, 752)


def test_an_inpainted_image_keeps_its_size(service: DiffusionService) -> None:
    fields = {"model": "flux-edit", "prompt": "a", "num_inference_steps": 1, "image": photo(96, 80)}
    with family_checks.small_references():
        for more in ({}, ONE):
            result = service.generate(**fields | more, mask_image=MASKED["mask_image"])
            assert result.image.size == (96, 80)


def test_kontext_without_references_matches_flux1(service: DiffusionService) -> None:
    "Same components, same pixels; a reference changes them, and leaves no state."
    plain = pixels(service, seed=3, height=64)
    assert difference(pixels(service, model="flux", seed=3, height=64), plain) == 0
    with family_checks.small_references():
        edited = pixels(service, seed=3, height=64, **ONE)
        assert difference(edited, plain) > 0
        assert difference(pixels(service, seed=3, height=64, reference_images=[photo()]), edited) > 0
    assert difference(pixels(service, seed=3, height=64), plain) == 0


def test_plain_flux1_refuses_references(service: DiffusionService) -> None:
    result = service.generate(**COMMON | {"model": "flux"}, **ONE)
    assert "flux has no use for reference_images" in result.message and "flux (kind edit)" in result.message


def test_from_pipeline_recognizes_kontext() -> None:
    pipe = quiet_pipeline(ModelFamily.flux, ModelKind.edit)
    assert isinstance(pipe, diffusers.FluxKontextPipeline)
    sizes = {"defaults": {"width": 64, "height": 64, "num_inference_steps": 1}}
    with family_checks.small_references(), DiffusionService.from_pipeline(pipe, "mine", manifest=sizes) as service:
        assert service.generate("a", seed=1, **ONE).generation.plan.pipeline_class == "FluxKontextPipeline"
