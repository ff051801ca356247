"""The made-up world: every answer stands in the text, and no question of the tested half does."""

import numpy as np
import pytest
import torch

from k2.training import facts


def documents(stream):
    ends = np.flatnonzero(stream == 0)
    return [tuple(int(i) for i in part if i) for part in np.split(stream, ends + 1) if len(part)]


@pytest.mark.parametrize("wording", facts.WORDINGS)
def test_both_texts_are_equally_long_and_tell_every_fact(wording):
    stream, everyone = facts.stream(wording, 3), facts.people(3)
    found = documents(stream)
    assert len(found) == facts.PEOPLE * facts.READINGS + facts.PEOPLE // 2 * 3 * 2
    for person in everyone:
        told = {tuple(facts.told(t, person)) for t in facts.TEMPLATES}
        readings = [d for d in found if d in told]
        assert len(readings) == facts.READINGS and len(set(readings)) == facts.WORDINGS[wording]
    assert stream.max() < facts.VOCABULARY


def test_questions_of_the_tested_half_are_never_read():
    found = set(documents(facts.stream("ten wordings, once", 0)))
    for i, person in enumerate(facts.people(0)):
        for question in facts.QUESTIONS:
            assert (tuple(facts.told(question, person)) in found) == bool(i % 2)


def test_people_have_names_of_their_own_and_seeds_make_other_worlds():
    assert len({p["n"] for p in facts.people(0)}) == facts.PEOPLE
    assert facts.people(0) == facts.people(0) != facts.people(1)


def test_accuracy_counts_right_first_answers():
    answers = {tuple(facts.told(q, p)[:-1]): facts.told(q, p)[-1] for i, p in enumerate(facts.people(0)) for q in facts.QUESTIONS if i % 4}

    def knows_three_quarters(ids):
        return torch.nn.functional.one_hot(torch.tensor([answers.get(tuple(ids[1:].tolist()), 1)] * len(ids)), facts.VOCABULARY)

    assert facts.accuracy(knows_three_quarters, 0) == {"asked_before": 1.0, "never_asked": 0.5}
