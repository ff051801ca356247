"""The benchmark: both engines run the same checkpoint to the same tokens, and what is printed is what was measured."""

import re

import pytest
import torch
from small import random_model, small_config

from k2 import K2Error, beside
from k2.__main__ import main
from k2.checkpoint import DTYPES, save


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint that transformers takes too (its kernel wants widths of whole 16 bytes), with a vocabulary as wide as the benchmark's prompts."""
    directory = tmp_path_factory.mktemp("bench") / "model"
    save(random_model(small_config(vocab_size=4096, moe_intermediate_size=28)), directory, format="fp32", shards=1)
    return directory


@pytest.fixture
def children_in_process(monkeypatch):
    """No process per measurement: the figures are not looked at here."""
    monkeypatch.setattr(beside, "run_child", lambda engine, directory, prompt, new, dtype: beside.child(engine, str(directory), prompt, new, DTYPES[dtype]))


def test_a_measurement_is_of_this_many_tokens(directory):
    found = beside.child("k2", str(directory), 70, 5, torch.float32)
    assert len(found["ids"]) == 6 and len(found["logits"]) == 4096 and found["logits"].index(max(found["logits"])) == found["ids"][0]
    assert found["prefill"] == pytest.approx(70 / found["first"])
    assert all(found[key] > 0 for key in ("load", "first", "prefill", "decode", "peak"))


@pytest.mark.oracle
def test_both_engines_choose_the_same_tokens(directory, children_in_process, capsys):
    pytest.importorskip("transformers", reason="tests/requirements-oracles.txt is not installed")
    beside.compare("small", directory, 70, 5, 1)
    printed = capsys.readouterr().out
    assert float(re.search(r"by (\S+) of their spread", printed)[1]) < 1e-5
    assert "same greedy tokens: yes" in printed and printed.count("times transformers") == 2


LOGITS = {"transformers": [-1.0, 0.0, 1.0], "k2": [-0.5, 0.5, 1.5]}


@pytest.mark.parametrize("dtype, why", [("float32", ""), ("bfloat16", " (each rounds bfloat16 at other places")])
def test_tokens_that_differ_are_shouted(directory, monkeypatch, capsys, dtype, why):
    fake = {"load": 1.0, "first": 1.0, "prefill": 10.0, "decode": 3.0, "peak": 7.0}
    monkeypatch.setattr(beside, "run_child", lambda engine, *_: {**fake, "decode": {"k2": 6.0, "transformers": 3.0}[engine], "ids": [len(engine)], "logits": LOGITS[engine], "dtype": dtype})
    beside.compare("small", directory, 70, 5, 3)
    printed = capsys.readouterr().out
    assert "logits behind the prompt apart from transformers' by 5.0e-01 of their spread" in printed
    assert f"same greedy tokens: NO, they part after 0 of 1{why}" in printed and ("at other places" in printed) == bool(why)
    assert "k2: decode 2.00 times transformers (2.00 to 2.00)" in printed


@pytest.mark.parametrize("asked, told", [([], "auto"), (["--dtype", "stored"], "auto"), (["--dtype", "float32"], "float32")])
def test_a_checkpoint_is_compared_in_the_dtype_that_was_asked_for(directory, monkeypatch, asked, told):
    told_of = []
    monkeypatch.setattr(beside, "compare", lambda *given: told_of.append(given))
    assert main(["bench", str(directory), "--beside", "--rounds", "2", *asked]) == 0
    assert told_of == [(directory.name, directory, 512, 32, 2, told, False)]


def test_an_engine_that_fails_is_named(tmp_path):
    with pytest.raises(K2Error, match="k2 failed"):
        beside.run_child("k2", tmp_path / "nothing", 4, 1, "float32")


def test_the_mid_size_model_has_the_sizes_of_an_ordinary_one():
    from k2.__main__ import MINI
    from k2.config import K2Config

    with torch.device("meta"):
        config = beside.random_model(K2Config.from_json(MINI)).config
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (1024, 8, 64)
