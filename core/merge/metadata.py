"""Metadata of adapters that were made from others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from ..keys.scale import network_args
from ..keys.trainers import GUESS, trainer
from ..metadata import SIGNATURE

# Of the options of a network: those that tell how its tensors are made, which they no longer are.
_OF_TENSORS = (
    "algo", "block_alphas", "block_dims", "block_size", "bypass_mode", "constraint", "conv_alpha",
    "conv_block_alphas", "conv_block_dims", "conv_dim", "conv_rank", "decompose_both", "dora_wd",
    "factor", "full_matrix", "rescaled", "rs_lora", "scalar", "split_qkv",
    "unbalanced_factorization", "unit", "use_conv_cp", "use_cp", "use_scalar", "use_tucker",
    "wd_on_output", "wd_on_out",
)  # fmt: skip
_DORA = ("wd_on_output", "wd_on_out")  # stay true of one
DYNAMIC = "Dynamic"  # a rank or alpha that differs between modules


def signed(metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with the name of this program, unless it tells which one trained the tensors."""
    known = trainer(metadata, ()) not in ("", GUESS)
    return dict(metadata) if known else {**metadata, **SIGNATURE}


def network_metadata(
    metadata: Mapping[str, str], ranks: Iterable[int], alphas: Iterable[float], comment: str = "",
    *, dora: bool = False,
) -> dict[str, str]:  # fmt: skip
    """``metadata`` with what it says of the network as it is now, in sd-scripts' words.

    Args:
        ranks, alphas: of the LoRA modules of the result; of no module: there are none, and the
            network stays what it was called.
        comment: goes before ``ss_training_comment``.
        dora: whether some of these modules have DoRA's lengths, which are LyCORIS' network.

    Reference: sd-scripts ``networks/resize_lora.py`` ("Dynamic", the comment).
    """
    made = dict(metadata)
    if comment:
        made["ss_training_comment"] = f"{comment}; {made.get('ss_training_comment', '')}"
    dims, scales = set(ranks), {float(alpha) for alpha in alphas}
    if not dims:
        return made
    if dora:
        made["ss_network_module"] = "lycoris.kohya"
    elif not made.get("ss_network_module", "").startswith("networks.lora"):
        made["ss_network_module"] = "networks.lora"
    made["ss_network_dim"] = str(*dims) if len(dims) == 1 else DYNAMIC
    made["ss_network_alpha"] = str(*scales) if len(scales) == 1 else DYNAMIC
    args = network_args(made)
    lost = [name for name in _OF_TENSORS if not (dora and name in _DORA)]
    kept = {name: value for name, value in args.items() if name not in lost}
    kept |= {"algo": "lora", "dora_wd": "True"} if dora else {}
    if kept:
        made["ss_network_args"] = json.dumps(kept)
    else:
        made.pop("ss_network_args", None)
    return made


def merged_from(names: Iterable[str]) -> str:
    """Value of ``modelspec.merged_from``: titles or file names without their ending."""
    return ", ".join(name.removesuffix(".safetensors") for name in names)
