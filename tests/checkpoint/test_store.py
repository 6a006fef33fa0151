"""Folders of checkpoints: what is whole, what is kept, what a failing rank leaves."""

import errno
import json
from pathlib import Path

import pytest
import torch

from dalle_dist.checkpoint import save, store
from dalle_dist.checkpoint.manifest import Manifest, read_manifest
from dalle_dist.checkpoint.read import TensorSource
from dalle_dist.checkpoint.save import Saver
from dalle_dist.distributed import process_group
from dalle_dist.errors import CheckpointError
from dalle_dist.gradients.piece import Piece
from dalle_dist.testing import run_distributed


@pytest.fixture
def ranks():
    return process_group.init()


def pieces(ranks, value):
    """Each rank has 8 elements of one parameter."""
    start = 8 * ranks.rank
    return {"weights": [Piece("w", start, torch.arange(start, start + 8.0) + value)]}


def manifest(step):
    return Manifest(step, {}, {}, {"stage": "dvae"}, {})


def write(folder, step, ranks, keep=2, value=0, keep_every=0):
    saver = Saver(str(folder), ranks, Path(folder) / "scratch", keep, keep_every)
    saver.save(manifest(step), pieces(ranks, value))
    saver.wait()
    return store.step_folder(str(folder), step)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_saved_steps_are_found_newest_first_and_only_keep_remain(tmp_path, ranks):
    assert store.newest(str(tmp_path / "none")) == ""
    for step in (10, 20, 30):
        path = write(tmp_path, step, ranks)
    assert path == f"{tmp_path}/step-00000030" == store.newest(str(tmp_path))
    assert store.steps(str(tmp_path)) == [20, 30]
    assert (tmp_path / "latest").read_text() == "step-00000030\n"
    (entry,) = read_manifest(path).files.values()
    file = Path(path) / "weights-rank-00000.safetensors"
    assert (entry.bytes, entry.pieces) == (file.stat().st_size, {"w@0": 8})


def test_milestones_are_kept_beside_the_newest(tmp_path, ranks):
    for step in range(1, 8):
        write(tmp_path, step, ranks, keep=1, keep_every=3)
    assert store.steps(str(tmp_path)) == [3, 6, 7]


def test_damaged_checkpoints_are_said_set_aside_and_not_deleted(tmp_path, ranks):
    said = []
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step, ranks, keep=5)
    (tmp_path / "step-00000009.tmp").mkdir()
    flip(tmp_path / "step-00000005/manifest.json", at=200)
    flip(tmp_path / "step-00000004/weights-rank-00000.safetensors")
    (tmp_path / "step-00000003/weights-rank-00000.safetensors").unlink()
    with (tmp_path / "step-00000002/weights-rank-00000.safetensors").open("ab") as file:
        file.truncate(50)
    assert store.newest(str(tmp_path), ranks, said.append) == f"{tmp_path}/step-00000001"
    reasons = ("manifest.json is damaged", "its hash differs", "is missing", "has 50 bytes, saved")
    for line, step, reason in zip(said, (5, 4, 3, 2), reasons, strict=True):
        assert line.startswith(f"{tmp_path}/step-0000000{step}: ")
        assert reason in line and line.endswith("; passed over") and "\n" not in line
    assert store.steps(str(tmp_path)) == [1]
    write(tmp_path, 2, ranks, keep=5)
    left = {p.name for p in tmp_path.glob("step-*/manifest.json.damaged")}
    assert left and (tmp_path / "step-00000004/weights-rank-00000.safetensors").exists()


@pytest.mark.parametrize("at", [0, 9, 60, -1])
def test_any_bit_of_a_file_counts(tmp_path, ranks, at):
    path = write(tmp_path, 1, ranks)
    store.verify(path)
    flip(Path(path) / "weights-rank-00000.safetensors", at)
    with pytest.raises(CheckpointError, match=r"weights-rank-00000.safetensors is damaged"):
        store.verify(path)


def test_a_manifest_of_another_format_is_no_damage(tmp_path, ranks):
    path = Path(write(tmp_path, 1, ranks)) / "manifest.json"
    path.write_text(json.dumps({"step": 1, "world": 1, "files": {}}))
    with pytest.raises(CheckpointError, match=r"format 1, and this version reads 2"):
        read_manifest(str(path.parent))


def test_saving_an_earlier_step_again_replaces_it_and_drops_the_abandoned_course(tmp_path, ranks):
    for step in (1, 2, 3):
        write(tmp_path, step, ranks, keep=5)
    path = write(tmp_path, 2, ranks, keep=5, value=7)
    assert store.steps(str(tmp_path)) == [1, 2]
    source = TensorSource.of_checkpoint(path, read_manifest(path), "weights")
    assert source.tensor("w", (8,)).tolist() == [x + 7.0 for x in range(8)]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["latest", "step-00000001", "step-00000002"]


class Killed(BaseException):
    pass


def test_what_a_save_was_to_replace_is_put_back_when_it_was_killed(tmp_path, ranks, monkeypatch):
    """Between the two renames the step has no folder of its name."""
    path = Path(write(tmp_path, 2, ranks))

    def phase(name):
        if name == "replaced":
            raise Killed

    monkeypatch.setattr(store, "phase", phase)
    partial = tmp_path / "step-00000002.new.tmp"
    partial.mkdir()
    with pytest.raises(Killed):
        store.publish(partial, str(path), read_manifest(str(path)))
    assert not path.exists()
    assert store.newest(str(tmp_path), ranks) == str(path)
    monkeypatch.undo()
    with pytest.raises(Killed):
        monkeypatch.setattr(store, "phase", phase)
        store.publish(partial, str(path), read_manifest(str(path)))
    monkeypatch.undo()
    write(tmp_path, 3, ranks)
    assert store.steps(str(tmp_path)) == [2, 3]


def test_a_step_that_is_saved_again_leaves_its_damaged_one(tmp_path, ranks):
    path = Path(write(tmp_path, 2, ranks))
    flip(path / "weights-rank-00000.safetensors")
    assert store.newest(str(tmp_path), ranks, lambda line: None) == ""
    write(tmp_path, 2, ranks)
    (aside,) = tmp_path.glob("step-00000002.*.damaged")
    assert (aside / "weights-rank-00000.safetensors").is_file()
    assert store.newest(str(tmp_path), ranks) == str(path)


def test_a_killed_save_is_cleared_away_by_the_next(tmp_path, ranks):
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-00000005.tmp" / "half").write_text("half")
    write(tmp_path, 6, ranks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000006"]


def test_the_copy_is_of_the_moment_of_the_call(tmp_path, ranks):
    """The thread is held until the trainer has changed what it copied."""
    saver, live = Saver(str(tmp_path), ranks, tmp_path / "scratch", 1), pieces(ranks, 0)
    changed = []

    def phase(name):
        while name == "prepared" and not changed:
            pass

    store.phase = phase
    try:
        saver.save(manifest(1), live)
        live["weights"][0].values.fill_(-1)
        changed.append(True)
        saver.wait()
    finally:
        store.phase = lambda name: None
    path = f"{tmp_path}/step-00000001"
    source = TensorSource.of_checkpoint(path, read_manifest(path), "weights")
    assert source.tensor("w", (8,)).tolist() == list(range(8))


def _fails_on_last_rank(ranks, folder, error):
    def failing(path, pieces):
        if ranks.rank == ranks.world - 1:
            raise error
        return original(path, pieces)

    write(folder, 1, ranks)
    original, save._write_file = save._write_file, failing
    with pytest.raises(CheckpointError) as caught:
        write(folder, 2, ranks)
    save._write_file = original
    ranks.barrier()
    return str(caught.value), sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (MemoryError(), "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_a_failure_on_one_rank_is_one_line_on_all_and_leaves_nothing(tmp_path, error, said):
    outcomes = run_distributed(_fails_on_last_rank, 2, tmp_path, error)
    assert outcomes[0] == outcomes[1]
    message, left = outcomes[0]
    assert "step-00000002: not saved (rank 1: " in message and said in message
    assert "\n" not in message
    assert left == ["latest", "step-00000001"]


def _save_and_find(ranks, folder):
    path = write(folder, 7, ranks)
    return path, store.newest(str(folder), ranks), store.problem(path, ranks)


def test_all_ranks_write_into_one_checkpoint_and_agree_on_it(tmp_path):
    path = f"{tmp_path}/step-00000007"
    assert run_distributed(_save_and_find, 2, tmp_path) == [(path, path, None)] * 2
    names = list(read_manifest(path).files)
    assert names == [f"weights-rank-0000{rank}.safetensors" for rank in (0, 1)]


def _save_apart(ranks, folder):
    """Machines with folders of their own."""
    own = folder / f"node-{ranks.rank}"
    with pytest.raises(CheckpointError) as caught:
        write(own, 7, ranks)
    found = store.newest(str(own), ranks)
    return str(caught.value), found, sorted(p.name for p in folder.rglob("*"))


def test_ranks_that_do_not_share_the_folder_are_told_so(tmp_path):
    (tmp_path / "node-1").mkdir(parents=True)
    for message, found, left in run_distributed(_save_apart, 2, tmp_path):
        assert "rank 1: it does not see the folder that rank 0 made" in message
        assert "\n" not in message
        assert found == ""
        assert left == ["node-0", "node-1"]
