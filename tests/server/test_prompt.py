"""What is known of prompts: scored once, whoever asks, and by somebody else where the first one leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.sampler import Sampler

from decar.server.gateway.prompt import PromptScorer, _mixed
from decar.server.protocol.member import PromptRows
from decar.server.protocol.runtime import DIRECTORY
from decar.server.vllm_adapter.engine import describe_prompt

PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}
SAID = np.array([[-3.0, np.nan], [-1.0, np.nan]]), np.array([-6.0, -1.5])
"""Of two experts: log p of two tokens, up to a unit's end and one more, and of all three."""


@pytest.fixture
def scorer() -> PromptScorer:
    engines: Any = [SimpleNamespace() for _ in range(2)]
    return PromptScorer(engines, vocab_size=10, unit=2)


async def test_whoever_asks_while_a_prompt_is_scored_waits_for_that(scorer: PromptScorer) -> None:
    async with scorer.beginning(PROMPT, (0, 1)) as first:
        assert not first.whole
        assert first.scored == [(1, 0.0), (1, 0.0)]
        others = [asyncio.create_task(likelihoods(scorer)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(other.done() for other in others)
        first.learn(*SAID)
        # The first one goes on to decode; nobody waits for that.
        assert await asyncio.gather(*others) == [[-6.0, -1.5]] * 3
    assert await likelihoods(scorer) == [-6.0, -1.5]


async def likelihoods(scorer: PromptScorer) -> list[float]:
    async with scorer.beginning(PROMPT, (0, 1)) as beginning:
        if not beginning.whole:
            beginning.learn(*SAID)
            return await likelihoods(scorer)
        return beginning.log_likelihoods


async def test_whoever_fails_to_score_a_prompt_leaves_it_to_the_next(scorer: PromptScorer) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with scorer.beginning(PROMPT, (0, 1)):
            others = [asyncio.create_task(likelihoods(scorer)) for _ in range(3)]
            await asyncio.sleep(0)
            raise ZeroDivisionError
    async with asyncio.timeout(10):
        assert await asyncio.gather(*others) == [[-6.0, -1.5]] * 3


async def test_whoever_stops_waiting_does_not_stop_the_others(scorer: PromptScorer) -> None:
    async with scorer.beginning(PROMPT, (0, 1)) as first:
        leaves, stays = (asyncio.create_task(likelihoods(scorer)) for _ in range(2))
        await asyncio.sleep(0)
        leaves.cancel()
        first.learn(*SAID)
    async with asyncio.timeout(10):
        assert await stays == [-6.0, -1.5]


async def test_a_shared_beginning_is_known(scorer: PromptScorer) -> None:
    await likelihoods(scorer)
    async with scorer.beginning({"prompt_token_ids": [5, 6, 7, 9, 9]}, (0, 1)) as longer:
        assert longer.scored == [(3, -3.0), (3, -1.0)]
        assert longer.log_likelihoods == [-3.0, -1.0]
    async with scorer.beginning({**PROMPT, "cache_salt": "mine"}, (0, 1)) as another:
        assert another.scored == [(1, 0.0), (1, 0.0)]


async def test_an_expert_with_other_weights_is_asked_anew(scorer: PromptScorer) -> None:
    async with scorer.beginning(PROMPT, (0, 1)) as before:
        scorer.forget(0)
        before.learn(*SAID)  # which the old weights said
    async with scorer.beginning(PROMPT, (0, 1)) as after:
        assert after.scored[0] == (1, 0.0)
        assert after.scored[1] == (4, -1.5)


async def test_one_token_says_nothing(scorer: PromptScorer) -> None:
    async with scorer.beginning({"prompt_token_ids": [5]}, (0, 1)) as beginning:
        assert beginning.whole
        assert beginning.log_likelihoods == [0.0, 0.0]


async def test_a_prompt_without_tokens_is_refused(scorer: PromptScorer) -> None:
    with pytest.raises(VLLMValidationError, match="token ids"):
        async with scorer.beginning({"prompt_embeds": None}, (0, 1)):
            pass


async def test_only_those_that_take_part_are_asked_and_learned_from(scorer: PromptScorer) -> None:
    async with scorer.beginning(PROMPT, (1,), [9]) as one:
        assert not one.whole
        one.learn(np.array([[7.0, 7.0], [-1.0, -2.5]]), np.array([7.0, -3.0]))
    async with scorer.beginning(PROMPT, (1,), [9]) as again:
        assert again.whole
        assert again.scored[0] == (1, 0.0), "what is left of an earlier tenant is not what the expert said"
        assert again.scored[1] == (5, -3.0)
    async with scorer.beginning(PROMPT, (0, 1), [9]) as both:
        assert not both.whole


class FakeRows:
    """An engine that writes what is to be one expert's rows of a prompt: float32 [T - 1, V]."""

    def __init__(self, rows: torch.Tensor, tokenizer: Any):
        self.client, self._rows, self._tokenizer = self, rows, tokenizer
        self.files = None
        self.errored = False

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str) -> AsyncIterator[None]:
        asked = PromptRows.of(params)
        assert asked is not None
        some = self._rows[asked.start : asked.end]
        file = np.memmap(DIRECTORY / asked.file, np.float32, "r+", shape=tuple(some.shape))
        file[:] = some.numpy()
        yield None

    def describe(self, *args: Any) -> None:
        describe_prompt(self._tokenizer, *args)


@pytest.mark.parametrize("text", ["naïve 😀", "a😀😀é", "x\N{FAMILY} ≠ é", "plain"])
@pytest.mark.parametrize("window_positions", [1, 3, 100])
@pytest.mark.parametrize("count", [0, 2])
async def test_a_character_of_several_tokens_is_said_when_it_is_whole(
    text: str, window_positions: int, count: int
) -> None:
    """As vLLM's own output processor says it of one engine's prompt, wherever windows of it end."""
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text)["input_ids"]
    vocab_size = len(tokenizer)
    rows = torch.randn(len(ids) - 1, vocab_size, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    engines: Any = [SimpleNamespace(engine=FakeRows(rows, tokenizer)) for _ in range(2)]
    scorer = PromptScorer(engines, vocab_size, unit=2)
    scorer._window_bytes = 4 * vocab_size * len(engines) * window_positions
    weights = np.log([0.3, 0.7])
    found, _ = await scorer.log_probs(
        {"prompt_token_ids": ids}, "r", {}, weights, "velocity", count, posterior=False
    )
    best = rows.topk(count, dim=1)
    tokens = torch.cat([torch.tensor(ids[1:])[:, None], best.indices], dim=1)
    logprobs = rows.gather(1, tokens)
    ranks = (rows > logprobs[:, :1]).sum(1) + 1
    theirs: Any = [None]
    describe_prompt(tokenizer, theirs, tokens, logprobs, ranks)
    assert [[(t, e.rank, e.decoded_token) for t, e in (at or {}).items()] for at in found] == [
        [(t, e.rank, e.decoded_token) for t, e in (at or {}).items()] for at in theirs
    ]
    said = [at[token].decoded_token for token, at in zip(ids[1:], found[1:], strict=True) if at]
    assert "".join(said) == text[1:]


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token, and nothing else is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def test_ranks_are_counted_as_vllm_counts_them() -> None:
    """Also where tokens are equally likely."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 1.0, 0.0, 0.0]])
    log_probs = logits.log_softmax(dim=1)
    targets = torch.tensor([2, 4, 0])
    # Two experts that agree: what they say is the mixture.
    (tokens, logprobs, ranks), _ = _mixed(
        [log_probs, log_probs], targets, np.log([0.5, 0.5]), "velocity", 3, None
    )
    with torch.compiler.set_stance("force_eager"):
        expected = Sampler.gather_logprobs(log_probs, 3, targets)
    assert tokens.tolist() == expected.logprob_token_ids.tolist()
    assert ranks.tolist() == expected.selected_token_ranks.tolist() == [4, 5, 2]
    torch.testing.assert_close(logprobs, expected.logprobs)
