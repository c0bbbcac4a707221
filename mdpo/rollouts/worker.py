"""A thread for the user's code: all methods of an environment's instance run in the same one, and its coroutines in one
loop, as a database connection or an HTTP client that it keeps wants."""

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mdpo.console import first_line


class Hung(Exception):
    """A function of the user's did not return in time."""


class Worker:
    """Runs one function at a time. After a Hung its thread may never be free again."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)  # one that never ends dies with the process
        self.thread.start()

    async def call(self, name: str, function: Callable[[], Any], seconds: float) -> Any:
        """What the function returns, or raises; of a coroutine, what it comes to. Raises Hung."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future = loop.create_future()
        self._jobs.put((function, future, loop))
        done, _ = await asyncio.wait([future], timeout=seconds)
        if not done:
            future.cancel()
            raise Hung(f"{name} did not return within {seconds:g} s")
        return future.result()

    def close(self) -> None:
        """Ends the thread when it is free."""
        self._jobs.put(None)

    def _work(self) -> None:
        with asyncio.Runner() as runner:
            while (job := self._jobs.get()) is not None:
                function, future, loop = job
                outcome: tuple[Any, BaseException | None]
                try:
                    result = function()
                    outcome = (runner.run(_awaited(result)) if inspect.isawaitable(result) else result, None)
                except BaseException as error:
                    outcome = (None, error)
                with suppress(RuntimeError):  # that loop has been closed since
                    loop.call_soon_threadsafe(_settle, future, *outcome)


async def _awaited(result: Any) -> Any:
    return await result


def _settle(future: asyncio.Future, result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        future.set_exception(error)
    else:  # SystemExit and the like of the user's code end the call, not the run
        future.set_exception(RuntimeError(f"{type(error).__name__}: {first_line(error)}"))
