"""The Slurm scripts that come with the package, and what they become when they are written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from dalle_dist.errors import ConfigError

SITE = "site.sh"  # what a user fills in, so it may differ
_SETTING = re.compile(r"^##?SBATCH --([a-z-]+)=(.*)$", re.MULTILINE)


def shipped() -> Path:
    """The folder slurm/ in an installed package, or beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for p in (package, package.parent) if (folder := p / "slurm").is_dir())


def write_slurm(folder: str) -> list[str]:
    """Write the Slurm scripts into a folder; returns their paths.

    Raises:
        ConfigError: one of them is there with other contents (then none is written), or `folder`
            cannot be written to. A `site.sh` stays as it is.
    """
    files = sorted(file for file in shipped().iterdir() if file.is_file())
    scripts = {Path(folder) / file.name: file.read_text() for file in files}
    try:
        there = {path: path.read_text() for path in scripts if path.exists()}
        changed = [p for p, text in there.items() if text != scripts[p] and p.name != SITE]
        if changed:
            raise ConfigError(
                f"{changed[0]} differs from the shipped one; move it away, or name another folder"
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in scripts.keys() - there.keys():
            path.write_text(scripts[path])
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; name another folder") from None
    return [str(path) for path in scripts]


def whole_script(
    name: str,
    settings: Mapping[str, str],
    environment: Mapping[str, str],
    site: str,
    words: Sequence[str],
) -> str:
    """A shipped script that needs no other file, nor an argument.

    Args:
        name: without .sbatch.
        settings: of sbatch by their long names, in place of the script's own or beside them.
        environment: variables that the job is to have.
        site: the text of `site.sh`.
        words: the arguments.
    """
    script = (shipped() / f"{name}.sbatch").read_text()
    head, _, tail = script.partition("set -euo pipefail\n")
    verb = re.findall(r'job\.sh" (.+) "\$@"', tail)[0]
    exports = "".join(f"export {key}={shlex.quote(text)}\n" for key, text in environment.items())
    return (
        _with_settings(head, settings)
        + exports
        + f"set -- {verb} {shlex.join(words)}\n\n# site.sh\n{site}\n# job.sh\n"
        + (shipped() / "job.sh").read_text().removeprefix("#!/usr/bin/env bash\n")
    )


def _with_settings(head: str, settings: Mapping[str, str]) -> str:
    left = dict(settings)

    def line(match: re.Match[str]) -> str:
        value = left.pop(match[1], None)
        return match[0] if value is None else f"#SBATCH --{match[1]}={value}"

    head = _SETTING.sub(line, head)
    return head + "".join(f"#SBATCH --{key}={value}\n" for key, value in left.items())
