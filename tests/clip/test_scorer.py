"""CLIPScorer: what it says of a CLIP, and which folders it refuses."""

import json
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_clip import make_clip
from torch.nn.functional import normalize
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dalle_dist import storage
from dalle_dist.checkpoint.formats import load_tensors, save_tensors
from dalle_dist.clip.captions import caption_ids
from dalle_dist.clip.model import end_of_text
from dalle_dist.clip.scorer import CLIPScorer
from dalle_dist.errors import CheckpointError, UserError
from dalle_dist.text_tokenizer.bpe import Tokenizer

CAPTIONS = [
    "red heart", "Red  HEART", "", "u\u0308ber <pad> <start> <end>", "\u0130stanbul \U0001f600",
    "a caption that goes on and on and on, for ever and ever, until it is cut",
]  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip


def picture(width=16, height=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def doubled(image):
    """Each pixel as four: a mean of them is exact, whatever is rounded on the way."""
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


SMALL_PICTURES = [picture(8, 8, seed) for seed in range(5)]
PICTURES = [doubled(image) for image in SMALL_PICTURES]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, the CLIP in memory, its release folder)."""
    return make_clip(tmp_path_factory.mktemp("clip"), CAPTIONS)


@pytest.fixture
def scorer(made):
    return CLIPScorer.load(made[2])


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[2], tmp_path / "copy")


def test_a_release_gives_the_features_of_the_clip_that_was_trained(made, scorer):
    config, clip, _, digest = made
    assert scorer.fingerprint == digest
    tokenizer = Tokenizer.load(config.paths.tokenizer)
    ids = [caption_ids(tokenizer, caption, 12, end_of_text(config)) for caption in CAPTIONS]
    small_BHWC = torch.from_numpy(np.stack([np.asarray(image) for image in SMALL_PICTURES]))
    images_BCHW = small_BHWC.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        image_BD, text_BD = clip.images(images_BCHW), clip.captions(torch.tensor(ids))
    torch.testing.assert_close(scorer.text_features(CAPTIONS), text_BD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scorer.image_features(PICTURES), image_BD, rtol=1e-5, atol=1e-6)
    score_B = scorer.score(PICTURES, CAPTIONS[:5])
    torch.testing.assert_close(score_B, (image_BD * text_BD[:5]).sum(1), rtol=1e-5, atol=1e-6)


def test_transformers_loads_a_release_as_it_is(made):
    config, clip, folder, _ = made
    model, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = Tokenizer.load(config.paths.tokenizer)
    expected = [caption_ids(ours, caption, 12, end_of_text(config)) for caption in CAPTIONS]
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        tokenizer = kind.from_pretrained(folder)
        # Length, padding and end are the files' own.
        ids = tokenizer(CAPTIONS, padding=True, truncation=True, return_tensors="pt").input_ids
        assert ids.tolist() == expected
    with torch.no_grad():
        found = model.get_text_features(ids)
        text_BD = getattr(found, "pooler_output", found)
        torch.testing.assert_close(normalize(text_BD, dim=-1), clip.captions(ids))


def test_the_batch_size_does_not_matter_and_features_have_length_1(made, scorer):
    single = CLIPScorer.load(made[2], batch=2)
    torch.testing.assert_close(
        scorer.image_features(PICTURES), single.image_features(PICTURES), rtol=1e-5, atol=1e-6
    )
    text_BD = single.text_features(CAPTIONS)
    torch.testing.assert_close(scorer.text_features(CAPTIONS), text_BD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(text_BD.norm(dim=1), torch.ones(6))
    assert text_BD.dtype == torch.float32
    assert scorer.image_features([]).shape == scorer.text_features([]).shape == (0, 12)
    with pytest.raises(ValueError, match="5 images and 4 captions"):
        scorer.score(PICTURES, CAPTIONS[:4])


def seen(scorer, image):
    """The pixels that the image encoder is given: CHW."""
    given = []
    handle = scorer._model.vision_model.embeddings.patch_embedding.register_forward_hook(
        lambda _, inputs, __: given.append(inputs[0])
    )
    scorer.image_features([image])
    handle.remove()
    return given[0][0]


def test_images_are_resized_cropped_and_normalised_as_the_folder_says(copy):
    path = copy / "preprocessor_config.json"
    mean, std = [0.5, 0.25, 0.0], [0.5, 0.25, 2.0]
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"image_mean": mean, "image_std": std})
    )
    small = picture(12, 8)
    middle_HWC = np.asarray(small).astype(float)[:, 2:10]
    expected_HWC = (middle_HWC / 255 - np.array(mean)) / np.array(std)
    found_CHW = seen(CLIPScorer.load(copy), doubled(small))
    torch.testing.assert_close(
        found_CHW.permute(1, 2, 0).double(), torch.from_numpy(expected_HWC), rtol=1e-5, atol=1e-5
    )


def test_the_filter_and_old_sizes_of_one_number_count(copy):
    """As in the files of the first published CLIPs."""
    path = copy / "preprocessor_config.json"
    old = {"do_resize": True, "size": 8, "resample": 3, "do_center_crop": True, "crop_size": 8,
           "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
           "feature_extractor_type": "CLIPFeatureExtractor"}  # fmt: skip
    path.write_text(json.dumps(old))
    image = picture(24, 16)
    bicubic = image.resize((12, 8), Image.Resampling.BICUBIC).crop((2, 0, 10, 8))
    expected_HWC = torch.from_numpy(np.asarray(bicubic) / 255.0 * 2 - 1).float()
    torch.testing.assert_close(seen(CLIPScorer.load(copy), image).permute(1, 2, 0), expected_HWC)


def test_transparent_grey_and_palette_images_are_taken(scorer):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    kinds = [clear, Image.new("L", (8, 8), 255), Image.new("RGB", (8, 8), "white").convert("P")]
    white_BD = scorer.image_features([Image.new("RGB", (8, 8), "white")] * 3)
    assert torch.equal(scorer.image_features(kinds), white_BD)


@pytest.fixture
def foreign(tmp_path):
    """A CLIP as `transformers` itself writes one, with the tokenizer and end of the first ones."""
    folder = tmp_path / "foreign"
    words = ["<|startoftext|>", "<|endoftext|>"]
    letters = [*"abcdehorty", *(f"{c}</w>" for c in "abcdehorty")]
    vocab = {word: i for i, word in enumerate([*letters, "re", "red</w>", *words])}
    (folder).mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    text = SMALL | {"vocab_size": len(vocab), "max_position_embeddings": 9, "eos_token_id": 2}
    image = SMALL | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=6)
    transformers.CLIPModel(config).save_pretrained(folder, max_shard_size=20_000)
    size = {"height": 8, "width": 8}
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size).save_pretrained(folder)
    return folder


def test_any_clip_is_scored_as_transformers_does(foreign):
    """Its weights are in parts; its end is found as the highest id."""
    assert len(list(foreign.glob("model-*.safetensors"))) > 1
    model = transformers.CLIPModel.from_pretrained(foreign)
    tokenizer = transformers.AutoTokenizer.from_pretrained(foreign)
    captions = ["red", "a hot dot", "Red red the rat tore a robe to the door of the barrack"]
    ids = tokenizer(captions, padding=True, truncation=True, max_length=9, return_tensors="pt")
    images = [picture(13, 9), picture(8, 20), picture(4, 4)]
    pixels = CLIPImageProcessorPil.from_pretrained(foreign)(images, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**ids, **pixels)
    scorer = CLIPScorer.load(foreign)
    torch.testing.assert_close(scorer.image_features(images), outputs.image_embeds)
    torch.testing.assert_close(scorer.text_features(captions), outputs.text_embeds)


def assert_refused(folder, match):
    with pytest.raises(CheckpointError, match=match) as error:
        CLIPScorer.load(folder)
    assert "\n" not in str(error.value)


def test_what_is_no_whole_clip_is_refused_in_one_line(copy, tmp_path):
    assert_refused(tmp_path / "nowhere", "no CLIP .config.json is missing")
    (tmp_path / "run").mkdir()
    shutil.copytree(copy, tmp_path / "run/release")
    assert_refused(tmp_path / "run", "did you mean .*/run/release")
    whole = (copy / "config.json").read_text()
    (copy / "config.json").write_text(json.dumps(json.loads(whole) | {"model_type": "bert"}))
    assert_refused(copy, "model_type 'bert', not of a CLIP")
    (copy / "config.json").write_text("{")
    assert_refused(copy, "not a whole CLIP")
    (copy / "config.json").write_text(json.dumps(json.loads(whole) | {"projection_dim": 13}))
    assert_refused(copy, "2 tensors do not fit its config")
    (copy / "config.json").write_text(whole)
    for name in ("preprocessor_config.json", "tokenizer.json"):
        (copy / name).rename(copy / "aside")
        assert_refused(copy, "no CLIP|not a whole CLIP")
        (copy / "aside").rename(copy / name)
    assert CLIPScorer.load(copy).fingerprint


def test_weights_that_lack_a_tensor_or_are_damaged_are_refused(copy):
    path = copy / "model.safetensors"
    state = load_tensors(path)
    state.pop("text_projection.weight")
    save_tensors(path, state)
    assert_refused(copy, "text_projection.weight")
    path.write_bytes(path.read_bytes()[:500])
    assert_refused(copy, "not a whole safetensors file")


def test_a_pickle_is_not_opened(copy):
    (copy / "model.safetensors").unlink()
    assert_refused(copy, "model.safetensors is missing")
    (copy / "pytorch_model.bin").write_bytes(b"anything")
    assert_refused(copy, "is a pickle.*convert it.*save_pretrained")


def test_code_of_the_folder_is_not_run(copy):
    """Nor is it asked for."""
    (copy / "evil.py").write_text("raise SystemExit('run')")
    for name, entry in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        tree = json.loads((copy / name).read_text())
        tree["auto_map"] = {entry: "evil.Evil"}
        (copy / name).write_text(json.dumps(tree))
    assert CLIPScorer.load(copy).text_features(["red"]).shape == (1, 12)


def test_nothing_is_asked_of_the_network_nor_of_torchvision(made, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert CLIPScorer.load(made[2]).score(PICTURES, CAPTIONS[:5]).shape == (5,)


def test_without_transformers_one_line_says_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'dalle-dist\[clip\]'"):
        CLIPScorer.load(made[2])


def test_random_numbers_go_on_as_if_nothing_was_loaded(made):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    CLIPScorer.load(made[2])
    assert torch.rand(1) == expected


def test_a_clip_on_s3_is_scored_from_the_cache(made, scorer, bucket):
    for name in storage.list_files(str(made[2])):
        storage.write_bytes(f"{bucket}/clips/a/{name}", (made[2] / name).read_bytes())
    storage.write_bytes(f"{bucket}/clips/a/pytorch_model.bin", b"a pickle that nobody needs")
    remote = CLIPScorer.load(f"{bucket}/clips/a")
    assert remote.fingerprint == scorer.fingerprint
    assert torch.equal(remote.text_features(CAPTIONS), scorer.text_features(CAPTIONS))
    cached = [path.name for path in storage.cache_folder().rglob("*")]
    assert not [name for name in cached if name.endswith("pytorch_model.bin")]
    assert_refused(f"{bucket}/clips/b", "no CLIP")
