"""Stable Diffusion XL in small: two text encoders, micro-conditioning, and a denoiser that starts from the first model's."""

# %%
import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .shapes import BACKGROUNDS, IMAGE_SIZE, Scene, describe, load_builtin_pipeline, random_scene, render
from .shapes_training import LOG_NAME, Checkpoint, TrainingLog, new_scheduler, one_cycle, picture_tensor, token_ids, update, update_ema

# %%
@dataclass(frozen=True)
class SceneData:
    "Training pictures, encoded once, with captions and SDXL's micro-conditioning."

    latents: torch.Tensor  # (N, 4, 16, 16), scenes with one object first
    captions: list[list[str]]  # for each of N, some wordings
    time_ids: torch.Tensor  # (N, 6): original height and width, crop top and left, target height and width
    singles: int  # how many of N have one object


CLEAN = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)  # the micro-conditioning of a sharp, uncropped picture
BLURRED_SIDES, LARGEST_CROP = (24, 32, 48, 64), 48  # pixels


def altered_picture(
    scene: Scene,  # what to draw
    rng: np.random.Generator,  # the source of chance
) -> tuple[Image.Image, tuple[int, ...]]:  # 128 x 128, and its micro-conditioning
    "A picture enlarged from a smaller original, or cut from a larger one at some corner, or both."
    picture, (height, width, top, left, *target) = render(scene, rng), CLEAN
    kind = rng.choice(["blurred", "cropped", "both"], p=[0.45, 0.45, 0.1])
    if kind != "blurred":
        top, left = (int(v) for v in rng.integers(0, LARGEST_CROP + 1, 2))
        moved = Image.new("RGB", picture.size, BACKGROUNDS[scene.background])
        moved.paste(picture, (-left, -top))
        picture = moved
    if kind != "cropped":
        height = width = int(rng.choice(BLURRED_SIDES))
        picture = picture.resize((width, height), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BICUBIC)
    return picture, (height, width, top, left, *target)


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL,
    pictures: list[Image.Image],  # 128 x 128
    batch: int = 50,  # pictures at once
) -> torch.Tensor:  # (N, 4, 16, 16)
    "The latents of pictures."
    parts = [np.stack([np.asarray(p) for p in pictures[i : i + batch]]) for i in range(0, len(pictures), batch)]
    return torch.cat([vae.encode(picture_tensor(part)).latent_dist.mean for part in parts])


def encode_scene_data(
    vae: AutoencoderKL,
    singles: int,  # scenes with one object
    pairs: int,  # scenes with two
    altered: bool = False,  # True: blurred and cropped pictures
    wordings: int = 3,  # captions of each
    seed: int = 0,
) -> SceneData:
    "Draw training scenes, encode them, and tell them in words."
    rng, latents, captions, times = np.random.default_rng((seed, 10 + altered)), [], [], []
    for start in range(0, singles + pairs, 500):
        scenes = [random_scene(rng, 1 if i < singles else 2, held_out=False) for i in range(start, min(start + 500, singles + pairs))]
        drawn = [altered_picture(s, rng) if altered else (render(s, rng), CLEAN) for s in scenes]
        latents.append(encode_pictures(vae, [picture for picture, _ in drawn]))
        times += [time for _, time in drawn]
        captions += [[describe(s, rng) for _ in range(wordings)] for s in scenes]
    return SceneData(torch.cat(latents), captions, torch.tensor(times, dtype=torch.float32), singles)


def kept_scene_data(
    path: Path,  # a file that is written once
    *arguments,  # of `encode_scene_data`
    **options,  # likewise
) -> SceneData:
    "Scenes from a file, or encoded into it."
    if not path.exists():
        data = encode_scene_data(*arguments, **options)
        torch.save(vars(data), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return SceneData(**torch.load(path, weights_only=True))


# %%
@dataclass(frozen=True)
class SdxlTrainingConfig:
    "Everything that decides what is learned, beyond the first model's weights."

    seed: int = 0  # of first weights and batches
    singles: int = 4500  # clean scenes with one object
    pairs: int = 5500  # clean scenes with two
    altered_singles: int = 1200  # blurred or cropped ones
    altered_pairs: int = 1000
    altered_share: float = 0.35  # of each batch
    time_width: int = 32  # channels for each of the six numbers of the micro-conditioning
    steps: int = 450
    batch: int = 32  # latents
    learning_rate: float = 4e-4  # peak
    caption_dropout: float = 0.1  # share of captions replaced by "", for guidance
    ema_decay: float = 0.99  # of the averaged weights


# %%
def deeper(
    encoder: CLIPTextModel,  # with N layers
    model_class: type,  # CLIPTextModel or CLIPTextModelWithProjection
) -> CLIPTextModel | CLIPTextModelWithProjection:  # with N + 1
    "The same encoder below one more layer that changes nothing, so that the last state but one is the old last one."
    settings = encoder.config.to_dict() | {"num_hidden_layers": encoder.config.num_hidden_layers + 1, "dtype": None}
    model = model_class(CLIPTextConfig(**settings))
    old, new = getattr(encoder, "text_model", encoder), getattr(model, "text_model", model)
    new.load_state_dict(old.state_dict(), strict=False)
    last = new.encoder.layers[-1]
    for layer in (last.self_attn.out_proj, last.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    if model_class is CLIPTextModelWithProjection:
        torch.nn.init.eye_(model.text_projection.weight)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sdxl_conditioning(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    captions: list[str],  # B of them
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, L, both widths) states, (B, projection) pooled
    "What StableDiffusionXLPipeline makes of its prompts."
    ids = token_ids(tokenizer, captions)
    first, second = (encoder(ids, output_hidden_states=True) for encoder in encoders)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


# %%
@torch.no_grad()
def fold_norm(
    unet: UNet2DConditionModel,  # trained on normalised states; changed in place
    norm: torch.nn.LayerNorm,  # that is applied no more
    deviation: float,  # of the states before it, over channels, on average
    extra: int,  # channels of a second encoder, not listened to at first
) -> None:
    "Let the cross attentions do what the text encoder's last normalisation did, as far as one deviation fits all tokens."
    for name, module in unet.named_modules():
        if not name.endswith("attn2"):
            continue
        shift = module.to_v.weight @ norm.bias
        module.to_out[0].bias += module.to_out[0].weight @ shift
        for part in ("to_k", "to_v"):
            weight = getattr(module, part).weight * norm.weight / deviation
            weight = weight - weight.mean(1, keepdim=True)
            linear = torch.nn.Linear(weight.shape[1] + extra, weight.shape[0], bias=False)
            linear.weight.copy_(F.pad(weight, (0, extra)))
            setattr(module, part, linear)


def new_sdxl_unet(
    base: UNet2DConditionModel,  # the first model's denoiser
    encoder: CLIPTextModel,  # the first model's
    tokenizer: CLIPTokenizer,
    config: SdxlTrainingConfig,
) -> UNet2DConditionModel:
    "The first model's denoiser with ears for two encoders, a pooled caption and six numbers."
    text = getattr(encoder, "text_model", encoder)
    width = encoder.config.hidden_size
    scenes = np.random.default_rng((config.seed, 12))
    captions = [describe(random_scene(scenes, 1 + i % 2, held_out=False), scenes) for i in range(64)]
    with torch.no_grad():
        states = deeper(encoder, CLIPTextModel)(token_ids(tokenizer, captions), output_hidden_states=True).hidden_states[-2]
    settings = dict(base.config) | {
        "cross_attention_dim": 2 * width, "addition_embed_type": "text_time", "addition_time_embed_dim": config.time_width,
        "projection_class_embeddings_input_dim": 6 * config.time_width + width,
    }
    old = copy.deepcopy(base)
    fold_norm(old, text.final_layer_norm, float(states.std(-1).mean()), width)
    unet = UNet2DConditionModel.from_config(settings)
    unet.load_state_dict(old.state_dict(), strict=False)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.weight)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return unet


# %%
def sdxl_batch(
    clean: SceneData,
    altered: SceneData,
    config: SdxlTrainingConfig,
    step: int,  # decides the batch, with the seed
) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor, torch.Tensor]:  # latents, time ids, captions, noise, timesteps
    "The batch of one step: half single objects, a share of altered pictures, timesteps spread evenly."
    rng, b = np.random.default_rng((config.seed, 11, step)), config.batch
    latents, times, captions = [], [], []
    for _ in range(b):
        data = altered if rng.random() < config.altered_share else clean
        i = int(rng.integers(data.singles) if rng.random() < 0.5 else rng.integers(data.singles, len(data.latents)))
        latents.append(data.latents[i])
        times.append(data.time_ids[i])
        captions.append("" if rng.random() < config.caption_dropout else str(rng.choice(data.captions[i])))
    timesteps = torch.from_numpy(((np.arange(b) + rng.random(b)) / b * 1000).astype(int))
    noise = torch.from_numpy(rng.standard_normal((b, *latents[0].shape), dtype=np.float32))
    return torch.stack(latents), torch.stack(times), captions, noise, timesteps


def train_sdxl_unet(
    out_dir: Path,  # keeps `sdxl_unet.pt` and the log
    config: SdxlTrainingConfig,
    parts: StableDiffusionXLPipeline,  # its denoiser is where training starts
    clean: SceneData,
    altered: SceneData,
    stop_after: int | None = None,  # end early, after so many steps, as if interrupted
) -> UNet2DConditionModel:  # the averaged weights
    "Train the denoiser of `parts`, continuing from its checkpoint."
    torch.manual_seed(config.seed)
    scheduler, unet = new_scheduler(), copy.deepcopy(parts.unet).train().requires_grad_(True)
    averaged = copy.deepcopy(unet).eval().requires_grad_(False)
    unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint = Checkpoint(out_dir / "sdxl_unet.pt", {"unet": unet, "ema": averaged, "optimizer": optimizer})
    step, log = checkpoint.load(), TrainingLog(out_dir / LOG_NAME, "sdxl unet", every=25)
    last = min(config.steps, stop_after or config.steps)
    while step < last:
        latents, times, captions, noise, timesteps = sdxl_batch(clean, altered, config, step)
        states, pooled = sdxl_conditioning((parts.text_encoder, parts.text_encoder_2), parts.tokenizer, captions)
        noisy, wanted = scheduler.add_noise(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps)
        added = {"text_embeds": pooled, "time_ids": times}
        loss = F.mse_loss(unet(noisy, timesteps, states, added_cond_kwargs=added).sample, wanted)
        update(optimizer, loss, config.learning_rate * one_cycle((step + 1) / config.steps))
        step += 1
        update_ema(averaged, unet, step, config.ema_decay)
        log.add(step, {"loss": loss})
        if step % 100 == 0 or step == last:
            checkpoint.save(step)
    return averaged


# %%
def new_sdxl_pipeline(
    config: SdxlTrainingConfig,
) -> StableDiffusionXLPipeline:
    "The first model turned into an SDXL one, before any training of its own."
    base = load_builtin_pipeline("shapes-sd15")
    encoder, tokenizer = base.text_encoder, base.tokenizer
    return assemble_sdxl(
        base.vae, tokenizer, deeper(encoder, CLIPTextModel), deeper(encoder, CLIPTextModelWithProjection),
        new_sdxl_unet(base.unet, encoder, tokenizer, config),
    )


def assemble_sdxl(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,  # of both encoders
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    unet: UNet2DConditionModel,
) -> StableDiffusionXLPipeline:
    "Put the parts together."
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=text_encoder, text_encoder_2=text_encoder_2, tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=new_scheduler(), force_zeros_for_empty_prompt=False, add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_half(
    pipeline,  # of diffusers, float32; left as it is
    folder: Path,  # of the diffusers repository
    shared: tuple[str, ...] = ("vae",),  # parts that the first model's folder holds already
) -> None:
    "Write the pipeline in half precision, without what is shared."
    half = {n: copy.deepcopy(part).half() for n, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    whole = {n: part for n, part in pipeline.components.items() if n not in half}
    saved = type(pipeline)(**half, **whole)
    saved.save_pretrained(folder, variant="fp16", safe_serialization=True)
    for name in shared:
        shutil.rmtree(folder / name)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
