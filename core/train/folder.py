"""Pictures, clips, captions and masks in a folder, as the folders of other trainers are laid out.

- ``10_dog`` visits what is in it ten times an epoch (sd-scripts); "dog" is its label.
- A folder ``reg``, ``reg_...`` or ``regulari[sz]ation...`` holds pictures of the class in general;
  folders in it may have repeats of their own (``reg/1_dog``).
- A mask is a picture beside its picture, ``a.mask.png``, ``a-mask.png`` or ``a-masklabel.png``
  (OneTrainer), or one of the same name in a folder ``mask`` or ``masks`` beside it.
- What begins with a dot is passed over.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..atomic import telling
from ..errors import AdapterLabError

PICTURES = frozenset((
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif",
    ".apng",
))  # fmt: skip
CLIPS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg"))
_REPEATS = re.compile(r"(\d+)_(.+)")
_REGULARISATION = re.compile(r"reg([_ -].*)?|regulari[sz]ation.*", re.IGNORECASE)
_MASKS = frozenset(("mask", "masks"))
_MASK = re.compile(r"(.+)(?:\.mask|-mask|-masklabel)")
_MOST_REPEATS = 10_000  # more is a date: "20260115_holiday"
# A picture may have so many files beside it: captions, masks, what other trainers keep. A folder
# with many more is a home folder or a disk, and looking through it would take minutes.
_BESIDE, _MOST_OTHERS = 10, 20_000
_TOLD = 1_000  # entries between two reports
_IGNORED = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir"))


class UnusableError(AdapterLabError):
    """A file that nothing can be learned from; others may do."""


@dataclass(frozen=True)
class Source:
    """One file to learn from.

    Attributes:
        path: of the picture or clip.
        name: the path from the folder on, for messages.
        label: name of its folder without repeats.
    """

    path: Path
    name: str
    label: str
    repeats: int = 1
    regularisation: bool = False
    mask: Path | None = None

    @property
    def is_clip(self) -> bool:
        """Whether it is a video file; an animated picture tells only when it is opened."""
        return self.path.suffix.lower() in CLIPS


def scan(
    root: Path, recursive: bool = True, heard: Callable[[int], None] | None = None
) -> list[Source]:
    """All pictures and clips below ``root``, by name.

    Args:
        heard: called with the number of files and folders seen so far; may raise to cancel.

    Raises:
        AdapterLabError: the folder is missing, cannot be read, holds none, or has very many
            other files below it.
    """
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing of that name"
        raise AdapterLabError(f"There is no folder '{root}'", found=what)
    sources: list[Source] = []
    with telling(f"Cannot read the folder '{root}'"):
        for folder in _Walk(root, heard).folders(root, recursive):
            sources += _in_folder(root, folder)
    if not sources:
        raise AdapterLabError(
            f"The folder '{root.name}' holds nothing to learn from",
            found="no picture or video",
            expected=f"files such as {', '.join(sorted(PICTURES))}",
        )
    return sources


def listing(root: Path, recursive: bool = True) -> str:
    """What changes when a file that :func:`scan` looks at is added, removed or written.

    Raises:
        AdapterLabError: the folder cannot be read, or has very many other files below it.
    """
    with telling(f"Cannot read the folder '{root}'"):
        folders = _Walk(root).folders(root, recursive)
        stats = [(e.path, e.stat()) for f in folders for e in (*f.files, *f.masks)]
    told = repr([(path, stat.st_mtime_ns, stat.st_size) for path, stat in stats])
    return hashlib.sha256(told.encode()).hexdigest()


def balanced(sources: Sequence[Source]) -> list[Source]:
    """``sources`` with more repeats for regularisation, until it is visited as often as the rest.

    As in sd-scripts, but where there is more of it than of the rest, all of it stays.
    """
    visits = Counter[bool]()
    for source in sources:
        visits[source.regularisation] += source.repeats
    count = sum(source.regularisation for source in sources)
    if not count or visits[True] >= visits[False]:
        return list(sources)
    more, rest = divmod(visits[False] - visits[True], count)
    result: list[Source] = []
    for source in sources:
        if source.regularisation:
            source = replace(source, repeats=source.repeats + more + (rest > 0))
            rest -= 1
        result.append(source)
    return result


@dataclass(frozen=True)
class _Folder:
    """What lies in a folder by name, and in the folders of masks in it."""

    path: Path
    files: Sequence[os.DirEntry[str]]
    masks: Sequence[os.DirEntry[str]]


class _Walk:
    """The folders below ``root``, given up where they are plainly not of training data."""

    def __init__(self, root: Path, heard: Callable[[int], None] | None = None) -> None:
        self.root, self.heard = root, heard
        self.seen = self.pictures = 0

    def folders(self, path: Path, recursive: bool) -> Iterator[_Folder]:
        entries = self._entries(path)
        masks = [e for e in entries if e.name.lower() in _MASKS and e.is_dir()]
        shelved = [e for shelf in masks for e in self._entries(Path(shelf.path)) if _is_file(e)]
        yield _Folder(path, [e for e in entries if _is_file(e)], shelved)
        for entry in entries if recursive else ():
            # A link to a folder could lead back here.
            if entry not in masks and entry.is_dir(follow_symlinks=False):
                self._require_few_others()
                yield from self.folders(Path(entry.path), recursive)

    def _entries(self, path: Path) -> list[os.DirEntry[str]]:
        found: list[os.DirEntry[str]] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if self.heard is not None and self.seen % _TOLD == 0:
                    self.heard(self.seen)
                self.seen += 1
                if not _hidden(entry.name):
                    self.pictures += _suffix(entry) in PICTURES | CLIPS
                    found.append(entry)
        return sorted(found, key=lambda entry: entry.name)

    def _require_few_others(self) -> None:
        if self.seen > _MOST_OTHERS + _BESIDE * self.pictures:
            raise AdapterLabError(
                "It holds too much else to be a folder of training data",
                found=f"{self.seen} files and folders, {self.pictures} of them pictures or "
                "videos, before it was given up",
                fix="Give the folder the pictures are in, or switch 'subfolders' off",
            )


def _in_folder(root: Path, found: _Folder) -> Iterator[Source]:
    folder = found.path
    files = [Path(e.path) for e in found.files if _suffix(e) in PICTURES | CLIPS]
    stems = {p.stem for p in files}
    masks = {Path(e.path).stem: Path(e.path) for e in found.masks if _suffix(e) in PICTURES}
    for path in list(files):
        match = _MASK.fullmatch(path.stem)
        # "face-mask.png" alone is a picture of a mask.
        if match and match[1] in stems and path.suffix.lower() in PICTURES:
            masks[match[1]] = path
            files.remove(path)
    label, repeats, regularisation = _place(root, folder)
    for path in files:
        name = path.relative_to(root).as_posix()
        mask = masks.get(path.stem)
        yield Source(path, name, label, repeats, regularisation, mask)


def _place(root: Path, folder: Path) -> tuple[str, int, bool]:
    """Label, repeats and whether it is regularisation; the innermost folder with repeats counts."""
    repeats, regularisation = 1, False
    for part in folder.relative_to(root).parts:
        match = _REPEATS.fullmatch(part)
        repeats = int(match[1]) if match else repeats
        regularisation |= bool(_REGULARISATION.fullmatch(match[2] if match else part))
    named = _REPEATS.fullmatch(folder.name)
    label = named[2] if named else folder.name
    if not 1 <= repeats <= _MOST_REPEATS:
        raise AdapterLabError(
            f"The folder '{folder.name}' is to be visited {repeats} times an epoch",
            found="the number in front of '_' in its name or that of a folder around it",
            expected=f"1 to {_MOST_REPEATS}",
            fix="Rename it, or move it elsewhere",
        )
    return label, repeats, regularisation


def _is_file(entry: os.DirEntry[str]) -> bool:
    # An entry raises on a link in a circle.
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _suffix(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _IGNORED
