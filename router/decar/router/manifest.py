"""The ensemble directory: its manifest, its checks, its atomic writing. Knows files, never engines."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from decar.router.errors import EnsembleError, did_you_mean
from decar.router.files import has_router, router_folder, router_problems
from decar.router.inside import check_file_name, inside, links_out

MANIFEST_NAME = "ensemble.json"
MAX_EXPERTS = 16
MAX_STEPS = 2**16
"""In which an answer is revealed: the noise of a token is counted by step and position, of 16 bits each."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]
"""What an ensemble or an expert may be called."""
Rule = Literal["velocity", "logit"]
RouterKind = Literal["posterior", "prior", "classifier", "centroid"]
Scope = Literal["full", "output"]
Start = Literal["prior", "classifier", "centroid"]
Trained = Literal["classifier", "centroid"]
Kind = Literal["autoregressive", "flow"]
Schedule = Literal["linear", "cosine"]
Order = Literal["random", "confident", "left-to-right"]


# With these a directory holds a processor of images; models of before transformers 5 have the second.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# What decides how many tokens an image takes and which, in an image-text model's files.
_VISION_SIZES = ("image_size", "patch_size")
_IMAGE_SETTINGS = (
    "image_token_index",
    "image_token_id",
    "vision_feature_select_strategy",
    "downsample_ratio",
)
_PROCESSOR_SIZES = ("patch_size", "num_additional_image_tokens", "image_seq_length", "image_token")
_IMAGE_PROCESSOR_SIZES = (
    "size",
    "crop_size",
    "do_resize",
    "do_center_crop",
    "crop_to_patches",
    "max_patches",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineOptions(_Strict):
    """What one expert's engine is started with that others' may not be.

    ``tensor_parallel_size``: GPUs (on a CPU, processes) that hold its weights together.
    """

    tensor_parallel_size: int | None = Field(default=None, ge=1, le=64)


class ExpertEntry(_Strict):
    """One expert: a Hugging Face checkpoint inside the ensemble directory, its prior mass, and its engine's options."""

    name: Name
    path: str
    prior: float = Field(
        gt=0, allow_inf_nan=False, description="share of the training data; normalised on use"
    )
    options: EngineOptions = EngineOptions()


class RouterEntry(_Strict):
    """How requests are weighted when they do not say.

    ``scope`` is the posterior router's: Bayes' rule over prompt and output (``full``), or over the output alone,
    from the weights that the router ``start`` gives for the prompt (``output``).
    """

    kind: RouterKind = "posterior"
    scope: Scope = "full"
    start: Start = "prior"

    @property
    def reads_text(self) -> bool:
        """Whether weights come from a trained router, whose files then have to be there."""
        if self.kind == "posterior":
            return self.scope == "output" and self.start != "prior"
        return self.kind != "prior"


class Mixing(_Strict):
    """How expert distributions are mixed when a request does not say.

    ``top_k`` keeps that many experts, ``prune`` drops experts whose weights add up to no more than that.
    """

    rule: Rule = "velocity"
    top_k: int | None = Field(default=None, ge=1)
    prune: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)


class FlowDefaults(_Strict):
    """How the experts of a flow ensemble reveal an answer's tokens when a request does not say.

    ``steps`` are those of a whole answer, None being one for each token; ``block_length`` is how many tokens are
    revealed before any to their right, None being all. ``prompt_chunks`` is in how many parts a prompt is revealed,
    from left to right, to find which expert it is like.
    """

    schedule: Schedule = "linear"
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    block_length: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    order: Order = "random"
    prompt_chunks: int = Field(default=4, ge=1, le=1024)


class Flow(FlowDefaults):
    """`FlowDefaults`, and the ``mask_token_id`` that stands for a token which is not known yet."""

    mask_token_id: int = Field(ge=0)


class Manifest(_Strict):
    """``ensemble.json``.

    ``kind`` is how experts generate: a token after the others, or, ``flow``, masked tokens in any order.
    """

    format_version: Literal[1] = 1
    name: Name
    kind: Kind = "autoregressive"
    flow: Flow | None = None
    experts: tuple[ExpertEntry, ...] = Field(min_length=1, max_length=MAX_EXPERTS)
    router: RouterEntry = RouterEntry()
    mixing: Mixing = Mixing()

    @pydantic.model_validator(mode="after")
    def _flow_says_how(self) -> Manifest:
        if self.kind == "flow" and self.flow is None:
            raise ValueError(
                'kind "flow" needs a section "flow" with "mask_token_id", as `decar-train export` writes it'
            )
        if self.kind != "flow" and self.flow is not None:
            raise ValueError(
                'a section "flow" belongs to kind "flow" alone; remove it, or say "kind": "flow"'
            )
        if self.kind == "flow" and (self.mixing.top_k is not None or self.mixing.prune):
            raise ValueError(
                'kind "flow" asks every expert at every step: remove "top_k" and "prune" from the section "mixing"'
            )
        return self

    @pydantic.model_validator(mode="after")
    def _names_are_unique(self) -> Manifest:
        names = [expert.name for expert in self.experts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two experts are named {twice[0]!r}; give each expert its own name")
        return self


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Write ``manifest`` to ``directory`` so that a reader sees the old file or the new one, never half of it."""
    path = directory / MANIFEST_NAME
    temporary = path.with_suffix(".tmp")
    data = manifest.model_dump(mode="json")
    if manifest.kind == "autoregressive":  # as it was before there were others
        del data["kind"], data["flow"]
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(temporary, path)
    return path


@dataclass(frozen=True)
class ExpertCheckpoint:
    """One expert on disk, with what its files say about it."""

    name: str
    path: Path
    prior: float
    config: dict[str, Any] = field(repr=False)
    options: EngineOptions = field(default_factory=EngineOptions)

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["unknown"])[0])

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer, padding included."""
        text = self.config.get("text_config") or {}
        return int(self.config.get("vocab_size") or text["vocab_size"])

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the configuration allows, where it says."""
        text = self.config.get("text_config") or {}
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            value = self.config.get(key) or text.get(key)
            if value:
                return int(value)
        return None

    @property
    def reads_images(self) -> bool:
        return isinstance(self.config.get("vision_config"), dict)

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """
        Raises:
            EnsembleError: their index cannot be read, or names a file that is not the expert's own.
        """
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            return tuple(sorted(self.path.glob("*.safetensors")))
        try:
            names = {check_file_name(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except EnsembleError as error:
            raise EnsembleError(f"{index}: in its weight_map, {error}") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise EnsembleError(f"{index} cannot be read ({error})") from None
        return tuple(self.path / name for name in sorted(names))

    @cached_property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files if file.exists())

    @cached_property
    def num_parameters(self) -> int:
        """Counted from the safetensors headers, without reading the weights."""
        return sum(_count_parameters(file) for file in self.weight_files)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.path)


class Ensemble:
    """An ensemble directory, read and checked.

    Use :meth:`load` to read one that has to be servable, or :meth:`inspect` to collect every problem.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        experts: tuple[ExpertCheckpoint, ...],
        has_router: bool = False,
    ):
        self.directory = directory
        self.manifest = manifest
        self.experts = experts
        self.has_router = has_router  # trained, for texts: when this was read

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def expert_names(self) -> list[str]:
        return [expert.name for expert in self.experts]

    @property
    def vocab_size(self) -> int:
        """V: token ids that every expert has a row for. Ids beyond it are some expert's padding."""
        return min(expert.vocab_size for expert in self.experts)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that every expert can score."""
        known = [expert.max_positions for expert in self.experts if expert.max_positions]
        return min(known, default=None)

    @classmethod
    def load(cls, directory: str | Path) -> Ensemble:
        """Read ``directory`` and refuse it unless it can be served.

        Raises:
            EnsembleError: the first problem found, naming the file or expert and the fix.
        """
        ensemble, problems = cls.inspect(directory)
        if problems:
            raise EnsembleError(problems[0])
        assert ensemble is not None
        return ensemble

    @classmethod
    def inspect(cls, directory: str | Path) -> tuple[Ensemble | None, list[str]]:
        """Read ``directory``; return what could be read and every problem found, worst first."""
        directory = Path(directory)
        problems = links_out(directory)
        if problems:  # nothing is read that lies elsewhere
            return None, problems
        try:
            manifest = _read_manifest(directory)
        except EnsembleError as error:
            return None, [str(error)]
        experts, problems = read_experts(directory, manifest.experts)
        names = [entry.name for entry in manifest.experts]
        problems += router_problems(directory, names, manifest.router.reads_text)
        if manifest.flow is not None:
            problems += _mask_problems(manifest.flow.mask_token_id, experts)
        return cls(directory, manifest, experts, has_router(router_folder(directory))), problems

    def of_experts(self, chosen: Sequence[tuple[Ensemble, int]]) -> Ensemble:
        """This one, with the experts that other readings of its directory have at these indices."""
        entries = tuple(other.manifest.experts[index] for other, index in chosen)
        experts = tuple(other.experts[index] for other, index in chosen)
        manifest = self.manifest.model_copy(update={"experts": entries})
        return Ensemble(self.directory, manifest, experts, self.has_router)


def read_experts(
    directory: Path, entries: Sequence[ExpertEntry]
) -> tuple[tuple[ExpertCheckpoint, ...], list[str]]:
    """The experts in ``directory`` that could be read, and what keeps them from being served together."""
    experts: list[ExpertCheckpoint] = []
    problems: list[str] = []
    for entry in entries:
        try:
            experts.append(_read_expert(directory, entry))
        except EnsembleError as error:
            problems.append(str(error))
    for expert in experts:
        problems += _weight_problems(expert)
    if not problems:
        problems += _tokenizer_problems(experts)
    if not problems:
        problems += image_problems(experts)
    return tuple(experts), problems


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise EnsembleError(
            f"{directory} is not a directory; give the path of an ensemble made by `decar-train export` or `decar new`"
        )
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise EnsembleError(f"{path} is missing; `decar-train export` or `decar new` writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EnsembleError(f"{path} is not valid JSON ({error})") from None
    except OSError as error:
        raise EnsembleError(f"{path} cannot be read ({error.strerror})") from None
    try:
        return Manifest.model_validate(data)
    except pydantic.ValidationError as error:
        raise EnsembleError(f"{path}: {describe_validation_error(error, Manifest)}") from None


def describe_validation_error(error: pydantic.ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one line: the field's path, what is wrong, and a near name where one exists."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or model.__name__
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        # A field of the same section first: another section's near name would lead astray.
        known = _names_at(model, first["loc"][:-1]), _field_names(model)
        message = "unknown field" + did_you_mean(first["loc"][-1], *known)
    elif first["type"] == "literal_error":
        message += f" (got {first['input']!r})"
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        message += did_you_mean(first["input"], choices)
    elif "input" in first and isinstance(first["input"], str | int | float | bool):
        message += f" (got {first['input']!r})"
    return f"{where}: {message}"


def _names_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the pydantic model that is nested in ``model`` at ``loc``."""
    for part in loc:
        if isinstance(part, int):  # an item of the list that the name before is of
            continue
        info = model.model_fields.get(part)
        pending: list[Any] = [info.annotation] if info else []
        nested = []
        while pending:
            annotation = pending.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                nested.append(annotation)
            pending += getattr(annotation, "__args__", ())
        if len(nested) != 1:
            return []
        model = nested[0]
    return list(model.model_fields)


def _field_names(model: type[BaseModel], seen: set[type] | None = None) -> list[str]:
    """Names of the fields of ``model`` and of every pydantic model nested in it."""
    seen = seen if seen is not None else set()
    if model in seen:
        return []
    seen.add(model)
    names: list[str] = []
    for name, info in model.model_fields.items():
        names.append(name)
        pending: list[Any] = [info.annotation]
        while pending:
            annotation = pending.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                names += _field_names(annotation, seen)
            pending += getattr(annotation, "__args__", ())
    return names


def _read_expert(directory: Path, entry: ExpertEntry) -> ExpertCheckpoint:
    try:
        path = inside(directory, entry.path)
    except EnsembleError as error:
        raise EnsembleError(f"expert {entry.name!r}: {error}") from None
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text())
    except FileNotFoundError:
        raise EnsembleError(
            f"expert {entry.name!r}: {config_path} is missing; export the expert again"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EnsembleError(f"expert {entry.name!r}: {config_path} is not valid JSON ({error})") from None
    except OSError as error:
        raise EnsembleError(
            f"expert {entry.name!r}: {config_path} cannot be read ({error.strerror})"
        ) from None
    expert = ExpertCheckpoint(entry.name, path, entry.prior, config, entry.options)
    problem = config_problem(expert)
    if problem:
        raise EnsembleError(f"expert {entry.name!r}: {config_path} {problem}")
    return expert


def config_problem(expert: ExpertCheckpoint) -> str | None:
    """Why an expert's ``config.json`` cannot be that of a language model, as words that go on after its name."""
    wrong = (AttributeError, LookupError, TypeError, ValueError)
    try:
        usable = expert.vocab_size > 0
    except wrong:
        usable = False
    if not usable:
        return "names no vocab_size"
    try:
        _ = expert.max_positions, expert.architecture
    except wrong:
        return "has architectures or max_position_embeddings that are not as transformers writes them"
    return None


def _weight_problems(expert: ExpertCheckpoint) -> list[str]:
    try:
        files = expert.weight_files
    except EnsembleError as error:
        return [f"expert {expert.name!r}: {error}"]
    if not files:
        return [f"expert {expert.name!r}: no *.safetensors in {expert.path}; export the expert again"]
    problems = []
    for file in files:
        try:
            expected = _safetensors_bytes(file)
        except FileNotFoundError:
            problems.append(
                f"expert {expert.name!r}: weights {file} are missing; copy or export the expert again"
            )
            continue
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            problems.append(f"expert {expert.name!r}: {file} is not a safetensors file ({error})")
            continue
        actual = file.stat().st_size
        if actual != expected:
            problems.append(
                f"expert {expert.name!r}: weights {file} are truncated "
                f"({actual:,} bytes, its header promises {expected:,}); copy or export the expert again"
            )
    return problems


def _safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """(header length in bytes, header) of a safetensors file; the format puts the length in the first 8 bytes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= 100_000_000:
            raise ValueError("its header length is out of range")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return length, header


def _safetensors_bytes(file: Path) -> int:
    length, header = _safetensors_header(file)
    return 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)


def _count_parameters(file: Path) -> int:
    _, header = _safetensors_header(file)
    total = 0
    for tensor in header.values():
        count = 1
        for size in tensor["shape"]:
            count *= size
        total += count
    return total


def _mask_problems(mask_token_id: int, experts: Sequence[ExpertCheckpoint]) -> list[str]:
    return [
        f"flow.mask_token_id is {mask_token_id}, but the ids that expert {expert.name!r} knows end at "
        f"{expert.vocab_size - 1}; give the id of the mask token that the experts were trained with"
        for expert in experts
        if mask_token_id >= expert.vocab_size
    ][:1]


def _tokenizer_problems(experts: list[ExpertCheckpoint]) -> list[str]:
    problems = []
    fingerprints: dict[str, str] = {}
    for expert in experts:
        try:
            fingerprints[expert.name] = expert.tokenizer_fingerprint
            known_ids = 1 + max(_tokenizer_ids(expert.path), default=-1)
        except EnsembleError as error:
            problems.append(f"expert {expert.name!r}: {error}")
            continue
        if known_ids > expert.vocab_size:
            problems.append(
                f"expert {expert.name!r}: its tokenizer has ids up to {known_ids - 1}, but its output layer has only "
                f"{expert.vocab_size} rows; resize the model's embeddings to the tokenizer"
            )
    if problems:
        return problems
    first = experts[0].name
    for name, fingerprint in fingerprints.items():
        if fingerprint != fingerprints[first]:
            problems.append(
                f"experts {first!r} and {name!r} have different tokenizers ({fingerprints[first]} and {fingerprint}); "
                "an ensemble mixes token probabilities, so train all experts with one tokenizer"
            )
    return problems


def image_problems(experts: list[ExpertCheckpoint]) -> list[str]:
    """What would have an image stand in different places of a prompt, one expert to another."""
    problems = [
        f"expert {expert.name!r} reads images, but {expert.path / PROCESSOR_FILES[0]} is missing; export it again"
        for expert in experts
        if expert.reads_images and not any((expert.path / file).is_file() for file in PROCESSOR_FILES)
    ]
    if problems:
        return problems
    first, *others = experts
    for other in others:
        if first.reads_images != other.reads_images:
            reader, blind = (first, other) if first.reads_images else (other, first)
            problems.append(
                f"expert {reader.name!r} reads images and {blind.name!r} does not; an ensemble gives all experts the "
                "same prompt, so make all of them image-text models, or none"
            )
            continue
        differing = [
            f"{name} ({json.dumps(one)} and {json.dumps(another)})"
            for name, (one, another) in _differences(image_tokens(first), image_tokens(other)).items()
        ]
        if differing:
            problems.append(
                f"experts {first.name!r} and {other.name!r} turn images into different tokens: they differ in "
                f"{', '.join(differing)}; train them with one processor and one kind of vision encoder"
            )
    return problems


def _differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (one.get(name), other.get(name))
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    }


def image_tokens(expert: ExpertCheckpoint) -> dict[str, Any]:
    """What of an expert's files decides which tokens an image becomes, and how many."""
    if not expert.reads_images:
        return {}
    vision = expert.config["vision_config"]
    found = {f"vision_config.{name}": vision.get(name) for name in _VISION_SIZES}
    found |= {name: expert.config.get(name) for name in _IMAGE_SETTINGS}
    for file in reversed(PROCESSOR_FILES):
        try:
            processor = json.loads((expert.path / file).read_text())
            image_processor = processor.get("image_processor") or processor
        except (OSError, ValueError, AttributeError):  # one of them may be missing
            continue
        found |= {f"processor.{name}": processor[name] for name in _PROCESSOR_SIZES if name in processor}
        found |= {
            f"image_processor.{name}": image_processor[name]
            for name in _IMAGE_PROCESSOR_SIZES
            if name in image_processor
        }
    return found


def _read_tokenizer(path: Path) -> dict[str, Any]:
    file = path / "tokenizer.json"
    try:
        data: dict[str, Any] = json.loads(file.read_text())
        _vocabulary(data)
        _added_tokens(data)
    except FileNotFoundError:
        raise EnsembleError(f"{file} is missing; save the tokenizer as a fast one (tokenizer.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnsembleError(f"{file} cannot be read ({error})") from None
    return data


def _vocabulary(data: dict[str, Any]) -> dict[str, int]:
    vocab = data["model"]["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {str(entry[0]): index for index, entry in enumerate(vocab)}  # Unigram: [piece, score] pairs


def _added_tokens(data: dict[str, Any]) -> list[tuple[int, str]]:
    return sorted((int(token["id"]), str(token["content"])) for token in data.get("added_tokens") or [])


def _tokenizer_ids(path: Path) -> set[int]:
    data = _read_tokenizer(path)
    return set(_vocabulary(data).values()) | {token for token, _ in _added_tokens(data)}


def tokenizer_fingerprint(path: Path) -> str:
    """12 hex digits of what makes two tokenizers give the same ids: vocabulary, merges, special tokens, pipeline.

    Raises:
        EnsembleError: no readable ``tokenizer.json`` in ``path``.
    """
    data = _read_tokenizer(path)
    identity = {
        "vocab": sorted(_vocabulary(data).items()),
        "merges": data["model"].get("merges"),
        "added": _added_tokens(data),
        "pipeline": {key: data.get(key) for key in ("normalizer", "pre_tokenizer")},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
