"""Every scheduler, with and without Karras sigmas, generates an image that matches the prompt."""

import inspect

import diffusers
import pytest
from diffusers import EulerDiscreteScheduler, SchedulerMixin

from diffusion_workers.families.registry import FAMILIES
from diffusion_workers.families.schedulers import SCHEDULER_FACTS
from diffusion_workers.pipeline.schedulers import make_scheduler
from diffusion_workers.planning.schedules import KARRAS_SCHEDULERS, SCHEDULERS
from diffusion_workers.prompt.sigmas import (
    ays_sigmas,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    sgm_uniform_sigmas,
    trained_sigmas,
)
from diffusion_workers.request.metadata import parameters_line
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.shapes.scenes import Scene, ShapeObject, matches, read_scene
from ez_diffusion_client.models import PlannedScheduler, SchedulerName

SCENE = Scene((ShapeObject("red", "circle"),), "white", place="center", size="large")
OFTEN = ("euler", "dpmpp_2m")  # often used with Karras sigmas; the others are marked slow
CASES = [
    pytest.param(name, karras, marks=[pytest.mark.slow] if karras and name not in OFTEN else [])
    for name in SCHEDULERS
    if name in FAMILIES["sd15"].schedulers
    for karras in (False, True)
    if not karras or name in KARRAS_SCHEDULERS
]


@pytest.fixture(scope="module")
def service():
    with DiffusionService(device="cpu") as service:
        yield service


@pytest.mark.parametrize(("scheduler", "karras"), CASES)
def test_image_matches_the_prompt_with_every_scheduler(
    service: DiffusionService, scheduler: SchedulerName, karras: bool
) -> None:
    "The built-in model is trained: the scene reader finds a red circle on white in the pixels."
    prompt = "a large red circle in the center on a white background"
    result = service.generate(
        prompt=prompt, seed=3, scheduler=scheduler.value, use_karras_sigmas=True if karras else None
    )
    assert result.ok, result
    assert matches(read_scene(result.image), SCENE), f"{scheduler.value}: {read_scene(result.image)}"


SCHEDULES = ("karras", "exponential", "beta", "sgm_uniform", "ays")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scheduler", ["euler", pytest.param("heun", marks=pytest.mark.slow), "dpmpp_2m"])
def test_noise_schedules_generate_and_are_restored(service: DiffusionService, scheduler: str, schedule: str) -> None:
    prompt = "a large red circle in the center on a white background"
    result = service.generate(prompt, seed=3, scheduler=scheduler, sigma_schedule=schedule, num_inference_steps=10)
    assert matches(read_scene(result.image), SCENE)
    assert result.generation.plan.denoiser_calls == (19 if scheduler == "heun" else 10)
    restored = service.restore(result.image).restored.request
    again = service.plan(restored).plan
    assert again.scheduler == result.generation.plan.scheduler
    line = service.restore(parameters=parameters_line(result.generation.plan)).restored
    assert service.plan(line.request).plan.scheduler == again.scheduler, line.lost


def levels(planned: PlannedScheduler, steps: int, own: SchedulerMixin) -> list[float]:
    "The sigmas of a scheduler after `set_timesteps`."
    scheduler = make_scheduler(own, planned)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


def test_noise_schedules_match_the_sigma_functions(service: DiffusionService) -> None:
    own = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    trained = trained_sigmas()
    smallest, largest = trained[0], trained[-1]
    wanted = {
        "karras": karras_sigmas(10, smallest, largest),
        "exponential": exponential_sigmas(10, smallest, largest),
        "beta": beta_sigmas(10, smallest, largest),
        "ays": ays_sigmas("sd1", 10),
    }
    asked = {"prompt": "a red circle", "scheduler": "euler", "num_inference_steps": 10}
    for schedule, sigmas in wanted.items():
        planned = service.plan(**asked, sigma_schedule=schedule).plan.scheduler
        found = levels(planned, 10, own)
        assert found == pytest.approx([*sigmas, 0.0], rel=2e-2), schedule  # sigmas in diffusers start at a timestep
    uniform = levels(service.plan(**asked, sigma_schedule="sgm_uniform").plan.scheduler, 10, own)
    assert uniform == pytest.approx([*sgm_uniform_sigmas(10, trained), 0.0], rel=2e-2)


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"scheduler": "euler", "use_karras_sigmas": True, "sigma_schedule": "beta"}, "sigma_schedule", "another"),
        ({"scheduler": "ddim", "sigma_schedule": "beta"}, "sigma_schedule", "ddim has no such noise levels"),
        ({"scheduler": "lms", "sigma_schedule": "ays"}, "sigma_schedule", "lms has no such noise levels"),
        ({"timestep_spacing": "leading", "sigma_schedule": "sgm_uniform"}, "sigma_schedule", "another"),
        ({"model": "shapes-flux", "sigma_schedule": "ays"}, "sigma_schedule", "the family flux has no such schedule"),
        ({"scheduler": "euler", "sigma_schedule": "simple"}, "sigma_schedule", "not one of the known values"),
    ],
)
def test_unsupported_noise_schedules_are_rejected(
    service: DiffusionService, fields: dict, field: str, said: str
) -> None:
    refused = service.plan(prompt="a red circle", **fields)
    assert [error.field for error in refused.errors] == [field] and said in refused.errors[0].message


@pytest.mark.parametrize(
    "sampler, schedule, wanted",
    [
        ("DPM++ 2M SDE", "Exponential", "exponential"),
        ("DPM++ 2M", "Beta", "beta"),
        ("Euler", "SGM Uniform", "sgm_uniform"),
        ("Euler", "Align Your Steps", "ays"),
        ("DPM++ 2M SDE", "Automatic", "exponential"),
    ],
)
def test_noise_schedules_of_other_programs_are_restored(
    service: DiffusionService, sampler: str, schedule: str, wanted: str
) -> None:
    settings = f"Steps: 10, Sampler: {sampler}, Schedule type: {schedule}, CFG scale: 2, Seed: 3, Size: 128x128"
    restored = service.restore(parameters=f"a red circle\n{settings}, Model: shapes-sd15").restored
    assert restored.request["sigma_schedule"] == wanted
    assert not restored.lost
    assert service.plan(restored.request).ok


SIGMAS = [14.6, 7.0, 3.0, 1.5, 0.8, 0.4, 0.1]
TIMESTEPS = [999, 850, 700, 500, 300, 100]
LISTED = [
    ("euler", {"sigmas": SIGMAS}),
    pytest.param("heun", {"sigmas": SIGMAS}, marks=pytest.mark.slow),
    ("lms", {"sigmas": SIGMAS}),
    ("unipc", {"sigmas": [*SIGMAS, 0]}),
    ("dpmpp_3m_sde", {"sigmas": SIGMAS}),
    ("euler", {"timesteps": TIMESTEPS}),
    pytest.param("heun", {"timesteps": TIMESTEPS}, marks=pytest.mark.slow),
    ("dpmpp_2m", {"timesteps": TIMESTEPS}),
    ("tcd", {"timesteps": TIMESTEPS}),
    ("flow_match_euler", {"sigmas": [1, 0.8, 0.6, 0.4, 0.2]}),
]


@pytest.mark.parametrize("scheduler, fields", LISTED)
def test_custom_sigmas_and_timesteps_generate_and_are_restored(
    service: DiffusionService, scheduler: str, fields: dict
) -> None:
    prompt = "a large red circle in the center on a white background"
    model = "shapes-flux" if scheduler == "flow_match_euler" else "shapes-sd15"
    result = service.generate(prompt, model=model, seed=3, scheduler=scheduler, **fields)
    assert matches(read_scene(result.image), SCENE)
    plan = result.generation.plan
    assert plan.num_inference_steps == sum(level > 0 for level in next(iter(fields.values())))
    restored = service.restore(result.image).restored.request
    again = service.generate(restored)
    assert again.generation.plan == plan and again.image.tobytes() == result.image.tobytes()
    line = service.restore(parameters=parameters_line(plan)).restored
    assert service.plan(line.request).plan.scheduler == plan.scheduler, line.lost


def given_options(name: SchedulerName) -> PlannedScheduler:
    return PlannedScheduler(name=name, class_name=SCHEDULERS[name][0], options=SCHEDULERS[name][1])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name in FAMILIES["sd15"].schedulers])
def test_schedulers_use_custom_sigmas_and_timesteps(name: SchedulerName) -> None:
    facts, own = SCHEDULER_FACTS[name], EulerDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    takes = inspect.signature(getattr(diffusers, facts.class_name).set_timesteps).parameters
    assert facts.takes_timesteps == ("timesteps" in takes)
    if facts.takes_sigmas:
        scheduler = make_scheduler(own, given_options(name).model_copy(update={"sigmas": SIGMAS}))
        scheduler.set_timesteps(len(SIGMAS))
        found = list(dict.fromkeys(scheduler.sigmas.tolist()))  # second-order methods repeat them
        assert found == pytest.approx([*SIGMAS, 0.0], rel=1e-6)
    if facts.takes_timesteps:
        scheduler = make_scheduler(own, given_options(name).model_copy(update={"timesteps": TIMESTEPS}))
        scheduler.set_timesteps(len(TIMESTEPS))
        assert list(dict.fromkeys(scheduler.timesteps.tolist())) == TIMESTEPS


@pytest.mark.parametrize(
    "fields, field, said",
    [
        ({"scheduler": "ddim", "sigmas": [3, 1]}, "sigmas", "ddim takes no sigmas"),
        ({"scheduler": "deis", "sigmas": [3, 1]}, "sigmas", "deis takes no sigmas"),
        ({"scheduler": "unipc", "timesteps": [999, 5]}, "timesteps", "unipc takes no timesteps"),
        ({"scheduler": "euler", "sigmas": [3, 4]}, "sigmas[1]", "must fall"),
        ({"scheduler": "euler", "timesteps": [5, 5]}, "timesteps[1]", "must fall"),
        ({"scheduler": "euler", "sigmas": [3, 0, 0]}, "sigmas[1]", "only the last"),
        ({"scheduler": "euler", "sigmas": [0]}, "sigmas", "no noise level above 0"),
        ({"scheduler": "euler", "sigmas": [3, -1]}, "sigmas[1]", "greater than or equal to 0"),
        ({"scheduler": "euler", "timesteps": [1000]}, "timesteps[0]", "less than or equal to 999"),
        ({"scheduler": "euler", "sigmas": [3, 1], "num_inference_steps": 3}, "num_inference_steps", "2 steps"),
        ({"scheduler": "euler", "sigmas": [3, 1], "timesteps": [5, 2]}, "sigmas", "are mutually exclusive"),
        ({"scheduler": "euler", "sigmas": [3, 1], "sigma_schedule": "beta"}, "sigmas", "are mutually exclusive"),
        (
            {"scheduler": "euler", "timesteps": [5], "timestep_spacing": "leading"},
            "timesteps",
            "are mutually exclusive",
        ),
        ({"scheduler": "euler", "timesteps": [5], "use_karras_sigmas": True}, "timesteps", "are mutually exclusive"),
        ({"model": "shapes-flux", "scheduler": "flow_match_euler", "sigmas": [2, 1]}, "sigmas[0]", "at most 1"),
        ({"model": "shapes-flux", "timesteps": [999]}, "timesteps", "has no use for timesteps"),
    ],
)
def test_invalid_custom_sigmas_and_timesteps_are_rejected(
    service: DiffusionService, fields: dict, field: str, said: str
) -> None:
    refused = service.plan(prompt="a red circle", **fields)
    assert refused.errors[0].field == field and said in refused.errors[0].message, refused.errors


def test_custom_sigmas_override_steps_of_profile_and_manifest(service: DiffusionService) -> None:
    plan = service.plan(prompt="a red circle", scheduler="euler", sigmas=SIGMAS, profile="fast").plan
    assert (plan.num_inference_steps, plan.scheduler.sigmas) == (7, SIGMAS)


# Sampler names of AUTOMATIC1111, ComfyUI and InvokeAI; None: no equivalent in diffusers
FOREIGN = {
    "Euler": "euler", "Euler a": "euler_ancestral", "Heun": "heun", "DPM2": "kdpm2", "DPM2 a": "kdpm2_ancestral",
    "LMS": "lms", "DDIM": "ddim", "PLMS": "pndm", "UniPC": "unipc", "LCM": "lcm", "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde", "DPM++ 3M SDE": "dpmpp_3m_sde", "DPM++ 2S": "dpmpp_singlestep", "DEIS": "deis",
    "DPM++ SDE": None, "DPM++ 2S a": None, "DPM++ 2M SDE Heun": None, "DPM fast": None, "DPM adaptive": None,
    "Restart": None, "DDIM CFG++": None,
    "euler_ancestral": "euler_ancestral", "dpm_2": "kdpm2", "dpm_2_ancestral": "kdpm2_ancestral",
    "dpmpp_2m": "dpmpp_2m", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde", "dpmpp_3m_sde": "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "ddpm": "ddpm", "deis": "deis", "uni_pc": "unipc", "uni_pc_bh2": "unipc", "sa_solver": "sa_solver",
    "dpmpp_sde": None, "dpmpp_2s_ancestral": None, "heunpp2": None, "ipndm": None, "ipndm_v": None,
    "res_multistep": None, "gradient_estimation": None, "er_sde": None, "seeds_2": None, "euler_cfg_pp": None,
    "sa_solver_pece": None,
    "euler_k": "euler", "euler_a": "euler_ancestral", "heun_k": "heun", "lms_k": "lms", "kdpm_2": "kdpm2",
    "kdpm_2_a_k": "kdpm2_ancestral", "dpmpp_2s": "dpmpp_singlestep", "dpmpp_2m_k": "dpmpp_2m", "dpmpp_3m": "dpmpp_3m",
    "dpmpp_3m_k": "dpmpp_3m", "dpmpp_2m_sde_k": "dpmpp_2m_sde", "unipc_k": "unipc", "tcd": "tcd", "deis_k": "deis",
    "dpmpp_sde_k": None,
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_samplers_of_other_programs_are_mapped_or_reported_lost(service: DiffusionService, name: str) -> None:
    settings = f"Steps: 10, Sampler: {name}, CFG scale: 2, Seed: 3, Size: 128x128, Model: shapes-sd15"
    restored = service.restore(parameters=f"a red circle\n{settings}").restored
    assert restored.request.get("scheduler") == FOREIGN[name]
    lost = [(note.name, note.given) for note in restored.lost or ()]
    assert lost[:1] == ([] if FOREIGN[name] else [("Sampler", name)])
