"""A training run on tiny models: what it writes, how it ends, what it leaves behind."""

from __future__ import annotations

import gc

import comfy.model_management
import comfy.sample
import pytest
import samples
import torch
from adapter_lab.core.adapters import ALGORITHMS, AdapterConfig
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import Adapter, read_adapter
from adapter_lab.core.train.config import OptimizerConfig, TrainConfig
from adapter_lab.core.train.data import TrainDataset, TrainItem
from adapter_lab.core.train.targets import Targets
from adapter_lab.nodes.host import model as host
from adapter_lab.nodes.host import paths, trainer
from adapter_lab.nodes.host.job import Job
from adapter_lab.nodes.host.latents import graph

KINDS = ("flux", "wan", "sd15")


def job(model, kind, steps=4, name="run", config=None, **more):
    """A small run on two attention-like modules of the model."""
    patterns = {"flux": r".*qkv", "wan": r".*self_attn\.q", "sd15": r".*to_q|.*in_layers\.2"}
    settings = dict(batch_size=2, seed=3, save_every=2) | (config or {})
    options = dict(
        adapter=AdapterConfig("lora", 2, 2.0),
        targets=Targets("everything", (".*",), (patterns[kind],)),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    data = more.pop("dataset", samples.dataset(kind))
    return Job(model, data, paths.run(name), TrainConfig(steps, **settings), **(options | more))


def run(*args, **kwargs):
    with torch.inference_mode():
        return trainer.Trainer(job(*args, **kwargs)).run()


def output(model, kind):
    """One sampled latent."""
    latent, cond = graph(samples.items(kind, 1)[0])
    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 2, 1.0, "euler", "simple", cond, cond, torch.zeros_like(noise),
            disable_pbar=True,
        )  # fmt: skip


OTHERS = [n for n, a in ALGORITHMS.items() if a.trainable and n not in ("norm", "lora")]


@pytest.mark.parametrize(
    ("kind", "algorithm", "checkpointing"),
    [
        *((kind, "lora", mode) for kind in KINDS for mode in ("off", "blocks")),
        *(("flux", name, "off") for name in OTHERS),
    ],
)
def test_run_writes_adapters_that_load(load, kind, algorithm, checkpointing):
    """With the targets that are usual for the model, and all that lies beside the adapters."""
    model = load(kind)
    before = output(model, kind)
    result = run(
        model, kind, checkpointing=checkpointing, adapter=AdapterConfig(algorithm, 4, 4.0),
        validation=samples.dataset(kind, 1, seed=8),
    )  # fmt: skip
    assert torch.equal(output(model, kind), before)
    assert written() == ["run-step00000002", "run-step00000004"]
    stored = read_adapter(paths.run("run").folder / "run-step00000004.safetensors")
    assert stored.keys() == result.adapter.keys()
    assert all(torch.equal(stored[k], t) for k, t in result.adapter.items())
    assert stored.metadata["ss_steps"] == "4" and "sshs_model_hash" in stored.metadata
    assert [step for step, _ in result.progress.validation] == [0, 2, 4]
    adapted = host.apply(model, None, stored, 1.0, 1.0, "error").model
    assert not torch.allclose(output(adapted, kind), before, atol=1e-4)
    assert torch.equal(output(model, kind), before)


def test_loss_goes_down(load):
    result = run(load("flux"), "flux", steps=60, validation=samples.dataset("flux"))
    (_, first), *_, (_, last) = result.progress.validation
    assert last < 0.97 * first


def test_global_randomness_and_memory_are_untouched(load):
    model = load("flux")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loaded = list(comfy.model_management.current_loaded_models)
    run(model, "flux")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(comfy.model_management.current_loaded_models) <= len(loaded) + 1
    gc.collect()
    before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    run(model, "flux", name="second")
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= before


def test_training_goes_on_top_of_patches(load):
    model = load("flux")
    first = run(model, "flux")
    adapted = host.apply(model, None, first.adapter, 1.0, 1.0, "error").model
    before = output(adapted, "flux")
    second = run(adapted, "flux", name="on top")
    assert second.progress.losses[0] != first.progress.losses[0]
    assert torch.equal(output(adapted, "flux"), before)


def interrupted(monkeypatch, after):
    """Cancel, as the user's button does, during the forward pass of step ``after`` + 1."""
    real = trainer.HostProcess.predict
    calls = []

    def predict(self, *args):
        calls.extend([1] * torch.is_grad_enabled())
        if len(calls) == after + 1:
            comfy.model_management.interrupt_current_processing()
        return real(self, *args)

    monkeypatch.setattr(trainer.HostProcess, "predict", predict)


def test_cancel_keeps_what_was_learned_and_resume_is_exact(load, monkeypatch):
    model = load("flux")
    before = output(model, "flux")
    whole = run(model, "flux", steps=6, name="whole")
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(model, "flux", steps=6)
    kept = paths.run("run").folder / "run-step00000003.safetensors"
    assert kept.exists() and paths.run("run").state.exists()
    assert torch.equal(output(model, "flux"), before)
    resumed = run(model, "flux", steps=6)
    assert resumed.progress.losses == whole.progress.losses
    assert all(torch.equal(resumed.adapter[k], t) for k, t in whole.adapter.items())


def test_finished_run_is_given_back_and_can_be_prolonged(load):
    model = load("flux")
    first = run(model, "flux")
    again = run(model, "flux")
    assert all(torch.equal(again.adapter[k], t) for k, t in first.adapter.items())
    longer, whole = run(model, "flux", steps=6), run(model, "flux", steps=6, name="whole")
    assert longer.progress.losses == whole.progress.losses


def test_existing_run(load):
    model = load("flux")
    first = run(model, "flux")
    with pytest.raises(AdapterLabError, match="exists already"):
        run(model, "flux", on_existing="error")
    with pytest.raises(AdapterLabError, match="other settings.*rank 2 -> 3"):
        run(model, "flux", steps=6, adapter=AdapterConfig("lora", 3, 3.0))
    restarted = run(model, "flux", steps=3, on_existing="restart")
    assert restarted.progress.losses == first.progress.losses[:3]
    assert written() == ["run-step00000002", "run-step00000003"]


def written():
    """The checkpoints, which loaders have to see as well."""
    run = paths.run("run")
    found = [path.stem for _, path in run.checkpoints()]
    assert sorted(path.stem for path in run.shelf.glob("*")) == found
    return found


def test_restart_deletes_nothing_before_all_is_known_to_be_right(load):
    model = load("flux")
    run(model, "flux")
    wrong = TrainDataset([TrainItem(torch.randn(4, 8, 8), torch.randn(4, 64))])
    for options in ({"dataset": wrong}, {"targets": Targets("everything", (".*",))}):
        with pytest.raises(AdapterLabError):
            run(model, "flux", on_existing="restart", **options)
        assert written() == ["run-step00000002", "run-step00000004"]
        assert paths.run("run").state.exists()


def test_adapter_files_without_a_state_are_not_overwritten(load):
    model = load("flux")
    run(model, "flux")
    paths.run("run").state.unlink()
    for choice, says in (("error", "exists already"), ("resume", "cannot be resumed")):
        with pytest.raises(AdapterLabError, match=says):
            run(model, "flux", on_existing=choice, config={"seed": 9})
    run(model, "flux", steps=2, on_existing="restart")
    assert written() == ["run-step00000002"]


@pytest.mark.parametrize("blocked", ["shelf", "folder"])
def test_a_place_that_cannot_be_written_to_is_found_before_training(load, monkeypatch, blocked):
    place = getattr(paths.run("run"), blocked)
    place.parent.mkdir(parents=True)
    place.write_text("a file where the folder should be")
    monkeypatch.setattr(trainer, "train", lambda *_: pytest.fail("training began"))
    with pytest.raises(AdapterLabError, match="Cannot write to"):
        run(load("flux"), "flux")


def test_damaged_state_says_what_to_do(load):
    model = load("flux")
    run(model, "flux")
    paths.run("run").state.write_bytes(b"")
    with pytest.raises(AdapterLabError, match="on_existing"):
        run(model, "flux", steps=6)


def test_adapter_file_that_was_moved_is_written_again(load):
    model = load("flux")
    first = run(model, "flux")
    for path in (*paths.run("run").folder.glob("run-*"), *paths.run("run").shelf.iterdir()):
        path.unlink()
    again = run(model, "flux")
    assert written() == ["run-step00000004"]
    assert all(torch.equal(again.adapter[k], t) for k, t in first.adapter.items())


def test_other_data_and_fewer_steps_are_said(load):
    model = load("flux")
    run(model, "flux")
    other = run(model, "flux", steps=5, dataset=samples.dataset("flux", seed=4))
    assert "resumed with another dataset" in other.report
    fewer = run(model, "flux", steps=2, dataset=samples.dataset("flux", seed=4))
    assert "more steps than the 2 asked for" in fewer.report


def test_shapes_of_factors_belong_to_the_run(load):
    model = load("flux")
    run(model, "flux", adapter=AdapterConfig("lokr", 1, 1.0, factor=4))
    with pytest.raises(AdapterLabError, match="other settings"):
        run(model, "flux", steps=6, adapter=AdapterConfig("lokr", 1, 1.0, factor=8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_train_like_float32(load, monkeypatch, dtype):
    """The first update points where that of the same model in float32 does."""
    halves, real = [], trainer.train
    monkeypatch.setattr(
        trainer, "train", lambda process, *args: [halves.append(process.half), real(process, *args)]
    )
    updates = []
    for kind in (torch.float32, dtype):
        model = load("sd15").clone()
        model.set_model_compute_dtype(kind)
        name = str(kind).replace("torch.", "")
        adapter = run(model, "sd15", steps=1, name=name).adapter
        updates.append(torch.cat([t.flatten() for k, t in adapter.items() if "lora_up" in k]))
    assert halves == [False, dtype == torch.float16]
    assert torch.nn.functional.cosine_similarity(*updates, dim=0) > 0.9


def test_keep_last(load):
    run(load("flux"), "flux", steps=7, config={"save_every": 2, "keep_last": 2})
    assert written() == ["run-step00000006", "run-step00000007"]


def test_init_from_goes_on_where_the_adapter_stopped(load):
    model = load("flux")
    first = run(model, "flux", validation=samples.dataset("flux"))
    second = run(
        model, "flux", name="second", validation=samples.dataset("flux"), init_from=first.adapter,
        adapter=AdapterConfig("loha", 8), targets=Targets("everything"),
    )  # fmt: skip
    assert second.progress.validation[0][1] == pytest.approx(first.progress.validation[-1][1])
    assert "not of 'config'" in second.report and "not of 'targets'" in second.report


@pytest.mark.parametrize("algorithm", ["lora", "oft"])
def test_init_from_an_adapter_with_biases(load, algorithm):
    model, held_out = load("flux"), samples.dataset("flux")
    config = AdapterConfig(algorithm, 4, 4.0, bias=True)
    options = {"validation": held_out, "adapter": config, "targets": Targets(norms=True)}
    first = run(model, "flux", **options)
    second = run(model, "flux", name="second", init_from=first.adapter, **options)
    assert second.progress.validation[0][1] == pytest.approx(first.progress.validation[-1][1])
    assert second.adapter.keys() == first.adapter.keys()
    moved = [k for k, t in second.adapter.items() if not torch.equal(t, first.adapter[k])]
    biases = {k for k in first.adapter if k.endswith("diff_b")}
    assert biases and biases <= set(moved)


def test_init_from_without_the_biases_that_are_asked_for(load):
    first = run(load("flux"), "flux").adapter
    asked = AdapterConfig(bias=True)
    second = run(load("flux"), "flux", name="second", init_from=first, adapter=asked)
    assert "biases are not trained" in second.report


def test_what_an_algorithm_is_not_made_for_is_named(load):
    with pytest.raises(AdapterLabError, match=r"^double_blocks\.0\.img_attn\.\w+: Only norms"):
        run(load("flux"), "flux", adapter=AdapterConfig("norm"))


def test_init_from_what_cannot_go_on(load):
    model = load("flux")
    first = run(model, "flux").adapter
    twice = dict(first) | {
        f"lora_unet_double_blocks_0_img_attn_qkv.{k.split('.', 5)[-1]}": t
        for k, t in first.items()
        if "double_blocks.0.img_attn.qkv" in k
    }
    for adapter, says in ((Adapter(), "Nothing"), (Adapter(twice), "two on a layer")):
        with pytest.raises(AdapterLabError, match=says):
            run(model, "flux", name="second", init_from=adapter)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([TrainItem(torch.randn(4, 8, 8), torch.randn(4, 64))], "4 channels.*expected 16"),
        ([TrainItem(torch.randn(16, 8, 8), torch.randn(77, 768))], "conditioning.*width 768"),
    ],
)
def test_data_of_another_model(load, items, says):
    with pytest.raises(AdapterLabError, match=says):
        run(load("flux"), "flux", dataset=TrainDataset(items))


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", "..", "a\\b", ".x", "nul", "Con.x", "ä" * 51, "x."]
)
def test_names_that_leave_their_folder(name):
    with pytest.raises(AdapterLabError, match="name"):
        paths.run(name)


@pytest.mark.parametrize(
    "prefix", ["../x", "/x", "", "a/", "a/../b", "a:b", ".x", "x" * 101, "a\0"]
)
def test_prefixes_that_name_no_file(prefix):
    with pytest.raises(AdapterLabError, match="prefix"):
        paths.numbered(prefix, "loras")


def test_prefixes_count_up():
    first = paths.numbered("a\\b", "loras")
    first.write_bytes(b"")
    assert first == paths.output("loras", "a", "b_00001_.safetensors")
    assert paths.numbered("a/b", "loras").name == "b_00002_.safetensors"


def test_modules_that_learn_nothing_are_named(load):
    model = load("flux")
    model.model.diffusion_model.spare = torch.nn.Linear(8, 8)
    chosen = Targets("everything", (".*",), (".*qkv", "spare"))
    with pytest.raises(AdapterLabError, match="no part in .*computation.*spare"):
        run(model, "flux", targets=chosen)


MIXED = {
    "flux": (((16, 8, 8), 4), ((16, 8, 10), 4), ((16, 9, 7), 6)),
    "wan": (((16, 1, 8, 8), 6), ((16, 3, 8, 6), 6), ((16, 3, 8, 6), 9)),
    "sd15": (((4, 8, 8), 77), ((4, 8, 8), 154), ((4, 12, 8), 77)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_lengths_of_prompts_may_differ(load, kind):
    """Pictures of several sizes, clips of several lengths, captions of several token counts."""
    first = samples.items(kind, 1)[0]
    items = [
        TrainItem(torch.randn(shape), torch.randn(tokens, first.cond.shape[-1]), first.extra)
        for shape, tokens in MIXED[kind]
    ]
    result = run(load(kind), kind, dataset=TrainDataset(items), config={"accumulation": 3})
    assert all(0.1 < loss < 10 for loss in result.progress.losses)
