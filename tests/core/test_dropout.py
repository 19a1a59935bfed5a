"""What is left out of a batch in training, and what is drawn for it."""

from __future__ import annotations

import pytest
import torch
from adapter_lab.core.adapters import AdapterConfig, Algorithm, Draw
from adapter_lab.core.adapters.draw import along
from adapter_lab.core.adapters.training import choices, make, with_leaves
from adapter_lab.core.tensors import Op
from adapter_lab.core.train.layer import adapted
from adapter_lab.tests.data.frozen import SHAPES, Frozen, frozen
from lycoris.modules.tlora import compute_timestep_mask
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")
KINDS = [name for name in choices() if name != "norm"]
N = 8


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int = 0, items: int = 2) -> Draw:
    return Draw(rng(seed), torch.linspace(0.1, 0.9, items))


def trained(name: str, layer: str = "linear", **options: object) -> Algorithm:
    config = AdapterConfig(name, 4, 4.0, **options)
    made = make(SHAPES[layer][0], config, rng()).started(frozen(layer)[0].values)
    generator, tensors = rng(1), dict(made.tensors)
    for suffix, t in made.trained.items():
        tensors[suffix] = t + 0.3 * torch.randn(t.shape, generator=generator)
    return with_leaves(made.on(tensors), CPU)


def plain_lora(**options: object) -> tuple[Algorithm, Frozen]:
    """h(x) is A x of as many ranks as there are outputs, A = B = I."""
    made = make((N, N), AdapterConfig("lora", N, N, **options), rng())
    made = made.on({name: torch.eye(N) for name in made.tensors})
    return made, Frozen(torch.zeros(N, N), Op())


def effect(adapter: Algorithm, layer: Frozen, x: Tensor, seed: int, items: int = 2) -> Tensor:
    drawn = adapter.drawn(draw(seed, items))
    return torch.zeros_like(x) if drawn is None else adapted(drawn, layer, x).detach()


ALL = {"dropout": 0.3, "rank_dropout": 0.3}


@pytest.mark.parametrize("layer", ["linear", "conv1d 1x1", "grouped"])
@pytest.mark.parametrize("name", KINDS)
def test_the_generator_alone_decides(name: str, layer: str) -> None:
    if name == "tlora" and layer == "grouped":
        return
    adapter, (base, x) = trained(name, layer, **ALL), frozen(layer)
    assert adapter.draws
    before = torch.get_rng_state()
    once, again, other = (adapted(adapter.drawn(draw(s)), base, x) for s in (3, 3, 4))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", KINDS)
def test_layer_that_runs_twice(name: str) -> None:
    """Under gradient checkpointing, drawn anew each time from a generator in one state."""

    def gradients(run) -> list[Tensor]:
        adapter, (base, x) = trained(name, **ALL), frozen("linear")
        x.requires_grad_()
        run(lambda x: adapted(adapter.drawn(draw(5)), base, x), x).square().sum().backward()
        return [x.grad, *(t.grad for t in adapter.trained.values() if t.grad is not None)]

    plain = gradients(lambda layer, x: layer(x))
    twice = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, twice, strict=True))


def test_ranks_are_dropped_for_each_item_by_itself() -> None:
    adapter, layer = plain_lora(rank_dropout=0.5)
    y = effect(adapter, layer, torch.ones(64, 3, N), 0, items=64)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y[:, :1].expand_as(y), y), "tokens of an item share their ranks"
    assert len({tuple(row) for row in y[:, 0].tolist()}) > 32
    assert y.mean() == pytest.approx(1, abs=0.1)


def test_elements_of_rank_activations_are_dropped() -> None:
    adapter, layer = plain_lora(dropout=0.25)
    y = effect(adapter, layer, torch.ones(2, 500, N), 0)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    per_rank = (y == 0).float().mean((0, 1))
    assert per_rank.min() > 0.15 and per_rank.max() < 0.35


@pytest.mark.parametrize("name", ["loha", "lokr", "glora", "glokr", "full"])
def test_output_rows_of_a_delta_are_dropped(name: str) -> None:
    adapter, (layer, x) = trained(name, rank_dropout=0.5), frozen("linear", bias=False)
    drawn = adapter.drawn(draw(2))
    whole = adapted(adapter, layer, x) - layer.base(x)
    rows = (adapted(drawn, layer, x) - layer.base(x)) / whole
    first = rows[0, 0].detach().round(decimals=3)
    assert set(first.tolist()) == {0.0, 2.0}
    torch.testing.assert_close(rows, first.expand_as(rows), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        adapted(drawn, layer, x, "rebuild"), adapted(drawn, layer, x, "bypass"), rtol=1e-4,
        atol=1e-4,
    )  # fmt: skip


def test_blocks_that_are_dropped_rotate_nothing() -> None:
    adapter, layer = trained("oft", rank_dropout=0.5), frozen("linear")[0]
    blocks = adapter.drawn(draw(1)).delta(layer.values).reshape(-1, 4, 12).flatten(1)
    dropped = ~blocks.any(1)
    assert 0 < dropped.sum() < len(blocks)
    kept = adapter.delta(layer.values).reshape(-1, 4, 12).flatten(1)
    torch.testing.assert_close(blocks[~dropped], kept[~dropped])


def test_stages_of_a_butterfly_are_dropped_by_block() -> None:
    adapter, layer = trained("boft", rank_dropout=0.5), frozen("linear")[0]
    drawn = adapter.drawn(draw(1))
    left = drawn.tensors["oft_blocks"].flatten(2).any(-1)
    assert left.shape == (3, 4) and 0 < left.sum() < left.numel()
    assert torch.equal(drawn.tensors["oft_blocks"][left], adapter.tensors["oft_blocks"][left])
    nearly = trained("boft", rank_dropout=0.9999).drawn(draw(1))
    assert not nearly.delta(layer.values).any()


@pytest.mark.parametrize("name", KINDS)
def test_dropout_means_the_whole_on_average(name: str) -> None:
    """But where ranks are left out for good, and where what is left out is no summand."""
    rates = {"dropout": 0.4} if name in ("oft", "boft", "coft") else {**ALL}
    adapter, (layer, x) = trained(name, **rates), frozen("linear", bias=False)
    if name in ("tlora", "dylora"):
        return
    base = layer.base(x)
    draws = [adapted(adapter.drawn(draw(s)), layer, x).detach() - base for s in range(600)]
    mean, whole = torch.stack(draws).mean(0), (adapted(adapter, layer, x) - base).detach()
    spread = torch.stack(draws).std(0) / 600**0.5
    assert ((mean - whole).abs() < 5 * spread + 1e-6).all()
    assert (torch.stack(draws).std(0) > 0).any()


def test_modules_are_left_out() -> None:
    adapter = trained("lora", module_dropout=0.25, bias=True, dora=True)
    out = [adapter.drawn(draw(seed)) is None for seed in range(1000)]
    assert sum(out) / len(out) == pytest.approx(0.25, abs=0.04)


def test_nothing_is_dropped_outside_training() -> None:
    layer, x = frozen("linear")
    for name in KINDS:
        adapter, calm = trained(name, **ALL), trained(name)
        assert torch.equal(adapted(adapter, layer, x), adapted(calm, layer, x))
        assert torch.equal(adapter.delta(layer.values), calm.delta(layer.values))


def test_lengths_of_dora_do_not_see_dropout() -> None:
    adapter, (layer, x) = trained("lora", dora=True, rank_dropout=0.5), frozen("linear", bias=False)
    lengths = adapter.tensors["dora_scale"]
    inner = adapter.inner
    gain = lengths / (layer.values + inner.delta(layer.values)).norm(dim=1, keepdim=True)
    drawn = inner.drawn(draw(3))
    want = gain.T * adapted(drawn, layer, x)
    torch.testing.assert_close(adapted(adapter.drawn(draw(3)), layer, x), want)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_ranks_of_tlora_by_noise_level(rank: int) -> None:
    config = AdapterConfig("tlora", rank)
    adapter = make((16, 12), config, rng())
    steps = torch.tensor([0, 1, 250, 333, 500, 749, 990, 999])
    ranks = adapter.drawn(Draw(rng(), steps / 1000))
    for step, mask in zip(steps.tolist(), ranks.mask, strict=True):
        assert torch.equal(mask[None], compute_timestep_mask(step, 1000, rank))


def test_tlora_of_items_at_several_noise_levels() -> None:
    adapter, (layer, x) = trained("tlora"), frozen("linear")
    t = torch.tensor([0.0, 1.0])
    both = adapted(adapter.drawn(Draw(rng(), t)), layer, x)
    for i in range(2):
        alone = adapted(adapter.drawn(Draw(rng(), t[i : i + 1])), layer, x[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone)
    torch.testing.assert_close(both[0], adapted(adapter, layer, x)[0])
    start = {n: adapter.tensors[f"{n}.start"] for n in ("q_layer.weight", "p_layer.weight")}
    one = adapter.tensors["p_layer.weight"][:, :1] * adapter.tensors["lambda_layer"][:, :1]
    began = start["p_layer.weight"][:, :1] * adapter.tensors["lambda_layer.start"][:, :1]
    delta = one @ adapter.tensors["q_layer.weight"][:1] - began @ start["q_layer.weight"][:1]
    torch.testing.assert_close(both[1], layer.base(x)[1] + x[1] @ delta.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_dylora_trains_a_block_of_the_ranks_so_far(layer: str) -> None:
    seen = set()
    for seed in range(40):
        adapter, (base, x) = trained("dylora", layer, unit=2), frozen(layer)
        drawn = adapter.drawn(draw(seed))
        up, down = adapter.tensors["lora_up.weight"], adapter.tensors["lora_down.weight"]
        active = drawn.rank
        dense = (up[:, :active].flatten(1) @ down[:active].flatten(1)).reshape(base.values.shape)
        effect = base.op(x, dense * (4 / active) ** 0.5)
        y = adapted(drawn, base, x)
        torch.testing.assert_close(y, base.base(x) + effect, rtol=1e-4, atol=1e-4)
        y.square().sum().backward()
        learns = [bool(up.grad[:, i].any()) for i in range(4)]
        assert learns == [active - 2 <= i < active for i in range(4)]
        assert learns == [bool(down.grad[i].any()) for i in range(4)]
        seen.add(active)
    assert seen == {2, 4}


def test_a_mask_on_tokens_that_share_an_axis_with_their_items() -> None:
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    folded = along(mask, torch.ones(6, 2), -1)
    assert folded[:, 0].tolist() == [1, 1, 1, 0, 0, 0]
    assert along(mask, torch.ones(2, 4, 5), 1)[:, :, 0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert along(mask, torch.ones(3, 7, 2), -1)[:, 0].tolist() == [[1, 0]] * 3
