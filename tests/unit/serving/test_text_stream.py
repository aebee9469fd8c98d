"""What was sent, joined, is the text of the finished completion: whole characters, no stop string, nothing unsafe."""

from __future__ import annotations

import random

import pytest

from serving.safety import DEFAULT_PATTERNS, OutputFilter
from serving.text_stream import Detokenizer, OutputText


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "héllo wörld", "日本語 🎉👩‍👩‍👧 mixed", "\n\n  spaces\t"])
def test_characters_leave_only_when_they_are_whole(text: str) -> None:
    stream = Detokenizer(decode_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    stream = Detokenizer(decode_bytes)
    assert [stream.push(byte) for byte in b"a\xf0\x9f"] == ["a", "", ""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("seed", range(50))
def test_any_cut_of_the_text_gives_the_same_visible_text(seed: int) -> None:
    dice = random.Random(seed)
    text = "".join(dice.choice("ab\n ") for _ in range(60))
    stops = ["".join(dice.choice("ab\n ") for _ in range(dice.randint(1, 5))) for _ in range(3)]
    first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    output = OutputText(stops, OutputFilter(()))
    visible, rest = "", text
    while rest and not output.is_stopped:
        size = dice.randint(1, 4)
        piece, rest = rest[:size], rest[size:]
        visible += output.push(piece, is_last=not rest)
    # two stops may end in one piece; the earliest place counts among what had been seen by then
    assert visible == text[: len(visible)]
    assert not any(stop in visible for stop in stops)
    assert len(visible) >= first
    assert output.is_stopped == (first < len(text))


def test_a_possible_beginning_of_a_stop_string_waits() -> None:
    output = OutputText(["STOP"], OutputFilter(()))
    assert output.push("go S") == "go "
    assert output.push("T") == ""
    assert output.push("AR") == "STAR"
    assert output.push("T ST", is_last=True) == "T ST"


def test_an_unsafe_text_is_stopped_before_the_match_and_marked() -> None:
    output = OutputText((), OutputFilter([r"secret\s+word"]))
    sent = output.push("the secret") + output.push(" word is") + output.push(" out")
    assert output.is_unsafe
    assert "secret word" not in sent
    assert output.push("more") == ""


@pytest.mark.parametrize("text", ["Just go and KILL yourself.", "how to make a pipe bomb at home"])
def test_the_default_patterns_find_what_they_are_for(text: str) -> None:
    assert OutputFilter(DEFAULT_PATTERNS).find(text, 0) is not None


def test_the_default_patterns_leave_ordinary_text_alone() -> None:
    text = "You can kill a process yourself. The bomb disposal team made a plan."
    assert OutputFilter(DEFAULT_PATTERNS).find(text, 0) is None
