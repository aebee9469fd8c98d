"""Who answers: shares, pairs, pins. Pure."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from router.arms import Arms, PairRatios, choose_arms, parse_model, pins
from router.errors import NotFound, Unavailable
from telemetry.routing import RoutingTable, VariantRoute

BASE = "v000000-aaaaaaaa"
STABLE = "v000003-bbbbbbbb"
PREVIOUS = "v000002-cccccccc"
CANARY = "v000004-dddddddd"
MAIN = VariantRoute(
    variant="chat-main", base="tiny", base_version=BASE, stable=STABLE, previous=PREVIOUS, temperature=0.8
)
CALM = VariantRoute(variant="chat-calm", base="tiny", base_version=BASE, stable=BASE, previous=BASE, temperature=0.3)
WITH_CANARY = replace(MAIN, canary=CANARY, canary_ratio=0.2)
RATIOS = PairRatios(canary=0.5, cross_variant=0.1)
DRAWS = 4000


def table(*routes: VariantRoute) -> RoutingTable:
    return RoutingTable(1, {"chat": routes})


def choose(
    routes: RoutingTable, model: str = "chat", *, wants_pair: bool = False, absent: tuple[str, ...] = (), seed: int = 0
) -> Arms:
    return choose_arms(
        routes,
        model,
        wants_pair=wants_pair,
        ratios=RATIOS,
        has=lambda base, version: version not in absent,
        draw=random.Random(seed),
    )


def share_of(routes: RoutingTable, *, wants_pair: bool) -> dict[tuple[tuple[str, str], ...], tuple[float, float]]:
    """Arms → (share over many seeds, the propensity that each draw states)."""
    drawn = [choose(routes, wants_pair=wants_pair, seed=seed) for seed in range(DRAWS)]
    names = [tuple((arm.variant, arm.version) for arm in arms.sides) for arms in drawn]
    stated = dict(zip(names, (arms.propensity for arms in drawn), strict=True))
    return {name: (count / DRAWS, stated[name]) for name, count in Counter(names).items()}


def test_a_plain_request_is_answered_by_the_first_variants_stable() -> None:
    arms = choose(table(MAIN, CALM))
    assert [(arm.variant, arm.version, arm.channel) for arm in arms.sides] == [("chat-main", STABLE, "stable")]
    assert arms.propensity == 1.0


def test_the_canary_gets_its_share_of_plain_requests() -> None:
    shares = share_of(table(WITH_CANARY), wants_pair=False)
    assert shares[(("chat-main", CANARY),)] == (pytest.approx(0.2, abs=0.03), 0.2)
    assert shares[(("chat-main", STABLE),)] == (pytest.approx(0.8, abs=0.03), 0.8)


def test_a_canary_that_no_replica_holds_gets_nothing() -> None:
    arms = [choose(table(WITH_CANARY), absent=(CANARY,), seed=seed) for seed in range(200)]
    assert {arm.version for chosen in arms for arm in chosen.sides} == {STABLE}
    assert {chosen.propensity for chosen in arms} == {1.0}


def test_a_pair_without_a_canary_is_two_answers_of_stable_now_and_then_across_variants() -> None:
    shares = share_of(table(MAIN, CALM), wants_pair=True)
    same = (("chat-main", STABLE), ("chat-main", STABLE))
    cross = (("chat-main", STABLE), ("chat-calm", BASE))
    assert shares == {
        same: (pytest.approx(0.9, abs=0.02), pytest.approx(0.9)),
        cross: (pytest.approx(0.1, abs=0.02), pytest.approx(0.1)),
    }


def test_half_of_the_pairs_set_a_canary_against_stable() -> None:
    shares = share_of(table(WITH_CANARY, CALM), wants_pair=True)
    against = (("chat-main", CANARY), ("chat-main", STABLE))
    assert shares[against] == (pytest.approx(0.45, abs=0.03), pytest.approx(0.45))
    assert sum(propensity for _, propensity in shares.values()) == pytest.approx(1.0)


def test_the_chance_of_a_cross_variant_pair_is_spread_over_the_other_variants() -> None:
    third = replace(CALM, variant="chat-wild", stable="v000009-eeeeeeee")
    shares = share_of(table(MAIN, CALM, third), wants_pair=True)
    cross = {name: share for name, share in shares.items() if name[0] != name[1]}
    assert len(cross) == 2
    assert [propensity for _, propensity in cross.values()] == [pytest.approx(0.05)] * 2


@pytest.mark.parametrize(
    ("model", "version", "channel", "variant"),
    [
        ("chat@stable", STABLE, "stable", "chat-main"),
        ("chat@canary", CANARY, "canary", "chat-main"),
        ("chat@base", BASE, "base", "chat-main"),
        (f"chat@{PREVIOUS}", PREVIOUS, "pinned", "chat-main"),
        ("chat@chat-calm", BASE, "pinned", "chat-calm"),
    ],
)
def test_a_pin_leaves_no_choice(model: str, version: str, channel: str, variant: str) -> None:
    routes = table(WITH_CANARY, CALM)
    for seed in range(20):
        arms = choose(routes, model, seed=seed)
        assert [(arm.version, arm.channel, arm.variant) for arm in arms.sides] == [(version, channel, variant)]
        assert arms.propensity == 1.0


def test_a_pinned_pair_is_two_answers_of_the_pinned_version() -> None:
    arms = choose(table(WITH_CANARY, CALM), "chat@canary", wants_pair=True)
    assert [arm.version for arm in arms.sides] == [CANARY, CANARY]


@pytest.mark.parametrize("model", ["other", "chat@canary", "chat@v999999-aaaaaaaa", "@stable", "chat@@"])
def test_a_model_that_is_not_there_is_refused(model: str) -> None:
    with pytest.raises(NotFound) as refusal:
        choose(table(MAIN), model)
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


def test_every_pin_that_is_listed_can_be_chosen() -> None:
    routes = table(WITH_CANARY, CALM)
    for name, _ in pins(routes.policies["chat"]):
        assert choose(routes, f"chat@{name}").sides


def test_a_models_policy_and_pin_are_parted_at_the_first_at_sign() -> None:
    assert [parse_model(model) for model in ("chat", "chat@stable")] == [("chat", ""), ("chat", "stable")]


def test_before_the_first_table_a_client_is_told_to_come_again() -> None:
    with pytest.raises(Unavailable) as refusal:
        choose(RoutingTable(0, {}))
    assert (refusal.value.code, refusal.value.retry_after_s) == ("starting", 1.0)
