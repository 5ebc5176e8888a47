"""The control that clusters have to beat: the same documents dealt out by chance, everything else alike.

Knows the configuration of a run, never its data.
"""

from __future__ import annotations

from decar.router.manifest import Mixing
from decar.training.config import RouterConfig, TrainConfig


def why_no_random_split(config: TrainConfig) -> str | None:
    """Why there is no random split to compare with, or None where there is one."""
    if len(config.experts) == 1:
        return "one expert gets all documents, by whatever split"
    if config.partition.method == "random":
        return "the experts' own documents are dealt out by chance"
    return None


def random_config(config: TrainConfig) -> TrainConfig:
    """An ordinary run in ``WORK_DIR/random``, like ``config`` but for who gets a document. Its mixing is the default.

    What is held out is what the run of ``config`` holds out, and the tokenizer is that of ``config``: both runs learn
    from the same tokens in all, and have not seen the same texts.
    """
    # `field` stays, which method random does not look at: rows without it are no documents there either.
    partition = config.partition.model_copy(
        update={"method": "random", "name_by": {}, "domains": {}, "held_out_as": config.run.partition}
    )
    tokenizer = config.tokenizer.model_copy(update={"path": config.run.tokenizer})
    return config.model_copy(
        update={
            "work_dir": config.run.random,
            "ensemble_dir": None,
            "partition": partition,
            "tokenizer": tokenizer,
            "router": RouterConfig(),
            "mixing": Mixing(),
        }
    )
