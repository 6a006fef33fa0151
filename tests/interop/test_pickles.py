"""Files of torch.save are read as data: what a pickle asks for beyond that is refused, not run."""

import collections
import io
import os
import pickle
import struct
import zipfile

import pytest
import torch
from torch import nn

from dalle_dist.errors import CheckpointError
from dalle_dist.interop.pickles import read_pickle, read_state
from dalle_dist.interop.unpickler import Record

LEGACY = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]


def tree():
    base = torch.arange(24.0)
    return {
        "hparams": {"dim": 8, "attn_types": ("full", "axial_row"), "rotary": True, "lr": 1e-3},
        "weights": collections.OrderedDict(
            a=base.view(4, 6).t(), b=base[5:9], c=torch.arange(3), half=torch.ones(2).half(),
            truth=torch.tensor([True, False]), brain=torch.ones(3, dtype=torch.bfloat16),
            empty=torch.empty(0, 3), parameter=nn.Parameter(torch.ones(2)),
        ),
        "list": [1, None, "text", {2, 3}], "device": torch.device("cpu"),
        "dtype": torch.float16,
    }  # fmt: skip


def write(path, pickled, *, legacy, keys=(), storages=b"", names=None):
    """A file whose main pickle is given, in either of torch's formats."""
    if legacy:
        heads = b"".join(pickle.dumps(head, 2) for head in LEGACY)
        path.write_bytes(heads + pickled + pickle.dumps(list(keys), 2) + storages)
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in (names or {}).items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_comes_back(tmp_path, legacy):
    saved = tree()
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    found = read_pickle(tmp_path / "a.pt")
    assert {k: found[k] for k in ("hparams", "list", "device", "dtype")} == {
        **{k: saved[k] for k in ("hparams", "list", "dtype")}, "device": "cpu",
    }  # fmt: skip
    assert list(found["weights"]) == list(saved["weights"])
    for name, tensor in saved["weights"].items():
        assert found["weights"][name].dtype == tensor.dtype
        assert torch.equal(found["weights"][name], tensor.detach())


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_may_be_written_to_without_changing_the_file(tmp_path, legacy):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    read_pickle(tmp_path / "a.pt")["a"].zero_()
    assert torch.equal(read_pickle(tmp_path / "a.pt")["a"], torch.ones(3))


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.nothing = None
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.where, self.kind = torch.device("cpu"), torch.float32


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_gives_its_state_dict(tmp_path, legacy):
    module = Counted()
    torch.save(module, tmp_path / "a.pkl", _use_new_zipfile_serialization=not legacy)
    record = read_pickle(tmp_path / "a.pkl")
    assert isinstance(record, Record)
    assert (record.module, record.name) == (Counted.__module__, "Counted")
    state = read_state(tmp_path / "a.pkl")
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in module.state_dict().items())


class Evil:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def malicious():
    """Pickles that would make a folder `pwned` if anything of them ran."""
    shell = "mkdir pwned"
    yield "reduce", pickle.dumps(Evil(os.system, (shell,)), 2)
    yield "stack global", pickle.dumps(Evil(os.system, (shell,)), 4)
    yield "exec", pickle.dumps(Evil(exec, ("import os; os.mkdir('pwned')",)), 2)
    yield "in a state dict", pickle.dumps({"a": [Evil(os.mkdir, ("pwned",))]}, 2)
    yield "inst", b"(S'mkdir pwned'\nios\nsystem\n."
    yield "obj", b"(cos\nsystem\nS'mkdir pwned'\no."
    yield "newobj", b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00mkdir pwned\x85\x81."
    yield "newobj of a function of torch", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81."
    yield "newobj ex", b"\x80\x04cos\nsystem\nX\x0b\x00\x00\x00mkdir pwned\x85}\x92."
    yield "build", b"\x80\x02cos\nsystem\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb."
    yield (
        "build of a function of torch",
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."),
    )
    yield "getattr", b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00x\x86R."
    yield "ordered dict of a record", b"\x80\x02ccollections\nOrderedDict\ncos\nsystem\n\x85R."
    yield (
        "tensor of no storage",
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x01\x85K\x01\x85\x89NtR."),
    )
    yield "persistent id of a name", b"Pos.system\n."
    yield "persistent id of a class", b"\x80\x02cos\nsystem\nQ."
    yield "persistent id that is short", b"\x80\x02X\x07\x00\x00\x00storageK\x01\x86Q."
    yield "memo of 64 GB", b"\x80\x02Nr\xff\xff\xff\xff" + b"h\x00."
    yield "bytes of 2**62", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"."
    yield "extension", b"\x80\x02\x82\x01."
    yield "cut off", b"\x80\x02}X\x04"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("pickled", [p for _, p in malicious()], ids=[n for n, _ in malicious()])
def test_malicious_pickles_are_refused_in_one_line(tmp_path, monkeypatch, pickled, legacy):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "evil.pt", pickled, legacy=legacy)
    with pytest.raises(CheckpointError) as caught:
        read_pickle(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("place", range(4))
def test_each_pickle_of_a_legacy_file_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    parts = [*LEGACY, {"a": 1}, []]
    parts[place] = Evil(os.mkdir, ("pwned",))
    (tmp_path / "a.pt").write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    with pytest.raises(CheckpointError, match=r"calls \w+\.mkdir, which is refused"):
        read_pickle(tmp_path / "a.pt")
    assert not (tmp_path / "pwned").exists()


def test_the_functions_of_torch_stay_as_they_are(tmp_path):
    before = torch._utils._rebuild_tensor_v2.__defaults__
    pickled = dict(malicious())["build of a function of torch"]
    with pytest.raises(CheckpointError, match="sets attributes of a function"):
        read_pickle(write(tmp_path / "a.pt", pickled, legacy=False))
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


@pytest.mark.parametrize("name", ["archive/../../x", "/archive/data/0", "archive\\x"])
def test_records_outside_of_the_archive_are_refused(tmp_path, name):
    path = write(tmp_path / "a.pt", pickle.dumps({}, 2), legacy=False, names={name: b"x"})
    with pytest.raises(CheckpointError, match="outside of the archive"):
        read_pickle(path)


def pickled_tensor(key, elements, offset=0, size=(2,), stride=(1,)):
    """A tensor of a storage, all of whose numbers may lie."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, key, "cpu", elements)
            return None

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            rest = (False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, *rest)

    file = io.BytesIO()
    Pickler(file, 2).dump({"a": Tensor()})
    return file.getvalue()


LIES = {
    "more elements than bytes": {"elements": 2**40},
    "negative elements": {"elements": -1},
    "beyond the storage": {"size": (5,)},
    "from beyond the storage": {"offset": 3},
    "by its stride": {"stride": (2**40,)},
    "before the storage": {"offset": -1},
    "negative stride": {"stride": (-1,)},
    "the same element again and again": {"size": (2**40,), "stride": (0,)},
    "sizes that are no numbers": {"size": (1.5,)},
    "more sizes than strides": {"size": (1, 2)},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_sizes_out_of_range_are_refused(tmp_path, lie, legacy):
    content = struct.pack("<4f", 1, 2, 3, 4)
    for numbers, fits in (({}, True), (lie, False)):
        pickled = pickled_tensor("0", **{"elements": 4, **numbers})
        path = write(
            tmp_path / "a.pt", pickled, legacy=legacy, keys=["0"],
            storages=struct.pack("<q", 4) + content, names={"archive/data/0": content},
        )  # fmt: skip
        if fits:
            assert read_pickle(path)["a"].tolist() == [1, 2]
        else:
            with pytest.raises(CheckpointError, match=r"a\.pt: has a (tensor|storage)"):
                read_pickle(path)


def test_a_storage_key_that_is_a_path_finds_nothing(tmp_path):
    (tmp_path / "x").write_bytes(b"\0" * 16)
    pickled = pickled_tensor("../../x", 4)
    with pytest.raises(CheckpointError, match="lacks its record"):
        read_pickle(write(tmp_path / "a.pt", pickled, legacy=False))


def test_compressed_records_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([0] * 1000, 2))
    with pytest.raises(CheckpointError, match="compressed record"):
        read_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04", pickle.dumps({"a": 1})])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^[^\n]*a\.pt: [^\n]*$"):
        read_pickle(tmp_path / "a.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pt: No such file"):
        read_pickle(tmp_path / "absent.pt")
