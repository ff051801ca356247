"""Kimi K2 in numpy, float64, from top to bottom: the specification that every other file is held to.

No cache, no batch, no tricks: a sequence goes in, logits come out, each line a formula. `weights` maps the checkpoint's
names to float64 arrays; a matrix is (outputs, inputs), so y = x W^T. Slow, and meant to be read in one sitting.

    T tokens (S the same tokens, seen as keys) · D hidden · H heads · N, R a head's plain and rotary part · A = N + R
    V value width · Q, C query and key-value ranks · E experts · K chosen · F width · P pairs · W vocabulary
"""

import numpy as np

from .config import K2Config

LATENT_EPS = 1e-6


def logits(config: K2Config, weights, ids) -> np.ndarray:
    """Logits (T, W) of a sequence of T ids: the whole model."""
    x_TD = weights["model.embed_tokens.weight"][np.asarray(ids)]
    for layer in range(config.num_hidden_layers):
        x_TD = decoder_layer(config, weights, layer, x_TD)
    return rms_norm(x_TD, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


def decoder_layer(config: K2Config, weights, layer: int, x_TD):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); (T, D) -> (T, D)."""
    name = f"model.layers.{layer}"
    normed_TD = rms_norm(x_TD, weights[f"{name}.input_layernorm.weight"], config.rms_norm_eps)
    x_TD = x_TD + attention(config, weights, f"{name}.self_attn", normed_TD)
    normed_TD = rms_norm(x_TD, weights[f"{name}.post_attention_layernorm.weight"], config.rms_norm_eps)
    feed_forward = swiglu(weights, f"{name}.mlp", normed_TD) if config.is_dense(layer) else moe(config, weights, f"{name}.mlp", normed_TD)
    return x_TD + feed_forward


def rms_norm(x_TI, weight_I, eps: float):
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x_TI / np.sqrt(np.mean(x_TI**2, axis=-1, keepdims=True) + eps) * weight_I


def rope_frequencies(config: K2Config):
    """Radians per token of each pair, (P,): theta^(-2i/R), slowed by YaRN where a pair turns less than once."""
    R, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    pair_P = np.arange(R // 2)
    plain_P = theta ** (-2.0 * pair_P / R)
    if yarn is None:
        return plain_P
    turns_once = R * np.log(yarn.original_max_position_embeddings / (2 * np.pi * np.array([yarn.beta_fast, yarn.beta_slow]))) / (2 * np.log(theta))
    low, high = max(np.floor(turns_once[0]), 0), min(np.ceil(turns_once[1]), R - 1)
    ramp_P = np.clip((pair_P - low) / (high - low or 0.001), 0, 1)
    return plain_P * (1 - ramp_P) + plain_P / yarn.factor * ramp_P


def rotate(x_TR, angle_TP):
    """Each neighbouring pair as a complex number, times e^(i angle)."""
    turned_TP = (x_TR[..., 0::2] + 1j * x_TR[..., 1::2]) * np.exp(1j * angle_TP)
    return np.stack((turned_TP.real, turned_TP.imag), axis=-1).reshape(x_TR.shape)


def attention(config: K2Config, weights, name: str, x_TD):
    """Multi-head latent attention, every head's keys and values written out; (T, D) -> (T, D)."""
    c, T = config, len(x_TD)
    H, N, A, C = c.num_attention_heads, c.qk_nope_head_dim, c.qk_head_dim, c.kv_lora_rank
    angle_TP = np.arange(T)[:, None] * rope_frequencies(c)

    q_HTA = queries(c, weights, name, x_TD).reshape(T, H, A).transpose(1, 0, 2)
    q_nope_HTN, q_rope_HTR = q_HTA[..., :N], rotate(q_HTA[..., N:], angle_TP)
    latent_TI = x_TD @ weights[f"{name}.kv_a_proj_with_mqa.weight"].T
    c_kv_SC = rms_norm(latent_TI[:, :C], weights[f"{name}.kv_a_layernorm.weight"], LATENT_EPS)
    k_rope_SR = rotate(latent_TI[:, C:], angle_TP)  # one rotary key for all heads, not normalised
    kv_HSO = (c_kv_SC @ weights[f"{name}.kv_b_proj.weight"].T).reshape(T, H, -1).transpose(1, 0, 2)
    k_nope_HSN, v_HSV = kv_HSO[..., :N], kv_HSO[..., N:]

    scores_HTS = softmax_scale(c) * (q_nope_HTN @ k_nope_HSN.transpose(0, 2, 1) + q_rope_HTR @ k_rope_SR.T)
    scores_HTS = np.where(np.tri(T, dtype=bool), scores_HTS, -np.inf)
    weights_HTS = np.exp(scores_HTS - scores_HTS.max(axis=-1, keepdims=True))
    mixed_HTV = weights_HTS / weights_HTS.sum(axis=-1, keepdims=True) @ v_HSV
    return mixed_HTV.transpose(1, 0, 2).reshape(T, -1) @ weights[f"{name}.o_proj.weight"].T


def softmax_scale(config: K2Config) -> float:
    """m^2 / sqrt(A), where YaRN's m grows with the logarithm of the factor and is 1 without YaRN."""
    yarn = config.rope_scaling
    m = 1 + 0.1 * yarn.mscale_all_dim * np.log(yarn.factor) if yarn else 1.0
    return m**2 / np.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)


def queries(config: K2Config, weights, name: str, x_TD):
    """All heads' queries side by side, (T, H x A): through the query latent, or directly where there is none."""
    if config.q_lora_rank is None:
        return x_TD @ weights[f"{name}.q_proj.weight"].T
    c_q_TQ = rms_norm(x_TD @ weights[f"{name}.q_a_proj.weight"].T, weights[f"{name}.q_a_layernorm.weight"], LATENT_EPS)
    return c_q_TQ @ weights[f"{name}.q_b_proj.weight"].T


def swiglu(weights, name: str, x_TD):
    """W_down (silu(W_gate x) * W_up x), silu(a) = a / (1 + e^-a); (T, D) -> (T, D)."""
    gate_TF = x_TD @ weights[f"{name}.gate_proj.weight"].T
    up_TF = x_TD @ weights[f"{name}.up_proj.weight"].T
    return (gate_TF * sigmoid(gate_TF) * up_TF) @ weights[f"{name}.down_proj.weight"].T


def sigmoid(x):
    """1 / (1 + e^-x), written with tanh so that no exponential overflows."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def route(config: K2Config, weights, name: str, x_TD):
    """The chosen experts (T, K) and their weights (T, K): the bias chooses, the unbiased score weighs."""
    scores_TE = sigmoid(x_TD @ weights[f"{name}.gate.weight"].T)
    biased_TE = scores_TE + weights[f"{name}.gate.e_score_correction_bias"]
    expert_ids_TK = np.argsort(-biased_TE, axis=-1, kind="stable")[:, : config.num_experts_per_tok]
    weights_TK = np.take_along_axis(scores_TE, expert_ids_TK, axis=-1)
    weights_TK = weights_TK / (weights_TK.sum(axis=-1, keepdims=True) + 1e-20)
    return expert_ids_TK, weights_TK * config.routed_scaling_factor


def moe(config: K2Config, weights, name: str, x_TD):
    """The shared expert, plus each token's K experts by weight; (T, D) -> (T, D)."""
    expert_ids_TK, weights_TK = route(config, weights, name, x_TD)
    y_TD = swiglu(weights, f"{name}.shared_experts", x_TD)
    for t in range(len(x_TD)):
        for e, weight in zip(expert_ids_TK[t], weights_TK[t]):
            y_TD[t] += weight * swiglu(weights, f"{name}.experts.{e}", x_TD[t : t + 1])[0]
    return y_TD


def generate(config: K2Config, weights, ids, max_new_tokens: int, stop_ids=()):
    """Greedy continuation, id by id, the whole sequence anew for each."""
    ids = list(ids)
    for _ in range(max_new_tokens):
        ids.append(int(logits(config, weights, ids)[-1].argmax()))
        if ids[-1] in stop_ids:
            return
        yield ids[-1]
