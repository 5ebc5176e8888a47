"""The training configuration: one pydantic model per concern, with its defaults here and nowhere else.

Knows YAML and `--set`, never what a stage does with a value.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from decar.router.errors import TrainingError, did_you_mean
from decar.router.files import Metric
from decar.router.manifest import (
    MAX_STEPS,
    FlowDefaults,
    Mixing,
    RouterEntry,
    Schedule,
    describe_validation_error,
)
from decar.training.run import Run

Builtin = Literal["python-stdlib", "python-docstrings", "pydoc-topics"]
Objective = Literal["causal", "masked-diffusion"]
_FLOW: Objective = "masked-diffusion"
Probability = Annotated[float, Field(gt=0, lt=1)]
MASK_TOKEN = "<|mask|>"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

# A plain language model continues text, so the default template adds nothing that its training text lacks:
# the messages as they are, bos in front, an answer glued to the message it continues.
CONTINUATION_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if not loop.first and message['role'] != 'assistant' %}{{ '\\n\\n' }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)


# The same where messages may have images, which stand in front of a line of their own.
IMAGE_TEMPLATE = CONTINUATION_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE_TOKEN\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnsConfig(_Strict):
    """Which columns of the rows are what, where they have names of their own (docs/training.md)."""

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    history: str | None = None
    system: str | None = None
    tools: str | None = None
    image: str | None = None

    @property
    def of(self) -> dict[str, str]:
        """The columns that are mapped, by what they are."""
        return {name: column for name, column in self if column is not None}


class HubConfig(_Strict):
    """A data set of the Hugging Face Hub, or one in a folder, that the library `datasets` loads."""

    id: str = Field(min_length=1, description="as in org/name")
    config: str | None = Field(default=None, description="of a data set that has several")
    split: str = "train"
    revision: str | None = Field(default=None, description="branch, tag or commit; default: main")
    streaming: bool = Field(default=False, description="read it as it comes, and keep no copy")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_id(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value


class DataConfig(_Strict):
    """Where the documents come from.

    ``files`` are paths, folders or globs: tables (.jsonl, .json, .csv, .tsv, .parquet), each of whose rows is a text or
    a chat, and texts, one document each; also compressed (.gz, .zst). ``hub`` names data sets of the Hugging Face Hub.
    ``builtin`` sources are part of every Python: ``python-stdlib`` is the standard library's code without
    its docstrings, ``python-docstrings`` those docstrings, ``pydoc-topics`` the language reference.
    ``held_out_files`` are held out, and nothing else is unless ``partition.held_out`` is set.
    ``columns`` maps columns of other names. ``image_field`` holds a chat's images: a path or a list of them, relative
    to ``image_dir`` or else to the file. ``on_bad_line`` says what becomes of a line or row that cannot be used.
    """

    files: list[str] = []
    hub: list[HubConfig] = []
    held_out_files: list[str] = []
    columns: ColumnsConfig = ColumnsConfig()
    text_field: str = "text"
    image_field: str = "image"
    image_dir: Path | None = Field(default=None, description="default: each file's own folder")
    builtin: list[Builtin] = []
    builtin_max_bytes: int = Field(default=2_000_000, gt=0, description="cap on each built-in source")
    on_bad_line: Literal["error", "skip"] = "error"

    @pydantic.model_validator(mode="after")
    def _not_empty(self) -> DataConfig:
        if not self.files and not self.builtin and not self.hub:
            raise ValueError("no data; list `files` or `builtin` sources, or data sets of the `hub`")
        return self

    @pydantic.model_validator(mode="after")
    def _named_once(self) -> DataConfig:
        for name in ("text", "image"):
            if getattr(self.columns, name) is not None and f"{name}_field" in self.model_fields_set:
                raise ValueError(f"columns.{name} and {name}_field name the same thing; drop one")
        return self


class DocumentConfig(_Strict):
    """What of the texts is partitioned: each as a whole, or cut into pieces of at most ``max_chars``.

    Cuts are at line ends where possible, else before a word. Experts learn adjacent pieces that they both get as one
    text. A piece shorter than ``min_chars`` stays with the one before it.
    """

    max_chars: int | None = Field(default=None, gt=0, description="characters; texts stay whole unless set")
    min_chars: int = Field(default=32, ge=0, description="shorter texts are dropped, and counted")


class TokenizerConfig(_Strict):
    """One tokenizer for all experts: the one at ``path``, or a byte-level BPE trained on all shards.

    ``chat_tokens`` are reserved in a trained vocabulary, so that chat tuning later needs no resizing; so is
    ``image_token``, of which a model reads as many as an image has patches, where the data have images, and
    ``mask_token`` where the objective is masked diffusion; a tokenizer at ``path`` has its own.
    ``chat_template`` (Jinja) replaces that of a tokenizer at ``path``; a trained one gets the default.
    """

    path: Path | None = None
    vocab_size: int = Field(default=4_096, ge=300)
    bos_token: str = "<|bos|>"
    eos_token: str = "<|eos|>"
    pad_token: str = "<|pad|>"
    image_token: str = "<image>"
    mask_token: str | None = Field(
        default=None, description=f"default: none, of masked diffusion {MASK_TOKEN}"
    )
    chat_tokens: list[str] = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    chat_template: str | None = None


class PartitionConfig(_Strict):
    """How documents are dealt out to the experts.

    ``method``: ``kmeans``, balanced spherical k-means; ``two-stage``, ``fine_clusters`` by mini-batch k-means, merged
    into balanced ones; ``random``, the control; ``by-field``, by the user's own domains.

    Documents are compared by TF-IDF and truncated SVD, or by the sentence-embedding model in the directory
    ``embedding``; those with images by their pixels, ``image_side`` squared, and truncated SVD, or by the
    image-embedding model (CLIP, SigLIP) in ``image_embedding``. What is fitted, is fitted to ``sample`` documents, and
    the report looks at the same.

    ``name_by`` maps an expert to a data source (a built-in's or a file's name): clusters are named so that
    each such expert holds as much of its source as possible. Without it, clusters are named in order.
    ``domains`` maps an expert to what it gets by ``by-field``: values, or shell patterns of them, of the rows' field
    ``field`` (``meta.lang`` where it is within another), of a part of the files' paths (``path[-2]``, the folder;
    ``path.name``, ``path.stem``, ``path.suffix``), or of the source where ``field`` is not set. Without it, the values
    are the experts' names.
    ``held_out`` is the share of each expert's documents. ``held_out_by`` says what is held out whole: an input
    ``document``, or a ``piece`` of one. ``held_out_as`` names the partition of another run of the same data
    (``WORK_DIR/partition``): what is held out there is held out here, and nothing else. Held-out documents that are
    among the training documents as well, in the same words, are removed from the held-out ones, or kept.
    """

    method: Literal["kmeans", "two-stage", "random", "by-field"] = "kmeans"
    field: str | None = None
    domains: dict[str, list[str]] = {}
    embedding: Path | None = None
    image_embedding: Path | None = None
    image_side: int = Field(default=16, gt=0, le=256, description="pixels")
    num_features: int = Field(default=20_000, gt=0)
    num_components: int = Field(default=64, gt=0)
    sample: int = Field(default=20_000, gt=0, description="documents, all where there are no more")
    fine_clusters: int = Field(default=1_024, gt=0)
    restarts: int = Field(default=4, gt=0)
    max_iterations: int = Field(default=50, gt=0)
    held_out: float = Field(default=0.05, gt=0, lt=1)
    held_out_by: Literal["document", "piece"] = "document"
    held_out_as: Path | None = Field(default=None, description="another run's WORK_DIR/partition")
    held_out_duplicates: Literal["remove", "keep"] = "remove"
    name_by: dict[str, str] = {}

    @pydantic.field_validator("domains", mode="before")
    @classmethod
    def _as_texts(cls, domains: Any) -> Any:
        """Numbers, true and false are compared as Python writes them, as they are in rows."""
        if not isinstance(domains, dict):
            return domains
        return {
            name: [str(value) if isinstance(value, int | float) else value for value in values]
            if isinstance(values, list)
            else values
            for name, values in domains.items()
        }

    @pydantic.field_validator("field")
    @classmethod
    def _counts_from_the_end(cls, field: str | None) -> str | None:
        if field is not None and re.fullmatch(r"path\[(?!-[1-9]\d*\]).*\]", field):
            raise ValueError(
                f"{field!r} has to count from the end: path[-1] is a file's name, path[-2] its folder"
            )
        return field

    @pydantic.model_validator(mode="after")
    def _method_fits(self) -> PartitionConfig:
        if self.method == "by-field" and self.name_by:
            raise ValueError("name_by names clusters, which method by-field has not; use domains")
        for name in ("field", "domains"):
            if self.method != "by-field" and getattr(self, name):
                raise ValueError(f"{name} is for method by-field; set method to it, or drop {name}")
        return self


class ExpertConfig(_Strict):
    """One expert. ``model`` is laid over the common ``model``; a ``checkpoint`` in it replaces that."""

    name: str = Field(pattern=NAME_PATTERN, max_length=64)
    model: dict[str, Any] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class LoraConfig(_Strict):
    """Low-rank adapters on a frozen checkpoint, merged into it when trained (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="names of linear layers; all-linear leaves out the output layer"
    )


class TrainingConfig(_Strict):
    """How each expert is trained.

    One step is ``batch_size`` x ``gradient_accumulation`` blocks of ``sequence_length`` tokens, by however many
    processes it is computed. ``trainer`` are options of transformers' TrainingArguments that have no setting here.
    """

    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, gt=0, description="overrides epochs")
    batch_size: int = Field(default=8, gt=0, description="blocks in one forward pass, over all processes")
    gradient_accumulation: int = Field(default=1, gt=0, description="forward passes in one step")
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations twice to save memory"
    )
    sequence_length: int = Field(default=512, gt=1, description="tokens")
    learning_rate: float = Field(default=1e-3, gt=0)
    min_learning_rate_ratio: float = Field(
        default=0.1, ge=0, le=1, description="where the cosine ends, of the peak"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.1, ge=0)
    adam_beta2: float = Field(default=0.95, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the forward pass; weights are fp32"
    )
    freeze: list[str] = Field(
        default=[], description="modules whose weights stay as they are, e.g. vision_tower"
    )
    lora: LoraConfig | None = Field(default=None, description="adapters instead of all weights")
    save_steps: int = Field(default=100, gt=0)
    save_total_limit: int = Field(default=2, gt=0, description="complete checkpoints kept while training")
    save_dtype: Literal["base", "fp32", "bf16", "fp16"] = Field(
        default="base", description="of the finished weights; base: the checkpoint's, of fresh weights fp32"
    )
    eval_steps: int | None = Field(
        default=None, gt=0, description="steps between held-out losses; default: one at the end"
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="weights of the last step, or of the lowest held-out loss"
    )
    patience: int | None = Field(
        default=None, gt=0, description="held-out losses in a row, none the lowest, that end the training"
    )
    log_steps: int = Field(default=10, gt=0)
    tensorboard: bool = Field(default=False, description="event files under WORK_DIR/logs")
    report_to: list[str] = Field(default=[], description="as transformers names them: wandb, mlflow, ...")
    sample_prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="continued greedily with every held-out loss"
    )
    sample_tokens: int = Field(default=48, gt=0, description="of each continuation")
    trainer: dict[str, Any] = Field(default={}, description="further options of TrainingArguments")

    @pydantic.model_validator(mode="after")
    def _best_is_measured(self) -> TrainingConfig:
        if self.keep == "best" and self.eval_steps is None:
            raise ValueError(
                "keep: best compares held-out losses, of which there are none; set eval_steps too"
            )
        if self.patience is not None and self.keep != "best":
            raise ValueError("patience waits for a lower held-out loss, to keep it; set keep: best too")
        return self

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation

    @property
    def tokens_per_step(self) -> int:
        """Where every row is full."""
        return self.rows_per_step * self.sequence_length


class RouterConfig(RouterEntry):
    """How requests are weighted by default (``kind``, ``scope``, ``start``), and how classifier and centroids are made.

    Their features are TF-IDF and truncated SVD, or the sentence-embedding model in the directory ``embedding``; those
    of images are pixels and truncated SVD, or the model in ``image_embedding``.
    """

    embedding: Path | None = None
    image_embedding: Path | None = None
    image_side: int = Field(default=16, gt=0, le=256, description="pixels")
    num_features: int = Field(default=20_000, gt=0)
    num_components: int = Field(default=64, gt=0)
    sample: int = Field(
        default=20_000, gt=0, description="documents it is fitted to, all where there are no more"
    )
    prefixes_per_document: int = Field(default=4, gt=0, description="lengths are drawn log-uniformly")
    centroid_metric: Metric = "cosine"

    @property
    def entry(self) -> RouterEntry:
        """What of it the manifest holds."""
        return RouterEntry(**{name: getattr(self, name) for name in RouterEntry.model_fields})


class MoeConfig(_Strict):
    """How ``export --merge moe`` finishes the mixture of experts that it merges (docs/training.md).

    Its gates start from the hidden states of ``sample`` rows of each expert's training text. Then it is trained on all
    experts' text, in steps like an expert's: ``training`` says how large they are, and all that is not said here, but
    for ``lora`` and ``freeze``. ``balance`` weights the loss that keeps experts equally busy (Branch-Train-MiX, arXiv
    2403.07816).
    """

    sample: int = Field(default=32, gt=0, description="rows of training.sequence_length tokens")
    steps: int = Field(default=50, ge=0, description="0: as merged, gates from centroids")
    train: Literal["all", "gates"] = Field(default="all", description="which weights")
    learning_rate: float | None = Field(default=None, gt=0, description="default: training.learning_rate")
    balance: float = Field(default=0.01, ge=0)


class EvaluateConfig(_Strict):
    """Which held-out texts systems are compared on: prompts of ``prompt_tokens``, and what follows them.

    ``seeds`` are whole runs of their own, each with its own partition, training and held-out texts; none stands for
    the configuration's ``seed``. Two systems are equivalent where the interval of their difference lies within
    ``margin``. ``prune`` are the budgets in the table; ``prune_grid`` those of the plot of active experts.
    """

    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = []
    noise_levels: int = Field(
        default=16,
        gt=0,
        le=MAX_STEPS,
        description="of masked diffusion: steps that reveal what follows a prompt",
    )
    margin: float = Field(default=0.02, gt=0, description="nats per token")
    prompt_tokens: int = Field(default=32, gt=1, description="bos included")
    max_tokens: int = Field(default=512, gt=2, description="prompt and continuation")
    max_texts: int = Field(default=200, gt=0, description="of each expert, drawn by the seed")
    sampled_tokens: int = Field(default=128, gt=0, description="that the ensemble writes after each prompt")
    batch_size: int = Field(default=4, gt=0, description="texts whose rows are in memory at once")
    prune: list[Probability] = [0.1, 0.01, 0.001]
    prune_grid: list[Probability] = [0.5, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6]

    @pydantic.field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is listed twice; the same run would count twice")
        return seeds


class CurveConfig(_Strict):
    """What `decar-train curve` tries: how much of all training goes into a common base before experts part from it.

    Every point takes ``steps`` steps in all, of which each of ``shares`` goes into the base and the rest to the experts
    together, in equal parts; the model that they are held against takes the rest alone. ``experts``: numbers of them.
    """

    steps: int = Field(gt=0, description="of base and experts together")
    shares: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0, 0.25, 0.5, 0.75], min_length=1)
    experts: list[Annotated[int, Field(ge=2, le=16)]] = Field(default=[2, 4], min_length=1)

    @pydantic.model_validator(mode="after")
    def _steps_fit(self) -> CurveConfig:
        for name, values in (("shares", self.shares), ("experts", self.experts)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} lists a value twice")
        for share in self.shares:
            for count in self.experts:
                if (self.steps - self.base_steps(share)) % count or not math.isclose(
                    self.base_steps(share), share * self.steps
                ):
                    raise ValueError(
                        f"{self.steps:,} steps cannot be parted into a share of {share:g} for a base "
                        f"and equal parts for {count} experts; set curve.steps to e.g. 1200"
                    )
        return self

    def base_steps(self, share: float) -> int:
        """How many steps the base takes whose share is ``share``."""
        return round(share * self.steps)


@dataclass(frozen=True)
class Recipe:
    """What one model is trained by, on whichever shards: an expert, or one that experts are compared with.

    ``model`` is its description, ``{"checkpoint": path}`` or a Hugging Face configuration; ``run`` says where tokenizer
    and shards are, and where checkpoints go; ``ensemble`` is the name of the whole. ``schedule`` is that of masked
    diffusion, None for a causal model.
    """

    ensemble: str
    run: Run
    name: str
    model: dict[str, Any]
    training: TrainingConfig
    image_token: str
    seed: int
    schedule: Schedule | None = None

    @property
    def is_flow(self) -> bool:
        return self.schedule is not None


class TrainConfig(_Strict):
    """A whole run of `decar-train`. Paths are relative to the working directory.

    In a file, ``{seed}`` in any string stands for the seed.
    """

    name: str = Field(pattern=NAME_PATTERN, max_length=64)
    work_dir: Path
    ensemble_dir: Path | None = Field(default=None, description="default: WORK_DIR/ensemble")
    seed: int = Field(default=0, ge=0, lt=2**32)
    data: DataConfig
    documents: DocumentConfig = DocumentConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    partition: PartitionConfig = PartitionConfig()
    experts: list[ExpertConfig] = Field(min_length=1, max_length=16)
    model: dict[str, Any] = {}
    training: TrainingConfig = TrainingConfig()
    router: RouterConfig = RouterConfig()
    mixing: Mixing = Mixing()
    flow: FlowDefaults = FlowDefaults()
    moe: MoeConfig = MoeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    curve: CurveConfig | None = None

    @pydantic.model_validator(mode="after")
    def _names_fit(self) -> TrainConfig:
        names = self.expert_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two experts are named {twice[0]!r}; give each expert its own name")
        for field, mapping in (("name_by", self.partition.name_by), ("domains", self.partition.domains)):
            for name in mapping:
                if name not in names:
                    raise ValueError(
                        f"partition.{field} names {name!r}, which is not one of the experts {names}"
                    )
        for name in names:
            if self.partition.domains and not self.partition.domains.get(name):
                raise ValueError(
                    f"partition.domains leaves expert {name!r} without a domain; list its values"
                )
        for name in names:
            model = self.model_of(name)
            if "checkpoint" in model and len(model) > 1:
                other = next(key for key in model if key != "checkpoint")
                raise ValueError(
                    f"the model of {name!r} is a checkpoint, which leaves no room for {other!r}; drop one"
                )
            if "checkpoint" in model and self.tokenizer.path is None:
                raise ValueError(
                    f"the model of {name!r} is a checkpoint; set tokenizer.path to its tokenizer"
                )
            if "checkpoint" not in model and "model_type" not in model:
                raise ValueError(f"the model of {name!r} needs a model_type (e.g. llama) or a checkpoint")
            if "checkpoint" not in model and self.training.lora is not None:
                raise ValueError(
                    f"training.lora adapts a checkpoint, but {name!r} starts from fresh weights; "
                    "set model.checkpoint or drop training.lora"
                )
        return self

    @pydantic.model_validator(mode="before")
    @classmethod
    def _masks_are_tokens(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        model, tokenizer = data.get("model"), data.get("tokenizer") or {}
        if isinstance(model, dict) and isinstance(tokenizer, dict) and model.get("objective") == _FLOW:
            return {**data, "tokenizer": {"mask_token": MASK_TOKEN, **tokenizer}}
        return data

    @pydantic.model_validator(mode="after")
    def _objective_fits(self) -> TrainConfig:
        objective, known = self.objective, get_args(Objective)
        if objective not in known:
            raise ValueError(
                f"model.objective is {' or '.join(known)}, not {objective!r}{did_you_mean(objective, known)}"
            )
        for expert in self.experts:
            if "objective" in expert.model:
                raise ValueError(f"all experts have one objective; take it out of {expert.name!r} into model")
        only_of_flow = {
            "flow": self.flow != FlowDefaults(),
            "tokenizer.mask_token": self.tokenizer.mask_token is not None,
            "evaluate.noise_levels": self.evaluate.noise_levels != EvaluateConfig().noise_levels,
        }
        never_of_flow = {
            "training.lora": self.training.lora is not None,
            "training.sample_prompts": bool(self.training.sample_prompts),
            "training.trainer.label_smoothing_factor": "label_smoothing_factor" in self.training.trainer,
            "mixing.top_k": self.mixing.top_k is not None,
            "mixing.prune": self.mixing.prune > 0,
            "curve": self.curve is not None,
        }
        for name, is_set in (never_of_flow if self.is_flow else only_of_flow).items():
            if is_set:
                raise ValueError(f"{name} does not apply to model.objective: {objective}; drop it")
        if self.is_flow and self.tokenizer.mask_token is None:
            raise ValueError(f"tokenizer.mask_token: masked diffusion needs one, e.g. {MASK_TOKEN}")
        return self

    @property
    def objective(self) -> Objective:
        """What experts learn: the next token, or masked ones, which they reveal in any order."""
        objective: Objective = self.model.get("objective", "causal")
        return objective

    @property
    def is_flow(self) -> bool:
        return self.objective == _FLOW

    @property
    def held_out_share(self) -> float:
        """What of each expert's documents is drawn to be held out: none where ``data.held_out_files`` says what is,
        unless ``partition.held_out`` is set as well."""
        is_said = "held_out" in self.partition.model_fields_set
        return 0.0 if self.data.held_out_files and not is_said else self.partition.held_out

    @property
    def expert_names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def run(self) -> Run:
        """Where everything of this run is."""
        return Run(self.work_dir, self.ensemble_dir, tuple(self.expert_names))

    @property
    def recipes(self) -> list[Recipe]:
        return [self.recipe(name) for name in self.expert_names]

    def recipe(self, name: str) -> Recipe:
        """What expert ``name`` is trained by.

        Raises:
            TrainingError: no expert has that name.
        """
        model = self.model_of(name)
        image_token = self.tokenizer.image_token
        schedule = self.flow.schedule if self.is_flow else None
        return Recipe(self.name, self.run, name, model, self.training, image_token, self.seed, schedule)

    def model_of(self, name: str) -> dict[str, Any]:
        """The model description of expert ``name``: ``{"checkpoint": path}`` or a Hugging Face configuration.

        Raises:
            TrainingError: no expert has that name.
        """
        for expert in self.experts:
            if expert.name == name:
                base = {} if "checkpoint" in expert.model else dict(self.model)
                base.pop("objective", None)
                if "model_type" in expert.model:
                    base.pop("checkpoint", None)
                return copy.deepcopy(base | expert.model)
        raise TrainingError(
            f"no expert is named {name!r}; the configuration has {', '.join(self.expert_names)}"
            + did_you_mean(name, self.expert_names)
        )


def load_config(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read ``path``, lay ``overrides`` (``"a.b=value"``, the value in YAML) over it, and put the seed for ``{seed}``.

    Raises:
        TrainingError: the first problem, naming the file and the field.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrainingError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise TrainingError(f"{path} is not valid YAML ({_one_line(error)})") from None
    if not isinstance(data, dict):
        raise TrainingError(f"{path} has to be a YAML mapping, e.g. `name: demo`")
    for override in overrides or []:
        _override(data, override)
    seed = data.get("seed", TrainConfig.model_fields["seed"].default)
    try:
        return TrainConfig.model_validate(_with_seed(data, str(seed)))
    except pydantic.ValidationError as error:
        raise TrainingError(f"{path}: {describe_validation_error(error, TrainConfig)}") from None


def load_seeds(path: Path, overrides: list[str] | None = None) -> list[TrainConfig]:
    """The runs that ``path`` is evaluated over, one for each of ``evaluate.seeds``.

    The configuration's own seed is the configuration as it is; every other one works in ``WORK_DIR/seed-SEED``.

    Raises:
        TrainingError: as `load_config`.
    """
    own = load_config(path, overrides)
    return [
        own if seed == own.seed else load_config(path, [*(overrides or []), *seed_overrides(own.run, seed)])
        for seed in own.evaluate.seeds or [own.seed]
    ]


def seed_overrides(run: Run, seed: int) -> list[str]:
    """What turns the configuration of ``run`` into that of another ``seed``, as for ``--set``."""
    # As YAML, quoted only where it has to be; after a plain word comes a line that ends the document.
    directory, *_ = yaml.safe_dump(str(run.seed(seed)), width=math.inf).splitlines()
    return [f"seed={seed}", f"work_dir={directory}", "ensemble_dir=null"]


def _with_seed(value: Any, seed: str) -> Any:
    if isinstance(value, str):
        return value.replace("{seed}", seed)
    if isinstance(value, dict):
        return {key: _with_seed(item, seed) for key, item in value.items()}
    return [_with_seed(item, seed) for item in value] if isinstance(value, list) else value


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key):
        raise TrainingError(f"--set {override!r}: write it as a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TrainingError(f"--set {override!r}: the value is not valid YAML ({_one_line(error)})") from None
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        if isinstance(node, dict) and node.get(parent) is None:
            node[parent] = {}
        node = node[_index(node, parent, override)]
    node[_index(node, last, override)] = value


def _index(node: Any, part: str, override: str) -> Any:
    """``part`` as an index of ``node``: a key of a mapping, a position in a list."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return int(part)
    raise TrainingError(f"--set {override!r}: there is no {part!r} to set")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
