"""Try every command of README.md as a reader would, in a scratch folder and with small sizes.

python tests/readme_commands.py            try them; the status is 1 when one fails
python tests/readme_commands.py --list     say how each would be tried

A command is a line of an indented or fenced block, a Python block, or what stands in `backticks`
and begins like a command or is an override. `TRIES` says how each is tried. A command that none of
its rows matches is a failure, and so is a row that matches no command.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(sys.prefix)
LIMIT = 300  # seconds for one command

# What `\g<0>`, the whole command, becomes: (regular expression of it, what the shell is given).
# They are tried in this order, so that a later one may use what an earlier one made in the scratch
# folder. $SMALL holds the overrides that make any preset small; RUN, OUT and FOLDER are the words
# that README leaves to its reader.
TRIES = [
    # That each make target does its work is what `make` is for in CI; here it must exist.
    (r"make (test|bench|demo-image-to-image|rehearse)", r"make -n -C $ROOT \1"),
    (
        r"make demo",
        r"make -C $ROOT demo -o $VENV/ready VENV=$VENV RUN=$PWD/runs/demo DATA=$PWD/data/emoji "
        r'CANDIDATES=2 EXTRA="$SMALL"',
    ),
    # The real installation, into an empty environment, is tests/test_wheel.py.
    (r"python3 -m venv my-env && \. my-env/bin/activate", r"\g<0>"),
    (r"pip install -c constraints.txt setuptools .*", r"cd $ROOT && \g<0> --dry-run"),
    (r"pip install .* kernels/ \.", r"cd $ROOT && \g<0> --dry-run --no-deps"),
    (r"pip install .* '\.\[serve\]'", r"cd $ROOT && \g<0> --dry-run --no-deps"),
    (r"pip install .* 'kernels/\[gpu\]'", r"cd $ROOT && \g<0> --dry-run --no-deps"),
    (r"pip install .* '\.\[clip\]'", r"cd $ROOT && \g<0> --dry-run --no-deps"),
    (r"dalle-dist (slurm|--version)", r"\g<0>"),
    (r"\.venv/bin/dalle-dist generate runs/demo/release .*", r"\g<0>"),
    (
        r"dalle-dist generate RELEASE (--prompts \S+) -n 512 --keep 32 --rerank CLIP (.*)",
        r"printf 'a red heart\na dog\n' > prompts.txt && dalle-dist generate runs/demo/release \1 "
        r"-n 4 --keep 2 --rerank runs/demo-clip/release \2",
    ),
    (
        r"dalle-dist complete RELEASE image\.png (.*) --rows 15",
        r"cp generated/grid.png image.png && dalle-dist complete runs/demo/release image.png \1 "
        r"--rows 2 -o completed",
    ),
    # Once it answers it is told to end.
    (
        r"\.venv/bin/dalle-dist serve runs/demo/release",
        r"\g<0> --port $PORT & "
        r"until python -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1])' "
        r"http://127.0.0.1:$PORT/ 2> waits; do kill -0 $!; sleep 1; done; "
        r"kill -INT $!; wait $! || test $? = 130",
    ),
    (r"python -c 'from dalle_dist import .*", r"\g<0> && test -s heart.png"),
    (r"dalle-dist data build FOLDER data/mine", r"dalle-dist data build images data/mine"),
    (r"dalle-dist data inspect data/mine .*", r"\g<0>"),
    (r"dalle-dist config --explain \S+", r"\g<0>"),
    (r"(dalle-dist config cc3m) > mine.yaml", r"\1 $SMALL $MINE > mine.yaml"),
    (r"dalle-dist (tokenizer train|train-dvae|encode|train-clip) mine\.yaml", r"\g<0>"),
    (
        r"dalle-dist overlap data/mine/held-out data/mine/train .*",
        r"\g<0> && test -s overlap/report.html",
    ),
    (r"torchrun --nproc-per-node 8 (.* train mine\.yaml .*)", r"torchrun --nproc-per-node 2 \1"),
    (r"dalle-dist train emoji", r"\g<0> $SMALL paths.run=runs/alone"),
    (
        r"(dalle-dist evaluate) RELEASE DATA",
        r"\1 runs/demo/release data/emoji --clip runs/mine-clip/release --captions 8",
    ),
    (
        r"deepspeed (.* train emoji)",
        r"deepspeed --master_port $PORT \1 $SMALL paths.run=runs/deepspeed",
    ),
    (r"torchrun .* train emoji", r"\g<0> $SMALL paths.run=runs/torchrun"),
    (r"mpirun .* train emoji", r"\g<0> $SMALL paths.run=runs/mpirun"),
    (
        r"dalle-dist doctor mine\.yaml",
        r"dalle-dist doctor emoji $SMALL paths.run=runs/doctor --quick",
    ),
    (r"dalle-dist submit 12b .*", r"\g<0> --dry-run"),
    (r"dalle-dist status RUN --follow", r"dalle-dist status runs/alone --follow"),
    (r"sbatch .* (slurm/\S+) (\S+)", r"dalle-dist slurm && bash -n \1 && dalle-dist config \2"),
    (r"train\.steps=1000 train\.warmup=50", r"dalle-dist config cc3m \g<0>"),
    (r"(train\.caption_dropout|sampling\.guidance)=.*", r"dalle-dist config cc3m \g<0>"),
    (r"train\.zero_stage=\d", r"dalle-dist train emoji $SMALL paths.run=runs/stage \g<0>"),
    (r"dalle-dist convert RUN OUT", r"dalle-dist convert runs/demo converted"),
    (
        r"train\.init=RELEASE",
        r"dalle-dist train emoji $SMALL paths.run=runs/tuned train.init=runs/demo/release",
    ),
    (r"dalle-dist plan 12b .*", r"\g<0>"),
    (
        r"dalle-dist samples --follow RUN",
        r"dalle-dist samples --follow runs/alone 'a red heart'",
    ),
    (r"train\.sample_every=0", r"dalle-dist config 1b \g<0>"),
    (
        r"parallel\.between_nodes=diloco",
        r"torchrun --nproc-per-node 2 -m dalle_dist train emoji $SMALL paths.run=runs/diloco "
        r"train.zero_stage=1 parallel.local_world_size=1 \g<0>",
    ),
    (r"train\.precision=fp16", r"dalle-dist train emoji $SMALL paths.run=runs/fp16 \g<0>"),
    (r"(dalle-dist plot scales) RUN", r"\1 runs/fp16"),
    (r"train\.moments=16-bit", r"dalle-dist train emoji $SMALL paths.run=runs/moments \g<0>"),
    (
        r"parallel\.between_nodes=powersgd .*",
        r"torchrun --nproc-per-node 2 -m dalle_dist train emoji $SMALL paths.run=runs/powersgd "
        r"\g<0> parallel.rank=4 parallel.local_world_size=1",
    ),
    (r"(dalle-dist plot compression) RUN", r"\1 runs/powersgd"),
]

PROGRAMS = "dalle-dist|deepspeed|make|mpirun|pip|python3?|sbatch|srun|torchrun"
# `dalle-dist data inspect X`, `NAME=1 .venv/bin/dalle-dist ...`, `train.steps=1000`
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:\S*/bin/)?(?:{PROGRAMS}) \S|[a-z_]+\.[a-z_]+=\S")
LANGUAGES = ("", "bash", "console", "python", "sh", "shell")  # of the fenced blocks that are tried
SMALL = """
    data.workers=0 dvae.image_size=16 dvae.width=8 dvae.decoder_stem=8 dvae.codebook_size=16
    transformer.codebook_size=16
    dvae.downsamplings=2 dvae.blocks_per_group=1 dvae_train.batch_size=8 dvae_train.steps=4
    dvae_train.warmup=2 train.warmup=2
    dvae_train.eval_every=4 dvae_train.save_every=4 dvae_train.precision=fp32
    transformer.layers=2 transformer.width=64 transformer.heads=1 transformer.text_tokens=24
    transformer.image_grid=4 transformer.conv_kernel=3 train.batch_size=8 train.micro_batch=2
    train.steps=4 train.eval_every=4 train.sample_every=4 train.save_every=2 train.log_every=1
    train.precision=fp32 train.prompts=[heart]
    clip.image_size=16 clip.patch_size=8 clip.image_width=32 clip.image_layers=1 clip.image_heads=1
    clip.text_width=32 clip.text_layers=1 clip.text_heads=1 clip_train.batch_size=8
    clip_train.steps=2 clip_train.warmup=0 clip_train.precision=fp32
"""
MINE = """
    paths.images=data/mine paths.tokens=data/mine-tokens paths.tokenizer=data/mine/tokenizer.json
    paths.dvae_run=runs/mine-dvae paths.run=runs/mine
    paths.clip_run=runs/mine-clip
"""


class Try(NamedTuple):
    command: str  # as README has it
    shell: str  # as it is tried


def commands(text: str) -> list[str]:
    """All commands of a Markdown text, each once, in its order."""
    found: list[str] = []
    for code, lines in itertools.groupby(_marked(text), key=lambda pair: pair[0]):
        part = "\n".join(line for _, line in lines)
        spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", part))
        found += _of_block(part) if code else [span for span in spans if COMMAND.match(span)]
    return list(dict.fromkeys(found))


def _marked(text: str) -> Iterator[tuple[bool, str]]:
    """Each line, and whether it belongs to a block of code."""
    fence, code = "", False
    for line in text.splitlines():
        if line.startswith("```"):
            fence, code = "" if fence else line, False
            yield False, ""
            continue
        indented = line.startswith("    ") or (code and not line)
        code = fence.strip("` ") in LANGUAGES if fence else indented
        yield code, line


def _of_block(block: str) -> list[str]:
    block = textwrap.dedent(block).strip()
    if re.match(r"(from|import) ", block):
        return [f"python -c {shlex.quote(block)}"]
    joined = re.sub(r"\\\n\s*", "", block)
    lines = (re.sub(r"(^|\s+)#.*", "", line) for line in joined.splitlines())
    return [line.strip().removeprefix("$ ") for line in lines if line.strip()]


def plan(text: str, rows: list[tuple[str, str]]) -> tuple[list[Try], list[str]]:
    """How the commands of `text` are tried, in the order of `rows`; what does not fit together."""
    chosen: dict[int, list[Try]] = {i: [] for i in range(len(rows))}
    wrong = []
    for command in commands(text):
        matches = (re.fullmatch(pattern, command, re.DOTALL) for pattern, _ in rows)
        i, match = next(((i, m) for i, m in enumerate(matches) if m), (-1, None))
        if match is None:
            wrong.append(f"README has a command nobody tries: {command}")
        else:
            chosen[i].append(Try(command, match.expand(rows[i][1])))
    wrong += [f"no command of README is tried by: {rows[i][0]}" for i in chosen if not chosen[i]]
    return [one for tries in chosen.values() for one in tries], wrong


def prepare(scratch: Path) -> dict[str, str]:
    """What a reader has before the first command; returns the environment of the commands."""
    (scratch / "images").mkdir()
    (scratch / ".venv").symlink_to(VENV)
    for i in range(40):
        Image.new("RGB", (24, 24), (i * 6, 128, 255 - i * 6)).save(scratch / f"images/{i}.png")
        (scratch / f"images/{i}.txt").write_text(f"a square of shade {i}")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    names = {"ROOT": str(ROOT), "VENV": str(VENV), "SMALL": " ".join(SMALL.split())}
    names |= {"MINE": " ".join(MINE.split()), "PORT": port, "PET_MASTER_PORT": port}
    return kept | root | names | {"PATH": f"{VENV}/bin:{kept['PATH']}", "OMP_NUM_THREADS": "1"}


def attempt(one: Try, scratch: Path, environment: dict[str, str]) -> bool:
    """Run it, and print one line; what it said follows if it failed."""
    start = time.monotonic()
    with (scratch / "output").open("w+") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", one.shell], cwd=scratch, env=environment,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            good = process.wait(LIMIT) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            good = False
        seconds = time.monotonic() - start
        print(f"{'ok' if good else 'FAILED':6} {seconds:5.1f} s  {_line(one)}", flush=True)
        output.seek(0)
        if not good:
            print(*output.read().splitlines()[-40:], sep="\n", flush=True)
    return good


def _line(one: Try) -> str:
    command, shell = (" ".join(text.split()) for text in one)
    return command if shell == command else f"{command}   AS   {shell}"


def main() -> int:
    tries, wrong = plan((ROOT / "README.md").read_text(), TRIES)
    if sys.argv[1:] == ["--list"]:
        print(*map(_line, tries), sep="\n")
    elif sys.argv[1:]:
        wrong = [f"usage: {sys.argv[0]} [--list]"]
    else:
        with tempfile.TemporaryDirectory() as folder:
            environment = prepare(Path(folder))
            failed = [one for one in tries if not attempt(one, Path(folder), environment)]
        wrong += [f"failed: {one.command}" for one in failed]
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
