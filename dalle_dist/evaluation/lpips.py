"""LPIPS (Zhang et al. 2018, arXiv 1801.03924), from a TorchScript file; 0 where images are equal.

The file is StyleGAN2-ADA's `vgg16.pt`, VGG16 with the weights of LPIPS folded in. It is called with
RGB images of 0 to 255, `resize_images=False` and `return_lpips=True`, and answers with one vector
for each image: LPIPS of two images is the sum of squares of the difference of theirs.

Shape suffixes: B batch, C colour channels, H and W pixels, V values of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_dist.errors import DataError
from dalle_dist.evaluation.features import call, load_torchscript


class Lpips:
    """LPIPS by the network of a file; `fingerprint` is the sha256 of the file.

    Raises DataError: no such file, or it is not TorchScript.
    """

    name = "LPIPS (VGG16)"

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        self._path, self._device = path, torch.device(device)
        self._network, self.fingerprint = load_torchscript(path, self._device)

    def __call__(self, images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
        """Of pairs of images in [0, 1], of the same size: lpips_B, float64, on the CPU.

        Raises DataError: the file is of another network.
        """
        pairs_BCHW = torch.cat([images_BCHW, others_BCHW])
        first_BV, second_BV = self._vectors(pairs_BCHW).cpu().double().chunk(2)
        return (first_BV - second_BV).square().sum(dim=1)

    def _vectors(self, images_BCHW: Tensor) -> Tensor:
        inputs_BCHW = 255 * images_BCHW.to(self._device).float()
        found = call(self._network, self._path, inputs_BCHW, resize_images=False, return_lpips=True)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images_BCHW):
            raise DataError(f"{self._path}: gave no vector for each image: another network's file?")
        return found
