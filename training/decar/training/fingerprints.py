"""What of the configuration each stage's result depends on: where that changes, the stage is done again.

Knows no files: what a stage reads is fingerprinted where it is read. A marker keeps both (`Stage` in `stages.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from decar.router.manifest import RouterEntry
from decar.training.config import DataConfig, MoeConfig, Recipe, TokenizerConfig, TrainConfig, TrainingConfig
from decar.training.stages import fingerprint

# What the trained weights do not depend on.
_NOT_IN_WEIGHTS = {
    "save_steps",
    "save_total_limit",
    "log_steps",
    "tensorboard",
    "report_to",
    "sample_prompts",
    "sample_tokens",
    "gradient_checkpointing",
}
# Settings that are younger than work which is finished. Unset they count for nothing, so that it stays finished.
_YOUNGER_OF_DATA = ("hub", "held_out_files", "columns")
_YOUNGER_OF_EXPERTS = (
    "gradient_accumulation",
    "lora",
    "freeze",
    "save_dtype",
    "eval_steps",
    "keep",
    "patience",
    "trainer",
)
# How runs are summed up does not change what one of them measures.
_NOT_IN_SCORES = {"seeds", "margin"}


def partition_fingerprint(config: TrainConfig) -> str:
    data = config.data.model_dump(mode="json")
    for field in _YOUNGER_OF_DATA:
        if getattr(config.data, field) == DataConfig.model_fields[field].default:
            del data[field]
    share = [config.held_out_share] if config.data.held_out_files else []
    return fingerprint(data, config.documents, config.partition, config.expert_names, config.seed, *share)


def tokenizer_fingerprint(settings: TokenizerConfig) -> str:
    exclude = {"mask_token"} if settings.mask_token is None else None
    return fingerprint(settings.model_dump(mode="json", exclude=exclude))


def expert_fingerprint(recipe: Recipe) -> str:
    """How often the weights are saved or logged does not count, nor how often they are measured, unless that decides
    which are kept."""
    training = recipe.training
    settings = training.model_dump(mode="json", exclude=_NOT_IN_WEIGHTS)
    for field in _YOUNGER_OF_EXPERTS:
        if getattr(training, field) == TrainingConfig.model_fields[field].default:
            del settings[field]
    if training.keep == "last":
        settings.pop("eval_steps", None)
    objective = [] if recipe.schedule is None else ["masked-diffusion", recipe.schedule]
    return fingerprint(recipe.model, settings, recipe.seed, *objective)


def router_fingerprint(config: TrainConfig) -> str:
    """Which router a request gets by default does not count."""
    settings = config.router.model_dump(mode="json", exclude=set(RouterEntry.model_fields))
    return fingerprint(settings, partition_fingerprint(config))


def moe_fingerprint(settings: MoeConfig, experts: Sequence[str]) -> str:
    return fingerprint(settings, list(experts))


def export_fingerprint(config: TrainConfig) -> str:
    place = config.run.ensemble.resolve()
    flow = [config.flow] if config.is_flow else []
    return fingerprint(config.name, config.expert_names, config.router.entry, config.mixing, place, *flow)


def scores_fingerprint(config: TrainConfig) -> str:
    settings = config.evaluate.model_dump(
        mode="json", exclude=_NOT_IN_SCORES | _never_measured(config.is_flow)
    )
    flow = [config.flow.model_dump(exclude={"steps"})] if config.is_flow else []
    return fingerprint(settings, config.router.entry, config.mixing, config.seed, *flow)


def evaluate_fingerprint(config: TrainConfig) -> str:
    settings = config.evaluate.model_dump(mode="json", exclude=_never_measured(config.is_flow))
    return fingerprint(settings, config.seed)


def _never_measured(is_flow: bool) -> set[str]:
    return set() if is_flow else {"noise_levels"}
