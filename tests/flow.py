"""The yardstick of flow ensembles: tiny denoisers, the law of every text they can reveal, and a slow sampler.

Written from the definitions alone and importing nothing from decar, so that a mistake there cannot hide here.

Shapes: K experts, B texts, L positions, V ids, one of which is the mask's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 8

Subsets = Callable[[int, tuple[int, ...]], Iterable[tuple[float, tuple[int, ...]]]]
"""Of a step's index and what is still masked: with which probability which positions are revealed together."""


class Denoisers:
    """K random networks of one layer: from a partly masked text to a row of logits at every position.

    ``left_looking``: a row depends on what is to the left of its position alone, as that of an autoregressive model.
    """

    def __init__(
        self, vocabulary: int, length: int, experts: int = 3, seed: int = 0, left_looking: bool = False
    ):
        rng = np.random.default_rng(seed)
        self.vocabulary, self.length, self.mask = vocabulary + 1, length, vocabulary // 2
        self.ids = [token for token in range(self.vocabulary) if token != self.mask]
        self.prior = rng.dirichlet(np.full(experts, 5.0))
        self._embedding = rng.normal(size=(experts, length, self.vocabulary, WIDTH))
        self._mixing = rng.normal(size=(experts, length, length))
        if left_looking:
            self._mixing = np.tril(self._mixing, k=-1)
        self._out = rng.normal(size=(experts, WIDTH, self.vocabulary)) / 2
        self._bias = rng.normal(size=(experts, 1, length, self.vocabulary))

    def logits(self, texts: np.ndarray) -> np.ndarray:
        """Rows [K, B, L, V] float32 of texts [B, L]; the mask's own logit is -inf, before any normaliser is taken."""
        embedded = self._embedding[:, np.arange(self.length), texts]
        hidden = np.tanh(np.einsum("kij,kbjd->kbid", self._mixing, embedded))
        logits = np.einsum("kbid,kdv->kbiv", hidden, self._out) + self._bias
        logits[..., self.mask] = -np.inf
        return logits.astype(np.float32)

    def probabilities(self, text: Sequence[int]) -> np.ndarray:
        """[K, L, V] of one text."""
        return softmax(self.logits(np.array([text]))[:, 0].astype(np.float64))

    def tables(self) -> np.ndarray:
        """`probabilities` of every partly masked text: [V] * L + [K, L, V]."""
        texts = np.array(list(itertools.product(range(self.vocabulary), repeat=self.length)))
        every = softmax(self.logits(texts).astype(np.float64))
        shape = [self.vocabulary] * self.length
        return np.moveaxis(every, 0, 1).reshape(*shape, len(self.prior), self.length, self.vocabulary)

    def masked_text(self) -> tuple[int, ...]:
        return (self.mask,) * self.length


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------------- laws


def law_of_own_processes(denoisers: Denoisers, orders: Sequence[Sequence[int]]) -> np.ndarray:
    """The law [V] * L of: draw an expert by its prior and an order, and let the expert reveal a token at a time in it.

    No weight but the prior's is in it: that Bayes' rule gives the same is the claim under test.
    """
    tables = denoisers.tables()
    law = np.zeros([denoisers.vocabulary] * denoisers.length)
    for text in itertools.product(denoisers.ids, repeat=denoisers.length):
        for order in orders:
            z = list(denoisers.masked_text())
            of_experts = np.ones(len(denoisers.prior))
            for position in order:
                of_experts *= tables[tuple(z)][:, position, text[position]]
                z[position] = text[position]
            law[text] += denoisers.prior @ of_experts / len(orders)
    return law


def law_of_steps(denoisers: Denoisers, weights: np.ndarray, subsets: Subsets) -> np.ndarray:
    """The law [V] * L of revealing positions together, each from the mixture alone, and weights by the product."""
    tables = denoisers.tables()
    law = np.zeros([denoisers.vocabulary] * denoisers.length)

    def walk(z: tuple[int, ...], weights: np.ndarray, step: int, probability: float) -> None:
        masked = tuple(i for i, token in enumerate(z) if token == denoisers.mask)
        if not masked:
            law[z] += probability
            return
        for chance, chosen in subsets(step, masked):
            of_experts = tables[z][:, list(chosen)]  # [K, n, V]
            mixture = np.einsum("k,knv->nv", weights, of_experts)
            for tokens in itertools.product(denoisers.ids, repeat=len(chosen)):
                after = list(z)
                for position, token in zip(chosen, tokens, strict=True):
                    after[position] = token
                each = np.arange(len(chosen)), list(tokens)
                said = of_experts[:, *each].prod(axis=1)
                moved = weights * said / (weights @ said)
                walk(tuple(after), moved, step + 1, probability * chance * mixture[each].prod())

    walk(denoisers.masked_text(), weights, 0, 1.0)
    return law


def autoregressive(denoisers: Denoisers, prefix: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The posterior ensemble of left-looking experts: the next token's distribution [V], and the weights [K] in it."""
    weights = denoisers.prior.copy()
    text = list(prefix) + [denoisers.mask] * (denoisers.length - len(prefix))
    rows = denoisers.probabilities(text)
    for position, token in enumerate(prefix):
        weights = weights * rows[:, position, token]
    weights /= weights.sum()
    return weights @ rows[:, len(prefix)], weights


def every_subset(chances: Sequence[float]) -> Subsets:
    """Each masked position on its own, with the chance of the step; in the last one it is 1."""

    def subsets(step: int, masked: tuple[int, ...]) -> Iterable[tuple[float, tuple[int, ...]]]:
        for count in range(len(masked) + 1):
            chance = chances[step] ** count * (1 - chances[step]) ** (len(masked) - count)
            if chance > 0:
                yield from ((chance, chosen) for chosen in itertools.combinations(masked, count))

    return subsets


def leftmost(counts: Sequence[int]) -> Subsets:
    return lambda step, masked: [(1.0, masked[: counts[step]])]


# ---------------------------------------------------------------------------------------------- a sampler


@dataclass
class Asked:
    """One request: a text [L] with masks, and how it is to be revealed."""

    text: Sequence[int]
    order: str = "random"
    schedule: str = "linear"
    steps: int | None = None
    block_length: int | None = None
    seed: int = 0
    sampler: str = "ancestral"
    posterior: bool = True
    rule: str = "velocity"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def slowly_revealed(denoisers: Denoisers, asked: Asked) -> tuple[list[int], dict[int, float], np.ndarray]:
    """The text, the log-probability of each revealed token, and the weights after it: one position at a time."""
    z, weights, log_probs = list(asked.text), denoisers.prior.copy(), {}
    masked = [i for i, token in enumerate(z) if token == denoisers.mask]
    length = asked.block_length or max(len(masked), 1)
    blocks = [masked[i : i + length] for i in range(0, len(masked), length)]
    rng = np.random.Generator(np.random.Philox(key=asked.seed))
    begun = 0  # steps of blocks before
    for block, steps in zip(blocks, _dealt(asked.steps, blocks), strict=True):
        uniform, turns = [], []
        if asked.order == "random" and asked.steps is None:
            turns = list(rng.permutation(len(block)))
        elif asked.order == "random":
            uniform = list(rng.random(len(block)))
        for step in range(steps):
            left = [i for i in block if z[i] == denoisers.mask]
            share = _share(asked, steps, step)
            if turns:
                now = [block[i] for i in range(len(block)) if turns[i] == step]
            elif uniform:
                now = [i for i in left if uniform[block.index(i)] < share]
            elif asked.steps is None:
                now = left if asked.order == "confident" else left[:1]
            else:
                count = round(len(block) * share) - (len(block) - len(left))
                now = left[:count] if asked.order == "left-to-right" else left
            keep = len(now)
            if asked.order == "confident":
                keep = 1 if asked.steps is None else count
            if not keep:
                continue
            rows = denoisers.probabilities(z)
            drawn = []
            for i in now:
                mixed = mixture(rows[:, i], weights, asked.rule)
                noise = gumbel(asked.seed, (begun + step) * 65536 + i, denoisers.vocabulary)
                token = choice(mixed, noise, asked)
                drawn.append((-math.log(mixed[token]), i, token))
            said = np.ones(len(weights))
            for surprise, i, token in sorted(drawn)[:keep]:
                z[i], log_probs[i] = token, -surprise
                said *= rows[:, i, token]
            if asked.posterior:
                weights = weights * said / (weights @ said)
        begun += steps
    return z, log_probs, weights


def mixture(rows: np.ndarray, weights: np.ndarray, rule: str) -> np.ndarray:
    """[V] of rows [K, V]."""
    if rule == "velocity":
        return weights @ rows
    geometric = np.prod(rows ** weights[:, None], axis=0)
    return geometric / geometric.sum()


def choice(mixed: np.ndarray, noise: np.ndarray, asked: Asked) -> int:
    """The token of a mixture [V]: at a temperature, of those that min-p, then top-k, then top-p keep."""
    if asked.temperature == 0:
        return int(mixed.argmax())
    heated = mixed ** (1 / asked.temperature)
    ranked = sorted(range(len(mixed)), key=lambda token: (-heated[token], token))
    kept = [token for token in ranked if heated[token] >= asked.min_p * heated[ranked[0]]]
    if asked.top_k:
        kept = kept[: asked.top_k]
    nucleus, mass = [], 0.0
    for token in kept:
        if asked.top_p < 1 and mass >= asked.top_p * heated[kept].sum():
            break
        nucleus.append(token)
        mass += heated[token]
    possible = [token for token in nucleus if heated[token] > 0]
    return max(possible, key=lambda token: math.log(heated[token]) + noise[token])


def gumbel(seed: int, counter: int, vocabulary: int) -> np.ndarray:
    """Token v's noise: word v % 4 of Philox4x32-7 with the seed as key, of the counters (v // 4, counter, 0, 0)."""
    noise = []
    for quarter in range(-(-vocabulary // 4)):
        words, key = [quarter, counter, 0, 0], [seed % 2**32, seed >> 32]
        for _ in range(7):
            even, odd = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
            words = [odd >> 32 ^ words[1] ^ key[0], odd % 2**32, even >> 32 ^ words[3] ^ key[1], even % 2**32]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        noise += [-math.log(-math.log1p(-min((word + 0.5) / 2**32, 1 - 2**-24))) for word in words]
    return np.array(noise[:vocabulary])


def _dealt(steps: int | None, blocks: Sequence[Sequence[int]]) -> list[int]:
    """One step each, and every further one to the block with most positions a step."""
    if steps is None:
        return [len(block) for block in blocks]
    dealt = [1] * len(blocks)
    while sum(dealt) < steps and blocks:
        neediest = max(range(len(blocks)), key=lambda b: (len(blocks[b]) / dealt[b], -b))
        dealt[neediest] += 1
    return dealt


def _share(asked: Asked, steps: int, step: int) -> float:
    """With which probability a position is revealed by the end of the step."""
    if step == steps - 1:
        return 1.0
    if asked.sampler == "ancestral":
        time = (step + 1) / steps
        return time if asked.schedule == "linear" else 1 - math.cos(math.pi / 2 * time)
    return 1 - math.prod(1 - chance for chance in euler_chances(asked.schedule, steps)[: step + 1])


def euler_chances(schedule: str, steps: int) -> list[float]:
    """h κ'(t) / (1 − κ(t)), at most 1, and 1 in the last step."""
    chances = []
    for step in range(steps - 1):
        t = step / steps
        if schedule == "linear":
            slope, left = 1.0, 1 - t
        else:
            slope, left = math.pi / 2 * math.sin(math.pi / 2 * t), math.cos(math.pi / 2 * t)
        chances.append(min(slope / left / steps, 1.0))
    return [*chances, 1.0]


def ancestral_chances(schedule: str, steps: int) -> list[float]:
    """(κ(t') − κ(t)) / (1 − κ(t)), and 1 in the last step."""

    def kappa(t: float) -> float:
        return t if schedule == "linear" else 1 - math.cos(math.pi / 2 * t)

    return [
        (kappa((step + 1) / steps) - kappa(step / steps)) / (1 - kappa(step / steps))
        for step in range(steps - 1)
    ] + [1.0]
