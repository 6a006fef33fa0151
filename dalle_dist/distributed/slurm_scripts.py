"""What comes with the package besides Python and presets: the Slurm scripts."""

from __future__ import annotations

import shlex
from pathlib import Path

from dalle_dist.errors import ConfigError


def root() -> Path:
    """The folder of slurm/: in an installed package, or beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    return package if (package / "slurm").is_dir() else package.parent


def names(folder: str) -> list[str]:
    """The files of a shipped folder."""
    return sorted(file.name for file in (root() / folder).iterdir() if file.is_file())


def write_slurm(folder: str) -> list[str]:
    """Write the Slurm scripts, to be submitted from the working folder; returns their paths.

    Raises:
        ConfigError: one of them is there with other contents (then none is written), or `folder`
            cannot be written to.
    """
    scripts = {Path(folder) / name: _script(name, folder) for name in names("slurm")}
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


def _script(name: str, folder: str) -> str:
    text = (root() / "slurm" / name).read_text()
    if not name.endswith(".sbatch"):
        return text
    # sbatch runs a copy from its spool, so that this script cannot find its neighbours by itself.
    return text.replace("slurm/", f"{shlex.quote(str(Path(folder)))}/")
