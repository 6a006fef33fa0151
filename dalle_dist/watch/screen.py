"""A run's status in words, on one screen."""

from __future__ import annotations

import time

from dalle_dist.watch.status import OVER, TREND, Status

SHOWN = 6  # checkpoints


def screen(found: Status, now: float | None = None) -> str:
    """Rows of name and text; without those of which nothing is known."""
    now = time.time() if now is None else now
    rows = {
        "state": _state(found, now),
        "step": _step(found),
        "loss": _loss(found),
        "speed": _speed(found),
        "left": _left(found),
        "saved": _saved(found, now),
        "slow rank": _slow(found),
        "skipped": _skipped(found),
        "process": _process(found),
    }
    lines = [f"  {name:10} {text}" for name, text in rows.items() if text]
    lines += [f"  {'trouble':10} {line}" for line in found.trouble]
    return "\n".join([found.run, *lines])


def duration(seconds: float) -> str:
    """ "2 d 3 h", "3 h 12 min", "4 min 5 s" or "12 s"."""
    left = round(max(seconds, 0))
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size or (name == "s" and not parts):
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2])


def _state(found: Status, now: float) -> str:
    when = f"{duration(now - found.seen)} ago" if found.seen else ""
    if found.state == "stalled":
        return f"stalled: no sign of life since {_clock(found.seen)}, {when}"
    if found.state in OVER:
        return f"{found.state}, {when}"
    doing = found.heartbeat.get("doing", "")
    return f"running ({doing or 'no heartbeat'}), last seen {when}"


def _step(found: Status) -> str:
    step = found.heartbeat.get("step", found.numbers.get("step"))
    if step is None:
        return ""
    steps = found.heartbeat.get("steps")
    return f"{step:,} of {steps:,} ({step / steps:.1%})" if steps else f"{step:,}"


def _loss(found: Status) -> str:
    loss = found.numbers.get("loss")
    if loss is None:
        return "not finite" if found.numbers else ""
    text = f"{loss:.4g} at step {found.numbers['step']:,}"
    if found.trend is None:
        return text
    way = "down" if found.trend < 0 else "up"
    return f"{text}, {way} by {abs(found.trend):.2g} over the last {TREND} lines of the log"


def _speed(found: Status) -> str:
    numbers = found.numbers | found.heartbeat
    parts = []
    if "tokens_per_s" in numbers:
        parts.append(f"{numbers['tokens_per_s']:,.0f} tokens/s")
    if "images_per_s" in numbers:
        parts.append(f"{numbers['images_per_s']:,.4g} images/s")
    if "mfu" in numbers:
        parts.append(f"MFU {numbers['mfu']:.1%}")
    return ", ".join(parts)


def _left(found: Status) -> str:
    left = found.numbers.get("seconds_left")
    return "" if found.state != "running" or left is None else duration(left)


def _saved(found: Status, now: float) -> str:
    parts, last = [], found.heartbeat.get("saved")
    if last:
        parts.append(f"step {last['step']:,}, {duration(now - last['time'])} ago")
    if found.checkpoints:
        more = "... " if len(found.checkpoints) > SHOWN else ""
        steps = ", ".join(f"{step:,}" for step in found.checkpoints[-SHOWN:])
        parts.append(f"checkpoints of {more}{steps}")
    parts += ["release"] if found.released else []
    return "; ".join(parts)


def _slow(found: Status) -> str:
    ratio = found.numbers.get("slowest_ratio")
    if ratio is None:
        return ""
    rank = found.numbers["slowest_rank"]
    return f"rank {rank:.0f} takes {ratio:.2g} times as long as the median rank"


def _skipped(found: Status) -> str:
    by_gradients = found.numbers.get("skipped") or 0
    parts = [f"{found.skipped:,} steps for their loss"] if found.skipped else []
    parts += [f"{by_gradients:,.0f} for their gradients"] if by_gradients else []
    return ", ".join(parts)


def _process(found: Status) -> str:
    heartbeat = found.heartbeat
    if not heartbeat:
        return ""
    job = f", job {heartbeat['job']}" if heartbeat.get("job") else ""
    ranks, restarts = heartbeat["ranks"], heartbeat["restarts"]
    again = f", restarted {restarts} times" if restarts else ""
    return f"{heartbeat['process']} on {heartbeat['host']}{job}, {ranks:,} ranks{again}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
