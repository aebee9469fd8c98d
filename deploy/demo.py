"""``tiebreak demo``: the whole circle in under eight minutes, on a stack of its own.

Simulated users click by HTTP; the page shows clicks, steps, versions and the win rate against the base on prompts
that nobody trained on. Then a version that is signed, well-formed and bad is forced to stable, and the guards have to
take it back. It succeeds (exit 0) only if both hold: after all clicks stable wins more than half of its comparisons
with the base and is not the base; and the bad version was rolled back while users were being answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from rich.console import Console

from deploy import config, machine
from deploy.api import Api, ApiError
from deploy.personas import EVALUATION_PROMPTS, TRAINING_PROMPTS
from deploy.picture import Point, draw
from deploy.sabotage import publish_bad_version
from deploy.simulate import Clicks, Comparison, compare, give_clicks, session
from deploy.stage import Story, display, notice, summarise
from deploy.status import fetch, numbers, read_status
from deploy.supervisor import child_setup

PERSONA = "speaks_to_you"
CLICKS = 150
USERS = 6
MAX_TOKENS = 32
LOOK_EVERY = 50  # clicks between two looks at the win rate, and the prompts of a look in between
LOOK_PROMPTS = 20
SETTLE_LIMIT_S, QUIET_S = 15.0, 10.0  # for the last versions to be released; sooner when no canary was seen lately
ROLLBACK_LIMIT_S = 100.0
POLL_S = 0.7


def demo(path: Path, out: Path) -> int:
    """Run it; 0 only if the win rate rose and the bad version was rolled back."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    console = Console()
    story = Story(CLICKS)
    story.say("starting the stack")
    with tempfile.TemporaryDirectory(prefix="tiebreak-demo-") as state, _stack(path, state) as url:
        try:
            asyncio.run(_tell(story, url, config.load(path, state=state), console))
        except (ApiError, TimeoutError) as error:
            console.print(f"[red]the demonstration failed: {error}[/]")
            _show_logs(Path(state), console)
            return 1
    title = f"{story.clicks} clicks of a user who likes answers that say “you”"
    draw(story.points, story.marks, title, out)
    return summarise(story, out, console)


@contextmanager
def _stack(path: Path, state: str) -> Iterator[str]:
    """A whole stack in a process of its own, on a free port; stopped at the end."""
    port = machine.free_port()
    environ = {**os.environ, "TIEBREAK_PORT": str(port), "TIEBREAK_STATE": state}
    command = [sys.executable, "-m", "deploy.cli", "up", "--config", str(path)]
    with (Path(state) / "up.log").open("wb") as log:
        launcher = subprocess.Popen(command, env=environ, stdout=log, stderr=log, preexec_fn=child_setup())
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait()


async def _tell(story: Story, url: str, deployment: config.Deployment, console: Console) -> None:
    """Start, click, compare, break, recover."""
    async with session() as http, display(story, console):
        await _wait_until_ready(deployment)
        api = Api(http, url)
        async with _watching(api, story, deployment.state):
            story.say("the stack answers; users begin to click")
            await _learn(api, story)
            await _break_and_recover(api, story, deployment)


async def _wait_until_ready(deployment: config.Deployment) -> None:
    for _ in range(int((deployment.stack.ready_timeout_s + 30.0) / POLL_S)):
        status = read_status(deployment.state)
        if status is not None and status.state == "ready":
            return
        if status is not None and status.state == "stopped":
            break
        await asyncio.sleep(POLL_S)
    said = (deployment.state / "up.log").read_text(errors="replace")
    raise TimeoutError(f"the stack does not answer:\n{said[-2000:]}")


async def _learn(api: Api, story: Story) -> None:
    """All clicks, with a look at the win rate now and then, and a long one once all of them are live."""
    story.points.append(Point(0, story.elapsed_s, 0.5, len(EVALUATION_PROMPTS), story.base))  # stable is the base
    base_answers: dict[str, str] = {}

    async def look(prompts: Sequence[str]) -> None:
        if story.stable == story.base:
            return  # nothing was released yet: equal by definition
        compared = compare(api, PERSONA, prompts, users=USERS, max_tokens=MAX_TOKENS, base_answers=base_answers)
        _note(story, await compared)

    def count(_: Clicks) -> None:
        story.clicks += 1

    for goal in range(LOOK_EVERY, CLICKS + 1, LOOK_EVERY):
        part = Clicks(LOOK_EVERY)
        await give_clicks(api, PERSONA, part, users=USERS, seed=goal, max_tokens=MAX_TOKENS, on_click=count)
        if goal < CLICKS:
            await look(EVALUATION_PROMPTS[:LOOK_PROMPTS])
    await _settle(api, story)
    await look(EVALUATION_PROMPTS)


def _note(story: Story, result: Comparison) -> None:
    count = result.wins + result.losses + result.ties
    story.points.append(Point(story.clicks, story.elapsed_s, result.win_rate, count, result.version))
    story.say(
        f"[bold]win rate {result.win_rate:.2f}[/] of {result.version} against the base after {story.clicks} "
        f"clicks ({result.wins} won, {result.losses} lost, {result.ties} tied)"
    )


async def _settle(api: Api, story: Story) -> None:
    """Let the last version's trial end: answers go on, clicks do not."""
    story.say("no more clicks; the last versions are released, or not")
    began = quiet_since = time.monotonic()
    async with _traffic(api):
        while time.monotonic() - began < SETTLE_LIMIT_S and time.monotonic() - quiet_since < QUIET_S:
            if story.canary:
                quiet_since = time.monotonic()
            await asyncio.sleep(POLL_S)


async def _break_and_recover(api: Api, story: Story, deployment: config.Deployment) -> None:
    """Force a bad version to stable and wait until the guards have taken it back."""
    good = story.stable
    if good == story.base:
        story.say("[red]no version was ever released: there is nothing to spoil[/]")
        return
    story.bad = await asyncio.to_thread(publish_bad_version, deployment.telemetry, story.variant, good)
    story.say(f"[red]{story.bad}: random weights, signed and published; forced to stable[/]")
    began = time.monotonic()
    await asyncio.sleep(3.0)  # the controller has to hear of it before the order
    await api.order("promote", story.bad, force=True, reason="the demonstration's bad version")
    async with _traffic(api):
        while not story.is_bad_undone and time.monotonic() - began < ROLLBACK_LIMIT_S:
            await asyncio.sleep(POLL_S)
    story.rollback_s = time.monotonic() - began


@asynccontextmanager
async def _traffic(api: Api) -> AsyncIterator[None]:
    """A few users who ask, as on any day."""

    async def one_user(number: int) -> None:
        for prompt in itertools.cycle(TRAINING_PROMPTS[number :: USERS // 2]):
            with contextlib.suppress(ApiError):
                await api.ask(prompt, max_tokens=MAX_TOKENS)
            await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one_user(number)) for number in range(USERS // 2)]
        yield
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def _watching(api: Api, story: Story, state: Path) -> AsyncIterator[None]:
    """Keep the story's versions and numbers current."""

    async def watch() -> None:
        while True:
            with contextlib.suppress(ApiError):
                notice(story, await api.releases())
            story.numbers = await asyncio.to_thread(_trainer_numbers, state)
            await asyncio.sleep(POLL_S)

    notice(story, await api.releases())
    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


def _trainer_numbers(state: Path) -> dict[str, float]:
    status = read_status(state)
    urls = {process.name: process.metrics_url for process in status.processes} if status else {}
    page = fetch(urls.get("trainer", "")) if urls.get("trainer") else None
    return numbers({"trainer": page.decode()}) if page else {}


def _show_logs(state: Path, console: Console) -> None:
    """The end of every process's log: the state folder is about to go."""
    for log in sorted((state / "logs").glob("*.log")):
        console.print(f"[bold]{log.name}[/]\n{log.read_text(errors='replace')[-1500:]}", markup=False)
