"""`dalle-dist serve` as a program: how it starts, what keeps it from starting, how it ends."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from dalle_dist.cli import main
from dalle_dist.serve import verbs

# It is cut, and would colour the terminal that told of it.
LONG = {"prompt": "\x1b[31m red heart" * 20, "n": 64, "guidance": 2}


def test_it_starts_answers_and_ends_by_ctrl_c_with_a_request_under_way(release):
    process = subprocess.Popen(
        [sys.executable, "-m", "dalle_dist", "serve", release, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and "is ready; Ctrl-C ends it" in line
        port = int(line.split("/")[2].split(":")[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/")
        assert b"<title>dalle-dist</title>" in connection.getresponse().read()
        connection.request("POST", "/api/images", json.dumps(LONG))
        answer = connection.getresponse()
        assert b"command" in answer.readline()
        process.send_signal(signal.SIGINT)
        assert answer.read().splitlines()[-1].startswith((b'{"error"', b'{"done"'))
        assert process.wait(20) == 130
        assert process.stdout.read() == "" and process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "PORT"], "--port: PORT is in use; choose another, 0 for any that is free"),
        (["--port", "70000"], "--port: 70000 is not in 0 to 65535"),
        (["--port", "0", "--host", "192.0.2.1"], "--host: '192.0.2.1' is no address of this"),
        (["--port", "0", "--host", "no such name"], "--host: 'no such name' is no address of"),
        (["--max-images", "0"], "--max-images: 0 is below 1"),
        (["--port", "0"], "no release folder"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line(tmp_path, capsys, options, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = [port if option == "PORT" else option for option in options]
        assert main(["serve", str(tmp_path), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message.replace("PORT", port) in lines[0]


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(verbs, "find_spec", lambda name: None)
    assert main(["serve", "release"]) == 2
    assert "pip install 'dalle-dist[serve]'" in capsys.readouterr().err
