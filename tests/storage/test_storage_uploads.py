"""What goes up is right there, or the upload is an error and the local file stays."""

import http.server
import threading
from urllib.parse import unquote, urlsplit

import boto3
import pytest
from faulty_proxy import FaultyProxy

from dalle_dist import storage
from dalle_dist.errors import DataError


class _KeepingServer(http.server.BaseHTTPRequestHandler):
    """A store that keeps what `kept` makes of a body, and says that `told` of it is its size."""

    protocol_version = "HTTP/1.1"
    objects: dict

    def log_message(self, *_):
        pass

    def _answer(self, status, body=b"", length=None):
        self.send_response(status)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _key(self):
        return unquote(urlsplit(self.path).path)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[self._key()] = (type(self).kept(body), len(type(self).told(body)))
        self._answer(200)

    def do_HEAD(self):
        found = self.objects.get(self._key())
        self._answer(200 if found else 404, length=found[1] if found else 0)

    def do_GET(self):
        found = self.objects.get(self._key())
        self._answer(200 if found else 404, found[0] if found else b"")

    def do_DELETE(self):
        self.objects.pop(self._key(), None)
        self._answer(204)


def _plain(body):
    return body


def _framed(body):
    """As newer botocore sends it over TLS, for stores that check the sum behind."""
    return b"%x\r\n%s\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n" % (len(body), body)


@pytest.fixture
def keeping(bucket, monkeypatch, hurried):
    """Starts such a store and returns its objects."""
    servers = []

    def start(kept, told):
        handler = type("Handler", (_KeepingServer,), {"objects": {}})
        handler.kept, handler.told = staticmethod(kept), staticmethod(told)
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers[-1].server_port}")
        return handler.objects

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_body_goes_up_plainly_and_is_read_back_where_the_etag_says_nothing(keeping):
    objects = keeping(_plain, _plain)
    storage.write_bytes("s3://bkt/x", b"index")
    assert objects == {"/bkt/x": (b"index", 5)}
    assert storage.read_bytes("s3://bkt/x") == b"index"


@pytest.mark.parametrize("told", [_framed, _plain], ids=["size-tells", "size-hides-it"])
def test_a_store_that_keeps_framing_is_an_error_and_costs_no_local_file(keeping, tmp_path, told):
    objects, file = keeping(_framed, told), tmp_path / "shard.tar"
    file.write_bytes(b"s" * 3000)
    with pytest.raises(DataError, match=r"s3://bkt/x: the store keeps .*speaks S3 in full"):
        storage.publish(file, "s3://bkt/x")
    assert file.read_bytes() == b"s" * 3000 and not objects


def _large(tmp_path, monkeypatch, hurried):
    """A file of three parts, the least that S3 takes being 5 MiB for all but the last."""
    monkeypatch.setattr(hurried, "write_part", 5 << 20)
    monkeypatch.setattr(hurried, "read_timeout", 20)
    file = tmp_path / "large"
    file.write_bytes(bytes(range(256)) * (11 << 12))
    return file, file.read_bytes()


def test_a_large_file_goes_up_in_parts_each_tried_again(
    bucket, s3_server, tmp_path, monkeypatch, hurried
):
    file, data = _large(tmp_path, monkeypatch, hurried)
    refused = []

    def plan(method, path, _):
        refused.append(f"{method} {'partNumber' in path}")
        return "503" if refused.count(refused[-1]) == 1 else ""

    with FaultyProxy(s3_server, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.publish(file, f"{bucket}/large")
        assert refused.count("PUT True") == 4 and proxy.gets("large") == 0
        assert storage.read_bytes(f"{bucket}/large") == data
    assert not file.exists()


def test_a_large_upload_that_fails_leaves_no_parts_behind(
    bucket, s3_server, tmp_path, monkeypatch, hurried
):
    file, data = _large(tmp_path, monkeypatch, hurried)

    def plan(_method, path, _range):
        return (403, "AccessDenied") if "partNumber=3" in path else ""

    with FaultyProxy(s3_server, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(DataError, match="access denied"):
            storage.publish(file, f"{bucket}/large")
    client = boto3.client("s3", endpoint_url=s3_server)
    assert not client.list_multipart_uploads(Bucket=bucket[5:]).get("Uploads")
    assert file.read_bytes() == data


def test_an_object_that_is_lost_on_the_way_is_put_again(bucket, s3_server, monkeypatch, hurried):
    heads = []

    def plan(method, path, _):
        heads.extend(["HEAD"] if method == "HEAD" else [])
        return (404, "") if method == "HEAD" and len(heads) == 1 else ""

    with FaultyProxy(s3_server, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.write_bytes(f"{bucket}/x", b"data")
        assert sum(count for (m, _), count in proxy.requests.items() if m == "PUT") == 2


def test_another_stores_object_appears_by_a_move(tmp_path, monkeypatch):
    import fsspec

    memory, path = fsspec.filesystem("memory"), f"memory:/{tmp_path}/x"

    def cut(*_, **__):
        raise ValueError("the connection is gone")

    storage.write_bytes(path, b"old")
    monkeypatch.setattr(type(memory), "mv", cut)
    with pytest.raises(DataError, match="the connection is gone"):
        storage.write_bytes(path, b"new")
    assert storage.read_bytes(path) == b"old"
    assert storage.list_files(f"memory:/{tmp_path}") == ["x"]
