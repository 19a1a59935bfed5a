"""Quantising a model file, beside musubi-tuner's quantiser and beside what any tool must do.

33 weights of 3072 x 3072 in bf16, 594 MiB, named as in Wan, in the page cache. Ours hashes the
file, measures every layer, reads parts of the result back and has it on the disk in the end;
musubi-tuner does none of this, and is given its own writer. Rows are compared with its fp8 of one
scale a row, as it has no int8.
"""

from __future__ import annotations

from collections.abc import Callable

import workfiles as files
from adapter_lab.core.merge.menus import NUMBERS
from workbench import Case, musubi, plain

LARGE, SMALL = files.attention(9, 3072)[:33], files.attention(2, 256)
PAIRS = 5


def _case(form: str, peer: str) -> Case:
    def make(shapes: files.Shapes) -> dict[str, str]:
        return {"model": str(files.model(shapes)), "form": form}

    child = musubi if peer.startswith("musubi") else plain
    return Case("quantize", child, peer, make, LARGE, SMALL, PAIRS)


MODES = {"fp8_e4m3": "tensor", "int8_row": "channel", "int8_convrot": "channel"}
BENCHES: dict[str, Callable[..., None]] = {}
for _form in NUMBERS:
    _floor = _case(_form, "read, cast, write")
    BENCHES[f"quantise_{_form}_floor"] = _floor.time
    if _form in MODES:
        _peer = _case(_form, f"musubi-tuner fp8, {MODES[_form]}")
        BENCHES |= {f"quantise_{_form}": _peer.time, f"quantise_{_form}_memory": _peer.memory}
    else:
        BENCHES[f"quantise_{_form}_memory"] = _floor.memory
