"""Fréchet distances and inception scores by one feature network, beside their self-checks.

Shape suffixes: N images, V features, then the probabilities of a classifier.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dalle_dist import storage
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import DataError
from dalle_dist.evaluate.figures import Figure
from dalle_dist.evaluate.rows import gathered
from dalle_dist.evaluation.blur import blur
from dalle_dist.evaluation.features import Classifier, FeatureNetwork
from dalle_dist.evaluation.frechet import frechet_distance
from dalle_dist.evaluation.inception_score import SPLITS, InceptionScore
from dalle_dist.evaluation.moments import Gaussian, Moments
from dalle_dist.evaluation.prepare import Preparation, stack
from dalle_dist.evaluation.reference import Setting, load_reference, save_reference
from dalle_dist.evaluation.self_checks import halves_check

Images = Callable[[range], Sequence[Image.Image]]  # prepared, those of these numbers
FEWEST = 4  # images of which two halves have a covariance


class Distances:
    """Of one network, and to one set of reference images.

    Args:
        given: path of reference moments that take the place of images, see `options.reference`.
        kept: folder in which the moments of images are kept.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        preparation: Preparation,
        ranks: Ranks,
        given: str | None = None,
        kept: str | None = None,
    ) -> None:
        self.network, self._preparation, self._ranks = network, preparation, ranks
        self._given, self._kept = given, kept
        self._references: dict[float, tuple[Gaussian, float | None, str]] = {}  # on rank 0

    def refer(self, images: Images, count: int, radii: Sequence[float], source: str) -> None:
        """Measure the reference images, named `source`, or read their moments; a collective call.

        Raises DataError: moments of another setting, or fewer than FEWEST images.
        """
        for radius in radii:
            path = self._ranks.on_main(partial(self._path, radius))
            if path is not None:
                self._ranks.on_main(partial(self._read, radius, path))
                continue
            if count < FEWEST:
                raise DataError(f"{source}: {count} images, distances take at least {FEWEST}")
            rows_NV = gathered(self._ranks, count, self._features(images, radius))
            self._ranks.on_main(partial(self._measured, radius, rows_NV, source))

    def rows(self, images: Images, radius: float) -> Callable[[range], Tensor]:
        """What `figures` is made of, for `gathered`."""

        def of(numbers: range) -> Tensor:
            pixels_BCHW = stack([blur(image, radius) for image in images(numbers)])
            features = self.network.features(pixels_BCHW).float().cpu()
            if not isinstance(self.network, Classifier):
                return features
            return torch.cat([features, self.network.probabilities(pixels_BCHW).cpu()], dim=1)

        return of

    def figures(
        self, rows_NV: Tensor, radius: float, name: str = "", candidates: int | None = None
    ) -> list[Figure]:
        """Distance and, of a classifier, inception score; on rank 0. Raises DataError.

        Args:
            name: of the distance, where it is not the network's own; then without the score.
        """
        setting = Setting.of(self.network, self._preparation, radius)
        shared = asdict(setting) | {"images": len(rows_NV), "candidates": candidates}
        features_NV, probabilities_NV = rows_NV.tensor_split([self.network.dim], dim=1)
        reference, halves, source = self._references[radius]
        with warnings.catch_warnings():  # `few` says it beside the figure
            warnings.simplefilter("ignore")
            value = frechet_distance(reference, gaussian_of(features_NV))
        note = _note(reference.count, len(rows_NV), self.network.dim, source)
        found = [
            Figure(
                name or self.network.figure,
                value,
                halves=halves,
                reference=source,
                note=note,
                **shared,
            )
        ]
        if probabilities_NV.shape[1] and not name:
            found.append(_score(probabilities_NV, shared))
        return found

    def _features(self, images: Images, radius: float) -> Callable[[range], Tensor]:
        return lambda numbers: self.network.features(
            stack([blur(image, radius) for image in images(numbers)])
        )

    def _path(self, radius: float) -> str | None:
        """The file of given moments at this radius, if there is one."""
        if self._given is None:
            return None
        if self._given.endswith((".npz", ".safetensors")):
            return self._given if radius == 0 else None
        path = storage.join(self._given, self._name(radius))
        return path if storage.exists(path) else None

    def _name(self, radius: float) -> str:
        figure = "".join(c for c in self.network.figure.lower() if c.isalnum())
        return f"{figure}-blur-{radius:g}.safetensors"

    def _read(self, radius: float, path: str) -> None:
        found = load_reference(path, Setting.of(self.network, self._preparation, radius))
        if len(found.gaussian.mean_D) != self.network.dim:
            raise DataError(
                f"{path}: moments of {len(found.gaussian.mean_D)} features, {self.network.name} "
                f"has {self.network.dim}"
            )
        of = "" if found.gaussian.count is None else f" of {found.gaussian.count} images"
        unknown = "" if found.setting else ", which states no setting"
        self._references[radius] = found.gaussian, found.halves, f"moments{of} in {path}{unknown}"

    def _measured(self, radius: float, features_NV: Tensor, source: str) -> None:
        gaussian, halves = gaussian_of(features_NV), halves_check(features_NV)
        self._references[radius] = gaussian, halves, source
        if self._kept is not None:
            path = storage.join(self._kept, self._name(radius))
            setting = Setting.of(self.network, self._preparation, radius)
            save_reference(path, gaussian, setting, halves)


def gaussian_of(features_NV: Tensor) -> Gaussian:
    moments = Moments(features_NV.shape[1])
    moments.add(features_NV)
    return moments.gaussian()


def _note(reference: int | None, count: int, dim: int, source: str) -> str:
    known = [n for n in (reference, count) if n is not None]
    few = f"{min(known)} images by {dim} features: too few, biased upwards"
    parts = [few] if min(known) <= dim else []
    return "; ".join([*parts, source] if source.startswith("moments") else parts)


def _score(probabilities_NV: Tensor, shared: dict[str, Any]) -> Figure:
    count, classes = probabilities_NV.shape
    score = InceptionScore(count, classes, min(SPLITS, count))
    score.add(torch.arange(count), probabilities_NV)
    mean, deviation = score.result()
    note = f"over {min(SPLITS, count)} splits, deviation {deviation:.2g}"
    few = "; too few images for a score" if count < 10 * classes else ""
    return Figure("inception score", mean, note=note + few, **shared)
