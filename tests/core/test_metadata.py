"""Metadata of a trained adapter against what sd-scripts and musubi-tuner write."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import torch
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.keys.trainers import trainer
from adapter_lab.core.metadata import TrainingInfo, training_metadata

INFO = TrainingInfo(
    base_version="flux1",
    architecture="flux-1-dev",
    output_name="stars",
    network_module="networks.lora_flux",
    network_dim=8,
    network_alpha=4,
    steps=30,
    max_steps=100,
    seed=7,
    learning_rate=1e-4,
    optimizer="torch.optim.adamw.AdamW",
    items=10,
    resolution=(512, 768),
    started=1_700_000_000.25,
    finished=1_700_000_100.75,
    optimizer_args={"weight_decay": 0.01, "betas": (0.9, 0.99)},
    batch_size=2,
    accumulation=2,
    prediction="flow",
)


def test_repeats_and_regularisation_count_as_in_sd_scripts():
    """Its DreamBoothDataset counts repeats, and regularisation by itself; batches are of buckets,
    so more than images over batch size."""
    found = training_metadata(replace(INFO, items=30, regularisation=10, batches=17))
    expected = {
        "ss_num_train_images": "20", "ss_num_reg_images": "10", "ss_num_batches_per_epoch": "17",
        "ss_epoch": "4",
    }  # fmt: skip
    assert expected.items() <= found.items()


def test_values_are_spelled_as_sd_scripts_spells_them():
    found = training_metadata(INFO)
    assert all(type(k) is str and type(v) is str for k, v in found.items())
    expected = {
        "ss_v2": "False",
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_output_name": "stars",
        "ss_training_started_at": "1700000000.25",
        "ss_training_finished_at": "1700000100.75",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.0001",
        "ss_lr_scheduler": "constant",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))",
        "ss_max_grad_norm": "1.0",
        "ss_mixed_precision": "no",
        "ss_seed": "7",
        "ss_steps": "30",
        "ss_max_train_steps": "100",
        "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": "5",
        "ss_epoch": "10",  # 5 batches, 2 accumulated: 3 steps an epoch
        "ss_num_epochs": "34",
        "ss_num_train_images": "10",
        "ss_num_train_items": "10",
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "4",
        "ss_gradient_accumulation_steps": "2",
        "ss_resolution": "(512, 768)",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": "stars",
        "modelspec.resolution": "512x768",
        "software": '{"name": "Adapter Lab"}',
    }
    date = found.pop("modelspec.date")  # 22:15:00.75 UTC, in local time
    assert re.fullmatch(r"2023-11-1[45]T\d\d:\d\d:00", date)
    assert found == expected


def test_what_the_other_architectures_write():
    rows = {
        "stable-diffusion-v1": "diffusers",
        "stable-diffusion-xl-v1-base": "https://github.com/Stability-AI/generative-models",
        "wan2.1": "https://github.com/Wan-Video/Wan2.1",
        "something-new": "https://github.com/comfyanonymous/ComfyUI",
    }
    for architecture, implementation in rows.items():
        found = training_metadata(replace(INFO, architecture=architecture))
        assert found["modelspec.architecture"] == f"{architecture}/lora"
        assert found["modelspec.implementation"] == implementation
    unknown = training_metadata(replace(INFO, architecture="", base_version=""))
    assert "modelspec.architecture" not in unknown and "ss_base_model_version" not in unknown


def test_optional_entries():
    for prediction in ("epsilon", "v"):
        found = training_metadata(replace(INFO, prediction=prediction))
        assert found["modelspec.prediction_type"] == prediction
    more = {"ss_timestep_sampling": "shift", "ss_epoch": 99, "ss_guidance_scale": None}
    info = replace(INFO, network_args={"algo": "lokr", "factor": 8}, comment="é", extra=more)
    found = training_metadata(info)
    assert json.loads(found["ss_network_args"]) == {"algo": "lokr", "factor": "8"}
    assert found["ss_training_comment"] == "é" and found["ss_timestep_sampling"] == "shift"
    assert found["ss_epoch"] == "99" and "ss_guidance_scale" not in found


def test_it_survives_a_file(tmp_path):
    metadata = training_metadata(INFO)
    write_adapter(tmp_path / "a.safetensors", Adapter({"a": torch.ones(1)}, metadata))
    found = read_adapter(tmp_path / "a.safetensors").metadata
    assert metadata.items() <= found.items()
    assert found.keys() - metadata.keys() == {"sshs_model_hash", "sshs_legacy_hash"}


def test_a_file_says_what_trained_it():
    assert trainer(training_metadata(INFO), []) == "Adapter Lab"
