"""Measures this pack beside its peers: ``python3 tests/bench/run.py [NAME ...]``.

Prints one JSON object a line. Ours and the peer's are run in turns, so that both see the same
machine; the figure is the median, the ratio that of the medians. sd-scripts and musubi-tuner are
taken from the checkouts that BENCH_SD_SCRIPTS and BENCH_MUSUBI name, what they import in vain
here from PYTHONPATH; without them their lines say so. What takes minutes is run when it is named.
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
    import caching
    import caching_costs
    import importing
    import loading
    import loop
    import matching
    import merging
    import quant_loading
    import quant_table
    import quantising
    import steps
    import training
    import workbench
    from pairs import measure, say
    from processes import Missing

    benches = {
        **training.BENCHES, **loading.BENCHES, **merging.BENCHES, **matching.BENCHES,
        **steps.BENCHES, **loop.BENCHES, **workbench.BENCHES, **importing.BENCHES,
        **caching.BENCHES, **caching_costs.BENCHES, **quantising.BENCHES, **quant_table.BENCHES,
        **quant_loading.BENCHES,
    }  # fmt: skip
    if unknown := set(names) - set(benches):
        sys.stderr.write(f"No bench {', '.join(unknown)}; there are {', '.join(benches)}\n")
        return 2
    long = workbench.LONG | caching.LONG | quant_loading.LONG
    for name in names or [name for name in benches if name not in long]:
        try:
            benches[name](lambda *args, name=name: measure(name, *args))
        except Missing as missing:
            say({"name": name, "left out": str(missing)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
