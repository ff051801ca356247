"""The specification itself, held to numbers that can be worked out by hand, and to the model in torch."""

import numpy as np
import torch
from small import assert_close, numbers, numpy_weights, random_ids, random_model, reference_logits, small_config

from k2 import reference


def test_sigmoid_is_right_and_never_overflows():
    found = reference.sigmoid(np.array([-1e4, -2.0, 0.0, 2.0, 1e4]))
    assert_close(found[None], [[0.0, 1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-2)), 1.0]], 1e-15)


def test_norm_of_a_worked_example():
    assert_close(reference.rms_norm(np.array([[3.0, 4.0]]), np.array([2.0, 10.0]), 0.0), np.array([[6.0, 40.0]]) / np.sqrt(12.5), 1e-15)


def test_neighbours_are_turned_as_a_pair():
    found = reference.rotate(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[np.pi / 2, np.pi]]))
    assert_close(found, [[-2.0, 1.0, -3.0, -4.0]], 1e-15)


def test_the_bias_chooses_and_never_weighs():
    score = np.array([0.9, 0.6, 0.5, 0.2])
    config = small_config(hidden_size=4, n_routed_experts=4, num_experts_per_tok=2)
    weights = {"m.gate.weight": np.eye(4), "m.gate.e_score_correction_bias": np.array([0.0, 0.0, 0.0, 2.0])}
    ids_TK, weights_TK = reference.route(config, weights, "m", np.log(score / (1 - score))[None])
    assert ids_TK.tolist() == [[3, 0]]
    assert_close(weights_TK, [[2.827 * 0.2 / 1.1, 2.827 * 0.9 / 1.1]], 1e-12)


def test_a_lone_token_attends_to_its_own_value():
    """With one token the softmax is 1: attention is o_proj(v), whatever the queries and keys."""
    config = small_config()
    weights = numpy_weights(random_model(config, 0, torch.float64))
    name, x_TD = "model.layers.0.self_attn", numbers(1, 48).numpy()
    latent = (x_TD @ weights[f"{name}.kv_a_proj_with_mqa.weight"].T)[:, :20]
    latent = latent / np.sqrt(np.mean(latent**2) + 1e-6) * weights[f"{name}.kv_a_layernorm.weight"]
    by_head = weights[f"{name}.kv_b_proj.weight"].reshape(3, 10 + 14, 20)
    values = np.concatenate([by_head[h, 10:] @ latent[0] for h in range(3)])
    assert_close(reference.attention(config, weights, name, x_TD), (weights[f"{name}.o_proj.weight"] @ values)[None], 1e-12)


def test_scores_of_one_head_by_loops():
    """Two tokens, attention written out number by number from the paper, with nothing of the reference in it."""
    config = small_config(num_attention_heads=1, rope_scaling=None, rope_theta=100.0)
    weights = numpy_weights(random_model(config, 0, torch.float64))
    name, x_TD = "model.layers.0.self_attn", numbers(2, 48).numpy()
    w = {key.removeprefix(f"{name}.").removesuffix(".weight"): value for key, value in weights.items() if key.startswith(name)}

    def normed(v, weight):
        return v / np.sqrt((v @ v) / len(v) + 1e-6) * weight

    def turned(v, position):
        out = v.copy()
        for i in range(6):
            a = position * 100.0 ** (-2 * i / 12)
            out[2 * i] = v[2 * i] * np.cos(a) - v[2 * i + 1] * np.sin(a)
            out[2 * i + 1] = v[2 * i] * np.sin(a) + v[2 * i + 1] * np.cos(a)
        return out

    keys, values, queries = [], [], []
    for t, x in enumerate(x_TD):
        q = w["q_b_proj"] @ normed(w["q_a_proj"] @ x, w["q_a_layernorm"])
        queries.append(np.concatenate([q[:10], turned(q[10:], t)]))
        latent = w["kv_a_proj_with_mqa"] @ x
        kv = w["kv_b_proj"] @ normed(latent[:20], w["kv_a_layernorm"])
        keys.append(np.concatenate([kv[:10], turned(latent[20:], t)]))
        values.append(kv[10:])
    scores = np.exp([queries[1] @ key / np.sqrt(22) for key in keys])
    mixed = (scores[0] * values[0] + scores[1] * values[1]) / scores.sum()
    assert_close(reference.attention(config, weights, name, x_TD), np.stack([w["o_proj"] @ values[0], w["o_proj"] @ mixed]), 1e-12)


def test_a_later_token_moves_no_earlier_logits():
    config = small_config()
    model, ids = random_model(config, 0, torch.float64), random_ids(config, 8)
    whole_TW = reference_logits(model, ids)
    for t in (1, 4, 7):
        assert_close(reference_logits(model, ids[:t]), whole_TW[:t], 1e-12, f"first {t} tokens")


@torch.no_grad()
def test_greedy_continuation_is_that_of_the_model():
    config = small_config()
    model, ids = random_model(config, 0, torch.float64), random_ids(config, 5).tolist()
    found = list(reference.generate(config, numpy_weights(model), ids, 8))
    for new in found:
        assert new == int(model(torch.tensor(ids))[-1].argmax())
        ids.append(new)
    assert len(found) == 8


def test_generation_ends_at_a_stop_id():
    config = small_config()
    weights, ids = numpy_weights(random_model(config)), random_ids(config, 5).tolist()
    free = list(reference.generate(config, weights, ids, 8))
    assert list(reference.generate(config, weights, ids, 8, stop_ids=(free[3],))) == free[: free.index(free[3])]
