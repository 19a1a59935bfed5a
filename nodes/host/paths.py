"""Where files live, in ComfyUI's own folders."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import folder_paths

import nodes

from ...core.atomic import telling
from ...core.errors import AdapterLabError
from ...core.files import config_beside
from ...core.train.checkpoints import TrainRun

PACK = Path(__file__).resolve().parents[2]
DEMO = PACK / "workflows" / "demo"
_DEMO_MODELS = ("diffusion_models", "vae", "loras")
MODEL_KINDS = ("diffusion_models", "checkpoints")  # of ComfyUI's folders
# What Windows, Linux and macOS refuse in a file name, and what would leave the folder.
LONGEST_NAME = 100  # bytes; a file system takes 255, and we add to it
_DEVICES = r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)"
_FORBIDDEN = re.compile(rf'^$|^\.|[. ]$|[\x00-\x1f<>:"/\\|?*]|^{_DEVICES}', re.IGNORECASE)
_RESERVED = re.compile(_DEVICES, re.IGNORECASE)
_SHOWN = 40  # letters of a bad name in a message


def register_demo_models() -> None:
    """Make the shipped demo model selectable, so that the shipped workflows run as they are."""
    for kind in _DEMO_MODELS:
        if (DEMO / kind).is_dir():
            folder_paths.add_model_folder_path(kind, str(DEMO / kind))


def serve_web_files() -> None:
    """Serve the pack's scripts under a name that can be a URL.

    ComfyUI serves them under the name of the pack's folder, whatever that is, but the server under
    it finds nothing below a name that has to be quoted ("My Pack").
    """
    # ComfyUI's module of this name, which type checkers take for ours.
    served: dict[str, str] = nodes.EXTENSION_WEB_DIRS  # pyright: ignore
    for name, folder in list(served.items()):
        if Path(folder).resolve() == PACK / "web" and quote(name) != name:
            del served[name]
            served[re.sub(r"[^A-Za-z0-9_.-]", "-", name)] = folder


def output(*parts: str) -> Path:
    """A path below ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()).joinpath(*parts)


def input_folder(name: str) -> Path:
    """A folder to read from: a full path, one below ComfyUI's input folder, else the demo's.

    Raises:
        AdapterLabError: a relative path that leaves the input folder.
    """
    base = Path(folder_paths.get_input_directory()).resolve()
    found = (base / Path(name).expanduser()).resolve()
    if not Path(name).expanduser().is_absolute() and not found.is_relative_to(base):
        raise AdapterLabError(
            f"The folder '{name}' is not in ComfyUI's input folder",
            fix="Give its full path",
        )
    demo = DEMO / "images" / name
    return demo if demo.is_dir() and not found.exists() else found


def adapters() -> list[str]:
    """Adapter files a loader can choose from."""
    return folder_paths.get_filename_list("loras")


def adapter_folders() -> list[Path]:
    """Where relative paths of adapter files are looked up: their folders, then that of the runs."""
    known = map(Path, folder_paths.get_folder_paths("loras"))
    return list(dict.fromkeys((output("loras"), *known, output("adapter_lab", "runs"))))


def adapter_path(name: str) -> str:
    """Full path of a listed adapter file.

    Raises:
        AdapterLabError: it is gone.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise AdapterLabError(
            f"There is no adapter file '{name}'",
            expected="a file in models/loras or output/loras",
            fix="Refresh the node definitions (R) and choose again",
        )
    return path


def model_files() -> list[str]:
    """Files of models to choose from; a checkpoint that shares its name goes by its folder too."""
    listed: dict[str, None] = {}
    for kind in MODEL_KINDS:
        for name in folder_paths.get_filename_list(kind):
            listed[f"{kind}/{name}" if name in listed else name] = None
    return list(listed)


def model_path(name: str) -> Path:
    """Full path of a listed model file.

    Raises:
        AdapterLabError: it is gone.
    """
    return _model(name)[1]


def model_kind(name: str) -> str:
    """Of :data:`MODEL_KINDS` the one that a listed model file is of. Raises the same."""
    return _model(name)[0]


def _model(name: str) -> tuple[str, Path]:
    kind, _, rest = name.replace("\\", "/").partition("/")
    spelled = [(kind, rest)] if kind in MODEL_KINDS and rest else []
    for folder, file in (*((k, name) for k in MODEL_KINDS), *spelled):
        path = folder_paths.get_full_path(folder, file)
        if path is not None:
            return folder, Path(path)
    raise AdapterLabError(
        f"There is no model file '{name}'",
        expected="a file in models/diffusion_models or models/checkpoints",
        fix="Refresh the node definitions (R) and choose again",
    )


def stamp(path: str | Path) -> tuple[int, int]:
    """What changes when a file is replaced, so that ComfyUI reads it again."""
    found = Path(path).stat()
    return found.st_mtime_ns, found.st_size


def adapter_stamp(name: str) -> tuple[int, ...]:
    """The same of a listed adapter file and of the config that belongs to it, if any."""
    path = adapter_path(name)
    config = config_beside(path)
    return (*stamp(path), *(stamp(config) if config else ()))


def checked_name(name: str, what: str) -> str:
    """``name`` if it can name a folder of ours.

    Raises:
        AdapterLabError: empty, or it would leave its folder or is no file name somewhere.
    """
    stripped = name.strip()
    if _FORBIDDEN.search(stripped) or len(stripped.encode()) > LONGEST_NAME:
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        raise AdapterLabError(
            f"The {what} '{shown}' cannot name a folder",
            found=_why(stripped),
            expected=f"at most {LONGEST_NAME} letters, digits, spaces, '-', '_' and inner dots",
            fix=f"Change the {what}",
        )
    return stripped


def _why(name: str) -> str:
    """What is wrong with a name, where it is not to be seen."""
    if device := _RESERVED.match(name):
        return f"'{device[1]}', a name that Windows keeps for a device"
    size = len(name.encode())
    return f"{size} bytes" if size > LONGEST_NAME else ""


def run(name: str) -> TrainRun:
    """A training run: its folder, and the shelf in a folder of adapters that loaders list."""
    checked = checked_name(name, "run name")
    return TrainRun(checked, output("adapter_lab", "runs", checked), output("loras", checked))


def runs() -> list[str]:
    """The runs on disk, the one that was saved last first."""
    saved: dict[str, float] = {}
    for folder in output("adapter_lab", "runs").glob("[!.]*"):
        with suppress(OSError):  # renamed just now, by a training that begins anew
            if folder.is_dir():
                saved[folder.name] = folder.stat().st_mtime  # of the last file put in place
    return sorted(saved, key=lambda name: -saved[name])


def dataset_folder(name: str) -> Path:
    """Folder of the user's dataset ``name``, there or not."""
    return output("adapter_lab", "datasets", checked_name(name, "dataset name"))


def new_dataset(name: str) -> Path:
    """Folder for a dataset to save; refuses the names of the demo's, which it would hide."""
    folder = dataset_folder(name)
    if (DEMO / "datasets" / folder.name).exists():
        raise AdapterLabError(
            f"'{folder.name}' is one of the demo's datasets", fix="Choose another"
        )
    return folder


def find_dataset(name: str) -> Path:
    """Folder of an existing dataset: the user's, else the demo's."""
    own = dataset_folder(name)
    demo = DEMO / "datasets" / own.name
    return demo if demo.is_dir() and not own.is_dir() else own


def datasets() -> list[str]:
    """Datasets on disk, the user's first."""
    roots = (output("adapter_lab", "datasets"), DEMO / "datasets")
    found = [sorted(p.parent.name for p in root.glob("[!.]*/dataset.json")) for root in roots]
    return list(dict.fromkeys(name for names in found for name in names))


def calibrations() -> Path:
    """Folder of what sampling runs measured for MagCache, in ComfyUI's user folder."""
    return Path(folder_paths.get_user_directory(), "adapter_lab", "magcache")


def numbered(prefix: str, root: str, suffix: str = ".safetensors") -> Path:
    """A new file ``<output>/<root>/<prefix>_00001_<suffix>``; the number counts up.

    Raises:
        AdapterLabError: the prefix leads out of the folder.
    """
    base = output(root)
    parts = prefix.replace("\\", "/").split("/")
    if any(_FORBIDDEN.search(p) or len(p.encode()) > LONGEST_NAME for p in parts):
        raise AdapterLabError(
            f"The prefix '{prefix}' does not name a file inside {root}",
            expected="a name such as 'my_adapter' or 'styles/my_adapter'",
        )
    with telling(f"Cannot write to '{base}'"):
        folder, name, counter, _, _ = folder_paths.get_save_image_path("/".join(parts), str(base))
    while (path := Path(folder) / f"{name}_{counter:05}_{suffix}").exists():
        counter += 1
    return path
