"""Files with something wrong end in an AdapterLabError or a misfit, whatever is wrong."""

from __future__ import annotations

import random

import torch
from adapter_lab.core.adapters import Algorithm, load_parts
from adapter_lab.core.errors import AdapterLabError
from adapter_samples import OUT, WIDTH, biases, r, samples
from torch import Tensor

ROUNDS = 8000
SHAPES = (
    (), (1,), (OUT,), (WIDTH,), (OUT, WIDTH), (WIDTH, OUT), (OUT, 1), (1, WIDTH), (1, 1),
    (OUT, WIDTH, 1), (OUT, WIDTH, 1, 1), (OUT, 4, 3), (OUT, 4, 1, 3), (OUT, WIDTH, 3, 3),
    (1, 1, 3, 3), (0, WIDTH), (OUT, 0),
)  # fmt: skip
NUMBERS = (
    torch.tensor(0.0), torch.tensor(0.5), torch.tensor([2.0]), torch.tensor(1), torch.tensor(-1.0),
    torch.tensor(1j), torch.tensor(torch.nan), torch.tensor(torch.inf), torch.ones(2),
    torch.ones(0), torch.tensor(True), torch.tensor(1e30),
)  # fmt: skip
CONFIGS = tuple(
    {name: value, "module": "a.b"}
    for name in ("feedforward_modules", "num_cayley_neumann_terms", "coft", "eps", "apply_GS",
                 "use_cayley_neumann")
    for value in (None, 5, 0, -1.0, 0.5, True, "b", "(", ["b"], [5], float("inf"), float("nan"))
)  # fmt: skip


def sources() -> list[dict[str, Tensor]]:
    plain = samples((OUT, WIDTH))
    lora = plain["lora"]
    return [
        *plain.values(), *biases(OUT).values(),
        *samples((OUT, WIDTH, 3, 3)).values(),
        {**lora, "lora_up.bias": r(OUT)},
        {**lora, "dora_scale": r(OUT, 1)}, {**lora, "scalar": torch.tensor(2.0)},
        {**lora, "reshape_weight": torch.tensor([OUT, WIDTH])},
        {"lora_embedding_A": r(2, OUT), "lora_embedding_B": r(WIDTH, 2)},
        {"kohya_oft_blocks.0": r(2, 4, 4), "kohya_oft_blocks.1": r(2, 4, 4)},
    ]  # fmt: skip


def spoilt(tensor: Tensor, chance: random.Random) -> Tensor:
    flat = tensor.reshape(-1)
    return chance.choice([
        flat, tensor[..., None], tensor[..., None, None], tensor[None], tensor.mT
        if tensor.ndim > 1 else tensor, tensor[:1] if tensor.ndim else tensor, flat[:0],
        tensor.real.to(torch.int32), flat[0] if len(flat) else tensor, tensor.to(torch.complex64),
        torch.cat((flat, flat)), tensor.real.double(),
    ])  # fmt: skip


def use(adapter: Algorithm, parameter: str, chance: random.Random) -> None:
    assert adapter.rank >= 1 and all(isinstance(n, int) for n in adapter.shape)
    assert isinstance(adapter.traits, tuple) and isinstance(adapter.whole, str)
    shape = chance.choice(SHAPES if parameter == "weight" else SHAPES[:4])
    weight = torch.randn(shape)
    # What acts on a bias may have to know the weight beside it first.
    if adapter.misfit(shape) is None and (parameter == "weight" or adapter.reads_output):
        delta, merged = adapter.delta(weight), adapter.merge(weight.clone())
        assert delta.shape == merged.shape
        if merged.shape == weight.shape:  # and not one that an adapter has enlarged
            assert torch.allclose(merged, weight + delta, 1e-3, 1e-3, equal_nan=True)
    adapter.at(0.5).state()


def test_nothing_but_our_errors() -> None:
    chance, whole, refused, used = random.Random(0), sources(), 0, 0
    torch.manual_seed(0)
    for _ in range(ROUNDS):
        tensors = dict(chance.choice(whole))
        for _ in range(chance.choice((0, 1, 1, 2))):
            name = chance.choice(list(tensors))
            if chance.random() < 0.1 and len(tensors) > 1:
                del tensors[name]
            else:
                tensors[name] = spoilt(tensors[name], chance)
        if chance.random() < 0.3:
            tensors[chance.choice(("alpha", "alpha", "scalar"))] = chance.choice(NUMBERS)
        if chance.random() < 0.1:
            tensors = {**chance.choice(whole), **tensors}
        try:
            for parameter, adapter in load_parts(tensors).items():
                use(adapter, parameter, chance)
                use(adapter.configured(chance.choice(CONFIGS)), parameter, chance)
                used += 1
        except AdapterLabError:
            refused += 1
        except Exception as error:
            sizes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
            raise AssertionError(f"{type(error).__name__} from {sizes}") from error
    assert min(refused, used) > ROUNDS / 10
