"""Load Quantized Model and Quantize Model File, called and in a running ComfyUI."""

from __future__ import annotations

import struct
import time

import comfy.model_management as management
import comfy.ops
import comfy.sd
import folder_paths
import made
import numpy as np
import pytest
import samples
import tiny
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import write_adapter
from adapter_lab.core.merge.bake import bake
from adapter_lab.core.merge.menus import NUMBERS
from adapter_lab.core.quant import Settings
from adapter_lab.core.quant.formats import FORMATS
from adapter_lab.core.quant.report import Layer, Report
from adapter_lab.nodes.host import hardware, paths, quantised
from adapter_lab.nodes.quant_plot import kind_of, quant_plot
from adapter_lab.nodes.quantize import QuantizeFile, QuantLoader
from adapter_lab.tests.server import Server
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from conftest import COMFYUI
from safetensors.torch import load_file, save_file

LAYER = "double_blocks.0.img_attn.qkv"
FLUX = "flux.safetensors"


@pytest.fixture
def folder(checkpoints, tmp_path, monkeypatch):
    """Folders of models that ComfyUI lists, with a tiny Flux."""
    roots = {kind: tmp_path / "models" / kind for kind in ("diffusion_models", "checkpoints")}
    for kind, root in roots.items():
        root.mkdir(parents=True)
        table = ([str(root), str(paths.output(kind))], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    root = roots["diffusion_models"]
    (root / FLUX).write_bytes(checkpoints("flux").read_bytes())
    return root


def output(model):
    with torch.inference_mode():
        return samples.run(model, "flux")


def adapter():
    return made.adapter({LAYER: made.factors("lora", (384, 128), 1)})


def test_loader_gives_what_the_file_gives(folder):
    """Of each format, with all the other inputs in use, in ComfyUI's own loader and in ours."""
    options = {"keep_worst": 1, "max_error": 50.0, "full_precision": True, "adapter": adapter()}
    for form in NUMBERS:
        given = (FLUX, form, "double_blocks.0.txt_mlp.0\n")
        with torch.inference_mode():
            path, report, plot = QuantizeFile.execute(
                *given, f"tiny/{form}", strength=0.5, **options).result  # fmt: skip
            loaded, told = QuantLoader.execute(*given, 0.5, **options).result
            native = comfy.sd.load_diffusion_model(path)
            again, unchanged = QuantLoader.execute(path, "nvfp4", "", 1.0).result
        assert path == str(paths.output("diffusion_models", "tiny", f"{form}_00001_.safetensors"))
        assert torch.equal(output(loaded), output(native)), form
        assert torch.equal(output(again), output(native)), form
        assert report.splitlines()[0] == told.splitlines()[0]
        assert unchanged.startswith("quantised already: ") and "as it is" in unchanged
        assert FORMATS[form].native in unchanged
        assert plot.ndim == 4 and plot.shape[3] == 3 and 0 <= float(plot.min()) < float(plot.max())
        modules = dict(loaded.model.diffusion_model.named_modules())
        assert not isinstance(modules["double_blocks.0.txt_mlp.0"].weight, QuantizedTensor)
        assert isinstance(modules[LAYER].weight, QuantizedTensor)


def test_limits_and_architecture_are_passed_on(folder):
    given = (FLUX, "fp8_e4m3", "")
    assert ": 8 layers to fp8" in QuantLoader.execute(*given, 1.0, keep_worst=2).result[1]
    assert ": 10 layers to fp8" in QuantLoader.execute(*given, 1.0, max_error=4.0).result[1]
    wrong = {"budget leaves no layer": {"max_error": 1.0},
             "architecture that the file is of": {"architecture": "Wan"}}  # fmt: skip
    for match, change in wrong.items():
        for node, more in ((QuantLoader, 1.0), (QuantizeFile, "x")):
            with pytest.raises(AdapterLabError, match=match):
                node.execute(*given, more, **change)


def test_adapter_goes_in_before(folder):
    given = adapter()
    bake(folder / FLUX, folder / "baked.safetensors", [(given, 0.5)])
    with torch.inference_mode():
        ours = QuantLoader.execute(FLUX, "int8_row", "", 0.5, adapter=given).result[0]
        baked = QuantLoader.execute("baked.safetensors", "int8_row", "", 1.0).result[0]
        without = QuantLoader.execute(FLUX, "int8_row", "", 1.0).result[0]
    assert torch.equal(output(ours), output(baked))
    assert not torch.equal(output(ours), output(without))


def test_a_copy_on_its_way_is_cancelled(folder):
    with torch.inference_mode():
        model, _ = quantised.load(folder / FLUX, Settings("fp8_e4m3"), lambda *_: None)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        model.deepclone_multigpu()


def test_a_model_outlives_its_file_and_can_not_be_copied(folder):
    with torch.inference_mode():
        model, _ = quantised.load(folder / FLUX, Settings("fp8_e4m3"), lambda *_: None)
    before = output(model)
    (folder / FLUX).unlink()
    assert torch.equal(output(model), before)
    with pytest.raises(AdapterLabError, match=f"made anew: Cannot read '.*{FLUX}'"):
        model.deepclone_multigpu()


def test_checkpoint_stays_whole(folder):
    """The other parts are copied, and the file goes where checkpoints are."""
    weights = load_file(str(folder / FLUX))
    whole = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    other = torch.randn(64, 256)
    whole |= {"first_stage_model.x.weight": other, "text_encoders.t5xxl.y.weight": other.clone()}
    save_file(whole, str(folder.parent / "checkpoints" / "whole.safetensors"))
    path = QuantizeFile.execute("whole.safetensors", "int8_row", "", "all").result[0]
    assert path == str(paths.output("checkpoints", "all_00001_.safetensors"))
    written = load_file(path)
    assert written[f"model.diffusion_model.{LAYER}.weight"].dtype == torch.int8
    for name in ("first_stage_model.x.weight", "text_encoders.t5xxl.y.weight"):
        assert torch.equal(written[name], other)
    with torch.inference_mode():
        ours = QuantLoader.execute("whole.safetensors", "int8_row", "", 1.0).result[0]
        assert torch.equal(output(ours), output(comfy.sd.load_diffusion_model(path)))


def test_quantised_already(folder):
    """Loaded as it is; an adapter has to go beside it, and a file is not written."""
    weights = load_file(str(folder / FLUX))
    cast = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in weights.items()}
    save_file(cast, str(folder / "cast.safetensors"))
    matrices = sum(value.ndim == 2 for value in weights.values())
    with torch.inference_mode():
        model, report = QuantLoader.execute("cast.safetensors", "int8_row", "", 1.0).result
        native = comfy.sd.load_diffusion_model(str(folder / "cast.safetensors"))
    assert report.startswith(f"quantised already: {matrices} weights in F8_E4M3; loaded as it is")
    assert torch.equal(output(model), output(native))
    whole = {f"model.diffusion_model.{key}": value for key, value in cast.items()}
    encoder = torch.randn(64, 256).to(torch.float8_e4m3fn)
    save_file(whole | {"text_encoders.t5xxl.y.weight": encoder}, str(folder / "whole.safetensors"))
    with torch.inference_mode():
        model, told = QuantLoader.execute("whole.safetensors", "int8_row", "", 1.0).result
    assert told == report and torch.equal(output(model), output(native))
    with pytest.raises(AdapterLabError, match="adapter can't go into it.*Apply Adapter"):
        QuantLoader.execute("cast.safetensors", "int8_row", "", 1.0, adapter=adapter())
    with pytest.raises(AdapterLabError, match="quantised already.*errors of both"):
        QuantizeFile.execute("cast.safetensors", "int8_row", "", "twice")
    assert not list(paths.output().rglob("*.safetensors"))


@pytest.mark.parametrize(("content", "said"), [
    (b"GGUF" + bytes(100), "GGUF file.*GGUF loader"),
    (b"PK\x03\x04" + bytes(100), "zip archive or PyTorch.*Convert"),
    (struct.pack("<Q", 1000) + b"{", "header is longer than the file"),
])  # fmt: skip
def test_other_files_are_refused_by_name(folder, content, said):
    (folder / "bad.safetensors").write_bytes(content)
    assert QuantLoader.validate_inputs("bad.safetensors") is True
    for run in (lambda: QuantLoader.execute("bad.safetensors", "fp8_e4m3", "", 1.0),
                lambda: QuantizeFile.execute("bad.safetensors", "fp8_e4m3", "", "x")):  # fmt: skip
        with pytest.raises(AdapterLabError, match=said):
            run()
    assert "no model file" in QuantLoader.validate_inputs("gone.safetensors")


def test_lora_is_no_model(folder):
    write_adapter(folder / "lora.safetensors", adapter())
    with pytest.raises(AdapterLabError, match="lora.safetensors"):
        QuantLoader.execute("lora.safetensors", "fp8_e4m3", "", 1.0)


def test_model_that_comfyui_does_not_know(folder):
    generator = torch.Generator().manual_seed(0)
    save_file({f"blocks.{i}.proj.weight": torch.randn(256, 256, generator=generator)
               for i in range(4)}, str(folder / "strange.safetensors"))  # fmt: skip
    with pytest.raises(AdapterLabError, match="ComfyUI does not know the model"):
        QuantLoader.execute("strange.safetensors", "fp8_e4m3", "", 1.0)


def test_layers_that_comfyui_leaves_out_are_named(folder):
    """A block behind a gap, which ComfyUI's loaders say of no more than a line of the log."""
    weights, lost = load_file(str(folder / FLUX)), LAYER.replace(".0.", ".7.")
    save_file(weights | {f"{lost}.weight": weights[f"{LAYER}.weight"].clone()},
              str(folder / "gap.safetensors"))  # fmt: skip
    with pytest.raises(AdapterLabError, match=f"does not take 1 layer in.*{lost}.*'keep'"):
        QuantLoader.execute("gap.safetensors", "fp8_e4m3", "", 1.0)
    with torch.inference_mode():
        QuantLoader.execute("gap.safetensors", "fp8_e4m3", lost, 1.0)


@pytest.mark.parametrize("rows", [slice(300), 0])
def test_weights_of_other_shapes_are_named(folder, rows):
    """Load Diffusion Model refuses them; ComfyUI's quantised layers fail when they run."""
    weights = load_file(str(folder / FLUX))
    weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"][rows].clone()
    save_file(weights, str(folder / FLUX))
    with pytest.raises(AdapterLabError, match=f"does not fit.*{LAYER}' of .*expected 384 x 128"):
        QuantLoader.execute(FLUX, "fp8_e4m3", "", 1.0)


def test_layers_that_the_file_lacks_are_told(folder):
    weights = load_file(str(folder / FLUX))
    del weights["single_blocks.0.linear2.weight"]
    save_file(weights, str(folder / FLUX))
    report = QuantLoader.execute(FLUX, "fp8_e4m3", "", 1.0).result[1]
    assert "1 layer of the model not in the file, such as 'single_blocks.0.linear2'" in report


def test_says_what_the_device_does(monkeypatch):
    """Where ComfyUI emulates a format, so does the line."""
    for name, form in FORMATS.items():
        where, here = hardware.told(form, full_precision=False)
        assert where == "on this machine (cpu)"
        ops = comfy.ops.pick_operations(None, torch.float32, torch.device("cpu"),
                                        model_config=_Config())  # fmt: skip
        assert ("dequantised" in here) == (form.native in ops._disabled), name
    assert "no other way" in hardware.told(FORMATS["int8_row"], full_precision=True)[1]
    # Found out when it is asked: a server has one device, a test may pretend.
    monkeypatch.setitem(hardware._MULTIPLIES, "nvfp4", lambda device: True)
    assert "multiplied in nvfp4" in hardware.told(FORMATS["nvfp4"], full_precision=False)[1]
    assert "asks" in hardware.told(FORMATS["nvfp4"], full_precision=True)[1]
    monkeypatch.setitem(hardware._MULTIPLIES, "float8_e4m3fn", lambda device: True)
    for name, form in FORMATS.items():
        given = QuantizedTensor.from_float(torch.full((32, 256), 900.0), _layout(form))
        cut = float(given.dequantize().max()) < 800
        assert ("cut at 448" in hardware.told(form, full_precision=False)[1]) == cut, name


def _layout(form):
    return QUANT_ALGOS[form.native]["comfy_tensor_layout"]


class _Config:
    quant_config = {"mixed_ops": True}


def test_full_precision_acts_on_no_int8(folder):
    """What the line and the tooltip say: the layers are marked, and multiplied in int8 anyway."""
    with torch.inference_mode():
        models = [QuantLoader.execute(FLUX, "int8_row", "", 1.0, full_precision=full).result[0]
                  for full in (False, True)]  # fmt: skip
    marked = [dict(m.model.diffusion_model.named_modules())[LAYER]._full_precision_mm
              for m in models]  # fmt: skip
    assert marked == [False, True]
    assert torch.equal(output(models[0]), output(models[1]))


@pytest.mark.parametrize(("path", "kind"), [
    ("double_blocks.0.img_attn.qkv", "q, k, v"), ("blocks.1.self_attn.q", "q, k, v"),
    ("transformer_blocks.3.attn.to_k", "q, k, v"), ("double_blocks.0.img_attn.proj",
    "attention out"), ("blocks.1.cross_attn.o", "attention out"), ("blocks.1.ffn.0", "MLP"),
    ("single_blocks.7.linear1", "attention and MLP in one"), ("layers.2.feed_forward.w1", "MLP"),
    ("txt_in", "other"),
])  # fmt: skip
def test_kinds_of_layers(path, kind):
    assert kind_of(path) == kind


@pytest.mark.parametrize("count", [0, 1, 5, 60, 800])
def test_bars_stand_for_errors(count):
    """Their heights, from the left: as many pixels as the error has of the largest tick."""
    report = Report("fp8", "Flux", before=200, after=100)
    for i in range(count):
        error = 0.04 * (1 - i / count)
        # Fields beside those of the quality are sizes.
        sizes = dict.fromkeys(set(Layer.__dataclass_fields__) - set(_QUALITY), 10)
        report.layers[f"b.{i}.attn.proj"] = Layer(error, 0.0, 0.0, **sizes)
    picture = np.asarray(quant_plot(report)[0])
    colour = np.array([0xA3, 0xBE, 0x8C]) / 255
    chart = (abs(picture[132:373, 64:936] - colour) < 0.002).all(2)
    if not count:
        assert not chart.any()
        return
    tall = chart.sum(0)
    step = min(872 / count, 96)
    for i in {0, count // 2, count - 1}:
        wanted = 240 * 0.04 * (1 - i / count) / 0.04
        assert tall[int(i * step + step / 3)] == pytest.approx(wanted, abs=3)
    assert tall[int(count * step) + 2 :].sum() == 0


_QUALITY = ("error", "saturated", "subnormal")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    tiny.write("flux", base / "models" / "diffusion_models" / FLUX)
    large = base / "models" / "diffusion_models" / "large.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = load_file(str(large.with_name(FLUX)))
    for i in range(60):
        noise = torch.randn(1024, 1024, generator=generator)
        weights[f"single_blocks.{i}.linear1.weight"] = noise
    save_file(weights, str(large))
    with Server(COMFYUI, base=base) as running:
        yield running


def prompt(*nodes):
    return {str(i): {"class_type": n, "inputs": values} for i, (n, values) in enumerate(nodes)}


def loader(**change):
    given = {"unet_name": FLUX, "format": "fp8_e4m3", "keep": "", "strength": 1.0} | change
    return ("AdapterLabQuantLoader", given)


def written(**change):
    given = {"unet_name": FLUX, "format": "nvfp4", "keep": "", "filename_prefix": "a/b"} | change
    return ("AdapterLabQuantize", given)


def test_same_inputs_are_not_quantised_twice(server):
    show = ("PreviewAny", {"source": ["0", 1]})
    first = server.run(prompt(loader(), show))
    assert first.ok, first.errors
    shown = first.outputs["0"]["adapter_lab"][0]
    assert shown["layers"][LAYER]["error"] == pytest.approx(0.0265, abs=0.003)
    assert any(name == "on this machine (cpu)" for name, _ in shown["facts"])
    assert len(first.texts["1"].splitlines()) > 5
    assert _executed(server.run(prompt(loader(), show))) == set()
    assert _executed(server.run(prompt(loader(max_error=50.0), show))) == {"0", "1"}
    path = server.base / "models" / "diffusion_models" / FLUX
    path.write_bytes(path.read_bytes())
    time.sleep(0.02)
    assert "0" in _executed(server.run(prompt(loader(max_error=50.0), show)))


def _executed(result):
    assert result.ok, result.errors
    return {data["node"] for kind, data in result.messages
            if kind == "executing" and data.get("node") is not None}  # fmt: skip


def test_file_into_comfyuis_loader_in_one_graph(server):
    given = prompt(written(), ("AdapterLabQuantLoader", {**loader()[1], "unet_name": ["0", 0]}),
                   ("PreviewAny", {"source": ["1", 0]}))  # fmt: skip
    result = server.run(given)
    assert result.ok, result.errors
    assert result.outputs["1"]["adapter_lab"][0]["text"].startswith("quantised already: ")
    assert _executed(server.run(given)) == set()
    name = "a/b_00001_.safetensors"
    assert (server.base / "output" / "diffusion_models" / name).is_file()
    native = ("UNETLoader", {"unet_name": name, "weight_dtype": "default"})
    assert server.run(prompt(native, ("PreviewAny", {"source": ["0", 0]}))).ok


def test_cancelled_in_the_middle_leaves_nothing(server):
    """While a file is written, and while a model is loaded."""
    before, said = sorted((server.base / "output").rglob("*")), []

    def stop(kind, data):
        if kind == "progress_text" and "quantising, " in data["text"] and not said:
            said.append(data["text"])
            server.interrupt()

    for node in (written(unet_name="large.safetensors", filename_prefix="c/d"),
                 loader(unet_name="large.safetensors")):  # fmt: skip
        result = server.run(prompt(node, ("PreviewAny", {"source": ["0", 0]})), on_message=stop)
        assert result.interrupted and said, result.errors
        said.clear()
    files = [p for p in sorted((server.base / "output").rglob("*")) if p.is_file()]
    assert files == [p for p in before if p.is_file()]
    assert server.run(prompt(loader(), ("PreviewAny", {"source": ["0", 0]}))).ok


def test_bad_regex_and_gone_files_are_one_sentence(server):
    bad = server.run(prompt(loader(keep="("), ("PreviewAny", {"source": ["0", 0]})))
    assert len(bad.errors) == 1 and "\n" not in bad.errors[0]["exception_message"].strip()
    assert "'('" in bad.errors[0]["exception_message"]
