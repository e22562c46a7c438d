"""Planned steps and denoiser calls match the actual ones, in every family, task, scheduler and strength."""

import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from diffusion_workers.cli.main import main
from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.families.schedulers import SCHEDULER_FACTS
from diffusion_workers.panel.form import request_sections
from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.planning.translate import from_parameters
from diffusion_workers.request.metadata import parameters_line
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings
from ez_diffusion_client.models import GenerationPlan, ModelFamily, OpResult, Phase, ProgressEvent, Task

PROMPT = "a red circle on a white background"
SIZE = {"width": 64, "height": 64}
SOURCE = Image.new("RGB", (64, 64), "green")
MASK = Image.new("L", (64, 64))
ImageDraw.Draw(MASK).rectangle((16, 16, 47, 47), fill=255)
CASES = [
    (family, name.value, karras)
    for family in FAMILIES
    for name in FAMILIES[family].schedulers
    for karras in (False, True)
    if SCHEDULER_FACTS[name].karras or not karras
]

TWO_SDXL = """
family: sdxl
source: {builtin: shapes-sdxl}
variant: fp16
components:
  vae: {source: {builtin: shapes-sd15, subfolder: vae}, variant: fp16}
refiner: {source: {builtin: shapes-sdxl}, variant: fp16}
defaults: {width: 64, height: 64, num_inference_steps: 8, guidance_scale: 1.5, scheduler: ddim}
limits: {min_width: 64, max_width: 256, min_height: 64, max_height: 256}
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiffusionService]:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_tiny_model(folder, family, family.value)
    (folder / "two.yaml").write_text(TWO_SDXL)
    with DiffusionService(Settings.from_environment().model_copy(update={"model_folders": (folder,)})) as made:
        yield made


class Counted:
    "A generation that records its denoiser calls and progress events."

    def __init__(self, service: DiffusionService, **fields):
        denoiser_slot = service.manifest(fields["model"]).record.denoiser
        denoiser = getattr(service.factory(service.manifest(fields["model"])).load(), denoiser_slot)
        self.timesteps: list[float] = []
        self.events: list[ProgressEvent] = []

        def note(*args, **kwargs):
            given = kwargs["timestep"] if "timestep" in kwargs else args[1]
            self.timesteps.append(float(torch.as_tensor(given).flatten()[0]))
            return own(*args, **kwargs)

        own, denoiser.forward = denoiser.forward, note
        try:
            self.result: OpResult = service.generate(prompt=PROMPT, on_progress=self.events.append, **fields)
        finally:
            denoiser.forward = own
        assert self.result.ok, self.result
        self.plan = self.result.generation.plan
        self.progress = [(event.step, event.total_steps) for event in self.events if event.phase == Phase.denoise]


IMAGE = {"image": SOURCE}
INPAINT = {"image": SOURCE, "mask_image": MASK}


def _check_counts(service: DiffusionService, **fields) -> None:
    "Compare planned and actual denoiser calls, steps and progress, without classifier-free guidance."
    fields |= {"seed": 1, "guidance_scale": 1.0} | SIZE
    planned = service.plan(prompt=PROMPT, **fields)
    assert planned.ok, planned
    made = Counted(service, **fields)
    assert made.plan.denoiser_calls == planned.plan.denoiser_calls == len(made.timesteps)
    assert len(made.progress) == len(made.timesteps)
    assert made.progress[-1] == (planned.plan.denoising_steps,) * 2
    assert min(made.timesteps) >= 0


@pytest.mark.parametrize(("family", "scheduler", "karras"), CASES)
def test_planned_denoiser_calls_match_the_actual_calls(
    service: DiffusionService, family: ModelFamily, scheduler: str, karras: bool
) -> None:
    asked = {"model": family.value, "scheduler": scheduler, "use_karras_sigmas": karras or None}
    _check_counts(service, **asked, num_inference_steps=4)
    if Task.image_to_image in FAMILIES[family].tasks:
        _check_counts(service, **asked, **IMAGE, num_inference_steps=4, strength=0.3)
    if Task.inpainting in FAMILIES[family].tasks:
        _check_counts(service, **asked, **INPAINT, num_inference_steps=5, strength=0.75)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("task", [IMAGE, INPAINT], ids=["image", "inpaint"])
def test_planned_calls_are_exact_at_extreme_strengths(
    service: DiffusionService, family: ModelFamily, task: dict
) -> None:
    "A single step, a strength that rounds to all steps, and one that leaves a single step."
    if (Task.image_to_image if task is IMAGE else Task.inpainting) not in FAMILIES[family].tasks:
        pytest.skip("the family has no such task")
    for steps, strength in ((1, 1.0), (4, 0.999), (10, 0.1)):
        for scheduler in {FAMILIES[family].schedulers[0].value, FAMILIES[family].schedulers[-1].value}:
            _check_counts(
                service,
                model=family.value,
                scheduler=scheduler,
                **task,
                num_inference_steps=steps,
                strength=strength,
            )


@pytest.mark.parametrize("steps", [61])
def test_trailing_spacing_has_no_extra_step(service: DiffusionService, steps: int) -> None:
    "Rounding in numpy.arange would add a timestep of -1."
    for scheduler in ("ddim", "heun"):
        made = Counted(
            service,
            model="sd15",
            scheduler=scheduler,
            timestep_spacing="trailing",
            num_inference_steps=steps,
            guidance_scale=1.0,
            seed=1,
            **SIZE,
        )
        assert len(made.timesteps) == made.plan.denoiser_calls
        assert min(made.timesteps) >= 0


def test_planned_calls_are_exact_with_the_model_scheduler(service: DiffusionService) -> None:
    for model in ("sd15", "sdxl", "flux", "sd35", "zimage"):
        made = Counted(service, model=model, num_inference_steps=3, guidance_scale=1.0, seed=1, **SIZE)
        assert made.plan.denoiser_calls == len(made.timesteps) == 3


def test_empty_control_window_is_detected_by_denoiser_calls(service: DiffusionService) -> None:
    "Heun makes 11 calls in 6 steps, so the first one is within a window that ends at 0.1."
    for scheduler, empty in (("ddim", True), ("heun", False), ("kdpm2", False)):
        plan = service.plan(
            prompt=PROMPT,
            model="shapes-sd15",
            scheduler=scheduler,
            num_inference_steps=6,
            controlnets=[{"model": "canny", "image": SOURCE, "guidance_end": 0.1}],
        )
        assert bool(plan.warnings) == empty, (scheduler, plan.warnings)


def test_strength_that_ignores_the_image_gets_a_warning(service: DiffusionService) -> None:
    for strength, warned in ((0.8, True), (0.75, False), (1.0, False)):
        plan = service.plan(prompt=PROMPT, model="shapes-flux", image=SOURCE, strength=strength, num_inference_steps=4)
        assert plan.ok
        assert any(note.field == "strength" for note in plan.warnings or ()) == warned


@pytest.fixture(scope="module")
def base(service: DiffusionService) -> Image.Image:
    return service.generate(prompt=PROMPT, seed=3).image


@pytest.mark.parametrize("scheduler", ["lms", "pndm"])
@pytest.mark.parametrize(("steps", "strength"), [(10, 0.1), (10, 0.2), (50, 0.06), (5, 0.5), (20, 0.95)])
def test_multistep_schedulers_leave_no_noise_at_low_strength(
    service: DiffusionService, base: Image.Image, scheduler: str, steps: int, strength: float
) -> None:
    "Image to image stays close to the result of DDIM."

    def image(name: str) -> np.ndarray:
        result = service.generate(
            prompt=PROMPT, seed=7, image=base, scheduler=name, num_inference_steps=steps, strength=strength
        )
        return np.asarray(result.image, dtype=int)

    assert np.abs(image(scheduler) - image("ddim")).mean() < 4


def test_too_few_steps_for_a_scheduler_get_a_warning(service: DiffusionService) -> None:
    for scheduler, few, enough in (("heun", 2, 3), ("kdpm2_ancestral", 3, 5), ("pndm", 4, 6)):
        for steps, warned in ((few, True), (enough, False)):
            plan = service.plan(prompt=PROMPT, scheduler=scheduler, num_inference_steps=steps)
            assert any(note.field == "num_inference_steps" for note in plan.warnings or ()) == warned
    leading = service.plan(prompt=PROMPT, scheduler="euler", timestep_spacing="leading", num_inference_steps=1)
    assert [note.field for note in leading.warnings] == ["timestep_spacing"]


def test_deis_ignores_karras_sigmas_with_one_step(service: DiffusionService) -> None:
    one = {"prompt": PROMPT, "seed": 3, "scheduler": "deis", "num_inference_steps": 1}
    karras = service.generate(use_karras_sigmas=True, **one)
    assert [note.field for note in karras.warnings] == ["use_karras_sigmas"]
    assert np.array_equal(np.asarray(karras.image), np.asarray(service.generate(**one).image))


def _generate_in_child(service: DiffusionService, answers) -> None:
    answers.put(service.generate(prompt=PROMPT, num_inference_steps=2, seed=1).status.value)


def test_service_works_in_a_forked_child() -> None:
    with DiffusionService(device="cpu") as service:
        assert service.generate(prompt=PROMPT, num_inference_steps=2, seed=1).ok
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=_generate_in_child, args=(service, answers))
        child.start()
        try:
            assert answers.get(timeout=120) == "success"
        finally:
            child.kill()
            child.join()


def test_out_of_memory_fallback_spares_smaller_requests(service: DiffusionService) -> None:
    ask = {"prompt": PROMPT, "seed": 4, "num_inference_steps": 2, "width": 256, "height": 256}
    before = service.generate(**ask)
    large = service.plan(**(ask | {"num_images": 4})).plan
    factory = service.factory(service.manifest(before.generation.plan.model))
    assert service.executor.fallbacks.advance([large], factory)
    after = service.generate(**ask)
    assert not after.warnings
    assert np.array_equal(np.asarray(before.image), np.asarray(after.image))
    assert service.executor.fallbacks.apply(large).memory.vae_tiling


@pytest.mark.parametrize("switch_at", [0.8, 0.01, 0.0])
@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_base_and_refiner_share_the_steps_of_one_run(
    service: DiffusionService, scheduler: str, switch_at: float
) -> None:
    "Progress counts each step once up to the total, and the number of denoiser calls is that of a single run."
    events: list[ProgressEvent] = []
    ask = {"prompt": PROMPT, "model": "two", "seed": 5, "scheduler": scheduler}
    result = service.generate(**ask, refiner={"switch_at": switch_at}, on_progress=events.append)
    assert result.ok, result
    progress = [(event.step, event.total_steps) for event in events if event.phase == Phase.denoise]
    steps = [step for step, _ in progress]
    assert {total for _, total in progress} == {8}
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 8)
    assert len(steps) == result.generation.plan.denoiser_calls


@pytest.mark.parametrize("scheduler", ["euler", "lms", "pndm", "heun"])
def test_refiner_with_the_same_weights_changes_little(service: DiffusionService, scheduler: str) -> None:
    "Latents passed to the refiner have the noise level of their timestep, so no noise is left in the image."
    ask = {"prompt": PROMPT, "model": "two", "seed": 5, "scheduler": scheduler, "num_inference_steps": 12}
    whole, refined = (service.generate(**ask, **more).image for more in ({}, {"refiner": {"switch_at": 0.5}}))
    assert np.abs(np.asarray(whole, dtype=int) - np.asarray(refined, dtype=int)).mean() < 4


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_applies_to_both_prompts(service: DiffusionService, clip_skip: int) -> None:
    "The image matches diffusers with both prompts encoded at that layer, within one level per pixel."
    negative = "a blue square on a navy background"
    ask = {"num_inference_steps": 4, "guidance_scale": 4.0} | SIZE
    made = service.generate(
        prompt=PROMPT, negative_prompt=negative, clip_skip=clip_skip, scheduler="ddim", seed=5, **ask
    )
    pipe = service.factory(service.manifest("shapes-sd15")).load()
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    plain = StableDiffusionPipeline(
        **parts, scheduler=DDIMScheduler.from_config(pipe.scheduler.config), requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    texts = [plain.encode_prompt(text, "cpu", 1, False, clip_skip=clip_skip)[0] for text in (PROMPT, negative)]
    expected = plain(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        generator=torch.Generator().manual_seed(5),
        **ask,
    ).images[0]
    assert np.abs(np.asarray(made.image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_control_without_a_warning_affects_the_image(service: DiffusionService) -> None:
    "A window that ends at 0.4 contains the first of Flux's three steps at strength 0.6."
    ask = {"prompt": PROMPT, "model": "shapes-flux", "seed": 4, "image": SOURCE, "strength": 0.6} | SIZE
    ask["num_inference_steps"] = 4
    unit = {"model": "canny", "image": MASK.convert("RGB"), "guidance_end": 0.4}
    controlled = service.generate(**ask, controlnets=[unit])
    assert controlled.ok, controlled
    assert not controlled.warnings
    assert not np.array_equal(np.asarray(controlled.image), np.asarray(service.generate(**ask).image))


def test_scheduler_options_work_in_every_interface(service: DiffusionService, capsys: pytest.CaptureFixture) -> None:
    "Request, command line, form, and the AUTOMATIC1111-style parameters line."
    fields = {"scheduler": "tcd", "eta": 0.2, "num_inference_steps": 4}
    plan = service.plan(prompt=PROMPT, seed=5, **fields).plan
    options = ["--scheduler", "TCD", "--eta", "0.2", "--num-inference-steps", "4", "--seed", "5", "--json"]
    assert main(["plan", PROMPT, *options]) == 0
    assert GenerationPlan.model_validate_json(capsys.readouterr().out).eta == plan.eta == 0.2
    line = parameters_line(plan)
    assert "Sampler: TCD, Eta DDIM: 0.2" in line
    assert fields.items() <= service.restore(parameters=line).restored.request.items()
    trailing = service.plan(prompt=PROMPT, scheduler="ddim", timestep_spacing="trailing").plan
    assert service.restore(parameters=parameters_line(trailing)).restored.request["timestep_spacing"] == "trailing"
    offered = {info.name for infos in request_sections().values() for info in infos}
    assert {"eta", "timestep_spacing", "scheduler"} <= offered


@pytest.mark.parametrize(
    ("model", "clip_skip"), [("shapes-sdxl", 0), ("sd_xl_base_1.0", 0), ("sd3.5_medium", 0), ("dreamshaper_8", 1)]
)
def test_clip_skip_in_parameters_depends_on_the_model_family(model: str, clip_skip: int) -> None:
    line = f"a red circle\nSteps: 12, Sampler: Euler, CFG scale: 3, Seed: 11, Model: {model}, Clip skip: 2"
    assert from_parameters(line).request["clip_skip"] == clip_skip
