"""What workers count together outlives none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from router.places import Places

NAMES = ("all", "key app")
OTHER = """
import sys, time
from pathlib import Path
from router.places import Places

places = Places(("all", "key app"), folder=Path(sys.argv[1]), worker=2, workers=2)
places.add("all", 3)
places.add("key app", 2)
print(flush=True)
time.sleep(600)
"""


def test_the_count_of_a_dead_worker_is_forgotten_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    places = Places(NAMES, folder=tmp_path, worker=1, workers=2)
    places.add("all", 1)
    with subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"\n"
            places.forget_the_dead()
            assert (places.total("all"), places.total("key app"), places.mine("all")) == (4, 2, 1)
        finally:
            other.kill()
    assert places.total("all") == 4, "nobody looks while there is room"
    places.forget_the_dead()
    assert (places.total("all"), places.total("key app")) == (1, 0)


def test_a_worker_that_starts_again_starts_from_nothing(tmp_path: Path) -> None:
    Places(NAMES, folder=tmp_path, worker=2, workers=2).add("all", 5)
    assert Places(NAMES, folder=tmp_path, worker=2, workers=2).total("all") == 0


def test_one_alone_needs_no_file() -> None:
    places = Places(NAMES)
    places.add("all", 1)
    places.forget_the_dead()
    assert places.total("all") == 1
