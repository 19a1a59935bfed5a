"""The demo model's text encoder: a fixed vector for every word, in ComfyUI's own CLIP object."""

from __future__ import annotations

import hashlib
from typing import Any

import comfy.ops
import comfy.sd
import torch
import torch.nn as nn
from torch import Tensor

WIDTH, TOKENS, PAD = 64, 4, "<pad>"
Tokens = dict[str, list[list[tuple[str, float]]]]


def vector(word: str) -> Tensor:
    """The bits of the word's SHA-256 as numbers of unit variance; (64,)."""
    digests = b"".join(hashlib.sha256(f"{i} {word}".encode()).digest() for i in range(2))
    return ((torch.tensor(list(digests), dtype=torch.float64) - 127.5) / 73.9).float()


class Tokenizer:
    """Splits at white space; a word is its own token."""

    def __init__(self, **_options: Any) -> None:
        pass

    def tokenize_with_weights(self, text: str, *_: Any, **_options: Any) -> Tokens:
        """Four words; shorter texts are padded, longer ones are cut."""
        words = (text.split() + [PAD] * TOKENS)[:TOKENS]
        return {"words": [[(word, 1.0) for word in words]]}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class Encoder(nn.Module):
    """Looks words up and sends them through one linear layer, which is the identity."""

    def __init__(self, dtype: torch.dtype, device: torch.device, model_options: Any) -> None:
        super().__init__()
        self.dtypes = {dtype}
        self.words = comfy.ops.manual_cast.Linear(WIDTH, WIDTH, bias=False, device=device)
        self.words.weight = nn.Parameter(torch.eye(WIDTH, device=device), requires_grad=False)

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """There is nothing to set."""

    def reset_clip_options(self) -> None:
        """There is nothing to reset."""

    def encode_token_weights(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Vectors of the words (b, 4, 64), and their sum over the root of their number (b, 64)."""
        rows = [[word for word, _ in row] for row in tokens["words"]]
        found = torch.stack([torch.stack([vector(word) for word in row]) for row in rows])
        cond = self.words(found.to(self.words.weight))
        said = torch.tensor([[word != PAD for word in row] for row in rows]).to(cond)
        count = said.sum(1, keepdim=True).clamp_min(1)
        return cond, (cond * said[..., None]).sum(1) / count.sqrt()


class _Target:
    """What ComfyUI makes a CLIP of."""

    params: dict[str, Any] = {}
    clip = Encoder
    tokenizer = Tokenizer


def load() -> Any:
    """A CLIP for the demo model, which knows any word."""
    return comfy.sd.CLIP(_Target(), model_options={"dtype": torch.float32})
