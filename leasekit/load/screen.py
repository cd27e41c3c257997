"""What a person sees while a load test runs: one line that changes on a terminal, else one a second."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.status import Status

from leasekit.load.messages import Progress

__all__ = ["LiveScreen", "Screen", "SilentScreen", "screen_for"]

LINE_EVERY_S = 1.0


class Screen(AbstractContextManager["Screen"]):
    """Plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began_s = self._last_s = time.monotonic()
        self._last_operations = 0
        self._phase = ""

    def say(self, text: str) -> None:
        """Something happened."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, phase: str) -> None:
        self._phase = phase
        self._began_s = self._last_s = time.monotonic()

    def show(self, progress: Progress) -> None:
        """How things stand, of all processes together."""
        now_s = time.monotonic()
        if now_s - self._last_s < LINE_EVERY_S:
            return
        rate = (progress.operations - self._last_operations) / (now_s - self._last_s)
        self._last_s, self._last_operations = now_s, progress.operations
        self._draw(
            f"{self._phase} {now_s - self._began_s:4.0f} s: {progress.operations:,} operations "
            f"({rate:,.0f}/s), {progress.enqueued - progress.acked:,} rows in line, "
            f"{progress.failed_calls:,} failed calls, {progress.reconnects} reconnects"
        )

    def _draw(self, line: str) -> None:
        self.say(line)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


class SilentScreen(Screen):
    """Nothing at all."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))


class LiveScreen(Screen):
    """A line that changes in place, under what is said."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._status = Status("", console=console)

    def __enter__(self) -> Screen:
        self._status.start()
        return self

    def _draw(self, line: str) -> None:
        self._status.update(line)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._status.stop()


def screen_for(console: Console) -> Screen:
    return LiveScreen(console) if console.is_terminal else Screen(console)
