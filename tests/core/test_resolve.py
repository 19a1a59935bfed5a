"""What matches, what does not and why, and what the report says about it."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter
from adapter_lab.core.keys import ModelIndex, resolve

H = 16
FLUX = {
    "img_in": (H, 4), "txt_in": (H, 6), "vector_in.in_layer": (H, 5), "final_layer.linear": (4, H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
    **{f"double_blocks.{i}.{m}_{n}": s for i in range(2) for m in ("img", "txt") for n, s in {
        "attn.qkv": (3 * H, H), "attn.proj": (H, H), "mlp.0": (4 * H, H), "mlp.2": (H, 4 * H),
        "mod.lin": (6 * H, H)}.items()},
    **{f"single_blocks.{i}.{n}": s for i in range(2) for n, s in {
        "linear1": (7 * H, H), "linear2": (H, 5 * H), "modulation.lin": (3 * H, H)}.items()},
}  # fmt: skip
MODEL = {f"diffusion_model.{path}.weight": shape for path, shape in FLUX.items()}
BLOCKS = [path for path in FLUX if "blocks" in path]
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def lora(stem: str, shape: tuple[int, ...], rank: int = 2) -> dict[str, torch.Tensor]:
    up, down = torch.ones(shape[0], rank), torch.ones(rank, *shape[1:])
    alpha = torch.tensor(float(rank))
    return {
        f"{stem}.lora_up.weight": up,
        f"{stem}.lora_down.weight": down,
        f"{stem}.alpha": alpha,
    }


def kohya(paths: list[str], rank: int = 2, **extra: object) -> Adapter:
    file = Adapter(name="x.safetensors", **extra)
    for path in paths:
        file.update(lora("lora_unet_" + path.replace(".", "_"), FLUX[path], rank))
    return file


def test_a_file_that_fits():
    entries, report = resolve(kohya(BLOCKS), MODEL)
    assert report.to_text() == "26 of 26 modules matched (LoRA rank 2, kohya format, FLUX.1)"
    assert (report.format, report.runner_up) == ("kohya", None)
    assert report.architecture == report.file_architecture == "flux"
    assert report.algorithms == {"lora": 26}
    assert not report.unmatched and not report.warnings
    match = report.matched[QKV]
    assert (match.key, match.slice) == ("diffusion_model.double_blocks.0.img_attn.qkv.weight", None)
    assert (match.algorithm, match.rank, match.scale) == ("lora", 2, 1.0)
    assert [e.path for e in entries] == BLOCKS


def test_the_index_may_be_shapes_tensors_or_made_before():
    file = kohya(["img_in"])
    tensors = {name: torch.zeros(shape) for name, shape in MODEL.items()}
    bare = {path + ".weight": shape for path, shape in FLUX.items()}
    for index in (MODEL, tensors, ModelIndex(MODEL), bare):
        entries, _ = resolve(file, index)
        assert [e.path for e in entries] == ["img_in"]
        assert entries[0].key in (index if isinstance(index, dict) else MODEL)


def test_report_is_json_and_tells_the_verdict():
    _, report = resolve(kohya(BLOCKS) | lora("lora_unet_what", (4, 4)), MODEL)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["verdict"] == report.to_text().splitlines()[0]
    assert told["verdict"].startswith("26 of 27")
    assert told["matched"][QKV]["rank"] == 2
    assert set(told["unmatched"]) == {"lora_unet_what"}
    assert told["algorithms"] == {"lora": 27}


def test_headline_and_rows_for_a_table():
    _, report = resolve(kohya(BLOCKS), MODEL)
    assert report.headline == "FLUX.1 LoRA, kohya: 26 of 26 modules"
    report.strengths[QKV] = 0.5
    told = json.loads(json.dumps(report.to_dict()))
    assert told["headline"] == report.headline
    assert told["matched"][QKV] == {
        "key": f"diffusion_model.{BLOCKS[0]}.weight", "slice": None, "algorithm": "lora",
        "rank": 2, "scale": 1.0, "traits": [], "strength": 0.5,
    }  # fmt: skip
    assert "Block weights: 1 module at 0.5, the rest at 1" in report.to_text()


def test_ranks_and_algorithms_in_the_verdict():
    file = kohya(["img_in"], rank=2) | kohya(["txt_in"], rank=4)
    file["lora_unet_double_blocks_0_img_attn_proj.lokr_w1"] = torch.ones(4, 4)
    file["lora_unet_double_blocks_0_img_attn_proj.lokr_w2"] = torch.ones(4, 4)
    _, report = resolve(file, MODEL)
    assert "(LoRA rank 2 to 4 + LoKr rank 4, kohya" in report.verdict


def test_diffusers_names_land_on_their_rows():
    names = {
        "transformer_blocks.1.attn.to_q": ("double_blocks.1.img_attn.qkv", (0, 0, H)),
        "transformer_blocks.1.attn.to_v": ("double_blocks.1.img_attn.qkv", (0, 2 * H, H)),
        "transformer_blocks.1.attn.add_k_proj": ("double_blocks.1.txt_attn.qkv", (0, H, H)),
        "single_transformer_blocks.0.attn.to_k": ("single_blocks.0.linear1", (0, H, H)),
        "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", (0, 3 * H, 4 * H)),
        "single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", None),
    }
    for prefix, separator in (("transformer.", "."), ("lycoris_", "_"), ("base_model.model.", ".")):
        file: dict[str, torch.Tensor] = {}
        for name, (path, rows) in names.items():
            shape = (rows[2], FLUX[path][1]) if rows else FLUX[path]
            file |= lora(prefix + name.replace(".", separator), shape)
        entries, report = resolve(file, MODEL)
        assert [(e.path, e.slice) for e in entries] == list(names.values())
        assert not report.warnings


def test_a_weight_alone_is_enough_for_its_rows():
    """A state dict that holds one weight does not say its architecture, but the caller may."""
    index = {"double_blocks.0.img_attn.qkv.weight": (3 * H, H)}
    file = lora("transformer.transformer_blocks.0.attn.to_k", (H, H))
    assert resolve(file, index)[1].matched == {}
    entries, _ = resolve(file, index, "flux")
    assert entries[0].slice == (0, H, H)


def test_rows_that_a_weight_does_not_have_are_refused():
    index = {"single_blocks.0.linear1.weight": (2 * H, H), "img_in.weight": (H, 4)}
    file = lora("transformer.single_transformer_blocks.0.attn.to_v", (H, H))
    _, report = resolve(file, index, "flux")
    assert f"rows {2 * H} to {3 * H} are not in" in next(iter(report.unmatched.values()))


def test_rows_in_another_order_are_put_right():
    """diffusers has scale before shift in the last layer, Black Forest Labs shift before scale."""
    file = lora("transformer.norm_out.linear", (2 * H, H))
    file["transformer.norm_out.linear.lora_up.weight"][H:] = 2
    (entry,), _ = resolve(file, MODEL)
    delta = entry.algorithm.delta(torch.zeros(2 * H, H))
    assert (delta[:H] == 4).all() and (delta[H:] == 2).all()


def test_a_file_for_another_architecture_is_named():
    wan = lora("lora_unet_blocks_0_self_attn_q", (H, H)) | lora("lora_unet_head_head", (4, H))
    entries, report = resolve(Adapter(wan, name="w.safetensors"), MODEL)
    assert not entries
    assert (report.architecture, report.file_architecture) == ("flux", "wan")
    assert report.format == "kohya"
    assert report.verdict == (
        "0 of 2 modules matched (LoRA, kohya format, for Wan, the model is FLUX.1)"
    )
    assert str(report.error()) == (
        "Nothing in 'w.safetensors' fits this model: found 2 modules for Wan, kohya format, "
        "expected modules of FLUX.1. Load it with Wan"
    )


def test_a_file_for_another_architecture_that_fits_here_and_there_is_warned_of():
    wan = {}
    for i in range(3):
        wan |= lora(f"lora_unet_blocks_{i}_self_attn_q", (H, H))
    _, report = resolve(wan | kohya(["img_in"]), MODEL)
    assert report.verdict.startswith("1 of 4")
    assert report.warnings == ["The file is for Wan, the model is FLUX.1"]


def test_an_unknown_model_works_by_its_own_names():
    index = {"net.0.weight": (8, 4), "net.2.weight": (2, 8)}
    for stem in ("net.0", "base_model.model.net.0", "lora_unet_net_0", "diffusion_model.net.0"):
        entries, report = resolve(lora(stem, (8, 4)), index)
        assert [e.key for e in entries] == ["net.0.weight"]
        assert report.architecture is None
        assert report.verdict.startswith("1 of 1 modules matched (LoRA rank 2")


def test_the_nearest_name_is_suggested():
    file = kohya(["img_in"])
    file |= lora("lora_unet_double_blocks_1_img_attn_qvk", (3 * H, H))
    file |= lora("lora_unet_single_blocks_0_linear9", (7 * H, H))
    file |= lora("lora_unet_zzz", (7, H))
    _, report = resolve(file, MODEL)
    unmatched = report.unmatched
    assert unmatched["lora_unet_double_blocks_1_img_attn_qvk"].endswith(
        "the nearest is double_blocks_1_img_attn_qkv"
    )
    assert "single_blocks_0_linear" in unmatched["lora_unet_single_blocks_0_linear9"]
    assert unmatched["lora_unet_zzz"] == "no module of this name"
    _, report = resolve(lora("transformer.transformer_blocks.1.attn.to_quu", (H, H)), MODEL)
    assert report.unmatched["transformer.transformer_blocks.1.attn.to_quu"].endswith(
        "the nearest is transformer_blocks.1.attn.to_q"
    )


def test_a_shape_that_does_not_fit_is_told_with_both_shapes():
    file = kohya(["img_in"]) | lora(QKV, (3 * H, H + 1))
    entries, report = resolve(file, MODEL)
    assert [e.path for e in entries] == ["img_in"]
    assert report.unmatched[QKV].startswith("does not fit double_blocks.0.img_attn.qkv")
    assert str((3 * H, H + 1)) in report.unmatched[QKV]
    assert str((3 * H, H)) in report.unmatched[QKV]


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        ("what.is.this", "what.is.this is not supported"),
        ("lora_upp.weight", "lora_upp.weight is not supported; the nearest known tensor is "
         "lora_up.weight"),
        ("hada_w1_a", "it mixes LoRA and LoHa: lora_up.weight, lora_down.weight, alpha, hada_w1_a"),
        ("diff", "it mixes LoRA and Full: lora_up.weight, lora_down.weight, alpha, diff"),
    ],
)  # fmt: skip
def test_a_module_is_not_applied_by_halves(suffix, reason):
    """And the rest of the file is."""
    file = kohya(["img_in"]) | lora(QKV, (3 * H, H)) | {f"{QKV}.{suffix}": torch.ones(3 * H, 2)}
    entries, report = resolve(file, MODEL)
    assert [e.path for e in entries] == ["img_in"]
    assert report.unmatched == {QKV: reason}


@pytest.mark.parametrize("suffix", ["dora_scale", "reshape_weight", "scalar", "alpha"])
def test_a_module_without_factors_is_not_applied(suffix):
    file = kohya(["img_in"]) | {f"{QKV}.{suffix}": torch.ones(3 * H)}
    entries, report = resolve(file, MODEL)
    assert [e.path for e in entries] == ["img_in"]
    assert report.unmatched == {QKV: f"it has no factors, only {suffix}"}


def test_a_bias_without_a_weight_or_with_one():
    biases = {"diffusion_model.img_in.bias": (H,)}
    file = {"lora_unet_img_in.diff_b": torch.ones(H), "lora_unet_txt_in.diff_b": torch.ones(H)}
    entries, report = resolve(file, MODEL | biases)
    assert [e.key for e in entries] == ["diffusion_model.img_in.bias"]
    assert report.unmatched["lora_unet_txt_in"] == "does not fit txt_in: it has no bias"
    both = kohya(["img_in"]) | {"lora_unet_img_in.diff_b": torch.ones(H)}
    entries, report = resolve(both, MODEL | biases)
    assert [e.key for e in entries] == [f"diffusion_model.img_in.{x}" for x in ("weight", "bias")]
    assert "LoRA rank 2 with biases" in report.verdict
    _, report = resolve(both, MODEL)
    assert report.matched and "biases are left out" in report.warnings[0]


def test_embeddings_in_the_file_are_left_out():
    file = kohya(["img_in"]) | {"bundle_emb.cat.string_to_param.*": torch.ones(2, 4)}
    file |= {f"bundle_emb.dog.clip_{x}": torch.ones(2, 4) for x in "lg"}
    _, report = resolve(file, MODEL)
    assert not report.unmatched and report.total == 1
    assert set(report.ignored) == {"bundle_emb.cat", "bundle_emb.dog"}
    assert "Left out:" in report.to_text()


def test_control_adapters_of_black_forest_labs():
    """They widen the first layer, set norms, and have bare names and biases."""
    norm = "single_blocks.0.norm.key_norm"
    index = MODEL | {f"diffusion_model.{norm}.weight": (4,), "diffusion_model.img_in.bias": (H,)}
    file = {f"{norm}.scale": torch.full((4,), 7.0), "img_in.lora_A.weight": torch.ones(2, 8),
            "img_in.lora_B.weight": torch.ones(H, 2),
            "img_in.lora_B.bias": torch.ones(H)}  # fmt: skip
    entries, report = resolve(file, index)
    assert not report.unmatched
    by_key = {entry.key.removeprefix("diffusion_model."): entry.algorithm for entry in entries}
    assert by_key["img_in.weight"].merge(torch.zeros(H, 4)).shape == (H, 8)
    assert (by_key[f"{norm}.weight"].merge(torch.ones(4)) == 7).all()
    assert (by_key["img_in.bias"].delta(torch.zeros(H)) == 1).all()


def test_xlabs_names():
    names = {"double_blocks.1.processor.qkv_lora1": ("double_blocks.1.img_attn.qkv", None),
             "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", None),
             "single_blocks.0.processor.qkv_lora": ("single_blocks.0.linear1", (0, 0, 3 * H)),
             "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", None)}  # fmt: skip
    file = {}
    for name, (path, rows) in names.items():
        shape = (rows[2], H) if rows else FLUX[path]
        file[f"{name}.up.weight"], file[f"{name}.down.weight"] = (
            torch.ones(shape[0], 2), torch.ones(2, shape[1]))  # fmt: skip
    entries, report = resolve(file, MODEL)
    assert [(e.path, e.slice) for e in entries] == list(names.values())
    assert report.format == "bare"


def test_a_broken_module_is_an_error_with_stem_and_file():
    file = kohya(["img_in"])
    del file["lora_unet_img_in.lora_down.weight"]
    with pytest.raises(AdapterLabError, match="'x.safetensors', module 'lora_unet_img_in'"):
        resolve(file, MODEL)


def test_mixed_formats_are_matched_with_a_warning():
    file = kohya(BLOCKS) | lora("transformer.context_embedder", FLUX["txt_in"])
    entries, report = resolve(file, MODEL)
    assert len(entries) == 27
    assert (report.format, report.runner_up) == ("kohya", ("diffusers", 1))
    assert (
        "diffusers" in report.warnings[0] and "transformer.context_embedder" in report.warnings[0]
    )


def test_two_modules_on_the_same_rows_are_both_applied_with_a_warning():
    file = lora(QKV, (3 * H, H)) | lora("transformer.transformer_blocks.0.attn.to_q", (H, H))
    entries, report = resolve(file, MODEL)
    assert [e.slice for e in entries] == [None, (0, 0, H)]
    assert any("more than one module" in text and QKV in text for text in report.warnings)
    twice = lora(QKV, (3 * H, H)) | lora(f"module.{QKV}", (3 * H, H))
    assert any("the same module twice" in text for text in resolve(twice, MODEL)[1].warnings)
    apart = lora("transformer.transformer_blocks.0.attn.to_k", (H, H))
    apart |= lora("transformer.transformer_blocks.0.attn.to_q", (H, H))
    assert not resolve(apart, MODEL)[1].warnings


def test_a_name_with_two_meanings_goes_where_it_fits_with_a_warning():
    index = {"a.b_c.weight": (4, 4), "a.b.c.weight": (6, 6)}
    for size, path in ((6, "a.b.c"), (4, "a.b_c")):
        entries, report = resolve(lora("lora_unet_a_b_c", (size, size)), index)
        assert [e.path for e in entries] == [path]
        assert "ambiguous" in report.warnings[0] and path in report.warnings[0]


def test_wrappers_are_seen_through():
    index = {f"_orig_mod.{name}": shape for name, shape in MODEL.items()}
    stems = ["module.diffusion_model.img_in", "model.diffusion_model.img_in",
             "diffusion_model._orig_mod.img_in", "lora_unet__orig_mod_img_in",
             "base_model.model.module.img_in", "lora_unet__img_in",
             "transformer.base_model.model.x_embedder"]  # fmt: skip
    for stem in stems:
        entries, _ = resolve(lora(stem, FLUX["img_in"]), index)
        assert [e.key for e in entries] == ["_orig_mod.diffusion_model.img_in.weight"], stem


def test_targets_go_before_names():
    index = MODEL | {"other.weight": (H, 3 * H)}
    file = lora(QKV, (H, H)) | lora("lora_unet_img_in", FLUX["img_in"])
    entries, report = resolve(file, index, targets={QKV: ("other", 1, H, H)})
    assert [(e.key, e.slice) for e in entries] == [
        ("other.weight", (1, H, H)),
        ("diffusion_model.img_in.weight", None),
    ]
    assert not report.unmatched
    whole = {QKV: "diffusion_model.double_blocks.0.img_attn.proj"}
    assert resolve(file, index, targets=whole)[0][0].path == "double_blocks.0.img_attn.proj"
    for bad in ({"nothing": "other"}, {QKV: "nothing"}, {QKV: ("other", 1, 2 * H, 2 * H)}):
        with pytest.raises(AdapterLabError, match="targets"):
            resolve(file, index, targets=bad)


def test_long_lists_are_grouped():
    file = kohya(BLOCKS)
    for i in range(40):
        file |= lora(f"lora_unet_vace_blocks_{i}_q", (H, H))
    _, report = resolve(file, MODEL)
    lines = report.to_text().splitlines()
    assert lines[0].startswith("26 of 66")
    assert len(lines) == 3
    assert lines[2].strip().startswith("40 x lora_unet_vace_blocks_*_q: no module of this name")


def test_nonsense_costs_no_minutes():
    """A search for the nearest name is slow: only some of many unknown names get one."""
    file = {f"{QKV}{chr(97 + i)}.lora_up.weight": torch.ones(1, 1) for i in range(26)}
    file |= {key.replace("up", "down"): tensor for key, tensor in file.items()}
    _, report = resolve(file, MODEL)
    assert len(report.unmatched) == 26
    assert 0 < sum("nearest" in reason for reason in report.unmatched.values()) < 26


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shape", ["foo.{0}.bar{0}.thing{0}.weird{0}", "{0}.lora_upp.weight"])
def test_a_hundred_thousand_keys_cost_no_minutes(shape):
    _, report = resolve({shape.format(n): torch.ones(1) for n in range(100_000)}, MODEL)
    assert len(report.unmatched) == 100_000


def test_a_checkpoint_is_called_one():
    path = "double_blocks.0.img_attn.qkv"
    _, report = resolve({f"{path}.weight": torch.ones(2, 2)}, MODEL)
    assert "of a model and not of an adapter" in report.unmatched[path]


def test_empty_file_and_empty_model():
    entries, report = resolve({}, MODEL)
    assert (entries, report.total) == ([], 0)
    assert "FLUX.1" in str(report.error())
    _, report = resolve(kohya(BLOCKS), {})
    assert report.file_architecture == "flux"
    assert report.architecture is None
