"""Checkpoints as DeepSpeed's folders: read by its own script, and loaded by plain engines."""

from argparse import Namespace
from itertools import product

import exported
import numpy as np
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from dalle_dist.checkpoint.export import deepspeed, universal
from dalle_dist.checkpoint.manifest import read_manifest
from dalle_dist.distributed import process_group
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.testing import run_distributed

STAGES, WORLDS, PRECISIONS = (0, 1, 2, 3), (1, 2), ("fp32", "bf16")


@pytest.fixture
def made(tmp_path):
    return exported.made(process_group.init(), tmp_path / "made")


def write(checkpoint, out, **options):
    manifest = read_manifest(checkpoint)
    return deepspeed.write(checkpoint, manifest, str(out), groups=exported.GROUPS, **options)


def read(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_script_of_deepspeed_finds_our_weights(made, stage, world, tmp_path):
    files = write(made, tmp_path / "out", stage=stage, world=world)
    assert all((tmp_path / "out" / file).exists() for file in files)
    state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "out"))
    assert exported.same(state, exported.whole(made))
    assert (tmp_path / "out" / "latest").read_text() == "global_step6"


def test_flat_partitions_have_equal_even_sizes(made, tmp_path):
    """57 and 17 elements over 3 ranks; the last ones lack what fills up to a multiple of 6."""
    write(made, tmp_path / "out", stage=2, world=3)
    found = [
        read(tmp_path / "out" / "global_step6" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")[
            "optimizer_state_dict"
        ]
        for rank in range(3)
    ]
    states = [part["base_optimizer_state"]["state"] for part in found]
    assert [[s[n]["exp_avg"].numel() for n in (0, 1)] for s in states] == [[20, 6]] * 3
    assert [part["group_paddings"] for part in found] == [[0, 0], [0, 0], [3, 1]]
    weights = [[f.numel() for f in part["single_partition_of_fp32_groups"]] for part in found]
    assert weights == [[20, 6], [20, 6], [17, 5]]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_module_is_whole(made, stage, tmp_path):
    write(made, tmp_path / "out", stage=stage, world=2)
    module = read(tmp_path / "out" / "global_step6" / "mp_rank_00_model_states.pt")
    assert exported.same(module["module"], exported.whole(made))
    assert (module["global_steps"], module["skipped_steps"]) == (6, 1)


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_packed_moments_are_unpacked(made, kind, tmp_path):
    write(made, tmp_path / "out", stage=0)
    found = read(tmp_path / "out" / "global_step6" / "mp_rank_00_model_states.pt")["optimizer"]
    names = [name for group in exported.GROUPS for name in group.shapes]
    state = {names[number]: state[kind] for number, state in found["state"].items()}
    assert exported.same(state, exported.whole(made, kind))
    assert [group["weight_decay"] for group in found["param_groups"]] == [0.3, 0.0]
    assert {int(state["step"]) for state in found["state"].values()} == {5}


def test_sub_groups_of_stage_3_hold_their_share(made, tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed, "_sub_group", lambda manifest: 4)
    write(made, tmp_path / "out", stage=3, world=2)
    state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "out"))
    assert exported.same(state, exported.whole(made))
    file = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    found = read(tmp_path / "out" / "global_step6" / file)["optimizer_state_dict"]
    assert [flat.numel() for flat in found["fp32_flat_groups"]] == [18, 11, 2 + 1 + 7]
    groups = found["optimizer_state_dict"]["param_groups"]
    assert [group["params"] for group in groups] == [[0, 1], [2]]


def test_without_a_wish_the_layout_is_that_of_a_node_of_the_run(made, tmp_path):
    files = write(made, tmp_path / "out")
    names = [file.rpartition("/")[2] for file in files]
    assert names == [
        "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_to_fp32.py", "latest",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stage": 4}, "stage: 4"),
        ({"world": 0}, "world: 0"),
        ({"precision": "fp8"}, "precision: 'fp8'"),
    ],
)
def test_what_there_is_not_is_refused(made, options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        write(made, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(made, tmp_path):
    write(made, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds an export already"):
        write(made, tmp_path / "out")


def goes_on(ranks, checkpoint, folder, is_universal):
    """Under each stage and precision, our losses and those of plain DeepSpeed."""
    found = {}
    for stage, precision, optimizer in product(STAGES, PRECISIONS, ("ours", "torch")):
        if is_universal and stage == 0:
            continue
        engine = exported.plain_engine(stage, precision, optimizer, is_universal)
        place = folder if is_universal else folder / f"{stage}-{precision}"
        path, _ = engine.load_checkpoint(str(place), load_lr_scheduler_states=False)
        assert path is not None
        if is_universal and stage == 3:
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
        theirs = exported.continued(ranks, engine)
        ours = exported.resumed(ranks, checkpoint, stage, precision)
        found[stage, precision, optimizer] = ours, theirs
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_distributed(exported.saved, 2, tmp_path_factory.mktemp("run"), 2, "fp32")[0]


def assert_same_courses(found, number):
    assert len(found) == number
    for (stage, precision, optimizer), (ours, theirs) in found.items():
        if optimizer == "ours":
            assert theirs == ours, (stage, precision)
        # torch's own arithmetic rounds elsewhere
        close = 1e-6 if precision == "fp32" else 1e-5
        assert np.allclose(theirs, ours, rtol=close), (stage, precision)
        assert len(set(ours)) == exported.AHEAD


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_plain_engine_goes_on_as_ours_does(run, world, tmp_path):
    manifest = read_manifest(run)
    for stage, precision in product(STAGES, PRECISIONS):
        out = str(tmp_path / f"{stage}-{precision}")
        deepspeed.write(run, manifest, out, stage=stage, world=world, precision=precision)
    (found, *_) = run_distributed(goes_on, world, run, tmp_path, False, timeout=400)
    assert_same_courses(found, 16)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_universal_checkpoint_goes_on_under_any_stage(run, world, tmp_path):
    universal.write(run, read_manifest(run), str(tmp_path))
    (found, *_) = run_distributed(goes_on, world, run, tmp_path, True, timeout=400)
    assert_same_courses(found, 12)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_universal_folder_is_what_deepspeed_makes_of_ours(made, stage, tmp_path):
    write(made, tmp_path / "zero", stage=stage, world=2)
    theirs, tag = tmp_path / "theirs", "global_step6"
    ds_to_universal.main(
        Namespace(
            input_folder=str(tmp_path / "zero" / tag), output_folder=str(theirs / tag),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
            inject_missing_state=False,
        )
    )  # fmt: skip
    manifest = read_manifest(made)
    universal.write(made, manifest, str(tmp_path / "ours"), groups=exported.GROUPS)
    ours = tmp_path / "ours"
    assert (ours / "latest_universal").read_text() == (theirs / "latest_universal").read_text()
    for name, kind in product(exported.SHAPES, ("fp32", "exp_avg", "exp_avg_sq")):
        file = f"{tag}/zero/{name}/{kind}.pt"
        mine, other = read(ours / file), read(theirs / file)
        if stage == 3:  # whose files there have no shape
            assert torch.equal(mine["param"].view(-1), other)
        else:
            assert mine.keys() == other.keys()
            assert torch.equal(mine["param"], other["param"])
            assert read(ours / tag / "zero" / name / "step.pt") == 5
    groups = [read(f / tag / "zero" / "optimizer_state.pt")["param_groups"] for f in (ours, theirs)]
    assert groups[0] == groups[1]
