"""For tests of exports: checkpoints, and plain DeepSpeed that goes on from what they became."""

import checkpointed
import numpy as np
import torch
from dalle_kernels.minifloat import pack

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.export.training_state import Group
from dalle_dist.checkpoint.manifest import Manifest, read_manifest
from dalle_dist.checkpoint.read import PACKED, TensorSource
from dalle_dist.checkpoint.save import Saver
from dalle_dist.engine.deepspeed.build import _forget_earlier_engines, _quieten
from dalle_dist.engine.interface import STATE
from dalle_dist.gradients.piece import Piece
from dalle_dist.optim.adamw import AdamW
from dalle_dist.optim.ema import EMA
from dalle_dist.optim.param_groups import param_groups
from dalle_dist.optim.plateau_schedule import PlateauSchedule
from dalle_dist.train.data import Progress
from dalle_dist.train.state import Identity, TrainingState
from dalle_dist.transformer.blocks import decayed
from tests.engine import test_fp16 as fp16

AHEAD, LR, SUB_GROUP = 3, 1e-2, 20_000

# Odd sizes: partitions begin and end inside of parameters, and need to be filled up.
SHAPES = {"a.weight": (7, 5), "b": (3,), "c.d.weight": (11, 2), "e": (1,), "f": (13,)}
OPTIONS = {"lr": 0.1, "betas": (0.9, 0.96), "eps": 1e-6, "moments": "fp32", "variance_clip": 5.0}
GROUPS = [
    Group({n: s for n, s in SHAPES.items() if len(s) == 2}, OPTIONS | {"weight_decay": 0.3}),
    Group({n: s for n, s in SHAPES.items() if len(s) == 1}, OPTIONS | {"weight_decay": 0.0}),
]


def made(ranks, folder):
    """A checkpoint without a run: random fp32 weights, moments of a matrix in 16 bits."""
    kinds = {}
    for kind in STATE:
        found = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        if kind in PACKED:
            found["a.weight"] = pack(found["a.weight"].abs(), PACKED[kind])
        kinds[kind] = [Piece(name, 0, tensor.view(-1)) for name, tensor in found.items()]
    layout = {"ranks": 4, "nodes": 2, "zero_stage": 2, "precision": "fp32"}
    training = {"shapes": SHAPES, "optimizer_steps": 5, "stage": "transformer"}
    saver = Saver(str(folder), ranks, folder / "scratch", 1)
    saver.save(Manifest(6, layout, {}, training, {}), kinds)
    saver.wait()
    return store.step_folder(str(folder), 6)


def whole(checkpoint, kind="weights"):
    """Arrays by name."""
    manifest = read_manifest(checkpoint)
    source = TensorSource.of_checkpoint(checkpoint, manifest, kind)
    shapes = manifest.training["shapes"].items()
    return {name: source.tensor(name, tuple(shape)).numpy() for name, shape in shapes}


def same(state, wanted):
    """Whether tensors by name are these arrays, bit for bit."""
    found = {name: tensor.contiguous().numpy() for name, tensor in state.items()}
    return found.keys() == wanted.keys() and all(
        found[name].shape == wanted[name].shape and np.array_equal(found[name], wanted[name])
        for name in found
    )


def options(precision):
    return [
        f"train.precision={precision}", "train.micro_batch=4", "train.moments=fp32",
        "train.weight_decay=0.3",
        # Biases of odd sizes, which ranks cannot share alike.
        "tokenizer.vocab_size=51", "dvae.codebook_size=21", "transformer.codebook_size=21",
        f"train.deepspeed={{zero_optimization: {{sub_group_size: {SUB_GROUP}}}}}",
    ]  # fmt: skip


def saved(ranks, folder, stage, precision):
    """Two updates of a small transformer, each taken into the average; the checkpoint's path."""
    config = fp16.config_of(stage, *options(precision))
    engine = fp16.build(ranks, stage, *options(precision))
    identity = Identity("transformer", config, config.train, precision)
    schedule = PlateauSchedule(config.train)
    state = TrainingState(identity, ranks, engine, EMA(0.5), schedule, Progress(0, {}, 1))
    for number in range(2):
        fp16.backward(engine, ranks, number)
        engine.step(LR)
        state.ema.update(engine.weights())
        state.step += 1
    return checkpointed.save_state(state, folder)


def resumed(ranks, checkpoint, stage, precision):
    """Losses with which our own engine goes on."""
    engine = fp16.build(ranks, stage, *options(precision))
    checkpointed.load_engine(engine, checkpoint)
    losses = []
    for number in range(2, 2 + AHEAD):
        losses.append(fp16.backward(engine, ranks, number))
        engine.step(LR)
    return losses


def plain_engine(stage, precision, optimizer, universal):
    """DeepSpeed by itself around the same model, with other weights and options."""
    import deepspeed

    _quieten()
    _forget_earlier_engines()
    deepspeed.init_distributed(dist_init_required=False)
    config = fp16.config_of(stage, *options("fp32"))
    model = fp16.model_of(config)
    decay = config.train.weight_decay
    groups = param_groups(model, decayed(model), decay)
    made = {"ours": AdamW, "torch": torch.optim.AdamW}[optimizer]
    settings = {
        "train_batch_size": fp16.BATCH, "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "sub_group_size": SUB_GROUP},
        "bf16": {"enabled": precision == "bf16"}, "steps_per_print": 2**62,
        "checkpoint": {"load_universal": universal},
    }  # fmt: skip
    if precision == "bf16" and stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=made(groups, lr=0.0, betas=(0.5, 0.5), eps=1e-3),
        config=settings,
        dist_init_required=False,
    )
    return engine


def continued(ranks, engine):
    """Losses of the same updates as `resumed`, by DeepSpeed alone."""
    wrapped, losses = _Plain(engine, ranks.world), []
    for number in range(2, 2 + AHEAD):
        losses.append(fp16.backward(wrapped, ranks, number))
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = LR
        engine.step()
    return losses


class _Plain:
    """What `fp16.backward` asks of an engine."""

    def __init__(self, engine, world):
        self._engine, self._world = engine, world
        self.accumulation = engine.gradient_accumulation_steps()

    def __call__(self, *inputs):
        return self._engine(*inputs)

    def backward(self, loss):
        self._engine.backward(loss * self._world, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
