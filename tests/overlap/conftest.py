"""Sets of pictures with copies among them, and a small CLIP that has not been trained."""

import pytest
from copied import CORRUPT_TRAINING, EVALUATED, TRAINING, encoded, evaluated_file, picture, write
from tiny_clip import make_clip


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """(folder of the evaluation set, folder of the training set)."""
    folder = tmp_path_factory.mktemp("sets")
    training = [
        ("png", b"cut off" if i in CORRUPT_TRAINING else encoded(picture(i)))
        for i in range(TRAINING)
    ]
    training[90] = training[20]  # of two that are equally near the first is the nearest
    write(folder / "train", training, "t")
    write(folder / "evaluated", [evaluated_file(i) for i in range(EVALUATED)], "e")
    return str(folder / "evaluated"), str(folder / "train")


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Its folder."""
    release = make_clip(tmp_path_factory.mktemp("clip"), ["red heart", "blue car"])[2]
    return str(release)
