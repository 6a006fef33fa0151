"""How much one request and all of them together may ask for."""

from __future__ import annotations

from dataclasses import dataclass

MOST_SEED = 2**53 - 1  # the largest integer that JavaScript has exactly


class Refusal(Exception):
    """An HTTP status, and the sentence that the page shows."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """
    images   of one request
    waiting  requests beside the one that is carried out
    body     bytes of a request
    prompt   characters
    pixels   of an image that is sent, before it is decoded
    seconds  until a body has arrived
    """

    images: int = 64
    waiting: int = 16
    body: int = 8 * 2**20
    prompt: int = 1000
    pixels: int = 40_000_000
    seconds: float = 30.0
