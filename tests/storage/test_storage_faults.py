"""Objects arrive whole through a network that fails in every way it can."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from faulty_proxy import ERRORS, OF_BODIES, Faults, FaultyProxy

from dalle_dist import storage
from dalle_dist.errors import DataError
from dalle_dist.storage import s3

KINDS = {*ERRORS, *OF_BODIES}


def _fill(bucket, count, size):
    """Objects of random bytes, by path."""
    dice = random.Random(1)
    objects = {f"{bucket}/o/{i:04d}": dice.randbytes(size + i) for i in range(count)}
    client = boto3.client("s3")
    for path, data in objects.items():
        client.put_object(Bucket=bucket[5:], Key=path.removeprefix(f"{bucket}/"), Body=data)
    return objects


def assert_all_arrive(objects):
    """Several at a time; every other one as an index knows it, the rest as the store says."""

    def fetch(numbered):
        i, (path, data) = numbered
        known = (len(data), hashlib.sha256(data).hexdigest()) if i % 2 else ()
        return storage.fetch(path, *known).read_bytes() == data

    with ThreadPoolExecutor(5) as pool:
        assert all(list(pool.map(fetch, enumerate(objects.items()))))


def _fetch_until(faults, objects, proxy, monkeypatch, tmp_path):
    """Again and again on new nodes, until so many faults, and each kind of them, were met."""
    for number in range(8):
        monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / f"node-{number}"))
        assert_all_arrive(objects)
        if sum(proxy.injected.values()) >= faults and set(proxy.injected) == KINDS:
            break


@pytest.fixture
def faulty(s3_server, monkeypatch, hurried):
    """Makes and enters a proxy before moto's server, to which all requests go from then on."""
    entered = []

    def enter(plan):
        entered.append(FaultyProxy(s3_server, plan, stall=5).__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", entered[-1].url)
        return entered[-1]

    yield enter
    for proxy in entered:
        proxy.__exit__()


def test_everything_arrives_through_sixty_faults(bucket, faulty, hurried, monkeypatch, tmp_path):
    objects = _fill(bucket, 30, 4000)
    monkeypatch.setattr(hurried, "read_part", 1000)
    monkeypatch.setattr(hurried, "read_timeout", 1.0)
    monkeypatch.setattr(hurried, "threads", 2)
    before = storage.retries()
    proxy = faulty(Faults(seed=2, share=0.4))
    _fetch_until(60, objects, proxy, monkeypatch, tmp_path)
    assert sum(proxy.injected.values()) >= 60 and set(proxy.injected) == KINDS
    noticed = storage.retries() - before
    assert set(noticed) >= {"server", "busy", "credentials", "timeout", "wrong bytes"}
    # All but the slow ones cost an attempt.
    assert sum(noticed.values()) >= 60 - proxy.injected["slow"]


@pytest.mark.slow
def test_everything_arrives_through_a_thousand_faults(
    bucket, faulty, hurried, monkeypatch, tmp_path
):
    objects = _fill(bucket, 150, 3000)
    monkeypatch.setattr(hurried, "read_part", 2000)
    monkeypatch.setattr(hurried, "read_timeout", 1.0)
    monkeypatch.setattr(hurried, "threads", 2)
    proxy = faulty(Faults(seed=3, share=0.6))
    _fetch_until(1001, objects, proxy, monkeypatch, tmp_path)
    print(sum(proxy.injected.values()), "faults:", dict(proxy.injected), dict(storage.retries()))
    assert sum(proxy.injected.values()) > 1000 and set(proxy.injected) == KINDS


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_fault_is_survived_and_one_that_stays_is_one_line(
    bucket, faulty, hurried, monkeypatch, kind
):
    data = b"d" * 3000
    storage.write_bytes(f"{bucket}/x", data)
    left = [2]

    def plan(method, path, range_):
        left[0] -= bool(range_)
        return kind if range_ and left[0] >= 0 else ""

    faulty(plan)
    known = (len(data), hashlib.sha256(data).hexdigest())
    assert storage.fetch(f"{bucket}/x", *known).read_bytes() == data
    if kind == "slow":
        return
    monkeypatch.setattr(hurried, "attempts", 2)
    left[0] = 100
    storage.write_bytes(f"{bucket}/y", data)
    with pytest.raises(DataError, match=r"y: .* \(after 2 attempts\)$") as caught:
        storage.fetch(f"{bucket}/y", *known)
    assert "\n" not in str(caught.value)
    assert not list(storage.cache_folder().rglob("*-y"))


def test_a_known_hash_asks_for_no_head(bucket, faulty):
    storage.write_bytes(f"{bucket}/x", b"data")
    proxy = faulty(lambda *_: "")
    storage.fetch(f"{bucket}/x", 4, hashlib.sha256(b"data").hexdigest())
    assert {method for method, _ in proxy.requests} == {"GET"}


def test_another_size_than_the_indexs_is_said_at_once(bucket, faulty):
    storage.write_bytes(f"{bucket}/x", b"cut")
    proxy = faulty(lambda *_: "")
    with pytest.raises(DataError, match="x: 3 bytes, the index says 400"):
        storage.fetch(f"{bucket}/x", 400, "0" * 64)
    assert proxy.gets("x") == 1


def test_parts_of_two_versions_are_not_mixed(bucket, faulty, hurried, monkeypatch):
    old, new, path = b"o" * 4000, b"n" * 4000, f"{bucket}/x"
    storage.write_bytes(path, old)
    monkeypatch.setattr(hurried, "read_part", 1000)
    monkeypatch.setattr(hurried, "threads", 1)
    monkeypatch.setattr(s3, "_md5", lambda head: "")  # as of an object that was put in parts
    changed = []

    def change_before_the_third_part(_method, _path, range_):
        if range_ == "bytes=2000-2999" and not changed:
            changed.append(direct.put_object(Bucket=bucket[5:], Key="x", Body=new))
        return ""

    direct = boto3.client("s3")
    faulty(change_before_the_third_part)
    assert storage.fetch(path).read_bytes() == new and changed


def test_a_permanent_refusal_is_not_tried_again(bucket, faulty):
    proxy = faulty(lambda method, path, _: (403, "AccessDenied") if path.endswith("x") else "")
    with pytest.raises(DataError, match="access denied"):
        storage.fetch(f"{bucket}/x", 4, "0" * 64)
    assert proxy.gets("x") == 1


def test_expired_credentials_are_read_anew(bucket, faulty, tmp_path, monkeypatch):
    """As a file that some agent renews."""
    storage.write_bytes(f"{bucket}/x", b"data")
    file, used = tmp_path / "credentials", []
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    file.write_text(text.format("old"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def plan(*_):
        used.append(file.read_text())
        file.write_text(text.format("new"))
        return "expired" if len(used) == 1 else ""

    faulty(plan)
    known = (4, hashlib.sha256(b"data").hexdigest())
    assert storage.fetch(f"{bucket}/x", *known).read_bytes() == b"data"
    assert s3.client()._request_signer._credentials.access_key == "new"


def test_an_etag_that_is_no_md5_does_not_hide_the_object(bucket, faulty, monkeypatch):
    """As in stores whose ETags are random digits."""
    storage.write_bytes(f"{bucket}/x", b"data")
    monkeypatch.setattr(s3, "_md5", lambda head: "0" * 32)
    proxy = faulty(lambda *_: "")
    assert storage.read_bytes(f"{bucket}/x") == b"data"
    assert proxy.gets("x") == 4, "a body is doubted before it is believed"
