"""fp16 with a gradient scale per resblock against one loss scale and fp32, on narrow deep models.

"d64-l64" shows what underflows: as deep as the 12B model, its embeddings starting at that model's
deviation. It learns little in its 120 steps, and two fp32 runs of it end apart. "d64-l24" learns
more, so that losses can be compared. All runs of a model share data and steps; they part after a
few in fp32, with scales as high as those steps' gradients allow: the rules need thousands.

The rival is the field's dynamic loss scale: x 2 after GOOD_STEPS, / 2 and no step after a bad
one. It comes in two forms: every gradient in fp16, as in engines that cast all parameters, and one
with fp32 outside the matrices, as ours. Underflow is counted on a batch held out, at the run's own
weights: entries of the matrices' gradients that are zero in fp16 and not in fp32.

Suffix K: resblocks; K1 has one more, for all other parameters.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from dalle_kernels.minifloat import pack
from torch import Tensor, nn

from benchmarks import common, precision_plots
from benchmarks.common import Measured
from benchmarks.precision_curves import Curve, means
from dalle_dist.config import Config, from_dict
from dalle_dist.optim.adamw import AdamW
from dalle_dist.optim.param_groups import param_groups
from dalle_dist.precision.scales import HIGH, WINDOW, BlockScales
from dalle_dist.transformer.blocks import attach_scales, resblock_map, resblocks
from dalle_dist.transformer.model import Transformer

GOOD_STEPS = 25  # custom is 1000 or 2000; short windows suit short runs, and the rival
HEADROOM = 5.0  # log2
WIDTH_12B = 3968
KINDS = 8  # colors, and things
WORST = 8  # resblocks
CUT = f"underflow, worst {WORST} resblocks"
NOISE = 0.1  # share of codes that are random


@dataclass(frozen=True)
class Plan:
    config: Config
    plots: tuple[str, ...]
    embedding_width: int  # of the model whose embeddings' deviation these start with
    shared: int  # steps in fp32 before the runs part
    steps: int
    probe_every: int
    held_out: int  # batches
    settle: int  # batches


class GlobalScale(BlockScales):
    """One dynamic loss scale, with the interface of one per resblock."""

    def __init__(self, blocks: int, window: int) -> None:
        super().__init__(blocks, replicas=1)
        self._window, self._good = window, 0

    def update(self, bad_K: Any) -> None:
        self._good = 0 if any(bad_K) else self._good + 1
        change = -1.0 if any(bad_K) else float(self._good % self._window == 0)
        self._logs = [log + change for log in self._logs]
        self._publish()


@dataclass
class Scheme:
    """How a run computes; `everything`: gradients of all parameters are rounded to fp16."""

    name: str
    scales: BlockScales | None = None
    everything: bool = False
    moments: str = "fp32"
    nudged: bool = False  # weights start wrong by as much as fp16 rounds them


def main() -> None:
    options = common.arguments(__doc__, rounds=1)
    for plan in plans(options.smoke):
        seeds = [compare(plan, seed) for seed in range(options.rounds)]
        common.report("precision", plan.config, figures(seeds), options)
        folder = options.out.parent if options.out else precision_plots.DOCS
        if options.out or not options.smoke:
            precision_plots.draw(plan.plots, seeds[0], plan.shared, folder)


def plans(smoke: bool) -> list[Plan]:
    deep, learns = ("underflow", "scales"), ("loss",)
    if smoke:
        tiny = make_config("smoke", layers=3, grid=4)
        return [
            Plan(tiny, p, 64, 2, 6, probe_every=2, held_out=1, settle=1) for p in (deep, learns)
        ]
    return [
        Plan(make_config("d64-l64", 64, 8), deep, WIDTH_12B, 10, 120, 10, held_out=32, settle=10),
        Plan(make_config("d64-l24", 24, 8), learns, 64, 10, 300, 25, held_out=32, settle=10),
    ]


def make_config(name: str, layers: int, grid: int) -> Config:
    """Width 64, 8 text tokens."""
    shape = {"width": 64, "heads": 1, "text_tokens": 8, "conv_kernel": 3}
    return from_dict(
        {
            "name": name,
            "tokenizer": {"vocab_size": 300},
            "dvae": {"image_size": 8 * grid, "codebook_size": 2 * KINDS},
            "transformer": {
                **shape,
                "layers": layers,
                "image_grid": grid,
                "codebook_size": 2 * KINDS,
            },
            "train": {"batch_size": 8, "lr": 3e-3, "warmup": 50, "checkpoint_activations": False},
        }
    )


def compare(plan: Plan, seed: int) -> dict[str, Curve]:
    """Train once by each scheme; curves by the scheme's name."""
    torch.manual_seed(seed)
    model = make_model(plan)
    first = Curve()
    fp32 = Run(model, Scheme("fp32"), plan, first)
    fp32.train(1, plan.shared)
    saved = copy.deepcopy((model.state_dict(), fp32.optimizer.state_dict()))
    fp32.train(plan.shared + 1, plan.steps)
    found = {"fp32": first}
    for scheme in schemes(len(resblocks(model))):
        model.load_state_dict(saved[0])
        found[scheme.name] = curve = Curve(losses=dict(list(first.losses.items())[: plan.shared]))
        run = Run(model, scheme, plan, curve)
        run.resume(saved[1])
        if scheme.scales is not None:
            run.settle()
        if scheme.nudged:
            run.nudge()
        run.train(plan.shared + 1, plan.steps)
        print(f"{scheme.name}: held-out loss {curve.held_out:.4f}, fp32 {first.held_out:.4f}")
    return found


def figures(seeds: list[dict[str, Curve]]) -> list[Measured]:
    """Of each scheme, and how much less is lost in the resblocks where the rival loses most."""
    rows = []
    for name in seeds[0]:
        curves = [curves[name] for curves in seeds]
        against = [curves[name].held_out / curves["fp32"].held_out for curves in seeds]
        rows.append(Measured(name, "held-out loss", "nats", [c.held_out for c in curves]))
        if name == "fp32":
            continue
        rows.append(Measured(name, "held-out loss / fp32's", "x", against))
        if name == "fp32, nudged":
            continue
        rows.append(Measured(name, "steps skipped", "", [float(c.skipped) for c in curves]))
        if not all(c.underflow for c in curves):
            print(f"{name}: every probe overflowed; its underflow is not known")
            continue
        for unit, of_block in (("worst resblock", max), ("all resblocks", statistics.fmean)):
            for what in ("underflow", "error"):
                shares = [100 * of_block(means(getattr(c, what))) for c in curves]
                rows.append(Measured(name, f"gradient {what}, {unit}", "%", shares))
    for rival in ("global, all fp16", "global"):
        pairs = [(curves[rival], curves["per resblock"]) for curves in seeds]
        cuts = [cut(*pair) for pair in pairs if all(curve.underflow for curve in pair)]
        cuts = [times for times in cuts if times is not None]
        if cuts:
            rows.append(Measured(f"{rival} / per resblock", CUT, "x", cuts))
    return rows


def cut(rival: Curve, ours: Curve) -> float | None:
    """Underflow in the rival's WORST resblocks by ours in the same ones.

    Infinite where ours is none, None where the rival's is none either.
    """
    theirs, own = means(rival.underflow), means(ours.underflow)
    worst = sorted(range(len(own)), key=theirs.__getitem__)[-WORST:]
    lost, still_lost = (sum(shares[k] for k in worst) for shares in (theirs, own))
    if lost == 0:
        return None
    return lost / still_lost if still_lost else float("inf")


def make_model(plan: Plan) -> Transformer:
    model = Transformer(plan.config)
    with torch.no_grad():
        for embedding in (model.text_embedding, model.image_embedding):
            for parameter in embedding.parameters():
                parameter.mul_((plan.config.transformer.width / plan.embedding_width) ** 0.5)
    return model


def schemes(blocks: int) -> Iterator[Scheme]:
    yield Scheme("fp32, nudged", nudged=True)
    yield Scheme("global, all fp16", GlobalScale(blocks, GOOD_STEPS), everything=True)
    yield Scheme("global", GlobalScale(blocks, GOOD_STEPS))
    yield Scheme("per resblock", BlockScales(blocks, replicas=1))
    yield Scheme("per resblock, 16-bit moments", BlockScales(blocks, replicas=1), moments="16-bit")


class Run:
    """One training run on `model` by `scheme`; fills `curve`."""

    def __init__(self, model: Transformer, scheme: Scheme, plan: Plan, curve: Curve) -> None:
        self._model, self._scheme, self._plan, self._curve = model, scheme, plan, curve
        self._blocks = [block for _, block in resblocks(model)]
        inside = {id(p) for block in self._blocks for p in block.parameters()}
        self._rest = [p for p in model.parameters() if id(p) not in inside]
        train = plan.config.train
        groups = param_groups(
            model, resblock_map(model).matrices, train.weight_decay, scheme.moments
        )
        self.optimizer = AdamW(
            groups, betas=(train.beta1, train.beta2), variance_clip=train.variance_clip
        )
        self._attach(scheme.scales)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on with the optimizer state of an fp32 run."""
        state = copy.deepcopy(state)
        if self._scheme.moments == "16-bit":
            matrices = state["param_groups"][0]
            matrices["moments"] = "16-bit"
            for moments in (state["state"][index] for index in matrices["params"]):
                moments["exp_avg"] = pack(moments["exp_avg"], "1-6-9")
                moments["exp_avg_sq"] = pack(moments["exp_avg_sq"], "0-6-10")
        self.optimizer.load_state_dict(state)

    def settle(self) -> None:
        """The highest powers of two at which no shared step's gradients overflow.

        Ours HEADROOM lower: gradients grow from here on, and the rule lowers a scale by sqrt(2) in
        125 steps. The rival adapts at once.
        """
        scales, blocks, last = self._scheme.scales, len(self._blocks), self._plan.shared
        log2_K = [HIGH + HEADROOM] * blocks
        for step in range(last + 1 - self._plan.settle, last + 1):
            bad_K = [True]
            while any(bad_K):
                state = {"log2": log2_K, "since_cut": [WINDOW] * blocks, "overflows": [0] * blocks}
                scales.load_state_dict(state)
                self._backward(step, self._plan.config.train.batch_size)
                *bad_K, rest = self._unscale()
                if isinstance(scales, GlobalScale):
                    bad_K = [rest or any(bad_K)] * blocks
                log2_K = [log2 - bad for log2, bad in zip(log2_K, bad_K, strict=True)]
        if not isinstance(scales, GlobalScale):
            scales.load_state_dict(scales.state_dict() | {"log2": [x - HEADROOM for x in log2_K]})

    @torch.no_grad()
    def nudge(self) -> None:
        for parameter in self._model.parameters():
            parameter.mul_(1 + torch.randn_like(parameter) / 2**12)

    def train(self, first: int, last: int) -> None:
        """Steps `first` to `last`, then the held-out loss."""
        scales, every = self._scheme.scales, self._plan.probe_every
        for step in range(first, last + 1):
            self._curve.losses[step] = self._step(step)
            if scales is not None:
                self._curve.scales[step] = scales.values
                if step % every == 0:
                    self._probe()
        with torch.no_grad():
            losses = [self._loss(-1 - n, 64).item() for n in range(self._plan.held_out)]
        self._curve.held_out = statistics.fmean(losses)

    def _step(self, step: int) -> float:
        train, scheme = self._plan.config.train, self._scheme
        loss = self._backward(step, train.batch_size)
        bad_K1 = self._unscale()
        if scheme.scales is not None:
            scheme.scales.update(bad_K1 if isinstance(scheme.scales, GlobalScale) else bad_K1[:-1])
        if any(bad_K1):
            self._curve.skipped += 1
            return loss
        nn.utils.clip_grad_norm_(self._model.parameters(), train.clip)
        warm, left = step / train.warmup, 1 - step / (self._plan.steps + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * min(1, warm, 2 * left)
        self.optimizer.step()
        return loss

    def _probe(self) -> None:
        """Gradients of one batch in fp32 and as the run has them, unless they overflow."""
        exact = self._matrix_gradients(None)
        ours = self._matrix_gradients(self._scheme.scales)
        if not all(bool(b.isfinite().all()) for b in ours):
            return
        pairs = list(zip(exact, ours, strict=True))
        self._curve.underflow.append(
            [float(((a != 0) & (b == 0)).sum() / (a != 0).sum().clamp(min=1)) for a, b in pairs]
        )
        self._curve.error.append([float((a - b).norm() / a.norm()) for a, b in pairs])

    def _matrix_gradients(self, scales: BlockScales | None) -> list[Tensor]:
        """Of each resblock, in true units, flat."""
        self._attach(scales)
        self._backward(0, self._plan.config.train.batch_size)
        if scales is not None:
            self._unscale()
        self._attach(self._scheme.scales)
        matrices = [[p for p in block.parameters() if p.ndim == 2] for block in self._blocks]
        return [torch.cat([p.grad.flatten() for p in block]) for block in matrices]

    def _attach(self, scales: BlockScales | None) -> None:
        if scales is None:
            for block in self._blocks:
                block.scale = None
        else:
            attach_scales(self._model, scales, torch.float16)

    def _backward(self, step: int, batch: int) -> float:
        self._model.zero_grad()
        loss = self._loss(step, batch)
        loss.backward()
        return loss.item()

    def _loss(self, step: int, batch: int) -> Tensor:
        config = self._plan.config
        return self._model(*make_batch(config, step, batch)).total(config.train.text_loss)

    def _unscale(self) -> list[bool]:
        """Gradients to true units; which resblocks', and whether the others', are not finite."""
        scheme = self._scheme
        if scheme.scales is None:
            return [False]
        owners = [list(block.parameters()) for block in self._blocks] + [self._rest]
        values = scheme.scales.values
        return [
            self._unscale_some(owned, scale, inside=k < len(values))
            for k, (owned, scale) in enumerate(
                zip(owners, [*values, values[0] if scheme.everything else 1.0], strict=True)
            )
        ]

    def _unscale_some(self, owned: list[nn.Parameter], scale: float, inside: bool) -> bool:
        """The resblocks' gradients hold their scale when they get here."""
        bad = False
        for parameter in owned:
            scaled = parameter.grad if inside else parameter.grad * scale
            if self._scheme.everything:
                scaled = scaled.half().float()
            bad = bad or not bool(scaled.isfinite().all())
            parameter.grad = scaled / scale
        return bad


def make_batch(config: Config, step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Captions "color thing" and codes: the color's above, the thing's below, some at random.

    The same for the same step; negative ones are held out.
    """
    generator = torch.Generator().manual_seed(2**20 + step)
    color_B1, thing_B1 = torch.randint(KINDS, (2, batch, 1), generator=generator)
    text_BT = torch.zeros(batch, config.transformer.text_tokens, dtype=torch.long)
    text_BT[:, :2] = torch.cat([2 + color_B1, 2 + KINDS + thing_B1], dim=1)
    half = config.transformer.image_tokens // 2
    codes_BN = torch.cat([color_B1.repeat(1, half), KINDS + thing_B1.repeat(1, half)], dim=1)
    noisy_BN = torch.rand(codes_BN.shape, generator=generator) < NOISE
    random_BN = torch.randint(2 * KINDS, codes_BN.shape, generator=generator)
    return text_BT, torch.where(noisy_BN, random_BN, codes_BN)


if __name__ == "__main__":
    main()
