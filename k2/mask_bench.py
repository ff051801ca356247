"""What a constraint costs a step with a vocabulary of K2's size: `python -m k2 bench --mask`. No weights are needed.

The vocabulary is made of the words, blanks and marks of this machine's Python sources, and of their beginnings: as many
tokens as K2 has, of like lengths. Documents are sampled evenly from what the masks allow, which strays further than a
model would: more states, and more walks over the trie, one for each mask that is not at hand.
"""

import random
import re
import time
from statistics import mean, median, quantiles
from types import SimpleNamespace

import torch

from .constraint import Grammar, Vocabulary
from .tokenizer import RESERVED, SPECIAL_NAMES
from .training.corpus import read_texts, training_files

K2_TOKENS = 163_584
PERSON = {
    "type": "object", "required": ["name", "age", "tags"],
    "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                   "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4}, "note": {"type": ["string", "null"]}},
}  # fmt: skip


def wide_tokens(texts: list[str], size: int) -> list[bytes]:
    """Single bytes, then the commonest pieces of some texts, then their beginnings, `size` in all."""
    count = {}
    for text in texts:
        for piece in re.findall(r" ?[^\W\d_]+| ?_+|\d{1,3}| ?[^\w\s]+|\s+", text):
            count[piece] = count.get(piece, 0) + 1
    pieces = [piece.encode()[:64] for piece in sorted(count, key=count.get, reverse=True)]
    tokens = dict.fromkeys([*(bytes([b]) for b in range(256)), *pieces, *(p[:n] for p in pieces for n in range(2, len(p)))])
    return list(tokens)[:size]


def stand_in(tokens: list[bytes]) -> SimpleNamespace:
    """What a Vocabulary asks of a tokenizer."""
    names = [SPECIAL_NAMES.get(offset, f"<|reserved_token_{len(tokens) + offset}|>") for offset in range(RESERVED)]
    special = {name: len(tokens) + offset for offset, name in enumerate(names)}
    return SimpleNamespace(bytes_of=[*tokens, *(name.encode() for name in names)], vocab_size=len(tokens) + RESERVED, special=special,
                           stop_ids={special["[EOS]"], special["<|im_end|>"]})  # fmt: skip


def documents(grammar: Grammar, count: int, limit: int, seed: int) -> list[float]:
    """Milliseconds of each step's mask and accept, over so many sampled documents."""
    choose, times = random.Random(seed), []
    for _ in range(count):
        constraint = grammar.start()
        for left in range(limit, 0, -1):
            started = time.perf_counter()
            mask_W = constraint.mask(left)
            masked = time.perf_counter()
            allowed = mask_W.nonzero()
            i = int(allowed[choose.randrange(len(allowed))])
            chosen = time.perf_counter()
            constraint.accept(i)
            times.append(1000 * (masked - started + time.perf_counter() - chosen))
            if constraint.done or i in constraint.stop_ids:
                break
    return times


def bench(size: int = K2_TOKENS, count: int = 60, limit: int = 64):
    """Print the cost of a step in the first documents and in later ones, on one thread."""
    torch.set_num_threads(1)
    tokens = wide_tokens(read_texts([path for path, _ in training_files()]), size)
    started = time.perf_counter()
    vocabulary = Vocabulary(stand_in(tokens))
    nodes = sum(len(parents) for parents, *_ in vocabulary.levels)
    print(f"{vocabulary.width:,} ids, {nodes:,} trie nodes, made in {time.perf_counter() - started:.2f} s; {count} documents of at most {limit} tokens, one thread")
    print(f"{'ms a step':42}{'steps':>7}{'median':>9}{'mean':>9}{'p99':>9}{'worst':>9}{'walks':>7}")
    for name, schema in (("JSON Mode", None), ("schema", PERSON)):
        grammar, made = Grammar(vocabulary, schema), 0
        for seed, turn in enumerate(("the first documents", "as many more, after that warm-up")):
            times = documents(grammar, count, limit, seed)
            print(f"{name + ', ' + turn:42}{len(times):>7}{median(times):>9.3f}{mean(times):>9.3f}{quantiles(times, n=100)[98]:>9.3f}{max(times):>9.3f}{grammar.walks - made:>7}")
            made = grammar.walks
