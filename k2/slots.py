"""Rooms for experts, in RAM and on a device, and the way from one to the other.

    slot      one expert's bytes, exactly as stored, preallocated, in RAM all in one arena; its tensors are views into it
    hold      while an expert is in use, or its bytes are on the way, nobody else gets its slot
    evict     the expert that was not used for longest and is not held makes room

Nothing here reads a file or knows of layers: offload.py, the expert store, decides what comes and goes.
"""

import math
from collections import OrderedDict, deque

import torch

from .ceilings import PAGE
from .checkpoint import DTYPE_NAMES, Checkpoint, expected_tensors
from .config import K2Error
from .expert import Expert
from .reading import Key

QUEUES = ("cuda",)  # kinds of devices that copy behind the program's back
SMALL = ("_scale_inv", "_shape")  # an expert's tensors that lie far from its weights in the file, and are kept once read


class Slots:
    """One tier: equal rooms in one arena, and who is in which, least recently used first. An expert takes `size` bytes of
    the arena and, while it computes, `beside` more."""

    def __init__(self, size: int, budget: int, most: int, device: torch.device, beside: int = 0):
        count = min(budget // (size + beside), most)
        if count < 1:
            raise K2Error(f"memory: {budget:,} bytes are left for experts on {device}; expected at least {size + beside:,}, the size of one. Give more, or use a smaller model.")
        self.rooms = arena(count, size, device)
        self.free = deque(range(len(self.rooms)))
        self.experts: dict[int, Expert] = {}  # modules around a slot's bytes, by slot
        self.slot_of: OrderedDict[Key, int] = OrderedDict()
        self.held: set[Key] = set()

    def hold(self, key: Key) -> bool:
        """True if the expert is in a slot, which it then keeps until it is released."""
        if key not in self.slot_of:
            return False
        self.slot_of.move_to_end(key)
        self.held.add(key)
        return True

    def reserve(self, key: Key) -> bool:
        """Give a slot to an expert, held, its bytes not yet there; False while every slot is held."""
        if not self.evict():
            return False
        self.slot_of[key] = self.free.popleft()
        self.held.add(key)
        return True

    def evict(self) -> bool:
        """See that a slot is free, by the least recently used if need be; False while every slot is held."""
        if not self.free:
            oldest = next((k for k in self.slot_of if k not in self.held), None)
            if oldest is None:
                return False
            self.forget(oldest)
        return True

    def forget(self, key: Key):
        """Empty the expert's slot; a module that was around it must not serve the next tenant."""
        slot = self.slot_of.pop(key)
        self.experts.pop(slot, None)
        self.free.append(slot)
        self.held.discard(key)

    def room(self, key: Key) -> torch.Tensor:
        """The expert's slot, uint8."""
        return self.rooms[self.slot_of[key]]

    def shrink(self) -> bool:
        """Let go of one slot for good; False where it would be the last, or every slot is held."""
        if len(self.free) + len(self.slot_of) < 2 or not self.evict():
            return False
        self.rooms[self.free.pop()] = None
        return True


def arena(count: int, size: int, device: torch.device) -> list:
    """`count` rooms of `size` bytes that start at pages; on a GPU as many as it can give, each an allocation of its own,
    so that one can be given back when memory gets short."""
    if device.type == "cpu":
        whole = torch.empty(count * size + PAGE, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGE
        return list(whole[start : start + count * size].view(count, size))
    rooms = []
    try:
        while len(rooms) < count:
            rooms.append(torch.empty(size, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        if not rooms:
            raise K2Error(f"memory: no room on {device} for one expert of {size:,} bytes. Give less to --gpu-memory for a smaller share, or use a smaller model.") from None
    return rooms


class Bus:
    """The way from RAM to a device, through a few pinned rooms in turn and on a stream of its own, so that experts cross
    while others compute. On a CPU, which stands in for a device in the tests, it is two copies."""

    def __init__(self, size: int, device: torch.device, rooms: int = 3):
        queues = device.type in QUEUES
        self.pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=queues) for _ in range(rooms)]
        self.left: list = [None] * rooms  # when each room's last load had left it
        self.device, self.stream, self.turn = device, torch.cuda.Stream(device) if queues else None, 0

    def carry(self, source, target):
        """Start a copy; what `arrived` waits for. The target may still be read by what was started before."""
        turn, self.turn = self.turn, (self.turn + 1) % len(self.pinned)
        if self.left[turn]:
            self.left[turn].synchronize()
        self.pinned[turn].copy_(source)
        if not self.stream:
            target.copy_(self.pinned[turn])
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(self.pinned[turn], non_blocking=True)
            self.left[turn] = self.stream.record_event()
        return self.left[turn]

    def arrived(self, event):
        """Let what is started from now on wait for a copy."""
        if event:
            torch.cuda.current_stream(self.device).wait_event(event)


# ---- how large a slot is ----


def large_tensors(checkpoint: Checkpoint) -> dict[str, int]:
    """The tensors of one expert that lie in its slot, and their bytes; all experts are alike."""
    config = checkpoint.config
    prefix = f"{config.tensor_prefix}model.layers.{config.num_hidden_layers - 1}.mlp.experts.0."
    specs = {name: spec for name, spec in expected_tensors(config).items() if name.startswith(prefix) and not name.endswith(SMALL)}
    return {name: math.prod(spec.shape) * DTYPE_NAMES[spec.dtypes[0]].itemsize for name, spec in specs.items()}


def room_size(checkpoint: Checkpoint) -> int:
    """Bytes of a slot, enough for every expert: its large tensors, and the pages that each may begin and end in."""
    return sum(-(-size // PAGE) * PAGE + PAGE for size in large_tensors(checkpoint).values())


def kernel_bytes(checkpoint: Checkpoint, dtype, device: torch.device) -> int:
    """What torch's INT4 kernel wants beside a slot: scale and zero of each group, where the file has the scale."""
    if device.type != "cpu" or dtype is not None:
        return 0
    return sum(2 * size for name, size in large_tensors(checkpoint).items() if name.endswith("weight_scale"))
