"""python -m k2 compare names the first tensor that differs: for every mistake of mutants.py that a forward pass can show."""

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import MUTANTS
from small import YARN, random_config, random_ids, random_model, small_config

import k2
from k2.__main__ import MINI, main
from k2.compare import Setting, lines, record, sentence
from k2.recording import Recording, Rows, call_names, place

TOKENS = 24
NO_FORWARD = {  # what no forward pass of a loaded model shows, by file
    "training/muonclip.py": "changes weights in training",
    "training/fused.py": "trains", "compiled.py": "runs where it is asked for",
    "chat.py": "writes prompts", "reply.py": "reads text", "grammar.py": "reads text", "constraint.py": "masks logits", "sampling.py": "reads logits",
}  # fmt: skip

# ---- the table: which tensor should be the first, and on which of the checkpoints below ----

QUERIES, KEY, NORM, HEADS = (f"model.layers.0.self_attn.{part}" for part in ("queries", "rotary_key", "kv_a_layernorm", "heads"))
DENSE, MIXTURE, GATE = "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.mlp.gate"
FIRST = {
    # A rotation is first met in the rotated queries, of tokens that stand behind the first place.
    "half-split instead of interleaved rotation": (QUERIES, "plain"),
    "rotation in the other direction": (QUERIES, "plain"),
    "YaRN ramp dropped: every pair slowed": (QUERIES, "plain"),
    "YaRN ramp the wrong way round": (QUERIES, "plain"),
    "beta_fast ignored, which only K2.5 shows": (QUERIES, "k2.5"),
    "mscale also multiplied into cos and sin": (QUERIES, "plain"),
    "position offset ignored on decode": (QUERIES, "plain"),
    # Scores are no tensor of a module: what attention mixes by them is the first that one can see.
    "mscale squared missing from the softmax scale": (HEADS, "plain"),
    "mscale not squared in the softmax scale": (HEADS, "plain"),
    "scale by V instead of A": (HEADS, "plain"),
    "scale by N instead of A": (HEADS, "plain"),
    "the absorbed form without the softmax scale": (HEADS, "plain"),
    "the absorbed form without the rotary scores": (HEADS, "plain"),
    "causal mask missing when a cache is present": (HEADS, "plain"),
    "causal mask aligned to the first keys instead of the last": (HEADS, "plain"),
    "a query does not see its own token": (HEADS, "plain"),
    "kv_a_layernorm skipped": (NORM, "plain"),
    "kv_a_layernorm applied to the rotary part too": (KEY, "plain"),
    "latent norms with the config's eps": (NORM, "k2.5"),
    "k_nope and v swapped": (HEADS, "plain"),
    "W^UK and W^UV swapped in the absorbed form": (HEADS, "plain"),
    "softmax instead of sigmoid": (f"{GATE}.scores", "plain"),
    "bias left in the weights": (f"{GATE}.weights", "plain"),
    "renormalisation skipped": (f"{GATE}.weights", "plain"),
    "scaling factor dropped": (f"{GATE}.weights", "plain"),
    "router bias not float32": (f"{GATE}.biased_scores", "plain in bfloat16"),
    "scores computed in the model's dtype": (f"{GATE}.scores", "plain in bfloat16"),
    # The parts are right, and their sum is not.
    "scaling factor applied to the shared expert": (MIXTURE, "plain"),
    "shared expert dropped": (MIXTURE, "plain"),
    "rows left in the experts' order": (MIXTURE, "plain"),
    "gate and up swapped": (DENSE, "plain"),
    "layer 0 made MoE": (f"{DENSE}.gate.scores", "plain"),
    # Of attention only o_proj has more rows than a block has; q_a_proj is the first that has more columns; only the
    # dense layer has both, as a transposed grid needs.
    "FP8 scales transposed": (DENSE, "fp8"),
    "ragged last block misread: columns shared out evenly": ("model.layers.0.self_attn.q_a_proj", "fp8"),
    "ragged last block misread: rows shared out evenly": ("model.layers.0.self_attn.o_proj", "fp8"),
    "few rows: every piece of blocks scaled as the first": ("model.layers.0.self_attn.o_proj", "wide at rest"),
    "INT4 nibbles read as two's complement": (f"{MIXTURE}.experts.0", "int4"),
    "INT4: the kernel given the words as they are stored": (f"{MIXTURE}.experts.0", "int4 at rest"),
}  # fmt: skip


@functools.cache
def folder_of_this_run() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(prefix="k2-compare-"))


@pytest.fixture(scope="module", autouse=True)
def cleaned():
    yield
    shutil.rmtree(folder_of_this_run())
    folder_of_this_run.cache_clear()


def uneven(model):
    """The same with rows and columns behind the first 128 larger, so that each block has a scale of its own."""
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim == 2):
            weight[128:] *= 5
            weight[:, 128:] *= 2
    return model


@functools.cache
def checkpoint(name: str) -> Path:
    """One of the small checkpoints."""
    folder = folder_of_this_run() / name
    if name in ("fp8", "int4", "wide"):
        model = uneven(random_model(small_config(hidden_size=160, moe_intermediate_size=96, intermediate_size=13300 if name == "wide" else 136), 3))
        k2.save(model, folder, format="int4" if name == "int4" else "fp8")
    else:
        changes = {"rope_scaling": replace(YARN, factor=64.0, beta_fast=32.0), "rms_norm_eps": 1e-5} if name == "k2.5" else {}
        k2.save(random_model(small_config(**changes), 0), folder, format="fp32")
    return folder


def setting_of(kind: str) -> Setting:
    """"fp8 at rest" is the checkpoint fp8, computed with as it is stored; float64 where nothing is said."""
    name, _, how = kind.partition(" ")
    dtype = {"": "float64", "in bfloat16": "bfloat16", "at rest": "stored"}[how]
    directory = checkpoint(name)
    return Setting(str(directory), random_ids(k2.K2Config.from_json(directory), TOKENS, seed=2).tolist(), dtype)


@functools.cache
def clean(kind: str) -> Recording:
    """The clean model on it; in float64 it is the reference, which shares no line with it."""
    setting = setting_of(kind)
    return record("numpy" if setting.dtype == "float64" else "torch", setting)


@pytest.mark.parametrize("mistake", FIRST)
def test_the_first_tensor_that_a_mistake_changes_is_named(mistake):
    expected, kind = FIRST[mistake]
    right, found = clean(kind), record(f"mutant:{mistake}", setting_of(kind))
    said = list(lines(right, found))
    first = next((line for line in said if line.differs), None)
    assert first is not None, f"{mistake}: {sentence(said, right, found, TOKENS)}"
    assert first.name == expected, f"{mistake}: {sentence(said, right, found, TOKENS)}"
    print(sentence(said, right, found, TOKENS))


@pytest.mark.parametrize("kind", sorted({kind for _, kind in FIRST.values()}))
def test_the_clean_model_differs_nowhere_on_the_same_checkpoints(kind):
    right, found = clean(kind), record("torch", setting_of(kind))
    assert not [line for line in lines(right, found) if line.differs], sentence(list(lines(right, found)), right, found, TOKENS)


def test_every_mistake_is_in_the_table_or_left_out_by_its_file():
    names = {mutant.name: mutant.file for mutant in MUTANTS}
    assert set(FIRST) <= set(names)
    for name, file in names.items():
        assert (name in FIRST) != (file in NO_FORWARD or file in ("offload.py", "slots.py")), f"{name} in {file}: which tensor should be the first?"


def test_a_stale_expert_is_named_where_memory_is_short():
    mistake = "a stale expert slot: the last tenant's module serves the next"
    setting = setting_of("plain")._replace(ram=500_000)  # 7 of 22 experts fit beside what every token needs
    right, found = record("torch", setting), record(f"mutant:{mistake}", setting)
    assert not [line for line in lines(clean("plain"), right) if line.differs]
    first = next(line for line in lines(right, found) if line.differs)
    assert first.name.startswith(f"{MIXTURE}.experts."), first


# ---- what rounding explains ----


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("variant", ["float32", "bfloat16", "float64"])
def test_no_dtype_of_a_right_model_is_called_wrong(tmp_path, seed, variant):
    config = random_config(seed) if seed == 5 else small_config(num_hidden_layers=5)  # a narrow one, whose parts cancel more
    k2.save(random_model(config, seed), tmp_path / "c", format="bf16")
    setting = Setting(str(tmp_path / "c"), random_ids(config, TOKENS, seed=seed).tolist())
    right, found = record("numpy", setting), record(variant, setting)
    said = list(lines(right, found))
    assert not [line for line in said if line.differs], sentence(said, right, found, TOKENS)
    assert max(line.error for line in said) > 0


def made(name: str, values, *, tokens=None, dtype="float32", **others) -> Recording:
    """A recording of one tensor, and of others."""
    tensors = {name: np.array(values, dtype=float), **{k: np.array(v, dtype=float) for k, v in others.items()}}
    return Recording("x", dtype, 4, {k: Rows(np.arange(len(v)) if tokens is None else np.array(tokens), v) for k, v in tensors.items()})


@pytest.mark.parametrize("name, depth", [("model.embed_tokens", 1), ("model.layers.0", 1), ("model.layers.3.self_attn.o_proj", 4), ("model.norm", 4)])
def test_the_bound_is_the_coarser_dtypes_times_the_root_of_the_depth(name, depth):
    for error, differs in ((0.99e-5, False), (1.01e-5, True)):
        a, b = made(name, [[1.0, 0.0], [0.0, 1.0]], dtype="float64"), made(name, [[1.0, 0.0], [error * depth**0.5, 1.0]])
        line = next(lines(a, b))
        assert line.differs == differs and line.allowed == 1e-5 * depth**0.5
        assert line.tokens == ((1,) if differs else ()) and abs(line.error - error * depth**0.5) < 1e-18


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_differs(value):
    line = next(lines(made("model.norm", [[1.0, 2.0]]), made("model.norm", [[1.0, value]])))
    assert line.differs and line.error == np.inf


def test_another_width_differs_and_a_tensor_that_one_side_lacks_does_too():
    line = next(lines(made("model.norm", [[1.0, 2.0]]), made("model.norm", [[1.0]])))
    assert line.differs and "shape (1, 2) and (1, 1)" in line.verdict
    line = next(lines(made("model.norm", [[1.0, 2.0]]), made("lm_head", [[1.0]])))
    assert (line.name, line.differs, line.verdict) == ("model.norm", True, "only in x")


def routed(ids, biased, state) -> Recording:
    """The choice of layer 1 and the layer's output, for as many tokens as there are rows."""
    gate = "model.layers.1.mlp.gate"
    return made(f"{gate}.ids", ids, **{f"{gate}.biased_scores": biased, "model.layers.1": state})


def test_a_choice_by_a_hair_is_rounding_and_ends_what_can_be_compared():
    a = routed([[0, 1], [0, 1], [0, 1]], [[0.9, 0.5, 0.1], [0.9, 0.5, 0.499999], [0.9, 0.5, 0.1]], [[1.0], [1.0], [1.0]])
    b = routed([[0, 1], [2, 0], [1, 0]], [[0.9, 0.5, 0.1], [0.9, 0.499999, 0.5], [0.9, 0.5, 0.1]], [[1.0], [7.0], [7.0]])
    _, choice, state = lines(a, b)
    assert not choice.differs and choice.tokens == (1,) and "before token 1" in choice.verdict
    assert state.rows == 1 and not state.differs, "tokens 1 and 2 have parted rightly"


def test_a_choice_that_its_own_scores_do_not_explain_differs_on_either_side():
    right, wrong = ([[0, 1]], [[0.9, 0.5, 0.1]], [[1.0]]), ([[0, 2]], [[0.9, 0.5, 0.1]], [[1.0]])
    for a, b in ((right, wrong), (wrong, right)):
        choice = next(line for line in lines(routed(*a), routed(*b)) if line.name.endswith("ids"))
        assert choice.differs and abs(choice.error - 0.4) < 1e-12 and choice.tokens == (0,)


def test_where_the_first_token_parts_nothing_is_left_and_that_is_said():
    a, b = routed([[0]], [[0.5, 0.499999]], [[1.0]]), routed([[1]], [[0.499999, 0.5]], [[7.0]])
    a, b = (r._replace(tensors={**r.tensors, "lm_head": Rows(np.arange(1), np.ones((1, 3)))}) for r in (a, b))
    said = list(lines(a, b))
    assert [line.verdict for line in said[2:]] == ["nothing left to compare"] * 2 and not any(line.differs for line in said)
    assert "nothing was left, so that this says little" in sentence(said, a, b, 1)


def test_the_order_of_a_choice_is_no_difference_and_weights_follow_their_experts():
    gate = "model.layers.1.mlp.gate"
    a = made(f"{gate}.ids", [[0, 1]], **{f"{gate}.biased_scores": [[0.5, 0.5]], f"{gate}.weights": [[2.0, 1.0]]})
    b = made(f"{gate}.ids", [[1, 0]], **{f"{gate}.biased_scores": [[0.5, 0.5]], f"{gate}.weights": [[1.0, 2.0]]})
    assert not any(line.differs for line in lines(a, b))
    swapped = b._replace(tensors={**b.tensors, f"{gate}.weights": Rows(np.arange(1), np.array([[2.0, 1.0]]))})
    assert [line.name for line in lines(a, swapped) if line.differs] == [f"{gate}.weights"]


# ---- the command ----


def run(capfd, *arguments) -> tuple[int, str, str]:
    status = main(["compare", *map(str, arguments)])
    return status, *capfd.readouterr()


def test_the_table_ends_with_the_first_difference_and_all_of_it_can_be_had(capfd):
    status, out, err = run(capfd, "torch", "mutant:shared expert dropped")
    rows = [line.split() for line in out.splitlines()]
    assert status == 1 and err == "" and rows[0] == ["tensor", "rows", "error", "allowed", "verdict"]
    assert rows[-2][0] == "model.layers.1.mlp" and rows[-2][4] == "DIFFERS"
    assert out.splitlines()[-1].startswith("model.layers.1.mlp is the first tensor that differs: relative error 7")
    assert [place(row[0].replace("*", "0")) for row in rows[1:-1]] == sorted(place(row[0].replace("*", "0")) for row in rows[1:-1])
    status, everything, _ = run(capfd, "torch", "mutant:shared expert dropped", "--all")
    assert status == 1 and everything.splitlines()[-2].startswith("lm_head ") and everything.splitlines()[-1] == out.splitlines()[-1]


def test_equal_variants_end_with_0_and_say_what_was_compared(capfd):
    status, out, _ = run(capfd, "torch", "numpy", "--prompt", "def read(path):\n    return [line for line in open(path)]\n", "--dtype", "float64")
    assert status == 0 and "Nothing differs beyond rounding between torch and numpy" in out and "model.layers.3.mlp.experts.*" in out
    assert "DIFFERS" not in out


def test_a_variant_equals_itself_to_the_bit(capfd):
    status, out, _ = run(capfd, "bfloat16", "bfloat16")
    assert status == 0 and out.splitlines()[-1].endswith("tensors of 23 tokens are equal to the bit.")


def test_a_directory_is_a_variant(capfd, tmp_path):
    model = k2.load(MINI, dtype=torch.float32)
    model.model.layers[2].self_attn.q_a_layernorm.weight.data *= 1.01
    k2.save(model, tmp_path / "other", format="fp32")
    status, out, _ = run(capfd, "torch", tmp_path / "other")
    assert status == 1 and out.splitlines()[-1].startswith("model.layers.2.self_attn.q_a_layernorm is the first tensor that differs: relative error 1.0e-02")


@pytest.mark.oracle
def test_transformers_agrees(capfd):
    pytest.importorskip("transformers", reason="needs tests/requirements-oracles.txt")
    status, out, _ = run(capfd, "torch", "transformers")
    assert status == 0 and "model.layers.3.self_attn.queries" in out, out
    status, out, _ = run(capfd, "transformers", "mutant:kv_a_layernorm applied to the rotary part too")
    assert status == 1 and out.splitlines()[-1].startswith(f"{KEY} is the first")


def test_which_call_is_wrong_is_said():
    said = {}
    for mistake in ("causal mask missing when a cache is present", "the absorbed form without the rotary scores"):
        right, found = clean("plain"), record(f"mutant:{mistake}", setting_of("plain"))
        said[mistake] = sentence(list(lines(right, found)), right, found, TOKENS)
    assert said["causal mask missing when a cache is present"].endswith("(second chunk).")
    assert said["the absorbed form without the rotary scores"].endswith("(decode).")
    assert call_names(TOKENS) == ["first chunk"] * 10 + ["second chunk"] * 11 + ["decode"] * 3


@pytest.mark.parametrize("arguments, words", [
    (["torch", "nothing"], "nothing: no such variant. Expected torch, numpy"),
    (["torch", "mutant:no such"], "tests/mutants.py has no mistake of this name"),
    (["torch", "mutant:shared expert"], "Do you mean: scaling factor applied to the shared expert; shared expert dropped?"),
    (["torch", "numpy", "--prompt", "a b"], "--prompt: 2 tokens; expected 7 to 1024"),
    (["torch", "numpy", "--prompt", "a " * 4000], "expected 7 to 1024"),
    (["torch", "numpy", "--model", "nowhere"], "nowhere"),
    (["torch", "numpy", "--ram", "much"], "size: found 'much'"),
    (["torch", "mutant:shared expert dropped", "--ram", "1KB"], "the weights that every token needs take"),
    (["torch"], "the following arguments are required: B"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_line(capfd, arguments, words):
    status, out, err = run(capfd, *arguments)
    assert status == 2 and out == "" and words in err and len(err.splitlines()) == 1, err
