"""Every Python process that finds this file has a fp32 square root that is one unit off.

MKL's is, for a sixth of all arguments, on AMD's processors. With this folder on PYTHONPATH the
tests show on any node that nothing rests on it (`make test-one-unit-off`).
"""

import functools
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder


class _Patching(Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        _patch(module)


class _Finder(MetaPathFinder):
    """Waits for torch to be imported; programs that need none do not pay for it."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Patching(spec.loader)
        return spec


def _patch(torch):
    def off(root):
        if root.dtype != torch.float32 or root.device.type != "cpu":
            return root
        words = root.detach().contiguous().view(torch.int32)
        # A sixth of the roots, chosen by their bits; 0, infinity and NaN stay.
        chosen = (words % 6 == 0) & root.detach().isfinite() & (root.detach() > 0)
        return torch.where(chosen, (words + 1).view(torch.float32).view_as(root), root)

    plain, plain_ = torch.Tensor.sqrt, torch.Tensor.sqrt_

    @functools.wraps(plain)
    def sqrt(self, *args, **kwargs):
        return off(plain(self, *args, **kwargs))

    @functools.wraps(plain_)
    def sqrt_(self):
        return self.copy_(off(plain_(self).clone()))

    torch.Tensor.sqrt, torch.Tensor.sqrt_ = sqrt, sqrt_
    torch.sqrt = lambda input, **kwargs: sqrt(input) if not kwargs else plain(input, **kwargs)


sys.meta_path.insert(0, _Finder())
