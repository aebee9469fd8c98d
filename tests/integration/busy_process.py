"""A process whose metrics move as a small deployment's do; prints its port, runs until it is stopped.

Every number goes through the objects of ``telemetry.metrics`` that the real processes use.
"""

from __future__ import annotations

import random
import time

from telemetry import metrics as m

V0, V1 = "v000000-00000000", "v000001-11111111"


def once(draw: random.Random) -> None:
    """A fifth of a second of life."""
    for version, channel in ((V0, "stable"), (V1, "canary")):
        m.REQUESTS.labels("chat", "200").inc()
        m.RESPONSES.labels("chat-main", version, channel).inc()
        m.TTFT.labels("chat-main", version).observe(draw.uniform(0.1, 0.6))
        m.DURATION.labels("chat-main", version).observe(draw.uniform(1, 3))
        m.TOKENS.labels("smollm2", version).inc(40)
        m.FEEDBACK.labels("chat-main", version, draw.choice(["1", "-1"])).inc()
    if draw.random() < 0.1:
        m.REQUESTS.labels("chat", "503").inc()
        m.RESPONSE_ERRORS.labels("chat-main", V1, "timeout").inc()
        m.SAFETY_VIOLATIONS.labels("chat-main", V1).inc()
    winner, loser = (V1, V0) if draw.random() < 0.7 else (V0, V1)
    m.PAIRS_SHOWN.labels("chat").inc()
    m.VERDICTS.labels("chat-main", winner, "win", "end_user", "true").inc()
    m.VERDICTS.labels("chat-main", loser, "loss", "end_user", "true").inc()
    m.VERDICT_SECONDS.observe(draw.uniform(0.002, 0.02))
    m.DUELS.labels("chat-main", V1, "stable", "win" if winner == V1 else "loss").inc()
    m.PAIRS_STORED.inc()
    m.STORE_SECONDS.observe(draw.uniform(0.2, 1.0))
    m.RECORDER_LAG.set(draw.randint(0, 3))
    m.TRAINER_LAG.set(draw.randint(0, 9))
    m.PAIRS_TRAINED.labels("chat-main").inc()
    m.PAIRS_DROPPED.labels("chat-main", "tie").inc()
    m.TRAIN_VALUE.labels("chat-main", "rewards/accuracies").set(draw.uniform(0.5, 0.8))
    m.LABEL_AGE.labels("chat-main").set(draw.uniform(5, 20))
    m.RETRAIN_SECONDS.labels("chat-main").observe(draw.uniform(10, 60))
    m.RELEASES.labels("chat-main", "canary").inc()


def main() -> None:
    """Expose and live."""
    draw = random.Random(1)
    m.HELDOUT_WIN_RATE.labels("chat-main", V1).set(0.72)
    m.CHANNEL_INFO.labels("chat-main", "stable", V0).set(1)
    m.LAST_RELEASE.labels("chat-main").set(time.time())
    m.REPLICAS_READY.labels("smollm2").set(1)
    m.ENGINE_BATCH.labels("smollm2").set(2)
    m.ENGINE_QUEUE.labels("smollm2").set(0)
    m.RETRAIN_SECONDS.labels("chat-main")
    print(m.expose(0), flush=True)
    while True:
        once(draw)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
