"""What one engine is told about its place in the ensemble. Knows no vLLM, so that both sides can import it."""

from __future__ import annotations

import functools
import os
import select
import threading
from dataclasses import dataclass, field
from typing import Any, NoReturn

from decar.router.manifest import Rule
from decar.server.protocol.plane import PlaneSpec
from decar.server.protocol.runtime import become, new_name, remove_all_of

REQUEST_KEY = "decar"
"""Key of a request's part in the lockstep, in ``SamplingParams.extra_args``."""
ROWS_KEY = "decar_rows"
"""The same of a request for rows of its prompt: see `PromptRows`."""
_ENVIRONMENT = "environment"
SPOKEN_KEY = "decar_spoken"
"""The same of a request that goes on where another one was broken off: see `Spoken`."""


@dataclass(frozen=True)
class LockstepConfig:
    """Given to an engine's worker and scheduler as vLLM's ``additional_config``.

    Attributes:
        expert: this engine's index, 0 to K - 1.
        plane: what to attach to.
        cpus: cores this engine's threads are bound to; empty leaves them alone.
        devices: CUDA_VISIBLE_DEVICES of its process, its own GPU first; empty on CPU.
        gateway_pid: the engine ends when this process does.
        engine: a name that the engine's process has made, where its ranks have processes of their own; else "".
        own_environment: its process has an environment of its own, and not the gateway's.
        mps_pipes: CUDA_MPS_PIPE_DIRECTORY of its process; "" leaves it alone.
    """

    expert: int
    plane: PlaneSpec
    cpus: tuple[int, ...]
    devices: str
    gateway_pid: int
    engine: str = field(default="", kw_only=True)
    own_environment: bool = field(default=False, kw_only=True)
    mps_pipes: str = field(default="", kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, _ENVIRONMENT: None if self.own_environment else dict(os.environ)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickling is the first that a new engine process does: from here on it ends with its gateway,
        and CUDA, which has not started, will find the engine's own GPU first. A process that a fork server has made,
        with which it ends too, has that one's environment until now."""
        environment = state.pop(_ENVIRONMENT)
        self.__dict__.update(state)
        if os.getpid() != self.gateway_pid:
            if environment is not None:
                become(environment)
            if os.getppid() != self.gateway_pid:
                end_with(os.getppid(), new_name())
            if self.devices:
                os.environ["CUDA_VISIBLE_DEVICES"] = self.devices
            if self.mps_pipes:
                os.environ["CUDA_MPS_PIPE_DIRECTORY"] = self.mps_pipes
            end_with(self.gateway_pid, self.plane.name)

    def compute_hash(self) -> str:
        """vLLM keys its compile cache with this: nothing here changes a compiled model."""
        return "decar"


@dataclass(frozen=True)
class Draw:
    """How a token is chosen where nothing but the mixture's probabilities matters: see `decar.kernels.decide`.

    Attributes:
        temperature: 0 is greedy.
        seed: of the noise, from 0 to 2^63 - 1; with a position it gives the same noise in every batch and engine.
    """

    temperature: float
    seed: int


@dataclass(kw_only=True)
class Member:
    """One request's part in the lockstep, as an engine sees it.

    Attributes:
        slot, generation: its place in the plane and which tenant of that place it is.
        leader: index of the expert that mixes and samples, now.
        active: indices of all experts that take part, the leader included.
        rule: how rows are mixed.
        log_weights: float64 [K], -inf for experts that do not take part; kept up to date by the leader.
        posterior: whether each sampled token updates the weights.
        prune: weight that the leader may still drop, see `decar.router.prune`.
        scored: of each expert, the leading tokens of the prompt whose log-likelihood the gateway knows, and that; then
            the experts score the rest as they compute it, and ``log_weights`` are those before the prompt. None: after.
        top_k, uniform: what the leader makes of the weights after the prompt, see `decar.router.restricted`.
        led_before: (position, expert) for each earlier leader, and the position from which on another one leads.
        alone_from: position from which the leader is the only one left.
        may_release: whether an expert may have to leave before the request ends, and its leader to hand over. It stays
            what it is when the request begins: also with nothing left to prune, there is what has been decided.
    """

    slot: int
    generation: int
    leader: int
    active: tuple[int, ...]
    rule: Rule
    log_weights: list[float] = field(repr=False)
    posterior: bool
    prune: float = 0.0
    scored: list[tuple[int, float]] | None = None
    top_k: int | None = None
    uniform: float | None = None
    led_before: list[tuple[int, int]] = field(default_factory=list)
    alone_from: int | None = None
    may_release: bool = field(init=False)

    def __post_init__(self) -> None:
        self.active = tuple(self.active)  # which comes as a list
        self.may_release = self.prune > 0 or self.top_k is not None or self.uniform is not None

    @property
    def followers(self) -> tuple[int, ...]:
        return tuple(expert for expert in self.active if expert != self.leader)

    def leader_at(self, position: int) -> int:
        """Who decides ``position``."""
        return next((expert for end, expert in self.led_before if position < end), self.leader)

    def to_wire(self) -> dict[str, Any]:
        """As it begins: what leaders decide later is read from the plane, by each reader for itself."""
        known_later = ("led_before", "alone_from", "may_release")
        return {name: value for name, value in vars(self).items() if name not in known_later}

    @classmethod
    def of(cls, sampling_params: Any) -> Member | None:
        """The member in a request's sampling parameters; None for a request that runs alone."""
        wire = _wire(sampling_params, REQUEST_KEY)
        return cls(**wire) if wire else None


@dataclass(frozen=True)
class PromptRows:
    """A request for what an expert says at its prompt's positions, as the engine sees it.

    Attributes:
        file: under /dev/shm, float32 [end - start, V]; gets the log-probabilities that follow positions
            ``start`` to ``end - 1``.
    """

    file: str
    start: int
    end: int

    def to_wire(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def of(cls, sampling_params: Any) -> PromptRows | None:
        """What a request's sampling parameters ask for; None for every other request."""
        wire = _wire(sampling_params, ROWS_KEY)
        return cls(**wire) if wire else None


@dataclass(frozen=True)
class Spoken:
    """What has been said of an answer by engines that took part before, where this one begins.

    Attributes:
        tokens: of the answer so far, [T]: to this engine they are what it has sampled itself, as after a preemption.
        ticket: whose answer, in the gateway's process.
    """

    tokens: list[int]
    ticket: int

    def to_wire(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def of(cls, sampling_params: Any) -> Spoken | None:
        """What a request's sampling parameters say; None for one that begins at the beginning."""
        wire = _wire(sampling_params, SPOKEN_KEY)
        return cls(**wire) if wire else None


def spoken_tokens(sampling_params: Any) -> list[int]:
    """The tokens [T] that a request begins after; most often, none."""
    spoken = Spoken.of(sampling_params)
    return [] if spoken is None else spoken.tokens


def _wire(sampling_params: Any, key: str) -> dict[str, Any] | None:
    extra = getattr(sampling_params, "extra_args", None)
    return extra.get(key) if extra else None


@functools.cache  # one watch per process
def end_with(pid: int, name: str) -> None:
    """End this process when process ``pid`` dies, however it dies, and leave nothing behind that either has made.

    A signal on the parent's death would follow the parent's *thread*, and engines are started from threads.

    Args:
        name: of something that the other has made, see `remove_all_of`.
    """

    def end() -> NoReturn:
        remove_all_of(name)
        remove_all_of(new_name())
        os._exit(1)

    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        end()

    def watch() -> None:
        select.select([process], [], [])
        end()

    threading.Thread(target=watch, name=f"watch-{pid}", daemon=True).start()
