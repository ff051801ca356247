"""The limit of a machine without a GPU.

Complete `answer(model, machine)`: the most tokens a second, or None if it does not run. All sizes are bytes, all
bandwidths bytes a second.

    model["rest"]        read for every token; must be in memory
    model["routed"]      the chosen experts of one token
    model["expert"]      one expert; memory must hold rest and one expert at least
    model["experts"]     all experts together
    machine["ram"], machine["ram_bandwidth"], machine["disk_bandwidth"]

Memory that rest does not take holds experts. Experts are asked evenly: if a tenth of them is in memory, a tenth of the
routed bytes is found there. The others come from the disk. Every byte that a token meets is read from memory once,
whether it came from the disk or not. Disk and memory read at the same time.
"""


def stub(model, machine):
    """Tokens a second, or None."""
    raise NotImplementedError


MODEL = {"rest": 12e9, "routed": 20e9, "expert": 50e6, "experts": 1000e9}


def machine_of(ram, ram_bandwidth=100e9, disk_bandwidth=5e9):
    return {"ram": ram, "ram_bandwidth": ram_bandwidth, "disk_bandwidth": disk_bandwidth}


def check(answer):
    found = answer(MODEL, machine_of(12e9))
    assert found is None, f"memory of 12 GB holds rest and no expert: expected None, found {found}"
    found = answer(MODEL, machine_of(12.05e9))
    assert found is not None, "memory for rest and exactly one expert is enough: expected a speed, found None"
    found = answer(MODEL, machine_of(2000e9))
    assert abs(found - 3.125) < 1e-6, f"all in memory: 32 GB a token at 100 GB/s are 3.125 tokens/s, found {found:.4g}: a token reads rest and routed, and never all experts"
    found = answer(MODEL, machine_of(512e9))
    assert abs(found - 0.5) > 1e-2 or abs(found - 0.5) < 1e-6, f"512 GB, of which 12 are taken by rest: half of the experts fit, so 10 GB come from the disk at 5 GB/s: 0.5 tokens/s; found {found:.4g}"
    assert abs(found - 1 / 2.32) > 1e-6, "disk and memory read at the same time: take the slower one's time, not the sum"
    assert abs(found - 3.125) > 1e-6, "with half of the experts on the disk it cannot be as fast as with all in memory: which experts are chosen changes with every token"
    assert abs(found - 0.5) < 1e-6, f"512 GB, of which 12 are taken by rest: half of the experts fit, so 10 GB come from the disk at 5 GB/s: 0.5 tokens/s; found {found:.4g}"
    found = answer(MODEL, machine_of(512e9, ram_bandwidth=4e9))
    assert abs(found - 4 / 32) < 1e-6, f"slow memory of 4 GB/s in front of the same disk: all 32 GB of a token pass through it, 0.125 tokens/s; found {found:.4g}"


HINT = """share = min(1, (ram - rest) / experts); the two times are (rest + routed) / ram_bandwidth and
(1 - share) * routed / disk_bandwidth; the larger one counts."""


def solution(model, machine):
    if machine["ram"] < model["rest"] + model["expert"]:
        return None
    share = min(1.0, (machine["ram"] - model["rest"]) / model["experts"])
    memory = (model["rest"] + model["routed"]) / machine["ram_bandwidth"]
    disk = (1 - share) * model["routed"] / machine["disk_bandwidth"]
    return 1 / max(memory, disk)


def by_the_active_size(model, machine):
    if machine["ram"] < model["rest"] + model["expert"]:
        return None
    if machine["ram"] >= model["rest"] + model["routed"]:
        return machine["ram_bandwidth"] / (model["rest"] + model["routed"])
    return machine["disk_bandwidth"] / model["routed"]


def added(model, machine):
    if machine["ram"] < model["rest"] + model["expert"]:
        return None
    share = min(1.0, (machine["ram"] - model["rest"]) / model["experts"])
    return 1 / ((model["rest"] + model["routed"]) / machine["ram_bandwidth"] + (1 - share) * model["routed"] / machine["disk_bandwidth"])


def all_experts(model, machine):
    if machine["ram"] < model["rest"] + model["expert"]:
        return None
    share = min(1.0, (machine["ram"] - model["rest"]) / model["experts"])
    return 1 / max((model["rest"] + model["experts"]) / machine["ram_bandwidth"], (1 - share) * model["experts"] / machine["disk_bandwidth"])


def rest_forgotten(model, machine):
    if machine["ram"] < model["rest"] + model["expert"]:
        return None
    share = min(1.0, machine["ram"] / model["experts"])
    return 1 / max((model["rest"] + model["routed"]) / machine["ram_bandwidth"], (1 - share) * model["routed"] / machine["disk_bandwidth"])


def only_hits_from_memory(model, machine):
    if machine["ram"] < model["rest"] + model["expert"]:
        return None
    share = min(1.0, (machine["ram"] - model["rest"]) / model["experts"])
    return 1 / max((model["rest"] + share * model["routed"]) / machine["ram_bandwidth"], (1 - share) * model["routed"] / machine["disk_bandwidth"])


WRONG = {
    "the active size is enough": (by_the_active_size, "changes with every token"),
    "times added": (added, "not the sum"),
    "all experts read": (all_experts, "never all experts"),
    "rest not taken off": (rest_forgotten, "12 are taken by rest"),
    "what came from the disk not read from memory": (only_hits_from_memory, "pass through it"),
}
