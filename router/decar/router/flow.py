"""Flow ensembles: which masked tokens are revealed when, and how that moves the experts' weights. Knows no rows.

Shapes: K experts, N masked positions of an answer, n positions of one step, S steps.
t runs from 0 (all masked) to 1 (all revealed); κ(t) is the probability that a token is revealed at time t.
Sources: mask path and Euler step, arXiv 2407.15595; ancestral step, MDLM, arXiv 2406.07524; blocks, and the most
confident first, LLaDA, arXiv 2502.09992; weights, arXiv 2601.03184. `docs/theory.md` derives them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from decar.router.manifest import MAX_STEPS, Order, Schedule
from decar.router.posterior import Float64s, moved_on

Int64s = npt.NDArray[np.int64]
Sampler = Literal["ancestral", "euler"]

NOISE_STRIDE = MAX_STEPS
"""More than any position, and than any number of steps: `decide` counts its noise in 32 bits, these are two halves."""


def kappa(schedule: Schedule, t: npt.ArrayLike) -> Float64s:
    """κ(t), the probability that a token is revealed at ``t``: linear t, cosine 1 − cos(πt/2). The shape is ``t``'s."""
    times = np.asarray(t, dtype=np.float64)
    if schedule == "linear":
        return times
    return np.asarray(1 - np.cos(np.pi / 2 * times))


def kappa_inverse(schedule: Schedule, share: npt.ArrayLike) -> Float64s:
    """The t with κ(t) = ``share``, from 0 to 1."""
    shares = np.asarray(share, dtype=np.float64)
    if schedule == "linear":
        return shares
    return np.asarray(2 / np.pi * np.arccos(1 - shares))


def rate(schedule: Schedule, t: npt.ArrayLike) -> Float64s:
    """κ'(t) / (1 − κ(t)), what a velocity is scaled by: u_t = rate · (p − δ_mask). ``t`` from 0 to less than 1."""
    times = np.asarray(t, dtype=np.float64)
    if schedule == "linear":
        return np.asarray(1 / (1 - times))
    return np.asarray(np.pi / 2 * np.tan(np.pi / 2 * times))


def revealed_shares(schedule: Schedule, steps: int, sampler: Sampler = "ancestral") -> Float64s:
    """With which probability a position is revealed by the end of each of ``steps`` equal steps of time.

    In a step from t to t' a position that is still masked is revealed with probability (κ(t') − κ(t)) / (1 − κ(t))
    (ancestral: the mask path's own), or (t' − t) κ'(t) / (1 − κ(t)), at most 1 (euler: the velocity at t, held for the
    step). In the last step all that is left is revealed.

    Returns:
        [S], the last one 1; for ancestral steps the others are κ(1 / S), κ(2 / S), …
    """
    if sampler == "ancestral":
        shares = kappa(schedule, np.arange(1, steps + 1) / steps)
    else:
        shares = 1 - np.cumprod(1 - np.minimum(rate(schedule, np.arange(steps) / steps) / steps, 1.0))
    shares[-1] = 1.0
    return shares


def deal_steps(steps: int, lengths: Sequence[int]) -> list[int]:
    """How many of an answer's ``steps`` each of its blocks gets, in proportion to its length, and at least one.

    Each step goes to the block that has the most tokens for a step, the leftmost of equals; so there are as many as
    asked for, unless there are more blocks than that.

    Args:
        lengths: the blocks', each at least 1.
    """
    dealt = [1] * len(lengths)
    neediest = [(-float(length), block) for block, length in enumerate(lengths)]
    heapq.heapify(neediest)
    for _ in range(steps - len(lengths) if lengths else 0):
        _, block = neediest[0]
        dealt[block] += 1
        heapq.heapreplace(neediest, (-lengths[block] / dealt[block], block))
    return dealt


@dataclass(frozen=True)
class Step:
    """One step that reveals something.

    Attributes:
        index: of the step among all of the answer's, from 0; those that reveal nothing are counted.
        positions: [n], in order: which positions are revealed; or, most confident first, the whole block's, of which
            those that are still masked compete.
        count: how many of them are revealed.
    """

    index: int
    positions: Int64s
    count: int


def plan(
    masked: npt.ArrayLike,
    order: Order,
    schedule: Schedule = "linear",
    steps: int | None = None,
    block_length: int | None = None,
    seed: int = 0,
    sampler: Sampler = "ancestral",
) -> list[Step]:
    """The steps in which an answer is revealed; those that reveal nothing are left out, since they ask no expert.

    Which positions are revealed when does not depend on tokens, so all of it is drawn before the first step, from
    ``np.random.Generator(np.random.Philox(key=seed))``, block by block. With ``steps`` None that is a permutation of
    the block, by ``permutation``; else a uniform number u for each of its positions, from left to right, by ``random``:
    a position is revealed in the first step by whose end that has a probability above u (`revealed_shares`). That is
    the same as a draw for each position that is still masked in each step. The other orders draw nothing: by the end of
    a step round(share · N) of the block's N positions are revealed, a half rounded to even.

    Args:
        masked: [N], different positions of the text from 0 to 65,535.
        order: ``random``, ``left-to-right``, or ``confident``: those whose tokens have the highest probability.
        schedule: see `kappa`.
        steps: of the whole answer, from 1 to 65,536, dealt to blocks by `deal_steps`; None is one for each token.
        block_length: how many masked positions are revealed before any to their right; None is all. The last block may
            be shorter.
        seed: not negative.
        sampler: see `revealed_shares`.

    Raises:
        ValueError: a value that is none of these.
    """
    positions = np.unique(np.asarray(masked, dtype=np.int64))
    _check(masked, positions, order, schedule, steps, block_length, seed, sampler)
    length = block_length or max(len(positions), 1)
    blocks = [positions[start : start + length] for start in range(0, len(positions), length)]
    sizes = [len(block) for block in blocks]
    rng = np.random.Generator(np.random.Philox(key=seed))
    planned: list[Step] = []
    begin = 0
    for block, own in zip(blocks, sizes if steps is None else deal_steps(steps, sizes), strict=True):
        # By position of the block: the step that reveals it; most confident first, only how many each reveals.
        if steps is None:
            step_of = rng.permutation(own) if order == "random" else np.arange(own)
        else:
            shares = revealed_shares(schedule, own, sampler)
            if order == "random":
                step_of = np.searchsorted(shares, rng.random(len(block)), side="right")
            else:
                revealed = np.rint(len(block) * shares)
                step_of = np.searchsorted(revealed, np.arange(len(block)), side="right")
        by_step = np.argsort(step_of, kind="stable")
        indices, starts = np.unique(step_of[by_step], return_index=True)
        for index, chosen in zip(indices, np.split(block[by_step], starts[1:]), strict=True):
            candidates = block if order == "confident" else chosen
            planned.append(Step(begin + int(index), candidates, len(chosen)))
        begin += own
    return planned


class Revealing:
    """One answer while it is revealed: whoever drives it asks for rows and says what they gave.

        while not answer.done:
            positions = answer.asks()
            ...  # the experts' rows at positions, given all that is revealed; decar.kernels.reveal
            positions, tokens = answer.takes(positions, tokens, log_probs, expert_log_probs)
            ...  # write tokens at positions

    One token a step is exact; several at once are sampled, and weigh the experts, as if they were independent of each
    other given what was revealed before (`docs/theory.md`, "Flows"). Nothing depends on other answers. What is not
    described here is as for `plan`.

    Args:
        log_weights: [K], as the answer begins; -inf for an expert that takes no part. With all weight on one expert,
            drawn by the weights (`decar.router.drawn`), the answer is a sample of the mixture of the experts' own
            processes, exact for any number of steps.
        posterior: whether every token moves the weights on, as under the router of that name.

    Attributes:
        log_weights: [K], after what has been revealed.
        masked: positions, in order, that are still masked.

    Raises:
        ValueError: as `plan`.
    """

    def __init__(
        self,
        masked: npt.ArrayLike,
        order: Order,
        schedule: Schedule,
        steps: int | None,
        block_length: int | None,
        seed: int,
        log_weights: npt.ArrayLike,
        *,
        sampler: Sampler = "ancestral",
        posterior: bool = True,
    ):
        self.masked: Int64s = np.sort(np.asarray(masked, dtype=np.int64))
        self.log_weights: Float64s = np.array(log_weights, dtype=np.float64)
        self._plan = plan(masked, order, schedule, steps, block_length, seed, sampler)
        self._next = 0
        self._posterior = posterior
        self._confident = order == "confident"

    @property
    def done(self) -> bool:
        """Whether nothing is masked any more."""
        return self._next == len(self._plan)

    @property
    def step(self) -> int:
        """The index of the step that `asks` is about; when all is done, of the last one."""
        return self._plan[min(self._next, len(self._plan) - 1)].index if self._plan else 0

    def asks(self) -> Int64s:
        """Positions [n], in order, whose rows are needed now; none only when all is done."""
        if self.done:
            return np.empty(0, dtype=np.int64)
        positions = self._plan[self._next].positions
        if self._confident:
            return self.masked[: np.searchsorted(self.masked, positions[-1], side="right")]
        return positions

    def noise(self) -> Int64s:
        """What `decar.kernels.reveal` is to be given as ``positions`` [n] for `asks`: step · 65,536 + position.

        A position that was not among the most confident is sampled again in the next step, with noise of its own.
        """
        return self.step * NOISE_STRIDE + self.asks()

    def takes(
        self,
        positions: npt.ArrayLike,
        tokens: npt.ArrayLike,
        log_probs: npt.ArrayLike,
        expert_log_probs: npt.ArrayLike,
    ) -> tuple[Int64s, Int64s]:
        """End the step with what was sampled for `asks`: reveal tokens and move the weights on by Bayes' rule.

        Weights stay where no expert that takes part could have given all of the tokens.

        Args:
            positions: [n], what `asks` said.
            tokens: [n].
            log_probs: [n], of the tokens under the mixture; they say which are the most confident, the leftmost of
                equals.
            expert_log_probs: [n, K], of the tokens under each expert; -inf or NaN where it has no part.

        Returns:
            positions and tokens that are revealed, from left to right.

        Raises:
            ValueError: positions that were not asked for, or nothing was.
        """
        if self.done or not np.array_equal(positions, self.asks()):
            raise ValueError("takes() is given what was sampled for the positions of asks(), in their order")
        most_confident = np.argsort(-np.asarray(log_probs), kind="stable")
        chosen = np.sort(most_confident[: self._plan[self._next].count])
        revealed = np.asarray(positions, dtype=np.int64)[chosen]
        if self._posterior:
            said = np.asarray(expert_log_probs, dtype=np.float64)[chosen].sum(axis=0)
            self.log_weights = moved_on(self.log_weights, said)
        self.masked = np.delete(self.masked, np.searchsorted(self.masked, revealed))
        self._next += 1
        return revealed, np.asarray(tokens, dtype=np.int64)[chosen]


def prompt_chunks(length: int, chunks: int) -> list[range]:
    """Cut a prompt of ``length`` known tokens into ``chunks`` of nearly equal length, from left to right, by which to
    weigh the experts; as many as there are tokens, if that is fewer.

    For a chunk each expert reads the text with the chunk's tokens, and all to their right, masked, so that it is always
    as long as in the answer. An expert's log-likelihood of the prompt is the sum of its log-probabilities of each
    chunk's tokens: exact by the chain rule between chunks, and factorised within one, as when several are revealed at
    once. `decar.router.moved_on` makes weights of it.
    """
    count = min(chunks, length)
    return [range(length * i // count, length * (i + 1) // count) for i in range(count)]


def _check(
    masked: npt.ArrayLike,
    positions: Int64s,
    order: str,
    schedule: str,
    steps: int | None,
    block_length: int | None,
    seed: int,
    sampler: str,
) -> None:
    for name, value, known in (
        ("order", order, get_args(Order)),
        ("schedule", schedule, get_args(Schedule)),
        ("sampler", sampler, get_args(Sampler)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if steps is not None and not 1 <= steps <= NOISE_STRIDE:
        raise ValueError(f"steps must be from 1 to {NOISE_STRIDE}, or None for one a token, not {steps}")
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length must be at least 1, or None for one block, not {block_length}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, and is {seed}")
    if len(positions) != np.size(masked):
        raise ValueError("masked must give every position once")
    if len(positions) and not 0 <= positions[0] <= positions[-1] < NOISE_STRIDE:
        raise ValueError(f"masked must be positions from 0 to {NOISE_STRIDE - 1}")
