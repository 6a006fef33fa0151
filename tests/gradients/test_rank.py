import pytest
import torch

from dalle_dist.config import load
from dalle_dist.errors import ConfigError
from dalle_dist.gradients.piece import Piece
from dalle_dist.gradients.powersgd.matrices import MatrixShards
from dalle_dist.gradients.powersgd.rank import (
    check_rank,
    check_ranks,
    pays,
    rank_of_shard,
    ratio,
    saved,
    table,
)
from dalle_dist.transformer.blocks import Attention, resblock_map
from dalle_dist.transformer.model import Transformer

NODE = 8


def shards_of(preset, pieces, owned):
    """Shapes of the shards of one layer, of which each rank owns one of `owned` parts."""
    with torch.device("meta"):
        model = Transformer(load(preset, ["transformer.layers=1"]))
    cuts, shapes = MatrixShards(resblock_map(model), pieces), {}
    for name, parameter in model.named_parameters():
        size = parameter.numel() // owned
        for start in range(0, size * owned, size):
            fragment = Piece(name, start, torch.empty(size, device="meta"))
            found = {s.key: tuple(s.values.shape) for s in cuts.cut(fragment)}
            shapes |= {key: shape for key, shape in found.items() if len(shape) == 2}
    return shapes


@pytest.mark.parametrize("owned", [NODE, 1], ids=["ZeRO-3", "ZeRO-1 and 2"])
@pytest.mark.parametrize(
    ("preset", "width", "paper"), [("2.8b", 1920, 0.83), ("5.6b", 2688, 0.85), ("12b", 3968, 0.86)]
)
def test_our_storage_reaches_the_papers_compression(preset, width, paper, owned):
    """Table 1: 83%, 85%, 86%, whether a rank owns an eighth of each matrix or some whole ones."""
    node_rank = load(preset).parallel.rank
    shapes, rows = shards_of(preset, NODE, owned), width // NODE
    assert sorted(shapes.values()) == [(rows, width)] * 32 + [(4 * rows, width)] * 16
    found = saved(shapes, rank_of_shard(node_rank, NODE))
    assert round(found, 2) == paper
    assert found == pytest.approx(1 - 5 * node_rank / (8 * width))


def test_storing_down_as_torch_does_would_cost_five_points():
    square, tall = (496, 3968), (1984, 3968)
    shapes = {"q": square, "k": square, "v": square, "out": square, "up": tall, "down": tall}
    assert saved(shapes, 112) == pytest.approx(0.859, abs=5e-4)
    assert saved(shapes | {"down": (496, 4 * 3968)}, 112) == pytest.approx(0.809, abs=5e-4)


def test_a_gradient_is_cut_at_multiples_of_a_shards_rows_and_nothing_is_lost():
    """A run of a 192 x 64 qkv, whose shards have 32 rows, from within row 1 to within row 61."""
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"a": Attention(64, None)})
    cuts = MatrixShards(resblock_map(model), 2)
    assert cuts.shapes == {"a.qkv.weight": (32, 64), "a.out.weight": (32, 64)}
    values = torch.arange(60 * 64.0)
    shards = list(cuts.cut(Piece("a.qkv.weight", 70, values)))
    rows = [tuple(shard.values.shape) for shard in shards]
    assert rows == [(58,), (30, 64), (29, 64), (6,)]
    assert torch.cat([shard.values.reshape(-1) for shard in shards]).equal(values)
    starts = [shard.start for shard in shards]
    assert starts == [70, 2 * 64, 32 * 64, 61 * 64]
    assert [s.values.shape for s in cuts.cut(Piece("a.qkv.weight", 70, values[:50]))] == [(50,)]


def test_rank_of_a_shard_is_its_part_of_the_machines():
    assert rank_of_shard(896, 8) == 112
    for rank, size in ((900, 8), (4, 8), (0, 8)):
        with pytest.raises(ConfigError, match=f"{rank} is not a multiple of {size}"):
            rank_of_shard(rank, size)


@pytest.mark.parametrize("rank", [496, 0, 1000])
def test_a_rank_that_does_not_compress_is_refused_with_the_largest_allowed(rank):
    with pytest.raises(ConfigError, match=rf"{rank} .* up of shape 496x3968.* allowed is 495"):
        check_rank("up", (496, 3968), rank)
    check_rank("up", (496, 3968), 495)


def test_shapes_without_profit_go_whole():
    assert [pays((20, 20), rank) for rank in (0, 8, 10, 20)] == [False, True, False, False]
    assert ratio((64, 256), 10) == pytest.approx(320 * 10 / (64 * 256))
    shapes = {"big": (64, 256), "square": (20, 20)}
    assert saved(shapes, 10) == pytest.approx(1 - (3200 + 400) / (64 * 256 + 400))
    assert saved({}, 10) == 0


def test_a_rank_that_makes_nothing_smaller_is_refused():
    check_ranks({"big": (64, 256), "square": (20, 20)}, 10)
    with pytest.raises(ConfigError, match=r"parallel.rank: 10 per shard .* no smaller"):
        check_ranks({"square": (20, 20)}, 10)
    with pytest.raises(ConfigError, match="square of shape 20x20"):
        check_ranks({"big": (64, 256), "square": (20, 20)}, 20)


def test_the_table_says_what_is_sent_of_each_shape():
    text = table({"a": (64, 256), "b": (64, 256), "c": (20, 20), "rest": (3, 20)}, 10)
    assert text.splitlines() == [
        "PowerSGD at rank 10 per shard leaves out 79.4%",
        "      1 x 3x20: sent whole: P and Q are no smaller",
        "      1 x 20x20: sent whole: P and Q are no smaller",
        "      2 x 64x256: 19.5% sent",
    ]
