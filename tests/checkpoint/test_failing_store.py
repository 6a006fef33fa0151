"""A store that fails in the middle of a save or of a resume: nothing good is lost."""

import os
from pathlib import Path

import boto3
import pytest

from dalle_dist import storage
from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.manifest import Manifest, read_manifest
from dalle_dist.checkpoint.names import MANIFEST
from dalle_dist.checkpoint.save import Saver
from dalle_dist.distributed import process_group
from dalle_dist.errors import CheckpointError, DataError
from dalle_dist.gradients.piece import Piece
from dalle_dist.storage.lease import LeaseLost
from dalle_dist.storage.retry import PassingTrouble
from dalle_dist.storage.s3 import S3Store
from dalle_dist.storage.settings import SETTINGS
from dalle_dist.testing import run_distributed
from tests.storage.faulty_proxy import FaultyProxy


@pytest.fixture
def ranks():
    return process_group.init()


def write(folder, step, ranks, scratch, keep=2, fence=lambda: None):
    import torch

    saver = Saver(folder, ranks, scratch, keep, fence=fence)
    start = 8 * ranks.rank
    kinds = {"weights": [Piece("w", start, torch.arange(8.0) + step)]}
    saver.save(Manifest(step, {}, {}, {"stage": "dvae"}, {}), kinds)
    saver.wait()


def failing(method, part, times=10**9):
    """A plan: the store answers 500 to such requests, so many times."""
    met = []

    def plan(asked, path, _range):
        if asked == method and part in path and len(met) < times:
            met.append(path)
            return "500"
        return ""

    return plan


IN_A_SAVE = [
    ("PUT", "step-00000003/weights", False),
    ("PUT", "step-00000003/manifest", False),
    ("PUT", "/latest", True),
    ("DELETE", "step-00000001/manifest", True),
    ("DELETE", "step-00000001/weights", True),
]


@pytest.mark.parametrize(("method", "part", "counts"), IN_A_SAVE)
def test_a_save_that_the_store_cuts_off(
    bucket, s3_server, ranks, tmp_path, monkeypatch, hurried, method, part, counts
):
    monkeypatch.setattr(hurried, "attempts", 2)
    for step in (1, 2):
        write(bucket, step, ranks, tmp_path)
    with FaultyProxy(s3_server, failing(method, part)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(CheckpointError) as caught:
            write(bucket, 3, ranks, tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{bucket}/step-00000003: {'saved, but' if counts else 'not saved ('}")
    assert "500 InternalError" in line and "--resume auto" in line and "\n" not in line
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    said = []
    step = 3 if counts else 2
    assert store.newest(bucket, ranks, said.append) == f"{bucket}/step-{step:08d}"
    assert not said and store.problem(f"{bucket}/step-00000002") is None
    write(bucket, 4, ranks, tmp_path)
    names = storage.list_files(bucket)
    whole = {name.split("/")[0] for name in names if name.endswith(MANIFEST)}
    assert whole == {"step-00000004", f"step-{step:08d}"}
    assert len(names) == 5, f"leftovers: {names}"


@pytest.mark.parametrize(("method", "part", "counts"), IN_A_SAVE)
def test_a_save_outlasts_a_short_failure(
    bucket, s3_server, ranks, tmp_path, monkeypatch, hurried, method, part, counts
):
    for step in (1, 2):
        write(bucket, step, ranks, tmp_path)
    with FaultyProxy(s3_server, failing(method, part, times=3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        write(bucket, 3, ranks, tmp_path)
        assert proxy.injected["InternalError"] + proxy.injected["500"] == 3
        assert store.steps(bucket) == [2, 3]
        assert store.newest(bucket, ranks) == f"{bucket}/step-00000003"


def _fails_on_all(ranks, environ, folder, scratch):
    os.environ.update(environ)
    SETTINGS.attempts, SETTINGS.base = 2, 0.01
    with pytest.raises(CheckpointError) as caught:
        write(folder, 2, ranks, scratch)
    return str(caught.value)


def test_a_file_that_one_rank_cannot_upload_is_one_line_on_all(bucket, s3_server, ranks, tmp_path):
    write(bucket, 1, ranks, tmp_path)
    with FaultyProxy(s3_server, failing("PUT", "step-00000002/weights-rank-00001")) as proxy:
        environ = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        environ |= {"AWS_ENDPOINT_URL": proxy.url, "DALLE_DIST_CACHE": str(tmp_path / "cache")}
        lines = run_distributed(_fails_on_all, 2, environ, bucket, tmp_path)
    assert lines[0] == lines[1] and "not saved (rank 1: " in lines[0]
    assert store.newest(bucket) == f"{bucket}/step-00000001"


def test_a_resume_that_the_store_cuts_off_is_refused_by_name(
    bucket, s3_server, ranks, tmp_path, monkeypatch, hurried
):
    monkeypatch.setattr(hurried, "attempts", 2)
    for step in (1, 2):
        write(bucket, step, ranks, tmp_path)
    monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / "another"))
    with FaultyProxy(s3_server, failing("GET", "step-00000002/weights")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(DataError, match=r"step-00000002/weights.*500"):
            store.newest(bucket, ranks)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert store.newest(bucket, ranks) == f"{bucket}/step-00000002"


@pytest.mark.parametrize("damage", ["missing", "other bytes", "cut"])
def test_a_checkpoint_that_is_damaged_there_is_passed_over(bucket, ranks, tmp_path, damage):
    for step in (1, 2):
        write(bucket, step, ranks, tmp_path)
    (name,) = read_manifest(f"{bucket}/step-00000002").files
    path = f"{bucket}/step-00000002/{name}"
    data = storage.read_bytes(path)
    storage.remove(path)
    if damage != "missing":
        storage.write_bytes(path, data[:-1] + (b"\xff" if damage == "other bytes" else b""))
    said = []
    assert store.newest(bucket, ranks, said.append) == f"{bucket}/step-00000001"
    (line,) = said
    assert name in line and line.endswith("; passed over")
    assert storage.exists(f"{bucket}/step-00000002/{store.DAMAGED}")


def test_a_step_saved_again_replaces_the_old_one_at_once(bucket, ranks, tmp_path):
    write(bucket, 2, ranks, tmp_path)
    first = storage.list_files(bucket)
    write(bucket, 2, ranks, tmp_path)
    assert store.problem(f"{bucket}/step-00000002") is None
    assert len(storage.list_files(bucket)) == len(first) == 3


def test_who_stops_after_the_fence_cannot_replace_what_another_published(bucket):
    target, asked = f"{bucket}/step-00000002", []

    def fence():
        asked.append(True)
        if len(asked) == 2:  # between the last fence and the PUT
            boto3.client("s3").put_object(
                Bucket=bucket[5:], Key=f"step-00000002/{MANIFEST}", Body=b"of another"
            )

    with pytest.raises(CheckpointError, match="another process saved this step meanwhile"):
        store.publish(Path("unused"), target, Manifest(2, {}, {}, {}, {}), fence)
    assert storage.read_bytes(f"{target}/{MANIFEST}") == b"of another"


def test_a_manifest_whose_answer_was_lost_counts(bucket, ranks, tmp_path, monkeypatch, hurried):
    whole, lost = S3Store.put_if, []

    def answerless(self, *arguments):
        version = whole(self, *arguments)
        if not lost:
            lost.append(version)
            raise PassingTrouble("connection", "gone")
        return version

    monkeypatch.setattr(S3Store, "put_if", answerless)
    write(bucket, 1, ranks, tmp_path)
    assert lost and store.newest(bucket, ranks) == f"{bucket}/step-00000001"


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("allowed", range(4))
def test_a_run_that_was_taken_over_changes_nothing_that_counts(
    request, ranks, tmp_path, remote, allowed
):
    """Lost after so many questions: before the files, the manifest, `latest`, the deletions."""
    folder = request.getfixturevalue("bucket") if remote else str(tmp_path / "checkpoints")
    for step in (1, 2):
        write(folder, step, ranks, tmp_path / "scratch")
    asked = []

    def fence():
        asked.append(True)
        if len(asked) > allowed + (remote and allowed > 1):  # a remote manifest asks twice
            raise LeaseLost("taken")

    with pytest.raises(CheckpointError, match=r"^taken$"):
        write(folder, 3, ranks, tmp_path / "scratch", fence=fence)
    published = allowed > 1
    assert store.steps(folder) == ([1, 2, 3] if published else [1, 2])
    latest = storage.read_bytes(f"{folder}/latest").decode()
    assert latest == ("step-00000003\n" if allowed > 2 else "step-00000002\n")
