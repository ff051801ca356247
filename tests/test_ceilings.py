"""The ceilings are measured, not assumed: what is timed really moves the bytes that are counted."""

import os
from pathlib import Path

import pytest
import torch

from k2 import ceilings
from k2.config import K2Error


def test_a_rate_is_bytes_over_the_fastest_call(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(clock))
    calls = []
    assert ceilings.best_rate(lambda: calls.append(1), 100, rounds=3) == 50.0 and len(calls) == 3


def test_every_block_of_a_burst_is_read_whole_and_once(tmp_path, monkeypatch):
    path = tmp_path / "blob.safetensors"
    path.write_bytes(bytes(3 * ceilings.BLOCK))
    plain, read = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *arguments: (read.append((arguments[2], plain(*arguments))), read[-1][1])[1])
    assert ceilings.disk_bandwidth(tmp_path, size=3 * ceilings.BLOCK, readers=(2,)) > 0
    assert sorted(read) == [(i * ceilings.BLOCK, ceilings.BLOCK) for i in range(3)]


def test_a_file_too_small_to_measure_with_is_refused(tmp_path):
    (tmp_path / "small.safetensors").write_bytes(b"few")
    with pytest.raises(K2Error, match="too small to measure the disk with"):
        ceilings.disk_bandwidth(tmp_path)


def test_memory_for_direct_reads_starts_at_a_page():
    rooms = [ceilings.aligned_bytes(8192) for _ in range(3)]
    assert all(len(room) == 8192 and torch.frombuffer(room, dtype=torch.uint8).data_ptr() % ceilings.PAGE == 0 for room in rooms)


def test_memory_and_bus_are_read_at_some_rate():
    size = 2**22
    assert ceilings.ram_bandwidth(size) > 0 and ceilings.bus_bandwidth(torch.device("cpu"), size) > 0 and ceilings.device_bandwidth(torch.device("cpu"), size) > 0


def test_how_long_a_disk_was_busy_is_the_systems_count(tmp_path, monkeypatch):
    (tmp_path / "stat").write_text("  7 0 56 3 0 0 0 0 0 1672460 9003151 0 0 0 0 0 0\n")
    asked = []
    monkeypatch.setattr(ceilings, "Path", lambda name: asked.append(name) or tmp_path / "stat")
    assert ceilings.disk_busy(tmp_path) == 1672.46
    device = os.stat(tmp_path).st_dev
    assert asked == [f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"]
    (tmp_path / "stat").unlink()
    assert ceilings.disk_busy(tmp_path) == 0, "no block device"


def test_a_file_system_without_direct_reads_is_read_plainly(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"abc")
    plain = os.open

    def refusing(path, flags, *rest):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(22, "Invalid argument")
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    descriptor = ceilings.open_direct(Path(tmp_path / "file"))
    assert os.read(descriptor, 3) == b"abc"
    os.close(descriptor)


def test_pages_that_are_forgotten_come_back_with_their_content(tmp_path):
    path = tmp_path / "map"
    path.write_bytes(bytes(range(256)) * 64)
    mapped = torch.from_file(str(path), shared=False, size=2**14, dtype=torch.uint8)
    before = mapped.clone()
    ceilings.forget_pages(mapped[100:])
    ceilings.forget_pages(mapped[:0])
    ceilings.forget_pages(torch.zeros(1, dtype=torch.uint8).expand(2**14))  # no memory of its own: nothing may happen
    assert torch.equal(mapped, before)


def test_settings_of_the_allocator_are_wishes(monkeypatch):
    def missing(name):
        raise OSError("no such library")

    monkeypatch.setattr(ceilings.ctypes, "CDLL", missing)
    ceilings.keep_freed_memory()
    ceilings.give_back_freed_memory()
