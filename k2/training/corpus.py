"""The corpus of K2-mini: Python source that every machine with this project already has, so nothing is downloaded.

The standard library (its own modules twice, its tests once) and three packages that requirements.txt brings: numpy,
matplotlib, networkx. All under permissive licences (PSF, BSD). Whole modules of the standard library are held out,
with every test that speaks of them, to measure on text that training never saw.
"""

import functools
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from ..config import K2Error
from ..tokenizer import Tokenizer

# Modules of the standard library, over 1 MB together, that training never sees.
HELD_OUT = tuple("argparse configparser csv dataclasses email fractions heapq http json statistics tarfile textwrap".split())
# Data tables and generated text: long, repetitive, and no prose or program.
LEFT_OUT = ("encodings", "pydoc_data", "site-packages", "lib2to3/tests/data", "test/cjkencodings", "test/decimaltestdata",
            "__pycache__", "unicodedata", "idlelib/help", "config-3", "bad_coding", "badsyntax")
PACKAGES = ("numpy", "matplotlib", "networkx")


def standard_library() -> Path:
    """Where this Python keeps its own sources."""
    return Path(sysconfig.get_paths()["stdlib"])


@functools.cache  # a walk over thousands of files, and the answer is asked for several times
def sources(root: Path) -> tuple[Path, ...]:
    """Python files below a folder, in the order of their names, so that every run sees one order."""
    found = (p for p in root.rglob("*.py") if not any(word in p.relative_to(root).as_posix() for word in LEFT_OUT))
    return tuple(sorted(found, key=lambda p: p.relative_to(root).as_posix()))


def speaks_of_held_out(relative: Path) -> bool:
    """True for a held-out module's own files and for tests named after one."""
    names = [part.removesuffix(".py").removeprefix("test_") for part in relative.parts]
    return any(name == held or name.startswith(held + "_") for name in names for held in HELD_OUT)


def held_out_files() -> list[Path]:
    """The held-out modules' files without their tests."""
    root = standard_library()
    own = [p for p in sources(root) if speaks_of_held_out(p.relative_to(root))]
    return [p for p in own if p.relative_to(root).parts[0].removesuffix(".py") in HELD_OUT]


def training_files() -> list[tuple[Path, int]]:
    """(file, how often one epoch shows it)."""
    root, site = standard_library(), Path(sysconfig.get_paths()["purelib"])
    own = [p for p in sources(root) if not speaks_of_held_out(p.relative_to(root))]
    chosen = [(p, 1 if "test" in p.relative_to(root).parts else 2) for p in own]
    return chosen + [(p, 1) for name in PACKAGES for p in sources(site / name)]


def read_texts(files: list[Path]) -> list[str]:
    """The files' texts, without those that are empty, not UTF-8, or equal to one read before."""
    texts = {}
    for path in files:
        try:
            texts.setdefault(path.read_text(encoding="utf-8"), None)
        except (UnicodeDecodeError, OSError):
            continue
    return [text for text in texts if text.strip()]


def digest_lines() -> list[str]:
    """One line `sha256 bytes name` per held-out file, to say later whether a machine measures the same text."""
    root = standard_library()
    return [f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.stat().st_size} {p.relative_to(root).as_posix()}" for p in held_out_files()]


def token_stream(tokenizer: Tokenizer, files: list[tuple[Path, int]]) -> np.ndarray:
    """Ids of all documents, each closed by [EOS], repeated as asked; uint16 where the vocabulary allows."""
    end, parts, seen = tokenizer.special["[EOS]"], [], set()
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    for path, times in files:
        for text in read_texts([path]):
            if text not in seen:
                seen.add(text)
                parts += [np.array(tokenizer.encode(text) + [end], dtype=kind)] * times
    return np.concatenate(parts)


class Windows:
    """Windows of T + 1 tokens in a new random order each epoch; window i of a run is a function of seed and i alone."""

    def __init__(self, stream: np.ndarray, length: int, seed: int):
        self.stream, self.length, self.seed = stream, length, seed
        self.per_epoch = (len(stream) - 1) // length - 1
        if self.per_epoch < 1:
            raise K2Error(f"training: found {len(stream)} tokens of text; expected at least {2 * length + 1} for windows of {length}. Give more text, or a smaller --window.")

    def batch(self, step: int, rows: int) -> np.ndarray:
        """The step's windows, int64 (rows, length + 1)."""
        return np.stack([self._window(i) for i in range(step * rows, (step + 1) * rows)]).astype(np.int64)

    def _window(self, i: int) -> np.ndarray:
        epoch, within = divmod(i, self.per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            random = np.random.default_rng((self.seed, epoch))
            self._epoch, self._order, self._offset = epoch, random.permutation(self.per_epoch), int(random.integers(self.length))
        start = int(self._order[within]) * self.length + self._offset
        return self.stream[start : start + self.length + 1]
