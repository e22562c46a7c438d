"""Scenes with objects anywhere, the control maps that go with them, and how well a picture follows a map."""

# %%
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from .shapes import (
    BACKGROUNDS, COLORS, IMAGE_SIZE, PLACES, SHAPES, SUPERSAMPLE, ShapeObject, draw_shape, nearest, object_phrase, place_phrase,
    polygon_corners,
)
from .shapes_sdxl import encode_pictures

# %%
@dataclass(frozen=True)
class FreeObject:
    "One shape, anywhere."

    item: ShapeObject
    x: float  # centre, pixels
    y: float  # centre, pixels
    radius: float  # pixels


@dataclass(frozen=True)
class FreeScene:
    "One object or two, anywhere, on a plain background."

    objects: tuple[FreeObject, ...]  # one or two
    background: str  # a key of `BACKGROUNDS`


SMALLEST, LARGEST, MARGIN = 13, 34, 4  # radii and distance from the border, pixels


def random_free_scene(
    rng: np.random.Generator,  # the source of chance
    n_objects: int | None = None,  # 1 or 2; None: either
) -> FreeScene:
    "Draw one or two objects that do not touch each other or the border."
    pick, n = lambda names: str(rng.choice(list(names))), n_objects or int(rng.integers(1, 3))
    while True:
        objects = []
        for _ in range(n):
            radius = float(rng.uniform(SMALLEST, LARGEST if n == 1 else 26))
            low = 1.1 * radius + MARGIN
            x, y = (float(v) for v in rng.uniform(low, IMAGE_SIZE - low, 2))
            objects.append(FreeObject(ShapeObject(pick(COLORS), pick(SHAPES)), x, y, radius))
        apart = n == 1 or np.hypot(objects[0].x - objects[1].x, objects[0].y - objects[1].y) > 1.15 * sum(o.radius for o in objects) + 6
        if apart and (n == 1 or objects[0].item != objects[1].item):
            return FreeScene(tuple(objects), pick(BACKGROUNDS))


# %%
def object_mask(
    thing: FreeObject,
) -> Image.Image:  # 128 x 128, mode "L"
    "Where an object covers the picture."
    mask = Image.new("L", (IMAGE_SIZE * SUPERSAMPLE,) * 2, 0)
    draw_shape(ImageDraw.Draw(mask), thing.item.shape, thing.x * SUPERSAMPLE, thing.y * SUPERSAMPLE, thing.radius * SUPERSAMPLE)
    return mask.reduce(SUPERSAMPLE)


def render_free(
    scene: FreeScene,
) -> Image.Image:  # 128 x 128, RGB
    "Draw a scene with smooth edges."
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[scene.background])
    for thing in scene.objects:
        picture.paste(COLORS[thing.item.color], mask=object_mask(thing))
    return picture


def describe_free(
    scene: FreeScene,
    rng: np.random.Generator,  # chooses the wording
) -> str:
    "Tell colours, shapes, background, and the place or the relation as far as a word fits."
    first = scene.objects[0]
    if len(scene.objects) == 1:
        body, place = object_phrase(first.item, None, 0, rng), nearest(np.array([first.x, first.y]), PLACES)
        if np.hypot(first.x - PLACES[place][0], first.y - PLACES[place][1]) < 16 and rng.random() < 0.7:
            body = f"{body} {place_phrase(place, rng)}"
    else:
        first, second = scene.objects if rng.random() < 0.5 else scene.objects[::-1]
        dx, dy = first.x - second.x, first.y - second.y
        relation = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        body = f"{object_phrase(first.item, None, 0, rng)} {relation} {object_phrase(second.item, None, 0, rng)}"
    return f"{body} on a {scene.background} background"


# %%
def _canny(scene: FreeScene, picture: np.ndarray) -> np.ndarray:
    return cv2.Canny(picture, 100, 200)


def _soft_edge(scene: FreeScene, picture: np.ndarray) -> np.ndarray:
    edges = cv2.GaussianBlur(_canny(scene, picture).astype(np.float32), (0, 0), 1.6)
    return np.clip(edges * 1.6, 0, 255).astype(np.uint8)


def _pose(scene: FreeScene, picture: np.ndarray) -> np.ndarray:
    map_ = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    draw = ImageDraw.Draw(map_)
    for thing in scene.objects:
        if thing.item.shape in ("circle", "ring"):
            reach = 1.0 if thing.item.shape == "circle" else 0.78
            angles = np.arange(8) * np.pi / 4
            tips = [(reach * np.cos(a), reach * np.sin(a)) for a in angles]
        else:
            tips = polygon_corners(thing.item.shape)
        for i, (px, py) in enumerate(tips):
            tip = thing.x + px * thing.radius, thing.y + py * thing.radius
            draw.line([thing.x, thing.y, *tip], fill=tuple(int(v) for v in 255 * _hue(i / len(tips))), width=2)
            draw.ellipse([tip[0] - 2, tip[1] - 2, tip[0] + 2, tip[1] + 2], fill=(255, 255, 255))
    return np.asarray(map_)


def _hue(turn: float) -> np.ndarray:  # RGB, 0 to 1
    return np.clip(np.abs((turn * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)


def _depth(scene: FreeScene, picture: np.ndarray) -> np.ndarray:
    near = np.broadcast_to(np.linspace(15, 90, IMAGE_SIZE)[:, None], (IMAGE_SIZE, IMAGE_SIZE)).copy()
    for thing in scene.objects:
        near[np.asarray(object_mask(thing)) > 127] = 130 + 3.4 * thing.radius
    return near.astype(np.uint8)


def _normal(scene: FreeScene, picture: np.ndarray) -> np.ndarray:
    height = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    for thing in scene.objects:
        inside = ndimage.distance_transform_edt(np.asarray(object_mask(thing)) > 127)
        height += 6 * np.sqrt(1 - (1 - np.clip(inside / 8, 0, 1)) ** 2)
    dy, dx = np.gradient(height)
    normals = np.stack([-dx, -dy, np.ones_like(height)], -1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return (127.5 + 127.5 * normals).astype(np.uint8)


def _segmentation(scene: FreeScene, picture: np.ndarray) -> np.ndarray:
    map_ = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 40, np.uint8)
    for thing in scene.objects:
        kind = SHAPES.index(thing.item.shape) / len(SHAPES)
        map_[np.asarray(object_mask(thing)) > 127] = (60 + 195 * _hue(kind)).astype(np.uint8)
    return map_


def _shrunk(picture: np.ndarray, side: int, back: int) -> np.ndarray:
    small = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (IMAGE_SIZE, IMAGE_SIZE), interpolation=back)


CONTROL_MAPS = {  # kind -> the map of a scene and its picture
    "canny": _canny, "openpose": _pose, "depth": _depth, "softedge": _soft_edge, "normal": _normal, "segment": _segmentation,
    "tile": lambda scene, picture: _shrunk(picture, 16, cv2.INTER_CUBIC),
    "blur": lambda scene, picture: cv2.GaussianBlur(picture, (0, 0), 5),
    "gray": lambda scene, picture: cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY),
    "low_quality": lambda scene, picture: _shrunk(picture, 32, cv2.INTER_NEAREST),
}


def control_map(
    kind: str,  # a key of `CONTROL_MAPS`
    scene: FreeScene,
    picture: Image.Image | None = None,  # of the scene, where it is at hand
) -> Image.Image:  # 128 x 128, RGB
    "What a preprocessor would read from the picture, made from what is known about the scene."
    pixels = np.asarray(picture if picture is not None else render_free(scene))
    return Image.fromarray(CONTROL_MAPS[kind](scene, pixels)).convert("RGB")


# %%
def edge_f1(
    picture: Image.Image,  # generated
    control: Image.Image,  # white edges on black
    tolerance: float = 2.0,  # pixels
) -> float:  # 0 to 1
    "Harmonic mean of the shares of drawn edges near a wanted one, and of wanted edges near a drawn one."
    drawn, wanted = cv2.Canny(np.asarray(picture.convert("RGB")), 100, 200) > 0, np.asarray(control.convert("L")) > 127
    if not drawn.any() or not wanted.any():
        return float(drawn.any() == wanted.any())
    near = lambda edges: ndimage.distance_transform_edt(~edges) <= tolerance
    precision, recall = (drawn & near(wanted)).sum() / drawn.sum(), (wanted & near(drawn)).sum() / wanted.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def colors_right(
    picture: Image.Image,  # 128 x 128
    scene: FreeScene,
) -> bool:
    "Whether the background and the inside of each object have the colours of the scene."
    pixels, free = np.asarray(picture.convert("RGB"), float), np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    right = True
    for thing in scene.objects:
        mask = np.asarray(object_mask(thing)) > 127
        inner = ndimage.binary_erosion(mask, iterations=2)
        right &= nearest(np.median(pixels[inner if inner.any() else mask], axis=0), COLORS) == thing.item.color
        free &= ~ndimage.binary_dilation(mask, iterations=3)
    return bool(right and nearest(np.median(pixels[free], axis=0), BACKGROUNDS) == scene.background)


def mask_overlap(
    picture: Image.Image,  # 128 x 128
    scene: FreeScene,
) -> float:  # intersection over union, 0 to 1
    "How well whatever differs from the background covers the scene's objects."
    pixels = np.asarray(picture.convert("RGB"), float)
    border = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    border[3:-3, 3:-3] = False
    drawn = np.square(pixels - np.median(pixels[border], axis=0)).sum(-1) > 55**2
    wanted = np.max([np.asarray(object_mask(thing)) > 127 for thing in scene.objects], axis=0)
    return float((drawn & wanted).sum() / max((drawn | wanted).sum(), 1))


# %%
@dataclass(frozen=True)
class FreeData:
    "Free scenes, drawn, told and encoded."

    scenes: list[FreeScene]
    captions: list[str]
    pictures: list[Image.Image]
    latents: torch.Tensor  # (N, 4, 16, 16)


def free_data(
    vae,  # AutoencoderKL
    n: int,  # scenes
    seed: int = 0,
    path: Path | None = None,  # keeps the latents
) -> FreeData:
    "Draw, tell and encode `n` scenes."
    rng = np.random.default_rng((seed, 20))
    scenes = [random_free_scene(rng) for _ in range(n)]
    captions, pictures = [describe_free(s, rng) for s in scenes], [render_free(s) for s in scenes]
    if path is not None and path.exists():
        return FreeData(scenes, captions, pictures, torch.load(path, weights_only=True))
    latents = encode_pictures(vae, pictures)
    if path is not None:
        torch.save(latents, path)
    return FreeData(scenes, captions, pictures, latents)


def map_tensor(
    maps: list[Image.Image],
) -> torch.Tensor:  # (B, 3, H, W), 0 to 1
    "Control maps as ControlNets take them."
    return torch.from_numpy(np.stack([np.asarray(m) for m in maps])).permute(0, 3, 1, 2).float() / 255
