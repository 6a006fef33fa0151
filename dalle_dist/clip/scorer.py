"""How well images fit captions, by any CLIP in a folder of Hugging Face's format.

Read from disk or S3, never from the hub: config.json, model.safetensors (whole, or in parts with
their index), preprocessor_config.json and the tokenizer's files. No pickle is opened and no code of
the folder is run.

Shape suffixes: B images or captions, C channels, H and W pixels, T text positions, D features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dalle_dist import storage
from dalle_dist.checkpoint.formats import State, fill, fingerprint, load_tensors
from dalle_dist.clip.hugging_face import library
from dalle_dist.data.decode import on_white
from dalle_dist.errors import CheckpointError, UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
PREPROCESSOR = "preprocessor_config.json"
FETCHED = (".json", ".txt", ".safetensors")  # suffixes of the files that are read
BATCH = 64  # images or captions of a forward pass
T = TypeVar("T")


class CLIPScorer:
    """A frozen CLIP in fp32; made by `load`.

    fingerprint   16 hex digits of the weights, for manifests
    name          what it sees, for figures and their files
    dim           number of features
    """

    def __init__(
        self, model: Any, processor: Any, tokenizer: Any, fingerprint: str, batch: int = BATCH
    ) -> None:
        self._model, self._processor, self._tokenizer = model, processor, tokenizer
        self.fingerprint, self._batch = fingerprint, batch
        self._length: int = model.config.text_config.max_position_embeddings
        self.dim: int = model.config.projection_dim
        seen = model.config.vision_config
        self.name = f"CLIP, {seen.image_size} pixels in patches of {seen.patch_size}"

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu", batch: int = BATCH
    ) -> CLIPScorer:
        """The CLIP of a folder, local or `s3://`.

        Args:
            batch: images or captions of a forward pass.

        Raises:
            CheckpointError: no CLIP there, or one that is not whole, or its weights are a pickle.
            UserError: `transformers` is not installed.
        """
        folder = os.fspath(folder)
        transformers = library()
        names = storage.list_files(folder)
        _require_files(folder, names)
        local = storage.fetch_folder(folder, FETCHED)
        config = _config(folder, local)
        state = _state(local, names)
        with torch.random.fork_rng(devices=[]):  # its first weights are not used
            model = _tried(folder, lambda: transformers.CLIPModel(config))
        fill(model, state, folder)
        return cls(
            model.to(device),
            _processor(folder, local),
            _tokenizer(folder, local),
            fingerprint(state),
            batch,
        )

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of length 1, float32, on the model's device: image_BD.

        Images of any size, on white where transparent, prepared as preprocessor_config.json says.
        """
        return self._batched(self._images, images)

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Features of length 1, float32, on the model's device: text_BD.

        Captions longer than the model's text positions are cut.
        """
        return self._batched(self._captions, captions)

    def score(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Cosine similarity of each image and its caption, in [-1, 1]: score_B.

        Raises ValueError: not as many captions as images.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images and {len(captions)} captions")
        return (self.image_features(images) * self.text_features(captions)).sum(dim=-1)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _batched(self, features: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
        if not items:
            return torch.zeros(0, self.dim, device=self._device)
        starts = range(0, len(items), self._batch)
        parts = [features(items[start : start + self._batch]) for start in starts]
        return normalize(torch.cat(parts).float(), dim=-1)

    @torch.no_grad()
    def _images(self, images: Sequence[Image.Image]) -> Tensor:
        upright = [on_white(image) for image in images]
        prepared = self._processor(images=upright, return_tensors="pt")
        pixels_BCHW = prepared["pixel_values"].to(self._device)
        seen = self._model.vision_model(pixel_values=pixels_BCHW)
        image_BD: Tensor = self._model.visual_projection(seen.pooler_output)
        return image_BD

    @torch.no_grad()
    def _captions(self, captions: Sequence[str]) -> Tensor:
        # All captions to one length: what is computed for one must not depend on the others.
        ids = self._tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        )
        read = self._model.text_model(
            input_ids=ids["input_ids"].to(self._device),
            attention_mask=ids["attention_mask"].to(self._device),
        )
        text_BD: Tensor = self._model.text_projection(read.pooler_output)
        return text_BD


def _require_files(folder: str, names: Sequence[str]) -> None:
    """Raise CheckpointError: the folder has not what a CLIP is made of."""
    if CONFIG not in names:
        inner = "release/config.json"
        hint = f"; did you mean {storage.join(folder, 'release')}?" if inner in names else ""
        raise CheckpointError(f"{folder}: no CLIP ({CONFIG} is missing){hint}")
    if not {WEIGHTS, INDEX} & set(names):
        if PICKLE in names:
            raise CheckpointError(
                f"{folder}: {PICKLE} is a pickle, which can run code when it is opened; where you "
                'trust it, convert it: python -c "from transformers import CLIPModel as M; '
                f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
        raise CheckpointError(f"{folder}: no CLIP ({WEIGHTS} is missing)")
    if PREPROCESSOR not in names:
        raise CheckpointError(f"{folder}: no CLIP ({PREPROCESSOR} is missing)")


def _config(folder: str, local: Path) -> Any:
    tree = _tried(folder, lambda: json.loads((local / CONFIG).read_text()))
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind != "clip":
        raise CheckpointError(f"{folder}: {CONFIG} is of model_type '{kind}', not of a CLIP")
    return _tried(folder, lambda: library().CLIPConfig.from_dict(tree))


def _state(local: Path, names: Sequence[str]) -> State:
    """The weights in fp32, without the positions' numbers that older files hold."""
    files = [WEIGHTS]
    if WEIGHTS not in names:
        index = json.loads((local / INDEX).read_text())
        files = sorted(set(index["weight_map"].values()))
    tensors = {name: t for file in files for name, t in load_tensors(local / file).items()}
    return {name: t.float() for name, t in tensors.items() if not name.endswith("position_ids")}


def _processor(folder: str, local: Path) -> Any:
    # By its name: the general one asks for torchvision.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return _tried(
        folder, lambda: CLIPImageProcessorPil.from_pretrained(local, local_files_only=True)
    )


def _tokenizer(folder: str, local: Path) -> Any:
    return _tried(
        folder,
        lambda: library().AutoTokenizer.from_pretrained(
            local, local_files_only=True, trust_remote_code=False
        ),
    )


def _tried(folder: str, action: Callable[[], T]) -> T:
    """What the library returns; what it raises, and be it of many lines, as a CheckpointError."""
    try:
        return action()
    except UserError:
        raise
    except Exception as error:  # a dozen unrelated classes
        raise CheckpointError(
            f"{folder}: not a whole CLIP ({' '.join(str(error).split())})"
        ) from None
