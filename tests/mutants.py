"""Mistakes that real ports of K2 and DeepSeek-V3 have made, each as a tiny patch, and the test that must notice it.

A test that cannot fail is not a test. `verdict` imports k2 anew with one text of one file replaced, runs the named test
against it, and says whether an assertion failed. Nothing on disk changes.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """`old` stands in `file` exactly once; with `new` in its place, `test` must fail by an assertion."""

    name: str
    file: str  # under k2/
    old: str
    new: str
    test: str  # as pytest writes it; all cases of a parametrised test count

    def source(self) -> str:
        """The file with the patch applied."""
        plain = (ROOT / "k2" / self.file).read_text(encoding="utf-8")
        assert plain.count(self.old) == 1, f"{self.name}: k2/{self.file} has this text {plain.count(self.old)} times, expected once:\n{self.old}"
        return plain.replace(self.old, self.new)

    @property
    def module(self) -> str:
        """training/muonclip.py is k2.training.muonclip."""
        return "k2." + self.file.removesuffix(".py").replace("/", ".")


class PatchedLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from a given source, as if its file held it."""

    def __init__(self, name: str, path: str, source: str):
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname):
        """Compiled anew: the cached bytecode is the plain file's."""
        return compile(self.source, self.path, "exec")


class PatchingFinder:
    """Finds the mutated module, and leaves every other to the finders behind it."""

    def __init__(self, mutant: Mutant):
        self.name, self.path, self.source = mutant.module, str(ROOT / "k2" / mutant.file), mutant.source()

    def find_spec(self, fullname, path=None, target=None):
        """The spec of the one module."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=PatchedLoader(fullname, self.path, self.source))


@contextlib.contextmanager
def patched(mutant: Mutant):
    """While this lasts, an `import` of k2 or of a test gets a fresh copy that has the mistake."""
    finder = PatchingFinder(mutant)

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "k2" or name == "small" or name.startswith("test_")]

    kept = {name: sys.modules.pop(name) for name in ours()}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)


def cases(function) -> list[dict]:
    """The arguments of each case of a test, read from its parametrize marks; one case without any where it has none."""
    axes = []
    for mark in getattr(function, "pytestmark", []):
        names, values = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        axes.append([dict(zip(names, value if len(names) > 1 else (value,))) for value in values])
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)]


def verdict(mutant: Mutant) -> str:
    """What the named test says of the mutated code: the message of its failed assertion, or "" where every case passes.

    Any other exception is raised: code that cannot be imported, or crashes, proves nothing about the test.
    """
    path, name = mutant.test.split("::")
    with patched(mutant):
        test = getattr(importlib.import_module(Path(path).stem), name)
        for case in cases(test):
            try:
                test(**case)
            except AssertionError as error:
                return str(error) or "an assertion failed"
    return ""


MUTANTS = (
    # ---- rotation and scale ----
    Mutant(
        "half-split instead of interleaved rotation", "rope.py",
        """even_TP, odd_TP = x_TR[..., 0::2], x_TR[..., 1::2]
    turned_TP2 = torch.stack((even_TP * cos_TP - odd_TP * sin_TP, even_TP * sin_TP + odd_TP * cos_TP), dim=-1)""",
        """even_TP, odd_TP = x_TR.chunk(2, dim=-1)
    turned_TP2 = torch.stack((even_TP * cos_TP - odd_TP * sin_TP, even_TP * sin_TP + odd_TP * cos_TP), dim=-2)""",
        "tests/test_rope.py::test_neighbours_are_a_pair",
    ),
    Mutant(
        "rotation in the other direction", "rope.py",
        "even_TP * cos_TP - odd_TP * sin_TP, even_TP * sin_TP + odd_TP * cos_TP", "even_TP * cos_TP + odd_TP * sin_TP, odd_TP * cos_TP - even_TP * sin_TP",
        "tests/test_rope.py::test_neighbours_are_a_pair",
    ),
    Mutant(
        "YaRN ramp dropped: every pair slowed", "rope.py",
        "return plain_P * (1 - ramp_P) + plain_P / yarn.factor * ramp_P", "return plain_P / yarn.factor",
        "tests/test_rope.py::test_frequencies_are_those_of_k2_instruct",
    ),
    Mutant(
        "YaRN ramp the wrong way round", "rope.py",
        "return plain_P * (1 - ramp_P) + plain_P / yarn.factor * ramp_P", "return plain_P * ramp_P + plain_P / yarn.factor * (1 - ramp_P)",
        "tests/test_rope.py::test_frequencies_are_those_of_k2_instruct_0905_and_thinking",
    ),
    Mutant(
        "beta_fast ignored, which only K2.5 shows", "rope.py",
        "pair_that_turns(yarn.beta_fast)", "pair_that_turns(yarn.beta_slow)",
        "tests/test_rope.py::test_frequencies_are_those_of_k2_5",
    ),
    Mutant(
        "mscale squared missing from the softmax scale", "config.py",
        "return self.qk_head_dim**-0.5 * mscale**2", "return self.qk_head_dim**-0.5",
        "tests/test_attention.py::test_softmax_scales_are_those_of_the_family",
    ),
    Mutant(
        "mscale not squared in the softmax scale", "config.py",
        "return self.qk_head_dim**-0.5 * mscale**2", "return self.qk_head_dim**-0.5 * mscale",
        "tests/test_attention.py::test_softmax_scales_are_those_of_the_family",
    ),
    Mutant(
        "mscale also multiplied into cos and sin", "model.py",
        "table_TP.to(x_TD.device, wide)", "1.3465735902799727 * table_TP.to(x_TD.device, wide)",
        "tests/test_model.py::test_model_equals_the_reference_in_float64",
    ),
    Mutant(
        "scale by V instead of A", "config.py",
        "return self.qk_head_dim**-0.5", "return self.v_head_dim**-0.5",
        "tests/test_attention.py::test_softmax_scales_are_those_of_the_family",
    ),
    Mutant(
        "scale by N instead of A", "config.py",
        "return self.qk_head_dim**-0.5", "return self.qk_nope_head_dim**-0.5",
        "tests/test_attention.py::test_softmax_scales_are_those_of_the_family",
    ),
    Mutant(
        "the absorbed form without the softmax scale", "attention.py",
        "wide_HTS.mul_(self.config.softmax_scale)", "wide_HTS",
        "tests/test_attention.py::test_the_absorbed_form_equals_the_expanded_form",
    ),
    Mutant(
        "the absorbed form without the rotary scores", "attention.py",
        "scores_MS = self.product(q_latent_HTC.flatten(-3, -2), c_kv_SC) + self.product(q_rope_HTR.flatten(-3, -2), k_rope_SR)", "scores_MS = self.product(q_latent_HTC.flatten(-3, -2), c_kv_SC)",
        "tests/test_attention.py::test_the_absorbed_form_equals_the_expanded_form",
    ),
    # ---- attention and its past ----
    Mutant(
        "causal mask missing when a cache is present", "attention.py",
        "mask_TS = causal_mask(q_TA.shape[-2], k_SA.shape[-2], q_TA.device)",
        "mask_TS = causal_mask(q_TA.shape[-2], k_SA.shape[-2], q_TA.device) if q_TA.shape[-2] == k_SA.shape[-2] else None",
        "tests/test_attention.py::test_attention_behind_a_cache_equals_attention_over_the_whole",
    ),
    Mutant(
        "causal mask aligned to the first keys instead of the last", "attention.py",
        "position_S <= position_S[S - T :, None]", "position_S <= position_S[:T, None]",
        "tests/test_attention.py::test_the_mask_is_the_last_rows_of_a_lower_triangle",
    ),
    Mutant(
        "a query does not see its own token", "attention.py",
        "position_S <= position_S[S - T :, None]", "(position_S < position_S[S - T :, None]) | (position_S == 0)",
        "tests/test_attention.py::test_equal_keys_share_attention_equally",
    ),
    Mutant(
        "position offset ignored on decode", "model.py",
        "rope_angles(self.frequencies_P, cache.length, T)", "rope_angles(self.frequencies_P, 0, T)",
        "tests/test_model.py::test_prefill_at_once_and_in_chunks_and_token_by_token_are_the_same",
    ),
    Mutant(
        "kv_a_layernorm skipped", "attention.py",
        "return self.kv_a_layernorm(c_kv_TC), rotate", "return c_kv_TC, rotate",
        "tests/test_attention.py::test_latent_norms_have_an_eps_of_their_own",
    ),
    Mutant(
        "kv_a_layernorm applied to the rotary part too", "attention.py",
        "rotate(k_rope_TR, cos_TP, sin_TP)", "rotate(F.rms_norm(k_rope_TR, k_rope_TR.shape[-1:], eps=LATENT_EPS), cos_TP, sin_TP)",
        "tests/test_attention.py::test_attention_equals_the_reference_in_float64",
    ),
    Mutant(
        "latent norms with the config's eps", "attention.py",
        "self.kv_a_layernorm = RMSNorm(C, LATENT_EPS)", "self.kv_a_layernorm = RMSNorm(C, config.rms_norm_eps)",
        "tests/test_attention.py::test_latent_norms_have_an_eps_of_their_own",
    ),
    Mutant(
        "k_nope and v swapped", "attention.py",
        "k_nope_SN, v_SV = kv_SO.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)", "v_SV, k_nope_SN = kv_SO.split((c.v_head_dim, c.qk_nope_head_dim), dim=-1)",
        "tests/test_attention.py::test_attention_equals_the_reference_in_float64",
    ),
    Mutant(
        "W^UK and W^UV swapped in the absorbed form", "attention.py",
        "return by_head_HOC.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)", "return by_head_HOC.split((c.v_head_dim, c.qk_nope_head_dim), dim=1)[::-1]",
        "tests/test_attention.py::test_the_absorbed_form_equals_the_expanded_form",
    ),
    # ---- router and experts ----
    Mutant(
        "softmax instead of sigmoid", "router.py",
        ".sigmoid()", ".softmax(dim=-1)",
        "tests/test_router.py::test_the_bias_chooses_and_never_weighs",
    ),
    Mutant(
        "bias left in the weights", "router.py",
        "weights_TK = scores_TE.gather(-1, expert_ids_TK)", "weights_TK = (scores_TE + self.e_score_correction_bias).gather(-1, expert_ids_TK)",
        "tests/test_router.py::test_the_bias_chooses_and_never_weighs",
    ),
    Mutant(
        "renormalisation skipped", "router.py",
        "weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)", "pass",
        "tests/test_router.py::test_weights_sum_to_the_scaling_factor",
    ),
    Mutant(
        "scaling factor dropped", "router.py",
        "return expert_ids_TK, weights_TK * self.scaling", "return expert_ids_TK, weights_TK",
        "tests/test_router.py::test_weights_sum_to_the_scaling_factor",
    ),
    Mutant(
        "router bias not float32", "router.py",
        "if self.e_score_correction_bias.dtype != torch.float32:", "if False:",
        "tests/test_router.py::test_no_conversion_touches_the_bias",
    ),
    Mutant(
        "scores computed in the model's dtype", "router.py",
        "wide = torch.promote_types(x_TD.dtype, torch.float32)", "wide = x_TD.dtype",
        "tests/test_router.py::test_a_bfloat16_model_routes_in_float32",
    ),
    Mutant(
        "scaling factor applied to the shared expert", "moe.py",
        "return (shared_TD + self", "return (self.gate.scaling * shared_TD + self",
        "tests/test_moe.py::test_the_shared_expert_counts_once_and_unscaled",
    ),
    Mutant(
        "shared expert dropped", "moe.py",
        "return (shared_TD + self", "return (self",
        "tests/test_moe.py::test_the_shared_expert_counts_once_and_unscaled",
    ),
    Mutant(
        "rows left in the experts' order", "moe.py",
        "back_TK = order_M.argsort()", "back_TK = order_M",
        "tests/test_moe.py::test_moe_equals_the_reference_in_float64",
    ),
    Mutant(
        "gate and up swapped", "expert.py",
        "F.silu(self.gate_proj(x_MD)) * self.up_proj(x_MD)", "F.silu(self.up_proj(x_MD)) * self.gate_proj(x_MD)",
        "tests/test_expert.py::test_the_gate_passes_through_silu_and_the_up_projection_does_not",
    ),
    Mutant(
        "layer 0 made MoE", "decoder.py",
        "dense = config.is_dense(layer)", "dense = layer != 0 and config.is_dense(layer)",
        "tests/test_decoder.py::test_the_first_layers_are_dense_and_all_others_hold_experts",
    ),
    # ---- stored formats ----
    Mutant(
        "FP8 scales transposed", "quantization.py",
        "return scale_BG.repeat_interleave(BLOCK, dim=1)", "return scale_BG.mT.reshape(scale_BG.shape).repeat_interleave(BLOCK, dim=1)",
        "tests/test_quantization.py::test_a_scale_touches_its_own_block_and_no_other",
    ),
    Mutant(
        "ragged last block misread: columns shared out evenly", "quantization.py",
        ".repeat_interleave(BLOCK, dim=1)", ".repeat_interleave(-(-columns // scale_BG.shape[1]), dim=1)",
        "tests/test_quantization.py::test_dequantisation_is_the_plain_double_loop_bit_for_bit",
    ),
    Mutant(
        "ragged last block misread: rows shared out evenly", "quantization.py",
        "value_NLI.mul_(some_NI.unsqueeze(1)).flatten(0, 1)",
        "value_NLI.flatten(0, 1).mul_(scale_BI[torch.arange(rows.start, rows.stop) * len(scale_BI) // len(code_OI)])",
        "tests/test_quantization.py::test_dequantisation_is_the_plain_double_loop_bit_for_bit",
    ),
    Mutant(
        "INT4 nibbles read as two's complement", "quantization.py",
        ".view(torch.int8) - 8)", ".view(torch.int8) ^ 8).sub_(8)",
        "tests/test_quantization.py::test_the_nibble_is_offset_binary_and_not_twos_complement",
    ),
    # ---- the expert store ----
    Mutant(
        "a stale expert slot: the last tenant's module serves the next", "slots.py",
        "        self.experts.pop(slot, None)\n", "",
        "tests/test_offload.py::test_a_slots_next_tenant_is_never_taken_for_its_last",
    ),
    Mutant(
        "a slot given away while its expert is in use", "slots.py",
        "oldest = next((k for k in self.slot_of if k not in self.held), None)", "oldest = next(iter(self.slot_of), None)",
        "tests/test_slots.py::test_a_slot_in_use_is_never_given_away",
    ),
    Mutant(
        "a slot whose read was never begun counts as filled", "offload.py",
        "memoryview(self.ram.room(key).numpy()))\n        except BaseException:\n            self.ram.forget(key)\n", "memoryview(self.ram.room(key).numpy()))\n        except BaseException:\n",
        "tests/test_offload.py::test_a_thread_that_cannot_be_started_is_an_error_and_no_stale_expert",
    ),
    Mutant(
        "few rows: every piece of blocks scaled as the first", "quantization.py",
        "some_NIC = x_BIC[blocks_of(rows)]", "some_NIC = x_BIC[: len(x_BIC[blocks_of(rows)])]",
        "tests/test_quantization.py::test_few_rows_meet_the_codes_and_get_the_dequantised_product",
    ),
    Mutant(
        "compiled FP8: a 1 in front of the smallest codes' fractions", "compiled.py",
        "above_OI = (size_OI - 8).clamp(min=0)", "above_OI = size_OI - 8",
        "tests/test_compiled.py::test_every_code_but_the_two_nans_is_widened_exactly",
    ),
    Mutant(
        "compiled FP8: codes that are NaN read as numbers", "compiled.py",
        "if not all(part.has_no_nan() for part in self.parts):", "if not self.parts:",
        "tests/test_compiled.py::test_a_nan_among_the_codes_is_kept_by_the_plain_way",
    ),
    Mutant(
        "INT4: the kernel given the words as they are stored", "quantization.py",
        "weight_OL = int4_kernel_order(self.weight_packed)", "weight_OL = self.weight_packed.data.view(torch.uint8).clone()",
        "tests/test_quantization.py::test_torchs_int4_kernel_gives_the_dequantised_product",
    ),
    # ---- the optimizer ----
    Mutant(
        "QK-Clip touches the shared rotary key", "training/muonclip.py",
        "key_HOC[:, :N] *= gamma_H.sqrt()[:, None, None]",
        "key_HOC[:, :N] *= gamma_H.sqrt()[:, None, None]\n    master[layer.kv_a_proj_with_mqa.weight][c.kv_lora_rank :] *= gamma_H.min().sqrt()",
        "tests/test_muonclip.py::test_a_clipped_heads_logit_is_tau_afterwards_and_other_heads_keep_their_bits",
    ),
    Mutant(
        "sqrt(gamma) on the rotary query, whose key does not move", "training/muonclip.py",
        "query_HAI[:, N:] *= gamma_H[:, None, None]", "query_HAI[:, N:] *= gamma_H.sqrt()[:, None, None]",
        "tests/test_muonclip.py::test_a_clipped_heads_logit_is_tau_afterwards_and_other_heads_keep_their_bits",
    ),
    Mutant(
        "all heads clipped by one gamma", "training/muonclip.py",
        "gamma_H = torch.where(max_H > self.tau, self.tau / max_H, 1.0)", "gamma_H = (self.tau / max_H.amax()).clamp(max=1.0).expand_as(max_H)",
        "tests/test_muonclip.py::test_a_clipped_heads_logit_is_tau_afterwards_and_other_heads_keep_their_bits",
    ),
    Mutant(
        "values clipped with the keys", "training/muonclip.py",
        "key_HOC[:, :N] *= gamma_H.sqrt()[:, None, None]", "key_HOC *= gamma_H.sqrt()[:, None, None]",
        "tests/test_muonclip.py::test_a_clipped_heads_logit_is_tau_afterwards_and_other_heads_keep_their_bits",
    ),
    Mutant(
        "largest logit without the softmax scale", "training/muonclip.py",
        ".float() * scale", ".float()  # not scaled:",
        "tests/test_muonclip.py::test_largest_logits_are_those_of_the_full_causal_square",
    ),
    Mutant(
        "largest logit over future positions too", "training/muonclip.py",
        "        logits_XMS[..., start - end :].masked_fill_(future_MM, -torch.inf)\n", "",
        "tests/test_muonclip.py::test_largest_logits_are_those_of_the_full_causal_square",
    ),
    Mutant(
        "only the last micro-batch's largest logits kept", "training/muonclip.py",
        "self.max_logits[layer] = torch.maximum(self.max_logits.get(layer, max_H), max_H)", "self.max_logits[layer] = max_H",
        "tests/test_muonclip.py::test_the_clip_sees_every_training_call_since_the_last_step_and_no_other",
    ),
    Mutant(
        "the clip also watches calls that do not train", "training/muonclip.py",
        "if layer.training:", "if True:",
        "tests/test_muonclip.py::test_the_clip_sees_every_training_call_since_the_last_step_and_no_other",
    ),
    Mutant(
        "RMS scale missing", "training/muonclip.py",
        "scale = RMS_MATCH * max(master_JOI.shape[1:]) ** 0.5", "scale = 1.0",
        "tests/test_muonclip.py::test_the_first_muon_step_is_the_formula",
    ),
    Mutant(
        "RMS scale with 0.2 under the root", "training/muonclip.py",
        "scale = RMS_MATCH * max(master_JOI.shape[1:]) ** 0.5", "scale = (RMS_MATCH * max(master_JOI.shape[1:])) ** 0.5",
        "tests/test_muonclip.py::test_the_first_muon_step_is_the_formula",
    ),
    Mutant(
        "Newton-Schulz on the wrong side, which runs for square matrices only", "training/muonclip.py",
        "gram_OO = x_OI @ x_OI.mT", "gram_OO = x_OI.mT @ x_OI if x_OI.shape[-2] == x_OI.shape[-1] else x_OI @ x_OI.mT",
        "tests/test_muonclip.py::test_newton_schulz_keeps_the_singular_vectors_and_maps_each_value_by_the_quintic",
    ),
    Mutant(
        "cubic Newton-Schulz", "training/muonclip.py",
        "QUINTIC = (3.4445, -4.7750, 2.0315)", "QUINTIC = (1.5, -0.5, 0.0)",
        "tests/test_muonclip.py::test_newton_schulz_brings_values_from_a_hundredth_on_near_one",
    ),
    Mutant(
        "Muon without momentum", "training/muonclip.py",
        "momentum_JOI.mul_(self.momentum).add_(gradient_JOI)", "momentum_JOI.copy_(gradient_JOI)",
        "tests/test_muonclip.py::test_later_muon_steps_follow_nesterovs_momentum",
    ),
    Mutant(
        "Muon's momentum without Nesterov's look ahead", "training/muonclip.py",
        "ahead_JOI = gradient_JOI.add_(momentum_JOI, alpha=self.momentum) if self.nesterov else momentum_JOI", "ahead_JOI = momentum_JOI",
        "tests/test_muonclip.py::test_later_muon_steps_follow_nesterovs_momentum",
    ),
    Mutant(
        "the clip reads heads along a matrix's inputs, as if nn.Linear stored (in, out)", "training/muonclip.py",
        "query_HAI = master[query.weight].unflatten(0, (H, c.qk_head_dim))", "query_HAI = master[query.weight].mT.reshape(-1, c.qk_head_dim, H).permute(2, 1, 0)",
        "tests/test_muonclip.py::test_a_clipped_heads_logit_is_tau_afterwards_and_other_heads_keep_their_bits",
    ),
    Mutant(
        "the clip finds no latent attention, and says nothing", "training/muonclip.py",
        "if isinstance(m, MultiHeadLatentAttention)]", 'if hasattr(m, "k_proj")]',
        "tests/test_muonclip.py::test_the_clip_sees_every_training_call_since_the_last_step_and_no_other",
    ),
    Mutant(
        "a head without a positive logit gets a negative gamma", "training/muonclip.py",
        "gamma_H = torch.where(max_H > self.tau, self.tau / max_H, 1.0)", "gamma_H = (self.tau / max_H).clamp(max=1.0)",
        "tests/test_muonclip.py::test_a_head_whose_logits_are_all_negative_keeps_its_bits",
    ),
    Mutant(
        "'Muon' that is Adam: no orthogonalisation", "training/muonclip.py",
        "orthogonalized(ahead_JOI, coefficients=self.newton_schulz)", "ahead_JOI.sign()",
        "tests/test_muonclip.py::test_the_first_muon_step_is_the_formula",
    ),
    Mutant(
        "embedding put under Muon", "training/muonclip.py",
        "tables = {model.model.embed_tokens.weight, model.lm_head.weight}", "tables = {model.lm_head.weight}",
        "tests/test_muonclip.py::test_muon_takes_every_matrix_but_the_two_tables",
    ),
    # ---- training in fewer passes ----
    Mutant(
        "the norm's gradient keeps what points along its own output", "training/fused.py",
        ".addcmul_(wide_TI, mean_T1, value=-1)", "",
        "tests/test_fused.py::test_the_norms_gradient_is_that_of_its_values",
    ),
    Mutant(
        "an expert without rows has no end in the grouped product, so that those behind it get another's rows", "training/fused.py",
        "[counts.get(e, 0) for e in range(len(experts))]", "[*counts.values(), *[0] * (len(experts) - len(counts))]",
        "tests/test_fused.py::test_values_and_gradients_of_a_fused_model_are_those_of_the_layers",
    ),
    Mutant(
        "all gates and then all ups, where the tensor has them in turn", "training/fused.py",
        "[w for e in experts for w in (e.gate_proj.weight, e.up_proj.weight)]", "[e.gate_proj.weight for e in experts] + [e.up_proj.weight for e in experts]",
        "tests/test_fused.py::test_values_and_gradients_of_a_fused_model_are_those_of_the_layers",
    ),
    # ---- the chat format ----
    Mutant(
        "generation prompt missing", "chat.py",
        "return [*parts, ASSISTANT, \"assistant\", MIDDLE] if add_generation_prompt else parts", "return parts",
        "tests/test_chat.py::test_a_dialog_with_a_system_message",
    ),
    Mutant(
        "user text encoded with special strings allowed", "chat.py",
        "if is_marker else tokenizer.encode(part)", "if is_marker else tokenizer.encode(part, allow_special=True)",
        "tests/test_chat.py::test_special_strings_in_user_text_tool_results_and_json_strings_stay_text",
    ),
    Mutant(
        "an empty content taken for a list of parts", "chat.py",
        "    return content or \"\"\n", "    return content or \"[]\"\n",
        "tests/test_chat.py::test_content_may_be_text_nothing_or_parts",
    ),
    Mutant(
        "arguments encoded as JSON once more", "chat.py",
        "given if isinstance(given, str) else as_json(given)", "as_json(given)",
        "tests/test_chat.py::test_arguments_given_as_text_stand_as_they_are_and_objects_become_json_with_default_separators",
    ),
    Mutant(
        "the index of a call starts again in every message", "chat.py",
        "for call, place in zip(message.get(\"tool_calls\") or (), count):", "for place, call in enumerate(message.get(\"tool_calls\") or ()):",
        "tests/test_chat.py::test_foreign_ids_are_numbered_through_the_whole_conversation",
    ),
    Mutant(
        "the first answer ends all reasoning, not the last", "chat.py",
        "answered = max((n for n, m in enumerate(messages) if is_answer(m)), default=-1)", "answered = min((n for n, m in enumerate(messages) if is_answer(m)), default=-1)",
        "tests/test_chat.py::test_thinking_looks_for_the_last_answer_and_not_the_first",
    ),
    Mutant(
        "tool JSON with blanks behind commas and colons", "chat.py",
        "separators=(\",\", \":\"), sort_keys=thinking", "sort_keys=thinking",
        "tests/test_chat.py::test_tool_json_is_compact_keeps_other_scripts_and_angle_brackets_and_only_thinking_sorts_its_keys",
    ),
    Mutant(
        "the open message of Partial Mode closed", "chat.py",
        "        return parts[:-1]\n", "        return parts\n",
        "tests/test_chat.py::test_a_partial_message_is_left_open_with_its_prefix_and_name",
    ),
    Mutant(
        "markers in a template's output not told from markers in texts", "chat.py",
        "for name in tokenizer.special for edge in (name[0], name[-1])", "for name in () for edge in (name[0], name[-1])",
        "tests/test_chat.py::test_a_marker_in_a_text_is_none_in_a_templates_output",
    ),
    Mutant(
        "names with a hyphen or a dot not read", "reply.py",
        "name = head.removeprefix(\"functions.\").strip(BLANKS)", "name = re.match(r\"\\w*\", head.removeprefix(\"functions.\"))[0]",
        "tests/test_reply.py::test_a_reply_is_read_as_it_was_meant",
    ),
    Mutant(
        "the delta's index is the number in the id", "reply.py",
        "{\"index\": self.calls, \"id\": i,", "{\"index\": int(i.rpartition(\":\")[2]), \"id\": i,",
        "tests/test_reply.py::test_the_index_is_the_place_in_this_reply_and_not_the_ids_number",
    ),
    Mutant(
        "half a marker at the end of a piece given out as text", "reply.py",
        "end = len(text) - possible_marker(text, at, self._state)", "end = len(text)",
        "tests/test_reply.py::test_a_stream_cut_anywhere_means_the_same",
    ),
    Mutant(
        "a call inside an open thought taken for thinking", "reply.py",
        "map(re.escape, (*MARKERS, THINK_END))", "map(re.escape, (THINK_END,))",
        "tests/test_reply.py::test_a_reply_is_read_as_it_was_meant",
    ),
    # ---- constrained text ----
    Mutant(
        "numbers with a zero in front", "grammar.py",
        "\"zero\": [(b\".\", \"point\"), (b\"eE\", \"e\")]", "\"zero\": [(DIGIT, \"whole\"), (b\".\", \"point\"), (b\"eE\", \"e\")]",
        "tests/test_grammar.py::test_all_short_texts_are_documents_just_when_python_says_so",
    ),
    Mutant(
        "bytes above 127 pass in strings whether or not they are UTF-8", "grammar.py",
        "(span(0xC2, 0xDF), \"1 more\")", "(span(0x80, 0xDF), \"1 more\")",
        "tests/test_grammar.py::test_every_byte_sequence_in_a_string_passes_just_when_it_is_utf8",
    ),
    Mutant(
        "half a surrogate pair in an escape", "grammar.py",
        "(b\"89abAB\", \"high 2\")", "(b\"89abAB\", \"2 hex\")",
        "tests/test_grammar.py::test_escapes_of_surrogates_come_in_pairs",
    ),
    Mutant(
        "an object may end without its required members", "grammar.py",
        "if self.object.required <= self.seen:", "if True:",
        "tests/test_grammar.py::test_members_come_in_any_order_but_only_once",
    ),
    Mutant(
        "a comma before the closing brace", "grammar.py",
        "if self.first and not self.object.required:", "if not self.object.required:",
        "tests/test_grammar.py::test_json_mode_is_an_object",
    ),
    Mutant(
        "length counts bytes and not characters", "grammar.py",
        "begins = self.where == \"\"", "begins = self.where == \"\" or \"more\" in self.where",
        "tests/test_grammar.py::test_lengths_count_characters_and_elements",
    ),
    Mutant(
        "a token judged by its first byte", "constraint.py",
        "behind_W[ids] = states[nodes]", "behind_W[[i for i, t in enumerate(self.vocabulary.tokens) if self.rows[s, t[0]]]] = s",
        "tests/test_constraint.py::test_a_mask_is_what_trying_every_token_gives",
    ),
    Mutant(
        "the limit noticed one token too late", "constraint.py",
        "if left > most:", "if left >= most:",
        "tests/test_constraint.py::test_the_longest_choice_at_every_step_still_ends_in_time",
    ),
    Mutant(
        "a document cut at the limit", "constraint.py",
        "if left > most:", "if True:",
        "tests/test_constraint.py::test_sampled_documents_always_parse_and_end_within_every_limit",
    ),
    Mutant(
        "a stop token allowed before the document is complete", "constraint.py",
        "            if is_complete(stacks):\n", "            if True:\n",
        "tests/test_constraint.py::test_a_stop_id_is_allowed_just_where_the_document_is_complete",
    ),
    Mutant(
        "every call has the same number", "constraint.py",
        "self._state, self.number = \"call ended\", self.number + 1", "self._state, self.number = \"call ended\", self.number",
        "tests/test_constraint.py::test_constrained_calls_are_in_form_of_declared_tools_and_fit_their_schemas",
    ),
    Mutant(
        "the mask not applied", "sampling.py",
        "if allowed_W is not None:", "if False:",
        "tests/test_constraint.py::test_any_object_that_keeps_the_contract_is_a_constraint",
    ),
)  # fmt: skip
