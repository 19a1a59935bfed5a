"""The wheel that `pip install .` makes: the package `adapter_lab`, whole and nothing more."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, as pip would lay it into site-packages."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-I", "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        wheel.extractall(out / "site-packages")
    return out / "site-packages"


def test_holds_every_module_and_no_test(installed: Path) -> None:
    here = {str(file.relative_to(ROOT)) for part in ("core", "nodes", "web", "locales")
            for file in (ROOT / part).rglob("*.*")
            if file.suffix != ".pyc" and file.is_file() and not file.name.startswith(".")}
    package = installed / "adapter_lab"
    there = {str(file.relative_to(package)) for file in package.rglob("*.*") if file.is_file()}
    assert there == here | {"__init__.py"}
    assert len(list(installed.iterdir())) == 2


def test_imports_and_carries_its_licence(installed: Path) -> None:
    code = (f"import sys; sys.path.insert(0, {str(installed)!r}); "
            "import adapter_lab.core.adapters, importlib.metadata as m; "
            "print(adapter_lab.__file__, m.version('adapter-lab'), m.requires('adapter-lab'))")
    # The checkout's finder would answer first; a package index install has none.
    code = code.replace("import adapter_lab", "sys.meta_path.pop(0); import adapter_lab", 1)
    said = subprocess.check_output([sys.executable, "-I", "-c", code], text=True)
    assert said.startswith(str(installed)) and "accelerate" in said
    assert next(installed.glob("*.dist-info/licenses/LICENSE")).is_file()


def test_installs_the_command(installed: Path) -> None:
    """What pip's script of the name calls, found and run as it does."""
    code = (f"import sys; sys.path.insert(0, {str(installed)!r}); sys.meta_path.pop(0); "
            "from importlib.metadata import distribution; "
            "(entry,) = distribution('adapter-lab').entry_points; "
            "sys.argv = [entry.name, '--version']; main = entry.load(); "
            "print(entry.group, sys.modules[main.__module__].__file__, flush=True); "
            "main()")  # fmt: skip
    said = subprocess.check_output([sys.executable, "-I", "-c", code], text=True).split()
    assert said[0] == "console_scripts" and said[1].startswith(str(installed))
    assert said[2:] == ["adapter-lab", "0.1.0"]
