"""What the server refuses: each with a status of 4xx or 5xx and one sentence, and it goes on."""

import base64
import io
import json
import socket
import struct
import time
import zlib

import pytest
from PIL import Image
from uploaded import picture

GOOD = {"prompt": "red heart"}


def still_answers(served):
    return "done" in served.events(GOOD)[-1]


def header_of_png(width, height):
    """A PNG of that size whose pixels are missing."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data))
    pixels = struct.pack(">I", 20) + b"IDAT" + bytes(8)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk + pixels).decode()


def gif():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompt": ""}, "a prompt is empty"),
        ({"prompt": None}, "a prompt is empty"),
        ({"prompt": ["red"]}, "a prompt is not text"),
        ({"prompt": "\ud800"}, "a prompt is not text"),
        ({"prompt": "a" * 1001}, "prompt: has more than 1,000 characters"),
        ({"n": 0}, "n: 0 is not in 1 to 64"),
        ({"n": 65}, "n: 65 is not in 1 to 64"),
        ({"n": 1.5}, "n: 1.5 is not an integer"),
        ({"n": True}, "n: True is not an integer"),
        ({"n": 10**400}, "n: 1000000"),
        ({"seed": -1}, "seed: -1 is not in 0 to"),
        ({"seed": "../../etc/passwd"}, "seed: '../../etc/passwd' is not an integer"),
        ({"temperature": -1}, "temperature: -1.0 is not at least 0"),
        ({"temperature": float("nan")}, "temperature: nan is not a finite number"),
        ({"guidance": float("inf")}, "guidance: inf is not a finite number"),
        ({"guidance": True}, "guidance: True is not a setting"),
        ({"guidance": 10**300}, "guidance: 1000000"),
        ({"top_k": -3}, "top-k: -3 is not at least 0"),
        ({"top_p": 0}, "top-p: 0.0 is not above 0"),
        ({"top_p": {}}, "top_p: {} is not a setting"),
        ({"guidance_schedule": "../x"}, "guidance-schedule: '../x' is not one of constant"),
        ({"release": "../../etc"}, "'release' is not a field"),
        ({"rows": 1}, "rows: needs an image"),
        ({"image": "/etc/passwd1", "rows": 1}, "image: is not a PNG, JPEG or WebP"),
        ({"image": "../x.png", "rows": 1}, "image: is not base64"),
        ({"image": 3, "rows": 1}, "image: is not base64"),
        ({"image": gif(), "rows": 1}, "image: is not a PNG, JPEG or WebP"),
        ({"image": header_of_png(8, 8), "rows": 1}, "image: is not a PNG, JPEG or WebP"),
    ],
)
def test_fields_that_do_not_fit_are_named(shared, fields, sentence):
    status, said = shared.refusal(GOOD | fields)
    assert status == 400 and said.startswith(sentence)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 10**6])
def test_broken_json_is_refused(shared, body):
    status, said = shared.refusal(body)
    assert status == 400 and "not " in said and "JSON" in said


def test_completions_that_do_not_fit_are_named(shared, tmp_path):
    image = base64.b64encode(picture(12, 8, tmp_path).read_bytes()).decode()
    for fields, sentence in (
        ({}, "an image needs either rows or a mask"),
        ({"rows": 1, "mask": image}, "an image needs either rows or a mask"),
        ({"rows": 4}, "rows: 4 is not in 1 to 3"),
        ({"mask": header_of_png(12, 8)}, "mask: is not a PNG"),
        ({"mask": mask_of((12, 8), 255)}, "mask: keeps all of the 4 x 4 tokens"),
        ({"mask": mask_of((12, 8), 0)}, "mask: keeps none of the 4 x 4 tokens"),
        ({"mask": mask_of((8, 8), 0)}, "mask: 8 x 8 pixels have not the proportions"),
    ):
        status, said = shared.refusal(GOOD | {"image": image} | fields)
        assert status == 400 and said.startswith(sentence)


def mask_of(size, value):
    file = io.BytesIO()
    Image.new("L", size, value).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("side", [6400, 12_000, 30_000, 2**31 - 1])
def test_an_image_bomb_is_refused_before_it_is_decoded(shared, side):
    status, said = shared.refusal(GOOD | {"image": header_of_png(side, side), "rows": 1})
    assert (status, said) == (413, "image: has more than 40 million pixels")


def test_a_large_body_is_refused_before_it_is_there(shared):
    """Announced, it is not read at all; streamed, not beyond the limit."""
    status, said = shared.refusal(b"", headers={"Content-Length": str(10**9)})
    assert (status, said) == (413, "the request has more than 8 MB")
    with socket.create_connection(("127.0.0.1", shared.port)) as client:
        head = "POST /api/images HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head.encode())
        chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
        sent = 0
        try:
            for _ in range(1000):
                client.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    # What the sockets of both sides hold comes to the limit.
    assert sent < 40 * 2**20
    assert still_answers(shared)


def test_a_body_that_does_not_arrive_is_given_up(serve):
    served = serve(seconds=0.2)
    status, said = served.refusal(b"{", headers={"Content-Length": "100"})
    assert status == 408 and "took more than 0.2 s" in said


def test_ten_thousand_requests_are_refused_fast(serve):
    served = serve(waiting=2)
    served.gate.clear()
    held = [served.ask(body=GOOD)]
    while not served.batches:
        time.sleep(0.01)
    held += [served.ask(body=GOOD) for _ in range(2)]
    begin = time.monotonic()
    request = f"POST /api/images HTTP/1.1\r\nHost: localhost:{served.port}\r\n"
    request = f"{request}Content-Length: 22\r\n\r\n{json.dumps(GOOD)}"
    for _ in range(10_000):
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(request.encode())
            assert client.recv(4096).startswith(b"HTTP/1.1 503")
    assert time.monotonic() - begin < 60
    assert served.refusal(GOOD) == (503, "2 requests wait already; try again later")
    served.gate.set()
    assert all(b'"done"' in answer.read() for _, answer in held)
    assert still_answers(served)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": "192.168.0.7"},
        {"Host": "[::1"},
        {"Host": "evil.example@localhost"},
        {"Host": "localhost/.evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_sites_are_refused(shared, headers):
    given = {"Host": f"localhost:{shared.port}"} | headers
    assert shared.refusal(GOOD, headers=given)[0] == 403
    connection, answer = shared.ask("GET", "/", headers=given)
    assert answer.status == (403 if "Host" in headers else 200)
    assert answer.getheader("Access-Control-Allow-Origin") is None
    connection.close()


def test_ones_own_page_is_answered_under_each_name_of_the_server(serve):
    own, any_address = serve("my-machine"), serve("0.0.0.0")
    for served, names in (
        (own, ("localhost", "127.0.0.1", "[::1]", "my-machine", "My-Machine")),
        (any_address, ("localhost", "192.168.0.7", "[fe80::1]", socket.gethostname())),
    ):
        for name in names:
            host = f"{name}:{served.port}"
            headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
            assert served.refusal({}, headers=headers)[0] == 400  # and not 403
    headers = {"Host": f"evil.example:{any_address.port}"}
    assert any_address.refusal({}, headers=headers)[0] == 403


def test_no_other_address_is_answered_and_every_answer_has_its_headers(shared):
    for method, path, status in (
        ("GET", "/", 200),
        ("GET", "/page.js", 200),
        ("GET", "/page.css", 200),
        ("GET", "/canvas.js", 200),
        ("GET", "/api/release", 200),
        ("GET", "/api/images", 405),
        ("POST", "/", 405),
        ("GET", "/page.py", 404),
        ("GET", "/../../../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "//etc/passwd", 404),
    ):
        connection, answer = shared.ask(method, path)
        assert answer.status == status, path
        assert "default-src 'none'" in answer.getheader("Content-Security-Policy")
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        connection.close()
