"""Puts the repository root on the path, so that `import k2` finds this tree, and checks names against shapes.

While a test of the model path runs, each function of k2/ is looked at as it returns: a local called `x_TD` must end in two
axes, T must be one size throughout the function, and D must be the config's hidden_size.
"""

import contextlib
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from k2 import config as k2_config  # noqa: E402  (the path comes first)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and one gives the same bits everywhere

MODEL_PATH = {f"test_{stem}" for stem in "norm rope embedding kv_cache attention router expert moe decoder model reference quantization recording properties".split()}
AXES = re.compile(r"_([A-Z]{1,4})$")
LEGEND = set(re.findall(r"(?:^| )([A-Z])  ", k2_config.__doc__, re.MULTILINE))
CONFIG_SIZES = {
    "W": lambda c: c.vocab_size,
    "D": lambda c: c.hidden_size,
    "H": lambda c: c.num_attention_heads,
    "N": lambda c: c.qk_nope_head_dim,
    "R": lambda c: c.qk_rope_head_dim,
    "P": lambda c: c.qk_rope_head_dim // 2,
    "A": lambda c: c.qk_head_dim,
    "V": lambda c: c.v_head_dim,
    "Q": lambda c: c.q_lora_rank,
    "C": lambda c: c.kv_lora_rank,
    "E": lambda c: c.n_routed_experts,
    "K": lambda c: c.num_experts_per_tok,
}


def nearest_config(frame):
    """The config of this function, or of the nearest caller that has one (as `config`, `c` or `self.config`); or None."""
    while frame is not None:
        names = frame.f_locals
        for found in (names.get("config"), names.get("c"), getattr(names.get("self"), "__dict__", {}).get("config")):
            if isinstance(found, k2_config.K2Config):
                return found
        frame = frame.f_back
    return None


def wrong_names(frame) -> list[str]:
    """What is wrong with the suffixes of a returning function's locals, one line each."""
    tensors = {name: value for name, value in frame.f_locals.items() if AXES.search(name) and isinstance(value, (torch.Tensor, np.ndarray))}
    where = f"{Path(frame.f_code.co_filename).name}::{frame.f_code.co_qualname}"
    config = nearest_config(frame) if tensors else None
    sizes = {letter: (size(config), "the config") for letter, size in CONFIG_SIZES.items()} if config else {}
    wrong = []
    for name, value in tensors.items():
        letters, shape = AXES.search(name)[1], tuple(value.shape)
        if len(shape) < len(letters):
            wrong.append(f"{where}: {name} has shape {shape}")
        for letter, found in zip(letters[::-1], shape[::-1]):
            size, source = sizes.setdefault(letter, (found, name))
            if letter not in LEGEND:
                wrong.append(f"{where}: {name} uses {letter}, which the legend does not have")
            elif found != size:
                wrong.append(f"{where}: {name} has shape {shape}, but {letter} = {size} in {source}")
    return wrong


@contextlib.contextmanager
def checked_shapes():
    """Yields a set that fills with one line for each wrong name in k2/ while the context lasts."""
    found, before, package = set(), sys.getprofile(), str(ROOT / "k2")

    def look(frame, event, _):
        if event == "return" and frame.f_code.co_filename.startswith(package):
            found.update(wrong_names(frame))

    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)


@pytest.fixture
def shape_checker():
    """`checked_shapes`, for the test of the checker itself."""
    return checked_shapes


@pytest.fixture(autouse=True)
def names_tell_shapes(request):
    """Every test of the model path also fails where a name in k2/ does not tell its tensor's shape."""
    if request.module.__name__ not in MODEL_PATH:
        yield
        return
    with checked_shapes() as found:
        yield
    assert not found, "\n".join(sorted(found))
