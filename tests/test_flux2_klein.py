"""FLUX.2 Klein through the service: references, distilled models, TaylorSeer, sizes, latents, LoRAs, the CLI, jobs."""

import json
from collections.abc import Iterator
from pathlib import Path

import diffusers
import family_checks
import numpy as np
import pytest
import torch
import yaml
from family_checks import MASKED, ROUNDING, SMALL, TWO, difference, half, photo, quiet_pipeline, serving
from PIL import Image
from safetensors.torch import save_file

from diffusion_workers.cli.main import main
from diffusion_workers.lora.files import LoraName
from diffusion_workers.lora.layers import load_lora
from diffusion_workers.models.manifest import ModelManifest
from diffusion_workers.pipeline.loading import quiet_libraries
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.planning.plan import request_from_plan
from diffusion_workers.request.errors import RequestError
from diffusion_workers.request.images import to_image_string
from diffusion_workers.server.jobs import Job, request_bytes, request_images
from diffusion_workers.service.previews import scaled_latents, vae_latents
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import GenerationRequest, ModelFamily, OpStatus

COMMON = SMALL | {"model": "flux2"}


def pixels(service: DiffusionService, **fields) -> list[np.ndarray]:
    "The images of a request."
    return family_checks.pixels(service, **COMMON | fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A tiny base model and its distilled twin."
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, ModelFamily.flux2, changes={"lora_folders": [{"folder": "loras"}]})
    with quiet_libraries():
        pipe = diffusers.Flux2KleinPipeline.from_pretrained(folder / "flux2")
        diffusers.Flux2KleinPipeline(**pipe.components, is_distilled=True).save_pretrained(folder / "distilled")
    defaults = "{width: 64, height: 64, guidance_scale: 1.0}"
    (folder / "distilled.yaml").write_text(f"family: flux2\nsource: {{folder: distilled}}\ndefaults: {defaults}\n")
    (folder / "loras").mkdir()
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[DiffusionService]:
    with serving(folder) as service:
        yield service


def their_pixels(seed: int, distilled: bool = False, **fields) -> np.ndarray:
    "The image that diffusers generates."
    pipe = quiet_pipeline(ModelFamily.flux2)
    pipe.register_to_config(is_distilled=distilled)
    common = {"prompt": COMMON["prompt"], "num_inference_steps": 3, "guidance_scale": 2.0, "width": 64, "height": 64}
    image = pipe(**common | fields, generator=torch.Generator().manual_seed(seed)).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("references", [[photo()], TWO["reference_images"], [photo(130, 70)]])
def test_edits_match_diffusers(service: DiffusionService, references: list) -> None:
    "The sides of references are cropped to multiples of 16 in the same way."
    ours = pixels(service, seed=6, height=64, reference_images=references)[0]
    assert difference(ours, their_pixels(6, image=references)) <= ROUNDING


def test_large_references_are_scaled_as_in_diffusers(service: DiffusionService) -> None:
    "References above a million pixels; the plan and a warning give the scaled size."
    large = photo(1400, 1100)
    result = service.generate(**COMMON, height=64, seed=1, num_images=1, reference_images=[large])
    planned = result.generation.plan.reference_images[0]
    assert (planned.width, planned.height, planned.used_width, planned.used_height) == (1400, 1100, 1152, 896)
    assert [(note.field, note.used) for note in result.warnings] == [("reference_images[0]", "'1152 x 896'")]
    assert difference(np.asarray(result.image).astype(int), their_pixels(1, image=[large])) <= ROUNDING


def test_manifests_can_set_reference_size_and_count(folder: Path) -> None:
    "Each reference is center-cropped and scaled to the size, in the plan, a warning and the pixels."
    manifest = (
        "family: flux2\nsource: {folder: flux2}\ndefaults: {guidance_scale: 2.0}\n"
        "limits: {reference_size: [80, 64], max_reference_images: 2}\n"
    )
    (folder / "sized.yaml").write_text(manifest)
    wide, large = photo(200, 80), photo(200, 160)
    with serving(folder) as service:
        result = service.generate(
            **COMMON | {"model": "sized"}, height=64, seed=5, reference_images=[large, photo(80, 64)]
        )
        assert [(note.field, note.used) for note in result.warnings] == [("reference_images[0]", "'80 x 64'")]
        used = [(each.used_width, each.used_height) for each in result.generation.plan.reference_images]
        assert used == [(80, 64)] * 2
        plain = service.plan("a", model="sized", reference_images=[wide]).plan
        assert (plain.width, plain.height) == (80, 64)
        [error] = service.plan("a", model="sized", reference_images=[wide] * 3).errors
        assert (error.field, error.allowed) == ("reference_images", "at most 2")
        assert error.message.startswith("sized takes fewer")
        [info] = [model for model in service.list_models().models if model.name == "sized"]
        assert info.max_reference_images == 2
        middle = wide.crop((50, 0, 150, 80))
        fields = COMMON | {"model": "sized", "height": 64, "seed": 5}
        cut, given = (service.generate(fields, reference_images=[each]).image for each in (wide, middle))
        assert cut.tobytes() == given.tobytes()
    scaled = large.resize((80, 64), Image.Resampling.LANCZOS)
    ours = np.asarray(result.image).astype(int)
    assert difference(ours, their_pixels(5, image=[scaled, photo(80, 64)])) <= ROUNDING


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("family: flux2\nlimits: {max_reference_images: 5}", "given 5; FLUX.2 Klein takes at most 4"),
        ("family: flux2\nlimits: {reference_size: [72, 64]}", "given 72 x 64; allowed: multiples of 16, at least 64"),
        ("family: sd15\nlimits: {reference_size: [64, 64]}", "this model takes no reference images; leave it out"),
        ("family: qwen\nkind: edit\nlimits: {reference_size: [64, 64]}", "scale reference images themselves"),
    ],
)
def test_invalid_reference_limits_are_refused(section: str, told: str) -> None:
    content = yaml.safe_load(section) | {"name": "odd", "source": {"folder": "odd"}}
    with pytest.raises(ValueError, match=r"limits\.(max_)?reference_") as caught:
        ModelManifest(**content)
    assert told in str(caught.value)


def test_a_default_size_unlike_the_reference_gets_a_warning(service: DiffusionService) -> None:
    small = {"model": "flux2-klein-4b", "reference_images": [photo(128, 96)]}
    planned = service.plan("a", **small)
    assert (planned.plan.width, planned.plan.height) != (128, 96)
    used = f"'{planned.plan.width} x {planned.plan.height}'"
    assert [(note.field, note.used) for note in planned.warnings] == [("reference_images[0]", used)]
    assert not service.plan("a", **small, width=256, height=256).warnings
    assert not service.plan(**COMMON, height=64, reference_images=[photo(96, 80)]).warnings


def test_each_reference_and_their_order_matter(service: DiffusionService) -> None:
    one, two = TWO["reference_images"]
    draw = lambda *images: pixels(service, seed=2, height=64, reference_images=list(images))[0]
    made = [draw(one), draw(two), draw(one, two), draw(two, one)]
    for index, image in enumerate(made):
        assert all(difference(image, other) > 0 for other in made[:index])
    assert difference(draw(one, two), made[2]) == 0
    plain = pixels(service, seed=2, height=64)[0]
    assert difference(plain, made[0]) > 0 and difference(pixels(service, seed=2, height=64)[0], plain) == 0


def test_image_sizes(service: DiffusionService) -> None:
    "The requested size, by default that of the first reference; an inpainted image keeps its size."
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
        ({"model": "distilled", "guidance_scale": 4.0}, "distilled, and ignores guidance"),
        ({"model": "shapes-sd15", "reference_images": [photo()]}, "sd15 has no use for reference_images"),
        (
            {"model": "shapes-sd15", "reference_images": [photo()]},
            "image and strength, or take a model of the families",
        ),
    ],
)
def test_unsupported_fields_are_refused(service: DiffusionService, fields: dict, message: str) -> None:
    result = service.generate(**COMMON | fields)
    assert result.status != OpStatus.success and message in result.message + str(result.errors)


def test_an_invalid_reference_image_is_named(service: DiffusionService) -> None:
    result = service.generate(**COMMON, reference_images=[to_image_string(photo()), "aGVsbG8="])
    assert [error.field for error in result.errors] == ["reference_images[1]"]


def test_too_large_inpainting_images_are_refused() -> None:
    "Diffusers would shrink it."
    with DiffusionService(device="cpu") as service:
        result = service.plan("a", model="flux2-klein-4b", image=photo(1200, 1200), mask_image=half())
    assert "at most 1048576 pixels" in result.message


def test_the_distilled_model_stays_distilled(service: DiffusionService) -> None:
    "In every pipeline made of its components; the base model uses guidance with an empty negative prompt."
    draw = lambda model, **fields: pixels(service, model=model, seed=3, height=64, **fields)[0]
    assert difference(draw("distilled"), their_pixels(3, distilled=True)) <= ROUNDING
    assert difference(draw("flux2"), draw("distilled")) > ROUNDING
    for fields in (TWO, MASKED):
        assert difference(draw("distilled", **fields), draw("flux2", guidance_scale=1.0, **fields)) == 0


def test_taylorseer_is_deterministic_and_leaves_no_state(service: DiffusionService) -> None:
    for fields in ({}, TWO):
        request = {"seed": 5, "num_inference_steps": 8, "height": 64} | fields
        plain = pixels(service, **request)[0]
        first, second = (
            pixels(service, step_cache={"method": "taylorseer", "interval": 3}, **request)[0] for _ in range(2)
        )
        assert difference(first, second) == 0
        assert difference(pixels(service, **request)[0], plain) == 0


def test_max_sequence_length_is_planned_and_changes_the_image(service: DiffusionService) -> None:
    assert service.plan(**COMMON).plan.max_sequence_length == 512
    short, usual = (pixels(service, seed=1, **fields)[0] for fields in ({"max_sequence_length": 64}, {}))
    assert difference(short, usual) > 0
    result = service.generate(**COMMON | {"prompt": "a" * 100}, seed=1, max_sequence_length=64)
    assert [note.field for note in result.warnings] == ["prompt"]


def test_step_latents_are_in_the_latent_space_of_the_vae(service: DiffusionService) -> None:
    "Step latents decode to the image, and scaling them to the VAE and back gives the same latents."
    seen = []
    result = service.generate(**COMMON, seed=1, on_step=seen.append)
    assert seen[-1].latents.shape == (1, 32, 8, 8)
    assert difference(np.asarray(seen[-1].decode()[0]).astype(int), np.asarray(result.image).astype(int)) <= ROUNDING
    vae = service.factory(service.manifest("flux2")).load().vae
    latents = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled_latents(vae, vae_latents(vae, latents)), latents, rtol=1e-5, atol=1e-6)


def test_edits_are_reproduced_from_their_receipt(service: DiffusionService) -> None:
    "The receipt holds image hashes; with the same images it gives the same pixels."
    result = service.generate(**COMMON, seed=4, **TWO)
    plan = result.generation.plan
    with pytest.raises(RequestError, match="2 reference images"):
        request_from_plan(plan)
    again = request_from_plan(plan, reference_images=[to_image_string(image) for image in TWO["reference_images"]])
    assert difference(np.asarray(service.generate(again).image), np.asarray(result.image)) == 0
    restored = service.restore(result.image).restored
    assert restored.missing_images == ["reference_images[0]", "reference_images[1]"]
    assert restored.request["prompt"] == COMMON["prompt"] and "reference_images" not in restored.request


def test_a_restored_edit_is_refused_without_its_references(service: DiffusionService) -> None:
    "The error names the missing ones and the remedy; other references give a warning, and none run on request."
    made = service.generate(**COMMON, seed=4, **TWO)
    restored = service.restore(made.image).restored.request
    service.log_failures = False
    first, second = TWO["reference_images"]
    shas = [image.sha256[:12] for image in made.generation.plan.reference_images]
    for given, missing in (([], [0, 1]), ([first], [1]), ([second], [0])):
        [error] = service.generate(restored, reference_images=given or None).errors
        assert (error.code, error.field, error.given) == (
            "missing_field",
            "reference_images",
            repr(f"{len(given)} of 2 images"),
        )
        named = [(f"image {at + 1} (" in error.message, sha in error.message) for at, sha in enumerate(shas)]
        assert named == [(at in missing, at in missing) for at in (0, 1)]
        assert "give them again in this order, or leave expected_references out" in error.hint
    assert "image 2 (96 x 80, sha256" in service.generate(restored).message
    again = service.generate(restored, reference_images=[first, second])
    assert difference(np.asarray(again.image), np.asarray(made.image)) == 0
    assert not any("another one" in note.message for note in again.warnings or [])
    swapped = service.generate(restored, reference_images=[second, first])
    assert sum("made with another one" in note.message for note in swapped.warnings) == 2
    without = service.generate(restored, expected_references=None)
    assert without.generation.plan.task.value == "text_to_image"


def test_the_cli_takes_references_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_server_jobs_count_and_release_reference_images() -> None:
    "They count toward the size of a request, may be URLs, and are released when a job has ended."
    texts = [to_image_string(image) for image in TWO["reference_images"]]
    request = GenerationRequest(prompt="a", reference_images=[*texts, "https://example.org/a.png"])
    assert request_images(request)[2:] == [*texts, "https://example.org/a.png"]
    assert request_bytes(request) > sum(map(len, texts))
    job = Job(request)
    job.release()
    assert job.request.reference_images is None and job.request.prompt == "a"


def test_klein_loras_are_recognized_at_their_real_width(folder: Path) -> None:
    "From the width of a single block, from the attention width of the 9B model, and from the number of blocks."
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


def test_a_kv_model_does_not_change_its_plain_twin(tmp_path: Path) -> None:
    "The KV pipeline replaces attention processors for good; a plain model from the same folder has its own."
    write_tiny_model(tmp_path, ModelFamily.flux2)
    text = (tmp_path / "flux2.yaml").read_text()
    (tmp_path / "kv.yaml").write_text(text + "kind: kv\n")
    with serving(tmp_path) as service:
        before = pixels(service, seed=3, height=64, **TWO)[0]
        kept = pixels(service, model="kv", seed=3, height=64, **TWO)[0]
        assert difference(kept, before) > 0 and difference(pixels(service, seed=3, height=64, **TWO)[0], before) == 0
        processors = lambda name: {
            type(part).__name__
            for part in service.factory(service.manifest(name)).load().transformer.attn_processors.values()
        }
        assert not processors("flux2") & processors("kv")
