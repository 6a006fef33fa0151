"""The Inception network of FID and inception score, from a TorchScript file.

The file is the one that StyleGAN2-ADA, StyleGAN3 and clean-fid use: `inception-2015-12-05.pt`, the
weights of the TensorFlow graph that FID was defined by. It is called with RGB images of 0 to 255,
and answers with 2,048 features (`return_features=True`), or with probabilities of 1,008 classes
without the last layer's bias (`no_output_bias=True`, as in the first code for inception scores).

Shape suffixes: B batch, C colour channels, H and W pixels, D features, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_dist.errors import ConfigError, DataError
from dalle_dist.evaluation.features import call, checked, load_torchscript

FEATURES, CLASSES, SIDE = 2048, 1008, 299
# Comparable with figures of StyleGAN, ADM and torch-fidelity, or with those of clean-fid.
RESIZES = ("tf1-bilinear", "pillow-bicubic")


class Inception:
    """The network of a file, behind one way to resize to 299 x 299.

    tf1-bilinear     by the file itself, as TensorFlow 1 did: without antialiasing
    pillow-bicubic   by Pillow before the network, in floats and with antialiasing

    Raises:
        ConfigError: another name of a resize.
        DataError: no such file, it is not TorchScript, or not this network.
    """

    figure, dim, classes = "FID", FEATURES, CLASSES

    def __init__(
        self, path: str, resize: str = RESIZES[0], device: torch.device | str = "cpu"
    ) -> None:
        if resize not in RESIZES:
            raise ConfigError(f"resize={resize}: one of {', '.join(RESIZES)}")
        self._path, self._resize, self._device = path, resize, torch.device(device)
        self._network, self.fingerprint = load_torchscript(path, self._device)
        if resize != RESIZES[0] and not hasattr(self._network, "layers"):
            raise DataError(f"{path}: has no `layers`, which resize={resize} calls")
        self.name = f"Inception, {resize}"

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Of RGB images in uint8: features_BD, float32, on the CPU. Raises DataError."""
        if self._resize == RESIZES[0]:
            found = self._call(self._network, images_BCHW, return_features=True)
        else:
            # The layers alone: past the file's own resize, and after its own mapping of values.
            inputs_BCHW = (_pillow_bicubic(images_BCHW) - 128) / 128
            found = self._call(self._network.layers, inputs_BCHW)
        if isinstance(found, Tensor):
            found = found.flatten(1)
        return checked(found, (len(images_BCHW), FEATURES), self._path).float().cpu()

    def probabilities(self, images_BCHW: Tensor) -> Tensor:
        """Of RGB images in uint8: probabilities_BK, float32, on the CPU. Raises DataError."""
        inputs_BCHW = images_BCHW
        if self._resize != RESIZES[0]:
            inputs_BCHW = _pillow_bicubic(images_BCHW)
        found = self._call(self._network, inputs_BCHW, no_output_bias=True)
        return checked(found, (len(images_BCHW), CLASSES), self._path).float().cpu()

    def _call(self, network: Any, inputs_BCHW: Tensor, **options: bool) -> Any:
        return call(network, self._path, inputs_BCHW.to(self._device), **options)


def _pillow_bicubic(images_BCHW: Tensor) -> Tensor:
    """Each channel to 299 x 299, float32; values may leave 0 to 255 a little, as in clean-fid."""
    planes_BCHW = images_BCHW.cpu().float().numpy()
    resized = [
        np.asarray(Image.fromarray(plane_HW).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for plane_HW in planes_BCHW.reshape(-1, *planes_BCHW.shape[2:])
    ]
    return torch.from_numpy(np.stack(resized)).unflatten(0, images_BCHW.shape[:2])
