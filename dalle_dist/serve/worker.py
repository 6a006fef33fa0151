"""The one thread that has the model: requests in their order, each in batches that grow.

A picture does not depend on what is generated beside it, so that the batches of a request are free.
The first are small, so that pictures come early; a large one is cheaper per picture. None has more
pictures than all before it, so that of a client that has gone it is known in time.
"""

from __future__ import annotations

import sys
import threading
import traceback
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import asdict

from dalle_dist.generate.completion import kept_tokens
from dalle_dist.generate.generator import Generator
from dalle_dist.generate.outputs import png
from dalle_dist.generate.request import Request
from dalle_dist.serve.form import Asked
from dalle_dist.serve.line import Line, Ticket

FIRST, MOST = 4, 16  # pictures of a batch


def start(generator: Generator, line: Line) -> threading.Thread:
    """The worker, running; it ends when the line is closed."""
    # A daemon: a batch of a large model must not hold up the program's end.
    thread = threading.Thread(target=_serve, args=(generator, line), daemon=True, name="worker")
    thread.start()
    return thread


def _serve(generator: Generator, line: Line) -> None:
    while (ticket := line.next()) is not None:
        try:
            _carry_out(generator, ticket)
        except Exception:
            # One request's fault is not the next one's.
            traceback.print_exc(file=sys.stderr)
            ticket.tell({"error": "the server failed at this request; its terminal says why"})


def _carry_out(generator: Generator, ticket: Ticket) -> None:
    request = _request(generator, ticket.wanted)
    ticket.tell({"working": True, "notices": _notices(generator, ticket.wanted)})
    for numbers in batches(len(request)):
        if ticket.left:
            return
        wanted = [request[number] for number in numbers]
        images = generator.images(generator.codes(wanted, request.settings))
        for (_, index), image in zip(wanted, images, strict=True):
            ticket.tell(
                {
                    "index": index,
                    "seed": request.settings.seed,
                    "png": b64encode(png(image)).decode(),
                }
            )
    ticket.tell({"done": True})


def batches(count: int) -> Iterator[range]:
    """0 to `count` in parts."""
    done = 0
    while done < count:
        stop = min(done + min(max(FIRST, done), MOST), count)
        yield range(done, stop)
        done = stop


def _request(generator: Generator, wanted: Asked) -> Request:
    kept = None
    if wanted.completion is not None:
        part = wanted.completion
        kept = kept_tokens(generator.image_tokenizer, part.square, part.keep_GG)
    settings = generator.settings(wanted.seed, kept, **asdict(wanted.sampling))
    return Request([wanted.prompt], wanted.n, settings)


def _notices(generator: Generator, wanted: Asked) -> list[str]:
    """What `Generator` warns of; to collect its warnings is not safe beside other threads."""
    length, notices = generator.config.transformer.text_tokens, []
    if generator.tokenizer.encode_padded(wanted.prompt, length)[1]:
        notices.append(
            f"The prompt was cut to its first {length} tokens, all that the model reads."
        )
    if wanted.sampling.guided and generator.config.train.caption_dropout == 0:
        notices.append(
            "The model never saw an empty caption in training, so that guidance may make pictures "
            "worse."
        )
    return notices
