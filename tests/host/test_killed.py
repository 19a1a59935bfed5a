"""Resume is exact, whatever ended the process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path


def test_killed_runs_go_on_as_if_nothing_had_been(checkpoints, tmp_path):
    """SIGKILL at random points of real runs: dropout, accumulation, two sizes of latents, averages;
    factors, averages, optimizer state and metrics are bitwise those of runs that nobody killed."""
    seed = random.randrange(1 << 30)
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, script, checkpoints("flux"), tmp_path / "output", str(seed)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for optimizer, found in json.loads(done.stdout.splitlines()[-1]).items():
        said = f"{optimizer}, seed {seed}: {found}\n{done.stderr[-2000:]}"
        assert not found.pop("failed"), said
        assert found.pop("kills") == 2, said
        assert all(found.values()), said
