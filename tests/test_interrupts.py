"""A Ctrl-C within a whole function comes behind it, once, and elsewhere at once."""

import signal
import threading

import pytest

from k2.interrupts import whole


@pytest.fixture(autouse=True)
def usual():
    """Python's own handler, whatever runs these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_is_raised_behind_the_function_and_once():
    done = []

    @whole
    def twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            done.append("a step")

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert done == ["a step"] * 2 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert whole(lambda x: x + 1)(1) == 2  # and not again


def test_a_whole_function_within_another_waits_for_the_outer_one():
    done = []
    inner = whole(lambda: signal.raise_signal(signal.SIGINT))

    @whole
    def outer():
        inner()
        done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert done == ["the rest"]


def test_an_error_within_is_not_lost_behind_the_press():
    @whole
    def failing():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("within")

    with pytest.raises(KeyboardInterrupt) as caught:
        failing()
    assert isinstance(caught.value.__context__, ValueError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_python_does_not_handle_it_nothing_is_changed(handler):
    signal.signal(signal.SIGINT, handler)
    assert whole(lambda: signal.getsignal(signal.SIGINT))() is handler


def test_another_thread_runs_the_function_as_it_is():
    seen = []
    thread = threading.Thread(target=whole(lambda: seen.append(signal.getsignal(signal.SIGINT))))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
