"""The demo's text encoder says to ComfyUI what the demo model was trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapter_lab.nodes.host import words
from shapes import encode_caption


@pytest.mark.parametrize("caption", ["red star plain", "purple circle gradient", "star", ""])
def test_encodes_as_the_demo_model_was_trained(caption):
    """The vectors that its training made with numpy, bit for bit."""
    with torch.inference_mode():
        clip = words.load()
        ((cond, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    wanted, pooled = encode_caption(caption)
    np.testing.assert_array_equal(cond[0].numpy(), wanted)
    np.testing.assert_allclose(extra["pooled_output"][0].numpy(), pooled, rtol=1e-6, atol=1e-7)
