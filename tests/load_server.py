"""Load test of a local server with many clients at once; prints the results as JSON.

    python tests/load_server.py [--clients 32] [--requests 4] [--url http://127.0.0.1:8000]

Without --url it starts its own server. It sends at most clients x requests generations and then exits. Every second
request uses /generate, the others use /jobs, whose responses contain the times of acceptance and completion. A request
that was sent after another one was accepted must be completed after it.
"""

import argparse
import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent))
SMALL = {"prompt": "a red circle left of a blue square", "num_inference_steps": 2, "width": 64, "height": 64}
PATIENCE = 1800  # seconds until a request counts as lost


def one_client(url: str, requests: int, number: int, rows: list[dict], start: threading.Barrier) -> None:
    "Send requests one after another, and record the responses."
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        start.wait()
        for i in range(requests):
            request, sent = SMALL | {"seed": number * 1000 + i}, time.monotonic()
            row = {"client": number, "sent": sent}
            if (number + i) % 2:
                answer = client.post("/generate", json=request)
                row |= {"status": answer.json()["status"], "seed": None}
                if answer.status_code == 200:
                    row["seed"] = answer.json()["generation"]["images"][0]["seed"]
            else:
                job = client.post("/jobs", json=request).json()
                row |= {"taken": time.monotonic()}
                with client.stream("GET", f"/jobs/{job['id']}/events") as stream:
                    for _ in stream.iter_lines():
                        pass
                ended = client.get(f"/jobs/{job['id']}").json()
                row |= {
                    "status": ended["result"]["status"],
                    "seed": ended["result"]["generation"]["images"][0]["seed"],
                    "finished_at": ended["finished_at"],
                }
            rows.append(row | {"wanted": request["seed"], "seconds": time.monotonic() - sent})


def round_of(url: str, clients: int, requests: int) -> list[dict]:
    "Run all clients at once."
    rows: list[dict] = []
    start = threading.Barrier(clients)
    threads = [
        threading.Thread(target=one_client, args=(url, requests, number, rows, start)) for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows


def out_of_order(rows: list[dict]) -> int:
    "The number of job pairs in which one that was sent after the other was accepted finished first."
    jobs = [row for row in rows if "taken" in row]
    return sum(a["taken"] < b["sent"] and a["finished_at"] > b["finished_at"] for a in jobs for b in jobs)


def figures(url: str, clients: int, requests: int) -> dict:
    "Run two rounds: the first one fills caches; memory is measured after each."
    memory = lambda: httpx.get(f"{url}/memory-info", timeout=PATIENCE).json()["process_bytes"]
    warm = round_of(url, clients, 1)
    before = memory()
    began = time.monotonic()
    rows = round_of(url, clients, requests)
    took = time.monotonic() - began
    after = memory()
    seconds = sorted(row["seconds"] for row in rows)
    return {
        "clients": clients,
        "requests": len(rows),
        "expected": clients * requests,
        "answered": sum(row["status"] == "success" for row in rows + warm) - len(warm),
        "right_seed": sum(row["seed"] == row["wanted"] for row in rows),
        "out_of_order": out_of_order(rows),
        "seconds": round(took, 1),
        "requests_per_second": round(len(rows) / took, 1),
        "median_seconds": round(seconds[len(seconds) // 2], 2),
        "slowest_seconds": round(seconds[-1], 2),
        "process_mb_before": before // 10**6,
        "process_mb_after": after // 10**6,
    }


@contextmanager
def server(url: str | None):
    "The address of the given server, or of a new one."
    if url is not None:
        yield url
        return
    from live_server import live_server

    from diffusion_workers.service.service import DiffusionService

    with DiffusionService(device="cpu") as service, live_server(service) as (own, _):
        yield own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="requests per client")
    parser.add_argument("--url", help="address of a running local server")
    arguments = parser.parse_args()
    with server(arguments.url) as url:
        print(json.dumps(figures(url, arguments.clients, arguments.requests), indent=2))


if __name__ == "__main__":
    main()
