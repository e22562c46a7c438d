"""Flux in small: a T5 encoder, a transformer that learns to undo noise along straight lines, and guidance learnt as an input."""

# %%
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from .shapes import describe, load_builtin_pipeline, random_scene
from .shapes_sdxl import SceneData
from .shapes_training import (
    LOG_NAME, PARSE_CLASSES, WORDS, Checkpoint, TrainingLog, one_cycle, parse_loss, parse_targets, token_ids, update, update_ema,
)

# %%
@dataclass(frozen=True)
class FluxTrainingConfig:
    "Everything that decides what is learned."

    seed: int = 0  # of scenes, first weights and batches
    text_width: int = 128  # channels of the T5 encoder
    text_layers: int = 2
    text_length: int = 24  # T5 tokens, padding included
    text_steps: int = 500
    text_batch: int = 64  # captions
    text_learning_rate: float = 3e-3  # peak
    heads: int = 4  # of 32 channels each
    double_blocks: int = 2  # text and picture with weights of their own
    single_blocks: int = 4  # with the same weights
    steps: int = 1000
    batch: int = 32  # latents
    matrix_learning_rate: float = 0.02  # peak, Muon
    learning_rate: float = 3e-3  # peak, AdamW, for what is not a hidden matrix
    caption_dropout: float = 0.1  # share of captions replaced by "" for both encoders
    single_share: float = 0.7  # of scenes with one object
    toward_noise: float = 0.5  # mean of the normal distribution behind the logit of the moments
    ema_decay: float = 0.99  # of the averaged weights
    guided_steps: int = 80  # of guidance distillation
    guided_batch: int = 16  # latents
    largest_guidance: float = 4.0


# %%
def build_t5_tokenizer(
    token_length: int,  # of a caption, padding included
) -> T5TokenizerFast:
    "A T5 tokenizer: our words, and letters for all others."
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -2.0) for word in dict.fromkeys(WORDS)]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.-'"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=token_length)


def t5_ids(
    tokenizer: T5TokenizerFast,
    captions: list[str],  # B of them
    length: int,  # tokens, padding included
) -> torch.Tensor:  # (B, length) int64
    "Tokens as FluxPipeline makes them."
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def train_t5(
    out_dir: Path,  # keeps `t5.pt` and the log
    config: FluxTrainingConfig,
) -> tuple[T5TokenizerFast, T5EncoderModel]:  # the encoder frozen
    "Train the T5 encoder to parse, as the CLIP encoder was."
    torch.manual_seed(config.seed)
    tokenizer, width = build_t5_tokenizer(config.text_length), config.text_width
    model = torch.nn.ModuleDict({"encoder": T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=config.text_layers, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", relative_attention_num_buckets=16, relative_attention_max_distance=24,
    ))})
    model["heads"] = torch.nn.Linear(width, sum(PARSE_CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    checkpoint, log = Checkpoint(out_dir / "t5.pt", {"model": model, "optimizer": optimizer}), TrainingLog(out_dir / LOG_NAME, "t5", 50)
    for step in range(checkpoint.load(), config.text_steps):
        rng = np.random.default_rng((config.seed, 30, step))
        scenes = [random_scene(rng, 1 + (i % 2), held_out=False) for i in range(config.text_batch)]
        ids = t5_ids(tokenizer, [describe(s, rng) for s in scenes], config.text_length)
        ended = ids == tokenizer.pad_token_id
        ended[:, -1] = True
        logits = model["heads"](model["encoder"](ids).last_hidden_state)
        figures = parse_loss(logits, torch.tensor([parse_targets(s) for s in scenes]), ended)
        update(optimizer, figures["loss"], config.text_learning_rate * one_cycle((step + 1) / config.text_steps))
        log.add(step + 1, figures)
    checkpoint.save(config.text_steps)
    return tokenizer, model["encoder"].eval().requires_grad_(False)


# %%
def new_transformer(
    config: FluxTrainingConfig,
) -> FluxTransformer2DModel:
    "Flux's transformer; its blocks and its output do nothing at first."
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=config.double_blocks, num_single_layers=config.single_blocks, attention_head_dim=32,
        num_attention_heads=config.heads, joint_attention_dim=config.text_width, pooled_projection_dim=128, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (".norm" in name or name.startswith("norm_out") or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer


def new_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    "Straight lines from noise to pictures; larger pictures spend more of the steps near the noise."
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=64, max_image_seq_len=256, base_shift=0.5, max_shift=1.15,
    )


def pack(
    latents: torch.Tensor,  # (B, 4, H, W)
) -> torch.Tensor:  # (B, H W / 4, 16)
    "Squares of two by two latents as tokens."
    b, c, h, w = latents.shape
    return FluxPipeline._pack_latents(latents, b, c, h, w)


def image_ids(
    side: int = 8,  # tokens of a row
) -> torch.Tensor:  # (side ** 2, 3)
    "Where each token stands."
    return FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)


# %%
@torch.no_grad()
def flux_conditioning(
    parts,  # has tokenizer, text_encoder, tokenizer_2, text_encoder_2
    captions: list[str],  # B of them
    length: int,  # T5 tokens
) -> dict[str, torch.Tensor]:  # arguments of the transformer
    "What FluxPipeline makes of its prompts."
    return {
        "pooled_projections": parts.text_encoder(token_ids(parts.tokenizer, captions)).pooler_output,
        "encoder_hidden_states": parts.text_encoder_2(t5_ids(parts.tokenizer_2, captions, length)).last_hidden_state,
        "txt_ids": torch.zeros(length, 3),
        "img_ids": image_ids(),
    }


@dataclass(frozen=True)
class FluxBatch:
    "What one step learns from."

    tokens: torch.Tensor  # (B, 64, 16), of clean pictures
    captions: list[str]
    noise: torch.Tensor  # like the tokens
    moments: torch.Tensor  # (B,), 0 is the picture and 1 is noise

    @property
    def noisy(self) -> torch.Tensor:  # like the tokens
        sigma = self.moments[:, None, None]
        return (1 - sigma) * self.tokens + sigma * self.noise


def flux_batch(
    tokens: torch.Tensor,  # (N, 64, 16), of all training pictures
    data: SceneData,  # their captions
    config: FluxTrainingConfig,
    step: int,  # decides the batch, with the seed
    batch: int,  # its size
) -> FluxBatch:
    "The batch of one step; the moments are spread evenly over a logit-normal distribution."
    rng = np.random.default_rng((config.seed, 31, step))
    single = rng.random(batch) < config.single_share
    chosen = np.where(single, rng.integers(data.singles, size=batch), rng.integers(data.singles, len(tokens), size=batch))
    captions = ["" if rng.random() < config.caption_dropout else str(rng.choice(data.captions[i])) for i in chosen]
    even = torch.from_numpy((rng.permutation(batch) + rng.random(batch)) / batch).clamp(1e-3, 1 - 1e-3)
    moments = torch.sigmoid(1.2 * torch.special.ndtri(even) + config.toward_noise).float()
    noise = torch.from_numpy(rng.standard_normal((batch, *tokens.shape[1:]), dtype=np.float32))
    return FluxBatch(tokens[chosen], captions, noise, moments)


# %%
def orthogonal(
    matrix: torch.Tensor,  # (rows, columns)
    iterations: int = 5,
) -> torch.Tensor:  # the same shape, singular values near 1
    "The Newton-Schulz iteration of Muon, in float32: the bfloat16 of `torch.optim.Muon` is slow on processors without it."
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    "Momentum, made orthogonal, for the matrices of a transformer (Jordan and others, 2024)."

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],  # matrices
        lr: float,
        momentum: float = 0.95,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        "One step, longer for matrices that are higher than wide."
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                average = state.setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonal(p.grad.lerp(average, group["momentum"]))
                p.add_(direction, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


# %%
def train_transformer(
    out_dir: Path,  # keeps `flux.pt` and the log
    config: FluxTrainingConfig,
    parts,  # has tokenizer, text_encoder, tokenizer_2, text_encoder_2
    data: SceneData,
    stop_after: int | None = None,  # end early, after so many steps, as if interrupted
    on_checkpoint=None,  # called with the steps done and the averaged weights
    minutes: float | None = None,  # spread the schedule over this time instead of `config.steps`
) -> FluxTransformer2DModel:  # the averaged weights
    "Train the transformer, continuing from its checkpoint: Muon for the matrices of the blocks, AdamW for the rest."
    torch.manual_seed(config.seed)
    transformer = new_transformer(config)
    averaged, tokens = copy.deepcopy(transformer).requires_grad_(False), pack(data.latents)
    named = list(transformer.named_parameters())
    hidden = [p for n, p in named if "blocks" in n and p.ndim == 2 and "norm" not in n]
    rest = [p for n, p in named if not ("blocks" in n and p.ndim == 2 and "norm" not in n)]
    muon = Muon(hidden, lr=config.matrix_learning_rate)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    checkpoint = Checkpoint(out_dir / "flux.pt", {"model": transformer, "ema": averaged, "muon": muon, "adam": adam})
    step, log = checkpoint.load(), TrainingLog(out_dir / LOG_NAME, "flux", every=50)
    while step != stop_after:
        done = step / config.steps if minutes is None else checkpoint.elapsed / 60 / minutes
        if done >= 1:
            break
        batch = flux_batch(tokens, data, config, step, config.batch)
        predicted = transformer(
            batch.noisy, timestep=batch.moments, guidance=torch.ones(config.batch),
            **flux_conditioning(parts, batch.captions, config.text_length),
        ).sample
        loss = F.mse_loss(predicted, batch.noise - batch.tokens)
        muon.param_groups[0]["lr"] = config.matrix_learning_rate * one_cycle(done + 1e-4)
        muon.zero_grad()
        update(adam, loss, config.learning_rate * one_cycle(done + 1e-4))
        muon.step()
        step += 1
        update_ema(averaged, transformer, step, config.ema_decay)
        log.add(step, {"loss": loss})
        if step % 200 == 0:
            checkpoint.save(step)
            if on_checkpoint is not None:
                on_checkpoint(step, averaged)
    checkpoint.save(step)
    return averaged


# %%
def guided_steps(
    out_dir: Path,  # keeps the log
    config: FluxTrainingConfig,
    parts,  # has tokenizer, text_encoder, tokenizer_2, text_encoder_2
    transformer: FluxTransformer2DModel,  # trained at guidance 1; left as it is
    data: SceneData,
) -> FluxTransformer2DModel:  # obeys the guidance that it is told
    "Teach one pass to give what two passes give with classifier-free guidance (Meng and others, 2023)."
    student, tokens = copy.deepcopy(transformer).requires_grad_(True), pack(data.latents)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    log, b = TrainingLog(out_dir / LOG_NAME, "flux guidance", every=20), config.guided_batch
    for step in range(config.guided_steps):
        batch = flux_batch(tokens, data, config, 1_000_000 + step, b)
        guidance = 1 + (config.largest_guidance - 1) * torch.rand(b, generator=torch.Generator().manual_seed(step))
        inputs = dict(hidden_states=batch.noisy, timestep=batch.moments)
        told, untold = (flux_conditioning(parts, captions, config.text_length) for captions in (batch.captions, [""] * b))
        with torch.no_grad():
            with_text, without = (transformer(**inputs, **c, guidance=torch.ones(b)).sample for c in (told, untold))
            wanted = without + guidance[:, None, None] * (with_text - without)
        loss = F.mse_loss(student(**inputs, **told, guidance=guidance).sample, wanted)
        update(optimizer, loss, 1e-3 * one_cycle((step + 1) / config.guided_steps))
        log.add(step + 1, {"loss": loss})
    return student.eval().requires_grad_(False)


def assemble_flux(
    base,  # the first model's pipeline: autoencoder, CLIP
    tokenizer_2: T5TokenizerFast,
    text_encoder_2: T5EncoderModel,
    transformer: FluxTransformer2DModel,
) -> FluxPipeline:
    "Put the parts together."
    pipeline = FluxPipeline(
        scheduler=new_flow_scheduler(), vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
        text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
