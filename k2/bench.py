"""What a checkpoint does on this machine at given budgets, beside what the machine could move: `python -m k2 bench DIR`.

Each budget runs in a process of its own (for its peak memory), in turn, for a few rounds; medians are printed. The
ceilings are measured in the same run. A decoded token reads every active weight once, so its share of a roofline is the
bytes it moved per second over that ceiling.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from .ceilings import bus_bandwidth, device_bandwidth, disk_bandwidth, disk_busy, peak_megabytes, ram_bandwidth
from .checkpoint import DTYPES, Checkpoint
from .config import K2Error
from .generation import chunk_size, decode, prefill
from .kv_cache import LatentCache
from .offload import load, store_of, weight_bytes

WARM_UP = 4  # decode steps before the clock starts
RANGES = ("prefill", "decode", "ram_share", "disk_share", "prefill_disk_share")  # what a median alone says too little of

COLUMNS = {  # title: (key, width, format)
    "load s": ("load", 8, ".2f"), "first s": ("first", 9, ".2f"), "prefill t/s": ("prefill", 13, ".1f"), "decode t/s": ("decode", 12, ".2f"),
    "hits": ("hits", 7, ".0%"), "GB/token": ("disk_per_token", 10, ".3f"), "disk busy": ("busy", 11, ".0%"), "wait s": ("wait", 9, ".3f"), "compute s": ("compute", 11, ".3f"),
    "peak MB": ("peak", 9, ".0f"), "of RAM": ("ram_share", 8, ".0%"), "of disk": ("disk_share", 9, ".0%"), "prefill": ("prefill_disk_share", 9, ".0%"),
}  # fmt: skip


def bench(directory, budgets: list, settings: dict, rounds: int) -> dict:
    """Measure a checkpoint at each budget of RAM in bytes (None: what is free); {ceilings, runs: [medians by budget]}.
    The ceilings are measured before and after each run, as they change within minutes on a machine that others use too: a
    run's shares are of the better of the two."""
    runs, measured = {budget: [] for budget in budgets}, [measured_ceilings(directory, settings["device"])]
    for _ in range(rounds):
        for budget, found in runs.items():
            run = run_child(directory, {**settings, "ram": budget})
            measured.append(measured_ceilings(directory, settings["device"]))
            found.append(with_shares(run, {name: max(rate, measured[-2][name]) for name, rate in measured[-1].items()}))
    ceilings = {name: sorted(rates[name] for rates in measured) for name in measured[0]}
    return {"checkpoint": str(directory), "threads": torch.get_num_threads(), **settings, "ceilings": ceilings,
            "runs": [middle_of(found) for found in runs.values()]}  # fmt: skip


def measured_ceilings(directory, device: str) -> dict[str, float]:
    """Bytes a second of each tier that there is."""
    found = {"ram": ram_bandwidth(), "disk": disk_bandwidth(directory)}
    if device == "cuda":
        found |= {"bus": bus_bandwidth(torch.device(device)), "gpu": device_bandwidth(torch.device(device))}
    return found


def run_child(directory, settings: dict) -> dict:
    """One budget in a fresh process; what it measured."""
    command = [sys.executable, "-m", "k2", "bench", str(directory), "--alone", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise K2Error(f"bench: {(done.stderr.strip() or 'no message').splitlines()[-1].removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def middle_of(found: list[dict]) -> dict:
    """The median of each figure, and the range of the speeds and shares."""
    middle = {key: median(run[key] for run in found) if isinstance(value, (int, float)) else value for key, value in found[0].items()}
    return middle | {f"{key}_range": [min(run[key] for run in found), max(run[key] for run in found)] for key in RANGES}


def with_shares(run: dict, ceilings: dict[str, float]) -> dict:
    """The figures, and the shares of the ceilings that they amount to."""
    return run | {
        "ram_share": run["active_bytes"] * run["decode"] / ceilings["ram"],
        "disk_share": run["disk_per_token"] * 1e9 * run["decode"] / ceilings["disk"],
        "prefill_disk_share": run["prefill_disk_rate"] / ceilings["disk"],
    }


def alone(directory, settings: dict) -> dict:
    """Load, prefill twice and decode once in this process; seconds, rates, and what moved."""
    before, started = peak_megabytes(), time.perf_counter()
    model, ids = loaded_with_prompt(directory, settings)
    loaded, store = time.perf_counter() - started, store_of(model)
    first, _, _, _ = timed_prefill(model, ids, store)
    again, read, cache, i = timed_prefill(model, ids, store)
    i = warmed_up(model, i, cache)
    moved, busy, started = moved_by(store), disk_busy(directory), time.perf_counter()
    for _ in range(settings["new"]):
        i = int(decode(model, i, cache).argmax())
    seconds = time.perf_counter() - started
    now, busy = moved_by(store), disk_busy(directory) - busy
    per_token = {key: (now[key] - moved[key]) / settings["new"] for key in now}
    asked = per_token["hits"] + per_token["misses"]
    return {"ram": settings["ram"], "load": loaded, "first": loaded + first, "prefill": len(ids) / again, "prefill_disk_rate": read / again, "decode": settings["new"] / seconds,
            "hits": per_token["hits"] / asked if asked else 1.0, "disk_per_token": per_token["bytes_read"] / 1e9, "bus_per_token": per_token["bytes_lifted"] / 1e9,
            "busy": busy / seconds, "wait": per_token["seconds_waited"], "compute": seconds / settings["new"] - per_token["seconds_waited"],
            "active_bytes": active_bytes(directory, settings), "before": before, "peak": peak_megabytes(), "slots": len(store.ram.rooms) if store else 0,
            "gpu_peak": torch.cuda.max_memory_allocated() / 1e6 if settings["device"] == "cuda" else 0.0, "last_id": i}  # fmt: skip


def loaded_with_prompt(directory, settings: dict):
    """(the model, the ids of a random prompt that is the same each time)."""
    model = load(directory, settings["device"], DTYPES[settings["dtype"]], settings["gpu_memory"], settings["ram"], compiled=settings["compiled"])
    return model, torch.randint(0, min(4096, model.config.vocab_size), (settings["prompt"],), generator=torch.Generator().manual_seed(1)).tolist()


def warmed_up(model, i: int, cache: LatentCache) -> int:
    """The id behind the first few tokens, which no clock counts."""
    for _ in range(WARM_UP):
        i = int(decode(model, i, cache).argmax())
    return i


def long_context(directory, lengths: list[int], dtype: str) -> list[dict]:
    """For each context length: seconds of a decoded token and of a prompt's chunk behind so many tokens, the cache's bytes
    and the process' peak. The past is made of random latents, as reading a prompt of that length would take hours."""
    model = load(directory, dtype=DTYPES[dtype])
    tokens = chunk_size(model.config)
    model.config = replace(model.config, max_position_embeddings=max(lengths) + tokens + WARM_UP + 8)  # K2-mini's is shorter
    rows = []
    for length in sorted(lengths):
        cache = filled_cache(model, length)
        chunk = [seconds_of(lambda: model(torch.arange(tokens) % model.config.vocab_size, trimmed(cache, length), slice(-1, None))) for _ in range(2)]
        token = [seconds_of(lambda: decode(model, 1, trimmed(cache, length))) for _ in range(WARM_UP + 5)]
        size = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.c_kv_MC, layer.k_rope_MR))
        rows.append({"length": length, "token": median(token[WARM_UP:]), "chunk": min(chunk), "cache": size, "peak": peak_megabytes()})
    return rows


def filled_cache(model, length: int) -> LatentCache:
    """A cache that holds so many random latents of ordinary size."""
    c, x = model.config, model.model.embed_tokens.weight
    cache, dtype = LatentCache(c), model.model.layers[0].self_attn.kv_b_proj.weight.dtype
    for layer in cache.layers:
        layer.append(torch.randn(length, c.kv_lora_rank, dtype=dtype, device=x.device), torch.randn(length, c.qk_rope_head_dim, dtype=dtype, device=x.device))
    cache.advance(length)
    return cache


def trimmed(cache: LatentCache, length: int) -> LatentCache:
    """The cache, back at a length."""
    cache.advance(length - cache.length)
    return cache


@torch.inference_mode()
def seconds_of(action) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def context_table(rows: list[dict]) -> str:
    """The rows in words."""
    lines = [f"{'context':>9}{'token s':>10}{'chunk s':>10}{'cache MB':>10}{'peak MB':>10}"]
    return "\n".join(lines + [f"{row['length']:>9}{row['token']:>10.4f}{row['chunk']:>10.3f}{row['cache'] / 1e6:>10.1f}{row['peak']:>10.0f}" for row in rows])


def profile(directory, settings: dict) -> dict:
    """Where the time of a decoded token goes, in this process: {seconds, in operations, waited for the disk, rows}, a row being an
    operation of torch and its seconds and calls a token, without those that it calls itself. Watching costs some time too."""
    model, ids = loaded_with_prompt(directory, settings)
    _, _, cache, i = timed_prefill(model, ids, store_of(model))
    i = warmed_up(model, i, cache)
    before = moved_by(store_of(model))["seconds_waited"]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler else tells stderr when it starts and stops
    with torch.autograd.profiler.profile() as watched:
        started = time.perf_counter()
        for _ in range(settings["new"]):
            i = int(decode(model, i, cache).argmax())
        seconds = time.perf_counter() - started
    rows = [{"name": row.key.removeprefix("aten::"), "seconds": row.self_cpu_time_total / 1e6 / settings["new"], "calls": row.count / settings["new"]} for row in watched.key_averages()]
    waited = (moved_by(store_of(model))["seconds_waited"] - before) / settings["new"]
    return {"seconds": seconds / settings["new"], "operations": sum(row["seconds"] for row in rows), "waited": waited, "rows": sorted(rows, key=lambda row: -row["seconds"])}


def profile_table(found: dict, most: int = 12) -> str:
    """The same in words, the dearest operations first."""
    between = found["seconds"] - found["operations"] - found["waited"]
    lines = [f"a decoded token: {1e3 * found['seconds']:.1f} ms, of which {1e3 * found['operations']:.1f} in torch's operations, {1e3 * found['waited']:.1f} waiting for the disk, {1e3 * between:.1f} between them (Python)",
             f"{'operation':46}{'ms':>8}{'calls':>8}{'us each':>9}"]  # fmt: skip
    return "\n".join(lines + [f"{row['name'][:45]:46}{1e3 * row['seconds']:>8.2f}{row['calls']:>8.0f}{1e6 * row['seconds'] / row['calls']:>9.1f}" for row in found["rows"][:most]])


def timed_prefill(model, ids: list[int], store):
    """(seconds, bytes read from disk, the cache, the first new id) of a prompt."""
    cache, before, started = LatentCache(model.config), moved_by(store)["bytes_read"], time.perf_counter()
    i = int(prefill(model, ids, cache).argmax())
    return time.perf_counter() - started, moved_by(store)["bytes_read"] - before, cache, i


def moved_by(store) -> dict:
    """A copy of a store's statistics; of none, zeros."""
    names = ("hits", "misses", "bytes_read", "bytes_lifted", "seconds_waited")
    return {name: getattr(store.statistics, name) if store else 0 for name in names}


def active_bytes(directory, settings: dict) -> float:
    """Bytes of weights that one token reads, in the form in which they lie in memory."""
    checkpoint = Checkpoint(directory)
    routed, rest = weight_bytes(checkpoint, DTYPES[settings["dtype"]], torch.device(settings["device"]))
    return rest + routed * checkpoint.config.num_experts_per_tok / checkpoint.config.n_routed_experts


def table(result: dict) -> str:
    """The result in words and columns."""
    ceilings = ", ".join(f"{name} {rates[0] / 1e9:.1f} to {rates[-1] / 1e9:.1f} GB/s" for name, rates in result["ceilings"].items())
    lines = [f"{Path(result['checkpoint']).name}: prompt {result['prompt']}, {result['new']} new tokens, {result['threads']} threads; ceilings measured: {ceilings}",
             f"{'RAM':>10}" + "".join(f"{title:>{width}}" for title, (_, width, _) in COLUMNS.items())]  # fmt: skip
    for run in result["runs"]:
        budget = f"{run['ram'] / 1e9:.3g} GB" if run["ram"] else "free"
        lines.append(f"{budget:>10}" + "".join(f"{run[key]:>{width}{form}}" for key, width, form in COLUMNS.values()))
    return "\n".join(lines)
