"""Every mistake in mutants.py turns its test red, by an assertion; and the runner that says so can say no."""

import sys

import pytest
from mutants import MUTANTS, Mutant, cases, verdict

SWIGLU = "F.silu(self.gate_proj(x_MD)) * self.up_proj(x_MD)"
SILU_TEST = "tests/test_expert.py::test_the_gate_passes_through_silu_and_the_up_projection_does_not"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_named_test_fails_on_the_mutant(mutant):
    found = verdict(mutant)
    assert found, f"{mutant.name}: survived; {mutant.test} passes with it. The test has a hole."
    print(f"{mutant.name}: {found.splitlines()[0]}")  # pytest -rP shows what each test saw


@pytest.mark.parametrize("test", sorted({mutant.test for mutant in MUTANTS}))
def test_the_named_test_passes_on_the_clean_tree_in_this_same_runner(test):
    found = verdict(Mutant("nothing changed", "expert.py", SWIGLU, SWIGLU, test))
    assert not found, f"{test} fails without any mutant: {found}"


def test_every_mutant_has_a_name_of_its_own_and_changes_something():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    assert all(mutant.old != mutant.new for mutant in MUTANTS)


def test_an_equivalent_mutant_is_reported_as_surviving():
    product_turned_round = "self.up_proj(x_MD) * F.silu(self.gate_proj(x_MD))"
    assert verdict(Mutant("equivalent", "expert.py", SWIGLU, product_turned_round, SILU_TEST)) == ""


def test_a_mutant_that_another_test_would_kill_survives_a_test_that_does_not_look():
    elsewhere = "tests/test_expert.py::test_one_class_serves_at_three_widths"
    assert verdict(Mutant("gate and up swapped", "expert.py", SWIGLU, "F.silu(self.up_proj(x_MD)) * self.gate_proj(x_MD)", elsewhere)) == ""


@pytest.mark.parametrize(("new", "error"), [("F.silu(", SyntaxError), ("F.sulu(x_MD)", AttributeError), ("x_MD[..., :1]", RuntimeError), ("no_such_name", NameError)])
def test_a_mutant_that_does_not_run_is_no_kill(new, error):
    with pytest.raises(error):
        verdict(Mutant("broken", "expert.py", SWIGLU, new, "tests/test_expert.py::test_expert_equals_the_reference_in_float64"))


@pytest.mark.parametrize("old", ["text that is not there", "nn.Linear(", ""])
def test_a_patch_whose_place_is_not_unique_is_refused(old):
    with pytest.raises(AssertionError, match="times, expected once"):
        verdict(Mutant("misplaced", "expert.py", old, "x", SILU_TEST))


def test_every_case_of_a_parametrised_test_is_run():
    @pytest.mark.parametrize("a, b", [(1, 2), (3, 4)])
    @pytest.mark.parametrize("c", ["x", "y"])
    def parametrised(a, b, c):
        pass

    found = sorted((case["a"], case["b"], case["c"]) for case in cases(parametrised))
    assert found == [(1, 2, "x"), (1, 2, "y"), (3, 4, "x"), (3, 4, "y")]
    assert cases(verdict) == [{}]


def test_a_mutant_leaves_no_trace_behind():
    import k2
    from k2.expert import Expert

    before, finders = dict(sys.modules), list(sys.meta_path)
    assert verdict(MUTANTS[0])
    import k2.expert

    assert k2.expert.Expert is Expert and sys.meta_path == finders
    changed = [name for name in before if sys.modules.get(name) is not before[name]]
    assert not changed, f"{changed} are other modules than before"
