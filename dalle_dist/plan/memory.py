"""Bytes of GPU memory of the rank that has most: what is always there, and the fullest moment.

Counted from DeepSpeed 0.19.8 (`stage_1_and_2.py`, `stage3.py`, `bf16_optimizer.py`, `engine.py`)
and from this package; `benchmarks/plan.py` compares with tensors alive in real processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dalle_dist.config import Config
from dalle_dist.gradients.all_reduce import bytes_per_value
from dalle_dist.gradients.batches import SCRATCH_BYTES
from dalle_dist.plan.activations import Activations
from dalle_dist.plan.items import Item, nonzero, total
from dalle_dist.plan.model import Model
from dalle_dist.plan.passes import together
from dalle_dist.plan.settings import Settings
from dalle_dist.plan.shares import Share, padded


@dataclass(frozen=True)
class GPUMemory:
    """Bytes.

    held     between two steps
    moments  by name, what comes on top of that at moments of a step
    """

    held: tuple[Item, ...]
    moments: dict[str, tuple[Item, ...]]

    @property
    def fullest(self) -> str:
        return max(self.moments, key=lambda name: total(self.moments[name]))

    @property
    def total(self) -> float:
        return total(self.held) + total(self.moments[self.fullest])


def gpu_memory(config: Config, model: Model, settings: Settings, share: Share) -> GPUMemory:
    """Without CUDA's context, which `plan.py` adds, and what the allocator cannot use."""
    held = (
        *_weights(model, settings),
        *_gradients(model, settings),
        *_powersgd(config, share),
        *_outer(settings, share),
        *_average(model, settings),
    )
    moments = {
        "forward pass": _forward(model, settings),
        "logits of the text": _text_logits(model, settings),
        "loss": _logits(model, settings),
        "backward pass begins": _turn(model, settings),
        "first gradients are reduced": _first_bucket(model, settings),
        "backward pass ends": _end(model, settings),
        "gradients are reduced": _reduction(model, settings),
        "gradients are averaged": _exchange(config, model, settings, share),
        "optimizer step": _step(model, settings),
    }
    if config.train.prompts and config.train.sample_every:
        moments["sample images"] = _sampling(config, model, settings)
    return GPUMemory(held, moments)


def _weights(model: Model, settings: Settings) -> tuple[Item, ...]:
    low, stage, ranks = settings.weight_bytes, settings.stage, settings.shards
    own = padded(model, stage, ranks)
    whole = padded(model, 1, ranks) * ranks if stage in (1, 2) else model.parameters
    kept = own if stage == 3 else whole
    # Under ZeRO-3 an fp32 shard is its own master (`engine/deepspeed/build.py`).
    masters = own if stage in (1, 2) or low == 2 else 0
    small = sum(s for s in model.sizes.values() if s <= settings.persistent_up_to)
    gathered = low * small if stage == 3 and ranks > 1 else 0
    narrow = 2 if settings.train.moments == "16-bit" else 4
    matrices = model.matrices * own / model.parameters
    moments = 2 * narrow * matrices + 8 * (own - matrices)
    return nonzero(
        Item("parameters", low * kept, f"{kept:,.0f} x {low} B"),
        Item("parameters never released", gathered, f"{small:,} in small ones x {low} B"),
        Item("fp32 masters", 4 * masters, f"{masters:,.0f} x 4 B"),
        Item(
            "moments",
            moments,
            f"{matrices:,.0f} of matrices x {2 * narrow} B, {own - matrices:,.0f} others x 8 B",
        ),
    )


def _gradients(model: Model, settings: Settings) -> tuple[Item, ...]:
    own, gradients, how = padded(model, settings.stage, settings.shards), 0.0, ""
    if settings.stage == 3:
        gradients, how = 4 * own, f"{own:,.0f} x 4 B"
    elif settings.stage == 1 and settings.precision == "bf16":
        whole = own * settings.shards
        gradients, how = 4 * whole, f"whole on each rank: {whole:,.0f} x 4 B"
    return nonzero(Item("gradients", gradients, how))


def _powersgd(config: Config, share: Share) -> tuple[Item, ...]:
    width = 2 if config.parallel.error_dtype == "1-6-9" else 4
    return nonzero(
        Item("error buffers", width * share.values, f"{share.values:,} x {width} B"),
        Item("Q", 4 * share.q, f"{share.q:,} x 4 B"),
    )


def _outer(settings: Settings, share: Share) -> tuple[Item, ...]:
    own = share.whole if settings.between == "diloco" else 0
    return nonzero(Item("anchor and outer momentum", 8 * own, f"{own:,} x 8 B"))


def _average(model: Model, settings: Settings) -> tuple[Item, ...]:
    ranks = settings.sharing.shard_world * settings.sharing.replicas
    own = model.parameters / ranks
    return (Item("moving average", 4 * own, f"{model.parameters:,} / {ranks} ranks x 4 B"),)


def live(model: Model, settings: Settings) -> tuple[int, int]:
    """Values gathered under ZeRO-3 at the fullest, and in the gathers that are under way."""
    if settings.stage < 3 or settings.shards == 1:
        return 0, 0
    large = [size for size in model.sizes.values() if size > settings.persistent_up_to]
    at_once = min(sum(large), settings.prefetch + max(large, default=0))
    return min(sum(large), settings.max_live), at_once


def _gathered(model: Model, settings: Settings, backward: bool = True) -> tuple[Item, ...]:
    there, arriving = live(model, settings)
    large = {n: s for n, s in model.sizes.items() if s > settings.persistent_up_to}
    matrices = sum(size for name, size in large.items() if name in model.resblocks.matrices)
    narrow, wide = settings.matrix_wire_bytes, settings.other_wire_bytes
    others = min(there, sum(large.values()) - matrices) if narrow != wide else 0
    if backward:  # what the forward pass has left need not be gathered
        arriving = min(arriving, sum(large.values()) - there)
    parts = f"{there - others:,} x {narrow} B" + (f" + {others:,} x {wide} B" if others else "")
    held = narrow * (there - others) + wide * others
    width = held / there if there else 0.0
    return nonzero(
        Item("gathered parameters", held, f"at most {parts}"),
        Item("gathers under way", width * arriving, f"{arriving:,} x {width:.3g} B"),
    )


def _layers(model: Model, settings: Settings) -> tuple[Item, ...]:
    """What is kept of the layers that the forward pass has gone through: all of them."""
    sizes, layers = Activations.of(model, settings), model.transformer.layers
    checkpointed = settings.train.checkpoint_activations
    each = sizes.input if checkpointed else sizes.layer
    name = "inputs of layers" if checkpointed else "activations"
    return (Item(name, layers * each, f"{layers} layers x {each:,} B"),)


def _forward(model: Model, settings: Settings) -> tuple[Item, ...]:
    return (
        *_gathered(model, settings, backward=False),
        *_earlier(model, settings, parts=1),
        *_layers(model, settings),
        Item("forward pass of a layer", Activations.of(model, settings).passing, "and the stream"),
    )


def _text_logits(model: Model, settings: Settings) -> tuple[Item, ...]:
    """Under ZeRO-3 the last gather is still whole: the image's unembedding is to come of it."""
    shape = model.transformer
    tokens = settings.samples * shape.text_tokens
    copied = 4 * (model.text_classes + tokens) * shape.width if settings.weight_bytes == 2 else 0
    stream = (8 + settings.weight_bytes) * settings.samples * shape.tokens * shape.width
    return (
        *_gathered(model, settings, backward=False),
        *_earlier(model, settings, parts=1),
        *_layers(model, settings),
        Item("last norm, unembedding of the text", stream + copied, "fp32 copies where bf16"),
        Item("logits", 4 * tokens * model.text_classes, "of the text, fp32"),
    )


def _logits(model: Model, settings: Settings) -> tuple[Item, ...]:
    sizes = Activations.of(model, settings)
    return (
        *_gathered(model, settings),
        *_earlier(model, settings, parts=1),
        *_layers(model, settings),
        Item("last norm, unembeddings", sizes.top, "their inputs; fp32 copies where bf16"),
        Item("logits", 2 * sizes.logits, f"fp32, with their log softmax: 2 x {sizes.logits:,} B"),
    )


def _turn(model: Model, settings: Settings) -> tuple[Item, ...]:
    return (
        *_gathered(model, settings),
        *_earlier(model, settings, parts=1),
        *_bucket(settings),
        *_layers(model, settings),
        _work(model, settings),
    )


def _first_bucket(model: Model, settings: Settings) -> tuple[Item, ...]:
    """When the first bucket is reduced; ZeRO-2 makes room for all gradients of this rank then."""
    if settings.stage < 2:
        return ()
    shape = model.transformer
    # A gradient larger than a bucket is reduced at once; else layers have been passed by then.
    first = shape.width * max(model.text_classes, shape.codebook_size)
    passed = settings.reduce_bucket / model.parameters if first < settings.reduce_bucket else 0.0
    (kept,) = _layers(model, settings)
    left = max(0.0, 1 - passed)
    return (
        *_gathered(model, settings),
        *_earlier(model, settings, parts=2),
        *_bucket(settings),
        *_waiting(model, settings),
        Item(kept.name, left * kept.amount, f"{left:.0%} of {kept.how}"),
        _work(model, settings),
    )


def _waiting(model: Model, settings: Settings) -> tuple[Item, ...]:
    """Under ZeRO-3 gradients stay where they are until a bucket is full; small ones are copied."""
    if settings.stage < 3 or settings.shards == 1:
        return ()
    share = min(1.0, settings.reduce_bucket / model.parameters)
    matrices, others = share * model.matrices, share * model.others
    held = settings.matrix_wire_bytes * matrices + settings.other_wire_bytes * others
    return nonzero(
        Item("gradients of a bucket", held, f"{share:.2%} of all"),
        Item("their copy", share * together(model, settings), "of those below 2^22 values"),
    )


def _work(model: Model, settings: Settings) -> Item:
    """The larger of what the loss and what a layer has in its backward pass."""
    sizes, shape = Activations.of(model, settings), model.transformer
    checkpointed = settings.train.checkpoint_activations
    layer = (sizes.layer if checkpointed else 0) + sizes.inside + sizes.layer_grads
    classes = max(model.text_classes, shape.codebook_size)
    top = sizes.top + sizes.logits + 4 * classes * shape.width
    if layer > top:
        how = "one layer computed again, its gradients" if checkpointed else "gradients of a layer"
        return Item("backward pass of a layer", layer, how)
    return Item("logits and their gradients", top, "fp32, and the largest unembedding's")


def _end(model: Model, settings: Settings) -> tuple[Item, ...]:
    sizes = Activations.of(model, settings)
    layer = sizes.layer + sizes.inside + sizes.layer_grads
    return (
        *_gathered(model, settings),
        *_earlier(model, settings, parts=2),
        *_bucket(settings),
        Item("backward pass of a layer", layer, "of the first layer"),
    )


def _earlier(model: Model, settings: Settings, parts: int) -> tuple[Item, ...]:
    """Gradients of the micro-batch before (parts=1), and of this one too (parts=2)."""
    stage, own = settings.stage, padded(model, settings.stage, settings.shards)
    accumulates = settings.accumulation > 1
    if stage == 3 or (parts == 1 and not accumulates):
        return ()
    if stage == 2:
        copies = parts if accumulates and settings.precision != "bf16" else 1
        return (Item("gradients", 4 * own * copies, f"{own:,.0f} x 4 B x {copies}"),)
    width = settings.weight_bytes
    return (Item("gradients", width * model.parameters, f"{model.parameters:,} x {width} B"),)


def _bucket(settings: Settings) -> tuple[Item, ...]:
    """ZeRO-1 and 2 make theirs for each backward pass."""
    if settings.stage not in (1, 2) or (settings.stage, settings.precision) == (1, "bf16"):
        return ()
    count = 2 if settings.precision == "fp16" else 1
    width = settings.weight_bytes
    size = settings.reduce_bucket
    return (Item("DeepSpeed's buckets", count * width * size, f"{count} x {size:,} x {width} B"),)


def _exchange(config: Config, model: Model, settings: Settings, share: Share) -> tuple[Item, ...]:
    if settings.between == "diloco":
        return _step_gradients(model, settings)  # its buckets are small, and gradients stay here
    wire = bytes_per_value(config.parallel.comm_dtype)
    alike: dict[tuple[int, int], int] = {}
    if config.parallel.error_dtype == "1-6-9":
        for rows, columns in share.compressed:
            alike[rows, columns] = alike.get((rows, columns), 0) + rows * columns
    chunk = min(SCRATCH_BYTES, 4 * max(alike.values(), default=0))
    factors, whole = share.p + share.q, share.whole if settings.sharing.replicas > 1 else 0
    return nonzero(
        *_step_gradients(model, settings),
        Item("P, Q on the way", (4 + wire) * factors, f"{factors:,} x (4 + {wire}) B"),
        Item("errors in fp32", chunk, "of shards of a shape, at most 256 MiB"),
        Item("what is sent whole", 4 * whole, f"{whole:,} x 4 B"),
    )


def _reduction(model: Model, settings: Settings) -> tuple[Item, ...]:
    """Without ZeRO, and of bf16 under ZeRO-1, all at once: DeepSpeed's `allreduce_bucket`."""
    width = settings.weight_bytes
    first = (settings.stage, settings.precision) == (1, "bf16")
    if settings.stage and not first:
        return ()
    flat = min(model.parameters, 500_000_000)
    copies = width + 4 if first else width
    return (
        *_step_gradients(model, settings),
        Item("flat copy to be reduced", flat * copies, f"{flat:,} x {copies} B"),
    )


def _step_gradients(model: Model, settings: Settings) -> tuple[Item, ...]:
    """After the last micro-batch they are there once."""
    return _earlier(model, replace(settings, accumulation=1), parts=2)


def _step(model: Model, settings: Settings) -> tuple[Item, ...]:
    own = padded(model, settings.stage, settings.shards)
    flat, how = 0.0, ""
    if settings.stage in (1, 2) and not (settings.stage == 1 and settings.precision == "bf16"):
        flat, how = 4 * model.matrices / settings.shards, "flat gradients of a group"
    elif settings.stage == 0 and settings.precision == "bf16":
        flat, how = 4 * own, "fp32 gradients"
    return nonzero(*_step_gradients(model, settings), Item("optimizer's gradients", flat, how))


def _sampling(config: Config, model: Model, settings: Settings) -> tuple[Item, ...]:
    shape = config.transformer
    whole = 2 * model.parameters if settings.stage == 3 else 0
    width = settings.compute_bytes
    samples = config.train.samples_per_prompt * (2 if config.sampling.guidance != 1 else 1)
    cache = 2 * width * shape.layers * shape.tokens * shape.width * samples
    return nonzero(
        Item("whole model on rank 0", whole, f"{model.parameters:,} x 2 B; train.prompts is set"),
        Item("keys and values", cache, f"{samples} samples x {shape.layers} layers"),
    )
