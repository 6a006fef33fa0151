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
        for name, value in (("include_paths", str(FOLDER / "include")), ("cxx_args", "-g0")):
            patch.setattr(builder, name, _with(value, getattr(builder, name)))


def _with(value, of):
    # DeepSpeed's own "-g" comes before, and the last one counts; of folders the first one does.
    return lambda self: [*of(self), value] if value.startswith("-") else [value, *of(self)]
