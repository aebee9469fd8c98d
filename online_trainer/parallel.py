"""Several processes compute a step together: one decides, the others lend their processor or GPU.

The trainer is the first process; the only one that reads the log, steps, checkpoints and tells. A helper holds the base
and no state: with every step it gets the adapter as it is, and its part of the examples; gradients are summed by
torch.distributed (gloo; adapters are small). Whoever dies takes the step with them: nothing was committed, and the
trainer, started anew, takes it again. DistributedDataParallel would need each process to read and decide alike.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from online_trainer.config import TrainerConfig
from online_trainer.errors import HelperLost
from online_trainer.learner import NOBODY, Example, Helpers, Learner, Lesson, Task
from online_trainer.policy import load_policy

STEP_LIMIT: Final = timedelta(minutes=10)  # that the slowest process has, longer than the quickest
END_S: Final = 5.0


class Share(NamedTuple):
    """What a helper needs for its part of one step."""

    parts: list[list[Example]]
    task: Task
    adapter: dict[str, Tensor]
    anchor: dict[str, Tensor] | None


class Crew(Helpers):
    """The other processes of a trainer, numbered from 1."""

    def __init__(self, config: TrainerConfig) -> None:
        self.processes = config.processes
        store = TCPStore("127.0.0.1", 0, self.processes, is_master=True, wait_for_workers=False)
        context = get_context("spawn")
        self._lines: list[Connection] = []
        self.people: list[SpawnProcess] = []
        for rank in range(1, self.processes):
            own, theirs = context.Pipe()
            helper = context.Process(target=_help, args=(config, rank, store.port, theirs), daemon=True)
            helper.start()
            theirs.close()
            self._lines.append(own)
            self.people.append(helper)
        _join(store, 0, self.processes)

    def accumulate(self, learner: Learner, parts: Sequence[Sequence[Example]], task: Task) -> Lesson:
        """Add the gradients of all ``parts`` to those of ``learner``'s policy. Raises HelperLost."""
        shares = shared_out(parts, self.processes)
        if not any(shares[1:]):
            return learner.accumulate(parts, task)
        adapter, anchor = learner.policy.tensors(), learner.policy.anchor
        with _nobody_lost():
            for line, theirs in zip(self._lines, shares[1:], strict=True):
                share = Share([[_on_cpu(example) for example in part] for part in theirs], task, adapter, anchor)
                line.send_bytes(pickle.dumps(share))  # Connection.send would share memory, a file for each tensor
        own = learner.accumulate(shares[0], task)
        with _nobody_lost():
            _sum_gradients(learner)
            others: list[Lesson] = [line.recv() for line in self._lines]
        return _merged([own, *others])

    def close(self) -> None:
        """Send everybody home."""
        for line in self._lines:
            line.close()
        for helper in self.people:
            helper.join(END_S)
            if helper.is_alive():
                helper.kill()
                helper.join()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _nobody_lost() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        raise HelperLost(f"a process that helps with steps is gone ({error})") from error


def start(config: TrainerConfig) -> Helpers:
    """The helpers that ``config.processes`` asks for."""
    return Crew(config) if config.processes > 1 else NOBODY


def shared_out(parts: Sequence[Sequence[Example]], processes: int) -> list[list[list[Example]]]:
    """``parts`` for each process: the largest first, each to whoever has least (LPT, Graham 1969)."""
    shares: list[list[list[Example]]] = [[] for _ in range(processes)]
    loads = [0] * processes
    sizes = [sum(example.encoded.tokens.total for example in part) for part in parts]
    for index in sorted(range(len(parts)), key=lambda place: (-sizes[place], place)):
        least = loads.index(min(loads))
        shares[least].append(list(parts[index]))
        loads[least] += sizes[index]
    return shares


def _on_cpu(example: Example) -> Example:
    return example._replace(encoded=example.encoded._replace(hidden_TD=example.encoded.hidden_TD.cpu()))


def _on(device: torch.device, example: Example) -> Example:
    return example._replace(encoded=example.encoded._replace(hidden_TD=example.encoded.hidden_TD.to(device)))


def _join(store: Store, rank: int, processes: int) -> None:
    """Be number ``rank`` of the group, and take no more than one's part of the processor."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=STEP_LIMIT)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def _sum_gradients(learner: Learner) -> None:
    """Give process 0 the sum of all processes' gradients; the others' are gone afterwards."""
    parameters = learner.policy.parameters()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu() for p in parameters])
    dist.reduce(flat, dst=0)
    is_first, start = dist.get_rank() == 0, 0
    for parameter in parameters:
        summed = flat[start : start + parameter.numel()].view_as(parameter)
        parameter.grad = summed.to(parameter.device) if is_first else None
        start += parameter.numel()


def _merged(lessons: Sequence[Lesson]) -> Lesson:
    metrics: dict[str, float] = {}
    agreement: dict[str, float] = {}
    for lesson in lessons:
        agreement |= lesson.agreement
        for name, value in lesson.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    return Lesson(metrics, agreement)


def _help(config: TrainerConfig, rank: int, port: int, line: Connection) -> None:
    """A helper's life: until the trainer closes the line, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a whole process group's: the trainer says when its step is done
        signal.signal(number, signal.SIG_IGN)
    store = TCPStore("127.0.0.1", port, config.processes, is_master=False)
    _join(store, rank, config.processes)
    policy = load_policy(config, rank)
    learner = Learner(policy, config, lambda: 0.0)
    while True:
        try:
            share: Share = pickle.loads(line.recv_bytes())
        except (EOFError, OSError):
            return
        policy.load(share.adapter)
        policy.anchor_at(share.anchor)
        parts = [[_on(policy.device, example) for example in part] for part in share.parts]
        lesson = learner.accumulate(parts, share.task)
        _sum_gradients(learner)
        line.send(lesson)
