"""The pack inside a running ComfyUI: its nodes, and what it makes of bad input."""

from __future__ import annotations

import json
import pickle
import re
import struct
import urllib.request

import pytest
import samples
import tiny
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.files import Adapter, read_adapter, write_adapter
from adapter_lab.core.train.random import generator
from adapter_lab.core.train.storage import save_dataset
from adapter_lab.tests.server import Server
from conftest import COMFYUI
from safetensors.torch import save

# Ids and inputs that saved workflows rely on, in order.
CONTRACT = {
    "AdapterLabLoader": "model clip adapter_name strength_model strength_clip mode on_unmatched "
    "block_weights schedule alpha",
    "AdapterLabFile": "adapter_name",
    "AdapterLabApply": "model clip adapter strength_model strength_clip mode on_unmatched "
    "block_weights schedule alpha",
    "AdapterLabInspect": "adapter model",
    "AdapterLabSave": "adapter filename_prefix key_format dtype metadata architecture inexact rank",
    "AdapterLabDataset": "latents conditioning mask name captions",
    "AdapterLabDatasetFolder": "vae clip folder name resolution flip missing_captions trigger "
    "bucket_step buckets upscale masks caption_lines caption_extension prefix suffix shuffles "
    "separator keep_tokens tag_dropout caption_dropout caption_seed frames frame_step clips "
    "subfolders balance_regularisation unusable_files",
    "AdapterLabDatasetLoad": "name",
    "AdapterLabDatasetItem": "dataset index",
    "AdapterLabTargets": "model preset exclude include default_excludes convolutions norms blocks "
    "train clip config",
    "AdapterLabConfig": "algorithm rank alpha factor decompose_both full_matrix tucker conv_rank "
    "conv_alpha unit constraint rescale dora dora_on rs_lora scalar on_input dropout rank_dropout "
    "module_dropout bias precision forward",
    "AdapterLabOptimizer": "optimizer learning_rate weight_decay clip warmup schedule cycles power "
    "decay final betas lora_plus rates text_encoder_rate rounding arguments",
    "AdapterLabObjective": "timestep_sampling mean std shift mode_scale min_timestep max_timestep "
    "timestep_range weighting gamma loss huber_c huber_schedule unmasked_weight prior_weight "
    "noise_offset adaptive_noise_scale input_perturbation guidance width height model",
    "AdapterLabPreview": "positive negative vae width height steps cfg seed every sampler "
    "scheduler frames",
    "AdapterLabTrain": "model dataset run_name steps batch_size accumulation seed save_every "
    "keep_last on_existing checkpointing config targets optimizer objective preview validation "
    "init_from ema_tracking clip chunk offload_activations streaming compile compute trackers",
    "AdapterLabRun": "run_name",
    "AdapterLabEMA": "run checkpoints profile sigma_rel beta beta2 order first last products",
    "AdapterLabBake": "model_file adapter strength filename_prefix dtype quantised precision "
    "architecture more_adapters more_strengths",
    "AdapterLabQuantLoader": "unet_name format keep strength adapter keep_worst max_error "
    "full_precision architecture",
    "AdapterLabQuantize": "unet_name format keep filename_prefix keep_worst max_error "
    "full_precision architecture adapter strength",
    "AdapterLabMerge": "adapters ratios method rank conv_rank max_error density majority seed "
    "dtype model clip",
    "AdapterLabExtract": "base_model tuned_model algorithm rank rule parameter conv_rank factor "
    "dora_on clamp_quantile min_change min_diff others quantised dtype exact seed",
    "AdapterLabResize": "adapter rank rule parameter conv_rank dtype exact seed model clip",
    "AdapterLabMagCache": "model ratios manual_ratios threshold k retention start_percent "
    "end_percent calibrate fill errors guard guard_last residual",
    "AdapterLabMagCachePlan": "ratios manual_ratios steps threshold k retention guard_last "
    "speed_up",
    "AdapterLabDemoText": "",
}
OUTPUTS = {
    "AdapterLabLoader": "MODEL CLIP STRING",
    "AdapterLabFile": "LORA_MODEL STRING",
    "AdapterLabInspect": "STRING IMAGE",
    "AdapterLabDataset": "TRAIN_DATASET STRING",
    "AdapterLabDatasetFolder": "TRAIN_DATASET STRING",
    "AdapterLabDatasetItem": "LATENT CONDITIONING",
    "AdapterLabTargets": "TRAIN_TARGETS STRING",
    "AdapterLabObjective": "OBJECTIVE_CONFIG IMAGE",
    "AdapterLabPreview": "TRAIN_PREVIEW",
    "AdapterLabTrain": "MODEL LORA_MODEL TRAIN_RUN LOSS_MAP IMAGE CLIP",
    "AdapterLabRun": "TRAIN_RUN LORA_MODEL STRING",
    "AdapterLabEMA": "LORA_MODEL STRING IMAGE",
    "AdapterLabBake": "STRING STRING",
    "AdapterLabQuantLoader": "MODEL STRING",
    "AdapterLabQuantize": "STRING STRING IMAGE",
    "AdapterLabMerge": "LORA_MODEL STRING",
    "AdapterLabExtract": "LORA_MODEL STRING",
    "AdapterLabResize": "LORA_MODEL STRING",
    "AdapterLabMagCache": "MODEL",
    "AdapterLabMagCachePlan": "STRING IMAGE",
}
STEM = "diffusion_model.double_blocks.0.img_attn.qkv"


def good(rank=4, **change):
    """Factors of one LoRA module."""
    config = AdapterConfig("lora", rank, rank)
    made = ALGORITHMS["lora"].init((384, 128), config, generator(0, "x"))
    return {f"{STEM}.{k}": v for k, v in (made.state() | change).items()}


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Name -> (content, part of what the error says)."""
    whole = save(good())
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    end = max(entry["data_offsets"][1] for entry in header.values())
    more = {"dtype": "F32", "shape": [4096], "data_offsets": [end, end + 16384]}
    claims = header | {"more": more}
    name = next(iter(header))
    twice = f'{{"{name}": {json.dumps(header[name])}, "{name}": {json.dumps(header[name])}}}'
    up, down = "lora_up.weight", "lora_down.weight"
    return {
        "truncated": (whole[:-100], "cut off"),
        "pickle": (pickle.dumps(good()), "pickle"),
        "empty": (b"", "empty"),
        "text": (b"this is not a model at all, but a page of text\n" * 20, "text"),
        "claims": (_pack(json.dumps(claims), whole[8 + size :]), "cut off"),
        "twice": (_pack(twice, whole[8 + size :]), "twice"),
        "nan": (save(good(**{up: torch.full((384, 4), torch.nan)})), "NaN"),
        "shapes": (save(good(**{down: torch.zeros(5, 128)})), STEM),
        "alpha": (save(good(alpha=torch.ones(3))), "alpha"),
        "rank0": (save(good(**{up: torch.zeros(384, 0), down: torch.zeros(0, 128)})), "rank"),
    }


def _pack(header: str, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    tiny.write("flux", base / "models" / "diffusion_models" / "flux.safetensors")
    loras = base / "models" / "loras"
    write_adapter(loras / "good.safetensors", Adapter(good()))
    for name, (content, _) in bad_files().items():
        (loras / f"{name}.safetensors").write_bytes(content)
    save_dataset(base / "output" / "adapter_lab" / "datasets" / "noise", samples.dataset("flux"))
    save_dataset(base / "output" / "adapter_lab" / "datasets" / "other", samples.dataset("sd15"))
    with Server(COMFYUI, base=base, folder="any name") as running:
        yield running


def prompt(*nodes) -> dict:
    """API prompt of (class, inputs), numbered from 0."""
    return {str(i): {"class_type": n, "inputs": values} for i, (n, values) in enumerate(nodes)}


MODEL = ("UNETLoader", {"unet_name": "flux.safetensors", "weight_dtype": "default"})
APPLY = {"strength_model": 1.0, "strength_clip": 1.0, "mode": "auto", "on_unmatched": "report"}
SHOW = ("PreviewAny", {"source": ["1", 2]})


def load(name: str) -> dict:
    loader = ("AdapterLabLoader", {"model": ["0", 0], "adapter_name": name, **APPLY})
    return prompt(MODEL, loader, SHOW)


def training(dataset="noise", **options) -> dict:
    inputs = dict(
        run_name="run", steps=3, batch_size=2, accumulation=1, seed=0, save_every=1,
        keep_last=0, on_existing="resume", checkpointing="auto",
    ) | options  # fmt: skip
    return prompt(
        MODEL,
        ("AdapterLabDatasetLoad", {"name": dataset}),
        ("AdapterLabTrain", {"model": ["0", 0], "dataset": ["1", 0], **inputs}),
        ("AdapterLabSave", {"adapter": ["2", 1], "filename_prefix": "mine/x", "key_format": "kohya",
                            "dtype": "bf16", "metadata": '{"modelspec.author": "me"}'}),
    )  # fmt: skip


def message(result) -> str:
    assert len(result.errors) == 1, result.errors
    return result.errors[0]["exception_message"]


def test_nodes_are_those_of_the_contract(server):
    info = server.object_info()
    for node, names in CONTRACT.items():
        inputs = info[node]["input_order"]
        # Sockets that may stay empty are listed apart, each list in order.
        listed = [*inputs.get("required", []), *inputs.get("optional", [])]
        wanted = names.split()
        assert set(wanted) <= set(listed), node
        for part in ("required", "optional"):
            own = [name for name in inputs.get(part, []) if name in wanted]
            assert own == [name for name in wanted if name in own], node
    for node, kinds in OUTPUTS.items():
        assert info[node]["output"] == kinds.split()


def test_no_log_line_at_import(server):
    """Only ComfyUI's own timing names the pack."""
    lines = [line for line in server.log.splitlines() if "any name" in line or "AdapterLab" in line]
    assert len(lines) == 1 and "seconds" in lines[0], lines


def test_scripts_are_served_from_a_folder_of_any_name(server):
    ours = [path for path in server.get("/extensions") if path.endswith("adapter_lab.js")]
    assert len(ours) == 1
    for path in (ours[0], ours[0].replace("js/adapter_lab.js", "lib/panel.mjs")):
        with urllib.request.urlopen(server.address + path) as answer:
            assert answer.status == 200


def test_report_is_on_the_node_and_an_output(server):
    result = server.run(load("good.safetensors"))
    assert result.ok, result.errors
    assert "1 of 1 modules matched" in result.texts["1"]
    assert result.outputs["1"]["adapter_lab"][0]["matched"][STEM]["rank"] == 4
    assert result.texts["1"] in result.texts["2"]


@pytest.mark.parametrize("name", list(bad_files()))
def test_bad_file_is_one_clear_error_and_comfyui_lives(server, name):
    said = message(server.run(load(f"{name}.safetensors")))
    assert f"{name}.safetensors" in said and bad_files()[name][1] in said
    assert "\n" not in said.strip() and len(said) < 400
    assert server.run(load("good.safetensors")).ok


def test_training_from_the_graph(server):
    result = server.run(training())
    assert result.ok, result.errors
    texts = [data["text"] for kind, data in result.messages if kind == "progress_text"]
    assert any("step 3 of 3" in text and "loss" in text for text in texts)
    assert "3 steps" in result.texts["2"]
    assert result.texts["3"].splitlines()[0].endswith(" to loras/mine/x_00001_.safetensors")
    adapter = read_adapter(server.base / "output" / "loras" / "mine" / "x_00001_.safetensors")
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" in adapter
    factors = {t.dtype for key, t in adapter.items() if not key.endswith(".alpha")}
    assert factors == {torch.bfloat16}
    assert adapter.metadata["modelspec.author"] == "me" and adapter.metadata["ss_steps"] == "3"
    loaded = server.run(load("mine/x_00001_.safetensors"))
    assert loaded.ok and not loaded.outputs["1"]["adapter_lab"][0]["unmatched"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"run_name": "../outside"}, "run name"),
        ({"run_name": "run", "on_existing": "error", "seed": 1}, "exists already"),
        ({"dataset": "other", "run_name": "new"}, "4 channels"),
    ],
)
def test_bad_training_input(server, options, says):
    server.run(training())
    before = sorted(server.base.rglob("output/**/*"))
    assert says in message(server.run(training(**options)))
    assert sorted(server.base.rglob("output/**/*")) == before
    assert server.run(load("good.safetensors")).ok


def test_cancel_stops_within_a_step_and_keeps_what_was_learned(server):
    done = []

    def stop(kind, data):
        step = re.search(r"step (\d+) of", data["text"]) if kind == "progress_text" else None
        if step and int(step[1]) >= 5 and not done:
            done.append(int(step[1]))
            server.interrupt()

    result = server.run(training(run_name="long", steps=100_000), on_message=stop)
    assert done and result.interrupted
    kept = sorted((server.base / "output" / "loras" / "long").iterdir())
    steps = [int(path.stem[-8:]) for path in kept]
    # The button is pressed while steps go on.
    assert steps == list(range(1, steps[-1] + 1)) and done[0] <= steps[-1] < done[0] + 100
    resumed = server.run(training(run_name="long", steps=steps[-1] + 1))
    assert resumed.ok and f"resumed at {steps[-1]}" in resumed.texts["2"]


def test_merging_in_the_graph(server):
    """Sockets that grow, as a client of the API names them."""
    given = {"adapters.adapter0": ["0", 0], "adapters.adapter1": ["0", 0]}
    settings = {"ratios": "1, 0.5", "method": "auto", "rank": 0}
    read = ("AdapterLabFile", {"adapter_name": "good.safetensors"})
    show = ("PreviewAny", {"source": ["1", 1]})
    result = server.run(prompt(read, ("AdapterLabMerge", {**given, **settings}), show))
    assert result.ok, result.errors
    shown = result.outputs["1"]["adapter_lab"][0]
    assert shown["rows"][STEM]["rank"] == 4
    assert any("more than once" in said for said in shown["warnings"])
    worse = {**given, **settings, "ratios": "1, x"}
    bad = server.run(prompt(read, ("AdapterLabMerge", worse), show))
    assert "'x'" in message(bad)


def test_baking_in_the_graph(server):
    """The new file is one that ComfyUI's own loader lists, in the same session."""
    read = ("AdapterLabFile", {"adapter_name": "good.safetensors"})
    given = {"model_file": "flux.safetensors", "adapter": ["0", 0], "strength": 0.5,
             "filename_prefix": "styles/ink", "dtype": "bf16", "more_strengths": "0.25",
             "more_adapters.adapter0": ["0", 0]}  # fmt: skip
    result = server.run(prompt(read, ("AdapterLabBake", given)))
    assert result.ok, result.errors
    shown = result.outputs["1"]["adapter_lab"][0]
    assert shown["rows"][STEM]["made"] == "LoRA" and len(shown["rows"]) == 2
    name = "styles/ink_00001_.safetensors"
    assert (server.base / "output" / "diffusion_models" / name).is_file()
    loader = ("UNETLoader", {"unet_name": name, "weight_dtype": "default"})
    again = ("AdapterLabBake", {**given, "model_file": name, "filename_prefix": "twice"})
    both = server.run(prompt(read, again, loader, ("AdapterLabInspect", {
        "adapter": ["0", 0], "model": ["2", 0]})))  # fmt: skip
    assert both.ok, both.errors
    linked = {**given, "model_file": ["1", 0], "filename_prefix": "linked"}
    for _ in range(2):  # nothing has changed before the second
        assert server.run(prompt(read, again, ("AdapterLabBake", linked))).ok
    assert len(list((server.base / "output" / "diffusion_models").glob("linked_*"))) == 1
    bad = server.run(prompt(read, ("AdapterLabBake", {**given, "more_strengths": "1, 2"})))
    assert "2 strengths for 1 adapters" in message(bad)


def test_replaced_file_is_read_again(server):
    path = server.base / "models" / "loras" / "replaced.safetensors"
    for rank in (2, 3):
        write_adapter(path, Adapter(good(rank)))
        assert f"rank {rank}" in server.run(load(path.name)).texts["1"]


def test_dataset_from_the_graph(server):
    item = ("AdapterLabDatasetItem", {"dataset": ["0", 0], "index": 1})
    result = server.run(
        prompt(
            ("AdapterLabDatasetLoad", {"name": "noise"}),
            item,
            ("AdapterLabDataset", {"latents": ["1", 0], "conditioning": ["1", 1], "name": "copy"}),
            ("PreviewAny", {"source": ["2", 1]}),
        )
    )
    assert result.ok, result.errors
    assert result.texts["2"].startswith("1 item\n")
    assert (server.base / "output" / "adapter_lab" / "datasets" / "copy").is_dir()
