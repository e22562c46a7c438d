"""Drives a server on this machine with many clients at once, and prints what happened as JSON.

    python tests/load_server.py [--clients 32] [--requests 4] [--url http://127.0.0.1:8000]

Without --url it starts a server of its own. It sends clients x requests generations at most, and then ends. Every
second request goes through /generate, the others through /jobs, whose responses say when a request was taken and when
it was done: a request that was sent after another one had been taken has to be done after it.
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
    "Sends its requests one after another, and notes what came back."
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        start.wait()
        for i in range(requests):
            request, sent = SMALL | {"seed": number * 1000 + i}, time.monotonic()
            row = {"client": number, "sent": sent}
            if (number + i) % 2:
                answer = client.post("/generate", json=request)
                row |= {
                    "status": answer.json()["status"],
                    "seed": answer.json()["generation"]["images"][0]["seed"] if answer.status_code == 200 else None,
                }
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
    "All clients at once."
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
    "Pairs of which the one that was surely second was done first."
    jobs = [row for row in rows if "taken" in row]
    return sum(a["taken"] < b["sent"] and a["finished_at"] > b["finished_at"] for a in jobs for b in jobs)


def figures(url: str, clients: int, requests: int) -> dict:
    "Two rounds: the first one fills caches, memory is compared after it and after the second."
    memory = lambda: httpx.get(f"{url}/memory-info", timeout=PATIENCE).json()["process_bytes"]
    warm = round_of(url, clients, 1)
    before, began = memory(), time.monotonic()
    rows = round_of(url, clients, requests)
    took, after = time.monotonic() - began, memory()
    seconds = sorted(row["seconds"] for row in rows)
    return {
        "clients": clients, "requests": len(rows), "expected": clients * requests,
        "answered": sum(row["status"] == "success" for row in rows + warm) - len(warm),
        "right_seed": sum(row["seed"] == row["wanted"] for row in rows), "out_of_order": out_of_order(rows),
        "seconds": round(took, 1), "requests_per_second": round(len(rows) / took, 1),
        "median_seconds": round(seconds[len(seconds) // 2], 2), "slowest_seconds": round(seconds[-1], 2),
        "process_mb_before": before // 10**6, "process_mb_after": after // 10**6,
    }  # fmt: skip


@contextmanager
def server(url: str | None):
    "The server that is named, or one of our own."
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
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--url", help="a server on this machine")
    arguments = parser.parse_args()
    with server(arguments.url) as url:
        print(json.dumps(figures(url, arguments.clients, arguments.requests), indent=2))


if __name__ == "__main__":
    main()
