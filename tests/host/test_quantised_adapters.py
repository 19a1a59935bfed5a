"""Adapters on quantised models: merged before, beside the weights, or quantised once more."""

from __future__ import annotations

import comfy.sd
import folder_paths
import pytest
import samples
import torch
import ways
from adapter_lab.core.files import write_adapter
from adapter_lab.core.merge.modules import quiet
from adapter_lab.core.quant import Settings, quantize_file
from adapter_lab.nodes.host import quantised as host
from adapter_lab.nodes.load import LoadAdapter
from comfy.quant_ops import QuantizedTensor
from test_quantize_file import FORMATS
from test_trainer import output

# A sum that is quantised again has the errors of two roundings, the second of them by chance.
TWICE = 1.15


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_what_each_way_keeps(checkpoints, algorithm):
    """Of a change of 1 %: before and beside all of it, with no error but the quantised model's."""
    rows = list(ways.compare(checkpoints("flux"), FORMATS, algorithm))
    print("\n" + ways.table(rows))
    for form in FORMATS:
        own = {row.way: row for row in rows if row.format == form}
        assert own["none"].share == 0
        assert own["beside"].share == pytest.approx(1, abs=0.01)
        assert own["before"].share == pytest.approx(1, abs=0.1 if form == "nvfp4" else 0.03)
        for way in ("before", "beside"):
            assert own[way].error < own["none"].error
            assert own["native"].error > TWICE * own[way].error


def test_a_small_change_is_lost_in_the_nearest_number(checkpoints):
    """Of 0.3 %, merged into weights that are quantised already; before that, it is not."""
    rows = list(ways.compare(checkpoints("flux"), FORMATS, size=0.003))
    print("\n" + ways.table(rows))
    kept = {way: [row.share for row in rows if row.way == way] for way in ways.WAYS}
    assert len(kept["nearest"]) == 5 and max(kept["nearest"]) < 0.2
    assert min(kept["before"]) > 0.8 and min(kept["beside"]) > 0.99


@pytest.fixture
def loaded(checkpoints, tmp_path):
    """(format, how) -> a Flux in it, by our loader or by ComfyUI's of our file."""

    def get(form, how):
        source, file = checkpoints("flux"), tmp_path / "small.safetensors"
        if how == "loader":
            return host.load(source, Settings(form), quiet)[0]
        quantize_file(source, file, format=form)
        return comfy.sd.load_diffusion_model(str(file))

    return get


@pytest.mark.parametrize(
    ("form", "how"), [*((form, "loader") for form in FORMATS), ("fp8_e4m3", "file")]
)
def test_load_adapter_goes_beside_the_weights_by_itself(
    loaded, model, tmp_path, monkeypatch, form, how
):
    listed = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", listed)
    write_adapter(tmp_path / "own.safetensors", ways.adapter(model("flux"), "lora", 0.3))

    def load(low, strength=1.0, mode="auto"):
        given = "own.safetensors", strength, 1.0, mode, "error"
        return LoadAdapter.execute(low, *given).args[::2]

    low = loaded(form, how)
    before = output(low, "flux")
    held = {path: ways.layer(low, path).weight for path in ways.LAYERS}
    assert all(isinstance(weight, QuantizedTensor) for weight in held.values())
    adapted, report = load(low)
    why = f"Mode: bypass, because 3 of its 3 layers are quantised ({FORMATS[form][0]})"
    assert why in report
    y = output(adapted, "flux")
    samples.differs(y, before)
    assert all(ways.layer(low, path).weight is weight for path, weight in held.items())
    assert torch.equal(output(load(low, mode="bypass")[0], "flux"), y)
    assert torch.equal(output(load(low, 0.0)[0], "flux"), before)
    assert torch.equal(output(low, "flux"), before)
    merged, report = load(low, mode="merge")
    assert "Mode: merge, as asked for" in report
    samples.differs(output(merged, "flux"), before)
    assert torch.equal(output(low, "flux"), before)
