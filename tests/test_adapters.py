"""Adapters (LoRA, LoHa, LoKr, DoRA, OFT and others) match double-precision formulas, and are removed bit for bit."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_workers.families.sd15 import TINY_DENOISER
from diffusion_workers.lora.files import LoraName, check_family, inspect_lora
from diffusion_workers.lora.layers import LoraLayer, load_lora, use_loras
from diffusion_workers.request.errors import RequestError
from ez_diffusion_client.models import Lora, ModelFamily

LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"  # 128 outputs, 16 inputs
CONV = "down_blocks.1.resnets.0.conv1"  # 16 outputs, 8 inputs, 3 x 3
POINT = "down_blocks.1.resnets.0.conv_shortcut"  # 16 outputs, 8 inputs, 1 x 1
PLAIN = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # 16 outputs, 16 inputs, no bias
NORM, GROUP_NORM = "mid_block.attentions.0.transformer_blocks.0.norm1", "mid_block.resnets.0.norm1"
SCALES = (1.0, 0.4, -1.3)


@pytest.fixture(scope="module")
def pipe() -> SimpleNamespace:
    "The U-Net of a tiny model."
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**TINY_DENOISER, cross_attention_dim=16).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.3)
    return SimpleNamespace(unet=unet, transformer=None, text_encoder=None)


def random(*sides: int) -> Tensor:
    return torch.randn(*sides) * 0.3


def kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


# Reference formulas in double precision: (weight, tensors of the file, scale) -> delta of the weight.


def lora(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    alpha = t["alpha"].item() if "alpha" in t else t["lora_down.weight"].shape[0]
    scaling = alpha / t["lora_down.weight"].shape[0]
    return scale * scaling * (t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)).view_as(weight)


def tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    kernel = torch.zeros(outputs.shape[1], inputs.shape[1], *core.shape[2:], dtype=core.dtype)
    for p in range(core.shape[0]):
        for q in range(core.shape[1]):
            kernel += outputs[p][:, None, None, None] * inputs[q][None, :, None, None] * core[p, q]
    return kernel


def loha(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    rank = t["hada_w1_b"].shape[0]
    if "hada_t1" in t:
        first, second = (tucker(t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]) for i in (1, 2))
    else:
        first, second = ((t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"]).view_as(weight) for i in (1, 2))
    return scale * t["alpha"].item() / rank * first * second


def lokr(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    rank = None
    first = t.get("lokr_w1")
    if first is None:
        first, rank = t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w1_b"].shape[0]
    second = t.get("lokr_w2")
    if "lokr_t2" in t:
        second, rank = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"]), t["lokr_w2_b"].shape[0]
    elif second is None:
        second, rank = t["lokr_w2_a"] @ t["lokr_w2_b"], t["lokr_w2_b"].shape[0]
    rows, columns = weight.shape[0] // first.shape[0], weight.shape[1] // first.shape[1]
    change = torch.empty_like(weight)
    for i in range(first.shape[0]):
        for j in range(first.shape[1]):
            block = first[i, j] * second.reshape(rows, columns, *weight.shape[2:])
            change[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = block
    return scale * (1 if rank is None else t["alpha"].item() / rank) * change


def glora(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    inside = torch.stack([part @ a1 @ a2 for part in weight.flatten(2).unbind(2)], 2) if weight.ndim > 2 else None
    inside = weight @ a1 @ a2 if inside is None else inside.view_as(weight)
    return scale * t["alpha"].item() / a2.shape[0] * (inside + (b1 @ b2).view_as(weight))


def ia3(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    if t["on_input"]:
        return torch.stack([weight[:, i] * t["weight"].flatten()[i] for i in range(weight.shape[1])], 1) * scale
    return torch.stack([weight[i] * t["weight"].flatten()[i] for i in range(weight.shape[0])]) * scale


def cayley(blocks: Tensor, bound: float) -> list[Tensor]:
    skew = blocks - blocks.mT
    if 0 < bound < skew.norm():
        skew = skew * (bound / (skew.norm() + 1e-8))
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    flat = skew.reshape(-1, *blocks.shape[-2:])
    return [torch.linalg.solve((eye - q).T, (eye + q).T).T for q in flat]


def oft(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    bound = t["alpha"].item() * weight.shape[0] if "alpha" in t else 0
    turned = torch.block_diag(*cayley(t["oft_blocks"], bound)).T @ weight.flatten(1)
    if "rescale" in t:
        turned = t["rescale"].reshape(-1, 1) * turned
    return scale * (turned.view_as(weight) - weight)


def boft(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    links, count, size, _ = t["oft_blocks"].shape
    outputs = weight.shape[0]
    every = cayley(t["oft_blocks"], 0)
    whole = torch.eye(outputs, dtype=weight.dtype)
    for link in range(links):
        far, order = 2**link * (size // 2), []
        for start in range(0, outputs, 2 * far):  # neighbors at a distance
            order += [start + j + side * far for j in range(far) for side in (0, 1)]
        permutation = torch.eye(outputs, dtype=weight.dtype)[order]
        turns = [scale * turn + (1 - scale) * torch.eye(size) for turn in every[link * count : (link + 1) * count]]
        whole = permutation.T @ torch.block_diag(*turns).to(weight.dtype) @ permutation @ whole
    turned = whole @ weight.flatten(1)
    if "rescale" in t:
        turned = (1 + scale * (t["rescale"].reshape(-1, 1) - 1)) * turned
    return turned.view_as(weight) - weight


def full(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
    return scale * t["diff"]


def dora(plain: Callable[..., Tensor], dim: int) -> Callable[..., Tensor]:
    "The same with DoRA's learned magnitudes, one for each index of the dimension."

    def change(weight: Tensor, t: dict[str, Tensor], scale: float) -> Tensor:
        whole = weight + plain(weight, t, 1.0)
        parts = [part * m / part.norm() for part, m in zip(whole.unbind(dim), t["dora_scale"].flatten(), strict=True)]
        return scale * (torch.stack(parts, dim) - weight)

    return change


@dataclass(frozen=True)
class Case:
    "The tensors of one module, and the reference formula."

    path: str
    tensors: dict[str, Tensor]
    change: Callable[[Tensor, dict[str, Tensor], float], Tensor]


def loha_tensors(outputs: int, columns: int) -> dict[str, Tensor]:
    return {
        "hada_w1_a": random(outputs, 3),
        "hada_w1_b": random(3, columns),
        "hada_w2_a": random(outputs, 3),
        "hada_w2_b": random(3, columns),
        "alpha": torch.tensor(2.0),
    }


def cases() -> dict[str, Case]:
    torch.manual_seed(1)
    one = lambda value: torch.tensor(float(value))
    down, up = {"lora_down.weight": random(4, 16)}, {"lora_up.weight": random(128, 4)}
    conv_lora = {"lora_down.weight": random(4, 8, 3, 3), "lora_up.weight": random(16, 4, 1, 1), "alpha": one(2)}
    linear_lora = down | up | {"alpha": one(2)}
    core = {"hada_t1": random(3, 3, 3, 3), "hada_t2": random(3, 3, 3, 3), "alpha": one(2)}
    for name in ("hada_w1", "hada_w2"):
        core |= {f"{name}_a": random(3, 16), f"{name}_b": random(3, 8)}
    glora_linear = {"a1": random(16, 3), "a2": random(3, 16), "b1": random(128, 3), "b2": random(3, 16)}
    glora_conv = {
        "a1": random(8, 3, 1, 1),
        "a2": random(3, 8, 1, 1),
        "b1": random(16, 3, 1, 1),
        "b2": random(3, 8, 3, 3),
    }
    weights_of = lambda parts: {f"{name}.weight": t for name, t in parts.items()} | {"alpha": one(2)}
    kr = {"lokr_w1": random(8, 4), "alpha": one(2)}
    return {
        "LoRA linear": Case(LINEAR, linear_lora, lora),
        "LoRA convolution": Case(CONV, conv_lora, lora),
        "LoHa linear": Case(LINEAR, loha_tensors(128, 16), loha),
        "LoHa convolution": Case(CONV, loha_tensors(16, 72), loha),
        "LoHa convolution 1 x 1": Case(POINT, loha_tensors(16, 8), loha),
        "LoHa Tucker": Case(CONV, core, loha),
        "LoKr whole": Case(LINEAR, {"lokr_w1": random(8, 4), "lokr_w2": random(16, 4), "alpha": one(1e10)}, lokr),
        "LoKr second decomposed": Case(LINEAR, kr | {"lokr_w2_a": random(16, 2), "lokr_w2_b": random(2, 4)}, lokr),
        "LoKr first decomposed": Case(
            LINEAR,
            {"lokr_w1_a": random(8, 2), "lokr_w1_b": random(2, 4), "lokr_w2": random(16, 4), "alpha": one(3)},
            lokr,
        ),
        "LoKr both decomposed": Case(
            LINEAR,
            {
                "lokr_w1_a": random(8, 2),
                "lokr_w1_b": random(2, 4),
                "lokr_w2_a": random(16, 2),
                "lokr_w2_b": random(2, 4),
                "alpha": one(3),
            },
            lokr,
        ),
        "LoKr convolution whole": Case(CONV, {"lokr_w1": random(4, 2), "lokr_w2": random(4, 4, 3, 3)}, lokr),
        "LoKr convolution decomposed": Case(
            CONV,
            {"lokr_w1": random(4, 2), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 36), "alpha": one(3)},
            lokr,
        ),
        "LoKr Tucker": Case(
            CONV,
            {
                "lokr_w1": random(4, 2),
                "lokr_w2_a": random(2, 4),
                "lokr_w2_b": random(2, 4),
                "lokr_t2": random(2, 2, 3, 3),
                "alpha": one(3),
            },
            lokr,
        ),
        "GLoRA linear": Case(LINEAR, weights_of(glora_linear), glora),
        "GLoRA convolution": Case(CONV, weights_of(glora_conv), glora),
        "IA3 outputs": Case(LINEAR, {"weight": random(128), "on_input": one(0)}, ia3),
        "IA3 inputs": Case(LINEAR, {"weight": random(16), "on_input": one(1)}, ia3),
        "IA3 convolution": Case(CONV, {"weight": random(1, 8, 1, 1), "on_input": one(1)}, ia3),
        "OFT linear": Case(LINEAR, {"oft_blocks": random(32, 4, 4), "alpha": one(0)}, oft),
        "OFT bounded": Case(LINEAR, {"oft_blocks": random(32, 4, 4), "alpha": one(0.01)}, oft),
        "OFT rescaled convolution": Case(
            CONV, {"oft_blocks": random(4, 4, 4), "rescale": 1 + random(16, 1, 1, 1)}, oft
        ),
        "BOFT linear": Case(LINEAR, {"oft_blocks": random(6, 32, 4, 4), "alpha": one(0)}, boft),
        "BOFT convolution": Case(CONV, {"oft_blocks": random(3, 4, 4, 4), "rescale": 1 + random(16, 1, 1, 1)}, boft),
        "full linear": Case(LINEAR, {"diff": random(128, 16)}, full),
        "full convolution with bias": Case(CONV, {"diff": random(16, 8, 3, 3), "diff_b": random(16)}, full),
        "full layer norm": Case(NORM, {"w_norm": random(16), "b_norm": random(16)}, full),
        "full group norm": Case(GROUP_NORM, {"diff": random(16), "diff_b": random(16)}, full),
        "LoRA with bias": Case(LINEAR, linear_lora | {"diff_b": random(128)}, lora),
        "DoRA outputs": Case(LINEAR, linear_lora | {"dora_scale": 1 + torch.rand(128, 1)}, dora(lora, 0)),
        "DoRA inputs": Case(LINEAR, linear_lora | {"dora_scale": 1 + torch.rand(1, 16)}, dora(lora, 1)),
        "DoRA convolution outputs": Case(CONV, conv_lora | {"dora_scale": 1 + torch.rand(16, 1, 1, 1)}, dora(lora, 0)),
        "DoRA convolution inputs": Case(CONV, conv_lora | {"dora_scale": 1 + torch.rand(1, 8, 1, 1)}, dora(lora, 1)),
        "LoHa with DoRA": Case(LINEAR, loha_tensors(128, 16) | {"dora_scale": 1 + torch.rand(128, 1)}, dora(loha, 0)),
        "LoKr with DoRA inputs": Case(
            LINEAR,
            {"lokr_w1": random(8, 4), "lokr_w2": random(16, 4), "dora_scale": 1 + torch.rand(1, 16)},
            dora(lokr, 1),
        ),
    }


CASES = cases()


def normalized(t: dict[str, Tensor]) -> dict[str, Tensor]:
    "The tensors in double precision, with norm weights under the names of other layers."
    names = {"w_norm": "diff", "b_norm": "diff_b"}
    return {names.get(name, name): tensor.double() for name, tensor in t.items()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict | None = None, **metadata: str) -> Path:
    path = folder / ("lora.safetensors" if config is None else "adapter_model.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata or None)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


def of_module(case: Case) -> dict[str, Tensor]:
    return {f"{kohya(case.path)}.{part}": tensor for part, tensor in case.tensors.items()}


@pytest.fixture
def unchanged(pipe: SimpleNamespace) -> Iterator[None]:
    "Assert that every module and every bit of the model is the same afterwards."
    modules = dict(pipe.unet.named_modules())
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    yield
    after = pipe.unet.state_dict()
    assert dict(pipe.unet.named_modules()) == modules
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def expected_output(layer: nn.Module, x: Tensor, change: Tensor, bias: Tensor | None) -> Tensor:
    weights = {"weight": layer.weight.double() + change}
    if layer.bias is not None:
        weights["bias"] = layer.bias.double() + (0 if bias is None else bias)
        return torch.func.functional_call(layer.double(), weights, x.double()).float()
    return torch.func.functional_call(layer.double(), weights, x.double()).float() + (0 if bias is None else bias)


def probe(layer: nn.Module) -> Tensor:
    torch.manual_seed(2)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(2, layer.in_channels, 6, 6)
    if isinstance(layer, nn.GroupNorm):
        return torch.randn(2, layer.num_channels, 4, 4)
    return torch.randn(3, layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0])


def check(pipe: SimpleNamespace, path: Path, module: str, change: Callable, bias: Callable, merge: bool) -> None:
    "Compare the output of a layer with an adapter to the reference, at several scales."
    loaded = load_lora(path, LoraName("x"))
    base = pipe.unet.get_submodule(module)
    reference = type(base).__new__(type(base))
    for scale in SCALES:
        reference = _copy(base)
        want = expected_output(reference, probe(base), change(base.weight.detach().double(), scale), bias(scale))
        with use_loras(pipe, [(loaded, Lora(name="x", scale=scale))], merge=merge) as notes, torch.no_grad():
            layer = pipe.unet.get_submodule(module)
            assert isinstance(layer, LoraLayer) != merge
            found = layer(probe(base))
        assert notes == []
        torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-4)  # fp32 against double, values about 10
        assert not torch.allclose(found, base(probe(base)), atol=1e-3)


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


@pytest.mark.parametrize("merge", [False, True], ids=["layer", "written"])
@pytest.mark.parametrize("name", CASES)
def test_adapters_match_their_reference_formula(
    pipe: SimpleNamespace, unchanged: None, tmp_path: Path, name: str, merge: bool
) -> None:
    case = CASES[name]
    tensors = normalized(case.tensors)
    bias = lambda scale: scale * tensors["diff_b"] if "diff_b" in tensors else None
    check(pipe, write(tmp_path, of_module(case)), case.path, lambda w, s: case.change(w, tensors, s), bias, merge)


@pytest.mark.parametrize("merge", [False, True], ids=["layer", "written"])
def test_peft_lora_bias_and_adalora(pipe: SimpleNamespace, unchanged: None, tmp_path: Path, merge: bool) -> None:
    "lora_B.bias is scaled like the product; AdaLoRA has singular values and their number."
    torch.manual_seed(3)
    a, b, bias, values = random(4, 16), random(128, 4), random(128), random(4, 1)
    key = f"base_model.model.{LINEAR}."
    path = write(
        tmp_path,
        {f"{key}lora_A.weight": a, f"{key}lora_B.weight": b, f"{key}lora_B.bias": bias},
        config={"peft_type": "LORA", "lora_alpha": 8, "r": 4, "lora_bias": True},
    )
    product = (b @ a).double()
    check(pipe, path, LINEAR, lambda w, s: 2 * s * product, lambda s: 2 * s * bias, merge)
    path = write(
        tmp_path,
        {f"{key}lora_A": a, f"{key}lora_B": b, f"{key}lora_E": values, f"{key}ranknum": torch.tensor(3.0)},
        config={"peft_type": "ADALORA", "lora_alpha": 8, "r": 4},
    )
    product = (b @ torch.diag(values[:, 0]) @ a).double()
    check(pipe, path, LINEAR, lambda w, s: s * product * 8 / 3, lambda s: None, merge)


def test_peft_ia3_scales_the_bias_with_the_outputs(pipe: SimpleNamespace, unchanged: None, tmp_path: Path) -> None:
    "peft multiplies the layer output, bias included; factors of a square layer are ambiguous and refused."
    torch.manual_seed(4)
    factors = 1 + random(128, 1)
    path = write(tmp_path, {f"base_model.model.{LINEAR}.ia3_l": factors}, config={"peft_type": "IA3"})
    own = pipe.unet.get_submodule(LINEAR).bias.detach()
    more = lambda s: s * (factors[:, 0] - 1) * own
    check(pipe, path, LINEAR, lambda w, s: s * (factors.double() - 1) * w, more, merge=False)
    square = write(tmp_path, {f"base_model.model.{PLAIN}.ia3_l": 1 + random(16)}, config={"peft_type": "IA3"})
    loaded = load_lora(square, LoraName("x"))
    with pytest.raises(RequestError, match="inputs or outputs"), use_loras(pipe, [(loaded, Lora(name="x"))]):
        pass


def test_adapter_bias_on_a_layer_without_bias(pipe: SimpleNamespace, unchanged: None, tmp_path: Path) -> None:
    torch.manual_seed(5)
    bias = random(16)
    path = write(tmp_path, {f"{kohya(PLAIN)}.diff": random(16, 16) * 0, f"{kohya(PLAIN)}.diff_b": bias})
    for merge in (False, True):  # without a bias to merge into, it stays a layer both times
        with use_loras(pipe, [(load_lora(path, LoraName("x")), Lora(name="x", scale=0.5))], merge=merge):
            layer = pipe.unet.get_submodule(PLAIN)
            x = probe(layer.base_layer)
            torch.testing.assert_close(layer(x), layer.base_layer(x) + 0.5 * bias)


@pytest.mark.parametrize("merge", [False, True], ids=["layer", "written"])
def test_adapters_on_one_layer_are_summed(pipe: SimpleNamespace, unchanged: None, tmp_path: Path, merge: bool) -> None:
    "A LoRA, a LoHa and a LoKr on one layer add up to the sum of their deltas."
    names = ("LoRA with bias", "LoHa linear", "LoKr whole")
    loras, change = [], 0
    weight = pipe.unet.get_submodule(LINEAR).weight.detach().double()
    for i, name in enumerate(names):
        (tmp_path / str(i)).mkdir()
        path = write(tmp_path / str(i), of_module(CASES[name]))
        loras.append((load_lora(path, LoraName(name)), Lora(name=name, scale=0.5 + i)))
        change = change + CASES[name].change(weight, normalized(CASES[name].tensors), 0.5 + i)
    base = pipe.unet.get_submodule(LINEAR)
    bias = 0.5 * CASES["LoRA with bias"].tensors["diff_b"].double()
    want = expected_output(_copy(base), probe(base), change, bias)
    with use_loras(pipe, loras, merge=merge), torch.no_grad():
        torch.testing.assert_close(pipe.unet.get_submodule(LINEAR)(probe(base)), want, rtol=2e-4, atol=5e-4)


def test_bfloat16_models_keep_their_dtype_and_bits(pipe: SimpleNamespace, tmp_path: Path) -> None:
    "A bf16 model keeps its dtype, and every bit after an adapter was merged and removed."
    half = SimpleNamespace(unet=_copy(pipe.unet).bfloat16(), transformer=None, text_encoder=None)
    before = {name: tensor.clone() for name, tensor in half.unet.state_dict().items()}
    for name in ("LoKr whole", "OFT linear", "DoRA inputs", "full layer norm"):
        path = write(tmp_path, of_module(CASES[name]))
        for merge in (False, True):
            with use_loras(half, [(load_lora(path, LoraName("x")), Lora(name="x"))], merge=merge), torch.no_grad():
                layer = half.unet.get_submodule(CASES[name].path)
                x = probe(getattr(layer, "base_layer", layer)).bfloat16()
                assert layer(x).dtype == torch.bfloat16
        assert all(torch.equal(before[key], tensor) for key, tensor in half.unet.state_dict().items())


@pytest.mark.parametrize(
    "name", ["LoHa linear", "LoKr whole", "full linear", "OFT linear", "GLoRA linear", "IA3 inputs"]
)
def test_adapters_on_quantized_layers(pipe: SimpleNamespace, tmp_path: Path, name: str) -> None:
    "Quantized layers take adapters that do not need the weights; others are refused with the reason."

    class Packed(nn.Linear):  # int8 rows and their scales, like a quantized layer
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.float() * 0.01, self.bias)

    packed = SimpleNamespace(unet=_copy(pipe.unet), transformer=None, text_encoder=None)
    layer = Packed(16, 128)
    layer.weight = nn.Parameter(torch.randint(-99, 99, (128, 16), dtype=torch.int8), requires_grad=False)
    parent, _, child = LINEAR.rpartition(".")
    setattr(packed.unet.get_submodule(parent), child, layer)
    loaded = load_lora(write(tmp_path, of_module(CASES[name])), LoraName("x"))
    use = lambda: use_loras(packed, [(loaded, Lora(name="x"))], merge=True)
    if name in ("OFT linear", "GLoRA linear", "IA3 inputs"):
        with pytest.raises(RequestError, match=r"needs the weights of the model, and these are quantized"), use():
            pass
        return
    change = CASES[name].change(layer.weight.double(), normalized(CASES[name].tensors), 1.0).float()
    x = probe(layer)
    with use(), torch.no_grad():
        found = packed.unet.get_submodule(LINEAR)(x)
    torch.testing.assert_close(found, layer(x) + x @ change.T, rtol=1e-4, atol=1e-4)
    assert packed.unet.get_submodule(LINEAR) is layer


# The original Flux layout fuses query, key and value into one matrix; its delta is split by rows.


@pytest.mark.parametrize("name", ["LoKr", "GLoRA", "OFT", "DoRA inputs", "full"])
def test_fused_qkv_deltas_are_split_by_rows(tmp_path: Path, name: str) -> None:
    torch.manual_seed(6)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    flux = SimpleNamespace(transformer=transformer, unet=None, text_encoder=None)
    one = torch.tensor(1.0)
    tensors, change = {
        "LoKr": ({"lokr_w1": random(3, 4), "lokr_w2": random(32, 8)}, lokr),
        "GLoRA": (
            {
                "a1.weight": random(32, 2),
                "a2.weight": random(2, 32),
                "b1.weight": random(96, 2),
                "b2.weight": random(2, 32),
            }
            | {"alpha": one},
            glora,
        ),
        "OFT": ({"oft_blocks": random(6, 16, 16)}, oft),
        "DoRA inputs": (
            {"lora_down.weight": random(4, 32), "lora_up.weight": random(96, 4), "alpha": one}
            | {"dora_scale": 1 + torch.rand(1, 32)},
            dora(lora, 1),
        ),
        "full": ({"diff": random(96, 32), "diff_b": random(96)}, full),
    }[name]
    paths = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    layers = [transformer.get_submodule(path) for path in paths]
    whole = torch.cat([layer.weight.detach() for layer in layers]).double()
    doubled = normalized(tensors)
    changed = whole + change(whole, doubled, 0.7)
    bias = torch.cat([layer.bias.detach() for layer in layers])
    bias = bias + 0.7 * tensors.get("diff_b", torch.zeros(96))
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    path = write(tmp_path, {f"{key}.{part}": tensor for part, tensor in tensors.items()})
    x = torch.randn(5, 32)
    with use_loras(flux, [(load_lora(path, LoraName("x")), Lora(name="x", scale=0.7))]), torch.no_grad():
        found = torch.cat([transformer.get_submodule(path)(x) for path in paths], 1)
    want = (x.double() @ changed.T).float() + bias
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert [transformer.get_submodule(path) for path in paths] == layers


# Skipped modules and refused files.


def pair(module: str, inputs: int, outputs: int, rank: int = 4) -> dict[str, Tensor]:
    return {
        f"{module}.lora_down.weight": random(rank, inputs),
        f"{module}.lora_up.weight": random(outputs, rank),
    }


def test_unusable_modules_are_skipped_with_a_warning(pipe: SimpleNamespace, unchanged: None, tmp_path: Path) -> None:
    good, other = kohya(LINEAR), kohya(PLAIN)
    cases = {
        "1 of 2 modules of this LoRA have another shape": pair(other, 24, 16),
        "1 of 2 modules of this LoRA cannot be used": pair(other, 16, 16, rank=0),
    }
    for message, bad in cases.items():
        loaded = load_lora(write(tmp_path, pair(good, 16, 128) | bad), LoraName("x"))
        with use_loras(pipe, [(loaded, Lora(name="x"))]) as notes:
            assert [p for p, m in pipe.unet.named_modules() if isinstance(m, LoraLayer)] == [LINEAR]
        assert [message in note.message for note in notes] == [True]
        assert "attn1" in notes[0].message
        with pytest.raises(RequestError):  # no usable module would be left
            loaded = load_lora(write(tmp_path, bad), LoraName("x"))
            with use_loras(pipe, [(loaded, Lora(name="x"))]):
                pass


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_must_be_finite(tmp_path: Path, alpha: float) -> None:
    path = write(tmp_path, pair("lora_unet_x", 4, 4) | {"lora_unet_x.alpha": torch.tensor(alpha)})
    with pytest.raises(RequestError, match=r"alpha of x is .*not finite"):
        load_lora(path, LoraName("x"))
    config = {"peft_type": "LORA", "lora_alpha": alpha, "r": 4}
    peft = {"base_model.model.x.lora_A.weight": random(4, 4), "base_model.model.x.lora_B.weight": random(4, 4)}
    with pytest.raises(RequestError, match="alpha is"):
        load_lora(write(tmp_path, peft, config), LoraName("x"))


def test_duplicate_modules_are_refused(pipe: SimpleNamespace, tmp_path: Path) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    original = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    loaded = load_lora(write(tmp_path, pair(kohya(path), 16, 16) | pair(original, 16, 16)), LoraName("x"))
    with pytest.raises(RequestError, match="under two names"), use_loras(pipe, [(loaded, Lora(name="x"))]):
        pass
    a, b = {f"unet.{path}.lora_A.{name}.weight": random(4, 16) for name in ("one", "two")}, {}
    b = {f"unet.{path}.lora_B.{name}.weight": random(16, 4) for name in ("one", "two")}
    with pytest.raises(RequestError, match="in this file twice"):
        load_lora(write(tmp_path, a | b), LoraName("x"))


@pytest.mark.parametrize(
    "pattern", [r".*attn1\.to_q", "(to_q|to_k)", "to_q", PLAIN.replace(".", r"\."), r"attn\d.to_q"]
)
def test_peft_alpha_pattern_selects_modules(pipe: SimpleNamespace, tmp_path: Path, pattern: str) -> None:
    a, b = random(4, 16), random(16, 4)
    written = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_v": 99, pattern: 16, ".*": 1}})
    tensors = {f"unet.{PLAIN}.lora_A.weight": a, f"unet.{PLAIN}.lora_B.weight": b}
    loaded = load_lora(write(tmp_path, tensors, lora_adapter_metadata=written), LoraName("x"))
    assert loaded.weights[0].scaling == 4
    broken = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 16}})
    with pytest.raises(RequestError, match="alpha_pattern is not a regular expression"):
        load_lora(write(tmp_path, tensors, lora_adapter_metadata=broken), LoraName("x"))


def attention(name: str, count: int, inputs: int, outputs: int) -> dict[str, Tensor]:
    "LoRA matrices for one module of the first blocks, expanded from single elements to save memory."
    empty = lambda *sides: torch.zeros(1).expand(*sides)
    tensors = {}
    for i in range(count):
        key = name.format(i)
        tensors |= {f"{key}.lora_A.weight": empty(1, inputs), f"{key}.lora_B.weight": empty(outputs, 1)}
    return tensors


FAMILIES = {
    "flux, double blocks": ("transformer.transformer_blocks.{}.attn.to_q", 19, 3072, 3072, "Flux"),
    "flux, single blocks": ("transformer.single_transformer_blocks.{}.attn.to_q", 38, 3072, 3072, "Flux"),
    "flux, original": ("diffusion_model.double_blocks.{}.img_attn.qkv", 19, 3072, 9216, "Flux"),
    "klein 4B, attention": ("diffusion_model.double_blocks.{}.img_attn.qkv", 5, 3072, 9216, "FLUX.2 klein 4B"),
    "klein 4B, diffusers": ("transformer.transformer_blocks.{}.attn.to_q", 5, 3072, 3072, "FLUX.2 klein 4B"),
    "klein 4B, single": ("diffusion_model.single_blocks.{}.linear1", 20, 3072, 27648, "FLUX.2 klein 4B"),
    "klein 9B": ("transformer.transformer_blocks.{}.attn.to_q", 8, 4096, 4096, "FLUX.2 klein 9B"),
    "FLUX.2 dev": ("transformer.transformer_blocks.{}.attn.to_q", 8, 6144, 6144, "FLUX.2 dev"),
    "Qwen-Image": ("transformer_blocks.{}.attn.to_q", 60, 3072, 3072, "Qwen-Image"),
    "Qwen-Image, a part": ("transformer_blocks.{}.attn.to_q", 10, 3072, 3072, "Qwen-Image"),
    "HunyuanVideo": ("transformer.double_blocks.{}.img_attn_qkv", 10, 3072, 9216, "HunyuanVideo"),
    "HunyuanVideo, diffusers": ("transformer.transformer_blocks.{}.attn.to_q", 20, 3072, 3072, "HunyuanVideo"),
    "Z-Image": ("diffusion_model.layers.{}.attention.qkv", 30, 3840, 11520, "Z-Image"),
    "Lumina 2": ("transformer.layers.{}.attn.to_q", 26, 2304, 2304, "Lumina 2"),
    "Wan": ("diffusion_model.blocks.{}.self_attn.q", 40, 5120, 5120, "Wan"),
    "SD 3.5 Large": ("transformer.transformer_blocks.{}.attn.to_q", 38, 2432, 2432, "Stable Diffusion 3.5"),
    "SD 3 Medium": ("transformer.transformer_blocks.{}.attn.to_q", 24, 1536, 1536, "Stable Diffusion 3.5"),
    "PixArt": ("transformer.transformer_blocks.{}.attn1.to_q", 28, 1152, 1152, "PixArt"),
    "AuraFlow": ("transformer.joint_transformer_blocks.{}.attn.to_q", 4, 3072, 3072, "AuraFlow"),
    "Kolors": ("unet.encoder_hid_proj{}", 1, 4096, 2048, "Kolors"),
}


@pytest.mark.parametrize("title", FAMILIES)
def test_the_family_is_inferred_from_attention_layers(tmp_path: Path, title: str) -> None:
    "An attention-only LoRA of another family is refused by the name of its family, and never taken for Flux."
    name, count, inputs, outputs, family = FAMILIES[title]
    header = inspect_lora(write(tmp_path, attention(name, count, inputs, outputs)))
    assert family in header.family_words
    if family == "Flux":
        check_family(header, ModelFamily.flux, LoraName("x"))
        return
    with pytest.raises(RequestError, match="this LoRA was made for"):
        check_family(header, ModelFamily.flux, LoraName("x"))


def test_the_family_is_inferred_from_metadata_or_t5_layers(tmp_path: Path) -> None:
    "Chroma has the block names of Flux, so metadata decides; T5 layers mean Flux."
    tensors = attention("lora_unet_double_blocks_{}_img_attn_qkv", 19, 3072, 9216)
    header = inspect_lora(write(tmp_path, tensors, **{"modelspec.architecture": "chroma/lora"}))
    assert header.family is not ModelFamily.flux
    t5 = pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4096, 4096)
    assert inspect_lora(write(tmp_path, tensors | t5)).family is ModelFamily.flux


OTHERS = {
    "a Control-LoRA": {"lora_controlnet": (1,), "input_blocks.0.0.up": (4, 4), "input_blocks.0.0.down": (4, 4)},
    "a ControlNet-LLLite": {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": (4, 4)},
    "an IP-Adapter": {"ip_adapter.0.to_q_lora.down.weight": (4, 4), "ip_adapter.0.to_q_lora.up.weight": (4, 4)},
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": (4, 4)},
    "a textual inversion": {"clip_g": (2, 1280), "clip_l": (2, 768)},
    "an OFT adapter of peft": {"base_model.model.x.oft_R.weight": (4, 4)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_non_lora_files_are_named_in_the_error(tmp_path: Path, what: str) -> None:
    path = write(tmp_path, {key: torch.zeros(shape) for key, shape in OTHERS[what].items()})
    with pytest.raises(RequestError, match=f"this is {what}, which cannot be used as a LoRA"):
        inspect_lora(path)


def test_adapters_match_lycoris(pipe: SimpleNamespace, tmp_path: Path) -> None:
    "The same outputs as the package that writes most of these files, if it is installed."
    modules = pytest.importorskip("lycoris.modules")
    names = {"LoHa": modules.loha.LohaModule, "OFT": modules.diag_oft.DiagOFTModule}
    names |= {"BOFT": modules.boft.ButterflyOFTModule, "GLoRA": modules.glora.GLoRAModule, "IA3": modules.ia3.IA3Module}
    torch.manual_seed(7)
    for path in (LINEAR, CONV):
        base = _copy(pipe.unet.get_submodule(path))
        for name, kind in names.items():
            module = kind("x", base, lora_dim=4, alpha=0 if "OFT" in name else 2)
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.2)
            tensors = module.custom_state_dict() if hasattr(module, "custom_state_dict") else module.state_dict()
            tensors = tensors or module.state_dict()
            file = write(tmp_path, {f"{kohya(path)}.{k}": v.detach().float() for k, v in tensors.items()})
            for scale in SCALES:
                module.eval().multiplier = scale
                with torch.no_grad():  # its training forward; its merging multiplies by alpha / rank twice
                    want = module(probe(base))
                with (
                    use_loras(pipe, [(load_lora(file, LoraName(name)), Lora(name=name, scale=scale))]),
                    torch.no_grad(),
                ):
                    found = pipe.unet.get_submodule(path)(probe(base))
                torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3, msg=f"{name} {path} {scale}")
