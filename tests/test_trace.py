"""python -m k2 trace: its numbers are the model's, against hooks that know nothing of trace.py's; and its page can be read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import assert_close, random_ids, random_model, small_config
from torch.utils._python_dispatch import TorchDispatchMode

import k2
from k2 import trace
from k2.__main__ import MINI, main
from k2.generation import CHUNK
from k2.offload import store_of
from k2.tokenizer import tokenizer_files, train_ranks

GOLDEN = Path(__file__).parent / "trace_golden.json"
PROMPT = "def read(path):\n    with open(path) as "


@pytest.fixture(scope="module")
def mini():
    return k2.load(MINI, dtype=torch.float32), k2.Tokenizer.from_directory(MINI)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small checkpoint with a tokenizer of 300 ranks, in each format."""
    folder = tmp_path_factory.mktemp("models")
    ranks = train_ranks(["def read(path):\n    return open(path).read()\n" * 4], 300)
    model = random_model(small_config(vocab_size=len(ranks) + 256, hidden_size=160, moe_intermediate_size=96), 0)
    for format in ("fp32", "bf16", "fp8", "int4"):
        k2.save(model, folder / format, format=format, files=tokenizer_files(ranks))
    return folder


# ---- the numbers ----


@torch.inference_mode()
def by_hooks(model, ids: list[int], head: int | None) -> list[dict]:
    """The same figures, from one call without a cache: streams from the norms' inputs, attention from the full square of scores."""
    seen, handles = [{} for _ in model.model.layers], []

    def at(module, key, of_input):
        handles.append(module.register_forward_hook(lambda _, inputs, output: key.__setitem__(of_input[0], inputs if of_input[1] else output)))

    for layer, found in zip(model.model.layers, seen):
        at(layer.input_layernorm, found, ("before", True))
        at(layer.post_attention_layernorm, found, ("middle", True))
        at(layer.self_attn.dot_product, found, ("qkv", True))
        at(layer, found, ("after", False))
        if hasattr(layer.mlp, "gate"):
            at(layer.mlp.gate, found, ("choice", False))
    model(torch.tensor(ids))
    for handle in handles:
        handle.remove()
    for found in seen:
        q, k, _ = found["qkv"]
        scores = q @ k.transpose(-1, -2) * model.config.softmax_scale
        shares = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf).softmax(-1)
        found["attention"] = shares.mean(0) if head is None else shares[head]
        found["reading"] = model.lm_head(model.model.norm(found["after"])).softmax(-1)
        found["rms"] = torch.stack([(x**2).mean(-1) ** 0.5 for x in (found["before"][0], found["middle"][0], found["after"])], -1)
    return seen


def assert_traced(found: trace.Trace, expected: list[dict], limit: float = 1e-9):
    for layer, right in zip(found.layers, expected, strict=True):
        assert_close(layer.rms, right["rms"], limit)
        for ids, values, full, count in ((layer.keys, layer.shares, right["attention"], trace.KEYS), (layer.top_ids, layer.top_shares, right["reading"], trace.TOP)):
            assert_close(values, full.topk(min(count, full.shape[-1])).values, limit)
            assert_close(full.gather(-1, ids), values, limit)  # and these are the ones that have them
        assert (layer.weights is None) == ("choice" not in right)
        if "choice" in right:
            assert torch.equal(layer.expert_ids, right["choice"][0])
            assert_close(layer.weights, right["choice"][1], limit)


class NoText:
    """A tokenizer's one method that a trace needs."""

    def token_bytes(self, i: int) -> bytes:
        return b"t%d" % i


@pytest.mark.parametrize("head", [None, 0, 2])
@pytest.mark.parametrize("tokens", [2, 7, 40])
def test_a_trace_is_what_independent_hooks_see(head, tokens):
    model, ids = random_model(small_config(), 0, torch.float64), random_ids(small_config(), tokens, seed=tokens).tolist()
    assert_traced(trace.trace(model, NoText(), ids, head), by_hooks(model, ids, head))


def test_q_lora_rank_may_be_absent():
    model = random_model(small_config(q_lora_rank=None), 0, torch.float64)
    assert_traced(trace.trace(model, NoText(), list(range(9))), by_hooks(model, list(range(9)), None))


def test_a_prompt_of_several_chunks_and_of_small_blocks_is_traced_alike(monkeypatch):
    model = random_model(small_config(max_position_embeddings=2000), 1, torch.float64)
    ids = random_ids(small_config(), CHUNK + 60, seed=4).tolist()
    expected = by_hooks(model, ids, 1)
    for numbers in (trace.NUMBERS, 3000):
        monkeypatch.setattr(trace, "NUMBERS", numbers)
        assert_traced(trace.trace(model, NoText(), ids, 1), expected)


def test_one_token_has_itself_to_look_at():
    model = random_model(small_config(), 0, torch.float64)
    found = trace.trace(model, NoText(), [5])
    assert found.layers[0].keys.tolist() == [[0]] and found.layers[0].shares.tolist() == [[1.0]]


def test_no_hook_stays_behind_and_logits_are_the_same_bits(mini):
    model, tokenizer = mini
    ids = tokenizer.encode(PROMPT)
    with torch.inference_mode():
        before = model(torch.tensor(ids))
        trace.trace(model, tokenizer, ids)
        assert torch.equal(model(torch.tensor(ids)), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_names_tell_shapes(mini, shape_checker):
    model, tokenizer = mini
    with shape_checker() as wrong:
        trace.trace(model, tokenizer, tokenizer.encode(PROMPT))
        trace.trace(random_model(small_config(), 0), NoText(), [3, 4, 5])
    assert not [line for line in wrong if line.startswith("trace")]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > self.numbers * 4 and value.is_floating_point():
                self.numbers = value.untyped_storage().nbytes() // 4
        return result


def test_two_thousand_tokens_are_traced_without_a_square_of_scores(mini):
    model, tokenizer = mini
    long = k2.K2(replace(model.config, max_position_embeddings=2048)).eval().requires_grad_(False)
    long.load_state_dict(model.state_dict())
    ids = (tokenizer.encode((Path(k2.__file__).parent / "chat.py").read_text()) * 2)[:2000]
    with Largest() as largest:
        found = trace.trace(long, tokenizer, ids)
    squares = len(ids) ** 2 * model.config.num_attention_heads
    assert largest.numbers < squares / 6, f"{largest.numbers:,} numbers at once; all scores of one layer are {squares:,}"
    kept = sum(values.numel() for layer in found.layers for values in layer[1:] if values is not None)
    assert kept < 50 * len(ids) * len(found.layers)


# ---- K2-mini's committed trace ----


def same_where_apart(found_ids, found_values, ids, values, limit: float):
    """Values within the limit, and the same ids wherever a value's neighbours are further off than that."""
    found_values, values = (torch.tensor(v, dtype=torch.float64) for v in (found_values, values))
    assert (found_values - values).abs().max() < limit
    for row, found_row, value in zip(ids, found_ids, values):
        for n in range(len(row)):
            gaps = [abs(value[n] - value[m]) for m in (n - 1, n + 1) if 0 <= m < len(row)]
            last_is_open = n == len(row) - 1  # the first one that was not kept may lie as near
            assert found_row[n] == row[n] or min(gaps) < 2 * limit or last_is_open, (row, found_row)


def test_k2_minis_trace_is_the_committed_one(mini):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = trace.as_dict(trace.trace(*mini, golden["ids"], golden["head"], golden["model"]))
    assert {k: found[k] for k in ("ids", "heads", "experts")} == {k: golden[k] for k in ("ids", "heads", "experts")} and len(golden["ids"]) > 8
    for layer, right in zip(found["layers"], golden["layers"], strict=True):
        assert layer["shapes"] == right["shapes"]
        assert_close(torch.tensor(layer["rms"]), torch.tensor(right["rms"]), 1e-3)
        same_where_apart(layer["keys"], layer["shares"], right["keys"], right["shares"], 1e-3)
        same_where_apart(layer["top_ids"], layer["top_shares"], right["top_ids"], right["top_shares"], 1e-3)
        if right["weights"] is not None:
            assert [sorted(row) for row in layer["expert_ids"]] == [sorted(row) for row in right["expert_ids"]]
            by_expert = [torch.tensor([dict(zip(*pair))[e] for pair, row in zip(zip(of["expert_ids"], of["weights"]), right["expert_ids"]) for e in row]) for of in (layer, right)]
            assert (by_expert[0] - by_expert[1]).abs().max() < 1e-3


def test_the_committed_choices_hang_on_no_rounding(mini):
    """The distance between the last expert chosen and the first left out, against float32's error of about 1e-6."""
    model, gaps = mini[0], []

    def measure(router, inputs, _):
        scores = (router.scores(inputs[0]) + router.e_score_correction_bias).sort(descending=True).values
        gaps.append(float((scores[:, router.top_k - 1] - scores[:, router.top_k]).min()))

    handles = [layer.mlp.gate.register_forward_hook(measure) for layer in model.model.layers[1:]]
    with torch.inference_mode():
        model(torch.tensor(json.loads(GOLDEN.read_text(encoding="utf-8"))["ids"]))
    for handle in handles:
        handle.remove()
    assert min(gaps) > 1e-4, f"smallest margin {min(gaps):.1e}"


# ---- any checkpoint, and the command ----


def run(capfd, *arguments) -> tuple[int, str, str]:
    status = main(["trace", *map(str, arguments)])
    return status, *capfd.readouterr()


@pytest.mark.parametrize("arguments", [
    ("fp32",), ("fp32", "--dtype", "bfloat16"), ("bf16",), ("fp8",), ("fp8", "--dtype", "stored"), ("int4",), ("int4", "--dtype", "stored"),
    ("fp8", "--dtype", "stored", "--ram", "1MB"), ("fp32", "--dtype", "float32", "--ram", "3MB"),
], ids=" ".join)  # fmt: skip
def test_any_checkpoint_that_loads_is_traced(checkpoint, capfd, tmp_path, arguments):
    name, *flags = arguments
    status, out, err = run(capfd, "def read(path):", "--model", checkpoint / name, "--json", tmp_path / "t.json", *flags)
    assert status == 0 and err == "" and out.count("\nlayer ") == 3 and out.count("  experts ") == 2
    found = json.loads((tmp_path / "t.json").read_text())
    assert len(found["layers"]) == 3 and all(abs(sum(row) - 2.827) < 0.02 for row in found["layers"][2]["weights"])
    assert all(0 < share <= 1 for layer in found["layers"] for row in layer["top_shares"] for share in row)


def test_an_expert_store_changes_no_bit_of_a_trace(checkpoint):
    tokenizer = k2.Tokenizer.from_directory(checkpoint / "fp32")
    whole, short = (k2.load(checkpoint / "fp32", dtype=torch.float32, ram=ram) for ram in (None, 3_000_000))
    assert store_of(whole) is None and store_of(short) is not None
    ids = tokenizer.encode("def read(path):\n    return 1\n")
    assert trace.as_dict(trace.trace(whole, tokenizer, ids)) == trace.as_dict(trace.trace(short, tokenizer, ids))


def test_the_page_shows_a_tokens_figures_within_100_columns(mini, capfd):
    status, out, err = run(capfd, PROMPT, "--dtype", "float32", "--token", "6", "--head", "1")
    assert status == 0 and err == "" and max(map(len, out.splitlines())) <= 100
    model, tokenizer = mini
    right = by_hooks(model, tokenizer.encode(PROMPT), 1)
    assert out.startswith("11 tokens; what the layers do to token 6, ' open'; attention by head 1 of 4\n")
    for number, layer in enumerate(right):
        before, middle, after = layer["rms"][6].tolist()
        assert f"layer {number}{', dense' if number == 0 else ''}   stream {before:.3g}, after attention {middle:.3g}, after the feed-forward {after:.3g}\n" in out
        share, best = layer["reading"][6].max(-1)
        assert f"  reads as   '{trace.token_text(tokenizer, int(best))}' {float(share):.1%}" in out
        share, key = layer["attention"][6].max(-1)
        assert f"  attends to {int(key)} '" in out
        if number:
            assert f"  experts    {int(layer['choice'][0][6, 0])} ({float(layer['choice'][1][6, 0]):.2f}), " in out


def test_wide_characters_count_twice():
    lines = trace.entry("reads as", [f"'世界世界' {n}%" for n in range(20)])
    assert len(lines) == 4 and max(len(line) + line.count("世") + line.count("界") for line in lines) in range(86, 101)
    assert trace.entry("reads as", ["x" * 200]) == ["  reads as   " + "x" * 200], "what cannot be broken stays whole"


def test_without_a_token_it_is_the_last(capfd):
    assert run(capfd, PROMPT) == run(capfd, PROMPT, "--token", "10")


@pytest.mark.parametrize("i, text", [(b"\n", "\\n"), (b"\xe4\xb8", "\\xe4\\xb8"), (b"\\n", "\\\\n"), (b" a", " a"), ("世".encode(), "世"), ("\u202e".encode(), "\\u202e"), (b"\x1b[2J", "\\x1b[2J")])
def test_a_token_is_one_visible_line(i, text):
    class One:
        def token_bytes(self, _):
            return i

    assert trace.token_text(One(), 0) == text


@pytest.mark.parametrize("arguments, words", [
    (["", ], "prompt: 0 tokens; expected 1 to 1024"),
    (["a " * 3000], "expected 1 to 1024"),
    (["a b", "--head", "4"], "--head: found 4; expected 0 to 3"),
    (["a b", "--head", "-1"], "--head: found -1"),
    (["a b", "--token", "9"], "--token: found 9; expected 0 to"),
    (["a b", "--token", "-1"], "--token: found -1"),
    (["a b", "--model", "nowhere"], "nowhere"),
    (["a b", "--json", "/no/such/folder/t.json"], "/no/such/folder/t.json: could not be written"),
    (["a b", "--html", "/no/such/folder/t.html"], "/no/such/folder/t.html: could not be written"),
    ([], "the following arguments are required: prompt"),
])  # fmt: skip
def test_what_cannot_be_traced_is_one_line(capfd, arguments, words):
    status, out, err = run(capfd, *arguments)
    assert status == 2 and out == "" and words in err and len(err.splitlines()) == 1, err
