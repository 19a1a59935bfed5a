"""Runs lint, types and every test; `--core`, `--host`, `--web`, `--bench`, `--lint` narrow it.

Further arguments go to pytest. Needs nothing but Python: the rest is prepared by `comfyui.py`.
Benchmarks run when they are asked for.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import comfyui
import provision
from provision import say

CHECKOUT = comfyui.CHECKOUT
TESTED = ("core", "host", "web")
PARTS = ("lint", *TESTED, "bench")
NOTHING_COLLECTED = 5
CLOSING = re.compile(r"=* ?((?:\d+ \w+,? ?)+ in .*?s)\b|=* ?(no tests ran.*?s)\b")


@dataclass
class Outcome:
    part: str
    state: str
    detail: str
    seconds: float


class Run:
    def __init__(self, python: Path, home: Path, arguments: list[str]) -> None:
        self.python, self.home, self.arguments = python, home, arguments
        self.named = {part: self.paths(part) for part in TESTED}

    def paths(self, part: str) -> list[str]:
        """Those of the arguments for pytest that are paths into this part's tests."""
        folder = CHECKOUT / "tests" / part
        files = [(a, Path(a.split("::")[0]).absolute()) for a in self.arguments if a[:1] != "-"]
        return [a for a, path in files if path.exists() and folder in (path, *path.parents)]

    def part(self, part: str) -> Outcome:
        sys.stdout.write(f"\n===== {part} =====\n")
        sys.stdout.flush()
        start = time.monotonic()
        state, detail = getattr(self, part)()
        return Outcome(part, state, detail, time.monotonic() - start)

    def lint(self) -> tuple[str, str]:
        """ruff, then pyright, which looks ComfyUI's modules up where the nodes will find them."""
        ruff = self.call("-m", "ruff", "check", ".")[0]
        pyright = self.call("-m", "pyright", "--pythonpath", str(self.python),
                            PYTHONPATH=str(self.home), PYRIGHT_PYTHON_IGNORE_WARNINGS="1")[0]
        said = ", ".join(f"{name} {'found something' if code else 'clean'}"
                         for name, code in (("ruff", ruff), ("pyright", pyright)))
        return ("failed" if ruff or pyright else "passed"), said

    def core(self) -> tuple[str, str]:
        return self.pytest("core", **self.side_by_side("loadfile"))

    def host(self) -> tuple[str, str]:
        return self.pytest("host", ADAPTER_LAB_COMFYUI=str(self.home),
                           **self.side_by_side("loadfile"))

    @staticmethod
    def side_by_side(spread: str) -> dict[str, str]:
        """Tests spread over the processors: files, or the groups that tests are marked with."""
        workers = min(4, os.cpu_count() or 1)
        options = f"{os.environ.get('PYTEST_ADDOPTS', '')} -n {workers} --dist {spread}"
        return {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": options}

    def web(self) -> tuple[str, str]:
        browser = find_chromium()
        if not browser:
            say("WEB TESTS SKIPPED: no chromium on this machine, and it could not be installed. "
                "Install it (Debian: apt-get install chromium) to run them.")
            return "SKIPPED", "no chromium"
        return self.pytest("web", ADAPTER_LAB_COMFYUI=str(self.home),
                           ADAPTER_LAB_CHROMIUM=browser, **self.side_by_side("loadgroup"))

    def bench(self) -> tuple[str, str]:
        code, _ = self.call("tests/bench/run.py", ADAPTER_LAB_COMFYUI=str(self.home))
        return ("failed" if code else "passed"), f"exit code {code}"

    def pytest(self, part: str, **variables: str) -> tuple[str, str]:
        every = {path for paths in self.named.values() for path in paths}
        others = [argument for argument in self.arguments if argument not in every]
        targets = self.named[part] or [f"tests/{part}"]
        # -I keeps the checkout off the path, where its `nodes` would hide ComfyUI's.
        code, lines = self.call("-I", "-m", "pytest", *targets, *others, **variables)
        closing = [m for line in lines[-5:] if (m := CLOSING.search(line))]
        detail = (closing[-1][1] or closing[-1][2]) if closing else f"exit code {code}"
        if code == NOTHING_COLLECTED:
            return ("none" if self.arguments else "failed"), "no test was selected"
        return ("failed" if code else "passed"), detail

    def call(self, *arguments: str, **variables: str) -> tuple[int, list[str]]:
        """Exit code and last lines of a command of the prepared Python; its output is shown."""
        colour = {"FORCE_COLOR": "1"} if sys.stdout.isatty() else {}
        process = subprocess.Popen([str(self.python), *arguments], cwd=CHECKOUT, text=True,
                                   errors="replace", stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, env=os.environ | colour | variables)
        lines: list[str] = []
        try:
            for line in process.stdout or ():
                sys.stdout.write(line)
                sys.stdout.flush()
                lines = [*lines[-9:], re.sub(r"\x1b\[[\d;]*m", "", line)]
        finally:
            if process.poll() is None and sys.exc_info()[0]:
                process.terminate()
            process.wait()
        return process.returncode, lines


def find_chromium() -> str | None:
    """Path of a Chromium, installed from Debian's archive if that is possible and needed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found or not shutil.which("apt-get") or os.name == "nt" or os.geteuid() != 0:
        return found
    say("installing Debian's chromium for the browser tests")
    # Without any font, pages are laid out as if they had no text.
    packages = ["chromium", "fonts-dejavu-core"]
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], install):
        subprocess.run(command, stdout=sys.stderr, check=False,
                       env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    return shutil.which("chromium")


def summary(outcomes: list[Outcome]) -> int:
    sys.stdout.write("\n===== summary =====\n")
    for one in outcomes:
        sys.stdout.write(f"{one.part:6} {one.state:8} {one.seconds:6.0f} s   {one.detail}\n")
    failed = [one.part for one in outcomes if one.state == "failed"]
    if all(one.state == "none" for one in outcomes):
        failed.append("no test was selected")
    total = sum(one.seconds for one in outcomes)
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all passed"
    skipped = [one.part for one in outcomes if one.state == "SKIPPED"]
    verdict += f" (SKIPPED: {', '.join(skipped)})" if skipped else ""
    sys.stdout.write(f"{verdict}, {total:.0f} s in all\n")
    return 1 if failed else 0


def main() -> int:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true")
    options, rest = parser.parse_known_args()
    run = Run(*comfyui.prepare(), rest)
    asked = [part for part in PARTS if getattr(options, part) or run.named.get(part)]
    chosen = asked or (list(TESTED) if rest else ["lint", *TESTED])
    return summary([run.part(part) for part in chosen])


if __name__ == "__main__":
    sys.exit(provision.run(main))
