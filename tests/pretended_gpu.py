"""A GPU that is none: tensors that lie on the CPU and say that they lie elsewhere, and copies that come as late as they may.

A GPU refuses an operation on tensors of two devices, and it works behind the program's back: a copy on a queue of its own is
there only once somebody has waited for it. Neither mistake shows where everything is a CPU. So `There` wraps a CPU tensor and
names another device, `run` refuses operations that mix the two and counts the bytes that the others move, and a `LateStream`
keeps the copies given to it until it is waited for.

Speed, memory and kernels are not pretended: what it shows is that the program asks for the right things in the right order.
A device is registered for the whole process, so this is a program: `python tests/pretended_gpu.py DIR [MISTAKE]` prints what it
found as JSON, for tests/test_pretended_gpu.py.
"""

import contextlib
import json
import random
import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    torch.inference_mode = torch.no_grad  # before k2 takes it: under inference_mode torch lets no wrapped tensor be viewed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import k2  # noqa: E402  (the path comes first)
from k2 import quantization, slots  # noqa: E402
from k2.checkpoint import Checkpoint  # noqa: E402
from k2.generation import Unconstrained  # noqa: E402
from k2.kv_cache import LatentCache  # noqa: E402
from k2.offload import load, store_of, weight_bytes  # noqa: E402

GPU, MOVES = "pretended", ("_to_copy", "copy_", "to")
ALONE = {"add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "pow", "where", "masked_fill_", "masked_fill", "bitwise_and_", "fill_"}  # a number may come from the CPU


class There(torch.Tensor):
    """A tensor on the pretended GPU; `here` holds its numbers."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=torch.device(GPU, 0))

    def __init__(self, here):
        self.here = here

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Within it, what is made on the GPU is made there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


moved = {"bytes": 0, "operations": 0}  # on the GPU, by all that is not a view
pinned, dice = set(), random.Random(0)  # addresses of pinned memory; which copies come early


def each(found, change):
    """Arguments or results of an operation, each of them changed."""
    if isinstance(found, (list, tuple)):
        return type(found)(each(x, change) for x in found)
    if isinstance(found, dict):
        return {name: each(x, change) for name, x in found.items()}
    return change(found)


def run(func, args, kwargs):
    """One operation: refused if it mixes devices, kept for later if it is a copy on a late stream, else done."""
    tensors, devices = [], []

    def as_here(x):
        if isinstance(x, torch.Tensor):
            tensors.append(x)
            return x.here if isinstance(x, There) else x
        if isinstance(x, torch.device):
            devices.append(x)
            return torch.device("cpu")
        return x

    here, named = each(args, as_here), each(kwargs, as_here)
    name, there = func.overloadpacket.__name__, [x for x in tensors if isinstance(x, There)]
    assert name in MOVES or not there or all(isinstance(x, There) or x.ndim == 0 and name in ALONE for x in tensors), f"{func} mixes devices"
    if LateStream.active and name == "copy_":
        assert here[1].data_ptr() in pinned and named | dict(zip(("non_blocking",), here[2:])) == {"non_blocking": True}, "a copy that the program would wait for"
        LateStream.active.later(lambda: func(*here, **named))
        return args[0]
    made = func(*here, **named)
    if devices[0].type != GPU if devices else not there or not isinstance(tensors[0], There):
        return made
    known = {id(x.here): x for x in there}  # what was written in place is the tensor that it was

    def as_there(x):
        if isinstance(x, torch.Tensor):
            if not func.is_view and not name.startswith("empty"):
                moved["bytes"] += x.numel() * x.element_size()
            return known[id(x)] if id(x) in known else There(x)
        return x

    if not func.is_view and not name.startswith("empty"):
        moved["operations"] += 1
        moved["bytes"] += sum(x.numel() * x.element_size() for x in tensors if x is not kwargs.get("out"))
    return each(made, as_there)


class LateStream:
    """torch.cuda.Stream, whose work is done when somebody waits for it and not before."""

    active = None

    def __init__(self, device=None):
        self.work, self.done, self.behind = [], 0, False

    def wait_stream(self, other):
        """Its next copy starts behind what the other was given before."""
        assert isinstance(other, Current), "a copy that waits for no products"
        self.behind = True

    def later(self, action):
        """Keep a copy; some come at once, as on a GPU that has nothing else to do."""
        assert self.behind, "a copy that does not wait for the products that may still read its target"
        self.work.append(action)
        self.behind = False
        if dice.random() < 0.3:
            self.catch_up(len(self.work))

    def record_event(self):
        """An event behind what was given so far."""
        return LateEvent(self, len(self.work))

    def catch_up(self, count: int):
        """Do what was given, up to there."""
        with torch.utils._python_dispatch._disable_current_modes():
            for action in self.work[self.done : count]:
                action()
        self.done = max(self.done, count)


class LateEvent:
    """torch.cuda.Event."""

    def __init__(self, stream: LateStream, count: int):
        self.stream, self.count = stream, count

    def synchronize(self):
        """Wait for it on the CPU."""
        self.stream.catch_up(self.count)


class Current:
    """torch.cuda.current_stream(device): its work is done at once, so that waiting for an event is doing what lies before it."""

    def __init__(self, device):
        assert torch.device(device).type == GPU

    def wait_event(self, event: LateEvent):
        """Let what comes now come behind the event."""
        event.synchronize()


@contextlib.contextmanager
def on_stream(stream: LateStream):
    """torch.cuda.stream(...)."""
    LateStream.active = stream
    try:
        yield
    finally:
        LateStream.active = None


def pretend():
    """Register the device, and put the late streams where torch's are."""
    backend_registration._setup_privateuseone_for_python_backend(GPU)
    slots.QUEUES, plain = (GPU,), torch.empty

    def empty(*size, pin_memory=False, **settings):
        made = plain(*size, **settings)
        if pin_memory:
            pinned.add(made.data_ptr())
        return made

    torch.empty = empty
    torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.stream = LateStream, Current, on_stream


# ---- what is tried ----


def answers(model) -> dict:
    """Logits of a prompt, of a batch and of decoded tokens, and ids of greedy, drawn and constrained text."""
    ids = torch.randint(model.config.vocab_size, (24,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        cache = LatentCache(model.config)
        logits = [model(ids.view(2, 12)), model(ids[:20], cache), *(model(ids[t : t + 1], cache) for t in range(20, 24))]
    return {
        "logits": [x.cpu().tolist() for x in logits],
        "text": list(k2.generate(model, ids.tolist(), 3)),
        "drawn": list(k2.generate(model, ids.tolist(), 3, temperature=1.0, top_p=0.9, seed=1)),
        "allowed": list(k2.generate(model, ids.tolist(), 3, constraint=EvenIds())),
    }


class EvenIds(Unconstrained):
    """A constraint of the simplest kind."""

    def check(self, count: int, width: int):
        """Any number of tokens will do."""
        self.mask_W = torch.arange(width) % 2 == 0

    def mask(self, left: int):
        """Every second id."""
        return self.mask_W


def budgets(directory, dtype) -> dict:
    """What `load` is told, by name: all there; some there, the others in RAM; a few there, a few in RAM, the others on disk."""
    checkpoint, size = Checkpoint(directory), slots.room_size(Checkpoint(directory))
    rest = weight_bytes(checkpoint, dtype, torch.device(GPU))[1]
    return {
        "resident": {"gpu_memory": 10**9, "ram": 10**9},
        "RAM": {"gpu_memory": rest + 6 * size, "ram": 10**9},
        "disk": {"gpu_memory": rest + 5 * size, "ram": 7 * size},
        "one above": {"gpu_memory": rest + size, "ram": 2 * size},
        "on the CPU": {"gpu_memory": 10**9, "ram": 9 * size, "experts_on": "cpu"},
    }


def tokens(directory, dtype, only=None) -> dict:
    """{budget: what the model says, and how many experts crossed}, for all budgets or some."""
    found = {}
    for name, settings in budgets(directory, dtype).items():
        if only and name not in only:
            continue
        with PretendedGPU():
            model = load(directory, torch.device(GPU), dtype, **settings)
            found[name] = answers(model)
        found[name]["lifted"] = store_of(model).statistics.lifted if store_of(model) else 0
    return found


def traffic() -> dict:
    """{format: bytes that one product of a row with a large matrix at rest moves there, a weight}."""
    weight, row, found = torch.randn(1024, 2048), torch.randn(1, 2048).bfloat16(), {}
    packed, scale = quantization.int4_quantize(weight)
    parts = {"fp8": (quantization.FP8Linear, quantization.fp8_quantize(weight)), "int4": (quantization.INT4Linear, (packed, scale, torch.tensor([1024, 2048])))}
    for name, (kind, tensors) in parts.items():
        with PretendedGPU():
            linear = kind(*(x.to(GPU) for x in tensors))
            x = row.to(GPU)
            moved.update(bytes=0, operations=0)
            linear(x)
        found[name] = {"bytes": moved["bytes"] / weight.numel(), "operations": moved["operations"]}
    return found


# ---- mistakes, to see that they are seen ----


def not_waited_for():
    """An expert computes before its bytes are there."""
    slots.Bus.arrived = lambda self, event: None


def room_taken_too_early():
    """A pinned room gets the next load while the last one has not left it."""
    plain = slots.Bus.carry

    def carry(self, source, target):
        self.left = [None] * len(self.left)
        return plain(self, source, target)

    slots.Bus.carry = carry


def target_taken_too_early():
    """An expert's slot gets the next one's bytes while products with it may still run."""
    plain = slots.Bus.carry

    def carry(self, source, target):
        self.stream.wait_stream = lambda other: None  # as if it were not asked
        return plain(self, source, target)

    slots.Bus.carry = carry


def two_devices():
    """A norm whose weight stayed on the CPU."""
    k2.norm.RMSNorm.forward = lambda self, x_TI: x_TI * self.weight.cpu()


MISTAKES = {mistake.__name__: mistake for mistake in (not_waited_for, room_taken_too_early, target_taken_too_early, two_devices)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend()
    directory, mistakes = sys.argv[1], sys.argv[2:]
    for mistake in mistakes:
        MISTAKES[mistake]()
    if mistakes:
        print(json.dumps({"stored": tokens(directory, None, ("resident", "RAM"))}))
    else:
        print(json.dumps({"float32": tokens(directory, torch.float32), "stored": tokens(directory, None), "traffic": traffic()}))
