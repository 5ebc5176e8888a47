"""The evaluation: every way to use an ensemble, and the centralized model, on the same held-out continuations.

Knows checkpoints as transformers loads them, and no serving. What a system makes of the scores is `systems.py`'s.

Shapes: K experts, B texts, L tokens of a text, T of its continuation, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor

from decar.router import Ensemble, load_router, log_weights_after
from decar.router.errors import TrainingError
from decar.router.manifest import Start
from decar.training.centralized import centralized_stage
from decar.training.config import TrainConfig
from decar.training.evaluate_plot import plot_pruning, plot_systems
from decar.training.expert import read_expert_report
from decar.training.export import export_stage
from decar.training.partition import read_shard
from decar.training.sampled import SampledRow, compare_pruned, sample_continuations
from decar.training.stages import Stage, fingerprint, read_marker
from decar.training.systems import DENSE, ROUTERS, Outcome, Scores, systems
from decar.training.tokenizer import load_tokenizer

CENTRALIZED = "centralized model"
_PACKAGES = ("decar", "numpy", "scikit-learn", "torch", "transformers")
_FIX = "run `decar-train evaluate CONFIG.yaml`, which makes all that is missing"


class Row(BaseModel):
    """One system. Means are taken for each expert's held-out texts and then pooled by the experts' priors.

    ``family``: the system without its pruning. ``nll``: nats per token of the continuation; ``above_dense``: how much
    more than the dense posterior's, with its standard error over texts. ``active_experts``: per token of the
    continuation. ``prompt_passes``: experts that run over a prompt. ``dropped_*``: posterior mass released per text.
    """

    system: str
    family: str
    prune: float = 0.0
    perplexity: float
    nll: float
    nll_by_domain: dict[str, float]
    above_dense: float
    standard_error: float
    active_experts: float
    prompt_passes: float
    dropped_mean: float
    dropped_max: float


class EvaluationReport(BaseModel):
    """``report.json`` of an evaluation; ``texts`` and ``tokens`` (of continuations) by whose held-out text it is.

    ``sampled``: the pruned posterior on continuations that the ensemble itself wrote.
    """

    ensemble: str
    experts: list[str]
    priors: list[float]
    model: str
    centralized: str
    texts: dict[str, int]
    tokens: dict[str, int]
    too_short: int
    prompt_tokens: int
    max_tokens: int
    rows: list[Row]
    sampled_tokens: int
    sampled: list[SampledRow]
    seed: int
    environment: dict[str, Any]


@dataclass(frozen=True)
class Text:
    """``ids``: prompt and continuation, bos in front; ``domain``: whose held-out text it is."""

    domain: int
    ids: list[int]


class Totals:
    """A system's sums over each text's continuation: nats, active experts, passes, mass dropped, tokens; [N, 5]."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []

    def add(self, outcome: Outcome) -> None:
        nats, active = -float(outcome.log_probs.sum()), float(outcome.active.sum())
        self.rows.append((nats, active, outcome.prompt_passes, outcome.dropped, len(outcome.log_probs)))

    @property
    def columns(self) -> list[NDArray[np.float64]]:
        return list(np.array(self.rows).T)


def evaluation_stage(config: TrainConfig) -> Stage:
    """The stage as ``config``, the exported ensemble and the centralized model are now.

    Raises:
        TrainingError: something of it is missing, or was made with another configuration.
    """
    twin = centralized_stage(config)
    if not twin.is_done:
        raise TrainingError(f"the centralized model is not trained; {_FIX}")
    return Stage(
        config.work_dir / "evaluate",
        fingerprint(config.evaluate, config.seed),
        fingerprint(export_stage(config).inputs, read_marker(twin.directory)),
    )


def read_evaluation(stage: Stage) -> EvaluationReport:
    """The report of a finished evaluation.

    Raises:
        TrainingError: its file is missing or damaged.
    """
    file = stage.directory / "report.json"
    try:
        return EvaluationReport.model_validate_json(file.read_text())
    except (OSError, pydantic.ValidationError):
        raise TrainingError(f"{file} cannot be read; delete {stage.directory} and run again") from None


def evaluate(
    config: TrainConfig, stage: Stage, progress: Callable[[int, int], None] = lambda done, total: None
) -> EvaluationReport:
    """Score the held-out texts, derive what every system makes of them, and write report and plots.

    Args:
        progress: is called with the number of texts done, and of all.

    Raises:
        TrainingError: an expert's held-out texts are all shorter than a prompt.
        EnsembleError: the exported ensemble has no router or cannot be read.
    """
    settings = config.evaluate
    ensemble = Ensemble.load(config.ensemble_path)
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    max_tokens = min(settings.max_tokens, ensemble.max_positions or settings.max_tokens)
    texts, too_short = read_texts(config, tokenizer, max_tokens)
    prompts = [
        tokenizer.decode(text.ids[: settings.prompt_tokens], skip_special_tokens=True) for text in texts
    ]
    starts = {start: load_router(ensemble, start).log_weights(prompts) for start in ROUTERS}
    twin = config.work_dir / "centralized"
    models = [load_model(path) for path in (*(expert.path for expert in ensemble.experts), twin)]
    compared = systems(len(ensemble.experts), sorted({*settings.prune, *settings.prune_grid}, reverse=True))
    alone = [*(f"{name} alone" for name in ensemble.expert_names), CENTRALIZED]
    totals = {name: Totals() for name in [*alone, *(system.name for system in compared)]}
    after_prompt = []
    num_steps = 2 * len(texts)
    for done, (text, rows) in enumerate(scored(models, texts, settings.batch_size, ensemble.vocab_size)):
        scores = scores_of(text, rows[:, :-1], settings.prompt_tokens, {s: starts[s][done] for s in starts})
        for name, log_probs in zip(alone, chosen(text, rows)[settings.prompt_tokens - 1 :].T, strict=True):
            totals[name].add(Outcome(log_probs, np.ones(len(log_probs)), 1))
        for system in compared:
            totals[system.name].add(system.outcome(scores))
        after_prompt.append(log_weights_after(scores.starts["prior"], scores.prompt))
        progress(done + 1, num_steps)

    # The same prompts again, now with what the ensemble writes after them.
    experts = models[:-1]
    sampled_tokens = min(settings.sampled_tokens, max_tokens - settings.prompt_tokens)
    written = sample_continuations(
        experts,
        [text.ids[: settings.prompt_tokens] for text in texts],
        np.array(after_prompt),
        sampled_tokens,
        ensemble.vocab_size,
        config.seed,
    )
    own = [Text(text.domain, ids) for text, ids in zip(texts, written, strict=True)]
    outcomes: dict[float, list[Outcome]] = {system.prune: [] for system in compared if system.family == DENSE}
    for done, (text, rows) in enumerate(scored(experts, own, settings.batch_size, ensemble.vocab_size)):
        scores = scores_of(text, rows, settings.prompt_tokens, {s: starts[s][done] for s in starts})
        for system in compared:
            if system.family == DENSE:
                outcomes[system.prune].append(system.outcome(scores))
        progress(len(texts) + done + 1, num_steps)

    priors = [expert.prior for expert in ensemble.experts]
    domains = np.array([text.domain for text in texts])
    rows_of = {
        name: _row(name, total, totals[DENSE], domains, dict(zip(ensemble.expert_names, priors, strict=True)))
        for name, total in totals.items()
    }
    for system in compared:
        rows_of[system.name] = rows_of[system.name].model_copy(
            update={"family": system.family, "prune": system.prune}
        )
    took = read_expert_report(twin).steps
    block = f"{config.training.batch_size} × {config.training.sequence_length} tokens"
    report = EvaluationReport(
        ensemble=ensemble.name,
        experts=ensemble.expert_names,
        priors=priors,
        model=f"{ensemble.experts[0].architecture}, {ensemble.experts[0].num_parameters / 1e6:.1f}M parameters",
        centralized=f"the same architecture on all shards, {took:,} steps of {block}, as many as all experts took",
        texts=_count(ensemble.expert_names, domains, np.ones(len(texts))),
        tokens=_count(ensemble.expert_names, domains, totals[DENSE].columns[4]),
        too_short=too_short,
        prompt_tokens=settings.prompt_tokens,
        max_tokens=max_tokens,
        rows=list(rows_of.values()),
        sampled_tokens=sampled_tokens,
        sampled=[compare_pruned(budget, outcomes[0.0], of) for budget, of in outcomes.items() if budget],
        seed=config.seed,
        environment=environment(),
    )
    with stage.writing() as directory:
        (directory / "report.json").write_text(report.model_dump_json(indent=1) + "\n")
        shown = [row for row in report.rows if row.prune in (0.0, *settings.prune)]
        title = (
            f"{report.ensemble}: {len(report.experts)} experts, {report.model}, {len(texts)} held-out texts"
        )
        plot_systems(
            [(row.system, row.active_experts, row.perplexity, row.prompt_passes) for row in shown],
            title,
            directory / "systems.png",
        )
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for row in report.rows:
            if row.prune:
                curves.setdefault(row.family, []).append((row.prune, row.active_experts, row.dropped_max))
        measured = [(row.prune, row.total_variation, row.standard_error) for row in report.sampled]
        plot_pruning(curves, measured, title, directory / "pruning.png")
    return report


def read_texts(config: TrainConfig, tokenizer: Any, max_tokens: int) -> tuple[list[Text], int]:
    """Held-out texts that go on after the prompt, cut to ``max_tokens``, by length; and how many do not go on.

    Raises:
        TrainingError: an expert has none.
    """
    rng = np.random.default_rng(config.seed)
    settings = config.evaluate
    found: list[Text] = []
    too_short = 0
    for domain, name in enumerate(config.expert_names):
        texts = read_shard(config, name, "held_out")
        drawn = rng.permutation(len(texts))[: settings.max_texts]
        encoded = tokenizer([texts[i] for i in drawn], truncation=True, max_length=max_tokens, verbose=False)
        mine = [Text(domain, ids) for ids in encoded["input_ids"] if len(ids) > settings.prompt_tokens]
        if not mine:
            raise TrainingError(
                f"no held-out text of {name!r} is longer than evaluate.prompt_tokens, {settings.prompt_tokens}"
            )
        too_short += len(drawn) - len(mine)
        found += mine
    return sorted(found, key=lambda text: len(text.ids)), too_short


def load_model(directory: Path) -> Any:
    """The causal language model in ``directory``, fp32, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.inference_mode()
def scored(
    models: Sequence[Any], texts: Sequence[Text], batch_size: int, vocab_size: int
) -> Iterator[tuple[Text, Tensor]]:
    """Each text with the log-probabilities [L - 1, models, V] of its tokens after the first, float32, on the CPU.

    The rows of one batch are held at a time.
    """
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        # Padding is on the right, where no token of the text attends to it.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text.ids) for text in batch], batch_first=True)
        rows = [
            model(input_ids=ids.to(model.device)).logits[:, :-1, :vocab_size].float().log_softmax(-1).cpu()
            for model in models
        ]
        for i, text in enumerate(batch):
            yield text, torch.stack([row[i, : len(text.ids) - 1] for row in rows], dim=1)


def chosen(text: Text, rows: Tensor) -> NDArray[np.float64]:
    """Log-probabilities [L - 1, models] of the text's own tokens."""
    ids = torch.tensor(text.ids[1:])[:, None, None].expand(-1, rows.shape[1], 1)
    return rows.gather(2, ids)[..., 0].double().numpy()


def scores_of(
    text: Text, rows: Tensor, prompt_tokens: int, starts: dict[Start, NDArray[np.float64]]
) -> Scores:
    """``rows`` [L - 1, K, V], split after the prompt's tokens; the first token has no row."""
    own, split = chosen(text, rows), prompt_tokens - 1
    return Scores(
        prompt=own[:split].sum(axis=0),
        tokens=own[split:],
        rows=rows[split:],
        ids=torch.tensor(text.ids[prompt_tokens:]),
        starts=starts,
    )


def _row(
    name: str, total: Totals, dense: Totals, domains: NDArray[np.int64], priors: dict[str, float]
) -> Row:
    nats, active, passes, dropped, tokens = total.columns
    excess = nats - dense.columns[0]
    share = np.array(list(priors.values())) / sum(priors.values())
    of = [domains == domain for domain in range(len(priors))]

    def pooled(values: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
        return float(share @ [values[mine].sum() / counts[mine].sum() for mine in of])

    each = np.ones(len(domains))
    by_domain = [nats[mine].sum() / tokens[mine].sum() for mine in of]
    # Of a ratio of sums over texts, to first order (Cochran, "Sampling Techniques", 1977, ch. 6).
    variances = [
        np.square(excess[mine] - excess[mine].sum() / tokens[mine].sum() * tokens[mine]).sum()
        / tokens[mine].sum() ** 2
        for mine in of
    ]
    return Row(
        system=name,
        family=name,
        perplexity=math.exp(min(pooled(nats, tokens), 100)),
        nll=pooled(nats, tokens),
        nll_by_domain=dict(zip(priors, map(float, by_domain), strict=True)),
        above_dense=pooled(excess, tokens),
        standard_error=float(np.sqrt(np.square(share) @ variances)),
        active_experts=pooled(active, tokens),
        prompt_passes=pooled(passes, each),
        dropped_mean=pooled(dropped, each),
        dropped_max=float(dropped.max()),
    )


def _count(names: list[str], domains: NDArray[np.int64], counts: NDArray[np.float64]) -> dict[str, int]:
    return {name: int(counts[domains == domain].sum()) for domain, name in enumerate(names)}


def environment() -> dict[str, Any]:
    """Hardware, versions, date (UTC) and command: kept beside every number."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["decar-train", *sys.argv[1:]]),
    }
