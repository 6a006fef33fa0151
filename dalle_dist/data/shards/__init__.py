"""Tar shards with an index, in img2dataset's layout; anything that reads WebDataset reads them.

    index.json              written last: kind, meta, of each shard its size, sha256 and samples
    00000.tar               KEY.jpg KEY.txt KEY.json, or KEY.npy KEY.txt KEY.json for tokens
    00000.samples.parquet   of each sample its key, its caption, and where its files are in the tar

The side file means that nothing scans a tar to read from it, and that what needs captions alone
never touches images.
"""

from dalle_dist.data.shards.index import (
    INDEX,
    PARTS,
    ShardIndex,
    ShardInfo,
    parts_of,
    refuse_used,
    write_index,
)
from dalle_dist.data.shards.reader import DamagedShard, ShardSet
from dalle_dist.data.shards.writer import ShardWriter, write_shard

__all__ = [
    "INDEX",
    "PARTS",
    "DamagedShard",
    "ShardIndex",
    "ShardInfo",
    "ShardSet",
    "ShardWriter",
    "parts_of",
    "refuse_used",
    "write_index",
    "write_shard",
]
