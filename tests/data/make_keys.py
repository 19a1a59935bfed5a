"""Writes keys/<model>_<producer>.json: keys and shapes that peft, diffusers and LyCORIS write.

Run with an environment where these import: ``python make_keys.py [CASE ...]``. The lists of
sd-scripts and musubi-tuner there come from the same on their own classes: their networks built
over a model on the meta device, one block of each kind.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from adapter_lab.tests.core.test_archs_flux import CASES, Case, diffusers_model
from lycoris import create_lycoris
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parent / "keys"
PIPELINES = {
    "flux": "FluxPipeline", "flux2": "Flux2Pipeline", "chroma": "ChromaPipeline",
    "hunyuan video": "HunyuanVideoPipeline", "hunyuan video 1.5": "HunyuanVideo15Pipeline",
    "hunyuan image": "HunyuanImagePipeline", "sd3.5": "StableDiffusion3Pipeline",
    "mochi": "MochiPipeline", "auraflow": "AuraFlowPipeline", "hidream": "HiDreamImagePipeline",
}  # fmt: skip
Keys = dict[str, list[int]]


def peft_keys(case: Case) -> Keys:
    """As ``get_peft_model(...).save_pretrained`` writes them."""
    model = diffusers_model(case)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    state = get_peft_model_state_dict(get_peft_model(model, LoraConfig(r=4, target_modules=names)))
    return {key: list(tensor.shape) for key, tensor in state.items()}


def diffusers_keys(case: Case, pipeline: Any) -> Keys:
    """As the pipeline's ``save_lora_weights`` writes them."""
    state = {
        key.removeprefix("base_model.model."): torch.zeros(shape, dtype=torch.float8_e4m3fn)
        for key, shape in peft_keys(case).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_lora_weights(folder, transformer_lora_layers=state)
        with safe_open(next(Path(folder).iterdir()), "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118


def lycoris_keys(case: Case) -> Keys:
    """As ``create_lycoris`` writes a LoKr over the whole model."""
    network = create_lycoris(diffusers_model(case), 1.0, linear_dim=4, linear_alpha=2, algo="lokr")
    network.apply_to()
    return {key: list(tensor.shape) for key, tensor in network.state_dict().items()}


def write(case: Case, name: str, producer: str, source: str, keys: Keys) -> None:
    first = {k: v for k, v in keys.items() if not re.search(r"(?:blocks|layers)[._][1-9]", k)}
    lines = ",\n".join(f'"{key}":{json.dumps(shape)}' for key, shape in first.items())
    head = f'"format":"{producer}","architecture":"{case.spec}","variant":"{case.variant}",'
    head += f'"source":"{source}"'
    text = f'{{{head},"keys":{{\n{lines}\n}}}}\n'.replace(", ", ",")
    json.loads(text)
    (FOLDER / f"{name}_{producer}.json").write_text(text)


def main(names: list[str]) -> None:
    versions = {name: f"{name} {version(name)}" for name in ("peft", "diffusers", "lycoris-lora")}
    for kind in names or CASES:
        case, pipeline = CASES[kind], getattr(diffusers, PIPELINES.get(kind, ""), None)
        stem = kind.replace(" ", "_")
        write(case, stem, "peft", versions["peft"], peft_keys(case))
        if hasattr(pipeline, "save_lora_weights"):
            keys = diffusers_keys(case, pipeline)
            write(case, stem, "diffusers", versions["diffusers"], keys)
        write(case, stem, "lycoris", versions["lycoris-lora"], lycoris_keys(case))


if __name__ == "__main__":
    main(sys.argv[1:])
