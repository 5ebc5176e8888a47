"""Backends of grammars, by vLLM's own manager and a tokenizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from decar.server.vllm_adapter.grammars import Backends, GrammarChooser
from tests.reference import Reference

XGRAMMAR: dict[str, Any] = {"regex": "[ab]"}
GUIDANCE: dict[str, Any] = {"json": {"type": "integer", "multipleOf": 7}}


def chooser_of(reference: Reference, backend: str = "auto") -> GrammarChooser:
    processor = SimpleNamespace(
        model_config=SimpleNamespace(is_diffusion=False),
        renderer=SimpleNamespace(get_tokenizer=lambda: reference.tokenizer),
        structured_outputs_config=SimpleNamespace(backend=backend),
    )
    llm: Any = SimpleNamespace(input_processor=processor)
    chooser = GrammarChooser(llm)
    assert processor.structured_outputs_config is None, "engines check nothing again"
    return chooser


def asking(grammar: dict[str, Any]) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**grammar))


class Engine:
    """As much of an engine as compiles grammars."""

    def __init__(self, reference: Reference, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(
            "vllm.v1.structured_output.cached_tokenizer_from_config", lambda model_config: reference.tokenizer
        )
        outputs = SimpleNamespace(
            reasoning_parser_plugin="",
            reasoning_parser="",
            enable_in_reasoning=False,
            disable_any_whitespace=False,
            disable_additional_properties=False,
        )
        model = SimpleNamespace(
            skip_tokenizer_init=False,
            get_vocab_size=lambda: reference.vocab_size,
            hf_config=SimpleNamespace(model_type="llama"),
            is_diffusion=False,
        )
        config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(distributed_executor_backend="uni"),
            scheduler_config=SimpleNamespace(max_num_seqs=4),
            model_config=model,
            structured_outputs_config=outputs,
            speculative_config=None,
            num_speculative_tokens=0,
        )
        self.tokenizer = reference.tokenizer
        self.manager = StructuredOutputManager(config)
        Backends(self.manager)

    def begin(self, params: SamplingParams) -> Any:
        """A request whose grammar has been compiled, or has failed to be."""
        wanted = StructuredOutputRequest.from_sampling_params(params)
        request = SimpleNamespace(
            request_id="r",
            sampling_params=params,
            structured_output_request=wanted,
            use_structured_output=True,
        )
        self.manager.grammar_init(request)
        assert wanted is not None
        wanted._grammar.exception()  # waits for it
        return request

    def allowed(self, *requests: Any) -> list[set[str]]:
        """First tokens that the grammars of a batch allow, as text."""
        by_id = {str(number): request for number, request in enumerate(requests)}
        masks = self.manager.grammar_bitmask(by_id, list(by_id), {})
        assert masks is not None
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
        return [{self.tokenizer.decode(token) for token in np.flatnonzero(row)} for row in bits]


@pytest.mark.parametrize("first", [XGRAMMAR, GUIDANCE])
def test_each_grammar_has_its_own_backend(
    duo: Reference, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any]
) -> None:
    chooser, engine = chooser_of(duo), Engine(duo, monkeypatch)
    requests = []
    for grammar in (first, XGRAMMAR, GUIDANCE, XGRAMMAR):
        params = asking(grammar)
        chooser.choose(params)
        requests.append(engine.begin(params))
    _, letters, numbers, again = engine.allowed(*requests)
    assert letters == again == {"a", "b"}
    assert numbers
    assert all(text.strip("-0123456789") == "" for text in numbers)


def test_the_choice_depends_on_the_grammar_alone(duo: Reference) -> None:
    chooser = chooser_of(duo)
    for grammar, backend in ((GUIDANCE, "guidance"), (XGRAMMAR, "xgrammar"), (GUIDANCE, "guidance")):
        params = asking(grammar)
        chooser.choose(params)
        assert params.structured_outputs is not None
        assert params.structured_outputs._backend == backend


def test_what_only_outlines_compiles_is_compiled_where_it_is_named(duo: Reference) -> None:
    """Whether it is done in time would depend on how busy an engine is."""
    params = asking({"json": {"type": "object", "patternProperties": {"^a": {}, "^b": {}}}})
    with pytest.raises(VLLMValidationError, match="outlines"):
        chooser_of(duo).choose(params)
    params = asking({"json": {"type": "object", "properties": {"a": {"type": "integer"}}}})
    chooser_of(duo, "outlines").choose(params)


PANICS = {"json": {"type": "object", "required": "😀" * 50, "properties": {}}}
"""Where llguidance's Rust cuts a character in its message."""


@pytest.mark.parametrize("backend", ["auto", "xgrammar", "guidance"])
@pytest.mark.parametrize(
    "grammar",
    [
        PANICS,
        {"regex": "(a"},
        {"json": {"$ref": "#/x"}},
        {"grammar": "{"},
        {"json": "["},
        {"json": {"type": {}}},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_the_users_fault(
    duo: Reference, grammar: dict[str, Any], backend: str
) -> None:
    with pytest.raises(VLLMValidationError):
        chooser_of(duo, backend).choose(asking(grammar))


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(
    duo: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(duo, monkeypatch)
    params = asking({"grammar": "{"})
    assert params.structured_outputs is not None
    params.structured_outputs._backend = "xgrammar"
    assert isinstance(engine.begin(params).structured_output_request.grammar, Exception)
