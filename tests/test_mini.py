"""The model that ships: in the released layout, as good as its card says, and saying the same text on every machine."""

import json
import re
from pathlib import Path

import pytest
import torch

import k2
from k2.__main__ import MINI, main
from k2.training import corpus, evaluation

CARD = (Path(MINI) / "README.md").read_text(encoding="utf-8")
GOLDEN = json.loads((Path(__file__).parent / "mini_golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mini():
    return k2.load(MINI, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return k2.Tokenizer.from_directory(MINI)


def test_it_has_the_files_of_a_released_checkpoint_and_is_small():
    names = {p.name for p in Path(MINI).iterdir()}
    shards = {n for n in names if n.endswith(".safetensors")}
    assert len(shards) > 1 and all(re.fullmatch(r"model-\d-of-\d\.safetensors", n) for n in shards)
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "tiktoken.model", "tokenizer_config.json"} <= names
    assert sum(p.stat().st_size for p in Path(MINI).iterdir()) < 16.5e6


def test_its_config_has_every_mechanism_of_k2():
    config = k2.K2Config.from_json(MINI)
    raw = json.loads((Path(MINI) / "config.json").read_text())
    assert raw["model_type"] == "kimi_k2" and config.weight_format == "fp8"
    assert config.first_k_dense_replace == 1 and config.n_shared_experts == 1
    assert config.q_lora_rank and config.rope_scaling.factor > 1
    assert config.n_routed_experts / config.num_experts_per_tok >= 12


def test_yarn_changes_its_angles():
    from dataclasses import replace

    from k2.rope import rope_frequencies

    config = k2.K2Config.from_json(MINI)
    plain, slowed = rope_frequencies(replace(config, rope_scaling=None)), rope_frequencies(config)
    assert 0 < (plain != slowed).sum() < len(plain)


def test_the_router_bias_has_been_trained(mini):
    for layer in mini.model.layers[1:]:
        assert layer.mlp.gate.e_score_correction_bias.std() > 0


@pytest.mark.parametrize("sample", GOLDEN, ids=lambda s: repr(s["prompt"][:20]))
def test_its_greedy_text_is_the_committed_one(mini, tokenizer, sample):
    ids = tokenizer.encode(sample["prompt"])
    found = list(k2.generate(mini, ids, sample["tokens"], stop_ids=tokenizer.stop_ids))
    assert tokenizer.decode(found) == sample["text"]


@pytest.mark.parametrize("sample", GOLDEN, ids=lambda s: repr(s["prompt"][:20]))
def test_the_committed_text_hangs_on_no_rounding(mini, tokenizer, sample):
    """The smallest gap between the best and the second-best logit along the text, against float32's error of about 1e-5."""
    ids = tokenizer.encode(sample["prompt"])
    new = list(k2.generate(mini, ids, sample["tokens"], stop_ids=tokenizer.stop_ids))
    with torch.inference_mode():
        top = mini(torch.tensor(ids + new))[len(ids) - 1 : -1].topk(2, dim=-1).values
    margin = float((top[:, 0] - top[:, 1]).min())
    assert margin > 1e-3 and abs(margin - sample["smallest_margin"]) < 1e-3, f"smallest margin {margin:.6f}"


def test_numpy_and_torch_say_the_same(capsys):
    arguments = ["generate", GOLDEN[0]["prompt"], "--max-new-tokens", "16", "--dtype", "float32"]
    texts = []
    for backend in ("torch", "numpy"):
        assert main([*arguments, "--backend", backend]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()


def test_its_logits_are_the_references(mini, tokenizer):
    from k2 import reference

    ids = tokenizer.encode(GOLDEN[0]["prompt"] + GOLDEN[0]["text"])[:40]
    weights = {name: tensor.double().numpy() for name, tensor in mini.state_dict().items()}
    expected = torch.from_numpy(reference.logits(mini.config, weights, ids))
    with torch.inference_mode():
        found = mini(torch.tensor(ids)).double()
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    assert error < 5e-6 * mini.config.num_hidden_layers**0.5, f"worst row {error:.2e}"


def card_figure(label: str) -> float:
    """The number of a row of the card's table."""
    return float(re.search(rf"\| {re.escape(label)} \| ([\d.]+)", CARD)[1])


def same_held_out_text() -> bool:
    return corpus.digest_lines() == (Path(MINI) / "held_out.sha256").read_text().splitlines()


def test_it_beats_xz_on_held_out_text_as_the_card_says(mini, tokenizer):
    if not same_held_out_text():
        pytest.skip("another Python version: its standard library differs from the one the card's figures are of")
    text = evaluation.held_out_text()[:40_000]
    found = evaluation.bits_per_byte(mini, tokenizer.encode(text), len(text.encode()))
    assert abs(found - card_figure("first 40,000 characters, FP8")) < 0.002, f"{found:.4f} bits per byte"
    assert card_figure("whole stream, FP8") < card_figure("xz -9e behind the training text") < card_figure("xz -9e")
    assert card_figure("whole stream, FP8") < 1.01 * card_figure("whole stream, bf16")


def test_no_expert_is_dead(mini, tokenizer):
    if not same_held_out_text():
        pytest.skip("another Python version: its standard library differs from the one the card's figures are of")
    ids = tokenizer.encode(evaluation.held_out_text()[-16_000:])
    for idlest, busiest in evaluation.expert_shares(mini, ids[: len(ids) // 256 * 256]):
        assert idlest > 0.02 and busiest < 8, f"idlest {idlest:.3f}, busiest {busiest:.2f} times the mean"


def test_bytes_that_are_no_text_never_reach_a_control_token(tokenizer):
    assert not set(tokenizer.encode("<|im_end|>[EOS]<|im_user|>")) & set(tokenizer.special.values())
    assert tokenizer.special["[EOS]"] == 3841 and tokenizer.special["<|im_end|>"] == 3842


@pytest.mark.slow
def test_it_finds_a_line_again_over_four_pretraining_windows(mini, tokenizer):
    """More often than chance, 1/8; the card says how often. 1,024 tokens against windows of 256."""
    found = [evaluation.needle_accuracy(mini, tokenizer, 1024, depth) for depth in (0.0, 0.5, 0.9)]
    assert (found[0] + found[1]) / 2 > 0.21 and found[2] > 0.5, f"{found}; chance is 0.125, plus or minus 0.037 for the first two together"
