"""ControlNets for three families, trained on scenes with objects anywhere while the model they steer stays as it is."""

# %%
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, ControlNetUnionModel, FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor

from .shapes_controls import FreeData, control_map, map_tensor
from .shapes_flux import flux_conditioning, pack
from .shapes_sdxl import CLEAN, sdxl_conditioning
from .shapes_training import LOG_NAME, Checkpoint, TrainingLog, new_scheduler, one_cycle, token_ids, update, update_ema

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
