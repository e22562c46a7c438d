"""The worker as RunPod runs it: RunPod's SDK in a separate process, with a local stand-in for the queue."""

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from project import ROOT
from runpod_queue import ENDPOINT, PATIENCE, QueuedJob, QueueServer, running_worker, worker_environment

from diffusion_workers.pipeline.tiny_models import write_tiny_model
from ez_diffusion_client import Client, RunPod, pil_images
from ez_diffusion_client.errors import NotFound
from ez_diffusion_client.models import ModelFamily, OpResult

QUICK = {"prompt": "a red circle on a white background", "seed": 1, "num_inference_steps": 2}
LONG = {"prompt": "a red circle on a white background", "seed": 1, "num_inference_steps": 150, "num_images": 8}
ENDLESS = {**LONG, "num_images": 32}  # 600 steps in total
TRACEBACK = "Traceback (most recent call last)"
SAMPLES = sorted((ROOT / "diffusion_workers" / "test_inputs").glob("*.json"))


def images_of(output: dict) -> list[Image.Image]:
    "The images of a job's output."
    return pil_images(OpResult.model_validate(output))


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def failure_of(job: QueuedJob) -> OpResult:
    "The result in the error of a failed job."
    assert job.status == "FAILED"
    return OpResult.model_validate_json(job.error)


# --- a worker with concurrency ----------------------------------------------


@pytest.fixture(scope="module")
def queue() -> Iterator[QueueServer]:
    with QueueServer() as server:
        yield server


@pytest.fixture(scope="module")
def worker(queue: QueueServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen, Path]]:
    "A worker with a concurrency of four and a tiny instruction-based editing model, and its log."
    log, models = tmp_path_factory.mktemp("worker") / "log.txt", tmp_path_factory.mktemp("models")
    write_tiny_model(models, ModelFamily.flux2)
    own = {"DIFFUSION_WORKERS_CONCURRENCY": "4", "DIFFUSION_WORKERS_PROGRESS_SECONDS": "0.1"}
    with running_worker(queue, "first", log, DIFFUSION_WORKERS_MODELS=str(models), **own) as process:
        yield process, log


def test_generation_health_memory_and_plan_jobs(queue: QueueServer, worker) -> None:
    "The image has its plan; health reports the seconds of each startup phase; the log names the job."
    made, health, memory, plan = queue.answers(QUICK, {"op": "health"}, {"op": "memory_info"}, {"op": "plan", **QUICK})
    assert [job.status for job in (made, health, memory, plan)] == ["COMPLETED"] * 4
    result = OpResult.model_validate(made.output)
    assert (result.status.value, result.request_id, result.generation.plan.seeds, pil_images(result)[0].size) == (
        "success",
        made.id,
        [1],
        (128, 128),
    )
    assert (
        plan.output["plan"]["prompt"] == QUICK["prompt"]
        and memory.output["memory"]["models"][0]["model"] == "shapes-sd15"
    )
    phases = {phase["phase"]: phase["seconds"] for phase in health.output["health"]["startup"]}
    assert (
        list(phases) == ["interpreter", "imports", "runpod", "device", "weights", "first_image"]
        and min(phases.values()) >= 0
    )
    assert health.output["health"]["state"] == "ready"
    log = worker[1].read_text()
    assert f"job {made.id}: success" in log and all(f"start-up: {phase}" in log for phase in phases)
    queue.until(lambda: any(ping.get("runpod_version") for ping in queue.pings), "a ping")


@pytest.mark.parametrize("given, status, field", [
    ({"prompt": ""}, "invalid_request", "prompt"),
    ({**QUICK, "wdith": 64}, "invalid_request", "wdith"),
    ({**QUICK, "width": 100}, "invalid_request", "width"),
    ({**QUICK, "model": "nothing"}, "unknown_model", "model"),
    ({**QUICK, "image": "/etc/passwd"}, "bad_image", "image"),
    ({**QUICK, "image": "http://127.0.0.1/a.png"}, "bad_image", "image"),
    ({"op": "dance"}, "invalid_request", "op"),
    ({"op": "preprocess", "image": "x", "preprocessing": {"name": "canny"}}, "bad_image", "image"),
    ([1, 2], "invalid_request", "input"),
    ("a red circle", "invalid_request", "input"),
])  # fmt: skip
def test_invalid_input_errors_name_the_field(queue: QueueServer, worker, given, status: str, field: str) -> None:
    "RunPod gets a failed job with a typed error and without information about the machine."
    job = queue.answers(given)[0]
    result = failure_of(job)
    assert (result.status.value, result.errors[0].field) == (status, field)
    assert not any(word in job.error for word in (TRACEBACK, str(ROOT), socket.gethostname(), "site-packages")), (
        job.error
    )
    assert not job.stop_pod


def test_progress_updates_have_steps_time_left_and_previews(queue: QueueServer, worker) -> None:
    "Updates report the progress, and the final output is still the result."
    job = queue.answers({**LONG, "num_images": 2, "num_inference_steps": 60})[0]
    steps = [update for update in job.updates if update["phase"] == "denoise"]
    assert job.status == "COMPLETED" and len(job.output["generation"]["images"]) == 2
    assert steps and all(update["total_steps"] == 60 and update["seconds_left"] >= 0 for update in steps)
    assert [update["step"] for update in steps] == sorted({update["step"] for update in steps})
    previews = [update["preview"] for update in steps if "preview" in update]
    assert previews and max(Image.open(io.BytesIO(base64.b64decode(previews[0]))).size) <= 384


def test_edit_respects_the_order_of_reference_images(queue: QueueServer, worker) -> None:
    "The plan has their sizes, the order changes the image, and unsupported fields are rejected."
    images = []
    for color, side in (("red", 64), ("blue", 80)):
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), color).save(buffer, "PNG")
        images.append(base64.b64encode(buffer.getvalue()).decode())
    edit = {**QUICK, "model": "flux2", "width": 64, "height": 64, "reference_images": images}
    made, turned, refused = queue.answers(
        edit, {**edit, "reference_images": images[::-1]}, {**edit, "negative_prompt": "blurry"}
    )
    plan = OpResult.model_validate(made.output).generation.plan
    assert (plan.task.value, [image.width for image in plan.reference_images]) == ("edit", [64, 80])
    assert difference(images_of(made.output)[0], images_of(turned.output)[0]) > 0
    assert [error.field for error in failure_of(refused).errors] == ["negative_prompt"]


def test_compatible_jobs_share_a_batch(queue: QueueServer, worker) -> None:
    "Jobs queued behind a long one are batched, and each gets the same image as in a separate job."
    prompts = [
        "a red circle on a white background",
        "a blue square on a white background",
        "a green star on a black background",
    ]
    asked = [{"prompt": prompt, "seed": seed, "num_inference_steps": 6} for seed, prompt in enumerate(prompts)]
    jobs = queue.answers({**LONG, "num_inference_steps": 60}, *asked)
    shared = [job.output for job in jobs[1:]]
    assert sum("batched with" in note["message"] for output in shared for note in output.get("warnings", [])) >= 2
    for output, given in zip(shared, asked):
        alone = queue.answers(given)[0].output
        assert alone.get("warnings") is None
        assert difference(images_of(output)[0], images_of(alone)[0]) <= 2


def test_cancelled_job_frees_the_worker(queue: QueueServer, worker) -> None:
    "A job cancelled while running has no output, the next job completes, and the queue is empty."
    endless = queue.submit(ENDLESS)
    queue.until(lambda: any(update.get("step") for update in queue.jobs[endless].updates), "the first step")
    queue.stop(endless)
    assert queue.answers(QUICK)[0].status == "COMPLETED"
    job = queue.jobs[endless]
    assert (job.status, job.output) == ("CANCELLED", None)
    assert max(update.get("step") or 0 for update in job.updates) < 600  # those after the cancellation too
    health = queue.answers({"op": "health"})[0].output["health"]
    assert health["queue_length"] == 0


def test_timed_out_job_names_timeout_seconds(queue: QueueServer, worker) -> None:
    result = failure_of(queue.answers({**LONG, "num_images": 32, "timeout_seconds": 0.3})[0])
    assert (result.status.value, result.errors[0].field) == ("timed_out", "timeout_seconds")


def test_worker_sdxl_requests_are_supported(queue: QueueServer, worker) -> None:
    "Input, output and errors follow the schema of RunPod's worker-sdxl."
    old = {
        "prompt": "a red circle",
        "scheduler": "K_EULER",
        "num_inference_steps": 4,
        "seed": 3,
        "num_images": 2,
        "image_url": None,
    }
    made, refused = queue.answers(old, {**old, "high_noise_frac": 7, "image_url": "nothing"})
    assert set(made.output) == {"images", "image_url", "seed"} and made.output["seed"] == 3
    assert len(made.output["images"]) == 2 and made.output["image_url"].startswith("data:image/png;base64,")
    assert refused.status == "FAILED" and refused.error.startswith("image_url:")


def test_python_client_works_with_the_endpoint(queue: QueueServer, worker) -> None:
    "The same calls as for a server: an image, a typed error, a job with events, a cancelled and an unknown job."
    with Client(RunPod(ENDPOINT, api_key="stand-in", url=queue.url)) as client:
        made = client.generate(QUICK)
        assert made.status.value == "success" and made.generation.plan.seeds == [1]
        refused = client.generate(prompt="a", model="nothing")
        assert (refused.status.value, refused.errors[0].field) == ("unknown_model", "model")
        job = client.submit(QUICK)
        assert [event.result.status.value for event in client.events(job.id) if event.result] == ["success"]
        endless = client.submit(ENDLESS)
        queue.until(lambda: queue.jobs[endless.id].updates, "the first update")
        assert client.cancel(endless.id).state.value == "cancelled"
        with pytest.raises(NotFound):
            client.job("nobody")


def noise_png(side: int) -> str:
    "A barely compressible noise image as base64."
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_output_over_10_mb_is_reencoded_for_run(queue: QueueServer, worker) -> None:
    "Without a bucket, output too large for /run is re-encoded with a warning; /runsync returns it unchanged."
    asked = {
        "op": "preprocess",
        "image": noise_png(768),
        "preprocessing": {"name": "tile"},
        "width": 2048,
        "height": 2048,
    }
    small = queue.answers(asked)[0]
    whole = queue.ended(queue.submit(asked, sync=True))
    assert small.status == whole.status == "COMPLETED"
    assert small.answer_bytes < 10_000_000 < whole.answer_bytes < 20_000_000
    assert "re-encoded" in small.output["warnings"][0]["message"] and "warnings" not in whole.output
    control_map = Image.open(io.BytesIO(base64.b64decode(small.output["control_map"]["image"])))
    assert control_map.size == (small.output["control_map"]["width"], small.output["control_map"]["height"])


@pytest.mark.parametrize("route, faults", [
    ("take_batch", [429]), ("take_batch", [500, 500]), ("take_batch", ["drop", "drop"]), ("take_batch", [2.0]),
    ("done", [500]), ("done", ["drop"]), ("done", [1.5]), ("stop", [500, "drop"]),
], ids=str)  # fmt: skip
def test_queue_errors_lose_no_jobs(queue: QueueServer, worker, route: str, faults: list) -> None:
    "429, 500, dropped connections and slow responses while taking jobs, sending results and polling for cancellation."
    queue.met[route] = 0
    queue.faults[route].extend(faults)
    jobs = queue.answers(QUICK, {**QUICK, "seed": 2})
    assert [job.status for job in jobs] == ["COMPLETED"] * 2
    queue.until(lambda: queue.met[route] >= len(faults), "the faults")
    assert [len(job.taken) for job in jobs] == [1, 1]


def memory_over(queue: QueueServer, process: subprocess.Popen, count: int, settle: int) -> list[int]:
    "Resident memory in bytes after each of `count` jobs, following `settle` warm-up jobs."
    resident = []
    for seed in range(settle + count):
        assert queue.answers({**QUICK, "seed": seed})[0].status == "COMPLETED"
        resident.append(psutil.Process(process.pid).memory_info().rss)
    return resident[settle:]


def test_memory_is_stable_over_jobs(queue: QueueServer, worker) -> None:
    "Detect large leaks; one image (49 KB) leaked per job would show in the longer test."
    resident = memory_over(queue, worker[0], 20, settle=5)
    assert max(resident) - resident[0] < 32 * 2**20


@pytest.mark.slow
def test_memory_is_stable_over_200_jobs(queue: QueueServer, worker) -> None:
    "The median of the second half is not larger than that of the first, within allocator noise."
    resident = memory_over(queue, worker[0], 200, settle=20)
    assert np.median(resident[100:]) - np.median(resident[:100]) < 8 * 2**20


def test_sigterm_completes_taken_jobs(quick_python: tuple[str, ...], tmp_path: Path) -> None:
    "Both concurrent jobs complete, then the process exits with status 0."
    log, more = (
        tmp_path / "log.txt",
        {"DIFFUSION_WORKERS_CONCURRENCY": "2", "DIFFUSION_WORKERS_PROGRESS_SECONDS": "0.1"},
    )
    with QueueServer() as queue, running_worker(queue, "fourth", log, quick_python, **more) as process:
        jobs = [queue.submit({**LONG, "num_images": 2}), queue.submit({**QUICK, "seed": 5})]
        queue.until(lambda: any(update.get("step") for update in queue.jobs[jobs[0]].updates), "the first step")
        queue.until(lambda: queue.jobs[jobs[1]].taken, "the second job was taken")
        process.send_signal(signal.SIGTERM)
        assert [queue.ended(job).status for job in jobs] == ["COMPLETED"] * 2
        assert process.wait(PATIENCE) == 0, log.read_text()


# --- a worker that streams, with a bucket -----------------------------------


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    "A local S3 server in a separate process; yields the environment variables for its bucket."
    import boto3

    port, log = free_port(), tmp_path_factory.mktemp("store") / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        keys = {"aws_access_key_id": "known", "aws_secret_access_key": "hidden-key", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket="images")
        yield {
            "BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "BUCKET_NAME": "images",
            "BUCKET_ACCESS_KEY_ID": "known",
            "BUCKET_SECRET_ACCESS_KEY": "hidden-key",
        }
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def streaming(
    store: dict[str, str], quick_python: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[QueueServer, Path]]:
    "A queue with a streaming worker, and the worker's log."
    log = tmp_path_factory.mktemp("streaming") / "log.txt"
    more = {
        "DIFFUSION_WORKERS_STREAM": "1",
        "DIFFUSION_WORKERS_PROGRESS_SECONDS": "0.05",
        "DIFFUSION_WORKERS_UPLOAD_ALL": "1",
    }
    with QueueServer() as queue, running_worker(queue, "second", log, quick_python, **more, **store):
        yield queue, log


def test_streaming_uploads_the_image_to_a_bucket(streaming) -> None:
    "Previews are stream items, the last item is the result with a link to the bucket, and the output has all items."
    queue, log = streaming
    job = queue.answers({**LONG, "num_images": 1, "num_inference_steps": 60})[0]
    assert job.status == "COMPLETED" and job.output == job.streamed
    *events, last = job.streamed
    assert {event["phase"] for event in events} >= {"denoise"} and any("preview" in event for event in events)
    link = last["result"]["generation"]["images"][0]["image"]
    with urllib.request.urlopen(link) as answer:
        data = answer.read()
    assert Image.open(io.BytesIO(data)).size == (128, 128)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(link.split("?")[0] + ".other")
    assert "hidden-key" not in log.read_text() + json.dumps(job.output)


def test_python_client_follows_a_stream(streaming) -> None:
    queue, _ = streaming
    events = []
    with Client(RunPod(ENDPOINT, api_key="stand-in", url=queue.url)) as client:
        result = client.generate({**LONG, "num_images": 1, "num_inference_steps": 60}, on_progress=events.append)
    assert result.status.value == "success" and result.generation.images[0].image.startswith("http://127.0.0.1")
    assert [event.step for event in events if event.phase.value == "denoise"] and any(event.preview for event in events)


def test_failed_stream_is_a_failed_job(streaming) -> None:
    queue, _ = streaming
    assert failure_of(queue.answers({"prompt": ""})[0]).errors[0].code.value == "empty_prompt"


def test_cancelled_stream_frees_the_worker(streaming) -> None:
    queue, _ = streaming
    endless = queue.submit(ENDLESS)
    queue.until(lambda: queue.jobs[endless].streamed, "the first item")
    queue.stop(endless)
    assert queue.answers(QUICK)[0].status == "COMPLETED"


# --- failed startup, and local runs -----------------------------------------


def run_handler(
    *arguments: str,
    cwd: Path,
    python: Sequence[str] = (sys.executable,),  # the Python command
    **more: str,  # additional environment variables
) -> subprocess.CompletedProcess:
    "Run a worker process to completion and capture its output."
    command = [*python, "-m", "diffusion_workers.handler", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=worker_environment(**more), capture_output=True, text=True, timeout=PATIENCE
    )


def test_unloadable_model_aborts_startup(quick_python: tuple[str, ...], tmp_path: Path) -> None:
    "One unhealthy ping, one error line without a traceback, exit status 1, and no job is taken."
    (tmp_path / "mine.yaml").write_text("family: sd15\nsource: {folder: not-there}\n")
    with QueueServer() as queue:
        job = queue.submit(QUICK)
        more = queue.environment("third") | {
            "DIFFUSION_WORKERS_MODELS": str(tmp_path),
            "DIFFUSION_WORKERS_DEFAULT_MODEL": "mine",
        }
        done = run_handler(cwd=tmp_path, python=quick_python, **more)
        said = done.stdout + done.stderr
        assert done.returncode == 1 and queue.jobs[job].taken == [], said
        assert [ping["status"] for ping in queue.pings] == ["unhealthy"] and "folder:not-there" in queue.pings[0][
            "reason"
        ]
        assert TRACEBACK not in said and sum("Fitness check failed" in line for line in said.splitlines()) == 1


def test_invalid_setting_aborts_startup(tmp_path: Path) -> None:
    done = run_handler(cwd=tmp_path, DIFFUSION_WORKERS_CONCURRENCY="many")
    assert done.returncode == 2 and done.stderr.startswith(
        "diffusion-workers: DIFFUSION_WORKERS_CONCURRENCY: given 'many'"
    )


def test_sample_inputs_exist() -> None:
    assert len(SAMPLES) >= 5


@pytest.fixture(scope="module")
def local_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "The URL of a worker that serves RunPod's local API."
    port, log = free_port(), tmp_path_factory.mktemp("api") / "log.txt"
    with log.open("w") as file:
        command = [
            sys.executable,
            "-m",
            "diffusion_workers.handler",
            "--rp_serve_api",
            "--rp_api_host",
            "127.0.0.1",
            "--rp_api_port",
            str(port),
        ]
        process = subprocess.Popen(command, env=worker_environment(), stdout=file, stderr=file, cwd=log.parent)
    try:
        deadline = time.monotonic() + PATIENCE
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def sample_input(path: Path) -> dict:
    "The input of a sample file, which may be a request or a complete job."
    given = json.loads(path.read_text())
    return given.get("input", given)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_local_api_runs_every_sample(local_api: str, path: Path) -> None:
    body = json.dumps({"input": sample_input(path)}).encode()
    asked = urllib.request.Request(f"{local_api}/runsync", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
        told = json.loads(answer.read())
    assert told["status"] == "COMPLETED", told
    assert images_of(told["output"])


HUB_TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text())["tests"]


@pytest.mark.parametrize("test", HUB_TESTS, ids=lambda test: test["name"])
def test_runpod_hub_tests_pass(local_api: str, test: dict) -> None:
    body = json.dumps({"input": test["input"]}).encode()
    asked = urllib.request.Request(f"{local_api}/runsync", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
        assert json.loads(answer.read())["status"] == "COMPLETED"


def local_run(path: Path, cwd: Path, as_file: bool) -> None:
    "Run a sample with --test_input or as test_input.json."
    job = json.dumps({"input": sample_input(path)})
    if as_file:
        (cwd / "test_input.json").write_text(job)
    done = run_handler(*(() if as_file else ("--test_input", job)), cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "completed successfully" in done.stdout


@pytest.mark.slow  # the same with a file is tested below
def test_test_input_option_runs_a_sample(tmp_path: Path) -> None:
    local_run(SAMPLES[0], tmp_path, as_file=False)


def test_test_input_file_runs_a_sample(tmp_path: Path) -> None:
    local_run(SAMPLES[-1], tmp_path, as_file=True)


def test_failed_test_input_exits_with_status_1(quick_python: tuple[str, ...], tmp_path: Path) -> None:
    "An unknown operation is reported as an error."
    done = run_handler("--test_input", json.dumps({"input": {"op": "dance"}}), cwd=tmp_path, python=quick_python)
    assert done.returncode == 1 and "there is no such operation" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("as_file", [False, True], ids=["test_input", "test_input.json"])
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_every_sample_runs_locally(path: Path, as_file: bool, tmp_path: Path) -> None:
    local_run(path, tmp_path, as_file)


# --- the command line -------------------------------------------------------


def test_check_config_lists_effective_settings(tmp_path: Path) -> None:
    "Secrets are not shown; an incomplete bucket configuration exits with status 2."
    command = [str(Path(sys.executable).parent / "diffusion-workers"), "worker", "--check-config"]
    more = {
        "BUCKET_ENDPOINT_URL": "https://store.example.org",
        "BUCKET_NAME": "images",
        "BUCKET_ACCESS_KEY_ID": "known",
        "BUCKET_SECRET_ACCESS_KEY": "hidden-key",
    }
    done = subprocess.run(
        command, env=worker_environment(**more), cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0 and "hidden-key" not in done.stdout, done.stderr
    assert re.search(r"^BUCKET_NAME +images +environment$", done.stdout, re.MULTILINE)
    assert re.search(r"^DIFFUSION_WORKERS_CONCURRENCY +1 +default$", done.stdout, re.MULTILINE)
    done = subprocess.run(
        command,
        env=worker_environment(BUCKET_NAME="images"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2 and "BUCKET_ENDPOINT_URL" in done.stderr


def modules_after(code: str, tmp_path: Path) -> set[str]:
    "The modules that a new process has imported after running some code."
    code += "\nimport sys\nprint(*sys.modules, sep=chr(10))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=worker_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_startup_imports_torch_and_diffusers_before_the_service_starts(tmp_path: Path) -> None:
    code = """
from diffusion_workers.settings.worker import WorkerSettings
from diffusion_workers.worker.startup import StartupClock, import_sdk
clock = StartupClock()
import_sdk(WorkerSettings(device="cpu"), clock)
"""
    assert {"torch", "diffusers", "runpod", "diffusion_workers.service.service"} <= modules_after(code, tmp_path)


def test_check_config_does_not_import_torch(tmp_path: Path) -> None:
    code = 'from diffusion_workers.cli.main import main\nassert main(["worker", "--check-config"]) == 0'
    found = modules_after(code, tmp_path)
    assert "diffusion_workers.settings.worker" in found and "torch" not in found
