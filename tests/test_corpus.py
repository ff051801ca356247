"""What training sees, and that it never sees what it is measured on."""

from pathlib import Path

import numpy as np
import pytest

from k2.training import corpus

CARD = Path(corpus.__file__).parents[1] / "mini" / "held_out.sha256"


def test_held_out_modules_are_whole_and_at_least_a_megabyte():
    files = corpus.held_out_files()
    assert sum(p.stat().st_size for p in files) >= 1_000_000
    names = {p.relative_to(corpus.standard_library()).parts[0].removesuffix(".py") for p in files}
    assert names == set(corpus.HELD_OUT)


def test_no_held_out_text_is_trained_on():
    held_out = {p.read_bytes() for p in corpus.held_out_files()} - {b""}
    sizes = {len(content) for content in held_out}
    trained = [p for p, _ in corpus.training_files()]
    assert not set(trained) & set(corpus.held_out_files())
    assert not [p for p in trained if 200 < p.stat().st_size in sizes and p.read_bytes() in held_out]
    inside = {p.relative_to(corpus.standard_library()).as_posix() for p in trained if corpus.standard_library() in p.parents}
    assert not inside & {"test/test_argparse.py", "test/test_dataclasses.py", "test/test_http_cookies.py", "test/test_tarfile.py"}
    assert not [name for name in inside if name.startswith(("test/test_email/", "test/test_json/", "json/", "email/", "http/"))]


def test_this_python_has_the_held_out_text_that_the_model_card_speaks_of():
    if corpus.digest_lines() != CARD.read_text().splitlines():
        pytest.skip("another Python version: its standard library differs from the one K2-mini was measured on")


def test_windows_depend_on_seed_and_step_alone():
    stream = np.arange(5000).astype(np.uint16)
    straight, jumping = corpus.Windows(stream, 16, seed=1), corpus.Windows(stream, 16, seed=1)
    batches = [straight.batch(step, 5) for step in range(130)]  # more than two epochs
    for step in (129, 3, 64):
        assert np.array_equal(jumping.batch(step, 5), batches[step])
    epoch = np.concatenate(batches)[: straight.per_epoch, 0]
    assert len(set(epoch.tolist())) == straight.per_epoch  # every window once before any comes again
    assert not np.array_equal(corpus.Windows(stream, 16, seed=2).batch(0, 5), batches[0])
