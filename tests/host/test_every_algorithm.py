"""Every algorithm on every tiny model: it learns, however it is run, and what it writes is read."""

from __future__ import annotations

import dataclasses

import comfy.model_management
import comfy.sd
import pytest
import samples
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.adapters.config import VARIANTS
from adapter_lab.core.adapters.training import config_notes
from adapter_lab.core.files import read_adapter
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.targets import Targets
from adapter_lab.nodes.host import paths
from adapter_lab.nodes.host.job import Job
from adapter_lab.nodes.host.trainer import Trainer

# A few layers of each sort: fused and plain attention, a feed-forward layer, a convolution, norms.
LAYERS = {
    "flux": r"double_blocks\.0\.(img_attn\.qkv|txt_mlp\.0)|single_blocks\.0\.linear[12]",
    "wan": r"blocks\.[01]\.(self_attn\.[qo]|cross_attn\.v|ffn\.2)",
    "sd3": r"joint_blocks\.0\.(context_block\.attn\.qkv|x_block\.(attn\.proj|mlp\.fc1))",
    "hunyuan_video": r"double_blocks\.0\.(img_attn\.qkv|txt_mlp\.2)|single_blocks\.0\.linear1",
    "sd15": r".*middle_block\.1\..*(attn1\.to_q|ff\.net\.2)|middle_block\.0\.in_layers\.2",
}
NORMS = {
    "flux": r".*norm\.query_norm", "wan": r".*norm_q", "sd15": r"middle_block\.1\..*norm1",
    "sd3": r".*ln_q", "hunyuan_video": r".*norm\.query_norm",
}  # fmt: skip
MORE = {
    "locon": AdapterConfig("lora", 4, 4.0, conv_rank=2, conv_alpha=1.0, tucker=True),
    "dora": AdapterConfig("lora", 4, 4.0, dora=True, rs_lora=True, bias=True),
    "loha_dora_on_inputs": AdapterConfig("loha", 2, 2.0, dora=True, dora_on="input"),
    "lokr_decomposed": AdapterConfig("lokr", 2, 2.0, decompose_both=True, scalar=True),
    "boft_rescaled": AdapterConfig("boft", 16, rescale=True),
}
RANKS = {"oft": 8, "boft": 16, "coft": 8}
CONFIGS = {
    name: AdapterConfig(name, RANKS.get(name, 4), 4.0)
    for name in [*(n for n, a in ALGORITHMS.items() if a.trainable), *VARIANTS]
} | MORE
FACTORS = {
    "full": 0.1, "lokr_decomposed": 3.0, "boft": 0.5, "boft_rescaled": 0.5, "tlora": 0.5,
}  # fmt: skip
# What ComfyUI's own loader does not read as what it is; of these the node says so.
ELSEWHERE = {"ia3", "glokr", "tlora", "coft", "dora"}
NATIVE = set(CONFIGS) - ELSEWHERE
RATE = {"sd15": 1e-2}


def steps(kind, name):
    """As few as the loss falls in; T-LoRA leaves most ranks out at high noise."""
    return 24 if (kind, name) == ("sd15", "tlora") else 8 if kind == "sd15" else 6


def job(model, kind, name, checkpointing, forward):
    pattern = (NORMS if name == "norm" else LAYERS)[kind]
    config = dataclasses.replace(CONFIGS[name], forward=forward)
    data = samples.dataset(kind, 1)
    rate = RATE.get(kind, 2e-2) * FACTORS.get(name, 1.0)
    targets = Targets(
        "everything", (".*",), (pattern,), norms=name == "norm", convolutions=name != "tlora"
    )
    return Job(
        model, data, paths.run(f"{kind} {name} {checkpointing} {forward}"),
        TrainConfig(steps(kind, name), save_every=0, seed=1), checkpointing=checkpointing,
        adapter=config, targets=targets, validation=data, ema_tracking=False,
        optimizer=OptimizerConfig(learning_rate=rate, clip=0.0),
    )  # fmt: skip


def trained(*args):
    with torch.inference_mode():
        return Trainer(job(*args)).run()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_learns_and_its_file_is_read(model, kind, name):
    base = model(kind)
    before = samples.run(base, kind)
    runs = {
        (checkpointing, forward): trained(base, kind, name, checkpointing, forward)
        for checkpointing in ("off", "blocks")
        for forward in ("bypass", "rebuild")
    }
    for how, result in runs.items():
        (_, first), (_, last) = result.progress.validation
        assert last < first, f"{how}: held-out loss {first} -> {last}"
    reference = runs["off", "bypass"].adapter
    for how, result in runs.items():
        # The same in other order: rounding grows over the steps, and Adam divides by it.
        for key, tensor in result.adapter.items():
            assert tensor.shape == reference[key].shape
        losses = torch.tensor([r.progress.losses for r in (result, runs["off", "bypass"])])
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-5, msg=str(how))
    file = read_adapter(job(base, kind, name, "off", "bypass").run.checkpoint(steps(kind, name)))
    live = samples.run(runs["off", "bypass"].model, kind)
    samples.differs(live, before)
    samples.close(samples.run(samples.apply(base, file), kind), live)
    told = any("own LoRA loader" in note for note in config_notes(CONFIGS[name]))
    assert told == (name in ELSEWHERE)
    if name in NATIVE:
        with torch.inference_mode():
            native, _ = comfy.sd.load_lora_for_models(base, None, dict(file), 1.0, 1.0)
        samples.close(samples.run(native, kind), live)
    samples.close(samples.run(base, kind), before, 1e-6)
