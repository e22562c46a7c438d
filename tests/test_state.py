"""No state leaks: a fixed request gives the same pixels whatever ran, failed, was cancelled or unloaded before.

Random sequences of requests run in one service whose memory budget cannot hold all models: all families, every task
and kind of control, LoRAs, schedulers, step caches, guidance windows, dtypes, memory settings, errors, cancellations.
After each sequence a fixed request of a random family, with or without acceleration, is compared with the output of a
fresh service. The models are tiny and untrained, but use the real classes.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusion_workers.families.record import CLIP_SIZES, Family
from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.pipeline.loading import load_pipeline, pick_device, quiet_libraries
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import Task

SEQUENCES, MANY_SEQUENCES = 20, 2000  # for each seed
FAMILY_NAMES = tuple(name.value for name in FAMILIES)


def write_lora(path: Path, pipe, denoiser: str, seed: int) -> None:
    "Save a LoRA of rank 2 for the query and value projections of the denoiser, in the PEFT layout."
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in getattr(pipe, denoiser).named_modules():
        if name.endswith((".to_q", ".to_v")):
            tensors[f"{denoiser}.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            tensors[f"{denoiser}.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a tiny model of each family, two LoRAs for each, and two textual inversion embeddings."
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILY_NAMES:
        loras = {name: {"source": {"file": f"{family}-{name}.safetensors"}} for name in ("one", "two")}
        wrong = {"wrong": {"source": {"file": f"{'sdxl' if family == 'flux' else 'flux'}-one.safetensors"}}}
        manifest = write_tiny_model(folder, family, changes={"loras": loras | wrong})
        with quiet_libraries():
            pipe = load_pipeline(manifest, pick_device("cpu"), torch.float32)
        for seed, name in enumerate(loras):
            write_lora(folder / f"{family}-{name}.safetensors", pipe, FAMILIES[manifest.family].denoiser, seed)
    (folder / "words").mkdir()
    vectors = torch.randn(2, CLIP_SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vectors}, folder / "words" / "toy.safetensors")
    save_file({"clip_l": vectors, "clip_g": vectors.clone()}, folder / "words" / "toy-two.safetensors")
    return folder


def random_image(seed: int) -> Image.Image:
    "An image of 4 x 4 colored squares."
    rng = random.Random(seed)
    small = Image.new("RGB", (4, 4))
    small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(16)])
    return small.resize((64, 64), Image.Resampling.NEAREST)


def random_request(rng: random.Random, family: str) -> dict:
    "A random request that the family supports."
    record = FAMILIES[family]
    task = rng.choice(record.tasks)
    kind = rng.choice([kind for kind in ("none", "none", "single", "multiple", "union") if record.call(task, kind)])
    window = lambda: {
        "conditioning_scale": rng.choice([0.0, 0.5, 1.0, 2.0]),
        "guidance_start": rng.choice([0.0, 0.3]),
        "guidance_end": rng.choice([0.6, 1.0]),
    }
    if kind == "union" and record.call(task, kind).controlnet_config:  # the tiny union ControlNet differs
        kind = "single"
    controlnets = {
        "none": [],
        "single": ["canny"],
        "multiple": ["canny", "tile"],
        "union": ["all"] * rng.choice([1, 2]),
    }[kind]
    controlnets = controlnets[: record.controls.max_units]
    mode = rng.choice(record.controls.modes).value
    units = [
        {
            "model": name,
            "image": random_image(i),
            "control_mode": mode,
            **window(),
            **({"union_mode": "canny" if i else "depth"} if name == "all" else {}),
        }
        for i, name in enumerate(controlnets)
    ]
    names = [name.value for name in record.schedulers if name.value != "lcm"]
    request = {
        "model": family,
        "prompt": rng.choice(["a cat", "a dog, in the rain"]),
        "num_inference_steps": 2,
        "seed": rng.randrange(99),
        "num_images": rng.choice([1, 1, 2]),
        "scheduler": rng.choice([None, *names]),
        **({"controlnets": units} if units else {}),
        "width": rng.choice([64, 96]),
    }
    if task in (Task.image_to_image, Task.inpainting):
        request["image"] = random_image(7)
    if record.max_references() and (task == Task.edit or rng.random() < 0.5):
        request["reference_images"] = [random_image(9)] * (2 if task == Task.edit else 1)
    if task == Task.inpainting:
        request["mask_image"] = random_image(8).convert("L")
    request["loras"] = [
        {"name": rng.choice(["one", "two"]), "scale": rng.choice([-1.0, 0.0, 0.5, 1.0])}
        for _ in range(rng.choice([0, 0, 1, 3]))
    ]
    if record.applies("clip_skip"):
        request |= {"guidance_scale": rng.choice([1.0, 3.0]), "clip_skip": rng.choice([0, 1])}
    faster = random_acceleration(rng, record, bool(units)) if rng.random() < 0.5 else {}
    if rng.random() < 0.5:
        request |= random_refinement(rng, record, bool(faster))
    return request | faster


def random_refinement(rng: random.Random, record: Family, faster: bool) -> dict:
    "Random prompt syntax, embeddings, variation seeds, seamless axes and guiders that the family supports."
    refined: dict = rng.choice([{}, {"subseed": 7, "subseed_strength": rng.choice([0.3, 1.0])}])
    if record.text_layout is not None:
        toy = "toy-two" if record.text_layout in ("clip_clip", "clip_clip_t5") else "toy"
        texts = ["a [cat:dog:0.5] in the (rain:1.3) BREAK night", "a [cat|dog]", f"a {toy} cat", f"a [{toy}:dog:1]"]
        refined = refined | {"prompt_syntax": "a1111", "prompt": rng.choice(texts)}
    if record.applies("seamless") and not faster:
        refined["seamless"] = rng.choice([None, None, "x", "both"])
    guiders = [None, *({"method": method} for method in record.guiders if not faster or method == "apg")]
    guider = rng.choice(guiders if record.guidance.embedded_field is None else [None])
    return refined | ({"guider": guider, "guidance_scale": 3.0} if guider else {})


def random_acceleration(rng: random.Random, record: Family, controlled: bool) -> dict:
    "Random acceleration, memory and step-cache options that the family supports."
    start, end = sorted(rng.choice([(0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0)]))
    options = {"guidance_start": start, "guidance_end": end} | rng.choice(
        [
            {},
            {"dtype": "bfloat16"},
            {"vae_dtype": "bfloat16"},
            {"guidance_tolerance": 0.5},
        ]
    )
    memory = rng.choice([None, None, {"vae_tiling": True}, {"batch_size": 1}])
    common = {"acceleration": options, "memory": memory}
    if not record.step_caches:
        return common | {"num_inference_steps": 4}
    if "first_block" in record.step_caches:
        caches = [None, {"method": "first_block", "threshold": 0.5}, {"method": "taylorseer", "interval": 2}]
        return common | {"num_inference_steps": 5, "step_cache": None if controlled else rng.choice(caches)}
    cache = {
        "method": rng.choice(["deepcache", "deep_features"]),
        "interval": rng.choice([1, 2, 3]),
        "branch": rng.choice([0, 1, 3]),
        "end": rng.choice([0.5, 1.0]),
        "reuse_control_residuals": rng.choice([None, True, False]),
    }
    return common | {"num_inference_steps": 4, "step_cache": rng.choice([None, cache, cache])}


def disturbances() -> Iterator[dict]:
    "Cycle endlessly through changes that make a request fail, before loading, in preparation or while running."
    return itertools.cycle(
        [
            {"loras": [{"name": "wrong"}]},
            {"loras": [{"name": "nowhere"}]},
            {"image": "no image"},
            {"timeout_seconds": 0.001},
            {"controlnets": [{"model": "nowhere", "image": random_image(1)}]},
            {"clip_skip": 24},
            {"width": 100000},
            {"profile": "none"},
            {"step_cache": {"method": "deepcache", "branch": 31}},
            {"acceleration": {"dtype": "float16"}},
            {"acceleration": {"guidance_start": 0.9, "guidance_end": 0.1}},
            {"controlnets": [{"model": "canny", "image": random_image(1), "preprocessing": {"name": "midas"}}]},
        ]
    )


BASES = {  # family -> fixed requests whose pixels must not change
    family: ({"num_inference_steps": 2}, {"num_inference_steps": 5, **cached})
    for family, cached in {
        "sd15": {"step_cache": {"method": "deepcache", "interval": 2}},
        "sdxl": {"step_cache": {"method": "deep_features", "interval": 3}, "acceleration": {"guidance_end": 0.5}},
        "flux": {"step_cache": {"method": "first_block", "threshold": 0.5}},
        "sd35": {"acceleration": {"guidance_end": 0.5}},
        "zimage": {"acceleration": {"guidance_end": 0.5}},
        "flux2": {"step_cache": {"method": "taylorseer", "interval": 2}},
        "chroma": {"step_cache": {"method": "taylorseer", "interval": 2}},
        "qwen": {"step_cache": {"method": "first_block", "threshold": 0.5}},
    }.items()
}  # fmt: skip


def base_pixels(service: DiffusionService, family: str, index: int) -> bytes:
    "The pixels of a fixed request."
    result = service.generate({"model": family, "prompt": "a cat", "seed": 5} | BASES[family][index])
    assert result.status == "success", result.message
    return result.images[0].tobytes()


def run_random(service: DiffusionService, rng: random.Random, wrong: Iterator[dict]) -> str:
    "Run a random request, sometimes made invalid or cancelled after its first step, and return its status."
    request = random_request(rng, rng.choice(FAMILY_NAMES))
    fate = rng.random()
    request = request | next(wrong) if fate < 0.25 else request
    handles = []
    cancel = lambda event: handles and event.step and handles[0].cancel()
    handle = service.submit(request, on_progress=cancel if fate > 0.75 else None)
    handles.append(handle)
    return handle.result(timeout=120).status.value


def check_sequences(models: Path, count: int, seed: int) -> dict[str, int]:
    "Run the sequences and return how many requests ended in each status."
    with DiffusionService(Settings(model_folders=(models,), embedding_folders=models / "words"), device="cpu") as fresh:
        wanted = {(family, index): base_pixels(fresh, family, index) for family in FAMILY_NAMES for index in (0, 1)}
        assert all(wanted[family, 0] != wanted[family, 1] for family in FAMILY_NAMES)
        budget = sum(sum(factory.component_bytes().values()) for factory in fresh.pool.factories) * 4 // 5
    rng, wrong, ends = random.Random(seed), disturbances(), {}
    with DiffusionService(
        Settings(model_folders=(models,), embedding_folders=models / "words", memory_budget=budget), device="cpu"
    ) as service:
        for number in range(count):
            for _ in range(rng.choice([1, 2, 3])):
                end = run_random(service, rng, wrong)
                ends[end] = ends.get(end, 0) + 1
            family, index = rng.choice(FAMILY_NAMES), rng.randrange(2)
            assert base_pixels(service, family, index) == wanted[family, index], (
                f"{family}, request {index}, has changed in sequence {number} of seed {seed}"
            )
    return ends


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_fixed_requests_are_reproducible_after_random_ones(models: Path, seed: int) -> None:
    ends = check_sequences(models, SEQUENCES, seed)
    print(ends)
    assert "internal_error" not in ends
    assert ends["success"] > SEQUENCES / 2  # enough requests succeeded
    assert {
        "cancelled",
        "timed_out",
        "unsupported_combination",
        "lora_not_found",
        "bad_image",
        "controlnet_not_found",
    } <= set(ends)


@pytest.mark.slow
def test_fixed_requests_are_reproducible_in_many_sequences(models: Path) -> None:
    check_sequences(models, MANY_SEQUENCES, seed=2)
