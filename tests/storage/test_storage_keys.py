"""S3 keys that are no names of files: nothing is written outside of the folder meant for them."""

import boto3
import pytest

from dalle_dist import storage
from dalle_dist.distributed import process_group
from dalle_dist.train.run import download, working_copy


@pytest.fixture
def put(bucket):
    client = boto3.client("s3")
    return lambda key: client.put_object(Bucket=bucket[5:], Key=key, Body=key.encode())


def _files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_placeholders_of_folders_are_no_files(bucket, put):
    for key in ("f/", "f/a.txt", "f/sub/", "f/sub/b.txt"):
        put(key)
    assert storage.list_files(f"{bucket}/f") == ["a.txt", "sub/b.txt"]
    assert _files(storage.fetch_folder(f"{bucket}/f")) == {"a.txt", "sub/b.txt"}


def test_a_folder_of_strange_keys_stays_in_its_folder(bucket, put, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    for key in ("a.txt", f"/{outside}/x", f"{outside}/y", "../../up", "s/./z", "a.txt/below"):
        put(f"f/{key}")
    before = _files(tmp_path)
    root = storage.fetch_folder(f"{bucket}/f")
    assert _files(root) == {"a.txt/below"}
    made = _files(tmp_path) - before
    assert not any(outside.iterdir()) and all(name.startswith("s3-cache/") for name in made)
    said = capsys.readouterr().err
    assert f"{bucket}/f: left out 5 objects" in said and said.count("\n") == 1


def test_a_run_of_strange_keys_stays_in_its_working_copy(bucket, put, tmp_path, capsys):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    for key in ("log.jsonl", "checkpoints/", str(victim), "../escaped"):
        put(f"run/{key}")
    copy = working_copy(f"{bucket}/run")
    download(f"{bucket}/run", process_group.init())
    assert _files(copy) == {"log.jsonl"} and victim.read_text() == "mine"
    assert not list(tmp_path.rglob("escaped"))
    assert "left out 2 objects" in capsys.readouterr().err


def test_more_objects_than_one_page_are_listed(bucket, put, monkeypatch):
    from dalle_dist.storage import s3

    names = [f"{i}.txt" for i in range(7)]
    for name in names:
        put(f"f/{name}")
    client = s3.client()
    whole = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **asked: whole(MaxKeys=3, **asked))
    assert storage.list_files(f"{bucket}/f") == names
