"""Averages of adapter files: order, what files must share, what goes into the result, bad input."""

from __future__ import annotations

import hashlib
import json
import os
import struct

import pytest
import torch
from adapter_lab.core.bake import merge_into
from adapter_lab.core.errors import AdapterLabError
from adapter_lab.core.files import read_adapter
from adapter_lab.core.merge.ema import Average, Settings, merge_files, plan
from adapter_lab.core.merge.order import Checkpoint, expand, ordered
from averaged import ALPHA, DOWN, UP, put, tensors, three
from safetensors.torch import load_file


def test_a_weighted_sum_in_float32(tmp_path):
    paths, given = three(tmp_path, torch.bfloat16), [-0.25, 0.5, 0.8]
    merge_files(paths, given, tmp_path / "out.safetensors")
    out, stored = load_file(tmp_path / "out.safetensors"), [load_file(p) for p in paths]
    for key in (UP, DOWN):
        exact = sum(w * s[key].double() for w, s in zip(given, stored, strict=True))
        assert out[key].dtype == torch.bfloat16
        assert torch.equal(out[key], exact.to(torch.bfloat16))
    assert out[ALPHA] == 1


def test_weights_that_were_given_count_for_what_is_the_same_in_all_files(tmp_path):
    paths = [put(tmp_path / f"{k}.safetensors", tensors()) for k in (1, 2)]
    merge_files(paths, [0.5, 1.0], tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out[UP], 1.5 * tensors()[UP]) and out[ALPHA] == 1


def test_float64_is_averaged_in_float64(tmp_path):
    values = [torch.full((3,), 1 + k * 1e-12, dtype=torch.float64) for k in (0, 1)]
    paths = [put(tmp_path / f"{k}.safetensors", {"x.diff": v}) for k, v in enumerate(values)]
    merge_files(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["x.diff"][0] - 1 == pytest.approx(5e-13, 1e-3)


def test_dtypes_that_differ_meet_in_the_wider(tmp_path):
    paths = [put(tmp_path / f"a-{k}.safetensors", tensors(k, dtype=dtype))
             for k, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16))]  # fmt: skip
    merge_files(paths, [0.2, 0.3, 0.5], tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")[UP].dtype == torch.float32


def test_what_is_no_float_comes_from_the_first_file(tmp_path):
    paths = [put(tmp_path / f"a-{k}.safetensors", {**tensors(k), "x.bits": torch.full((3,), k)})
             for k in (1, 2)]  # fmt: skip
    merge_files(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["x.bits"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("index", "steps"), [(-1, "30"), (0, "10"), (1, "20")])
def test_metadata_of_one_file_with_its_own_hashes(tmp_path, index, steps):
    paths = three(tmp_path)
    out = tmp_path / "out.safetensors"
    written = merge_files(paths, [0.2, 0.3, 0.5], out, metadata_from=index)
    data = out.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    assert written == json.loads(data[8 : 8 + size])["__metadata__"]
    assert written["sshs_model_hash"] == hashlib.sha256(data[8 + size :]).hexdigest()
    assert (written["ss_steps"], written["ss_network_dim"]) == (steps, "2")
    assert written["modelspec.merged_from"] == "a-001, a-002, a-003"


def test_memory_and_file_are_the_same(tmp_path):
    made = plan(three(tmp_path), "power", Settings(0.1))
    held = Average(made).collect("mean")
    metadata = Average(made).write(tmp_path / "out.safetensors")
    stored = read_adapter(tmp_path / "out.safetensors")
    assert held.keys() == stored.keys() and held.name == "mean"
    assert all(torch.equal(held[k], stored[k]) for k in held)
    assert held.metadata.items() < metadata.items()
    assert metadata["adapter_lab_ema_sigma_rel"] == "0.1"


def names(course):
    return [c.path.stem for c in course.checkpoints], course.times, course.unit


def course(paths, order="step"):
    return ordered([Checkpoint.of(p) for p in paths], order)


def test_order_by_metadata_before_names(tmp_path):
    paths = [put(tmp_path / f"a-{n}.safetensors", ss_steps=str(s)) for n, s in ((9, 5), (1, 70))]
    assert names(course(paths)) == (["a-9", "a-1"], [5, 70], "step")
    paths = [put(tmp_path / f"b-{n}.safetensors", ss_epoch=str(s)) for n, s in ((9, 1), (1, 2))]
    assert names(course(paths)) == (["b-9", "b-1"], [1, 2], "epoch")
    # Metadata that does not tell the files apart tells nothing.
    paths = [put(tmp_path / f"c-{n}.safetensors", ss_steps="5") for n in (9, 10)]
    assert names(course(paths)) == (["c-9", "c-10"], [9, 10], "number")


def test_order_by_the_last_number_of_the_name(tmp_path):
    paths = [put(tmp_path / f"{n}.safetensors") for n in ("v2_lr1e-4-000100", "v2_lr1e-4-000020")]
    assert names(course(paths))[1:] == ([20, 100], "number")
    paths = [put(tmp_path / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (500, 90)]
    assert course(paths).times == [90, 500] and course(paths).unit == "step"
    assert course(paths).checkpoints[0].name == "checkpoint-90/adapter_model.safetensors"


def test_a_last_file_without_a_number_of_its_own(tmp_path):
    paths = [put(tmp_path / f"{n}.safetensors") for n in ("style2-000010", "style2-000020")]
    final = put(tmp_path / "style2.safetensors")
    with pytest.raises(AdapterLabError, match=r"no step .* 'style2.safetensors'.*modified"):
        course([final, *paths])
    assert names(course([final, *paths], "as given"))[1:] == ([1, 2, 3], "file")


def test_order_by_time_and_as_given(tmp_path):
    paths = three(tmp_path)
    for path, when in zip(paths, (300, 100, 200), strict=True):
        os.utime(path, (when, when))
    found = course(paths, "modified")
    assert names(found) == (["a-002", "a-003", "a-001"], [1, 2, 3], "file")
    assert "equally spaced" in found.warnings[0]
    assert names(course(paths, "as given"))[1:] == ([10, 20, 30], "step")
    assert names(course(paths[::-1], "as given"))[1:] == ([1, 2, 3], "file")


@pytest.mark.parametrize(("first", "last", "times"), [
    (0, 0, [10, 20, 30]), (20, 0, [20, 30]), (11, 29, [20]), (0, 20, [10, 20]), (-2, 0, [20, 30]),
    (0, -1, [10, 20, 30]), (0, -2, [10, 20]), (-99, 0, [10, 20, 30]), (-2, -2, [20]),
])  # fmt: skip
def test_a_range_of_steps(tmp_path, first, last, times):
    found = course(three(tmp_path)).cut(first, last)
    assert found.times == times
    assert len(found.left_out) == 3 - len(times)


def test_a_range_of_tracked_averages_counts_steps(tmp_path):
    paths = [put(tmp_path / f"r-step{n:08}-ema{s:.3f}.safetensors", tensors(n))
             for n in (1, 2, 3) for s in (0.05, 0.1)]  # fmt: skip
    made = plan(paths, "reconstruct", last=-2)
    assert (made.course.times, made.end) == ([1, 1, 2, 2], 2)
    assert made.snapshots == [(1, 0.05), (1, 0.1), (2, 0.05), (2, 0.1)]


def test_each_profile_takes_its_kind_of_files(tmp_path):
    plain = three(tmp_path)
    tracked = [put(tmp_path / f"a-{k:03}-ema{s:.3f}.safetensors", tensors(k), ss_output_name="a",
                   ss_steps=str(k * 10)) for k in (1, 2) for s in (0.05, 0.1)]  # fmt: skip
    Average(plan(plain, "power")).write(tmp_path / "a-999.safetensors")
    every = [*expand([str(tmp_path)])]
    assert len(every) == 8
    power, near = plan(every, "power"), plan(every, "reconstruct")
    assert [c.path for c in power.files] == plain and [c.path for c in near.files] == tracked
    assert power.course.left_out["a-001-ema0.050.safetensors"] == "a tracked average"
    assert near.course.left_out["a-999.safetensors"] == "it was averaged from files already"
    with pytest.raises(AdapterLabError, match=r"ema_tracking.*power"):
        plan(plain, "reconstruct")
    with pytest.raises(AdapterLabError, match="profile 'reconstruct'"):
        plan(tracked, "musubi beta")
    with pytest.raises(AdapterLabError, match=r"steps of these averages.*order 'step'"):
        plan(tracked[::-1], "reconstruct", order="as given")


def test_lines_are_paths_globs_and_folders(tmp_path):
    paths, other = three(tmp_path / "one [x]"), put(tmp_path / "two" / "b.safetensors")
    (tmp_path / "one [x]" / "notes.txt").write_text("no adapter")
    put(tmp_path / "one [x]" / "state.safetensors")  # of a run
    (tmp_path / "one [x]" / ".adapter_lab-00.tmp").write_bytes(b"half a file")
    folders = [tmp_path / "two", tmp_path]
    assert expand(["one [x]"], folders) == paths
    assert expand(["one [[]x]/*2*", "b.safetensors"], folders) == [paths[1], other]
    assert expand([str(paths[0])], folders) == paths[:1]
    assert sorted(expand(["**/*.safetensors"], folders[1:])) == sorted([*paths, other])
    quoted = [f'"{paths[0]}"', "'b.safetensors'", r"one [[]x]\*2*"]  # as file managers copy them
    assert expand(quoted, folders) == [paths[0], other, paths[1]]
    with pytest.raises(AdapterLabError, match="Nothing matches"):
        expand(["a" * 5000], folders)
    with pytest.raises(AdapterLabError, match=r"Nothing matches 'c\*'.*two"):
        expand(["b.safetensors", "c*"], folders)


def refused(paths, part, profile="power", out=None, **options):
    with pytest.raises(AdapterLabError, match=part):
        Average(plan(paths, profile, **options)).collect()


def test_files_that_have_no_average(tmp_path):
    one, two, third = three(tmp_path)
    refused([], "no files")
    refused([one], "only")
    refused([one, two], "only", first=20)
    refused([one, two], "No checkpoint", first=99)
    refused([one, two, one], "given twice")
    refused([one, tmp_path / "gone.safetensors"], "gone")
    refused([one, two], "no profile", profile="median")
    refused([one, two], "no order", order="random")
    refused([one, put(tmp_path / "b-4.safetensors", tensors(rank=3), ss_steps="40")],
            r"2 tensors.*x.lora_down.weight is \[2, 5\] in 'a-001")  # fmt: skip
    more = {**tensors(), "y.lora_up.weight": torch.ones(2, 2)}
    refused([one, put(tmp_path / "c-4.safetensors", more, ss_steps="40")],
            "'a-001.safetensors' lacks y.lora_up.weight")  # fmt: skip
    louder = put(tmp_path / "d-4.safetensors", tensors(4, alpha=2.0), ss_steps="40")
    refused([one, two, louder], r"alphas of 1 modules differ.*x.alpha \(1, 2\)")
    refused([one, two, louder], "alphas of 1", profile="musubi beta")
    link = tmp_path / "link-9.safetensors"
    link.symlink_to(third)
    refused([one, third, link], "given twice")


def test_other_algorithms_models_and_trainings(tmp_path):
    def pair(key, profile="power", names=("p-1", "p-2")):
        paths = [put(tmp_path / f"{n}.safetensors", tensors(i), **{key: str(i)})
                 for i, n in enumerate(names)]  # fmt: skip
        return Average(plan(paths, profile))

    for key in ("ss_network_module", "ss_base_model_version", "modelspec.architecture"):
        with pytest.raises(AdapterLabError, match=f"not of one training.*{key}.*0, 1"):
            pair(key)
    for key in ("ss_output_name", "ss_session_id", "ss_seed"):
        assert f"{key} differs between the files: 0, 1" in pair(key).outcome.to_text()
    with pytest.raises(AdapterLabError, match="ss_output_name"):
        pair("ss_output_name", "reconstruct", ("p-1-ema0.050", "p-1-ema0.100"))


def test_scales_that_only_the_metadata_tells(tmp_path):
    values = {k: v for k, v in tensors().items() if k != ALPHA}
    paths = [put(tmp_path / f"a-{k}.safetensors", values, ss_network_dim="2",
                 ss_network_alpha=str(k)) for k in (1, 2)]  # fmt: skip
    refused(paths, "ss_network_alpha differs.*1 in 'a-1.safetensors', 2 in 'a-2")


def test_the_same_tensors_in_two_files_are_told(tmp_path):
    paths = three(tmp_path)
    merge_files(paths[:1] + paths[1:2], [0, 1], tmp_path / "m-50.safetensors")
    merge_files(paths[:1] + paths[1:2], [0, 1], tmp_path / "n-60.safetensors")
    twins = [tmp_path / "m-50.safetensors", tmp_path / "n-60.safetensors"]
    assert "The same tensors in m-50" in course(twins, "as given").warnings[0]


@pytest.mark.parametrize(("weights", "part"), [
    ([0.5], "for 2 files"), ([0.5, float("nan")], "finite"), ([], "for 2"),
    ([[0.5], [0.5]], "finite"),
])  # fmt: skip
def test_weights_that_do_not_fit(tmp_path, weights, part):
    with pytest.raises(AdapterLabError, match=part):
        merge_files(three(tmp_path)[:2], weights, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_outputs_that_are_in_the_way(tmp_path):
    paths = three(tmp_path)
    before = paths[0].read_bytes()
    for overwrite in (True, False):
        with pytest.raises(AdapterLabError, match="one of the averaged files"):
            merge_files(paths, [0, 0, 1], paths[0], overwrite=overwrite)
    other = put(tmp_path / "other.safetensors")
    with pytest.raises(AdapterLabError, match="exists"):
        merge_files(paths, [0, 0, 1], other)
    with pytest.raises(AdapterLabError, match="no file 3"):
        merge_files(paths, [0, 0, 1], tmp_path / "out.safetensors", metadata_from=3)
    assert paths[0].read_bytes() == before
    merge_files(paths, [0, 0, 1], other, overwrite=True)
    assert torch.equal(load_file(other)[UP], load_file(paths[2])[UP])


@pytest.mark.parametrize("change", ["touched", "removed"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    paths, out = three(tmp_path), put(tmp_path / "out.safetensors")
    before = out.read_bytes()

    def tick(done, total, what):
        if done == 1:
            paths[1].unlink() if change == "removed" else os.utime(paths[1], (1, 1))

    job = Average(plan(paths, "power"), tick=tick)
    with pytest.raises(AdapterLabError, match=r"a-002.*changed or removed"):
        job.write(out, overwrite=True)
    assert out.read_bytes() == before
    assert not [*tmp_path.glob(".adapter_lab*")]


def test_cancelled_in_the_middle(tmp_path):
    class Stop(Exception):
        pass

    def tick(done, total, what):
        if done == 2:
            raise Stop

    paths = three(tmp_path)
    with pytest.raises(Stop):
        merge_files(paths, [0.2, 0.3, 0.5], tmp_path / "out.safetensors", tick=tick)
    assert sorted(tmp_path.iterdir()) == paths


def test_damaged_numbers_are_named(tmp_path):
    one, two, _ = three(tmp_path)
    broken = tensors()
    broken[DOWN][1, 1] = torch.nan
    put(tmp_path / "a-9.safetensors", broken, ss_steps="90")
    refused([one, two, tmp_path / "a-9.safetensors"], f"a-9.*NaN or infinity in '{DOWN}'")
    huge = {k: torch.full((2, 2), 6e4, dtype=torch.float16) for k in (UP, DOWN)}
    paths = [put(tmp_path / f"h-{k}.safetensors", huge | {"x.b": torch.full((1,), k)})
             for k in (1, 2)]  # fmt: skip
    with pytest.raises(AdapterLabError, match="does not fit"):
        huge[UP][0, 0] = -6e4  # no longer the same in both
        put(tmp_path / "h-2.safetensors", huge | {"x.b": torch.ones(1)})
        merge_files(paths, [2.0, -0.2], tmp_path / "out.safetensors")


def test_a_scale_that_only_a_config_tells_is_written(tmp_path):
    names = {UP: "base_model.model.x.lora_B.weight", DOWN: "base_model.model.x.lora_A.weight"}
    paths = []
    for k in (1, 2):
        values = {names[key]: t for key, t in tensors(k).items() if key in names}
        paths.append(put(tmp_path / f"checkpoint-{k}" / "adapter_model.safetensors", values))
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["x"]}
        (paths[-1].parent / "adapter_config.json").write_text(json.dumps(config))
    made = plan(paths, "power", Settings(0.2))
    Average(made).write(tmp_path / "out" / "mean.safetensors")
    (tmp_path / "out" / "b.safetensors").write_bytes(b"")
    out = read_adapter(tmp_path / "out" / "mean.safetensors")
    assert out.config is None and out["base_model.model.x.alpha"] == 8
    weights = {"x.weight": torch.zeros(6, 5)}
    changed, _ = merge_into(weights, out, targets={"base_model.model.x": "x"})
    mean = {n: sum(w * load_file(p)[names[n]] for w, p in zip(made.weights, paths, strict=True))
            for n in names}  # fmt: skip
    assert torch.allclose(changed["x.weight"], 4 * mean[UP].float() @ mean[DOWN].float(), atol=1e-5)
    config["lora_alpha"] = 9
    (paths[-1].parent / "adapter_config.json").write_text(json.dumps(config))
    refused(paths, "scale in adapter_config.json differs")
