"""Trains, kills what trains at random points, resumes, and compares with a run left alone.

    python killing.py CHECKPOINT OUTPUT SEED

Each training is a process of its own, forked from this one, which has no threads: nothing but the
files of the run goes from one to the next. Prints a JSON object: optimizer -> what was found.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKPOINT, OUTPUT, SEED = sys.argv[1:4]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, os.environ["ADAPTER_LAB_COMFYUI"])
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import samples  # noqa: E402
import torch  # noqa: E402
from adapter_lab.core.adapters import AdapterConfig  # noqa: E402
from adapter_lab.core.files import read_adapter  # noqa: E402
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig  # noqa: E402
from adapter_lab.core.train.data import TrainDataset, TrainItem  # noqa: E402
from adapter_lab.core.train.record import read_metrics  # noqa: E402
from adapter_lab.core.train.targets import Targets  # noqa: E402
from adapter_lab.nodes.host import paths, trainer  # noqa: E402
from adapter_lab.nodes.host.job import Job  # noqa: E402

STEPS, KILLS = 11, 2
DELAY = 0.03  # seconds: a step takes about as long
OPTIMIZERS = {"AdamW": 1e-2, "Adafactor": 1e-2, "Prodigy": 1.0, "ScheduleFreeAdamW": 1e-2}


def train(name: str, optimizer: str) -> None:
    """A run with everything that is random or has a state of its own."""
    rng = torch.Generator().manual_seed(1)
    first = samples.items("flux", 5)
    sizes = ((16, 8, 8), (16, 8, 8), (16, 8, 10), (16, 8, 10), (16, 8, 10))
    items = [
        TrainItem(torch.randn(size, generator=rng), item.cond, item.extra, item.caption)
        for item, size in zip(first, sizes, strict=True)
    ]
    with torch.inference_mode():
        job = Job(
            comfy.sd.load_diffusion_model(CHECKPOINT),
            TrainDataset(items),
            paths.run(name),
            TrainConfig(STEPS, batch_size=2, accumulation=2, seed=5, save_every=3),
            adapter=AdapterConfig("lora", 4, 4.0, dropout=0.1, rank_dropout=0.1,
                                  module_dropout=0.2, dora=optimizer == "AdamW"),
            targets=Targets("everything", (".*",), (".*qkv", ".*linear1")),
            optimizer=OptimizerConfig(optimizer, OPTIMIZERS[optimizer], warmup=3,
                                      schedule="cosine" if optimizer == "AdamW" else "constant"),
        )  # fmt: skip
        trainer.Trainer(job).run()


def forked(work: Callable[[], None]) -> int:
    """Start ``work`` as a process; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()  # nobody else will
        sys.stderr.flush()
        os._exit(code)


def done(name: str) -> int:
    """The last step that the run wrote down."""
    return max((row["step"] for row in read_metrics(paths.run(name).metrics)), default=0)


def killed(child: int, name: str, step: int, delay: float) -> bool:
    """Kill ``child`` ``delay`` seconds after its step ``step``; whether it was still at work."""
    while done(name) < step:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def same(one: Path, other: Path) -> bool:
    a, b = read_adapter(one), read_adapter(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def compare(whole: Any, other: Any) -> dict[str, bool]:
    """What of two runs is the same to the bit."""
    files = [run.checkpoints() for run in (whole, other)]
    emas = [[p for _, c in found for p in run.averages(c)] for run, found in
            zip((whole, other), files, strict=True)]  # fmt: skip
    rows = [[(r["step"], r["loss"], r["norm"], r["t"]) for r in read_metrics(run.metrics)]
            for run in (whole, other)]  # fmt: skip
    steps = [[step for step, _ in found] for found in files]
    pairs = list(zip(*([path for _, path in found] for found in files), strict=True))
    return {
        "steps": steps[0] == steps[1] == [3, 6, 9, STEPS],
        "checkpoints": all(same(a, b) for a, b in pairs),
        "averages": len(emas[0]) == 8 and all(same(a, b) for a, b in zip(*emas, strict=True)),
        "state": same(whole.state, other.state),
        "metrics": rows[0] == rows[1] and [row[0] for row in rows[0]] == list(range(1, STEPS + 1)),
    }


def main() -> None:
    folder_paths.set_output_directory(OUTPUT)
    chance = random.Random(int(SEED))
    found: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        whole, name = f"whole {optimizer}", f"killed {optimizer}"
        failed = os.waitpid(forked(lambda o=optimizer, n=whole: train(n, o)), 0)[1]
        kills = 0
        for _ in range(KILLS):
            low, high = done(name) + 1, STEPS - 1 if kills else STEPS // 2
            step = chance.randint(low, max(low, high))
            child = forked(lambda o=optimizer, n=name: train(n, o))
            kills += killed(child, name, step, chance.random() * DELAY)
        failed |= os.waitpid(forked(lambda o=optimizer, n=name: train(n, o)), 0)[1]
        result = {} if failed else compare(paths.run(whole), paths.run(name))
        found[optimizer] = {"failed": failed, "kills": kills, **result}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
