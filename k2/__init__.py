"""Kimi K2 from scratch, to be read. The reading order is the order in which a token meets the files:

    config      what the model is, and the axis legend
    reference   the whole model in numpy: the specification
    norm, rope, embedding, kv_cache, attention, router, expert, moe, decoder, model    the layers
    quantization, ceilings, checkpoint, slots, offload                                 the weights
    tokenizer, sampling, generation                                                    text in, text out
    chat, reply, grammar, constraint                                                   dialogs, tool calls, JSON
    part, inspection, needs, machine, plan, published                                  what a checkpoint holds, and what it takes
    hub, download, layer_check                                                         the real weights: fetched, and checked
    recording, compare, trace                                                          looking inside: two variants, and one prompt
    training/muonclip, training/corpus, training/pretraining                           making weights

The names below are the public face; everything a user can do wrong raises K2Error.
"""

import os
import signal
import sys

_program = sys.argv[:1] == ["-m"] and ("-m", "k2") in zip(sys.orig_argv, sys.orig_argv[1:]) and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _program:  # `python -m k2`: while torch is imported nothing runs yet that a traceback would tell of, so Ctrl-C just ends it
    signal.signal(signal.SIGINT, signal.SIG_DFL)

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's memory in pages of 2 MiB; torch looks once, when it first allocates

from .chat import encode_chat, render_chat
from .checkpoint import Checkpoint, save
from .config import K2Config, K2Error
from .generation import generate
from .kv_cache import LatentCache
from .model import K2
from .offload import load
from .reply import ReplyStream, parse_reply
from .tokenizer import Tokenizer

if _program:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["Checkpoint", "K2", "K2Config", "K2Error", "LatentCache", "ReplyStream", "Tokenizer", "encode_chat", "generate", "load", "parse_reply",
           "render_chat", "save"]  # fmt: skip
