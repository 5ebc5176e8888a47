"""Experts of one architecture merged into one mixture-of-experts model in Mixtral's format: Branch-Train-MiX.

Source: Sukhbaatar et al. 2024, arXiv 2403.07816, section 3. The model routes every token in every layer; it is not the
mixture of distributions that an ensemble serves.

Shapes: K experts, L layers, H hidden size.
"""

from __future__ import annotations

import math
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decar.router.errors import TrainingError
from decar.router.manifest import ExpertCheckpoint
from decar.training.config import MoeConfig, Recipe, TrainConfig
from decar.training.data.blocks import IGNORED, Rows, mean_loss
from decar.training.data.tokenizer import load_tokenizer
from decar.training.expert.model import load_model, round_weights
from decar.training.expert.report import ExpertReport, read_expert_report, versions
from decar.training.expert.stage import make_trainer, read_blocks, write_plot
from decar.training.expert.watch import Prompts, curve, read_prompts
from decar.training.export.average import average, check_configurations, mean, open_weights
from decar.training.export.card import CARD_NAME, moe_card
from decar.training.export.stage import (
    check_target,
    copy_text_files,
    expert_marker,
    origin_of,
    read_trained,
)
from decar.training.fingerprints import moe_fingerprint
from decar.training.run import NOT_EXPORTED, SPLITS, average_folder, report_file
from decar.training.stages import Stage, fingerprint, replaced_directory

_SUPPORTED = ("llama", "mistral")
# What Mixtral's configuration has in common with theirs.
_COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "sliding_window",
    "attention_dropout",
    "rope_parameters",
    "dtype",
)
_FEED_FORWARD = re.compile(r"(model\.layers\.\d+\.)mlp\.(gate|up|down)_proj\.weight")
_MIXTRAL_NAMES = {"gate": "w1", "down": "w2", "up": "w3"}


def moe_stage(config: TrainConfig) -> Stage:
    """The stage of the merged model as ``config`` and the trained experts are now.

    Raises:
        TrainingError: an expert is not trained, or was trained with another configuration.
    """
    markers = [expert_marker(recipe) for recipe in config.recipes]
    return Stage(config.run.moe, moe_fingerprint(config.moe, config.expert_names), fingerprint(markers))


def why_no_moe(recipes: Sequence[Recipe]) -> str | None:
    """Why the trained experts cannot be merged into a mixture of experts, or None where they can."""
    experts, _ = read_trained(recipes)
    try:
        mixtral_config(experts)
    except TrainingError as error:
        return str(error)
    return None


def experts_per_token(num_experts: int) -> int:
    """How many feed-forward blocks of a layer run for a token, of the merged model of ``num_experts``."""
    return min(2, num_experts)


def mixtral_config(experts: Sequence[ExpertCheckpoint]) -> Any:
    """The transformers ``MixtralConfig`` of the merged ``experts``, of which two are used for each token.

    Raises:
        TrainingError: the experts differ in architecture, or theirs has no counterpart in Mixtral's.
    """
    from transformers import AutoConfig, MixtralConfig

    check_configurations(experts)
    first = experts[0]
    dense = AutoConfig.from_pretrained(first.path, local_files_only=True, trust_remote_code=False)
    problem = None
    if dense.model_type not in _SUPPORTED:
        problem = f"is a {dense.model_type} model"
    elif dense.hidden_act != "silu":
        problem = f"has hidden_act {dense.hidden_act}, where Mixtral has silu"
    else:
        biases = [field for field in ("attention_bias", "mlp_bias") if getattr(dense, field, False)]
        if biases:
            problem = f"has {biases[0]}, which Mixtral has not"
    if problem is not None:
        raise TrainingError(
            f"expert {first.name!r} {problem}; only llama and mistral models without biases can be merged into a "
            "mixture of experts. Use --merge average, or export without --merge"
        )
    return MixtralConfig(
        **{field: getattr(dense, field, None) for field in _COMMON_FIELDS},
        num_local_experts=len(experts),
        num_experts_per_tok=experts_per_token(len(experts)),
    )


def merge(experts: Sequence[ExpertCheckpoint]) -> Any:
    """A ``MixtralForCausalLM`` in fp32, on the CPU: the experts' feed-forward blocks, of all else the mean.

    Its gates are 0, so that they tell no expert from another.

    Raises:
        TrainingError: as `mixtral_config`; or the experts' tensors differ, or are not those of their architecture.
    """
    from transformers import MixtralForCausalLM

    wanted = mixtral_config(experts)
    tensors: dict[str, Tensor] = {}
    with open_weights(experts) as weights:
        for name in weights[0]:
            block = _FEED_FORWARD.fullmatch(name)
            if block is None:
                tensors[name] = mean(name, weights)
                continue
            layer, part = block.groups()
            for k, file_of in enumerate(weights):
                merged = f"{layer}block_sparse_moe.experts.{k}.{_MIXTRAL_NAMES[part]}.weight"
                tensors[merged] = file_of[name].get_tensor(name)
    for i in range(wanted.num_hidden_layers):
        gate = torch.zeros(len(experts), wanted.hidden_size)
        tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] = gate
    model, found = MixtralForCausalLM.from_pretrained(
        None,
        config=wanted,
        state_dict=tensors,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # which else ends in a traceback
        output_loading_info=True,
        trust_remote_code=False,
    )
    mismatched = {name for name, *_ in found["mismatched_keys"]}
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"], *mismatched})
    if wrong:
        raise TrainingError(
            f"expert {experts[0].name!r} cannot be merged: its weights are not those of its config.json "
            f"({wrong[0]} is missing, left over or of another shape)"
        )
    return model


def gate_weights(centroids: Tensor, rms: Tensor) -> Tensor:
    """One layer's gate [K, H] from the mean hidden state of each expert's text.

    A gate has no bias: its logits are products with the hidden state, of which all texts share a large part, the mean m
    of the centroids. With the centroids themselves that part would decide, for every token alike. So each expert's row
    is the direction from m to its centroid, without its component along m: a token at m gives every expert the logit 0,
    one at a centroid gives that expert the largest, if they are apart. Rows have length 1 / ``rms``, which makes a
    logit √H times the cosine of the angle between row and token: about 1 in size where the token has nothing to do
    with the row, whatever the model's width and scale, so that no gate starts out certain.

    Args:
        centroids: [K, H].
        rms: root mean square of the hidden states' components.
    """
    m = centroids.mean(dim=0)
    directions = centroids - m
    directions = directions - (directions @ m / m.square().sum())[:, None] * m
    return torch.nn.functional.normalize(directions, dim=1) / rms


@torch.inference_mode()
def start_gates(model: Any, averaged: Any, samples: Sequence[Iterable[Mapping[str, Tensor]]]) -> None:
    """Set the gates of the merged ``model`` by `gate_weights`, in place.

    The hidden states are those that enter the feed-forward blocks of ``averaged``, the dense model of the experts' mean
    weights: those of the merged model would depend on the gates that are still to be found.

    Args:
        samples: [K], batches of each expert's training text with their labels.
    """
    found = [_hidden_states(averaged, batches) for batches in samples]
    centroids = torch.stack([means for means, _ in found])  # [K, L, H]
    rms = torch.stack([squares for _, squares in found]).mean(dim=0).sqrt()  # [L]
    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate.weight.copy_(gate_weights(centroids[:, i], rms[i]))


def _hidden_states(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """(mean [L, H], mean square of a component [L]) of what enters the feed-forward blocks, over all learned tokens."""
    layers = model.model.layers
    sums = torch.zeros(len(layers), model.config.hidden_size, dtype=torch.float64)
    squares = torch.zeros_like(sums)
    learned = torch.empty(0)
    count = 0

    def note(i: int, _: Any, inputs: tuple[Tensor]) -> None:
        hidden = inputs[0][learned].double()
        sums[i] += hidden.sum(dim=0).cpu()
        squares[i] += hidden.square().sum(dim=0).cpu()

    hooks = [layer.mlp.register_forward_pre_hook(partial(note, i)) for i, layer in enumerate(layers)]
    try:
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            learned = inputs.pop("labels") != IGNORED
            count += int(learned.sum())
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return sums / count, (squares / count).mean(dim=1)


def _sample(rows: Rows, num_rows: int, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of ``num_rows`` of ``rows``, drawn by ``seed``."""
    drawn = np.random.default_rng(seed).permutation(len(rows))[:num_rows].tolist()
    for start in range(0, len(drawn), batch_size):
        yield rows.collate([rows[i] for i in drawn[start : start + batch_size]])


def train_moe(
    recipes: Sequence[Recipe], settings: MoeConfig, stage: Stage, callbacks: Iterable[Any] = ()
) -> ExpertReport:
    """Merge the trained experts, start the gates, train the whole and put it in ``stage``'s place.

    An interrupted training starts anew. The report's losses are the merged model's on all experts' text.

    Args:
        recipes: the experts'.
        callbacks: transformers ``TrainerCallback`` objects, e.g. a progress bar.

    Raises:
        TrainingError: the experts cannot be merged (`mixtral_config`), their shards or the tokenizer are unusable, or
            training has spoilt the weights.
        EnsembleError: an expert is damaged, or tokenizers differ.
    """
    recipe = recipes[0]  # what it says of training, they all do
    experts, reports = read_trained(recipes)
    names, batch_size = list(reports), recipe.training.batch_size
    model = merge(experts)
    tokenizer = load_tokenizer(recipe.run.tokenizer)
    start_s = time.monotonic()
    train, held_out = (read_blocks(recipe, names, split, tokenizer) for split in SPLITS)
    with stage.writing() as directory:
        folder = average_folder(directory)
        folder.mkdir()
        average(experts, folder)
        samples = [
            _sample(read_blocks(recipe, [name], "train", tokenizer), settings.sample, batch_size, recipe.seed)
            for name in names
        ]
        start_gates(model, load_model(folder), samples)
        shutil.rmtree(folder)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        prompts = read_prompts(recipe.training, recipe.run.shard(names[0], "train"), tokenizer, model)
        train_loss, log = _train(recipe, settings, model, train, held_out, prompts, directory, callbacks)
        dtype = mixtral_config(experts).dtype or torch.float32
        round_weights(model, dtype)
        held_out_loss = mean_loss(model, held_out, batch_size)
        log += [{"step": settings.steps, "eval_loss": held_out_loss, **prompts.log_entry(model)}]
        if not math.isfinite(held_out_loss):
            raise TrainingError(
                f"the merged model's loss is {held_out_loss} after {settings.steps} steps; lower moe.learning_rate"
            )
        report = ExpertReport(
            expert=stage.directory.name,
            num_parameters=model.num_parameters(),
            train_tokens=train.num_tokens,
            held_out_tokens=held_out.num_tokens,
            steps=settings.steps,
            train_loss=train_loss,
            held_out_loss=held_out_loss,
            train_time_s=time.monotonic() - start_s,
            train_documents=_sum(report.train_documents for report in reports.values()),
            held_out_documents=_sum(report.held_out_documents for report in reports.values()),
            shards={file: sha256 for report in reports.values() for file, sha256 in report.shards.items()},
            versions=versions(),
            kept_step=settings.steps,
            curve=curve(log),
            samples=prompts.samples(log),
        )
        model.to(dtype).save_pretrained(directory)
        copy_text_files(experts[0], directory)
        report_file(directory).write_text(report.model_dump_json(indent=2) + "\n")
        if settings.steps:
            write_plot(report, directory)
    return report


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where one of them is unknown, as in reports of older versions."""
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def _train(
    recipe: Recipe,
    settings: MoeConfig,
    model: Any,
    train: Rows,
    held_out: Rows,
    prompts: Prompts,
    directory: Path,
    callbacks: Iterable[Any],
) -> tuple[float | None, list[dict[str, Any]]]:
    """Train the merged ``model`` in place as ``settings`` say.

    Returns:
        The mean loss, with the balance's share in it, and the Trainer's log.
    """
    from transformers.trainer_utils import SaveStrategy

    if not settings.steps:
        return None, []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = settings.train == "all" or ".mlp.gate." in name
    own = {
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate or recipe.training.learning_rate,
        "keep": "last",  # nothing is kept before the end
        "patience": None,
    }
    steps_like_an_experts = replace(recipe, training=recipe.training.model_copy(update=own))
    # Mixtral adds the loss that balances the load where it hands out what its gates say.
    model.config.output_router_logits = settings.balance > 0
    model.config.router_aux_loss_coef = settings.balance
    run_name = f"{recipe.ensemble} {recipe.run.moe.name}"
    trainer = make_trainer(steps_like_an_experts, model, train, directory, held_out, prompts, run_name)
    trainer.args.save_strategy = SaveStrategy.NO
    for callback in callbacks:
        trainer.add_callback(callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        loss = trainer.train().training_loss
    model.config.output_router_logits = False
    model.config.use_cache = True  # which the Trainer switches off
    return float(loss), trainer.state.log_history


def export_moe(config: TrainConfig, stage: Stage) -> Path:
    """Copy the merged model of ``stage``, with a card, beside the ensemble directory, and return where.

    Raises:
        TrainingError: the model is not made, or the target is no model.
    """
    target = config.run.ensemble_moe
    check_target(target, "config.json", "a model")
    reports = {name: read_expert_report(config.run.expert(name)) for name in config.expert_names}
    merged = read_expert_report(stage.directory)
    with replaced_directory(target) as directory:
        for file in stage.directory.iterdir():
            if not any(file.match(pattern) for pattern in NOT_EXPORTED):
                shutil.copyfile(file, directory / file.name)
        card = moe_card(origin_of(config), config.moe, reports, merged)
        (directory / CARD_NAME).write_text(card, encoding="utf-8")
    return target
