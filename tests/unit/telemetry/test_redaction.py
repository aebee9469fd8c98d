"""Structured personal data is taken out before anything is written; numbers that are none stay."""

from __future__ import annotations

import re
import time

import pytest
from msgspec.structs import replace

from telemetry.events import Message, ToolCall
from telemetry.redaction import KINDS, Redactor, is_card, is_iban, load_hook
from telemetry.sealing import SHAPES
from tests import examples

REDACTOR = Redactor(KINDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to ann.b+c@mail.example.org!", "write to [email]!"),
        ("a@b is no address", "a@b is no address"),
        ("card 4111 1111 1111 1111, please", "card [card], please"),
        ("card 4111-1111-1111-1112 fails Luhn", "card 4111-1111-1111-1112 fails Luhn"),
        ("5500005555555559", "[card]"),
        ("0000000000000000 is no card", "0000000000000000 is no card"),
        ("4111 1111 1111 1111 123", "[card] 123"),
        ("ES91 2100 0418 4502 0005 1332 is mine", "[iban] is mine"),
        ("AT611904300234573201 and more", "[iban] and more"),
        ("PL61 1090 1014 0000 0712 1981 2874 bitte", "[iban] bitte"),
        ("4111111111111111 5500005555555559", "[card] [card]"),
        ("order 7 4111 1111 1111 1111", "order 7 [card]"),
        ("4111\u00a01111\u00a01111\u00a01111 12/27", "[card] 12/27"),
        ("at 10:20 4111111111111111", "at 10:20 [card]"),
        ("de89 3704 0044 0532 0130 00", "[iban]"),
        ("IBAN DE89 3704 0044 0532 0130 00 is mine", "IBAN [iban] is mine"),
        ("GB82WEST12345698765432.", "[iban]."),
        ("DE89370400440532013001 is mistyped", "DE89370400440532013001 is mistyped"),
        ("call +49 (30) 1234-5678 now", "call [phone] now"),
        ("call 555 1234", "call 555 1234"),
        ("pi is 3.14159265358979323846", "pi is 3.14159265358979323846"),
        ("in 2026, 1,000,000 people and 20 30 40 50", "in 2026, 1,000,000 people and 20 30 40 50"),
        ("x = a@b.com; y = 4111111111111111", "x = [email]; y = [card]"),
        ("", ""),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert REDACTOR.text(text) == expected
    assert REDACTOR.text(expected) == expected, "twice is once"


def test_check_sums() -> None:
    assert is_card("4012888888881881") and not is_card("4012888888881882")
    assert is_iban("FR1420041010050500013M02606") and not is_iban("FR1420041010050500013M02607")


def test_only_the_kinds_that_are_wanted() -> None:
    assert Redactor(("email",)).text("a@b.com 4111111111111111") == "[email] 4111111111111111"
    assert Redactor(()).text("a@b.com") == "a@b.com"


def test_a_changed_answer_loses_what_was_measured_of_it() -> None:
    side = replace(examples.completion(1), token_ids=(1,), logps=(-1.0,), reference="v", reference_logps=(-2.0,))
    shown = replace(examples.pair(1), a=replace(side, text="mail a@b.com"), b=side)
    found = REDACTOR.record(shown, SHAPES[type(shown)])
    assert (found.a.text, found.a.token_ids, found.a.logps, found.a.reference_logps) == ("mail [email]", (), (), ())
    assert found.b is side
    assert found.prompt is not None and found.prompt == shown.prompt


def test_a_changed_prompt_makes_log_probs_those_of_another() -> None:
    side = replace(examples.completion(1), token_ids=(1,), logps=(-1.0,))
    call = ToolCall("c", "mail", '{"to": "a@b.com"}')
    prompt = (Message("user", "I am a@b.com"), Message("assistant", "", tool_calls=(call,)))
    shown = replace(examples.pair(1), prompt=prompt, a=side, b=side)
    found = REDACTOR.record(shown, SHAPES[type(shown)])
    assert found.prompt[0].content == "I am [email]"
    assert found.prompt[1].tool_calls[0].arguments == '{"to": "[email]"}'
    assert (found.a.text, found.a.token_ids, found.a.logps) == (side.text, (1,), ())


def test_what_has_nothing_is_the_same_object_and_what_users_write_is_read() -> None:
    event = examples.preference(1)
    shape = SHAPES[type(event)]
    assert REDACTOR.record(event, shape) is event
    noted = replace(event, comment="ask a@b.com", edited="+49 30 12345678", reasons=("a@b.com",))
    found = REDACTOR.record(noted, shape)
    assert (found.comment, found.edited, found.reasons) == ("ask [email]", "[phone]", ("[email]",))


def no_names() -> object:
    """A hook, as a deployment would name it."""
    return lambda text: re.sub(r"\bAnn\b", "[name]", text)


def test_a_hook_finds_what_needs_a_model() -> None:
    hook = load_hook(f"{__name__}:no_names")
    assert load_hook("") is None
    assert Redactor(("email",), hook).text("Ann is a@b.com") == "[name] is [email]"


@pytest.mark.parametrize(
    "text",
    ["a" * 60_000 + " @", "a.b-" * 15_000 + "@", "1 " * 30_000, "+1 " * 20_000, "DE89" * 15_000, "4 1 1 1 " * 10_000],
)
def test_no_text_takes_long(text: str) -> None:
    """Each of these took seconds with patterns that try every beginning to every end."""
    begun = time.process_time()
    REDACTOR.text(text + " a@b.com")
    assert time.process_time() - begun < 1.5
