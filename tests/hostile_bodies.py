"""Fuzz test of a server with a corpus of hostile requests from a fixed seed; prints the results as JSON.

    python tests/hostile_bodies.py [--count 10000] [--seed 0]

It starts a server in its own process with a tiny model, whose limits keep every accepted request small. A request
passes if the response has a status of the specification, gives a reason in words, is short, and leaks no internals.
"""

import argparse
import base64
import gzip
import io
import itertools
import json
import random
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
PATIENCE = 300  # seconds until a response counts as missing
STILL_WAITING = 30  # seconds
JSON = {"Content-Type": "application/json"}
LONGEST_ANSWER = 100_000  # bytes of an error response
REFUSED = {400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 431}
EXPLAINED = {501: "missing_dependency", 503: "model_unavailable"}  # errors that a valid request may get
SECRETS = ("Traceback", "site-packages", "/home/", "/work/", 'File "')


@dataclass
class Case:
    "One hostile request."

    kind: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    raw: bytes | None = None  # the whole request, if HTTP clients would not send it


# --- invalid image files --------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(*chunks: bytes, width: int = 8, height: int = 8, depth: int = 8, color: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def small_image(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, kind)
    return buffer.getvalue()


BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\xff\xff\xffWEBP", b"GIF89a", b"BM", b"II*\0")
ZEROS = zlib.compress(bytes(20_000_000), 9)  # 20 kB
FILES: dict[str, Callable[[random.Random], bytes]] = {
    "nothing": lambda rng: b"",
    "noise": lambda rng: rng.randbytes(rng.randrange(1, 3000)),
    "cut": lambda rng: (file := small_image(rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP"])))[
        : rng.randrange(len(file))
    ],
    "flipped": lambda rng: flipped(rng, small_image(rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))),
    "a size without pixels": lambda rng: png_of(
        width=rng.choice([0, 1, 30_000, 2**31 - 1]), height=rng.choice([0, 1, 30_000])
    ),
    "more pixels than the size": lambda rng: png_of(chunk(b"IDAT", ZEROS)),
    "a bomb of pixels": lambda rng: png_of(chunk(b"IDAT", ZEROS), width=20_000, height=20_000, depth=1, color=0),
    "a bomb of text": lambda rng: png_of(
        chunk(b"zTXt", b"parameters\0\0" + ZEROS), chunk(b"IDAT", zlib.compress(bytes(200)))
    ),
    "a bomb of a profile": lambda rng: png_of(
        chunk(b"iCCP", b"a\0\0" + ZEROS), chunk(b"IDAT", zlib.compress(bytes(200)))
    ),
    "a palette without colors": lambda rng: png_of(chunk(b"IDAT", zlib.compress(bytes(72))), color=3),
    "unknown kinds": lambda rng: png_of(depth=rng.choice([0, 3, 255]), color=rng.choice([1, 5, 255])),
    "XML": lambda rng: b"<!---->" * rng.randrange(1, 400) + b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PDF": lambda rng: b"%PDF-1.4\n" + rng.randbytes(100),
    "a program": lambda rng: b"\x7fELF" + rng.randbytes(100),
    "a pickle": lambda rng: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "only a beginning": lambda rng: rng.choice(BEGINNINGS),
}


def flipped(rng: random.Random, data: bytes) -> bytes:
    "The same bytes with some of them changed."
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 12)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def image_text(rng: random.Random) -> str:
    "A hostile value for an image: a broken file, or a path or URL that must not be read."
    file = FILES[rng.choice(list(FILES))](rng)
    coded = base64.b64encode(file).decode()
    forms = [
        coded,
        "data:image/png;base64," + coded,
        "data:"
        + rng.choice(["", "text/html", "image/" + "x" * 300, ";;;", "image/png;charset=utf-8"])
        + ";base64,"
        + coded,
        "data:image/png," + coded,
        "data:image/png;base64" + coded,
        coded[: rng.randrange(len(coded) + 1)] + rng.choice(["=", "===", "\n", " ", "%", "é", "\0"]),
        rng.choice(
            [
                "http://127.0.0.1:1/a.png",
                "http://[::1]/a.png",
                "http://169.254.169.254/latest/meta-data",
                "http://0/",
                "http://2130706433/",
                "http://localhost/",
                "https://a@127.0.0.1/",
                "file:///etc/passwd",
                "ftp://a/b",
                "http://",
                "https:///a",
                "http://[",
                "http://a:99999/",
                "http://\udcff/".encode("utf-8", "replace").decode(),
                "/etc/passwd",
                "C:\\windows\\win.ini",
                "../../a.png",
                "gopher://127.0.0.1/",
                "javascript:alert(1)",
            ]
        ),
    ]
    return rng.choice(forms)


# --- values ---------------------------------------------------------------------------------------------------------

ODD_TEXTS = (
    "\0", "\u2028", "\u2029", "\x85", "\u202eabc", "\ufeff", "\uffff", "é" * 50, "e\u0301" * 50, "👩‍👩‍👧" * 20,
    "\U0010ffff", "z\u0300" * 300, "\x1b[31m", "\r\nSet-Cookie: a=b", "%00", "%s%n", "${jndi:ldap://a}", "{{7*7}}",
    "<script>alert(1)</script>", "'; DROP TABLE jobs;--", "../" * 40, "(" * 3000, "[a:" * 1000, "<lora:" * 500,
    "((a:1.1)" * 400, "{a|b}" * 400, "__a__" * 200, "embedding:" * 300, "BREAK " * 500, "a AND " * 200, "\\" * 3000,
    " ", "", "a" * 30_000, ",".join("a" * 3000), "İ" * 200, "ß" * 200, "ﷺ" * 200, "\ud800",
)  # fmt: skip
ODD_NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**53,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    0.1 + 0.2,
    float("inf"),
    float("-inf"),
    float("nan"),
    63,
    64,
    65,
    1.5,
    1.0,
    999_999_999_999,
)
ODD_KEYS = ("__proto__", "constructor", "", " ", "prompt ", "Prompt", "a.b", "seed\0", "é", "x" * 5000, "loras[0].name")


def odd_value(rng: random.Random, deep: int = 0) -> object:
    "A value that a field does not expect."
    kind = rng.randrange(8 if deep < 3 else 5)
    if kind == 0:
        return rng.choice(ODD_TEXTS)
    if kind == 1:
        return rng.choice(ODD_NUMBERS)
    if kind == 2:
        return rng.choice([None, True, False])
    if kind == 3:
        return image_text(rng)
    if kind == 4:
        return rng.choice(["1", "true", "null", "NaN", "1e5", "0x10", "tiny", "euler", "png"])
    if kind == 5:
        return [odd_value(rng, deep + 1) for _ in range(rng.choice([0, 1, 2, 5]))]
    if kind == 6:
        return {rng.choice(ODD_KEYS): odd_value(rng, deep + 1) for _ in range(rng.randrange(4))}
    return [odd_value(rng, 9)] * rng.choice([33, 1000])


def valid_bodies() -> dict[str, list[dict]]:
    "Valid request bodies for each path."
    image = base64.b64encode(small_image()).decode()
    small = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "width": 64, "height": 64}
    generations = [
        small,
        small | {"negative_prompt": "blue", "guidance_scale": 2.5, "scheduler": "euler", "num_images": 2},
        small | {"seeds": [1, 2], "output": {"format": "webp", "quality": 80}, "preview_interval": 1},
        small | {"image": image, "strength": 0.9},
        small | {"image": image, "mask_image": image, "inpaint": {"mask_blur": 2}},
        small | {"step_cache": {"method": "deep_features", "interval": 2}, "memory": {"vae_tiling": True}},
        small | {"controlnets": [{"model": "a", "image": image, "preprocessing": {"name": "canny"}}]},
        small | {"loras": [{"name": "heart", "scale": 0.5}], "timeout_seconds": 60, "request_id": "a:b"},
        small | {"acceleration": {"dtype": "float32"}, "scheduler_config": {"noise_schedule": "karras"}},
    ]
    maps = [{"image": image, "preprocessing": {"name": name}} for name in ("canny", "scribble", "lineart")]
    settings = [
        {"parameters": "a\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"},
        {"parameters": '{"prompt": "a", "steps": 5}'},
        {"image": image},
    ]
    return {
        "/generate": generations,
        "/jobs": generations,
        "/plan": generations,
        "/preprocess": maps,
        "/restore": settings,
    }


# --- kinds of hostile requests --------------------------------------------------------------------------------------


def places(value: object, before: tuple = ()) -> Iterator[tuple]:
    "The path of every value nested in a JSON value."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from places(inner, (*before, key))


def mutated(rng: random.Random, path: str, body: dict) -> Case:
    "A valid body with some values replaced, added or removed."
    body = json.loads(json.dumps(body))
    for _ in range(rng.randrange(1, 4)):
        place = rng.choice(list(places(body)) or [("image",)])
        inside = body
        for key in place[:-1]:
            inside = inside[key]
        way = rng.randrange(10)
        if way == 0 and len(body) > 1:
            del inside[place[-1]]
        elif way == 1 and isinstance(inside, dict):
            inside[rng.choice(ODD_KEYS)] = odd_value(rng)
        else:
            inside[place[-1]] = odd_value(rng)
    return Case("mutated", path, encoded(rng, body))


def encoded(rng: random.Random, body: object) -> bytes:
    "JSON, with or without ASCII escapes."
    plain = rng.random() < 0.5
    return json.dumps(body, ensure_ascii=plain).encode("utf-8", "surrogatepass")


def wrong_type(rng: random.Random, path: str, body: dict) -> Case:
    "A valid body with a value of the wrong type in one field."
    name = rng.choice(list(body))
    return Case("wrong type", path, encoded(rng, body | {name: odd_value(rng)}))


def broken_image(rng: random.Random, path: str, body: dict) -> Case:
    name = rng.choice(["image", "mask_image"])
    body = {**body, "image": image_text(rng)} | {name: image_text(rng)}
    if path == "/restore":
        body = {"image": image_text(rng)}
    return Case("broken image", path, encoded(rng, body))


def deep(rng: random.Random, path: str, body: dict) -> Case:
    "Deeply nested lists and objects, closed or not."
    depth = rng.choice([50, 1000, 20_000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
    inner = opening * depth + b"1" + closing * rng.choice([0, depth // 2, depth])
    field_name = rng.choice(list(body)).encode()
    return Case("deep", path, rng.choice([inner, b'{"' + field_name + b'": ' + inner + b"}"]))


def huge_number(rng: random.Random, path: str, body: dict) -> Case:
    digits = rng.choice([20, 400, 5000, 200_000])
    forms = [
        b"9" * digits,
        b"-" + b"9" * digits,
        b"0." + b"1" * digits,
        b"1e" + b"9" * min(digits, 400),
        b"1" + b"0" * digits,
    ]
    forms += [b"Infinity", b"-Infinity", b"NaN", b"1e400", b"-0", b"1E+2", b"00", b"0x1", b"+1", b".5", b"1."]
    name = rng.choice(
        ["seed", "num_inference_steps", "guidance_scale", "width", "strength", "timeout_seconds"]
    ).encode()
    head = json.dumps(body).encode()[:-1]
    return Case("huge number", path, head + b', "' + name + b'": ' + rng.choice(forms) + b"}")


def odd_text(rng: random.Random, path: str, body: dict) -> Case:
    texts = [name for name, value in body.items() if isinstance(value, str)]
    name = rng.choice([*texts, "request_id", "scheduler", "model"])
    given = "".join(rng.choice(ODD_TEXTS) for _ in range(rng.randrange(1, 4)))
    return Case("odd text", path, encoded(rng, body | {name: given}))


def broken_bytes(rng: random.Random, path: str, body: dict) -> Case:
    "JSON that is truncated, corrupted or in another encoding."
    data = json.dumps(body).encode()
    forms = [
        lambda: data[: rng.randrange(len(data))],
        lambda: flipped(rng, data),
        lambda: data + rng.choice([b"}", b"\0", b"{}", b",", b"\xff"]),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode().encode(rng.choice(["utf-16", "utf-32", "utf-16-le"])),
        lambda: rng.randbytes(rng.randrange(1, 500)),
        lambda: rng.choice(
            [b"", b"null", b"[]", b"1", b'"a"', b"true", b" " * 1000, b"[" + data + b"]", b"{,}", b"{'a': 1}"]
        ),
    ]
    return Case("broken bytes", path, rng.choice(forms)())


def many(rng: random.Random, path: str, body: dict) -> Case:
    "Very many entries, fields or characters."
    count = rng.choice([100, 3000, 30_000])
    forms = [
        lambda: body | {f"x{index}": index for index in range(count)},
        lambda: body | {"seeds": [1] * count},
        lambda: body | {"controlnets": [{"image": "AAAA"}] * count},
        lambda: body | {"loras": [{"name": "a"}] * count},
        lambda: body | {"prompt": "a," * count},
        lambda: body | {"parameters": "Steps: 1, " * count},
    ]
    return Case("many", path, encoded(rng, rng.choice(forms)()))


def compressed(rng: random.Random, path: str, body: dict) -> Case:
    "A body with a Content-Encoding, including decompression bombs."
    data = json.dumps(body).encode()
    forms = {
        "gzip": rng.choice([gzip.compress(data), gzip.compress(bytes(10_000_000)), b"\x1f\x8b", data]),
        "deflate": rng.choice([zlib.compress(data), ZEROS]),
        "br": data,
        "identity, gzip": gzip.compress(data),
    }
    name = rng.choice(list(forms))
    return Case("compressed", path, forms[name], JSON | {"Content-Encoding": name})


def odd_headers(rng: random.Random, path: str, body: dict) -> Case:
    "A valid body with odd headers that clients can send."
    data = json.dumps(body).encode()
    name, value = rng.choice(
        [
            (
                "Content-Type",
                rng.choice(
                    [
                        "",
                        "text/plain",
                        "application/json; charset=utf-16",
                        "a/b/c",
                        ";",
                        "application/xml+json",
                        "x" * 4000,
                    ]
                ),
            ),
            (
                "Accept",
                rng.choice(
                    [
                        "image/*;q=x",
                        "image/png;q=1e999",
                        ",,,;;;",
                        "image/png;q=-1",
                        "*/*" * 500,
                        "image/webp;q=0.5, image/jpeg",
                        "x/y",
                        "image/png;q=²",
                        "image/png;q=nan",
                    ]
                ),
            ),
            ("X-Request-ID", rng.choice(["a" * 4000, "a b", "../..", "<b>", "é"])),
            ("Authorization", rng.choice(["Bearer", "Bearer  ", "Basic YTpi", "Bearer " + "a" * 3000])),
            ("Origin", rng.choice(["null", "http://evil.example", "file://", "x" * 3000])),
            (
                "Host",
                rng.choice(
                    ["evil.example", "", "127.0.0.1:99999", "[::1", "127.0.0.1.evil.example", "localhost:", "a" * 3000]
                ),
            ),
            ("Last-Event-ID", rng.choice(["-1", "x", "9" * 400, "²"])),
            ("Expect", "200-ok"),
            ("Range", "bytes=0-0,-1"),
            ("Transfer-Encoding", "gzip"),
            ("Upgrade", "h2c"),
            ("X-Forwarded-For", "127.0.0.1"),
            ("X-HTTP-Method-Override", "DELETE"),
            ("Content-Length", rng.choice(["-1", "1e3", "²", "99999999999999999999999", "0x10", "+5"])),
        ]
    )
    head = {"Host": "127.0.0.1", "Connection": "close", "Content-Length": str(len(data))} | JSON | {name: value}
    lines = "".join(f"{key}: {text}\r\n" for key, text in head.items()).encode("utf-8")
    return Case("odd headers", path, data, raw=f"POST {path} HTTP/1.1\r\n".encode() + lines + b"\r\n" + data)


def odd_line(rng: random.Random, path: str, body: dict) -> Case:
    "A broken request line, an odd path, another method."
    data = json.dumps(body).encode()
    method = rng.choice(["POST", "GET", "PUT", "TRACE", "CONNECT", "post", "A" * 300, "PATCH", "OPTIONS", ""])
    target = rng.choice(
        [
            path,
            path + "/",
            path + "?" + "a=" * 500,
            "/%00",
            "/%2e%2e/%2e%2e/etc/passwd",
            "//evil.example/a",
            "*",
            "http://evil.example/",
            "/jobs/%ff%fe",
            "/jobs/" + "a" * 3000,
            "/outputs/..%2f..",
            "/jobs/../health",
            "/é",
            "/a b",
        ]
    )
    version = rng.choice(["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "", "HTTP/2"])
    head = (
        f"Host: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return Case("odd line", path, data, raw=f"{method} {target} {version}\r\n{head}".encode() + data)


KINDS: dict[Callable[[random.Random, str, dict], Case], int] = {  # with relative frequencies
    mutated: 30, wrong_type: 12, broken_image: 15, deep: 4, huge_number: 8, odd_text: 8, broken_bytes: 8, many: 3,
    compressed: 4, odd_headers: 5, odd_line: 3,
}  # fmt: skip
PATHS = {"/generate": 3, "/jobs": 1, "/plan": 4, "/preprocess": 2, "/restore": 2}


def corpus(count: int, seed: int = 0) -> Iterator[Case]:
    "Hostile requests, deterministic for a seed; each depends only on its index."
    valid = valid_bodies()
    for index in range(count):
        rng = random.Random(f"{seed}-{index}")
        path = rng.choices(list(PATHS), list(PATHS.values()))[0]
        make = rng.choices(list(KINDS), list(KINDS.values()))[0]
        yield make(rng, path, rng.choice(valid[path]))


# --- sending --------------------------------------------------------------------------------------------------------


def send_raw(url: str, data: bytes) -> tuple[int, bytes]:
    "Send raw bytes; return status and body, with status 0 if the connection closes without a response."
    host, port = url.removeprefix("http://").split(":")
    answered = b""
    with socket.create_connection((host, int(port)), timeout=STILL_WAITING) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                answered += part
        except ConnectionError:
            pass
        except TimeoutError:  # the server waits for more of the body than there is
            return (int(answered[9:12]) if answered else 408), b"{}"
    head, _, body = answered.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else 0), body


def fault(case: Case, status: int, body: bytes) -> str | None:
    "What is wrong with a response, or None."
    text = body[:LONGEST_ANSWER].decode("utf-8", "replace")
    if found := [word for word in SECRETS if word in text]:
        return f"shows {found[0]!r}"
    if status in (200, 202, 204) or (status < 400 and case.kind == "odd line"):
        return None
    if status in EXPLAINED and f'"status":"{EXPLAINED[status]}"' in text:
        return None
    if status == 504 and b"timeout_seconds" in case.body and '"status":"timed_out"' in text:
        return None
    if status not in REFUSED:
        return "is not a refusal"
    if len(body) > LONGEST_ANSWER:
        return f"has {len(body)} bytes"
    if case.raw is not None and status in (400, 431) and not text.startswith("{"):
        return None  # invalid HTTP: answered before routing
    try:
        said = json.loads(text)
        wordless = not (said.get("errors") and said["errors"][0]["message"])
    except (ValueError, LookupError, AttributeError):
        return "is not an OpResult"
    return "does not say why" if wordless else None


def memory_mb(client: httpx.Client) -> int:
    return client.get("/memory-info").json()["process_bytes"] // 10**6


def attack(url: str, cases: Iterator[Case], at_once: int = 4) -> dict:
    "Send all cases, and summarize the responses."

    def one(case: Case) -> tuple[str, int, str | None, float]:
        started = time.monotonic()
        try:
            if case.raw is not None:
                status, body = send_raw(url, case.raw)
            else:
                response = client.post(case.path, content=case.body, headers=case.headers)
                status, body = response.status_code, response.content
        except (httpx.HTTPError, OSError) as exc:
            status, body = -1, repr(exc).encode()
        why = fault(case, status, body)
        return case.kind, status, why and f"{case.path} {why}: {body[:200]!r}", time.monotonic() - started

    rows: list[tuple[str, int, str | None, float]] = []
    memory: list[int] = []
    with httpx.Client(base_url=url, timeout=PATIENCE) as client, ThreadPoolExecutor(at_once) as pool:
        while some := list(itertools.islice(cases, 100)):
            rows += pool.map(one, some)
            if len(rows) % 1000 == 0:
                memory.append(memory_mb(client))
    slowest = max(rows, key=lambda row: row[3])
    return {
        "requests": len(rows),
        "by_kind": dict(sorted(Counter(row[0] for row in rows).items())),
        "by_status": dict(sorted(Counter(row[1] for row in rows).items())),
        "faults": [f"{index} {kind}: {status} {why}" for index, (kind, status, why, _) in enumerate(rows) if why],
        "slowest_seconds": round(slowest[3], 2),
        "slowest_kind": slowest[0],
        "process_mb_after_each_thousand": memory,
    }


BOUNDS = {  # of the tiny model; they keep every accepted request small
    "limits": {"max_width": 64, "max_height": 64, "max_num_images": 2, "max_num_inference_steps": 2},
    "defaults": {"width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 1.0},
}


@contextmanager
def bounded_server() -> Iterator[str]:
    "A server in its own process, with a tiny model that has operator limits."
    from server_process import running_server

    from diffusion_workers.pipeline.tiny_models import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder), "sd15", "tiny", changes=BOUNDS)
        variables = {"DIFFUSION_WORKERS_MODELS": folder, "DIFFUSION_WORKERS_DEFAULT_MODEL": "tiny"}
        with running_server(**variables, DIFFUSION_WORKERS_KEEP_BYTES="32MB") as url:
            yield url


def figures(url: str, count: int, seed: int) -> dict:
    "Send the corpus to a server, and measure its memory before and after."
    plain = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        image = lambda: client.post("/generate", json=plain).json()["generation"]["images"][0]["image"]
        first, before = image(), memory_mb(client)
        found = attack(url, corpus(count, seed))
        same = image() == first
        return found | {
            "process_mb_before": before,
            "process_mb_after": memory_mb(client),
            "same_image_afterwards": same,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with bounded_server() as url:
        print(json.dumps(figures(url, arguments.count, arguments.seed), indent=2))


if __name__ == "__main__":
    main()
