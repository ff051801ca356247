"""LRU for experts that are asked for several at a time.

Complete `answer(requests, slots)`: (hits, evicted) for

    requests    a list of lists of experts. The experts of one list are asked for together, in that order; a list never
                has more experts than there are slots
    slots       how many experts fit into memory, which is empty at first

For each list: first, the experts of it that are in memory count as hits, and as used now, in the list's order. Then each
one that is not there is read, in the list's order, and counts as used now. If there is no free slot, the expert that was
least recently used is evicted. (It is never one of the list that is being served: think why, and you need no rule for it.)

    hits        how many experts were found in memory, over all lists
    evicted     the experts that had to go, in order
"""


def stub(requests, slots):
    """(int, list)"""
    raise NotImplementedError


def check(answer):
    found = answer([["a", "b"], ["a", "b"]], 2)
    assert isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], list), f"expected (hits, list of evicted), found {found!r}"
    assert found == (2, []), f"two experts asked for twice, with two slots: expected (2, []), found {found}"
    found = answer([["a"], ["b"], ["a"], ["c"], ["b"]], 2)
    assert found[1][:1] == ["b"], f"a, b, a, then c with two slots: b was used least recently, since a was used again; you evicted {found[1][:1]}"
    assert found == (1, ["b", "a"]), f"a, b, a, c, b with two slots: expected (1, ['b', 'a']), found {found}"
    found = answer([["a"], ["b"], ["c", "a"]], 2)
    assert found[1] == ["b"], f"memory holds a and b, and c and a are asked for together: a is in use and b must go; you evicted {found[1]}"
    assert found[0] == 1, f"memory holds a and b, and c and a are asked for together: a is a hit, whatever c displaces; found {found[0]} hits"
    found = answer([["a", "b", "c"], ["b"], ["d"], ["c"], ["e"]], 3)
    assert found == (2, ["a", "b"]), f"[a b c], b, d, c, e with three slots: expected (2, ['a', 'b']), found {found}"
    found = answer([["a"], ["b"], ["c", "a"], ["d"]], 2)
    assert found == (1, ["b", "a"]), f"a, b, [c a], d with two slots: of [c a] the hit, a, counts as used first, and c, which is read, after it; so d displaces a. You evicted {found[1]}: go through a list twice, first for its hits, then for what is missing"
    import random

    draw = random.Random(16)
    for _ in range(30):
        slots = draw.randint(3, 7)
        requests = [draw.sample(range(10), draw.randint(1, 3)) for _ in range(20)]
        for count in range(1, len(requests) + 1):
            found, expected = answer([list(r) for r in requests[:count]], slots), solution(requests[:count], slots)
            assert found == expected, difference(requests[:count], slots, found, expected)


def difference(requests, slots, found, expected) -> str:
    """What the last list of requests shows, all before it being served rightly."""
    hits, evicted = solution(requests[:-1], slots)
    asked = f"with {slots} slots all goes well until {requests[-1]} is asked for, behind ... {requests[-6:-1]}"
    return f"{asked}: expected {expected[0]} hits and at last {expected[1][len(evicted) :]} evicted, found {found[0]} (after {hits}) and {found[1][len(evicted) :]}"


HINT = """A dict keeps the order of insertion: to count an expert as used now, remove its key and put it in again. The first
key is then the one to evict. Go through each list twice: first for its hits, then for what is missing."""


def solution(requests, slots):
    memory, hits, evicted = {}, 0, []
    for asked in requests:
        there = [e for e in asked if e in memory]
        hits += len(there)
        for e in there:
            memory[e] = memory.pop(e)
        for e in asked:
            if e in there:
                continue
            if len(memory) == slots:
                oldest = next(iter(memory))  # the list's hits were moved behind all others, and a list fits into the slots
                del memory[oldest]
                evicted.append(oldest)
            memory[e] = True
    return hits, evicted


def first_in_first_out(requests, slots):
    memory, hits, evicted = {}, 0, []
    for asked in requests:
        there = [e for e in asked if e in memory]
        hits += len(there)
        for e in asked:
            if e not in memory:
                if len(memory) == slots:
                    oldest = next(key for key in memory if key not in asked)
                    del memory[oldest]
                    evicted.append(oldest)
                memory[e] = True
    return hits, evicted


def one_by_one(requests, slots):
    return solution([[e] for asked in requests for e in asked], slots)


def nothing_held(requests, slots):
    memory, hits, evicted = {}, 0, []
    for asked in requests:
        there = [e for e in asked if e in memory]
        hits += len(there)
        for e in asked:
            if e not in memory:
                if len(memory) == slots:
                    oldest = next(iter(memory))
                    del memory[oldest]
                    evicted.append(oldest)
                memory[e] = True
            else:
                memory[e] = memory.pop(e)
    return hits, evicted


def newest_goes(requests, slots):
    memory, hits, evicted = {}, 0, []
    for asked in requests:
        for e in asked:
            if e in memory:
                hits += 1
                memory[e] = memory.pop(e)
            else:
                if len(memory) == slots:
                    newest = next(key for key in reversed(memory) if key not in asked)
                    del memory[newest]
                    evicted.append(newest)
                memory[e] = True
    return hits, evicted


def in_one_pass(requests, slots):
    memory, hits, evicted = {}, 0, []
    for asked in requests:
        for e in asked:
            if e in memory:
                hits += 1
                memory[e] = memory.pop(e)
                continue
            if len(memory) == slots:
                oldest = next(key for key in memory if key not in asked)
                del memory[oldest]
                evicted.append(oldest)
            memory[e] = True
    return hits, evicted


def forgets_after_ten(requests, slots):
    return solution(requests[-10:], slots)


WRONG = {
    "in one pass": (in_one_pass, "go through a list twice"),
    "only the last ten lists": (forgets_after_ten, "all goes well until"),
    "first in, first out": (first_in_first_out, "used least recently"),
    "each expert for itself": (one_by_one, "a is in use and b must go"),
    "experts in use are evicted": (nothing_held, "a is in use and b must go"),
    "the most recently used goes": (newest_goes, "used least recently"),
}
