"""Rooms for experts: who is in which, who may be sent away, how large they are, and the way up to a device."""

import random

import pytest
import torch
from small import random_model, small_config

from k2 import K2Error
from k2.ceilings import PAGE
from k2.checkpoint import Checkpoint, save
from k2.reading import data_start, expert_record
from k2.slots import Bus, Slots, arena, kernel_bytes, room_size

CPU = torch.device("cpu")


def test_a_slot_in_use_is_never_given_away():
    slots = Slots(PAGE, 2 * PAGE, 9, CPU)
    assert slots.reserve((1, 0)) and slots.reserve((1, 1)) and not slots.reserve((1, 2))
    slots.held.discard((1, 1))
    assert slots.reserve((1, 2)) and list(slots.slot_of) == [(1, 0), (1, 2)]


def test_slots_never_share_bytes_and_start_at_pages():
    slots = Slots(PAGE, 5 * PAGE + 17, 9, CPU)
    starts = [room.data_ptr() for room in slots.rooms]
    assert all(start % PAGE == 0 for start in starts) and len(set(starts)) == 5


def test_the_book_is_that_of_a_plain_list_that_is_kept_in_order_of_use():
    slots, dice, order, held = Slots(PAGE, 4 * PAGE, 9, CPU), random.Random(0), [], set()
    for _ in range(2000):
        key = (1, dice.randrange(9))
        if held and dice.random() < 0.4:
            free = dice.choice(sorted(held))
            slots.held.discard(free)
            held.discard(free)
        elif slots.hold(key):
            order.remove(key)
            order.append(key)
            held.add(key)
        elif len(held) == 4:
            assert not slots.reserve(key)
        else:
            if len(order) == 4:
                order.remove(next(k for k in order if k not in held))
            assert slots.reserve(key)
            order.append(key)
            held.add(key)
        assert list(slots.slot_of) == order and slots.held == held
        assert sorted([*slots.slot_of.values(), *slots.free]) == [0, 1, 2, 3]


def test_a_slot_that_is_let_go_for_good_takes_its_tenant_with_it_and_the_last_stays():
    slots = Slots(PAGE, 2 * PAGE, 9, CPU)
    assert slots.reserve((1, 0)) and slots.reserve((1, 1))
    assert not slots.shrink(), "both are held"
    slots.held.clear()
    assert slots.shrink() and list(slots.slot_of) == [(1, 1)] and sum(room is not None for room in slots.rooms) == 1
    assert not slots.shrink(), "the last"
    assert slots.reserve((1, 2)) and slots.room((1, 2)).numel() == PAGE


def test_a_budget_below_one_expert_is_refused_with_both_numbers():
    with pytest.raises(K2Error, match="4,095 bytes are left for experts on cpu; expected at least 4,096, the size of one"):
        Slots(PAGE, PAGE - 1, 9, CPU)
    with pytest.raises(K2Error, match="expected at least 5,000"):
        Slots(PAGE, PAGE, 9, CPU, beside=5000 - PAGE)
    assert len(Slots(PAGE, 100 * PAGE, 9, CPU).rooms) == 9, "no more than there are experts"


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8", "int4"])
def test_every_expert_of_a_checkpoint_fits_into_a_room(tmp_path, format):
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32)), tmp_path / "model", format=format, shards=2)
    opened = Checkpoint(tmp_path / "model")
    starts = {file: data_start(opened.directory / file) for file in opened.headers}
    sizes = [expert_record(opened, starts, (layer, e)).size for layer in (1, 2) for e in range(11)]
    # Each of at most six large tensors may begin and end within a page.
    assert max(sizes) <= room_size(opened) < max(sizes) + 6 * 2 * PAGE
    assert (kernel_bytes(opened, None, CPU) > 0) == (format == "int4") and kernel_bytes(opened, torch.float32, CPU) == 0


def test_an_arena_on_a_device_is_as_large_as_the_device_allows(monkeypatch):
    plain, made = torch.empty, []

    def limited(size, dtype, device):
        made.append(size)
        if len(made) > 3:
            raise torch.OutOfMemoryError("no room")
        return plain(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", limited)
    assert len(arena(9, 4096, torch.device("cuda"))) == 3
    with pytest.raises(K2Error, match="no room on cuda for one expert"):
        arena(9, 4096, torch.device("cuda"))


def test_the_bus_carries_every_load_through_its_rooms_in_turn():
    bus = Bus(16, torch.device("cpu"), rooms=2)
    loads, targets = [torch.full((16,), i, dtype=torch.uint8) for i in range(5)], [torch.zeros(16, dtype=torch.uint8) for _ in range(5)]
    for load, target in zip(loads, targets):
        bus.arrived(bus.carry(load, target))
    assert all(torch.equal(load, target) for load, target in zip(loads, targets)) and bus.turn == 1
