"""Soak test of a local server with mixed requests; prints the results as JSON.

    python tests/soak_server.py [--count 10000] [--clients 4] [--seed 0]

It starts a server in its own process with the built-in models. Images have 64 x 64 pixels and, unless they are
cancelled, one step. Every response is checked: the right status, the right seeds, and the same pixels as for an earlier
identical request.
"""

import argparse
import base64
import hashlib
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import httpx
from httpx_sse import connect_sse
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent))
PATIENCE = 600  # seconds until a request counts as lost
WINDOW = 1000  # requests at the beginning and at the end whose throughput is compared


def scene() -> str:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(220, 30, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


SCENE = scene()
CANNY = {"name": "canny"}
SMALL = {"model": "shapes-sd15", "num_inference_steps": 1, "width": 64, "height": 64}
PROMPTS = (
    "a red circle",
    "a blue square on a white background",
    "a green star\u2028and a line",
    "ein Kreis, 圆 👩‍👩‍👧",
)
EXTRAS: list[dict] = [
    {},
    {"guidance_scale": 1.0},
    {"negative_prompt": "blue", "scheduler": "euler"},
    {"num_images": 2},
    {"image": SCENE, "strength": 1.0},
    {"image": SCENE, "mask_image": SCENE, "strength": 1.0},
    {"loras": [{"name": "heart", "scale": 0.5}]},
    {"controlnets": [{"model": "canny", "image": SCENE, "preprocessing": CANNY}]},
    {"output": {"format": "webp"}},
    {"preview_interval": 1},
    {"memory": {"vae_tiling": True}},
]


class Wrong(Exception):
    "An unexpected response."


def expect(response: httpx.Response, *wanted: int) -> httpx.Response:
    if response.status_code not in wanted:
        raise Wrong(f"{response.request.method} {response.url.path}: {response.status_code} {response.text[:200]}")
    return response


class Soak:
    "State shared by the clients: the pixels of each request, which must always be the same."

    def __init__(self) -> None:
        self.lock = Lock()
        self.pixels: dict[str, str] = {}

    def check(self, body: dict, result: dict) -> None:
        "Check the seeds and the pixels of a successful result."
        images = result["generation"]["images"]
        wanted = [body["seed"] + index for index in range(body.get("num_images", 1))]
        if [image["seed"] for image in images] != wanted:
            raise Wrong(f"seeds {[image['seed'] for image in images]} instead of {wanted}")
        found = hashlib.sha256()
        for image in images:
            found.update(Image.open(io.BytesIO(base64.b64decode(image["image"]))).convert("RGB").tobytes())
        key = json.dumps({name: value for name, value in body.items() if name != "preview_interval"}, sort_keys=True)
        with self.lock:
            if self.pixels.setdefault(key, found.hexdigest()) != found.hexdigest():
                raise Wrong(f"other pixels than before for {key[:200]}")


def body_of(rng: random.Random) -> dict:
    return SMALL | {"prompt": rng.choice(PROMPTS), "seed": rng.randrange(3)} | rng.choice(EXTRAS)


def make(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    body = body_of(rng)
    response = expect(client.post("/generate", json=body), 200)
    soak.check(body, response.json())
    return response.status_code


def make_bytes(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    kind = rng.choice(["png", "jpeg", "webp"])
    response = expect(client.post("/generate", json=body_of(rng), headers={"Accept": f"image/{kind}"}), 200)
    if Image.open(io.BytesIO(response.content)).size != (64, 64):
        raise Wrong("an image of another size")
    return response.status_code


def poll(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    body = body_of(rng)
    job = expect(client.post("/jobs", json=body), 202).json()
    give_up = time.monotonic() + PATIENCE
    while job.get("result") is None:
        if time.monotonic() > give_up:
            raise Wrong("a job that does not end")
        time.sleep(0.05)
        job = expect(client.get(f"/jobs/{job['id']}"), 200).json()
    soak.check(body, job["result"])
    return 202


def stream(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    body = body_of(rng)
    job = expect(client.post("/jobs", json=body), 202).json()
    with connect_sse(client, "GET", f"/jobs/{job['id']}/events") as events:
        last = [json.loads(event.data) for event in events.iter_sse()][-1]
    if last["phase"] != "done":
        raise Wrong(f"the last phase is {last['phase']}")
    soak.check(body, expect(client.get(f"/jobs/{job['id']}"), 200).json()["result"])
    return 202


def cancel(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    body = body_of(rng) | {"num_inference_steps": 50}
    job = expect(client.post("/jobs", json=body), 202).json()
    time.sleep(rng.choice([0, 0.05]))
    expect(client.delete(f"/jobs/{job['id']}"), 200)
    give_up = time.monotonic() + PATIENCE
    while job.get("result") is None:
        if time.monotonic() > give_up:
            raise Wrong("a cancelled job that does not end")
        time.sleep(0.05)
        job = expect(client.get(f"/jobs/{job['id']}"), 200).json()
    if job["state"] != "cancelled":
        raise Wrong(f"a cancelled job is {job['state']}")
    return 202


def leave(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    "Disconnect during a generation, which must leave nothing in the queue."
    try:
        client.post("/generate", json=body_of(rng) | {"num_inference_steps": 50}, timeout=0.02)
    except httpx.TimeoutException:
        return 499
    raise Wrong("fifty steps in 20 ms")


def plan(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    return expect(client.post("/plan", json=body_of(rng)), 200).status_code


def preprocess(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    return expect(client.post("/preprocess", json={"image": SCENE, "preprocessing": CANNY}), 200).status_code


def restore(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    text = f"a\nSteps: {rng.randrange(1, 50)}, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"
    return expect(client.post("/restore", json={"parameters": text}), 200).status_code


def look(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    method = rng.choice(["GET", "GET", "HEAD"])
    paths = ["/health", "/ready", "/models", "/memory-info", "/metrics", "/docs", "/openapi.yaml", "/"]
    return expect(client.request(method, rng.choice(paths)), 200).status_code


INVALID = (
    {"prompt": 5}, {"prompt": "a", "seed": "x"}, {"prompt": "a", "sede": 1}, {"prompt": "a", "width": 63}, {},
    {"prompt": "a", "model": "none"}, {"prompt": "a", "image": "AAAA"}, {"prompt": "a", "loras": [{"name": "none"}]},
    {"prompt": "a", "scheduler": "none"}, {"prompt": "a", "image": "http://127.0.0.1:1/"},
)  # fmt: skip


def invalid(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    path = rng.choice(["/generate", "/jobs", "/plan"])
    return expect(client.post(path, json={"model": "shapes-sd15"} | rng.choice(INVALID)), 422).status_code


def missing(client: httpx.Client, rng: random.Random, soak: Soak) -> int:
    return expect(
        client.get(rng.choice(["/jobs/none", "/none", "/jobs/none/events", "/outputs/none"])), 404
    ).status_code


KINDS: dict[Callable[[httpx.Client, random.Random, Soak], int], int] = {  # with relative frequencies
    make: 12, make_bytes: 4, poll: 4, stream: 5, cancel: 2, leave: 2, plan: 24, preprocess: 4, restore: 8, look: 15,
    invalid: 15, missing: 5,
}  # fmt: skip


def one(client: httpx.Client, index: int, seed: int, soak: Soak) -> dict:
    "Send the request with an index: the same for the same seed."
    rng = random.Random(f"{seed}-{index}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    started = time.monotonic()
    row = {"kind": kind.__name__, "status": 0, "fault": None}
    try:
        row["status"] = kind(client, rng, soak)
    except Exception as exc:  # also a connection that is closed without an answer
        row["fault"] = f"{index} {kind.__name__}: {type(exc).__name__}: {exc}"
    ended = time.monotonic()
    return row | {"seconds": ended - started, "ended": ended}


def idle(client: httpx.Client) -> bool:
    "Whether the queue is empty, once abandoned jobs have ended."
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        lines = client.get("/metrics").text.splitlines()
        gauges = [
            line
            for line in lines
            if line.startswith(("diffusion_workers_jobs_waiting", "diffusion_workers_jobs_running"))
        ]
        if gauges and all(float(line.split()[-1]) == 0 for line in gauges):
            return True
        time.sleep(0.1)
    return False


def figures(url: str, count: int, clients: int = 4, seed: int = 0) -> dict:
    "Send `count` requests, `clients` of them at once."
    soak = Soak()
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        memory = lambda: client.get("/memory-info").json()["process_bytes"] // 10**6
        warm = min(count // 10, WINDOW // 10)  # fill the caches
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda index: one(client, index, seed + 1, soak), range(warm)))
            before = memory()
            began = time.monotonic()
            rows = list(pool.map(lambda index: one(client, index, seed, soak), range(count)))
        ended_idle = idle(client)
        after = memory()
    ends = sorted(row["ended"] for row in rows)
    window = min(WINDOW, count // 4)
    first, last = ends[window - 1] - began, ends[-1] - ends[-window - 1]
    faults = [row["fault"] for row in rows if row["fault"]]
    return {
        "requests": len(rows),
        "by_kind": dict(sorted(Counter(row["kind"] for row in rows).items())),
        "by_status": dict(sorted(Counter(row["status"] for row in rows).items())),
        "faults": faults,
        "nothing_left_in_the_queue": ended_idle,
        "process_mb_before": before,
        "process_mb_after": after,
        "seconds": round(ends[-1] - began),
        "slowest_seconds": round(max(row["seconds"] for row in rows), 2),
        "requests_per_second_at_the_beginning": round(window / first, 1),
        "requests_per_second_at_the_end": round(window / last, 1),
        "throughput_at_the_end_relative_to_the_beginning": round(first / last, 2),
    }


@contextmanager
def soaked_server() -> Iterator[str]:
    "A server in its own process that keeps few results, so that its memory shows leaks elsewhere."
    from server_process import running_server

    with running_server(DIFFUSION_WORKERS_KEEP_BYTES="16MB") as url:
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with soaked_server() as url:
        print(json.dumps(figures(url, arguments.count, arguments.clients, arguments.seed), indent=2))


if __name__ == "__main__":
    main()
