"""One holder at a time, on a store with conditional writes and on a bare folder."""

import os
import threading

import boto3
import pytest

from dalle_dist import storage
from dalle_dist.errors import DataError, UserError
from dalle_dist.storage.conditional import Conflict, FileCell, StoredCell
from dalle_dist.storage.lease import Lease, LeaseLost, Record
from dalle_dist.storage.retry import PassingTrouble
from dalle_dist.storage.s3 import S3Store
from dalle_dist.storage.store import NoConditions

SHORT = 1.0  # seconds


@pytest.fixture(params=["store", "folder"])
def cell(request, tmp_path):
    if request.param == "folder":
        return FileCell(tmp_path / "run" / ".lease")
    return StoredCell(f"{request.getfixturevalue('bucket')}/run/.lease")


@pytest.fixture
def said():
    return []


@pytest.fixture
def take(cell, said):
    """Takes a lease that is let go at the end."""
    held = []

    def taken(seconds=SHORT, of=Lease):
        held.append(of(cell, "RUN", said.append, seconds))
        return held[-1]

    yield taken
    for lease in held:
        lease.release(used=True)


class Stopped(Lease):
    """Of a process that sleeps: it renews nothing by itself."""

    def _renew_in_time(self):
        pass


def test_a_second_is_refused_while_the_first_renews(take, said):
    first = take()
    with pytest.raises(UserError, match=rf"RUN: another .* \(process {os.getpid()} on ") as caught:
        take()
    assert "\n" not in str(caught.value) and len(said) == 1
    first.fence()


def test_after_a_release_nobody_waits(take, said):
    take().release(used=True)
    take().fence()
    assert said == []


def test_of_one_that_was_not_used_nothing_is_left(take, cell, tmp_path):
    take().release(used=False)
    assert cell.read() is None and not list(tmp_path.rglob(".lease"))


def test_a_lease_that_nobody_renews_ends_and_its_holder_can_do_nothing_more(take, said):
    sleeper = take(of=Stopped)
    second = take()
    assert len(said) == 1 and f"process {os.getpid()} on " in said[0]
    with pytest.raises(LeaseLost, match=r"RUN: another process took this run over") as caught:
        sleeper.fence()
    assert sleeper.lost and "\n" not in str(caught.value)
    sleeper.release(used=False)
    second.fence()


def test_one_that_slept_and_was_not_replaced_goes_on(take):
    sleeper = take(seconds=60.0, of=Stopped)
    sleeper._renewed -= 1000.0
    sleeper.fence()
    assert not sleeper.lost


def test_of_many_at_once_one_has_it(cell):
    taken, lost = [], []

    def run():
        try:
            taken.append(Lease(cell, "RUN", print, 5.0))
        except UserError as error:
            lost.append(str(error))

    cell.write(Record("x", "h", 1, 0, 5.0, released=True).encoded(), None)
    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(lost) == 5
    taken[0].fence()
    taken[0].release(used=True)


def test_a_file_that_was_replaced_is_not_written_after_all_are_gone(tmp_path):
    folder = tmp_path / ".lease"
    zombie, other = FileCell(folder), FileCell(folder)
    version = zombie.write(b"a", None)
    other.remove(other.write(b"c", other.write(b"b", version)))
    with pytest.raises(Conflict):
        zombie.write(b"d", version)
    assert not folder.exists()


def test_a_renewal_whose_answer_is_lost_is_ours(bucket, monkeypatch, hurried):
    lease = Stopped(StoredCell(f"{bucket}/.lease"), "RUN", print, 60.0)
    whole, lost = S3Store.put_if, []

    def answerless(self, *arguments):
        version = whole(self, *arguments)
        if len(lost) < 2:
            lost.append(version)
            raise PassingTrouble("connection", "gone")
        return version

    monkeypatch.setattr(S3Store, "put_if", answerless)
    lease.fence()
    assert lost
    lease.fence()
    assert not lease.lost


def test_a_renewal_that_failed_after_it_was_written_is_ours(bucket, monkeypatch, hurried):
    lease = Stopped(StoredCell(f"{bucket}/.lease"), "RUN", print, 60.0)
    whole = S3Store.put_if

    def answerless(self, *arguments):
        whole(self, *arguments)
        raise DataError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(S3Store, "put_if", answerless)
        with pytest.raises(DataError, match="no answer"):
            lease.fence()
    lease.fence()
    assert not lease.lost


def test_a_store_that_ignores_conditions_is_found_out(bucket, monkeypatch):
    def ignoring(self, path, data, _version):
        client = boto3.client("s3")
        _, _, name, key = path.split("/", 3)
        return client.put_object(Bucket=name, Key=key, Body=data)["ETag"]

    monkeypatch.setattr(S3Store, "put_if", ignoring)
    with pytest.raises(NoConditions, match="ignores the conditions of writes"):
        Lease(StoredCell(f"{bucket}/.lease"), "RUN", print, 60.0)
    assert not storage.exists(f"{bucket}/.lease")


def test_a_store_of_another_scheme_says_that_it_has_no_conditions(tmp_path):
    with pytest.raises(NoConditions, match="no conditional writes to memory://"):
        Lease(StoredCell(f"memory:/{tmp_path}/.lease"), "RUN", print, 60.0)
