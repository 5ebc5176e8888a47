"""Which options of transformers' TrainingArguments a configuration may set, and which services it reports to.

Knows their names. What a value means, transformers says.
"""

from __future__ import annotations

from dataclasses import fields

from decar.router.errors import TrainingError, did_you_mean
from decar.training.config import TrainingConfig

# Options that have a setting of their own.
_SETTINGS = {
    "output_dir": "work_dir",
    "run_name": "name",
    "seed": "seed",
    "data_seed": "seed",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.batch_size",
    "auto_find_batch_size": "training.batch_size and training.gradient_accumulation",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "learning_rate": "training.learning_rate",
    "warmup_steps": "training.warmup",
    "weight_decay": "training.weight_decay",
    "adam_beta2": "training.adam_beta2",
    "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.precision",
    "logging_steps": "training.log_steps",
    "logging_strategy": "training.log_steps",
    "report_to": "training.report_to",
    "do_eval": "training.eval_steps",
    "eval_steps": "training.eval_steps",
    "eval_strategy": "training.eval_steps",
    "save_steps": "training.save_steps",
    "save_strategy": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
    "load_best_model_at_end": "training.keep",
    "metric_for_best_model": "training.keep",
    "greater_is_better": "training.keep",
    "deepspeed": "training.trainer.fsdp",
}
# Options that would break what decar promises (an interrupted expert ends with the same weights, documents do not see
# each other, losses are per token and finite), or that nothing here reads.
_LEFT_OUT = {
    "resume_from_checkpoint",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
    "enable_jit_checkpoint",
    "save_only_model",
    "save_on_each_node",
    "remove_unused_columns",
    "label_names",
    "use_cache",
    "average_tokens_across_devices",
    "logging_nan_inf_filter",
    "eval_delay",
    "prediction_loss_only",
    "batch_eval_metrics",
    "include_for_metrics",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "bf16_full_eval",
    "fp16_full_eval",
    "disable_tqdm",
    "do_train",
    "do_predict",
    "local_rank",
    "parallelism_config",
}


def check_options(training: TrainingConfig) -> None:
    """Refuse what ``training.trainer`` and ``training.report_to`` must not hold, before anything is trained.

    Raises:
        TrainingError: an option is unknown, has a setting of its own or is decar's; a service is unknown, or its
            package is not installed.
    """
    for name in training.trainer:
        _check_option(name)
    for name in training.report_to:
        _check_service(name)


def _check_option(name: str) -> None:
    from transformers import TrainingArguments

    known = [field.name for field in fields(TrainingArguments)]
    if name not in known:
        raise TrainingError(
            f"training.trainer.{name}: transformers' TrainingArguments has no such option{did_you_mean(name, known)}"
        )
    if name in _SETTINGS:
        raise TrainingError(f"training.trainer.{name}: set {_SETTINGS[name]} instead")
    if name in _LEFT_OUT or name.startswith(("hub_", "push_to_hub")):
        raise TrainingError(f"training.trainer.{name}: decar sees to that itself; leave it out")


def _check_service(name: str) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if name == "tensorboard":
        raise TrainingError("training.report_to: for tensorboard, set training.tensorboard: true instead")
    if name not in INTEGRATION_TO_CALLBACK:
        known = sorted(INTEGRATION_TO_CALLBACK.keys() - {"tensorboard"})
        raise TrainingError(
            f"training.report_to: transformers reports to no {name!r}{did_you_mean(name, known)}; it knows "
            f"{', '.join(known)}"
        )
    if name not in get_available_reporting_integrations():
        raise TrainingError(
            f"training.report_to: {name!r} needs its package, which is not installed; try `pip install {name}`"
        )
