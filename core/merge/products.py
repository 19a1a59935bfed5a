"""The average of what checkpoints do to the weights, in place of that of their factors.

    dW = sum_i w_i s B_i A_i        and not        s (sum_i w_i B_i) (sum_i w_i A_i)

The first is what an average of whole weights would be. It is factored anew at the rank that the
product has in one file; what that loses is told for each module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..adapters import Algorithm
from ..adapters.loha import LoHa
from ..adapters.lokr import LoKr
from ..adapters.lora import UP_BIAS, LoRA
from ..errors import AdapterLabError
from ..lazy import AdapterFile
from ..streams import PathLike
from .agree import out_dtype
from .ema import Average, require_other, require_unchanged
from .factors import lora_of, pairs, spectrum_of
from .job import Job
from .kept import stays
from .mean import Mean
from .metadata import network_metadata
from .modules import Module, Source
from .outcome import Row
from .ranks import RankRule

_KINDS = (LoRA, LoHa, LoKr)


class ProductAverage(Average):
    """As :class:`Average`, of the products: modules of LoRA, LoHa and LoKr become LoRA, of the rank
    of one product: r, r^2, and that of W1 by that of W2.

    The factors of others are averaged: a whole difference is its own product, of rotations and
    DoRA no sum of products is one, and of full rank LoHa and LoKr are smaller than any LoRA.
    """

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of the result, module by module, then what belongs to none."""
        files, made = self.plan.files, set[str]()
        ranks: list[int] = []
        alphas: list[float] = []
        with ExitStack() as stack:
            opened = [stack.enter_context(AdapterFile(c.path)) for c in files]
            sources = [Source(file) for file in opened]
            mean = stack.enter_context(self.opened())
            for done, name in enumerate(sources[0].stems):
                self.tick(done, len(sources[0].stems), f"averaging {name}")
                if sources[0].stems[name].foreign:
                    self.outcome.rows[name] = Row("unknown", note="its tensors are averaged")
                    continue
                first = sources[0].module(name)
                terms = [first.weight, *(s.module(name).weight for s in sources[1:])]
                known = [a for a in terms if isinstance(a, _KINDS) and a.scale]
                rank = 0 if len(known) < len(files) or stays(first) else _rank(known[0])
                if not rank:
                    if first.weight is not None:
                        self.outcome.rows[name] = Row(first.weight.title, note=_as_it_is(first))
                    continue
                owned = [key for suffix, key in first.stem.keys.items() if suffix != UP_BIAS
                         and (known[0].owns(suffix) or suffix in ("alpha", "scalar"))]  # fmt: skip
                made |= {*owned, sources[0].key(name, "alpha")}
                factors = self._refactored(name, known, rank, self._dtype(owned, mean))
                ranks.append(factors["lora_down.weight"].shape[0])
                alphas.append(float(factors["alpha"]))
                for suffix, tensor in factors.items():
                    yield sources[0].key(name, suffix), tensor
            rest = [key for key in files[0].header.tensors if key not in made]
            yield from ((key, mean.tensor(key)) for key in rest)
        untold = {key: t for key, t in self.alphas.items() if key not in made}
        yield from untold.items()
        require_unchanged(files)
        self.describe(network_metadata(self.metadata, ranks, alphas))
        self.outcome.verdict = (
            f"The products of {len(ranks)} modules of {len(files)} files are averaged and factored "
            f"anew, the largest error is {self.outcome.error:.2%}"
        )

    def write(self, path: PathLike, *, overwrite: bool = False) -> dict[str, str]:
        """As :meth:`Average.write`."""
        require_other(path, self.plan.files)
        return Job.write(self, path, overwrite=overwrite)

    def _refactored(
        self, name: str, terms: Sequence[Algorithm], rank: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """LoRA tensors by suffix, of the same scale where the files hold LoRA."""
        first, weights = terms[0], (float(w) for w in self.plan.weights)
        found = spectrum_of(
            list(zip(terms, weights, strict=True)), RankRule("fixed", 0, rank, rank), first.shape
        )
        rank = min(rank, len(found.s))
        self.outcome.rows[name] = Row("LoRA", rank, found.error(rank))
        alpha = first.scale * rank if isinstance(first, LoRA) else None
        try:
            return lora_of(found, rank, first.shape, dtype, alpha)
        except AdapterLabError as error:
            raise error.about(f"module '{name}'") from error

    def _dtype(self, keys: list[str], mean: Mean) -> torch.dtype:
        """The widest of a module's factors; scalars do not count."""
        infos = [r.header.tensors[key] for r in mean.readers for key in keys]
        return out_dtype([info for info in infos if info.shape] or infos)


def _rank(algorithm: Algorithm) -> int:
    """Of dW; 0 where it has no thin factors."""
    return sum(up.shape[1] for up, _ in pairs(algorithm) or ())


def _as_it_is(module: Module) -> str:
    traits = sorted(module.weight.traits) if module.weight else []
    return ", ".join(filter(None, ("its factors are averaged", stays(module), *traits)))
