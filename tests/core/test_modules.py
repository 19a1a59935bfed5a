"""Adapters module by module: from disk as from memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import peft
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.lazy import AdapterFile
from adapter_lab.core.merge import menus
from adapter_lab.core.merge.fits import FITS
from adapter_lab.core.merge.job import Job
from adapter_lab.core.merge.modules import Source
from adapter_lab.core.merge.outcome import Outcome, Row
from adapter_lab.core.merge.profiles import PROFILES
from adapter_lab.core.merge.ranks import RankRule
from torch import Tensor, nn

WIDE = 1500  # of tensors that are not read before they are asked for


def adapter() -> Adapter:
    torch.manual_seed(0)
    return Adapter({
        "lora_unet_a.lora_up.weight": torch.randn(WIDE, 2),
        "lora_unet_a.lora_down.weight": torch.randn(2, WIDE),
        "lora_unet_a.alpha": torch.tensor(3.0),
        "lora_unet_b.lokr_w1": torch.randn(2, 2), "lora_unet_b.lokr_w2": torch.randn(4, WIDE),
        "lora_unet_b.diff_b": torch.randn(8),
        "bundle_emb.cat.string_to_param.*": torch.randn(2, 4),
    })  # fmt: skip


def test_a_file_as_memory(tmp_path: Path) -> None:
    memory = Source(adapter())
    write_adapter(tmp_path / "a.safetensors", adapter())
    with AdapterFile(tmp_path / "a.safetensors") as opened:
        file = Source(opened)
        assert list(file.stems) == list(memory.stems) and "cat" not in str(list(file.stems))
        assert file.form is memory.form and file.form.id == "kohya"
        assert any(t.is_meta for stem in file.stems.values() for t in stem.tensors.values())
        ticks: list[tuple[int, int]] = []
        for mine, theirs in zip(
            file.modules(lambda done, total, _: ticks.append((done, total))), memory.modules(),
            strict=True,
        ):  # fmt: skip
            assert mine.name == theirs.name and set(mine.parts) == set(theirs.parts)
            one, two = mine.weight, theirs.weight
            assert one is not None and two is not None and one.scale == two.scale
            zeros = torch.zeros(one.shape)
            assert torch.equal(one.delta(zeros), two.delta(zeros))
        assert ticks == [(0, 2), (1, 2)]
        # What was read is not kept.
        assert any(t.is_meta for t in file.stems["lora_unet_a"].tensors.values())


def test_keys_are_spelled_as_the_file_spells_them() -> None:
    source = Source(Adapter({"transformer.a.lora_A.weight": torch.ones(2, 3),
                             "transformer.a.lora_B.weight": torch.ones(3, 2)}))  # fmt: skip
    assert source.key("transformer.a", "lora_down.weight") == "transformer.a.lora_A.weight"
    assert source.key("transformer.a", "lora_up.weight") == "transformer.a.lora_B.weight"
    assert source.key("transformer.a", "alpha") == "transformer.a.alpha"
    assert Source(adapter()).key("lora_unet_b", "lora_up.weight") == "lora_unet_b.lora_up.weight"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(600, 600), nn.Linear(600, 600)


def test_matrices_that_modules_share_are_read_as_well(tmp_path: Path) -> None:
    """VeRA keeps them once a file, under a name of their own."""
    config = peft.VeraConfig(r=4, target_modules=["one", "two"], save_projection=True)
    model = peft.get_peft_model(Two(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda" in name:
                parameter.normal_()
    before = {
        n: getattr(model.base_model.model, n).base_layer.weight.clone() for n in ("one", "two")
    }
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    with AdapterFile(tmp_path / "adapter_model.safetensors") as opened:
        for module in Source(opened).modules():
            name = module.name.rpartition(".")[2]
            weight = module.weight
            assert weight is not None
            change = getattr(merged, name).weight - before[name]
            torch.testing.assert_close(weight.delta(before[name]), change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"lora_unet_a.lora_up.weight": torch.ones(WIDE, 5)}, "'lora_unet_a'.*do not multiply"),
    ({"lora_unet_a.vblora_logits_A": torch.ones(2, 2)}, "'lora_unet_a'.*logits_A is not supported"),
])  # fmt: skip
def test_broken_modules_are_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AdapterLabError, match=message):
        Source(Adapter({**adapter(), **change})).module("lora_unet_a")


class Numbers(Job):
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for n in range(3):
            self.tick(n, 3, f"module {n}")
            yield f"{n}.diff", torch.full((2,), float(n))
        self.metadata["made"] = "3"
        self.outcome.verdict = "done"


def test_a_job_in_memory_and_by_file(tmp_path: Path) -> None:
    metadata = {"a": "b", "lora_adapter_metadata": "of the old keys"}
    collected = Numbers(metadata).collect("n")
    written = Numbers(metadata).write(tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    kept = {"a": "b", "made": "3", "software": '{"name": "Adapter Lab"}'}
    assert collected.metadata == kept and collected.name == "n"
    assert collected.metadata.items() <= written.items()
    assert all(torch.equal(read[key], tensor) for key, tensor in collected.items())


def test_cancel_ends_a_job_and_leaves_nothing(tmp_path: Path) -> None:
    def tick(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt(what)

    with pytest.raises(KeyboardInterrupt, match="module 1"):
        Numbers(tick=tick).write(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_outcome_puts_the_worst_first_and_counts_the_rest() -> None:
    rows = {f"m{n}": Row("LoRA", n, n / 100 if n else None) for n in range(20)}
    outcome = Outcome("ok", rows, {"x": "too small"}, [("rank", "4")], ["careful"])
    text = outcome.to_text().splitlines()
    assert text[0] == "ok" and "careful" in text[1] and text[2] == "rank: 4"
    assert text[3] == "m19: LoRA 19, error 19.00%" and outcome.error == 0.19
    assert "... and 8 more" in text and text[-1] == "left out: x: too small"
    assert outcome.to_dict()["rows"]["m3"] == {"made": "LoRA", "rank": 3, "error": 0.03, "note": ""}


def test_menus_offer_what_there_is():
    assert tuple(FITS) == menus.FITTED and tuple(PROFILES) == menus.AVERAGES
    for rule in menus.RULES:
        assert RankRule(rule, 0.5 if rule != "sv_ratio" else 2.0).rule == rule
    assert set(get_args(menus.Sign)) == {*menus.SIGNS}
    assert set(get_args(menus.Inexact)) == {*menus.INEXACT}
