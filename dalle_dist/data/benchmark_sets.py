"""The paper's two evaluation sets as their users download them: MS-COCO captions, and CUB.

Evaluated are the paper's captions (3.1): of COCO 30,000 of the validation images', of CUB all that
are unique among those of the test images.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dalle_dist import storage
from dalle_dist.data.build.build import run
from dalle_dist.data.build.keys import UniqueKeys, share
from dalle_dist.data.build.plan import PARTS, plan_of_parts
from dalle_dist.data.build.samples import Candidate, PictureFile, Recipe
from dalle_dist.errors import DataError

SAMPLES_PER_SHARD = 1000
CUB_CAPTIONS = ("text_c10", "text")  # folders of CLASS/IMAGE.txt, ten captions each


def build_coco(folder: str, out: str, size: int | None, seed: int, captions: int) -> None:
    """COCO's train images to OUT/train, `captions` of its validation images to OUT/held-out.

    FOLDER holds annotations/captions_{train,val}YEAR.json, trainYEAR/ and valYEAR/, as unpacked.
    Each image has one of its captions; which, and which images are held out, depends on (seed,
    image) alone.

    Raises:
        DataError: a file or folder is missing, or as `build`.
    """
    root = storage.fetch_folder(folder)
    val = _coco_split(root, folder, "val", seed)
    chosen = sorted(val, key=lambda image: share(f"held-out {image.key}", seed))[:captions]
    parts = {"train": _coco_split(root, folder, "train", seed), "held-out": chosen}
    _build(folder, out, parts, size, "unpack the images beside annotations/")


def _build(
    source: str, out: str, parts: dict[str, list[PictureFile]], size: int | None, fix: str
) -> None:
    recipe, chosen = Recipe(size), dict[str, list[Candidate]]()
    for part in PARTS:
        keys = UniqueKeys()
        chosen[part] = [replace(p, key=keys.unique(p.key, p.name)) for p in parts[part]]
    run(source, out, plan_of_parts(chosen, recipe, SAMPLES_PER_SHARD), recipe, fix)


def _coco_split(root: Path, folder: str, split: str, seed: int) -> list[PictureFile]:
    found = sorted((root / "annotations").glob(f"captions_{split}20*.json"))
    if len(found) != 1:
        what = "is missing" if not found else "is there for several years"
        raise DataError(f"{folder}: annotations/captions_{split}YEAR.json {what}")
    images = root / found[0].stem.removeprefix("captions_")
    if not images.is_dir():
        raise DataError(f"{folder}: {images.name}/ is missing, the images of {found[0].name}")
    try:
        tree = json.loads(found[0].read_text("utf-8"))
        names = {image["id"]: image["file_name"] for image in tree["images"]}
        captions = defaultdict[int, list[str]](list)
        for one in sorted(tree["annotations"], key=lambda one: one["id"]):
            captions[one["image_id"]].append(" ".join(one["caption"].split()))
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: {found[0].name} holds no captions of images") from None
    return [
        _one_of(images / names[image], texts, f"{images.name}/{names[image]}", seed)
        for image, texts in sorted(captions.items())
        if image in names and (images / names[image]).is_file()
    ]


def _one_of(path: Path, captions: list[str], name: str, seed: int) -> PictureFile:
    told = [caption for caption in captions if caption] or [""]
    caption = told[int(share(f"caption {path.stem}", seed) * len(told))]
    key = path.stem.replace(".", "_")
    return PictureFile(key, key, name, str(path), caption)


def build_cub(folder: str, out: str, size: int | None, test: str | None) -> None:
    """CUB's training classes to OUT/train, all unique captions of its test classes' images.

    FOLDER holds CUB_200_2011/images/CLASS/IMAGE.jpg, and text_c10/CLASS/IMAGE.txt with a caption
    per line (Reed et al. 2016). Each training image has its first caption; a test image is there
    once for each of its captions that no test image before it has.

    Args:
        test: names or numbers of the test classes, or images of them, one per line; None:
            FOLDER/test/filenames.pickle, the list that text-to-image work hands round.

    Raises:
        DataError: a file or folder is missing, or as `build`.
    """
    root = storage.fetch_folder(folder)
    images = _inside(root, folder, ("CUB_200_2011/images", "images"), "the images of the classes")
    texts = _inside(root, folder, CUB_CAPTIONS, "the captions, CLASS/IMAGE.txt")
    classes = _test_classes(root, images, folder, test)
    parts: dict[str, list[PictureFile]] = {"train": [], "held-out": []}
    seen = set[str]()
    for path in sorted(images.glob("*/*.jpg")):
        own = list(_captions(texts / path.parent.name / f"{path.stem}.txt"))
        name = f"{path.parent.name}/{path.name}"
        if path.parent.name not in classes:
            parts["train"].append(
                PictureFile(path.stem, path.stem, name, str(path), (own or [""])[0])
            )
            continue
        for number, caption in enumerate(own):
            if caption not in seen:
                seen.add(caption)
                key = f"{path.stem}-{number}"
                parts["held-out"].append(PictureFile(key, key, name, str(path), caption))
    _build(folder, out, parts, size, "name other classes with --test-classes")


def _inside(root: Path, folder: str, names: tuple[str, ...], what: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{folder}: {names[0]}/ is missing, {what}")


def _captions(path: Path) -> Iterator[str]:
    if path.is_file():
        lines = (" ".join(line.split()) for line in path.read_text("utf-8", "replace").splitlines())
        yield from (line for line in lines if line)


def _test_classes(root: Path, images: Path, folder: str, test: str | None) -> set[str]:
    handed_round = root / "test" / "filenames.pickle"
    if test is not None:
        named = storage.read_bytes(test).decode("utf-8", "replace").split()
    elif handed_round.is_file():
        named = _strings(handed_round)
    else:
        raise DataError(
            f"{folder}: which classes are for testing? test/filenames.pickle is missing; name a "
            "file with --test-classes"
        )
    wanted = {name.partition("/")[0] for name in named}
    numbers = {name.partition(".")[0].lstrip("0") for name in wanted}
    classes = [path.name for path in images.iterdir() if path.is_dir()]
    return {name for name in classes if name.partition(".")[0].lstrip("0") in numbers}


def _strings(path: Path) -> list[str]:
    """A pickled list of strings; a pickle that asks for any class is refused."""
    try:
        found = _Plain(io.BytesIO(path.read_bytes()), encoding="latin-1").load()
    except Exception as error:
        raise DataError(f"{path}: not a pickled list of file names ({error})") from None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{path}: not a pickled list of file names")
    return found


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")
