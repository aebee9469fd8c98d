"""What the weights descend from, and which verdicts they have learned since: the truth that receipts rely on.

Published versions form a chain back to the base. When the release refuses one of them, the weights go back to
a sound one, and what was learned only after it is lost with them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

import msgspec

from online_trainer.ingest import Verdict

BASE_SEQUENCE = "v000000-"
MAX_ANCESTORS = 200  # versions that a fall-back can go back over


class Taught(msgspec.Struct, frozen=True):
    """A published version that the weights descend from, and what it learned since its parent."""

    version: str
    preference_ids: tuple[str, ...]
    is_met: bool = False  # by users: the release found nothing wrong with it before


class Lineage(msgspec.Struct, frozen=True):
    """Immutable; every change is a new lineage."""

    parent: str  # version that the weights descend from
    ancestors: tuple[Taught, ...] = ()  # up to the parent, newest last, bounded; the base is not among them
    steps: int = 0  # taken since the parent, those on earlier verdicts alone included
    preference_ids: tuple[str, ...] = ()  # learned since the parent
    oldest_verdict_at: datetime | None = None  # of those
    retreats: int = 0  # fall-backs in a row since users last met one of these versions

    def descends_from(self, version: str) -> bool:
        """Whether the present weights come from a published ``version``."""
        return any(taught.version == version for taught in self.ancestors)

    def distance(self, versions: Collection[str]) -> int:
        """How many of our versions came after the newest of ``versions``.

        After the base, and after what is older than all that is remembered, all; after strangers' none.
        """
        names = [taught.version for taught in self.ancestors]
        places = [names.index(version) + 1 for version in versions if version in names]
        if places:
            return len(names) - max(places)
        # Sequence numbers have six digits, so that names compare as they followed each other.
        is_older = all(version.startswith(BASE_SEQUENCE) or version < min(names, default="") for version in versions)
        return len(names) * is_older

    def before(self, version: str) -> str:
        """The published ancestor that ``version`` was trained from; "" where there is none of ours."""
        names = [taught.version for taught in self.ancestors]
        at = names.index(version) if version in names else 0
        return names[at - 1] if at else ""

    def learned(self, batch: Sequence[Verdict]) -> Lineage:
        """After a step on the new verdicts ``batch``; there may be none, where earlier ones were gone through again."""
        times = [verdict.occurred_at for verdict in batch]
        if self.oldest_verdict_at is not None:
            times.append(self.oldest_verdict_at)
        ids = self.preference_ids + tuple(verdict.preference_id for verdict in batch)
        oldest = min(times, default=None)
        return msgspec.structs.replace(self, steps=self.steps + 1, preference_ids=ids, oldest_verdict_at=oldest)

    def published(self, version: str) -> Lineage:
        """After ``version`` was made of the present weights."""
        taught = Taught(version, self.preference_ids)
        return Lineage(version, (*self.ancestors, taught)[-MAX_ANCESTORS:], retreats=self.retreats)

    def accepted(self, version: str) -> Lineage:
        """After users met ``version``, one of these."""
        replace = msgspec.structs.replace
        marked = (replace(each, is_met=True) if each.version == version else each for each in self.ancestors)
        return replace(self, ancestors=tuple(marked), retreats=0)

    def started_anew(self) -> Lineage:
        """After a fall-back to where the ones before it had not gone to: none of them counts there."""
        return msgspec.structs.replace(self, retreats=0)

    def met_before(self, version: str) -> str:
        """The newest ancestor of ``version`` that users have met; "" where they have met none of ours."""
        names = [taught.version for taught in self.ancestors]
        older = self.ancestors[: names.index(version)] if version in names else ()
        return next((taught.version for taught in reversed(older) if taught.is_met), "")

    def fallen_back(self, version: str) -> tuple[Lineage, tuple[str, ...]]:
        """After the weights were replaced by those of ``version`` (an ancestor, the base or somebody else's).

        Also the verdicts that were learned only by the weights thrown away.
        """
        names = [taught.version for taught in self.ancestors]
        kept = names.index(version) + 1 if version in names else 0
        lost = [name for taught in self.ancestors[kept:] for name in taught.preference_ids]
        fallen = Lineage(version, self.ancestors[:kept], retreats=self.retreats + 1)
        return fallen, (*lost, *self.preference_ids)
