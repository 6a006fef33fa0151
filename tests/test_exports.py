"""The names that people import, and what importing them costs."""

import ast
import os
import pydoc
import subprocess
import sys
from pathlib import Path

import dalle_kernels
import pytest

import dalle_dist


def fresh(code, **environ):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | environ,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", [dalle_dist, dalle_kernels], ids=lambda m: m.__name__)
def test_every_exported_name_is_there_and_explains_itself(module):
    assert set(module.__all__) <= set(dir(module))
    text = pydoc.plain(pydoc.render_doc(module))
    for name in set(module.__all__) - {"__version__"}:
        value = getattr(module, name)
        assert value is getattr(module, name)
        assert name in text
        assert value.__doc__


def test_names_lead_to_what_they_say():
    from dalle_dist import Config, Generator, load, load_config

    assert load.__module__ == "dalle_dist.generate.generator"
    assert isinstance(load_config("emoji"), Config)
    assert Generator.__module__ == "dalle_dist.generate.generator"


def test_type_checkers_see_the_names_that_run():
    """The imports for type checkers and the names fetched when asked for must not drift apart."""
    tree = ast.parse(Path(dalle_dist.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{line.module}.{alias.name}".removeprefix("dalle_dist.")
        for line in checked.body
        for alias in line.names
    }
    assert seen == dalle_dist._HOMES
    assert set(dalle_dist.__all__) == seen.keys() | {"__version__"}


def test_an_unknown_name_is_named_with_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'Generater'; did you mean 'Generator'"):
        _ = dalle_dist.Generater
    with pytest.raises(AttributeError, match=r"'dalle_dist' has no attribute 'xyzzy'$"):
        _ = dalle_dist.xyzzy
    assert not hasattr(dalle_dist, "__wrapped__")


@pytest.mark.parametrize(
    "module",
    ["dalle_dist", "dalle_dist.cli", "dalle_dist.config", "dalle_dist.config.docs"],
)
def test_importing_the_package_does_not_import_torch(module):
    heavy = fresh(f"import sys, {module}; print({{'torch', 'numpy', 'PIL'}} & sys.modules.keys())")
    assert heavy == "set()"
    assert (
        fresh(f"import sys, {module}, dalle_dist; dalle_dist.DVAE; print('torch' in sys.modules)")
        == "True"
    )


def test_the_kernels_front_page_leaves_its_rooms_reachable():
    code = (
        "from dalle_kernels.sparse_attention import BACKENDS\n"
        "from dalle_kernels.sparse_attention.decode import DecodeCache\n"
        "import dalle_kernels, sys\n"
        "assert callable(dalle_kernels.sparse_attention)\n"
        "assert DecodeCache is dalle_kernels.DecodeCache\n"
        "print('dalle_dist' in sys.modules)"
    )
    assert fresh(code) == "False"
