"""The expert store: the same bits at every budget, in every order of arrival, and through every fault."""

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from small import assert_same, random_ids, random_model, small_config
from torch import nn

import k2
from k2 import K2Error, checkpoint, offload, reading, slots
from k2.__main__ import main
from k2.checkpoint import Checkpoint, save
from k2.expert import Expert
from k2.offload import ExpertStore, parse_size, store_of, weight_bytes
from k2.slots import kernel_bytes, room_size

FORMATS = ("fp32", "bf16", "fp8", "int4")


@pytest.fixture(scope="module", params=FORMATS)
def directory(request, tmp_path_factory):
    """A checkpoint of 22 experts in two layers, in each stored format, in two shards."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32)), directory, format=request.param, shards=2)
    return directory


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """One FP8 checkpoint, for what does not depend on the format."""
    directory = tmp_path_factory.mktemp("one") / "model"
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32)), directory, format="fp8", shards=2)
    return directory


def with_slots(directory, count: int, dtype=None, readers: int = 2, upper: int | None = None):
    """(the model with `count` slots for its experts, its store); `upper` slots of a second pool stand in for a GPU's."""
    opened = Checkpoint(directory)
    size = room_size(opened) + kernel_bytes(opened, dtype, torch.device("cpu"))
    store = ExpertStore(opened, count * size, device_memory=upper and upper * size, readers=readers, dtype=dtype)
    return checkpoint.filled_model(opened, torch.device("cpu"), dtype, store.layer), store


def logits_and_text(model):
    """What must not depend on the budget: a prefill, a batch and a few steps of decode."""
    ids = random_ids(model.config, 24, seed=3)
    with torch.inference_mode():
        return model(ids), model(ids.view(2, 12)), list(k2.generate(model, ids.tolist(), 6))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_logits_are_the_same_bit_for_bit_at_every_budget(directory, dtype):
    expected = logits_and_text(checkpoint.load(directory, dtype=dtype))
    for count in (1, 5, 100):
        model, store = with_slots(directory, count, dtype)
        found = logits_and_text(model)
        assert_same(found[0], expected[0], f"{count} slots")
        assert_same(found[1], expected[1], f"{count} slots, a batch")
        assert found[2] == expected[2]
        assert len(store.ram.free) + len(store.ram.slot_of) == min(count, 22) and not store.ram.held


@pytest.mark.parametrize("count, upper", [(1, 1), (3, 4), (2, 22)])
def test_logits_are_the_same_bit_for_bit_with_a_second_tier(directory, count, upper):
    expected = logits_and_text(checkpoint.load(directory, dtype=None))
    model, store = with_slots(directory, count, upper=upper)
    found = logits_and_text(model)
    assert_same(found[0], expected[0], f"{count} slots, {upper} above")
    assert_same(found[1], expected[1], f"{count} slots, {upper} above, a batch")
    assert found[2] == expected[2] and store.statistics.lifted > 0
    assert not store.ram.held and not store.upper.held and len(store.upper.slot_of) <= upper


def test_an_expert_above_needs_no_slot_below(fp8):
    _, store = with_slots(fp8, 1, upper=5)
    for _ in range(3):
        for e in range(5):
            assert [found for found, _ in store.fetch(1, [e])] == [e]
    assert store.statistics.misses == 5 and store.statistics.hits == 10


def test_two_experts_rise_before_any_computes_and_one_behind_each_that_has(fp8):
    _, store = with_slots(fp8, 22, upper=9)
    list(store.fetch(1, list(range(8))))  # read, and lifted
    list(store.fetch(2, list(range(9))))  # in the slots above now, in place of the others
    lifted, before = [], store.statistics.lifted
    for _, _ in store.fetch(1, list(range(8))):
        lifted.append(store.statistics.lifted - before)
    assert lifted == [2, 3, 4, 5, 6, 7, 8, 8], "two, then one more for each that has computed"
    assert not store.crossing and not store.ram.held and not store.upper.held


def test_where_every_slot_above_is_in_use_an_expert_rises_when_its_turn_comes(fp8):
    _, store = with_slots(fp8, 22, upper=1)
    list(store.fetch(1, list(range(5))))
    assert [e for e, _ in store.fetch(1, [4, 0, 1, 2])] == [4, 0, 1, 2] and store.statistics.lifted == 5 + 3
    assert not store.crossing and not store.ram.held and not store.upper.held


def test_readers_and_delays_change_no_bit(fp8, monkeypatch):
    expected = logits_and_text(checkpoint.load(fp8, dtype=None))
    plain, dice = reading.Shards.read, random.Random(0)

    def delayed(self, span, slot):
        time.sleep(dice.random() * 0.002)
        return plain(self, span, slot)

    monkeypatch.setattr(reading.Shards, "read", delayed)
    for readers in (1, 7):
        found = logits_and_text(with_slots(fp8, 6, readers=readers)[0])
        assert_same(found[0], expected[0], f"{readers} readers")
        assert found[2] == expected[2]


@pytest.mark.parametrize("count, upper", [(7, 3), (2, 1), (22, 2), (9, 6)])
def test_hundreds_of_random_requests_get_the_right_experts_and_never_more_slots(fp8, count, upper):
    _, store = with_slots(fp8, count, upper=upper)
    resident, dice = checkpoint.load(fp8, dtype=None), random.Random(1)
    x_MD = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = {(i, e): resident.model.layers[i].mlp.experts[e](x_MD) for i in (1, 2) for e in range(11)}
    for _ in range(400):
        layer, ids = dice.choice((1, 2)), dice.sample(range(11), dice.choice((1, 1, 2, 3, 4, 8)))
        if dice.random() < 0.3:
            store.ahead(layer, dice.sample(range(11), 3), 2)
        found = {}
        for e, expert in store.fetch(layer, ids):
            for tier, most in ((store.ram, count), (store.upper, upper)):
                assert len(tier.slot_of) <= most and len(set(tier.slot_of.values())) == len(tier.slot_of)
            found[e] = expert(x_MD)
        assert sorted(found) == sorted(ids) and all(torch.equal(found[e], expected[layer, e]) for e in ids), f"layer {layer}, experts {ids}"
    statistics = store.statistics
    assert statistics.hits > 0 and statistics.misses > 0 and statistics.bytes_read >= statistics.misses * 3 * 64 * 32


def test_a_slots_next_tenant_is_never_taken_for_its_last():
    with tempfile.TemporaryDirectory() as folder:
        save(random_model(small_config()), Path(folder) / "model", format="fp32", shards=1)
        resident, x_MD = checkpoint.load(Path(folder) / "model"), torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
        for upper in (None, 1):
            _, store = with_slots(Path(folder) / "model", 2, upper=upper)
            for e in (0, 1, 2, 0, 3, 1):
                [(found, expert)] = store.fetch(1, [e])
                assert found == e and torch.equal(expert(x_MD), resident.model.layers[1].mlp.experts[e](x_MD)), f"expert {e} is another"


def test_a_loop_that_is_left_early_leaves_no_slot_held_and_no_stale_bytes(fp8):
    model, store = with_slots(fp8, 4)
    expected = logits_and_text(checkpoint.load(fp8, dtype=None))
    for stop in range(5):
        for count, _ in enumerate(store.fetch(1, list(range(11)))):
            if count == stop:
                break
        assert store.ram.held == set(store.reading)
    assert_same(logits_and_text(model)[0], expected[0], "after loops that were left")


def test_reads_start_before_the_first_expert_is_asked_for(fp8, monkeypatch):
    _, store = with_slots(fp8, 4)
    started, plain = threading.Event(), reading.Shards.read
    monkeypatch.setattr(reading.Shards, "read", lambda self, span, slot: (started.set(), plain(self, span, slot))[1])
    arriving = store.fetch(1, [3])
    assert started.wait(10), "no read was started"
    assert [e for e, _ in arriving] == [3]


def test_the_least_recently_used_expert_makes_room(fp8):
    _, store = with_slots(fp8, 3)

    def ask(*ids):
        before = store.statistics.misses
        for _ in store.fetch(1, list(ids)):
            pass
        return store.statistics.misses - before

    assert [ask(1), ask(2), ask(3)] == [1, 1, 1]
    assert ask(1) == 0 and ask(4) == 1  # 2 went, as 1 was used since
    assert ask(1) == ask(3) == ask(4) == 0 and ask(2) == 1


# ---- faults ----


def test_a_shard_that_is_cut_while_running_ends_with_its_name(fp8, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(fp8, directory)
    model, store = with_slots(directory, 1)
    for path in directory.glob("*.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(K2Error, match=r"model-\d-of-2.safetensors.*changed while running"):
        for e in range(11):
            list(store.fetch(1, [e]))
            list(store.fetch(2, [e]))
    assert not store.ram.held


def test_a_shard_that_is_written_to_while_running_never_gives_new_bytes(fp8, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(fp8, directory)
    _, store = with_slots(directory, 2)
    list(store.fetch(1, [0]))
    path = directory / "model-1-of-2.safetensors"
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x11\x11")
    os.utime(path, ns=(1, 1))  # whatever the clock's grain is, the time differs
    with pytest.raises(K2Error, match="changed while running"):
        for e in range(1, 11):
            list(store.fetch(1, [e]))


def test_a_shard_that_is_replaced_goes_on_from_the_old_one(fp8, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(fp8, directory)
    expected = logits_and_text(checkpoint.load(fp8, dtype=None))
    model, _ = with_slots(directory, 2)
    for path in directory.glob("*.safetensors"):
        (tmp_path / "new").write_bytes(b"other bytes")
        os.replace(tmp_path / "new", path)
    assert_same(logits_and_text(model)[0], expected[0], "after the files were replaced")


def test_a_read_error_names_the_shard_and_the_next_request_works(fp8, monkeypatch):
    model, store = with_slots(fp8, 3)
    expected = logits_and_text(checkpoint.load(fp8, dtype=None))
    plain, calls = os.preadv, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return plain(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(K2Error, match=r"safetensors: could not be read at \d+: Input/output error"):
        list(store.fetch(1, [0, 1, 2, 3]))
    assert store.ram.held == set(store.reading)
    assert_same(logits_and_text(model)[0], expected[0], "after the error")


def test_a_file_system_without_direct_reads_is_read_plainly(fp8, monkeypatch):
    expected, plain = logits_and_text(checkpoint.load(fp8, dtype=None)), os.open

    def refusing(path, flags, *rest):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(22, "Invalid argument")
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    assert_same(logits_and_text(with_slots(fp8, 2)[0])[0], expected[0], "plain reads")


def test_mapped_weights_that_change_while_running_end_it(fp8, tmp_path):
    for change in ("written", "replaced", "gone"):
        directory = tmp_path / change
        shutil.copytree(fp8, directory)
        model, path = k2.load(directory, dtype=None), directory / "model-2-of-2.safetensors"
        model(torch.arange(3))
        if change == "written":
            os.utime(path, ns=(1, 1))
        elif change == "replaced":
            (directory / "new").write_bytes(path.read_bytes())
            os.replace(directory / "new", path)
        else:
            path.unlink()
        with pytest.raises(K2Error, match="model-2-of-2.safetensors: expected the file as it was at the start, found it changed or replaced"):
            model(torch.arange(3))


@pytest.mark.parametrize("k", range(1, 41))
def test_a_device_without_memory_at_the_kth_product_gives_up_a_slot_and_no_token(fp8, monkeypatch, k):
    expected = list(k2.generate(checkpoint.load(fp8, dtype=None), [1, 2, 3], 5))
    model, store = with_slots(fp8, 6, upper=5)
    plain, calls = Expert.forward, []

    def failing(self, x_MD):
        if self in [module.expert for module in store.upper.experts.values()]:
            calls.append(1)
        if len(calls) == k:
            calls.append(1)
            raise torch.OutOfMemoryError("no room")
        return plain(self, x_MD)

    monkeypatch.setattr(Expert, "forward", failing)
    assert list(k2.generate(model, [1, 2, 3], 5)) == expected
    assert len(store.upper.free) + len(store.upper.slot_of) >= 4


def test_a_device_that_has_no_memory_at_all_is_a_clear_end(fp8, monkeypatch):
    model, store = with_slots(fp8, 6, upper=3)

    class Full(nn.Module):
        def forward(self, x_MD):
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ExpertStore, "expert_in", lambda self, room, key: Full())
    with pytest.raises(K2Error, match="no room left beside one expert"):
        model(torch.arange(5))
    assert len(store.upper.free) + len(store.upper.slot_of) >= 1


def bytes_of(store, request) -> dict:
    """What a request's experts hold."""
    return {e: expert_bits(expert) for e, expert in store.fetch(*request)}


@contextlib.contextmanager
def pressed_at(line: int):
    """Ctrl-C when the main thread begins the given line, counted from 0, of those that the store and its readers run."""
    passed = iter(range(10**9))

    def local(frame, event, argument):
        if event == "line" and next(passed) == line:
            signal.raise_signal(signal.SIGINT)
        return local

    def trace(frame, event, argument):
        return local if frame.f_code.co_filename in (offload.__file__, slots.__file__, reading.__file__) else None

    usual, before = signal.signal(signal.SIGINT, signal.default_int_handler), sys.gettrace()
    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGINT, usual)


@pytest.mark.parametrize(("upper", "step"), [(None, 30), (2, 30), pytest.param(None, 1, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_line_of_the_store_leaves_it_right(fp8, upper, step):
    expected = bytes_of(with_slots(fp8, 22)[1], (1, list(range(11))))
    requests, line, interrupted = [[0, 1, 2], [1, 3, 4], [5, 0, 1]], 0, 0
    while True:
        _, store = with_slots(fp8, 6, upper=upper)
        with pressed_at(line) as passed:
            try:
                for number, ids in enumerate(requests):
                    store.soon = (1, requests[(number + 1) % 3][::-1] + [7], 2)
                    store.ahead(1, ids[1:] + [9], 2)
                    bytes_of(store, (1, ids))
            except KeyboardInterrupt:
                interrupted += 1
        for ids in ([9, 7, 5], [0, 1, 2, 3, 4], [10]):
            found = bytes_of(store, (1, ids))
            assert set(found) == set(ids)
            assert all(torch.equal(a, b) for e in ids for a, b in zip(found[e], expected[e], strict=True)), f"Ctrl-C at line {line}"
        for tier in {store.ram, store.upper}:
            assert len(tier.free) + len(tier.slot_of) == len(tier.rooms), f"Ctrl-C at line {line}"
        assert store.ram.held == set(store.reading)
        store.shards.close()
        if next(passed) <= line:
            break
        line += step
    assert interrupted > 0.9 * line / step > 20, (interrupted, line)  # in each run the press came, and was not lost


def test_a_thread_that_cannot_be_started_is_an_error_and_no_stale_expert():
    with tempfile.TemporaryDirectory() as folder:
        save(random_model(small_config()), Path(folder) / "model", format="fp32", shards=1)
        expected = bytes_of(with_slots(Path(folder) / "model", 22)[1], (1, [0, 1, 2]))
        for when in range(1, 5):
            _, store = with_slots(Path(folder) / "model", 4)
            calls, submit = [], store.shards.readers.submit

            def refused(*arguments, calls=calls, submit=submit, when=when):
                calls.append(1)
                if len(calls) == when:
                    raise RuntimeError("can't start new thread")
                return submit(*arguments)

            store.shards.readers.submit = refused
            with contextlib.suppress(RuntimeError):
                bytes_of(store, (1, [0, 1, 2]))
            store.shards.readers.submit = submit
            found = bytes_of(store, (1, [0, 1, 2]))
            assert all(torch.equal(a, b) for e in expected for a, b in zip(found[e], expected[e], strict=True)), f"refused at {when}"


def test_a_request_that_was_never_taken_up_holds_no_slot_for_good(fp8):
    expected = logits_and_text(checkpoint.load(fp8, dtype=None))
    model, store = with_slots(fp8, 3)
    for e in range(8):
        store.fetch(1, [e, e + 1, e + 2])  # as when the shared expert fails in between
    assert_same(logits_and_text(model)[0], expected[0], "after requests that were dropped")


def test_a_reader_that_dies_is_an_error_and_not_a_wait(fp8, monkeypatch):
    _, store = with_slots(fp8, 3)

    def dying(self, span, room):
        raise SystemExit("the thread is gone")

    with monkeypatch.context() as patch:
        patch.setattr(reading.Shards, "read", dying)
        with pytest.raises(SystemExit):
            list(store.fetch(1, [0, 1]))
    assert store.ram.held == set(store.reading) and [e for e, _ in store.fetch(1, [0, 1])] == [0, 1]


def test_an_nan_in_an_expert_is_found_when_it_is_read(fp8, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(fp8, directory)
    opened = Checkpoint(fp8)
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    file = opened.weight_map[name]
    begin = reading.data_start(directory / file) + opened.headers[file][name]["data_offsets"][0]
    with open(directory / file, "r+b") as shard:
        shard.seek(begin + 5)
        shard.write(b"\xff")
    _, store = with_slots(directory, 3)
    with pytest.raises(K2Error, match="experts.4.up_proj.weight: expected finite numbers, found NaN"):
        list(store.fetch(1, [3, 4]))


# ---- reading ahead ----


def guessing(directory, count: int, **settings):
    """A model with `count` slots whose layers guess."""
    model, store = with_slots(directory, count, **settings)
    return offload.with_guesses(model), store


@pytest.mark.parametrize("count", [1, 2, 5, 9, 100])
def test_reading_ahead_changes_no_bit_at_any_budget(fp8, count):
    expected = logits_and_text(checkpoint.load(fp8, dtype=None))
    model, store = guessing(fp8, count)
    found = logits_and_text(model)
    assert_same(found[0], expected[0], f"{count} slots")
    assert found[2] == expected[2]
    assert len(store.ram.free) + len(store.ram.slot_of) == min(count, 22) and store.ram.held == set(store.reading)


def test_a_right_guess_is_read_once_and_a_wrong_one_that_was_read_stays_an_ordinary_tenant(fp8):
    _, store = with_slots(fp8, 8)
    store.ahead(1, [3, 4], 2)
    assert set(store.reading) == {(1, 3), (1, 4)}
    wait([part for parts in store.reading.values() for part in parts])
    assert [e for e, _ in store.fetch(1, [3])] == [3]
    assert (store.statistics.guessed, store.statistics.guessed_right) == (2, 1) and store.statistics.hits + store.statistics.misses == 1
    assert not store.reading
    read = store.statistics.bytes_read
    assert [e for e, _ in store.fetch(1, [4])] == [4] and store.statistics.bytes_read == read


@pytest.fixture
def gate(monkeypatch):
    """An event without which no read of an expert ends, and the pieces whose reads have begun."""
    opened, begun, read = threading.Event(), [], reading.Shards.read

    def held_up(shards, piece, room):
        begun.append(piece)
        assert opened.wait(20)
        return read(shards, piece, room)

    monkeypatch.setattr(reading.Shards, "read", held_up)
    yield opened, begun
    opened.set()


def expert_bits(expert):
    return [p.detach().view(torch.uint8).clone() for p in expert.parameters()]


def until(condition):
    """Wait for what another thread does."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_wrong_guess_whose_read_has_not_begun_is_called_off_and_its_slot_free(fp8, gate):
    opened, begun = gate
    _, store = with_slots(fp8, 8, readers=1)
    store.ahead(1, [3, 4], 2)
    until(lambda: begun)
    arriving = store.fetch(1, [3])
    opened.set()
    assert [e for e, _ in arriving] == [3]
    while store.reading:
        store.settle(2, set())
    assert store.statistics.bytes_read == store.record((1, 3)).size and (1, 4) not in store.ram.slot_of and not store.ram.held
    assert not {piece.begin for piece in begun} & {piece.begin for span in store.record((1, 4)).spans for piece in reading.pieces(span)}
    assert (store.statistics.guessed, store.statistics.guessed_right) == (2, 1)


@pytest.mark.parametrize("begun_already", [False, True])
def test_what_was_called_off_and_is_asked_for_all_the_same_is_read_again_whole(fp8, gate, monkeypatch, begun_already):
    opened, begun = gate
    monkeypatch.setattr(reading, "PIECE", 4096)  # an expert has several pieces
    _, store = with_slots(fp8, 8, readers=1)
    store.ahead(1, [4, 3] if begun_already else [3, 4], 2)
    until(lambda: begun)
    store.ahead(1, [3], 1)  # a later guess, which does not want 4
    assert store.reading.keys() == {(1, 3), (1, 4)} if begun_already else store.reading.keys() == {(1, 3)}
    threading.Timer(0.05, opened.set).start()
    found = {e: expert_bits(expert) for e, expert in store.fetch(1, [3, 4])}
    _, other = with_slots(fp8, 8)
    for e, expert in other.fetch(1, [3, 4]):
        assert all(torch.equal(a, b) for a, b in zip(found[e], expert_bits(expert), strict=True))
    assert not store.reading and not store.ram.held


def test_right_guesses_come_in_the_order_in_which_they_are_read(fp8):
    _, store = with_slots(fp8, 8, readers=1)
    store.ahead(1, [7, 2, 5], 3)
    with_nothing_landed = store.arriving([], deque(), deque(), deque(store.reading))
    assert [e for e, _ in with_nothing_landed] == [7, 2, 5]
    store.ahead(2, [7, 2, 5], 3)
    assert [e for e, _ in store.fetch(2, [2, 5, 6, 7])][-1] == 6


def test_the_next_layers_guess_is_read_once_all_of_this_layer_is_under_way(fp8):
    _, store = with_slots(fp8, 12)
    store.soon = (2, [8, 9], 2)
    asked, begin = [], store.begin
    store.begin = lambda key: asked.append(key) or begin(key)
    assert {e for e, _ in store.fetch(1, [3, 4])} == {3, 4}
    assert asked == [(1, 3), (1, 4), (2, 8), (2, 9)]
    _, small = with_slots(fp8, 1)
    small.soon = (2, [8, 9], 2)
    assert {e for e, _ in small.fetch(1, [3, 4])} == {3, 4} and not small.statistics.guessed


def test_an_error_in_what_was_read_ahead_waits_for_someone_to_ask(fp8, monkeypatch):
    _, store = with_slots(fp8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        store.ahead(1, [3], 1)
        wait(store.reading[1, 3])
    assert [e for e, _ in store.fetch(1, [5])] == [5]
    assert [e for e, _ in store.fetch(1, [3])] == [3]


def test_the_routers_before_attention_are_what_guesses(fp8):
    model, store = guessing(fp8, 100)
    asked, soon = [], []
    store.ahead = lambda layer, ids, most: asked.append((layer, ids, most))
    store.call_off_all_but = lambda wanted, layer: soon.append(store.soon)  # settle's; behind the hook of its layer
    model(torch.arange(6))
    model(torch.arange(1))
    A, S = offload.AHEAD, offload.SOON
    assert [(layer, most) for layer, _, most in asked] == [(1, 6 * S), (1, 6 * A), (2, 6 * S), (2, 6 * A), (1, S), (1, A), (2, S), (2, A)]
    first = model.model.layers[1]
    before = first.mlp.gate(first.post_attention_layernorm(model.model.embed_tokens(torch.arange(1))))[0]
    assert asked[4][1] == before[0].tolist() != asked[5][1], "before the dense layer, and after it"
    assert all(len(set(ids)) == len(ids) for _, ids, _ in asked) and len(asked[-1][1]) == 4
    assert [told[0] if told else None for told in soon] == [2, None, 2, None]


def test_of_several_dense_layers_the_last_one_guesses(tmp_path):
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32, first_k_dense_replace=2, num_hidden_layers=3)), tmp_path / "model", format="fp8", shards=2)
    model, store = guessing(tmp_path / "model", 100)
    asked, entered = [], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: entered.append(len(asked)))
    store.ahead = lambda layer, ids, most: asked.append((layer, most))
    model(torch.arange(1))
    assert asked == [(2, offload.SOON), (2, offload.AHEAD)] and entered == [0, 1, 2], "behind the first dense layer nothing was asked yet"


# ---- experts that stay below ----


def test_experts_that_compute_where_they_lie_give_the_same_bits_on_a_cpu(fp8):
    expected = logits_and_text(checkpoint.load(fp8, dtype=None))
    model = k2.load(fp8, dtype=None, ram=400_000, experts_on="cpu")
    assert isinstance(model.model.layers[1].mlp.experts, offload.VisitedExperts)
    found = logits_and_text(model)
    assert_same(found[0], expected[0], "visited")
    assert found[2] == expected[2]


# ---- budgets ----


def test_too_little_memory_is_refused_before_anything_is_read(fp8):
    with pytest.raises(K2Error, match="every token needs take .* bytes; expected at most the 1,000 given.*--ram"):
        k2.load(fp8, dtype=None, ram=1000)
    _, rest = weight_bytes(Checkpoint(fp8), None)
    with pytest.raises(K2Error, match="expected at least .*, the size of one"):
        k2.load(fp8, dtype=None, ram=rest + 100)


def test_experts_are_resident_where_all_fit(fp8):
    routed, rest = weight_bytes(Checkpoint(fp8), None)
    assert store_of(k2.load(fp8, dtype=None, ram=routed + rest)) is None
    assert store_of(k2.load(fp8, dtype=None, ram=routed + rest - 1)) is not None
    assert store_of(k2.load(fp8, dtype=None)) is None


def test_weights_are_counted_as_they_will_lie_in_memory(directory):
    opened = Checkpoint(directory)
    for dtype in (None, torch.float32):
        model = checkpoint.load(directory, dtype=dtype)
        sizes = {name: t.numel() * t.element_size() for name, t in model.state_dict().items() if "embed_tokens" not in name}
        routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
        assert weight_bytes(opened, dtype)[0] >= routed * 0.99
        assert abs(weight_bytes(opened, dtype)[1] / (sum(sizes.values()) - routed) - 1) < 0.3  # kv_b_proj is widened


@pytest.mark.parametrize("text, size", [("3GB", 3_000_000_000), ("512 mb", 512_000_000), ("1.5e3", 1500), ("7", 7), ("2TB", 2_000_000_000_000)])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "3XB", "1..2GB", "1e999", "3 GB free"])
def test_other_sizes_are_refused(text):
    with pytest.raises(K2Error, match="3GB"):
        parse_size(text)


def test_the_command_line_gives_the_same_text_and_says_what_moved(capfd):
    arguments = ["generate", "import ", "--max-new-tokens", "8", "--device", "cpu", "--dtype", "float32"]
    assert main(arguments) == 0
    expected = capfd.readouterr().out
    assert main([*arguments, "--ram", "12MB"]) == 0
    found = capfd.readouterr()
    assert found.out == expected
    assert re.search(r"\d+ slots of 0.0\d MB in RAM for 144 experts", found.err) and "GB read from disk" in found.err
