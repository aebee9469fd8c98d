"""The ``tiebreak`` command: arguments in, an exit status out. What each command does is in the module it calls."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.table import Table

from deploy import config
from telemetry.config import TelemetryConfig
from telemetry.configuration import InvalidConfiguration
from telemetry.errors import StoreDamaged
from telemetry.people import KeysAway, KeyUnusable

OVERVIEW = """\
Your users break the tie; your model learns from it within seconds.

  tiebreak up                          start everything here, then open http://127.0.0.1:8000
  tiebreak status                      processes, channels, counts and lag
  tiebreak simulate --persona NAME     simulated users click, then compare the result with the base
  tiebreak releases list               what is stable, what is on trial, what happened and why
  tiebreak export --out pairs.jsonl    every verdict as a row that TRL trains on
  tiebreak lineage VERSION|VERDICT     what a version learned from; where a verdict went
  tiebreak card VERSION                its model card: data, settings, numbers, limits
  tiebreak datasets create             a data set that stays what it is; list, diff, export
  tiebreak train --dataset ID          learn a data set to its end, and publish one version of it
  tiebreak audit list | verify         who read, exported, changed or deleted what
  tiebreak dlq list                    log entries that could not be read, and whether they can be now
  tiebreak doctor                      is this machine fit, and if not, the mend
"""
EPILOG = """\
environment:
  TIEBREAK_STATE            folder of everything a deployment writes (default ~/.local/share/tiebreak)
  TIEBREAK_PORT             the router's port (default 8000)
  TIEBREAK_KEY              API key, where the router asks for one
  TIEBREAK_<TABLE>_<FIELD>  any field of the configuration, e.g. TIEBREAK_ROUTER_PAIR_RATIO=0.5
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it did what it says."""
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (InvalidConfiguration, StoreDamaged, KeyUnusable, KeysAway) as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config", type=Path, default=config.DEFAULT, metavar="FILE",
        help="the deployment's TOML (default: the embedded one, no broker, no GPU)",
    )  # fmt: skip
    shared.add_argument("--state", default="", metavar="DIR", help="folder of its state; wins over TIEBREAK_STATE")
    top = argparse.ArgumentParser(
        prog="tiebreak", description=OVERVIEW, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        text: str,
        parents: tuple[argparse.ArgumentParser, ...] = (shared,),
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=parents, help=text, description=_sentence(text))
        added.set_defaults(run=run)
        return added

    up = command("up", _up, "start the stack in the foreground; Ctrl-C stops all of it and nothing else")
    up.add_argument("--port", type=int, help="the router's port; wins over TIEBREAK_PORT")
    status = command("status", _status, "show processes, channels, counts and lag; exit 1 unless all is ready")
    status.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    _add_simulate(command("simulate", _simulate, "let simulated users click over HTTP, then compare stable with base"))
    _add_releases(command("releases", _releases, "list releases, or order a promotion or a rollback", ()), shared)
    export = command("export", _export, "write the verdicts as TRL's conversational preference rows (JSON lines)")
    export.add_argument("--out", required=True, metavar="FILE", help="the file to write, - for standard output")
    lineage = command("lineage", _lineage, "show a version's forebears and verdicts, or what became of one verdict")
    lineage.add_argument("name", help="a version (v000012-1a2b3c4d), or a preference's id")
    lineage.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    card = command("card", _card, "write a version's model card: what it learned from, how, and how it did")
    card.add_argument("name", help="a version (v000012-1a2b3c4d)")
    _add_dlq(command("dlq", _dlq, "list, show or replay entries of the event log that could not be read", ()), shared)
    _add_datasets(command("datasets", _datasets, "make, list, compare or export versioned data sets", ()), shared)
    train = command("train", _train, "learn a data set to its end, and publish one version for release")
    train.add_argument("--dataset", required=True, metavar="ID", help="as `datasets list` shows it, or its beginning")
    train.add_argument("--passes", type=_positive, default=4, metavar="N", help="steps of each verdict (default 4)")
    train.add_argument(
        "--if-drifted", nargs=2, default=None, metavar=("FROM", "NATS"),
        help="only if people prefer something else there than in data set FROM: KL of a feature above NATS (0.2, say)",
    )  # fmt: skip
    _add_labels(command("labels", _labels, "give pairs to labelers, and take their labels in", ()), shared)
    text = "show who read, exported, changed or deleted what, or prove that trail whole"
    _add_audit(command("audit", _audit, text, ()), shared)
    doctor = command(
        "doctor", _doctor, "check this machine, with a mend for every failure; exit 1 if a stack cannot start"
    )
    doctor.add_argument("--port", type=int, help="the router's port; wins over TIEBREAK_PORT")
    demo = command("demo", _demo, "show the whole circle with simulated users on a state of its own, then a rollback")
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo.png"), metavar="FILE", help="the learning curve's picture"
    )
    return top


def _add_simulate(simulate: argparse.ArgumentParser) -> None:
    simulate.add_argument("--persona", default="", metavar="NAME", help="whose taste; without it the names are listed")
    simulate.add_argument("--clicks", type=int, default=40, metavar="N", help="verdicts to give (default 40)")
    simulate.add_argument("--concurrency", type=int, default=4, metavar="K", help="users at once (default 4)")
    simulate.add_argument("--seed", type=int, default=0, help="order of prompts and doubts of the persona")
    simulate.add_argument("--url", default="", help="the gateway (default: this deployment's)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return int(text)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _add_releases(releases: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    actions = releases.add_subparsers(title="actions", metavar="list|promote|rollback", required=True, dest="action")
    text = "show the channels of every variant, and the latest changes with their reasons"
    actions.add_parser("list", parents=[shared], help=text, description=_sentence(text))
    for name, text in (
        ("promote", "queue a version for release; the guards still decide, unless --force"),
        ("rollback", "take a version out: stable goes back to the one before it, at once"),
    ):
        action = actions.add_parser(name, parents=[shared], help=text, description=_sentence(text))
        action.add_argument("version", help="e.g. v000012-1a2b3c4d")
        action.add_argument("--force", action="store_true", help="go past the guards; they keep watching afterwards")
        action.add_argument("--reason", default="", help="kept in the history")


def _add_dlq(dlq: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    actions = dlq.add_subparsers(title="actions", metavar="list|show|replay", required=True, dest="action")
    for name, text in (
        ("list", "show every dead letter: where it lay, why it could not be read, what can be done"),
        ("show", "write one dead letter's entry as it is to standard output"),
        ("replay", "put dead letters that this build can read back into the log; each counts once"),
    ):
        action = actions.add_parser(name, parents=[shared], help=text, description=_sentence(text))
        if name != "list":
            every = "; none: all that can be read" if name == "replay" else ""
            action.add_argument(
                "ids", nargs="*" if every else 1, metavar="ID", help=f"as `list` shows it, or its beginning{every}"
            )


def _add_datasets(datasets: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    from telemetry.datasets import STRATA

    actions = datasets.add_subparsers(
        title="actions", metavar="create|list|diff|drift|export", required=True, dest="action"
    )
    text = "make a data set of the verdicts that the store holds now; prints its id, which is always the same set"
    create = actions.add_parser("create", parents=[shared], help=text, description=_sentence(text))
    for name in ("policy", "cohort", "cluster", "source", "labeler", "outcome", "variant", "version"):
        one = " (one of the two sides)" if name.startswith("v") else ""
        create.add_argument(f"--{name}", default="", help=f"only verdicts of this {name}{one}")
    create.add_argument("--since", default="", metavar="TIME", help="only those given then or later (ISO 8601)")
    create.add_argument("--until", default="", metavar="TIME", help="only those given before")
    create.add_argument("--against", default="", help="only pairs whose other side is this variant")
    create.add_argument("--sample", type=_positive, default=0, metavar="N", help="of these so many, at random")
    create.add_argument("--per", choices=STRATA, help="in the sample as many of each of these, as far as there are any")
    create.add_argument("--seed", type=int, default=0, help="another one is another sample (default 0)")
    create.add_argument("--note", default="", help="kept with it")
    text = "show every data set"
    listing = actions.add_parser("list", parents=[shared], help=text, description=_sentence(text))
    listing.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    text = "show which verdicts only one of two data sets has; exit 1 if there are any"
    diff = actions.add_parser("diff", parents=[shared], help=text, description=_sentence(text))
    diff.add_argument("ids", nargs=2, metavar="ID", help="as `list` shows it, or its beginning")
    text = "show in what people prefer something else in one data set than in another"
    moved = actions.add_parser("drift", parents=[shared], help=text, description=_sentence(text))
    moved.add_argument("ids", nargs=2, metavar="ID", help="the earlier one, then the later one")
    text = "write a data set's verdicts, one JSON a line"
    export = actions.add_parser("export", parents=[shared], help=text, description=_sentence(text))
    export.add_argument("ids", nargs=1, metavar="ID", help="as `list` shows it, or its beginning")
    export.add_argument("--format", choices=["trl", "events"], default="trl", help="TRL's rows, or whole events")
    export.add_argument("--out", required=True, metavar="FILE", help="the file to write, - for standard output")


def _add_labels(labels: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    from telemetry.labeling import FORMATS

    actions = labels.add_subparsers(title="actions", metavar="export|import|view", required=True, dest="action")
    text = "write the newest pairs that nobody judged as tasks for labelers (JSON)"
    export = actions.add_parser("export", parents=[shared], help=text, description=_sentence(text))
    export.add_argument("--out", required=True, metavar="FILE", help="the file to write, - for standard output")
    export.add_argument("--pairs", type=_positive, default=100, metavar="N", help="at most so many (default 100)")
    export.add_argument("--with-judged", action="store_true", help="also pairs that have a verdict")
    text = "record what labelers chose; a file imported twice counts once"
    taking = actions.add_parser("import", parents=[shared], help=text, description=_sentence(text))
    taking.add_argument("file", type=Path, metavar="FILE", help="what the tool exported (JSON)")
    taking.add_argument("--source", choices=["labeler", "judge", "import"], default="labeler", help="whose labels")
    taking.add_argument("--instructions", default="", metavar="VERSION", help="of the instructions that they had")
    for action in (export, taking):
        action.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"(default {FORMATS[0]})")
    text = "print Label Studio's labeling interface for these tasks"
    actions.add_parser("view", parents=[shared], help=text, description=_sentence(text))


def _add_audit(audit: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    actions = audit.add_subparsers(title="actions", metavar="list|verify", required=True, dest="action")
    text = "show every entry of the audit trail"
    listing = actions.add_parser("list", parents=[shared], help=text, description=_sentence(text))
    listing.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    text = "find any entry that was changed, removed or reordered; exit 1 if there is one"
    actions.add_parser("verify", parents=[shared], help=text, description=_sentence(text))


def _up(options: argparse.Namespace) -> int:
    from deploy.launch import up

    return up(options.config, state=options.state, port=options.port)


def _status(options: argparse.Namespace) -> int:
    from deploy.status import overview, read_status
    from deploy.view import console, show_status

    deployment = config.load(options.config, state=options.state)
    stack = read_status(deployment.state)
    if stack is None:
        print(f"tiebreak: no stack ever ran on {deployment.state}; `tiebreak up` starts one", file=sys.stderr)
        return 1
    found = overview(stack, deployment.telemetry.store_root, key=_key())
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        show_status(found, console())
    return 0 if stack.state == "ready" else 1


def _simulate(options: argparse.Namespace) -> int:
    from deploy.api import ApiError
    from deploy.personas import PERSONAS
    from deploy.simulate import simulate

    if options.persona not in PERSONAS:
        unknown = f"no persona {options.persona!r}; " if options.persona else ""
        print(f"tiebreak: {unknown}choose one with --persona: {', '.join(sorted(PERSONAS))}", file=sys.stderr)
        return 2
    try:
        return asyncio.run(
            simulate(
                options.url or _url(options),
                options.persona,
                options.clicks,
                users=options.concurrency,
                seed=options.seed,
                key=_key(),
            )
        )
    except ApiError as error:
        return _say_unreachable(error)


def _releases(options: argparse.Namespace) -> int:
    from deploy.api import Api, ApiError
    from deploy.simulate import session
    from deploy.view import console, show_releases

    async def act() -> None:
        async with session() as http:
            api = Api(http, _url(options), key=_key())
            if options.action == "list":
                show_releases(await api.releases(), console())
                return
            await api.order(options.action, options.version, force=options.force, reason=options.reason)
            print(f"{options.action} of {options.version} is ordered; `tiebreak releases list` shows what became of it")

    try:
        asyncio.run(act())
    except ApiError as error:
        return _say_unreachable(error)
    return 0


def _export(options: argparse.Namespace) -> int:
    from deploy import audit
    from deploy.export import export
    from telemetry.config import open_sealer
    from telemetry.event_log import LogUnavailable
    from telemetry.store import trl_rows, verdicts

    telemetry = config.load(options.config, state=options.state).telemetry
    try:
        audit.record(telemetry, "exported", "preferences", out=options.out)
    except LogUnavailable as error:
        print(f"tiebreak: nothing is exported that the audit trail does not know of: {error}", file=sys.stderr)
        return 1
    count = export(trl_rows(verdicts(telemetry.store_root, open_sealer(telemetry))), options.out)
    print(f"{count} preferences", file=sys.stderr)
    return 0


def _datasets(options: argparse.Namespace) -> int:
    from deploy import datasets
    from deploy.view import console
    from telemetry.datasets import DatasetChanged, DatasetUnknown
    from telemetry.event_log import LogUnavailable

    telemetry = config.load(options.config, state=options.state).telemetry
    try:
        match options.action:
            case "create":
                return datasets.create(telemetry, options)
            case "list":
                return datasets.show_all(telemetry, console(), as_json=options.json)
            case "diff":
                return datasets.diff(telemetry, *options.ids)
            case "drift":
                return datasets.drift(telemetry, options.ids[0], options.ids[1], console())
        return datasets.export_one(telemetry, options.ids[0], options.format, options.out)
    except (DatasetUnknown, DatasetChanged, LogUnavailable, ValueError) as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 2


def _train(options: argparse.Namespace) -> int:
    from deploy.models import ModelUnavailable, prepare_model
    from deploy.train import train
    from online_trainer.config import TrainerConfig
    from online_trainer.errors import TrainerError
    from telemetry import logs
    from telemetry.configuration import convert_table
    from telemetry.datasets import DatasetChanged, DatasetUnknown
    from telemetry.event_log import LogUnavailable

    logs.configure("train")
    try:
        deployment = config.load(options.config, state=options.state)
        if options.if_drifted and not _has_drifted(deployment.telemetry, options.dataset, *options.if_drifted):
            return 0
        deployment = config.prepared(deployment, prepare_model)
        trainer = convert_table(
            deployment.document["trainer"], "trainer", TrainerConfig, os.environ, where=str(options.config)
        )
        return train(deployment.telemetry, trainer, options.dataset, passes=options.passes)
    except (DatasetUnknown, DatasetChanged, LogUnavailable, ModelUnavailable, TrainerError, ValueError) as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 1


def _has_drifted(telemetry: TelemetryConfig, dataset: str, before: str, nats: str) -> bool:
    from deploy.datasets import drifted

    feature, most = next(iter(drifted(telemetry, before, dataset).divergences.items()))
    print(f"{feature}: KL {most:.3f} nats from {before}", file=sys.stderr)
    return most > float(nats)


def _labels(options: argparse.Namespace) -> int:
    from deploy import labels
    from telemetry.event_log import LogUnavailable
    from telemetry.labeling import LABEL_STUDIO_VIEW, InvalidLabels

    if options.action == "view":
        print(LABEL_STUDIO_VIEW, end="")
        return 0
    telemetry = config.load(options.config, state=options.state).telemetry
    try:
        if options.action == "export":
            return labels.pairs_out(
                telemetry, options.format, options.out, most=options.pairs, with_judged=options.with_judged
            )
        return labels.labels_in(
            telemetry, options.format, options.file, source=options.source, instructions=options.instructions
        )
    except (InvalidLabels, LogUnavailable, OSError) as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 1


def _audit(options: argparse.Namespace) -> int:
    from deploy import audit
    from deploy.view import console

    telemetry = config.load(options.config, state=options.state).telemetry
    if options.action == "verify":
        return audit.verify(telemetry)
    return audit.show(telemetry, console(), as_json=options.json)


def _card(options: argparse.Namespace) -> int:
    from deploy import card
    from telemetry.lineage import NotRecorded
    from telemetry.manifest import UntrustedVersion
    from telemetry.process import signing_key

    telemetry = config.load(options.config, state=options.state).telemetry
    try:
        manifest = card.find(telemetry.state_path / "versions", options.name, signing_key(telemetry.state_path))
    except (NotRecorded, UntrustedVersion) as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 1
    print(card.card(options.name, manifest, telemetry.store_root), end="")
    return 0


def _lineage(options: argparse.Namespace) -> int:
    from deploy import audit, lineage
    from deploy.view import console
    from telemetry.event_log import LogUnavailable
    from telemetry.lineage import NotRecorded
    from telemetry.manifest import VERSION_PATTERN

    telemetry = config.load(options.config, state=options.state).telemetry
    try:
        if not VERSION_PATTERN.match(options.name):  # a person's verdict
            audit.record(telemetry, "read", f"verdict {options.name}")
        if options.json:
            found = lineage.document(telemetry.store_root, options.name)
            print(msgspec.json.format(msgspec.json.encode(found)).decode())
        else:
            lineage.show(telemetry.store_root, options.name, console())
    except (NotRecorded, LogUnavailable) as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 1
    return 0


def _dlq(options: argparse.Namespace) -> int:
    from deploy import dlq
    from deploy.view import console
    from telemetry.dead_letters import LetterUnknown
    from telemetry.event_log import LogUnavailable

    telemetry = config.load(options.config, state=options.state).telemetry
    try:
        if options.action == "list":
            return dlq.show_all(telemetry, console())
        if options.action == "show":
            return dlq.show_one(telemetry, options.ids[0])
        return dlq.replay_some(telemetry, options.ids)
    except (LetterUnknown, LogUnavailable) as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 1


def _doctor(options: argparse.Namespace) -> int:
    from deploy.doctor import examine
    from deploy.view import console

    table = Table(box=None, show_header=False)
    findings = list(examine(options.config, state=options.state, port=options.port))
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        mend = f"\n→ {finding.mend}" if finding.mend else ""
        table.add_row(f"[{colours[finding.verdict]}]{finding.verdict}[/]", finding.name, finding.detail + mend)
    console().print(table)
    return 1 if any(finding.verdict == "fail" for finding in findings) else 0


def _demo(options: argparse.Namespace) -> int:
    from deploy.demo import demo

    return demo(options.config, options.out)


def _url(options: argparse.Namespace) -> str:
    """Where this deployment's router listens: what its launcher said, else what the configuration says."""
    from deploy.status import read_status

    deployment = config.load(options.config, state=options.state)
    running = read_status(deployment.state)
    return running.url if running is not None else deployment.stack.url


def _key() -> str:
    return os.environ.get("TIEBREAK_KEY", "")


def _say_unreachable(error: Exception) -> int:
    print(f"tiebreak: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
