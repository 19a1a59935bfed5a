"""Datasets on disk: a folder of two files.

``data.safetensors`` holds tensors, ``dataset.json`` says what they are::

    {"format": "adapter-lab-dataset", "version": 1, "items": [
        {"caption": "a red star", "weight": 1.0, "latent": "0.latent", "mask": null,
         "cond": "0.cond", "extra": {"pooled_output": {"$tensor": "0.extra.pooled_output"}}}]}

Tensors are referred to by name, so that items may share them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..atomic import replacing, telling, write_all
from ..errors import AdapterLabError
from ..files import Adapter, read_adapter, write_adapter
from .data import TrainDataset, TrainItem

FORMAT, VERSION = "adapter-lab-dataset", 1
_JSON, _DATA, _REF = "dataset.json", "data.safetensors", "$tensor"


class _Store:
    """Tensors under way to a file, each once, and values that refer to them by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def name(self, tensor: Tensor | None, name: str) -> str | None:
        """The name under which ``tensor`` is stored: ``name``, or that of an earlier item."""
        if tensor is None:
            return None
        while name in self.tensors and id(tensor) not in self._names:
            name += "_"  # {"a.b": x, "a": {"b": y}}
        known = self._names.setdefault(id(tensor), name)
        self.tensors.setdefault(known, tensor)
        return known

    def encode(self, value: Any, name: str) -> Any:
        """``value`` as JSON; raises on what is neither tensor, number, text nor made of them."""
        if isinstance(value, Tensor):
            return {_REF: self.name(value, name)}
        if isinstance(value, dict):
            pairs = cast(dict[str, Any], value).items()
            return {k: self.encode(v, f"{name}.{k}") for k, v in pairs}
        if isinstance(value, (list, tuple)):
            return [self.encode(v, f"{name}.{i}") for i, v in enumerate(cast(list[Any], value))]
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        raise AdapterLabError(
            f"The conditioning entry '{name}' cannot be stored",
            found=type(value).__name__,
            expected="tensors, numbers and text",
            fix="Train on conditioning without ControlNet, hooks or masks",
        )


def save_dataset(folder: Path, dataset: TrainDataset) -> None:
    """Write ``dataset`` as the new ``folder``, which appears whole or not at all.

    Raises:
        AdapterLabError: the folder exists with other content, or a conditioning holds something
            that is neither tensor, number nor text.
    """
    store = _Store()
    rows = [
        {
            "caption": item.caption,
            "weight": item.weight,
            "latent": store.name(item.latent, f"{i}.latent"),
            "mask": store.name(item.mask, f"{i}.mask"),
            "cond": store.name(item.cond, f"{i}.cond"),
            "extra": {k: store.encode(v, f"{i}.extra.{k}") for k, v in item.extra.items()},
        }
        for i, item in enumerate(dataset)
    ]
    listing = json.dumps({"format": FORMAT, "version": VERSION, "items": rows}, indent=1)
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


def _require_same(folder: Path, listing: str, tensors: Mapping[str, Tensor]) -> None:
    """Running a graph again is fine, replacing somebody's dataset is not."""
    stored = read_adapter(folder / _DATA) if (folder / _DATA).exists() else Adapter()
    text = (folder / _JSON).read_text(encoding="utf-8") if (folder / _JSON).exists() else ""
    same = (n in stored and torch.equal(t, stored[n]) for n, t in tensors.items())
    if text != listing or not all(same):
        raise AdapterLabError(
            f"A dataset '{folder.name}' with other content exists already",
            fix="Choose another name, or delete its folder",
        )


def load_dataset(folder: Path) -> TrainDataset:
    """Read what :func:`save_dataset` wrote.

    Raises:
        AdapterLabError: files missing, of another format, or naming tensors that are not there.
    """
    listing = _read_listing(folder / _JSON)
    tensors = read_adapter(folder / _DATA)

    def tensor(name: str | None) -> Tensor | None:
        if name is None:
            return None
        if name not in tensors:
            raise AdapterLabError(
                f"The dataset '{folder.name}' is damaged", found=f"no tensor '{name}' in {_DATA}"
            )
        return tensors[name]

    def decode(value: Any) -> Any:
        if isinstance(value, dict):
            table = cast(dict[str, Any], value)
            if set(table) == {_REF}:
                return tensor(table[_REF])
            return {k: decode(v) for k, v in table.items()}
        return [decode(v) for v in cast(list[Any], value)] if isinstance(value, list) else value

    try:
        items = [
            TrainItem(
                latent=cast(Tensor, tensor(row["latent"])),
                cond=tensor(row["cond"]),
                extra=decode(row["extra"]),
                caption=row["caption"],
                mask=tensor(row["mask"]),
                weight=float(row["weight"]),
            )
            for row in listing["items"]
        ]
    except (KeyError, TypeError, ValueError) as err:
        raise AdapterLabError(
            f"The dataset '{folder.name}' is damaged", found=f"{_JSON} without or with a bad {err}"
        ) from err
    return TrainDataset(items, folder.name)


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
