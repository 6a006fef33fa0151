"""The Slurm scripts that come with the package, which cannot be run from where they are."""

from __future__ import annotations

import shlex
from pathlib import Path

from dalle_dist.errors import ConfigError


def shipped() -> Path:
    """The folder slurm/ in an installed package, or beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for p in (package, package.parent) if (folder := p / "slurm").is_dir())


def write_slurm(folder: str) -> list[str]:
    """Write the Slurm scripts, to be submitted from the working folder; returns their paths.

    Raises:
        ConfigError: one of them is there with other contents (then none is written), or `folder`
            cannot be written to.
    """
    files = sorted(file for file in shipped().iterdir() if file.is_file())
    scripts = {Path(folder) / file.name: _script(file, folder) for file in files}
    try:
        changed = [p for p, text in scripts.items() if p.exists() and p.read_text() != text]
        if changed:
            raise ConfigError(
                f"{changed[0]} differs from the shipped one; move it away, or name another folder"
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, text in scripts.items():
            path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; name another folder") from None
    return [str(path) for path in scripts]


def _script(file: Path, folder: str) -> str:
    text = file.read_text()
    if file.suffix != ".sbatch":
        return text
    # sbatch runs a copy from its spool, so that this script cannot find its neighbours by itself.
    return text.replace("slurm/", f"{shlex.quote(str(Path(folder)))}/")
