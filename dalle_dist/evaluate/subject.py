"""All that is evaluated and measured with, loaded and checked before anything is sampled.

Shape suffixes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from PIL import Image
from torch import Tensor

from dalle_dist.checkpoint.release import has_transformer, load_release_image_tokenizer
from dalle_dist.clip.scorer import CLIPScorer
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.evaluate.data import Data
from dalle_dist.evaluate.options import Options
from dalle_dist.evaluation.features import ClipFeatures, FeatureNetwork
from dalle_dist.evaluation.inception import Inception
from dalle_dist.evaluation.lpips import Lpips
from dalle_dist.evaluation.prepare import Preparation, stack
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.request import Settings
from dalle_dist.image_tokenizer.protocol import ImageTokenizer


@dataclass(frozen=True)
class Subject:
    """A release, a set, and the networks that measure.

    generator         None: the release is of an image tokenizer alone
    settings          of the images that are sampled
    preparation       of all images whose features are compared
    own_preparation   of what the image tokenizer is given: its own size
    scorer            what gives the CLIP score
    chooser           what chooses among candidates
    """

    options: Options
    ranks: Ranks
    data: Data
    generator: Generator | None
    settings: Settings | None
    image_tokenizer: ImageTokenizer
    preparation: Preparation
    own_preparation: Preparation
    networks: list[FeatureNetwork]
    lpips: Lpips | None
    scorer: CLIPScorer | None
    chooser: CLIPScorer | None

    @classmethod
    def load(cls, options: Options, ranks: Ranks) -> Subject:
        """Raises UserError: a file or folder that is not what its option asks for."""
        device = ranks.device
        data, generator, settings = Data(options.data), None, None
        if has_transformer(options.release):
            generator = Generator.load(options.release, device, options.precision)
            settings = generator.settings(options.seed, None, **options.sampling)
            data.chosen(options.captions)  # its errors before the first image is measured
            tokenizer = generator.image_tokenizer
        else:
            tokenizer = load_release_image_tokenizer(options.release, device)
        size = tokenizer.image_size
        clips = {folder: CLIPScorer.load(folder, device) for folder in _clips(options)}
        return cls(
            options,
            ranks,
            data,
            generator,
            settings,
            tokenizer,
            Preparation(options.size or size, "centre", options.filter),
            Preparation(size, "centre", options.filter),
            _networks(options, clips, ranks),
            None if options.lpips is None else Lpips(options.lpips, device),
            clips.get(options.score_clip or options.clip or ""),
            clips.get(options.rerank or ""),
        )

    def true(self, i: int) -> Image.Image:
        """An image of the set, prepared for a comparison."""
        return self.preparation(self.data.image(i))

    def originals(self, numbers: range) -> Tensor:
        """Images of the set as the image tokenizer takes them: images_BCHW in [0, 1]."""
        return self.floats([self.own_preparation(self.data.image(i)) for i in numbers])

    @staticmethod
    def floats(images: Sequence[Image.Image]) -> Tensor:
        """images_BCHW in [0, 1]."""
        return stack(images).float() / 255

    def common(self) -> dict[str, str]:
        """What all figures depend on."""
        sampling = {} if self.settings is None else asdict(self.settings.sampling)
        return {
            "model": "" if self.generator is None else self.generator.fingerprint,
            "image_tokenizer": self.image_tokenizer.fingerprint,
            "data": self.data.folder,
            "data_fingerprint": self.data.fingerprint,
            "seed": str(self.options.seed),
            "sampling": json.dumps(sampling, sort_keys=True),
            "precision": self.options.precision,
            "chosen_by": "" if self.chooser is None else self.chooser.fingerprint,
        }


def _clips(options: Options) -> set[str]:
    """Folders, each once: one CLIP may do several things."""
    return {f for f in (options.clip, options.score_clip, options.rerank) if f is not None}


def _networks(options: Options, clips: dict[str, CLIPScorer], ranks: Ranks) -> list[FeatureNetwork]:
    found: list[FeatureNetwork] = []
    if options.inception is not None:
        found.append(Inception(options.inception, options.inception_resize, ranks.device))
    if options.clip is not None:
        clip = clips[options.clip]
        found.append(ClipFeatures(clip, clip.name, clip.fingerprint, clip.dim))
    return found
