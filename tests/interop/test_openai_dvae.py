"""OpenAI's dVAE against its own code, and by its names alone where that is not installed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle_dist.errors import CheckpointError
from dalle_dist.image_tokenizer.registry import load_image_tokenizer
from dalle_dist.interop import openai_dvae
from dalle_dist.interop.importing import parity, write_release
from dalle_dist.interop.registry import detect
from tests.interop.oracles import program

SIZE = 32


@pytest.fixture(scope="module")
def theirs():
    dall_e = program("dall_e")
    torch.manual_seed(0)
    sizes = {"n_hid": 64, "n_blk_per_group": 2, "vocab_size": 512}
    return dall_e, dall_e.Encoder(**sizes).eval(), dall_e.Decoder(n_init=16, **sizes).eval()


def write(folder, encoder, decoder, form):
    folder.mkdir(exist_ok=True)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        if form == "pkl":
            torch.save(module, folder / f"{name}.pkl")
        elif form == "pt":
            torch.save(module.state_dict(), folder / f"{name}.pt")
        else:
            save_file(module.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("form", ["pkl", "pt", "safetensors"])
@torch.no_grad()
def test_codes_and_images_are_those_of_its_own_code(tmp_path, theirs, form):
    dall_e, encoder, decoder = theirs
    folder = write(tmp_path / "source", encoder, decoder, form)
    assert detect([folder]) == "openai-dvae"
    imported = openai_dvae.load([folder], image_size=SIZE)
    write_release(imported, str(tmp_path / "release"))
    assert parity(imported, str(tmp_path / "release")) == {"images": 0.0}
    ours = load_image_tokenizer("dvae", str(tmp_path / "release"))
    images_BCHW = torch.rand(2, 3, SIZE, SIZE)
    logits_BKGG = encoder(dall_e.map_pixels(images_BCHW))
    found_BKGG = ours.model.encode_logits(images_BCHW)
    torch.testing.assert_close(found_BKGG, logits_BKGG, rtol=0, atol=1e-5)
    codes_BN = logits_BKGG.argmax(1).flatten(1)
    assert torch.equal(ours.encode(images_BCHW), codes_BN)
    one_hot = torch.nn.functional.one_hot(codes_BN, 512).float().mT.unflatten(2, (4, 4))
    wanted = dall_e.unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))
    torch.testing.assert_close(ours.decode(codes_BN), wanted, rtol=0, atol=1e-5)


def test_files_may_be_named_in_any_order(tmp_path, theirs):
    folder = write(tmp_path / "source", *theirs[1:], "pt")
    files = [folder / "decoder.pt", folder / "encoder.pt"]
    for file, other in zip(files, ("a.pt", "b.pt"), strict=True):
        file.rename(folder / other)
    imported = openai_dvae.load([folder / "a.pt", folder / "b.pt"], image_size=SIZE)
    assert torch.equal(
        imported.image_tokenizer.state["encoder.input.weight"],
        theirs[1].state_dict()["blocks.input.w"],
    )


def test_its_own_code_loads_what_is_exported(tmp_path, theirs):
    _, encoder, decoder = theirs
    imported = openai_dvae.load([write(tmp_path / "source", encoder, decoder, "pt")])
    files = openai_dvae.export(imported, tmp_path / "out")
    for file, module in zip(files, (encoder, decoder), strict=True):
        state = load_file(file)
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(state[name], t) for name, t in module.state_dict().items())


def test_other_files_are_refused(tmp_path):
    for name in ("encoder.pt", "decoder.pt"):
        torch.save({"weight": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="no encoder of OpenAI's dVAE"):
        openai_dvae.load([tmp_path])
    with pytest.raises(CheckpointError, match="1 files; it is two"):
        openai_dvae.load([tmp_path / "encoder.pt"])
