"""Work that has a thread of its own: what it gives and raises, and who interrupts it."""

import signal
import threading
from collections.abc import Callable

import pytest

from prunewright.graph.running.stopping import StoppedError, call_alone, call_stoppable, check_stop


def interrupt_main() -> None:
    """Ctrl-C, to the thread that runs the tests."""
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


def work_until_stopped(begin: Callable[[], None], ended: list[type[BaseException]]) -> None:
    """Look again and again whether to stop, for ten seconds at most."""
    begin()
    for _ in range(1000):
        try:
            check_stop()
        except StoppedError:
            ended.append(StoppedError)
            raise
        threading.Event().wait(0.01)


def test_what_it_gives_or_raises_is_the_callers() -> None:
    threads: list[threading.Thread] = []

    def work() -> int:
        threads.append(threading.current_thread())
        return 7

    assert call_alone(work) == 7
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()
    with pytest.raises(ZeroDivisionError):
        call_alone(lambda: 1 // 0)


@pytest.mark.parametrize(
    "wait", [call_alone, lambda work: call_alone(lambda: call_stoppable(work))]
)
def test_an_interrupt_of_the_caller_stops_the_work_at_its_next_look(
    wait: Callable[[Callable[[], None]], None],
) -> None:
    ended: list[type[BaseException]] = []
    with pytest.raises(KeyboardInterrupt):
        wait(lambda: work_until_stopped(interrupt_main, ended))
    for _ in range(1000):  # a call that was left behind ends a moment later
        if ended:
            break
        threading.Event().wait(0.01)
    assert ended == [StoppedError]
