"""What the tests of building share: pictures, a call of the command, what it made."""

import json
from pathlib import Path

from dalle_dist.cli import main
from dalle_dist.data.shards import ShardSet


def fill(folder, image, count=6):
    """Pictures n0.png ... with captions "caption 0" ...; the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (Path(folder) / f"n{i}.png").write_bytes(image())
        (Path(folder) / f"n{i}.txt").write_text(f"caption {i}")
    return Path(folder)


def build(*arguments):
    """The exit status of `dalle-dist data build`, in this process alone."""
    return main(["data", "build", *map(str, arguments), "--processes", "1"])


def samples(out, *parts):
    """Samples by key, of both parts or of those named."""
    found = {}
    for part in parts or ("train", "held-out"):
        shards = ShardSet(f"{out}/{part}", "images")
        for sample in map(shards.read, range(len(shards))):
            found[sample["__key__"].decode()] = sample
    return found


def captions(out, *parts):
    return {key: sample["txt"].decode() for key, sample in samples(out, *parts).items()}


def skipped(out):
    """Reasons by file."""
    lines = Path(out, "skipped.jsonl").read_text().splitlines()
    return {line["file"]: line["reason"] for line in map(json.loads, lines)}


def files(folder):
    """Contents of all files by their names."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
