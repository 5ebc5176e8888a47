"""Which clients are tried, in which environment each is installed, and which check it has to pass. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["python", "npm", "own"]


@dataclass(frozen=True)
class Environment:
    """Where clients are installed that do not conflict.

    Attributes:
        kind: a virtual environment, an npm project, or the one that runs this, which has them already.
        packages: by name.
        needs_torch: have the torch that runs this installed first: pip would choose one for CUDA.
    """

    kind: Kind
    packages: tuple[str, ...] = ()
    needs_torch: bool = False


@dataclass(frozen=True)
class Client:
    """One line of the table.

    Attributes:
        name: as its makers call it.
        package: whose version the table gives.
        environment: one of `ENVIRONMENTS`.
        check: a file in tests/compat/checks.
        timeout_s: for the check.
    """

    name: str
    package: str
    environment: str
    check: str
    timeout_s: float = 300


ENVIRONMENTS = {
    "own": Environment("own"),
    "js": Environment("npm", ("openai",)),
    "sdks": Environment("python", ("openai", "anthropic")),
    "frameworks": Environment(
        "python",
        (
            *("langchain-openai", "langchain-tests", "instructor", "pydantic-ai-slim[anthropic,openai]"),
            *("llm", "outlines[openai]"),
            "anthropic<2",  # pydantic-ai 2.38 takes 2.x, and then fails before it asks: a class it calls is none there
        ),
    ),
    "litellm": Environment("python", ("litellm[proxy]",)),
    "guidellm": Environment("python", ("guidellm",), needs_torch=True),
    "aiperf": Environment("python", ("aiperf",)),
}

CLIENTS = (
    Client("openai (Python)", "openai", "sdks", "openai_python.py"),
    Client("openai (JavaScript)", "openai", "js", "openai_js.mjs"),
    Client("anthropic", "anthropic", "sdks", "anthropic_python.py"),
    Client("LangChain's standard tests", "langchain-openai", "frameworks", "langchain_check.py", 900),
    Client("litellm (package)", "litellm", "litellm", "litellm_sdk.py", 600),
    Client("litellm (proxy)", "litellm", "litellm", "litellm_proxy.py", 600),
    Client("instructor", "instructor", "frameworks", "instructor_check.py"),
    Client("pydantic-ai", "pydantic-ai-slim", "frameworks", "pydantic_ai_check.py"),
    Client("outlines", "outlines", "frameworks", "outlines_check.py"),
    Client("llm", "llm", "frameworks", "llm_check.py"),
    Client("guidellm", "guidellm", "guidellm", "guidellm_check.py", 600),
    Client("aiperf", "aiperf", "aiperf", "aiperf_check.py", 600),
    Client("schemathesis", "schemathesis", "own", "schemathesis_check.py", 900),
    Client("vllm bench serve", "vllm", "own", "vllm_bench.py", 900),
    Client("lm-evaluation-harness", "lm-eval", "own", "lm_eval_check.py", 900),
)
