"""Feature networks by one protocol: what a Fréchet distance is of, and what it is then called.

Shape suffixes: B batch, C colour channels, H and W pixels, D features, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from dalle_dist import storage
from dalle_dist.errors import DataError
from dalle_dist.evaluation.prepare import unstack


class FeatureNetwork(Protocol):
    """What turns images into features.

    name         of the network and of how it resizes, as figures and files state it
    fingerprint  of its weights
    figure       what a Fréchet distance of its features is called
    dim          number of features
    """

    name: str
    fingerprint: str
    figure: str
    dim: int

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Of images in uint8: features_BD, float32."""
        ...


@runtime_checkable
class Classifier(Protocol):
    """A feature network that an inception score can be taken of."""

    def probabilities(self, images_BCHW: Tensor) -> Tensor:
        """Of images in uint8: probabilities_BK, float32, which sum to 1."""
        ...


class ImageEncoder(Protocol):
    """The part of a CLIP that is asked here."""

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Of RGB images of any size: features_BD, float32."""
        ...


class ClipFeatures:
    """The features of a CLIP's image encoder, which resizes images by its own rule.

    Their distance is "FD (CLIP)": its scale is not that of FID, and the two are never compared.

    Args:
        encoder: what computes the features.
        name: of the CLIP.
        fingerprint: of its weights.
        dim: number of features.
    """

    figure = "FD (CLIP)"

    def __init__(self, encoder: ImageEncoder, name: str, fingerprint: str, dim: int) -> None:
        self._encoder, self.name, self.fingerprint, self.dim = encoder, name, fingerprint, dim

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Of images in uint8: features_BD, float32. Raises DataError: not `dim` of them."""
        found_BD = self._encoder.image_features(unstack(images_BCHW)).float()
        return checked(found_BD, (len(images_BCHW), self.dim), self.name)


def load_torchscript(path: str, device: torch.device) -> tuple[torch.jit.ScriptModule, str]:
    """A TorchScript file, local or on S3, and the sha256 of its bytes.

    Such a file holds a program as well as weights: use only one whose origin is trusted.

    Raises:
        DataError: no such file, or it is not TorchScript.
    """
    local = storage.fetch(path)
    fingerprint = hashlib.sha256(local.read_bytes()).hexdigest()
    try:
        module: torch.jit.ScriptModule = torch.jit.load(str(local), map_location=device)
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: not a TorchScript file ({why})") from None
    return module.eval(), fingerprint


@torch.no_grad()
def call(network: Any, path: str, inputs_BCHW: Tensor, **options: bool) -> Any:
    """What the network of a file answers. Raises DataError: it is not to be called like this."""
    cudnn = torch.backends.cudnn
    # TF32 products would change the third digit of features, and tell one GPU from another.
    with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
        try:
            return network(inputs_BCHW, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).strip().splitlines()[-1]
            raise DataError(f"{path}: is not called like the network expected ({why})") from None


def checked(found: object, shape: tuple[int, int], name: str) -> Tensor:
    """`found` itself. Raises DataError: it is not a tensor of this shape."""
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"{name}: gave {got} where {shape} is due: another network's file?")
    return found
