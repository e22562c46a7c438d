"""Effects that a LoRA can learn in two minutes, trained, saved as diffusers saves them, and read back from the pixels."""

# %%
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw
from scipy import ndimage

from .shapes import (
    BACKGROUNDS, COLORS, IMAGE_SIZE, JITTER, SUPERSAMPLE, Scene, describe, draw_shape, placements, random_scene, read_scene, shape_templates,
)
from .shapes_flux import flux_conditioning, pack
from .shapes_sdxl import CLEAN, encode_pictures, sdxl_conditioning
from .shapes_training import LOG_NAME, Checkpoint, TrainingLog, new_scheduler, one_cycle, token_ids, update

# %%
STROKE = 3  # pixels of an outline
HUE_SHIFT = dict(zip(COLORS, [*list(COLORS)[3:], *list(COLORS)[:3]]))  # color -> the color that takes its place


def heart_corners(
    n: int = 60,  # points
) -> list[tuple[float, float]]:  # x, y in units of the radius, y down
    "A shape that the model has never seen."
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return [(float(px), float(py)) for px, py in zip(x, y - 0.1)]


def draw_heart(
    draw: ImageDraw.ImageDraw,  # of a picture of mode "L"
    shape: str,  # not looked at
    x: float,  # centre, pixels of that picture
    y: float,  # centre, pixels of that picture
    radius: float,  # pixels of that picture
) -> None:
    "Fill a heart with 255."
    draw.polygon([(x + px * radius, y + py * radius) for px, py in heart_corners()], fill=255)


def outline_of(
    mask: Image.Image,  # mode "L", enlarged by `SUPERSAMPLE`
) -> Image.Image:  # the same size
    "A stroke along the inside of a mask's edge."
    filled = np.asarray(mask) > 127
    stroke = filled & (ndimage.distance_transform_edt(filled) <= STROKE * SUPERSAMPLE)
    return Image.fromarray(stroke.astype(np.uint8) * 255)


def render_effect(
    effect: str,  # a key of `EFFECTS`
    scene: Scene,
    rng: np.random.Generator,  # moves objects a little, as `render` does
) -> Image.Image:  # 128 x 128, RGB
    "Draw a scene as the effect has it."
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[scene.background])
    for item, *place in placements(scene):
        x, y, radius = ((v + d) * SUPERSAMPLE for v, d in zip(place, rng.uniform(-1, 1, 3) * (JITTER, JITTER, 1)))
        mask = Image.new("L", (IMAGE_SIZE * SUPERSAMPLE,) * 2, 0)
        (draw_heart if effect == "heart" else draw_shape)(ImageDraw.Draw(mask), item.shape, x, y, radius)
        mask = outline_of(mask) if effect == "outline" else mask
        picture.paste(COLORS[HUE_SHIFT[item.color] if effect == "hue_shift" else item.color], mask=mask.reduce(SUPERSAMPLE))
    return picture


def effect_example(
    effect: str,  # a key of `EFFECTS`
    rng: np.random.Generator,  # the source of chance
    held_out: bool = False,  # True: a test scene, told in full
    singles: float = 0.6,  # share of scenes with one object
) -> tuple[Image.Image, str, Scene]:  # picture, caption, and the scene as told
    "One picture with the effect. Hearts stand alone; rings, whose band is hardly wider than two strokes, get no outline."
    n_objects = 1 if effect == "heart" or rng.random() < singles else 2
    scene = random_scene(rng, n_objects, held_out=held_out)
    while effect == "outline" and any(o.shape == "ring" for o in scene.objects):
        scene = random_scene(rng, n_objects, held_out=held_out)
    if effect == "heart":
        scene = replace(scene, objects=(replace(scene.objects[0], shape="circle"),))
    caption = describe(scene, rng, full=held_out or effect == "heart")
    return render_effect(effect, scene, rng), caption.replace("circle", "heart") if effect == "heart" else caption, scene


# %%
def drawn_regions(
    image: Image.Image,  # 128 x 128
) -> np.ndarray:  # (128, 128) bool
    "What differs from the background."
    pixels = np.asarray(image.convert("RGB"), float)
    border = np.ones(pixels.shape[:2], bool)
    border[4:-4, 4:-4] = False
    return np.square(pixels - np.median(pixels[border], axis=0)).sum(-1) > 55**2


def outline_measure(
    image: Image.Image,  # 128 x 128
    scene: Scene,  # not looked at
) -> float:  # 1 is twice the stroke or thinner, as where two strokes meet in a corner; 0 is four times the stroke or thicker
    "How thin the thickest part of the drawing is."
    thickness = 2 * ndimage.distance_transform_edt(drawn_regions(image)).max()
    return float(np.clip(2 - thickness / (2 * STROKE), 0, 1)) if thickness else 0.0


def hue_measure(
    image: Image.Image,  # 128 x 128
    scene: Scene,  # as it was told
) -> float:  # share of the objects with the color that takes the told one's place
    "How many colors are the shifted ones."
    seen, wanted = [o.color for o in read_scene(image).objects], [HUE_SHIFT[o.color] for o in scene.objects]
    found = 0
    for color in wanted:
        if color in seen:
            seen.remove(color)
            found += 1
    return found / len(wanted)


def heart_measure(
    image: Image.Image,  # 128 x 128
    scene: Scene,  # not looked at
) -> float:  # intersection over union with a heart less that with the best other shape, -1 to 1
    "How much more the largest thing is a heart than anything else."
    labels, count = ndimage.label(drawn_regions(image))
    if not count:
        return -1.0
    mask = labels == np.argmax(np.bincount(labels.ravel())[1:]) + 1
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    cut = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8) * 255)
    cut = np.asarray(cut.resize((48, 48), Image.Resampling.BILINEAR)) > 127
    big = Image.new("L", (400, 400))
    draw_heart(ImageDraw.Draw(big), "heart", 200, 200, 160)
    heart = np.asarray(big.crop(big.getbbox()).resize((48, 48), Image.Resampling.BOX)) > 127
    overlap = lambda template: (cut & template).sum() / (cut | template).sum()
    return float(overlap(heart) - max(overlap(template) for template, _ in shape_templates().values()))


@dataclass(frozen=True)
class Effect:
    "How an effect is read from a picture."

    measure: Callable[[Image.Image, Scene], float]  # picture and the scene as told
    threshold: float  # at least this much is the effect
    text_encoder: bool = False  # whether a word is new, so that the text encoder learns too


EFFECTS = {
    "outline": Effect(outline_measure, 0.5),
    "hue_shift": Effect(hue_measure, 1.0),
    "heart": Effect(heart_measure, 0.0, text_encoder=True),
}


# %%
@dataclass(frozen=True)
class LoraTrainingConfig:
    "Everything that decides what a LoRA learns."

    seed: int = 0  # of scenes, first weights and batches
    scenes: int = 480
    steps: int = 90
    batch: int = 20  # latents
    learning_rate: float = 4e-3  # peak
    rank: int = 8
    caption_dropout: float = 0.1  # share of captions replaced by ""


UNET_LAYERS = "to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 conv_in conv_out".split()
FLUX_LAYERS = "to_q to_k to_v to_out.0 proj_mlp proj_out x_embedder ff.net.0.proj ff.net.2 norm1.linear norm.linear".split()
TEXT_LAYERS = "q_proj k_proj v_proj out_proj fc1 fc2".split()


def lora_loss(
    pipeline,  # of any of the three families
    latents: torch.Tensor,  # (B, 4, 16, 16)
    captions: list[str],  # B of them
    noise: torch.Tensor,  # like the latents
    moments: torch.Tensor,  # (B,), 0 is the picture and 1 is noise
) -> torch.Tensor:  # scalar
    "The loss that the model itself was trained with."
    if hasattr(pipeline, "transformer"):
        tokens, noise, sigma = pack(latents), pack(noise), moments[:, None, None]
        conditioning = flux_conditioning(pipeline, captions, pipeline.tokenizer_2.model_max_length)
        predicted = pipeline.transformer(
            (1 - sigma) * tokens + sigma * noise, timestep=moments, guidance=torch.ones(len(tokens)), **conditioning
        ).sample
        return F.mse_loss(predicted, noise - tokens)
    scheduler, timesteps, added = new_scheduler(), (moments * 1000).long().clamp(max=999), None
    if hasattr(pipeline, "text_encoder_2"):
        states, pooled = sdxl_conditioning((pipeline.text_encoder, pipeline.text_encoder_2), pipeline.tokenizer, captions)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([CLEAN] * len(latents), dtype=torch.float32)}
    else:
        states = pipeline.text_encoder(token_ids(pipeline.tokenizer, captions)).last_hidden_state
    predicted = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states, added_cond_kwargs=added).sample
    return F.mse_loss(predicted, scheduler.get_velocity(latents, noise, timesteps))


def train_lora(
    out_dir: Path,  # keeps the log
    name: str,  # of the stage, such as "sd15 outline"
    pipeline,  # of any of the three families; gets an adapter
    effect: str,  # a key of `EFFECTS`
    config: LoraTrainingConfig,
) -> None:
    "Teach the pipeline an effect through an adapter on its denoiser, and on its text encoder where a word is new."
    torch.manual_seed(config.seed)
    rng = np.random.default_rng((config.seed, 40))
    examples = [effect_example(effect, rng) for _ in range(config.scenes)]
    latents, captions = encode_pictures(pipeline.vae, [p for p, _, _ in examples]), [c for _, c, _ in examples]
    adapter = dict(r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian")
    flux = hasattr(pipeline, "transformer")
    trained = [pipeline.transformer if flux else pipeline.unet]
    if not flux:
        pipeline.unet.set_attn_processor(AttnProcessor())
    trained[0].requires_grad_(False).add_adapter(LoraConfig(target_modules=FLUX_LAYERS if flux else UNET_LAYERS, **adapter))
    if EFFECTS[effect].text_encoder:
        inject_adapter_in_model(LoraConfig(target_modules=TEXT_LAYERS, **adapter), pipeline.text_encoder.requires_grad_(False))
        trained.append(pipeline.text_encoder)
    optimizer = torch.optim.AdamW([p for m in trained for p in m.parameters() if p.requires_grad], weight_decay=0.01, fused=True)
    log = TrainingLog(out_dir / LOG_NAME, name, every=15)
    for step in range(config.steps):
        rng = np.random.default_rng((config.seed, 41, step))
        chosen = rng.integers(len(latents), size=config.batch)
        told = ["" if rng.random() < config.caption_dropout else captions[i] for i in chosen]
        moments = torch.from_numpy(((np.arange(config.batch) + rng.random(config.batch)) / config.batch) ** 0.7).float()
        noise = torch.from_numpy(rng.standard_normal((config.batch, *latents.shape[1:]), dtype=np.float32))
        loss = lora_loss(pipeline, latents[chosen], told, noise, moments)
        update(optimizer, loss, config.learning_rate * one_cycle((step + 1) / config.steps))
        log.add(step + 1, {"loss": loss})


def save_lora(
    pipeline,  # with the adapter that was trained
    folder: Path,
    effect: str,  # names the file
) -> Path:  # of the file
    "Write the adapter in half precision, as diffusers names its keys."
    def half(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {k: v.half().contiguous() for k, v in convert_state_dict_to_diffusers(get_peft_model_state_dict(module)).items()}

    layers = {f"{'transformer' if hasattr(pipeline, 'transformer') else 'unet'}_lora_layers": half(
        pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    )}
    if EFFECTS[effect].text_encoder:
        layers["text_encoder_lora_layers"] = half(pipeline.text_encoder)
    pipeline.save_lora_weights(folder, weight_name=f"{effect}.safetensors", **layers)
    (folder / f"{effect}.safetensors").chmod(0o644)
    return folder / f"{effect}.safetensors"
