"""Which masked positions are revealed when, and how that moves the weights (`tests/test_flow.py`: what is sampled)."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest

from decar.router import log_prior, moved_on
from decar.router.flow import (
    Revealing,
    deal_steps,
    kappa,
    kappa_inverse,
    plan,
    prompt_chunks,
    rate,
    revealed_shares,
)
from decar.router.manifest import Order, Schedule
from tests.flow import Denoisers, ancestral_chances, euler_chances

SCHEDULES, ORDERS = get_args(Schedule), get_args(Order)


# ---------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_goes_from_all_masked_to_all_revealed(schedule: Any) -> None:
    times = np.linspace(0, 1, 101)
    shares = kappa(schedule, times)
    assert shares[[0, -1]] == pytest.approx([0, 1])
    assert (np.diff(shares) > 0).all()
    assert kappa_inverse(schedule, shares) == pytest.approx(
        times, abs=1e-7
    )  # arccos loses half the digits at 0


def test_schedules_by_hand() -> None:
    assert kappa("linear", 0.25) == 0.25
    assert kappa("cosine", 0.5) == pytest.approx(1 - math.sqrt(0.5))
    assert kappa("cosine", [[1 / 3]]) == pytest.approx(np.array([[1 - math.sqrt(0.75)]]))
    assert rate("linear", 0.75) == pytest.approx(4)
    assert rate("cosine", 0.5) == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_is_the_derivative_over_what_is_masked(schedule: Any) -> None:
    times = np.linspace(0.05, 0.9, 18)
    slope = (kappa(schedule, times + 1e-6) - kappa(schedule, times - 1e-6)) / 2e-6
    assert rate(schedule, times) == pytest.approx(slope / (1 - kappa(schedule, times)), rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 100])
def test_shares_are_what_steps_with_their_chances_leave(schedule: Any, steps: int) -> None:
    for sampler, chances in (("ancestral", ancestral_chances), ("euler", euler_chances)):
        left = np.cumprod(1 - np.array(chances(schedule, steps)))
        assert revealed_shares(schedule, steps, sampler) == pytest.approx(1 - left)  # type: ignore[arg-type]
        assert revealed_shares(schedule, steps, sampler)[-1] == 1  # type: ignore[arg-type]


def test_eulers_steps_are_ancestral_where_the_schedule_is_linear_and_converge_to_them_where_not() -> None:
    assert revealed_shares("linear", 9, "euler") == pytest.approx(revealed_shares("linear", 9))
    few, many = (
        np.abs(revealed_shares("cosine", steps, "euler") - revealed_shares("cosine", steps)).max()
        for steps in (8, 800)
    )
    assert few > 0.05
    assert many < 0.005


# ---------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("steps", "lengths", "dealt"),
    [
        (16, [8, 8], [8, 8]),
        (8, [8, 8, 4], [3, 3, 2]),
        (4, [8, 8, 1], [2, 1, 1]),
        (1, [8, 8, 1], [1, 1, 1]),
        (100, [3], [100]),
        (7, [1, 1, 1], [3, 2, 2]),
        (5, [], []),
    ],
)
def test_steps_are_dealt_in_proportion_and_at_least_one_each(
    steps: int, lengths: list[int], dealt: list[int]
) -> None:
    assert deal_steps(steps, lengths) == dealt


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [None, 1, 2, 5, 13, 64])
@pytest.mark.parametrize("block_length", [None, 1, 4, 100])
@pytest.mark.parametrize("sampler", ["ancestral", "euler"])
def test_a_plan_reveals_every_position_once_block_after_block(
    order: Any, steps: int | None, block_length: int | None, sampler: Any
) -> None:
    """Positions that do not follow one another, and a last block that is shorter."""
    positions = np.array([3, 4, 5, 9, 12, 13, 20, 21, 22, 40, 41, 99, 100])
    length = block_length or len(positions)
    blocks = [set(positions[start : start + length].tolist()) for start in range(0, len(positions), length)]
    for schedule in SCHEDULES:
        planned = plan(positions, order, schedule, steps, block_length, 3, sampler)
        indices = [step.index for step in planned]
        assert indices == sorted(set(indices))
        assert indices[-1] < max(steps or len(positions), len(blocks))
        assert sum(step.count for step in planned) == len(positions)
        assert all(step.count >= 1 for step in planned)
        if steps is None:
            assert indices == list(range(len(positions)))
        asked = [step.positions.tolist() for step in planned]
        assert all(one == sorted(one) for one in asked)
        if order == "confident":
            assert all(set(one) in blocks for one in asked)
        else:
            assert [len(one) for one in asked] == [step.count for step in planned]
            flat = [position for one in asked for position in one]
            assert [set(part) for part in _parts(flat, [len(block) for block in blocks])] == blocks
            if order == "left-to-right":
                assert flat == positions.tolist()


def _parts(values: list[int], lengths: list[int]) -> list[list[int]]:
    ends = np.cumsum(lengths)
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def test_how_many_each_step_reveals_is_the_schedules() -> None:
    counts = [step.count for step in plan(range(12), "left-to-right", "linear", 4)]
    assert counts == [3, 3, 3, 3]
    counts = [step.count for step in plan(range(12), "confident", "cosine", 4)]
    assert counts == [1, 3, 3, 5]  # 12 κ = 0.91, 3.51, 7.41, 12
    assert [step.index for step in plan(range(2), "left-to-right", "linear", 8)] == [
        2,
        5,
    ]  # 0.5 is 0, 1.5 is 2


def test_one_step_reveals_all() -> None:
    for order in ORDERS:
        (step,) = plan(range(7), order, "cosine", 1, None, 5)
        assert (step.index, step.positions.tolist(), step.count) == (0, list(range(7)), 7)


def test_an_order_is_the_seeds_alone() -> None:
    def order(seed: int) -> list[int]:
        return [int(step.positions[0]) for step in plan(range(20), "random", seed=seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(2**63 - 1) != order(0)


def test_the_order_of_masked_positions_given_does_not_matter() -> None:
    shuffled = plan([5, 2, 9], "random", "linear", 2, seed=4)
    for one, other in zip(shuffled, plan([2, 5, 9], "random", "linear", 2, seed=4), strict=True):
        assert one.positions.tolist() == other.positions.tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": "right-to-left"}, "order must be one of random, confident, left-to-right"),
        ({"schedule": "square"}, "schedule must be one of linear, cosine"),
        ({"sampler": "heun"}, "sampler must be one of ancestral, euler"),
        ({"steps": 0}, "steps must be from 1 to 65536"),
        ({"steps": 65537}, "steps must be from 1 to 65536"),
        ({"block_length": 0}, "block_length must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"masked": [1, 2, 1]}, "every position once"),
        ({"masked": [-1, 2]}, "positions from 0 to 65535"),
        ({"masked": [2, 65536]}, "positions from 0 to 65535"),
    ],
    ids=str,
)
def test_what_is_no_plan_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan(**({"masked": [0, 1], "order": "random"} | fields))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- an answer


def an_answer(
    count: int = 4, order: Any = "left-to-right", steps: int | None = 2, **others: Any
) -> Revealing:
    return Revealing(range(10, 10 + count), order, "linear", steps, None, 0, log_prior([1, 1]), **others)


def test_weights_move_by_the_product_of_what_is_revealed() -> None:
    answer = an_answer()
    assert answer.asks().tolist() == [10, 11]
    positions, tokens = answer.takes([10, 11], [7, 8], [-1.0, -1.0], np.log([[0.5, 0.1], [0.2, 0.3]]))
    assert (positions.tolist(), tokens.tolist()) == ([10, 11], [7, 8])
    assert np.exp(answer.log_weights) == pytest.approx([0.1 / 0.13, 0.03 / 0.13])
    assert answer.masked.tolist() == answer.asks().tolist() == [12, 13]
    answer.takes([12, 13], [7, 8], [-1.0, -1.0], np.log([[0.5, 0.5], [0.3, 0.1]]))
    assert np.exp(answer.log_weights) == pytest.approx([0.03 / 0.033, 0.003 / 0.033])
    assert answer.done
    assert not len(answer.masked)


def test_weights_that_tokens_do_not_move() -> None:
    answer = an_answer(posterior=False)
    answer.takes(answer.asks(), [7, 8], [-1.0, -1.0], np.log([[0.5, 0.1], [0.2, 0.3]]))
    assert np.exp(answer.log_weights) == pytest.approx([0.5, 0.5])


def test_one_by_one_or_together_the_same_likelihoods_give_the_same_weights() -> None:
    said = np.log(np.random.default_rng(0).uniform(0.01, 1, size=(6, 2)))
    after = []
    for steps in (None, 1, 4):
        answer = an_answer(6, steps=steps)
        while not answer.done:
            positions = answer.asks()
            answer.takes(positions, positions, np.zeros(len(positions)), said[positions - 10])
        after.append(answer.log_weights)
    assert after[1] == pytest.approx(after[0])
    assert after[2] == pytest.approx(after[0])


@pytest.mark.parametrize("without", [-math.inf, math.nan])
def test_experts_that_could_not_have_given_a_token(without: float) -> None:
    answer = an_answer()
    answer.takes([10, 11], [7, 8], [-1.0, -1.0], [[-0.5, -0.1], [-0.3, without]])
    assert np.exp(answer.log_weights).tolist() == [1.0, 0.0]
    answer.takes([12, 13], [7, 8], [-1.0, -1.0], [[-0.5, -0.1], [without, -0.1]])
    assert np.exp(answer.log_weights).tolist() == [1.0, 0.0], "nobody that is left could have given it"


def test_an_answer_does_not_touch_what_it_was_given() -> None:
    log_weights, masked = log_prior([1, 1]), np.array([4, 3])
    answer = Revealing(masked, "left-to-right", "linear", None, None, 0, log_weights)
    answer.takes([3], [7], [0.0], [[-1.0, -2.0]])
    assert np.exp(log_weights) == pytest.approx([0.5, 0.5])
    assert masked.tolist() == [4, 3]


def test_the_most_confident_are_revealed_and_the_leftmost_of_equals() -> None:
    answer = an_answer(5, order="confident", steps=3)  # 2, 1 and 2 of them
    assert answer.asks().tolist() == [10, 11, 12, 13, 14]
    said = np.log([[0.9, 0.1], [0.5, 0.5], [0.2, 0.4], [0.5, 0.5], [0.3, 0.3]])
    positions, tokens = answer.takes(answer.asks(), [0, 1, 2, 3, 4], [-3.0, -1.0, -0.5, -1.0, -1.0], said)
    assert (positions.tolist(), tokens.tolist()) == ([11, 12], [1, 2])
    assert np.exp(answer.log_weights) == pytest.approx([1 / 3, 2 / 3])  # by those that are revealed alone
    assert answer.asks().tolist() == [10, 13, 14]
    positions, _ = answer.takes([10, 13, 14], [5, 6, 7], [-2.0, -2.0, -2.0], said[:3])
    assert positions.tolist() == [10]
    assert answer.takes([13, 14], [8, 9], [-9.0, -8.0], said[:2])[0].tolist() == [13, 14]
    assert answer.done


@pytest.mark.parametrize("order", ORDERS)
def test_no_two_draws_of_an_answer_share_their_noise(order: Any) -> None:
    answer = Revealing(range(40), order, "cosine", 12, 16, 3, log_prior([1]))
    seen: list[int] = []
    while not answer.done:
        positions, noise = answer.asks(), answer.noise()
        assert noise.tolist() == (answer.step * 65536 + positions).tolist()
        seen += noise.tolist()
        answer.takes(positions, positions, -np.arange(len(positions)), np.zeros((len(positions), 1)))
    assert len(seen) == len(set(seen))
    assert max(seen) < 2**32
    assert answer.step == 11


def test_what_was_not_asked_for_is_refused() -> None:
    answer = an_answer()
    for positions in ([11, 10], [10], [10, 11, 12]):
        with pytest.raises(ValueError, match="positions of asks"):
            answer.takes(positions, positions, np.zeros(len(positions)), np.zeros((len(positions), 2)))
    nothing = an_answer(0)
    assert nothing.done
    assert nothing.step == 0
    assert not len(nothing.asks())
    with pytest.raises(ValueError, match="positions of asks"):
        nothing.takes([], [], [], np.zeros((0, 2)))


# ---------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("length", "chunks", "lengths"),
    [(0, 4, []), (3, 4, [1, 1, 1]), (10, 4, [2, 3, 2, 3]), (8, 2, [4, 4]), (5, 1, [5])],
)
def test_a_prompt_is_cut_into_chunks_of_nearly_equal_length(
    length: int, chunks: int, lengths: list[int]
) -> None:
    cut = prompt_chunks(length, chunks)
    assert [len(chunk) for chunk in cut] == lengths
    assert [position for chunk in cut for position in chunk] == list(range(length))


@pytest.mark.parametrize(
    ("chunks", "parts"), [(1, [[0, 1, 2]]), (2, [[0], [1, 2]]), (3, [[0], [1], [2]]), (9, [[0], [1], [2]])]
)
def test_the_posterior_after_a_prompt(chunks: int, parts: list[list[int]]) -> None:
    """Three known tokens before two masked ones, against Bayes' rule written out for each way of cutting them."""
    experts = Denoisers(vocabulary=5, length=5)
    known = [experts.ids[4], experts.ids[0], experts.ids[3]]
    log_likelihoods = np.zeros(3)
    for chunk in prompt_chunks(len(known), chunks):
        z = [token if i < chunk.start else experts.mask for i, token in enumerate(known)] + [experts.mask] * 2
        rows = experts.probabilities(z)
        log_likelihoods += sum(np.log(rows[:, i, known[i]]) for i in chunk)
    weights = np.exp(moved_on(np.log(experts.prior), log_likelihoods))

    expected, z = experts.prior, [experts.mask] * 5
    for part in parts:
        rows = experts.probabilities(z)
        for i in part:
            expected = expected * rows[:, i, known[i]]
        for i in part:
            z[i] = known[i]
    assert weights == pytest.approx(expected / expected.sum())
