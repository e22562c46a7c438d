"""Images in requests and results: bytes, files, and PIL images where Pillow is installed."""

import base64
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from .errors import ConnectionLost, UnexpectedAnswer
from .models import GenerationRequest, OpResult, PreprocessRequest

if TYPE_CHECKING:
    from .receipts import ReceiptImage

_FIELDS = ("image", "mask_image")
_LISTS = ("reference_images",)


def image_text(
    value: Any,  # text of the API as it is; bytes of a file, a pathlib.Path or a PIL image
) -> Any:
    """The image as base64 text; anything else is left as it is, for the server to check."""
    if isinstance(value, Path):
        value = value.read_bytes()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if hasattr(value, "save") and hasattr(value, "getbands"):  # a PIL image, without importing Pillow
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()
    return value


def _with_text(body: dict[str, Any]) -> dict[str, Any]:
    body = body | {name: image_text(body[name]) for name in _FIELDS if name in body}
    for name in _LISTS:
        if isinstance(body.get(name), (list, tuple)):
            body = body | {name: [image_text(value) for value in body[name]]}
    if isinstance(body.get("controlnets"), (list, tuple)):
        body["controlnets"] = [
            _with_text(plain(unit)) if isinstance(unit, (dict, BaseModel)) else unit for unit in body["controlnets"]
        ]
    return body


def plain(value: Any) -> Any:
    """A model as what JSON has; anything else as it is."""
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value


def is_json_text(text: str | bytes) -> bool:
    """Whether a text is meant as a JSON object; any other text is a prompt."""
    return isinstance(text, bytes) or re.match(r'\s*\{\s*["}]', text) is not None


def request_body(
    request: GenerationRequest | PreprocessRequest | dict[str, Any] | str | bytes | None,  # or a prompt
    fields: dict[str, Any],  # set or override single fields
) -> dict[str, Any]:
    """What is sent for a request; the server checks it."""
    if isinstance(request, (str, bytes)):
        given = json.loads(request) if is_json_text(request) else {"prompt": request}
    else:
        given = plain(request)
    if not isinstance(given, dict | None):
        raise TypeError(f"a request is an object with named fields, not a {type(given).__name__}")
    merged = (given or {}) | {name: plain(value) for name, value in fields.items()}
    return _with_text(merged)


def restore_body(
    image: Any,  # an image file: bytes, a path, base64 text or a URL
    parameters: str | None,
) -> dict[str, Any]:
    """What is sent to restore a request; a `TypeError` for a PIL image, which would be sent without its metadata."""
    if hasattr(image, "getbands"):
        raise TypeError("give the image file (bytes or a path): sending a PIL image would drop its metadata")
    given = {"image": image_text(image), "parameters": parameters}
    return {name: value for name, value in given.items() if value is not None}


def image_data(
    text: str,  # base64, a data URI, or an http(s) URL, such as one of a worker's bucket
) -> bytes:
    """The file that an image of a result stands for; a `ClientError` where it cannot be had."""
    if re.match("https?://", text, re.IGNORECASE):
        return _fetched(text)
    encoded = text.partition(",")[2] if text[:5].lower() == "data:" else text
    compact = "".join(encoded.split()).rstrip("=").replace("-", "+").replace("_", "/")  # as a server reads it
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError:
        raise UnexpectedAnswer(f"the image of the result is neither base64 nor a URL: {text[:60]!r}") from None


def _fetched(url: str) -> bytes:
    import httpx

    shown = url.partition("?")[0]  # the query of a presigned URL holds its signature
    try:  # without the key of the server or endpoint, which is not the bucket's business
        return httpx.get(url, timeout=60, follow_redirects=True).raise_for_status().content
    except httpx.HTTPStatusError as exc:
        raise ConnectionLost(f"{shown} answered {exc.response.status_code}: the image cannot be fetched") from None
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ConnectionLost(f"the image cannot be fetched from {shown}: {type(exc).__name__}") from None


def image_bytes(
    result: OpResult,  # of a generation
) -> list[bytes]:
    """The files of the images, in the requested format; a `RequestFailed` if the request failed."""
    from .errors import raise_for_status

    made = raise_for_status(result).generation
    return [image_data(image.image) for image in made.images] if made else []


def pil_images(result: OpResult) -> "list[ReceiptImage]":
    """The images for Pillow, which has to be installed; their `save` keeps the receipt."""
    from .receipts import ReceiptImage

    return [ReceiptImage.open(data) for data in image_bytes(result)]
