"""Which layers of a text encoder its conditioning depends on.

Models take the states of a layer before the last ("clip skip") or only the pooled output of one of
two text encoders. What is left over is computed and thrown away: nothing can be learned there.
"""

from __future__ import annotations

import re
from typing import Any

import comfy.model_base
import comfy.sd1_clip
import comfy.sdxl_clip

from ...core.train.targets import layer_of


def reaches(path: str, clip: Any, model: Any) -> bool:
    """Whether the module ``path`` of ``clip`` has a part in what ``model`` is given."""
    name, _, inside = path.partition(".transformer.")
    part = getattr(clip.patcher.model, name, None)
    if not isinstance(part, comfy.sd1_clip.SDClipModel):
        return True  # a text encoder with rules of its own
    pooled = _pools(part) and _takes_pooled(name, clip, model)
    layer = layer_of(path)
    if layer:
        return pooled or int(layer.rpartition(".")[2]) <= last_layer(part, clip)
    if inside == "text_projection":
        return pooled and part.return_projected_pooled
    ends = re.fullmatch(r"(?:.*\.)?(?:final_layer_norm|norm)", inside)
    return not ends or pooled or part.layer == "last" or part.layer_norm_hidden_state


def last_layer(part: Any, clip: Any) -> int:
    """The last layer whose states are the text; ``part`` is one text encoder of ``clip``."""
    part.reset_clip_options()
    if clip.layer_idx is not None:
        part.set_clip_options({"layer": clip.layer_idx})
    layer, index = part.layer, part.layer_idx
    if isinstance(layer, list):
        return max(n + part.num_layers if n < 0 else n for n in layer) - 1
    if layer != "hidden":
        return part.num_layers - 1
    return index + part.num_layers if index < 0 else index


def _pools(part: Any) -> bool:
    """Whether there is a pooled output, which only CLIP has; it is that of the last layer."""
    return hasattr(part.transformer, "text_projection")


def _takes_pooled(name: str, clip: Any, model: Any) -> bool:
    wrapper = clip.patcher.model
    if isinstance(wrapper, comfy.sdxl_clip.SDXLClipModel) and name == "clip_l":
        return False
    base = comfy.model_base.BaseModel.encode_adm
    return type(model.model).encode_adm is not base
