"""The product of a matrix with some rows, x W^T: what a CPU does differently from F.linear, and when.

    one row      a token that is decoded. It is bound by reading the matrix once, F.linear is made for more, and torch.mv
                 reads large ones of bfloat16 faster (`python -m k2 bench --products` shows both); on a processor with
                 tiles that is nearly all of them. compiled.py puts a compiled function in the same place.
    many rows    a prompt. It is bound by arithmetic, and most processors outside servers have none for bfloat16: F.linear
                 then converts as it goes, and takes longer than converting a panel of the matrix to float32 and multiplying
                 there (`bench --products --rows 64`). That is no less exact: sums are float32 either way, and rounded once.

    M rows sent here, N with any batch folded in, L filled up to whole steps · I, O a matrix's columns (inputs) and rows (outputs)
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

PANEL = 2**20  # weights that are widened at a time: 4 MiB of float32
LARGE = 2**21  # weights from which torch.mv is worth a call that costs more
LARGE_BESIDE_TILES = 2**17  # the same on a processor with tiles
SOME = 8  # rows of x from which widening bfloat16 weights to float32 is worth its time
STEP = 16  # rows of x that a float32 kernel takes at once, where they are the second factor
MANY = 64  # rows of x from which a product in float32 is fastest as it is written, x W^T
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")  # F.linear multiplies bfloat16 by any of these without a detour


class OneRow:
    """A module's other way: `one_row` where x is a single row, (..., I) all of whose leading axes are 1, and `many_rows`
    for whatever else; both -> (..., O). It runs hundreds of times a token, so it asks for as little as it can."""

    def forward(self, x_MI):
        return self.one_row(x_MI) if x_MI.numel() == x_MI.shape[-1] else self.many_rows(x_MI)


def wants_mv(dtype, device) -> bool:
    """Whether a single row meets such matrices, if they are large, in torch.mv."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def takes_mv(weight_OI) -> bool:
    """Whether a single row meets this matrix in torch.mv."""
    return wants_mv(weight_OI.dtype, weight_OI.device) and weight_OI.numel() >= (LARGE_BESIDE_TILES if has_tiles() else LARGE)


def wants_float32(x_MI) -> bool:
    """Whether a product of many rows like these is faster in float32. Not in training, which would keep the wide copies."""
    return x_MI.dtype == torch.bfloat16 and x_MI.device.type == "cpu" and not x_MI.requires_grad and not has_bfloat16()


@functools.cache
def has_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX), which F.linear then fills for a single row too."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16; one that is not x86, which torch does not say it of, is taken to."""
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or any(found.get(name) for name in INSTRUCTIONS)


def panels(rows: int, columns: int, unit: int = 1) -> list[slice]:
    """A matrix's rows in pieces of whole units, each small enough to stay in a cache while it is widened."""
    step = max(1, PANEL // (unit * columns)) * unit
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def single_row_product(x_MI, weight_OI):
    """W x, (..., I) -> (..., O), by the kernel that every such product of one row takes, wherever its matrix comes from."""
    if not takes_mv(weight_OI):
        return F.linear(x_MI, weight_OI)
    return torch.mv(weight_OI, x_MI.flatten()).view(*x_MI.shape[:-1], -1)


def many_rows_product(x_MI, weight_OI):
    """x W^T, (..., M, I) -> (..., M, O), by the kernel that every such product of many rows takes. W may be a batch, (..., O, I)."""
    if weight_OI.ndim > 2:
        return x_MI @ weight_OI.mT
    if x_MI.shape[:-1].numel() < SOME or weight_OI.dtype != x_MI.dtype or not wants_float32(x_MI):
        return F.linear(x_MI, weight_OI)
    if weight_OI.stride(-1) != 1:
        return float32_sum(x_MI, weight_OI.mT)
    return float32_product(x_MI, panels(*weight_OI.shape), lambda rows: weight_OI[rows].float())


def float32_sum(x_MI, weight_IO):
    """x W in x's dtype, computed in float32, for a matrix that lies with a row per input: such panels' products are summed."""
    wide_NI = x_MI.flatten(0, -2).float()
    y_NO = wide_NI.new_zeros(len(wide_NI), weight_IO.shape[1])
    for some in panels(*weight_IO.shape):
        y_NO.addmm_(wide_NI[:, some], weight_IO[some].float())
    return y_NO.to(x_MI.dtype).view(*x_MI.shape[:-1], -1)


def float32_product(x_MI, pieces: list[slice], widened):
    """x W^T in x's dtype, computed in float32, the matrix asked for a panel at a time: `widened(rows)`, float32."""
    wide_NI, O = x_MI.flatten(0, -2).float(), pieces[-1].stop
    N = len(wide_NI)
    y_NO = x_MI.new_empty(N, O)
    # Fewer rows than MANY are the second factor, W x^T, and filled up to whole steps of the kernel: 59 take longer than 64.
    few_LI = F.pad(wide_NI, (0, 0, 0, -N % STEP)) if N < MANY else None
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
