"""Every algorithm, alone and wrapped: all ways of using an adapter do the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapter_lab.core.adapters import ALGORITHMS, Algorithm, Ordered, load, load_parts
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.tensors import Op
from adapter_samples import OUT, WIDTH, biases, samples
from torch import Tensor

LAYERS = {
    "linear": ((OUT, WIDTH), Op()),
    "conv2d 1x1": ((OUT, WIDTH, 1, 1), Op(2, stride=2)),
    "conv2d 3x3": ((OUT, WIDTH, 3, 3), Op(2, padding=1)),
    "grouped": ((OUT, WIDTH // 2, 3, 3), Op(2, padding=1, groups=2)),
}
SAMPLES = {name: samples(shape, op.groups) for name, (shape, op) in LAYERS.items()}
CASES = [(layer, name) for layer, found in SAMPLES.items() for name in found]
WRAPS = ("plain", "DoRA", "DoRA on inputs", "ordered", "ordered DoRA")
ORDER = torch.randperm(OUT, generator=torch.Generator().manual_seed(4))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def wrapped(layer: str, name: str, how: str) -> Algorithm | None:
    """The sample in a wrapper; None where its file does not tell the axis of the lengths."""
    tensors, (_, width, *k) = SAMPLES[layer][name], LAYERS[layer][0]
    if "DoRA" in how:
        sizes = (1, width) if "inputs" in how else (OUT, 1)
        lengths = noise(*sizes, *(1,) * len(k)).abs() + 0.5
        try:
            adapter = load({**tensors, "dora_scale": lengths})
        except AdapterLabError as error:
            assert "fits no axis" in str(error)
            adapter = None
        if adapter is None or adapter.misfit(LAYERS[layer][0]):
            assert load(tensors).shape[:2] != (OUT, width)
            return None
    else:
        adapter = load(tensors)
    assert adapter is not None
    return Ordered(adapter, ORDER) if "ordered" in how else adapter


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-5)


def test_there_is_a_sample_of_every_algorithm() -> None:
    found = {
        load_parts(tensors)[part].name
        for tensors, part in [
            *((t, "weight") for s in SAMPLES.values() for t in s.values()),
            *((t, ALGORITHMS[n].parameter) for n, t in biases(4).items()),
        ]
    }
    assert found == set(ALGORITHMS)
    for name in itertools.chain(*SAMPLES.values()):
        layer = next(layer for layer, found in SAMPLES.items() if name in found)
        assert load(SAMPLES[layer][name]).name == name.partition(",")[0]


@pytest.mark.parametrize("layer, name", CASES)
@pytest.mark.parametrize("how", WRAPS)
def test_all_routes_agree(layer: str, name: str, how: str) -> None:
    adapter, (shape, op) = wrapped(layer, name, how), LAYERS[layer]
    if adapter is None:
        return
    weight = noise(*shape)
    x = noise(3, WIDTH, 5, 4) if op.dims else noise(3, 5, WIDTH)
    y = op(x, weight)
    assert adapter.misfit(shape) is None
    assert torch.equal(adapter.at(0.0).merge(weight.clone()), weight)
    settled = adapter.settled(weight)
    again = settled.on({k: t.clone() for k, t in settled.tensors.items()})
    for m in (1.0, -0.6):
        delta, place = adapter.at(m).delta(weight), weight.clone()
        assert delta.norm() > 0.01
        merged = adapter.at(m).merge(place)
        assert merged is place and close(merged, weight + delta)
        effect = op(x, delta)
        for ready, known in itertools.product((adapter, settled, again), (None, y)):
            assert close(ready.at(m).bypass(x, op, weight, known), effect)
            # What says that it needs no values gets none.
            blind = not ready.reads_weight or (known is not None and ready.reads_output)
            if blind and op.groups == 1:
                nothing = torch.full_like(weight, torch.nan)
                assert close(ready.at(m).bypass(x, op, nothing, known), effect)


@pytest.mark.parametrize("layer, name", CASES)
def test_an_order_is_that_of_the_rows(layer: str, name: str) -> None:
    adapter, shape = load(SAMPLES[layer][name]), LAYERS[layer][0]
    assert adapter is not None
    weight, ordered = noise(*shape), Ordered(adapter, ORDER)
    want = torch.empty(shape)
    want[ORDER] = adapter.merge(weight[ORDER])
    assert torch.equal(ordered.merge(weight.clone()), want)
    assert close(weight + ordered.delta(weight), want, 1e-5)
    assert ordered.misfit((OUT + 1, *shape[1:])) is not None and ordered.misfit(()) is not None


@pytest.mark.parametrize("name", biases(OUT))
def test_biases_and_norms(name: str) -> None:
    tensors, vector = biases(OUT)[name], noise(OUT)
    adapter = load_parts(tensors)[ALGORITHMS[name].parameter]
    assert adapter.misfit((OUT,)) is None and adapter.misfit((OUT + 1,)) is not None
    for ready in (adapter, Ordered(adapter, ORDER), adapter.settled(vector)):
        for m in (1.0, 0.3):
            merged = ready.at(m).merge(vector.clone())
            assert close(merged, vector + ready.at(m).delta(vector), 1e-5)
        assert torch.equal(ready.at(0.0).merge(vector.clone()), vector)


@pytest.mark.parametrize("name", SAMPLES["linear"])
@pytest.mark.parametrize("how", WRAPS[:2])
def test_factors_and_weights_of_any_dtype(name: str, how: str) -> None:
    adapter = wrapped("linear", name, how)
    if adapter is None:
        return
    x, weight = noise(3, WIDTH), noise(OUT, WIDTH)
    for number, dtype in enumerate((torch.bfloat16, torch.float32, torch.float64)):
        # bfloat16 is one of several dtypes in a file.
        mixed = {
            k: t.to(dtype if n % 2 or number else torch.float32) if t.is_floating_point() else t
            for n, (k, t) in enumerate(adapter.tensors.items())
        }
        ready = adapter.on(mixed)
        exact = adapter.on(
            {k: t.double() if t.is_floating_point() else t for k, t in mixed.items()}
        ).delta(weight.double())
        assert exact.dtype == torch.float64
        for given in (weight, weight.double()):
            delta = ready.delta(given)
            assert delta.dtype == given.dtype and close(delta, exact)
            assert close(ready.merge(given.clone()) - given, exact)
            effect = x.double() @ exact.T
            assert close(ready.bypass(x.to(given), Op(), given), effect)
            assert close(ready.settled(given).bypass(x.to(given), Op(), given), effect)


@pytest.mark.parametrize("layer, name", CASES)
@pytest.mark.parametrize("how", WRAPS[:2])
def test_a_file_holds_it(layer: str, name: str, how: str) -> None:
    """At strength 1 always; at another one unless it says that it can't."""
    adapter, shape = wrapped(layer, name, how), LAYERS[layer][0]
    if adapter is None:
        return
    weight = noise(*shape)
    for m in (1.0, 0.5):
        part = adapter.at(m)
        if m != 1 and (how == "DoRA" or name == "set"):
            with pytest.raises(AdapterLabError, match="no strength that a file could hold"):
                part.state()
            continue
        again = load(part.state())
        assert again is not None and close(again.delta(weight), part.delta(weight), 1e-5)
