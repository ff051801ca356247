"""A stranger's K2 agrees: transformers' DeepseekV3ForCausalLM on checkpoints that we wrote, and ours on one that it wrote.

Experts are chosen by comparing scores, so every case first proves that no choice was closer than MARGIN: below that two
correct programs may choose differently. Numbers are printed: pytest -m oracle -rP.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the oracle tests need tests/requirements-oracles.txt")
import safetensors.numpy  # noqa: E402
from small import YARN, random_model, relative_error, small_config  # noqa: E402

import k2  # noqa: E402
from k2.config import YarnScaling  # noqa: E402

pytestmark = pytest.mark.oracle
MARGIN = 1e-5
TOKENS = 56  # more than three times YaRN's original window of 16 in these configs
YARN_OF_K25 = YarnScaling(64.0, 16, 32.0, 1.0, 1.0, 1.0)
MEMBERS = {
    "k2": {},
    "without q_lora_rank": {"q_lora_rank": None},
    "k2.5's beta_fast": {"rope_scaling": YARN_OF_K25},
    "no yarn, no dense layer": {"rope_scaling": None, "first_k_dense_replace": 0},
    "two shared experts, mscale 0.7": {"n_shared_experts": 2, "rope_scaling": replace(YARN, mscale=0.7, mscale_all_dim=0.7)},
}


def budget(layers: int) -> float:
    """float32's largest relative L2 distance of a row behind so many layers."""
    return 5e-6 * math.sqrt(layers)


def some_ids(seed: int, count: int = TOKENS):
    """ids (1, T)."""
    return torch.randint(0, 97, (1, count), generator=torch.Generator().manual_seed(seed))


def as_deepseek(directory: Path, **changes) -> Path:
    """A copy of a checkpoint whose config.json calls itself what transformers knows."""
    copy = directory.with_name(directory.name + "-deepseek")
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "deepseek_v3"} | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def load_theirs(directory: Path):
    """transformers' model in float32, every tensor of the file used and none missing."""
    model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", local_files_only=True, output_loading_info=True
    )
    assert not any(info.values()), info
    model.generation_config.eos_token_id = None  # the comparison wants all its tokens
    return model.eval()


def states(model, ids) -> list:
    """Each decoder layer's output (T, D), and the logits (T, W), of either model."""
    seen, handles = [], []
    for layer in model.model.layers:
        handles.append(layer.register_forward_hook(lambda module, inputs, output: seen.append(output.reshape(TOKENS, -1))))
    with torch.inference_mode():
        output = model(ids)
    for handle in handles:
        handle.remove()
    return [*seen, (output if isinstance(output, torch.Tensor) else output.logits).reshape(TOKENS, -1)]


def closest_choice(model, ids) -> float:
    """The smallest distance, over tokens and layers, between the last expert chosen and the first one left out."""
    gaps = []

    def measure(router, inputs, output):
        biased_TE = (router.scores(inputs[0]) + router.e_score_correction_bias).sort(descending=True).values
        gaps.append(float((biased_TE[:, router.top_k - 1] - biased_TE[:, router.top_k]).min()))

    handles = [layer.mlp.gate.register_forward_hook(measure) for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    with torch.inference_mode():
        model(ids)
    for handle in handles:
        handle.remove()
    return min(gaps)


def assert_agree(ours, theirs, ids, name: str):
    """Every layer and the logits within float32's budget, on an input where no expert is chosen by a hair."""
    gap = closest_choice(ours, ids)
    assert gap > MARGIN, f"{name}: the closest choice of an expert is {gap:.1e}; take another seed"
    found, expected = states(ours, ids), states(theirs, ids)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    largest = float((found[-1] - expected[-1]).abs().max())
    print(f"{name}: layers {' '.join(f'{e:.1e}' for e in errors[:-1])} logits {errors[-1]:.1e} largest {largest:.1e} closest choice {gap:.1e}")
    for layer, error in enumerate(errors):
        depth = min(layer + 1, len(errors) - 1)
        assert error <= budget(depth), f"{name}, layer {layer}: worst row {error:.3e} relative, budget {budget(depth):.1e}; largest logit difference {largest:.3e}"


# ---- float32 checkpoints of ours ----


def checkpoint_pair(directory: Path, seed: int, format: str = "fp32", **changes):
    """A random model written by us and opened by both, in float32."""
    model = random_model(small_config(num_hidden_layers=4, **changes), seed)
    k2.save(model, directory / "ours", format=format)
    return k2.load(directory / "ours", dtype=torch.float32), load_theirs(as_deepseek(directory / "ours"))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("member", MEMBERS)
def test_every_layer_and_the_logits_agree_in_float32(tmp_path, member, seed):
    ours, theirs = checkpoint_pair(tmp_path, seed, **MEMBERS[member])
    assert_agree(ours, theirs, some_ids(seed), f"{member}, seed {seed}")


@pytest.mark.parametrize("member", ["k2", "without q_lora_rank"])
def test_a_greedy_continuation_of_32_tokens_is_the_same(tmp_path, member):
    ours, theirs = checkpoint_pair(tmp_path, 0, **MEMBERS[member])
    prompt = some_ids(6, TOKENS - 32)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False)
    top = states(ours, expected)[-1][-33:].topk(2).values
    gap = float((top[:, 0] - top[:, 1]).min())
    choice = closest_choice(ours, expected)
    assert choice > MARGIN and gap > 1e-3, f"two logits within {gap:.1e}, two experts within {choice:.1e}: take another seed"
    found = list(k2.generate(ours, prompt[0], 32))
    assert found == expected[0, -32:].tolist() and len(set(found)) > 8
    print(f"{member}: 32 of 32 ids equal, {len(set(found))} different ones, closest logits {gap:.1e} apart")


@pytest.mark.parametrize("mistake", ["no yarn frequencies", "no router bias", "fresh norms", "other theta", "one expert fewer"])
def test_the_comparison_would_notice(tmp_path, mistake):
    ours, theirs = checkpoint_pair(tmp_path, 0)
    with torch.no_grad():
        for name, values in [*ours.named_parameters(), *ours.named_buffers()]:
            if mistake == "no router bias" and "correction_bias" in name or mistake == "fresh norms" and "kv_a_layernorm" in name:
                values.fill_(float("norm" in name))
    if mistake in ("no yarn frequencies", "other theta"):
        changes = {"rope_scaling": None} if "yarn" in mistake else {"rope_theta": 2 * ours.config.rope_theta}
        ours.model.frequencies_P = k2.model.rope_frequencies(replace(ours.config, **changes))
    if mistake == "one expert fewer":
        ours.model.layers[1].mlp.gate.top_k -= 1
    error = relative_error(states(ours, some_ids(0))[-1], states(theirs, some_ids(0))[-1])
    print(f"{mistake}: {error:.1e}")
    assert error > 1000 * budget(4), f"{mistake} moves the logits by {error:.1e} only"


# ---- quantised checkpoints of ours, dequantised by this test ----


def e4m3(code: int) -> float:
    """One float8_e4m3fn by its definition: sign, 4 bits of exponent with bias 7, 3 of fraction, subnormals, one NaN."""
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def raw_tensors(directory: Path) -> dict:
    """All tensors of a checkpoint, read with nothing but the format's description: {name: (dtype, array of raw numbers)}."""
    kinds = {"BF16": "<u2", "F32": "<f4", "F8_E4M3": "u1", "I32": "<u4"}
    tensors = {}
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                tensors[name] = entry["dtype"], np.frombuffer(content[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def from_bf16(bits):
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def dequantise_fp8(codes, scales):
    """Number by number: the code's value times the scale of the 128 x 128 block it lies in."""
    value_of = [e4m3(code) for code in range(256)]
    rows = [[value_of[code] * float(scales[r // 128, c // 128]) for c, code in enumerate(row)] for r, row in enumerate(codes.tolist())]
    return np.array(rows, dtype=np.float32)


def dequantise_int4(words, scales):
    """Eight numbers a word, lowest four bits first, each eight too large; times the scale of their 32."""
    scales = from_bf16(scales).tolist()
    rows = [[((row[c // 8] >> 4 * (c % 8) & 15) - 8) * scales[r][c // 32] for c in range(8 * len(row))] for r, row in enumerate(words.tolist())]
    return np.array(rows, dtype=np.float32)


def dequantised(directory: Path) -> dict:
    """Every weight of a quantised checkpoint in float32, by the plain loops above."""
    stored, plain = raw_tensors(directory), {}
    for name, (dtype, values) in stored.items():
        if name.endswith("weight_packed"):
            plain[name.removesuffix("_packed")] = dequantise_int4(values, stored[name.replace("_packed", "_scale")][1])
        elif dtype == "F8_E4M3":
            plain[name] = dequantise_fp8(values, stored[name + "_scale_inv"][1])
        elif not name.endswith(("weight_scale", "weight_shape", "weight_scale_inv")):
            plain[name] = from_bf16(values) if dtype == "BF16" else values
    return plain


def quantised_pair(directory: Path, format: str, seed: int):
    """A quantised checkpoint's folder, and transformers' model fed with what this test reads in it."""
    # More than one block each way, and ragged edges; K2's int4 wants multiples of 32.
    config = small_config(hidden_size=160, moe_intermediate_size=96, intermediate_size=136, num_hidden_layers=3)
    ours, plain = directory / format, directory / f"{format}-plain"
    k2.save(random_model(config, seed), ours, format=format)
    tensors = dequantised(ours)
    plain.mkdir()
    safetensors.numpy.save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    changes = {"model_type": "deepseek_v3", "torch_dtype": "float32"}
    written = json.loads((ours / "config.json").read_text()) | changes
    assert written.pop("quantization_config")
    (plain / "config.json").write_text(json.dumps(written))
    return ours, load_theirs(plain)


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_a_quantised_checkpoint_means_what_the_plain_loops_read_in_it(tmp_path, format):
    directory, theirs = quantised_pair(tmp_path, format, 0)
    assert_agree(k2.load(directory, dtype=torch.float32), theirs, some_ids(0), format)


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_weights_kept_quantised_agree_as_far_as_bfloat16_goes(tmp_path, format):
    directory, theirs = quantised_pair(tmp_path, format, 0)
    ours, ids = k2.load(directory, dtype=None), some_ids(0)
    chosen = routing_of(theirs, ids)
    for layer, held_TK in chosen.items():
        hold_routing(ours.model.layers[layer].mlp.gate, held_TK)
    errors = [relative_error(a, b) for a, b in zip(states(ours, ids), states(theirs, ids), strict=True)]
    print(f"{format} at rest: layers {' '.join(f'{e:.1e}' for e in errors[:-1])} logits {errors[-1]:.1e}")
    for layer, error in enumerate(errors):
        bound = 4e-2 * math.sqrt(min(layer + 1, 3))
        assert error <= bound, f"{format}, layer {layer}: worst row {error:.3e} relative, bound {bound:.1e}"


def routing_of(theirs, ids) -> dict:
    """{layer: expert ids (T, K)} as transformers chose them."""
    chosen, handles = {}, []
    for number, layer in enumerate(theirs.model.layers):
        if hasattr(layer.mlp, "gate"):
            handles.append(layer.mlp.gate.register_forward_hook(lambda module, inputs, output, number=number: chosen.update({number: output[-1]})))
    with torch.inference_mode():
        theirs(ids)
    for handle in handles:
        handle.remove()
    return chosen


def hold_routing(router, held_TK):
    """Our router weighs, but the choice is given: bfloat16 flips near-ties, and a flip is no error of the arithmetic."""

    def weigh(module, inputs, output):
        weights_TK = module.scores(inputs[0]).gather(-1, held_TK)
        return held_TK, weights_TK / weights_TK.sum(-1, keepdim=True) * module.scaling

    router.register_forward_hook(weigh)


# ---- bfloat16 checkpoints, both ways ----


def transformers_model(seed: int, **changes):
    """A bfloat16 model that transformers made from a config of its own, with random norms and a router bias."""
    own = small_config(**changes)
    rope = {"rope_type": "default"} if own.rope_scaling is None else {"rope_type": "yarn", **vars(own.rope_scaling)}
    keys = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers first_k_dense_replace num_attention_heads
        num_key_value_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts
        num_experts_per_tok routed_scaling_factor rms_norm_eps max_position_embeddings bos_token_id eos_token_id""".split()
    config = transformers.DeepseekV3Config(
        **{key: getattr(own, key) for key in keys}, rope_parameters=rope | {"rope_theta": own.rope_theta}, n_group=1, topk_group=1, num_nextn_predict_layers=0
    )
    model, generator = transformers.DeepseekV3ForCausalLM(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                centre, spread = (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.2 if p.ndim == 1 else p.shape[-1] ** -0.5)
                p.copy_(centre + spread * torch.randn(p.shape, generator=generator))
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_scaling": None}])
def test_a_checkpoint_that_transformers_wrote_loads_here(tmp_path, changes):
    transformers_model(0, **changes).save_pretrained(tmp_path)
    stored = raw_tensors(tmp_path)
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"][0] == "BF16", "unlike the released files', their bias has the weights' dtype"
    ours, theirs = k2.load(tmp_path, dtype=torch.float32), load_theirs(tmp_path)
    assert ours.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert_agree(ours, theirs, some_ids(0), f"written by transformers, {changes or 'k2'}")


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}])
def test_a_bfloat16_checkpoint_of_ours_loads_in_transformers(tmp_path, changes):
    ours, theirs = checkpoint_pair(tmp_path, 1, format="bf16", **changes)
    bias_E = ours.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(bias_E, theirs.model.layers[1].mlp.gate.e_score_correction_bias) and not torch.equal(bias_E, bias_E.bfloat16().float())
    assert_agree(ours, theirs, some_ids(1), f"bf16 by us, {changes or 'k2'}")
