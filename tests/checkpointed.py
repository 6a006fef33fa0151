"""Checkpoints of engines and training states, for tests: saved, waited for, loaded."""

from dalle_dist.checkpoint import store
from dalle_dist.checkpoint.manifest import Manifest, read_manifest
from dalle_dist.checkpoint.read import TensorSource
from dalle_dist.checkpoint.save import Saver


def save_state(state, folder, keep=2):
    """Of a TrainingState; all ranks. The path of the checkpoint."""
    saver = Saver(str(folder), state.ranks, folder / "scratch", keep)
    state.save(saver)
    saver.wait()
    return store.step_folder(str(folder), state.step)


def save_engine(engine, ranks, folder):
    """The state of an engine alone; all ranks. The path of the checkpoint."""
    engine.settle()
    engine.refuse_diverged()
    numbers, tensors = engine.transform_state()
    training = {"gradients": numbers, "optimizer_steps": engine.optimizer_steps}
    saver = Saver(str(folder), ranks, folder / "scratch", 1)
    saver.save(Manifest(0, {}, {}, training, {}), engine.state() | tensors)
    saver.wait()
    return store.step_folder(str(folder), 0)


def load_engine(engine, checkpoint):
    """What `save_engine` wrote, whoever it was; all ranks."""
    manifest = read_manifest(checkpoint)

    def read(kind, pieces):
        return TensorSource.of_checkpoint(checkpoint, manifest, kind).fill(pieces)

    with engine.restoring() as restoring:
        filled = [read(kind, pieces) for kind, pieces in restoring.share.items()]
        assert all(filled), "elements are missing"
        restoring.steps = manifest.training["optimizer_steps"]
    engine.load_transform_state(manifest.training["gradients"], read)
