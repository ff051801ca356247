"""The benchmark of products: every form is the same expert, and what it reads is counted."""

from dataclasses import replace

import pytest
import torch
from small import assert_close, small_config
from torch import nn

from k2 import product_bench, products
from k2.products import RowLinear
from k2.quantization import fp8_dequantize

CONFIG = replace(small_config(), hidden_size=256, moe_intermediate_size=128)


@pytest.fixture
def uncompiled(monkeypatch):
    """The written out functions as they stand."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_each_format_has_its_form_and_both_forms_of_one_format_answer_alike(uncompiled):
    found, x = product_bench.forms(CONFIG, compiled=True), torch.randn(1, 256).to(torch.bfloat16)
    assert list(found) == ["bf16, F.linear", "bf16", "fp8", "int4", "bf16, compiled", "fp8, compiled"]
    assert all(isinstance(m, nn.Linear) for m in found["bf16"].children()) and isinstance(found["bf16"].up_proj, RowLinear)
    with torch.inference_mode():
        for one, other in (("bf16, F.linear", "bf16"), ("bf16", "bf16, compiled"), ("fp8", "fp8, compiled")):
            assert_close(found[one](x), found[other](x), 2e-2, f"{one} and {other}")
    assert found["bf16, compiled"].plain is found["bf16"]
    assert all(part.dequantize is fp8_dequantize for part in found["fp8"].children()), "the plain form stays plain beside the compiled one"


def test_what_a_form_reads_is_its_weights_and_scales(uncompiled):
    found, weights = product_bench.forms(CONFIG, compiled=True), 3 * 256 * 128
    assert product_bench.bytes_of(found["bf16"]) == product_bench.bytes_of(found["bf16, compiled"]) == 2 * weights
    assert product_bench.bytes_of(found["fp8"]) == weights + 3 * 2 * 4
    scales = 2 * weights // 32
    assert product_bench.bytes_of(found["int4"]) == weights // 2 + 2 * scales + 3 * 2 * 8  # and three stored shapes


def test_a_rate_is_bytes_over_seconds_and_a_share_that_over_the_reading(monkeypatch):
    """With a clock that goes on by one second a look: each turn then takes one."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(product_bench, "ram_bandwidth", lambda: 1e6)
    monkeypatch.setattr(product_bench.time, "perf_counter", lambda: float(next(ticks)))
    found = product_bench.measure(CONFIG, rounds=3, compiled=False, copies=2)
    read = product_bench.TOKENS * 2 * 2 * 3 * 256 * 128
    assert found["reading"] == (1e6, 1.0) and found["bf16"] == found["bf16, F.linear"] == (read, read / 1e6)


def test_each_form_takes_its_own_kernel(monkeypatch):
    found, taken, real = product_bench.forms(CONFIG, compiled=False), [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda weight, x: taken.append(1) or real(weight, x))
    monkeypatch.setattr(products, "MV_FROM", dict.fromkeys(products.MV_FROM, 1))
    with torch.inference_mode():
        for name, calls in (("bf16, F.linear", 0), ("bf16", 3)):
            taken.clear()
            found[name](torch.randn(1, 256).to(torch.bfloat16))
            assert len(taken) == calls, name


def test_the_command_compiles_if_asked_and_takes_no_checkpoint(monkeypatch, capsys, tmp_path):
    from k2.__main__ import main

    asked = []
    monkeypatch.setattr(product_bench, "bench", lambda config, rounds, compiled, rows: asked.append((config.hidden_size, rounds, compiled, rows)))
    assert main(["bench", "--products", "--rounds", "2"]) == main(["bench", "--products", "--compile", "--rounds", "2", "--rows", "64"]) == 0
    assert asked == [(7168, 2, False, 1), (7168, 2, True, 64)]
    assert main(["bench", "--products", "--rows", "0"]) == 2 and "--rows: found 0; expected 1 or more" in capsys.readouterr().err
    assert main(["bench", str(tmp_path), "--products"]) == 2 and "expected no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 5])
def test_as_many_rows_as_asked_meet_each_form(monkeypatch, capsys, rows):
    seen, real = [], product_bench.forms
    monkeypatch.setattr(product_bench, "ram_bandwidth", lambda: 1e9)
    monkeypatch.setattr(product_bench, "forms", lambda *given: {name: Seen(seen, form) for name, form in real(*given).items()})
    product_bench.bench(CONFIG, rounds=1, compiled=False, rows=rows)
    assert set(seen) == {rows} and capsys.readouterr().out.startswith(f"{rows} token{'s' if rows > 1 else ''} through")


class Seen(nn.Module):
    """A form that notes how many rows it is given."""

    def __init__(self, seen: list, plain: nn.Module):
        super().__init__()
        self.seen, self.plain = seen, plain

    def __deepcopy__(self, memo):
        return Seen(self.seen, self.plain)

    def forward(self, x_MD):
        self.seen.append(len(x_MD))
        return self.plain(x_MD)


def test_the_table_has_a_line_for_each_form(monkeypatch, capsys):
    monkeypatch.setattr(product_bench, "ram_bandwidth", lambda: 1e9)
    product_bench.bench(CONFIG, rounds=1, compiled=False)
    printed = capsys.readouterr().out.split("\n")
    assert "256 x 128" in printed[0] and "1.0 GB/s" in printed[0] and [line.split("  ")[0] for line in printed[2:] if line] == ["bf16, F.linear", "bf16", "fp8", "int4"]
