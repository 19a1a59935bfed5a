"""An ordered, duplicate-safe registry that fills itself from the modules of a package."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from .errors import AdapterLabError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> item, in the order added. Menus, help tables and tests read it.

    Args:
        kind: what an item is called in errors ("algorithm", "key format").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register ``item``; raises ``ValueError`` when the name is taken."""
        if name in self._items:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._items[name] = item
        return item

    def discover(
        self, package: str, path: Iterable[str], find: Callable[[object], str | None]
    ) -> None:
        """Import every module of ``package`` and add each of its own objects that ``find`` names.

        Modules are taken in order of their attribute ``ORDER`` (default 0), then of their name.
        """
        names = [f"{package}.{m.name}" for m in pkgutil.iter_modules(path)]
        modules = [importlib.import_module(name) for name in names]
        for module in sorted(modules, key=lambda m: (getattr(m, "ORDER", 0), m.__name__)):
            for item in vars(module).values():
                owner = getattr(item, "__module__", module.__name__)
                name = find(item) if owner == module.__name__ or not callable(item) else None
                if name is not None and self._items.get(name) is not item:
                    self.add(name, item)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            raise AdapterLabError(
                f"Unknown {self.kind} '{name}'", expected=f"one of {', '.join(self._items)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
