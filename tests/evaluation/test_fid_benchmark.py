"""The benchmark of FID refuses a formula that is off."""

import pytest

from benchmarks import fid


def test_a_wrong_distance_is_not_timed(monkeypatch):
    sets = fid.features(60, 8, seed=0), fid.features(60, 8, seed=1)
    errors = fid.check(fid.contenders(), *sets)
    assert len(errors) == 3 and max(errors.values()) < 1e-6
    wrong = {**fid.contenders(), "ours": lambda a, b: fid.ours(a, b) * 1.0001}
    with pytest.raises(SystemExit, match=r"fid: ours: off by 1\.0e-04"):
        fid.check(wrong, *sets)
    monkeypatch.setattr(fid.common, "version_of", lambda package: "absent")
    with pytest.raises(SystemExit, match=r"pip install -c constraints\.txt scipy"):
        fid.contenders()
