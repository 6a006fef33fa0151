"""Seconds of an optimizer step, item by item: a count of FLOP or bytes over a rate of the hardware.

Letters as in `activations.py`. "Exposed" is what computing does not hide.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dalle_dist.config import Config
from dalle_dist.gradients.waves import Waves
from dalle_dist.plan.hardware import Hardware
from dalle_dist.plan.items import Item, Layout, nonzero, total
from dalle_dist.plan.model import Model
from dalle_dist.plan.passes import alone, copies, gather_groups
from dalle_dist.plan.settings import Settings
from dalle_dist.plan.shares import Share, padded
from dalle_dist.plan.storing import checkpoint
from dalle_dist.plan.traffic import Traffic, gathered_per_micro_batch

GEMMS = ("matrices, forward", "matrices, backward", "matrices, again")

# Bytes read and written for each value of x by what is no product, in a layer of two resblocks:
# layer norms, casts, GELU, sums into the stream, sums of bias gradients; fp16 also scales and
# filters gradients, on GPUs in a pass each (`dalle_kernels/scaled_gradients`). Forward, backward.
PASSES = {"fp32": (72, 148), "bf16": (64, 130), "fp16": (80, 194)}
_FEWER_PASSES = 2 * (22 - 6) + 2 * (16 - 8)  # of these, on GPUs, in the backward pass
# Operations of a layer that are no views, forward and backward, counted by torch's dispatcher.
OPERATIONS = {"fp32": (13, 36), "bf16": (19, 46), "fp16": (37, 78)}
_BACKWARD = 2 / 3  # of the computing
_STEP_OPERATIONS = 30  # of a layer, once a step: pieces, norms, copies
MODULES = 10  # of a layer, each with DeepSpeed's hooks under ZeRO-3
_BIASES = 9  # widths of a layer's products, whose biases DeepSpeed's own linear layer adds apart


@dataclass(frozen=True)
class Timing:
    """Seconds on each rank per optimizer step, and what follows from them.

    peak        FLOP/s of a GPU in the run's precision, by its data sheet
    gemm_share  what products of matrices reach of it
    """

    items: tuple[Item, ...]
    step_flop: float
    peak: float
    gemm_share: float
    tokens: int
    steps: int
    ranks: int

    @property
    def seconds(self) -> float:
        return total(self.items)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOP, without what is computed again, as a share of all ranks' peak."""
        return self.step_flop / (self.seconds * self.peak * self.ranks)

    @property
    def other_than_gemms(self) -> float:
        return 1 - total(i for i in self.items if i.name in GEMMS) / self.seconds

    @property
    def days(self) -> float:
        return self.seconds * self.steps / 86_400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.ranks


def timing(
    config: Config,
    model: Model,
    settings: Settings,
    share: Share,
    traffic: Traffic,
    layout: Layout,
    hardware: Hardware,
) -> Timing:
    computing = _computing(model, settings, hardware)
    once = (
        *_powersgd(config, settings, share, hardware),
        *_between(config, model, settings, traffic, layout, hardware, total(computing)),
        _optimizer(model, settings, hardware),
    )
    device = (
        *computing,
        *_inside(model, settings, traffic, hardware, total(computing)),
        *once,
    )
    items = nonzero(
        *device,
        _host(model, settings, hardware, total(device)),
        *_now_and_then(config, model, settings, layout, hardware),
    )
    train = settings.train
    return Timing(
        items,
        model.flop * train.batch_size,
        _peak(settings, hardware),
        _product_rate(settings, hardware) / _peak(settings, hardware),
        train.batch_size * model.transformer.tokens,
        train.steps,
        layout.world,
    )


def _peak(settings: Settings, hardware: Hardware) -> float:
    return hardware.peak_fp32 if settings.precision == "fp32" else hardware.peak_16


def _product_rate(settings: Settings, hardware: Hardware) -> float:
    share = hardware.fp32_share if settings.precision == "fp32" else hardware.gemm_share
    return share * _peak(settings, hardware)


def _computing(model: Model, settings: Settings, hardware: Hardware) -> tuple[Item, ...]:
    """Forward and backward passes of all micro-batches."""
    shape, samples = model.transformer, settings.samples * settings.accumulation
    tokens, again = samples * shape.tokens, settings.train.checkpoint_activations
    flop, rate = 2 * model.matrices * tokens, _product_rate(settings, hardware)
    how = f"FLOP at {rate / 1e12:,.3g} TFLOP/s"
    peak = _peak(settings, hardware)
    forward = 4 * model.attention_size * samples / (hardware.attention_forward_share * peak)
    backward = 8 * model.attention_size * samples / (hardware.attention_backward_share * peak)
    there, back = PASSES[settings.precision]
    if settings.precision == "fp16" and hardware.device != "cpu":
        back -= _FEWER_PASSES
    if settings.stage == 3 and settings.precision != "fp16":
        there += 2 * settings.compute_bytes * _BIASES
    passes = there * (2 if again else 1) + back
    x = shape.layers * tokens * shape.width
    bandwidth = hardware.bandwidth * hardware.memory_share
    classes = shape.text_tokens * model.text_classes + shape.image_tokens * shape.codebook_size
    logits = 6 * shape.width * samples * classes
    fp32 = hardware.fp32_share * hardware.peak_fp32
    loss = logits / fp32 + 6 * 4 * samples * classes / bandwidth
    loss += _unembedding_casts(model, settings) / (hardware.bandwidth * hardware.copy_share)
    return (
        Item(GEMMS[0], flop / rate, f"{flop:.3g} {how}"),
        Item(GEMMS[1], 2 * flop / rate, f"{2 * flop:.3g} {how}"),
        Item(GEMMS[2], flop / rate if again else 0, f"{flop:.3g} {how}; activation checkpoints"),
        Item(
            "attention",
            forward * (2 if again else 1) + backward,
            f"pairs that masks allow: {4 * model.attention_size * samples:.3g} FLOP forward",
        ),
        Item("element-wise", passes * x / bandwidth, f"{passes} B x {x:,} values"),
        Item("logits and loss", loss, f"{logits:.3g} fp32 FLOP, 6 passes over the logits"),
    )


def _unembedding_casts(model: Model, settings: Settings) -> float:
    """Bytes: bf16 weights to fp32 for each forward pass, and their gradients back."""
    classes = model.text_classes + model.transformer.codebook_size
    if settings.precision != "bf16":
        return 0.0
    return settings.accumulation * 2 * (2 + 4) * classes * model.transformer.width


def _inside(
    model: Model, settings: Settings, traffic: Traffic, hardware: Hardware, computing: float
) -> tuple[Item, ...]:
    """ZeRO's collectives; those over several nodes are bound by the slower of the two networks.

    What DeepSpeed copies for them stands in the same streams, and hides where they leave room.
    """
    link = hardware.link * hardware.link_share
    rank_wire = hardware.wire / 8 * hardware.wire_share
    sent = total(i for i in traffic.inside if i.name != "flags and numbers")
    seconds = sent / link
    if settings.sharing.replicas == 1 and traffic.between:
        # All GPUs of a node send their part of the ring through the node's wire.
        share = total(i for i in traffic.between if i.name != "flags and numbers")
        node = round(sent / share) + 1 if share else 1
        seconds = max(seconds, share * node / rank_wire)
    hidden = hardware.overlap * computing if settings.stage == 3 else 0.0
    first = seconds / (3 * model.transformer.layers * settings.accumulation)
    exposed = max(seconds - hidden, first if settings.stage == 3 else 0.0)
    count = collectives(model, settings)
    around = copies(model, settings)
    passes = total(around) / (hardware.bandwidth * hardware.copy_share)
    return (
        Item("ZeRO's collectives, exposed", exposed, f"{seconds:.3g} s less {hidden:.3g} s hidden"),
        Item("their start", count * hardware.collective_s, f"{count} collectives"),
        Item(
            "DeepSpeed's copies, exposed",
            max(0.0, passes - max(0.0, hidden - seconds)),
            "; ".join(f"{item.amount:.3g} B {item.name}" for item in around),
        ),
    )


def collectives(model: Model, settings: Settings) -> int:
    """Of ZeRO in a step: reductions, gathers, small parameters that stay whole one by one."""
    reductions = _reductions(model, settings)
    if settings.stage == 0:
        return 1
    if settings.stage < 3:
        return reductions * (settings.accumulation if settings.stage == 2 else 1) + 2
    if settings.shards == 1:
        return settings.accumulation * reductions
    small = sum(size <= settings.persistent_up_to for size in model.sizes.values())
    return settings.accumulation * (reductions + _gathers(model, settings)) + small


def _gathers(model: Model, settings: Settings) -> int:
    """Of a micro-batch. fp16 gathers its matrices apart from the rest of a group."""
    dtypes = 0
    for names in gather_groups(model, settings):
        kinds = {name in model.resblocks.matrices for name in names}
        dtypes += len(kinds) if settings.precision == "fp16" else 1
    # Some or all are gathered again in the backward pass.
    return round(dtypes * sum(gathered_per_micro_batch(model, settings)) / model.parameters)


def _reductions(model: Model, settings: Settings) -> int:
    """Of a backward pass: of buckets, which end where there is no room left for a gradient, and of
    large gradients; a bucket of those alone needs none of its own."""
    buckets: dict[bool, list[list[str]]] = {}
    large = set(alone(model, settings))
    for name, size in reversed(model.sizes.items()):
        apart = settings.precision == "fp16" and name in model.resblocks.matrices
        filled = buckets.setdefault(apart, [[]])
        held = sum(model.sizes[other] for other in filled[-1])
        if held and held + size > settings.reduce_bucket:
            filled.append([])
        filled[-1].append(name)
    together = [
        names for filled in buckets.values() for names in filled if not large.issuperset(names)
    ]
    return len(together) + len(large)


def _powersgd(
    config: Config, settings: Settings, share: Share, hardware: Hardware
) -> tuple[Item, ...]:
    if not share.compressed or settings.sharing.replicas == 1:
        return ()
    products = 3 * 2 * share.rank * share.values
    fp32 = hardware.fp32_share * hardware.peak_fp32
    narrow = config.parallel.products == "tf32" and hardware.peak_tf32 > 0
    rate = hardware.fp32_share * hardware.peak_tf32 if narrow else fp32
    # Norm; gradient + error; both products' reading; P Q^T; what it leaves. The kernels of 1-6-9
    # errors pass once over gradient + error, and once over what is left.
    if config.parallel.error_dtype == "fp32":
        passes = 4 + 4 * (2 + 3) + 4 * 2 + 4 + 4 * 3
    else:
        passes = 4 + (4 + 2 + 4) + 4 * 2 + 4 + (4 + 4 + 4 + 2)
    bandwidth = hardware.bandwidth * hardware.memory_share
    shapes = Counter(min(shape) for shape in share.compressed)
    columns = sum(short * count for short, count in shapes.items())
    # CholeskyQR2: twice a Gram matrix and a triangular solve.
    flop = 2 * (2 + 1) * columns * share.rank**2
    orthogonal = len(shapes) * hardware.factor_s + flop / fp32
    return (
        Item(
            "PowerSGD's products",
            products / rate,
            f"{products:.3g} FLOP in {'TF32' if narrow else 'fp32'}",
        ),
        Item(
            "PowerSGD's passes",
            passes * share.values / bandwidth,
            f"{passes} B x {share.values:,} values",
        ),
        Item(
            "orthogonalisation",
            orthogonal,
            f"{len(shapes)} batches, {flop:.3g} fp32 FLOP",
        ),
    )


def _between(
    config: Config,
    model: Model,
    settings: Settings,
    traffic: Traffic,
    layout: Layout,
    hardware: Hardware,
    computing: float,
) -> tuple[Item, ...]:
    """All GPUs of a node share its wire. Under ZeRO-3 waves go beside the backward pass."""
    sent = {i.name: i.amount * layout.gpus_per_node for i in traffic.between}
    rate = hardware.wire / 8 * hardware.wire_share
    waved = sent.get("P", 0.0) + sent.get("Q", 0.0)
    whole = sent.get("sent whole", 0.0) + sent.get("outer steps", 0.0)
    if settings.between == "dense":
        waved = whole * model.matrices / model.parameters
        whole -= waved
    waves = Waves(model.resblocks.count).last
    hidden = 0.0
    if settings.stage == 3 and config.parallel.overlap:
        # The first wave is ready when its part of the backward pass is done, the last at the end.
        beside = hardware.overlap * _BACKWARD * computing / settings.accumulation
        hidden = (1 - 1 / waves) * min(beside, waved / rate)
    exposed = (waved + whole) / rate - hidden
    how = (
        f"{(waved + whole) / 1e9:,.3g} GB of a node at {rate / 1e9:,.3g} GB/s, "
        f"{hidden:.3g} s beside the backward pass"
    )
    return (Item("between nodes, exposed", exposed, how),)


def optimizer_passes(moments: str, weight_bytes: int, stage: int = 3) -> int:
    """Bytes of each value: norm, flat gradient, its scale, AdamW, parameters.

    Under ZeRO-3 (`one_copy.py`) the gradient is flat, the norm is taken of it in fp32, and an fp32
    weight is the parameter; else DeepSpeed copies, the gradient to fp64 for the norm.
    """
    narrow = 2 if moments == "16-bit" else 4
    adamw = (4 + 4 + 2 * narrow) + (4 + 2 * narrow)
    if stage == 3:
        return 4 + 8 + adamw + (4 + weight_bytes if weight_bytes == 2 else 0)
    return (4 + 8 + 8) + 8 + 8 + adamw + 4 + weight_bytes


def _optimizer(model: Model, settings: Settings, hardware: Hardware) -> Item:
    own = padded(model, settings.stage, settings.shards)
    passes = optimizer_passes(settings.train.moments, settings.weight_bytes, settings.stage)
    if settings.precision == "fp16" and settings.between in ("zero", "diloco"):
        passes += 4 + 8  # finite, unscaled; means between nodes do so as they read
    seconds = passes * own / (hardware.bandwidth * hardware.optimizer_share)
    return Item("optimizer", seconds, f"{passes} B x {own:,.0f} values")


def _host(model: Model, settings: Settings, hardware: Hardware, device: float) -> Item:
    """Launches, and DeepSpeed's hooks: hidden where the device works on while the host goes on."""
    layers, train = model.transformer.layers, settings.train
    forward, backward = OPERATIONS[settings.precision]
    again = train.checkpoint_activations
    passes = forward * (2 if again else 1) + backward
    operations = layers * (settings.accumulation * passes + _STEP_OPERATIONS)
    modules = gradients = 0
    if settings.stage == 3:
        modules = layers * MODULES * settings.accumulation * (3 if again else 2)
    if settings.stage:
        often = settings.stage > 1 or settings.precision == "bf16"
        gradients = len(model.sizes) * (settings.accumulation if often else 1)
    hooks = modules * hardware.module_s + gradients * hardware.gradient_s
    seconds = operations * hardware.launch_s + hooks
    exposed = max(0.0, seconds - device) if hardware.asynchronous else seconds
    how = (
        f"{operations:,} operations, hooks of {modules:,} modules and {gradients:,} gradients: "
        f"{seconds:.3g} s of the host"
    )
    return Item("launches and host, exposed", exposed, how)


def _now_and_then(
    config: Config, model: Model, settings: Settings, layout: Layout, hardware: Hardware
) -> tuple[Item, ...]:
    train, bandwidth = settings.train, hardware.bandwidth * hardware.memory_share
    average = 12 * model.parameters / layout.world / bandwidth / train.ema_every
    saved = total(checkpoint(config, model, settings)) / layout.world
    saving = saved / hardware.host_link / train.save_every
    sampling, tokens = 0.0, model.transformer.image_tokens * len(train.prompts)
    if train.sample_every and tokens:
        weights = 2 * model.parameters / (hardware.bandwidth * hardware.decode_share)
        sampling = tokens * weights / train.sample_every
    return (
        Item("moving average", average, f"12 B x its share, every {train.ema_every} steps"),
        Item("saving", saving, f"{saved / 1e9:.3g} GB to the host, every {train.save_every} steps"),
        Item("sample images", sampling, f"{tokens:,} tokens, every {train.sample_every} steps"),
    )
