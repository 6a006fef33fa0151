"""`python -m tests.train.recorded_run FOLDER CONFIG`: stage 2, noting the samples of each step.

A line of FOLDER/RANK.jsonl: the step, and of each sample the codes that tell it from the others.
"""

import json
import sys
from pathlib import Path

from dalle_dist.config import load
from dalle_dist.distributed import process_group
from dalle_dist.train.loop import train_stage
from dalle_dist.train.transformer import TransformerStage

FOLDER, CONFIG = sys.argv[1:]


class Recorded(TransformerStage):
    def __init__(self, config, ranks):
        super().__init__(config, ranks)
        Path(FOLDER).mkdir(parents=True, exist_ok=True)
        self.path = Path(FOLDER, f"{ranks.rank}.jsonl")

    def loss(self, engine, micro_batch, counts, step):
        samples = [(row[0], row[-1]) for row in micro_batch.codes.tolist()]
        with self.path.open("a") as file:
            file.write(json.dumps([step, samples]) + "\n")
        return super().loss(engine, micro_batch, counts, step)


if __name__ == "__main__":
    train_stage(Recorded, load(CONFIG, []), "auto")
    process_group.leave(0)
