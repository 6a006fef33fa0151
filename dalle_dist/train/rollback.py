"""What a run does about a loss that leaps up: it says so, or goes back and passes the samples over.

Going back means the newest checkpoint, none of which is of a step of the spike, and the samples
that come after it (as PaLM's training did: arXiv 2204.02311, section 5.1). The log keeps a line of
it, by which a run that is cut off before its next checkpoint passes the same samples over.
"""

from __future__ import annotations

from dalle_dist.checkpoint import store
from dalle_dist.config import WatchConfig
from dalle_dist.distributed.process_group import Ranks
from dalle_dist.errors import UserError
from dalle_dist.train.run import Run
from dalle_dist.train.state import TrainingState
from dalle_dist.watch.spikes import LossSpikes

ROLLED_BACK, GOES_ON_AT = "rolled_back_from", "goes_on_at_sample"  # keys of the line


class Rollback:
    """Of one run; every call is for all ranks, whose losses are the same.

    due  whether the run is to go back before its next step
    """

    def __init__(self, settings: WatchConfig, run: Run, ranks: Ranks) -> None:
        self._settings, self._run, self._ranks = settings, run, ranks
        self._spikes, self._back = LossSpikes(settings), settings.on_spike == "rollback"
        self.due = False

    @property
    def suspected(self) -> bool:
        """Whether a checkpoint of now might be one of a spike."""
        return self._back and self._spikes.suspected

    def see(self, step: int, loss: float) -> None:
        """Judge the loss of a finished step."""
        if not self._spikes.see(loss):
            return
        count, usual = self._settings.spike_steps, self._spikes.usual
        line = f"step {step}: the loss is {loss:.4g}, and was {usual:.4g} until {count} steps ago"
        if self._back:
            self.due = True
            self._run.say(f"{line}; going back to the last checkpoint")
        else:
            self._spikes.accept()
            self._run.note(step, loss_spike=round(usual, 6))
            self._run.say(f"{line}; watch.on_spike=rollback would go back")

    def lost(self) -> bool:
        """The weights are past help; whether the run goes back rather than ends."""
        self.due |= self._back
        return self._back

    def go_back(self, state: TrainingState) -> None:
        """Load the newest checkpoint, and pass over the samples that were consumed since.

        Raises UserError: this was done as often as it may be.
        """
        step, samples, run = state.step, state.progress.samples, self._run
        before = self._ranks.broadcast(len([1 for line in run.lines() if ROLLED_BACK in line]))
        if before >= self._settings.rollbacks:
            raise UserError(
                f"{run.path}: the loss leapt up again after {before} rollbacks "
                f"(watch.rollbacks), at step {step}; resume from an earlier checkpoint, with a "
                "lower learning rate"
            )
        checkpoint = store.newest(run.checkpoints, self._ranks, run.say)
        state.load(checkpoint)
        first, state.progress.samples = state.progress.samples, samples
        run.rewind(state.step)
        run.note(state.step, **{ROLLED_BACK: step, GOES_ON_AT: samples})
        run.say(
            f"went back from step {step} to step {state.step}; samples {first:,} to "
            f"{samples - 1:,} of the stream are passed over"
        )
        self._spikes.forget()
        self.due = False

    def pass_over(self, state: TrainingState) -> None:
        """Of a run that was resumed: go on after samples that were passed over at this step."""
        found = [
            line[GOES_ON_AT]
            for line in self._run.lines()
            if line["step"] == state.step and GOES_ON_AT in line
        ]
        samples = self._ranks.broadcast(max(found, default=0))
        if samples > state.progress.samples:
            state.progress.samples = samples
            self._run.say(f"passes over the samples up to {samples - 1:,}, as before")
