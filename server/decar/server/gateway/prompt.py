"""What experts say of prompts: sums for the posterior, whole rows for the mixture's prompt log-probabilities.

Knows engines and the score cache; knows nothing of slots and decoding.

Shapes: K experts, T tokens of a prompt, V vocabulary, W positions of a window.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from decar.kernels import mix
from decar.router import active_experts, log_weights_after
from decar.router.errors import StartError
from decar.router.manifest import Rule
from decar.server.gateway.engine import Engine, ExpertEngine, ExpertLost, FilesElsewhere, PromptLogprobs
from decar.server.gateway.images import is_text
from decar.server.gateway.queue import Places
from decar.server.gateway.scores import PrefixScores
from decar.server.protocol.member import ROWS_KEY, PromptRows
from decar.server.protocol.plane import create_segment, unlink
from decar.server.protocol.runtime import DIRECTORY, new_name

WINDOW_BYTES = 64 * 2**20  # of all experts' rows of one prompt at a time, at most
PROMPTS_AT_ONCE = 4  # whose rows are held

_Key = tuple[bytes, tuple[int, ...]]  # what tells prompts apart: salt and tokens


class Beginning:
    """What is known of a prompt before it is decoded, on each of K experts.

    Attributes:
        scored: how many of its leading tokens have a known log-likelihood, and that.
        whole: nothing is left to score for those of the ``experts`` that are to take part.
    """

    def __init__(self, scores: Sequence[PrefixScores], experts: Sequence[int], ids: list[int], salt: bytes):
        self._scores = list(scores)  # an expert that is exchanged meanwhile has others
        self._experts, self._ids, self._salt = experts, ids, salt
        self.scored = [expert.known(ids, salt) for expert in scores]
        self.whole = all(self.scored[k][0] == len(ids) for k in experts)
        self.learned = asyncio.Event()

    @property
    def log_likelihoods(self) -> list[float]:
        """log p_k of the known part [K], the first token given."""
        return [total for _, total in self.scored]

    def learn(self, sums: np.ndarray, wholes: np.ndarray) -> None:
        """Take in what the experts said of the prompt beyond what was known: log p up to each unit's end [K, U], of
        which those in the known part are not read, and in all [K]."""
        for k in self._experts:
            known, total = self.scored[k]
            self._scores[k].learn(self._ids, known, total, sums[k].tolist(), float(wholes[k]), self._salt)
        self.learned.set()


class PromptScorer:
    """Knows what K experts have said of prompts, and asks their engines for more.

    Args:
        experts: in manifest order.
        vocab_size: V, the ids that all experts share.
        unit: tokens between the places of a prompt up to which its log-likelihood is kept.
    """

    def __init__(self, experts: Sequence[ExpertEngine], vocab_size: int, unit: int):
        self._experts = experts
        self._vocab_size = vocab_size
        self._unit = unit
        self._scores = [PrefixScores(unit) for _ in experts]
        self._under_way: dict[_Key, Beginning] = {}
        memory = os.statvfs(DIRECTORY)
        share = memory.f_bavail * memory.f_frsize // (2 * PROMPTS_AT_ONCE)
        self._window_bytes = min(WINDOW_BYTES, share)
        self._places = Places(PROMPTS_AT_ONCE)

    @contextlib.asynccontextmanager
    async def beginning(
        self, prompt: Any, experts: Sequence[int], spoken: Sequence[int] = ()
    ) -> AsyncIterator[Beginning]:
        """What ``experts`` are known to think of ``prompt``, with what has been ``spoken`` after it. Where that is not
        all, whoever enters has the rest scored, and says so to `Beginning.learn`; others who ask for the same text
        wait for that, so that it is scored once."""
        ids, salt = [*tokens_of(prompt), *spoken], _salt_of(prompt)
        key = (salt, tuple(ids))
        while (other := self._under_way.get(key)) is not None:
            await other.learned.wait()
            if self._under_way.get(key) is other:
                del self._under_way[key]
        beginning = Beginning(self._scores, experts, ids, salt)
        if not beginning.whole:
            self._under_way[key] = beginning
        try:
            yield beginning
        finally:
            if self._under_way.get(key) is beginning:
                del self._under_way[key]
            beginning.learned.set()

    def forget(self, expert: int) -> None:
        """Ask an expert anew, since its weights are others; who has asked the old ones learns for those."""
        self._scores[expert] = PrefixScores(self._unit)

    async def log_probs(
        self,
        prompt: Any,
        request_id: str,
        kwargs: dict[str, Any],
        log_weights: np.ndarray,
        rule: Rule,
        count: int,
        *,
        posterior: bool,
    ) -> tuple[PromptLogprobs, np.ndarray]:
        """What the mixture says of each token of a prompt, as vLLM gives it: token, rank, and ``count`` best ones.

        Args:
            log_weights: [K] to start from; with ``posterior``, every token moves them on.

        Returns:
            None for the first token and a dict for each other one; and the log weights [K] after the last.

        Raises:
            ExpertLost: one of those with weight is.
        """
        ids = tokens_of(prompt)
        experts = active_experts(log_weights)
        counted = is_text(prompt)
        found: PromptLogprobs = [None]
        log_weights = np.array(log_weights)
        width = max(self._window_bytes // (4 * self._vocab_size * len(experts)), 1)
        async with self._places.take():
            for start in range(0, len(ids) - 1, width):
                end = min(start + width, len(ids) - 1)
                # What comes after the window need not be computed; but a prompt with images stays as it is.
                whole = end + 1 == len(ids) or not counted.all()
                window = prompt if whole else {**prompt, "prompt_token_ids": ids[: end + 1]}
                async with contextlib.AsyncExitStack() as stack:
                    shape = (end - start, self._vocab_size)
                    files = [
                        await stack.enter_async_context(_file_for(k, self._experts[k].engine, shape))
                        for k in experts
                    ]
                    await asyncio.gather(
                        *(
                            self._run(k, window, f"{request_id}-rows", kwargs, PromptRows(name, start, end))
                            for k, (name, _) in zip(experts, files, strict=True)
                        )
                    )
                    rows = [await read() for _, read in files]
                    files.clear()
                    targets = torch.tensor(ids[start + 1 : end + 1])
                    entries, log_weights[experts] = await asyncio.to_thread(
                        _mixed,
                        rows,
                        targets,
                        log_weights[experts],
                        rule,
                        count,
                        counted[start + 1 : end + 1] if posterior else None,
                    )
                    rows.clear()  # its memory is free before the next window takes some
                await asyncio.to_thread(self._experts[0].engine.describe, found, *entries)
        return found, log_weights

    async def _run(
        self,
        expert: int,
        prompt: Any,
        request_id: str,
        kwargs: dict[str, Any],
        rows: PromptRows,
    ) -> None:
        """Have one engine compute ``prompt`` and write ``rows``, and one token that nobody needs.

        Raises:
            ExpertLost: it is dead.
        """
        client = self._experts[expert].engine.client
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=False,
            extra_args={ROWS_KEY: rows.to_wire()},
        )
        try:
            async for _ in client.generate(prompt, params, request_id, **kwargs):
                pass
        except Exception:
            if client.errored:
                raise ExpertLost(expert) from None
            raise


def tokens_of(prompt: Any) -> list[int]:
    """The token ids of what vLLM's renderer, or a caller of `EnsembleClient.generate`, gives as a prompt.

    Raises:
        VLLMValidationError: it has none, so that experts cannot be weighed by it.
    """
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if not ids:
        raise VLLMValidationError("an ensemble needs a prompt of token ids", parameter="prompt")
    return list(ids)


def _salt_of(prompt: Any) -> bytes:
    """What a prompt is beside its tokens, as vLLM's prefix cache tells prompts apart."""
    salt = repr((prompt.get("cache_salt"), prompt.get("mm_hashes")))
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


@contextlib.asynccontextmanager
async def _file_for(
    expert: int, engine: Engine, shape: tuple[int, int]
) -> AsyncIterator[tuple[str, Callable[[], Awaitable[torch.Tensor]]]]:
    """A file under /dev/shm of an engine's host for it to fill, and what reads it: float32 [W, V].

    Raises:
        ExpertLost: its host is not there.
    """
    size_bytes, files = 4 * shape[0] * shape[1], engine.files
    if files is None:
        name = new_name()
        try:
            memory = create_segment(name, size_bytes)

            async def read() -> torch.Tensor:
                return torch.frombuffer(memory, dtype=torch.float32).view(shape)

            yield name, read
        finally:
            unlink(name)
        return
    making = asyncio.ensure_future(asyncio.to_thread(files.make_rows, size_bytes))

    async def bring() -> torch.Tensor:
        try:
            rows = await asyncio.to_thread(files.take_rows, name)
        except StartError:
            raise ExpertLost(expert) from None
        return torch.from_numpy(rows.copy().view(np.float32)).view(shape)

    try:
        try:
            name = await asyncio.shield(making)
        except StartError:
            raise ExpertLost(expert) from None
        yield name, bring
    finally:
        dropping = asyncio.ensure_future(_drop(files, making))
        _DROPPING.add(dropping)
        dropping.add_done_callback(_DROPPING.discard)


_DROPPING: set[asyncio.Future[None]] = set()


async def _drop(files: FilesElsewhere, making: asyncio.Future[str]) -> None:
    """Have a file removed, also one that nobody has waited for."""
    with contextlib.suppress(StartError):  # with its host, it is gone
        await asyncio.to_thread(files.drop_rows, await making)


def _mixed(
    rows: Sequence[torch.Tensor],
    targets: torch.Tensor,
    log_weights: np.ndarray,
    rule: Rule,
    count: int,
    counted: np.ndarray | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], np.ndarray]:
    """Mix a window of prompt rows K x [W, V]: what `Engine.describe` takes of it; the weights after all.

    Args:
        counted: which targets [W] move the weights on; None: the weights stay.
    """
    log_probs = torch.stack(list(rows))  # [K, W, V]
    weights = np.repeat(np.asarray(log_weights)[None], len(targets), axis=0)  # [W, K]
    if counted is not None:
        said = log_probs[:, torch.arange(len(targets)), targets].double().numpy().T  # [W, K]
        said = np.where(counted[:, None], said, 0.0)
        sums = np.cumsum(said, axis=0)
        after = log_weights_after(np.asarray(log_weights), sums)
        weights[1:] = after[:-1]
        log_weights = after[-1]
    mixed = mix(log_probs, torch.from_numpy(weights), rule)  # [W, V]
    of_targets = mixed.gather(1, targets[:, None])
    ranks = (mixed >= of_targets).sum(dim=1)  # the last of those that tie, as vLLM counts
    best = mixed.topk(min(count, mixed.shape[1]), dim=1)
    tokens = torch.cat([targets[:, None], best.indices], dim=1)
    return (tokens, torch.cat([of_targets, best.values], dim=1), ranks), log_weights
