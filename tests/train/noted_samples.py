"""Which samples a rank has in each step; a line of its file for each micro-batch."""

import json

from dalle_dist.train.transformer import TransformerStage


def note(file):
    """Have this process note the step, and of each sample the codes that tell it from others."""
    loss = TransformerStage.loss

    def noted_loss(self, engine, micro_batch, counts, step):
        samples = [(row[0], row[-1]) for row in micro_batch.codes.tolist()]
        with file.open("a") as lines:
            lines.write(json.dumps([step, samples]) + "\n")
        return loss(self, engine, micro_batch, counts, step)

    TransformerStage.loss = noted_loss


def noted(file):
    """(step, its samples) in the order in which they were done, again or not; whole lines alone."""
    lines = file.read_text().splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
