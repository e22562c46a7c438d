"""Receipts of earlier versions are read and replayed.

`receipts_v1/` contains plans of version 1, extracted from images that the code of that time made with the built-in
models (`compute_float16` comes from a dry run, because a CPU refuses it). `EQUIVALENT` has the equivalent current
requests.
"""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from diffusion_workers.cli.main import main
from diffusion_workers.models.files import ManifestError, load_manifest
from diffusion_workers.planning.plan import request_from_plan
from diffusion_workers.planning.replay import restore
from diffusion_workers.request.images import PLAN_KEY
from diffusion_workers.request.metadata import PLAN_VERSION, read_metadata, upgrade_plan
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.models import GenerationPlan

RECEIPTS = Path(__file__).parent / "receipts_v1"
DEEP_FEATURES = {"method": "deep_features", "interval": 2}
EQUIVALENT = {  # name of a receipt -> what its equivalent current request has besides `COMMON`
    "no_acceleration": {},
    "deepcache": {"step_cache": {"method": "deepcache"}},
    "deepcache_all_fields": {
        "step_cache": {"method": "deepcache", "interval": 2, "branch": 1, "start": 0.25, "end": 0.75}
    },
    "deepcache_interval_1": {"step_cache": {"method": "deepcache", "interval": 1}},
    "deepcache_control": {"step_cache": {"method": "deepcache", "interval": 2}},
    "deepcache_reuse_control": {
        "step_cache": {"method": "deepcache", "interval": 2, "reuse_control_residuals": True}
    },
    "unet_step_cache": {"step_cache": {"method": "deep_features"}},
    "unet_step_cache_control": {"step_cache": DEEP_FEATURES},
    "unet_step_cache_no_reuse": {"step_cache": DEEP_FEATURES | {"reuse_control_residuals": False}},
    "unet_step_cache_sdxl": {"model": "shapes-sdxl", "step_cache": DEEP_FEATURES | {"end": 0.5}},
    "reuse_without_cache": {},
    "first_block": {"model": "shapes-flux", "step_cache": {"method": "first_block"}},
    "first_block_threshold": {"model": "shapes-flux", "step_cache": {"method": "first_block", "threshold": 0.5}},
    "taylorseer": {"model": "shapes-flux", "step_cache": {"method": "taylorseer"}},
    "taylorseer_interval": {"model": "shapes-flux", "step_cache": {"method": "taylorseer", "interval": 2}},
    "mag": {"model": "shapes-flux", "step_cache": {"method": "mag"}},
    "mag_threshold": {"model": "shapes-flux", "step_cache": {"method": "mag", "threshold": 0.3}},
    "compute_bfloat16": {"acceleration": {"dtype": "bfloat16"}},
    "compute_float16": {
        "acceleration": {"dtype": "float16"},
        "prompt": "a red circle",
        "width": 128,
        "height": 128,
        "num_inference_steps": 25,
    },
    "vae_bf16": {"model": "shapes-sdxl", "acceleration": {"vae_dtype": "bfloat16"}},
    "vae_full": {"model": "shapes-flux"},
    "vae_tiling": {"memory": {"vae_tiling": True}, "width": 96},
    "vae_tiling_off": {"memory": {"vae_tiling": False}},
    "batch_size": {"memory": {"batch_size": 1}, "seed": 4},
    "guidance": {
        "acceleration": {"guidance_start": 0.25, "guidance_end": 0.75, "guidance_tolerance": 0.01},
        "guidance_scale": 3.0,
    },
    "not_compiled": {"acceleration": {"torch_compile": False}},
    "profile_sd15_fast": {"profile": "fast", "num_inference_steps": None},
    "profile_flux_balanced": {"model": "shapes-flux", "profile": "balanced", "num_inference_steps": None},
    "profile_flux_fast": {"model": "shapes-flux", "profile": "fast", "num_inference_steps": None},
    "everything_unet": {
        "step_cache": DEEP_FEATURES,
        "acceleration": {"dtype": "bfloat16", "vae_dtype": "bfloat16", "guidance_end": 0.5},
        "memory": {"vae_tiling": True, "batch_size": 2},
        "num_images": 2,
    },
    "everything_flux": {
        "model": "shapes-flux",
        "step_cache": {"method": "taylorseer", "interval": 3},
        "acceleration": {"dtype": "bfloat16", "vae_dtype": "bfloat16", "guidance_start": 0.1},
        "memory": {"vae_tiling": True, "batch_size": 1},
        "seed": 4,
    },
}  # fmt: skip
COMMON = {
    "model": "shapes-sd15",
    "prompt": "a red circle on a white background",
    "width": 64,
    "height": 64,
    "num_inference_steps": 6,
    "seed": 3,
}
NOT_OF_THE_REQUEST = {"denoiser_calls", "manifest_sha256", "environment", "warnings", "image_index"}


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    with DiffusionService(device="cpu") as service:
        yield service


def control_image() -> Image.Image:
    "The control image of the receipts with a ControlNet."
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), outline="white", width=2)
    return image


def control_text() -> str:
    buffer = io.BytesIO()
    control_image().save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def receipt(name: str) -> GenerationPlan:
    data = json.loads((RECEIPTS / f"{name}.json").read_text())
    assert data["plan_version"] == 1
    return GenerationPlan.model_validate(upgrade_plan(data))


def request_of_today(name: str) -> dict:
    request = {key: value for key, value in (COMMON | EQUIVALENT[name]).items() if value is not None}
    if receipt(name).controlnets:
        request["controlnets"] = [{"model": "canny", "image": control_image()}]
    return request


def test_every_receipt_has_an_equivalent_request() -> None:
    assert {path.stem for path in RECEIPTS.glob("*.json")} == set(EQUIVALENT)


@pytest.mark.parametrize("name", EQUIVALENT)
def test_old_receipts_are_read_as_current_plans(service: DiffusionService, name: str) -> None:
    planned = service.plan(request_of_today(name))
    assert planned.ok, planned.message
    read = receipt(name)
    assert read.plan_version == PLAN_VERSION
    assert read.model_dump(exclude=NOT_OF_THE_REQUEST) == planned.plan.model_dump(exclude=NOT_OF_THE_REQUEST)
    for note in read.warnings or []:
        assert not note.field.startswith(("deepcache", "acceleration.step_cache", "acceleration.reuse"))


@pytest.mark.parametrize("name", [name for name in EQUIVALENT if name != "compute_float16"])
def test_old_receipts_replay_like_equivalent_requests(service: DiffusionService, name: str) -> None:
    read = receipt(name)
    controls = {0: {"image": control_text()}} if read.controlnets else {}
    replayed = service.generate(request_from_plan(read, controls=controls))
    today = service.generate(request_of_today(name))
    assert today.ok, today.message
    assert replayed.ok, replayed.message
    assert [image.tobytes() for image in replayed.images] == [image.tobytes() for image in today.images]


def test_settings_of_receipts_affect_the_image(service: DiffusionService) -> None:
    "Replayed settings take effect: each one gives a different image."
    pixels = lambda name: service.generate(request_from_plan(receipt(name))).images[0].tobytes()
    assert pixels("no_acceleration") == pixels("deepcache_interval_1") == pixels("reuse_without_cache")
    drawn = [pixels(name) for name in ("no_acceleration", "unet_step_cache", "compute_bfloat16", "guidance")]
    drawn += [
        pixels(name) for name in ("vae_full", "first_block_threshold", "taylorseer", "taylorseer_interval", "mag")
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_requests_are_restored_from_old_images(ending: str) -> None:
    path = RECEIPTS / f"everything_unet.{ending}"
    restored = restore(path)
    assert (restored.source, restored.lost) == ("plan", None)
    assert restored.request["step_cache"] == DEEP_FEATURES | {"branch": 0, "start": 0.0, "end": 1.0}
    assert restored.request["acceleration"] == EQUIVALENT["everything_unet"]["acceleration"]
    assert restored.request["memory"] == EQUIVALENT["everything_unet"]["memory"]


def test_command_line_replays_old_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    "CPUs round bfloat16 differently, so the plan of the new image is checked, not its pixels."
    replayed = tmp_path / "again.png"
    code = main(["replay", str(RECEIPTS / "everything_unet.png"), "-o", str(replayed), "--quiet"])
    assert code in (0, 1), capsys.readouterr().err
    assert read_metadata(replayed).plan.step_cache.method == "deep_features"


def _image_of(tmp_path: Path, **fields) -> Path:
    "An image with the receipt of an earlier version."
    info = PngInfo()
    data = json.loads((RECEIPTS / "no_acceleration.json").read_text()) | {"plan_version": PLAN_VERSION} | fields
    info.add_text(PLAN_KEY, json.dumps(data))
    path = tmp_path / "before.png"
    control_image().save(path, pnginfo=info)
    return path


def _scheduler(name: str, class_name: str, **options) -> dict:
    return {"scheduler": {"name": name, "class_name": class_name, "options": options or None}}


SDXL = {"model": "shapes-sdxl", "family": "sdxl", "pipeline_class": "StableDiffusionXLPipeline"}
HEUN = _scheduler("heun", "HeunDiscreteScheduler")
MIDWAY = {"denoising_steps": 3, "strength": 0.5}
DEIS = _scheduler("deis", "DEISMultistepScheduler", use_karras_sigmas=True)
TRAILING = _scheduler("ddim", "DDIMScheduler", timestep_spacing="trailing")
LMS, PNDM = _scheduler("lms", "LMSDiscreteScheduler"), _scheduler("pndm", "PNDMScheduler")
CORRECTED = [
    (LMS | MIDWAY, "scheduler"),
    (PNDM | MIDWAY, "scheduler"),
    (SDXL | PNDM | {"refiner": {"switch_at": 0.5}}, "scheduler"),
    (LMS, None),
    (DEIS | {"num_inference_steps": 1, "denoising_steps": 1}, "use_karras_sigmas"),
    (DEIS, None),
    ({"clip_skip": 1}, "clip_skip"),
    ({"clip_skip": 1, "guidance_scale": 1.0}, None),
    (SDXL | HEUN | {"refiner": {"switch_at": 0.5}}, "scheduler"),
    (SDXL | {"refiner": {"switch_at": 0.0}}, "refiner.switch_at"),
    (SDXL | {"refiner": {"switch_at": 0.5}}, None),
    *[
        (TRAILING | {"num_inference_steps": steps, "denoising_steps": steps}, "timestep_spacing")
        for steps in (61, 103, 121, 122)
    ],
    (TRAILING | {"num_inference_steps": 60, "denoising_steps": 60}, None),
]


@pytest.mark.parametrize(("fields", "warned"), CORRECTED)
def test_receipts_affected_by_a_fix_are_restored_with_a_warning(
    service: DiffusionService, tmp_path: Path, fields: dict, warned: str | None
) -> None:
    result = service.restore(_image_of(tmp_path, **fields))
    assert result.restored.source == "plan"
    notes = result.warnings or []
    assert [note.field for note in notes] == ([] if warned is None else [warned])
    assert all("earlier version" in note.message for note in notes)
    of_today = service.restore(_image_of(tmp_path, **fields, denoiser_calls=1))
    assert not of_today.warnings


def test_command_line_notes_receipts_affected_by_a_fix(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = _image_of(tmp_path, clip_skip=1, negative_prompt="a blue square")
    replayed = tmp_path / "again.png"
    assert main(["replay", str(path), "-o", str(replayed), "--quiet"]) == 1
    assert "note: clip_skip: an earlier version, which made this image, read the negative" in capsys.readouterr().err
    assert read_metadata(replayed).plan.clip_skip == 1


def test_receipts_of_newer_versions_are_reported(tmp_path: Path) -> None:
    newer = json.loads((RECEIPTS / "deepcache.json").read_text()) | {"plan_version": PLAN_VERSION + 1}
    info = PngInfo()
    info.add_text(PLAN_KEY, json.dumps(newer))
    path = tmp_path / "newer.png"
    control_image().save(path, pnginfo=info)
    found = read_metadata(path)
    assert found.plan is None
    assert f"plan_version is {PLAN_VERSION + 1}" in found.problem
    assert "newer version of diffusion_workers" in restore(path).lost[0].reason


@pytest.mark.parametrize(
    ("old", "field", "new"),
    [
        ({"deepcache": {"cache_interval": 3}}, "deepcache", "step_cache"),
        ({"acceleration": {"step_cache": "mag"}}, "acceleration.step_cache", "step_cache.method"),
        ({"acceleration": {"compute_dtype": "bfloat16"}}, "acceleration.compute_dtype", "acceleration.dtype"),
        ({"acceleration": {"vae_precision": "bf16"}}, "acceleration.vae_precision", "acceleration.vae_dtype"),
        ({"acceleration": {"batch_size": 1}}, "acceleration.batch_size", "memory.batch_size"),
        ({"acceleration": {"vae_tiling": True}}, "acceleration.vae_tiling", "memory.vae_tiling"),
    ],
)
def test_renamed_fields_are_refused_with_their_new_name(
    service: DiffusionService, tmp_path: Path, old: dict, field: str, new: str
) -> None:
    (error,) = service.plan(COMMON | old).errors
    assert (error.code, error.field) == ("unknown_field", field)
    assert error.hint == f"it was renamed: use {new}"
    manifest = {"family": "sd15", "source": {"builtin": "shapes-sd15"}, "profiles": {"fast": old}}
    path = tmp_path / "model.yaml"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=f"profiles.fast.{field}.*use {new}$"):
        load_manifest(path)
