"""The yardstick: tiny experts, and the mixture decoded by plain transformers forwards.

Written from the definitions alone and importing nothing from decar, so that a mistake there cannot hide here.

Shapes: K experts, B prompts, T positions, V token ids that every expert has a row for.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Kind = Literal["llama", "qwen2", "llama-padded"]
Rule = Literal["velocity", "logit"]
Route = Literal["posterior", "prior"]

VOCAB_SIZE = 600
PADDING_ROWS = 24
MAX_POSITIONS = 512
HEAD_DIM = 32  # the smallest that vLLM's CPU attention has

_SPREAD = 0.1  # standard deviation of the weights; logits then vary by 1.6 nats
OWN_SHARE = 0.04

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_TRAINING_MODULES = (
    "argparse",
    "asyncio.events",
    "dataclasses",
    "json.encoder",
    "logging",
    "textwrap",
    "typing",
)


# ---------------------------------------------------------------------------------------------- building


def stdlib_text(*modules: str) -> str:
    """The source text of modules of the standard library."""
    text = ""
    for module in modules:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        text += Path(spec.origin).read_text(encoding="utf-8")
    return text


def make_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on standard library text, save it to ``directory`` and return it.

    Its alphabet is ASCII, so that any token sequence, also a random one, is a valid text: answers can then be
    compared exactly, without regard to how incomplete UTF-8 is shown.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted({char for byte in range(128) for char in byte_level.pre_tokenize_str(chr(byte))[0][0]})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    text = stdlib_text(*_TRAINING_MODULES).encode("ascii", "ignore").decode()
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == vocab_size
    fast.save_pretrained(directory)
    return fast


def make_tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of so few words that everything a model can say in a few of them can be counted."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **special)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_expert(
    kind: Kind, seed: int, directory: Path, tokenizer: PreTrainedTokenizerFast, own_share: float = OWN_SHARE
) -> None:
    """Save an fp32 expert with random weights and ``tokenizer`` to ``directory``.

    All experts are near one common model, as fine-tuned siblings are: unrelated random models would differ by
    nats per token, and every posterior would be at 0 or 1 before the first generated token.

    Args:
        own_share: of an expert's weights; the rest is common to all.
    """
    rows = len(tokenizer) + (PADDING_ROWS if kind == "llama-padded" else 0)
    shape: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": 2 * HEAD_DIM,
        "intermediate_size": 4 * HEAD_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, head_dim=HEAD_DIM))
    common = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("norm.weight"):
                continue
            if name.endswith("bias"):  # Qwen2's, which the common model lacks
                parameter.normal_(std=own_share * _SPREAD, generator=own)
                continue
            size = (len(tokenizer), *parameter.shape[1:]) if parameter.shape[0] == rows else parameter.shape
            shared = torch.randn(size, generator=common)
            noise = torch.randn(parameter.shape, generator=own)
            parameter.copy_(own_share * noise)
            parameter[: size[0]] += math.sqrt(1 - own_share**2) * shared
            parameter *= 2 * _SPREAD if name.startswith("lm_head") else _SPREAD
        if kind == "llama-padded":
            # As likely as the best tokens, so that leaving them in would show in every probability.
            model.lm_head.weight[len(tokenizer) :] *= 1 / own_share
    model.to(torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@dataclass(frozen=True)
class ExpertSpec:
    """An expert to build. Equal (kind, seed) gives equal weights."""

    name: str
    kind: Kind
    seed: int
    prior: float


def make_ensemble(
    directory: Path,
    specs: Sequence[ExpertSpec],
    *,
    name: str,
    rule: Rule = "velocity",
    route: Route = "posterior",
    tokenizer: PreTrainedTokenizerFast | None = None,
    own_share: float = OWN_SHARE,
) -> Path:
    """Write an ensemble directory: ``ensemble.json`` and ``experts/NAME/``."""
    directory.mkdir(parents=True)
    tokenizer = tokenizer or make_tokenizer(directory / "tokenizer-source")
    for spec in specs:
        make_expert(spec.kind, spec.seed, directory / "experts" / spec.name, tokenizer, own_share)
    manifest = {
        "format_version": 1,
        "name": name,
        "experts": [{"name": s.name, "path": f"experts/{s.name}", "prior": s.prior} for s in specs],
        "router": {"kind": route},
        "mixing": {"rule": rule},
    }
    (directory / "ensemble.json").write_text(json.dumps(manifest, indent=2))
    return directory


# ---------------------------------------------------------------------------------------------- decoding


def load_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Reference:
    """An ensemble as transformers models."""

    directory: Path
    name: str
    experts: tuple[str, ...]
    models: tuple[Any, ...] = field(repr=False)
    prior: tuple[float, ...]
    vocab_size: int  # V: rows beyond it are some expert's padding, and dropped
    tokenizer: PreTrainedTokenizerFast = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> Reference:
        manifest = json.loads((directory / "ensemble.json").read_text())
        paths = [directory / entry["path"] for entry in manifest["experts"]]
        total = math.fsum(entry["prior"] for entry in manifest["experts"])
        loaded = tuple(load_model(path) for path in paths)
        return cls(
            directory=directory,
            name=manifest["name"],
            experts=tuple(entry["name"] for entry in manifest["experts"]),
            models=loaded,
            prior=tuple(entry["prior"] / total for entry in manifest["experts"]),
            vocab_size=min(model.config.vocab_size for model in loaded),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(paths[0]),
        )

    def alone(self, expert: str) -> Reference:
        """The ensemble of this one expert, over the whole ensemble's V."""
        index = self.experts.index(expert)
        return replace(
            self, name=f"{self.name}/{expert}", experts=(expert,), models=(self.models[index],), prior=(1.0,)
        )

    def without(self, expert: str) -> Reference:
        """The ensemble of the other experts, over the whole ensemble's V."""
        kept = [k for k, name in enumerate(self.experts) if name != expert]
        return replace(
            self,
            experts=tuple(self.experts[k] for k in kept),
            models=tuple(self.models[k] for k in kept),
            prior=tuple(self.prior[k] for k in kept),
        )

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The models are too small to share; beside busy engines, waiting for a second thread costs 20-fold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def logits_of(model: Any, sequences: Sequence[Sequence[int]], vocab_size: int) -> torch.Tensor:
    """Logits of the next token at every position: [B, T, V] float64, T the longest sequence.

    A whole forward without cache. Shorter sequences are padded on the right, which a causal model cannot see.
    """
    width = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return torch.as_tensor(logits[..., :vocab_size]).double()


@_one_thread()
def log_likelihood(model: Any, sequences: Sequence[Sequence[int]], vocab_size: int) -> torch.Tensor:
    """log p(each sequence without its first token | its first token): [B] float64. Nothing predicts the first."""
    scores = logits_of(model, sequences, vocab_size).log_softmax(dim=-1)
    later = [torch.tensor(sequence[1:], dtype=torch.long) for sequence in sequences]
    return torch.stack(
        [row[torch.arange(len(ids)), ids].sum() for row, ids in zip(scores, later, strict=True)]
    )


def mix(log_weights: torch.Tensor, rows: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The mixture's log-probs [V] from log weights [K] that sum to 1 and the experts' log-probs [K, V]."""
    active = torch.isfinite(log_weights)
    if rule == "velocity":
        return torch.logsumexp(log_weights[active, None] + rows[active], dim=0)
    return torch.log_softmax((log_weights[active].exp()[:, None] * rows[active]).sum(dim=0), dim=-1)


@dataclass
class Decoded:
    """One prompt's greedy answer. Lists have one entry per generated token."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the token, before bias and penalties
    top: list[dict[int, float]] = field(default_factory=list)  # the 5 best, best first
    top_gaps: list[float] = field(default_factory=list)  # between the 5th and the 6th best
    weights: list[list[float]] = field(default_factory=list)  # [K] that mixed the token
    margin: float = math.inf  # the smallest lead of a chosen token over the runner-up, in nats
    prune_gap: float = math.inf  # how near a weight came to being pruned, or not, by a hair
    finished: bool = False  # an end-of-sequence token was chosen


@_one_thread()
def mixture_decode(
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    rule: Rule = "velocity",
    route: Route = "posterior",
    weights: Mapping[str, float] | None = None,
    prune: float = 0.0,
    spoken: Sequence[Sequence[int]] | None = None,
    eos_token_id: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    allowed: Callable[[list[int]], torch.Tensor] | None = None,
    temperature: float = 1.0,
    noise: Callable[[int], torch.Tensor] | None = None,
) -> list[Decoded]:
    """Decode each prompt greedily from the mixture of all experts, or sample it with the noise that is given.

    Args:
        weights: by expert name, fixed for the whole answer; experts left out have none. Overrides ``route``.
        prune: whenever the lightest experts' weights add up to at most what is left of it, those experts are dropped,
            for good, and their weights are taken off it. As many as possible at once; never all.
        spoken: the beginning of each answer, whoever has said it; all lists but ``tokens`` begin after it.
        eos_token_id: ends an answer, and is its last token; None: never.
        logit_bias, repetition_penalty, frequency_penalty, presence_penalty: as vLLM defines them, applied in
            this order to the mixture's logits: its log-probs plus the weighted mean of the experts' log-normalisers.
            Only the repetition penalty sees that shift; with it, identical experts are one expert here too.
        allowed: from the tokens generated so far to a mask [V] of the tokens that may follow.
        noise: from a position of the answer to Gumbel noise [V], which is added at that ``temperature``. Leads are then
            of such sums.
    """
    fixed = weights is not None
    given = [weights.get(name, 0.0) for name in reference.experts] if weights is not None else reference.prior
    log_start = torch.tensor(given, dtype=torch.float64).log().log_softmax(dim=0)
    vocab_size = reference.vocab_size

    spoken = spoken or [()] * len(prompts)
    answers = [Decoded(list(prompt), list(said)) for prompt, said in zip(prompts, spoken, strict=True)]
    log_weights = log_start.repeat(len(prompts), 1)  # [B, K]
    follow_posterior = route == "posterior" and not fixed
    if follow_posterior:
        texts = [answer.prompt + answer.tokens for answer in answers]
        scored = [log_likelihood(model, texts, vocab_size) for model in reference.models]
        log_weights = (log_weights + torch.stack(scored, dim=1)).log_softmax(dim=1)
    budgets = [prune] * len(prompts)
    for b in range(len(prompts)):
        log_weights[b], budgets[b] = _pruned(log_weights[b], budgets[b], answers[b])

    for _ in range(max_tokens):
        running = [b for b, answer in enumerate(answers) if not answer.finished]
        if not running:
            break
        sequences = [answers[b].prompt + answers[b].tokens for b in running]
        last = torch.tensor([len(sequence) - 1 for sequence in sequences])
        logits = torch.stack(
            [
                logits_of(model, sequences, vocab_size)[torch.arange(len(running)), last]
                for model in reference.models
            ],
            dim=1,
        )  # [B, K, V]
        normalisers = logits.logsumexp(dim=-1)  # [B, K]
        rows = logits - normalisers[..., None]
        for row, normaliser, b in zip(rows, normalisers, running, strict=True):
            answer = answers[b]
            mixed = mix(log_weights[b], row, rule)
            scores = mixed + log_weights[b].exp() @ normaliser
            for token, bias in (logit_bias or {}).items():
                scores[token] += bias
            scores = _penalised(scores, answer, repetition_penalty, frequency_penalty, presence_penalty)
            if allowed is not None:
                scores[~allowed(answer.tokens)] = -math.inf
            if noise is not None:
                scores = scores / temperature + noise(len(answer.tokens))
            lead = scores.topk(2)
            token = int(lead.indices[0])
            best = mixed.topk(6)
            answer.weights.append(log_weights[b].exp().tolist())
            answer.tokens.append(token)
            answer.logprobs.append(float(mixed[token]))
            answer.top.append(dict(zip(best.indices[:5].tolist(), best.values[:5].tolist(), strict=True)))
            answer.margin = min(answer.margin, float(lead.values[0] - lead.values[1]))
            answer.top_gaps.append(float(best.values[4] - best.values[5]))
            answer.finished = token == eos_token_id
            if follow_posterior:
                log_weights[b] = (log_weights[b] + row[:, token]).log_softmax(dim=0)
                log_weights[b], budgets[b] = _pruned(log_weights[b], budgets[b], answer)
    return answers


def _pruned(log_weights: torch.Tensor, budget: float, answer: Decoded) -> tuple[torch.Tensor, float]:
    """Drop the largest set of lightest experts that ``budget`` allows; (log weights [K], budget left)."""
    order = [k for k in log_weights.argsort().tolist() if log_weights[k] > -math.inf]
    for count in range(len(order) - 1, 0, -1) if budget else ():
        mass = math.fsum(math.exp(log_weights[k]) for k in order[:count])
        answer.prune_gap = min(answer.prune_gap, abs(mass - budget))
        if mass <= budget:
            kept = log_weights.clone()
            kept[order[:count]] = -math.inf
            return kept.log_softmax(dim=0), budget - mass
    return log_weights, budget


def _penalised(
    scores: torch.Tensor, answer: Decoded, repetition: float, frequency: float, presence: float
) -> torch.Tensor:
    """vLLM's penalties: repetition sees prompt and answer, the other two the answer alone."""
    seen = torch.zeros_like(scores, dtype=torch.bool)
    seen[answer.prompt + answer.tokens] = True
    counts = torch.bincount(torch.tensor(answer.tokens, dtype=torch.long), minlength=len(scores))
    scores = torch.where(seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores)
    return scores - frequency * counts - presence * (counts > 0)


@_one_thread()
def prompt_scores(
    reference: Reference,
    prompt: Sequence[int],
    *,
    rule: Rule,
    posterior: bool,
    start: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixture's log-probs [T - 1, V] of what follows each prompt token, and the weights [T - 1, K] that mixed them.

    Args:
        posterior: each token moves the weights on; else they stay as they are.
        start: weights [K] before the prompt; default: the prior.
    """
    rows = torch.cat([logits_of(model, [prompt], reference.vocab_size) for model in reference.models])
    rows = rows[:, :-1].log_softmax(dim=-1)  # [K, T - 1, V]
    said = rows[:, torch.arange(len(prompt) - 1), list(prompt[1:])]  # [K, T - 1]
    log_weights = (
        torch.tensor(start or reference.prior, dtype=torch.float64).log().expand(len(prompt) - 1, -1)
    )
    if posterior:
        before = torch.cat([torch.zeros(len(rows), 1), said.cumsum(dim=1)[:, :-1]], dim=1)
        log_weights = (log_weights + before.T).log_softmax(dim=1)
    mixed = [mix(weights, rows[:, t], rule) for t, weights in enumerate(log_weights)]
    return torch.stack(mixed), log_weights.exp()


def sequence_log_probs(reference: Reference, sequence: Sequence[int]) -> torch.Tensor:
    """log p_k(sequence without its first token | its first token): [K]."""
    return torch.cat([log_likelihood(model, [sequence], reference.vocab_size) for model in reference.models])


# ---------------------------------------------------------------------------------------------- prompts


def prompt_texts(count: int, min_words: int = 2, max_words: int = 10) -> list[str]:
    """Different short texts of ``min_words`` to ``max_words`` words, always the same."""
    words = stdlib_text("string", "shelve", "calendar", "heapq").encode("ascii", "ignore").decode().split()
    texts = []
    start = 0
    for index in range(count):
        length = min_words + index % (max_words - min_words + 1)
        texts.append(" ".join(words[start : start + length]))
        start += length
    assert all(texts)
    assert len(set(texts)) == count
    return texts
