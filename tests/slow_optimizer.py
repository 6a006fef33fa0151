"""The 16-bit formats and AdamW once more, one number at a time, for tests to compare with."""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import lru_cache

import numpy as np

MANTISSA = {"1-6-9": 9, "0-6-10": 10}


@lru_cache
def magnitudes(fmt):
    """Values of the words without a sign, in their order: word 0 is 0."""
    ulps = 1 << MANTISSA[fmt]
    words = [
        Fraction(ulps + fraction, ulps) * Fraction(2) ** (exponent - 60)
        for exponent in range(64)
        for fraction in range(ulps)
    ]
    return [Fraction(0), *words[1:]]


def slow_unpack(word, fmt):
    """The float of one word."""
    negative = fmt == "1-6-9" and word >= 1 << 15
    value = float(magnitudes(fmt)[word - (1 << 15) if negative else word])
    return -value if negative else value


def slow_pack(x, fmt):
    """The word of one float: the nearest value's, halves away from zero."""
    table, sign = magnitudes(fmt), 0
    if math.isnan(x):
        return len(table) - 1
    if math.copysign(1, x) < 0:
        if fmt == "0-6-10":
            return 0
        x, sign = -x, 1 << 15
    if x == 0:
        return sign
    if x >= table[-1]:
        return sign + len(table) - 1
    if x < table[1]:
        return 0
    above = bisect_left(table, x)
    nearer = x - table[above - 1] < table[above] - Fraction(x)
    return sign + above - nearer


def slow_adamw(p, g, m, v, step, group):
    """(p, m, v) after one step, in numpy's fp32, every operation rounded by itself.

    m and v may be words; `group` is an optimizer's group of options.
    """
    f, packed = np.float32, m.dtype == np.uint16
    beta1, beta2 = group["betas"]
    if packed:
        m = np.array([slow_unpack(int(word), "1-6-9") for word in m], f)
        v = np.array([slow_unpack(int(word), "0-6-10") for word in v], f)
    m = m * f(beta1) + g * f(1 - beta1)
    v = v * f(beta2) + g * g * f(1 - beta2)
    if group["variance_clip"]:
        v = np.minimum(v, f(group["variance_clip"]))
    root, size = 1 / math.sqrt(1 - beta2**step), group["lr"] / (1 - beta1**step)
    moved = m / (np.sqrt(v) * f(root) + f(group["eps"])) * f(size)
    p = p * f(1 - group["lr"] * group["weight_decay"]) - moved
    if packed:
        m = np.array([slow_pack(float(x), "1-6-9") for x in m], np.uint16)
        v = np.array([slow_pack(float(x), "0-6-10") for x in v], np.uint16)
    return p, m, v
