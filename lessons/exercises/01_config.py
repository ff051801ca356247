"""How many weights does one token meet?

Complete `answer(config)`: the number of weights that one token is multiplied with (or looked up in) on its way through the
model, the embedding counted whole. Use the config's fields and nothing else. Count

    the embedding and the output head, vocab_size x hidden_size each
    per layer: the attention matrices of `attention_shapes` in k2/checkpoint.py (with q_lora_rank None there is one query
        matrix instead of two), two norms of hidden_size, and a norm for each latent: kv_lora_rank, and q_lora_rank if any
    layers below first_k_dense_replace: one feed-forward of three matrices hidden_size x intermediate_size
    other layers: a router (one row and one bias for each routed expert), the chosen experts, the shared ones
    the last norm, hidden_size
"""


def stub(config):
    """The number of weights, an int. `config` is a k2.config.K2Config."""
    raise NotImplementedError


def check(answer):
    from lessons.counts import active, config, expert, moe_layers, table, total

    for name in ("kimi-k2-instruct", "mini", "moonlight-16b-a3b-instruct"):
        c = config(name)
        found, right = answer(c), active(c)
        assert isinstance(found, int), f"{name}: expected an int, found {type(found).__name__}"
        if found == right:
            continue
        off = found - right
        known = {
            total(c) - right: "that is all weights: a token meets only num_experts_per_tok of the routed experts in a layer",
            -moe_layers(c) * c.n_shared_experts * expert(c): "the shared experts are missing, n_shared_experts in each layer with a router",
            -moe_layers(c) * (c.n_shared_experts - 1) * expert(c): "this member has more than one shared expert: n_shared_experts",
            -table(c): "one of the two tables is missing: embedding and output head are separate matrices",
        }
        why = known.get(off, f"it is {abs(off):,} too {'many' if off > 0 else 'few'}; which product of config fields is that?")
        raise AssertionError(f"{name}: found {found:,}, expected {right:,}: {why}")


HINT = """Start from one layer and write a line for each of its parts. A layer with experts has
config.num_experts_per_tok + config.n_shared_experts experts for one token, each of 3 * hidden_size * moe_intermediate_size.
If Moonlight alone is off, look at q_lora_rank None: one matrix, and one norm less."""


def solution(config):
    D, C, R, H = config.hidden_size, config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
    N, V, Q = config.qk_nope_head_dim, config.v_head_dim, config.q_lora_rank
    queries = Q * D + H * (N + R) * Q + Q if Q else H * (N + R) * D
    attention = queries + (C + R) * D + C + H * (N + V) * C + D * H * V
    dense = 3 * D * config.intermediate_size
    experts = (config.num_experts_per_tok + config.n_shared_experts) * 3 * D * config.moe_intermediate_size
    router = config.n_routed_experts * (D + 1)
    first, rest = config.first_k_dense_replace, config.num_hidden_layers - config.first_k_dense_replace
    return 2 * config.vocab_size * D + config.num_hidden_layers * (attention + 2 * D) + first * dense + rest * (experts + router) + D


def all_experts(config):
    idle = config.n_routed_experts - config.num_experts_per_tok
    return solution(config) + (config.num_hidden_layers - config.first_k_dense_replace) * idle * 3 * config.hidden_size * config.moe_intermediate_size


def no_shared_expert(config):
    return solution(config) - (config.num_hidden_layers - config.first_k_dense_replace) * config.n_shared_experts * 3 * config.hidden_size * config.moe_intermediate_size


def one_shared_expert(config):
    extra = config.n_shared_experts - 1
    return solution(config) - (config.num_hidden_layers - config.first_k_dense_replace) * extra * 3 * config.hidden_size * config.moe_intermediate_size


def one_table(config):
    return solution(config) - config.vocab_size * config.hidden_size


WRONG = {
    "all routed experts counted": (all_experts, "only num_experts_per_tok"),
    "the shared expert forgotten": (no_shared_expert, "shared experts are missing"),
    "one shared expert where Moonlight has two": (one_shared_expert, "more than one shared expert"),
    "tied tables": (one_table, "separate matrices"),
}
