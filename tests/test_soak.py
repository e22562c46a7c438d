"""Soak tests with mixed and hostile requests; a short version always runs, 10,000 requests are marked slow."""

from collections.abc import Iterator

import hostile_bodies
import pytest
import soak_server
from live_server import live_server

from diffusion_workers.pipeline.tiny_models import write_tiny_model
from diffusion_workers.service.service import DiffusionService
from diffusion_workers.settings.service import Settings


def check_soak(found: dict, count: int) -> None:
    "Every request is answered without faults or 5xx, and the queue is empty at the end."
    assert not found["faults"], "\n".join(found["faults"][:20])
    assert found["requests"] == count == sum(found["by_status"].values())
    assert not [status for status in found["by_status"] if status >= 500 or status == 0]
    assert found["nothing_left_in_the_queue"]


def check_corpus(found: dict, count: int) -> None:
    "Every request is answered without faults, and the server generates the same image afterwards."
    assert not found["faults"], "\n".join(found["faults"][:20])
    assert found["requests"] == count == sum(found["by_status"].values())
    assert found["same_image_afterwards"]


def test_short_soak_with_mixed_requests(server: str) -> None:
    check_soak(soak_server.figures(server, 40), 40)


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder, "sd15", "tiny", changes=hostile_bodies.BOUNDS)
    settings = Settings(model_folders=(folder,), default_model="tiny")
    with DiffusionService(settings, device="cpu") as service, live_server(service) as (url, _):
        yield url


def test_short_soak_with_hostile_requests(bounded: str) -> None:
    check_corpus(hostile_bodies.figures(bounded, 150, seed=1), 150)


def test_hostile_corpus_is_deterministic_per_seed() -> None:
    first, again, other = (list(hostile_bodies.corpus(20, seed)) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.slow
def test_soak_with_ten_thousand_mixed_requests() -> None:
    "Process memory grows by less than 150 MB."
    with soak_server.soaked_server() as url:
        found = soak_server.figures(url, 10_000)
    check_soak(found, 10_000)
    assert found["process_mb_after"] < found["process_mb_before"] + 150, found


@pytest.mark.slow
def test_soak_with_ten_thousand_hostile_requests() -> None:
    with hostile_bodies.bounded_server() as url:
        found = hostile_bodies.figures(url, 10_000, seed=0)
    check_corpus(found, 10_000)
    memory = found["process_mb_after_each_thousand"]
    assert memory[-1] < memory[4] + 150, memory  # the first 5,000 requests fill caches and pools
