"""Which model a calibration is of: told by its own weights, whatever is done to them."""

from __future__ import annotations

import gc
import weakref

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import samples
import tiny
import torch
from adapter_lab.nodes.host import calibrations
from adapter_lab.nodes.host.fingerprint import base_fingerprint, identity
from calibrated import QKV, adapted, sample
from comfy.quant_ops import QUANT_ALGOS
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def during(model, look):
    """A clone that calls ``look`` in the middle of each evaluation."""
    clone = model.clone()

    def wrapped(apply_model, args):
        found.append(look())
        return apply_model(args["input"], args["timestep"], **args["c"])

    found = []
    clone.set_model_unet_function_wrapper(wrapped)
    return clone, found


@pytest.mark.parametrize("kind", [kind for kind in tiny.BUILDERS if kind != "sd15"])
def test_fingerprint_is_that_of_the_file(load, kind):
    one = base_fingerprint(load(kind))
    again = load(kind)
    comfy.model_management.load_models_gpu([again])
    assert base_fingerprint(again) == one == base_fingerprint(again.clone())


def test_fingerprints_tell_architectures_apart(load):
    found = [base_fingerprint(load(kind)) for kind in tiny.BUILDERS]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", QKV)
def test_fingerprint_of_a_fine_tune_is_another(load, checkpoints, tmp_path, kind):
    """Of one that changes nothing but attention, as a merged adapter does."""
    state = load_file(str(checkpoints(kind)))
    for name in [n for n in state if QKV[kind].split(".")[-1] in n and n.endswith("weight")]:
        state[name] = state[name] * 1.02
    save_file(state, str(tmp_path / "tuned.safetensors"))
    tuned = comfy.sd.load_diffusion_model(str(tmp_path / "tuned.safetensors"))
    assert base_fingerprint(tuned) != base_fingerprint(load(kind))


@pytest.mark.parametrize("mode", ["merge", "bypass"])
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_fingerprint_does_not_see_adapters(load, kind, mode):
    model = load(kind)
    before, plain = base_fingerprint(model), samples.run(model, kind)
    clone = adapted(model, kind, mode)
    samples.differs(samples.run(clone, kind), plain)  # it is in the weights or layers now
    assert base_fingerprint(clone) == base_fingerprint(model) == before
    looking, found = during(clone, lambda: base_fingerprint(clone))
    sample(looking, kind, steps=2)
    assert set(found) == {before} and base_fingerprint(clone) == before


def test_fingerprint_does_not_see_what_a_conditioning_hooks_on(load):
    model = load("flux")
    key = f"diffusion_model.{QKV['flux']}.weight"
    before, live = base_fingerprint(model), comfy.utils.get_attr(model.model, key).clone()
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights = {key: ("diff", (torch.ones_like(live),))}
    hook.need_weight_init = False
    hooks.add(hook)
    for group in (None, hooks):
        clone = model.clone()
        clone.register_all_hook_patches(
            hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        )
        comfy.model_management.load_models_gpu([clone])
        clone.apply_hooks(group)
        changed = not torch.equal(comfy.utils.get_attr(model.model, key), live)
        assert changed == (group is not None)
        assert base_fingerprint(clone) == before
        clone.apply_hooks(None)


def test_fingerprint_is_that_of_the_values_and_not_of_their_precision(load, checkpoints):
    wide = load("flux")
    options = {"dtype": torch.bfloat16}
    narrow = comfy.sd.load_diffusion_model(str(checkpoints("flux")), model_options=options)
    weight = narrow.model.get_submodule(f"diffusion_model.{QKV['flux']}").weight
    assert weight.dtype == torch.bfloat16
    assert base_fingerprint(narrow) == base_fingerprint(wide)


@pytest.mark.parametrize("form", QUANT_ALGOS)
def test_fingerprint_of_a_quantised_model(load, checkpoints, tmp_path, form):
    file = tiny.quantise(checkpoints("flux"), tmp_path / "low.safetensors", form)
    one, two = (comfy.sd.load_diffusion_model(str(file)) for _ in range(2))
    comfy.model_management.load_models_gpu([two])
    assert base_fingerprint(one) == base_fingerprint(two) != base_fingerprint(load("flux"))


def test_fingerprint_without_values(load):
    """Of weights that are nowhere yet: of their names and shapes alone."""
    found = []
    for kind in ("flux", "wan"):
        model = load(kind)
        model.model.diffusion_model.to("meta")
        found.append(base_fingerprint(model))
    assert found[0] != found[1]


def test_fingerprint_of_a_compiled_model(load, monkeypatch):
    """While it is sampled from, the compiled network stands in the place of the plain one."""
    model = load("flux")
    before = calibrations.subject(model, "network")
    compiled = torch.compile(model.model.diffusion_model, backend="eager")
    monkeypatch.setitem(model.model._modules, "diffusion_model", compiled)
    assert all("_orig_mod" in name for name, _ in model.model.named_parameters())
    assert calibrations.subject(model, "network") == before and before.architecture == "flux"


def test_a_model_is_looked_at_once(load, monkeypatch):
    model, other = load("flux"), load("wan")
    known = identity(model)
    assert identity(model.clone()) is known and identity(adapted(model, "flux", "merge")) is known
    assert identity(other) != known == identity(load("flux"))
    monkeypatch.setitem(model.model._modules, "diffusion_model", other.model.diffusion_model)
    assert identity(model) == identity(other)


def test_what_is_known_of_a_model_does_not_keep_it(load):
    model = load("flux")
    assert identity(model).architecture == "flux"
    network = weakref.ref(model.model.diffusion_model)
    del model
    gc.collect()
    assert network() is None
