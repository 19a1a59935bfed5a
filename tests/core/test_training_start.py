"""What every configuration that can be trained has in common, from its start to its file."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig, Algorithm, load_parts
from adapter_lab.core.adapters.training import (
    choices,
    config_notes,
    go_on,
    make,
    training_notes,
    with_leaves,
)
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.train.layer import adapted
from adapter_lab.tests.data.frozen import SHAPES, frozen
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

CPU = torch.device("cpu")
ADDITIVE = ("lora", "lora_fa", "dylora", "loha", "lokr", "glora", "glokr", "full", "tlora")
FOLDING = ("lora", "lora_fa", "dylora", "loha", "lokr", "glora", "glokr")
CONFIGS = {
    **{name: {} for name in choices() if name != "norm"},
    **{f"{n} dora": {"dora": True} for n in ADDITIVE},
    **{f"{n} dora input": {"dora": True, "dora_on": "input"} for n in ADDITIVE},
    **{f"{n} scalar": {"scalar": True} for n in FOLDING},
    "lora everything": {"scalar": True, "dora": True, "rs_lora": True, "bias": True},
    "lora tucker": {"tucker": True, "conv_rank": 3, "conv_alpha": 1.5},
    "loha tucker": {"tucker": True, "bias": True},
    "lokr tucker": {"tucker": True, "factor": 4, "rank": 1},
    "lokr both": {"decompose_both": True, "factor": 4, "rank": 1},
    "lokr full": {"full_matrix": True, "scalar": True},
    "glokr full": {"full_matrix": True},
    "dylora unit": {"unit": 2, "conv_rank": 2},
    "ia3 input": {"on_input": True},
    "oft rescaled": {"rescale": True, "bias": True},
    "boft rescaled": {"rescale": True, "constraint": 0.01},
}


def config_of(name: str, **more: object) -> AdapterConfig:
    return AdapterConfig(name.split()[0], **{"rank": 4, "alpha": 3.0, **CONFIGS[name], **more})


def possible(name: str, layer: str) -> bool:
    kernel = any(n != 1 for n in SHAPES[layer][0][2:])
    return not (name.startswith("tlora") and kernel)


CASES = [(n, layer) for n, layer in itertools.product(CONFIGS, SHAPES) if possible(n, layer)]
each_case = pytest.mark.parametrize("name, layer", CASES)
each_config = pytest.mark.parametrize("name", CONFIGS)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(name: str, layer: str, seed: int = 0, precision: str = "fp32") -> Algorithm:
    made = make(SHAPES[layer][0], config_of(name), rng(seed), biased=True)
    return with_leaves(made.started(frozen(layer)[0].values), CPU, precision)


def moved(adapter: Algorithm, seed: int = 1, std: float = 0.3) -> Algorithm:
    """The same with every trained number somewhere else."""
    generator, tensors = rng(seed), dict(adapter.tensors)
    for name, t in adapter.trained.items():
        tensors[name] = t.detach() + std * torch.randn(t.shape, generator=generator).to(t)
    return with_leaves(adapter.on(tensors), CPU)


def bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp(min=1e-30))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_the_layer_bit_by_bit(name: str, layer: str, dtype: torch.dtype) -> None:
    """Of a model and factors in either dtype."""
    before = torch.get_rng_state()
    with_bias, x = frozen(layer, dtype=dtype)
    without, _ = frozen(layer, bias=False, dtype=dtype)
    adapter = make(SHAPES[layer][0], config_of(name), rng(), biased=True)
    adapter = adapter.started(with_bias.values)
    adapter = with_leaves(adapter, CPU, "fp32" if dtype == torch.float32 else "bf16")
    assert bits(adapted(adapter, with_bias, x, "bypass"), with_bias.base(x))
    if not config_of(name).bias:
        for mode in ("auto", "rebuild"):
            assert bits(adapted(adapter, without, x, mode), without.base(x))
    with torch.no_grad():
        weight = with_bias.values.float()
        assert bits(adapter.merge(weight.clone()), weight)
        assert not adapter.delta(with_bias.values).any()
        assert not adapter.bypass(x, with_bias.op, with_bias.values).any()
    assert torch.equal(torch.get_rng_state(), before), "it drew from the global generator"


@each_case
def test_file_says_what_was_trained(name: str, layer: str) -> None:
    adapter = moved(fresh(name, layer))
    weight = frozen(layer)[0].values
    state = load_bytes(save_bytes({k: t.detach().contiguous() for k, t in adapter.state().items()}))
    parts = load_parts(state)
    assert not any(n == "scalar" or n.endswith(".start") for n in state)
    assert error(parts["weight"].delta(weight), adapter.delta(weight)) < 2e-6
    assert ("bias" in parts) == config_of(name).bias
    if config_of(name).bias:
        (learned,) = (t for n, t in adapter.tensors.items() if n == "diff_b")
        assert torch.equal(parts["bias"].delta(torch.zeros(16)), learned)


@each_config
def test_resumes_without_its_weight(name: str) -> None:
    """A snapshot of ``tensors`` is all: nothing is drawn or worked out again."""
    adapter = moved(fresh(name, "linear"))
    layer, x = frozen("linear")
    again = make(layer.values.shape, config_of(name), rng(5), biased=True)
    assert again.tensors.keys() == adapter.tensors.keys()
    assert [t.shape for t in again.tensors.values()] == [t.shape for t in adapter.tensors.values()]
    again = with_leaves(again.on(adapter.tensors), CPU)
    assert again.trained.keys() == adapter.trained.keys()
    assert bits(adapted(again, layer, x), adapted(adapter, layer, x))
    assert all(bits(t, adapter.state()[n]) for n, t in again.state().items())


@each_case
def test_gradients_are_differences(name: str, layer: str) -> None:
    """By central differences, of the factors and of x; for DoRA with its lengths held still."""
    frozen_layer, x = frozen(layer, dtype=torch.float64)
    adapter = moved(fresh(name, layer))
    names = list(adapter.trained)
    still = {n: t.double() if t.is_floating_point() else t for n, t in adapter.tensors.items()}
    adapter = adapter.on(still)
    probe = torch.randn(frozen_layer.base(x).shape, generator=rng(3), dtype=torch.float64)
    values = [still[n].detach().requires_grad_() for n in names]

    def run(x: Tensor, *factors: Tensor, mode: str = "bypass") -> Tensor:
        changed = adapter.on({**still, **dict(zip(names, factors, strict=True))})
        return (adapted(changed, frozen_layer, x, mode) * probe).sum()

    x.requires_grad_()
    ours = torch.autograd.grad(run(x, *values), (x, *values), allow_unused=True)
    rebuilt = torch.autograd.grad(run(x, *values, mode="rebuild"), (x, *values))
    for one, other, n in zip(ours, rebuilt, ("x", *names), strict=True):
        assert one is not None and one.any(), f"{n} learns nothing"
        assert error(one, other) < 1e-9, n
    if "dora" not in name and "everything" not in name:
        torch.autograd.gradcheck(run, (x, *values), fast_mode=True, atol=1e-4)


@each_config
def test_the_first_gradient_is_finite(name: str) -> None:
    """Where norms of zero and products with zero are differentiated."""
    adapter, (layer, x) = fresh(name, "linear"), frozen("linear")
    probe = torch.randn(2, 3, 16, generator=rng(3))
    (adapted(adapter, layer, x) * probe).sum().backward()
    found = [t.grad for t in adapter.trained.values() if t.grad is not None]
    assert all(grad.isfinite().all() for grad in found) and any(grad.any() for grad in found)


@each_config
def test_only_what_is_trained_has_a_gradient(name: str) -> None:
    adapter = moved(fresh(name, "linear"))
    layer, x = frozen("linear")
    adapted(adapter, layer, x).square().sum().backward()
    with_gradient = {n for n, t in adapter.tensors.items() if t.grad is not None}
    assert with_gradient == set(adapter.trained)
    assert "alpha" not in adapter.tensors


FROZEN = {
    "lora_fa": {"lora_down.weight"}, "ia3": {"on_input"},
    "tlora": {"q_layer.weight.start", "p_layer.weight.start", "lambda_layer.start"},
}  # fmt: skip


@each_config
def test_what_stays_as_it_began(name: str) -> None:
    adapter = fresh(name, "linear")
    untrained = adapter.tensors.keys() - adapter.trained.keys()
    assert untrained == FROZEN.get(name.split()[0], set())


@pytest.mark.parametrize("name", ["lora", "lora_fa", "dylora", "dylora unit", "lora tucker"])
def test_kin_of_lora_write_loras(name: str) -> None:
    state = moved(fresh(name, "conv2d")).state()
    mid = {"lora_mid.weight"} if "tucker" in name else set()
    assert state.keys() == {"lora_up.weight", "lora_down.weight", "alpha"} | mid


def test_ranks_of_convolutions_and_scales() -> None:
    config = AdapterConfig("lora", 4, 2.0, conv_rank=2, conv_alpha=3.0)
    ranks = {}
    for layer in SHAPES:
        made = make(SHAPES[layer][0], config, rng())
        ranks[layer] = (made.rank, made.scale, float(made.state()["alpha"]))
    assert ranks["linear"] == ranks["conv1d 1x1"] == (4, 0.5, 2.0)
    assert ranks["conv2d"] == (2, 1.5, 3.0)
    shared = make(SHAPES["conv2d"][0], AdapterConfig("lora", 4, 2.0), rng())
    assert (shared.rank, shared.scale) == (4, 0.5)
    stable = make((16, 12), AdapterConfig("loha", 4, 2.0, rs_lora=True), rng())
    assert stable.scale == 1.0 and float(stable.state()["alpha"]) == 4.0


def test_a_norm_is_trained_whole_under_any_configuration() -> None:
    for name in choices():
        adapter = make((16,), AdapterConfig(name, 4), rng(), biased=True)
        assert adapter.state().keys() - {"alpha"} == {"w_norm", "b_norm"}
        assert set(adapter.trained) == {"w_norm", "b_norm"}
        assert not adapter.delta(torch.randn(16)).any()
    assert make((16,), AdapterConfig(), rng()).state().keys() - {"alpha"} == {"w_norm"}


def test_a_layer_without_a_bias_gets_none() -> None:
    assert "diff_b" not in make((16, 12), AdapterConfig(bias=True), rng()).tensors


def test_precision_of_factors() -> None:
    adapter = fresh("lora everything", "linear", precision="bf16")
    narrow = {n for n, t in adapter.tensors.items() if t.dtype == torch.bfloat16}
    assert narrow == adapter.tensors.keys() - {"dora_scale"}
    start = fresh("tlora", "linear", precision="bf16")
    assert {t.dtype for t in start.tensors.values()} == {torch.float32}


REFUSED = {
    "DoRA means nothing on Diag-OFT": {"algorithm": "oft", "dora": True},
    "DoRA means nothing on .IA": {"algorithm": "ia3", "dora": True},
    "no factor that could carry a scalar": {"algorithm": "boft", "scalar": True},
    "no multiple of DyLoRA's unit": {"algorithm": "dylora", "rank": 6, "unit": 4},
    "no ranks to cut in a Tucker": {"algorithm": "dylora", "tucker": True},
    "VeRA is read, not trained: found its random matrices": {"algorithm": "vera"},
    "Only norms are trained as norms": {"algorithm": "norm"},
    "Unknown algorithm 'lorra'": {"algorithm": "lorra"},
    "BOFT has no blocks": {"algorithm": "boft", "rank": 1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_means_nothing_is_refused(message: str) -> None:
    with pytest.raises(AdapterLabError, match=message):
        make((16, 12), AdapterConfig(**REFUSED[message]), rng())
    with pytest.raises(AdapterLabError, match="kernel of .3, 3."):
        make((16, 12, 3, 3), AdapterConfig("tlora"), rng())


@pytest.mark.parametrize("field, value", [
    ("rank", 0), ("factor", -2), ("conv_rank", -1), ("unit", 0), ("alpha", -1.0),
    ("alpha", float("nan")), ("constraint", float("inf")), ("dropout", 1.0), ("rank_dropout", -0.1),
    ("module_dropout", 1.5), ("precision", "fp16"), ("forward", "merge"), ("dora_on", "both"),
])  # fmt: skip
def test_values_out_of_range(field: str, value: object) -> None:
    with pytest.raises(AdapterLabError, match=field):
        AdapterConfig(**{field: value})


@pytest.mark.parametrize("name", [n for n in CONFIGS if "bias" not in CONFIGS[n]])
def test_training_goes_on_from_a_file(name: str) -> None:
    """Under its own algorithm, as the layer was; T-LoRA from where it began."""
    first, config = moved(fresh(name, "linear")), config_of(name, dropout=0.1)
    layer, x = frozen("linear")
    loaded = load_parts({k: t.detach() for k, t in first.state().items()})["weight"]
    second = go_on(loaded, config)
    names = second.tensors.keys()
    second = with_leaves(second.started(layer.values), CPU)
    assert second.tensors.keys() == names and second.draws
    assert error(second.delta(layer.values), first.delta(layer.values)) < 5e-6
    trained = first.trained.keys() - {"scalar"}
    assert second.trained.keys() == trained
    adapted(second, layer, x).square().sum().backward()
    assert all(t.grad is not None for t in second.trained.values())
    # Its state is what a snapshot restores, without the weight.
    again = go_on(loaded, config).on(second.tensors)
    assert torch.equal(again.delta(layer.values), second.delta(layer.values))


def test_training_cannot_go_on_from_everything() -> None:
    up, down = torch.randn(16, 2), torch.randn(2, 12)
    lora = {"lora_up.weight": up, "lora_down.weight": down}
    for tensors, message in (
        ({"hra_u": torch.randn(12, 2)}, "HRA is read, not trained: found it starts"),
        ({**lora, "lora_up.bias": torch.randn(16)}, "changes a bias"),
        ({"oft_diag": torch.eye(4).repeat(4, 1, 1)}, "trained by what its rotations are made of"),
        ({**lora, "reshape_weight": torch.tensor([16, 12])}, "enlarges the weight"),
    ):
        with pytest.raises(AdapterLabError, match=message):
            go_on(load_parts(tensors)["weight"], AdapterConfig())
    with pytest.raises(AdapterLabError, match="no multiple"):
        go_on(load_parts(lora)["weight"], AdapterConfig("dylora", 4, unit=4))


def test_notes_on_ranks() -> None:
    """The limits are those of LyCORIS, which warns at the same ranks."""
    (note,) = training_notes((512, 256), AdapterConfig("lokr", 16))
    assert "rank 16" in note and "full matrix" in note
    assert not training_notes((512, 256), AdapterConfig("lokr", 15))
    assert not training_notes((512, 256), AdapterConfig("lokr", 16, full_matrix=True))
    made = make((512, 256), AdapterConfig("lokr", 16), rng())
    assert "lokr_w2" in made.tensors
    (note,) = training_notes((84, 12), AdapterConfig("boft", 16))
    assert "blocks of 14 mix 28 rows" in note
    assert not training_notes((96, 12), AdapterConfig("boft", 16))
    assert "12" in training_notes((16, 12), AdapterConfig("tlora", 20))[0]
    assert make((16, 12), AdapterConfig("tlora", 20), rng()).rank == 12
    assert not training_notes((16,), AdapterConfig("lokr", 512))


def test_notes_on_options() -> None:
    assert config_notes(AdapterConfig()) == ()
    note, _ = config_notes(AdapterConfig("ia3", rank=8, factor=4, unit=2, on_input=True))
    assert note == "(IA)^3 does not use rank, factor, unit"
    assert config_notes(AdapterConfig("dylora", unit=4, conv_rank=8)) == ()
    assert config_notes(AdapterConfig("lokr", dora=True, dora_on="input")) == ()
    assert "dora_on" in config_notes(AdapterConfig(dora_on="input"))[0]
    assert "fp32" in config_notes(AdapterConfig("tlora", precision="bf16"))[0]


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (AdapterConfig("ia3", rank=16), "(IA)^3"),
        (AdapterConfig("coft", rescale=True), "the constraint, rescale"),
        (AdapterConfig("boft", constraint=0.1, rescale=True), "the constraint"),
        (AdapterConfig("loha", dora=True), "DoRA on outputs"),
    ],
)
def test_notes_what_another_loader_reads_otherwise(config: AdapterConfig, what: str) -> None:
    (note,) = config_notes(config)
    assert f"does not read {what} as trained" in note


def test_menu() -> None:
    menu = choices()
    assert [n for n in menu if n in ("lora", "lora_fa", "dylora")] == ["lora", "lora_fa", "dylora"]
    assert all(purpose.rpartition(": ")[2] for purpose in menu.values())
    assert not {"vera", "hra", "set", "bias"} & menu.keys()
    reasons = [a.untrained for a in ALGORITHMS.values() if not a.trainable]
    assert all(reasons) and len(reasons) + len(menu) == len(ALGORITHMS) + 3
