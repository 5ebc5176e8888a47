"""Ways to use one ensemble, as arithmetic on what its experts say of a text. Knows no models and no files.

Shapes: K experts, T tokens of the continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from decar.router import log_weights_after, prune, top_k
from decar.router.flow import Int64s
from decar.router.manifest import Mixing, RouterEntry, Rule, Start
from decar.router.posterior import Float64s

Bayes = Literal["none", "output", "full"]
ROUTERS: tuple[Start, ...] = ("prior", "centroid", "classifier")


@dataclass(frozen=True)
class Scores:
    """One text, split into a prompt and a continuation, as all experts see it.

    Args:
        prompt: [K], log p_k(prompt); the first token has no prediction and is not counted.
        tokens: [T, K], log p_k of each token of the continuation.
        rows: [T, K, V] float32, log p_k of every token.
        ids: [T] int64, the continuation.
        starts: log weights [K] that each router gives for the prompt.
        steps: [T] int64, in which step each token is revealed, in order, where several may be at once; None: each in
            one of its own.
    """

    prompt: Float64s
    tokens: Float64s
    rows: Tensor
    ids: Tensor
    starts: Mapping[Start, Float64s]
    steps: Int64s | None = None

    @cached_property
    def probabilities(self) -> Tensor:
        """[T, K, V] float32."""
        return self.rows.exp()

    @cached_property
    def right(self) -> Float64s:
        """[T, K], 1 where the token is the one that the expert holds most probable, as greedy decoding chooses it."""
        return (self.rows.argmax(dim=-1) == self.ids[:, None]).double().numpy()


@dataclass(frozen=True)
class Outcome:
    """What a system makes of one text.

    Args:
        log_probs: [T], nats, of the continuation's tokens.
        right: [T], the share of its greedy choices that are the text's token: 0 or 1, unless experts are drawn.
        exact: the share of its greedy continuations that are the text's, every token of it.
        active: [T], experts that ran for each of them.
        prompt_passes: experts that ran over the prompt.
        dropped: posterior mass that pruning released.
    """

    log_probs: Float64s
    right: Float64s
    exact: float
    active: Float64s
    prompt_passes: int
    dropped: float = 0.0

    @classmethod
    def alone(cls, scores: Scores, expert: int, active: int = 1) -> Outcome:
        """Of one expert, which no router weights; or of one model in which ``active`` experts run for each token."""
        right = scores.right[:, expert]
        ran = np.full(len(right), active, dtype=np.float64)
        return cls(scores.tokens[:, expert], right, float(right.all()), ran, active)


@dataclass(frozen=True)
class System:
    """One way to serve the ensemble.

    Args:
        family: its name, but for pruning.
        start: the router that weights experts before any of them has seen the text.
        bayes: the experts' likelihoods that move the weights on: none, the output's, or prompt and output's.
        experts: keep that many, chosen when the prompt is known.
        prune: total posterior mass that may be released.
        draw: one expert is drawn by the weights after the prompt and decodes alone. In distribution that is the
            mixture with a token a step, so the log-probabilities are that mixture's, also where it reveals several at
            once. Its greedy choices are the drawn expert's.
    """

    family: str
    start: Start = "prior"
    bayes: Bayes = "none"
    rule: Rule = "velocity"
    experts: int | None = None
    prune: float = 0.0
    draw: bool = False

    @property
    def name(self) -> str:
        return f"{self.family} ε {self.prune:g}" if self.prune else self.family

    def outcome(self, scores: Scores) -> Outcome:
        num_tokens, num_experts = scores.tokens.shape
        first = scores.starts[self.start]
        if self.bayes == "full":
            first = log_weights_after(first, scores.prompt)
        if self.experts is not None:
            first = top_k(first, self.experts)
        if self.bayes == "none":
            first, left = prune(first, self.prune)
            log_weights = np.tile(first, (num_tokens, 1))
        else:
            steps = None if self.draw else scores.steps
            log_weights, left = posterior_path(first, scores.tokens, self.prune, steps)
        active = np.isfinite(log_weights).sum(axis=1).astype(np.float64)
        # What has to run over the prompt: everything that is asked about it, or will decode.
        passes = num_experts if self.bayes == "full" else int(active[0])
        if self.draw:
            weights = np.exp(log_weights[0])
            right, exact = scores.right @ weights, float(scores.right.all(axis=0) @ weights)
            active = np.ones(num_tokens)
        else:
            right = greedy_is_right(log_weights, scores, self.rule)
            exact = float(right.all())
        mixed = mix_tokens if self.rule == "velocity" else mix_logits
        return Outcome(mixed(log_weights, scores), right, exact, active, passes, self.prune - left)


def posterior_path(
    first: Float64s, tokens: Float64s, budget: float, steps: Int64s | None = None
) -> tuple[Float64s, float]:
    """Log weights [T, K] before each of ``tokens`` [T, K], from ``first`` [K], pruned at every step; budget left.

    Where ``steps`` [T] say which tokens are revealed at once, all of these have the weights of before; none is pruned.
    """
    assert steps is None or not budget
    if not budget:
        before = np.concatenate([np.zeros_like(tokens[:1]), np.cumsum(tokens, axis=0)[:-1]])
        if steps is not None:
            before = before[np.searchsorted(steps, steps)]
        return log_weights_after(first, before), budget
    path = np.empty_like(tokens)
    current = first
    for t in range(len(tokens)):
        current, budget = prune(current, budget)
        path[t] = current
        if np.isfinite(current).sum() == 1:  # alone from here on
            path[t:] = current
            break
        current = log_weights_after(current, tokens[t])
    return path, budget


def mix_tokens(log_weights: Float64s, scores: Scores) -> Float64s:
    """Velocity rule: log Σ_k w_k p_k of the continuation's tokens, [T], from log weights [T, K]."""
    return np.asarray(np.logaddexp.reduce(log_weights + scores.tokens, axis=1))


def mix_logits(log_weights: Float64s, scores: Scores) -> Float64s:
    """Logit rule: the normalised geometric mean, [T], from log weights [T, K]."""
    weights = torch.from_numpy(np.exp(log_weights)).to(scores.rows.dtype)
    mean = torch.einsum("tk,tkv->tv", weights, scores.rows)
    chosen = mean.log_softmax(dim=-1).gather(1, scores.ids[:, None])
    return chosen[:, 0].double().numpy()


def greedy_is_right(log_weights: Float64s, scores: Scores, rule: Rule) -> Float64s:
    """[T], 1 where the mixture's most probable token is the text's, from log weights [T, K]."""
    active = np.isfinite(log_weights)
    mixed = active.sum(axis=1) > 1
    right = scores.right[np.arange(len(log_weights)), log_weights.argmax(axis=1)].copy()
    if mixed.any():
        where = torch.from_numpy(np.flatnonzero(mixed))
        summands = scores.probabilities if rule == "velocity" else scores.rows
        summands = summands if mixed.all() else summands[where]
        weights = torch.from_numpy(np.exp(log_weights[mixed])).to(summands.dtype)
        # Neither rule's normalisation changes which token comes first.
        best = torch.einsum("tk,tkv->tv", weights, summands).argmax(dim=-1)
        right[mixed] = (best == scores.ids[where]).double().numpy()
    return right


DENSE = "posterior"
"""The ensemble as it is: Bayes' rule from the prior over prompt and output, nothing left out."""


def systems(num_experts: int, prunes: Sequence[float]) -> list[System]:
    """All that are compared, from the simplest to the ensemble's exact distribution and its cheaper forms.

    ``classifier→posterior``: the classifier weights the prompt, Bayes' rule the output (the manifest's scope `output`).
    """
    found = [System(router, router) for router in ROUTERS]
    for count in (1, 2)[: num_experts - 1]:
        found += [System(f"{router}, top-{count}", router, experts=count) for router in ROUTERS[1:]]
        found += [System(f"{DENSE}, top-{count}", bayes="full", experts=count)]
    found += [System(f"{router}→posterior", router, "output") for router in ROUTERS]
    found += [System(DENSE, bayes="full"), System(f"{DENSE}, drawn", bayes="full", draw=True)]
    found += [System(DENSE, bayes="full", prune=budget) for budget in prunes]
    found += [System("classifier→posterior", "classifier", "output", prune=budget) for budget in prunes]
    found += [System(f"{router}, logit rule", router, rule="logit") for router in ROUTERS]
    return [*found, System(f"{DENSE}, logit rule", bayes="full", rule="logit")]


def served(router: RouterEntry, mixing: Mixing, compared: Sequence[System]) -> System:
    """The system that a manifest's ``router`` and ``mixing`` make the default: one of ``compared``, or one more."""
    start: Start
    if router.kind == "posterior":
        bayes: Bayes = router.scope
        start = router.start if router.scope == "output" else "prior"
    else:
        bayes, start = "none", router.kind
    system = System("as served", start, bayes, mixing.rule, mixing.top_k, mixing.prune)
    return next((other for other in compared if replace(system, family=other.family) == other), system)
