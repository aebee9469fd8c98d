"""What ``tiebreak demo`` knows and shows: one story, told live on a terminal and line by line elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deploy.picture import Mark, Point

SHOWN_EVENTS = 9


@dataclass
class Story:
    """What the demonstration knows so far; the display shows it, the summary judges it."""

    wanted: int
    started_s: float = field(default_factory=time.monotonic)
    clicks: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    stable: str = ""
    canary: str = ""
    base: str = ""
    variant: str = ""
    points: list[Point] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    seen: set[tuple[str, str, str]] = field(default_factory=set)
    undone: dict[str, str] = field(default_factory=dict)  # version → reason
    bad: str = ""
    rollback_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def say(self, text: str) -> None:
        self.events.append(f"{self.elapsed_s:5.0f} s  {text}")

    @property
    def is_bad_undone(self) -> bool:
        return bool(self.bad) and self.bad in self.undone

    @property
    def has_risen(self) -> bool:
        """More than half of the comparisons on all evaluation prompts are won, by a version that was trained."""
        return bool(self.points) and self.points[-1].win_rate > 0.5 and self.points[-1].version != self.base


def notice(story: Story, releases: dict[str, Any]) -> None:
    """Take over the routes of the policy's first variant, and tell every change once."""
    route = releases["routing"]["policies"]["chat"][0]
    story.stable, story.canary = route["stable"], route.get("canary", "")
    story.base, story.variant = route["base_version"], route["variant"]
    for entry in reversed(releases["history"]):
        key = (entry["at"], entry["version"], entry["state"])
        if key in story.seen or entry["variant"] != story.variant:
            continue
        story.seen.add(key)
        if entry["state"] == "stable":
            story.marks.append(Mark(story.clicks, story.elapsed_s, entry["version"]))
        if entry["state"] == "rolled_back":
            story.undone[entry["version"]] = entry["reason"]
        if entry["state"] in ("stable", "rolled_back", "rejected"):
            story.say(f"{entry['version']} → {entry['state']}: {entry['reason']}")


@asynccontextmanager
async def display(story: Story, console: Console) -> AsyncIterator[None]:
    """The page, four times a second on a terminal; elsewhere every new event as a line."""
    if not console.is_terminal:
        async with _lines(story, console):
            yield
        return
    with Live(console=console, get_renderable=lambda: _page(story), refresh_per_second=4):
        yield


@asynccontextmanager
async def _lines(story: Story, console: Console) -> AsyncIterator[None]:
    told = 0

    def tell() -> None:
        nonlocal told
        for event in story.events[told:]:
            console.print(event, soft_wrap=True)
        told = len(story.events)

    async def follow() -> None:
        while True:
            tell()
            await asyncio.sleep(0.2)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        tell()


def _page(story: Story) -> Group:
    table = Table.grid(padding=(0, 2))
    last = story.points[-1].win_rate if story.points else 0.5
    table.add_row(
        "clicks", ProgressBar(total=story.wanted, completed=story.clicks, width=40), f"{story.clicks}/{story.wanted}"
    )
    table.add_row("win rate", ProgressBar(total=1.0, completed=last, width=40), f"{last:.2f}")
    for name, key in (("steps", "train_steps"), ("trained pairs", "pairs_trained")):
        table.add_row(name, f"{story.numbers.get(key, 0):.0f}")
    table.add_row("stable", story.stable)
    table.add_row("canary", story.canary)
    events = Text.from_markup("\n".join(story.events[-SHOWN_EVENTS:]))
    return Group(Text(f"tiebreak demo · {story.elapsed_s:.0f} s", style="bold"), table, events)


def summarise(story: Story, out: Path, console: Console) -> int:
    """Say what happened; the exit status."""
    last = story.points[-1]
    console.print(f"\n{story.clicks} clicks, {story.numbers.get('train_steps', 0):.0f} steps, {story.elapsed_s:.0f} s")
    console.print(
        f"{_sign(story.has_risen)} win rate of {last.version} against the base on {last.prompts} new prompts: "
        f"{last.win_rate:.2f} (has to be above 0.50)"
    )
    if story.is_bad_undone:
        console.print(
            f"{_sign(True)} {story.bad} was rolled back {story.rollback_s:.0f} s after it was published: "
            f"{story.undone[story.bad]}"
        )
    else:
        console.print(f"{_sign(False)} the bad version was not rolled back")
    console.print(f"the learning curve: {out}")
    return 0 if story.has_risen and story.is_bad_undone else 1


def _sign(is_good: bool) -> str:
    return "[green]✓[/]" if is_good else "[red]✗[/]"
