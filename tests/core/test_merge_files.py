"""Files to merge: their names, metadata and settings, and those that do not go together."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_lab.core.bake import merge_into
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.lazy import AdapterFile
from adapter_lab.core.merge.combine import Merge
from adapter_lab.core.merge.ranks import RankRule
from adapter_samples import samples
from merged import DOWN, STEM, UP, assert_sum, by_hand, close, file, lora, model, rng


def test_unet_and_text_encoder_files_mix():
    unet = file(lora(seed=1), "lora_unet_down_blocks_0_attentions_0_proj_in")
    text = file(lora(seed=2), "lora_te_text_model_encoder_layers_0_mlp_fc1")
    merged = Merge([unet, text], [0.5, 2.0]).collect()
    assert set(merged) - {k for k in merged if k.endswith("alpha")} == {*unet, *text}
    for stem, ratio, given in ((next(iter(unet)), 0.5, unet), (next(iter(text)), 2.0, text)):
        prefix = stem.removesuffix(UP)
        assert close(by_hand(merged, prefix), ratio * by_hand(given, prefix), 1e-6)


FLUX = {
    "diffusion_model.double_blocks.0.img_attn.qkv.weight": (384, 128),
    "diffusion_model.double_blocks.0.img_attn.proj.weight": (128, 128),
    "diffusion_model.single_blocks.0.linear1.weight": (384 + 512, 128),
}


@pytest.mark.parametrize("fused_first", [True, False])
def test_spellings_are_paired_by_what_they_act_on(fused_first):
    """kohya's fused names and diffusers' split ones."""
    weights = {key: torch.randn(shape, generator=rng(1)) for key, shape in FLUX.items()}
    fused = Adapter({
        **file(lora(384, 128, 4, 2, seed=1), "lora_unet_double_blocks_0_img_attn_qkv"),
        **file(lora(128, 128, 4, 2, seed=2), "lora_unet_double_blocks_0_img_attn_proj"),
    })  # fmt: skip
    block, single = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
    split = Adapter()
    for seed, name in enumerate((f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v",
                                 f"{block}.attn.to_out.0", f"{single}.attn.to_q",
                                 f"{single}.attn.to_k", f"{single}.attn.to_v")):  # fmt: skip
        made = lora(128, 128, 3, seed=5 + seed)
        split |= {f"{name}.lora_B.weight": made[UP], f"{name}.lora_A.weight": made[DOWN]}
    given = [(fused, 0.5), (split, -2.0)][:: 1 if fused_first else -1]
    merged = Merge([a for a, _ in given], [r for _, r in given], architecture="flux").collect()
    found, report = merge_into(weights, merged, architecture="flux")
    assert not report.unmatched and not any("more than one" in w for w in report.warnings)
    for key, weight in weights.items():
        wanted = torch.zeros_like(weight)
        for adapter, ratio in given:
            part, _ = merge_into(weights, adapter, ratio, architecture="flux")
            wanted += part[key] - weight if key in part else 0
        assert close(found[key] - weight, wanted)
    assert all(key.startswith("lora_unet_") == fused_first for key in merged)


def test_one_format_with_names_of_two_families():
    """The rows of q beside all of qkv: exact, and one module where they can be joined."""
    whole, part = (
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_transformer_blocks_0_attn_to_",
    )
    fused = file(lora(384, 128, 4, 2, seed=1), whole)
    split = Adapter()
    for seed, letter in enumerate("qkv"):
        split |= file(lora(128, 128, 3, 6, seed=5 + seed), part + letter)
    merged = Merge([fused, split], [0.5, 2], architecture="flux").collect()
    assert {key.partition(".")[0] for key in merged} == {whole}
    wanted = 0.5 * by_hand(fused, whole + ".")
    wanted += 2 * torch.cat([by_hand(split, f"{part}{letter}.") for letter in "qkv"])
    assert close(by_hand(merged, whole + "."), wanted, 1e-6)


def test_files_on_disk_are_streamed(tmp_path):
    files = []
    for i in range(3):
        adapter = Adapter({f"lora_unet_l{n}.{name}": t for n in range(4)
                           for name, t in lora(40, 40, 2 + i, 2, seed=10 * i + n).items()},
                          {"ss_base_model_version": "flux1", "ss_seed": str(i)})  # fmt: skip
        files.append(tmp_path / f"{i}.safetensors")
        write_adapter(files[-1], adapter)
    ticks = []
    job = Merge([AdapterFile(path) for path in files], [1, -0.5, 2],
                tick=lambda *tick: ticks.append(tick))  # fmt: skip
    written = job.write(tmp_path / "merged.safetensors")
    assert [(done, total) for done, total, _ in ticks] == [(n, 4) for n in range(4)]
    merged = read_adapter(tmp_path / "merged.safetensors")
    memory = Merge([read_adapter(path) for path in files], [1, -0.5, 2]).collect()
    assert merged.keys() == memory.keys()
    assert all(torch.equal(merged[key], memory[key]) for key in memory)
    assert written["ss_base_model_version"] == "flux1" and "ss_seed" not in written
    assert written["ss_network_dim"] == "9" and written["ss_network_module"] == "networks.lora"
    assert written["modelspec.merged_from"] == "0 (1), 1 (-0.5), 2 (2)"


def test_a_cancelled_merge_leaves_no_file(tmp_path):
    class Cancelled(Exception):
        pass

    def tick(done, total, what):
        if done:
            raise Cancelled

    two = Adapter({f"lora_unet_{n}.{name}": t for n in "ab" for name, t in lora().items()})
    with pytest.raises(Cancelled):
        Merge([two, two], [1, 2], tick=tick).write(tmp_path / "x.safetensors")
    assert not [*tmp_path.iterdir()]


def test_alphas_that_metadata_explains_stay_right():
    """rs_lora of LyCORIS, which the result may not be read by once more."""
    options = {"ss_network_args": '{"algo": "lora", "rs_lora": "True"}',
               "ss_network_module": "lycoris.kohya"}  # fmt: skip
    weights = model((16, 12))
    one, two = (file({**samples((16, 12))["glora"], "alpha": torch.tensor(2.0)}, **options)
                for _ in range(2))  # fmt: skip
    plain = file(lora(alpha=3), **options)
    assert_sum(Merge([one], [1]).collect(), weights, [(two, 1)])
    assert_sum(Merge([plain], [0.3]).collect(), weights, [(plain, 0.3)])


@pytest.mark.parametrize(
    ("ratios", "options", "says"),
    [
        ([], {}, "one ratio for each"),
        ([1, 1, 1], {}, "one ratio for each"),
        ([1, math.nan], {}, "not a finite number"),
        ([math.inf], {}, "not a finite number"),
        ([0, 0], {}, "All ratios are 0"),
        ([1], {"method": "magic"}, "no such method"),
        ([1], {"method": "svd"}, "needs a rank"),
        ([1], {"method": "ties"}, "needs a rank"),
        ([1], {"method": "ties", "rule": RankRule(rank=4), "density": 0.0}, "density"),
        ([1], {"method": "kohya svd", "rule": RankRule("error", 0.1, rank=4)}, "fixed rank"),
    ],
)
def test_bad_settings(ratios, options, says):
    with pytest.raises(AdapterLabError, match=says):
        Merge([file(lora()), file(lora(seed=1))], ratios, **options)


def test_nothing_to_merge():
    with pytest.raises(AdapterLabError, match="no adapter"):
        Merge([], [1])


def test_shapes_that_differ_name_the_module():
    with pytest.raises(AdapterLabError, match=rf"{STEM}.*different shapes"):
        Merge([file(lora()), file(lora(20))], [1, 1]).collect()


def test_adapters_of_different_models():
    flux = file(lora(), "lora_unet_double_blocks_0_img_attn_qkv")
    wan = file(lora(), "diffusion_model.blocks.0.self_attn.q")
    with pytest.raises(AdapterLabError, match=r"different models.*FLUX.*Wan"):
        Merge([flux, wan], [1, 1])
