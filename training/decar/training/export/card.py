"""Model cards: what an exported directory holds, how it came about, how to serve it. Knows reports, never weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from decar.router.manifest import Manifest
from decar.training.config import DocumentConfig, MoeConfig, Objective, PartitionConfig, TrainingConfig
from decar.training.expert.report import ExpertReport

CARD_NAME = "README.md"
_LOAD_MASKED = [
    "```python",
    'model = transformers.AutoModelForMaskedLM.from_pretrained(".")    # in this directory',
    "```",
]


@dataclass(frozen=True)
class Origin:
    """How what a card describes was made; ``models``: the description of each expert's."""

    name: str
    seed: int
    models: Mapping[str, dict[str, Any]]
    objective: Objective
    training: TrainingConfig
    documents: DocumentConfig
    partition: PartitionConfig

    @property
    def is_flow(self) -> bool:
        return self.objective == "masked-diffusion"


def ensemble_card(
    origin: Origin, manifest: Manifest, reports: Mapping[str, ExpertReport], read_images: bool
) -> str:
    """The ``README.md`` of an ensemble directory, in Markdown with the Hub's YAML header.

    Args:
        read_images: the experts are image-text models.
    """
    priors = {expert.name: f"{expert.prior:.4f}" for expert in manifest.experts}
    return "\n".join(
        [
            _header(["decar", "ensemble"], read_images),
            f"# {origin.name}",
            "",
            f'{len(reports)} language models ("experts"), each trained alone on its own part of the data and kept as '
            "an ordinary Hugging Face checkpoint. decar serves them as one model: at every step it mixes their "
            f"distributions of {'masked tokens' if origin.is_flow else 'the next token'}, with weights from its router "
            f"(here by default: {manifest.router.kind}, rule {manifest.mixing.rule}).",
            "",
            "## Serve it",
            "",
            "```bash",
            f"decar serve . --port 8000           # in this directory; the model is {origin.name!r}",
            *(
                []
                if origin.is_flow
                else [f"vllm serve experts/{next(iter(reports))}    # or one expert alone"]
            ),
            "```",
            "",
            "## Experts",
            "",
            *_experts_table(reports, priors),
            "",
            "The prior is an expert's share of the training tokens; the loss is in nats per token"
            f"{', a bound' if origin.is_flow else ''}, of each expert on the held-out text of its own part.",
            "",
            *_making(origin, reports),
        ]
    )


def average_card(origin: Origin, reports: Mapping[str, ExpertReport], read_images: bool) -> str:
    """The ``README.md`` of the experts' parameter average, as `ensemble_card`."""
    return "\n".join(
        [
            _header(["decar", "merge"], read_images),
            f"# {origin.name}, averaged",
            "",
            f"One language model whose weights are the mean of {len(reports)} experts' weights (Branch-Train-Merge's "
            "parameter average, arXiv 2208.03306), each with the same share. The experts were trained alone, each on "
            "its own part of the data. An average is only as good as its experts are close to each other: those that "
            "branch from one trained checkpoint average well, those trained from scratch hardly.",
            "",
            "## Serve it",
            "",
            *(_LOAD_MASKED if origin.is_flow else _serve("Hugging Face")),
            "",
            "## Experts it is the mean of",
            "",
            *_experts_table(reports, {}),
            "",
            "The loss is in nats per token, of each expert before averaging on the held-out text of its own part. The "
            "average itself was not measured.",
            "",
            *_making(origin, reports),
        ]
    )


def moe_card(
    origin: Origin, settings: MoeConfig, reports: Mapping[str, ExpertReport], merged: ExpertReport
) -> str:
    """The ``README.md`` of the merged mixture of experts, whose report is ``merged``, as `ensemble_card`."""
    weights = "all weights" if settings.train == "all" else "its gates alone"
    trained = (
        f"then {weights} were trained for {merged.steps:,} steps of {origin.training.tokens_per_step:,} tokens on all "
        "experts' text"
        if merged.steps
        else "nothing was trained after that"
    )
    return "\n".join(
        [
            _header(["decar", "merge", "moe", "mixtral"], False),
            f"# {origin.name}, merged into a mixture of experts",
            "",
            f"One language model in Mixtral's format, of {merged.num_parameters:,} parameters: in every layer the "
            f"feed-forward blocks of {len(reports)} experts, of which a gate chooses {min(2, len(reports))} for each "
            "token; all other weights are the mean of the experts' (Branch-Train-MiX, arXiv 2403.07816). The experts "
            "were trained alone, each on its own part of the data. The gates started from the hidden states of each "
            f"expert's text; {trained}.",
            "",
            "It is another model than the ensemble of these experts, which mixes their distributions. Experts that "
            "branch from one trained checkpoint merge well, those trained from scratch hardly.",
            "",
            "## Serve it",
            "",
            *_serve("Mixtral's"),
            "",
            "## Experts it is made of",
            "",
            *_experts_table(reports, {}),
            "",
            "The loss is in nats per token, of each expert before merging on the held-out text of its own part. The "
            f"merged model's on all of it is {merged.held_out_loss:.4f}.",
            "",
            *_making(origin, reports, moe=settings),
        ]
    )


def _header(tags: Sequence[str], read_images: bool) -> str:
    task = "image-text-to-text" if read_images else "text-generation"
    header = {"library_name": "transformers", "pipeline_tag": task, "tags": list(tags)}
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def _experts_table(reports: Mapping[str, ExpertReport], priors: Mapping[str, str]) -> list[str]:
    columns = [
        "parameters",
        "documents",
        "held-out documents",
        "tokens",
        "held-out tokens",
        "steps",
        "held-out loss",
    ]
    rows = [
        [
            name,
            *([priors[name]] if priors else []),
            f"{report.num_parameters:,}",
            _count(report.train_documents),
            _count(report.held_out_documents),
            f"{report.train_tokens:,}",
            f"{report.held_out_tokens:,}",
            f"{report.steps:,}",
            f"{report.held_out_loss:.4f}",
        ]
        for name, report in reports.items()
    ]
    return _table(["expert", *(["prior"] if priors else []), *columns], rows)


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def _serve(kind: str) -> list[str]:
    """How one model alone is served, whose checkpoint is of this ``kind``."""
    return [
        "```bash",
        f"vllm serve .    # in this directory; any other tool that reads {kind} checkpoints will do",
        "```",
    ]


def _making(origin: Origin, reports: Mapping[str, ExpertReport], **more: BaseModel) -> list[str]:
    first, *others = origin.models.values()
    settings: dict[str, Any] = {
        "seed": origin.seed,
        **({"objective": origin.objective} if origin.is_flow else {}),
        "model": dict(origin.models) if any(str(other) != str(first) for other in others) else first,
        "training": origin.training.model_dump(mode="json"),
        "documents": origin.documents.model_dump(mode="json"),
        "partition": origin.partition.model_dump(mode="json"),
        **{section: value.model_dump(mode="json") for section, value in more.items()},
    }
    software = ("decar", "torch", "transformers")
    versions = [
        [name, *(report.versions.get(s, "unknown") for s in software)] for name, report in reports.items()
    ]
    hashes = [
        [name, f"`{file}`", f"`{sha256}`"]
        for name, report in reports.items()
        for file, sha256 in report.shards.items()
    ]
    return [
        "## How it was made",
        "",
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False).rstrip(),
        "```",
        "",
        *_table(["expert", *software], versions),
        "",
        "SHA-256 of each expert's data:",
        "",
        *_table(["expert", "shard", "SHA-256"], hashes),
        "",
    ]
