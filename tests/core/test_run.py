"""`tests/run.py` says what passed, and never passes by running nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1]
PASSES, FAILS = "def test_one(): pass\n", "def test_two(): assert False\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a test that passes in core, one that fails in host, and none in web."""
    for name in ("run.py", "comfyui.py", "provision.py"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        shutil.copy(SCRIPTS / name, tmp_path / "tests")
    for part, test in (("core", PASSES), ("host", FAILS), ("web", "")):
        (tmp_path / "tests" / part).mkdir()
        (tmp_path / "tests" / part / f"test_{part}.py").write_text(test, "utf-8")
    return tmp_path


def run(checkout: Path, *arguments: str, path: str = "") -> tuple[int, str, str]:
    """Exit code, output and progress, with this Python in place of a prepared one."""
    code = (f"import os, sys; sys.path.insert(0, 'tests'); os.environ['PATH'] = {path!r}\n"
            "import comfyui, run; from pathlib import Path\n"
            "comfyui.prepare = lambda: (Path(sys.executable), Path('.'))\n"
            "if os.environ['PATH']: run.find_chromium = lambda: 'chromium'\n"
            "sys.exit(run.main())")
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=checkout, text=True,
                          capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_passing_part(checkout: Path) -> None:
    code, out, _ = run(checkout, "--core", "-q")
    assert code == 0 and "core   passed" in out and "1 passed in" in out.splitlines()[-2]


def test_failing_part_fails_the_run(checkout: Path) -> None:
    code, out, _ = run(checkout, "--core", "--host")
    assert code == 1 and "host   failed" in out and "1 failed in" in out.splitlines()[-2]
    assert out.splitlines()[-1].startswith("FAILED: host")


def test_part_without_tests_fails(checkout: Path) -> None:
    code, out, _ = run(checkout, "--web", path="x")
    assert code == 1 and "no test was selected" in out


def test_narrowing_may_leave_parts_empty_but_not_all(checkout: Path) -> None:
    code, out, _ = run(checkout, "--core", "--host", "-k", "one")
    assert code == 0 and "host   none" in out
    assert run(checkout, "--core", "--host", "-k", "three")[0] == 1


def test_paths_choose_their_part(checkout: Path) -> None:
    code, out, _ = run(checkout, "tests/core/test_core.py::test_one")
    assert code == 0 and "core   passed" in out and "host" not in out


def test_without_chromium_web_is_skipped_loudly(checkout: Path) -> None:
    code, out, err = run(checkout, "--core", "--web")
    assert code == 0 and "WEB TESTS SKIPPED" in err and "SKIPPED: web" in out.splitlines()[-1]
