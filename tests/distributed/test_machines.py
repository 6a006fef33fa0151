"""ZeRO inside each machine and averages between them: processes as ranks, node_size as machines."""

import numpy as np

from dalle_dist.testing import run_distributed
from tests.distributed.test_fp16 import backward, build

STAGES = (1, 2, 3)


def build_on(ranks, stage, size, *overrides):
    """`size` ranks to a machine; rank 8 of 64 and more, so that every matrix is compressed."""
    return build(
        ranks, stage, f"train.micro_batch={max(1, 4 // ranks.world)}", f"parallel.node_size={size}",
        "parallel.rank_of=shard", "parallel.rank=8", "parallel.wire=fp32", *overrides,
    )  # fmt: skip


def course(ranks, stage, size, *overrides, updates=6):
    engine = build_on(ranks, stage, size, *overrides)
    curve = [(backward(engine, ranks, n), engine.step(3e-3, measure=True)) for n in range(updates)]
    digest = sum(float(f.values.double().sum()) for f in engine.fragments())
    return {"curve": np.array(curve), "digest": digest, "numbers": engine.path.numbers()}


if __name__ == "__main__":
    for s in STAGES:
        for b in ("zero", "dense", "powersgd"):
            for p in ("fp32", "bf16", "fp16"):
                r = run_distributed(
                    course, 4, s, 2, f"parallel.between_machines={b}", f"train.precision={p}"
                )
                print(
                    s, b, p, r[0]["curve"].T.round(4).tolist(), [round(x["digest"], 3) for x in r]
                )
    print(r[0]["numbers"])
