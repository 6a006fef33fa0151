import errno
import json

import pytest

from dalle_dist.checkpoint import store
from dalle_dist.distributed import process_group
from dalle_dist.errors import CheckpointError
from dalle_dist.testing import run_distributed


def _writer(ranks, text="x" * 1000):
    def write(folder):
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / f"rank-{ranks.rank}.bin").write_text(text)

    return write


@pytest.fixture
def ranks():
    return process_group.init()


def _save(folder, step, ranks, keep=2):
    return store.save(folder, step, _writer(ranks, f"step {step}"), ranks, keep)


def test_saved_steps_are_found_newest_first_and_only_keep_remain(tmp_path, ranks):
    assert store.latest(tmp_path / "none") is None
    for step in (10, 20, 30):
        path = _save(tmp_path, step, ranks)
    assert path == tmp_path / "step-00000030" == store.latest(tmp_path)
    assert store.steps(tmp_path) == [20, 30]
    assert json.loads((path / "manifest.json").read_text())["files"]["sub/rank-0.bin"]["bytes"] == 7


def test_half_written_and_damaged_checkpoints_are_passed_over(tmp_path, ranks):
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, ranks, keep=4)
    (tmp_path / "step-00000009.tmp").mkdir()
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    (tmp_path / "step-00000003" / "sub" / "rank-0.bin").write_text("step X")  # same length
    (tmp_path / "step-00000002" / "sub" / "rank-0.bin").unlink()
    assert store.latest(tmp_path) == tmp_path / "step-00000001"
    for step, reason in ((4, "manifest"), (3, "sha256"), (2, "missing")):
        with pytest.raises(CheckpointError, match=reason):
            store.verify(tmp_path / f"step-{step:08d}")


def test_a_cut_file_is_named_with_both_sizes(tmp_path, ranks):
    path = _save(tmp_path, 1, ranks)
    (path / "sub" / "rank-0.bin").write_text("st")
    with pytest.raises(CheckpointError, match=r"sub/rank-0.bin has 2 bytes, saved with 6"):
        store.verify(path)


def test_saving_an_earlier_step_again_replaces_it_and_drops_the_abandoned_course(tmp_path, ranks):
    for step in (1, 2, 3):
        _save(tmp_path, step, ranks, keep=5)
    store.save(tmp_path, 2, _writer(ranks, "second course"), ranks, 5)
    assert store.steps(tmp_path) == [1, 2]
    assert (tmp_path / "step-00000002/sub/rank-0.bin").read_text() == "second course"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_killed_save_is_cleared_away_by_the_next(tmp_path, ranks):
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-00000005.tmp" / "half").write_text("half")
    _save(tmp_path, 6, ranks)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006"]


def _disk_full_on_last_rank(ranks, folder):
    def write(partial):
        _writer(ranks)(partial)
        if ranks.rank == ranks.world - 1:
            raise RuntimeError("writing failed") from OSError(errno.ENOSPC, "No space left")

    _save(folder, 1, ranks)
    with pytest.raises(CheckpointError) as caught:
        store.save(folder, 2, write, ranks, 2)
    ranks.barrier()
    return str(caught.value), sorted(p.name for p in folder.iterdir())


def test_disk_full_on_one_rank_is_one_line_on_all_and_leaves_nothing(tmp_path):
    outcomes = run_distributed(_disk_full_on_last_rank, 2, tmp_path)
    assert outcomes[0] == outcomes[1]
    message, left = outcomes[0]
    assert "step-00000002: not saved (rank 1: disk full)" in message
    assert "\n" not in message
    assert left == ["step-00000001"]


def _save_and_find(ranks, folder):
    path = _save(folder, 7, ranks)
    return path, store.latest(folder, ranks), store.problem(path, ranks)


def test_all_ranks_write_into_one_checkpoint_and_agree_on_it(tmp_path):
    path = tmp_path / "step-00000007"
    assert run_distributed(_save_and_find, 2, tmp_path) == [(path, path, None)] * 2
    names = json.loads((path / "manifest.json").read_text())["files"]
    assert list(names) == ["sub/rank-0.bin", "sub/rank-1.bin"]


def _save_apart(ranks, folder):
    """Machines with folders of their own; the writer would wait for the other rank."""
    own = folder / f"node-{ranks.rank}"
    with pytest.raises(CheckpointError) as caught:
        store.save(own, 7, lambda partial: ranks.barrier(), ranks, 2)
    latest = store.latest(own, ranks)
    return str(caught.value), latest, sorted(p.name for p in folder.rglob("*"))


def test_ranks_that_do_not_share_the_folder_are_told_so_before_anything_is_written(tmp_path):
    (tmp_path / "node-1" / "step-00000003").mkdir(parents=True)
    for message, latest, left in run_distributed(_save_apart, 2, tmp_path):
        assert "rank 1: it does not see the folder that rank 0 made" in message
        assert "\n" not in message
        assert latest is None
        assert left == ["node-0", "node-1", "step-00000003"]
