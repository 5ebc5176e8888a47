"""A stream that several engines speak, over vLLM's own output processors; sockets deliver in any order."""

import math
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from decar.server.protocol.cores import GatewayThread
from decar.server.protocol.lockstep import Lockstep
from decar.server.protocol.member import SPOKEN_KEY, Member, Spoken
from decar.server.protocol.plane import Plane
from decar.server.protocol.transport import HostTransport
from decar.server.vllm_adapter.relay import LATE_S, Relay

OLD, NEW = 0, 1


class Ensemble:
    """Two engines' output processors, one request, and the plane that says who leads."""

    def __init__(self, kind: RequestOutputKind):
        self.plane = Plane.create(experts=2, slots=1, vocab_size=4, positions=16)
        self.plane.unlink()
        self.processors = [OutputProcessor(None, log_stats=False) for _ in range(2)]
        engines = [
            SimpleNamespace(llm=SimpleNamespace(output_processor=processor)) for processor in self.processors
        ]
        self.thread = GatewayThread([])
        self.relay = Relay(engines, self.plane.blocks, self.thread)
        self.member = self.new_member()
        self.relayed = self.relay.begin(OLD, self.member, lambda heard: heard + 1)
        params = SamplingParams(detokenize=False, output_kind=kind)
        self.queues = []
        self.kind = kind
        for expert in range(2):
            self.queues.append(self.add(expert, f"r-{expert}", params))
            self.relay.follow(self.relayed, expert, f"r-{expert}")

    def add(self, expert: int, request_id: str, params: SamplingParams) -> RequestOutputCollector:
        """Give a request to an engine, as `AsyncLLM` does."""
        queue = RequestOutputCollector(self.kind, request_id)
        fields: dict[str, Any] = dict.fromkeys(EngineCoreRequest.__struct_fields__[:9])
        fields |= {"request_id": request_id, "prompt_token_ids": [1], "sampling_params": params}
        request = EngineCoreRequest(**{**fields, "arrival_time": 0.0}, external_req_id="r")
        self.processors[expert].add_request(request, None, queue=queue)
        return queue

    @staticmethod
    def new_member() -> Member:
        return Member(
            slot=0,
            generation=1,
            leader=OLD,
            active=(0, 1),
            rule="velocity",
            log_weights=[-0.1, -2.4],
            posterior=True,
            prune=0.5,
        )

    def says(
        self, expert: int, tokens: list[int], finish: FinishReason | None = None, seconds_ago: float = 0.0
    ) -> None:
        output = EngineCoreOutput(f"r-{expert}", tokens, finish_reason=finish)
        self.processors[expert].process_outputs([output], time.monotonic() - seconds_ago)

    def hand_over(self, position: int, log_weights: tuple[float, float] = (-5.0, -0.0067)) -> None:
        """What the old leader writes when it releases itself before ``position``, where these are the weights."""
        leader = Lockstep(self.plane, OLD, HostTransport(self.plane, OLD))
        member = self.new_member()
        leader.join(member)
        leader.log_weights[member.slot] = log_weights
        leader._release(member.slot, position)

    def heard(self) -> list[int]:
        """Tokens the user has got so far."""
        output = self.queues[OLD].get_nowait()
        return list(output.outputs[0].token_ids) if output else []


@pytest.fixture(params=[RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY], ids=["stream", "final"])
def ensemble(request: pytest.FixtureRequest) -> Ensemble:
    return Ensemble(request.param)


@pytest.mark.parametrize("early", [False, True])
def test_the_user_hears_every_token_once_and_in_order(ensemble: Ensemble, early: bool) -> None:
    ensemble.says(OLD, [10])
    ensemble.hand_over(2)
    if early:  # the next leader's socket was faster
        ensemble.says(NEW, [12])
        ensemble.says(NEW, [13])
        ensemble.says(OLD, [11])
    else:
        ensemble.says(OLD, [11])
        ensemble.says(NEW, [12])
        ensemble.says(NEW, [13])
    ensemble.says(NEW, [14], FinishReason.LENGTH)
    assert ensemble.heard() == [10, 11, 12, 13, 14]
    assert ensemble.relayed.speaker == NEW
    assert "r-1" not in ensemble.processors[NEW].request_states


def test_tokens_that_come_early_are_not_there_yet(ensemble: Ensemble) -> None:
    """The weights of those before them may not have been brought here, nor who led them."""
    counted: list[int] = []
    ensemble.relayed.on_tokens = lambda heard: counted.append(heard) or heard + 1
    ensemble.hand_over(2)
    ensemble.says(OLD, [10])
    ensemble.says(NEW, [12])
    assert counted == [1]
    ensemble.says(OLD, [11])
    assert counted == [1, 2, 3]


def test_a_budget_that_is_used_up_does_not_keep_the_next_leader_from_being_heard(ensemble: Ensemble) -> None:
    half = math.log(0.5)
    ensemble.hand_over(1, (half, half))
    assert ensemble.plane.fields["membership_weights"][OLD, 0, -1] == 0.0
    ensemble.says(NEW, [11])
    ensemble.says(OLD, [10])
    ensemble.says(NEW, [12], FinishReason.LENGTH)
    assert ensemble.heard() == [10, 11, 12]


def test_the_end_may_come_early_too(ensemble: Ensemble) -> None:
    ensemble.hand_over(1)
    ensemble.says(NEW, [11], FinishReason.STOP)
    assert ensemble.heard() == []
    ensemble.says(OLD, [10])
    assert ensemble.heard() == [10, 11]


def test_what_an_expert_that_was_left_behind_gets_is_not_the_users(ensemble: Ensemble) -> None:
    """Its engine dies, or is told to stop: the user's request goes on."""
    ensemble.hand_over(1)
    ensemble.says(OLD, [10])
    ensemble.processors[OLD].propagate_error(RuntimeError("dead"))
    ensemble.says(NEW, [11], FinishReason.LENGTH)
    assert ensemble.heard() == [10, 11]


def test_tokens_that_have_waited_for_long_are_urgent_until_newer_ones_come(
    ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(ensemble.thread, "hurry", lambda _, urgent: told.append(urgent))
    ensemble.relay.forget(ensemble.relayed)
    ensemble.says(OLD, [10], seconds_ago=LATE_S)
    ensemble.says(OLD, [11], seconds_ago=-60.0)  # however long this test takes
    assert told == [True, False]


def test_requests_that_nobody_hands_over_pass_through(ensemble: Ensemble) -> None:
    ensemble.relay.forget(ensemble.relayed)
    ensemble.hand_over(1)
    ensemble.says(OLD, [10], FinishReason.LENGTH)
    assert ensemble.heard() == [10]
    assert ensemble.relayed.speaker == OLD


def test_tokens_are_told_as_they_come_also_early_ones_and_not_an_end_without_one(ensemble: Ensemble) -> None:
    told: list[int] = []
    ensemble.relayed.on_tokens = lambda heard: told.append(heard) or heard + 1
    ensemble.says(NEW, [])
    assert told == []
    ensemble.says(OLD, [10])
    ensemble.hand_over(2)
    ensemble.says(NEW, [12])
    ensemble.says(OLD, [11])
    ensemble.says(NEW, [13, 14], FinishReason.LENGTH)
    assert told == [1, 2, 3, 5]
    assert ensemble.heard() == [10, 11, 12, 13, 14]


def test_tokens_are_told_when_there_are_as_many_as_were_asked_for(ensemble: Ensemble) -> None:
    told: list[int] = []
    ensemble.relayed.on_tokens = lambda heard: told.append(heard) or heard + 3
    for token in range(8):
        ensemble.says(OLD, [token])
    assert told == [1, 4, 7]


@pytest.mark.parametrize("early", [False, True])
def test_another_engine_goes_on_with_what_was_broken_off(ensemble: Ensemble, early: bool) -> None:
    ensemble.says(OLD, [10, 11])
    if early:
        ensemble.hand_over(3)
        ensemble.says(NEW, [13])  # which nobody will hear: the token before it was lost with its leader
    speech = ensemble.relay.break_off(ensemble.relayed)
    assert speech is not None
    assert speech.tokens == [10, 11]
    assert "r-0" not in ensemble.processors[OLD].request_states
    heard = ensemble.heard()

    told: list[int] = []
    relayed = ensemble.relay.begin(NEW, None, lambda heard: told.append(heard) or heard + 1, speech)
    params = SamplingParams(
        detokenize=False,
        output_kind=ensemble.kind,
        extra_args={SPOKEN_KEY: Spoken(speech.tokens, speech.ticket).to_wire()},
    )
    queue = ensemble.add(NEW, "again", params)
    ensemble.relay.follow(relayed, NEW, "again")
    output = EngineCoreOutput("again", [12], finish_reason=FinishReason.LENGTH)
    ensemble.processors[NEW].process_outputs([output], time.monotonic())
    rest = queue.get_nowait()
    assert rest is not None
    assert rest.finished
    tokens = list(rest.outputs[0].token_ids)
    assert heard + tokens == [10, 11, 12]
    assert told == [3]
    assert not ensemble.processors[NEW].request_states.keys() & {"again"}


def test_what_was_not_begun_is_not_broken_off(ensemble: Ensemble) -> None:
    assert ensemble.relay.break_off(ensemble.relayed) is None
    assert "r-0" in ensemble.processors[OLD].request_states, "it is cancelled as usual"


def test_who_is_known_to_the_relay_hears_of_a_death_elsewhere(ensemble: Ensemble) -> None:
    ensemble.processors[OLD].propagate_error(RuntimeError("dead"))
    assert ensemble.queues[OLD].output is None
    ensemble.relay.forget(ensemble.relayed)
    ensemble.processors[OLD].propagate_error(RuntimeError("dead"))
    with pytest.raises(RuntimeError, match="dead"):
        ensemble.queues[OLD].get_nowait()


def test_an_answer_that_nobody_went_on_with_can_be_gone_on_with_by_another(ensemble: Ensemble) -> None:
    ensemble.says(OLD, [10])
    speech = ensemble.relay.break_off(ensemble.relayed)
    relayed = ensemble.relay.begin(NEW, None, None, speech)
    assert ensemble.relay.break_off(relayed) is None, "its engine died before it had it"
    ensemble.relay.forget(relayed)
    assert not ensemble.relay._broken_off
    assert ensemble.relay.begin(OLD, None, None, speech).heard == 1


def test_a_follower_that_ends_with_an_error_ends_the_request(ensemble: Ensemble) -> None:
    """Else its leader would wait for its rows."""
    ensemble.says(OLD, [10])
    ensemble.says(NEW, [], FinishReason.ERROR)
    output = ensemble.queues[OLD].get_nowait()
    assert output is not None
    assert output.finished
    assert output.outputs[0].finish_reason == "error"


@pytest.mark.parametrize("prune", [0.0, 0.5])
def test_it_does_so_too_before_the_leader_has_the_request(prune: float) -> None:
    ensemble = Ensemble(RequestOutputKind.DELTA)
    ensemble.relay.forget(ensemble.relayed)
    relayed = ensemble.relay.begin(OLD, replace(ensemble.new_member(), prune=prune))
    ensemble.relay.follow(relayed, NEW, "r-1")
    ensemble.says(NEW, [], FinishReason.ERROR)
    ensemble.relay.follow(relayed, OLD, "r-0")
    output = ensemble.queues[OLD].get_nowait()
    assert output is not None
    assert output.outputs[0].finish_reason == "error"


def test_a_follower_that_ends_as_its_leader_does_is_not_heard(ensemble: Ensemble) -> None:
    heard: list[int] = []

    def note(count: int) -> int:
        heard.append(count)
        return 0

    ensemble.relay.forget(ensemble.relayed)
    ensemble.relayed = ensemble.relay.begin(OLD, replace(ensemble.new_member(), prune=0.0), note)
    for expert in (OLD, NEW):
        ensemble.relay.follow(ensemble.relayed, expert, f"r-{expert}")
    ensemble.says(NEW, [10], FinishReason.LENGTH)
    assert "r-1" in ensemble.processors[NEW].request_states, "vLLM would count it, and trace it, as a request's end"
    ensemble.says(OLD, [10], FinishReason.LENGTH)
    assert ensemble.heard() == [10]
    assert heard == [1]


def test_nor_is_one_that_ends_after_its_leader_was_lost(ensemble: Ensemble) -> None:
    ensemble.relay.forget(ensemble.relayed)
    ensemble.relayed = ensemble.relay.begin(OLD, replace(ensemble.new_member(), prune=0.0))
    for expert in (OLD, NEW):
        ensemble.relay.follow(ensemble.relayed, expert, f"r-{expert}")
    ensemble.says(OLD, [10])
    assert ensemble.relay.break_off(ensemble.relayed) is not None
    ensemble.says(NEW, [10, 11], FinishReason.LENGTH)
    assert "r-1" in ensemble.processors[NEW].request_states
