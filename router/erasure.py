"""``DELETE /v1/users/{user}``: a person is forgotten the moment that their key is gone, everywhere at once.

First the key, then everything else: what a crash leaves undone (the event, consent) is done when it is asked again.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime

import msgspec
from redis.exceptions import RedisError

from router.admission import Caller
from router.consent import ConsentBook
from router.errors import Conflict, Unavailable
from router.ledger import Ledger
from telemetry.errors import StoreDamaged
from telemetry.events import PersonErased
from telemetry.sealing import Sealer

log = logging.getLogger(__name__)


class Erasure(msgspec.Struct, frozen=True):
    """A person is forgotten. ``versions`` had learned from them, as far as the store knows by now."""

    user: str  # pseudonym
    erased_at: datetime
    had_data: bool
    versions: tuple[str, ...]
    object: str = "erasure"


class Eraser:
    """Forgets people."""

    def __init__(self, sealer: Sealer, book: ConsentBook, ledger: Ledger, store_root: str) -> None:
        self._sealer, self._book, self._ledger, self._store_root = sealer, book, ledger, store_root

    async def erase(self, person: str, caller: Caller) -> Erasure:
        """Delete the person's key and consent, and say so in the log. Raises Conflict, or Unavailable: try again."""
        keys = self._sealer.keys
        if keys is None or not self._sealer.is_sealing:
            message = "Texts are not encrypted here ([telemetry] encryption is off): no person can be forgotten."
            raise Conflict(message, code="erasure_not_configured")
        try:
            had_data = await asyncio.to_thread(keys.erase, person)
            await self._book.forget(person)
        except (RedisError, OSError) as error:
            message = "Not all could be erased now; the same request again does the rest."
            raise Unavailable(message, code="state_unavailable", retry_after_s=1.0) from error
        event = PersonErased(user=person, actor=caller.name or "operator")
        await self._ledger.audit(caller, "erased", person, had_data=str(had_data).lower())
        await self._ledger.durable(event)
        versions = await asyncio.to_thread(learned_from, self._store_root, person)
        return Erasure(person, event.occurred_at, had_data, versions)


def learned_from(store_root: str, person: str) -> tuple[str, ...]:
    """The versions that know a verdict of the person; none where the store cannot be read."""
    from telemetry.lineage import Lineages, NotRecorded  # Arrow and delta-rs: for this alone

    try:
        return Lineages(store_root).of_person(person)
    except (NotRecorded, StoreDamaged, OSError) as error:
        log.warning("versions not named: %s", error, extra={"action": "versions_not_named"})
        return ()
