"""Bucket uploads for every form of endpoint URL: host, path and region of requests and presigned URLs."""

import base64
import io
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.awsrequest import AWSResponse
from urllib3 import HTTPResponse

from diffusion_workers.settings.environment import SettingsError
from diffusion_workers.settings.worker import WorkerSettings
from diffusion_workers.worker.delivery import Bucket

KEYS = {"BUCKET_ACCESS_KEY_ID": "known", "BUCKET_SECRET_ACCESS_KEY": "hidden"}
ACCOUNT = "0123456789abcdef0123456789abcdef"
KEY = "diffusion-workers/job/0.png"


def bucket_of(address: str, name: str | None = None, **variables: str) -> Bucket:
    given = KEYS | {"BUCKET_ENDPOINT_URL": address} | ({"BUCKET_NAME": name} if name else {}) | variables
    made = Bucket.from_settings(WorkerSettings.from_environment(given))
    assert made is not None
    return made


CASES = {  # endpoint URL, BUCKET_NAME -> URL of an upload, and signing region
    ("https://images.s3.eu-central-1.amazonaws.com", None): (
        "https://images.s3.eu-central-1.amazonaws.com/",
        "eu-central-1",
    ),
    ("https://images.s3.eu-central-1.amazonaws.com/", "images"): (
        "https://images.s3.eu-central-1.amazonaws.com/",
        "eu-central-1",
    ),
    ("https://s3.eu-central-1.amazonaws.com/images", None): (
        "https://s3.eu-central-1.amazonaws.com/images/",
        "eu-central-1",
    ),
    ("https://s3.eu-central-1.amazonaws.com/images/", "images"): (
        "https://s3.eu-central-1.amazonaws.com/images/",
        "eu-central-1",
    ),
    ("https://s3.us-gov-west-1.amazonaws.com", "images"): (
        "https://s3.us-gov-west-1.amazonaws.com/images/",
        "us-gov-west-1",
    ),
    ("https://s3.amazonaws.com/images", None): ("https://s3.amazonaws.com/images/", "us-east-1"),
    ("https://images.s3.amazonaws.com", None): ("https://images.s3.amazonaws.com/", "us-east-1"),
    ("https://s3-eu-west-1.amazonaws.com", "images"): ("https://s3-eu-west-1.amazonaws.com/images/", "eu-west-1"),
    ("https://images.s3.dualstack.eu-west-1.amazonaws.com", None): (
        "https://images.s3.dualstack.eu-west-1.amazonaws.com/",
        "eu-west-1",
    ),
    ("https://images.s3.cn-north-1.amazonaws.com.cn", None): (
        "https://images.s3.cn-north-1.amazonaws.com.cn/",
        "cn-north-1",
    ),
    (f"https://{ACCOUNT}.r2.cloudflarestorage.com", "images"): (
        f"https://{ACCOUNT}.r2.cloudflarestorage.com/images/",
        "auto",
    ),
    (f"https://{ACCOUNT}.r2.cloudflarestorage.com/images", None): (
        f"https://{ACCOUNT}.r2.cloudflarestorage.com/images/",
        "auto",
    ),
    (f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com/images", "images"): (
        f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com/images/",
        "auto",
    ),
    ("https://images.nyc3.digitaloceanspaces.com", None): ("https://images.nyc3.digitaloceanspaces.com/", "nyc3"),
    ("https://nyc3.digitaloceanspaces.com", "images"): ("https://nyc3.digitaloceanspaces.com/images/", "nyc3"),
    ("https://s3.us-west-004.backblazeb2.com", "images"): (
        "https://s3.us-west-004.backblazeb2.com/images/",
        "us-west-004",
    ),
    ("https://images.s3.us-west-004.backblazeb2.com", None): (
        "https://images.s3.us-west-004.backblazeb2.com/",
        "us-west-004",
    ),
    ("https://s3.eu-central-2.wasabisys.com/images", None): (
        "https://s3.eu-central-2.wasabisys.com/images/",
        "eu-central-2",
    ),
    ("https://s3.fr-par.scw.cloud", "images"): ("https://s3.fr-par.scw.cloud/images/", "fr-par"),
    ("https://s3.gra.io.cloud.ovh.net", "images"): ("https://s3.gra.io.cloud.ovh.net/images/", "gra"),
    ("https://storage.googleapis.com", "images"): ("https://storage.googleapis.com/images/", "auto"),
    ("https://s3api-eu-ro-1.runpod.io/", "volume1"): ("https://s3api-eu-ro-1.runpod.io/volume1/", "eu-ro-1"),
    ("http://minio:9000", "images"): ("http://minio:9000/images/", "us-east-1"),
    ("http://minio:9000/images", None): ("http://minio:9000/images/", "us-east-1"),
    ("http://minio:9000/images", "images"): ("http://minio:9000/images/", "us-east-1"),
    ("http://10.0.0.7:9000", "images"): ("http://10.0.0.7:9000/images/", "us-east-1"),
    ("https://images.minio.example.org", "images"): ("https://images.minio.example.org/", "us-east-1"),
    ("https://minio.example.org", "minio"): ("https://minio.example.org/minio/", "us-east-1"),
    ("https://abc.supabase.co/storage/v1/s3", "images"): ("https://abc.supabase.co/storage/v1/s3/images/", "us-east-1"),
    # wildcard certificates do not cover bucket names with dots, so these are always in the path
    ("https://team.images.s3.eu-west-1.amazonaws.com", None): (
        "https://s3.eu-west-1.amazonaws.com/team.images/",
        "eu-west-1",
    ),
}


@pytest.mark.parametrize("address, name", CASES)
def test_uploads_use_the_right_host_path_and_region(address: str, name: str | None) -> None:
    "The request that boto3 would send, and the presigned URL for clients, with the signing region of both."
    wanted, region = CASES[address, name]
    bucket, sent = bucket_of(address, name), []
    client = bucket.client()

    def keep(request, **_):
        sent.append(request)
        return AWSResponse(request.url, 200, {}, HTTPResponse(io.BytesIO(), preload_content=False))

    client.meta.events.register("before-send.s3.PutObject", keep)
    link = bucket.upload("job/0.png", b"image", "png", client)
    assert sent[0].url == wanted + KEY
    assert re.search(r"Credential=known/\d{8}/([^/]+)/s3/", str(sent[0].headers["Authorization"]))[1] == region
    assert link.split("?")[0] == wanted + KEY
    assert parse_qs(urlsplit(link).query)["X-Amz-Credential"][0].split("/")[2] == region


def test_bucket_region_overrides_the_inferred_region() -> None:
    assert bucket_of("https://s3.example.org", "images", BUCKET_REGION="eu-9").region == "eu-9"
    assert bucket_of("https://images.s3.eu-central-1.amazonaws.com", BUCKET_REGION="eu-west-2").region == "eu-west-2"


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"BUCKET_ENDPOINT_URL": "https://s3.eu-central-1.amazonaws.com"}, "names no bucket"),
        ({"BUCKET_ENDPOINT_URL": "http://minio:9000"}, "set BUCKET_NAME"),
        (
            {"BUCKET_ENDPOINT_URL": "https://cats.s3.eu-central-1.amazonaws.com", "BUCKET_NAME": "dogs"},
            "BUCKET_NAME is dogs",
        ),
        (
            {"BUCKET_ENDPOINT_URL": "https://s3.eu-central-1.amazonaws.com/cats", "BUCKET_NAME": "dogs"},
            "the bucket cats",
        ),
        ({"BUCKET_NAME": "dogs"}, "BUCKET_ENDPOINT_URL: missing"),
    ],
)
def test_unusable_bucket_settings_are_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        WorkerSettings.from_environment(KEYS | variables)


@pytest.fixture
def store() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    "A local object store, and the host, path and region of each upload to it."
    asked: list[tuple[str, str, str]] = []
    files: dict[str, bytes] = {}

    class Store(BaseHTTPRequestHandler):
        def do_PUT(self):
            signed = re.search(r"Credential=known/\d{8}/([^/]+)/s3/", self.headers["Authorization"])
            asked.append((self.headers["Host"], self.path, signed[1]))
            files[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path.partition("?")[0]])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.mark.parametrize("path, name", [("/images", None), ("/images/", "images"), ("", "images")])
def test_a_delivered_image_is_downloaded_from_its_url(store, path: str, name: str | None) -> None:
    "From the worker settings to the client, through a real socket."
    from PIL import Image

    from diffusion_workers.worker.delivery import deliver
    from ez_diffusion_client.images import image_data
    from ez_diffusion_client.models import ControlMap, OpResult, OpStatus

    address, asked = store
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    found = ControlMap(image=base64.b64encode(buffer.getvalue()).decode(), preprocessor="canny", width=8, height=8)
    result = OpResult(status=OpStatus.success, control_map=found)
    sent = deliver(result, "job", 10_000_000, bucket_of(address + path, name, BUCKET_REGION="eu-1"), upload_all=True)
    assert asked == [(address.removeprefix("http://"), f"/images/{KEY}", "eu-1")]
    assert image_data(sent.control_map.image) == buffer.getvalue()
