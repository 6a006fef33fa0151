"""A run whose every path is on S3 (moto's HTTP server): trained on one node, gone on on another.

A node is its cache folder.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import subprocess
import sys

import boto3
import pytest
import tiny_run
from moto.server import ThreadedMotoServer

from dalle_dist import storage
from dalle_dist.checkpoint.convert import convert
from dalle_dist.checkpoint.release import load_release
from dalle_dist.config import PathsConfig
from dalle_dist.testing import run_distributed
from dalle_dist.train.transformer import train

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    # The server's buckets outlive it within one process.
    name = re.sub("[^a-z0-9]", "", tmp_path.name.lower())[:60]
    boto3.client("s3").create_bucket(Bucket=name)
    yield f"s3://{name}"
    server.stop()


def _train_on(ranks, environ, cache, config, resume):
    os.environ.update(environ, DALLE_DIST_CACHE=str(cache))
    train(config, resume)


def _aws():
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def test_a_run_on_s3_is_gone_on_with_on_another_machine(bucket, tmp_path):
    local = tiny_run.make(tmp_path / "local", zero_stage=2, steps=3)
    storage.publish_folder(tmp_path / "local", bucket)
    names = [field.name for field in dataclasses.fields(PathsConfig)]
    paths = PathsConfig(**{name: f"{bucket}/{name}" for name in names})
    config = dataclasses.replace(local, paths=paths)
    run_distributed(_train_on, 2, _aws(), tmp_path / "one", config, None)
    files = storage.list_files(f"{bucket}/run")
    assert "checkpoints/step-00000003/manifest.json" in files
    assert "release/transformer.safetensors" in files
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=5))
    run_distributed(_train_on, 2, _aws(), tmp_path / "two", longer, "auto")
    log = [json.loads(line) for line in storage.read_bytes(f"{bucket}/run/log.jsonl").splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5]


def test_convert_reads_a_checkpoint_from_s3_and_writes_a_release_there(bucket, tmp_path):
    config = tiny_run.make(tmp_path / "local", steps=2)
    run_distributed(_train_on, 1, {}, tmp_path / "one", config, None)
    storage.publish_folder(tmp_path / "local" / "run", f"{bucket}/run")
    digest = convert(f"{bucket}/run/checkpoints/step-00000002", f"{bucket}/release", "raw")
    assert digest == convert(f"{bucket}/run", str(tmp_path / "release"), "raw")
    assert load_release(f"{bucket}/release").fingerprint == digest


def test_slurm_sees_how_far_a_run_on_s3_is(bucket):
    def progress(steps):
        command = [sys.executable, "-m", "dalle_dist", "progress", "train", "emoji"]
        settings = [f"paths.run={bucket}/run", f"train.steps={steps}"]
        return subprocess.check_output([*command, *settings], text=True).strip()

    assert progress(20) == "none"
    storage.write_bytes(f"{bucket}/run/checkpoints/step-00000010/manifest.json", b"{}")
    storage.write_bytes(f"{bucket}/run/checkpoints/step-00000020.tmp/manifest.json", b"{}")
    assert progress(20) == "10"
    storage.write_bytes(f"{bucket}/run/release/config.yaml", b"{}")
    storage.write_bytes(f"{bucket}/run/release/checkpoint.sha256", b"of another checkpoint")
    assert progress(10) == "10", "the release of an earlier checkpoint is not the end"
    stamp = hashlib.sha256(b"{}").hexdigest()
    storage.write_bytes(f"{bucket}/run/release/checkpoint.sha256", stamp.encode())
    assert progress(10) == "finished"
    assert progress(20) == "10"  # the release of a shorter run is not the end
