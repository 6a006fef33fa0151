"""README's commands work: each is known to `readme_commands.py`, which tries them."""

import subprocess
import sys
from pathlib import Path

import pytest
from readme_commands import ROOT, TRIES, commands, plan

SAMPLE = """# Title

Say `make demo`. `train.steps=1000` is a setting, `emoji` a preset, `make` a program; `dalle-dist
convert A B` is broken over two lines.

    make demo        # a comment
                     # that goes on
    dalle-dist data build FOLDER \\
      data/mine

```sh
$ OMP_NUM_THREADS=1 dalle-dist train emoji
```

```text
a drawing -> no command
```

    from dalle_dist import Generator

    print("two parts of one program")

| Slurm | `sbatch --nodes 2 slurm/train.sbatch 12b` |
"""


def test_every_command_of_readme_is_tried_and_every_row_of_the_table_is_used():
    tries, wrong = plan((ROOT / "README.md").read_text(), TRIES)
    assert not wrong
    assert len(tries) > 20


def test_commands_are_found_in_prose_blocks_and_tables():
    *others, program, slurm = commands(SAMPLE)
    assert others == [
        "make demo",
        "train.steps=1000",
        "dalle-dist convert A B",
        "dalle-dist data build FOLDER data/mine",
        "OMP_NUM_THREADS=1 dalle-dist train emoji",
    ]
    assert program.startswith("python -c 'from dalle_dist") and program.endswith("one program\")'")
    assert slurm == "sbatch --nodes 2 slurm/train.sbatch 12b"


def test_a_command_without_a_row_and_a_row_without_a_command_are_told():
    rows = [(r"make (demo|test)", r"make -n \1"), (r"make bench", r"\g<0>")]
    tries, wrong = plan("`make test`, `make demo`, `make coffee`", rows)
    assert [one.shell for one in tries] == ["make -n test", "make -n demo"]
    assert wrong == [
        "README has a command nobody tries: make coffee",
        "no command of README is tried by: make bench",
    ]


@pytest.mark.slow
def test_every_command_of_readme_works():
    program = Path(__file__).with_name("readme_commands.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("ok ") for line in done.stdout.splitlines()) > 20
