"""RoPE with YaRN: position as rotation.

Coordinates are taken in neighbouring pairs, (x[0], x[1]), (x[2], x[3]) and so on, and pair i is turned by the angle
position * frequency[i]. A query and a key turned so meet at the difference of their positions, which is how attention
learns where a token stands (Su et al., arXiv 2104.09864). Only R = 64 of a head's 192 coordinates are turned.

    paper                    ours
    theta_i = b^(-2i/d)      plain_P, b = rope_theta = 50000, d = R
    YaRN's ramp, 1 - gamma   ramp_P, 0 keeps a frequency, 1 divides it by the factor

    T tokens · R rotary part of a head · P pairs, R / 2

The released weights want neighbouring pairs. Code that pairs coordinate i with i + R/2 (the half-split form, as in
Llama) must permute the weights first, or it computes another model.
"""

import math

import torch

from .config import K2Config


def rope_frequencies(config: K2Config):
    """Radians per token of each pair, float64 (P,), on the CPU. Source: YaRN, arXiv 2309.00071, section 3.2.

    Pairs that turn often inside the original window keep their frequency; pairs that turn less than once are slowed
    by the factor, so that the long context spans no angle that training never saw. With K2's beta_fast = beta_slow = 1
    the ramp between the two is a step, between pair 19 and 20; with K2.5's 32 and 1 it runs from pair 8 to pair 20.
    """
    R = config.qk_rope_head_dim
    # device="cpu" because models are also built under torch.device("meta"), where values would be lost.
    pair_P = torch.arange(R // 2, dtype=torch.float64, device="cpu")
    plain_P = config.rope_theta ** (-2 * pair_P / R)
    yarn = config.rope_scaling
    if yarn is None:
        return plain_P

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes so many full turns inside the original window."""
        return R * math.log(yarn.original_max_position_embeddings / (2 * math.pi * times)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), R - 1)
    width = high - low or 0.001  # a step needs some width to divide by
    ramp_P = ((pair_P - low) / width).clamp(0, 1)
    return plain_P * (1 - ramp_P) + plain_P / yarn.factor * ramp_P


def rope_angles(frequencies_P, start: int, tokens: int):
    """cos and sin (T, P), float64, on the CPU, for positions start ... start + tokens - 1.

    At position 131,000 a float32 angle would be off by up to 0.006 radians, which shows in the logits.
    """
    position_T = torch.arange(start, start + tokens, dtype=torch.float64, device="cpu")
    angle_TP = position_T[:, None] * frequencies_P
    return angle_TP.cos(), angle_TP.sin()


def rotate(x_TR, cos_TP, sin_TP):
    """Turn each neighbouring pair of x (..., T, R) by its angle; dtype and shape stay.

    The product is taken in float32 at least (the tables' dtype), so a bfloat16 query is rounded once and not three times.
    """
    even_TP, odd_TP = x_TR[..., 0::2], x_TR[..., 1::2]
    turned_TP2 = torch.stack((even_TP * cos_TP - odd_TP * sin_TP, even_TP * sin_TP + odd_TP * cos_TP), dim=-1)
    return turned_TP2.flatten(-2).to(x_TR.dtype)
