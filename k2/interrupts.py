"""Ctrl-C kept back for a moment, where half of a change would be worse than none of it.

Python raises KeyboardInterrupt between any two instructions of the main thread. Between "this slot is the expert's" and
"its bytes are on the way" that would leave a slot with another expert's bytes, which the next request would take for right.
"""

import functools
import signal
import threading


class KeptBack:
    """A handler of SIGINT that remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, *arguments):
        self.calls.append(arguments)


def whole(function):
    """The same function, done to its end or not begun: a Ctrl-C that comes within is raised behind it. It should take
    milliseconds, and wait for nothing that may take longer."""

    @functools.wraps(function)
    def undivided(*arguments):
        usual = signal.getsignal(signal.SIGINT)
        if not callable(usual) or isinstance(usual, KeptBack) or threading.current_thread() is not threading.main_thread():
            return function(*arguments)  # kept back already, or never raised here
        kept = KeptBack()
        signal.signal(signal.SIGINT, kept)
        try:
            return function(*arguments)
        finally:
            signal.signal(signal.SIGINT, usual)
            if kept.calls:
                usual(*kept.calls[0])

    return undivided
