"""Samples of token shards, and what is random in them."""

import io
import json

import numpy as np
import pytest
import torch

from dalle_dist.data.order import SampleOrder
from dalle_dist.data.shards import ShardWriter
from dalle_dist.data.token_dataset import TokenDataset, TokenNoise, collate_tokens
from dalle_dist.errors import DataError
from dalle_dist.text_tokenizer.bpe import PAD, train_tokenizer

GRID = 2
META = {"image_tokenizer": "aa", "grid": GRID, "codebook_size": 100_000}


def _write_tokens(folder, captions):
    with ShardWriter(str(folder), "tokens", META) as writer:
        for i, caption in enumerate(captions):
            buffer = io.BytesIO()
            np.save(buffer, np.arange(i, i + GRID**2, dtype=np.uint16))
            about = json.dumps({"source": str(i)}).encode()
            writer.write(
                f"{i:03d}", {"npy": buffer.getvalue(), "txt": caption.encode(), "json": about}
            )
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red heart", "a blue heart", "one two three"], 300)


def test_token_samples(tmp_path, tokenizer):
    captions = ["a red heart", "one two three", ""]
    dataset = TokenDataset(_write_tokens(tmp_path / "t", captions), None, tokenizer, 12, "aa", GRID)
    text_BT, codes_BN, seen_BN = collate_tokens([dataset[i] for i in range(3)])
    assert text_BT.dtype == codes_BN.dtype == torch.int64
    assert torch.equal(seen_BN, codes_BN)
    assert codes_BN.tolist() == [[i, i + 1, i + 2, i + 3] for i in range(3)]
    for row, caption in zip(text_BT.tolist(), captions, strict=True):
        ids = tokenizer.encode(caption)
        assert row == ids + [PAD] * (12 - len(ids))
    assert dataset.key(1) == "001"


def test_captions_long_or_empty_have_the_length_of_the_text_block(tmp_path, tokenizer):
    captions = ["a red heart " * 5, "a", " "]
    dataset = TokenDataset(_write_tokens(tmp_path / "t", captions), None, tokenizer, 4, "aa", GRID)
    long, short, empty = (dataset[i][0].tolist() for i in range(3))
    assert long == tokenizer.encode(captions[0])[:4] and len(tokenizer.encode(captions[0])) > 4
    assert len(short) == len(empty) == 4 and short[-1] == empty[-1] == PAD


def test_dropout_differs_between_epochs_and_is_reproducible(tmp_path, tokenizer):
    folder = _write_tokens(tmp_path / "t", ["one two three a red heart"])

    def epochs():
        order = SampleOrder(0, [1], 1, 1)
        noise = TokenNoise(bpe_dropout=0.3)
        dataset = TokenDataset(folder, order, tokenizer, 30, "aa", GRID, noise=noise)
        return [dataset[p][0].tolist() for p in range(8)]

    assert epochs() == epochs()
    assert len({tuple(ids) for ids in epochs()}) > 3


def _texts(folder, tokenizer, samples, caption_dropout, bpe_dropout=0.3, seed=0):
    """Two epochs of rows, by position."""
    order = SampleOrder(0, [samples], 1, 1)
    dataset = TokenDataset(
        folder,
        order,
        tokenizer,
        30,
        "aa",
        GRID,
        seed=seed,
        noise=TokenNoise(bpe_dropout, caption_dropout),
    )
    return {p: dataset[p][0].tolist() for p in reversed(range(2 * samples))}


def test_a_dropped_caption_is_all_pads_and_the_others_are_as_without_dropout(tmp_path, tokenizer):
    folder = _write_tokens(tmp_path / "t", ["one two three a red heart"] * 200)
    kept, some = (_texts(folder, tokenizer, 200, share) for share in (0.0, 0.3))
    dropped = {p for p, row in some.items() if row == [PAD] * 30}
    assert 90 <= len(dropped) <= 150
    assert not any(row == [PAD] * 30 for row in kept.values())
    assert {p: row for p, row in some.items() if p not in dropped} == {
        p: row for p, row in kept.items() if p not in dropped
    }
    # Other samples in the second epoch.
    order = SampleOrder(0, [200], 1, 1)
    first, second = (
        {order.at(p).number for p in dropped if order.at(p).epoch == epoch} for epoch in (0, 1)
    )
    assert first != second


def test_which_captions_are_dropped_depends_on_the_seed_not_on_bpe_dropout(tmp_path, tokenizer):
    folder = _write_tokens(tmp_path / "t", ["a red heart"] * 100)

    def dropped(bpe_dropout, seed):
        texts = _texts(folder, tokenizer, 100, 0.3, bpe_dropout, seed)
        return {p for p, row in texts.items() if row[0] == PAD}

    assert dropped(0.0, 0) == dropped(0.3, 0) != dropped(0.3, 1)


@pytest.mark.parametrize(
    ("fingerprint", "grid", "message"),
    [
        ("bb", GRID, "tokens of image tokenizer aa, but the run's is bb"),
        ("aa", 4, "tokens of grid 2, but"),
    ],
)
def test_tokens_of_another_dvae_are_refused(tmp_path, tokenizer, fingerprint, grid, message):
    folder = _write_tokens(tmp_path / "t", ["a"])
    with pytest.raises(DataError, match=message):
        TokenDataset(folder, None, tokenizer, 8, fingerprint, grid)


def _samples(folder, tokenizer, count, noise, seed=0):
    """Two epochs, by position."""
    order = SampleOrder(0, [count], 1, 1)
    dataset = TokenDataset(folder, order, tokenizer, 30, "aa", GRID, seed=seed, noise=noise)
    return {p: dataset[p] for p in reversed(range(2 * count))}


def _replaced(samples):
    return {p: (sample.seen != sample.codes).tolist() for p, sample in samples.items()}


def test_image_noise_replaces_up_to_its_share_of_what_the_model_sees(tmp_path, tokenizer):
    folder = _write_tokens(tmp_path / "t", ["a red heart"] * 500)
    clean = _samples(folder, tokenizer, 500, TokenNoise())
    noisy = _samples(folder, tokenizer, 500, TokenNoise(image_noise=0.8))
    for p, sample in noisy.items():
        assert torch.equal(sample.codes, clean[p].codes) and torch.equal(sample.text, clean[p].text)
    replaced = torch.tensor(list(_replaced(noisy).values())).double()
    assert replaced.mean() == pytest.approx(0.4, abs=0.03)
    # Uniform shares s of 0 to 0.8: all 4 tokens are kept with the mean of (1 - s)^4 over them.
    kept = (replaced.sum(dim=1) == 0).double().mean()
    assert kept == pytest.approx((1 - 0.2**5) / 5 / 0.8, abs=0.04)
    wrong = torch.cat([s.seen[s.seen != s.codes] for s in noisy.values()])
    assert 0 <= wrong.min() < 1_000 and 99_000 < wrong.max() < META["codebook_size"]


def test_image_noise_depends_on_seed_and_epoch_and_on_no_other_noise(tmp_path, tokenizer):
    folder = _write_tokens(tmp_path / "t", ["a red heart"] * 50)
    noise = TokenNoise(image_noise=1.0)
    first = _replaced(_samples(folder, tokenizer, 50, noise))
    assert first == _replaced(_samples(folder, tokenizer, 50, noise))
    assert first == _replaced(_samples(folder, tokenizer, 50, TokenNoise(0.5, 0.5, 1.0)))
    assert first != _replaced(_samples(folder, tokenizer, 50, noise, seed=1))
    order = SampleOrder(0, [50], 1, 1)
    by_epoch = [{order.at(p)[1]: first[p] for p in first if p // 50 == e} for e in (0, 1)]
    assert by_epoch[0] != by_epoch[1]


def test_of_several_crops_each_epoch_draws_one(tmp_path, tokenizer):
    samples, crops, epochs = 40, 3, 30
    with ShardWriter(str(tmp_path), "tokens", META | {"crops": crops}) as writer:
        for i in range(samples):
            buffer = io.BytesIO()
            numbers = (10 * i + np.arange(crops)).astype(np.uint16)
            np.save(buffer, np.repeat(numbers[:, None], GRID**2, axis=1))
            writer.write(f"{i:03d}", {"npy": buffer.getvalue(), "txt": b"a"})
    order = SampleOrder(0, [samples], 4, 1)
    dataset = TokenDataset(str(tmp_path), order, tokenizer, 8, "aa", GRID)
    seen = [divmod(int(dataset[p].codes[0]), 10) for p in range(epochs * samples)]
    assert seen == [divmod(int(dataset[p].codes[0]), 10) for p in range(epochs * samples)]
    for i in range(samples):
        drawn = [crop for sample, crop in seen if sample == i]
        assert len(drawn) == epochs and set(drawn) == {0, 1, 2}
    shares = [sum(crop == wanted for _, crop in seen) / len(seen) for wanted in range(crops)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)
