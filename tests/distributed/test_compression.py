import pytest

from dalle_dist.distributed.compression import (
    check_rank,
    compressible,
    ratio,
    saved,
    shard_rank,
    table,
)
from dalle_dist.errors import ConfigError

MACHINE = 8


def block_shards(width, qkv_apart):
    """One attention and one MLP resblock, every weight cut along dim 0; `down` lies as [4d, d].

    A GPU's part of the fused qkv is three pieces of width / 8 rows, each inside one of q, k, v.
    """
    rows = width // MACHINE
    qkv = {f"qkv.{i}": (rows, width) for i in range(3)} if qkv_apart else {"qkv": (3 * rows, width)}
    return qkv | {"out": (rows, width), "up": (4 * rows, width), "down": (4 * rows, width)}


@pytest.mark.parametrize(
    ("width", "machine_rank", "paper", "fused"),
    [(1920, 512, 0.83, 0.878), (2688, 640, 0.85, 0.891), (3968, 896, 0.86, 0.897)],
)
def test_our_storage_reaches_the_papers_compression(width, machine_rank, paper, fused):
    """Table 1: 83%, 85%, 86%, with q, k and v apart; fused they share one rank and save more."""
    rank = shard_rank(machine_rank, MACHINE)
    found = saved(block_shards(width, qkv_apart=True), rank)
    assert round(found, 2) == paper
    assert found == pytest.approx(1 - 5 * machine_rank / (8 * width))
    assert round(saved(block_shards(width, qkv_apart=False), rank), 3) == fused


def test_storing_down_as_torch_does_would_cost_five_points():
    shards = block_shards(3968, qkv_apart=True) | {"down": (496, 4 * 3968)}
    assert saved(shards, 112) == pytest.approx(0.809, abs=5e-4)


def test_rank_of_a_shard_is_its_part_of_the_machines():
    assert shard_rank(896, 8) == 112
    for rank, size in ((900, 8), (4, 8), (0, 8)):
        with pytest.raises(ConfigError, match=f"{rank} is not a multiple of {size}"):
            shard_rank(rank, size)


@pytest.mark.parametrize("rank", [496, 0, 1000])
def test_a_rank_that_does_not_compress_is_refused_with_the_largest_allowed(rank):
    with pytest.raises(ConfigError, match=rf"{rank} .* up of shape 496x3968.* allowed is 495"):
        check_rank("up", (496, 3968), rank)
    check_rank("up", (496, 3968), 495)


def test_shapes_without_profit_go_whole():
    shapes = {"big": (64, 256), "square": (20, 20), "gain": (64,)}
    assert compressible(shapes, 8) == {"big", "square"}
    assert compressible(shapes, 10) == {"big"}
    assert ratio((64, 256), 10) == pytest.approx(320 * 10 / (64 * 256))
    assert saved(shapes, 10) == pytest.approx(1 - (3200 + 400) / (64 * 256 + 400))
    with pytest.raises(ConfigError, match="square of shape 20x20"):
        compressible(shapes, 20)


def test_the_table_says_what_is_sent_of_each_shape():
    text = table({"a": (64, 256), "b": (64, 256), "c": (20, 20), "gain": (64,)}, 10)
    assert text.splitlines() == [
        "PowerSGD at rank 10 per shard leaves out 79.5%",
        "      1 x 20x20: sent whole: P and Q are no smaller",
        "      2 x 64x256: 19.5% sent",
    ]
