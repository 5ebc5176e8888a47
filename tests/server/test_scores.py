"""Scores of beginnings: what is known is never asked again, and never taken for what it is not."""

import random

import pytest

from decar.server.gateway.scores import PrefixScores

BLOCK = 4


def likelihood(prompt: list[int], i: int) -> float:
    """A number that depends on the whole beginning, as log p(x_i | x_<i) does."""
    return -random.Random(str(prompt[: i + 1])).random()


def ask(scores: PrefixScores, prompt: list[int]) -> tuple[int, float]:
    """Score ``prompt`` as a gateway does; how many tokens had to be asked for, and the score."""
    start, total = scores.known(prompt)
    fresh = [likelihood(prompt, i) for i in range(start, len(prompt))]
    sums = [sum(fresh[: max(end - start, 0)]) for end in range(BLOCK + 1, len(prompt) + 1, BLOCK)]
    scores.learn(prompt, start, total, sums, sum(fresh))
    length, score = scores.known(prompt)
    assert length == len(prompt)
    return len(fresh), score


def test_a_prompt_is_scored_once() -> None:
    scores = PrefixScores(BLOCK)
    prompt = list(range(11))
    asked, score = ask(scores, prompt)
    assert asked == 10
    assert score == pytest.approx(sum(likelihood(prompt, i) for i in range(1, 11)))
    assert ask(scores, prompt) == (0, score)


@pytest.mark.parametrize("shared", range(1, 14))
def test_a_shared_beginning_is_scored_once_up_to_its_last_whole_block(shared: int) -> None:
    scores = PrefixScores(BLOCK)
    one, other = list(range(14)), [*range(shared), *range(100, 120)]
    ask(scores, one)
    asked, score = ask(scores, other)
    # The prediction of a block's next token belongs to the text with that token.
    reused = max([1, *(n for n in range(BLOCK + 1, len(one), BLOCK) if n <= shared)])
    if shared == len(one):
        reused = shared
    assert asked == len(other) - reused
    assert score == pytest.approx(sum(likelihood(other, i) for i in range(1, len(other))))


def test_a_longer_prompt_begins_where_a_whole_one_ended_only_at_a_block() -> None:
    scores = PrefixScores(BLOCK)
    ask(scores, list(range(7)))
    assert ask(scores, list(range(9)))[0] == 9 - 5


@pytest.mark.parametrize("length", [1, 2])
def test_short_prompts(length: int) -> None:
    scores = PrefixScores(BLOCK)
    prompt = list(range(length))
    assert ask(scores, prompt)[0] == length - 1
    assert ask(scores, prompt)[0] == 0


def test_random_prompts_always_get_their_own_score() -> None:
    scores = PrefixScores(BLOCK, max_entries=50)
    rng = random.Random(0)
    for _ in range(500):
        prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 14))]
        _, score = ask(scores, prompt)
        assert score == pytest.approx(sum(likelihood(prompt, i) for i in range(1, len(prompt))))
        assert len(scores._sums) <= 50


def test_the_least_recently_used_are_forgotten_first() -> None:
    scores = PrefixScores(BLOCK, max_entries=2)
    ask(scores, [1, 2])
    ask(scores, [1, 3])
    assert ask(scores, [1, 2])[0] == 0
    ask(scores, [1, 4])
    assert ask(scores, [1, 2])[0] == 0
    assert ask(scores, [1, 3])[0] == 1
