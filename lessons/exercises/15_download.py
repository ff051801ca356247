"""From a header to the ranges to ask for.

Complete `answer(header, length, names)`: a list of HTTP ranges that together bring exactly the bytes of the named tensors
of a safetensors file, in the file's order, for

    header    {tensor: {"dtype", "shape", "data_offsets": [begin, end]}}; offsets count from the end of the header, and the
              header lies behind the 8 bytes that hold its length
    length    the header's length in bytes
    names     the tensors wanted, in any order

A range is a text such as "bytes=100-199": the first and the last byte of the file that are wanted, both included. Tensors
that are neighbours in the file are one range, since each request costs a journey. No byte of another tensor may come. A
tensor of no bytes needs no range.
"""


def stub(header, length, names):
    """["bytes=...", ...]"""
    raise NotImplementedError


def entry(begin, end):
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


HEADER = {"z": entry(0, 10), "b": entry(10, 30), "empty": entry(30, 30), "a": entry(30, 35), "c": entry(35, 70), "d": entry(70, 71)}


def check(answer):
    found = answer(dict(HEADER), 100, ["b"])
    assert isinstance(found, list) and all(isinstance(text, str) for text in found), f"expected a list of texts, found {found!r}"
    assert found != ["bytes=10-29"] and found != ["bytes=10-30"], f"tensor b lies at 10 of the *data*, which begins behind 8 bytes and the header of 100; found {found}"
    assert found != ["bytes=110-129"] and found != ["bytes=110-130"], f"in front of the header there are 8 bytes more; found {found}"
    assert found != ["bytes=118-138"], f"the last byte is included in a range, so 20 bytes from 118 on end at 137; found {found}"
    assert found == ["bytes=118-137"], f"tensor b is bytes 118 to 137 of the file; found {found}"
    found = answer(dict(HEADER), 100, ["z", "b"])
    assert found == ["bytes=108-137"], f"z and b are neighbours and one request: expected ['bytes=108-137'], found {found}"
    found = answer(dict(HEADER), 100, ["d", "z"])
    assert found != ["bytes=108-178"], "between z and d lie tensors that nobody asked for: their bytes must not come"
    assert found == ["bytes=108-117", "bytes=178-178"], f"z and then d, in the file's order: expected ['bytes=108-117', 'bytes=178-178'], found {found}"
    found = answer(dict(HEADER), 100, ["c", "a", "b"])
    assert found == ["bytes=118-177"], f"b, a and c lie in this order in the file without a gap, whatever their names: expected ['bytes=118-177'], found {found}"
    found = answer(dict(HEADER), 100, ["empty"])
    assert found == [], f"a tensor of no bytes needs no range: found {found}"
    found = answer(dict(HEADER), 100, ["b", "empty", "a"])
    assert found == ["bytes=118-142"], f"an empty tensor between two neighbours parts nothing: expected ['bytes=118-142'], found {found}"


HINT = """Sort the wanted offsets by begin, leave out where begin == end, and keep a list of [begin, end) pairs: if the last
pair ends where this one begins, lengthen it. Add 8 + length, and take one off the end, when you write the texts."""


def solution(header, length, names):
    runs = []
    for begin, end in sorted(header[name]["data_offsets"] for name in names):
        if begin == end:
            continue
        if runs and runs[-1][1] == begin:
            runs[-1][1] = end
        else:
            runs.append([begin, end])
    start = 8 + length
    return [f"bytes={start + begin}-{start + end - 1}" for begin, end in runs]


def from_the_files_start(header, length, names):
    return solution(header, -8, names)


def eight_forgotten(header, length, names):
    return solution(header, length - 8, names)


def end_excluded(header, length, names):
    runs = [text.removeprefix("bytes=").split("-") for text in solution(header, length, names)]
    return [f"bytes={begin}-{int(end) + 1}" for begin, end in runs]


def one_each(header, length, names):
    return [text for name in sorted(names, key=lambda name: header[name]["data_offsets"]) for text in solution(header, length, [name])]


def from_first_to_last(header, length, names):
    begin, end = min(header[name]["data_offsets"][0] for name in names), max(header[name]["data_offsets"][1] for name in names)
    return [f"bytes={108 - 100 + length + begin}-{8 + length + end - 1}"] if end > begin else []


def by_name(header, length, names):
    runs = []
    for name in sorted(names):
        begin, end = header[name]["data_offsets"]
        if runs and runs[-1][1] == begin:
            runs[-1][1] = end
        elif runs and runs[-1][0] == end:
            runs[-1][0] = begin
        elif end > begin:
            runs.append([begin, end])
    return [f"bytes={8 + length + begin}-{8 + length + end - 1}" for begin, end in runs]


WRONG = {
    "offsets from the start of the file": (from_the_files_start, "of the *data*"),
    "the 8 bytes forgotten": (eight_forgotten, "8 bytes more"),
    "the end excluded": (end_excluded, "last byte is included"),
    "a request for each tensor": (one_each, "neighbours and one request"),
    "one range from first to last": (from_first_to_last, "nobody asked for"),
    "in the names' order": (by_name, "in the file's order"),
}
