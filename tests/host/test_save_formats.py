"""Save Adapter in every format: read back by this pack and, where it can, by ComfyUI itself."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.utils
import made
import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.save import KEY_FORMATS, SaveAdapter

PATHS = ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear1"]
# Formats that ComfyUI's own loader reads of FLUX, OneTrainer's and LyCORIS' among them.
NATIVE = ["comfyui", "kohya", "diffusers", "lycoris", "musubi", "aitoolkit", "onetrainer"]


def adapter(model, algorithm: str) -> Adapter:
    shapes = host.shapes(model.model)
    chosen = {p: made.factors(algorithm, shapes[f"diffusion_model.{p}.weight"]) for p in PATHS}
    return made.adapter(chosen)


def save(file: Adapter, form: str, **options) -> tuple[Path, dict]:
    values = {"dtype": "keep", "architecture": "FLUX.1", **options}
    out = SaveAdapter.execute(file, "x", form, **values)
    return Path(out.args[0]), out.ui["adapter_lab"][0]


def weights(patched, model) -> dict[str, torch.Tensor]:
    """The changed weights as ComfyUI computes them."""
    return {
        key: comfy.lora.calculate_weight(
            patched.patches[key], comfy.utils.get_attr(model.model, key).float().clone(), key
        )
        for key in patched.patches
    }


@pytest.mark.parametrize("algorithm", ["lora", "loha"])
@pytest.mark.parametrize("form", KEY_FORMATS)
def test_every_format(load, form: str, algorithm: str) -> None:
    with torch.inference_mode():
        model = load("flux")
        source = adapter(model, algorithm)
        expected = host.apply(model, None, source, 1.0, 1.0, "error", mode="merge").model
        path, panel = save(source, form)
        count = len(comfy.utils.load_torch_file(str(path), safe_load=True))
        assert panel["text"].startswith(f"saved {count} tensors to loras/x_00001_")
        assert not panel["rows"]
        assert (path.parent / "adapter_config.json").exists() == (form == "peft")
        ours = host.apply(model, None, read_adapter(path), 1.0, 1.0, "error", mode="merge").model
        wanted = weights(expected, model)
        results = [weights(ours, model)]
        if form in NATIVE:
            read = comfy.utils.load_torch_file(str(path), safe_load=True)
            native, _ = comfy.sd.load_lora_for_models(model, None, read, 1.0, 1.0)
            results.append(weights(native, model))
        for result in results:
            assert set(result) == set(wanted) and len(wanted) == 3
            for key, tensor in wanted.items():
                torch.testing.assert_close(result[key], tensor, rtol=1e-4, atol=1e-5)


def test_parts_that_comfyui_reads_are_kept_and_exact(load) -> None:
    """LoKr on q, k and v can't be joined; under diffusers' names ComfyUI takes each."""
    with torch.inference_mode():
        model = load("flux")
        parts = {f"transformer_blocks.0.attn.to_{x}": made.factors("lokr", (128, 128), n)
                 for n, x in enumerate("qkv")}  # fmt: skip
        source = Adapter(
            {
                f"transformer.{path}.{suffix}": t
                for path, factors in parts.items()
                for suffix, t in factors.items()
            }
        )
        path, panel = save(source, "comfyui")
        assert "ComfyUI reads both" in str(panel["facts"]) and not panel["warnings"]
        read = comfy.utils.load_torch_file(str(path), safe_load=True)
        native, _ = comfy.sd.load_lora_for_models(model, None, read, 1.0, 1.0)
        ours = host.apply(model, None, source, 1.0, 1.0, "error", mode="merge").model
        (key,) = native.patches
        assert key.endswith("double_blocks.0.img_attn.qkv.weight")
        torch.testing.assert_close(weights(native, model)[key], weights(ours, model)[key])


def test_what_is_made_anew_is_shown_with_its_error(load) -> None:
    with torch.inference_mode():
        model = load("flux")
        source = adapter(model, "lokr")
    path, panel = save(source, "lycoris", rank=2)
    errors = [row["error"] for row in panel["rows"].values() if row["made"] == "LoRA"]
    assert errors and max(errors) > 0.01 and "made anew by SVD" in str(panel["facts"])
    kept, panel = save(source, "lycoris", inexact="keep")
    assert kept != path and len(panel["warnings"]) == 1
    assert {row["note"] for row in panel["rows"].values()} == {
        "keeps its name, which Adapter Lab reads"
    }
    with pytest.raises(AdapterLabError, match="no exact form"):
        save(source, "lycoris", inexact="error")
    assert len(list(path.parent.iterdir())) == 2


def test_peft_gets_a_folder_each_time(load) -> None:
    with torch.inference_mode():
        source = adapter(load("flux"), "lora")
    first, second = (save(source, "peft")[0] for _ in range(2))
    assert first.name == second.name == "adapter_model.safetensors"
    assert [p.parent.name for p in (first, second)] == ["x_00001_", "x_00002_"]
    assert read_adapter(first).config["r"] == made.RANK


def test_nothing_and_bad_metadata_are_refused() -> None:
    with pytest.raises(AdapterLabError, match="The adapter is empty"):
        save(Adapter(), "kohya")
    with pytest.raises(AdapterLabError, match="The metadata is not JSON"):
        save(Adapter({"diffusion_model.a.diff": torch.ones(2)}), "comfyui", metadata="{")
