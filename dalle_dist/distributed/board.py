"""Messages between ranks that any thread may send and await, while others use collectives.

They lie in the store where the ranks met. Nothing blocks in it: a blocking question would hold up
every other user of the store's connection.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

_POLL = 0.01


class Board:
    """Values of JSON by key; each key is written once, by one rank.

    Args:
        topic: tells the keys of one use from those of others.
    """

    def __init__(self, store: Any, topic: str) -> None:
        self._store = dist.PrefixStore(topic, store)

    def post(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def posted(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def all_posted(self, keys: Iterable[str]) -> bool:
        """Whether all of them are, by one question."""
        return bool(self._store.check(list(keys)))

    def read(self, key: str) -> Any:
        """The value of a key that `posted` is true of."""
        return json.loads(self._store.get(key))

    def await_all(self, keys: Iterable[str]) -> list[Any]:
        """The values of all keys, in their order, once they are there."""
        keys = list(keys)
        for key in keys:
            while not self.posted(key):
                time.sleep(_POLL)
        return [self.read(key) for key in keys]

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._store.delete_key(key)
