"""K2Config: what config.json says, checked, and nothing guessed.

The fields bear config.json's own names. A key that decides what the model computes must be present; a key that no file
of the family has is refused; a value that this project does not implement is refused by name. There are no defaults,
because a default silently turns one model into another that still speaks English.

The axis legend
---------------
Every tensor in k2/ ends in its axes, one capital letter each. Any batch axes ride in front and are never named.

    T  tokens in this call                    D  hidden_size
    S  tokens attended to (cache and call)    H  num_attention_heads
    E  n_routed_experts                       N  qk_nope_head_dim, the part of a head without position
    K  num_experts_per_tok                    R  qk_rope_head_dim, the rotated part of a head
    M  any rows that are computed alike       A  N + R, a whole query or key head
    F  width of the feed-forward at hand      V  v_head_dim
    P  rotary pairs, R / 2                    Q  q_lora_rank
    W  vocab_size                             C  kv_lora_rank
    O  a matrix's rows (outputs)              I  a matrix's columns (inputs)
    B  scale blocks along the rows            G  scale blocks or groups along the columns
    U  packed int32 words along the columns   L  place within a block or a group
"""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path


class K2Error(Exception):
    """Something that a user can cause and mend. One line: what, where, expected, found, what to do."""


def printable(text) -> str:
    """A text, or an error's, as one line that cannot steer a terminal, whatever names a hostile file put into it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:4000])


@dataclass(frozen=True)
class YarnScaling:
    """config.json's `rope_scaling` of type yarn (Peng et al., arXiv 2309.00071); lengths in tokens."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @property
    def attention_mscale(self) -> float:
        """YaRN's m = 0.1 ln(factor) + 1; the softmax scale is multiplied by its square."""
        if self.factor <= 1 or self.mscale_all_dim == 0:
            return 1.0
        return 0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0


# Keys whose only implemented value is this one. Any other value is another architecture.
IMPLEMENTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}

# What transformers 5 leaves out of a config.json it writes, because its DeepseekV3 class knows no other value.
FIXED_BY_THE_TRANSFORMERS_CLASS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}

# Keys that do not change what this code computes: bookkeeping, training settings, other software's switches.
IGNORED = frozenset(
    """architectures auto_map transformers_version use_cache pretraining_tp attention_dropout seq_aux aux_loss_alpha
    initializer_range ep_size head_dim qk_head_dim rope_interleave output_router_logits _name_or_path _provenance
    model_type use_bfloat16 torchscript return_dict output_hidden_states output_attentions tf_legacy_loss pruned_heads
    chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens finetuning_task id2label label2id tokenizer_class prefix sep_token_id decoder_start_token_id
    task_specific_params problem_type unsloth_fixed""".split()
)

MODEL_TYPES = ("kimi_k2", "deepseek_v3")  # deepseek_v3: Moonlight, and K2 checkpoints renamed for transformers
WEIGHT_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class K2Config:
    """One member of the family, field by field as in its config.json. Sizes are counts, lengths are tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    num_key_value_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int | None
    torch_dtype: str
    quantization_config: dict | None
    tensor_prefix: str = ""  # not in config.json: K2.5 puts "language_model." before every name of its text part

    def __post_init__(self):
        for name, test, expected in CONSTRAINTS:
            if not test(self):
                raise K2Error(f"config: {name} is {getattr(self, name)!r}; expected {expected}. Compare the file with the model's own config.json.")

    @classmethod
    def from_json(cls, path) -> "K2Config":
        """Read config.json (or the directory that holds it). Raises K2Error naming the key, the expected and the found."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json_object(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config") -> "K2Config":
        """The same from a dict that was read already; `where` names it in errors."""
        raw, prefix = text_part(raw, where)
        raw = in_the_released_dialect(raw)
        refuse_what_is_not_implemented(raw, where)
        values = {f.name: take(raw, f.name, where) for f in fields(cls) if f.name != "tensor_prefix"}
        values["rope_scaling"] = yarn_from(values["rope_scaling"], where)
        values["quantization_config"] = quantization_from(values["quantization_config"], where)
        try:
            return cls(**values, tensor_prefix=prefix)
        except K2Error as error:
            raise K2Error(f"{where}: {error}") from None

    def to_dict(self) -> dict:
        """config.json's content for this model, the implemented constants included."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensor_prefix"}
        if self.rope_scaling is not None:
            own["rope_scaling"] = {**vars(self.rope_scaling), "type": "yarn"}
        own = {key: value for key, value in own.items() if value is not None or key in ("q_lora_rank", "rope_scaling")}
        names = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"}
        return dict(sorted({**names, **IMPLEMENTED, **own}.items()))

    @property
    def qk_head_dim(self) -> int:
        """A = N + R, the size of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(A), times YaRN's m squared: 0.13086 for K2-Instruct (DeepSeek-V3 inference/model.py)."""
        mscale = self.rope_scaling.attention_mscale if self.rope_scaling else 1.0
        return self.qk_head_dim**-0.5 * mscale**2

    @property
    def weight_format(self) -> str:
        """How the checkpoint stores its large matrices: "plain", "fp8" (128 x 128 blocks) or "int4" (groups of 32)."""
        if self.quantization_config is None:
            return "plain"
        return "fp8" if self.quantization_config["quant_method"] == "fp8" else "int4"

    def is_dense(self, layer: int) -> bool:
        """True for the first layers, which have one wide feed-forward instead of experts (K2: layer 0)."""
        return layer < self.first_k_dense_replace


def _positive(name):
    return name, lambda c: getattr(c, name) > 0, "a positive number"


CONSTRAINTS = (
    *(_positive(f) for f in """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers
      num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts
      num_experts_per_tok max_position_embeddings routed_scaling_factor rms_norm_eps""".split()),
    ("v_head_dim", lambda c: c.v_head_dim <= c.qk_head_dim, "at most qk_nope_head_dim + qk_rope_head_dim, as in the whole family"),
    ("num_hidden_layers", lambda c: c.num_hidden_layers <= 1000, "at most 1000"),
    ("n_routed_experts", lambda c: c.n_routed_experts <= 100_000, "at most 100000"),
    # A hostile config must not make a reader list names until its memory is gone; K2 has 23,040 experts.
    ("n_routed_experts", lambda c: c.n_routed_experts * c.num_hidden_layers <= 200_000, "at most 200000 in all layers together"),
    ("q_lora_rank", lambda c: c.q_lora_rank is None or c.q_lora_rank > 0, "a positive number or null"),
    ("qk_rope_head_dim", lambda c: c.qk_rope_head_dim % 2 == 0, "an even number, since dimensions rotate in pairs"),
    ("num_key_value_heads", lambda c: c.num_key_value_heads == c.num_attention_heads, "num_attention_heads, as latent attention has no grouped heads"),
    ("first_k_dense_replace", lambda c: 0 <= c.first_k_dense_replace <= c.num_hidden_layers, "0 to num_hidden_layers"),
    ("num_experts_per_tok", lambda c: c.num_experts_per_tok <= c.n_routed_experts, "at most n_routed_experts"),
    ("rms_norm_eps", lambda c: c.rms_norm_eps < 1, "a small number such as 1e-6"),
    ("rope_theta", lambda c: c.rope_theta > 1, "a number above 1"),
    ("bos_token_id", lambda c: 0 <= c.bos_token_id < c.vocab_size, "an id below vocab_size"),
    ("eos_token_id", lambda c: 0 <= c.eos_token_id < c.vocab_size, "an id below vocab_size"),
    ("pad_token_id", lambda c: c.pad_token_id is None or 0 <= c.pad_token_id < c.vocab_size, "an id below vocab_size, or absent"),
    ("torch_dtype", lambda c: c.torch_dtype in WEIGHT_DTYPES, f"one of {', '.join(WEIGHT_DTYPES)}"),
)


def without_repeats(pairs) -> dict:
    """A JSON object's pairs as a dict. Python's reader would keep the last of two equal keys in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)} twice")
    return found


LARGEST_JSON = 100_000_000  # bytes; K2's index, the longest, has 12 million


def read_json_object(path: Path) -> dict:
    """The JSON object in a regular file, with a K2Error for everything else that can stand at a path."""
    if not os.path.isfile(path):  # false for a directory, a fifo, a dangling link, a name too long: opening a fifo would hang
        raise K2Error(f"{path}: expected a regular file, found {'something else' if os.path.exists(path) else 'nothing'}. Point --model at a checkpoint directory.")
    if os.path.getsize(path) > LARGEST_JSON:
        raise K2Error(f"{path}: expected JSON of at most {LARGEST_JSON} bytes, found {os.path.getsize(path)}. Fetch the file again.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, OSError, RecursionError) as error:
        raise K2Error(f"{path}: expected JSON, found: {error}. Fetch the file again.") from None
    if not isinstance(value, dict):
        raise K2Error(f"{path}: expected a JSON object, found {type(value).__name__}. Fetch the file again.")
    return value


def text_part(raw: dict, where: str) -> tuple[dict, str]:
    """K2.5 and K2.6 nest the language model in `text_config` and prefix its tensors; the vision part is not built here."""
    if raw.get("model_type") == "kimi_k25":
        inner = raw.get("text_config")
        if not isinstance(inner, dict):
            raise K2Error(f"{where}: model_type kimi_k25 without text_config; expected an object there. Fetch the file again.")
        raw, where, prefix = inner, f"{where}: text_config", "language_model."
    else:
        prefix = ""
    if raw.get("model_type") not in MODEL_TYPES:
        raise K2Error(f"{where}: model_type is {raw.get('model_type')!r}; expected one of {', '.join(MODEL_TYPES)}, kimi_k25. This is not a K2 family checkpoint.")
    return raw, prefix


def in_the_released_dialect(raw: dict) -> dict:
    """The same settings under the keys of K2's own file: transformers 5 writes `dtype` for `torch_dtype`, and
    `rope_parameters` for `rope_theta` and `rope_scaling`."""
    raw = dict(raw)
    if raw.get("model_type") == "deepseek_v3":
        raw.setdefault("rope_scaling", None)  # Moonlight's file lacks the key: its class then takes plain RoPE
    if "dtype" in raw and "torch_dtype" not in raw:
        raw["torch_dtype"] = raw.pop("dtype")
    if isinstance(raw.get("rope_parameters"), dict):
        rope = dict(raw.pop("rope_parameters"))
        rope_type = rope.pop("rope_type", None)
        raw["rope_theta"] = rope.pop("rope_theta", None)
        raw["rope_scaling"] = None if rope_type == "default" else {**rope, "type": rope_type}
        raw = {**FIXED_BY_THE_TRANSFORMERS_CLASS, **raw}
    return raw


def refuse_what_is_not_implemented(raw: dict, where: str):
    """Raise K2Error for an unknown key, or for a known one whose value this code does not compute."""
    known = {f.name for f in fields(K2Config)} | IMPLEMENTED.keys() | IGNORED
    for key in raw:
        if key not in known or key == "tensor_prefix":
            raise K2Error(f"{where}: unknown key {key} = {raw[key]!r}; this code does not know what it changes. Remove it only if you are sure that it changes nothing.")
    for key, implemented in IMPLEMENTED.items():
        if key not in raw:
            raise K2Error(f"{where}: {key} is missing; expected {implemented!r}. Take the value from the model's own config.json.")
        if raw[key] != implemented or type(raw[key]) is not type(implemented):
            raise K2Error(f"{where}: {key} is {raw[key]!r}; only {implemented!r} is implemented. Another architecture needs other code.")


LARGEST = 1e12  # no size, id or base of a real model comes near; a damaged number does, and would take all memory
MAY_BE_ABSENT = ("pad_token_id", "quantization_config")  # absent in the released files where they do not apply


def take(raw: dict, key: str, where: str):
    """The value of a key with its type checked. An int is a fine float; a bool is never a number."""
    if key not in raw and key in MAY_BE_ABSENT:
        return None
    if key not in raw:
        raise K2Error(f"{where}: {key} is missing and has no safe default. Take the value from the model's own config.json.")
    annotation = K2Config.__dataclass_fields__[key].type if key in K2Config.__dataclass_fields__ else YarnScaling.__dataclass_fields__[key].type
    value = raw[key]
    # The keys that may be null are checked further where they are read: yarn_from, quantization_from.
    allowed = {int: (int,), float: (int, float), str: (str,), int | None: (int, type(None))}.get(annotation, object)
    number_is_bad = isinstance(value, bool) or (isinstance(value, (int, float)) and not abs(value) < LARGEST)
    if number_is_bad or not isinstance(value, allowed):
        raise K2Error(f"{where}: {key} is {value!r}; expected {getattr(annotation, '__name__', annotation)}. Take the value from the model's own config.json.")
    return float(value) if annotation is float else value


def yarn_from(raw, where: str) -> YarnScaling | None:
    """rope_scaling: null for a model without it, or YaRN. Nothing else is implemented."""
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("type", raw.get("rope_type")) != "yarn":
        raise K2Error(f"{where}: rope_scaling is {raw!r}; only type 'yarn' or null is implemented.")
    names = {f.name for f in fields(YarnScaling)}
    unknown = raw.keys() - names - {"type", "rope_type"}
    if unknown:
        raise K2Error(f"{where}: rope_scaling has the unknown key {min(unknown)}; expected {', '.join(sorted(names))}.")
    yarn = YarnScaling(**{name: take(raw, name, f"{where}: rope_scaling") for name in names})
    if yarn.mscale != yarn.mscale_all_dim:
        raise K2Error(f"{where}: rope_scaling.mscale is {yarn.mscale}, mscale_all_dim {yarn.mscale_all_dim}; only equal values are implemented (cos and sin then keep factor 1).")
    if yarn.factor < 1 or yarn.original_max_position_embeddings < 1 or not yarn.beta_fast >= yarn.beta_slow > 0:
        raise K2Error(f"{where}: rope_scaling {vars(yarn)}; expected factor >= 1, a positive original length and beta_fast >= beta_slow > 0.")
    return yarn


def quantization_from(raw, where: str) -> dict | None:
    """quantization_config: null, FP8 in 128 x 128 blocks (K2, 0905), or INT4 packed in groups of 32 (Thinking, K2.5)."""
    if raw is None:
        return None
    method = raw.get("quant_method") if isinstance(raw, dict) else None
    if method == "fp8":
        expected = {"fmt": "e4m3", "weight_block_size": [128, 128]}
        found = {key: raw.get(key) for key in expected}
    elif method == "compressed-tensors":
        groups = raw.get("config_groups")
        group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        expected = {"format": "pack-quantized", "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        found = {key: weights.get(key, raw.get(key)) for key in expected}
    else:
        raise K2Error(f"{where}: quantization_config: quant_method is {method!r} in {raw!r}; expected fp8 or compressed-tensors.")
    for key in expected:
        if found[key] != expected[key]:
            raise K2Error(f"{where}: quantization_config: {key} is {found[key]!r}; only {expected[key]!r} is implemented.")
    return raw


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                        "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {}},
        }
    },
}
