"""Every ```python block of the pages runs as it stands, in a folder with a release."""

import re
import runpy
from pathlib import Path

import pytest
import tiny_run

from dalle_dist.checkpoint.release import save_release
from dalle_dist.config.docs import markdown
from dalle_dist.transformer.model import Transformer

ROOT = Path(__file__).parents[1]


def blocks(page):
    """(line, code) of each block of Python."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder but for runs/demo/release of a tiny model."""
    config = tiny_run.make(tmp_path / "made")
    weights, folder = Transformer(config).state_dict(), str(tmp_path / "runs/demo/release")
    dvae = str(tmp_path / "made/dvae_run/release")
    save_release(folder, config, weights, config.paths.tokenizer, dvae)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "count"), [("docs/python.md", 4), ("kernels/README.md", 1)])
def test_every_block_of_a_page_runs(page, count, place, capsys):
    """In order, as a reader does; each in a namespace of its own."""
    assert len(blocks(page)) == count
    for line, code in blocks(page):
        script = place / f"line_{line}.py"
        script.write_text("\n" * line + code)  # so that a traceback names the page's line
        runpy.run_path(str(script))
    if page == "docs/python.md":
        assert (place / "a-blue-car-1.png").is_file() and (place / "mine.png").is_file()
        assert "nats per image token" in capsys.readouterr().out


def test_the_page_of_the_config_is_that_of_its_fields():
    written = (ROOT / "docs/config.md").read_text()
    assert written == markdown(), "docs/config.md is out of date: make docs"


def test_the_snippet_of_the_kernels_stays_short():
    ((_, code),) = blocks("kernels/README.md")
    assert len(code.splitlines()) <= 10
