"""Claims of the how-to on proxies: clients follow the variables, public host names are listed, image URLs go direct."""

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import httpx
import pytest
from live_server import live_server
from PIL import Image

from diffusion_workers.request.images import ImagePolicy
from diffusion_workers.service.service import DiffusionService
from ez_diffusion_client.client import Client

PUBLIC = "http://diffusion.example.org"  # known only to the proxy
QUICK = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 1}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-encoding", "content-length", "proxy-connection"}


class ForwardProxy(ThreadingHTTPServer):
    "Forward every request to one server, with the client's Host header."

    def __init__(self, target: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.seen = target, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: ForwardProxy

    def _forward(self) -> None:
        self.server.seen.append(self.path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        parts = urlsplit(self.path)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        with httpx.Client(trust_env=False, timeout=300) as direct:
            answer = direct.request(self.command, self.server.target + path, content=body, headers=headers)
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("content-length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_DELETE = _forward

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def service() -> Iterator[DiffusionService]:
    with DiffusionService(device="cpu", log_failures=False) as made:
        yield made


@pytest.fixture
def proxied(service: DiffusionService, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForwardProxy]:
    "A server with a public name, a proxy before it, and an environment that names the proxy."
    with live_server(service, hosts=("diffusion.example.org", "127.0.0.1")) as (url, _), ForwardProxy(url) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("NO_PROXY", "no_proxy", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        yield proxy
        proxy.shutdown()


def test_a_client_reaches_a_server_through_a_proxy(proxied: ForwardProxy) -> None:
    with Client(PUBLIC) as client:
        result = client.generate(**QUICK)
    assert result.ok and result.generation.plan.seeds == [1]
    assert proxied.seen and all(path.startswith(PUBLIC) for path in proxied.seen)


def test_a_host_in_no_proxy_is_reached_directly(proxied: ForwardProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Client(proxied.target) as client:
        assert client.generate(**QUICK).ok
    assert proxied.seen == []


def test_unlisted_host_names_are_refused(service: DiffusionService) -> None:
    with live_server(service) as (url, _), httpx.Client(trust_env=False) as direct:
        refused = direct.get(f"{url}/models", headers={"host": "diffusion.example.org"})
    assert refused.status_code >= 400 and "DIFFUSION_WORKERS_HOSTS" in refused.text


class _ImageHost(BaseHTTPRequestHandler):
    "A host whose every path is the same image."

    def do_GET(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (128, 128), "red").save(buffer, "PNG")
        self.send_response(200)
        self.send_header("content-type", "image/png")
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, *args) -> None:
        pass


def test_allowed_image_hosts_are_reached_without_the_proxy(proxied: ForwardProxy) -> None:
    "A proxy could reach addresses of the internal network, which a request must not name (SSRF)."
    with ThreadingHTTPServer(("127.0.0.1", 0), _ImageHost) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        name = f"127.0.0.1:{host.server_address[1]}"
        policy = ImagePolicy(allowed_hosts=frozenset({name}))
        with DiffusionService(device="cpu", image_policy=policy, log_failures=False) as service:
            planned = service.plan(**QUICK, image=f"http://{name}/a.png", strength=0.5)
        host.shutdown()
    assert planned.ok and planned.plan.task == "image_to_image"
    assert proxied.seen == []


def test_internal_image_urls_are_refused_and_never_sent_to_the_proxy(
    proxied: ForwardProxy, service: DiffusionService
) -> None:
    result = service.generate(**QUICK, image=f"{proxied.target}/secret.png", strength=0.5)
    assert not result.ok and result.errors[0].field == "image"
    assert proxied.seen == []
