"""What an extraction comes to in sum."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field

from ..archs import ArchSpec
from ..errors import AdapterLabError
from .fits import Fit
from .metadata import network_metadata
from .model_pair import Models
from .outcome import Outcome, mebibytes

_NETWORKS: dict[str, dict[str, str]] = {
    "dora": {"algo": "lora", "dora_wd": "True"}, "lokr": {"algo": "lokr"}, "full": {"algo": "full"},
}  # fmt: skip
_REASONS = 6  # that are counted in a report, the most frequent first


@dataclass
class Tally:
    """Sums over the modules.

    Attributes:
        source: what was extracted. changed: sum of ||D||^2, missed: of ||D - dW||^2. same:
            parameters that are alike. size: bytes of the result.
    """

    source: str
    changed: float = 0.0
    missed: float = 0.0
    same: int = 0
    size: int = 0
    ranks: list[int] = field(default_factory=list[int])
    alphas: list[float] = field(default_factory=list[float])

    def add(self, fit: Fit) -> None:
        """Count one parameter of the result."""
        self.missed += fit.rest**2
        self.size += fit.size
        if fit.rank:
            self.ranks.append(fit.rank)
            self.alphas.append(float(fit.tensors["alpha"]))

    def conclude(self, outcome: Outcome, models: Models) -> None:
        """Verdict and facts.

        Raises:
            AdapterLabError: nothing has been extracted.
        """
        reasons = Counter(outcome.left_out.values()).most_common(_REASONS)
        if not outcome.rows:
            raise self._nothing(reasons)
        share = self.missed / self.changed
        made = Counter(row.made for row in outcome.rows.values())
        parts = ", ".join(f"{count} {name}" for name, count in made.most_common())
        outcome.verdict = f"extracted {parts}: {1 - share:.2%} of the squared change"
        spec = models.spec
        facts = [
            ("architecture", spec.title if spec else "unknown, the names are those of the file"),
            ("relative error of all", f"{math.sqrt(share):.2%}"),
        ]
        if self.ranks:
            facts.append(("ranks", f"{min(self.ranks)} to {max(self.ranks)}"))
        facts.append(("size", mebibytes(self.size)))
        if self.same:
            facts.append(("unchanged", f"{self.same} parameters"))
        facts += [("left out", f"{count}: {reason}") for reason, count in reasons]
        if others := len(models.tuned.other):
            facts.append(("not compared", f"{others} tensors of a VAE or other parts"))
        outcome.facts = facts
        if models.base.quantised or models.tuned.quantised:
            said = "A model is quantised: its rounding is part of the difference"
            outcome.warnings.append(said)

    def metadata(self, spec: ArchSpec | None, algorithm: str) -> dict[str, str]:
        """Of the result, in sd-scripts' words."""
        found = {"ss_v2": "False", "ss_training_comment": f"extracted: {self.source}"}
        if spec and spec.base_versions:
            found["ss_base_model_version"] = spec.base_versions[0]
        if spec and spec.modelspec:
            found["modelspec.architecture"] = f"{spec.modelspec[0]}/lora"
        found = network_metadata(found, self.ranks, self.alphas)
        if algorithm in _NETWORKS:
            found["ss_network_module"] = "lycoris.kohya"
            found["ss_network_args"] = json.dumps(_NETWORKS[algorithm])
        return found

    def _nothing(self, reasons: list[tuple[str, int]]) -> AdapterLabError:
        found = "; ".join(f"{count} left out: {reason}" for reason, count in reasons)
        if not self.changed:
            return AdapterLabError(
                "The two models do not differ", found=found or f"{self.same} equal parameters",
                expected="a model and its fine-tune",
            )  # fmt: skip
        return AdapterLabError(
            "All that differs is left out", found=found,
            fix="Set min_change to 0 to keep rounding too, and others to keep",
        )  # fmt: skip
