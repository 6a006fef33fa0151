"""DALLE-pytorch's models against its own code: logits, codes, images, and what it loads again."""

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from dalle_dist.checkpoint.release import load_release
from dalle_dist.errors import CheckpointError, ConfigError
from dalle_dist.generate.generator import Generator
from dalle_dist.image_tokenizer.registry import load_image_tokenizer
from dalle_dist.interop.dalle_pytorch import files
from dalle_dist.interop.importing import model_of, parity, tokenizer_class, write_release
from dalle_dist.interop.registry import detect
from dalle_dist.transformer.loss_model import loss_transformer
from tests.interop import vqgan_by_hand
from tests.interop.oracles import program

VAE = {
    "image_size": 16, "num_layers": 1, "num_tokens": 30, "codebook_dim": 12, "hidden_dim": 8,
    "num_resnet_blocks": 1, "channels": 3,
}  # fmt: skip
DALLE = {
    "dim": 36, "depth": 3, "heads": 2, "dim_head": 18, "num_text_tokens": 50, "text_seq_len": 6,
}  # fmt: skip
KINDS = ("full", "axial_row", "axial_col", "conv_like")
CASES = {
    "defaults": {},
    "plain": {"shift_tokens": False, "rotary_emb": False},
    "shifted": {"rotary_emb": False},
    "rotary": {"shift_tokens": False},
    "all kinds of attention": {"attn_types": KINDS, "depth": 5},
    "all kinds, plain": {
        "attn_types": KINDS, "depth": 4, "shift_tokens": False, "rotary_emb": False,
    },
    "reversible": {"reversible": True},
    "reversible, all kinds": {"reversible": True, "attn_types": KINDS, "depth": 4},
    "stable": {"stable": True},
    "sandwich": {"sandwich_norm": True},
    "tied": {"share_input_output_emb": True},
    "shared": {"depth": 4, "shared_attn_ids": (0, 1, 0, 1), "shared_ff_ids": (0,)},
    "all at once": {
        "depth": 4, "attn_types": ("full", "axial_row"), "shared_attn_ids": (0, 1),
        "shared_ff_ids": (0, 1, 1, 0), "stable": True, "sandwich_norm": True, "reversible": True,
        "share_input_output_emb": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def dp():
    return program("dalle_pytorch")


def source(dp, **changes):
    """A model of its own with random weights, and the tree of its dalle.pt."""
    torch.manual_seed(0)
    hparams = {**DALLE, "attn_types": ("full",), **changes}
    model = dp.DALLE(vae=dp.DiscreteVAE(**VAE), **hparams).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.normal_(std=0.3)
    tree = {
        "hparams": hparams, "vae_params": VAE, "epoch": 3, "version": "1.6.6",
        "vae_class_name": "DiscreteVAE", "weights": model.state_dict(), "opt_state": None,
        "scheduler_state": None,
    }  # fmt: skip
    return model, tree


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(1, 50, (3, 6), generator=generator)
    text_BT[0, 4:] = 0
    text_BT[1] = 0
    return text_BT, torch.randint(30, (3, 64), generator=generator)


def saved(tmp_path, tree):
    torch.save(tree, tmp_path / "dalle.pt")
    return tmp_path / "dalle.pt"


def words(folder):
    vocab = {word: number for number, word in enumerate(["<pad>", "a", "red", "heart", "x"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return folder / "words.json"


@torch.no_grad()
def assert_same_logits(theirs, ours):
    text_BT, codes_BN = inputs()
    wanted_BSV = theirs(text_BT.clone(), codes_BN)
    text_BTV, image_BNK = ours.logits(text_BT, codes_BN)
    classes = DALLE["num_text_tokens"] + DALLE["text_seq_len"]
    torch.testing.assert_close(text_BTV, wanted_BSV[:, :6, :classes], rtol=0, atol=1e-5)
    torch.testing.assert_close(image_BNK, wanted_BSV[:, 6:, classes:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_are_those_of_its_own_code(tmp_path, dp, changes):
    theirs, tree = source(dp, **changes)
    path = saved(tmp_path, tree)
    assert detect([path]) == "dalle-pytorch"
    assert_same_logits(theirs, model_of(files.load([path])))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@torch.no_grad()
def test_steps_give_the_logits_of_the_whole(tmp_path, dp, changes):
    _, tree = source(dp, **changes)
    model = model_of(files.load([saved(tmp_path, tree)]))
    text_BT, codes_BN = inputs()
    wanted_BNK = model.logits(text_BT, codes_BN)[1]
    caches = model.prefill(text_BT, [1, 1, 1], codes_BN[:, :2], window=31)
    for first in (2, 33):
        held_BN = codes_BN[:, first - 1 : first + 30]
        found_BNK = model.step(held_BN, caches, torch.full((3,), first))
        wanted = wanted_BNK[:, first : first + 31]
        torch.testing.assert_close(found_BNK, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_its_own_code_loads_what_is_exported(tmp_path, dp, changes):
    theirs, tree = source(dp, **changes)
    imported = files.load([saved(tmp_path, tree)])
    (path,) = files.export(imported, tmp_path / "out.pt")
    found = torch.load(path, weights_only=True)
    assert found.keys() == tree.keys()
    again = dp.DALLE(vae=dp.DiscreteVAE(**found["vae_params"]), **found["hparams"])
    again.load_state_dict(found["weights"])
    text_BT, codes_BN = inputs(1)
    with torch.no_grad():
        wanted = theirs(text_BT.clone(), codes_BN)
        torch.testing.assert_close(
            again.eval()(text_BT.clone(), codes_BN), wanted, rtol=0, atol=1e-5
        )


def _known(dp, hparams):
    assert hparams["attn_dropout"] == 0
    return hparams


@pytest.mark.parametrize("blocks", [0, 2])
@torch.no_grad()
def test_the_vae_gives_its_own_codes_and_images_and_comes_back(tmp_path, dp, blocks):
    torch.manual_seed(0)
    hparams = {**VAE, "num_resnet_blocks": blocks}
    theirs = dp.DiscreteVAE(**hparams).eval()
    torch.save({"hparams": hparams, "weights": theirs.state_dict()}, tmp_path / "vae.pt")
    assert detect([tmp_path / "vae.pt"]) == "dalle-pytorch"
    imported = files.load([tmp_path / "vae.pt"])
    write_release(imported, str(tmp_path / "release"))
    assert parity(imported, str(tmp_path / "release")) == {"images": 0.0}
    ours = load_image_tokenizer("dalle-pytorch", str(tmp_path / "release"))
    images_BCHW = torch.rand(2, 3, 16, 16)
    codes_BN = theirs.get_codebook_indices(images_BCHW)
    assert torch.equal(ours.encode(images_BCHW), codes_BN)
    wanted = (theirs.decode(codes_BN) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.decode(codes_BN), wanted, rtol=0, atol=1e-5)
    files.export(imported, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    again = dp.DiscreteVAE(**found["hparams"])
    again.load_state_dict(found["weights"])
    assert found["hparams"] == hparams


@torch.no_grad()
def test_openais_dvae_comes_and_goes_with_a_model(tmp_path, dp):
    dall_e = program("dall_e")
    vae = dp.OpenAIDiscreteVAE.__new__(dp.OpenAIDiscreteVAE)
    torch.nn.Module.__init__(vae)
    sizes = {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512}
    vae.enc, vae.dec = dall_e.Encoder(**sizes), dall_e.Decoder(n_init=8, **sizes)
    vae.channels, vae.num_layers, vae.image_size, vae.num_tokens = 3, 3, 256, 512
    theirs = dp.DALLE(vae=vae, **DALLE).eval()
    tree = source(dp)[1] | {
        "vae_params": None, "vae_class_name": "OpenAIDiscreteVAE", "weights": theirs.state_dict(),
    }  # fmt: skip
    imported = files.load([saved(tmp_path, tree)])
    parts = imported.image_tokenizer
    ours = tokenizer_class(imported).of(parts.shape, parts.state)
    images_BCHW = torch.rand(1, 3, 256, 256)
    codes_BN = vae.get_codebook_indices(images_BCHW)
    assert torch.equal(ours.encode(images_BCHW), codes_BN)
    torch.testing.assert_close(ours.decode(codes_BN), vae.decode(codes_BN), rtol=0, atol=1e-5)
    text_BT = inputs()[0][:1]
    found_BNK = model_of(imported).logits(text_BT, codes_BN)[1]
    wanted_BNK = theirs(text_BT.clone(), codes_BN)[:, 6:, 56:]
    torch.testing.assert_close(found_BNK, wanted_BNK, rtol=0, atol=1e-5)
    files.export(imported, tmp_path / "out.pt")
    theirs.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True)["weights"])


def test_a_vqgan_comes_and_goes_with_a_model(tmp_path, dp):
    tree = source(dp)[1]
    # Five halvings of the 256 pixels that the program assumes, so that 8 x 8 codes are left.
    vqgan = vqgan_by_hand.weights(multiples=(1,) * 6, attention=())
    tree["weights"] = {n: x for n, x in tree["weights"].items() if not n.startswith("vae.")}
    tree["weights"] |= {f"vae.model.{name}": tensor for name, tensor in vqgan.items()}
    tree |= {"vae_params": None, "vae_class_name": "VQGanVAE"}
    imported = files.load([saved(tmp_path, tree)])
    parts = imported.image_tokenizer
    assert (parts.shape["grid"], parts.shape["image_size"]) == (8, 256)
    assert all(torch.equal(parts.state[name], tensor) for name, tensor in vqgan.items())
    files.export(imported, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert (found["vae_class_name"], found["weights"].keys()) == (
        "VQGanVAE",
        tree["weights"].keys(),
    )


def test_names_of_other_versions_are_read(tmp_path, dp):
    theirs, tree = source(dp, shift_tokens=False, rotary_emb=False)
    weights = {}
    for name, tensor in tree["weights"].items():
        name = name.replace(".fn.fn.fn.", ".fn.fn.").replace("_emb.weights.", "_emb.weights_")
        weights[name] = tensor
    tree["weights"] = weights
    # The first versions had no such options.
    for key in ("shift_tokens", "rotary_emb"):
        del tree["hparams"][key]
    assert_same_logits(theirs, model_of(files.load([saved(tmp_path, tree)])))


def test_a_release_generates_and_can_be_fine_tuned(tmp_path, dp):
    _, tree = source(dp)
    imported = files.load([saved(tmp_path, tree)], words(tmp_path))
    write_release(imported, str(tmp_path / "release"))
    assert parity(imported, str(tmp_path / "release")) == {
        "text logits": 0.0, "image logits": 0.0, "images": 0.0,
    }  # fmt: skip
    (one,) = Generator.load(tmp_path / "release", device="cpu").generate("a red heart", seed=1)
    (windowed,) = Generator.load(tmp_path / "release", device="cpu").generate(
        "a red heart", seed=1, window=1
    )
    assert one.image.size == (16, 16)
    assert one.codes_N.tolist() == windowed.codes_N.tolist()
    model = loss_transformer(imported.config)
    model.load_state_dict(load_release(tmp_path / "release").transformer.state_dict())
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=0.05), []
    for _ in range(3):
        text_sum, text, image_sum, image = model(*inputs())
        loss = text_sum / text / 8 + image_sum / image * 7 / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("changes", [CASES["all at once"], CASES["plain"]])
@torch.no_grad()
def test_blocks_may_be_in_16_bits(tmp_path, dp, changes):
    model = model_of(files.load([saved(tmp_path, source(dp, **changes)[1])]))
    wanted_BNK = model.logits(*inputs())[1]
    model.blocks.to(torch.bfloat16)
    found_BNK = model.logits(*inputs())[1]
    assert found_BNK.dtype == torch.float32
    torch.testing.assert_close(found_BNK, wanted_BNK, rtol=0.1, atol=0.2)


def test_a_release_without_a_text_tokenizer_is_refused(tmp_path, dp):
    imported = files.load([saved(tmp_path, source(dp)[1])])
    with pytest.raises(Exception, match="name it by --tokenizer"):
        write_release(imported, str(tmp_path / "release"))


REFUSED = {
    "no hparams": ({"hparams": None}, "no dalle.pt or vae.pt"),
    "DeepSpeed": ({"weights": "see the folder"}, "zero_to_fp32.py"),
    "vqgan": ({"vae_params": None, "vae_class_name": "VQGanVAE"}, "VQGanVAE is not read"),
    "odd weight": ({"weights": {"transformer.odd": torch.ones(1)}}, "transformer.odd: no weight"),
}


@pytest.mark.parametrize(("changes", "line"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_in_one_line(tmp_path, changes, line):
    hparams = {**DALLE, "rotary_emb": False}
    tree = {"hparams": hparams, "vae_params": VAE, "weights": {"a": torch.ones(1)}, **changes}
    with pytest.raises(CheckpointError, match=line) as caught:
        files.load([saved(tmp_path, tree)])
    assert "\n" not in str(caught.value)


def test_kinds_of_attention_that_are_not_known_are_refused(tmp_path, dp):
    _, tree = source(dp)
    tree["hparams"]["attn_types"] = ("full", "sparse")
    imported = files.load([saved(tmp_path, tree)])
    with pytest.raises(ConfigError, match="attn_types: 'sparse' is not one of"):
        model_of(imported)
