"""What the measurements of one run share: an ensemble, the servers that are compared, and whose turn it is.

Knows servers by their commands and HTTP. All of them are up throughout, and take turns: a machine that slows down
slows all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import Progress

from decar.benchmarks.load import Load, Measured, Prompts, Target, measure, together
from decar.benchmarks.texts import Texts
from decar.clients.child import Server, free_port, launched


@dataclass
class Bench:
    """Everything that one run shares.

    Attributes:
        flags: vLLM's, of every server.
        goodput: promises in ms that goodput counts.
        temperature: of all requests.
        texts: where prompts come from; None: random token ids.
        runs: what was measured so far.
    """

    directory: Path
    dtype: str
    flags: list[str]
    goodput: list[str]
    logs: Path
    progress: Progress
    temperature: float = 0.0
    texts: Texts | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    picked: int = 0  # how often prompts were picked

    def __post_init__(self) -> None:
        manifest = json.loads((self.directory / "ensemble.json").read_text())
        self.name: str = manifest["name"]
        self.experts: dict[str, Path] = {e["name"]: self.directory / e["path"] for e in manifest["experts"]}
        self.priors: list[float] = [e["prior"] for e in manifest["experts"]]
        self.first = next(iter(self.experts))
        self.cores = sorted(os.sched_getaffinity(0))
        self.on_gpu = torch.cuda.is_available()

    def target(self, server: Server, model: str, **extra: Any) -> Target:
        """Requests for ``model`` of ``server`` that say ``extra`` besides."""
        body = {"temperature": self.temperature, **extra}
        return Target(server.base_url, model, self.experts[self.first], body)

    def new_prompts(self, load: Load) -> Prompts:
        """For every system others: what a server has seen before costs it less."""
        self.picked += 1
        if self.texts is None:
            return Prompts(self.picked)
        file = self.logs / f"prompts-{self.picked}.jsonl"
        return Prompts(self.picked, self.texts.write(file, load.requests))

    def measured(self, targets: list[Target], load: Load, prompts: Prompts | None = None) -> Measured:
        """Put ``load`` on each of ``targets`` at the same time, with new prompts where none are given.

        Raises:
            LoadFailed: not every request came back whole.
        """
        prompts = prompts or self.new_prompts(load)
        return together(measure(targets, load, self.goodput, self.logs / "client.log", prompts))

    def keep(self, system: str, load: Load, repeat: int, measured: Measured) -> None:
        self.runs.append({"system": system, "load": asdict(load), "repeat": repeat, **measured})

    def random_prompts(self, count: int, length: int) -> list[list[int]]:
        """Random token ids that every expert knows."""
        vocabulary = min(
            json.loads((path / "config.json").read_text())["vocab_size"] for path in self.experts.values()
        )
        generator = torch.Generator().manual_seed(0)
        ids: list[list[int]] = torch.randint(2, vocabulary, (count, length), generator=generator).tolist()
        return ids

    @contextlib.contextmanager
    def servers(self, count: int) -> Iterator[tuple[list[tuple[Server, str]], Server]]:
        """The first ``count`` experts' plain vLLM servers, each on its share of the cores, with their model ids; and
        the ensemble's. They start side by side."""
        share = max(len(self.cores) // len(self.experts), 1)
        flags = self.all_flags()
        with contextlib.ExitStack() as stack:

            def launch(name: str, command: list[str], cores: list[int]) -> Callable[[], Server]:
                log = self.logs / f"{name}.log"
                cores = [] if self.on_gpu else cores
                return stack.enter_context(launched([*command, *flags], free_port(), log, cores=cores))

            plain = []
            for i, name in enumerate(list(self.experts)[:count]):
                dealt = self.cores[i * share % len(self.cores) :][:share]
                plain.append((launch(name, self._plain(name), dealt), name))
            served = [sys.executable, "-m", "decar.server", "serve", str(self.directory)]
            served += ["--log-file", str(self.logs / "ensemble.log")]
            ensemble = launch("ensemble", served, self.cores)
            yield [(started(), name) for started, name in plain], ensemble()

    @contextlib.contextmanager
    def plain(self) -> Iterator[tuple[Server, str]]:
        """The first expert's plain vLLM server by itself, on its share of the cores, with its model id."""
        share = max(len(self.cores) // len(self.experts), 1)
        cores = [] if self.on_gpu else self.cores[-share:]
        command, log = self._plain(self.first), self.logs / f"{self.first}.log"
        with launched([*command, *self.all_flags()], free_port(), log, cores=cores) as started:
            yield started(), self.first

    def _plain(self, name: str) -> list[str]:
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(self.experts[name]),
        ]
        return [*command, "--served-model-name", name, "--max-logprobs", "-1"]

    def all_flags(self) -> list[str]:
        """The same KV cache for every engine: otherwise a plain server would take what K engines share."""
        kv = [] if "--kv-cache-memory-bytes" in self.flags else ["--kv-cache-memory-bytes", str(1 << 29)]
        return [*kv, *self.flags]


def limits(load: Load, at_once: int) -> list[str]:
    """vLLM flags that leave room for ``load`` and for prompts that are cut a little differently by their server.

    A quarter more: vLLM also refuses a prompt by its characters, and does not count the spaces between words.
    """
    room = load.input_tokens + load.output_tokens + max(load.input_tokens // 4, 32)
    return ["--max-model-len", str(room), "--max-num-seqs", str(at_once)]


@contextlib.contextmanager
def turn_of(targets: Iterable[Target], everyone: Iterable[Server]) -> Iterator[None]:
    """Stop the servers of ``everyone`` that ``targets`` do not need, as Ctrl-Z would, until the block ends.

    An idle engine still wakes a thousand times a second.
    """
    busy = {target.base_url for target in targets}
    roots = [psutil.Process(server.pid) for server in everyone if server.base_url not in busy]
    family = [process for root in roots for process in (root, *root.children(recursive=True))]
    try:
        for process in family:
            process.suspend()
        yield
    finally:
        for process in family:
            process.resume()
