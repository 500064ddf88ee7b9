"""What is running and how long it will take, on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """A bar where tqdm is installed, a line now and then where it is not or nobody watches."""

    def __init__(self, jobs: int, budget: float) -> None:
        self._jobs, self._done = jobs, 0
        self._start, self._budget = time.monotonic(), budget
        self._told = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=jobs, file=sys.stderr, dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar:20}| {desc}",
            )  # fmt: skip

    def left(self) -> float:
        """Seconds until the end: of the jobs at the pace so far, or of the budget."""
        spent = time.monotonic() - self._start
        budget = max(0.0, self._budget - spent)
        if not self._done:
            return budget
        return min(budget, spent / self._done * (self._jobs - self._done))

    def running(self, what: object) -> None:
        left = f"{self.left():.0f} s left"
        if self._bar is not None:
            self._bar.set_description_str(f"{left}: {what}")
        elif time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            print(f"{self._done}/{self._jobs}, {left}: {what}", file=sys.stderr, flush=True)

    def done(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
