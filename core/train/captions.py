"""Captions beside pictures, and the forms of one that a picture is trained under.

Order, fixed tags and dropout are sd-scripts' (``process_caption``): prefix and suffix, the tags
before ``keep_tokens`` or the first ``|||`` stay where they are, and so do those after a second
one. Where sd-scripts draws anew at every step, a fixed number of forms is drawn here, so that
their encodings can be cached.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..atomic import telling
from ..checks import require_choice, require_range
from ..errors import AdapterLabError
from .random import generator, permutation

EXTENSIONS = (".txt", ".caption")
KEPT = "|||"
MISSING = ("error", "folder name", "empty")
LINES = ("first", "all", "each")


@dataclass(frozen=True)
class CaptionConfig:
    """What is made of a caption file.

    Args:
        extension: of caption files; "" looks for .txt, then .caption.
        lines: "first" takes the first line, "all" joins them by spaces, "each" takes every line
            as a caption of its own.
        missing: what a picture without caption file gets: an error, its folder's name, nothing.
            An empty file is an empty caption.
        trigger: word put in place of ``[trigger]``, and in front of captions that lack it.
        prefix, suffix: put before and behind, with a space.
        separator: between tags.
        keep_tokens: leading tags that are neither shuffled nor dropped.
        shuffles: number of shuffled orders of the tags; 0 keeps the order.
        tag_dropout: share of the tags that each shuffled order lacks.
        dropout: share of the steps that train without caption.
        seed: of orders and dropped tags.
    """

    extension: str = ""
    lines: str = "first"
    missing: str = "error"
    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    separator: str = ","
    keep_tokens: int = 0
    shuffles: int = 0
    tag_dropout: float = 0.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tag_dropout", "dropout"):
            require_range(name, getattr(self, name), 0, 1)
        for name in ("shuffles", "keep_tokens"):
            require_range(name, getattr(self, name), 0)
        require_choice("missing", self.missing, MISSING)
        require_choice("lines", self.lines, LINES)
        if (self.shuffles and not self.separator) or (self.tag_dropout and not self.shuffles):
            raise AdapterLabError(
                "Tags cannot be told apart or varied",
                found=f"separator '{self.separator}', {self.shuffles} shuffled orders",
                fix="Give a separator, and at least one shuffled order for tag dropout",
            )

    @property
    def extensions(self) -> tuple[str, ...]:
        """Endings of caption files in the order they are looked for."""
        return (f".{self.extension.lstrip('. ')}",) if self.extension.strip() else EXTENSIONS


def caption_file(picture: Path, config: CaptionConfig) -> Path | None:
    """The caption file of ``picture``: ``a.txt`` or, where that is none, ``a.png.txt``."""
    names = [picture.with_suffix(e) for e in config.extensions]
    names += [picture.with_name(picture.name + e) for e in config.extensions]
    return next((name for name in names if name.is_file()), None)


def read_captions(path: Path, config: CaptionConfig) -> list[str]:
    """The captions in a file: UTF-8 with or without mark, UTF-16 with mark, else Latin-1.

    Raises:
        AdapterLabError: it cannot be read.
    """
    with telling(f"Cannot read '{path.name}'"):
        data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    lines = [line.strip() for line in text.replace("\0", "").splitlines()]
    lines = [line for line in lines if line] or [""]
    return {"first": lines[:1], "all": [" ".join(lines)], "each": lines}[config.lines]


def variants(captions: list[str], config: CaptionConfig) -> list[tuple[str, float]]:
    """(text, share of the steps) of each form of a picture's captions; the shares add up to 1."""
    texts = [form for caption in captions for form in _forms(_complete(caption, config), config)]
    shares: dict[str, float] = {}
    for text in texts:
        shares[text] = shares.get(text, 0.0) + (1 - config.dropout) / len(texts)
    if config.dropout:
        shares[""] = shares.get("", 0.0) + config.dropout
    return [(text, share) for text, share in shares.items() if share > 0]


def _complete(caption: str, config: CaptionConfig) -> str:
    caption = " ".join(filter(None, (config.prefix.strip(), caption, config.suffix.strip())))
    word = config.trigger.strip()
    if "[trigger]" in caption:
        return caption.replace("[trigger]", word).strip()
    if not word or word in caption:
        return caption
    return f"{word}{config.separator or ','} {caption}" if caption else word


def _forms(caption: str, config: CaptionConfig) -> list[str]:
    """Shuffled orders of ``caption``, or itself without the marks of fixed tags."""
    front, middle, back = _parts(caption, config)
    if not config.shuffles:
        return [_joined(front + middle + back, config)] if KEPT in caption else [caption]
    forms: list[str] = []
    # What is drawn depends on the caption alone, so that other files may come and go.
    name = zlib.crc32(caption.encode())
    for i in range(config.shuffles):
        tags = [middle[j] for j in permutation(config.seed, "tags", len(middle), name, i)]
        rng = generator(config.seed, "dropped tags", name, i)
        left = [t for t in tags if float(torch.rand(1, generator=rng)) >= config.tag_dropout]
        forms.append(_joined(front + left + back, config))
    return forms


def _parts(caption: str, config: CaptionConfig) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay in front, that move, and that stay behind."""
    if KEPT in caption:
        parts = [_tags(part, config) for part in caption.split(KEPT, 2)]
        return parts[0], parts[1], parts[2] if len(parts) > 2 else []
    tags = _tags(caption, config)
    return tags[: config.keep_tokens], tags[config.keep_tokens :], []


def _tags(text: str, config: CaptionConfig) -> list[str]:
    if not config.separator:
        return [text.strip()] if text.strip() else []
    return [tag.strip() for tag in text.split(config.separator) if tag.strip()]


def _joined(tags: list[str], config: CaptionConfig) -> str:
    return f"{config.separator.strip() or ','} ".join(tags)
