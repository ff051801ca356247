"""What this machine can move: bytes a second from RAM, from the disk, over the bus to a GPU, and from the GPU's own memory.

Decode reads every active weight once a token, so tokens a second are at most bytes a second over bytes a token: these
four numbers are the roofline. They are measured, since data sheets promise what a shared machine does not keep, and
each is the best of a few short bursts, since a ceiling is what the hardware reached at least once.
"""

import ctypes
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .config import K2Error

BURST = 2**29  # bytes a measurement of memory reads: far larger than any cache
BLOCK = 2**24  # bytes a read from disk, as large as an expert
PAGE = 4096  # direct reads want file offsets, lengths and addresses in whole pages
LARGE = 2**24  # bytes from which on a freed block goes back to the system
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
MADV_DONTNEED = 4  # mman.h


def best_rate(move, size: int, rounds: int = 5) -> float:
    """Bytes a second of the fastest of a few calls of `move`, which moves `size` bytes."""
    fastest = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        move()
        fastest = min(fastest, time.perf_counter() - started)
    return size / fastest


def ram_bandwidth(size: int = BURST) -> float:
    """Bytes a second that all of torch's threads together read from RAM: a maximum over `size` bytes, or a product with a
    vector, whichever is faster on the machine; nothing is kept."""
    values_OI = torch.ones(size // 2**14, 2**12)
    return max(best_rate(values_OI.amax, size), best_rate(lambda: torch.mv(values_OI, values_OI[0]), size))


def disk_bandwidth(path, size: int = BURST, readers=(1, 2, 4)) -> float:
    """Bytes a second of cold reads of 16 MiB (of whole pages, where no file is so large) from the files at `path`, a file or
    a checkpoint's folder, past the page cache where the file system allows it; the best of a few numbers of threads.

    The blocks are drawn at random and none is read twice in one burst. Raises K2Error where there is too little to read.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    block = min(BLOCK, max(sizes.values(), default=0) // PAGE * PAGE)
    if not block:
        raise K2Error(f"{path}: too small to measure the disk with; expected a file of at least {PAGE:,} bytes, found none. Name a larger file.")
    blocks = [(file, begin) for file, length in sizes.items() for begin in range(0, length - block + 1, block)]
    descriptors = {file: open_direct(file) for file in sizes}
    try:
        return max(burst_rate(descriptors, blocks, block, size, threads) for threads in readers)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def burst_rate(descriptors: dict, blocks: list, block: int, size: int, threads: int) -> float:
    """Bytes a second of one burst of random blocks of one size, by so many threads."""
    chosen = random.sample(blocks, min(len(blocks), max(threads, size // block)))
    for descriptor in descriptors.values():
        drop_pages(descriptor)
    rooms = [aligned_bytes(block) for _ in range(threads)]
    shares = [chosen[i::threads] for i in range(threads)]

    def read_all(room, share):
        for file, begin in share:
            os.preadv(descriptors[file], [room], begin)

    with ThreadPoolExecutor(threads) as pool:
        return best_rate(lambda: list(pool.map(read_all, rooms, shares)), len(chosen) * block, rounds=1)


def aligned_bytes(size: int) -> memoryview:
    """Memory that starts at a page, already touched."""
    room = torch.zeros(size + PAGE, dtype=torch.uint8)
    return memoryview(room[-room.data_ptr() % PAGE :][:size].numpy())


def open_direct(path) -> int:
    """A file descriptor that reads past the page cache, or a plain one where there is no such thing (tmpfs, macOS)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return os.open(path, os.O_RDONLY)


def disk_busy(path) -> float:
    """For how many seconds, since the system started, the disk under a file had something to do, whoever asked; on Linux, and
    0 where no block device says so."""
    device = os.stat(path).st_dev
    try:
        milliseconds = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()[9]  # io_ticks
    except (OSError, IndexError, AttributeError):
        return 0.0
    return int(milliseconds) / 1e3


def drop_pages(descriptor: int):
    """Ask the system to forget what it cached of a file; a wish, and unknown outside Linux."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def bus_bandwidth(device: torch.device, size: int = BURST) -> float:
    """Bytes a second from pinned RAM to a GPU."""
    source = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    return best_rate(lambda: finished(device, target.copy_(source, non_blocking=True)), size)


def device_bandwidth(device: torch.device, size: int = 2 * BURST) -> float:
    """Bytes a second that a GPU reads from its own memory."""
    values = torch.ones(size // 4, device=device)
    return best_rate(lambda: finished(device, values.amax()), size, rounds=10)


def finished(device: torch.device, result):
    """The result, once the device's queue is empty: a GPU returns from a call before it has done the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result


def keep_freed_memory(large_too: bool = False):
    """Let glibc keep what is freed for the next allocation. By default it hands blocks of more than a few megabytes back
    to the system, and each new tensor of that size then costs a page fault per 4 KiB: a tenth of a training step.
    Elsewhere nothing happens.

    Blocks of more than LARGE bytes still come from the system and go back to it, in pages of 2 MiB (k2/__init__.py asks
    torch for them), so that they cost few faults: between the small things that live on, kept large blocks leave holes that the next ones do not fit into, and a
    prompt of 512 tokens took from 0.4 to 2.1 GB of them. `large_too` keeps these as well, for training, whose
    allocations are the same in every step.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**22)):
        mallopt(parameter, value)
    if large_too:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TOP_PAD, 2**28)


def give_back_freed_memory():
    """Hand what glibc kept so far back to the system: what loading needed for a moment is not what running needs."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def forget_pages(tensor):
    """Let the process give back the whole pages of a tensor that lies in a file's map, and of no other: there a later use
    brings them again, elsewhere their content would be lost. Linux."""
    if not tensor.is_contiguous():
        return
    size = tensor.numel() * tensor.element_size()
    begin = -(-tensor.data_ptr() // PAGE) * PAGE
    whole = (tensor.data_ptr() + size) // PAGE * PAGE - begin
    if whole > 0 and tensor.device.type == "cpu" and sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(begin), ctypes.c_size_t(whole), MADV_DONTNEED)


def peak_megabytes() -> float:
    """The process' largest resident memory. Linux and macOS; 0 elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux counts the process that started this one
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # macOS counts bytes
