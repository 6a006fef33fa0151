"""minDALL-E's stage 2 computed from its state dict alone: what ours is compared with."""

import math

import torch


def weights(layers=3, width=8, text=6, grid=4, classes=40, codes=20, seed=0):
    """Random weights under the program's names."""
    made = torch.Generator().manual_seed(seed)
    shapes = {
        "tok_emb_img.weight": (codes, width),
        "tok_emb_txt.weight": (classes, width),
        "pos_emb_img.weight": (grid * grid, width),
        "pos_emb_txt.weight": (text, width),
        "head_img.weight": (codes, width),
        "head_txt.weight": (classes, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for layer in range(layers):
        for part, outputs, inputs in (
            ("ln1", width, 0), ("ln2", width, 0), ("attn.key", width, width),
            ("attn.query", width, width), ("attn.value", width, width),
            ("attn.proj", width, width), ("mlp.0", 4 * width, width), ("mlp.2", width, 4 * width),
        ):  # fmt: skip
            name = f"blocks.{layer}.{part}"
            shapes[f"{name}.weight"] = (outputs, inputs) if inputs else (outputs,)
            shapes[f"{name}.bias"] = (outputs,)
    state = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    for name, weight in state.items():
        if weight.ndim == 2 and "emb" not in name:
            weight /= math.sqrt(weight.shape[1])
    return state


def logits(state, text_ids, codes, heads):
    """(text logits of the tokens after the first, image logits of all codes)."""
    out = [_sequence(state, row, cells, heads) for row, cells in zip(text_ids, codes, strict=True)]
    return tuple(torch.stack(part) for part in zip(*out, strict=True))


def _sequence(state, ids, codes, heads):
    x = torch.cat(
        [
            state["tok_emb_txt.weight"][ids] + state["pos_emb_txt.weight"],
            state["tok_emb_img.weight"][codes] + state["pos_emb_img.weight"],
        ]
    )
    for layer in range(1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))):
        x = _layer(state, f"blocks.{layer}", x, heads)
    x = _norm(state, "ln_f", x)
    text, image = x[: len(ids) - 1], x[len(ids) - 1 : -1]
    return text @ state["head_txt.weight"].T, image @ state["head_img.weight"].T


def _layer(state, name, x, heads):
    h = _norm(state, f"{name}.ln1", x)
    q, k, v = (
        _linear(state, f"{name}.attn.{part}", h).reshape(len(x), heads, -1)
        for part in ("query", "key", "value")
    )
    rows = []
    for i in range(len(x)):
        scores = torch.einsum("hd,jhd->hj", q[i], k[: i + 1]) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), v[: i + 1]).flatten())
    x = x + _linear(state, f"{name}.attn.proj", torch.stack(rows))
    h = _linear(state, f"{name}.mlp.0", _norm(state, f"{name}.ln2", x))
    return x + _linear(state, f"{name}.mlp.2", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))


def _linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state, name, x):
    middle = x - x.mean(-1, keepdim=True)
    scaled = middle / (middle.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]
