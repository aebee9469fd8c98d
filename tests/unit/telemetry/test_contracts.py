"""The shared records: what goes in comes out, and what is not ours is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from telemetry import events, manifest, routing
from telemetry.configuration import InvalidConfiguration, convert_table, read_table
from telemetry.process import signing_key
from telemetry.text import distinct_ratio, repetition_ratio

KEY = b"k" * 32


def completion(text: str, version: str = "v000000-00000000") -> events.Completion:
    return events.Completion(
        completion_id=events.new_id(),
        text=text,
        variant="chat-main",
        version=version,
        channel="stable",
        finish_reason="stop",
        prompt_tokens=3,
        completion_tokens=2,
        ttft_s=0.1,
        duration_s=0.2,
        temperature=0.7,
        top_p=0.9,
    )


def preference() -> events.PreferenceRecorded:
    return events.PreferenceRecorded(
        pair_id="p1",
        policy="chat",
        user="u",
        prompt=(events.Message(role="user", content="hi"),),
        chosen=completion("yes"),
        rejected=completion("no"),
        outcome="chosen_rejected",
        chosen_position="a",
        propensity=0.5,
        shown_at=datetime(2026, 1, 1, tzinfo=UTC),
        decided_s=1.5,
    )


def test_an_event_survives_the_wire_unchanged() -> None:
    event = preference()
    assert events.decode(events.encode(event)) == event


def test_a_plain_message_is_on_the_wire_what_it_was_before_tools() -> None:
    """Readers of the build before refuse fields that they do not know."""
    message = events.Message(role="user", content="hi")
    assert msgspec.json.encode(message) == b'{"role":"user","content":"hi"}'


def test_tools_and_their_calls_survive_the_wire_in_a_prompt() -> None:
    call = events.ToolCall("call_1", "f", '{"b": 1, "a": 2}')
    prompt = (
        events.Message("user", "hi", tools=(events.Tool("f", "Does it.", '{"type":"object"}', True),)),
        events.Message("assistant", "", tool_calls=(call,)),
        events.Message("tool", "done", tool_call_id="call_1"),
    )
    event = msgspec.structs.replace(preference(), prompt=prompt)
    assert events.decode(events.encode(event)) == event


def test_every_event_has_a_topic_and_a_key() -> None:
    for cls in events.AnyEvent.__args__:
        assert events.TOPIC_OF[cls] in events.TOPICS
    assert events.key_of(preference()) == "p1"


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b'{"type":"NoSuchEvent"}', b'{"type":"PreferenceRetracted","pair_id":1}'],
)
def test_a_payload_that_is_not_ours_is_refused(payload: bytes) -> None:
    with pytest.raises(events.InvalidEvent):
        events.decode(payload)


def test_an_event_in_another_topic_is_no_entry_there() -> None:
    payload = events.encode(preference())
    assert events.decode_from(events.PREFERENCES, payload) == events.decode(payload)
    with pytest.raises(events.InvalidEvent, match="PreferenceRecorded belongs to tiebreak"):
        events.decode_from(events.VERSIONS, payload)


def test_an_event_of_a_newer_schema_is_refused_not_guessed() -> None:
    newer = msgspec.structs.replace(preference(), schema_version=2)
    with pytest.raises(events.InvalidEvent, match="schema_version 2"):
        events.decode(events.encode(newer))


def test_ids_are_unique_version_7_and_ordered_by_time() -> None:
    ids = [events.new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(i[14] == "7" and i[19] in "89ab" for i in ids)
    assert [i[:13] for i in ids] == sorted(i[:13] for i in ids)


def _manifest(folder: Path, **changes: object) -> manifest.Manifest:
    return manifest.Manifest(
        variant="chat-main",
        sequence=1,
        parent="v000000-00000000",
        base="tiny",
        base_digest="0" * 64,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        step=3,
        rank=4,
        alpha=8.0,
        target_modules=("q_proj",),
        files={manifest.ADAPTER_FILE: manifest.file_digest(folder / "adapter")},
    )


@pytest.fixture
def version_folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").write_bytes(b"weights")
    files = {manifest.ADAPTER_FILE: tmp_path / "adapter"}
    name, folder = manifest.write_version(tmp_path / "versions", _manifest(tmp_path), files, KEY)
    assert manifest.VERSION_PATTERN.match(name)
    return folder


def test_a_written_version_is_read_back(version_folder: Path) -> None:
    assert manifest.read_version(version_folder, KEY).step == 3


def test_changed_weights_are_not_trusted(version_folder: Path) -> None:
    (version_folder / manifest.ADAPTER_FILE).write_bytes(b"weightz")
    with pytest.raises(manifest.UntrustedVersion, match="does not match the manifest"):
        manifest.read_version(version_folder, KEY)


def test_a_changed_manifest_is_not_trusted(version_folder: Path) -> None:
    path = version_folder / manifest.MANIFEST_FILE
    path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
    with pytest.raises(manifest.UntrustedVersion, match="digest"):
        manifest.read_version(version_folder, KEY)


def test_another_deployments_signature_is_not_trusted(version_folder: Path) -> None:
    with pytest.raises(manifest.UntrustedVersion, match="signature"):
        manifest.read_version(version_folder, b"x" * 32)


def test_a_renamed_version_is_not_trusted(version_folder: Path) -> None:
    other = version_folder.rename(version_folder.with_name("v000002-deadbeef"))
    with pytest.raises(manifest.UntrustedVersion):
        manifest.read_version(other, KEY)


def test_the_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    key = signing_key(tmp_path)
    assert len(key) == 32
    assert signing_key(tmp_path) == key
    assert (tmp_path / "keys" / "signing.key").stat().st_mode & 0o077 == 0


def test_processes_that_start_together_get_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: signing_key(tmp_path), range(64)))) == 1
    assert [path.name for path in (tmp_path / "keys").iterdir()] == ["signing.key"]


def test_a_torn_key_is_no_key(tmp_path: Path) -> None:
    signing_key(tmp_path)
    (tmp_path / "keys" / "signing.key").write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes instead of 32"):
        signing_key(tmp_path)


def test_replicas_must_hold_every_channel_but_not_the_base() -> None:
    route = routing.VariantRoute(
        variant="chat-main",
        base="tiny",
        base_version="v000000-aa",
        stable="v000002-bb",
        previous="v000000-aa",
        canary="v000003-cc",
        shadow="v000004-dd",
    )
    assert route.wanted() == ("v000002-bb", "v000003-cc", "v000004-dd")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    port: int = 1
    name: str = "x"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[router]\nport = 2\nname = 'y'\n")
    config = read_table(path, "router", Config, {"TIEBREAK_ROUTER_PORT": "3"})
    assert config == Config(port=3, name="y")


def test_an_unknown_key_is_refused_with_its_name() -> None:
    with pytest.raises(InvalidConfiguration, match=r"\[router\].*porrt"):
        convert_table({"porrt": 2}, "router", Config, {})


def test_a_missing_file_says_which(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"absent\.toml"):
        read_table(tmp_path / "absent.toml", "router", Config, {})


def test_repetition_is_the_share_of_trigrams_seen_before() -> None:
    assert repetition_ratio("one two three four five") == 0.0
    assert repetition_ratio("a b c a b c") == pytest.approx(0.25)  # abc bca cab abc: 1 of 4 repeats
    assert repetition_ratio("no " * 12) == pytest.approx(0.9)


def test_diversity_falls_where_different_questions_get_one_answer() -> None:
    assert distinct_ratio(["a b c", "d e f"]) == 1.0
    assert distinct_ratio(["a b c", "a b c"]) == 0.5  # ab bc ab bc
    assert distinct_ratio(["one", ""]) == 1.0, "nothing is said twice"
