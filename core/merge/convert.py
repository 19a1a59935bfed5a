"""Adapters in another key format."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..archs import ARCHITECTURES, ArchSpec
from ..atomic import replacing, telling, write_all
from ..errors import AdapterLabError
from ..keys.convert import Conversion, kept_metadata
from ..keys.dialect import loaded
from ..keys.places import find_specs
from ..keys.stems import EMBEDDING, Stem
from ..keys.writer import Piece
from ..streams import PathLike
from .approximate import Approximation
from .factors import cast
from .job import Job
from .menus import INEXACT, Inexact
from .metadata import network_metadata
from .modules import Source, Tick, quiet
from .outcome import Row

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Convert(Job):
    """An adapter's modules by the names of another format: what they do stays the same.

    Modules of fused weights are cut and joined where the format's tools have other ones, and the
    scale goes where their readers look for it; see :func:`core.keys.convert.convert`.

    Args:
        adapter: tensors by key, or an open file, of which one weight's modules are read at a time.
        form: id of the format. architecture: found out from the file by default.
        dtype: of the factors, None: as they are.
        inexact: what becomes of modules that can't be cut or joined exactly. svd: a LoRA that
            comes near, where the model's weights aren't needed for it. keep: they keep their
            name in the other family. error: they are refused. Where the format's readers know
            both names they are always kept, which is exact.
        rank: of such a LoRA, 0: see :class:`.approximate.Approximation`.

    Raises:
        AdapterLabError: as :func:`core.keys.convert.convert`.
    """

    signs = False  # another spelling of what somebody trained

    def __init__(
        self, adapter: Mapping[str, Tensor], form: str, *,
        architecture: str | ArchSpec | None = None, dtype: torch.dtype | None = None,
        inexact: Inexact = "svd", rank: int = 0, seed: int = 0, tick: Tick = quiet,
    ) -> None:  # fmt: skip
        if inexact not in INEXACT:
            known = ", ".join(INEXACT)
            raise AdapterLabError("Unknown choice for inexact", found=inexact, expected=known)
        if not adapter:
            raise AdapterLabError("The adapter is empty", found="no tensors")
        self._source = Source(adapter)
        spec = architecture.id if isinstance(architecture, ArchSpec) else architecture
        approximate = Approximation(rank, seed) if inexact == "svd" else None
        self._plan = Conversion(self._source.shell, form, spec, approximate)
        super().__init__(kept_metadata(self._source.shell.metadata, self._plan.form), tick)
        self._dtype, self._inexact = dtype, inexact
        self._doubt(spec)
        self._counts: Counter[str] = Counter()
        self._ranks: list[tuple[int, float] | None] = []

    def _doubt(self, asked: str | None) -> None:
        """Warn where names and sizes are those of other architectures than the one asked for."""
        likely = find_specs(self._source.stems.values(), self._source.shell.metadata)
        if asked and likely and asked not in {spec.id for spec in likely}:
            self.outcome.warnings.append(
                f"The names are those of {likely[0].title}, not of {ARCHITECTURES[asked].title}"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        groups = self._plan.groups
        for done, group in enumerate(groups):
            self.tick(done, len(groups), f"converting {group[0]}")
            stems = [self._widened(self._source.stem(name)) for name in group]
            pieces = list(self._plan.pieces(stems))
            del stems
            self._note(group, pieces)
            while pieces:
                for key, tensor in self._plan.named(pieces.pop(0)).items():
                    factor = tensor.is_floating_point() and tensor.numel() > 1
                    yield key, cast(tensor, self._dtype or tensor.dtype, key) if factor else tensor
        for key in self._source.adapter:
            if key.startswith(EMBEDDING):
                yield key, self._source.adapter[key]
        self._conclude()

    def write(self, path: PathLike, *, overwrite: bool = False) -> dict[str, str]:
        """Also writes the config that peft needs beside its file.

        Raises:
            AdapterLabError: as :meth:`Job.write`; a config is there and not of a file to replace.
        """
        beside = os.path.join(os.path.dirname(os.path.realpath(path)), PEFT_CONFIG)
        peft = self._plan.form.id == "peft"
        own = overwrite and os.path.exists(path)
        if peft and os.path.exists(beside) and not own:
            fix = "Choose another folder."
            raise AdapterLabError(f"Cannot write '{beside}': it exists already", fix=fix)
        written = super().write(path, overwrite=overwrite)
        if self.config is not None:
            with (
                replacing(beside, overwrite=own) as file,
                telling(f"Cannot write '{beside}'"),
            ):
                write_all(file, json.dumps(self.config, indent=2).encode())
            if os.path.basename(path) != PEFT_FILE:
                text = f"peft opens the folder of a file only if it is called {PEFT_FILE}"
                self.outcome.warnings.append(text)
        return written

    def _widened(self, stem: Stem) -> Stem:
        """In float32 where it will be cast, so that it is rounded once."""
        if self._dtype is None:
            return stem
        tensors = {
            name: t.float() if t.is_floating_point() and t.dtype != self._dtype else t
            for name, t in stem.tensors.items()
        }
        return replace(stem, tensors=tensors)

    def _note(self, group: list[str], pieces: list[Piece]) -> None:
        """Count what became of one weight's modules."""
        self._counts["read"] += len(group)
        self._counts["written"] += len(pieces)
        for piece in pieces:
            algorithm = loaded(piece.tensors)
            self._counts[f"as {algorithm.title if algorithm else 'bias'}"] += 1
            lora = algorithm if algorithm is not None and algorithm.name == "lora" else None
            self._ranks.append((lora.rank, lora.alpha) if lora else None)
            made = "svd" if piece.error is not None else piece.how
            self._counts[made] += 1
            title = algorithm.title if algorithm else "bias"
            if made == "svd":
                rank, note = lora.rank if lora else None, f"{piece.how or 'made anew'} by SVD"
                row = Row(title, rank, piece.error, note)
                self.outcome.rows[f"{piece.stem} -> {piece.place.path}"] = row
            elif made == "kept":
                self._keep(piece, title)
        if any(piece.how == "cut" and piece.error is None for piece in pieces):
            self._counts["cut whole"] += 1

    def _keep(self, piece: Piece, title: str) -> None:
        form, spec = self._plan.form, self._plan.spec
        both = spec is not None and spec.id in form.mixed
        if self._inexact == "error" and not both:
            raise AdapterLabError(
                f"'{piece.stem}' has no exact form with {form.title} keys", found=title,
                fix="Choose svd or keep for what is inexact",
            )  # fmt: skip
        who = form.title if both else "Adapter Lab"
        self.outcome.rows[piece.stem] = Row(title, note=f"keeps its name, which {who} reads")
        self._counts["kept read" if both else "kept alone"] += 1

    def _conclude(self) -> None:
        counts, outcome, form = self._counts, self.outcome, self._plan.form
        changed = counts["joined"] or counts["svd"]
        self.config, told = self._plan.settings()
        if changed and self.metadata.get("ss_network_dim") and all(self._ranks):
            known = [found for found in self._ranks if found]
            made = network_metadata(self.metadata, [r for r, _ in known], [a for _, a in known])
            self.describe(made)
        self.metadata.update(told)
        spec = self._plan.spec
        outcome.verdict = (
            f"{counts['read']} modules -> {counts['written']} with {form.title} keys"
            f"{f', for {spec.title}' if spec else ''}"
        )
        kinds = [(k.removeprefix("as "), n) for k, n in counts.items() if k.startswith("as ")]
        outcome.facts.append(("written", ", ".join(f"{n} {title}" for title, n in kinds)))
        if counts["cut"]:
            text = f"{counts['cut whole']} modules into {counts['cut']}, exactly"
            outcome.facts.append(("cut", text))
        if counts["joined"]:
            outcome.facts.append(("joined", f"{counts['joined']} modules, exactly"))
        if counts["svd"]:
            text = f"{counts['svd']} modules, largest error {outcome.error:.2%}"
            outcome.facts.append(("made anew by SVD", text))
        if counts["kept read"]:
            text = f"{counts['kept read']} modules, exactly; {form.title} reads both"
            outcome.facts.append(("under other names", text))
        self._warn()

    def _warn(self) -> None:
        form, counts = self._plan.form, self._counts
        if counts["kept alone"]:
            self.outcome.warnings.append(
                f"{counts['kept alone']} modules keep names of another family, which {form.title} "
                "itself may not read: they can't be cut or joined without the model's weights"
            )
        self.outcome.warnings += self._plan.warnings()
