"""Rounds: every step of every answer that a flow ensemble is revealing, one round after another. Knows no HTTP.

In a round each answer says which rows it needs (`Revealing.asks`), every expert that takes part in it is asked for
them, and engines batch what they are asked. When all rows have come they lie in the plane, and one call of
`decar.kernels.reveal` mixes and samples all of them. Whoever has come meanwhile takes part in the next round, and
whoever has left does not.

Shapes: K places of experts, E entries of an expert's rows, T positions of a text, B masked positions of a round, n of
one answer, V vocabulary, N alternatives of a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from decar.kernels import Revealed, Rows, mix_rows, reveal
from decar.router import active_experts
from decar.router.flow import Revealing
from decar.router.manifest import Rule
from decar.server.gateway.engine import ExpertEngine, Speaker
from decar.server.metrics import FlowMetrics
from decar.server.protocol.flow import Denoising
from decar.server.protocol.plane import Plane

logger = logging.getLogger("decar")


@dataclass(frozen=True)
class Sampled:
    """How an answer's tokens are sampled from the mixture.

    Attributes:
        seed: not negative.
        top_k, top_p, min_p: as `reveal` takes them: 0, 1 and 0 keep all.
        alternatives: N, how many of the likeliest tokens are told with each; None: not even its own log-probability.
    """

    rule: Rule
    temperature: float
    seed: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    alternatives: int | None = None


@dataclass(eq=False)
class Answer:
    """One answer while it is revealed.

    Attributes:
        text: [T] int64, prompt and answer, with the mask token where nothing is revealed.
        begins: position of the answer's first token: the first that was masked, or the end of the prompt.
        prompt_tokens: from where on a token may end the answer.
        revealing: what is revealed when.
        speaker: tells it to the user.
        lost: is told of an expert that has died; gives log weights [K] to go on with, or raises what the answer ends
            with.
        weights: [T, K] that mixed the token at each position.
        revealed_at: [T], the step that revealed it, from 1; 0: it was given.
        said: up to which position all has been said.
        asked: positions [n] of the round that goes on.
    """

    text: np.ndarray
    begins: int
    prompt_tokens: int
    revealing: Revealing
    sampled: Sampled
    speaker: Speaker
    lost: Callable[[int], np.ndarray]
    weights: np.ndarray = field(init=False)
    revealed_at: np.ndarray = field(init=False)
    said: int = field(init=False)
    asked: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        length, alternatives = len(self.text), self.sampled.alternatives or 0
        self.weights = np.tile(np.exp(self.revealing.log_weights), (length, 1))
        self.revealed_at = np.zeros(length, np.int64)
        self.said = self.begins
        self.asked = self.revealing.asks()
        # What was given has probability 1, and no alternatives.
        self._token_ids = np.repeat(self.text[:, None], 1 + alternatives, axis=1)
        self._log_probs = np.zeros((length, 1 + alternatives))
        self._ranks = np.ones(length, np.int64)

    @property
    def active(self) -> list[int]:
        """The experts that take part."""
        return active_experts(self.revealing.log_weights)

    def take(
        self, tokens: np.ndarray, log_probs: np.ndarray, expert_log_probs: np.ndarray, best: Best | None
    ) -> bool:
        """End a step with what was sampled at ``asked``, and say what is whole by now; whether the answer goes on.

        Args:
            tokens, log_probs: [n].
            expert_log_probs: [n, K].
            best: [n, N] alternatives.
        """
        step, weights = self.revealing.step, np.exp(self.revealing.log_weights)
        positions, found = self.revealing.takes(self.asked, tokens, log_probs, expert_log_probs)
        chosen = np.searchsorted(self.asked, positions)
        self.text[positions] = self._token_ids[positions, 0] = found
        self._log_probs[positions, 0] = log_probs[chosen]
        if best is not None:
            self._token_ids[positions, 1:], self._log_probs[positions, 1:] = (
                best.tokens[chosen],
                best.log_probs[chosen],
            )
            self._ranks[positions] = best.ranks[chosen]
        self.weights[positions] = weights
        self.revealed_at[positions] = step + 1
        self.asked = self.revealing.asks()
        return self._say()

    def _say(self) -> bool:
        """Nothing that is revealed changes, so all up to the first mask can be said."""
        masked, length = self.revealing.masked, len(self.text)
        until = int(masked[0]) if len(masked) else length
        finish = None if len(masked) else "length" if length > self.prompt_tokens else "stop"
        first = max(self.said, self.prompt_tokens)
        end = next((i for i in range(first, until) if int(self.text[i]) in self.speaker.ends), None)
        if end is not None:
            until, finish = end + 1, "stop"
        new = slice(self.said, until)
        if new.start == new.stop:
            return True
        told = None
        if self.sampled.alternatives is not None:
            told = self._token_ids[new], self._log_probs[new], self._ranks[new]
        self.said = until
        return self.speaker.say(self.text[new].tolist(), told, finish)


@dataclass(frozen=True)
class Best:
    """The likeliest tokens of positions under the mixture: [n, N], best first; and the rank [n] of what was sampled."""

    tokens: np.ndarray
    log_probs: np.ndarray
    ranks: np.ndarray


class Rounds:
    """Reveals answers together.

    Args:
        experts: by place.
        plane: has their rows.
        metrics: told of each round.
        mask_token_id: as experts have learned it.
    """

    def __init__(
        self, experts: Sequence[ExpertEngine], plane: Plane, metrics: FlowMetrics, mask_token_id: int
    ):
        self._experts, self._metrics, self._mask = experts, metrics, mask_token_id
        rows, log_normalisers = plane.fields["rows"], plane.fields["log_normaliser"]
        self._entries = rows.shape[1]
        self._rows = Rows([*map(torch.from_numpy, rows)], [*map(torch.from_numpy, log_normalisers)])
        self._answers: list[Answer] = []  # who has waited longest comes first
        self._some = asyncio.Event()
        self._numbers = itertools.count()
        self._task: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> int:
        """How many answers are being revealed."""
        return len(self._answers)

    def needs(self, expert: int) -> bool:
        """Whether it takes part in an answer."""
        return any(expert in answer.active for answer in self._answers)

    def join(self, answer: Answer) -> None:
        """Reveal an answer from the next round on, until all is said or it `leave`s."""
        self._answers.append(answer)
        self._some.set()
        if self._task is None:
            # Not in the context of whoever comes first, whose request it would keep.
            self._task = asyncio.create_task(self._run(), context=contextvars.Context())

    def leave(self, answer: Answer) -> None:
        """Nobody wants it any more; quiet if it has ended."""
        with contextlib.suppress(ValueError):
            self._answers.remove(answer)

    def stop(self) -> None:
        """Begin no more rounds."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            while self._answers:
                await self._round()

    async def _round(self) -> None:
        answers = self._due()
        try:
            ready = await self._compute(answers)
            if ready:
                await self._reveal(ready)
        except Exception as error:
            logger.exception("a round has failed")
            for answer in answers:
                self._end(answer, error)

    def _due(self) -> list[Answer]:
        """Those whose rows find room, the longest waiting first; they come last in the next round."""
        room = self._entries
        due = []
        for answer in self._answers:
            room -= len(answer.asked)
            if room < 0:
                break
            due.append(answer)
        self._answers[:] = [*self._answers[len(due) :], *due]
        return due

    def _end(self, answer: Answer, error: Exception) -> None:
        answer.speaker.fail(error)
        self.leave(answer)

    # --- rows ---------------------------------------------------------------------------------------------

    async def _compute(self, answers: Sequence[Answer]) -> list[tuple[Answer, range]]:
        """Have the experts write the answers' rows; those whose rows have come, and in which entries they are."""
        number, first = next(self._numbers), 0
        parts, asked = [], []
        for i, answer in enumerate(answers):
            entries = range(first, first + len(answer.asked))
            first = entries.stop
            parts.append((answer, entries))
            tokens = answer.text.tolist()
            part = Denoising(self._mask, answer.asked, np.asarray(entries))
            for k in answer.active:
                engine = self._experts[k].engine  # by the end of the round the expert may have another
                asked.append((i, k, engine, engine.denoise(f"round-{number}-{i}", tokens, part)))
        results = await asyncio.gather(*(work for *_, work in asked), return_exceptions=True)
        failed: dict[int, dict[int, BaseException | None]] = {}
        for (i, k, engine, _), result in zip(asked, results, strict=True):
            if isinstance(result, BaseException):
                failed.setdefault(i, {})[k] = None if engine.client.errored else result
        for i, errors in failed.items():
            self._go_on_without(answers[i], errors)
        there = set(self._answers)
        return [part for i, part in enumerate(parts) if i not in failed and part[0] in there]

    def _go_on_without(self, answer: Answer, errors: dict[int, BaseException | None]) -> None:
        """Take experts that have died (None) out of an answer, which asks again in the next round; or end it."""
        for k, error in errors.items():
            try:
                if error is not None:
                    raise error
                answer.revealing.log_weights = answer.lost(k)
            except Exception as ends:
                return self._end(answer, ends)

    # --- tokens -------------------------------------------------------------------------------------------

    async def _reveal(self, ready: Sequence[tuple[Answer, range]]) -> None:
        """Mix and sample all rows of a round, in one call for each rule that there is."""
        revealed = 0
        for rule in dict.fromkeys(answer.sampled.rule for answer, _ in ready):
            batch = [part for part in ready if part[0].sampled.rule == rule]
            found, best = await asyncio.to_thread(self._sampled, rule, batch)
            self._metrics.round(sum(len(entries) for _, entries in batch))
            tokens, log_probs, expert_log_probs = (values.numpy() for values in found)
            begin = 0
            there = set(self._answers)
            for answer, entries in batch:
                mine = slice(begin, begin + len(entries))
                begin = mine.stop
                if answer not in there:
                    continue  # cancelled meanwhile
                before = len(answer.revealing.masked)
                try:
                    goes_on = answer.take(
                        tokens[mine], log_probs[mine], expert_log_probs[mine], best.get(answer)
                    )
                except Exception as error:
                    self._end(answer, error)
                    continue
                revealed += before - len(answer.revealing.masked)
                if not goes_on:
                    self.leave(answer)
        self._metrics.stepped(len(ready), revealed)

    def _sampled(
        self, rule: Rule, batch: Sequence[tuple[Answer, range]]
    ) -> tuple[Revealed, dict[Answer, Best]]:
        counts = [len(entries) for _, entries in batch]
        each = [answer.sampled for answer, _ in batch]

        def repeated(values: Sequence[float]) -> torch.Tensor:
            """One value of each answer, for all of its positions."""
            return torch.from_numpy(np.repeat(values, counts))

        entries = torch.from_numpy(np.concatenate([np.asarray(part) for _, part in batch]))
        log_weights = np.repeat([answer.revealing.log_weights for answer, _ in batch], counts, axis=0)
        found = reveal(
            self._rows,
            entries,
            torch.from_numpy(log_weights),
            rule,
            repeated([how.temperature for how in each]),
            repeated([how.seed for how in each]),
            torch.from_numpy(np.concatenate([answer.revealing.noise() for answer, _ in batch])),
            repeated([how.top_k for how in each]) if any(how.top_k for how in each) else None,
            repeated([how.top_p for how in each]) if any(how.top_p < 1 for how in each) else None,
            repeated([how.min_p for how in each]) if any(how.min_p for how in each) else None,
        )
        tokens, best = found.tokens.split(counts), {}
        for (answer, part), own in zip(batch, tokens, strict=True):
            if answer.sampled.alternatives:
                best[answer] = self._best(answer, torch.tensor(list(part)), own)
        return found, best

    def _best(self, answer: Answer, entries: torch.Tensor, tokens: torch.Tensor) -> Best:
        log_weights = torch.from_numpy(answer.revealing.log_weights).expand(len(entries), -1)
        rows = mix_rows(self._rows, entries, log_weights, answer.sampled.rule).double().log_softmax(dim=1)
        best = rows.topk(answer.sampled.alternatives or 0, dim=1)
        ranks = (rows >= rows.gather(1, tokens[:, None])).sum(dim=1)
        return Best(best.indices.numpy(), best.values.numpy(), ranks.numpy())
