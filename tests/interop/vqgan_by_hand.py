"""A VQGAN computed from its state dict alone, by the equations: what ours is compared with.

One function for each kind of layer, named by the prefix of its weights; no modules.
"""

import math

import torch
import torch.nn.functional as F


def shapes(width=32, multiples=(1, 2), blocks=1, attention=(1,), latent=6, code=6, gumbel=False):
    """Name -> shape of every weight, as the program that trains VQGANs names them."""
    out, channels = {}, [width * m for m in multiples]

    def conv(name, before, after, side):
        out[f"{name}.weight"], out[f"{name}.bias"] = (after, before, side, side), (after,)

    def norm(name, size):
        out[f"{name}.weight"] = out[f"{name}.bias"] = (size,)

    def block(name, before, after):
        norm(f"{name}.norm1", before), conv(f"{name}.conv1", before, after, 3)
        norm(f"{name}.norm2", after), conv(f"{name}.conv2", after, after, 3)
        if before != after:
            conv(f"{name}.nin_shortcut", before, after, 1)

    def attend(name, size):
        norm(f"{name}.norm", size)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", size, size, 1)

    def side(name, first, last, ends):
        conv(f"{name}.conv_in", first, ends[0], 3), conv(f"{name}.conv_out", ends[1], last, 3)
        norm(f"{name}.norm_out", ends[1])
        for part in ("block_1", "block_2"):
            block(f"{name}.mid.{part}", channels[-1], channels[-1])
        attend(f"{name}.mid.attn_1", channels[-1])

    side("encoder", 3, latent, (width, channels[-1]))
    side("decoder", latent, 3, (channels[-1], channels[0]))
    for way, count in (("encoder.down", blocks), ("decoder.up", blocks + 1)):
        down = way == "encoder.down"
        order = range(len(channels)) if down else reversed(range(len(channels)))
        before = width if down else channels[-1]
        for level in order:
            for i in range(count):
                block(f"{way}.{level}.block.{i}", before, channels[level])
                before = channels[level]
                if level in attention:
                    attend(f"{way}.{level}.attn.{i}", before)
            if down and level < len(channels) - 1:
                conv(f"{way}.{level}.downsample.conv", before, before, 3)
            if not down and level:
                conv(f"{way}.{level}.upsample.conv", before, before, 3)
    conv("quant_conv", latent, code, 1), conv("post_quant_conv", code, latent, 1)
    if gumbel:
        conv("quantize.proj", code, 20, 1)
    out[f"quantize.{'embed' if gumbel else 'embedding'}.weight"] = (20, code)
    return out


def weights(seed=0, **kind):
    """Random weights of those shapes that keep signals alive through all layers."""
    made = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(**kind).items():
        fan_in = 1 if name.startswith("quantize.emb") else math.prod(shape[1:])
        state[name] = torch.randn(shape, generator=made) / math.sqrt(fan_in)
        if "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.2 * state[name]
        elif name.endswith("bias"):
            state[name] *= 0.1
    return state


def encode(state, pixels):
    """Images in [0, 1] to [batch, cells] codes."""
    x = _conv(state, "encoder.conv_in", 2 * pixels - 1)
    level = 0
    while f"encoder.down.{level}.block.0.conv1.weight" in state:
        x = _blocks(state, f"encoder.down.{level}", x)
        name = f"encoder.down.{level}.downsample.conv"
        if f"{name}.weight" in state:
            wide = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1)
            wide[..., :-1, :-1] = x
            x = F.conv2d(wide, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)
        level += 1
    x = _conv(state, "quant_conv", _end(state, "encoder", _middle(state, "encoder", x)))
    if "quantize.proj.weight" in state:
        return _conv(state, "quantize.proj", x).flatten(2).max(1).indices
    points = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
    gaps = (points[:, None] - state["quantize.embedding.weight"][None]).pow(2).sum(-1)
    return gaps.min(1).indices.reshape(len(x), -1)


def decode(state, codes):
    """[batch, cells] codes to images in [0, 1]."""
    side = math.isqrt(codes.shape[1])
    kind = "embed" if "quantize.embed.weight" in state else "embedding"
    rows = F.one_hot(codes, 20).float() @ state[f"quantize.{kind}.weight"]
    x = rows.transpose(1, 2).reshape(len(codes), -1, side, side)
    x = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", x))
    x = _middle(state, "decoder", x)
    levels = sorted({int(n.split(".")[2]) for n in state if n.startswith("decoder.up.")})
    for level in levels[::-1]:
        x = _blocks(state, f"decoder.up.{level}", x)
        if f"decoder.up.{level}.upsample.conv.weight" in state:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = _conv(state, f"decoder.up.{level}.upsample.conv", x)
    return (_end(state, "decoder", x) * 0.5 + 0.5).clip(0, 1)


def _conv(state, name, x):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _norm(state, name, x):
    parts = x.reshape(len(x), 32, -1)
    mean, variance = parts.mean(-1, True), parts.var(-1, unbiased=False, keepdim=True)
    flat = ((parts - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
    return flat * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def _swish(x):
    return x / (1 + torch.exp(-x))


def _end(state, side, x):
    return _conv(state, f"{side}.conv_out", _swish(_norm(state, f"{side}.norm_out", x)))


def _block(state, name, x):
    h = x
    for i in (1, 2):
        h = _conv(state, f"{name}.conv{i}", _swish(_norm(state, f"{name}.norm{i}", h)))
    return h + (
        _conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.bias" in state else x
    )


def _attend(state, name, x):
    flat = _norm(state, f"{name}.norm", x)
    q, k, v = (_conv(state, f"{name}.{part}", flat).flatten(2) for part in "qkv")
    shares = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(-1)
    return x + _conv(
        state, f"{name}.proj_out", torch.einsum("bij,bcj->bci", shares, v).reshape(x.shape)
    )


def _blocks(state, name, x):
    i = 0
    while f"{name}.block.{i}.conv1.weight" in state:
        x = _block(state, f"{name}.block.{i}", x)
        if f"{name}.attn.{i}.q.weight" in state:
            x = _attend(state, f"{name}.attn.{i}", x)
        i += 1
    return x


def _middle(state, side, x):
    x = _block(state, f"{side}.mid.block_1", x)
    return _block(state, f"{side}.mid.block_2", _attend(state, f"{side}.mid.attn_1", x))
