"""Datasets on disk: a folder of two files.

``data.safetensors`` holds tensors, ``dataset.json`` says what they are::

    {"format": "adapter-lab-dataset", "version": 1, "items": [
        {"caption": "a red star", "weight": 1.0, "latent": "0.latent", "mask": null,
         "cond": "0.cond", "extra": {"pooled_output": {"$tensor": "0.extra.pooled_output"}}}]}

Tensors are referred to by name, so that items may share them. An item may also have ``repeats``,
``regularisation``, ``share`` and ``variants`` (a list of such items).

A dataset that was made from a folder of pictures has an ``origin`` and no tensors of its own: its
names are ``cache/<key>.safetensors|<name>``, so that nothing is stored twice and an update of it
writes only what changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..atomic import replacing, telling, write_all
from ..errors import AdapterLabError
from ..files import Adapter, write_adapter
from .cache import FOLDER
from .data import TrainDataset, TrainItem
from .lock import locked
from .packing import Mapper, Packing, decode

FORMAT, VERSION = "adapter-lab-dataset", 1
_JSON, _DATA = "dataset.json", "data.safetensors"
_CACHED = re.compile(rf"({FOLDER}/[0-9a-f]+\.safetensors)\|(.*)", re.DOTALL)


def save_dataset(folder: Path, dataset: TrainDataset) -> None:
    """Write ``dataset`` as the new ``folder``, which appears whole or not at all.

    Raises:
        AdapterLabError: the folder exists with other content or is being written, or a
            conditioning holds something that is neither tensor, number nor text.
    """
    store = Packing()
    listing = _listing(dataset, store)
    lock, what = folder.with_name(f".{folder.name}.lock"), f"The dataset '{folder.name}'"
    with locked(lock, what, "saved", "name"):
        _remove_stale(folder)
        _save(folder, listing, store)


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left of ``folder``; a living one would hold its lock."""
    staging = re.compile(rf"\.{re.escape(folder.name)}\.\d+")
    for path in folder.parent.iterdir():
        if staging.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _save(folder: Path, listing: str, store: Packing) -> None:
    if folder.exists():
        _require_same(folder, listing, store.tensors)
        return
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        write_adapter(staging / _DATA, Adapter(store.tensors))
        with replacing(staging / _JSON) as file:
            write_all(file, listing.encode())
        with telling(f"Cannot write the dataset '{folder.name}'"):
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_folder_dataset(
    folder: Path, dataset: TrainDataset, origin: str, names: Mapping[int, str]
) -> None:
    """Write the listing of a dataset whose tensors all lie in the cache below ``folder``.

    Args:
        origin: what it was made from; a dataset of the same origin is replaced.
        names: id of each tensor -> its name, as :class:`.cache.Cache` gives them.

    Raises:
        AdapterLabError: as :func:`require_origin`; the disk is full.
    """
    require_origin(folder, origin)
    store = Packing(names)
    listing = _listing(dataset, store, origin)
    if store.tensors:
        raise AdapterLabError(
            f"The dataset '{folder.name}' cannot be saved",
            found=f"{len(store.tensors)} tensors that are not in its cache",
        )
    with replacing(folder / _JSON) as file:
        write_all(file, listing.encode())


def require_origin(folder: Path, origin: str) -> None:
    """Refuse a ``folder`` with a dataset that was made otherwise than from ``origin``."""
    if not (folder / _JSON).exists():
        return
    found = _read_listing(folder / _JSON).get("origin")
    if found != origin:
        raise AdapterLabError(
            f"A dataset '{folder.name}' exists already and is not replaced",
            found=f"one made from '{found}'" if found else "one that was put together in a graph",
            expected=f"one made from '{origin}'",
            fix="Choose another name, or delete its folder",
        )


def _listing(dataset: TrainDataset, store: Packing, origin: str = "") -> str:
    rows = [_row(item, f"{i}", store) for i, item in enumerate(dataset)]
    table: dict[str, Any] = {"format": FORMAT, "version": VERSION, "items": rows}
    return json.dumps(table | ({"origin": origin} if origin else {}), indent=1)


def _row(item: TrainItem, name: str, store: Packing) -> dict[str, Any]:
    """An item as JSON; what most items have not is left out."""
    row: dict[str, Any] = {
        "caption": item.caption,
        "weight": item.weight,
        "latent": store.name(item.latent, f"{name}.latent"),
        "mask": store.name(item.mask, f"{name}.mask"),
        "cond": store.name(item.cond, f"{name}.cond"),
        "extra": {k: store.encode(v, f"{name}.extra.{k}") for k, v in item.extra.items()},
    }
    more = {
        "repeats": (item.repeats, 1),
        "regularisation": (item.regularisation, False),
        "share": (item.share, 1.0),
    }
    row |= {key: value for key, (value, usual) in more.items() if value != usual}
    if item.variants:
        forms = enumerate(item.variants)
        row["variants"] = [_row(form, f"{name}.variants.{i}", store) for i, form in forms]
    return row


def _require_same(folder: Path, listing: str, tensors: Mapping[str, Tensor]) -> None:
    """Running a graph again is fine, replacing somebody's dataset is not."""
    stored = Mapper().open(folder / _DATA)[0] if (folder / _DATA).exists() else {}
    text = (folder / _JSON).read_text(encoding="utf-8") if (folder / _JSON).exists() else ""
    same = (n in stored and torch.equal(t, stored[n]) for n, t in tensors.items())
    if text != listing or not all(same):
        raise AdapterLabError(
            f"A dataset '{folder.name}' with other content exists already",
            fix="Choose another name, or delete its folder",
        )


def load_dataset(folder: Path) -> TrainDataset:
    """Read what :func:`save_dataset` or :func:`save_folder_dataset` wrote.

    The tensors stay on disk until they are used: see :class:`.packing.Mapper`.

    Raises:
        AdapterLabError: files missing, of another format, or naming tensors that are not there.
    """
    listing = _read_listing(folder / _JSON)
    files, mapper = dict[str, dict[str, Tensor]](), Mapper()

    def tensor(name: str | None) -> Tensor | None:
        if name is None:
            return None
        in_cache = _CACHED.fullmatch(name)
        file, inside = (in_cache[1], in_cache[2]) if in_cache else (_DATA, name)
        if file not in files:
            files[file] = mapper.open(folder / file)[0]
        if inside not in files[file]:
            raise AdapterLabError(
                f"The dataset '{folder.name}' is damaged", found=f"no tensor '{inside}' in {file}"
            )
        return files[file][inside]

    try:
        items = [_item(row, tensor) for row in listing["items"]]
    except (KeyError, TypeError, ValueError) as err:
        raise AdapterLabError(
            f"The dataset '{folder.name}' is damaged", found=f"{_JSON} without or with a bad {err}"
        ) from err
    return TrainDataset(items, folder.name)


def _item(row: dict[str, Any], tensor: Callable[[str | None], Tensor | None]) -> TrainItem:
    return TrainItem(
        latent=cast(Tensor, tensor(row["latent"])),
        cond=tensor(row["cond"]),
        extra=decode(row["extra"], tensor),
        caption=row["caption"],
        mask=tensor(row["mask"]),
        weight=float(row["weight"]),
        variants=tuple(_item(form, tensor) for form in row.get("variants", ())),
        repeats=int(row.get("repeats", 1)),
        regularisation=bool(row.get("regularisation", False)),
        share=float(row.get("share", 1.0)),
    )


def _read_listing(path: Path) -> dict[str, Any]:
    try:
        listing = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterLabError(f"There is no dataset '{path.parent.name}'") from None
    except ValueError as err:
        raise AdapterLabError(
            f"{path.name} of '{path.parent.name}' is not JSON", found=str(err)
        ) from err
    known = {"format": FORMAT, "version": VERSION}
    if not isinstance(listing, dict) or not known.items() <= cast(dict[str, Any], listing).items():
        raise AdapterLabError(
            f"'{path.parent.name}' is not a dataset of this version",
            expected=f'"format": "{FORMAT}", "version": {VERSION}',
        )
    return cast(dict[str, Any], listing)
