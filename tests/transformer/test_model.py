import dataclasses
import math

import pytest
import torch
from dalle_kernels.masks import AttentionMask

from dalle_dist.config import load, preset_names
from dalle_dist.text_tokenizer.protocol import PAD
from dalle_dist.transformer.initial import initialise
from dalle_dist.transformer.layout import counted_text_targets, layer_masks, text_inputs
from dalle_dist.transformer.loss_model import LossTransformer
from dalle_dist.transformer.model import Transformer

TINY = [
    "transformer.layers=4", "transformer.width=64", "transformer.heads=1",
    "transformer.scale_embeddings=false",
    "transformer.text_tokens=6", "transformer.image_grid=4", "transformer.conv_kernel=3",
    "tokenizer.vocab_size=300", "dvae.image_size=32", "dvae.downsamplings=3",
    "dvae.codebook_size=20", "transformer.codebook_size=20", "train.checkpoint_activations=false",
]  # fmt: skip


def tiny(*overrides, dtype=torch.float32):
    torch.manual_seed(0)
    model = Transformer(load("emoji", [*TINY, *overrides])).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # the unembeddings start at zero
    return model


def batch(size=3):
    generator = torch.Generator().manual_seed(5)
    text_BT = torch.randint(2, 300, (size, 6), generator=generator)
    text_BT[0, 2:] = PAD
    text_BT[1, 5:] = PAD
    return text_BT, torch.randint(0, 20, (size, 16), generator=generator)


def test_layers_follow_the_papers_pattern():
    kinds = [mask.kind for mask in layer_masks(load("12b").transformer)]
    assert kinds[:4] == ["row", "column", "row", "row"]
    assert [i + 1 for i, kind in enumerate(kinds) if kind == "column"] == list(range(2, 63, 4))
    assert kinds[-1] == "conv" and kinds.count("conv") == 1 and kinds.count("row") == 47


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds(name):
    config = load(name)
    with torch.device("meta"):
        model = Transformer(config)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert matrices == 12 * config.transformer.layers * config.transformer.width**2


@pytest.mark.parametrize(
    ("name", "billions"), [("12b", 12.09), ("5.6b", 5.55), ("2.8b", 2.83), ("1b", 1.21)]
)
def test_parameter_counts(name, billions):
    with torch.device("meta"):
        blocks = Transformer(load(name)).blocks
    matrices = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    assert round(matrices / 1e9, 2) == billions


def test_text_layout():
    text_BT = torch.tensor([[5, 6, PAD, PAD], [5, 6, 7, 8], [PAD, PAD, PAD, PAD]])
    assert text_inputs(text_BT).tolist() == [[1, 5, 6, 0], [1, 5, 6, 7], [1, 0, 0, 0]]
    counted = counted_text_targets(text_BT).int().tolist()
    assert counted == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_a_batch_of_empty_captions_has_a_loss_of_the_image_alone():
    model = tiny()
    text_BT, codes_BN = batch()
    loss = model(torch.full_like(text_BT, PAD), codes_BN)
    total = loss.total(1 / 8)
    assert (loss.text_count, loss.text_sum) == (0, 0)
    torch.testing.assert_close(total, 7 / 8 * loss.image_sum / loss.image_count)
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.text_embedding.pad.grad.any() and not model.text_unembedding.weight.grad.any()


def slow_stream(model, text, codes):
    """Final states of one sample in fp64, straight from the weights, state by state."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    embed = lambda name, index: w[f"{name}.weight"][index]  # noqa: E731
    linear = lambda name, x: w[f"{name}.weight"] @ x + w[f"{name}.bias"]  # noqa: E731

    def norm(name, x):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    stream = []
    for t, token in enumerate([1, *text[:-1]]):  # 1 is the start of the text
        held = w["text_embedding.pad"][t] if token == PAD else embed("text_embedding.token", token)
        stream.append(held + w["text_embedding.position"][t])
    for s, code in enumerate([20, *codes[:-1]]):  # 20, after the last code, starts the image
        cell = w["image_embedding.row"][s // 4] + w["image_embedding.column"][s % 4]
        stream.append(embed("image_embedding.code", code) + cell)
    for i, kind in enumerate(["row", "column", "row", "conv"]):
        seen = AttentionMask(kind, 6, 4, kernel=3).dense()
        name = f"blocks.{i}.attention"
        qkv = [linear(f"{name}.qkv", norm(f"{name}.norm", x)).view(3, 2, 64) for x in stream]
        attended = []
        for n, x in enumerate(stream):
            keys = [m for m in range(22) if seen[n, m]]
            heads = []
            for h in range(2):
                scores = torch.stack([qkv[n][0, h] @ qkv[m][1, h] / 8 for m in keys])
                weights = scores.softmax(0)
                heads.append(sum(p * qkv[m][2, h] for p, m in zip(weights, keys, strict=True)))
            attended.append(x + linear(f"{name}.out", torch.cat(heads)))
        name = f"blocks.{i}.mlp"
        inner = [linear(f"{name}.up", norm(f"{name}.norm", x)) for x in attended]
        gelu = [x * (1 + torch.erf(x / math.sqrt(2))) / 2 for x in inner]
        w[f"{name}.down.weight"] = w[f"{name}.down.weight"].t()
        stream = [x + linear(f"{name}.down", g) for x, g in zip(attended, gelu, strict=True)]
    return torch.stack([norm("norm", x) for x in stream])


def test_states_equal_a_slow_loop_in_double():
    model = tiny("transformer.width=128", "transformer.heads=2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    text_BT, codes_BN = batch()
    states_BSW = model._stream(text_BT, codes_BN).double()
    for b in range(3):
        expected_SW = slow_stream(model, text_BT[b].tolist(), codes_BN[b].tolist())
        torch.testing.assert_close(states_BSW[b], expected_SW, rtol=1e-4, atol=1e-4)


def test_loss_equals_a_slow_loop_in_double():
    model = tiny(dtype=torch.double)
    text_BT, codes_BN = batch()
    loss = model(text_BT, codes_BN)
    text_logits, image_logits = model.logits(text_BT, codes_BN)
    text, image, counted = 0.0, 0.0, 0
    for b in range(3):
        for t in range(6):
            if t == 0 or text_BT[b, t - 1] != PAD:
                logits = text_logits[b, t].double()
                text += torch.logsumexp(logits, 0) - logits[text_BT[b, t]]
                counted += 1
        for n in range(16):
            logits = image_logits[b, n].double()
            image += torch.logsumexp(logits, 0) - logits[codes_BN[b, n]]
    assert (int(loss.text_count), int(loss.image_count)) == (counted, 48) == (3 + 6 + 6, 48)
    torch.testing.assert_close(loss.text_sum.double(), text, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.image_sum.double(), image, rtol=1e-5, atol=0)
    expected = text / counted / 8 + 7 / 8 * image / 48
    torch.testing.assert_close(loss.total(1 / 8).double(), expected, rtol=1e-5, atol=0)


def test_first_loss_is_that_of_uniform_predictions():
    model = Transformer(load("emoji", TINY))
    loss = model(*batch())
    assert (loss.text_sum / loss.text_count).item() == pytest.approx(math.log(300))
    assert (loss.image_sum / loss.image_count).item() == pytest.approx(math.log(20))


@pytest.mark.parametrize("variant", ["paper", "clamp", "torus", "dalle-pytorch"])
@pytest.mark.parametrize("kind", ["row", "column", "conv", "causal"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_changing_a_token_leaves_all_positions_before_it_bit_for_bit(
    kind, variant, backend, monkeypatch
):
    if (kind, backend) == ("causal", "cpu"):
        backend = "reference"
    model = tiny(f"transformer.mask_variant={variant}")
    for layer in model.blocks:
        layer.attention.mask = AttentionMask(kind, 6, 4, variant, kernel=3)
    from dalle_dist.transformer import blocks

    attention = blocks.sparse_attention
    monkeypatch.setattr(blocks, "sparse_attention", lambda q, m: attention(q, m, backend))
    text_BT, codes_BN = batch()
    text_BT = text_BT.masked_fill(text_BT == PAD, 9)
    text, image = model.logits(text_BT, codes_BN)
    for j in range(6):
        changed = text_BT.clone()
        changed[:, j] += 1
        other, other_image = model.logits(changed, codes_BN)
        assert other[:, : j + 1].equal(text[:, : j + 1])
        assert j == 5 or not other[:, j + 1].equal(text[:, j + 1])
        assert not other_image[:, 0].equal(image[:, 0]) or j == 5
    for j in range(15):
        changed = codes_BN.clone()
        changed[:, j] = (changed[:, j] + 1) % 20
        other_text, other = model.logits(text_BT, changed)
        assert other_text.equal(text)
        assert other[:, : j + 1].equal(image[:, : j + 1])
        assert not other[:, j + 1].equal(image[:, j + 1])


def test_each_position_has_its_own_pad():
    model = tiny()
    text_BT, codes_BN = batch()
    before = model.logits(text_BT, codes_BN)[1]
    with torch.no_grad():
        model.text_embedding.pad[5] += 1
    after = model.logits(text_BT, codes_BN)[1]
    assert not after[0].equal(before[0]), "caption 0 holds a pad at position 5"
    assert after[2].equal(before[2]), "caption 2 is as long as the text block"


def test_checkpointed_activations_change_nothing():
    text_BT, codes_BN = batch()
    grads = []
    for flag in ("false", "true"):
        model = tiny(f"train.checkpoint_activations={flag}")
        model(text_BT, codes_BN).total(1 / 8).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("flag", "passes"), [("false", 1), ("true", 2)])
def test_checkpointing_recomputes_each_layer_in_training_alone(flag, passes):
    model = tiny(f"train.checkpoint_activations={flag}")
    calls = []
    model.blocks[1].mlp.up.register_forward_hook(lambda *_: calls.append(1))
    model(*batch()).total(1 / 8).backward()
    assert len(calls) == passes
    model.eval()(*batch()).total(1 / 8).backward()
    assert len(calls) == passes + 1


def test_outputs_into_the_stream_start_smaller_with_depth():
    layer = Transformer(load("emoji", [*TINY, "transformer.layers=8"])).blocks[3]
    deviations = [m.weight.std().item() for m in (layer.attention.qkv, layer.attention.out)]
    deviations += [m.weight.std().item() for m in (layer.mlp.up, layer.mlp.down)]
    assert deviations == pytest.approx([1 / 16, 1 / 64, 1 / 16, 1 / 128], rel=0.05)


def test_bf16_keeps_the_stream_and_logits_in_fp32():
    model = tiny().bfloat16()
    text_BT, codes_BN = batch()
    streams = []
    for layer in model.blocks:
        for block in (layer.attention, layer.mlp):
            block.register_forward_hook(lambda *arguments: streams.append(arguments[-1].dtype))
    loss = model(text_BT, codes_BN)
    assert set(streams) == {torch.float32}
    assert all(getattr(loss, f.name).dtype == torch.float32 for f in dataclasses.fields(loss))
    exact = tiny()(text_BT, codes_BN).total(0.5)
    assert loss.total(0.5).item() == pytest.approx(exact.item(), rel=0.05)


def test_a_tiny_model_learns_a_batch_by_heart():
    model = tiny()
    initialise(model, model.initials(), seed=0)
    text_BT, codes_BN = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(text_BT, codes_BN).total(1 / 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def _wrong(name, tensor, message):
    text_BT, codes_BN = batch()
    return ({"text": text_BT, "codes": codes_BN} | {name: tensor(text_BT, codes_BN)}, message)


SHAPES = [
    _wrong("text", lambda t, c: t[:, :1], r"text: shape \(3, 1\) is not \[B, 6\]; tokenizer\."),
    _wrong("text", lambda t, c: t[0], r"text: shape \(6,\) is not \[B, 6\]"),
    _wrong("text", lambda t, c: t.int(), r"text: dtype torch\.int32 is not int64; use text\.long"),
    _wrong("text", lambda t, c: t.tolist(), "text: list is not a tensor"),
    _wrong("codes", lambda t, c: c[:, :15], r"codes: shape \(3, 15\) is not \[B, 16\]; image"),
    _wrong("codes", lambda t, c: c.view(3, 4, 4), r"codes: shape \(3, 4, 4\) is not \[B, 16\]"),
    _wrong("codes", lambda t, c: c.float(), r"codes: dtype torch\.float32 is not int64"),
    _wrong("codes", lambda t, c: c[:1], "codes: 1 rows, but text has 3"),
]


@pytest.mark.parametrize(("inputs", "message"), SHAPES)
def test_inputs_of_another_shape_or_dtype_are_refused(inputs, message):
    model = tiny()
    for entry in (model, model.logits):
        with pytest.raises(ValueError, match=message):
            entry(inputs["text"], inputs["codes"])
    if message.startswith("text"):
        with pytest.raises(ValueError, match=message):
            model.prefill(inputs["text"], [1, 1, 1])


@pytest.mark.parametrize(("name", "value", "most"), [("text", 300, 299), ("codes", 20, 19)])
def test_ids_outside_the_vocabulary_are_refused_outside_training(name, value, most):
    text_BT, codes_BN = batch()
    {"text": text_BT, "codes": codes_BN}[name][0, 0] = value
    with pytest.raises(ValueError, match=rf"{name}: values from \d+ to {value} .* 0 to {most}"):
        tiny().logits(text_BT, codes_BN)
    if name == "text":
        with pytest.raises(ValueError, match=f"to {value} are not in 0 to {most}"):
            tiny().prefill(text_BT, [1, 1, 1])


def test_what_is_seen_is_embedded_and_what_is_true_is_the_target():
    model = LossTransformer(tiny().config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    text_BT, codes_BN = batch()
    seen_BN = codes_BN.clone()
    seen_BN[0, 5] = (seen_BN[0, 5] + 1) % model.config.transformer.codebook_size
    own = model.predictions(text_BT, codes_BN)[1]
    noisy = model.predictions(text_BT, codes_BN, seen_BN)[1]
    assert torch.equal(noisy[1], own[1])
    changed_BN = (noisy[0] != own[0]).any(dim=-1).unflatten(0, codes_BN.shape)
    assert changed_BN[0, 6] and not changed_BN[0, :6].any() and not changed_BN[1:].any()
    assert not torch.equal(model(text_BT, codes_BN, seen_BN)[2], model(text_BT, codes_BN)[2])
    torch.testing.assert_close(model(text_BT, codes_BN, codes_BN), model(text_BT, codes_BN))


def test_scaled_embeddings_are_those_of_a_model_whose_embeddings_are_larger():
    model, scaled = tiny(), tiny("transformer.scale_embeddings=true")
    with torch.no_grad():
        for embedding in (model.text_embedding, model.image_embedding):
            for parameter in embedding.parameters():
                parameter.mul_(64**0.5)
    text_BT, codes_BN = batch()
    expected = model.logits(text_BT, codes_BN)
    torch.testing.assert_close(scaled.logits(text_BT, codes_BN), expected)
    caches = scaled.prefill(text_BT, [1, 1, 1])
    held_B = torch.full((3,), scaled.image_embedding.start)
    for position in range(3):
        logits_BK = scaled.step(held_B[:, None], caches, position)[:, 0]
        torch.testing.assert_close(logits_BK, expected[1][:, position])
        held_B = codes_BN[:, position]
