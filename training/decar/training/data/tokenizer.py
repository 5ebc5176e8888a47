"""The tokenizer stage: one tokenizer for all experts, given or trained. Knows nothing about models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from decar.router.errors import TrainingError
from decar.training.checkpoint_files import check_files
from decar.training.config import CONTINUATION_TEMPLATE, IMAGE_TEMPLATE, TokenizerConfig
from decar.training.data.corpus import IMAGES_FIELD
from decar.training.data.formats import MESSAGES_FIELD
from decar.training.data.processor import name_marks, processor_files
from decar.training.data.shards import has_column, read_texts
from decar.training.fingerprints import tokenizer_fingerprint
from decar.training.run import Run, require
from decar.training.stages import Stage, digest


def tokenizer_stage(run: Run, settings: TokenizerConfig) -> Stage:
    """The stage as ``settings`` and the shards (or the given tokenizer's files) are now.

    Raises:
        TrainingError: the tokenizer at ``tokenizer.path`` or the shards are missing.
    """
    given = settings.path
    if given is not None:
        check_given(settings)
        files = sorted(file for file in given.glob("*token*") if file.is_file()) + processor_files(given)
    else:
        files = run.shards("train")
        require(run.partition, *files)
    return Stage(run.tokenizer, tokenizer_fingerprint(settings), digest(*files))


def check_given(config: TokenizerConfig) -> None:
    """Refuse a ``config.path`` without a tokenizer.

    Raises:
        TrainingError: there is none, or a file there is not whole.
    """
    if config.path is not None and not (config.path / "tokenizer.json").is_file():
        raise TrainingError(
            f"tokenizer.path: {config.path} holds no tokenizer.json; save a fast tokenizer there"
        )
    if config.path is not None:
        check_files(config.path, "tokenizer.path")


def make_tokenizer(run: Run, settings: TokenizerConfig, stage: Stage) -> None:
    """Train the tokenizer on all shards, or copy the given one with its processor; each has its chat template.

    Raises:
        TrainingError: a given tokenizer cannot be read, has no end-of-text token, or no chat template where there are
            chats.
    """
    if settings.path is not None:
        tokenizer = load_tokenizer(settings.path)
    else:
        shards = run.shards("train")
        with_images = has_column(shards[0], IMAGES_FIELD)
        tokenizer = _train(chain.from_iterable(map(read_texts, shards)), settings, with_images)
        tokenizer.chat_template = CONTINUATION_TEMPLATE
        if with_images:
            tokenizer.chat_template = IMAGE_TEMPLATE.replace("IMAGE_TOKEN", settings.image_token)
    if settings.mask_token is not None:
        _check_masks(tokenizer, settings)
    name_marks(tokenizer, settings.image_token)
    if tokenizer.eos_token_id is None:
        raise TrainingError(f"the tokenizer at {settings.path} has no eos_token, which has to end a document")
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    if tokenizer.chat_template is None and has_column(run.shards("train")[0], MESSAGES_FIELD):
        raise TrainingError(
            f"the data hold chats, and the tokenizer at {settings.path} has no chat template to render them with; "
            "set tokenizer.chat_template"
        )
    with stage.writing() as directory:
        # The template goes into tokenizer_config.json, where every server looks for it.
        tokenizer.save_pretrained(directory, save_jinja_files=False)
        for file in processor_files(settings.path) if settings.path else []:
            shutil.copyfile(file, directory / file.name)


def _check_masks(tokenizer: Any, settings: TokenizerConfig) -> None:
    """Refuse a given ``tokenizer`` without a mask token; one that ends texts with a separator, as BERT's, has it for
    an eos."""
    if tokenizer.mask_token_id is None:
        raise TrainingError(
            f"the tokenizer at {settings.path} has no mask_token, which masked diffusion replaces tokens by; add one, "
            "and a row for it to the checkpoint's embeddings, or take a checkpoint of a masked language model"
        )
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token


def load_tokenizer(directory: Path) -> Any:
    """The transformers tokenizer in ``directory``; never asks the network.

    Raises:
        TrainingError: it is missing or damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"no tokenizer can be read from {directory} ({error})") from None


def _train(texts: Iterator[str], config: TokenizerConfig, with_images: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra = [*config.chat_tokens, *([config.image_token] if with_images else [])]
    mask = {} if config.mask_token is None else {"mask_token": config.mask_token}
    ends = (config.bos_token, config.eos_token, config.pad_token)
    special = list(dict.fromkeys([*ends, *extra, *mask.values()]))
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Every text starts with bos, in training and in serving alike.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{config.bos_token} $A",
        pair=f"{config.bos_token} $A $B",
        special_tokens=[(config.bos_token, tokenizer.token_to_id(config.bos_token))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=config.bos_token,
        eos_token=config.eos_token,
        pad_token=config.pad_token,
        **mask,
        extra_special_tokens=extra,
        clean_up_tokenization_spaces=False,
    )
