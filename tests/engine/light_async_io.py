"""DeepSpeed's async_io from its own sources in a quarter of the time: 15 files, each of which would
spend most of a minute on all headers of torch and on debugging symbols.
"""

from pathlib import Path

from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder

FOLDER = Path(__file__).parents[2] / "build" / "async_io"
HEADER = "#include <torch/csrc/utils/pybind.h>\n#include <torch/types.h>\n"


def compile_light(patch):
    """Have this process compile it so; each rank must, or compiles it anew.

    Args:
        patch: pytest's MonkeyPatch.
    """
    header = FOLDER / "include" / "torch" / "extension.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists():  # a newer one is compiled anew
        header.write_text(HEADER)
    patch.setenv("TORCH_EXTENSIONS_DIR", str(FOLDER))
    for builder in (AsyncIOBuilder, PinMemoryBuilder):
        _lighten(patch, builder, str(FOLDER / "include"))


def _lighten(patch, builder, include):
    paths, flags = builder.include_paths, builder.cxx_args
    patch.setattr(builder, "include_paths", lambda self: [include, *paths(self)])
    patch.setattr(builder, "cxx_args", lambda self: [*flags(self), "-g0"])  # after their own "-g"
