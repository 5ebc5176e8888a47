"""Bodies that no client should send: good ones, each with something wrong. The same for the same seed.

Knows the forms of vLLM's API, but no server.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FIELDS = {
    "/v1/chat/completions": """
        messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
        presence_penalty response_format seed stop stream stream_options temperature top_p tools tool_choice
        reasoning_effort thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k min_p
        repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
        skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
        logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt continue_final_message
        add_special_tokens documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs
        structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids
        routed_experts_prompt_start return_token_offsets return_prompt_text mm_payload return_mm_kwargs cache_salt
        kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval decar""",
    "/v1/completions": """
        model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
        stream_options suffix temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking
        length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
        spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs
        logprob_token_ids bad_words prompt_embeds add_special_tokens response_format structured_outputs priority
        request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
        return_token_offsets mm_payload return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
        repetition_detection thinking_token_budget stream_interval best_of decar""",
    "/v1/responses": """
        background include input instructions max_output_tokens max_tool_calls metadata model logit_bias
        parallel_tool_calls previous_response_id prompt reasoning include_reasoning service_tier store stream
        temperature text tool_choice tools top_logprobs top_p top_k min_p truncation user skip_special_tokens
        include_stop_str_in_output presence_penalty frequency_penalty prompt_cache_key watermarking request_id
        session_id media_io_kwargs mm_processor_kwargs priority mm_payload return_mm_kwargs cache_salt
        enable_response_messages previous_input_messages structured_outputs repetition_penalty seed stop
        stop_token_ids ignore_eos vllm_xargs kv_transfer_params ec_transfer_params chat_template_kwargs decar""",
    "/v1/messages": """
        model messages max_tokens metadata output_config thinking stop_sequences stream system temperature tool_choice
        tools top_k top_p mm_payload return_mm_kwargs cache_salt watermarking kv_transfer_params ec_transfer_params
        vllm_xargs chat_template_kwargs decar""",
    "/tokenize": """
        model messages prompt add_generation_prompt return_token_strs continue_final_message add_special_tokens
        chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs tools decar""",
    "/detokenize": "model tokens decar",
    "/invocations": "model prompt messages max_tokens requestType decar",
}
"""What a body may hold, by path, as far as vLLM 0.32 knows."""

MESSAGES = [{"role": "user", "content": "Sort a list."}]
_TOOL = {
    "type": "function",
    "function": {"name": "sort", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}


def bases(model: str) -> list[tuple[str, dict[str, Any]]]:
    """Bodies that are answered with status 200, and for little."""
    few: dict[str, Any] = {"model": model, "max_tokens": 2}
    chat = {**few, "messages": MESSAGES}
    weights = {"weights": {"code": 0.6, "prose": 0.4}, "rule": "logit", "trace": True}
    return [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2, "n": 2, "decar": weights}),
        (
            "/v1/chat/completions",
            {**chat, "tools": [_TOOL], "tool_choice": "none"},
        ),
        (
            "/v1/chat/completions",
            {
                **chat,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
            },
        ),
        (
            "/v1/chat/completions",
            {
                **chat,
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "a", "type": "function", "function": {"name": "sort", "arguments": "{}"}}
                        ],
                    },
                    {"role": "tool", "tool_call_id": "a", "content": "done"},
                    *MESSAGES,
                ],
            },
        ),
        ("/v1/completions", {**few, "prompt": "import os"}),
        ("/v1/completions", {**few, "prompt": [[5, 6, 7], [8]], "n": 2, "echo": True, "logprobs": 1}),
        (
            "/v1/completions",
            {
                **few,
                "prompt": [5, 6],
                "stream": True,
                "temperature": 0.5,
                "seed": 3,
                "stop": ["x"],
                "logit_bias": {"5": 1.0},
                "decar": {"route": "posterior", "prune": 0.01, "top_k": 1},
            },
        ),
        ("/v1/completions", {**few, "prompt": "x", "structured_outputs": {"regex": "[ab]+"}}),
        ("/v1/completions", {**few, "prompt": "x", "structured_outputs": {"json": _SCHEMA}}),
        ("/v1/completions", {**few, "prompt": "x", "structured_outputs": {"choice": ["a", "b"]}}),
        ("/v1/completions", {**few, "prompt": "x", "structured_outputs": {"grammar": 'root ::= "a" | "b"'}}),
        ("/v1/completions", {**few, "prompt": "x", "prompt_logprobs": 1, "decar": {"route": "prior"}}),
        ("/v1/responses", {"model": model, "input": "Sort a list.", "max_output_tokens": 2}),
        (
            "/v1/responses",
            {
                "model": model,
                "input": [
                    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}
                ],
                "instructions": "Be brief.",
                "max_output_tokens": 2,
                "text": {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}},
            },
        ),
        ("/v1/messages", {**chat, "system": "Be brief.", "stop_sequences": ["x"], "top_k": 3}),
        (
            "/v1/messages",
            {
                **few,
                "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
                "tools": [{"name": "sort", "input_schema": {"type": "object"}}],
                "tool_choice": {"type": "none"},
            },
        ),
        ("/v1/messages/count_tokens", {"model": model, "messages": MESSAGES}),
        ("/tokenize", {"model": model, "prompt": "import os", "return_token_strs": True}),
        ("/tokenize", {"model": model, "messages": MESSAGES, "tools": [_TOOL]}),
        ("/detokenize", {"model": model, "tokens": [5, 6, 7]}),
        ("/invocations", {**few, "prompt": "x", "decar": {"sampling": "draw", "route": "posterior"}}),
    ]


BY_TYPE: dict[str, list[Any]] = {
    "null": [None],
    "bool": [True, False],
    "integer": [0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**63), 10**30],
    "number": [0.5, -1.5, 1e308, 1e-320, float("nan"), float("inf"), -float("inf")],
    "text": [
        "",
        "x",
        "\0",
        "\ud800",
        "😀" * 50,
        "null",
        "1",
        "{}",
        "{{ x }}",
        "{% for %}",
        "../x",
        "a" * 5_000,
    ],
    "list": [[], [[]], [None], ["x"], [1, "x", None, {}], [-1], [10**9], ["x"] * 20, [{}], [[[[[[[[]]]]]]]]],
    "object": [
        {},
        {"x": 1},
        {"": None},
        {"type": "x"},
        {"$ref": "#"},
        {"type": ["object"]},
        {"a": {"b": []}},
    ],
}
"""Values of every type that JSON has."""

_VALUES = [value for values in BY_TYPE.values() for value in values]


@dataclass(frozen=True)
class Mutated:
    """A request.

    Attributes:
        number: by which it is found again.
    """

    number: int
    path: str
    body: bytes


def mutated(model: str, count: int, seed: int) -> Iterator[Mutated]:
    """``count`` requests; the first ones of more are the same."""
    draw = random.Random(seed)
    good = bases(model)
    for number in range(count):
        path, base = draw.choice(good)
        body = copy.deepcopy(base)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            draw.choice(_CHANGES)(draw, path, body)
        text = json.dumps(body).encode()
        yield Mutated(number, path, _damaged(draw, text) if draw.random() < 0.05 else text)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a body, at every level."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _replace(draw: random.Random, path: str, body: dict[str, Any]) -> None:
    places = list(_places(body))
    if places:
        container, key = draw.choice(places)
        container[key] = copy.deepcopy(draw.choice(_VALUES))


def _set_field(draw: random.Random, path: str, body: dict[str, Any]) -> None:
    fields = FIELDS.get(path, FIELDS["/v1/messages"]).split()
    body[draw.choice(fields)] = copy.deepcopy(draw.choice(_VALUES))


def _set_other_field(draw: random.Random, path: str, body: dict[str, Any]) -> None:
    """Something that another route, or nobody, knows."""
    fields = draw.choice(list(FIELDS.values())).split()
    body[draw.choice([*fields, "", "\0", "__class__", "x" * 1_000])] = copy.deepcopy(draw.choice(_VALUES))


def _remove(draw: random.Random, path: str, body: dict[str, Any]) -> None:
    places = list(_places(body))
    if places:
        container, key = draw.choice(places)
        del container[key]


def _wrap(draw: random.Random, path: str, body: dict[str, Any]) -> None:
    places = list(_places(body))
    if places:
        container, key = draw.choice(places)
        for _ in range(draw.choice([1, 2, 50, 150, 250])):
            container[key] = [container[key]] if draw.random() < 0.5 else {"x": container[key]}


def _add(draw: random.Random, path: str, body: dict[str, Any]) -> None:
    """An item to a list, or a field to an object, within."""
    inner = [container[key] for container, key in _places(body) if isinstance(container[key], list | dict)]
    if inner:
        container, value = draw.choice(inner), copy.deepcopy(draw.choice(_VALUES))
        if isinstance(container, list):
            container.append(value)
        else:
            names = (
                "type",
                "role",
                "content",
                "name",
                "json",
                "regex",
                "grammar",
                "choice",
                "structural_tag",
                "x",
            )
            container[draw.choice(names)] = value


def _options(draw: random.Random, path: str, body: dict[str, Any]) -> None:
    """A wrong `decar` object."""
    fields = ["route", "scope", "start", "weights", "rule", "sampling", "top_k", "prune", "trace", "x"]
    chosen = draw.sample(fields, draw.choice([1, 2]))
    sensible = [
        "posterior",
        "prior",
        "velocity",
        "logit",
        "draw",
        "output",
        {"code": 1},
        {"code": -1},
        {"x": 1},
    ]
    body["decar"] = {field: copy.deepcopy(draw.choice([*_VALUES, *sensible])) for field in chosen}


_CHANGES = [_replace, _replace, _set_field, _set_field, _set_other_field, _remove, _wrap, _add, _options]


def _damaged(draw: random.Random, text: bytes) -> bytes:
    """Not the JSON that it was."""
    at = draw.randrange(len(text))
    return draw.choice(
        [
            text[:at],
            text[:at] + bytes([draw.randrange(256)]) + text[at:],
            text[:at] + text[at + 1 :],
            b"[" * 3_000,
            b'{"a":' * 3_000,
            b'{"model": ' + b"1" * 5_000 + b"}",
            b"",
            text + text,
            b"[" + text + b"]",
            b"\xef\xbb\xbf" + text,
        ]
    )
