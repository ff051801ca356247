"""Read a tensor with struct and json.

Complete `answer(raw, name)`: a nested list of Python floats, as deep as the tensor has axes, for

    raw      the bytes of a safetensors file: 8 bytes, the header's length as an unsigned little-endian integer; the
             header, JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, in which one entry may be no tensor:
             "__metadata__", a few strings about the file; then the data, from whose start the offsets count
    name     a tensor of dtype F32 (four bytes a number) or BF16 (two bytes, the upper half of a float32), with one or
             two axes; little-endian, the last axis runs fastest

Raise ValueError if the data's end is not the file's end: the file is then damaged.
"""

import json
import struct


def stub(raw, name):
    """[...] or [[...], ...]"""
    raise NotImplementedError


def made(tensors) -> bytes:
    """A file of {name: (dtype, shape, numbers)}, its header padded to another length than a beginner's guess."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, numbers) in tensors.items():
        body = struct.pack(f"<{len(numbers)}f", *numbers)
        body = body if dtype == "F32" else b"".join(body[i + 2 : i + 4] for i in range(0, len(body), 4))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(body)]}
        data += body
    text = json.dumps(header).encode() + b" " * 37
    return struct.pack("<Q", len(text)) + text + data


def check(answer):
    numbers = [1.5, -2.0, 0.25, 1024.0, -0.0078125, 3.0]
    raw = made({"first": ("F32", [2, 3], numbers), "second": ("BF16", [6], numbers), "third": ("F32", [3, 2], [2 * n for n in numbers]), "fourth": ("BF16", [2, 3], numbers)})
    try:
        first = answer(raw, "first")
    except (json.JSONDecodeError, struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise AssertionError(f"the header could not be read ({type(error).__name__}): its length is the first 8 bytes, the lowest first, and it begins behind them") from None
    except KeyError as error:
        if error.args[0] not in ("data_offsets", "dtype", "shape"):
            raise
        raise AssertionError(f"{type(error).__name__} {error} on the way through the header: its entry __metadata__ is no tensor and has no data_offsets; leave it out") from None
    except ValueError as error:
        raise AssertionError(f"a whole file was refused: {error}. The data begins at 8 + the header's length, and its end is the largest offset") from None
    assert isinstance(first, list), f"expected a list, found {type(first).__name__}"
    flat = [x for row in first for x in (row if isinstance(row, list) else [row])]
    assert sorted(flat) == sorted(numbers), f"the numbers are {flat[:3]}...; expected {numbers[:3]}...: offsets count from the end of the header, which is 8 + its length"
    assert first == [numbers[:3], numbers[3:]], f"the numbers are right and their order is not: found {first}; expected two rows of three"
    second = answer(raw, "second")
    assert second == numbers, f"a BF16 tensor gave {second[:3]}...; expected {numbers[:3]}...: its two bytes are the upper, that is the last, two of a little-endian float32"
    assert answer(raw, "third") == [[3.0, -4.0], [0.5, 2048.0], [-0.015625, 6.0]], f"the third tensor is wrong: found {answer(raw, 'third')}: is its own begin used?"
    assert answer(raw, "fourth") == first, "a BF16 tensor of two axes is wrong"
    for damaged, what in ((raw[:-1], "cut by one byte"), (raw + b"x", "longer by one byte")):
        try:
            answer(damaged, "first")
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(f"a file {what} raised {type(error).__name__}; expected ValueError") from None
        raise AssertionError(f"a file {what} was read without a word; expected ValueError, even where the tensor asked for is whole")


HINT = """length = struct.unpack("<Q", raw[:8])[0]; the data starts at 8 + length. For BF16 put b"\\0\\0" in front of each pair
of bytes and unpack "<f". The file's end must be the start plus the largest second offset of all tensors (__metadata__
is none)."""


def solution(raw, name):
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    start = 8 + length
    if start + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__") != len(raw):
        raise ValueError("the file is not as long as its header says")
    begin, end = header[name]["data_offsets"]
    body = raw[start + begin : start + end]
    if header[name]["dtype"] == "BF16":
        body = b"".join(b"\0\0" + body[i : i + 2] for i in range(0, len(body), 2))
    numbers = [x for (x,) in struct.iter_unpack("<f", body)]
    if len(header[name]["shape"]) == 1:
        return numbers
    width = header[name]["shape"][1]
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def read(raw, name, base=None, lower=False, columns_first=False, order="<", judge=True):
    length = struct.unpack(f"{order}Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    end_of_data = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    if judge and 8 + length + end_of_data != len(raw):
        raise ValueError("cut")
    start = 8 + length if base is None else base
    begin, end = header[name]["data_offsets"]
    body = raw[start + begin : start + end]
    if header[name]["dtype"] == "BF16":
        body = b"".join(body[i : i + 2] + b"\0\0" if lower else b"\0\0" + body[i : i + 2] for i in range(0, len(body), 2))
    numbers = [x for (x,) in struct.iter_unpack("<f", body)]
    shape = header[name]["shape"]
    if len(shape) == 1:
        return numbers
    return [numbers[i :: shape[0]] for i in range(shape[0])] if columns_first else [numbers[i : i + shape[1]] for i in range(0, len(numbers), shape[1])]


def from_the_files_start(raw, name):
    return read(raw, name, base=0)


def highest_byte_first(raw, name):
    return read(raw, name, order=">")


def lower_half(raw, name):
    return read(raw, name, lower=True)


def columns_first(raw, name):
    return read(raw, name, columns_first=True)


def credulous(raw, name):
    return read(raw, name, judge=False)


def metadata_is_a_tensor(raw, name):
    length = struct.unpack("<Q", raw[:8])[0]
    ends = [entry["data_offsets"][1] for entry in json.loads(raw[8 : 8 + length]).values()]
    if 8 + length + max(ends) != len(raw):
        raise ValueError("cut")
    return read(raw, name)


WRONG = {
    "__metadata__ taken for a tensor": (metadata_is_a_tensor, "is no tensor"),
    "offsets from the start of the file": (from_the_files_start, "from the end of the header"),
    "the length read with its highest byte first": (highest_byte_first, "the lowest first"),
    "BF16 as the lower half": (lower_half, "upper"),
    "columns before rows": (columns_first, "two rows of three"),
    "a cut file is read": (credulous, "without a word"),
}
