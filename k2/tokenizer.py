"""Text to ids and back: a byte-level BPE read from `tiktoken.model`, with K2's own splitting pattern.

    tiktoken.model          one line per token: base64(bytes) rank         K2: 163,584 ranks
    tokenizer_config.json   names of the special tokens by id              K2: 17, at 163,584 and above
    reserved ids            <|reserved_token_ID|> for the rest of the 256  K2: up to 163,839

Encoding is three steps. The pattern cuts the text into pieces (a word with its leading space, up to three digits, a run
of Han characters, ...). A piece that is itself a token is that token. Any other starts as single bytes, and the
adjacent pair whose union has the lowest rank is joined until no pair is a token.

The strings of special tokens inside ordinary text are ordinary text: a user who types <|im_end|> must not end a turn.
"""

import base64
import codecs
import json
import re
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from .config import K2Error, read_json_object

RESERVED = 256  # ids above the ranks, named in tokenizer_config.json or not

WORD_UPPER, WORD_LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(  # && is set intersection: letters that are not Han. Python's re would read it as two ampersands.
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{WORD_UPPER}&&[^\p{{Han}}]]*[{WORD_LOWER}&&[^\p{{Han}}]]+{CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{WORD_UPPER}&&[^\p{{Han}}]]+[{WORD_LOWER}&&[^\p{{Han}}]]*{CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# K2's own code cuts huge inputs before the pattern sees them; tokens never cross these cuts.
LONGEST_TEXT, LONGEST_RUN = 400_000, 25_000
LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}(?=\S)|\s{{{LONGEST_RUN}}}(?=\s)")


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, which `tokenizers` expects: 188 bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of tiktoken.model by rank. Raises K2Error for a line that is not base64 and the next rank."""
    if not path.is_file():
        raise K2Error(f"{path}: expected the tokenizer's ranks in a regular file, found none. A checkpoint directory needs its tiktoken.model.")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise K2Error(f"{path}: expected the tokenizer's ranks, could not read them: {error.strerror}. Check its permissions and the disk.") from None
    tokens = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            in_order, token = int(rank) == len(tokens), base64.b64decode(token, validate=True)
        except ValueError:
            in_order = False
        if not in_order:
            raise K2Error(f"{path}: line {number} is {line[:40]!r}; expected base64 and rank {len(tokens)}. Fetch the file again.")
        tokens.append(token)
    if len(set(tokens)) != len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
        raise K2Error(f"{path}: expected every single byte and no token twice among {len(tokens)}. Fetch the file again.")
    return tokens


def merge_of(token: bytes, rank_of: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts whose union a token is: what BPE leaves of its bytes when only lower ranks may join."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((rank_of.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= rank_of[token]:
            raise K2Error(f"tiktoken.model: token {token!r} is not the union of two lower ranks. Fetch the file again.")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def build_bpe(tokens: list[bytes]) -> tokenizers.Tokenizer:
    """The Rust BPE for these ranks. ignore_merges emits a piece that is a token whole, as tiktoken does."""
    letter = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(letter[b] for b in token)

    rank_of = {token: rank for rank, token in enumerate(tokens)}
    merges = [tuple(map(spell, merge_of(token, rank_of))) for token in tokens if len(token) > 1]
    vocabulary = {spell(token): rank for token, rank in rank_of.items()}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True, fuse_unk=False))
    bpe.pre_tokenizer = split_and_spell()
    return bpe


def split_and_spell() -> pre_tokenizers.PreTokenizer:
    """Cut by K2's pattern, then write bytes as letters. No normaliser: the bytes that come back are those that went in."""
    cut = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


class Tokenizer:
    """Encodes and decodes with one checkpoint's vocabulary; `special` maps the strings of all 256 reserved ids to ids."""

    def __init__(self, tokens: list[bytes], special_names: dict[int, str], where: str = "tokenizer"):
        first, last = len(tokens), len(tokens) + RESERVED - 1
        wrong = [i for i in special_names if not first <= i <= last]
        if wrong:
            raise K2Error(f"{where}: special token {special_names[wrong[0]]!r} has id {wrong[0]}; expected {first} to {last}. The files are not of one checkpoint.")
        names = {i: special_names.get(i, f"<|reserved_token_{i}|>") for i in range(first, last + 1)}
        self.special = {name: i for i, name in names.items()}
        self.bytes_of = tokens + [names[i].encode() for i in sorted(names)]
        self._bpe = build_bpe(tokens)
        self._special_strings = re.compile("|".join(re.escape(name) for name in sorted(self.special, key=len, reverse=True)))

    @classmethod
    def from_directory(cls, directory) -> "Tokenizer":
        """Read tiktoken.model and tokenizer_config.json. Raises K2Error where one is missing or damaged."""
        directory = Path(directory)
        config_path = directory / "tokenizer_config.json"
        entries = read_json_object(config_path).get("added_tokens_decoder")
        try:
            names = {int(i): entry["content"] for i, entry in entries.items()}
            spelled = {name.encode() for name in names.values()}  # fails for what is no string, or no UTF-8
        except (AttributeError, ValueError, TypeError, KeyError):
            raise K2Error(f"{config_path}: expected added_tokens_decoder to map ids to objects with a content. Fetch the file again.") from None
        if b"" in spelled or len(spelled) != len(entries):
            raise K2Error(f"{config_path}: expected a name of its own for every id in added_tokens_decoder, found an empty or a repeated one. Fetch the file again.")
        return cls(read_ranks(directory / "tiktoken.model"), names, str(directory))

    @property
    def vocab_size(self) -> int:
        """All ids, the reserved ones included: 163,840 for K2."""
        return len(self.bytes_of)

    @property
    def stop_ids(self) -> set[int]:
        """Where a text or a turn ends: [EOS], <|im_end|> and [EOT], as far as this checkpoint names them.

        All three, because config.json names only [EOS] while a chat turn ends in <|im_end|>.
        """
        return {self.special[name] for name in ("[EOS]", "<|im_end|>", "[EOT]") if name in self.special}

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """ids of a text. Nothing is added in front or behind. Only with allow_special do strings such as <|im_end|>
        become their ids: for text that this program wrote, never for text that a user typed."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise K2Error(f"text: character {error.start} is a lone surrogate, which no UTF-8 text has. Decode the input as UTF-8.") from None
        ids, end = [], 0
        for match in self._special_strings.finditer(text) if allow_special else ():
            ids += self._encode_plain(text[end : match.start()]) + [self.special[match.group()]]
            end = match.end()
        return ids + self._encode_plain(text[end:])

    def _encode_plain(self, text: str) -> list[int]:
        chunks = (text[i : i + LONGEST_TEXT] for i in range(0, len(text), LONGEST_TEXT))
        return [i for chunk in chunks for piece in cut_long_runs(chunk) for i in self._bpe.encode(piece).ids]

    def decode(self, ids) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, special ids their strings."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id. Raises K2Error for an id that the vocabulary does not have."""
        if not 0 <= i < self.vocab_size:
            raise K2Error(f"ids: found {i}; expected 0 to {self.vocab_size - 1}. Were the ids made with this tokenizer?")
        return self.bytes_of[i]

    def stream(self) -> "StreamDecoder":
        """A decoder to be fed id by id."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids as they come. A character may span tokens: its bytes are held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i: int) -> str:
        """The text that id i completes, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(i))

    def finish(self) -> str:
        """What is left at the end: empty, or U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


def cut_long_runs(text: str) -> list[str]:
    """The text in pieces, none with more than 25,000 characters of one kind (space or not) in a row."""
    cuts = [0, *(match.end() for match in LONG_RUN.finditer(text)), len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


# The names K2-Instruct gives to its 17 special tokens, as offsets behind the ranks (163,584 for K2).
SPECIAL_NAMES = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>", 14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip


def train_ranks(texts, size: int) -> list[bytes]:
    """`size` tokens learnt from texts by BPE under K2's pattern: the 256 bytes, then the commonest unions in order."""
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = split_and_spell()
    bpe.train_from_iterator(texts, trainer)
    byte_of = {letter: byte for byte, letter in byte_alphabet().items()}
    by_id = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return [bytes(byte_of[letter] for letter in spelled) for spelled, _ in by_id]


def tokenizer_files(tokens: list[bytes]) -> dict[str, str]:
    """The contents of tiktoken.model and tokenizer_config.json for a vocabulary with K2's special tokens behind it."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    entries = {
        str(len(tokens) + offset): {"content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        for offset, name in SPECIAL_NAMES.items()
    }
    config = {"added_tokens_decoder": entries, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]",
              "tokenizer_class": "TikTokenTokenizer", "model_max_length": 1000000000000000019884624838656}  # fmt: skip
    return {"tiktoken.model": "".join(lines), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
