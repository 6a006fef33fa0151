"""What a path means: schemes, `~`, `file://`, and what is refused in one line."""

from pathlib import Path

import pytest
import yaml

from dalle_dist import storage
from dalle_dist.config import load
from dalle_dist.errors import ConfigError, DataError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    yield str(tmp_path / "home")
    assert not list(Path().iterdir()), "nothing may be made in the folder one happens to be in"


def test_the_normal_form(home):
    assert {
        path: storage.normal(path)
        for path in ("a/b", "data:v1", "~/x/", "file:///a/b", "file://localhost/a", "S3://B/k")
    } == {
        "a/b": "a/b",
        "data:v1": "data:v1",
        "~/x/": f"{home}/x/",
        "file:///a/b": "/a/b",
        "file://localhost/a": "/a",
        "S3://B/k": "s3://B/k",
    }
    assert not storage.is_remote("file:///a") and not storage.is_remote("data:v1")
    assert storage.is_remote("gs://b/k")


@pytest.mark.parametrize(
    "path, said",
    [
        ("gs://b/k", "pip install gcsfs"),
        ("az://b/k", "pip install adlfs"),
        ("s3a://b/k", "write s3://"),
        ("nosuch://b/k", "unknown scheme nosuch://"),
    ],
)
def test_a_scheme_that_nothing_reads_is_one_line_and_no_folder(home, tmp_path, path, said):
    (tmp_path / "file").write_bytes(b"x")
    uses = [
        lambda: storage.write_bytes(path, b"x"),
        lambda: storage.publish(tmp_path / "file", path),
        lambda: storage.made(path),
        lambda: storage.fetch(path),
        lambda: storage.list_files(path),
        lambda: storage.exists(path),
    ]
    for use in uses:
        with pytest.raises(DataError, match=said) as caught:
            use()
        assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_scheme_for_reading_alone_is_not_written_to(home):
    from dalle_dist.storage.other import OtherStore
    from dalle_dist.storage.store import Content

    with pytest.raises(DataError, match="https:// can only be read"):
        OtherStore().put("https://example.org/x", Content.of_bytes(b"x"))
    with pytest.raises(DataError, match=r"https://"):
        storage.write_bytes("https://example.org/x", b"x")


def test_a_config_has_no_tilde_in_its_paths(home, tmp_path):
    file = tmp_path / "run.yaml"
    tree = {"base": "emoji", "paths": {"run": "~/r"}, "image_tokenizer": {"path": "~/dvae"}}
    file.write_text(yaml.safe_dump(tree))
    config = load(str(file), ["paths.images=~/i", "paths.tokens=file:///t"])
    assert (config.paths.run, config.paths.images, config.paths.tokens) == (
        f"{home}/r",
        f"{home}/i",
        "/t",
    )
    assert config.image_tokenizer.path == f"{home}/dvae"
    with pytest.raises(ConfigError, match=r"paths\.run: gs://b/r: .* pip install gcsfs"):
        load("emoji", ["paths.run=gs://b/r"])


def test_storage_itself_expands_a_tilde(home):
    storage.write_bytes("~/a/b.txt", b"x")
    assert storage.list_files("~/a") == ["b.txt"] and storage.fetch("~/a/b.txt").is_absolute()
    storage.made("~/c")
    storage.remove_empty("~/c")
    storage.remove("~/a/b.txt")
    assert not storage.exists("~/a/b.txt") and not storage.exists("~/c")


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", "a/../b", "a/.", "a/", "a\0b"])
def test_a_name_that_leaves_its_folder_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="not a file's name under a folder"):
        storage.inside(tmp_path, name)
    assert storage.inside(tmp_path, "a/..b/c") == tmp_path / "a/..b/c"
