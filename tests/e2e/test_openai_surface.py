"""What OpenAI's API promises, asked of the ensemble by OpenAI's own client and by plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
import xgrammar

from tests.e2e.conftest import MAX_NUM_SEQS
from tests.helpers import COMPLETION_EXTRAS, Answer, Server, answer_of, in_batches, names
from tests.reference import Decoded, Reference, mixture_decode, prompt_texts

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

WEIGHTS = {"code": 0.6, "prose": 0.4}
LOGPROB_TOLERANCE = 1e-3  # as in test_exact
WEIGHT_TOLERANCE = 1e-4
LEAD = 2 * LOGPROB_TOLERANCE
MESSAGES: list[Any] = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "Sort a list."},
]


@pytest.fixture
def client(duo_server: Server) -> openai.OpenAI:
    return duo_server.openai()


@pytest.fixture
def http(duo_server: Server) -> httpx.Client:
    return duo_server.http


def clear_answer(
    reference: Reference, max_tokens: int, accept: Callable[[Decoded], bool] = bool, **options: Any
) -> Decoded:
    """The reference's answer to the first prompt for which it is decided clearly, and acceptable."""
    for texts in in_batches(prompt_texts(24), 6):
        for answer in decode(reference, texts, max_tokens, **options):
            if answer.margin > LEAD and accept(answer):
                return answer
    raise AssertionError("no prompt is decided clearly")


def decode(reference: Reference, texts: Sequence[str], max_tokens: int, **options: Any) -> list[Decoded]:
    """The reference's answers, under fixed weights unless ``options`` say otherwise."""
    prompts = [reference.encode(text) for text in texts]
    return mixture_decode(reference, prompts, max_tokens, **{"weights": WEIGHTS, **options})


def complete(client: openai.OpenAI, model: str, prompt: Any, **options: Any) -> Any:
    """A greedy completion under fixed weights, unless ``options`` say otherwise."""
    extra = {**COMPLETION_EXTRAS, "decar": {"weights": WEIGHTS}, **options.pop("extra_body", {})}
    options = {"temperature": 0, "max_tokens": 16, **options}
    return client.completions.create(model=model, prompt=prompt, extra_body=extra, **options)


def chat_prompt(reference: Reference, messages: list[Any]) -> list[int]:
    return reference.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:")


# ---------------------------------------------------------------------------------------------- models


def test_models_are_the_ensemble_and_each_expert(client: openai.OpenAI, duo: Reference) -> None:
    models = client.models.list().data
    assert names(models) == {"duo", "duo/code", "duo/prose"}
    assert models[0].id == "duo"
    for model in models:
        retrieved = client.models.retrieve(model.id)
        assert retrieved.id == model.id
        assert retrieved.object == "model"
        assert retrieved.model_extra is not None
        assert retrieved.model_extra["max_model_len"] == 512
        assert retrieved.model_extra["root"] == model.id  # a path is for the admin
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(f"{duo.name}/stranger")


def test_the_ensemble_describes_itself(duo_server: Server, duo: Reference) -> None:
    body = duo_server.ensemble()
    assert body["name"] == duo.name
    assert body["defaults"] == {
        "route": "posterior",
        "scope": "full",
        "start": "prior",
        "rule": "velocity",
        "top_k": None,
        "prune": 0.0,
    }
    assert body["routes"] == ["posterior", "prior"]
    assert body["slots"] == {"total": MAX_NUM_SEQS, "in_use": 0}
    assert [expert["name"] for expert in body["experts"]] == list(duo.experts)
    own = {process.pid for process in duo_server.processes()}
    for expert, prior in zip(body["experts"], duo.prior, strict=True):
        assert expert["up"] is True
        assert expert["prior"] == prior
        assert expert["pid"] in own
        assert psutil.Process(expert["pid"]).is_running()
    assert duo_server.health() == 200


def test_only_this_user_can_read_the_plane_or_speak_to_engines(duo_server: Server) -> None:
    assert len(duo_server.shared_memory) == 2
    for path in duo_server.shared_memory:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


# ---------------------------------------------------------------------------------------------- chat


def test_chat(client: openai.OpenAI, duo: Reference) -> None:
    prompt = chat_prompt(duo, MESSAGES)
    [expected] = mixture_decode(duo, [prompt], 16, weights=WEIGHTS)
    assert expected.margin > LEAD, "choose other MESSAGES"
    options: dict[str, Any] = {"model": duo.name, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    extra = {"ignore_eos": True, "decar": {"weights": WEIGHTS, "trace": True}}
    answer = client.chat.completions.create(messages=MESSAGES, max_tokens=16, extra_body=extra, **options)

    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.message.content == duo.decode(expected.tokens)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 16)
    assert answer.usage.total_tokens == len(prompt) + 16
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert [entry.logprob for entry in content] == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)
    assert [entry.token for entry in content] == [duo.tokenizer.decode([token]) for token in expected.tokens]
    for entry, best in zip(content, expected.top, strict=True):
        top = [candidate.logprob for candidate in entry.top_logprobs]
        assert top == pytest.approx(list(best.values()), abs=LOGPROB_TOLERANCE)
    assert choice.model_extra is not None
    assert choice.model_extra["decar"]["active"] == list(duo.experts)
    assert choice.model_extra["decar"]["weights"] == [
        pytest.approx([0.6, 0.4], abs=WEIGHT_TOLERANCE) for _ in range(16)
    ]

    # The same request, written in the API's other ways.
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    again = client.chat.completions.create(
        messages=parts,  # type: ignore[arg-type]
        max_completion_tokens=16,
        stop=openai.omit,
        extra_body={**extra, "no_such_field": 1, "user": None},
        **options,
    )
    assert again.choices[0].message.content == choice.message.content


def test_chat_takes_the_developer_role(client: openai.OpenAI, duo: Reference) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, *MESSAGES[1:]]
    answer = client.chat.completions.create(model=duo.name, messages=messages, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(chat_prompt(duo, messages))


def test_chat_stream_with_usage_and_trace(client: openai.OpenAI, duo: Reference) -> None:
    prompt = chat_prompt(duo, MESSAGES)
    [expected] = mixture_decode(duo, [prompt], 16, route="posterior")
    assert expected.margin > LEAD, "choose other MESSAGES"
    stream = client.chat.completions.create(
        model=duo.name,
        messages=MESSAGES,
        max_tokens=16,
        temperature=0,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "decar": {"route": "posterior", "trace": True}},
    )
    chunks = list(stream)
    *parts, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 16)
    assert all(part.usage is None for part in parts)
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == "length"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == duo.decode(expected.tokens)
    logprobs = [
        entry.logprob
        for part in parts
        if part.choices[0].logprobs
        for entry in part.choices[0].logprobs.content or []
    ]
    assert logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)

    summaries = [(chunk.model_extra or {}).get("decar") for chunk in chunks]
    assert summaries[0] is not None
    assert summaries[0]["experts"] == list(duo.experts)
    assert summaries[0]["leader"] in duo.experts
    assert not any(summaries[1:]), "only the first chunk carries the summary"
    extras = [part.choices[0].model_extra or {} for part in parts]
    traces = [
        extra["decar"] for extra in extras if "decar" in extra
    ]  # the role's chunk has no token, and no trace
    assert all(trace["active"] == list(duo.experts) for trace in traces)
    weights = [row for trace in traces for row in trace["weights"]]
    assert weights == [pytest.approx(row, abs=WEIGHT_TOLERANCE) for row in expected.weights]


def test_responses(client: openai.OpenAI, duo: Reference) -> None:
    messages = [{"role": "user", "content": "Sort a list."}]
    [expected] = mixture_decode(duo, [chat_prompt(duo, messages)], 12, weights=WEIGHTS)
    assert expected.margin > LEAD, "choose another message"
    answer = client.responses.create(
        model=duo.name,
        input="Sort a list.",
        max_output_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True, "decar": {"weights": WEIGHTS}},
    )
    assert answer.output_text == duo.decode(expected.tokens)


# ---------------------------------------------------------------------------------------------- streams


def test_completion_stream_equals_the_whole_answer(client: openai.OpenAI, duo: Reference) -> None:
    expected = clear_answer(duo, 16)
    whole = complete(client, duo.name, expected.prompt, logprobs=2)
    chunks = list(
        complete(
            client,
            duo.name,
            expected.prompt,
            logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"decar": {"weights": WEIGHTS, "trace": True}},
        )
    )
    *parts, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    answers = [answer_of(part.choices[0]) for part in parts]
    assert "".join(answer.text for answer in answers) == whole.choices[0].text == duo.decode(expected.tokens)
    assert [token for answer in answers for token in answer.tokens] == expected.tokens
    for answer in answers:
        assert len(answer.weights) == len(answer.tokens)  # each chunk brings the weights of its own tokens
    streamed = [value for answer in answers for value in answer.logprobs]
    assert streamed == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)


def test_a_stream_is_server_sent_events_as_openai_sends_them(http: httpx.Client, duo: Reference) -> None:
    body = {
        "model": duo.name,
        "messages": MESSAGES,
        "max_tokens": 3,
        "stream": True,
        "decar": None,
        "stop": None,
    }
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert "decar" in events[0]
    assert not any(
        "decar" in choice for event in events for choice in event["choices"]
    )  # no trace was asked for


# ---------------------------------------------------------------------------------------------- choices


def test_four_choices_share_a_seed_and_differ(client: openai.OpenAI, duo: Reference) -> None:
    prompt = duo.encode(prompt_texts(1)[0])

    def sample(seed: int, **options: Any) -> list[list[int]]:
        answer = complete(client, duo.name, prompt, n=4, seed=seed, temperature=1.0, **options)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.completion_tokens == 64
        return [answer_of(choice).tokens for choice in answer.choices]

    first = sample(1234)
    assert len({tuple(tokens) for tokens in first}) == 4
    assert sample(1234) == first
    assert sample(4321) != first
    # A stream of the same choices, which arrive interleaved.
    chunks = complete(client, duo.name, prompt, n=4, seed=1234, temperature=1.0, stream=True)
    streamed: dict[int, list[int]] = {index: [] for index in range(4)}
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += answer_of(choice).tokens
    assert [streamed[index] for index in range(4)] == first


def test_four_choices_with_nothing_to_choose_are_equal(client: openai.OpenAI, duo: Reference) -> None:
    expected = clear_answer(duo, 16)
    extra = {"top_k": 1, "decar": {"weights": WEIGHTS, "trace": True}}
    answer = complete(client, duo.name, expected.prompt, n=4, temperature=1.0, extra_body=extra)
    assert len(answer.choices) == 4
    for choice in map(answer_of, answer.choices):
        assert choice.tokens == expected.tokens
        assert len(choice.weights) == 16


def test_sampling_acts_on_the_mixture(client: openai.OpenAI, duo: Reference) -> None:
    """At a high temperature among the three best, each token is one of the mixture's three best, and not always
    the best."""
    expected = clear_answer(duo, 1, lambda answer: _gap(answer, 2, 3) > LEAD)
    best = list(expected.top[0])[:3]
    extra = {"top_k": 3}
    answer = complete(
        client, duo.name, expected.prompt, n=24, max_tokens=1, temperature=2.0, seed=5, extra_body=extra
    )
    assert {answer_of(choice).tokens[0] for choice in answer.choices} == set(best)
    extra = {"top_k": 1}
    answer = complete(client, duo.name, expected.prompt, max_tokens=1, temperature=2.0, extra_body=extra)
    assert answer_of(answer.choices[0]).tokens == expected.tokens


def _gap(answer: Decoded, better: int, worse: int) -> float:
    values = list(answer.top[0].values())
    return values[better] - values[worse]


def test_several_prompts_in_one_request(client: openai.OpenAI, duo: Reference) -> None:
    texts = prompt_texts(3)
    prompts = [duo.encode(text) for text in texts]
    extra = {"top_k": 1, "decar": {"route": "posterior", "trace": True}}
    as_text, as_ids = (
        complete(client, duo.name, given, n=2, temperature=1.0, logprobs=1, extra_body=extra)
        for given in (texts, prompts)
    )
    expected = mixture_decode(duo, prompts, 16)
    assert [choice.index for choice in as_ids.choices] == list(range(6))
    assert as_ids.usage.prompt_tokens == as_text.usage.prompt_tokens == sum(map(len, prompts))
    for text_choice, id_choice in zip(as_text.choices, as_ids.choices, strict=True):
        of_text, of_ids = answer_of(text_choice), answer_of(id_choice)
        one = expected[id_choice.index // 2]
        assert one.margin > LEAD, "choose other prompts"
        assert of_text.tokens == of_ids.tokens == one.tokens
        assert of_ids.weights == [pytest.approx(row, abs=WEIGHT_TOLERANCE) for row in one.weights]


def test_a_prompt_of_one_token_leaves_the_prior(client: openai.OpenAI, duo: Reference) -> None:
    extra = {"decar": {"route": "posterior", "trace": True}}
    answer = answer_of(complete(client, duo.name, [7], extra_body=extra).choices[0])
    assert answer.weights[0] == pytest.approx(list(duo.prior), abs=1e-6)
    assert answer.weights[-1] != pytest.approx(list(duo.prior), abs=1e-3)


# ---------------------------------------------------------------------------------------------- the end


def test_stop_strings(client: openai.OpenAI, duo: Reference) -> None:
    expected = clear_answer(duo, 32)
    text = duo.decode(expected.tokens)
    stop = text[len(text) // 2 :][:3]
    others = ["\0never", "\0nor this", "\0nor that"]  # with the one that counts, as many as OpenAI allows
    assert not any(other in text for other in others)
    options: dict[str, Any] = {"max_tokens": 32, "stop": [*others, stop]}
    answer = complete(client, duo.name, expected.prompt, **options).choices[0]
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.model_extra["stop_reason"] == stop

    streamed = complete(client, duo.name, expected.prompt, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.text
    extra = {"include_stop_str_in_output": True}
    answer = complete(client, duo.name, expected.prompt, extra_body=extra, **options).choices[0]
    assert answer.text == text[: text.index(stop)] + stop


def test_the_end_of_sequence_token_ends_an_answer(client: openai.OpenAI, duo: Reference) -> None:
    eos = duo.tokenizer.eos_token_id
    bias = {eos: 2.5}
    expected = clear_answer(
        duo,
        32,
        lambda answer: answer.finished and 3 < len(answer.tokens) < 30,
        eos_token_id=eos,
        logit_bias=bias,
    )
    options: dict[str, Any] = {"max_tokens": 32, "logit_bias": {str(k): v for k, v in bias.items()}}
    extra = {"ignore_eos": False}
    answer = complete(client, duo.name, expected.prompt, extra_body=extra, **options)
    assert answer_of(answer.choices[0]).tokens == expected.tokens
    assert answer.choices[0].text == duo.decode(expected.tokens)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(expected.tokens)


# ------------------------------------------------------------------------------- what acts after mixing


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.4, "frequency_penalty": -0.3, "repetition_penalty": 1.1},
    ],
    ids=["presence", "frequency", "repetition", "all"],
)
@pytest.mark.parametrize("route", ["weights", "posterior"])
def test_penalties(client: openai.OpenAI, duo: Reference, options: dict[str, float], route: str) -> None:
    plain: dict[str, Any] = {"weights": WEIGHTS} if route == "weights" else {"weights": None}

    def shows(answer: Decoded) -> bool:
        return answer.tokens != mixture_decode(duo, [answer.prompt], 32, **plain)[0].tokens

    expected = clear_answer(duo, 32, shows, **plain, **options)
    decar = {"weights": WEIGHTS} if route == "weights" else {"route": "posterior"}
    answer = complete(
        client, duo.name, expected.prompt, max_tokens=32, logprobs=5, extra_body={**options, "decar": decar}
    )
    _assert_tokens_and_logprobs(answer_of(answer.choices[0]), expected)


def test_logit_bias(client: openai.OpenAI, duo: Reference) -> None:
    plain = clear_answer(duo, 16)
    bias = {plain.tokens[0]: -100.0, plain.tokens[3]: 0.5, 300: 2.0}
    expected = clear_answer(duo, 16, lambda answer: answer.prompt == plain.prompt, logit_bias=bias)
    assert expected.tokens[0] != plain.tokens[0]
    answer = complete(
        client,
        duo.name,
        expected.prompt,
        logprobs=5,
        logit_bias={str(token): value for token, value in bias.items()},
    )
    _assert_tokens_and_logprobs(answer_of(answer.choices[0]), expected)


def _assert_tokens_and_logprobs(answer: Answer, expected: Decoded) -> None:
    """Logprobs are the mixture's own, before bias and penalties, as vLLM gives them by default."""
    assert answer.tokens == expected.tokens
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_TOLERANCE)


SCHEMA = {
    "type": "object",
    "properties": {
        "language": {"type": "string", "enum": ["python", "prolog", "perl", "pascal"]},
        "typed": {"type": "boolean"},
        "level": {"type": "string", "pattern": "^[a-f]{4}$"},
    },
    "required": ["language", "typed", "level"],
    "additionalProperties": False,
}


def grammar_mask(reference: Reference) -> Callable[[list[int]], torch.Tensor]:
    """The tokens that SCHEMA allows, by the grammar library's own matcher."""
    info = xgrammar.TokenizerInfo.from_huggingface(reference.tokenizer, vocab_size=reference.vocab_size)
    compiler = xgrammar.GrammarCompiler(info)
    grammar = compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False, separators=(",", ":"))
    bitmask = xgrammar.allocate_token_bitmask(1, reference.vocab_size)

    def allowed(tokens: list[int]) -> torch.Tensor:
        matcher = xgrammar.GrammarMatcher(grammar)
        for token in tokens:
            assert matcher.accept_token(token)
        matcher.fill_next_token_bitmask(bitmask)
        bits = (bitmask[0, :, None] >> torch.arange(32)) & 1
        return bits.reshape(-1)[: reference.vocab_size].bool()

    return allowed


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_json_schema(client: openai.OpenAI, duo: Reference, api: str) -> None:
    prompt = chat_prompt(duo, MESSAGES)
    [expected] = mixture_decode(
        duo, [prompt], 64, weights=WEIGHTS, eos_token_id=duo.tokenizer.eos_token_id, allowed=grammar_mask(duo)
    )
    assert expected.finished
    assert expected.margin > LEAD, "choose another SCHEMA"
    response_format: Any = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    }
    if api == "chat":
        answer = client.chat.completions.create(
            model=duo.name,
            messages=MESSAGES,
            max_tokens=64,
            temperature=0,
            response_format=response_format,
            extra_body={"decar": {"weights": WEIGHTS}},
        )
        text, finish_reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    else:
        extra = {"response_format": response_format, "ignore_eos": False}
        choice = complete(client, duo.name, prompt, max_tokens=64, extra_body=extra).choices[0]
        text, finish_reason = choice.text, choice.finish_reason
    assert text == duo.decode(expected.tokens)
    assert finish_reason == "stop"
    assert text is not None
    assert set(json.loads(text)) == set(SCHEMA["properties"])


def test_json_schema_holds_when_sampled(client: openai.OpenAI, duo: Reference) -> None:
    answer = client.chat.completions.create(
        model=duo.name,
        messages=MESSAGES,
        max_tokens=64,
        temperature=1.5,
        n=8,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
    )
    values = [json.loads(choice.message.content or "") for choice in answer.choices]
    for value in values:
        assert value["language"] in SCHEMA["properties"]["language"]["enum"]  # type: ignore[index]
        assert isinstance(value["typed"], bool)
        assert len(value["level"]) == 4
    assert len({json.dumps(value) for value in values}) > 1


# ---------------------------------------------------------------------------------------------- echo


def test_echo(client: openai.OpenAI, duo: Reference) -> None:
    text = prompt_texts(1)[0]
    [expected] = mixture_decode(duo, [duo.encode(text)], 8, weights=WEIGHTS)
    assert expected.margin > LEAD
    extra = {"return_token_ids": False}  # with the ids, vLLM leaves the prompt's text out
    answer = complete(client, duo.name, text, echo=True, max_tokens=8, extra_body=extra).choices[0]
    assert answer.text == text + duo.decode(expected.tokens)


def test_an_expert_scores_a_prompt(client: openai.OpenAI, duo: Reference) -> None:
    """As evaluation harnesses do: one entry per prompt token, and the first has nothing to be predicted from."""
    prompt = duo.encode(prompt_texts(12)[11])
    answer = complete(
        client, "duo/code", prompt, echo=True, logprobs=1, max_tokens=1, extra_body={"decar": None}
    ).choices[0]
    scores = answer.logprobs.token_logprobs
    assert len(scores) == len(prompt) + 1
    assert scores[0] is None
    alone = duo.alone("code")
    expected = [_likelihood(alone, prompt, t) for t in range(1, len(prompt))]
    assert scores[1:-1] == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def _likelihood(reference: Reference, tokens: list[int], t: int) -> float:
    """log p(tokens[t] | tokens[:t]) of one expert, by a decode that may only choose it."""

    def only(_: list[int]) -> torch.Tensor:
        mask = torch.zeros(reference.vocab_size, dtype=torch.bool)
        mask[tokens[t]] = True
        return mask

    return mixture_decode(reference, [tokens[:t]], 1, allowed=only)[0].logprobs[0]
