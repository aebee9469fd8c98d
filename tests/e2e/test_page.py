"""The chat page in a real Chromium, against the real router, a real replica (echo engine), Redis and recorder."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, Request, Route, ViewportSize, async_playwright, expect

from serving.echo_engine import EchoEngine
from telemetry.config import TelemetryConfig, open_log, redis_client
from telemetry.events import (
    TOPIC_OF,
    AnyEvent,
    FeedbackRecorded,
    PreferenceRecorded,
    PreferenceRetracted,
    encode,
    key_of,
)
from telemetry.receipts import Receipts
from telemetry.recorder import Recorder
from tests.examples import batch, published, release
from tests.router_stack import CANARY, STABLE, Stack, fast, routes, running_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one browser for all tests, a profile for each
DESKTOP: ViewportSize = {"width": 1280, "height": 800}


@pytest_asyncio.fixture(loop_scope="module")
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    engine = EchoEngine(token_s=0.005)
    async with running_stack(telemetry_config, engine=engine) as stack:
        yield stack


@pytest.fixture
def recorder(telemetry_config: TelemetryConfig) -> Iterator[None]:
    """A recorder in a thread."""
    client, log = redis_client(telemetry_config), open_log(telemetry_config)
    recorder = Recorder(log, telemetry_config.store_root, Receipts(client), batch_entries=100, flush_s=0.01)
    thread = threading.Thread(target=recorder.run)
    thread.start()
    yield
    recorder.stop.set()
    thread.join()
    log.close()
    client.close()


def happen(stack: Stack, *events: AnyEvent) -> None:
    """Append events, as trainer and release controller do."""
    log = open_log(stack.telemetry)
    for event in events:
        log.append(TOPIC_OF[type(event)], key_of(event), encode(event)).result(10)
    log.close()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("no Chromium on this machine: install Debian's package chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, stack: Stack) -> AsyncIterator[Page]:
    """The page of a user who has opted in, at desktop size. Fails the test on script errors and policy violations."""
    complaints: list[str] = []
    page = await browser.new_page(viewport=DESKTOP)
    page.set_default_timeout(15_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if "Content Security" in message.text else None)
    await page.goto(stack.url)
    await expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    await page.get_by_role("switch").check()
    yield page
    await page.close()
    assert complaints == []


async def ask(page: Page, text: str) -> None:
    await page.get_by_label("Your message").fill(text)
    await page.keyboard.press("Enter")


async def ask_for_pair(page: Page, text: str) -> Locator:
    """Ask and wait until both answers can be judged; the two answers."""
    await ask(page, text)
    answers = page.locator(".turn").last.locator(".answer")
    await expect(answers.locator(".choose")).to_have_count(2)
    return answers


def messages_of(request: Request) -> list[dict[str, str]]:
    """The conversation that a chat request carries."""
    body: dict[str, Any] = request.post_data_json or {}
    messages: list[dict[str, str]] = body["messages"]
    return messages


async def give_verdict(page: Page, key: str) -> str:
    """Press ``key``; the preference's id."""
    async with page.expect_response("**/v1/preferences") as answer:
        await page.keyboard.press(key)
    receipt = await (await answer.value).json()
    return str(receipt["id"])


async def test_a_pair_stands_side_by_side_on_a_desktop_and_stacked_on_a_phone(page: Page) -> None:
    answers = await ask_for_pair(page, "Why is the sky blue?")
    left, right = await answers.nth(0).bounding_box(), await answers.nth(1).bounding_box()
    assert left and right
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    await expect(answers.locator(".answer-text")).to_contain_text(["Why is the sky blue?"] * 2)
    await page.set_viewport_size({"width": 360, "height": 740})
    upper, lower = await answers.nth(0).bounding_box(), await answers.nth(1).bounding_box()
    assert upper and lower
    assert upper["x"] == lower["x"] and upper["y"] + upper["height"] < lower["y"]


async def test_every_verdict_is_in_sight_when_the_pair_is_complete(page: Page) -> None:
    await ask_for_pair(page, "Tell me a story. " * 40)
    foot, composer = await page.locator(".turn-foot").bounding_box(), await page.locator("#composer").bounding_box()
    assert foot and composer
    covered_by = 40  # pixels, if the page did not move
    height = int(foot["y"] + foot["height"] + composer["height"]) - covered_by
    await page.set_viewport_size({"width": 1200, "height": height})
    await page.get_by_role("button", name="New chat").click()
    await ask_for_pair(page, "Tell me a story. " * 40)
    tie, composer = (
        await page.get_by_role("button", name="Tie").bounding_box(),
        await page.locator("#composer").bounding_box(),
    )
    assert tie and composer
    assert tie["y"] + tie["height"] <= composer["y"]


async def test_versions_stay_hidden_until_the_verdict(page: Page) -> None:
    answers = await ask_for_pair(page, "Which version are you?")
    await expect(answers.locator(".version")).to_have_text(["", ""])
    await answers.nth(0).locator(".answer-text").click()
    await expect(answers.locator(".version")).to_have_text([f"chat-main {STABLE}"] * 2)


async def test_a_click_on_an_answer_is_one_verdict_however_often_it_is_clicked(page: Page, stack: Stack) -> None:
    answers = await ask_for_pair(page, "Say something kind.")
    text = await answers.nth(1).locator(".answer-text").inner_text()
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method) if "/v1/preferences" in request.url else None)
    await answers.nth(1).evaluate("card => { card.click(); card.click(); card.querySelector('button')?.click(); }")
    await expect(page.locator(".verdict")).to_have_text("You preferred answer 2")
    await expect(answers.nth(1)).to_have_class("answer preferred")
    assert sent.count("POST") == 1
    (event,) = await stack.events(PreferenceRecorded, expected=1)
    assert (event.chosen.text, event.chosen_position, event.outcome) == (text, "b", "chosen_rejected")


@pytest.mark.parametrize(
    ("key", "outcome", "position"),
    [
        ("1", "chosen_rejected", "a"),
        ("2", "chosen_rejected", "b"),
        ("0", "tie", ""),
        ("3", "both_bad", ""),
        ("s", "skip", ""),
    ],
)
async def test_a_key_is_a_verdict(page: Page, stack: Stack, key: str, outcome: str, position: str) -> None:
    await ask_for_pair(page, "Tea or coffee?")
    await page.keyboard.press(key)
    await expect(page.locator('[data-step="accepted"]')).to_be_visible()
    (event,) = await stack.events(PreferenceRecorded, expected=1)
    assert (event.outcome, event.chosen_position) == (outcome, position)


async def test_digits_in_the_message_box_are_text_and_no_verdict(page: Page, stack: Stack) -> None:
    await ask_for_pair(page, "Count to three.")
    await page.get_by_label("Your message").focus()
    await page.keyboard.type("102")
    await expect(page.get_by_label("Your message")).to_have_value("102")
    await expect(page.locator(".choose")).to_have_count(2)
    assert await stack.events(PreferenceRecorded) == []


async def test_the_keyboard_alone_reaches_every_verdict_and_focus_can_be_seen(page: Page) -> None:
    await ask_for_pair(page, "Tell me a story.")
    reached = []
    for _ in range(5):
        await page.keyboard.press("Tab")
        focused = page.locator(":focus-visible")
        reached.append(await focused.get_attribute("data-choice"))
        outline = await focused.evaluate("node => getComputedStyle(node).outlineStyle")
        assert outline == "solid"
    assert reached == ["a", "b", "tie", "both_bad", "skip"]
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Enter")
    await expect(page.locator(".verdict")).to_have_text("Neither was good")
    await expect(page.get_by_label("Your message")).to_be_focused()


@pytest.mark.usefixtures("recorder")
async def test_a_verdict_is_followed_until_the_version_that_learned_from_it_is_live(page: Page, stack: Stack) -> None:
    await ask_for_pair(page, "Explain gravity.")
    preference_id = await give_verdict(page, "1")
    step = page.locator(".step")
    await expect(step.nth(1)).to_have_attribute("data-state", "done")
    states = [await step.nth(index).get_attribute("data-state") for index in range(4)]
    assert states == ["done", "done", "waiting", "next"]
    happen(stack, batch(1, [preference_id]), published(CANARY, [preference_id], parent=STABLE))
    await expect(page.locator('[data-step="trained"]')).to_contain_text("chat-main/000001")
    happen(stack, release(CANARY, "stable"))
    live = page.locator('[data-step="live"]')
    await expect(live).to_have_attribute("data-state", "done")
    await expect(live).to_contain_text(CANARY)


@pytest.mark.usefixtures("recorder")
async def test_a_dropped_verdict_says_why(page: Page, stack: Stack) -> None:
    await ask_for_pair(page, "Explain tides.")
    preference_id = await give_verdict(page, "2")
    happen(stack, batch(1, [], [(preference_id, "held_out")]))
    await expect(page.locator('[data-step="dropped"]')).to_contain_text("held_out")
    await expect(page.locator('[data-step="live"]')).to_have_count(0)


async def test_undo_takes_the_verdict_back(page: Page, stack: Stack) -> None:
    await ask_for_pair(page, "Explain magnets.")
    await page.keyboard.press("1")
    await page.get_by_role("button", name="Undo").click()
    await expect(page.locator('[data-step="retracted"]')).to_contain_text("Taken back")
    await expect(page.get_by_role("button", name="Undo")).to_be_hidden()
    await stack.events(PreferenceRetracted, expected=1)


async def test_who_has_not_opted_in_gets_one_answer_with_its_version_and_can_rate_it(page: Page, stack: Stack) -> None:
    await page.get_by_role("switch").uncheck()
    await ask(page, "Hello there.")
    await expect(page.locator(".answer .version")).to_have_text(f"chat-main {STABLE}")
    await expect(page.locator(".answer")).to_have_count(1)
    await expect(page.locator(".choose")).to_have_count(0)
    await page.get_by_role("button", name="Good answer").click()
    await expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    (event,) = await stack.events(FeedbackRecorded, expected=1)
    assert event.rating == 1


@pytest.mark.parametrize("slow", ["GET", "PUT"])
async def test_consent_given_while_the_gateway_is_slow_holds_for_the_next_question(page: Page, slow: str) -> None:
    async def delay(route: Route) -> None:
        wait_s = 0.7 if route.request.method == slow else 0.0
        await asyncio.sleep(wait_s if slow == "PUT" else 0.0)  # on its way to the gateway
        response = await route.fetch()
        await asyncio.sleep(wait_s if slow == "GET" else 0.0)  # on its way back, with what was true before
        await route.fulfill(response=response)

    await page.evaluate("localStorage.clear()")  # another user, who has not opted in
    await page.route("**/consent", delay)
    await page.reload()
    await expect(page.locator("#model")).to_have_attribute("data-state", "ready")
    await page.get_by_role("switch").check()
    if slow == "GET":
        await page.wait_for_timeout(1000)  # what the gateway knew before arrives after the choice
    await ask_for_pair(page, "Quickly!")
    await expect(page.get_by_role("switch")).to_be_checked()


async def test_consent_outlives_a_reload(page: Page) -> None:
    await page.reload()
    await expect(page.get_by_role("switch")).to_be_checked()


async def test_the_chosen_answer_continues_the_conversation(page: Page) -> None:
    answers = await ask_for_pair(page, "First.")
    chosen = await answers.nth(1).locator(".answer-text").inner_text()
    await page.keyboard.press("2")
    async with page.expect_request("**/v1/chat/completions") as request:
        await ask(page, "Second.")
    assert messages_of(await request.value) == [
        {"role": "user", "content": "First."},
        {"role": "assistant", "content": chosen},
        {"role": "user", "content": "Second."},
    ]


async def test_going_on_without_a_verdict_skips_the_pair_and_keeps_the_left_answer(page: Page, stack: Stack) -> None:
    answers = await ask_for_pair(page, "First.")
    left = await answers.nth(0).locator(".answer-text").inner_text()
    async with page.expect_request("**/v1/chat/completions") as request:
        await ask(page, "Second.")
    assert messages_of(await request.value)[1]["content"] == left
    await expect(page.locator(".verdict")).to_have_text("Skipped")
    (event,) = await stack.events(PreferenceRecorded, expected=1)
    assert event.outcome == "skip"


async def test_stop_keeps_what_was_said(page: Page) -> None:
    await page.get_by_role("switch").uncheck()
    await ask(page, "word " * 400)
    await expect(page.locator(".answer-text").first).to_contain_text("word word")
    await page.get_by_role("button", name="Stop").click()
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await expect(page.locator(".answer")).to_contain_text("Stopped")
    said = await page.locator(".answer-text").inner_text()
    assert said.count("word") < 400
    async with page.expect_request("**/v1/chat/completions") as request:
        await ask(page, "Go on.")
    assert messages_of(await request.value)[1]["content"].strip() == said.strip()


async def test_markup_in_an_answer_is_text(page: Page) -> None:
    evil = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    answers = await ask_for_pair(page, evil)
    await page.keyboard.press("1")
    await expect(answers.locator(".answer-text")).to_contain_text([evil, evil])
    assert await page.evaluate("window.pwned") is None
    assert await page.locator("#conversation script, #conversation img").count() == 0


async def test_an_error_is_shown_and_trying_again_helps(page: Page, stack: Stack) -> None:
    (replica,) = stack.replicas
    await stack.publish(replicas=[msgspec.structs.replace(replica, is_ready=False)])
    await ask(page, "Are you there?")
    problem = page.get_by_role("alert")
    await expect(problem).to_be_visible()
    await expect(page.get_by_label("Your message")).to_have_value("Are you there?")
    await stack.publish(replicas=[replica])
    await problem.get_by_role("button", name="Try again").click()
    await expect(page.locator(".choose")).to_have_count(2)
    await expect(problem).to_be_hidden()
    await expect(page.get_by_label("Your message")).to_have_value("")


async def test_a_gateway_with_keys_asks_for_one(
    browser: Browser, telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"open sesame").hexdigest()
    (tmp_path / "keys.toml").write_text(f'[[keys]]\nname = "page"\nsha256 = "{digest}"\n')
    config = fast(key_file=str(tmp_path / "keys.toml"))
    async with running_stack(telemetry_config, config=config, key="open sesame") as stack:
        page = await browser.new_page(viewport=DESKTOP)
        await page.goto(stack.url)
        await expect(page.locator("#stable-version")).to_have_text("needs a key")
        await page.get_by_label("API key").fill("open sesame")
        await page.get_by_role("button", name="Try again").click()
        await page.get_by_role("switch").check()
        await ask_for_pair(page, "Hello.")
        await page.close()


async def test_a_new_stable_version_is_shown_and_told(page: Page, stack: Stack) -> None:
    await ask_for_pair(page, "Hello.")
    await expect(page.locator("#stable-version")).to_have_text(STABLE)
    await stack.publish(routing=routes(stack.engine, stable=CANARY))
    await expect(page.locator("#stable-version")).to_have_text(CANARY)
    await expect(page.locator(".model-change")).to_contain_text(f"{STABLE} → {CANARY}")
    await expect(page.get_by_role("status")).to_contain_text(CANARY)


@pytest.mark.parametrize("width", [320, 360, 768])
@pytest.mark.usefixtures("recorder")
async def test_nothing_scrolls_sideways(page: Page, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 640})
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert await page.evaluate(overflow) <= 0
    await ask_for_pair(page, "A" * 300 + " wide")
    assert await page.evaluate(overflow) <= 0
    await page.locator(".choose").first.click()
    await expect(page.locator(".step").nth(1)).to_have_attribute("data-state", "done")
    assert await page.evaluate(overflow) <= 0


CONTRAST = """
() => {
  const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if ((colour[3] ?? 1) === 1) return colour;
    }
  };
  const ratio = (node) => {
    const [low, high] = [rgba(getComputedStyle(node).color), ground(node)].map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const hasText = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  const texts = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() && hasText(node));
  return texts.map((node) => [node.className || node.id || node.tagName, ratio(node)]);
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.usefixtures("recorder")
async def test_every_text_has_enough_contrast(page: Page, scheme: Any) -> None:
    await page.emulate_media(color_scheme=scheme)
    faint = [entry for entry in await page.evaluate(CONTRAST) if entry[1] < 4.5]
    await ask_for_pair(page, "Hello.")
    faint += [entry for entry in await page.evaluate(CONTRAST) if entry[1] < 4.5]
    await page.keyboard.press("1")
    await expect(page.locator(".step").nth(1)).to_have_attribute("data-state", "done")
    faint += [entry for entry in await page.evaluate(CONTRAST) if entry[1] < 4.5]
    assert faint == []


async def test_the_page_loads_nothing_from_elsewhere(page: Page, stack: Stack) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.reload()
    await ask_for_pair(page, "Hello.")
    assert [url for url in asked if not url.startswith(stack.url)] == []
    assert f"{stack.url}/pages/app.js" in asked
