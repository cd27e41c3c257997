"""What a person sees while the demo runs: bars and processes on a terminal, else plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from leasekit.demo.book import Book
from leasekit.demo.crew import Member

__all__ = ["LiveScreen", "Screen", "SilentScreen", "screen_for"]

REFRESHES_PER_SECOND = 8
STYLES = {"running": "green", "holding": "yellow", "stopped": "yellow", "killed": "red"}


class Screen(AbstractContextManager["Screen"]):
    """Plain lines: one for each thing that happens."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Something happened."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, book: Book, members: Sequence[Member], rows: int) -> None:
        """How things stand; called after every report."""

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
    """Bars and states that change in place, under the lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bars = Progress(
            TextColumn("{task.description:>10}"),
            BarColumn(bar_width=50),
            MofNCompleteColumn(),
            console=console,
        )
        self._tasks = [
            self._bars.add_task(name, total=None) for name in ("enqueued", "delivered", "acked")
        ]
        self._members: Sequence[Member] = ()
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        )

    def __enter__(self) -> Screen:
        self._live.__enter__()
        return self

    def show(self, book: Book, members: Sequence[Member], rows: int) -> None:
        self._members = members
        for task, done in zip(self._tasks, (book.enqueued, book.applied, book.acked), strict=True):
            self._bars.update(task, completed=done, total=rows)

    def _render(self) -> Group:
        states = Text("  ").join(
            Text.assemble(member.name, " ", (member.state, STYLES.get(member.state, "dim")))
            for member in self._members
        )
        return Group(self._bars, states)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, traceback)


def screen_for(console: Console) -> Screen:
    return LiveScreen(console) if console.is_terminal else Screen(console)
