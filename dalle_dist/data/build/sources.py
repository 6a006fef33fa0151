"""What kind of source it is, told by looking, and the plan that is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dalle_dist import storage
from dalle_dist.data.build import captions, folder, table
from dalle_dist.data.build.folder import Found, Skipped, extension
from dalle_dist.data.build.keys import UniqueKeys, printable
from dalle_dist.data.build.options import Options
from dalle_dist.data.build.parquet import ParquetRow, rows_with_images
from dalle_dist.data.build.plan import PARTS, Plan, plan_of_parts, split_parts
from dalle_dist.data.build.samples import Candidate, PictureFile
from dalle_dist.data.build.table import Columns, Table
from dalle_dist.data.build.tars import Tars, TarUnit
from dalle_dist.data.decode import picture_extensions
from dalle_dist.errors import DataError


def plan_of(source: str, out: str, options: Options) -> Plan:
    """The plan of a folder of pictures or of tars, or of a table, tar or Parquet file.

    Raises:
        DataError: nothing of these, or options that do not fit it.
    """
    if extension(source) in folder.TABLES and not Path(source).is_dir():
        return _plan_of_tables([source], options, [])
    if source.lower().endswith(folder.TARS) and not Path(source).is_dir():
        parent, _, name = source.rpartition("/")
        return _plan_of_tars(Tars(parent or ".", [name]), options, [])
    if storage.is_remote(source):
        return _plan_of_bucket(source, out, options)
    return _plan_of_folder(source, out, options)


def _plan_of_bucket(source: str, out: str, options: Options) -> Plan:
    """Tars are fetched one at a time, by the units that they are read in; all else at once."""
    names = storage.list_files(source)
    tars = [name for name in names if name.lower().endswith(folder.TARS)]
    if tars and not any(extension(name) in picture_extensions() for name in names):
        others = [(printable(name), NO_TAR) for name in names if name not in set(tars)]
        return _plan_of_tars(Tars(source, tars), options, others)
    return _plan_of_folder(source, out, options)


NO_TAR = "a file beside the tars"


def _plan_of_folder(source: str, out: str, options: Options) -> Plan:
    root = storage.fetch_folder(source)
    found = folder.walk(root, None if storage.is_remote(out) else Path(out))
    if found.pictures:
        return _plan_of_pictures(source, found, options)
    if found.tars:
        others = [(name, _beside_tars(reason)) for name, reason in found.skipped]
        others += [(printable(name), NO_TAR) for name in found.tables]
        plan = _plan_of_tars(Tars(str(root), sorted(found.tars)), options, others)
        return dataclasses.replace(plan, linked=found.linked)
    parquet = [name for name in sorted(found.tables) if extension(name) == "parquet"]
    if parquet:
        return _plan_of_tables([found.path(name) for name in parquet], options, found.skipped)
    hint = f"; name its table: {storage.join(source, found.tables[0])}" if found.tables else ""
    raise DataError(f"{source}: no images (NAME.jpg, .png ...) and no tars in this folder{hint}")


def _beside_tars(reason: str) -> str:
    return NO_TAR if reason in (folder.ORPHAN, folder.SECOND) else reason


def _plan_of_pictures(source: str, found: Found, options: Options) -> Plan:
    told = options.captions_from
    pictures = folder.candidates(found, source, told)
    if told not in captions.FROM:
        of_table = table.captions(Table(told, _columns(options), options.encoding))
        pictures = [
            dataclasses.replace(p, text=of_table.get(p.name) or of_table.get(Path(p.name).name, ""))
            for p in pictures
        ]
    return _plan_of_candidates(
        pictures,
        options,
        skipped=found.skipped,
        captions=len(set(found.captions.values())),
        linked=found.linked,
    )


def _plan_of_tables(paths: Sequence[str], options: Options, skipped: Skipped) -> Plan:
    _refuse_captions_from(options, "a table has a column of captions")
    found: list[PictureFile | ParquetRow] = []
    for path in paths:
        one = Table(path, _columns(options), options.encoding)
        in_table = rows_with_images(one) if extension(path) == "parquet" else None
        found += table.candidates(one, skipped) if in_table is None else in_table
    keys = UniqueKeys()  # tables of two folders may have one name
    found = [dataclasses.replace(one, key=keys.unique(one.key, one.identity)) for one in found]
    if not found:
        raise DataError(f"{paths[0]}: names no images")
    return _plan_of_candidates(found, options, skipped=skipped)


def _plan_of_candidates(
    found: Sequence[Candidate],
    options: Options,
    skipped: Skipped,
    captions: int = 0,
    linked: Sequence[str] = (),
) -> Plan:
    return plan_of_parts(
        split_parts(found, options.recipe, options.seed, options.held_out),
        options.recipe,
        options.samples_per_shard,
        skipped=skipped,
        captions=captions,
        linked=linked,
    )


def _plan_of_tars(tars: Tars, options: Options, skipped: Skipped) -> Plan:
    _refuse_captions_from(options, "in a tar a caption is NAME.txt or NAME.json")
    split = tars.split(options.seed, options.held_out)
    units = [
        TarUnit(part, f"{number:05d}", tars, name, split, options.recipe)
        for part in PARTS
        for number, name in enumerate(tars.names)
    ]
    digest = [list(tars.names), dataclasses.asdict(split), dataclasses.asdict(options.recipe)]
    return Plan(units, digest, skipped)


def _refuse_captions_from(options: Options, why: str) -> None:
    if options.captions_from != "beside":
        raise DataError(f"--captions-from {options.captions_from}: is of folders; {why}")


def _columns(options: Options) -> Columns:
    return Columns(options.image_column, options.caption_column)
