"""Installed packages: against those that this project is tested with, and equal on all ranks."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata, resources

import torch

from dalle_dist.config import StageConfig
from dalle_dist.doctor.patient import NO_CONFIG, Patient, grouped, values_of
from dalle_dist.doctor.report import Row, Verdict
from dalle_dist.engine.deepspeed.versions import TESTED, check_version
from dalle_dist.errors import ConfigError
from dalle_dist.optim import apex

NAME = "versions"
# What a run's figures, files and speed depend on.
PACKAGES = (
    "torch", "deepspeed", "triton", "webdataset", "numpy", "safetensors", "tokenizers", "pyarrow",
    "pillow", "boto3", "fsspec",
)  # fmt: skip
ON_GPUS = "triton"  # which CPUs do without


def pins() -> dict[str, str]:
    """Version of each package that this project is tested with: of `constraints.txt`."""
    text = resources.files("dalle_dist").joinpath("constraints.txt").read_text()
    pairs = (line.split("==") for line in text.splitlines() if "==" in line)
    return {name.strip(): version.strip() for name, version in pairs}


def installed() -> dict[str, str]:
    """Of python and PACKAGES, as this rank finds them; empty where there is none."""
    found = {"python": platform.python_version(), "CUDA": torch.version.cuda or ""}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def tested(patient: Patient) -> list[Row]:
    """A row for all that is as tested, and one for each package that is not."""
    answers = patient.meeting.everywhere(installed)
    by_rank = values_of(answers)
    rows = patient.failures(NAME, answers)
    rows += [row for name in ("python", "CUDA", *PACKAGES) for row in _of(name, patient, by_rank)]
    rows += _refused(patient, by_rank)
    shown = ", ".join(f"{name} {version}" for name, version in by_rank[0].items() if version)
    return rows or [Row(NAME, Verdict.OK, shown, "constraints.txt")]


def _of(name: str, patient: Patient, by_rank: dict[int, dict[str, str]]) -> Iterator[Row]:
    versions = {rank: found[name] for rank, found in by_rank.items()}
    words = {version: patient.meeting.named(r) for version, r in grouped(versions).items()}
    if len(words) > 1:
        text = "; ".join(f"{version or 'none'} on {who}" for version, who in words.items())
        yield Row(NAME, Verdict.FAIL, f"{name}: {text}", "the same on all ranks")
        return
    (version,) = words
    right = pins().get(name)
    if right is None or _plain(version) == right:
        return
    missing_is_fine = name == ON_GPUS and patient.ranks.device.type != "cuda"
    if version or name == ON_GPUS:
        if not (missing_is_fine and not version) and not _also_tested(name, version):
            yield Row(NAME, Verdict.WARN, f"{name} {version or 'is not installed'}", right)
    else:
        yield Row(NAME, Verdict.FAIL, f"{name} is not installed", right)


def _refused(patient: Patient, by_rank: dict[int, dict[str, str]]) -> Iterator[Row]:
    """A DeepSpeed that is known to be wrong for this config."""
    settings, config = patient.settings, patient.config
    version = by_rank[0]["deepspeed"]
    if settings is None or config is None or not version:
        return
    try:
        check_version(
            version, patient.precision, settings.zero_stage, config.parallel.between_nodes
        )
    except ConfigError as error:
        yield Row(NAME, Verdict.FAIL, str(error), " or ".join(TESTED))


def _also_tested(name: str, version: str) -> bool:
    return name == "deepspeed" and _plain(version) in TESTED


def _plain(version: str) -> str:
    """Without the build: 2.13.0+cu130 is 2.13.0."""
    return version.partition("+")[0]


def optional(patient: Patient) -> list[Row]:
    """Packages that only some configs need, imported as the run would."""
    name, settings = "packages", patient.settings
    if settings is None:
        return [Row(name, Verdict.SKIP, NO_CONFIG)]
    wanted = _wanted(settings, patient.verb)
    answers = patient.meeting.everywhere(lambda: [_import(module) for module in wanted])
    rows = patient.failures(name, answers)
    for number, (module, key) in enumerate(wanted.items()):
        errors = {rank: found[number] for rank, found in values_of(answers).items()}
        for error, ranks in grouped(errors).items():
            text = f"{module}: {error}, on {patient.meeting.named(ranks)}"
            if error:
                rows.append(Row(name, Verdict.FAIL, text, key))
    found = ", ".join(wanted) or "the config asks for none beyond those required"
    return rows or [Row(name, Verdict.OK, found, ", ".join(wanted.values()))]


def _wanted(settings: StageConfig, verb: str) -> dict[str, str]:
    """Modules, and the key of the config, or verb, that needs each."""
    modules = {}
    if settings.wandb:
        modules["wandb"] = f"{settings.section}.wandb"
    if settings.adamw_backend == "apex":
        modules["apex"] = f"{settings.section}.adamw_backend"
    if verb == "train-clip":
        modules["transformers"] = verb
    return modules


def _import(module: str) -> str:
    """Why it cannot be had; empty if it can."""
    try:
        if module == "apex":  # another program has that name
            apex.fused_adam()
            apex.fused_layer_norm()
        else:
            importlib.import_module(module)
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""
