"""What compiles a grammar: chosen in the gateway, once a request, and the same in every engine. Knows no lockstep.

vLLM chooses a backend for each grammar, where the user leaves that to it (`auto`), but an engine has only one: that of
the first grammar which came to it. So engines that have met different requests would answer one request differently.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

PANIC = "PanicException"
"""Of Rust libraries: no `Exception`, and in no module to import it from."""


class GrammarChooser:
    """In the gateway: checks the grammars of ``llm``'s requests and chooses their backends, instead of ``llm``."""

    def __init__(self, llm: AsyncLLM):
        self._processor = processor = llm.input_processor
        self._config = processor.structured_outputs_config
        # What is checked here is not checked for every engine again.
        processor.structured_outputs_config = None

    def choose(self, params: SamplingParams) -> None:
        """Note in ``params`` which backend compiles their grammar. It may take seconds.

        Raises:
            VLLMValidationError: none can.
        """
        processor = self._processor
        tokenizer = processor.renderer.get_tokenizer()
        try:
            params._validate_structured_outputs(processor.model_config, self._config, tokenizer)
        except VLLMValidationError:
            raise
        except BaseException as error:
            # vLLM looks at a schema in many places before it knows types, and a panic of Rust's is no `Exception`.
            if not isinstance(error, Exception) and type(error).__name__ != PANIC:
                raise
            raise VLLMValidationError(
                f"structured_outputs cannot be read ({type(error).__name__}: {error})",
                parameter="structured_outputs",
            ) from None
        chosen = params.structured_outputs
        if chosen is not None and chosen._backend == "outlines" and self._config.backend == "auto":
            # It takes seconds, or fails by how busy an engine is, and goes on in vain with ever more memory.
            raise VLLMValidationError(
                "only outlines can compile this schema (patternProperties, with something else that xgrammar lacks), "
                "and it is used only where --structured-outputs-config names it",
                parameter="structured_outputs",
            )


class Backends:
    """In an engine: has ``manager``, vLLM's `StructuredOutputManager`, compile each grammar with the chosen backend."""

    def __init__(self, manager: Any):
        self._manager = manager
        self._managers: dict[str, Any] = {}  # one for each backend; what they share is the first one's
        manager.grammar_init = self._begin

    def _begin(self, request: Any) -> None:
        """In place of the manager's `grammar_init`."""
        name = request.sampling_params.structured_outputs._backend
        if name not in self._managers:
            self._managers[name] = manager = copy.copy(self._manager)
            del manager.grammar_init
            manager.backend = None
        manager = self._managers[name]
        manager.grammar_init(request)
        if self._manager.backend is None:
            self._manager.backend = manager.backend  # whose masks are as wide as every other one's
