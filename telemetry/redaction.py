"""What nobody needs to learn from is taken out of texts before they are written: addresses and numbers.

Only kinds with a structure are found here, by pattern and, where they have one, by check sum; names and addresses of
houses need a model, which a hook can bring. Where a text changes, what was measured of the old one (tokens,
log-probs) goes with it, so that no learner mistakes one for the other. What the user reads is not touched.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from msgspec.structs import replace

from telemetry.events import Completion, Message, ToolCall
from telemetry.sealing import Shape

Kind = Literal["email", "phone", "card", "iban"]
Hook = Callable[[str], str]

# No pattern tries a text's every beginning to every end: each is anchored on its left and bounded.
_EMAIL: Final = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_IBAN: Final = re.compile(r"\b[A-Za-z]{2}\d{2}(?:[ \u00a0]?[A-Za-z0-9]{4}){2,7}(?:[ \u00a0]?[A-Za-z0-9]{1,3})?\b")
_DIGITS: Final = re.compile(r"(?<!\d)(?<!\d\.)\d(?:[ \u00a0-]?\d){12,80}(?!\d)")
_PHONE: Final = re.compile(r"(?<![\w+])\+\d(?:[ \u00a0().-]{0,2}\d){7,14}(?!\d)")
_MAY_HAVE_NUMBER: Final = re.compile(r"\d[\d \u00a0().-]{6}|[A-Za-z]{2}\d{2}[ \u00a0]?[A-Za-z0-9]{4}")
_SPACES: Final = " \u00a0-"
CARD_DIGITS: Final = range(19, 12, -1)
CARD_GAPS: Final = 5  # between its groups


def is_card(text: str) -> bool:
    """Whether the digits pass Luhn's check (ISO/IEC 7812)."""
    digits = [int(sign) for sign in text if sign.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether the check digits are right (ISO 13616: 97-10)."""
    signs = text.replace(" ", "").replace("\u00a0", "")
    return 15 <= len(signs) <= 34 and int("".join(str(int(sign, 36)) for sign in signs[4:] + signs[:4])) % 97 == 1


def _emails(text: str) -> str:
    return _EMAIL.sub("[email]", text)


def _ibans(text: str) -> str:
    return _IBAN.sub(lambda found: _without_iban(found[0]), text)


def _without_iban(run: str) -> str:
    """The run of groups without the account number that it begins with; words may follow that."""
    ends = [i for i in range(len(run), 0, -1) if i == len(run) or run[i] in _SPACES]
    return next((f"[iban]{run[end:]}" for end in ends if is_iban(run[:end])), run)


def _phones(text: str) -> str:
    return _PHONE.sub("[phone]", text)


def _cards(text: str) -> str:
    return _DIGITS.sub(lambda found: _without_card(found[0]), text)


def _without_card(run: str) -> str:
    """The run of digits without the card numbers in it; these begin and end where a group of digits does."""
    starts = [i for i, sign in enumerate(run) if sign.isdigit() and (i == 0 or run[i - 1] in _SPACES)]
    ends = [i + 1 for i, sign in enumerate(run) if sign.isdigit() and (i + 1 == len(run) or run[i + 1] in _SPACES)]
    for start in starts:
        for end in reversed([end for end in ends if 12 < end - start <= CARD_DIGITS[0] + CARD_GAPS]):
            number = run[start:end]
            digits = sum(map(str.isdigit, number))
            if digits in CARD_DIGITS and len(number) - digits <= CARD_GAPS and is_card(number):
                return f"{run[:start]}[card]{_without_card(run[end:])}"
    return run


_FINDERS: Final[dict[Kind, Hook]] = {"email": _emails, "iban": _ibans, "card": _cards, "phone": _phones}
KINDS: Final[tuple[Kind, ...]] = tuple(_FINDERS)


def load_hook(name: str) -> Hook | None:
    """``module:factory``, called once; it returns the function from a text to the redacted one. None for no name.

    The function is called by several threads at once.
    """
    if not name:
        return None
    module, _, factory = name.partition(":")
    hook: Hook = getattr(importlib.import_module(module), factory)()
    return hook


class Redactor:
    """Takes ``kinds`` out of texts and records, then what ``hook`` finds."""

    def __init__(self, kinds: Sequence[Kind], hook: Hook | None = None) -> None:
        self._finders = [_FINDERS[kind] for kind in KINDS if kind in kinds]
        self._hook = hook

    @property
    def has_hook(self) -> bool:
        """Whether a text may take long."""
        return self._hook is not None

    def text(self, text: str) -> str:
        """``text`` with what was found replaced by its kind in brackets."""
        if "@" in text or _MAY_HAVE_NUMBER.search(text):
            for without in self._finders:
                text = without(text)
        return self._hook(text) if self._hook is not None else text

    def record(self, record: Any, shape: Shape) -> Any:
        """The record with redacted texts; the same object where nothing was found."""
        prompt = tuple(map(self._message, record.prompt))
        is_other_prompt = prompt != record.prompt
        changes: dict[str, Any] = {"prompt": prompt} if is_other_prompt else {}
        for field in shape.sides:
            side = getattr(record, field)
            if (redacted := self._side(side, is_other_prompt=is_other_prompt)) is not side:
                changes[field] = redacted
        for field in shape.notes:
            if (value := getattr(record, field)) and (other := self._note(value)) != value:
                changes[field] = other
        return replace(record, **changes) if changes else record

    def _side(self, side: Completion, *, is_other_prompt: bool) -> Completion:
        text = self.text(side.text)
        if text != side.text:
            return replace(side, text=text, token_ids=(), logps=(), reference_logps=(), reference="")
        if is_other_prompt and (side.logps or side.reference_logps):
            return replace(side, logps=(), reference_logps=(), reference="")
        return side

    def _note(self, value: Any) -> Any:
        return self.text(value) if isinstance(value, str) else tuple(map(self.text, value))

    def _message(self, message: Message) -> Message:
        content = self.text(message.content)
        calls = tuple(map(self._call, message.tool_calls))
        if content == message.content and calls == message.tool_calls:
            return message
        return replace(message, content=content, tool_calls=calls)

    def _call(self, call: ToolCall) -> ToolCall:
        return replace(call, arguments=self.text(call.arguments))
