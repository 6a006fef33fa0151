"""The pictures of the server are those of `Generator`, whatever waits before and beside them."""

import base64
import io
import shlex
import time

import pytest
from PIL import Image
from uploaded import picture

from dalle_dist.cli import main
from dalle_dist.serve.worker import batches

PROMPT = "red heart"


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pictures(events):
    found = [event for event in events if "png" in event]
    assert [event["index"] for event in found] == list(range(len(found)))
    return [Image.open(io.BytesIO(base64.b64decode(event["png"]))) for event in found]


def base64_of(path):
    return base64.b64encode(path.read_bytes()).decode()


def same(some, others):
    return [image.tobytes() for image in some] == [image.tobytes() for image in others]


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "guidance": 2, "temperature": 0.5}])
def test_pictures_are_those_of_generate(served, generator, options):
    events = served.events({"prompt": PROMPT, "n": 6, "seed": 5, **options})
    expected = generator.generate(PROMPT, n=6, seed=5, **options)
    assert same(pictures(events), [image.image for image in expected])
    assert served.batches == [PROMPT] * 2
    assert [sorted(event) for event in events if "png" not in event] == [
        ["command"], ["before"], ["notices", "working"], ["done"]
    ]  # fmt: skip


def test_batches_grow_and_hold_each_picture_once():
    assert [len(part) for part in batches(64)] == [4, 4, 8, 16, 16, 16]
    for count in range(1, 70):
        assert [number for part in batches(count) for number in part] == list(range(count))


def test_a_completion_is_that_of_complete_and_keeps_tokens(served, generator, tmp_path):
    path = picture(12, 8, tmp_path)
    mask = Image.new("L", (12, 8), 255)
    mask.paste(0, (4, 2, 8, 6))
    mask.save(tmp_path / "mask.png")
    body = {"prompt": PROMPT, "n": 2, "image": base64_of(path)}
    for part, options in (
        ({"mask": base64_of(tmp_path / "mask.png")}, {"keep_mask": mask}),
        ({"rows": 2}, {"rows": 2}),
    ):
        with Image.open(path) as image:
            expected = generator.complete(image, PROMPT, n=2, **options)
            kept_N = generator.kept(image, options.get("rows"), options.get("keep_mask")).codes_N
        assert same(pictures(served.events(body | part)), [image.image for image in expected])
        assert (expected[0].codes_N[kept_N >= 0] == kept_N[kept_N >= 0]).all()


@pytest.mark.parametrize("prompt", [PROMPT, "--it's;$(red)", "../../etc/passwd"])
def test_the_command_makes_the_same_pictures(served, tmp_path, monkeypatch, prompt):
    monkeypatch.chdir(tmp_path)
    body = {"prompt": prompt, "n": 3, "seed": 7, "top_p": 0.8}
    picture(8, 12, tmp_path).rename(tmp_path / "image.png")
    if prompt == PROMPT:
        body |= {"image": base64_of(tmp_path / "image.png"), "rows": 1}
    events = served.events(body)
    words = shlex.split(events[0]["command"])
    assert words[0] == "dalle-dist" and main(words[1:]) == 0
    files = sorted(tmp_path.glob("generated/*-0000*.png")) or sorted(
        path for path in tmp_path.glob("generated/*.png") if path.name != "grid.png"
    )
    assert same(pictures(events), [Image.open(path) for path in files])


def test_warnings_reach_the_page(served):
    events = served.events({"prompt": "red heart " * 40, "guidance": 3})
    (notices,) = (event["notices"] for event in events if "working" in event)
    assert "cut to its first 8 tokens" in notices[0] and "empty caption" in notices[1]


def test_requests_are_served_in_order_and_told_how_many_are_before_them(served):
    served.gate.clear()
    asked = [served.ask(body={"prompt": "first"})]
    until(lambda: served.batches)
    for prompt in ("second", "third"):
        asked.append(served.ask(body={"prompt": prompt}))
    assert b'"before": 2' in asked[2][1].readline() + asked[2][1].readline()
    served.gate.set()
    assert all(b'"done"' in answer.read() for _, answer in asked)
    assert served.batches == ["first", "second", "third"]


def test_a_client_that_goes_ends_its_request_and_the_next_is_served(served):
    served.gate.clear()
    going, answer = served.ask(body={"prompt": "going", "n": 64})
    waiting, second = served.ask(body={"prompt": "waiting"})
    until(lambda: served.batches)
    for connection, half_read in ((going, answer), (waiting, second)):
        half_read.close()
        connection.close()
    until(lambda: not served.line._waiting and served.line._served.left)
    served.gate.set()
    assert pictures(served.events({"prompt": "next"}))
    assert served.batches == ["going", "next"]


def test_a_fault_of_one_request_is_not_the_next_ones(served, capsys):
    codes, served.batches = served.batches, None  # append fails
    assert "the server failed" in served.events({"prompt": PROMPT})[-1]["error"]
    assert "AttributeError" in capsys.readouterr().err
    served.batches = codes
    assert pictures(served.events({"prompt": PROMPT}))


def test_the_end_of_the_server_ends_what_waits(serve):
    served = serve()
    served.gate.clear()
    asked = [served.ask(body={"prompt": prompt}) for prompt in ("first", "second")]
    until(lambda: served.batches)
    served.server.should_exit = True
    for _, answer in asked:
        assert b"the server is stopping" in answer.read()
