"""Scenes with objects anywhere, the control maps that go with them, and ControlNets that learn to follow the maps."""

# %%
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, ControlNetUnionModel, FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from scipy import ndimage

from .shapes import (
    BACKGROUNDS, COLORS, IMAGE_SIZE, PLACES, SHAPES, SUPERSAMPLE, ShapeObject, draw_shape, nearest, object_phrase, place_phrase,
    polygon_corners,
)
from .shapes_flux import flux_conditioning, pack
from .shapes_sdxl import CLEAN, encode_pictures, sdxl_conditioning
from .shapes_training import LOG_NAME, Checkpoint, TrainingLog, new_scheduler, one_cycle, token_ids, update, update_ema

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


# %%
@dataclass(frozen=True)
class ControlTrainingConfig:
    "Everything that decides what a ControlNet learns."

    seed: int = 0  # of scenes, first weights and batches
    scenes: int = 4000
    steps: int = 400
    batch: int = 32  # latents
    learning_rate: float = 1.5e-3  # peak
    caption_dropout: float = 0.15  # share of captions replaced by ""
    toward_noise: float = 0.5  # exponent: timesteps are a uniform number to this power, so that layout gets more of the steps
    ema_decay: float = 0.98  # of the averaged weights
    widths: tuple[int, ...] = (8, 16, 32, 32)  # channels of the map at 128, 64, 32 and 16 pixels


@dataclass(frozen=True)
class ControlBatch:
    "What one step learns from."

    latents: torch.Tensor  # (B, 4, 16, 16)
    captions: list[str]
    kinds: tuple[str, ...]  # of the maps, the same for the whole batch
    maps: list[torch.Tensor]  # for each kind (B, 3, 128, 128), 0 to 1
    moments: torch.Tensor  # (B,), 0 is the picture and 1 is noise
    noise: torch.Tensor  # like the latents


def control_batch(
    data: FreeData,
    kinds: tuple[str, ...],  # what the net learns
    config: ControlTrainingConfig,
    step: int,  # decides the batch, with the seed
    two_at_times: float = 0.0,  # share of the steps that get two kinds of maps
) -> ControlBatch:
    "The batch of one step."
    rng, b = np.random.default_rng((config.seed, 21, step)), config.batch
    chosen = rng.integers(len(data.scenes), size=b)
    together = 2 if len(kinds) > 1 and rng.random() < two_at_times else 1
    names = tuple(kinds[i] for i in sorted(rng.permutation(len(kinds))[:together]))
    maps = [map_tensor([control_map(name, data.scenes[i], data.pictures[i]) for i in chosen]) for name in names]
    captions = ["" if rng.random() < config.caption_dropout else data.captions[i] for i in chosen]
    moments = torch.from_numpy(((np.arange(b) + rng.random(b)) / b) ** config.toward_noise).float()
    noise = torch.from_numpy(rng.standard_normal((b, *data.latents.shape[1:]), dtype=np.float32))
    return ControlBatch(data.latents[chosen], captions, names, maps, moments, noise)


def train_controlnet(
    out_dir: Path,  # keeps the checkpoint and the log
    name: str,  # of the stage, such as "sd15 canny"
    net: torch.nn.Module,  # a ControlNet of any family; trained in place
    loss_of: Callable[[torch.nn.Module, ControlBatch], torch.Tensor],  # one of the losses below
    data: FreeData,
    kinds: tuple[str, ...],  # keys of `CONTROL_MAPS`
    config: ControlTrainingConfig,
    two_at_times: float = 0.0,  # share of the steps that get two kinds of maps
    stop_after: int | None = None,  # end early, after so many steps, as if interrupted
) -> torch.nn.Module:  # the averaged weights
    "Train a ControlNet while the model it steers stays as it is."
    net.train().requires_grad_(True)
    averaged = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint = Checkpoint(out_dir / f"{name.replace(' ', '_')}.pt", {"net": net, "ema": averaged, "optimizer": optimizer})
    step, log = checkpoint.load(), TrainingLog(out_dir / LOG_NAME, name, every=25)
    last = min(config.steps, stop_after or config.steps)
    while step < last:
        loss = loss_of(net, control_batch(data, kinds, config, step, two_at_times))
        update(optimizer, loss, config.learning_rate * one_cycle((step + 1) / config.steps))
        step += 1
        update_ema(averaged, net, step, config.ema_decay)
        log.add(step, {"loss": loss})
        if step % 100 == 0 or step == last:
            checkpoint.save(step)
    return averaged


# %%
def wake(
    net: torch.nn.Module,  # a ControlNet with `controlnet_cond_embedding`
    seed: int = 0,
) -> torch.nn.Module:  # the same
    "Let the map reach the net from the first step; its outputs stay zero, so nothing changes yet."
    generator = torch.Generator().manual_seed(seed)
    embedding = net.controlnet_cond_embedding
    for module in [embedding.conv_in, *embedding.blocks, embedding.conv_out]:
        fan = module.weight[0].numel()
        module.weight.data.normal_(0, (2 / fan) ** 0.5, generator=generator)
        module.bias.data.zero_()
    return net


def denoiser_loss(
    pipeline,  # StableDiffusionPipeline or StableDiffusionXLPipeline, frozen
    union_modes: dict[str, int] | None = None,  # kind -> number, for a union net
) -> Callable[[torch.nn.Module, ControlBatch], torch.Tensor]:  # for `train_controlnet`
    "Squared error of the velocity that a steered U-Net predicts."
    unet, scheduler, xl = pipeline.unet.requires_grad_(False), new_scheduler(), hasattr(pipeline, "text_encoder_2")
    unet.set_attn_processor(AttnProcessor())

    def loss_of(net: torch.nn.Module, batch: ControlBatch) -> torch.Tensor:
        timesteps = (batch.moments * 1000).long().clamp(max=999)
        noisy = scheduler.add_noise(batch.latents, batch.noise, timesteps)
        wanted = scheduler.get_velocity(batch.latents, batch.noise, timesteps)
        if xl:
            states, pooled = sdxl_conditioning((pipeline.text_encoder, pipeline.text_encoder_2), pipeline.tokenizer, batch.captions)
            added = {"text_embeds": pooled, "time_ids": torch.tensor([CLEAN] * len(noisy), dtype=torch.float32)}
        else:
            with torch.no_grad():
                states, added = pipeline.text_encoder(token_ids(pipeline.tokenizer, batch.captions)).last_hidden_state, None
        if union_modes is None:
            steered = net(noisy, timesteps, states, batch.maps[0], added_cond_kwargs=added)
        else:
            numbers = [union_modes[kind] for kind in batch.kinds]
            types = torch.zeros(len(noisy), 6)
            types[:, numbers] = 1
            steered = net(noisy, timesteps, states, batch.maps, types, numbers, added_cond_kwargs=added)
        predicted = unet(
            noisy, timesteps, states, added_cond_kwargs=added, down_block_additional_residuals=steered.down_block_res_samples,
            mid_block_additional_residual=steered.mid_block_res_sample,
        ).sample
        return F.mse_loss(predicted, wanted)

    return loss_of


# %%
def new_controlnet(
    unet,  # UNet2DConditionModel that it will steer
    config: ControlTrainingConfig,
) -> ControlNetModel:
    "A copy of the U-Net's first half that sees a map."
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=config.widths)
    net.set_attn_processor(AttnProcessor())
    return wake(net, config.seed)


def save_controlnet(
    net: torch.nn.Module,  # float32; left as it is
    folder: Path,
) -> None:
    "Write a ControlNet in half precision."
    copy.deepcopy(net).half().save_pretrained(folder, variant="fp16")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


# %%
SDXL_UNION = {"openpose": 0, "depth": 1, "softedge": 2, "canny": 3, "normal": 4, "segment": 5}  # kind -> mode
FLUX_UNION = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "openpose": 4, "gray": 5, "low_quality": 6}  # kind -> mode


def borrow(
    net: torch.nn.Module,  # changed in place
    trained: torch.nn.Module,  # another net that knows part of the task
) -> torch.nn.Module:  # the same as `net`
    "Take over every weight that has the same name and shape."
    own = net.state_dict()
    net.load_state_dict({k: v for k, v in trained.state_dict().items() if k in own and own[k].shape == v.shape}, strict=False)
    return net


def new_union(
    unet,  # UNet2DConditionModel that it will steer
    config: ControlTrainingConfig,
) -> ControlNetUnionModel:
    "One net for six kinds of maps."
    width = unet.config.block_out_channels[0]
    settings = {k: v for k, v in unet.config.items() if k in ControlNetUnionModel._get_init_keys(ControlNetUnionModel)}
    net = ControlNetUnionModel(**settings | dict(
        conditioning_embedding_out_channels=config.widths, num_control_type=6, num_trans_channel=width, num_trans_head=4,
        num_trans_layer=1, num_proj_channel=width,
    ))
    net.set_attn_processor(AttnProcessor())
    borrow(net, unet)
    torch.nn.init.zeros_(net.control_add_embedding.linear_2.weight)
    torch.nn.init.zeros_(net.control_add_embedding.linear_2.bias)
    return wake(net, config.seed)


# %%
def new_flux_controlnet(
    transformer: FluxTransformer2DModel,  # that it will steer
    config: ControlTrainingConfig,
    num_mode: int | None = None,  # kinds of maps of a union net
) -> FluxControlNetModel:
    "A copy of the transformer's double blocks that sees a map through convolutions, as the nets of XLabs do."
    double = len(transformer.transformer_blocks)
    settings = dict(transformer.config) | dict(
        num_layers=double, num_single_layers=0, num_mode=num_mode, conditioning_embedding_channels=4, patch_size=2,
    )
    names = FluxControlNetModel._get_init_keys(FluxControlNetModel)
    net = FluxControlNetModel(**{name: value for name, value in settings.items() if name in names})
    borrow(net, transformer)
    generator = torch.Generator().manual_seed(config.seed)
    hint = net.input_hint_block
    for module in [hint.conv_in, *hint.blocks, hint.conv_out]:
        module.weight.data.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
        module.bias.data.zero_()
    return net


def flux_control_loss(
    pipeline: FluxPipeline,  # frozen
    union_modes: dict[str, int] | None = None,  # kind -> number, for a union net
) -> Callable[[torch.nn.Module, ControlBatch], torch.Tensor]:  # for `train_controlnet`
    "Squared error of the velocity that a steered transformer predicts."
    transformer = pipeline.transformer.requires_grad_(False)

    def loss_of(net: FluxControlNetModel, batch: ControlBatch) -> torch.Tensor:
        tokens, noise, sigma = pack(batch.latents), pack(batch.noise), batch.moments[:, None, None]
        inputs = flux_conditioning(pipeline, batch.captions, pipeline.tokenizer_2.model_max_length) | dict(
            hidden_states=(1 - sigma) * tokens + sigma * noise, timestep=batch.moments, guidance=torch.ones(len(tokens)),
        )
        mode = None if union_modes is None else torch.full((len(tokens), 1), union_modes[batch.kinds[0]])
        steered = net(controlnet_cond=batch.maps[0] * 2 - 1, controlnet_mode=mode, **inputs)
        predicted = transformer(
            **inputs, controlnet_block_samples=steered.controlnet_block_samples, controlnet_blocks_repeat=True,
            controlnet_single_block_samples=steered.controlnet_single_block_samples,
        ).sample
        return F.mse_loss(predicted, noise - tokens)

    return loss_of
