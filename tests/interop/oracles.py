"""The other programs' own code, where it is installed, with what it needs for nothing stubbed."""

import contextlib
import importlib
import importlib.util
import sys
import types

import pytest

# Data of their command lines and of tokenizers that no test here uses.
STUBS = {
    "requests": [], "tqdm": ["tqdm"], "youtokentome": [], "omegaconf": ["OmegaConf"],
    "taming": [], "taming.models": [], "taming.models.vqgan": ["VQModel", "GumbelVQ"],
    "pkg_resources": ["get_distribution"], "ftfy": ["fix_text"], "transformers": ["BertTokenizer"],
    "webdataset": [], "g_mlp_pytorch": ["gMLPBlock"],
}  # fmt: skip


@contextlib.contextmanager
def stubbed():
    """Imports of what is not installed give empty classes."""
    put = {}
    for name, members in STUBS.items():
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            continue
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, str if member == "fix_text" else type(member, (), {}))
        module.__path__ = []
        put[name] = module
    sys.modules.update(put)
    if "pkg_resources" in put:
        put["pkg_resources"].get_distribution = lambda name: types.SimpleNamespace(version="1.6.6")
    try:
        yield
    finally:
        for name in put:
            sys.modules.pop(name, None)


def program(name):
    """The module of this name; the test is left out, with a reason, where it is not installed."""
    with stubbed():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            pytest.skip(
                f"{name} is not installed ({error}): the extra interop-test, and pip install "
                "--no-deps DALL-E dalle-pytorch"
            )
