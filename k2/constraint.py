"""Constrained decoding: of all tokens, those that keep a document of a grammar possible. JSON Mode, schemas, tool arguments.

    state    a set of stacks of k2.grammar (anyOf may leave several open), numbered when first met; 0 is a dead end
    row      state x byte -> state, filled when first needed
    mask     state -> which of all tokens may come next: the trie of the vocabulary walked once, level by level, and kept
    limit    when as many tokens are left as the shortest ending takes, only that ending is allowed

    W vocabulary

`generate` asks a constraint four things: `check(count, width)` before any work, `mask(left)` and `accept(id)` at each
step, `done`; and adds its `stop_ids`. That is the whole contract, and any object that keeps it will do.
"""

import numpy as np
import torch

from . import grammar
from .chat import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END, THINK, THINK_END
from .config import K2Error
from .reply import declared_tools
from .tokenizer import RESERVED, Tokenizer

MOST_STATES, MOST_MASKS = 20_000, 1_000  # then the tables are emptied: a server must not grow with every document


class Vocabulary:
    """All ordinary tokens of a tokenizer as a trie; made once (about a second for K2), used by every grammar.

    levels[d] describes the nodes that are d + 1 bytes deep: (parent among the nodes above, byte, ids of the tokens that
    end at this depth, their nodes). Control tokens and reserved ids are in no trie: no document may contain them."""

    def __init__(self, tokenizer: Tokenizer):
        self.width, self.special, self.stop_ids = tokenizer.vocab_size, tokenizer.special, frozenset(tokenizer.stop_ids)
        self.tokens = tokenizer.bytes_of[: self.width - RESERVED]
        self.id_of = {token: i for i, token in enumerate(self.tokens)}
        self.longest = max(map(len, self.tokens))
        self.levels = trie_levels(self.tokens)

    def only(self, ids) -> torch.Tensor:
        """The mask of some ids, (W,)."""
        mask_W = torch.zeros(self.width, dtype=torch.bool)
        mask_W[list(ids)] = True
        return mask_W


def trie_levels(tokens: list[bytes]) -> list[tuple]:
    """The trie of some texts by depth. Sorted, the texts that begin alike are neighbours, and a node is a run of them."""
    ids = np.array(sorted(range(len(tokens)), key=tokens.__getitem__))
    lengths = np.array([len(tokens[i]) for i in ids])
    text, starts = np.frombuffer(b"".join(tokens[i] for i in ids), np.uint8), np.cumsum(lengths) - lengths
    parents, levels = np.zeros(len(ids), np.int64), []
    for depth in range(int(lengths.max())):
        deep = lengths > depth  # the others have ended above
        ids, parents, lengths, starts = ids[deep], parents[deep], lengths[deep], starts[deep]
        byte, ending = text[starts + depth], lengths == depth + 1
        new = np.append(True, (parents[1:] != parents[:-1]) | (byte[1:] != byte[:-1]))
        nodes = np.cumsum(new) - 1
        levels.append((parents[new], byte[new].astype(np.int64), ids[ending], nodes[ending]))
        parents = nodes
    return levels


class Grammar:
    """A schema ready to constrain with, and its masks; `start()` begins a document. One serves many documents.

    Without a schema it is JSON Mode: any JSON object; with `texts` it is no JSON, but one of these, word for word. Raises
    K2Error, naming the place, for what cannot be enforced."""

    def __init__(self, vocabulary: Vocabulary, schema=None, texts: list[str] | None = None):
        if texts:
            node = grammar.Literals(tuple(text.encode() for text in texts))
        else:
            node = grammar.any_object() if schema is None else grammar.compiled(schema)
        self.vocabulary, self.first = vocabulary, ((grammar.Value(node, 0), ()),)
        self.walks = 0  # over the trie so far, for the benchmark
        self._forget()

    def _forget(self):
        """Empty tables."""
        self.states, self.number = [()], {(): 0}
        self.rows, self.filled = np.zeros((256, 256), np.int32), np.zeros(256, bool)
        self.filled[0] = True
        self._masks, self._needs, self._endings, self._walked = {}, {0: 0}, {}, (0, None)
        self._longest = (b"", [0], [0])  # the longest ending so far, and its tables: others mostly end like it

    def start(self) -> "Constraint":
        """A constraint at the beginning of a document."""
        return Constraint(self)

    # ---- states and rows ----

    def state(self, stacks: tuple) -> int:
        """The number of a set of stacks."""
        if stacks not in self.number:
            self.number[stacks] = len(self.states)
            self.states.append(stacks)
            if len(self.states) > len(self.rows):
                self.rows, self.filled = (np.concatenate([table, np.zeros_like(table)]) for table in (self.rows, self.filled))
        return self.number[stacks]

    def row(self, s: int) -> np.ndarray:
        """The state behind each of 256 bytes."""
        if not self.filled[s]:
            ways, by_byte, together = [way for stack in self.states[s] for way in grammar.moves(stack)], {}, {}
            for n, (choice, _) in enumerate(ways):
                for byte in choice:
                    by_byte.setdefault(byte, []).append(n)
            for byte, taken in by_byte.items():  # bytes that take the same ways lead to the same state
                together.setdefault(tuple(taken), []).append(byte)
            for taken, group in together.items():
                behind = self.state(tuple(dict.fromkeys(ways[n][1] for n in taken)))
                self.rows[s, group] = behind
            self.filled[s] = True
        return self.rows[s]

    def after(self, stacks: tuple, text: bytes) -> tuple:
        """The stacks behind a text; () where it does not fit."""
        s = self.state(stacks)
        for byte in text:
            s = int(self.row(s)[byte])
        return self.states[s]

    def walk(self, s: int) -> np.ndarray:
        """The state behind each token, (W,); 0 where it does not fit."""
        if self._walked[0] == s:  # near the limit the same walk is asked for twice
            return self._walked[1]
        self.walks += 1
        behind_W, states = np.zeros(self.vocabulary.width, np.int32), np.array([s], np.int32)
        for parent, byte, ids, nodes in self.vocabulary.levels:
            for new in np.unique(states[~self.filled[states]]):
                self.row(int(new))
            states = self.rows.reshape(-1)[states[parent] * 256 + byte]
            behind_W[ids] = states[nodes]
            if not states.any():
                break
        self._walked = s, behind_W
        return behind_W

    # ---- masks ----

    def mask(self, stacks: tuple) -> tuple[torch.Tensor, int]:
        """(which tokens may follow, (W,) bool; the most bytes that any of them leaves to be written)."""
        if len(self.states) > MOST_STATES or len(self._masks) > MOST_MASKS:
            self._forget()
        s = self.state(tuple(map(self._roomy, stacks)))
        if s not in self._masks:
            behind_W = self.walk(s)
            mask_W = torch.from_numpy(behind_W > 0)
            if is_complete(stacks):
                mask_W[list(self.vocabulary.stop_ids)] = True
            self._masks[s] = mask_W, max(map(self.need, self.met(behind_W)))
        mask_W, most = self._masks[s]
        shared = self.states[s]
        return mask_W, most + max(len(grammar.closing(stack)) - len(grammar.closing(roomy)) for stack, roomy in zip(stacks, shared))

    def met(self, behind_W: np.ndarray) -> list[int]:
        """Each state that stands in a walk's result, once."""
        flags = np.zeros(len(self.states), bool)
        flags[behind_W] = True
        return np.flatnonzero(flags).tolist()

    def _roomy(self, stack: tuple) -> tuple:
        """The same stack, where a string has more room, or must have more characters, than any token has, with just that
        many: they share a mask."""
        if not stack or not isinstance(stack[0], grammar.Text):
            return stack
        text, most = stack[0], self.vocabulary.longest + 1
        return grammar.Text(text.where, min(text.need, most), None if text.room is None else min(text.room, most)), stack[1]

    def need(self, s: int) -> int:
        """The fewest bytes from a state to the end of the document."""
        if s not in self._needs:
            self._needs[s] = min(len(grammar.closing(stack)) for stack in self.states[s])
        return self._needs[s]

    def ending(self, stacks: tuple) -> tuple[int, ...]:
        """The shortest ending, in as few tokens as write it."""
        text = min((grammar.closing(stack) for stack in stacks), key=len)
        if text not in self._endings:
            tables = cut(text, self.vocabulary, self._longest)
            self._longest = max(tables, self._longest, key=lambda known: len(known[0]))
            self._endings[text] = read_cut(tables, self.vocabulary)
        return self._endings[text]


def fewest_tokens(text: bytes, vocabulary: Vocabulary) -> tuple[int, ...]:
    """A text in as few tokens as possible, found from its end; single bytes are always tokens."""
    return read_cut(cut(text, vocabulary, (b"", [0], [0])), vocabulary)


def cut(text: bytes, vocabulary: Vocabulary, known: tuple) -> tuple[bytes, list[int], list[int]]:
    """(text, tokens that its last n bytes take, length of the first of them); of a known text that ends alike, its tables."""
    same = next((len(text) - n for n in range(min(len(text), vocabulary.longest)) if known[0].endswith(text[n:])), 0)
    fewest, first = known[1][: same + 1], known[2][: same + 1]
    for n in range(same + 1, len(text) + 1):
        start = len(text) - n
        lengths = (length for length in range(1, min(n, vocabulary.longest) + 1) if text[start : start + length] in vocabulary.id_of)
        first.append(min(lengths, key=lambda length: fewest[n - length]))
        fewest.append(1 + fewest[n - first[n]])
    return text, fewest, first


def read_cut(tables: tuple, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The tokens that the tables found."""
    text, _, first = tables
    ids, left = [], len(text)
    while left:
        ids.append(vocabulary.id_of[text[len(text) - left : len(text) - left + first[left]]])
        left -= first[left]
    return tuple(ids)


def is_complete(stacks: tuple) -> bool:
    """Whether the document may end here."""
    return any(not grammar.closing(stack) for stack in stacks)


class Constraint:
    """One document in the making, as `generate` asks for it."""

    def __init__(self, grammar: Grammar):
        self.grammar, self.stacks, self.stop_ids = grammar, grammar.first, grammar.vocabulary.stop_ids
        self._plan = grammar.ending(self.stacks)  # an ending that is known to fit into what is left; None if not known

    @property
    def shortest(self) -> int:
        """Tokens that the shortest ending takes from here."""
        return len(self.grammar.ending(self.stacks))

    def check(self, count: int, width: int):
        """Refuse a limit of tokens that no document fits into, and a model of another vocabulary."""
        check_width(self.grammar.vocabulary, width)
        if count < self.shortest:
            raise K2Error(f"max_new_tokens: found {count}; expected at least {self.shortest}, which the shortest such document takes. Allow more.")

    @property
    def complete(self) -> bool:
        """Whether what was written is a document."""
        return is_complete(self.stacks)

    @property
    def done(self) -> bool:
        """Whether nothing can follow: the document is complete, and no number that might have further digits."""
        return self.stacks == ((),)

    def mask(self, left: int) -> torch.Tensor:
        """Which ids may come next, (W,) bool, where so many tokens may still be written, this one among them."""
        mask_W, most = self.grammar.mask(self.stacks)
        if left > most:
            return mask_W  # whatever comes, there is room to end: a byte takes one token at most
        plans = [plan for plan in (self._plan, self.grammar.ending(self.stacks)) if plan is not None]
        self._plan = min(plans, key=len)
        if left > len(self._plan):
            return self._in_time(left - 1)
        return self.grammar.vocabulary.only(self._plan[:1] or self.stop_ids)

    def _in_time(self, left: int) -> torch.Tensor:
        """The mask without tokens behind which so many more could not end the document."""
        g = self.grammar
        behind_W = g.walk(g.state(self.stacks))
        in_time = np.zeros(len(g.states), bool)
        in_time[[n for n in g.met(behind_W) if n and (g.need(n) <= left or len(g.ending(g.states[n])) <= left)]] = True
        mask_W = torch.from_numpy(in_time[behind_W])
        mask_W[[*self._plan[:1], *(self.stop_ids if self.complete else ())]] = True
        return mask_W

    def accept(self, i: int):
        """The document goes on with id i. A stop id ends it; any other must be one that the mask allows."""
        if i in self.stop_ids:
            return
        self._plan = self._plan[1:] if self._plan and self._plan[0] == i else None
        tokens = self.grammar.vocabulary.tokens
        self.stacks = self.grammar.after(self.stacks, tokens[i]) if i < len(tokens) else ()
        if not self.stacks:
            raise K2Error(f"constraint: id {i} does not continue the document. Choose among those that the mask allows.")


class ThoughtFirst:
    """A document behind a thought: <think>, any text, </think>, or no thought at all. `begun`: the prompt opened it."""

    def __init__(self, constraint: Constraint, begun: bool = False):
        self.inner, self.vocabulary, self.stop_ids = constraint, constraint.grammar.vocabulary, constraint.stop_ids
        self._state = "thought" if begun else "start"
        missing = [marker for marker in (THINK, THINK_END) if marker not in self.vocabulary.special]
        if missing:
            raise K2Error(f"constraint: the tokenizer has no {missing[0]}. Use the document's constraint alone.")

    def check(self, count: int, width: int):
        """As Constraint.check; a thought that is open takes one token to close."""
        self.inner.check(count - (self._state == "thought"), width)

    @property
    def complete(self) -> bool:
        """Whether the document is."""
        return self.inner.complete

    @property
    def done(self) -> bool:
        """Whether nothing can follow."""
        return self.inner.done

    def mask(self, left: int) -> torch.Tensor:
        """As Constraint.mask; the thought leaves room for the shortest document."""
        v, room = self.vocabulary, left - self.inner.shortest
        if self._state == "thought":
            end_W = v.only([v.special[THINK_END]])
            end_W[: len(v.tokens)] = room > 1
            return end_W
        mask_W = self.inner.mask(left)
        return mask_W | v.only([v.special[THINK]]) if self._state == "start" and room > 2 else mask_W

    def accept(self, i: int):
        """The reply goes on with id i."""
        if self._state == "start" and i == self.vocabulary.special[THINK]:
            self._state = "thought"
        elif self._state == "thought":
            self._state = "document" if i == self.vocabulary.special[THINK_END] else "thought"
        else:
            self._state = "document"
            self.inner.accept(i)


# ---- tool calls ----


class CallConstraint:
    """A whole reply: free text, and calls that are in form, of declared tools, with arguments that fit their schemas.

    What Moonshot's servers call the enforcer. A section of calls ends the reply. `number` is that of the next call in the
    conversation: functions.NAME:number."""

    def __init__(self, vocabulary: Vocabulary, tools: list, number: int = 0):
        self.vocabulary, self.stop_ids, self.number = vocabulary, vocabulary.stop_ids, number
        missing = [marker for marker in (CALLS, CALL, ARGUMENTS, CALL_END, CALLS_END) if marker not in vocabulary.special]
        if missing or not tools:
            raise K2Error(f"constraint: {f'the tokenizer has no {missing[0]}' if missing else 'no tools are declared'}. Leave the constraint away.")
        self._grammars = {name: Grammar(vocabulary, schema or {"type": "object"}) for name, schema in declared_tools(tools).items()}
        # What the reply needs at least behind an id: three markers, and the longest of all shortest arguments.
        self._behind_id = 3 + max(g.start().shortest for g in self._grammars.values())
        self._free_W = vocabulary.only([*self.stop_ids, *(vocabulary.special[m] for m in (THINK, THINK_END) if m in vocabulary.special)])
        self._free_W[: len(vocabulary.tokens)] = True
        self._state, self._inner, self._id, self._call = "text", None, b"", self._call_at_most()

    def check(self, count: int, width: int):
        """Refuse a model of another vocabulary. A reply without a call may stop anywhere, so any count will do."""
        check_width(self.vocabulary, width)

    @property
    def done(self) -> bool:
        """Whether the section of calls is closed."""
        return self._state == "end"

    complete = done  # of a text nobody knows whether it is

    def mask(self, left: int) -> torch.Tensor:
        """As Constraint.mask. Nothing is begun that cannot be ended within the limit."""
        if self._state == "text":
            return self._free_W | self._only(CALLS) if left > 1 + self._call else self._free_W
        if self._state == "id":
            return self._only(ARGUMENTS) if self._inner.done else self._inner.mask(left - self._behind_id)
        if self._state == "arguments":
            return self._only(CALL_END) if self._inner.done else self._inner.mask(left - 2)
        if self._state == "section":
            return self._only(CALL)
        return self._only(CALLS_END) | self._only(CALL) if left > self._call else self._only(CALLS_END)

    def accept(self, i: int):
        """The reply goes on with id i."""
        if self._state == "text":
            self._state = "section" if i == self.vocabulary.special[CALLS] else "text"
        elif i == self.vocabulary.special[CALL]:
            self._state, self._inner, self._id = "id", Grammar(self.vocabulary, texts=list(self._ids())).start(), b""
        elif i == self.vocabulary.special[ARGUMENTS]:
            name = self._ids().get(self._id.decode(errors="replace"))
            if self._state != "id" or name is None:
                raise K2Error(f"constraint: {self._id!r} is not the id of the next call. Choose among the ids that the mask allows.")
            self._state, self._inner = "arguments", self._grammars[name].start()
        elif i == self.vocabulary.special[CALL_END]:
            self._state, self.number = "call ended", self.number + 1
            self._call = self._call_at_most()
        elif i == self.vocabulary.special[CALLS_END]:
            self._state = "end"
        else:
            self._inner.accept(i)
            self._id += self.vocabulary.tokens[i] if self._state == "id" else b""

    def _ids(self) -> dict[str, str]:
        """{the id that the next call has: its tool}."""
        return {f"functions.{name}:{self.number}": name for name in self._grammars}

    def _call_at_most(self) -> int:
        """Tokens within which a further call and the end of the section fit, whichever tool it is."""
        return 1 + max(len(fewest_tokens(i.encode(), self.vocabulary)) for i in self._ids()) + self._behind_id

    def _only(self, marker: str) -> torch.Tensor:
        """The mask of one marker."""
        return self.vocabulary.only([self.vocabulary.special[marker]])


def check_width(vocabulary: Vocabulary, width: int):
    """Refuse a model that gives scores to another number of ids than the constraint's tokenizer has."""
    if width != vocabulary.width:
        raise K2Error(f"constraint: made for {vocabulary.width} ids, but the model has {width}. Use the checkpoint's own tokenizer.")
