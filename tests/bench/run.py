"""Measures this pack beside its peers: ``python3 tests/bench/run.py [NAME ...]``.

Prints one JSON object a line. Ours and the peer's are run in turns in one process, so that both
see the same machine; the figure is the median, the ratio that of the medians.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """Run the benches ``names``, or all, in the prepared environment."""
    if importlib.util.find_spec("adapter_lab") is None:
        prepared = subprocess.check_output([sys.executable, str(HERE.parent / "comfyui.py")])
        python, comfyui = prepared.decode().splitlines()
        os.environ["ADAPTER_LAB_COMFYUI"] = comfyui
        return subprocess.call([python, __file__, *names])
    sys.path[:0] = [str(HERE), str(HERE.parent / "host")]
    import loading
    import loop
    import matching
    import merging
    import steps
    import training
    from pairs import measure

    benches = {
        **training.BENCHES, **loading.BENCHES, **merging.BENCHES, **matching.BENCHES,
        **steps.BENCHES, **loop.BENCHES,
    }  # fmt: skip
    if unknown := set(names) - set(benches):
        sys.stderr.write(f"No bench {', '.join(unknown)}; there are {', '.join(benches)}\n")
        return 2
    for name in names or benches:
        benches[name](lambda *args, name=name: measure(name, *args))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
