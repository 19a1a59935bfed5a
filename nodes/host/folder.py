"""A training dataset out of a folder of pictures and clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ...core.errors import AdapterLabError
from ...core.train import buckets as plans
from ...core.train.buckets import Buckets
from ...core.train.cache import FOLDER, Cache
from ...core.train.captions import CaptionConfig, caption_file, read_captions, variants
from ...core.train.data import TrainDataset, TrainItem
from ...core.train.folder import Source, UnusableError, balanced, scan
from ...core.train.storage import require_origin, save_folder_dataset
from . import paths, pictures
from .encode import Encoder, Picture, sha256
from .progress import Bar

_SHOWN = 20  # names of files in a report, and
_NAMED = 5  # in an error
Texts = list[tuple[str, float]]


@dataclass(frozen=True)
class FolderJob:
    """What is made of a folder.

    Args:
        root: the folder.
        name: of the dataset; "" does not save it.
        flip: also train on each picture mirrored, half of the time.
        frames: of a clip for a VAE of clips, cut to what that keeps; the most single frames of a
            clip for other VAEs; 0 passes clips over.
        every: each how many-th frame is taken.
        clips: the most clips of ``frames`` frames out of one file.
        masks: "files", "files or alpha" or "off".
        on_unusable: what a file that cannot be used does: "skip" or "error".
        balance: repeat regularisation until it is visited as often as the rest.
    """

    vae: Any
    clip: Any
    root: Path
    name: str
    buckets: Buckets = Buckets()
    captions: CaptionConfig = CaptionConfig()
    flip: bool = False
    frames: int = 17
    every: int = 1
    clips: int = 1
    masks: str = "files"
    recursive: bool = True
    on_unusable: str = "skip"
    balance: bool = True


def build(job: FolderJob, node_id: str | None) -> tuple[TrainDataset, str]:
    """The dataset, saved if it has a name, and what to tell about it.

    What is encoded stays encoded when the user cancels, or anything fails.

    Raises:
        AdapterLabError: no such folder, nothing usable in it, captions missing, the name taken.
    """
    return _Builder(job, node_id).build()


class _Builder:
    def __init__(self, job: FolderJob, node_id: str | None) -> None:
        self.job, self.node_id = job, node_id
        self.folder = paths.new_dataset(job.name) if job.name else None
        self.skipped: list[str] = []
        bar = Bar(1, node_id)
        self.sources = scan(job.root, job.recursive, lambda n: bar.update(0, f"{n} files seen"))
        if self.folder:
            require_origin(self.folder, str(job.root))
        shelf = self.folder or paths.output("adapter_lab")
        self.encoder = Encoder(job.vae, job.clip, Cache(shelf / FOLDER))
        self.buckets = self.encoder.fitted(job.buckets)

    def build(self) -> tuple[TrainDataset, str]:
        texts = self._captions()
        plan = self._planned(texts)
        self._require_some(plan)
        if self.job.balance:
            sources = balanced([source for source, _ in plan])
            plan = [(s, picture) for s, (_, picture) in zip(sources, plan, strict=True)]
        captions = list(dict.fromkeys(t for s, _ in plan for t, _ in texts[s.path]))
        bar = Bar(len(captions) + len(plan), self.node_id)
        for i, caption in enumerate(captions):
            bar.update(i, f"encoding caption {i + 1} of {len(captions)}")
            with torch.inference_mode():
                self.encoder.text(caption)
        items: list[TrainItem] = []
        for i, (source, picture) in enumerate(plan):
            bar.update(len(captions) + i, f"encoding picture {i + 1} of {len(plan)}: {source.name}")
            items += self._item(source, picture, texts[source.path])
        self._require_some(items)
        bar.update(bar.total, f"{len(items)} items")
        return self._finished(items, plan)

    def _finished(
        self, items: list[TrainItem], plan: Sequence[tuple[Source, Picture]]
    ) -> tuple[TrainDataset, str]:
        dataset, cache = TrainDataset(items, self.job.name), self.encoder.cache
        comfy.model_management.soft_empty_cache()
        if self.folder:
            save_folder_dataset(self.folder, dataset, str(self.job.root), cache.names)
        cache.prune()
        return dataset, self._report(dataset, plan)

    def _require_some(self, found: Sequence[object]) -> None:
        if not found:
            raise AdapterLabError(
                f"Nothing in '{self.job.root.name}' can be used", found="; ".join(self.skipped[:3])
            )

    def _captions(self) -> dict[Path, Texts]:
        """Forms of the caption of each source."""
        config, missing = self.job.captions, list[str]()
        # Regularisation keeps what the class looks like without the word.
        untriggered = replace(config, trigger="")
        texts: dict[Path, Texts] = {}
        for source in self.sources:
            file = caption_file(source.path, config)
            found = read_captions(file, config) if file else [""]
            if file is None and config.missing == "folder name":
                found = [source.label]
            elif file is None and config.missing == "error":
                missing.append(source.name)
            form = untriggered if source.regularisation else config
            texts[source.path] = variants(found, form)
        if missing:
            raise AdapterLabError(
                f"{len(missing)} of {len(self.sources)} files have no caption",
                found=_some(missing, _NAMED),
                expected=f"a file beside each, such as {Path(missing[0]).stem}"
                f"{config.extensions[0]}",
                fix="Write captions, or set 'missing_captions'",
            )
        return texts

    def _planned(self, texts: dict[Path, Texts]) -> list[tuple[Source, Picture]]:
        """What is to be encoded of each source that can be used."""
        plan: list[tuple[Source, Picture]] = []
        seen: dict[Any, str] = {}
        bar = Bar(len(self.sources), self.node_id)
        for i, source in enumerate(self.sources):
            bar.update(i, f"looking at file {i + 1} of {len(self.sources)}: {source.name}")
            try:
                found = self._pictures(source)
            except AdapterLabError as error:
                if self.job.on_unusable == "error":
                    raise error.about(source.name) from error
                self.skipped.append(str(error.about(source.name)))
                continue
            what = (found[0].sha, found[0].mask, tuple(texts[source.path]), source.regularisation)
            first = seen.setdefault(what, source.name)
            if first != source.name:
                self.skipped.append(f"{source.name}: the same as {first}, caption included")
                continue
            plan += [(source, picture) for picture in found]
        return plan

    def _pictures(self, source: Source) -> list[Picture]:
        job, facts = self.job, pictures.facts(source.path)
        size, sha = facts.size, sha256(source.path)
        picture = Picture(source.path, sha, size, self.buckets.plan(*size))
        if job.masks != "off":
            picture = replace(picture, mask=source.mask, use_alpha=job.masks == "files or alpha")
        if facts.frames == 1 and not source.is_clip:
            return [picture]
        if job.frames < 1:
            raise AdapterLabError("clips are passed over", fix="Set 'frames' to learn from them")
        available = -(-facts.frames // job.every)
        length, clips = 1, job.frames
        if self.encoder.is_video:
            length, clips = plans.frames(available, job.frames, self.encoder.ratio), job.clips
        picture = replace(picture, count=length, every=job.every)
        starts = plans.starts(available, length, clips)
        return [replace(picture, first=n * job.every) for n in starts]

    def _item(self, source: Source, picture: Picture, texts: Texts) -> list[TrainItem]:
        """One item with its variants; none if the file turns out to be broken."""
        try:
            return [self._encoded(source, picture, texts)]
        except UnusableError as error:
            if self.job.on_unusable == "error":
                raise error.about(source.name) from error
            self.skipped.append(str(error.about(source.name)))
            return []
        except AdapterLabError as error:
            raise error.about(source.name) from error

    def _encoded(self, source: Source, picture: Picture, texts: Texts) -> TrainItem:
        flips = (False, True) if self.job.flip else (False,)
        with torch.inference_mode():
            masks = [self.encoder.mask(picture, flip) for flip in flips]
            if masks[0] is not None and not bool((masks[0] > 0).any()):
                fix = "White is what counts: invert the mask"
                raise UnusableError("Its mask is black everywhere", fix=fix)
            latents = [self.encoder.latent(picture, flip) for flip in flips]
            conds = [self.encoder.text(text) for text, _ in texts]
        forms = [
            TrainItem(latent, *cond, caption=text, mask=mask, share=share / len(flips),
                      regularisation=source.regularisation)
            for (latent, mask), (cond, (text, share)) in product(
                zip(latents, masks, strict=True), zip(conds, texts, strict=True)
            )
        ]  # fmt: skip
        first = replace(forms[0], share=1.0) if len(forms) == 1 else forms[0]
        return replace(first, variants=tuple(forms[1:]), repeats=source.repeats)

    def _report(self, dataset: TrainDataset, plan: Sequence[tuple[Source, Picture]]) -> str:
        cache = self.encoder.cache
        files = len({source.path for source, _ in plan})
        sizes = Counter(picture.plan.size for _, picture in plan)
        enlarged = sum(picture.plan.scale > 1 for _, picture in plan)
        lines = [
            dataset.to_text(),
            f"from {files} of {len(self.sources)} files in {self.job.root}",
            f"buckets in steps of {self.buckets.step} pixels (width x height):",
            *(f"  {count} x {w} x {h}" for (w, h), count in sorted(sizes.items())),
            f"encoded {cache.made}, {cache.hits} were in the cache",
        ]
        lines += [f"enlarged: {enlarged}"] if enlarged else []
        if self.job.frames and any(picture.count > 1 for _, picture in plan):
            counts = sorted({picture.count for _, picture in plan})
            lines.append(f"frames of a clip: {', '.join(map(str, counts))}")
        if self.skipped:
            lines.append(f"left out {len(self.skipped)}:")
            lines += [f"  {reason}" for reason in self.skipped[:_SHOWN]]
            lines += ["  ..."] if len(self.skipped) > _SHOWN else []
        return "\n".join(lines)


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
