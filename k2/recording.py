"""Every tensor of a forward pass, under the checkpoint's module names, caught in torch, in numpy and in transformers.

    torch          hooks on modules; what is no module (rotated queries and keys, scores) is asked for once more of the
                   methods that made it, which are functions of their inputs
    numpy          k2/reference.py is run as it stands, and each of its functions is looked at as it returns
    transformers   hooks, and one function looked at as it returns

None of the three is changed. All read the same ids: a prompt in two chunks, then tokens one by one, as mistakes that
need a cache show only behind one. The reference has no cache; its rows are those of the whole sequence at once.

    T tokens · M rows of some of them · I a tensor's width, heads side by side · D hidden · H heads · E experts · K chosen · R rotary part
"""

import contextlib
import re
import sys
from typing import NamedTuple

import numpy as np
import torch

from . import reference

DECODED = 3  # tokens read one by one at the end
FEWEST = 4 + DECODED  # tokens: two chunks of at least two, since a single token takes attention's absorbed form

# The parts of a layer in the order in which a token meets them; "" is the layer's own output.
LAYER = ["input_layernorm", "self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj", "self_attn.q_proj", "self_attn.queries", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm", "self_attn.rotary_key", "self_attn.heads", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate.scores", "mlp.gate.biased_scores", "mlp.gate.ids", "mlp.gate.weights", "mlp.experts", "mlp.shared_experts", "mlp"] + [""]
HOOKED = {*LAYER, "mlp.gate", "self_attn"} - {"mlp.experts"}  # modules; experts are watched where they are fetched


class Rows(NamedTuple):
    """A tensor's rows (M, I) in float64 and the tokens (M,) that they belong to, ascending."""

    tokens: np.ndarray
    values: np.ndarray


class Recording(NamedTuple):
    """What one variant computed. `hidden`: the parts of a layer that it cannot show, which prove nothing by their absence."""

    variant: str
    dtype: str
    layers: int
    tensors: dict[str, Rows]
    hidden: tuple[str, ...] = ()


def layer_and_part(name: str) -> tuple[int, str, int]:
    """model.layers.3.mlp.experts.17 -> (3, "mlp.experts", 17); -1 for a layer or an expert that is none."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.?(.*)", name)
    if found is None:
        return -1, name, -1
    expert = re.fullmatch(r"mlp\.experts\.(\d+)", found[2])
    return int(found[1]), "mlp.experts" if expert else found[2], int(expert[1]) if expert else -1


def place(name: str) -> tuple[int, int, int]:
    """A key that sorts names in the order in which a token meets them."""
    layer, part, expert = layer_and_part(name)
    if layer < 0:
        return {"model.embed_tokens": (-1, 0, 0), "model.norm": (10**6, 0, 0), "lm_head": (10**6, 1, 0)}[name]
    return layer, LAYER.index(part), expert


def calls(tokens: int) -> list[slice]:
    """Which tokens each call reads: two chunks, then one by one."""
    prompt = tokens - DECODED
    return [slice(0, prompt // 2), slice(prompt // 2, prompt), *(slice(t, t + 1) for t in range(prompt, tokens))]


def call_names(tokens: int) -> list[str]:
    """What each token was read in: "first chunk", "second chunk" or "decode"."""
    first, second = calls(tokens)[:2]
    return ["first chunk"] * first.stop + ["second chunk"] * (second.stop - first.stop) + ["decode"] * (tokens - second.stop)


class Tape:
    """Collects rows by name. Within a call the last word on a name counts: an expert store asks the router twice, and the
    first time is a guess."""

    def __init__(self):
        self.kept: dict[str, list[Rows]] = {}
        self.of_call: dict[str, tuple] = {}

    def keep(self, name: str, values, tokens=None):
        """A tensor (..., I) of this call, of all its tokens or of those given by their place in it."""
        if isinstance(values, torch.Tensor):
            values = values.detach().double().cpu().numpy()
        self.of_call[name] = tokens, np.array(values, dtype=np.float64).reshape(-1, values.shape[-1])

    def keep_heads(self, name: str, values):
        """A tensor (..., H, T, I) as rows of all heads side by side, H x I numbers a token."""
        values = np.asarray(values.detach().double().cpu()) if isinstance(values, torch.Tensor) else values
        values = values.reshape(values.shape[-3:]).swapaxes(0, 1)
        self.keep(name, values.reshape(len(values), -1))

    def end_call(self, first: int):
        """The call read tokens from `first` on: add its rows to those of the calls before."""
        for name, (tokens, values_MI) in self.of_call.items():
            own = np.arange(len(values_MI)) if tokens is None else tokens
            self.kept.setdefault(name, []).append(Rows(first + own, values_MI))
        self.of_call = {}

    def tensors(self) -> dict[str, Rows]:
        """All rows of each name, in the order of the tokens."""
        return {name: Rows(*(np.concatenate(parts) for parts in zip(*rows))) for name, rows in self.kept.items()}


# ---- torch ----


def torch_recording(variant: str, model, cache, ids: list[int]) -> Recording:
    """Run our model behind an empty cache of its own package."""
    tape = Tape()
    with torch.inference_mode(), torch_hooks(model, tape):
        for part in calls(len(ids)):
            tape.keep("lm_head", model(torch.tensor(ids[part]), cache))
            tape.end_call(part.start)
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return Recording(variant, dtype, len(model.model.layers), tape.tensors())


@contextlib.contextmanager
def torch_hooks(model, tape: Tape):
    """While this lasts, what the model's modules give out goes to the tape."""
    handles, stores = [], []
    for name, module in model.named_modules():
        if name in ("model.embed_tokens", "model.norm") or name.startswith("model.layers.") and layer_and_part(name)[1] in HOOKED:
            handles.append(module.register_forward_hook(lambda module, inputs, output, name=name: keep_output(tape, name, module, inputs, output)))
        if name.endswith("mlp.experts") and hasattr(module, "fetch"):
            module.fetch = watched_fetch(tape, name, module.fetch)
            stores.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in stores:
            del module.fetch  # the class's own stands again


def keep_output(tape: Tape, name: str, module, inputs, output):
    """A module's output; of attention and router also what they computed on the way, from the same inputs."""
    if name.endswith("self_attn"):
        x_TD, cos_TP, sin_TP = inputs[:3]
        tape.keep_heads(f"{name}.queries", torch.cat(module.queries(x_TD, cos_TP, sin_TP), dim=-1))
        c_kv_TC, k_rope_TR = module.latents(x_TD, cos_TP, sin_TP)
        tape.keep(f"{name}.kv_a_layernorm", c_kv_TC)  # as the cache gets it, whether or not the norm had a hand in it
        tape.keep(f"{name}.rotary_key", k_rope_TR)
    elif name.endswith("mlp.gate"):
        scores_TE, (expert_ids_TK, weights_TK) = module.scores(inputs[0]), output
        keep_choice(tape, name, scores_TE, scores_TE + module.e_score_correction_bias, expert_ids_TK, weights_TK)
    else:
        tape.keep(name, output)
        if name.endswith("self_attn.o_proj"):
            tape.keep(name.replace("o_proj", "heads"), inputs[0])


def keep_choice(tape: Tape, name: str, scores_TE, biased_TE, expert_ids_TK, weights_TK):
    """The router's four tensors."""
    for part, values in (("scores", scores_TE), ("biased_scores", biased_TE), ("ids", expert_ids_TK), ("weights", weights_TK)):
        tape.keep(f"{name}.{part}", values)


def watched_fetch(tape: Tape, name: str, fetch):
    """The same `fetch`, whose experts also tell the tape what they answer; wherever they live."""

    def watched(ids):
        chosen_TK = tape.of_call[name.replace("experts", "gate.ids")][1]
        for e, expert in fetch(ids):
            tokens = np.flatnonzero((chosen_TK == e).any(axis=-1))
            yield e, lambda x_MD, e=e, expert=expert, tokens=tokens: kept_answer(tape, f"{name}.{e}", expert(x_MD), tokens)

    return watched


def kept_answer(tape: Tape, name: str, y_MD, tokens):
    """What an expert answered, passed on."""
    tape.keep(name, y_MD, tokens)
    return y_MD


# ---- numpy ----


@contextlib.contextmanager
def watched_functions(file: str, look):
    """While this lasts, `look(frame, event, result)` sees the calls and returns of one file's functions."""
    before = sys.getprofile()

    def profile(frame, event, result):
        if event in ("call", "return") and frame.f_code.co_filename == file:
            look(frame, event, result)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def numpy_recording(variant: str, config, weights, ids: list[int]) -> Recording:
    """Run the reference on the whole sequence."""
    tape, answers = Tape(), {}
    with watched_functions(reference.__file__, lambda frame, event, result: look_at_reference(tape, answers, frame, event, result)):
        reference.logits(config, weights, ids)
    for name, rows in answers.items():  # the reference asks an expert token by token
        tape.keep(name, np.concatenate(list(rows.values())), np.array(list(rows)))
    tape.end_call(0)
    return Recording(variant, "float64", config.num_hidden_layers, tape.tensors())


def look_at_reference(tape: Tape, answers: dict, frame, event: str, result):
    """One call or return of k2/reference.py."""
    function, names = frame.f_code.co_name, frame.f_locals
    if event == "call":
        if function == "decoder_layer" and names["layer"] == 0:
            tape.keep("model.embed_tokens", names["x_TD"])
    elif function == "rms_norm":
        look_at_norm(tape, frame, result)
    elif function == "queries":
        tape.keep(f"{names['name']}.{'q_b_proj' if 'c_q_TQ' in names else 'q_proj'}", result)
    elif function == "attention":
        name = names["name"]
        tape.keep_heads(f"{name}.queries", np.concatenate((names["q_nope_HTN"], names["q_rope_HTR"]), axis=-1))
        for part, local in (("kv_a_proj_with_mqa", "latent_TI"), ("kv_a_layernorm", "c_kv_SC"), ("rotary_key", "k_rope_SR")):
            tape.keep(f"{name}.{part}", names[local])
        tape.keep_heads(f"{name}.heads", names["mixed_HTV"])
        tape.keep(f"{name}.o_proj", result)
    elif function == "route":
        keep_choice(tape, f"{names['name']}.gate", names["scores_TE"], names["biased_TE"], *result)
    elif function == "swiglu" and ".experts." in names["name"]:
        answers.setdefault(names["name"], {})[frame.f_back.f_locals["t"]] = result
    elif function in ("swiglu", "moe", "decoder_layer"):
        tape.keep(names["name"], result)
    elif function == "logits":
        tape.keep("lm_head", result)


def look_at_norm(tape: Tape, frame, result):
    """A norm is named by who called it, and by what it has in its hands: attention's latents are kept there."""
    caller, names = frame.f_back.f_code.co_name, frame.f_back.f_locals
    if caller == "queries":
        tape.keep(f"{names['name']}.q_a_proj", frame.f_locals["x_TI"])
        tape.keep(f"{names['name']}.q_a_layernorm", result)
    elif caller == "decoder_layer":  # the second norm finds the first one's result among the caller's names
        tape.keep(f"{names['name']}.{'post_attention_layernorm' if 'normed_TD' in names else 'input_layernorm'}", result)
    elif caller == "logits":
        tape.keep("model.norm", result)


# ---- transformers ----


def transformers_recording(variant: str, model, cache, ids: list[int]) -> Recording:
    """Run transformers' DeepseekV3ForCausalLM. Its experts are one module, so that single ones are hidden."""
    tape, names = Tape(), {module: name for name, module in model.named_modules()}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: keep_theirs(tape, name, module, inputs, output))
        for module, name in names.items()
        if name in ("model.embed_tokens", "model.norm") or name.startswith("model.layers.") and layer_and_part(name)[1] in HOOKED - {"self_attn"}
    ]
    file = sys.modules[type(model).__module__].__file__
    with torch.inference_mode(), watched_functions(file, lambda frame, event, result: look_at_theirs(tape, names, frame, event)):
        for part in calls(len(ids)):
            tape.keep("lm_head", model(input_ids=torch.tensor([ids[part]]), past_key_values=cache, use_cache=True).logits)
            tape.end_call(part.start)
    for handle in handles:
        handle.remove()
    dtype = str(model.dtype).removeprefix("torch.")
    return Recording(variant, dtype, len(model.model.layers), tape.tensors(), hidden=("mlp.experts",))


def keep_theirs(tape: Tape, name: str, module, inputs, output):
    """A module's output; their router gives logits, weights and ids."""
    if name.endswith("mlp.gate"):
        logits_TE, weights_TK, expert_ids_TK = output
        scores_TE = logits_TE.sigmoid()
        return keep_choice(tape, name, scores_TE, scores_TE + module.e_score_correction_bias, expert_ids_TK, weights_TK)
    tape.keep(name, output)
    if name.endswith("self_attn.o_proj"):
        tape.keep(name.replace("o_proj", "heads"), inputs[0])


def look_at_theirs(tape: Tape, names: dict, frame, event: str):
    """Rotated queries and keys are locals of their attention's forward. Theirs lie half-split: first all even places, then all odd."""
    module = frame.f_locals.get("self")
    if event != "return" or frame.f_code.co_name != "forward" or not names.get(module, "").endswith("self_attn"):
        return
    R, T = module.qk_rope_head_dim, frame.f_locals["query_states"].shape[-2]
    q_HTA, k_rope_SR = frame.f_locals["query_states"], frame.f_locals["k_rot"]
    paired_HTR = q_HTA[..., -R:].unflatten(-1, (2, R // 2)).mT.flatten(-2)
    tape.keep_heads(f"{names[module]}.queries", torch.cat((q_HTA[..., :-R], paired_HTR), dim=-1))
    tape.keep(f"{names[module]}.rotary_key", k_rope_SR[..., -T:, :].unflatten(-1, (2, R // 2)).mT.flatten(-2))


