"""ruDALL-E computed from its state dict alone: what ours is compared with.

Masks come from loops over cells, scores are masked by multiplication, as its program does.
"""

import math

import torch


def weights(layers=5, width=8, text=4, grid=3, classes=20, codes=11, seed=0):
    """Random weights under the program's names; 129 becomes text + 1, and so on."""
    made = torch.Generator().manual_seed(seed)
    shapes = {
        "text_embeddings.weight": (classes + text, width),
        "image_embeddings.weight": (codes, width),
        "text_pos_embeddings.weight": (text + 1, width),
        "image_row_embeddings.weight": (grid, width),
        "image_col_embeddings.weight": (grid, width),
    }

    def norm(name):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def linear(name, inputs, outputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for layer in range(layers):
        name = f"transformer.layers.{layer}"
        for part in ("input_layernorm", "post_attention_layernorm"):
            norm(f"{name}.{part}")
        for part in ("before_first_addition_layernorm", "before_second_addition_layernorm"):
            norm(f"{name}.{part}")
        linear(f"{name}.attention.query_key_value", width, 3 * width)
        linear(f"{name}.attention.dense", width, width)
        linear(f"{name}.mlp.dense_h_to_4h", width, 4 * width)
        linear(f"{name}.mlp.dense_4h_to_h", 4 * width, width)
    norm("transformer.final_layernorm"), norm("to_logits.0")
    linear("to_logits.1", width, classes + text + codes)
    state = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    for name, weight in state.items():
        if "emb" not in name and weight.ndim == 2:
            weight /= math.sqrt(weight.shape[1])
    return state


def with_masks(state, version, text, grid):
    """As the program's own files, which hold its three masks."""
    kinds = {"row": "row", "col": "column", "conv": "conv"}
    return state | {
        f"transformer.{name}_mask": torch.tensor(mask(kind, version, text, grid))
        for name, kind in kinds.items()
    }


def mask(kind, version, text, grid):
    """Rows of queries, columns of keys; cells are those of the tokens at text and after."""
    size = text + grid * grid
    rows = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            (r, c), (s, d) = divmod(i - text, grid), divmod(j - text, grid)
            down, right = abs(r - s), abs(c - d)
            if version == 2:
                down, right = min(down, grid - down), min(right, grid - right)
            near = {"row": i - j <= grid, "column": c == d, "conv": max(down, right) <= 5}[kind]
            rows[i][j] = float(j < text or near)
    return rows


def logits(state, text_ids, codes, version, heads, classes):
    """(text logits, image logits) of each token of the text and of the image.

    Of version 3 the first text token has none: zeros.
    """
    text, grid = text_ids.shape[1], len(state["image_row_embeddings.weight"])
    layers = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("transformer.layers."))
    ids = text_ids.clone()
    for at in range(text):
        ids[ids[:, at] == 0, at] = classes + at
    if version == 2:
        ids = torch.cat([torch.full((len(ids), 1), 2), ids], 1)
    x = state["text_embeddings.weight"][ids] + state["text_pos_embeddings.weight"][: ids.shape[1]]
    rows, cols = state["image_row_embeddings.weight"], state["image_col_embeddings.weight"]
    cells = torch.stack([rows[n // grid] + cols[n % grid] for n in range(grid * grid)])
    x = torch.cat([x, state["image_embeddings.weight"][codes] + cells], 1)
    x = x[:, : text + grid * grid]
    for layer in range(layers):
        kind = "column" if (layer - 1) % 4 == 0 else "conv" if layer == layers - 1 else "row"
        x = _layer(state, f"transformer.layers.{layer}", x, mask(kind, version, text, grid), heads)
    x = _norm(state, "to_logits.0", _norm(state, "transformer.final_layernorm", x))
    out = _linear(state, "to_logits.1", x)
    before = text if version == 2 else text - 1  # position that predicts the first code
    image = out[:, before : before + grid * grid, classes + text :]
    first = out[:, :0] if version == 2 else torch.zeros_like(out[:, :1])
    return torch.cat([first, out[:, :before]], 1)[..., : classes + text], image


def _layer(state, name, x, rows, heads):
    h = _norm(state, f"{name}.input_layernorm", x)
    q, k, v = _linear(state, f"{name}.attention.query_key_value", h).chunk(3, -1)
    size = q.shape[-1] // heads
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = (q[..., part] / math.sqrt(size)) @ k[..., part].transpose(1, 2)
        scores = (scores / 32 - (scores / 32).amax((1, 2), keepdim=True)) * 32
        seen = torch.tensor(rows)
        scores = scores * seen - 10000.0 * (1.0 - seen)
        out.append(torch.exp(scores.log_softmax(-1)) @ v[..., part])
    a = _linear(state, f"{name}.attention.dense", torch.cat(out, -1)).clamp(-65504, 65504)
    x = x + _norm(state, f"{name}.before_first_addition_layernorm", a)
    h = _norm(state, f"{name}.post_attention_layernorm", x)
    h = _linear(state, f"{name}.mlp.dense_h_to_4h", h)
    h = 0.5 * h * (1 + torch.tanh(0.7978845608028654 * h * (1 + 0.044715 * h * h)))
    h = _linear(state, f"{name}.mlp.dense_4h_to_h", h)
    return x + _norm(state, f"{name}.before_second_addition_layernorm", h)


def _linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state, name, x):
    middle = x - x.mean(-1, keepdim=True)
    scaled = middle / (middle.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]
