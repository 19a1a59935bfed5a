"""The file tools, each beside the script that people use for it now.

Every one runs in a process of its own that has done the same on small files before; times include
reading and writing. Errors are relative, over all modules, and divided by the least that the rank
allows, unless the name says exact. Files are in the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import workfiles as files
from processes import Child, Missing
from workfiles import FLUX, FOLDER, attention, best, dense_best, dense_error, error, lora, sums

OURS, PLAIN = Child("tools"), Child("plain")
RANK, RATIOS = 32, [0.7, -0.4]
Measure = Callable[..., None]
Arguments = Mapping[str, Any]


@cache
def _sd_scripts() -> Child:
    root = _checkout("BENCH_SD_SCRIPTS")
    return Child("sd_scripts", root, root / "networks")


@cache
def musubi() -> Child:
    return Child("musubi", _checkout("BENCH_MUSUBI") / "src")


def _checkout(variable: str) -> Path:
    if not os.environ.get(variable):
        raise Missing(f"{variable} names no checkout")
    return Path(os.environ[variable]).resolve()


def plain() -> Child:
    return PLAIN


class Case:
    """One job of one tool and of its peer.

    Args:
        function: of both processes. peer: gives that of the peer. peer_name: as it is printed.
        make: the arguments but for "out", for a size. small: the size to warm up with.
        pairs: of times; fewer where a peer takes half a minute.
    """

    def __init__(
        self, function: str, peer: Callable[[], Child], peer_name: str,
        make: Callable[[Any], Arguments], size: Any, small: Any, pairs: int = 5,
    ) -> None:  # fmt: skip
        self.function, self.peer, self.peer_name = function, peer, peer_name
        self.make, self.size, self.small, self.pairs = make, size, small, pairs
        self.made: set[str] = set()

    def out(self, child: Child, size: Any) -> str:
        name = self.peer_name.replace(" ", "-")
        kind = "large" if size == self.size else "small"
        return str(FOLDER / f"{name}-{child.module}-{self.size[0][1]}-{kind}.safetensors")

    def seconds(self, child: Child, size: Any) -> float:
        self.made |= {child.module} if size == self.size else set()
        return child.seconds(self.function, **self.make(size), out=self.out(child, size))

    def peak(self, child: Child, size: Any) -> float:
        return child.peak(self.function, **self.make(size), out=self.out(child, size))

    def result(self, child: Child) -> Path:
        """What the process makes of the large input, if it was not yet measured now."""
        if child.module not in self.made:
            self.seconds(child, self.size)
        return Path(self.out(child, self.size))

    def time(self, measure: Measure) -> None:
        both = self._warm()
        runs = [partial(self.seconds, child, self.size) for child in both]
        measure(*runs, self.peer_name, "s", self.pairs, False)

    def memory(self, measure: Measure) -> None:
        both = self._warm()
        runs = [partial(self.peak, child, self.size) for child in both]
        measure(*runs, self.peer_name, "MiB private", min(self.pairs, 3), False)

    def errors(self, of: Callable[[Path], float], unit: str, measure: Measure) -> None:
        runs = [lambda child=child: of(self.result(child)) for child in (OURS, self.peer())]
        measure(*runs, self.peer_name, unit, 1, False)

    def _warm(self) -> list[Child]:
        both = [OURS, self.peer()]
        for child in both:
            self.seconds(child, self.small)
        return both


def _averaged(shapes: files.Shapes) -> Arguments:
    return {"paths": [str(lora(shapes, 7, seed)) for seed in range(1, 11)]}


def _extracted(shapes: files.Shapes) -> Arguments:
    base, tuned = files.tuned(shapes)
    return {"base": str(base), "tuned": str(tuned), "rank": RANK}


def _merged(method: str, rank: int, shapes: files.Shapes, of: int = RANK) -> Arguments:
    pair = [str(path) for path in _pair(shapes, of)]
    return {"paths": pair, "ratios": RATIOS, "method": method, "rank": rank}


def _pair(shapes: files.Shapes, rank: int = RANK) -> list[Path]:
    return [lora(shapes, rank, seed, alpha) for seed, alpha in ((1, 16.0), (2, 32.0))]


def _resized(shapes: files.Shapes, of: int = RANK) -> Arguments:
    return {"path": str(lora(shapes, of, 1)), "rank": 8}


def _converted(shapes: files.Shapes, of: int = 7) -> Arguments:
    return {"path": str(lora(shapes, of, 1)), "form": "diffusers"}


def _baked(shapes: files.Shapes) -> Arguments:
    return {"model": str(files.model(shapes)), "adapter": str(lora(shapes, 16, 1))}


def _layer(out: int, width: int) -> files.Shapes:
    return (("double_blocks.0.img_mlp.0", (out, width)),)


WAN, TINY = attention(24, 768), attention(2, 64)
SMALL = tuple((name, (64, 64)) for name, _ in FLUX)
SIZES = {"1280": (1280, 1280), "2560": (2560, 2560), "3072x12288": (3072, 12288)}
EXTRACTS = {
    f"extract_{name}": Case("extract", _sd_scripts, "sd-scripts flux_extract_lora", _extracted,
                            _layer(*size), _layer(64, 96), 3 if name == "1280" else 1)
    for name, size in SIZES.items()
}  # fmt: skip
EMA = Case("ema", musubi, "musubi-tuner lora_post_hoc_ema", _averaged, FLUX, SMALL)
SVD = Case("merge", _sd_scripts, "sd-scripts svd_merge_lora",
           partial(_merged, "svd", RANK), WAN, TINY, 3)  # fmt: skip
CONCAT = Case("merge", _sd_scripts, "sd-scripts merge_lora --concat",
              partial(_merged, "concatenate", 2 * RANK), WAN, TINY)  # fmt: skip
RESIZE = Case("resize", _sd_scripts, "sd-scripts resize_lora", _resized, WAN, TINY, 3)
CONVERT = Case("convert", musubi, "musubi-tuner convert_lora", _converted, FLUX, SMALL)
BAKE = Case("bake", plain, "load all, add, save", _baked, attention(8, 2048), TINY)


def _bytes(measure: Measure) -> None:
    """Ours beside reading every byte and writing those of one file."""
    paths, out = EMA.make(FLUX)["paths"], str(FOLDER / "copy.safetensors")
    ours = partial(EMA.seconds, OURS, FLUX)
    bare = partial(PLAIN.seconds, "copy", paths=paths, out=out)
    measure(ours, bare, "the bytes alone", "s", EMA.pairs)


def _extract_error(name: str, measure: Measure) -> None:
    case = EXTRACTS[name]
    exact = files.difference(files.tuned(case.size))
    least = dense_best(RANK, exact)
    case.errors(lambda path: dense_error(path, exact) / least, "x the least error", measure)


def _merge_error(measure: Measure) -> None:
    exact = sums(_pair(WAN), RATIOS)
    least = best(RANK, exact)
    SVD.errors(lambda path: error(path, exact) / least, "x the least error", measure)


def _concat_error(measure: Measure) -> None:
    exact = sums(_pair(WAN), RATIOS)
    CONCAT.errors(lambda path: error(path, exact), "relative error", measure)


def _resize_error(measure: Measure) -> None:
    exact = sums([lora(WAN, RANK, 1)], [1.0])
    least = best(8, exact)
    RESIZE.errors(lambda path: error(path, exact) / least, "x the least error", measure)


# Tool -> its arguments for a file of 4 n modules whose tensors have 4 to 16 MiB in float32.
WIDE: Mapping[str, Callable[[int], Arguments]] = {
    "ema": lambda n: {"paths": [str(lora(attention(n, 4096), 256, seed)) for seed in (1, 2, 3)]},
    "merge": lambda n: _merged("concatenate", 0, attention(n, 4096), 256),
    "merge_svd": lambda n: _merged("svd", RANK, attention(n, 4096), 256),
    "resize": lambda n: _resized(attention(n, 4096), 256),
    "convert": lambda n: _converted(attention(n, 4096), 256),
    "extract": lambda n: _extracted(attention(n, 1024)),
    "bake": lambda n: _baked(attention(n, 2048)),
    "quantize": lambda n: {"model": str(files.model(attention(n, 2048)))},
}
FEW, MANY = 2, 8


def _sizes(tool: str, measure: Measure) -> None:
    """Private memory for a file of four times the modules beside that for the file."""
    function, out = tool.split("_")[0], str(FOLDER / f"sized-{tool}.safetensors")
    arguments = {n: WIDE[tool](n) for n in (FEW, MANY)}
    OURS.seconds(function, **arguments[FEW], out=out)
    runs = [partial(OURS.peak, function, **arguments[n], out=out) for n in (MANY, FEW)]
    measure(*runs, "a file of a quarter of it", "MiB private", 3, False)


def _bound(tool: str, measure: Measure) -> None:
    """Private memory beside the header of the result and two tensors, the largest in float32."""
    function, out = tool.split("_")[0], FOLDER / f"sized-{tool}.safetensors"
    arguments = WIDE[tool](MANY)
    OURS.seconds(function, **arguments, out=str(out))
    given = [v for v in arguments.values() if str(v).endswith(".safetensors")]
    largest = max(files.largest(Path(p)) for p in [*given, *arguments.get("paths", ()), out])
    ours = partial(OURS.peak, function, **arguments, out=str(out))
    measure(ours, lambda: (files.header(out) + 2 * largest) / 2**20, "header and two tensors",
            "MiB private", 3, False)  # fmt: skip


def _named() -> dict[str, Callable[[Measure], None]]:
    cases = {"ema_files": EMA, **EXTRACTS, "merge_two": SVD, "merge_concat": CONCAT,
             "resize": RESIZE, "convert": CONVERT, "bake": BAKE}  # fmt: skip
    found: dict[str, Callable[[Measure], None]] = {}
    for name, case in cases.items():
        found |= {name: case.time, f"{name}_memory": case.memory}
    found["ema_files_bytes"] = _bytes
    found |= {f"{name}_error": partial(_extract_error, name) for name in EXTRACTS}
    found |= {"merge_two_error": _merge_error, "merge_concat_error": _concat_error,
              "resize_error": _resize_error}  # fmt: skip
    for tool in WIDE:
        found |= {f"sizes_{tool}": partial(_sizes, tool), f"bound_{tool}": partial(_bound, tool)}
    return found


BENCHES = _named()
LONG = {name for name in BENCHES if "3072x12288" in name}
