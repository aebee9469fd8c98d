"""How far each person's verdicts can be relied on: one flip rate a person, in the manner of Dawid and Skene (1979).

A verdict that the policy had not seen agrees with it with probability p = σ(d). It was flipped with the posterior
probability of its giver's flip rate; summed up, that is the next flip rate. Whoever contradicts what all others taught
loses weight, and gets it back by agreeing. While the policy knows little, p is near one half, and nobody loses any.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

PRIOR_FLIPS, PRIOR_VERDICTS = 1.0, 10.0  # what is taken for granted of somebody new: one flip in ten
MOST_PEOPLE = 5_000  # those whose last verdict is oldest are forgotten


class Record(msgspec.Struct, frozen=True):
    """What a person's verdicts have shown."""

    name: str
    verdicts: float = 0.0
    flips: float = 0.0  # expected

    @property
    def flip_rate(self) -> float:
        """Posterior mean."""
        return (self.flips + PRIOR_FLIPS) / (self.verdicts + PRIOR_VERDICTS)


class Annotators:
    """Everybody's record, most recent last."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records = {record.name: record for record in records}

    def records(self) -> tuple[Record, ...]:
        """For the checkpoint."""
        return tuple(self._records.values())

    def weight(self, name: str) -> float:
        """0 for who flips half of the time or more, 1 for who is as good as somebody new or better."""
        usual = PRIOR_FLIPS / PRIOR_VERDICTS
        rate = self._records.get(name, Record(name)).flip_rate
        return min(1.0, max(0.0, (1 - 2 * rate) / (1 - 2 * usual)))

    def saw(self, name: str, agreement: float) -> None:
        """A new verdict of this person, and how probable the policy found it before it learned from it."""
        record = self._records.pop(name, Record(name))
        flipped = record.flip_rate * (1 - agreement)
        flipped /= flipped + (1 - record.flip_rate) * agreement
        self._records[name] = Record(name, record.verdicts + 1, record.flips + flipped)
        if len(self._records) > MOST_PEOPLE:
            del self._records[next(iter(self._records))]

    def forget(self, name: str) -> None:
        """This person is erased."""
        self._records.pop(name, None)
