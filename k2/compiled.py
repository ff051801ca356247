"""torch.compile for decode on a CPU, and for the FP8 experts of a prompt, an option: `--compile`.

A token's product with a matrix reads the matrix once. Here it is written out as multiply and sum, which the compiler
fuses into one pass over the weights, an expert's three matrices in one function. FP8 gains most, as its codes are widened
within that pass and never written out; bfloat16 gains where products.py has no torch.mv for it, and what it has is left to it,
as that was faster where both were measured (two Intel servers). INT4 is left to torch's own kernel. A prompt's products go
the plain way, but for the experts' FP8 codes, which are widened and scaled in one pass instead of five. The first prompt and first
tokens pay for compiling, some ten to thirty seconds.

    M rows sent here, one in the compiled forms · D hidden · F width · O, I a matrix's rows and columns
    B blocks of 128 rows · G blocks of 128 columns
"""

import os
import shutil

import torch
import torch.nn.functional as F
from torch import nn

from .config import K2Error
from .embedding import OutputHead
from .expert import Expert
from .model import K2
from .moe import Experts
from .products import OneRow, takes_mv
from .quantization import BLOCK, FP8CodesLinear, fp8_dequantize

PART = 1024  # numbers of a matrix's row that are added up at a time: on an AMD (Zen 4) K2's rows of 7168 in one go take longer by a fifth at least


def row_sums(weight_OI, x_I):
    """W x, (O,), float32 like x; rows of whole parts, as nearly all of K2's are, part by part."""
    if weight_OI.shape[1] % PART:
        return (weight_OI.float() * x_I).sum(-1)
    return (weight_OI.float().unflatten(-1, (-1, PART)) * x_I.unflatten(0, (-1, PART))).sum(-1).sum(-1)


def row_product(x_MI, weight_OI):
    """x W^T for one row of x, (1, O), summed in float32."""
    return row_sums(weight_OI, x_MI[0].float())[None].to(x_MI.dtype)


def row_logits(x_MI, weight_OI):
    """The output head's product, widened as the head widens it: rounded first, so that ties are the same."""
    return row_product(x_MI, weight_OI).float()


def row_expert(x_MD, gate_FD, up_FD, down_DF):
    """An expert's answer to one row, (1, D); what lies between its products stays float32."""
    x_D = x_MD[0].float()
    h_F = F.silu(row_sums(gate_FD, x_D)) * row_sums(up_FD, x_D)
    return row_sums(down_DF, h_F)[None].to(x_MD.dtype)


def fp8_widened(code_OI):
    """float8_e4m3fn codes, seen as int8, as float32, exactly but for the sign of zero and 2^9 times too large. No code may be NaN.

    Every e4m3 number is a whole number of 2^-9: with exponent e and fraction f, (8 + f) 2^(e - 1) of them, or f where e is 0. So
    whole numbers are all that it takes; to see the bits of one as a float32 would cost the compiler several steps. Without its
    sign a code is 8 e + f: less 8, but not below 0, the e - 1 stands in its upper bits, and taken out it leaves 8 + f.
    """
    code_OI = code_OI.int()
    size_OI = code_OI & 0x7F
    above_OI = (size_OI - 8).clamp(min=0)
    number_OI = size_OI - (above_OI & -8) << (above_OI >> 3)
    return torch.where(code_OI < 0, -number_OI, number_OI).float()


def fp8_weights(code_OI, scale_BG):
    """fp8_dequantize to float32, for codes, seen as int8, in whole blocks and none of them NaN, (O, I). The same numbers but for
    the sign of zero, if scales lie between 2^-117 and 2^119; beyond, one or the other way loses bits or is infinite."""
    value_BLGL = fp8_widened(code_OI).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    return (value_BLGL * (scale_BG * 2.0**-9)[:, None, :, None]).flatten(2).flatten(0, 1)


def fp8_bfloat16_weights(code_OI, scale_BG):
    """The same in bfloat16, and a second result that nobody asks for: because of its bytes the compiler takes as many
    codes at a time as a vector has float32s. For bfloat16 alone it takes twice as many, and converts them one by one: that took over twice as long."""
    return fp8_weights(code_OI, scale_BG).to(torch.bfloat16), ~code_OI


def fp8_row(x_I, code_OI, scale_BG):
    """W x for float8_e4m3fn codes, seen as int8, (I,) -> (O,), both float32: each block's sum is scaled, not each weight."""
    part_OG = (fp8_widened(code_OI).unflatten(-1, (-1, BLOCK)) * x_I.unflatten(0, (-1, BLOCK))).sum(-1)
    return (part_OG * (scale_BG * 2.0**-9).repeat_interleave(BLOCK, dim=0)[: len(code_OI)]).sum(-1)


def fp8_row_expert(x_D, gate_FD, up_FD, down_DF, gate_BG, up_BG, down_BG):
    """An expert's answer to one row, float32 (D,), from its codes and scales."""
    h_F = F.silu(fp8_row(x_D, gate_FD, gate_BG)) * fp8_row(x_D, up_FD, up_BG)
    return fp8_row(h_F, down_DF, down_BG)


class Compiled(OneRow, nn.Module):
    """A module, and a compiled function of x and some weights that stands in for it where x is one row."""

    def __init__(self, plain: nn.Module, function, weights):
        super().__init__()
        self.plain, self.function, self.weights = plain, function, weights
        self.weight = weights[0]  # the model asks its head for device and dtype

    def many_rows(self, x_MI):
        """The module as it is."""
        return self.plain(x_MI)

    def one_row(self, x_MI):
        """The function that stands in for it."""
        return self.function(x_MI.view(1, -1), *self.weights).view(*x_MI.shape[:-1], -1)


class CompiledCodes(Compiled):
    """The same for FP8 codes, unless there is a NaN among them."""

    def __init__(self, plain: nn.Module, function, parts: list[FP8CodesLinear]):
        super().__init__(plain, function, [part.weight for part in parts] + [part.weight_scale_inv for part in parts])
        self.parts = parts

    def one_row(self, x_MI):
        """The function that stands in for the module; a NaN goes the plain way, which keeps it. x is widened here:
        with bfloat16 in it the function is compiled to a much slower one."""
        if not all(part.has_no_nan() for part in self.parts):
            return self.plain(x_MI)
        codes, scales = self.weights[: len(self.parts)], self.weights[len(self.parts) :]
        return self.function(x_MI.flatten().float(), *(code_OI.view(torch.int8) for code_OI in codes), *scales).to(x_MI.dtype).view(*x_MI.shape[:-1], -1)


class Compiler:
    """The compiled form of each module that has one. Without `experts` the routed ones stay as they are: those that a store
    widens for each product have none, and memory must not change the text. Raises K2Error where nothing can be compiled."""

    def __init__(self, device=torch.device("cpu"), experts: bool = True):
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
        if device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise K2Error("--compile: expected a C++ compiler, g++, clang++ or the one that CXX names; found none. Install one, or leave --compile out.")
        self.experts = experts
        self.product, self.expert, self.logits, self.fp8_product, self.fp8_expert = (
            torch.compile(function) for function in (row_product, row_expert, row_logits, fp8_row, fp8_row_expert)
        )
        # One for each size of panels: K2 has three of them, with tiles and their larger panels five; torch goes up to eight.
        self.fp8_weights, self.fp8_bfloat16_weights = (torch.compile(function, dynamic=False) for function in (fp8_weights, fp8_bfloat16_weights))

    def form_of(self, module: nn.Module) -> nn.Module:
        """The module in its compiled form, or as it is where there is none: they sum in float32, so float64 has none."""
        if next(module.parameters(), torch.empty(0)).dtype == torch.float64:
            return module
        if isinstance(module, Expert):
            parts = [module.gate_proj, module.up_proj, module.down_proj]
            if all(isinstance(part, nn.Linear) for part in parts):
                if takes_mv(parts[0].weight):
                    return module
                return Compiled(module, self.expert, [part.weight for part in parts])
            if all(in_whole_blocks(part) for part in parts):
                for part in parts:
                    part.dequantize = self.dequantize
                return CompiledCodes(module, self.fp8_expert, parts)
        elif isinstance(module, nn.Linear):
            if takes_mv(module.weight):
                return module
            return Compiled(module, self.logits if isinstance(module, OutputHead) else self.product, [module.weight])
        elif in_whole_blocks(module):
            return CompiledCodes(module, self.fp8_product, [module])
        return module

    def dequantize(self, code_OI, scale_BG, dtype, finite: bool):
        """quantization.fp8_dequantize for a panel of a prompt's product, the same numbers: see fp8_weights."""
        if not finite or len(code_OI) % BLOCK:
            return fp8_dequantize(code_OI, scale_BG, dtype, finite)
        if dtype == torch.bfloat16:
            return self.fp8_bfloat16_weights(code_OI.view(torch.int8), scale_BG)[0]
        return self.fp8_weights(code_OI.view(torch.int8), scale_BG).to(dtype)


def in_whole_blocks(module: nn.Module) -> bool:
    """Whether it is an FP8 matrix that computes from its codes and whose columns are whole blocks, as all of K2's are."""
    return isinstance(module, FP8CodesLinear) and module.weight.shape[1] % BLOCK == 0


def with_compiled_products(model: K2, compiler: Compiler) -> K2:
    """The model with its matrices and experts in compiled forms, as far as they have one and lie in memory."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name != "kv_b_proj" and not isinstance(parent, (Expert, Compiled)) and (compiler.experts or not isinstance(parent, Experts)):
                setattr(parent, name, compiler.form_of(child))
    return model
