import io
import threading

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def s3_server():
    from moto.server import ThreadedMotoServer

    before = threading.active_count()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    assert threading.active_count() > before
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path):
    """An empty bucket on an HTTP server of its own; its URL, and a cache of its own."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("DALLE_DIST_CACHE", str(tmp_path / "s3-cache"))
    name = "b" + "".join(c for c in tmp_path.name.lower() if c.isalnum())[:40]
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def image():
    """image(channel, size, format) -> the bytes of a plain image."""

    def make(colour="red", size=(8, 8), format_="PNG", mode="RGB"):
        buffer = io.BytesIO()
        Image.new(mode, size, colour).save(buffer, format=format_)
        return buffer.getvalue()

    return make
