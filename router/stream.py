"""A growing exchange as server-sent pieces, in OpenAI's shape. No I/O."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from router.answers import PairOffer, StreamedPair
from router.exchange import Exchange
from router.generation import Grown

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(record: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(record) + b"\n\n"


class ChatStream:
    """Server-sent pieces of one exchange: what has been said already, and what is held back."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._begun: set[int] = set()  # ids of answers whose first piece is out
        self._held: list[bytes] = []
        self._preference = _streamed(exchange.offer)

    def write(self, grown: Grown) -> bytes:
        """Pieces to send now. The finish of a pair's sides is held until the pair can be judged."""
        out: list[bytes] = []
        for answer, chunk in grown:
            if answer not in self._exchange.shown or chunk is None:
                continue
            is_first = id(answer) not in self._begun
            self._begun.add(id(answer))
            for piece in self._exchange.pieces(answer, chunk, is_first=is_first):
                data = event(self._exchange.chunk((piece,), self._preference))
                self._preference = UNSET
                is_held = self._exchange.is_pair and piece.finish_reason is not None
                (self._held if is_held else out).append(data)
        return b"".join(out)

    def finish(self) -> bytes:
        """The held finishes."""
        return b"".join(self._held)

    def void(self) -> bytes:
        """Word that there can be no verdict, who the answer is from, and the finishes."""
        exchange = self._exchange
        survivor = next(answer for answer in exchange.shown if not answer.failure)
        notice = StreamedPair(
            pair_id=exchange.pair_id, is_void=True, variant=survivor.arm.variant, version=survivor.arm.version
        )
        return event(exchange.chunk(exchange.failed_pieces(), notice)) + b"".join(self._held)

    def failure(self) -> bytes:
        """The error that ended everything."""
        failure = self._exchange.failed()[0].failure
        assert failure is not None
        return event(failure.body())


def _streamed(offer: PairOffer | None) -> StreamedPair | UnsetType:
    if offer is None:
        return UNSET
    return StreamedPair(pair_id=offer.pair_id, token=offer.token, expires_at=offer.expires_at)
