"""Objects passed in from Python: loaded pipelines, noise, embeddings, callbacks, schedulers, preprocessors, classes."""

import dataclasses
import os
import signal

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusion_workers import DiffusionService
from diffusion_workers.control.preprocessors import (
    PREPROCESSORS,
    ControlnetGuideImagePreprocessor,
    Parameter,
    preprocessor_list,
)
from diffusion_workers.families import registry
from diffusion_workers.pipeline.tiny_models import tiny_controlnet, tiny_pipeline
from diffusion_workers.request.errors import RequestError
from diffusion_workers.service.batching import BatchPolicy
from ez_diffusion_client.frames import to_dataframe
from ez_diffusion_client.models import ControlKind, ErrorCode, ModelFamily, Task

FAMILIES = list(ModelFamily)
RECORDS = registry.FAMILIES
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (16, 16, 48, 48))
SIZES = {"defaults": {"width": 64, "height": 64, "num_inference_steps": 3}}
INPUTS = {
    "text_to_image": {},
    "image_to_image": {"image": PHOTO, "strength": 0.7},
    "inpainting": {"image": PHOTO, "mask_image": MASK, "strength": 0.7},
    "inpainting_all": {"image": PHOTO, "mask_image": MASK, "strength": 1.0},
}


def pixels(result) -> list[np.ndarray]:
    return [np.asarray(image) for image in result.raise_for_status().images]


def same(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(pixels(left), pixels(right), strict=True))


def state_of(pipe) -> dict:
    """The state of a pipeline that a service could change."""
    found = {"vars": sorted(vars(pipe)), "scheduler": (id(pipe.scheduler), dict(pipe.scheduler.config))}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in part.modules()]
            layers = [(id(m), type(m).__name__, "forward" in vars(m)) for m in part.modules()]
            weights = {key: (id(p), p._version, p.requires_grad) for key, p in part.named_parameters()}
            config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
            found[name] = (id(part), sorted(vars(part)), hooks, layers, weights, part.training, config)
    return found


def skip_missing(service, task: str) -> None:
    """Skip a task of `INPUTS` that the family does not have."""
    if Task(task.removesuffix("_all")) not in service.manifest().tasks:
        pytest.skip("the family has no such task")


def has_control(service, task: str) -> bool:
    """Whether diffusers has a ControlNet pipeline for a task of `INPUTS`."""
    call = service.manifest().record.call(Task(task.removesuffix("_all")), ControlKind.single)
    return call is not None


def without_strength(service, fields: dict, control: dict) -> dict:
    """The fields of a request whose ControlNet pipeline may start from noise alone."""
    call = service.manifest().record.call(Task.inpainting, ControlKind.single)
    starts_from_noise = control and "mask_image" in fields and call is not None and not call.takes_strength
    return {name: value for name, value in fields.items() if name != "strength" or not starts_from_noise}


@pytest.fixture(scope="module")
def service():
    with DiffusionService(log_failures=False) as made:
        yield made


@pytest.fixture(scope="module", params=FAMILIES, ids=[family.value for family in FAMILIES])
def tiny(request):
    pipe = tiny_pipeline(request.param)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    # transformers attaches its own hooks for hidden states in the first call, whatever the caller
    pipe(prompt="a red circle", width=64, height=64, num_inference_steps=1, output_type="latent")
    if hasattr(pipe.vae, "clear_cache"):  # the feature cache of a video VAE, which each call clears
        pipe.vae.clear_cache()
    controlnets = {"lines": tiny_controlnet(request.param)} if RECORDS[request.param].has_controlnets else {}
    with DiffusionService.from_pipeline(
        pipe, "mine", controlnets=controlnets, manifest=SIZES, log_failures=False
    ) as made:
        yield made, pipe


@pytest.mark.parametrize("task", INPUTS)
def test_loaded_pipelines_run_every_task_and_stay_unchanged(tiny, task):
    service, pipe = tiny
    skip_missing(service, task)
    before = state_of(pipe)
    fields = INPUTS[task] | {"seed": 1, "prompt": "a red circle"}
    control = {"controlnets": [{"model": "lines", "image": PHOTO}]} if has_control(service, task) else {}
    first = service.generate(**fields)
    controlled = service.generate(**without_strength(service, fields, control), **control)
    stopped = service.generate(**fields, on_step=lambda step: 1 / 0)
    assert stopped.errors[0].code == ErrorCode.custom_code_failed
    assert same(first, controlled) != bool(control)
    assert same(first, service.generate(**fields))
    assert state_of(pipe) == before
    receipt = {(part.kind.value, part.name) for part in controlled.generation.plan.custom}
    expected = {("pipeline", type(pipe).__name__)} | ({("controlnet", "lines")} if control else set())
    assert receipt == expected
    lost = service.restore(controlled.image).restored.lost
    assert {kind for kind, _ in expected} <= {setting.name for setting in lost}


@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "controlnet"])
@pytest.mark.parametrize("task", INPUTS)
def test_initial_latents_reproduce_the_image_of_their_seed(tiny, task, controlled):
    service, _pipe = tiny
    skip_missing(service, task)
    fields = INPUTS[task] | {"prompt": "a red circle", "seeds": [1, 2, 3], "memory": {"batch_size": 2}}
    if controlled:
        if not has_control(service, task):
            pytest.skip("diffusers has no such pipeline")
        fields["controlnets"] = [{"model": "lines", "image": PHOTO}]
        fields = without_strength(service, fields, fields)
    taken = []

    def keep(shape, generator=None, **kwargs):
        drawn = original(shape, generator=generator, **kwargs)
        taken.append(drawn)
        return drawn

    chosen = service.plan(**fields).plan.pipeline_class
    globals_ = getattr(diffusers, chosen).prepare_latents.__globals__
    original = globals_["randn_tensor"]
    globals_["randn_tensor"] = keep
    try:
        plain = service.generate(**fields)
    finally:
        globals_["randn_tensor"] = original
    noise = torch.cat(taken)
    if service.manifest().record.latents.frames:  # drawn as one frame
        noise = noise[:, 0]
    assert noise.shape[0] == 3 and noise.ndim == 4
    if service.manifest().record.latents.normalized_patches:  # drawn as patches of 2 x 2
        noise = torch.nn.functional.pixel_shuffle(noise, 2)
    assert same(plain, service.generate(**fields, latents=noise))
    other = service.generate(**fields, latents=-noise)
    assert not any(np.array_equal(a, b) for a, b in zip(pixels(plain), pixels(other)))
    assert same(plain, service.generate(**fields))


SCENE = {"prompt": "a red circle on a white background", "seed": 3, "num_inference_steps": 6}
EDGES = Image.new("RGB", (128, 128))
ImageDraw.Draw(EDGES).ellipse((40, 40, 90, 90), outline="white")
ADDED = {  # what is applied to a pipeline and must be removed again
    "plain": {},
    "lora": {"loras": [{"name": "LORA", "scale": 1.0}]},
    "controlnet": {"controlnets": [{"model": "canny", "image": EDGES}]},
    "cache": {"step_cache": "CACHE"},
    "all": {
        "loras": [{"name": "LORA", "scale": 1.0}],
        "controlnets": [{"model": "canny", "image": EDGES}],
        "step_cache": "CACHE",
    },
}
ADOPTED = {  # model -> one of its LoRAs, and a step cache of its family
    "shapes-sd15": ("outline", {"method": "deepcache", "interval": 2}),
    "shapes-sdxl": ("outline", {"method": "deep_features", "interval": 2}),
    "shapes-flux": ("heart", {"method": "taylorseer", "interval": 2}),
}


@pytest.mark.parametrize("model", ADOPTED)
def test_adopted_pipelines_match_the_model_and_stay_unchanged(service, model):
    lora, cache = ADOPTED[model]
    known = service.manifest(model)
    pipe = service.pipeline(model)
    offered = {
        "loras": {lora: known.loras[lora].model_dump(mode="json", exclude_none=True)},
        "controlnets": {"canny": known.controlnets["canny"].model_dump(mode="json", exclude_none=True)},
        "defaults": known.defaults.model_dump(mode="json", exclude_none=True),
    }
    service.generate(SCENE | {"model": model})  # transformers attaches its own hooks in the first call
    before = state_of(pipe)
    images = {}
    with DiffusionService.from_pipeline(pipe, "mine", manifest=offered, log_failures=False) as adopting:
        for name, added in ADDED.items():
            asked = SCENE | added
            if "loras" in asked:
                asked["loras"] = [{"name": lora, "scale": 1.0}]
            if "step_cache" in asked:
                asked["step_cache"] = cache
            if name == "all" and model == "shapes-flux":  # its caches are refused with a ControlNet
                del asked["controlnets"]
            images[name] = adopting.generate(asked)
            assert same(images[name], service.generate(asked | {"model": model})), name
        assert same(images["plain"], adopting.generate(SCENE))

        # an interrupt, as in a notebook, stops generation early, and the next call works
        seen = []

        def interrupt(step):
            seen.append(step.index)
            if step.index == 1:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            adopting.generate(SCENE | {"num_inference_steps": 60}, on_step=interrupt)
        assert max(seen) < 30
        assert same(images["plain"], adopting.generate(SCENE))
    assert state_of(pipe) == before
    different = {name: pixels(made)[0].tobytes() for name, made in images.items()}
    assert len(set(different.values())) == len(ADDED), "each of them changes the image"


def test_embeddings_give_the_image_of_their_prompt(tiny):
    service, _pipe = tiny
    fields = {"seeds": [1, 2, 3], "memory": {"batch_size": 2}}
    if service.manifest().record.embeds_have_masks:
        with pytest.raises(RequestError, match="needs attention masks"):
            service.encode("a red circle")
        return
    embeds = service.encode("a red circle")
    plain = service.generate("a red circle", **fields)
    assert same(plain, service.generate(prompt_embeds=embeds, **fields))
    assert same(plain, service.generate(**embeds.tensors(), **fields))
    each = {name: tensor.repeat(3, *[1] * (tensor.ndim - 1)) for name, tensor in embeds.tensors().items()}
    assert same(plain, service.generate(**each, **fields))
    scaled = dataclasses.replace(embeds, prompt_embeds=embeds.prompt_embeds.flip(-1))
    made = service.generate(prompt_embeds=scaled, **fields)
    assert not same(plain, made)
    assert [part.kind.value for part in made.generation.plan.custom] == ["pipeline", "prompt_embeds"]
    assert made.generation.plan.prompt == "a red circle"


@pytest.mark.parametrize("task", INPUTS)
def test_on_step_sees_every_step_and_can_replace_the_latents(tiny, task):
    service, _pipe = tiny
    skip_missing(service, task)
    fields = INPUTS[task] | {"prompt": "a red circle", "seeds": [1, 2, 3], "memory": {"batch_size": 2}}
    seen = []
    plain = service.generate(**fields)
    watched = service.generate(**fields, on_step=seen.append)
    assert same(plain, watched)
    steps = watched.generation.plan.denoising_steps
    assert [step.seeds for step in seen] == [(1, 2)] * steps + [(3,)] * steps
    assert [step.index for step in seen] == [*range(steps)] * 2
    assert seen[0].total == steps
    layout = service.manifest().record.latents
    assert {tuple(step.latents.shape[1:]) for step in seen} == {(layout.channels, 8, 8)}
    assert seen[0].decode()[0].size == (64, 64)
    kept = service.generate(**fields, on_step=lambda step: step.latents)
    assert same(plain, kept)
    changed = service.generate(**fields, on_step=lambda step: step.latents * 0.5)
    assert not same(plain, changed)


def test_latent_output_decodes_to_the_image(tiny):
    service, _pipe = tiny
    made = service.generate("a red circle", seeds=[1, 2, 3], memory={"batch_size": 2}, output_type="latent")
    channels = service.manifest().record.latents.channels
    assert (tuple(made.latents.shape), made.latents.dtype) == ((3, channels, 8, 8), torch.float32)
    plain = service.generate("a red circle", seeds=[1, 2, 3], memory={"batch_size": 2})
    decoded = [np.asarray(image) for image in service.decode(made.latents)]
    assert max(int(abs(a.astype(int) - b).max()) for a, b in zip(decoded, pixels(plain))) <= 1
    with pytest.raises(ValueError, match="output_type"):
        _ = plain.latents
    with pytest.raises(ValueError, match=r"result\.latents"):
        _ = made.image


def test_pipelines_can_be_used_directly_with_diffusers(tiny):
    service, pipe = tiny
    for task in service.manifest().tasks:
        own = service.pipeline(task=task)
        assert own.scheduler is not pipe.scheduler
        assert getattr(own, service.manifest().record.denoiser) is getattr(pipe, service.manifest().record.denoiser)
    if not service.manifest().record.has_controlnets:
        return
    controlled = service.pipeline(task="text_to_image", controlnets=["lines"])
    assert controlled.controlnet is not None
    size = {"width": 64, "height": 64, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(1)}
    argument = service.manifest().record.call(Task.text_to_image, ControlKind.single).control_argument
    image = controlled("a red circle", **{argument: PHOTO}, **size).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"task": "text2img"}, "task"),
        ({"controlnets": ["nothing"]}, "controlnets[0]"),
        ({"scheduler": "eulr"}, "scheduler"),
        ({"scheduler": "flow_match_euler"}, "scheduler"),
        ({"scheduler": 3}, "scheduler"),
        ({"model": "nothing"}, "model"),
    ],
)
def test_wrong_pipeline_arguments_are_named(service, arguments, field):
    with pytest.raises(RequestError) as caught:
        service.pipeline(**arguments)
    assert caught.value.errors[0].field == field


NOISE = torch.zeros(1, 4, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "code", "field"),
    [
        ({"latents": NOISE[:, :3]}, ErrorCode.wrong_type, "latents"),
        ({"latents": NOISE.numpy()}, ErrorCode.wrong_type, "latents"),
        ({"latents": NOISE.int()}, ErrorCode.wrong_type, "latents"),
        ({"latents": NOISE / 0}, ErrorCode.not_a_finite_number, "latents"),
        ({"latents": NOISE, "num_images": 2}, ErrorCode.wrong_type, "latents"),
        ({"output_type": "np"}, ErrorCode.not_one_of, "output_type"),
        ({"on_step": 3}, ErrorCode.wrong_type, "on_step"),
        ({"on_step": lambda step: step.latents[0]}, ErrorCode.wrong_type, "on_step"),
        ({"on_step": lambda step: step.latents.half()}, ErrorCode.wrong_type, "on_step"),
        ({"on_step": lambda step: step.latents * torch.nan}, ErrorCode.not_a_finite_number, "on_step"),
        ({"on_step": lambda step: step.latents.zero_() and None}, ErrorCode.custom_code_failed, "on_step"),
        ({"on_step": lambda step: {}["missing"]}, ErrorCode.custom_code_failed, "on_step"),
        ({"prompt_embeds": torch.zeros(1, 8, 8)}, ErrorCode.unsupported_combination, "prompt"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 8, 8)}, ErrorCode.wrong_type, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(8, 8)}, ErrorCode.wrong_type, "prompt_embeds"),
        ({"prompt": None, "negative_prompt_embeds": NOISE}, ErrorCode.missing_field, "prompt_embeds"),
        ({"scheduler": object()}, ErrorCode.wrong_type, "scheduler"),
        ({"scheduler": dict}, ErrorCode.wrong_type, "scheduler"),
        ({"scheduler": "mine"}, ErrorCode.unknown_scheduler, "scheduler"),
    ],
)
def test_wrong_hooks_are_named_and_leave_no_state(service, arguments, code, field):
    usual = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}
    before = service.generate(**usual)
    error = service.generate(**(usual | arguments)).errors[0]
    assert (error.code, error.field) == (code, field), error
    assert same(before, service.generate(**usual))


class Halving(diffusers.DDIMScheduler):
    """A custom scheduler."""

    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output * 0.5, timestep, sample, **kwargs)


class Broken(diffusers.DDIMScheduler):
    def step(self, *args, **kwargs):
        raise ArithmeticError("no step")


def test_custom_schedulers_by_class_object_and_name(service):
    usual = {"prompt": "a red circle", "seeds": [1, 2, 3], "num_inference_steps": 3, "memory": {"batch_size": 2}}
    before = service.generate(**usual)
    mine = Halving.from_config(service.pipeline().scheduler.config)
    untouched = dict(vars(mine))
    by_class = service.generate(**usual, scheduler=Halving)
    by_object = service.generate(**usual, scheduler=mine)
    service.register_scheduler("halving", Halving)
    by_name = service.generate(**usual, scheduler="halving")
    assert same(by_class, by_object) and same(by_class, by_name) and not same(by_class, before)
    assert vars(mine).keys() == untouched.keys() and mine.num_inference_steps is None
    assert by_name.generation.plan.scheduler.class_name == "Halving"
    assert [part.name for part in by_name.generation.plan.custom] == ["halving"]
    assert same(before, service.generate(**usual))
    error = service.generate(**usual, scheduler=Broken).errors[0]
    assert (error.code, error.message) == (ErrorCode.custom_code_failed, "scheduler raised ArithmeticError: no step")
    with pytest.raises(RequestError, match="already"):
        service.register_scheduler("ddim", Halving)
    assert isinstance(service.pipeline(scheduler="halving").scheduler, Halving)
    assert same(before, service.generate(**usual))


def test_restore_lists_custom_parts_to_pass_in_again(service):
    made = service.generate("a red circle", seed=1, num_inference_steps=2, scheduler=Halving, on_step=lambda step: None)
    lost = {setting.name: setting for setting in service.restore(made.image).restored.lost}
    assert {"scheduler", "on_step"} == set(lost)
    assert lost["scheduler"].given == "Halving" and "hand it in again" in lost["scheduler"].reason
    assert "custom" in made.generation.plan._repr_markdown_()


class Doubled(diffusers.StableDiffusionPipeline):
    """A custom pipeline class."""

    def __call__(self, *args, guidance_scale=1.0, **kwargs):
        return super().__call__(*args, guidance_scale=guidance_scale * 2, **kwargs)


def test_custom_pipeline_classes():
    with DiffusionService(log_failures=False) as service:
        usual = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 3}
        double = service.generate(**usual, guidance_scale=4.0)
        service.register_pipeline_class(Doubled)
        made = service.generate(**usual, guidance_scale=2.0)
        assert same(made, double)
        assert [(part.kind.value, part.name) for part in made.generation.plan.custom] == [("pipeline_class", "Doubled")]
        with pytest.raises(RequestError, match="does not inherit"):
            service.register_pipeline_class(diffusers.FluxPipeline)


def test_an_adopted_subclass_keeps_its_call_method(service):
    pipe = Doubled(**service.pipeline().components)
    with DiffusionService.from_pipeline(pipe, log_failures=False) as own:
        usual = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 3}
        assert same(own.generate(**usual, guidance_scale=2.0), service.generate(**usual, guidance_scale=4.0))


@pytest.mark.parametrize(
    "cls",
    ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionControlNetPipeline"],
)
def test_from_pipeline_accepts_any_class_of_the_family(service, cls):
    made = service.pipeline()
    given = dict(made.components)
    if "ControlNet" in cls:
        given["controlnet"] = service.pipeline(controlnets=["canny"]).controlnet
    pipe = getattr(diffusers, cls)(**given)
    with DiffusionService.from_pipeline(pipe, log_failures=False) as own:
        usual = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 3, "guidance_scale": 2.0}
        assert same(own.generate(**usual), service.generate(**usual))
        assert list(own.manifest().controlnets) == (["controlnet"] if "ControlNet" in cls else [])


def test_callbacks_can_decode_but_not_generate(service):
    inner = []

    def callback(step):
        inner.append(service.generate("a blue star", seed=1, num_inference_steps=2))
        inner.append(service.decode(step.latents))

    made = service.generate("a red circle", seed=1, num_inference_steps=2, on_step=callback)
    assert made.ok
    assert inner[0].errors[0].code == ErrorCode.unsupported_combination
    assert inner[1][0].size == (128, 128)


def test_requests_with_hooks_are_never_batched_with_others():
    with DiffusionService(batching=BatchPolicy(max_wait_seconds=0.3), log_failures=False) as service:
        usual = {"prompt": "a red circle", "num_inference_steps": 3}
        alone = [service.generate(**usual, seed=seed) for seed in (1, 2)]
        seen = []
        running = [
            service.submit(**usual, seed=1),
            service.submit(**usual, seed=2, on_step=lambda step: seen.append(step.seeds)),
            service.submit(**usual, seed=1, on_step=lambda step: step.latents * 0),
        ]
        results = [generation.result() for generation in running]
        assert same(results[0], alone[0]) and same(results[1], alone[1]) and not same(results[2], alone[0])
        assert set(seen) == {(2,)}


def test_custom_preprocessors_are_listed_checked_and_recorded(service):
    def stripes(pixels: np.ndarray, width: int) -> np.ndarray:
        made = np.zeros_like(pixels)
        made[:, :: max(1, width)] = 255
        return made

    def wrong(pixels: np.ndarray) -> np.ndarray:
        return pixels.astype(np.float64)[:2]

    row = ControlnetGuideImagePreprocessor(
        "stripes", "stripes", "any ControlNet", (Parameter("width", 4, "pixels", 1, 64),), make_map=stripes
    )
    bad = ControlnetGuideImagePreprocessor("wrong_map", "wrong", "any ControlNet", make_map=wrong)
    PREPROCESSORS.add(row, bad)
    try:
        listed = {info.name: info for info in service.list_models().preprocessors}
        assert listed["stripes"].parameters[0].maximum == 64
        made = service.preprocess(image=PHOTO, preprocessing={"name": "stripes", "parameters": {"width": 8}})
        assert made.ok
        error = service.preprocess(image=PHOTO, preprocessing={"name": "stripes", "parameters": {"width": 99}}).errors[
            0
        ]
        assert (error.code, error.field) == (ErrorCode.out_of_range, "preprocessing.parameters.width")
        error = service.preprocess(image=PHOTO, preprocessing={"name": "wrong_map"}).errors[0]
        assert error.code == ErrorCode.custom_code_failed
        name = next(iter(service.manifest().controlnets))
        unit = {"model": name, "image": PHOTO, "preprocessing": {"name": "stripes"}}
        made = service.generate("a red circle", seed=1, num_inference_steps=2, controlnets=[unit])
        assert [(p.kind.value, p.name) for p in made.generation.plan.custom] == [("preprocessor", "stripes")]
    finally:
        del PREPROCESSORS["stripes"], PREPROCESSORS["wrong_map"]
    assert "stripes" not in [info.name for info in preprocessor_list()]


def test_result_tables_have_settings_and_images(service):
    made = service.generate("a red circle", seeds=[1, 2], num_inference_steps=2)
    failed = service.generate("a red circle", width=130)
    frame = to_dataframe([made, failed])
    assert len(frame) == 3
    assert list(frame["seed"][:2]) == [1, 2]
    assert {"model", "width", "guidance_scale", "scheduler", "controlnets", "loras", "total_seconds"} <= set(frame)
    assert np.array_equal(np.asarray(frame["image"][1]), pixels(made)[1])
    assert frame["status"][2] == "invalid_request"
    assert len(made.to_dataframe()) == 2
