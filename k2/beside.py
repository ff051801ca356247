"""How fast, beside transformers on the same checkpoint: `python -m k2 bench --beside`.

Each engine runs in a process of its own (for its peak memory), the two in turn, a few rounds; what counts is the ratio
within one round, since machines drift. Both compute in the same dtype; in float32 they must choose the same tokens.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from .ceilings import peak_megabytes
from .checkpoint import Checkpoint, save
from .config import K2Config, K2Error
from .generation import decode, prefill
from .kv_cache import LatentCache
from .model import K2
from .offload import load

MID = {  # a random model of ordinary proportions: 0.4 billion weights
    "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "vocab_size": 16384, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


TIMES = 5  # each process measures so often
LOGITS = 4096  # of the vocabulary's first ids are compared


def bench(mini: Path, prompt: int = 512, new: int = 64, rounds: int = 3):
    """Print a table of both engines on K2-mini and on the mid-size model, and the ratios. Needs transformers."""
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("K2-mini", load(mini, dtype=torch.float32)), ("mid-size", random_model(load(mini).config))):
            directory = Path(folder) / name
            save(model, directory, format="fp32")
            longest = model.config.max_position_embeddings - new
            del model
            compare(name, directory, min(prompt, longest), new, rounds)


def compare_checkpoint(directory: Path, prompt: int, new: int, rounds: int, compiled: bool, dtype: str = "auto"):
    """The same for one checkpoint of unquantised weights, in its own dtype ("auto", "stored") or another; `compiled` adds this
    project with torch.compile."""
    if Checkpoint(directory).config.weight_format != "plain":
        raise K2Error(f"{directory}: quantised weights; expected bfloat16 or float32 ones, since transformers widens others at load. Write some: python -m k2 bench --write mid --format bf16 --out DIR")
    compare(directory.name, directory, prompt, new, rounds, "auto" if dtype == "stored" else dtype, compiled)


def random_model(like: K2Config) -> K2:
    """The mid-size model: weights that keep activations finite, and nothing to say."""
    torch.manual_seed(0)
    return K2(replace(like, quantization_config=None, **MID))


def compare(name: str, directory: Path, prompt: int, new: int, rounds: int, dtype: str = "float32", compiled: bool = False):
    """Run the engines in turn and print medians and per-round ratios."""
    runs = {engine: [] for engine in ("k2", *(["compiled"] if compiled else []), "transformers")}
    for _ in range(rounds):
        for engine, results in runs.items():
            results.append(run_child(engine, directory, prompt, new, dtype))
    print(f"\n{name}: prompt {prompt}, {new} new tokens, {runs['k2'][0]['dtype']}, {torch.get_num_threads()} threads, median of {rounds}")
    print(f"{'':14}{'load s':>9}{'first token s':>15}{'prefill t/s':>13}{'decode t/s':>12}{'peak MB':>10}")
    columns = (("load", 9, ".2f"), ("first", 15, ".3f"), ("prefill", 13, ".0f"), ("decode", 12, ".1f"), ("peak", 10, ".0f"))
    for engine, results in runs.items():
        print(f"{engine:14}" + "".join(f"{median(r[key] for r in results):>{width}{form}}" for key, width, form in columns))
    for engine in list(runs)[:-1]:
        for key in ("prefill", "decode"):
            ratios = sorted(ours[key] / theirs[key] for ours, theirs in zip(runs[engine], runs["transformers"]))
            print(f"{engine}: {key} {median(ratios):.2f} times transformers ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"same greedy tokens: {agreement([r['ids'] for results in runs.values() for r in results], runs['k2'][0]['dtype'])}")
    for engine in list(runs)[:-1]:
        print(f"{engine}: logits behind the prompt apart from transformers' by {apart(runs[engine][0]['logits'], runs['transformers'][0]['logits']):.1e} of their spread")


def agreement(texts: list[list[int]], dtype: str) -> str:
    """yes, or NO and where they part; in bfloat16 each engine rounds at other places, and random weights have many near ties."""
    same = next((n for n, ids in enumerate(zip(*texts)) if len(set(ids)) > 1), len(texts[0]))
    if same == len(texts[0]):
        return "yes"
    why = " (each rounds bfloat16 at other places, and random weights have many near ties; with --dtype float32 both should choose the same)" if dtype == "bfloat16" else ""
    return f"NO, they part after {same} of {len(texts[0])}{why}"


def apart(ours: list[float], theirs: list[float]) -> float:
    """The root mean square of the difference over the standard deviation of the second."""
    ours_W, theirs_W = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return ((ours_W - theirs_W).square().mean().sqrt() / theirs_W.std()).item()


def run_child(engine: str, directory: Path, prompt: int, new: int, dtype: str) -> dict:
    """One engine in a fresh process; what it measured."""
    done = subprocess.run(**child_process(engine, directory, prompt, new, dtype), capture_output=True, check=False)
    if done.returncode:
        raise failure(engine, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child_process(engine: str, directory: Path, first: int, second: int, dtype: str) -> dict:
    """What subprocess is told. What `import k2` asks of torch's memory is not asked for others."""
    command = [sys.executable, "-m", "k2", "bench", "--child", engine, str(directory), str(first), str(second), "--dtype", dtype]
    settings = os.environ | ({"THP_MEM_ALLOC_ENABLE": "0"} if engine.startswith("transformers") else {})
    return {"args": command, "env": settings, "text": True}


def failure(engine: str, said: str) -> K2Error:
    """What the user is told of a child that failed."""
    return K2Error(f"bench: {engine} failed: {(said.strip() or 'no message').splitlines()[-1]}. Install tests/requirements-oracles.txt for transformers.")


def child(engine: str, directory: str, prompt: int, new: int, dtype) -> dict:
    """Load, read a little to warm up, then measure prefill and decode a few times: the medians, as machines hiccup."""
    started = time.perf_counter()
    begin, computes = {"k2": ours, "compiled": ours_compiled, "transformers": theirs}[engine](directory, dtype)
    loaded = time.perf_counter()
    ids = torch.randint(0, 4096, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    begin(ids[:64])
    seconds = {"prefill": [], "decode": []}
    for _ in range(TIMES):
        before = time.perf_counter()
        logits_W, step = begin(ids)
        chosen = [int(logits_W.argmax())]
        after = time.perf_counter()
        for _ in range(new):
            chosen.append(step(chosen[-1]))
        seconds["prefill"].append(after - before)
        seconds["decode"].append(time.perf_counter() - after)
    first = median(seconds["prefill"])
    return {"load": loaded - started, "first": first, "prefill": prompt / first, "decode": new / median(seconds["decode"]),
            "peak": peak_megabytes(), "ids": chosen, "logits": logits_W[:LOGITS].tolist(), "dtype": str(computes).removeprefix("torch.")}  # fmt: skip


def ours(directory: str, dtype, compiled: bool = False):
    """(begin, the dtype that it computes in), with begin(ids) -> (logits (W,) behind them, step) and step(id) -> next id; this project."""
    model = load(directory, dtype=dtype, compiled=compiled)

    def begin(ids):
        cache = LatentCache(model.config)
        return prefill(model, ids, cache), lambda i: int(decode(model, i, cache).argmax())

    return begin, model.lm_head.weight.dtype


def ours_compiled(directory: str, dtype):
    """The same with torch.compile."""
    return ours(directory, dtype, compiled=True)


def theirs(directory: str, dtype):
    """The same with transformers' DeepseekV3ForCausalLM in its default settings."""
    import transformers

    config = json.loads((Path(directory) / "config.json").read_text())
    config = transformers.DeepseekV3Config.from_dict({**config, "model_type": "deepseek_v3"})  # it does not know kimi_k2
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(directory, config=config, dtype=dtype).eval()

    @torch.inference_mode()
    def run(ids, cache):
        out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]

    def begin(ids):
        cache = transformers.DynamicCache()
        return run(ids, cache), lambda i: int(run([i], cache).argmax())

    return begin, model.lm_head.weight.dtype
