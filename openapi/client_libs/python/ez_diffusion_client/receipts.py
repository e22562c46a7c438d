"""Receipts in image files: how an image was made, kept when it is saved again. Needs Pillow."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from .images import image_data
from .models import ControlMap, OpResult

PLAN_KEY = "diffusion_workers"  # the plan as JSON
PARAMETERS_KEY = "parameters"  # one line that other programs read
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # ending of a file -> its format
_JPEG_EXIF_BYTES = 65_533  # that fit into a JPEG


def exif_bytes(
    texts: Mapping[str, str],  # under PLAN_KEY and PARAMETERS_KEY
) -> bytes:
    """EXIF data with these texts."""
    exif = Image.Exif()
    exif.endian = ">"
    if PLAN_KEY in texts:
        exif[ExifTags.Base.ImageDescription] = texts[PLAN_KEY].encode("ascii", "backslashreplace").decode()
    if PARAMETERS_KEY in texts:
        comment = b"UNICODE\0" + texts[PARAMETERS_KEY].encode("utf-16-be", "replace")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def fitting_texts(
    texts: Mapping[str, str],  # under PLAN_KEY and PARAMETERS_KEY
    format: str,  # PNG, JPEG or WEBP
) -> dict[str, str]:
    """The texts that a file of this format has room for; a JPEG that is short of room loses the plan first."""
    limit = _JPEG_EXIF_BYTES if format == "JPEG" else 2**31
    parameters = {key: text for key, text in texts.items() if key == PARAMETERS_KEY}
    return next((choice for choice in (dict(texts), parameters) if len(exif_bytes(choice)) <= limit), {})


def save_arguments(
    texts: Mapping[str, str],  # under PLAN_KEY and PARAMETERS_KEY
    format: str,  # PNG, JPEG or WEBP; others carry no texts
) -> dict[str, Any]:
    """What `Image.save` takes so that the file carries the texts."""
    kept = fitting_texts(texts, format) if format in FORMATS.values() else {}
    if not kept:
        return {}
    if format != "PNG":
        return {"exif": exif_bytes(kept)}
    info = PngInfo()
    for key, text in kept.items():
        info.add_text(key, text.replace("\0", ""))
    return {"pnginfo": info}


def _of_utf_16(body: bytes) -> str:  # in the byte order that makes more of it ASCII
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return body.decode("utf-16", "replace")
    even, odd = body[0::2], body[1::2]
    little = odd.count(0) > even.count(0)
    return body.decode("utf-16-le" if little else "utf-16-be", "replace")


def _of_bytes(body: bytes) -> str:  # UTF-8, where it is not that UTF-16 or Latin-1
    if body[:2] not in (b"\xff\xfe", b"\xfe\xff") and 0 not in body.strip(b"\0"):
        try:
            return body.decode("utf-8-sig").strip("\0")
        except UnicodeDecodeError:
            pass
    return ""


def comment_text(
    raw: object,  # of an EXIF UserComment, as Pillow reads it
) -> str | None:
    """The text of a comment: its first eight bytes name an encoding, which programs fill with others too."""
    if isinstance(raw, str):  # Pillow reads what is declared as ASCII as Latin-1
        if len(raw) <= 8 or not (raw.startswith(("UNICODE\0", "ASCII\0\0\0")) or not raw.isascii()):
            return raw
        text = raw
        try:
            raw = text.encode("latin-1")
        except UnicodeEncodeError:
            return text
    if not isinstance(raw, bytes) or len(raw) <= 8:
        return None
    head, body = raw[:8], raw[8:]
    if head == b"UNICODE\0":
        text = _of_bytes(body) or _of_utf_16(body)
    else:
        body = body if head in (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8)) else raw
        wide = body[:2] in (b"\xff\xfe", b"\xfe\xff") or 4 * body.count(0) > len(body)
        text = _of_bytes(body) or (_of_utf_16(body) if wide else body.decode("latin-1"))
    return text.lstrip("\ufeff").strip("\0")


def read_texts(
    image: Image.Image,  # as it was opened
) -> dict[str, str]:  # under PLAN_KEY and PARAMETERS_KEY, as far as they are there
    """The texts that an image file carries."""
    plan, parameters = image.info.get(PLAN_KEY), image.info.get(PARAMETERS_KEY)
    if plan is None and parameters is None:
        exif = image.getexif()
        plan = exif.get(ExifTags.Base.ImageDescription)
        tag = ExifTags.Base.UserComment
        parameters = comment_text(exif.get_ifd(ExifTags.IFD.Exif).get(tag) or exif.get(tag))
        if not (isinstance(plan, str) and plan.startswith('{"plan_version"')):
            plan = None
    found = {PLAN_KEY: plan, PARAMETERS_KEY: parameters}
    return {key: text for key, text in found.items() if isinstance(text, str)}


class ReceiptImage(Image.Image):
    """A PIL image that keeps its receipt in `save` and `copy`; images made from it in other ways lose it."""

    receipt: Mapping[str, str]  # texts under PLAN_KEY and PARAMETERS_KEY

    @classmethod
    def open(cls, source: bytes | str | Path) -> "ReceiptImage":
        """The image of a file, with the receipt inside."""
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            try:
                texts = read_texts(image)
            except Exception:  # damaged EXIF data: there is nothing to keep
                texts = {}
            return cls._of(image, texts)

    @classmethod
    def _of(cls, image: Image.Image, texts: Mapping[str, str]) -> "ReceiptImage":
        made = cls()
        made.__setstate__([Image.Image.__getstate__(image), image.format, dict(texts)])
        return made

    def __getstate__(self) -> list:  # pickled with its receipt
        return [super().__getstate__(), self.format, dict(self.receipt)]

    def __setstate__(self, state: list) -> None:
        pixels, self.format, self.receipt = state
        super().__setstate__(pixels)

    def copy(self) -> "ReceiptImage":
        """A copy with the same receipt."""
        return self._of(self, self.receipt)

    __copy__ = copy

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As `Image.save`; a PNG, JPEG or WebP file carries the receipt, unless `pnginfo` or `exif` is given."""
        ending = Path(fp).suffix.lower() if isinstance(fp, (str, Path)) else ""
        kind = {"JPG": "JPEG"}.get(format.upper(), format.upper()) if format else FORMATS.get(ending, "")
        super().save(fp, format, **save_arguments(self.receipt, kind) | params)

    def _repr_png_(self) -> bytes | None:  # a notebook shows the pixels alone
        return Image.Image.copy(self)._repr_png_()

    def _repr_jpeg_(self) -> bytes | None:
        return Image.Image.copy(self)._repr_jpeg_()


def output_paths(
    path: str | Path,  # where several images go, it may hold {index}, counted from 1, and {seed}
    seeds: list[int],  # of the images, in their order
) -> list[Path]:
    """A path for each image: as named for one, numbered for several, or filled in where the name is a template."""
    path = Path(path)
    if "{index}" in path.name or "{seed}" in path.name:
        fill = lambda index, seed: path.name.replace("{index}", str(index)).replace("{seed}", str(seed))
        paths = [path.with_name(fill(index, seed)) for index, seed in enumerate(seeds, 1)]
    elif len(seeds) == 1:
        return [path]
    else:
        paths = [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(1, len(seeds) + 1)]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{path.name} names one file for several images: add {{index}}")
    return paths


def save_images(
    result: OpResult,  # of a generation; one that has failed raises
    path: str | Path,  # ends in .png, .jpg, .jpeg or .webp; see `output_paths` for several images
) -> list[Path]:
    """Write the images of a result to files, in the format of the ending, each with its receipt."""
    from .images import image_bytes

    format = FORMATS.get(Path(path).suffix.lower())
    if format is None:
        raise ValueError(f"{Path(path).name}: the name must end in one of {', '.join(FORMATS)}")
    files = image_bytes(result)
    if result.generation is None or not files:
        return []
    paths = output_paths(path, [image.seed for image in result.generation.images])
    for target, data, made in zip(paths, files, result.generation.images):
        target.parent.mkdir(parents=True, exist_ok=True)
        if made.format.value.upper() == format:
            target.write_bytes(data)
        else:
            quality: dict[str, Any] = {} if format == "PNG" else {"quality": 95}
            ReceiptImage.open(data).save(target, **quality)
    return paths


def save_map(
    found: ControlMap,
    path: str | Path,  # ends in .png
) -> Path:
    """Write a control map as a PNG; missing folders are made."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path.name}: a control map is saved as .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_data(found.image))
    return path
