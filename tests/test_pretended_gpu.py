"""The way over a GPU, on a machine without one: no operation mixes devices, and no copy is used before it was waited for.

tests/pretended_gpu.py is the GPU. It runs as a program of its own, for some seconds each time.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pretended_gpu import MISTAKES, answers
from small import assert_close, random_model, small_config

from k2 import checkpoint

PRETENDED = Path(__file__).with_name("pretended_gpu.py")
FORMATS = ("bf16", "fp8", "int4")
WITH_A_BUS = ("RAM", "disk", "one above")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of 22 experts in each format."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for form in FORMATS:
        checkpoint.save(random_model(small_config(hidden_size=128, moe_intermediate_size=96)), folder / form, format=form, shards=2)
    return folder


@pytest.fixture(scope="module")
def running(folder):
    """All of the programs below, by format and mistake, as many at a time as there are cores."""
    asked = [*((form,) for form in FORMATS), *(("bf16", mistake) for mistake in MISTAKES)]
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        yield {(form, *mistake): cores.submit(on_the_gpu, folder / form, *mistake) for form, *mistake in asked}


@pytest.fixture(scope="module", params=FORMATS)
def both(request, folder, running):
    """What the pretended GPU says of a checkpoint, and what the CPU says in float32."""
    done = running[request.param,].result()
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), answers(checkpoint.load(folder / request.param, dtype=torch.float32))


def on_the_gpu(*arguments):
    """The process that takes the pretended GPU for one, at its end."""
    return subprocess.run([sys.executable, str(PRETENDED), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


def assert_logits_are_close(found: dict, expected: dict, limit: float, what: str):
    """Each of the logits tensors, within the limit."""
    for ours, theirs in zip(found["logits"], expected["logits"], strict=True):
        assert_close(torch.tensor(ours), torch.tensor(theirs, dtype=torch.float64), limit, what)


def test_in_float32_the_gpu_says_what_the_cpu_says_at_every_budget(both):
    found, expected = both
    for budget, said in found["float32"].items():
        assert_logits_are_close(said, expected, 1e-5, budget)
        assert [said[kind] for kind in ("text", "drawn", "allowed")] == [expected[kind] for kind in ("text", "drawn", "allowed")], budget
        assert (said["lifted"] > 0) == (budget in WITH_A_BUS), f"{budget}: {said['lifted']} experts crossed"


def test_with_weights_at_rest_every_budget_gives_the_same_bits(both):
    found, expected = both[0]["stored"], both[1]
    for budget in WITH_A_BUS:
        assert found[budget]["lifted"] > 0, f"{budget}: nothing crossed"
        assert {**found[budget], "lifted": 0} == found["resident"], budget
    for budget in ("resident", "on the CPU"):  # the latter by the CPU's kernels, which round elsewhere
        assert_logits_are_close(found[budget], expected, 5e-2, budget)


def test_a_product_at_rest_moves_few_bytes_for_each_weight(both):
    found = both[0]["traffic"]
    print(found)
    # FP8: 1 for the code, 2 + 2 for it as bfloat16, 2 for the weight, 2 for the product; INT4: bytes and nibbles instead of the code
    assert found["fp8"]["bytes"] < 9.5 and found["int4"]["bytes"] < 11.5, found
    assert found["fp8"]["operations"] <= 4 and found["int4"]["operations"] <= 7, found


SEEN = {
    "not_waited_for": "expected finite numbers",  # or other text: bytes that are not there yet may be numbers
    "room_taken_too_early": "",
    "target_taken_too_early": "does not wait for the products",
    "two_devices": "mixes devices",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(running, mistake):
    done = running["bf16", mistake].result()
    if done.returncode == 0:
        found = json.loads(done.stdout)["stored"]
        assert {**found["RAM"], "lifted": 0} != found["resident"], "it changes nothing"
        assert mistake in ("not_waited_for", "room_taken_too_early"), "nobody said a word"
    else:
        assert SEEN[mistake] and SEEN[mistake] in done.stderr, done.stderr[-2000:]
