"""Jobs of the shipped scripts on the two nodes of the test's cluster, which have no GPUs."""

from pathlib import Path

from dalle_dist.train.run import read_log
from slurm.cluster import NODES, ROOT, until


class Job:
    """A script of `slurm/`, submitted from `folder`, where its logs are."""

    def __init__(self, cluster, folder, script, *words, options=(), **environ):
        folder.mkdir(exist_ok=True)
        self.cluster, self.out = cluster, folder / f"{script}.out"
        path = ROOT / "slurm" / f"{script}.sbatch"
        options = (*NODES, f"--output={self.out}", *options)
        self.id = cluster.submit(*options, str(path), *words, cwd=folder, **environ)

    def signal(self, name):
        self.cluster.run("scancel", f"--signal={name}", self.id)

    def wait(self, seconds=240):
        return self.cluster.wait(self.id, seconds)

    def waited_for(self):
        """What it said in all."""
        self.assert_completed()
        return self.said

    @property
    def said(self):
        return self.out.read_text() if self.out.exists() else ""

    def assert_completed(self, seconds=240):
        state = self.wait(seconds)
        assert state == "COMPLETED", f"{state}\n{self.said}"


def await_step(run, step, seconds=90):
    """Until the log of a local run has so many steps."""
    log = Path(run) / "log.jsonl"

    def there():
        return log.exists() and len(log.read_text().splitlines()) >= step

    until(there, seconds, f"step {step} of {run}")


def losses(run):
    """(step, loss) of each line of a run's log."""
    return [(line["step"], line["loss"]) for line in read_log(run) if "loss" in line]
