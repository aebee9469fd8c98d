"""Everything the routes work with, opened in order and closed in reverse."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis

from router.admin import ReleaseDesk
from router.admission import Admission, Caller, place_names, read_keys
from router.arms import PairRatios
from router.backends import ReplicaPool
from router.chat import Chat, ChatSettings
from router.claims import Claims
from router.config import RouterConfig, worker_name
from router.consent import ConsentBook
from router.erasure import Eraser
from router.gathered import Gathered, packing
from router.ledger import Ledger
from router.pairs import PairMemory
from router.places import Places
from router.preferences import Preferences
from router.private import Private
from router.receipts import ReceiptBook
from router.reference import References
from router.schema import ChatLimits
from router.tables import Tables
from telemetry.config import TelemetryConfig, open_log, open_sealer, redis_client_async
from telemetry.event_log import EventLog
from telemetry.outbox import OutboxLog
from telemetry.process import signing_key
from telemetry.redaction import Redactor, load_hook


class Services(msgspec.Struct, frozen=True):
    """What the routes use."""

    key: bytes
    started_at: int  # unix seconds
    redis: Redis
    admission: Admission
    tables: Tables
    book: ConsentBook
    ledger: Ledger
    chat: Chat
    preferences: Preferences
    receipts: ReceiptBook
    references: References
    eraser: Eraser
    releases: ReleaseDesk


def keys_of(config: RouterConfig) -> dict[str, Caller]:
    """The callers that are known; none in open mode."""
    return read_keys(Path(config.key_file).expanduser()) if config.key_file else {}


@asynccontextmanager
async def open_services(
    config: RouterConfig, telemetry: TelemetryConfig, *, worker: int = 1, event_log: EventLog | None = None
) -> AsyncIterator[Services]:
    """Services of one worker (from 1); ``event_log`` takes the place of the configured one."""
    redis = _queueing(redis_client_async(telemetry), config.redis_connections, telemetry.redis_timeout_s)
    outbox = _open_outbox(event_log or open_log(telemetry), telemetry.state_path, worker, config.workers)
    tables = Tables(redis)
    pool = ReplicaPool(
        tables,
        ready_wait_s=config.ready_wait_s,
        min_in_flight=config.min_in_flight / config.workers,  # each worker finds a limit of its own
        max_in_flight=2 * config.max_in_flight,  # a pair of two versions is two generations
        patience_s=config.patience_s,
    )
    await tables.refresh()
    stop = asyncio.Event()
    polling = asyncio.create_task(tables.poll(config.table_poll_s, stop))
    embedded_log = event_log is None and telemetry.log == "redis"
    key, admission = signing_key(telemetry.state_path), _admission(config, telemetry.state_path / "run", worker)
    private = Private(open_sealer(telemetry), Redactor(config.redact, load_hook(config.redactor)), key)
    services = _wire(
        config,
        key=key,
        private=private,
        store_root=telemetry.store_root,
        redis=redis,
        outbox=outbox,
        tables=tables,
        pool=pool,
        admission=admission,
        embedded_log=embedded_log,
    )
    try:
        yield services
    finally:
        stop.set()
        await polling
        await services.references.close()
        await services.ledger.settled()
        pool.close()
        await asyncio.to_thread(outbox.close)
        await redis.aclose()


def _open_outbox(event_log: EventLog, state: Path, worker: int, workers: int) -> OutboxLog:
    """Each worker's own; the first one also sends what workers and commands left that are no more."""
    folders = {number: state / "outbox" / worker_name(number) for number in range(1, workers + 1)}
    left = sorted(set((state / "outbox").glob("*")) - set(folders.values())) if worker == 1 else ()
    return OutboxLog(event_log, folders[worker], adopt=left)


def _admission(config: RouterConfig, folder: Path, worker: int) -> Admission:
    keys = keys_of(config)
    shared = folder if config.workers > 1 else None
    places = Places(place_names(keys), folder=shared, worker=worker, workers=config.workers)
    limits = {"max_in_flight": config.max_in_flight, "max_in_flight_per_key": config.max_in_flight_per_key}
    return Admission(keys, places, **limits)


def _queueing(client: Redis, connections: int, timeout_s: float) -> Redis:
    """``client`` over a pool in which a burst waits for a free connection; redis-py's own refuses it."""
    given = client.connection_pool
    pool = BlockingConnectionPool(
        max_connections=connections,
        timeout=timeout_s,
        connection_class=packing(given.connection_class),
        **given.connection_kwargs,
    )
    return Redis.from_pool(pool)


def _wire(
    config: RouterConfig,
    *,
    key: bytes,
    private: Private,
    store_root: str,
    redis: Redis,
    outbox: OutboxLog,
    tables: Tables,
    pool: ReplicaPool,
    admission: Admission,
    embedded_log: bool,
) -> Services:
    reads, writes, memories = Gathered(redis), Gathered(redis), Gathered(redis)
    pairs = PairMemory(redis, writes, config.pair_ttl_s)
    ledger = Ledger(outbox, redis, memories, pairs, private, completion_ttl_s=config.completion_ttl_s)
    book = ConsentBook(redis, reads, writes, pairs_per_minute=config.pairs_per_minute)
    claims = Claims(redis, ledger, ttl_s=config.verdict_ttl_s, lease_s=config.claim_lease_s, embedded_log=embedded_log)
    receipts = ReceiptBook(redis, ledger, claims)
    settings = ChatSettings(
        key=key,
        limits=ChatLimits(config.default_max_tokens, config.max_tokens, config.max_choices),
        ratios=PairRatios(config.canary_pair_ratio, config.cross_variant_ratio),
        pair_ratio=config.pair_ratio,
        pair_ttl_s=config.pair_ttl_s,
        deadline_s=config.deadline_s,
    )
    references = References(pool, tables, pairs, private)
    chat = Chat(
        settings,
        admission=admission,
        tables=tables,
        pool=pool,
        book=book,
        ledger=ledger,
        references=references,
        draw=random.Random(),
    )
    preferences = Preferences(
        key=key,
        private=private,
        pairs=pairs,
        ledger=ledger,
        claims=claims,
        book=receipts,
        lease_s=config.claim_lease_s,
    )
    return Services(
        key=key,
        started_at=int(time.time()),
        redis=redis,
        admission=admission,
        tables=tables,
        book=book,
        ledger=ledger,
        chat=chat,
        preferences=preferences,
        receipts=receipts,
        references=references,
        eraser=Eraser(private.sealer, book, ledger, store_root),
        releases=ReleaseDesk(redis),
    )
