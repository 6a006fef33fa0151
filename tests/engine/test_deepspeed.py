"""What is asked of every DeepSpeed; `make test-deepspeed-matrix` runs it under each version."""

from pathlib import Path

import checkpointed
import deepspeed
import numpy as np
import pytest

from dalle_dist.engine.deepspeed import build as build_module
from dalle_dist.engine.deepspeed import versions
from dalle_dist.engine.deepspeed.versions import TESTED, check_version
from dalle_dist.errors import ConfigError
from dalle_dist.testing import run_distributed
from tests.engine import test_fp16 as fp16
from tests.engine.test_nodes import course, state_of

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp16")
# Of a norm, from what fp32, bf16 and fp16 round; losses are ten times closer.
CLOSE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 2e-3}


def works(stage, precision, between="zero", version=deepspeed.__version__):
    try:
        check_version(version, precision, stage, between)
    except ConfigError:
        return False
    return True


def build(ranks, stage, precision, parts=1):
    micro = f"train.micro_batch={fp16.BATCH // ranks.world // parts}"
    return fp16.build(ranks, stage, f"train.precision={precision}", micro)


def accumulated(ranks, stage, precision, parts):
    """Three updates of `parts` micro-batches each, and what this rank owned of their gradients."""
    engine = build(ranks, stage, precision, parts)
    curve, owned = [], None
    for number in range(3):
        loss = fp16.backward(engine, ranks, number)
        gradients = engine.gradients()
        owned = {f.name: (f.start, f.values.numel()) for f in gradients}
        dtypes = {f.values.dtype for f in gradients}
        curve.append((loss, engine.step(1e-3)))
    return {"curve": np.array(curve), "owned": owned, "shapes": engine.shapes,
            "stage": engine.zero_stage, "dtypes": {str(dtype) for dtype in dtypes}}  # fmt: skip


def all_accumulated(ranks, precision):
    return {
        (stage, parts): accumulated(ranks, stage, precision, parts)
        for stage in STAGES
        for parts in (1, 4)
        if works(stage, precision)
    }


@pytest.fixture(scope="module", params=PRECISIONS)
def pair(request):
    if not works(3, request.param):
        pytest.skip("refused under this DeepSpeed")
    alone = run_distributed(accumulated, 1, 0, "fp32", 1)[0]
    return request.param, alone, run_distributed(all_accumulated, 2, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_and_any_accumulation_follow_one_process(pair, stage, parts):
    precision, alone, outcomes = pair
    if not works(stage, precision):
        pytest.skip("refused under this DeepSpeed")
    for outcome in outcomes:
        losses, norms = outcome[stage, parts]["curve"].T
        assert np.allclose(losses, alone["curve"][:, 0], rtol=CLOSE[precision] / 10)
        assert np.allclose(norms, alone["curve"][:, 1], rtol=CLOSE[precision])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_element_of_the_gradient_is_owned_once(pair, stage):
    precision, _, outcomes = pair
    if not works(stage, precision):
        pytest.skip("refused under this DeepSpeed")
    found = [outcome[stage, 1] for outcome in outcomes]
    for name, shape in found[0]["shapes"].items():
        pieces = sorted(f["owned"][name] for f in found if name in f["owned"])
        numel = int(np.prod(shape))
        if found[0]["stage"] == 0:
            assert pieces == [(0, numel)] * 2
            continue
        ends = [start + size for start, size in pieces]
        assert [start for start, _ in pieces] == [0, *ends[:-1]] and ends[-1] == numel, name


def cells(stage):
    ways = [(b, p) for p in PRECISIONS for b in ("zero", "dense", "powersgd")]
    return [(between, p) for between, p in ways if works(stage, p, between)]


def machines(ranks, stage):
    """Two nodes of two ranks."""
    return {
        (between, p): course(ranks, stage, between, f"train.precision={p}", steps=3)
        for between, p in cells(stage)
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_two_machines_of_two_ranks(stage):
    four = run_distributed(machines, 4, stage)
    for precision in [p for between, p in cells(stage) if between == "dense"]:
        dense, zero = (four[0][between, precision]["curve"] for between in ("dense", "zero"))
        assert np.allclose(dense, zero, rtol=CLOSE[precision] / 5)
    for cell in four[0]:
        digests = [rank[cell]["digest"] for rank in four]
        assert cell[0] == "zero" or digests[:2] == digests[2:], cell
        assert all(np.array_equal(rank[cell]["curve"], four[0][cell]["curve"]) for rank in four)
    dense, powersgd = (four[0][between, "fp32"]["curve"][:, 0] for between in ("dense", "powersgd"))
    assert np.allclose(powersgd, dense, rtol=2e-3) and not np.array_equal(powersgd, dense)


def resumed(ranks, folder, stage, precision):
    place = folder / f"{stage}-{precision}"
    engine = build(ranks, stage, precision)
    fp16.backward(engine, ranks, 0)
    engine.step(1e-3)
    checkpoint = checkpointed.save_engine(engine, ranks, place)
    ahead = [(fp16.backward(engine, ranks, n), engine.step(1e-3)) for n in (1, 2)]
    again = build(ranks, stage, precision)
    checkpointed.load_engine(again, checkpoint)
    same = ahead == [(fp16.backward(again, ranks, n), again.step(1e-3)) for n in (1, 2)]
    return same and fp16.changed(state_of(engine), state_of(again)) == set()


def all_resumed(ranks, folder):
    return {(s, p): resumed(ranks, folder, s, p) for s in STAGES for p in PRECISIONS if works(s, p)}


@pytest.mark.slow
def test_a_loaded_engine_goes_on_bit_for_bit(tmp_path):
    for outcomes in run_distributed(all_resumed, 2, tmp_path):
        assert outcomes and all(outcomes.values()), outcomes


@pytest.mark.slow
@pytest.mark.skipif(not works(1, "fp16"), reason="refused under this DeepSpeed")
def test_an_infinity_freezes_its_block_alone():
    name = "blocks.0.attention.out"
    for rank in run_distributed(fp16.overflows, 2, "block", name):
        for stage, found in rank.items():
            inside = {n for n in found["all"] if n.startswith("blocks.0.attention.")}
            assert found["changed"] == found["all"] - inside, stage
            assert found["overflows"] == [1, 0, 0, 0]


# What is gone, by stage and precision: part of the engine, and its name.
GONE = [
    (0, "fp32", "engine", "basic_optimizer"),
    (0, "bf16", "optimizer", "fp32_groups"),
    (0, "bf16", "optimizer", "fp16_groups"),
    (1, "bf16", "optimizer", "bf16_groups"),
    (1, "bf16", "optimizer", "fp32_groups_gradients"),
    (1, "bf16", "optimizer", "fp32_groups_gradients_flat"),
    (1, "fp32", "optimizer", "averaged_gradients"),
    (2, "fp32", "optimizer", "averaged_gradients"),
    (3, "fp32", "optimizer", "averaged_gradients"),
    (3, "fp32", "optimizer", "fp16_groups"),
    (2, "bf16", "optimizer", "update_lp_params"),
    (3, "fp32", "optimizer", "persistent_parameters"),
    (3, "fp32", "optimizer", "fp32_partitioned_groups_flat"),
    (3, "fp32", "optimizer", "sub_group_to_group_id"),
    (3, "bf16", "optimizer", "_reassign_or_swap_out_partitioned_parameters"),
    (2, "fp32", "parameter", "_hp_mapping"),
    (2, "fp32", "parameter", "_index_in_param_group"),
    (2, "fp32", "mapping", "lp_fragment_address"),
    (3, "fp32", "parameter", "ds_tensor"),
    (3, "fp32", "parameter", "ds_shape"),
    (3, "fp32", "parameter", "ds_numel"),
    (1, "fp16", "optimizer", "torch_autocast_gradscaler"),
    (3, "fp16", "optimizer", "torch_autocast_gradscaler"),
]


def losing(patch, part, name):
    """`deepspeed.initialize`, but its engine lacks the name as long as `patch` lasts."""
    original = deepspeed.initialize

    def initialize(*args, **kwargs):
        engine, *rest = original(*args, **kwargs)
        owned = [p for p in engine.module.parameters() if getattr(p, "_hp_mapping", p) is not None]
        parts = {"engine": engine, "optimizer": engine.optimizer, "parameter": owned[0]}
        parts["mapping"] = getattr(owned[0], "_hp_mapping", None)
        owner = parts[part]
        patch.delattr(owner if name in vars(owner) else type(owner), name)
        return engine, *rest

    return initialize


def bf16_without_zero():
    """What 0.17 does not have: there it is ZeRO-1."""
    return (0, "bf16") if deepspeed.__version__.startswith("0.17") else None


def refusals(ranks):
    said = {}
    for case in [case for case in GONE if works(*case[:2]) and case[:2] != bf16_without_zero()]:
        stage, precision, part, name = case
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed, "initialize", losing(patch, part, name))
            with pytest.raises(RuntimeError) as error:
                build(ranks, stage, precision)
            said[case] = str(error.value)
    return said


@pytest.mark.slow
def test_a_private_name_that_is_gone_is_refused_in_one_line():
    said = run_distributed(refusals, 1)[0]
    assert len(said) >= len(GONE) - (0 if deepspeed.__version__ == TESTED[0] else 7)
    for (_, _, _, name), line in said.items():
        assert f".{name}, which dalle-dist rests on" in line and "\n" not in line
        assert deepspeed.__version__ in line and ", ".join(TESTED) in line


def late(ranks):
    """The gradients are moved elsewhere after the engine was built."""
    said = []
    for stage in (1, 2, 3):
        engine = build(ranks, stage, "fp32")
        fp16.backward(engine, ranks, 0)
        engine._engine.optimizer.averaged_gradients.clear()
        with pytest.raises(RuntimeError) as error:
            engine.gradients()
        said.append(str(error.value))
    return said


def test_gradients_that_are_elsewhere_are_an_error():
    for line in run_distributed(late, 1)[0]:
        assert "DeepSpeed does not keep its gradients where they were" in line


REFUSED = {
    "0.19.8": set(),
    "0.19.8+cu128": set(),
    "0.19.0": {("bf16", 2, "dense"), ("bf16", 2, "powersgd")},
    "0.18.9": {("bf16", 2, "dense"), ("bf16", 2, "powersgd")}
    | {("bf16", 1, between) for between in ("zero", "dense", "powersgd")},
    "0.17.5": {("bf16", 2, "dense"), ("bf16", 2, "powersgd")}
    | {("fp16", stage, b) for stage in STAGES for b in ("zero", "dense", "powersgd")},
}


@pytest.mark.parametrize("version", REFUSED)
def test_a_version_is_refused_what_it_does_wrong_and_nothing_else(version):
    every = [(p, s, b) for p in PRECISIONS for s in STAGES for b in ("zero", "dense", "powersgd")]
    assert {(p, s, b) for p, s, b in every if not works(s, p, b, version)} == REFUSED[version]


@pytest.mark.parametrize(
    ("version", "fault"),
    [
        ("0.17.6", "keeps only the last micro-batch"),
        ("0.18.1", "keeps only the last micro-batch"),  # a norm of 0.092 instead of 0.140
        ("0.18.2", "keeps only the last micro-batch"),
        ("0.18.3", "makes accumulated gradients too small"),  # 0.035 instead of 0.140
    ],
)
def test_versions_that_lose_micro_batches_are_refused(version, fault):
    with pytest.raises(ConfigError, match=f"{version} {fault}.*; install 0.19.8"):
        check_version(version, "fp32", 0, "zero")


def test_a_version_older_than_those_tested_is_refused():
    with pytest.raises(ConfigError, match=r"0\.17\.4 is older than what is tested"):
        check_version("0.17.4", "fp32", 0, "zero")


def test_the_matrix_runs_what_is_said_to_be_tested():
    root = Path(__file__).parents[2]
    assert f"\nOLD_DEEPSPEEDS := {' '.join(TESTED[1:])}\n" in (root / "Makefile").read_text()
    assert f"\ndeepspeed=={TESTED[0]}\n" in (root / "constraints.txt").read_text()
    assert f'"deepspeed>={TESTED[-1]}' in (root / "setup.py").read_text()
    assert all(version in build_module.__doc__ for version in TESTED)


class _Slow:
    """A gather under way: its result is there once it was waited for."""

    def __init__(self):
        self.waited = False

    def wait(self):
        self.waited = True


def test_on_cpus_older_versions_wait_for_each_gather(monkeypatch):
    from deepspeed import comm

    for version, device, waited in (
        ("0.19.7", "cpu", True), ("0.19.8", "cpu", False), ("0.18.9", "cuda", False),
    ):  # fmt: skip
        monkeypatch.setattr(comm, "all_gather_into_tensor", lambda *a, **k: _Slow())
        versions.wait_for_all_gathers(version, device)
        versions.wait_for_all_gathers(version, device)
        assert comm.all_gather_into_tensor(None, None, async_op=True).waited == waited
