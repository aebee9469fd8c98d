"""The learning curve's arithmetic, and that a picture comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.picture import Mark, Point, draw, wilson


def test_wilson_of_half_of_a_hundred_is_the_textbook_interval() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0.5, 0) == (0.0, 1.0)


def test_wilson_stays_within_bounds_at_the_edges() -> None:
    low, high = wilson(1.0, 10)
    assert low == pytest.approx(0.7225, abs=1e-3)
    assert high == pytest.approx(1.0)


def test_a_picture_is_written(tmp_path: Path) -> None:
    points = [Point(0, 0.0, 0.5, 40, "v000000-0000abcd"), Point(50, 60.0, 0.7, 20, "v000003-1111abcd")]
    path = tmp_path / "out" / "demo.png"
    draw(points, [Mark(30, 40.0, "v000003-1111abcd")], "50 clicks", path)
    assert path.read_bytes().startswith(b"\x89PNG")
