"""The README's picture of the page: a real stack, a real browser, one question, one click. ``make pictures``"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from playwright.async_api import async_playwright, expect

from tests.bench.client import running_stack

OUT = Path(__file__).parents[2] / "deploy" / "pictures" / "page.png"
QUESTION = "Give me three ideas for a rainy Sunday."
ANSWER_LIMIT_MS = 120_000


async def main() -> None:
    async with running_stack() as (_, _, url), async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = await browser.new_page(viewport={"width": 1200, "height": 780}, device_scale_factor=1.5)
        await page.goto(url)
        await page.get_by_role("switch").check()
        for number, key in enumerate("12"):
            await page.get_by_label("Your message").fill(QUESTION if number else "How do I keep basil alive?")
            await page.keyboard.press("Enter")
            answers = page.locator(".turn").nth(number).locator(".answer")
            await expect(answers.locator(".choose")).to_have_count(2, timeout=ANSWER_LIMIT_MS)
            if not number:
                await page.keyboard.press(key)
                await asyncio.sleep(3)
        OUT.parent.mkdir(exist_ok=True)
        await page.screenshot(path=OUT)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
