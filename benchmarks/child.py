"""A process of its own, and the pipe to it, as the process that started it sees them."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from typing import Any


class Ended(RuntimeError):
    """The process died, which the message tells."""


class Late(RuntimeError):
    """The process took too long for what it was asked, and was ended."""


class Child:
    """A spawned process that runs `main(connection, *arguments)`. A daemon has no children of its
    own; it ends with the process that started it, or when that one's end of the pipe does."""

    def __init__(
        self, main: Callable[..., None], arguments: tuple[Any, ...], name: str, daemon: bool = True
    ) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA survives no fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=main, args=(theirs, *arguments), daemon=daemon, name=name
        )
        self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def send(self, what: object) -> None:
        """To whoever is there: that it died, the next `receive` says."""
        with contextlib.suppress(OSError):
            self._connection.send(what)

    def receive(self, seconds: float) -> Any:
        """What it sends next; Ended or Late where it sends nothing, and then it is no more."""
        try:
            if self._connection.poll(max(0.0, seconds)):
                return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            self.stop()
            raise Ended(f"its process died: {_reason(self._process.exitcode)}") from None
        self.stop()
        raise Late

    def stop(self, seconds: float = 0.0) -> None:
        """End it: at once, or when it did not end by itself in so many seconds."""
        if seconds:
            self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10)
        self._connection.close()


class Helper:
    """A child that answers one question at a time, started when it is first asked. Once it died or
    took too long it is started `again` with the next question, or never."""

    def __init__(
        self, main: Callable[..., None], arguments: tuple[Any, ...], name: str, limit_s: float,
        again: bool = False,
    ) -> None:  # fmt: skip
        self._given, self._limit_s, self._again = (main, arguments, name), limit_s, again
        self._child: Child | None = None
        self._over = False

    def asked(self, question: object) -> Any:
        """Its answer; Ended or Late where there is none."""
        if self._over:
            raise Ended("it died before")
        if self._child is None:
            self._child = Child(*self._given)
        self._child.send(question)
        try:
            return self._child.receive(self._limit_s)
        except (Ended, Late):
            self._child, self._over = None, not self._again
            raise

    def stop(self) -> None:
        """End the child; the next question starts another one."""
        if self._child is not None:
            self._child.stop()
            self._child = None


def _reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {-exitcode}"
    return f"exit status {exitcode}"
