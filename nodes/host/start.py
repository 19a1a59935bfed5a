"""The adapters that a job begins with."""

from __future__ import annotations

import torch

from ...core.adapters import AdapterConfig, Algorithm
from ...core.adapters.beside import Biased
from ...core.adapters.full import Bias
from ...core.adapters.training import (
    config_notes,
    go_on,
    is_made_by,
    make,
    training_notes,
    with_leaves,
)
from ...core.archs import ArchSpec
from ...core.errors import AdapterLabError
from ...core.files import Adapter
from ...core.keys import resolve
from ...core.train.random import generator
from ...core.train.targets import in_model, pattern_name
from .frozen import HostLayer
from .job import Job
from .layers import dims, submodules
from .model import index, require_fit
from .session import Session, SessionOptions
from .targets import chosen, encoder_notes, trainable, with_bias


def adapters(job: Job, arch: ArchSpec | None, notes: list[str]) -> dict[str, Algorithm]:
    """Full path -> fresh or given adapter, its factors not yet on the device.

    Args:
        notes: what the user should know is added.
    """
    return _fresh(job, arch, notes) if job.init_from is None else _given(job, arch, notes)


def as_leaves(made: dict[str, Algorithm], job: Job) -> dict[str, Algorithm]:
    """The same on the device of the part they are for, ready for the optimizer."""
    precision = (job.adapter or AdapterConfig()).precision

    def device(path: str) -> torch.device:
        return (job.model if in_model(path) else job.clip.patcher).load_device

    return {path: with_leaves(a, device(path), precision) for path, a in made.items()}


def started(made: dict[str, Algorithm], job: Job, options: SessionOptions) -> dict[str, Algorithm]:
    """The same told of the weights they are for, as these act, where they ask for them."""
    asking = [path for path, algorithm in made.items() if algorithm.needs_weight_to_start]
    if not asking:
        return made
    found = dict(made)
    with torch.inference_mode(), Session(job.model, {}, options, job.clip) as session:
        modules = submodules(session.model)
        if job.clip is not None:
            modules |= submodules(job.clip.patcher.model)
        for path in asking:
            if dims(modules[path]) is not None:
                weight = HostLayer(modules[path], session.device).weight()
                found[path] = made[path].started(weight.detach().clone())
    return found


def _fresh(job: Job, arch: ArchSpec | None, notes: list[str]) -> dict[str, Algorithm]:
    config, seed = job.adapter or AdapterConfig(), job.config.seed
    shapes = chosen(job.targets, job.model, job.clip, arch)
    biased = with_bias(shapes, job.model, job.clip)
    told = [note for shape in shapes.values() for note in training_notes(shape, config)]
    notes += [*config_notes(config), *dict.fromkeys(told), *encoder_notes(job.targets, shapes)]
    found: dict[str, Algorithm] = {}
    for path, shape in shapes.items():
        try:
            draws = generator(seed, f"init {path}")
            found[path] = make(shape, config, draws, biased=path in biased)
        except AdapterLabError as error:
            raise error.about(pattern_name(path)) from error.__cause__
    return found


def _given(job: Job, arch: ArchSpec | None, notes: list[str]) -> dict[str, Algorithm]:
    """The modules of an adapter to go on from; they decide what is trained."""
    assert job.init_from is not None
    config = job.adapter or AdapterConfig()
    entries, report = resolve(Adapter.of(job.init_from), index(job.model, job.clip), arch)
    require_fit(report, "Only an adapter of which everything fits can be trained on")
    whole = {e.key: e.algorithm for e in entries if e.slice is None}
    biases = {k.rpartition(".")[0]: a for k, a in whole.items() if isinstance(a, Bias)}
    given = {k.rpartition(".")[0]: a for k, a in whole.items() if not isinstance(a, Bias)}
    known = trainable(job.model, job.clip)
    one_each = len(given) + len(biases) == len(entries) and biases.keys() <= given.keys()
    if not one_each or not given.keys() <= known.keys():
        raise AdapterLabError(
            "Training cannot go on from this adapter",
            found="modules on parts of fused weights, on biases alone or two on a layer",
            expected="one module for each layer",
        )
    kinds = {(a.name, a.rank, known[path]): a for path, a in given.items()}
    alike = (is_made_by(a, shape, config) for (_, _, shape), a in kinds.items())
    if job.adapter is not None and not all(alike):
        notes.append("algorithm and rank are those of 'init_from', not of 'config'")
    if config.bias and not biases:
        notes.append("biases are not trained: 'init_from' has none")
    if job.targets is not None:
        wanted = chosen(job.targets, job.model, job.clip, arch)
        if wanted.keys() != given.keys():
            notes.append("the modules are those of 'init_from', not of 'targets'")
    made = {path: go_on(algorithm, config) for path, algorithm in given.items()}
    for path, bias in biases.items():
        (stored,) = bias.state().values()
        name = "b_norm" if len(known[path]) == 1 else "diff_b"
        made[path] = Biased(made[path], {name: stored.float()})
    return made
