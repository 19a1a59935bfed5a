"""What is said of a file from the file alone."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_lab.core.files import Adapter
from adapter_lab.core.keys import describe
from adapter_lab.core.keys.describe import top_tags
from adapter_lab.core.keys.trainers import trainer


def lora(stem: str, rank: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    up, down = torch.ones(128, rank), torch.ones(rank, 128)
    factors = {"lora_up.weight": up, "lora_down.weight": down, **more}
    return {f"{stem}.{suffix}": tensor for suffix, tensor in factors.items()}


def test_format_architecture_ranks_and_metadata():
    file = lora("lora_unet_double_blocks_0_img_attn_proj", 4, alpha=torch.tensor(2.0))
    file |= lora("lora_unet_double_blocks_1_img_attn_proj", 8, alpha=torch.tensor(8.0))
    told = describe(Adapter(file, {"ss_seed": "7", "other": "x"}, name="a.safetensors"))
    assert told.headline == "a.safetensors: 2 modules (2 LoRA)"
    assert (told.format, told.architecture, told.algorithms) == ("kohya", "flux", {"lora": 2})
    assert told.ranks == [(4, 2.0, 1), (8, 8.0, 1)]
    assert (told.tensors, told.parameters, told.dtypes) == (6, 2 * 128 * 12 + 2, {"float32": 6})
    text = told.to_text()
    assert text.startswith(told.headline)
    assert "kohya format, for FLUX.1" in text
    assert "rank 4 alpha 2 (1 x), rank 8 alpha 8 (1 x)" in text
    assert "ss_seed: 7" in text and "other" not in text


def test_scale_of_peft_is_shown():
    file = lora("base_model.model.layer", 8)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32}
    assert describe(Adapter(file, config=config)).ranks == [(8, 32.0, 1)]
    assert "Scale assumed: 1" in describe(Adapter(file)).to_text()


def test_modules_that_no_algorithm_can_take_are_told():
    """A broken file is described as far as it goes."""
    file = lora("lora_unet_x", 4) | {"lora_unet_y.thing": torch.ones(2)}
    del file["lora_unet_x.lora_down.weight"]
    told = describe(Adapter(file))
    assert set(told.broken) == {"lora_unet_x", "lora_unet_y"}
    assert "A factor is missing" in told.broken["lora_unet_x"]
    assert "thing is not supported" in told.broken["lora_unet_y"]
    assert "2 modules of no supported algorithm" in told.to_text()


def test_trigger_words_tags_hashes_and_embeddings():
    tags = {"10_cat": {"cat ": 3, "dog": 1}, "2_dog": {"dog": 5, "tree": 2}}
    metadata = {
        "ss_tag_frequency": json.dumps(tags), "modelspec.trigger_phrase": "ohwx cat",
        "sshs_model_hash": "ab" * 32, "ss_sd_scripts_commit_hash": "x",
    }  # fmt: skip
    file = lora("lora_unet_x", 4) | {"bundle_emb.moggy.string_to_param.*": torch.ones(2, 4)}
    told = describe(Adapter(file, metadata))
    assert told.tags == [("dog", 6), ("cat", 3), ("tree", 2)]
    assert told.triggers == ["ohwx cat"]
    assert told.hashes == {"sshs_model_hash": "ab" * 32}
    assert told.embeddings == ["moggy"] and told.modules == 1
    facts = dict(json.loads(json.dumps(told.to_dict()))["facts"])
    assert facts["top tags"] == "dog (6), cat (3), tree (2)"
    assert facts["trainer"] == "sd-scripts" and facts["embeddings"] == "moggy"
    assert facts["SHA-256 of the tensors"] == "ab" * 32


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", '{"a": 3}', '{"a": {"b": "c"}}'])
def test_tags_that_are_none(text):
    assert top_tags({"ss_tag_frequency": text}) == []


@pytest.mark.parametrize(
    ("metadata", "stems", "config", "program"),
    [
        ({"ss_sd_scripts_commit_hash": "x"}, [], False, "sd-scripts"),
        ({"ot_branch": "master"}, [], False, "OneTrainer"),
        ({"software": '{"name": "ai-toolkit"}'}, [], False, "ai-toolkit"),
        ({"lora_adapter_metadata": "{}"}, [], False, "diffusers"),
        ({"ss_network_module": "networks.lora_wan"}, [], False, "musubi-tuner"),
        ({"ss_network_module": "networks.lora"}, [], False, "sd-scripts or musubi-tuner"),
        ({"ss_network_module": "lycoris.kohya"}, [], False, "sd-scripts with LyCORIS"),
        ({}, ["double_blocks.0.processor.qkv_lora1"], False, "XLabs"),
        ({}, ["lora_transformer_x"], False, "OneTrainer"),
        ({}, ["base_model.model.x"], True, "peft"),
        ({}, ["diffusion_model.x"], True, "diffusion-pipe"),
        ({}, ["diffusion_model.x"], False, ""),
    ],
)
def test_trainer(metadata, stems, config, program):
    assert trainer(metadata, stems, config) == program
