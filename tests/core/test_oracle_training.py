"""Training against the libraries that train: how factors begin, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.adapters import AdapterConfig, Algorithm, Draw, load
from adapter_lab.core.adapters.dropout import Rows
from adapter_lab.core.adapters.ranks import Ranks
from adapter_lab.core.adapters.training import make, with_leaves
from adapter_lab.core.tensors import Op
from adapter_lab.core.train.layer import adapted
from adapter_lab.tests.data.frozen import Frozen
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, set_timestep_mask
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

CPU = torch.device("cpu")
LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "conv2d": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 9, 8)),
}
# ours, theirs and its options, the same said in ours
KINDS = {
    "lora": ("lora", LoConModule, {}, {}),
    "lora tucker": ("lora", LoConModule, {"use_tucker": True}, {"tucker": True}),
    "lora scalar": ("lora", LoConModule, {"use_scalar": True}, {"scalar": True}),
    "lora rs": ("lora", LoConModule, {"rs_lora": True}, {"rs_lora": True}),
    "loha": ("loha", LohaModule, {}, {}),
    "loha tucker": ("loha", LohaModule, {"use_tucker": True}, {"tucker": True}),
    "loha scalar": ("loha", LohaModule, {"use_scalar": True}, {"scalar": True}),
    "lokr": ("lokr", LokrModule, {"factor": 4}, {"factor": 4}),
    "lokr both": (
        "lokr", LokrModule, {"factor": 8, "decompose_both": True, "lora_dim": 1},
        {"factor": 8, "decompose_both": True, "rank": 1},
    ),
    "lokr tucker": (
        "lokr", LokrModule, {"factor": 4, "use_tucker": True, "lora_dim": 2},
        {"factor": 4, "tucker": True, "rank": 2},
    ),
    "lokr full": ("lokr", LokrModule, {"full_matrix": True}, {"full_matrix": True}),
    "lokr scalar": ("lokr", LokrModule, {"use_scalar": True}, {"scalar": True}),
    "glora": ("glora", GLoRAModule, {}, {}),
    "glora scalar": ("glora", GLoRAModule, {"use_scalar": True}, {"scalar": True}),
    "ia3": ("ia3", IA3Module, {}, {}),
    "ia3 input": ("ia3", IA3Module, {"train_on_input": True}, {"on_input": True}),
    "oft": ("oft", DiagOFTModule, {}, {}),
    "oft rescaled": ("oft", DiagOFTModule, {"rescaled": True}, {"rescale": True}),
    "coft": ("coft", DiagOFTModule, {"constraint": 0.02}, {"constraint": 0.02}),
    "boft": ("boft", ButterflyOFTModule, {"lora_dim": 10}, {"rank": 10}),
    "boft rescaled": (
        "boft", ButterflyOFTModule, {"lora_dim": 10, "rescaled": True, "constraint": 0.02},
        {"rank": 10, "rescale": True, "constraint": 0.02},
    ),
    "tlora": ("tlora", TLoraModule, {}, {}),
    "full": ("full", FullModule, {}, {"bias": True}),
}  # fmt: skip
CASES = [(k, n) for k in KINDS for n in LAYERS if (k, n) != ("tlora", "conv2d")]
NAMES = {"full": {"weight": "diff", "bias": "diff_b"}}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(
    kind: str, layer: nn.Module, rank: int = 4, seed: int = 0
) -> tuple[LycorisBaseModule, Algorithm]:
    """Theirs and ours, fresh, for one layer."""
    name, theirs, options, own = KINDS[kind]
    module = theirs("", layer, **{"lora_dim": rank, "alpha": 3.0, "bypass_mode": False, **options})
    config = AdapterConfig(name, **{"rank": rank, "alpha": 3.0, **own})
    made = make(layer.weight.shape, config, rng(seed), biased=True)
    return module, made.started(layer.weight.detach())


def named(kind: str, module: LycorisBaseModule) -> dict[str, nn.Parameter]:
    names = NAMES.get(kind, {})
    return {names.get(n, n): p for n, p in module.named_parameters()}


def start_of(module: TLoraModule) -> dict[str, Tensor]:
    names = {"q_layer.weight": "base_q", "p_layer.weight": "base_p", "lambda_layer": "base_lambda"}
    return {f"{ours}.start": getattr(module, theirs) for ours, theirs in names.items()}


def layer_and_input(name: str) -> tuple[nn.Module, Frozen, Tensor]:
    torch.manual_seed(0)
    make_layer, size = LAYERS[name]
    layer = make_layer().requires_grad_(False)
    conv = not isinstance(layer, nn.Linear)
    op = Op(2, layer.stride, layer.padding, layer.dilation, layer.groups) if conv else Op()
    return layer, Frozen(layer.weight, op, layer.bias), torch.randn(size)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("kind", KINDS)
def test_factors_begin_as_in_lycoris(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3) if "tucker" in kind else nn.Linear(256, 160)
    layer.requires_grad_(False)
    # Some factors of a Kronecker product are too small to show a distribution.
    draws = [pair(kind, layer, 16, seed) for seed in range(60 if "lokr" in kind else 1)]
    assert draws[0][1].trained.keys() == named(kind, draws[0][0]).keys()
    for name in draws[0][1].trained:
        t = torch.stack([ours.tensors[name] for _, ours in draws])
        other = torch.stack([named(kind, module)[name].detach() for module, _ in draws])
        assert t.shape == other.shape, name
        if kind == "tlora":  # signs of singular vectors are free
            torch.testing.assert_close(t.abs(), other.abs(), rtol=1e-3, atol=1e-4)
        elif t[0].numel() == 1 or not other.std():
            assert torch.equal(t, other), name
        else:
            # The width of the distribution, and by its tail which one it is.
            assert float(t.std()) == pytest.approx(float(other.std()), rel=0.2), name
            tails = [float(v.abs().max() / v.std()) for v in (t, other)]
            assert tails[0] == pytest.approx(tails[1], rel=0.35), name


def test_factors_of_dylora_and_norms_begin_as_in_lycoris() -> None:
    layer = nn.Linear(256, 192)
    theirs = DyLoraModule("", layer, lora_dim=16, block_size=4).custom_state_dict()
    ours = make(layer.weight.shape, AdapterConfig("dylora", 16, unit=4), rng()).state()
    assert not ours["lora_up.weight"].any() and not theirs["lora_up.weight"].any()
    down = [float(s["lora_down.weight"].detach().std()) for s in (ours, theirs)]
    assert down[0] == pytest.approx(down[1], rel=0.05)
    norm = NormModule("", nn.LayerNorm(24))
    ours = make((24,), AdapterConfig(), rng(), biased=True)
    assert {n: tuple(p.shape) for n, p in norm.named_parameters()} == {
        n: tuple(t.shape) for n, t in ours.trained.items()
    }


@pytest.mark.parametrize("kind, name", CASES)
@pytest.mark.parametrize("mode", ["bypass", "rebuild"])
def test_outputs_and_gradients_of_lycoris(kind: str, name: str, mode: str) -> None:
    layer, base, x = layer_and_input(name)
    module, ours = pair(kind, layer)
    module.train()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=rng(1)), alpha=0.3)
    theirs = named(kind, module)
    ours = with_leaves(ours.on({**ours.tensors, **{n: p.detach() for n, p in theirs.items()}}), CPU)
    if kind == "tlora":  # theirs begins with singular vectors of other signs
        ours = with_leaves(ours.on({**ours.tensors, **start_of(module)}), CPU)
    probe = torch.randn(layer(x).shape, generator=rng(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(inputs[0]), adapted(ours, base, inputs[1], mode)]
    assert error(outputs[1] - layer(x), outputs[0] - layer(x)) < 1e-5
    for y in outputs:
        (y * probe).sum().backward()
    assert error(inputs[1].grad, inputs[0].grad) < 1e-5
    for n, t in ours.trained.items():
        if kind == "tlora" or theirs[n].grad is not None:
            assert error(t.grad, theirs[n].grad.reshape(t.shape)) < 2e-5, n


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
def test_rows_that_lycoris_drops(kind: str) -> None:
    """Its ``rank_dropout`` without ``rank_dropout_scale``, by the mask that its generator gives."""
    layer, base, x = layer_and_input("linear")
    module, ours = pair(kind, layer)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=rng(1)))
    module.rank_dropout = 0.5
    module.train()
    given = {n: p.detach() for n, p in named(kind, module).items() if n != "diff_b"}
    ours = ours.inner if kind == "full" else ours
    ours = ours.on({**ours.tensors, **given})
    torch.manual_seed(11)
    theirs = module(x)
    torch.manual_seed(11)
    rows = (torch.rand(40) > 0.5).float()
    added = module.bias * rows if kind == "full" else 0.0
    for mode in ("bypass", "rebuild"):
        y = adapted(Rows(ours, rows), base, x, mode)
        assert error(y - layer(x) + added, theirs - layer(x)) < 1e-5


def test_ranks_that_lycoris_drops_in_bypass() -> None:
    for name in LAYERS:
        layer, base, x = layer_and_input(name)
        module = LoConModule("", layer, lora_dim=4, alpha=3.0, bypass_mode=True, rank_dropout=0.5)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=rng(1)))
        lora = load({n: t.detach() for n, t in module.custom_state_dict().items()})
        module.train()
        torch.manual_seed(4)
        theirs = module(x)
        torch.manual_seed(4)
        kept = (torch.rand(4) > 0.5).float()
        assert 0 < kept.sum() < 4
        ours = adapted(Ranks(lora, kept[None].repeat(len(x), 1)), base, x)
        assert error(ours - layer(x), theirs - layer(x)) < 1e-5


def test_masked_ranks_of_tlora() -> None:
    layer, base, x = layer_and_input("linear")
    module, ours = pair("tlora", layer)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=rng(1)), alpha=0.1)
    given = {n: p.detach() for n, p in module.named_parameters()}
    ours = ours.on({**ours.tensors, **given, **start_of(module)})
    masks = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1.0]])
    drawn = ours.drawn(Draw(rng(), torch.tensor([0.9, 0.3, 0.0])))
    assert torch.equal(drawn.mask, masks)
    y = adapted(drawn, base, x)
    for i in range(3):
        set_timestep_mask(masks[i : i + 1])
        assert error(y[i] - layer(x[i]), module(x[i : i + 1])[0] - layer(x[i])) < 2e-5
    clear_timestep_mask()


def peft_layer(layer: nn.Module, **options: object) -> nn.Module:
    holder = nn.Module()
    holder.add_module("layer", layer)
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["layer"], **options)
    return get_peft_model(holder, config).base_model.model.layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_outputs_and_gradients_of_peft(name: str, options: dict[str, bool]) -> None:
    """Lengths of DoRA are constants in the backward pass of both."""
    layer, base, x = layer_and_input(name)
    reference = layer(x)
    theirs = peft_layer(layer, **options).train()
    config = AdapterConfig(
        "lora", 4, 3.0, rs_lora="use_rslora" in options, dora="use_dora" in options
    )
    ours = make(base.values.shape, config, rng()).started(base.values)
    with torch.no_grad():
        pairs = {
            "lora_down.weight": theirs.lora_A["default"].weight,
            "lora_up.weight": theirs.lora_B["default"].weight,
        }
        if config.dora:
            pairs["dora_scale"] = theirs.lora_magnitude_vector["default"].weight
            lengths = pairs["dora_scale"].reshape(ours.tensors["dora_scale"].shape)
            torch.testing.assert_close(ours.tensors["dora_scale"], lengths)
        for p in pairs.values():
            p.add_(torch.randn(p.shape, generator=rng(1)), alpha=0.2)
    given = {n: p.detach().reshape(ours.tensors[n].shape) for n, p in pairs.items()}
    ours = with_leaves(ours.on(given), CPU)
    probe = torch.randn(reference.shape, generator=rng(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [theirs(inputs[0]), adapted(ours, base, inputs[1])]
    assert error(outputs[1] - reference, outputs[0] - reference) < 1e-5
    for y in outputs:
        (y * probe).sum().backward()
    assert error(inputs[1].grad, inputs[0].grad) < 1e-5
    for n, p in pairs.items():
        assert error(ours.tensors[n].grad, p.grad.reshape(ours.tensors[n].shape)) < 1e-5, n


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("name", LAYERS)
def test_dora_of_lycoris(kind: str, name: str, on_output: bool) -> None:
    """Its start and its outputs; it differentiates the lengths too."""
    layer, base, x = layer_and_input(name)
    algorithm, theirs, options, own = KINDS[kind]
    module = theirs("", layer, lora_dim=4, alpha=3.0, bypass_mode=False, weight_decompose=True,
                    wd_on_out=on_output, **options)  # fmt: skip
    axis = "output" if on_output else "input"
    config = AdapterConfig(algorithm, 4, 3.0, dora=True, dora_on=axis, **own)
    ours = make(layer.weight.shape, config, rng()).started(layer.weight)
    started = ours.tensors["dora_scale"]
    torch.testing.assert_close(started, module.dora_scale.detach().reshape(started.shape))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=rng(1)), alpha=0.3)
    ours = ours.on({n: p.detach() for n, p in module.named_parameters()})
    assert error(adapted(ours, base, x) - layer(x), module.train()(x) - layer(x)) < 1e-5


READERS = {
    "lora": LoConModule, "lora_fa": LoConModule, "dylora": LoConModule, "loha": LohaModule,
    "lokr": LokrModule, "glora": GLoRAModule, "oft": DiagOFTModule, "boft": ButterflyOFTModule,
    "tlora": TLoraModule, "full": FullModule,
}  # fmt: skip


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("algorithm", READERS)
def test_lycoris_reads_what_was_trained(algorithm: str, scalar: bool) -> None:
    if scalar and algorithm in ("oft", "boft", "tlora", "full"):
        return
    layer, base, x = layer_and_input("linear")
    rank = 10 if algorithm == "boft" else 4
    config = AdapterConfig(algorithm, rank, 3.0, scalar=scalar, rs_lora=algorithm == "loha")
    ours = make(layer.weight.shape, config, rng()).started(layer.weight)
    tensors = {n: t + 0.2 * torch.randn(t.shape, generator=rng(1)) for n, t in ours.trained.items()}
    ours = ours.on({**ours.tensors, **tensors})
    kind = READERS[algorithm]
    state = ours.state()
    assert kind.algo_check({f"x.{n}": t for n, t in state.items()}, "x")
    given = kind.extract_state_dict({f"x.{n}": t for n, t in state.items()}, "x")
    with torch.no_grad():
        module = kind.make_module_from_state_dict("x", layer, *given)
    theirs = module.eval()(x)
    assert error(adapted(ours, base, x) - layer(x), theirs - layer(x)) < 2e-5
