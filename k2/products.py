"""The product of a matrix with some rows, x W^T: what a CPU does differently from F.linear, and when.

    one row      a token that is decoded. It is bound by reading the matrix once, and F.linear is made for more. Which way
                 reads bfloat16 fastest depends on what the processor has for it (`python -m k2 bench --products` shows
                 F.linear beside our choice): without any arithmetic, torch.mv for large matrices; with tiles, torch.mv
                 for nearly all; with products of pairs but no tiles, F.linear, and of two rows rather than one. Of
                 others nothing is known, and they are treated as if they had none.
                 compiled.py puts a compiled function in the same place.
    many rows    a prompt. It is bound by arithmetic, and most processors outside servers have none for bfloat16: F.linear
                 then converts as it goes, and takes longer than converting a panel of the matrix to float32 and multiplying
                 there (`bench --products --rows 64`). That is no less exact: sums are float32 either way, and rounded once.

    M rows sent here, N with any batch folded in, L filled up to whole steps · I, O a matrix's columns (inputs) and rows (outputs)
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

PANEL = {"tiles": 2**24, "pairs": 2**22, "none": 2**22, "unknown": 2**22}  # bytes of a matrix widened at a time for many rows: what a cache holds; with tiles four times as much is faster
MV_FROM = {"tiles": 2**17, "pairs": math.inf, "none": 2**21, "unknown": 2**21}  # weights from which torch.mv is faster for one row
TWICE_FROM = 2**20  # weights from which, with products of pairs, F.linear takes less time for two rows than for one
SOME = 8  # rows of x from which widening bfloat16 weights to float32 is worth its time
STEP = 16  # rows of x that a float32 kernel takes at once, where they are the second factor
MANY = 64  # rows of x from which a product in float32 is fastest as it is written, x W^T


class OneRow:
    """A module's other way: `one_row` where x is a single row, (..., I) all of whose leading axes are 1, and `many_rows`
    for whatever else; both -> (..., O). It runs hundreds of times a token, so it asks for as little as it can."""

    def forward(self, x_MI):
        return self.one_row(x_MI) if x_MI.numel() == x_MI.shape[-1] else self.many_rows(x_MI)


def wants_row_kernel(dtype, device) -> bool:
    """Whether a single row meets such matrices, if they are large, in another way than F.linear's own."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def takes_mv(weight_OI) -> bool:
    """Whether a single row meets this matrix in torch.mv."""
    return weight_OI.numel() >= MV_FROM[bfloat16_unit()] and wants_row_kernel(weight_OI.dtype, weight_OI.device)


def takes_two_rows(weight_OI) -> bool:
    """Whether a single row meets this matrix twice over, in F.linear."""
    return bfloat16_unit() == "pairs" and weight_OI.numel() >= TWICE_FROM and wants_row_kernel(weight_OI.dtype, weight_OI.device)


def wants_float32(x_MI) -> bool:
    """Whether a product of many rows like these is faster in float32. Not in training, which would keep the wide copies."""
    return x_MI.dtype == torch.bfloat16 and x_MI.device.type == "cpu" and not x_MI.requires_grad and not has_bfloat16()


@functools.cache
def bfloat16_unit() -> str:
    """What the processor multiplies bfloat16 with: "tiles" (AMX), "pairs" (AVX-512's sums of two products), "none", or
    "unknown": it has something else, or is not x86, of which torch does not say it."""
    found = torch.cpu.get_capabilities()
    if found.get("amx_bf16"):
        return "tiles"
    if found.get("avx512_bf16"):
        return "pairs"
    return "none" if found.get("architecture") == "x86_64" and not found.get("avx_ne_convert") else "unknown"


@functools.cache
def mv_is_shared() -> bool:
    """Whether a float32 matrix meets a single column on all threads. MKL, which torch on x86 computes it by, did so on a
    Xeon, where that was half as fast again as two columns on two threads, and on an AMD it took one thread: it tells its maker's processors from others."""
    return torch.backends.mkl.is_available() and torch.cpu.get_capabilities().get("cpu_name", "").startswith("Intel")


def has_bfloat16() -> bool:
    """Whether F.linear multiplies bfloat16 without a detour. A processor of which nothing is known is taken to."""
    return bfloat16_unit() != "none"


def panel_bytes() -> int:
    """The size of a panel on this processor."""
    return PANEL[bfloat16_unit()]


def panels(rows: int, columns: int, unit: int = 1, dtype=torch.float32) -> list[slice]:
    """A matrix's rows in equal pieces of whole units, each of panel_bytes() at most, once widened to `dtype`, or of one unit."""
    most = max(1, panel_bytes() // (dtype.itemsize * unit * columns)) * unit
    step = -(-rows // (-(-rows // most) * unit)) * unit
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def single_row_product(x_MI, weight_OI):
    """W x, (..., I) -> (..., O), by the kernel that every such product of one row takes, wherever its matrix comes from."""
    if takes_mv(weight_OI):
        return torch.mv(weight_OI, x_MI.flatten()).view(*x_MI.shape[:-1], -1)
    if takes_two_rows(weight_OI):
        return F.linear(x_MI.view(1, -1).expand(2, -1), weight_OI)[0].view(*x_MI.shape[:-1], -1)
    return F.linear(x_MI, weight_OI)


def many_rows_product(x_MI, weight_OI):
    """x W^T, (..., M, I) -> (..., M, O), by the kernel that every such product of many rows takes. W may be a batch, (..., O, I)."""
    if weight_OI.ndim > 2:
        return x_MI @ weight_OI.mT
    if x_MI.shape[:-1].numel() < SOME or weight_OI.dtype != x_MI.dtype or not wants_float32(x_MI):
        return F.linear(x_MI, weight_OI)
    if weight_OI.stride(-1) != 1:
        return float32_sum(x_MI, weight_OI.mT)
    return panel_product(x_MI, panels(*weight_OI.shape), lambda rows: weight_OI[rows].float())


def float32_sum(x_MI, weight_IO):
    """x W in x's dtype, computed in float32, for a matrix that lies with a row per input: such panels' products are summed."""
    wide_NI = x_MI.flatten(0, -2).float()
    y_NO = wide_NI.new_zeros(len(wide_NI), weight_IO.shape[1])
    for some in panels(*weight_IO.shape):
        y_NO.addmm_(wide_NI[:, some], weight_IO[some].float())
    return y_NO.to(x_MI.dtype).view(*x_MI.shape[:-1], -1)


def panel_product(x_MI, pieces: list[slice], widened, dtype=torch.float32):
    """x W^T in x's dtype, computed in `dtype`, the matrix asked for a panel at a time: `widened(rows)`, in that dtype."""
    N, O = x_MI.shape[:-1].numel(), pieces[-1].stop
    few = N < MANY and dtype == torch.float32
    if len(pieces) == 1 and dtype == x_MI.dtype and not few:
        return F.linear(x_MI, widened(pieces[0]))
    wide_NI, y_NO = x_MI.flatten(0, -2).to(dtype), x_MI.new_empty(N, O)
    # Fewer rows than MANY are in float32 the second factor, W x^T, and filled up to whole steps of the kernel: 59 take longer than 64.
    few_LI = F.pad(wide_NI, (0, 0, 0, -N % STEP)) if few else None
    for rows in pieces:
        y_NO[:, rows] = F.linear(wide_NI, widened(rows)) if few_LI is None else F.linear(widened(rows), few_LI)[:, :N].mT
    return y_NO.view(*x_MI.shape[:-1], O)


class RowLinear(OneRow, nn.Linear):
    """nn.Linear without bias that takes the faster kernel for a single row, and for many."""

    def one_row(self, x_MI):
        """W x, (..., I) -> (..., O)."""
        return single_row_product(x_MI, self.weight)

    def many_rows(self, x_MI):
        """x W^T, (..., M, I) -> (..., M, O)."""
        return many_rows_product(x_MI, self.weight)
