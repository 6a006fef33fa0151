import pytest
import tiny_run
import torch

from dalle_dist.errors import CheckpointError
from dalle_dist.gradients.piece import Piece, assemble
from dalle_dist.optim.ema import EMA
from dalle_dist.optim.param_groups import param_groups
from dalle_dist.transformer.blocks import resblock_map
from dalle_dist.transformer.model import Transformer


def _update(ema, values):
    for value in values:
        ema.update([Piece("w", 4, torch.tensor([float(value), -float(value)]))])


def test_early_updates_average_over_the_last_tenth_and_later_ones_by_the_decay():
    ema = EMA(0.5)
    values, expected = list(range(1, 31)), 0.0
    for n, value in enumerate(values):
        decay = min(0.5, n / (n + 9))
        expected = decay * expected + (1 - decay) * value
    _update(ema, values)
    state = ema.state([])
    assert state["w@4"].tolist() == pytest.approx([expected, -expected])


def test_the_random_start_is_forgotten_after_the_first_update():
    ema = EMA(0.99)
    _update(ema, [1e6])
    _update(ema, [1.0] * 200)
    assert ema.state([])["w@4"][0] == pytest.approx(1.0, abs=1e-2)


def test_average_is_a_copy_in_fp32_and_before_the_first_fold_the_present_values():
    live = torch.ones(3, dtype=torch.bfloat16)
    ema = EMA(0.9)
    before = ema.state([Piece("w", 0, live)])
    ema.update([Piece("w", 0, live)])
    live.fill_(7)
    assert before["w@0"].tolist() == ema.state([])["w@0"].tolist() == [1, 1, 1]
    assert ema.state([])["w@0"].dtype == torch.float32


def test_a_saved_average_goes_on_bit_for_bit():
    values = torch.rand(40, generator=torch.Generator().manual_seed(3)).tolist()
    whole, first, second = EMA(0.9), EMA(0.9), EMA(0.9)
    _update(whole, values)
    _update(first, values[:13])
    second.load(first.state([]), first.updates)
    _update(second, values[13:])
    assert torch.equal(second.state([])["w@4"], whole.state([])["w@4"])


def test_fragments_of_all_ranks_make_whole_tensors():
    whole = torch.arange(6.0)
    fragments = {"a.b@4": whole[4:], "a.b@0": whole[:1], "a.b@1": whole[1:4], "c@0": torch.ones(1)}
    state = assemble(fragments, {"a.b": (2, 3), "c": ()})
    assert torch.equal(state["a.b"], whole.view(2, 3))
    assert state["c"].shape == ()


@pytest.mark.parametrize(
    ("fragments", "reason"),
    [
        ({"w@0": torch.ones(2)}, "hold 2 elements, the model has 4"),
        ({"w@0": torch.ones(2), "w@3": torch.ones(1)}, "elements 2 to 3"),
        ({"w@0": torch.ones(3), "w@2": torch.ones(2)}, "doubled"),
        ({"w@0": torch.ones(4), "x@0": torch.ones(1)}, "belongs to no parameter"),
        ({}, "hold 0 elements"),
    ],
)
def test_missing_doubled_and_foreign_fragments_are_refused(fragments, reason):
    with pytest.raises(CheckpointError, match=reason):
        assemble(fragments, {"w": (2, 2)})


def test_only_matrices_of_resblocks_are_decayed(tmp_path):
    model = Transformer(tiny_run.make(tmp_path))
    model.blocks[0].attention.qkv.bias.requires_grad_(False)
    decayed, others = param_groups(model, resblock_map(model).matrices, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = {name_of[id(p)] for p in decayed["params"]}
    inner = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert names == {f"blocks.{i}.{n}.weight" for i in range(len(model.blocks)) for n in inner}
    assert len(others["params"]) == len(name_of) - len(names) - 1
