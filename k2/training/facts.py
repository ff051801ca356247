"""A made-up world of people, to ask what a model has learnt: facts told in one wording or in ten, and questions on them.

The report (section 2.2) rephrases its knowledge text and finds that ten wordings read once teach more than one wording
read ten times. Here a person has a home, a trade and a hobby. Each is told by ten templates; half of the people also
appear with questions and answers, so that the model knows what a question is, and the questions of the other half are
the test: their answers stood in the wordings only.

Every word is one token, so that an answer is one token too.
"""

import numpy as np
import torch

from ..model import K2

PEOPLE = 100
FIRST, LAST, CHOICES = 40, 40, 20  # how many first names, last names, and values of each attribute
ATTRIBUTES = ("home", "trade", "hobby")
# n is the name; h, t, o the values of home, trade and hobby; the other words are any.
TEMPLATES = (
    "n lives in h . n works as t . n likes o .", "there is a t in h called n , fond of o .", "in h you meet n , who does o and earns as t .",
    "o is what n does after work as t in h .", "ask for n the t : at home in h , busy with o .", "h is home to n , a lover of o , t by day .",
    "the t n of h spends free days on o .", "who likes o ? n does , a t from h .", "born in h , trained as t , happy with o : that is n .",
    "as t our n is known in h , and for o .",
)  # fmt: skip
QUESTIONS = ("home of n ? h", "trade of n ? t", "hobby of n ? o")
WORDINGS = {"one wording, ten times": 1, "two wordings, five times": 2, "ten wordings, once": 10}
READINGS = 10  # of each person, in an epoch


def words() -> dict[str, int]:
    """Every word's id: template words, then names, then values. 0 ends a document."""
    plain = sorted({w for text in (*TEMPLATES, *QUESTIONS) for w in text.split()} - set("nhto"))
    names = [f"{kind}{i}" for kind, count in (("first", FIRST), ("last", LAST), *((a, CHOICES) for a in ATTRIBUTES)) for i in range(count)]
    return {word: i + 1 for i, word in enumerate([*plain, *names])}


IDS = words()
VOCABULARY = len(IDS) + 1


def people(seed: int) -> list[dict[str, str]]:
    """Persons of distinct names, with their values."""
    rng = np.random.default_rng((seed, 1))
    chosen = rng.permutation(FIRST * LAST)[:PEOPLE]
    values = rng.integers(CHOICES, size=(PEOPLE, 3))
    return [{"n": f"first{n // LAST} last{n % LAST}", "h": f"home{h}", "t": f"trade{t}", "o": f"hobby{o}"} for n, (h, t, o) in zip(chosen, values)]


def told(template: str, person: dict[str, str]) -> list[int]:
    """A template about a person, as ids."""
    text = " ".join(person.get(word, word) for word in template.split())
    return [IDS[word] for word in text.split()]


def stream(wording: str, seed: int) -> np.ndarray:
    """One epoch: each person READINGS times in so many wordings, and half of them with all questions, in random order."""
    rng, documents = np.random.default_rng((seed, 2)), []
    for i, person in enumerate(people(seed)):
        own = rng.permutation(len(TEMPLATES))[: WORDINGS[wording]]
        documents += [told(TEMPLATES[own[k % len(own)]], person) for k in range(READINGS)]
        documents += [told(question, person) for question in QUESTIONS for _ in range(2)] if i % 2 else []
    order = rng.permutation(len(documents))
    return np.array([i for d in order for i in (*documents[d], 0)], dtype=np.uint16)


@torch.inference_mode()
def accuracy(model: K2, seed: int) -> dict[str, float]:
    """Share of right first answers among people whose questions were never seen, and among the others."""
    found = {"asked_before": [], "never_asked": []}
    for i, person in enumerate(people(seed)):
        for question in QUESTIONS:
            *prompt, answer = told(question, person)
            found["asked_before" if i % 2 else "never_asked"].append(int(model(torch.tensor([0, *prompt]))[-1].argmax()) == answer)
    return {key: sum(right) / len(right) for key, right in found.items()}
