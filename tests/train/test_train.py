"""Stage 2 as a whole, on real processes; each launch of two ranks proves several things."""

import dataclasses
import errno
import os
import signal
import warnings
from pathlib import Path
from unittest import mock

import checkpointed
import pytest
import tiny_run
import torch

from dalle_dist.checkpoint import save
from dalle_dist.checkpoint.manifest import read_manifest
from dalle_dist.checkpoint.read import TensorSource
from dalle_dist.checkpoint.release import load_release, save_dvae_release
from dalle_dist.config import Config, SamplingConfig
from dalle_dist.data.token_dataset import collate_tokens
from dalle_dist.dvae.model import DVAE
from dalle_dist.errors import CheckpointError, ConfigError, DataError, UserError
from dalle_dist.testing import run_distributed
from dalle_dist.text_tokenizer.bpe import train_tokenizer
from dalle_dist.train import loop, state
from dalle_dist.train import transformer as program
from dalle_dist.train.run import read_log
from dalle_dist.transformer.layout import counted_text_targets

CURVE = ("loss", "loss_text", "loss_image", "grad_norm", "lr")
HELD_OUT = ("held_out_text", "held_out_image")


def in_folder(config: Config, name: str, **train: object) -> Config:
    """The same inputs, another run folder and other train options."""
    folder = Path(config.paths.run).parent / name
    return dataclasses.replace(
        config,
        paths=dataclasses.replace(config.paths, run=str(folder)),
        train=dataclasses.replace(config.train, **train),
    )


def curve(config: Config, names: tuple[str, ...] = CURVE) -> list[list[float]]:
    """The logged numbers of each update that has them."""
    lines = [line for line in read_log(Path(config.paths.run)) if names[0] in line]
    return [[line[name] for name in names] for line in lines]


def zero(stage: int, precision: str = "fp32") -> dict[str, object]:
    return {"zero_stage": stage, "precision": precision}


def train_all(ranks, configs):
    warnings.simplefilter("ignore")
    for config in configs:
        program.train(config)
    return [curve(config) for config in configs], [curve(config, HELD_OUT) for config in configs]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Config:
    return tiny_run.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(inputs) -> tuple[Config, list[list[float]], list[list[float]]]:
    """A run of one process without ZeRO, all in micro-batches of two."""
    config = in_folder(inputs, "alone", **zero(0))
    (curves,), (held_out,) = run_distributed(train_all, 1, [config])[0]
    return config, curves, held_out


class TestOneProcess:
    def test_loss_falls_and_the_release_holds_the_average(self, alone):
        config, curves, held_out = alone
        assert len(curves) == config.train.steps
        assert curves[-1][0] < curves[0][0] - 0.3
        assert [row[4] for row in curves] == [2.5e-3] + [5e-3] * 5
        assert len(held_out) == 1
        run = Path(config.paths.run)
        release = load_release(str(run / "release"))
        step = run / "checkpoints" / "step-00000006"
        manifest = read_manifest(str(step))
        average, raw = (
            TensorSource.of_checkpoint(str(step), manifest, kind) for kind in ("average", "weights")
        )
        changed = []
        for name, values in release.transformer.named_parameters():
            shape = tuple(values.shape)
            assert torch.equal(average.tensor(name, shape), values), name
            changed.append(not torch.equal(raw.tensor(name, shape), values))
        assert any(changed)
        assert (run / "samples" / "step-00000006-samples.png").is_file()

    def test_first_loss_is_the_mean_over_all_tokens_of_the_batch(self, alone):
        """Uniform predictions at the start give ln of the vocabularies, whatever the lengths."""
        _, curves, _ = alone
        assert curves[0][1] == pytest.approx(torch.tensor(300.0).log().item(), rel=1e-6)
        assert curves[0][2] == pytest.approx(torch.tensor(16.0).log().item(), rel=1e-6)
        assert curves[0][0] == pytest.approx(curves[0][1] / 8 + curves[0][2] * 7 / 8, rel=1e-6)

    def test_text_loss_weighs_every_counted_target_alike(self, inputs):
        """Micro-batches with few and with many text targets: means of means would differ."""
        config = in_folder(inputs, "lengths", micro_batch=1, steps=2, **zero(0))
        whole = in_folder(inputs, "whole", micro_batch=8, steps=2, **zero(0))
        curves, _ = run_distributed(train_all, 1, [config, whole])[0]
        assert curves[0] == [pytest.approx(row, rel=1e-5) for row in curves[1]]
        setup_counts = _counts(config)
        assert len(set(setup_counts)) > 1

    def test_steps_whose_captions_are_all_dropped_have_no_text_loss(self, inputs):
        config = in_folder(inputs, "dropped", caption_dropout=0.9999, steps=2, **zero(0))
        (curves,), (held_out,) = run_distributed(train_all, 1, [config])[0]
        assert [row[1] for row in curves] == [0, 0]
        assert [row[0] for row in curves] == [pytest.approx(row[2] * 7 / 8) for row in curves]
        # Held-out captions are never dropped, and no text was learned.
        assert held_out == [[pytest.approx(torch.tensor(300.0).log().item()), held_out[0][1]]]


def _counts(config: Config) -> list[int]:
    from dalle_dist.distributed import process_group

    dataset = program.TransformerStage(config, process_group.init()).train_set
    texts = [collate_tokens([dataset[i]])[0] for i in range(config.train.batch_size)]
    return [int(counted_text_targets(text).sum()) for text in texts]


def train_and_stop(ranks, config):
    """Rank 1 alone gets a signal before update 4; the run goes on in the same processes."""
    warnings.simplefilter("ignore")
    finished = loop._Loop._finished

    def with_signal(self, made):
        finished(self, made)
        if self.state.step == 3 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    loop._Loop._finished = with_signal
    program.train(config)
    stopped = sorted(p.name for p in (Path(config.paths.run) / "checkpoints").iterdir())
    loop._Loop._finished = finished
    program.train(config, "auto")
    return stopped


def train_on_a_full_disk(ranks, config):
    """Rank 1 alone cannot write."""
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = full if ranks.rank == 1 else save._write_file
    with mock.patch.object(save, "_write_file", side_effect=wrapped):
        return refused(ranks, config)


class TestTwoRanks:
    @pytest.fixture(scope="class")
    def outcomes(self, inputs):
        configs = [in_folder(inputs, f"zero{stage}", **zero(stage)) for stage in range(4)]
        configs.append(in_folder(inputs, "bf16-zero1", **zero(1, "bf16")))
        configs.append(in_folder(inputs, "fp16-zero2", moments="16-bit", **zero(2, "fp16")))
        curves, held_out = run_distributed(train_all, 2, configs)[0]
        return dict(enumerate(zip(configs, curves, held_out, strict=True)))

    @pytest.mark.parametrize("stage", range(4))
    def test_zero_stages_follow_the_curve_of_one_process(self, alone, outcomes, stage):
        config, curves, held_out = outcomes[stage]
        assert curves == [pytest.approx(row, rel=2e-5) for row in alone[1]]
        assert held_out == [pytest.approx(row, rel=2e-5) for row in alone[2]]
        assert (Path(config.paths.run) / "samples" / "step-00000006-samples.png").is_file()
        assert load_release(str(Path(config.paths.run) / "release")).fingerprint

    def test_bf16_under_zero1_counts_each_micro_batch_once(self, alone, outcomes):
        """With a dataclass as the module's output, the norm came out three times as large."""
        _, curves, _ = outcomes[4]
        # Later ones are steps whose losses bf16's own rounding moves by as much.
        first, wanted = ([row[0] for row in rows[:5]] for rows in (curves, alone[1]))
        assert first == pytest.approx(wanted, rel=5e-3)
        assert curves[0][3] == pytest.approx(alone[1][0][3], rel=1e-2)

    def test_disk_full_on_one_rank_is_one_line_on_all_and_leaves_nothing(self, inputs):
        config = in_folder(inputs, "full", steps=1, warmup=1, **zero(2))
        for message in run_distributed(train_on_a_full_disk, 2, config, timeout=60):
            assert "step-00000000: not saved (rank 1: disk full)" in message
            assert "\n" not in message
        assert list((Path(config.paths.run) / "checkpoints").iterdir()) == []

    @pytest.mark.parametrize(
        "course", [2, pytest.param(5, marks=pytest.mark.slow)], ids=["fp32", "fp16"]
    )
    def test_stopped_by_a_signal_to_one_rank_and_resumed_is_bit_for_bit_the_same(
        self, inputs, outcomes, course
    ):
        whole = outcomes[course][0]
        folder = str(Path(inputs.paths.run).parent / f"stopped-{course}")
        config = dataclasses.replace(whole, paths=dataclasses.replace(whole.paths, run=folder))
        stopped = run_distributed(train_and_stop, 2, config)
        assert stopped[0] == ["latest", "step-00000003", "step-00000004"]
        assert curve(config) == curve(whole)
        if course == 5:
            scales = ("scale", "overflows", "skipped", "underflow", "block_norm")
            assert curve(config, scales) == curve(whole, scales)
        assert curve(config, HELD_OUT) == curve(whole, HELD_OUT)
        folders = [Path(c.paths.run) / "checkpoints/step-00000006" for c in (config, whole)]
        names = [sorted(p.name for p in f.glob("*.safetensors")) for f in folders]
        kinds = {name.partition("-rank-")[0] for name in names[0]}
        assert names[0] == names[1] and kinds >= {"weights", "average", "exp_avg", "exp_avg_sq"}
        for name in names[0]:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
        releases = [load_release(str(Path(c.paths.run) / "release")) for c in (config, whole)]
        assert releases[0].fingerprint == releases[1].fingerprint


def counts(ranks, config):
    """What the log counts after a resume."""
    warnings.simplefilter("ignore")
    stage = program.TransformerStage(config, ranks)

    def new():
        engine = stage.build_engine(ranks)
        return state.TrainingState(
            stage.identity,
            ranks,
            engine,
            stage.ema(),
            stage.schedule(),
            stage.progress(),
        )

    first = new()
    skipped, _ = first.engine.transform_state()
    skipped["skipped"], skipped["scaling"]["other_overflows"] = 3, 2
    first.engine.load_transform_state(skipped, lambda kind, pieces: True)
    checkpoint, second = checkpointed.save_state(first, Path(config.paths.run)), new()
    second.load(checkpoint)
    numbers = second.engine.telemetry()
    return numbers["skipped"], numbers["other_overflows"]


def test_what_was_skipped_is_counted_on_after_a_resume(inputs):
    config = in_folder(inputs, "counts", micro_batch=8, **zero(2, "fp16"))
    assert run_distributed(counts, 1, config) == [(3, 2)]


def refused(ranks, config, resume=None):
    with pytest.raises(UserError) as caught:
        program.train(config, resume)
    return str(caught.value)


class TestRefusals:
    """None of them may change the finished run, or leave a folder behind."""

    @pytest.fixture(autouse=True)
    def untouched(self, alone):
        run = Path(alone[0].paths.run)
        before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}
        yield
        assert before == {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}

    def test_a_complete_run_says_so(self, alone, capsys):
        program.train(alone[0], "auto")
        assert "complete at step 6; nothing to do" in capsys.readouterr().out
        assert len(curve(alone[0])) == 6

    def test_a_used_folder_needs_resume(self, alone):
        with pytest.raises(UserError, match="--resume auto"):
            program.train(alone[0])

    def test_other_sampling_options_are_no_reason_to_refuse(self, alone, capsys):
        config = dataclasses.replace(alone[0], sampling=SamplingConfig(guidance=3))
        program.train(config, "auto")
        assert "complete at step 6; nothing to do" in capsys.readouterr().out

    def test_another_shape(self, alone):
        tree = dataclasses.replace(alone[0].transformer, conv_kernel=5)
        with pytest.raises(ConfigError, match=r"transformer\.conv_kernel: 3 -> 5"):
            program.train(dataclasses.replace(alone[0], transformer=tree), "auto")

    def test_another_tokenizer(self, alone, tmp_path):
        other = train_tokenizer(["a lazy dog", "a quick fox"] * 5, 300)
        other.save(str(tmp_path / "other.json"))
        paths = dataclasses.replace(alone[0].paths, tokenizer=str(tmp_path / "other.json"))
        config = dataclasses.replace(alone[0], paths=paths)
        (message,) = run_distributed(refused, 1, config, "auto")
        assert "tokenizer" in message and "\n" not in message

    def test_batch_that_does_not_divide(self, inputs):
        config = in_folder(inputs, "odd", batch_size=8, micro_batch=8)
        for message in run_distributed(refused, 2, config):
            assert "train.batch_size: 8 is not a multiple of train.micro_batch 8 x 2" in message
        assert not Path(config.paths.run).exists()

    def test_nothing_to_resume_from_at_a_path(self, inputs, tmp_path):
        config = in_folder(inputs, "nowhere")
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            program.train(config, str(tmp_path))
        assert not Path(config.paths.run).exists()

    def test_tokens_of_another_dvae(self, inputs, tmp_path):
        """A dVAE trained anew gives other codes: same shape, other fingerprint."""
        torch.manual_seed(2)
        weights = DVAE(inputs.dvae).state_dict()
        save_dvae_release(str(tmp_path / "release"), inputs, weights)
        config = in_folder(inputs, "other-dvae")
        paths = dataclasses.replace(config.paths, dvae_run=str(tmp_path))
        with pytest.raises(DataError, match="encode the images again"):
            program.train(dataclasses.replace(config, paths=paths))
        assert not Path(config.paths.run).exists()
