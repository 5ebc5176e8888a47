"""Flags that an ensemble cannot have are refused, by the names that the tested vLLM gives them."""

from __future__ import annotations

import json
from argparse import Namespace
from copy import copy

import pytest
import vllm
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from decar.router.errors import StartError
from decar.server.vllm_adapter.app import api_keys
from decar.server.vllm_adapter.arguments import RESERVED_FLAGS, parse_flags, refuse_reserved

RESERVED = [flag for flags in RESERVED_FLAGS.values() for flag in flags]


@pytest.fixture(scope="module")
def defaults() -> Namespace:
    return make_arg_parser(FlexibleArgumentParser()).parse_args([])


@pytest.mark.skipif(not vllm.__version__.startswith("0.32"), reason="flags are reserved by the names of 0.32")
def test_every_reserved_flag_exists(defaults: Namespace) -> None:
    assert len(RESERVED) == len(set(RESERVED))
    assert not [flag for flag in RESERVED if not hasattr(defaults, flag)]


@pytest.mark.parametrize("flag", RESERVED)
def test_every_reserved_flag_is_refused(defaults: Namespace, flag: str) -> None:
    args = copy(defaults)
    refuse_reserved(args, defaults)
    setattr(args, flag, "something else")
    with pytest.raises(StartError, match=f"^--{flag.replace('_', '-')} cannot be passed: .*leave it out$"):
        refuse_reserved(args, defaults)


@pytest.mark.parametrize(
    "flags",
    [
        ["--watermark-config", '{"scheme": "kgw"}'],
        ["--kv-sharing-fast-prefill"],
        ["--kv-offloading-size", "4"],
        ["--enable-lora"],
        ["--enable-trace-replay"],
        ["--enable-return-routed-experts"],
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
        ["--decode-context-parallel-size", "2"],
        ["--runner", "pooling"],
        ["--grpc"],
        ["--headless"],
    ],
    ids=lambda flags: flags[0],
)
def test_as_a_user_writes_them(flags: list[str]) -> None:
    with pytest.raises(StartError, match=f"^{flags[0]} cannot be passed"):
        parse_flags(flags, "directory", ["demo"])


def test_what_an_ensemble_can_have_is_parsed() -> None:
    args = parse_flags(
        ["--port", "1234", "--dtype", "float32", "--max-num-seqs", "8"], "directory", ["demo", "demo/a"]
    )
    assert (args.port, args.dtype, args.max_num_seqs) == (1234, "float32", 8)
    assert (args.host, args.model, args.served_model_name) == ("127.0.0.1", "directory", ["demo", "demo/a"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["some/model"], "ensemble directory"), (["--logprobs-mode", "raw_logits"], "--logprobs-mode")],
    ids=str,
)
def test_other_refusals(flags: list[str], says: str) -> None:
    with pytest.raises(StartError, match=says):
        parse_flags(flags, "directory", ["demo"])


ORIGINS = '["https://a.page", "http://localhost:3000", "http://[::1]:80", "chrome-extension://abc"]'


@pytest.mark.parametrize("origins", [None, '["*"]', ORIGINS, "[]"])
def test_pages_of_other_origins_may_ask_where_they_are_named(origins: str | None) -> None:
    flags = [] if origins is None else ["--allowed-origins", origins]
    args = parse_flags(flags, "directory", ["demo"])
    assert args.allowed_origins == ([] if origins is None else json.loads(origins))


@pytest.mark.parametrize(
    "origin",
    [
        "https://a.page/",
        "https://a.page/path",
        "a.page",
        "HTTPS://a.page",
        "null",
        "",
        "https://*.page",
        "https://a b",
    ],
)
def test_what_no_browser_calls_itself_is_refused(origin: str) -> None:
    with pytest.raises(StartError, match="no browser calls itself"):
        parse_flags(["--allowed-origins", json.dumps([origin])], "directory", ["demo"])


@pytest.mark.parametrize("origins", ['"https://a.page"', "3", "{}", "null", "[3]"])
def test_origins_are_a_list(origins: str) -> None:
    """Of a text, every part would be an origin that may ask."""
    with pytest.raises(StartError, match="JSON list"):
        parse_flags(["--allowed-origins", origins], "directory", ["demo"])


def test_not_every_page_acts_for_whoever_looks_at_it() -> None:
    named = ["--allow-credentials", "--allowed-origins"]
    assert parse_flags([*named, '["https://a.page"]'], "directory", ["demo"]).allow_credentials
    with pytest.raises(StartError, match="name the origins"):
        parse_flags([*named, '["*"]'], "directory", ["demo"])


def test_the_admins_key_is_one_of_the_keys_where_there_are_any() -> None:
    args = Namespace(api_key=["user"])
    assert api_keys(args, "admin") == args.api_key == ["user", "admin"]
    assert api_keys(Namespace(api_key=["user"]), None) == ["user"]
    assert api_keys(Namespace(api_key=None), "admin") == []


def test_headers_are_bounded_closer_than_vllm_would() -> None:
    assert parse_flags([], "directory", ["demo"]).h11_max_incomplete_event_size == 2**16
    flags = ["--h11-max-incomplete-event-size", "1000"]
    assert parse_flags(flags, "directory", ["demo"]).h11_max_incomplete_event_size == 1000
