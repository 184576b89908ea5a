"""Stopping a run between two windows or layers, so that a signal loses nothing.

LangGraph runs nodes in threads of its own, which a KeyboardInterrupt in the main thread does
not reach, and waits for them on a lock, where a signal that comes a moment too early is not
noticed. So the graph is driven from another thread, the first signal only sets an event that
the work looks at, and the second goes to whoever handled signals before.
"""

import asyncio
import logging
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from types import FrameType
from typing import Any, TypeVar

from prunewright.graph.running.logs import log_progress
from prunewright.state import PrunewrightError

_log = logging.getLogger("prunewright")
_Value = TypeVar("_Value")

POLL = 0.1
"""Seconds between two looks of a waiting thread at whether it shall stop."""


class StoppedError(PrunewrightError):
    """The run was asked to stop; what its last checkpoint holds is kept."""


class _Stop(threading.Event):
    """Set once the run shall stop.

    Attributes:
        number: the signal that asked for it.
    """

    number: int = int(signal.SIGINT)


# LangGraph hands the caller's context variables on to the threads of the nodes.
_current: ContextVar[_Stop | None] = ContextVar("prunewright_stop", default=None)


def stop_requested() -> bool:
    """Whether the run of this context was asked to stop."""
    stop = _current.get()
    return stop is not None and stop.is_set()


def check_stop() -> None:
    """Called wherever work may end early.

    Raises:
        StoppedError: the run of this context was asked to stop.
    """
    if stop_requested():
        raise StoppedError("the run was stopped")


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM ask the work to stop, which ends it at `check_stop`.

    Raises:
        KeyboardInterrupt: the work stopped; its argument is the signal's number.
    """
    stop = _Stop()
    earlier: dict[int, Any] = {}

    def on_signal(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(number, earlier[number])
            signal.raise_signal(number)
            return
        stop.number = number
        stop.set()
        _log.warning("stopping after the window or layer in hand; press again to stop at once")

    token = _current.set(stop)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                earlier[number] = handler
                signal.signal(number, on_signal)
    try:
        yield
    except StoppedError:
        raise KeyboardInterrupt(stop.number) from None
    finally:
        for caught, handler in earlier.items():
            signal.signal(caught, handler)
        _current.reset(token)


def call_stoppable(function: Callable[[], _Value], seconds: float = math.inf) -> _Value:
    """Call something that cannot look at the event itself, such as a request to an LLM.

    It runs in a daemon thread, which is left behind if the run is stopped meanwhile.

    Args:
        function: what is called.
        seconds: how long it may take.

    Raises:
        StoppedError: the run was asked to stop.
        TimeoutError: it took longer.
    """
    end = time.monotonic() + seconds
    results: list[_Value] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = _start(work)
    while thread.is_alive():
        check_stop()
        if time.monotonic() > end:
            raise TimeoutError(f"no answer within {seconds:g} seconds")
        thread.join(POLL)
    if errors:
        raise errors[0]
    return results[0]


def call_alone(function: Callable[[], _Value]) -> _Value:
    """Call something that computes, in a thread that ends with it.

    OpenMP keeps a team of threads for every thread that has computed. LangGraph takes whichever of
    its threads is free, and with more teams alive than one, passes take a fifth longer and small
    operations twice as long (SmolLM2-135M on two cores). If the caller is interrupted, the work is
    asked to stop and waited for.
    """
    stop, context = _current.get() or _Stop(), copy_context()
    context.run(_current.set, stop)
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(context.run, function).result()
        except KeyboardInterrupt:
            stop.set()
            raise


async def call_cancellable(function: Callable[[], _Value]) -> _Value:
    """Call something in another thread; if this task is cancelled, it is asked to stop.

    The task ends only after the work has, so that nothing is at work behind its back.
    """
    stop, context = _Stop(), copy_context()
    context.run(_current.set, stop)
    work = asyncio.get_running_loop().run_in_executor(None, context.run, function)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([work])
        work.exception()  # seen: what ended it no longer matters
        raise


def iterate_stoppable(
    function: Callable[[], Iterable[_Value]],
) -> Generator[_Value, None, None]:
    """Yield what an iterable gives that another thread goes through.

    The caller's thread never waits long, so that it notices signals. If the caller gives up,
    the work is asked to stop and waited for.

    Args:
        function: makes the iterable; called in the other thread.
    """
    items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def work() -> None:
        try:
            for item in function():
                items.put(("item", item))
        except BaseException as error:
            items.put(("error", error))
        else:
            items.put(("end", None))

    thread = _start(work)
    try:
        while True:
            try:
                kind, value = items.get(timeout=POLL)
            except queue.Empty:
                continue
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    except GeneratorExit:
        if (stop := _current.get()) is not None:
            stop.set()
        raise
    finally:
        while thread.is_alive():
            thread.join(POLL)


def _start(work: Callable[[], None]) -> threading.Thread:
    """A daemon thread that sees this thread's context variables."""
    thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
    thread.start()
    return thread


def reporter(
    tell: Callable[[dict[str, Any]], None], interval: float = 0.0
) -> Callable[[str, int, int], None]:
    """What is told of progress by those at work; it stops them where a person or the system asks.

    Args:
        tell: is sent ``progress`` events, and the log the same.
        interval: seconds between two of them, but for the beginning and the end of a phase.
    """
    told = -math.inf

    def report(label: str, done: int, total: int) -> None:
        nonlocal told
        check_stop()
        now = time.monotonic()
        if 0 < done < total and now - told < interval:
            return
        told = now
        log_progress(label, done, total)
        tell({"progress": {"label": label, "done": done, "total": total}})

    return report
