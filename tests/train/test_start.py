"""What a run checks and says before its first step; a start that fails leaves no trace."""

import errno
import fcntl
import io
import json
import os
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import tiny_run
from test_train_dvae import arguments as stage1_arguments
from test_train_dvae import write_images

from dalle_dist.checkpoint.release import load_release
from dalle_dist.cli import main
from dalle_dist.config import Config
from dalle_dist.data.shards import ShardSet, ShardWriter
from dalle_dist.distributed import process_group
from dalle_dist.errors import UserError
from dalle_dist.image_tokenizer.dvae import DVAETokenizer
from dalle_dist.storage.lease import Record
from dalle_dist.testing import run_distributed
from dalle_dist.text_tokenizer.bpe import train_tokenizer
from dalle_dist.train.lock import Lock
from dalle_dist.train.run import read_log, working_copy
from dalle_dist.train.transformer import TransformerStage

SHORT = {"steps": 1, "warmup": 1, "prompts": []}


def _main(ranks, words, environ, no_locks):
    """Exit status, standard output and standard error of one command."""
    warnings.simplefilter("ignore")
    os.environ.update(environ)
    locking = mock.Mock(side_effect=OSError(no_locks, "not here")) if no_locks else fcntl.flock
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(fcntl, "flock", locking), redirect_stdout(out), redirect_stderr(err):
        return main(words), out.getvalue(), err.getvalue()


class Stage:
    """A run of one step that would work: its command, its inputs and its folder."""

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder, self.verb, self.run = folder, verb, folder / "runs" / "new"
        if verb == "train":
            config = tiny_run.make(folder, **SHORT)
            path = tiny_run.write_config(config, folder / "config.yaml")
            self.words, self.inputs = [path, f"paths.run={self.run}"], folder / "tokens"
        else:
            write_images(folder / "images")
            self.words = stage1_arguments(folder, "dvae_train.steps=1", run="runs/new")
            self.inputs = folder / "images"

    def start(self, *more, world=1, no_locks=0, **environ):
        """In new processes, since DeepSpeed starts once in each; what rank 0 has of `_main`."""
        words = [self.verb, *self.words, *more]
        outcomes = run_distributed(_main, world, words, environ, no_locks)
        assert len({status for status, _, _ in outcomes}) == 1
        assert sum("dalle-dist: error" in err for _, _, err in outcomes) <= 1
        lines = [text for _, _, text in outcomes]
        return outcomes[0][0], outcomes[0][1], "".join(lines)

    def works(self, *more, **how) -> str:
        """What a start says that goes on to the end of the run."""
        status, out, err = self.start(*more, **how)
        assert status == 0, err
        assert "complete" in out
        assert (self.run / "config.yaml").is_file() and (self.run / "release").is_dir()
        return out

    def refused(self, *more, **how) -> str:
        """The one line of a start that fails; nothing is made or lost."""
        before = self._files()
        status, out, err = self.start(*more, **how)
        (line,) = err.strip().splitlines()
        assert line.startswith("dalle-dist: error: ")
        assert (status, out) == (2, "")
        assert self._files() == before
        return line

    def _files(self) -> dict[str, int]:
        """Names, and when each was written; the lock of an older run may go, it is made anew."""
        return {
            str(path): path.stat().st_mtime_ns if path.is_file() else 0
            for path in self.folder.rglob("*")
            if path.name != ".lock"
        }


# Stage 2 takes seconds to start; what it alone can get wrong is among the quick tests below.
@pytest.fixture(params=["train-dvae", pytest.param("train", marks=pytest.mark.slow)])
def stage(request, tmp_path):
    return Stage(tmp_path, request.param)


def test_a_start_without_inputs_leaves_nothing_and_works_once_they_are_there(stage):
    away = stage.folder / "away"
    stage.inputs.rename(away)
    assert str(stage.inputs) in stage.refused()
    away.rename(stage.inputs)
    stage.works()


@pytest.mark.parametrize("part", ["train", "held-out"])
def test_a_start_with_a_shard_missing_leaves_nothing_and_names_it(stage, part):
    shard = sorted((stage.inputs / part).glob("*.tar"))[-1]
    away = stage.folder / "away.tar"
    shard.rename(away)
    assert shard.name in stage.refused()
    away.rename(shard)
    stage.works()


def test_a_start_from_what_is_no_checkpoint_leaves_nothing(stage):
    (stage.folder / "empty").mkdir()
    for path in ("empty", "nowhere"):
        line = stage.refused("--resume", str(stage.folder / path))
        assert str(stage.folder / path) in line and "checkpoint" in line
    stage.works()


def test_a_start_beside_a_process_that_trains_leaves_its_folder_as_it_was(stage):
    stage.run.mkdir(parents=True)
    lock = stage.run / ".lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        line = stage.refused()
        assert "another process is training in this folder" in line
        assert lock.exists()
    stage.works()


def test_a_batch_that_does_not_divide_leaves_nothing_and_is_told_once(stage):
    override, reason = {
        "train-dvae": ("dvae_train.batch_size=7", "7 is not a multiple of 2 ranks"),
        "train": ("train.micro_batch=8", "8 is not a multiple of train.micro_batch 8 x 2 ranks"),
    }[stage.verb]
    assert reason in stage.refused(override, world=2)


def test_a_warm_up_longer_than_the_run_is_refused_and_one_of_its_length_is_not(stage):
    name = "train.warmup" if stage.verb == "train" else "dvae_train.warmup"
    steps = name.split(".")[0] + ".steps=2"
    line = stage.refused(f"{name}=3", steps)
    assert f"{name}: 3 steps of warm-up in a run of 2" in line
    stage.works(f"{name}=2", steps)


def test_a_file_system_without_locks_is_trained_on_under_a_lease(stage):
    stage.works(no_locks=errno.ENOLCK)
    file = max((stage.run / ".lease").iterdir(), key=lambda path: int(path.name))
    assert Record.of(file.read_bytes()).released


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_locks_are_missing_in_other_words_too(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(number, "not here")))
    first = Lock(tmp_path / "a" / "b", "RUN", print, 1.0)
    with pytest.raises(UserError, match="RUN: another process is training in this run"):
        Lock(tmp_path / "a" / "b", "RUN", print, 1.0)
    first.release(used=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("DALLE_DIST_NO_LOCK", "1")
    Lock(tmp_path / "a" / "b", "RUN").release(used=False)
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_conditions_is_refused_unless_the_user_says_so(tmp_path, monkeypatch):
    run = f"memory:/{tmp_path}/run"
    with pytest.raises(UserError, match=r"no conditional writes .*set DALLE_DIST_NO_LOCK=1"):
        Lock(tmp_path / "copy", run)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("DALLE_DIST_NO_LOCK", "1")
    lock = Lock(tmp_path / "copy", run)
    lock.fence()
    assert not lock.lost
    lock.release(used=False)


def test_a_file_system_without_locks_is_trained_on_by_the_users_word(stage):
    assert "another process" not in stage.works(no_locks=errno.ENOLCK, DALLE_DIST_NO_LOCK="1")


def test_that_word_does_not_let_a_second_process_in(stage):
    stage.run.mkdir(parents=True)
    with (stage.run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training" in stage.refused(DALLE_DIST_NO_LOCK="1")


class TestTransformer:
    @pytest.fixture
    def stage(self, tmp_path):
        return Stage(tmp_path, "train")

    def test_a_deepspeed_file_that_contradicts_the_config_leaves_nothing(self, stage):
        path = stage.folder / "zero.json"
        path.write_text('{"gradient_clipping": 7}')
        line = stage.refused(f"train.deepspeed={path}")
        assert "gradient_clipping is 7, but train.clip is" in line

    def test_tokens_of_another_dvae_leave_nothing(self, stage):
        index = stage.inputs / "train" / "index.json"
        saved = index.read_text()
        tree = json.loads(saved)
        tree["meta"]["image_tokenizer"] = "0" * 16
        index.write_text(json.dumps(tree))
        assert "tokens of image tokenizer 0000" in stage.refused()
        index.write_text(saved)
        stage.works()

    @pytest.mark.slow
    def test_another_tokenizer_leaves_the_run_as_it_was_and_its_own_goes_on(self, stage):
        stage.works()
        other = stage.folder / "other"
        train_tokenizer(["a lazy dog", "a quick fox"] * 5, 300).save(str(other))
        log = (stage.run / "log.jsonl").read_bytes()
        more = ("train.steps=2", "--resume", "auto")
        line = stage.refused(f"paths.tokenizer={other}", *more)
        assert "tokenizer" in line
        assert (stage.run / "log.jsonl").read_bytes() == log
        assert "complete at step 2" in stage.works(*more)

    def test_a_tokenizer_of_more_classes_than_the_model_leaves_nothing(self, stage):
        assert "has 300; train it again" in stage.refused("tokenizer.vocab_size=290")


def banner(out: str) -> dict[str, str]:
    """The block that begins a run, by name."""
    rows = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
    return dict(rows)


def test_stage_1_says_what_it_is_about_to_do(tmp_path):
    stage = Stage(tmp_path, "train-dvae")
    more = ["dvae_train.steps=6", "dvae_train.warmup=3", "dvae_train.lr_steps=6"]
    more += ["dvae_train.temperature_steps=7", "dvae_train.kl_steps=8"]
    block = banner(stage.works(*more))
    weights = DVAETokenizer.load(str(stage.run / "release")).model.parameters()
    count = sum(weight.numel() for weight in weights)
    assert block["device"] == "CPU, 1 rank x 1 thread, 1 node (deepspeed)"
    assert block["model"].startswith(f"dVAE of {count:,} parameters: 16 x 16 pixels to 4 x 4 codes")
    assert block["precision"] == "fp32"
    assert block["data"] == f"{stage.inputs}: 24 images to train on, 8 held out"
    assert block["length"] == "6 steps of 8 images = 2.00 epochs"
    assert "after 3 steps of warm-up" in block["schedule"]
    late = "dvae_train.temperature_steps, dvae_train.kl_steps"
    assert block["warning"] == f"THE RUN ENDS BEFORE {late}"
    assert block["from"] == "the start"


def test_stage_1_names_no_setting_that_ends_in_time(tmp_path):
    stage = Stage(tmp_path, "train-dvae")
    ends = [f"dvae_train.{name}_steps=1" for name in ("lr", "temperature", "kl")]
    block = banner(stage.works(*ends, "dvae_train.precision=bf16"))
    assert "warning" not in block and "schedule" in block
    assert block["precision"] == "bf16 autocast, fp32 weights"


def test_stage_2_says_what_it_is_about_to_do(tmp_path):
    stage = Stage(tmp_path, "train")
    more = ["train.steps=2", "train.warmup=2", "train.halve_at=[5, 9]"]
    block = banner(stage.works(*more))
    weights = load_release(str(stage.run / "release")).transformer.parameters()
    count = sum(weight.numel() for weight in weights)
    assert block["device"] == "CPU, 1 rank x 1 thread, 1 node (deepspeed)"
    assert block["model"].startswith(f"transformer of {count:,} parameters: 2 layers of width 64")
    assert block["precision"].startswith("fp32, moments ")
    assert block["data"] == f"{stage.inputs}: 61 images to train on, 3 held out"
    assert block["batch"] == "8 = 2 x 1 ranks x 4 accumulated"
    assert block["length"] == f"2 steps of 8 images = {16 / 61:.2f} epochs"
    assert "rate 0.005 after 2 steps of warm-up, halved at 5, 9" in block["schedule"]
    assert block["from"] == "the start"
    block = banner(stage.works("train.steps=3", "--resume", "auto"))
    assert block["from"] == "step 2"
    assert block["schedule"].endswith("when the loss no longer falls")


def _captions_of(config: Config, length: int) -> tuple[int, int, int]:
    """How many captions have more tokens than `length`, of how many, and the longest's."""
    data = TransformerStage(config, process_group.init()).train_set
    texts = [
        text for shard in range(len(data.shards.sizes)) for text in data.shards.captions(shard)
    ]
    counts = [len(data.tokenizer.encode(text)) for text in texts]
    return sum(count > length for count in counts), len(counts), max(counts)


def test_stage_2_counts_the_captions_that_it_cuts(tmp_path):
    stage = Stage(tmp_path, "train")
    _write_captions(tmp_path, ["red heart"] * 7 + ["a very long quick caption " * 4] * 5)
    config = tiny_run.make(tmp_path, **SHORT)
    cut, total, longest = _captions_of(config, 8)
    assert (cut, total) == (5, 12)
    assert banner(stage.works())["captions"] == (
        f"5 of 12 (41.7%) are cut to transformer.text_tokens=8; the longest has {longest} tokens"
    )


def test_empty_captions_are_counted_and_both_shares_logged_once(tmp_path):
    stage = Stage(tmp_path, "train")
    _write_captions(tmp_path, [""] * 3 + ["red heart"] * 8 + ["a very long quick caption " * 4])
    assert "; 3 (25.0%) are empty; the longest has" in banner(stage.works())["captions"]
    stage.works("train.steps=2", "--resume", "auto")
    lines = [line for line in read_log(stage.run) if "captions_cut" in line]
    assert [line["step"] for line in lines] == [0]
    assert (lines[0]["captions_cut"], lines[0]["captions_empty"]) == (1 / 12, 3 / 12)


def test_stage_2_says_that_no_caption_is_cut_even_one_that_just_fits(tmp_path):
    stage = Stage(tmp_path, "train")
    longest = _captions_of(tiny_run.make(tmp_path, **SHORT), 8)[2]
    said = banner(stage.works(f"transformer.text_tokens={longest}"))["captions"]
    assert said == f"none of 61 is cut; the longest has {longest} tokens"


def _write_captions(folder: Path, captions: list[str]) -> None:
    """Training shards anew: the same codes, other captions."""
    shards = ShardSet(str(folder / "tokens" / "train"), "tokens")
    samples = [dict(shards.read(i)) for i in range(len(captions))]
    meta = dict(shards.index.meta)
    shutil.rmtree(folder / "tokens" / "train")
    with ShardWriter(str(folder / "tokens" / "train"), "tokens", meta, 20) as writer:
        for sample, caption in zip(samples, captions, strict=True):
            files = {"npy": sample["npy"], "txt": caption.encode(), "json": sample["json"]}
            writer.write(sample["__key__"].decode(), files)


def test_a_remote_runs_working_copy_lies_in_the_cache_that_all_files_share(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DALLE_DIST_CACHE", "")
    monkeypatch.chdir(tmp_path)
    copy = working_copy("s3://bucket/run")
    assert copy.parent == tmp_path / ".cache/dalle-dist/runs"
