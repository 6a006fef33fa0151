"""The training set of a run: in which order, how far, and what was amiss in it."""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass
from typing import Any

from dalle_dist import storage
from dalle_dist.config import Config, StageConfig, difference
from dalle_dist.data.image_dataset import ImageDataset
from dalle_dist.data.notes import Notes
from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardIndex
from dalle_dist.data.source import require_few
from dalle_dist.data.token_dataset import TokenDataset
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import ConfigError

NAMED = 5  # of the keys of corrupt samples, in an epoch's summary
TrainingSet = ImageDataset | TokenDataset


def training_order(folder: str, config: Config, settings: StageConfig, ranks: Ranks) -> SampleOrder:
    """Of a stage's training set.

    Raises:
        DataError: no shards.
        ConfigError: the ranks cannot share the streams.
    """
    data = config.data
    streams = data.streams or settings.batch_size
    sizes = ShardIndex.load(folder).shards.samples
    order = SampleOrder(config.seed, sizes, streams, data.shuffle_shards)
    order.require(ranks.world)
    return order


@dataclass
class Progress:
    """How far a run has come in its training set; part of its checkpoints.

    samples  consumed, counted from the start of epoch 0: the next one's position
    order    what the order of the samples depends on, by name
    total    samples of the set
    """

    samples: int
    order: dict[str, Any]
    total: int

    @classmethod
    def start(cls, dataset: TrainingSet, settings: StageConfig) -> Progress:
        order, index = dataset.source.order, dataset.shards.index
        assert order is not None
        return cls(
            0,
            {
                "training set": f"{index.samples} samples, {index.fingerprint}",
                "seed": order.seed,
                "data.streams": order.streams,
                "data.shuffle_shards": order.shuffle_shards,
                f"{settings.section}.batch_size": settings.batch_size,
            },
            order.samples,
        )

    @property
    def epoch(self) -> int:
        """Epochs that are finished."""
        return self.samples // self.total

    def state_dict(self) -> dict[str, Any]:
        epochs = math.ceil(self.samples / self.total)
        return {"samples": self.samples, "epochs_begun": epochs, "order": self.order}

    def load_state_dict(self, state: dict[str, Any], new_epoch: bool, checkpoint: str) -> None:
        """Go on where a checkpoint was.

        Args:
            new_epoch: where the order is another one, it begins with the next epoch.

        Raises:
            ConfigError: the order is another one, and `new_epoch` is false.
        """
        lines = difference(state.get("order", {}), self.order)
        if not lines:
            self.samples = state["samples"]
        elif new_epoch:
            self.samples = state.get("epochs_begun", 0) * self.total
        else:
            raise ConfigError(
                f"{checkpoint}: the samples would come in another order: {'; '.join(lines)}; go on "
                "as it was, or with --new-epoch, which leaves the rest of the epoch out"
            )


class Amiss:
    """What is found amiss in the samples: collected on each rank, said at the end of an epoch."""

    def __init__(self, ranks: Ranks, bad_shards: int) -> None:
        self.notes, self._ranks, self._bad_shards = Notes(), ranks, bad_shards

    def summary(self, epoch: int, samples: int) -> tuple[str, dict[str, float]]:
        """(one line, numbers for the log) of the epoch that ended; a collective call.

        Raises:
            DamagedShard: over all ranks more shards are bad than may be.
        """
        found = Notes.together(self._ranks.gather(self.notes.take()))
        self.notes.quarantined |= found.quarantined
        if found.quarantined:
            *_, last = found.quarantined.values()
            require_few(len(found.quarantined), self._bad_shards, last)
        captions = max(found.captions, 1)
        numbers = {
            "samples_corrupt": float(len(found.corrupt)),
            "shards_quarantined": float(len(found.quarantined)),
            "epoch_captions_cut": found.cut / captions,
            "epoch_captions_empty": found.empty / captions,
        }
        return f"epoch {epoch} of {samples:,} samples ends: {_in_words(found)}", numbers


def _in_words(found: Notes) -> str:
    parts = [f"{len(found.corrupt)} samples corrupt"]
    if found.corrupt:
        named = sorted(found.corrupt)
        more = ", ..." if len(named) > NAMED else ""
        parts[0] += f" ({', '.join(named[:NAMED])}{more})"
    if found.quarantined:
        parts.append(f"shards quarantined: {', '.join(sorted(found.quarantined))}")
    if found.captions:
        parts.append(f"{found.cut / found.captions:.1%} of captions cut, {found.empty} empty")
    retries = storage.retries()
    if retries:
        parts.append(f"{sum(retries.values())} requests repeated by rank 0")
    return "; ".join(parts)


def in_flight(dataset: TrainingSet, ranks: Ranks) -> str:
    """What of a remote set a node has in its cache at a time, in words; a collective call."""
    on_node = ranks.gather(socket.gethostname()).count(socket.gethostname())
    order = dataset.source.order
    if order is None or not storage.is_remote(dataset.shards.folder):
        return ""
    index = dataset.shards.index
    # The windows that are read, and those that are fetched ahead.
    shards = 2 * order.shuffle_shards * order.streams * on_node // ranks.world
    shards = min(shards, len(index.shards))
    size, budget = shards * index.shards.bytes / len(index.shards), storage.cache_budget()
    text = (
        f"{shards:,} shards at a time on a node, {size / 1e9:.1f} GB, in {storage.cache_folder()} "
        f"(at most {budget / 1e9:.0f} GB)"
    )
    if size > budget:
        text += "; TOO LITTLE: shards are fetched again and again; raise data.cache_gb"
    return text
