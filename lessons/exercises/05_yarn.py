"""By how much does YaRN slow each rotary pair?

Complete `answer(R, theta, window, factor, beta_fast, beta_slow)`: a list of R / 2 numbers, the plain frequency of a pair
divided by its frequency under YaRN (1 where it is kept, `factor` where it is fully slowed).

    the pair that makes b full turns inside the window:  R ln(window / (2 pi b)) / (2 ln theta)
    low, high = that for beta_fast rounded down (at least 0), that for beta_slow rounded up (at most R - 1)
    ramp of pair i = (i - low) / (high - low), cut to 0 ... 1;  where high = low take 0.001 for high - low
    frequency = plain x (1 - ramp) + plain / factor x ramp
"""

import math


def stub(R, theta, window, factor, beta_fast, beta_slow):
    """A list of R // 2 floats."""
    raise NotImplementedError


def check(answer):
    def compare(found, expected, what):
        assert len(found) == len(expected), f"{what}: expected a number for each of {len(expected)} pairs, found {len(found)}"
        for i, (f, e) in enumerate(zip(found, expected)):
            if not math.isclose(f, e, rel_tol=1e-6):
                yield i, f, e

    k2 = [1.0] * 20 + [32.0] * 12
    wrong = list(compare(answer(64, 50000.0, 4096, 32.0, 1.0, 1.0), k2, "K2"))
    if wrong:
        i, f, e = wrong[0]
        assert not (i == 0 and math.isclose(f, 32)), "K2: pair 0 turns 652 times in training and is slowed; the fast pairs are the ones to keep"
        raise AssertionError(f"K2: pair {i} is slowed by {f:.4g}, expected {e:g}. Its step lies between pair 19 and 20: is the 2 pi there, is low rounded down and high rounded up?")
    k25 = solution(64, 50000.0, 4096, 64.0, 32.0, 1.0)
    wrong = list(compare(answer(64, 50000.0, 4096, 64.0, 32.0, 1.0), k25, "K2.5"))
    if wrong:
        i, f, e = wrong[0]
        straight = 1 + 63 * (i - 8) / 12
        assert not math.isclose(f, straight, rel_tol=1e-3), f"K2.5: pair {i} slowed by {f:.4g}, expected {e:.4g}: the ramp blends the two frequencies; you blended the factors"
        raise AssertionError(f"K2.5 (beta 32 and 1, factor 64): pair {i} is slowed by {f:.4g}, expected {e:.4g}; low is 8 and high is 20")
    for arguments in ((12, 100.0, 16, 32.0, 1.0, 1.0), (16, 50000.0, 256, 4.0, 1.0, 1.0), (8, 10000.0, 8, 4.0, 32.0, 1.0)):
        wrong = list(compare(answer(*arguments), solution(*arguments), f"{arguments}"))
        assert not wrong, f"R, theta, window, factor, betas = {arguments}: pair {wrong[0][0]} is slowed by {wrong[0][1]:.4g}, expected {wrong[0][2]:.4g}. Is low kept at 0 or above?"


HINT = """Write turns(b) = R * math.log(window / (2 * math.pi * b)) / (2 * math.log(theta)) first. The plain frequency cancels: a
pair is slowed by 1 / ((1 - ramp) + ramp / factor)."""


def solution(R, theta, window, factor, beta_fast, beta_slow):
    def turns(b):
        return R * math.log(window / (2 * math.pi * b)) / (2 * math.log(theta))

    low, high = max(math.floor(turns(beta_fast)), 0), min(math.ceil(turns(beta_slow)), R - 1)
    ramps = [min(max((i - low) / (high - low or 0.001), 0), 1) for i in range(R // 2)]
    return [1 / ((1 - ramp) + ramp / factor) for ramp in ramps]


def reversed_ramp(R, theta, window, factor, beta_fast, beta_slow):
    return [factor / s if s in (1.0, factor) else s for s in solution(R, theta, window, factor, beta_fast, beta_slow)]


def factors_blended(R, theta, window, factor, beta_fast, beta_slow):
    slowed = solution(R, theta, window, factor, beta_fast, beta_slow)
    ramps = [(1 - 1 / s) / (1 - 1 / factor) for s in slowed]
    return [1 + ramp * (factor - 1) for ramp in ramps]


def no_two_pi(R, theta, window, factor, beta_fast, beta_slow):
    return solution(R, theta, window * 2 * math.pi, factor, beta_fast, beta_slow)


def low_below_zero(R, theta, window, factor, beta_fast, beta_slow):
    def turns(b):
        return R * math.log(window / (2 * math.pi * b)) / (2 * math.log(theta))

    low, high = math.floor(turns(beta_fast)), min(math.ceil(turns(beta_slow)), R - 1)
    ramps = [min(max((i - low) / (high - low or 0.001), 0), 1) for i in range(R // 2)]
    return [1 / ((1 - ramp) + ramp / factor) for ramp in ramps]


WRONG = {
    "the ramp the wrong way round": (reversed_ramp, "fast pairs are the ones to keep"),
    "factors blended in place of frequencies": (factors_blended, "blends the two frequencies"),
    "2 pi forgotten": (no_two_pi, "is the 2 pi there"),
    "low not kept at 0": (low_below_zero, "kept at 0"),
}
