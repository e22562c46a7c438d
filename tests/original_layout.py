"""Stable Diffusion 1 and Flux weights in the layout of their original implementations: one file, other key names."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def renamed(key: str, names: Mapping[str, str]) -> str:
    "The key with every part in `names` replaced; a part begins and ends at a dot."
    for old, new in names.items():
        key = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, key)
    return key


def count(weights: Mapping[str, torch.Tensor], pattern: str) -> int:
    "How many different numbers the pattern's group matches among the keys."
    return len({found[1] for key in weights if (found := re.match(pattern, key))})


def original_unet(weights: Mapping[str, torch.Tensor]) -> Weights:
    "The UNet: levels are counted through, in `input_blocks` on the way down and in `output_blocks` on the way up."
    layers = count(weights, r"down_blocks\.0\.resnets\.(\d+)\.")

    def name(key: str) -> str:
        found = LEVEL.match(key)
        if not found:
            return renamed(renamed(key, UNET_TOP), UNET_RESNET if ".resnets." in key else {})
        side, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
        rest = renamed(found[5], UNET_RESNET if kind == "resnets" else {})
        last = level * (layers + 1) + layers
        if kind == "downsamplers":
            return f"input_blocks.{1 + last}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            slot = 2 if count(weights, rf"up_blocks\.{level}\.attentions\.(\d+)\.") else 1
            return f"output_blocks.{last}.{slot}.{rest}"
        blocks, first = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
        return f"{blocks}.{first + level * (layers + 1) + index}.{0 if kind == 'resnets' else 1}.{rest}"

    return {f"model.diffusion_model.{name(key)}": value for key, value in weights.items()}


def original_vae(weights: Mapping[str, torch.Tensor]) -> Weights:
    "The VAE: the decoder's levels count from the finest one, and its attention is made of 1 x 1 convolutions."
    levels = count(weights, r"decoder\.up_blocks\.(\d+)\.")
    made = {}
    for key, value in weights.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", renamed(key, VAE_NAMES))
        is_matrix = ".mid.attn_1." in name and value.ndim == 2
        made[f"first_stage_model.{name}"] = value[:, :, None, None] if is_matrix else value
    return made


def original_text_encoder(weights: Mapping[str, torch.Tensor]) -> Weights:
    "The CLIP text encoder: its own names with a prefix, and the position ids, which newer files omit."
    made = {
        f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value
        for key, value in weights.items()
    }
    embeddings = "cond_stage_model.transformer.text_model.embeddings"
    positions = len(made[f"{embeddings}.position_embedding.weight"])
    return {**made, f"{embeddings}.position_ids": torch.arange(positions)[None]}


def original_weights(pipe: StableDiffusionPipeline) -> Weights:
    "All weights of a pipeline under the names of the original implementation."
    return {
        **original_unet(pipe.unet.state_dict()),
        **original_vae(pipe.vae.state_dict()),
        **original_text_encoder(pipe.text_encoder.state_dict()),
    }


def save_original(weights: Weights, path: Path) -> None:
    "Write them as one .safetensors file."
    save_file({key: value.contiguous() for key, value in weights.items()}, path)


FLUX_TOP = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
FLUX_TOGETHER = {  # first of the layers that are one matrix there -> (all of them, its name)
    "transformer_blocks": {
        "attn.to_q": (("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv"),
        "attn.add_q_proj": (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv"),
    },
    "single_transformer_blocks": {"attn.to_q": (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1")},
}


def original_flux(weights: Mapping[str, torch.Tensor]) -> Weights:
    "A Flux transformer: query, key and value are one matrix, and the last modulation has shift and scale swapped."
    blocks = {
        "transformer_blocks": ("double_blocks", FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", FLUX_SINGLE),
    }
    made = {}
    for key, value in weights.items():
        found = re.match(r"(\w*transformer_blocks)\.(\d+)\.(.+)", key)
        if not found:
            made[renamed(key, FLUX_TOP)] = torch.cat(value.chunk(2)[::-1]) if key.startswith("norm_out.") else value
            continue
        (prefix, names), together = blocks[found[1]], FLUX_TOGETHER[found[1]]
        layer, _, kind = found[3].rpartition(".")
        if layer in together:
            parts, name = together[layer]
            made[f"{prefix}.{found[2]}.{name}.{kind}"] = torch.cat(
                [weights[f"{found[1]}.{found[2]}.{part}.{kind}"] for part in parts]
            )
        elif not any(layer in parts for parts, _ in together.values()):
            made[f"{prefix}.{found[2]}.{renamed(found[3], names)}"] = value
    return made
