"""One decode step of the lockstep: post, wait, mix, publish, adopt. Knows the plane, and nothing about vLLM.

Every engine runs this after its forward pass, for the requests it shares with others. Each wait is bounded
by what the peer is doing: a row or a token is worth waiting for only while the peer runs the very step that makes
it. Where another host has to say something, and others want to go on, the clock bounds it as well. What is not worth
waiting for is a *hold*: no token this step.

A step's work is done on arrays, one entry a request: what stamps, tokens and weights are anyway.

Shapes: n turns of one step, K experts, S slots, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from decar.kernels import Rule, decide, mix_rows
from decar.router import active_experts, moved_on, prune, restricted
from decar.server.protocol.cores import yield_core
from decar.server.protocol.member import Draw, Member
from decar.server.protocol.plane import (
    NOTHING,
    WHOLE,
    Block,
    Plane,
    entry_of,
    membership_word,
    read_membership_word,
    stamp_of,
)
from decar.server.protocol.transport import Transport

HELD = -1
"""In place of a token: there is none this step."""
RULES: tuple[Rule, ...] = get_args(Rule)
_NEVER = np.iinfo(np.int64).max
# A peer's row is often microseconds away: look again at once, and leave the core to whoever wants it, this many times
# (about 0.1 ms) before sleeping, which on Linux takes 50 µs and more however little is asked for.
_SPINS = 200
_FOREVER = float("inf")
_PATIENCE = 0.5
"""Of a step's time so far: what it waits for other hosts while it has rows that need none."""
_SLEEP_S = 20e-6


def follow_membership(blocks: Sequence[Block], member: Member) -> None:
    """Bring ``member`` up to date with what its leaders have written of who takes part from which position on."""
    while True:
        block, slot = blocks[member.leader], member.slot
        word = block.membership[slot]
        if word >> 32 != member.generation:
            return  # an earlier tenant's: this one's leader has released nobody
        leader, active = read_membership_word(word)
        member.active = active
        if len(active) == 1:
            member.alone_from = block.membership_from[slot]
        if leader == member.leader:
            return
        *member.log_weights, member.prune = block.membership_weights[slot].tolist()
        member.led_before.append((block.membership_from[slot], member.leader))
        member.leader = leader


class Observer:
    """What one engine's scheduler asks about one request: it reads the plane, and writes nothing.

    Args:
        plane: attached shared memory.
        expert: this engine's index.
    """

    def __init__(self, plane: Plane, expert: int):
        self.expert = expert
        self.mine: Block = plane.blocks[expert]
        self._blocks = plane.blocks
        self._ring = plane.spec.ring
        self._far = set(np.flatnonzero(plane.spec.far_from(expert)).tolist())
        self._weights_read = plane.weights_read.data

    def takes_part(self, member: Member) -> bool:
        """Whether this engine still does, as far as leaders have decided; brings ``member`` up to date."""
        follow_membership(self._blocks, member)
        return self.expert in member.active

    def decided(self, member: Member, position: int) -> int | None:
        """The leader's token for ``position``, if it has published it."""
        leader = self._blocks[member.leader_at(position)]
        return leader.published(member.slot, stamp_of(member.generation, position))

    def needs_hosts(self, member: Member) -> bool:
        """Whether its next token waits for another host, whoever leads it."""
        return not self._far.isdisjoint(member.active)

    def rows_may_come(self, member: Member, position: int, patient: bool = True) -> bool:
        """Whether a held turn that this engine leads is worth running again: every follower has given its row, or is
        about to, and the gateway has read what the weights of ``position`` would overwrite.

        Args:
            patient: rows of other hosts are worth waiting for; else they have to be there.
        """
        slot, stamp = member.slot, stamp_of(member.generation, position)
        return stamp - self._weights_read[slot] <= self._ring and all(
            self._blocks[follower].has_row(slot, stamp)
            or (self._blocks[follower].running[slot] == stamp and (patient or follower not in self._far))
            for follower in member.followers
        )


@dataclass
class Turns:
    """The parts of n requests in one step; every attribute is [n] int64.

    Attributes:
        slots, positions: which position of which request is to be decided.
        stamps, entries: those of its row and its token.
        leaders: who decides it.
        rows: its row in this engine's batch, which is known after the forward pass.
    """

    slots: np.ndarray
    positions: np.ndarray
    stamps: np.ndarray
    entries: np.ndarray
    leaders: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, chosen: np.ndarray | slice) -> Turns:
        """Those at indices, or of a slice."""
        return Turns(*[values[chosen] for values in vars(self).values()])

    def where(self, mask: np.ndarray) -> Turns:
        """Those of which ``mask`` [n] is true; most often, all of them."""
        return self if mask.all() else self[mask]


class Lockstep:
    """An engine's steps. What it knows of a slot's tenant it keeps in arrays [S]; the tenant is the newest that joined.

    Args:
        plane: attached shared memory.
        expert: this engine's index.
        transport: where rows lie.
    """

    def __init__(self, plane: Plane, expert: int, transport: Transport):
        slots, experts = plane.spec.slots, plane.spec.experts
        self.expert = expert
        self.vocab_size = plane.spec.vocab_size
        self.prompt_unit = plane.spec.prompt_unit
        self.transport = transport
        self.blocks = plane.blocks
        self.mine: Block = plane.blocks[expert]
        self._fields, self._alive, self._weights_read = plane.fields, plane.alive, plane.weights_read
        self._own = {name: field[expert] for name, field in plane.fields.items()}
        self._ring = plane.spec.ring
        self._tell_others = plane.tell_others
        self._own["running"][:] = NOTHING  # whatever an engine before this one was doing
        self._far = plane.spec.far_from(expert)
        self._began = 0.0
        self._until = _FOREVER  # that other hosts are waited for
        self._needs_hosts = np.zeros(slots, bool)  # whose tokens

        self.generation = np.zeros(slots, np.int64)
        self.produced = np.zeros(slots, np.int64)  # tokens of the answer that this engine knows
        self._first = np.zeros(slots, np.int64)  # those that it knew from the beginning
        self.leader = np.zeros(slots, np.int64)
        self.log_weights = np.full((slots, experts), -np.inf)
        self.budget = np.zeros(slots)  # weight that may still be pruned
        self.may_release = np.zeros(slots, bool)
        self.alone_from = np.full(slots, _NEVER)
        self._active = np.zeros((slots, experts), bool)
        self._led_until = np.zeros(slots, np.int64)  # up to which position earlier leaders decide
        self._seen = np.zeros(slots, np.int64)  # the membership word that the above is by
        self._posterior = np.zeros(slots, bool)
        self._unweighed = np.zeros(slots, bool)  # the prompt has still to move the weights
        self._rules = np.zeros(slots, np.int64)
        self._whole = np.zeros(slots, np.int64)  # `WHOLE` where a product of experts needs every logit
        self.plain = np.zeros(slots, bool)  # `decide` chooses the tokens, when it is led from here
        self._temperatures = np.zeros(slots)
        self._seeds = np.zeros(slots, np.int64)
        self._members: list[Member | None] = [None] * slots

    # --- who takes part -----------------------------------------------------------------------------------

    def join(self, member: Member, spoken: int = 0, draw: Draw | None = None) -> None:
        """Take part in a request. A newer tenant of a slot silences the older one, which is being aborted.

        Args:
            spoken: tokens of the answer that are there already.
            draw: how `decide` chooses its tokens; None: somebody else does, from what `mixed` gives.
        """
        slot = member.slot
        if member.generation <= self.generation[slot]:
            return
        self._members[slot] = member
        self.generation[slot] = member.generation
        self.produced[slot] = self._first[slot] = spoken
        self.may_release[slot] = member.may_release
        self._posterior[slot] = member.posterior
        self._unweighed[slot] = member.scored is not None
        self._rules[slot] = RULES.index(member.rule)
        self._whole[slot] = WHOLE if member.rule == "logit" else 0
        self.plain[slot] = draw is not None
        if draw is not None:
            self._temperatures[slot], self._seeds[slot] = draw.temperature, draw.seed
        self._load(slot)

    def holds_slot(self, member: Member) -> bool:
        return bool(self.generation[member.slot] == member.generation)

    def take_part(self, slots: np.ndarray) -> np.ndarray:
        """Whether this engine still does in each of ``slots``, as far as leaders have decided; [n] bool."""
        words = self._fields["membership"][self.leader[slots], slots]
        news = (words >> 32 == self.generation[slots]) & (words != self._seen[slots])
        for slot in slots[news].tolist():
            follow_membership(self.blocks, self._member(slot))
            self._load(slot)
        return self._active[slots, self.expert]

    def turns(self, slots: np.ndarray, positions: np.ndarray) -> Turns:
        """The turns of a step that is to decide ``positions`` of ``slots``."""
        stamps = stamp_of(self.generation[slots], positions)
        leaders = self.leader[slots]
        for i in np.flatnonzero(positions < self._led_until[slots]):
            leaders[i] = self._member(slots[i]).leader_at(int(positions[i]))
        return Turns(slots, positions, stamps, entry_of(slots, stamps), leaders, np.full_like(slots, -1))

    def learn(self, member: Member) -> None:
        """Count a token of the answer that this engine was given between two steps."""
        if self.holds_slot(member):
            self.produced[member.slot] += 1

    def _member(self, slot: int) -> Member:
        member = self._members[slot]
        assert member is not None, "nobody has joined in this slot"
        return member

    def _load(self, slot: int) -> None:
        """Take over what a slot's member says of who takes part, and with which weights."""
        member = self._member(slot)
        self.leader[slot] = member.leader
        self.log_weights[slot] = member.log_weights
        self.budget[slot] = member.prune
        self.alone_from[slot] = _NEVER if member.alone_from is None else member.alone_from
        self._active[slot] = False
        self._active[slot, list(member.active)] = True
        self._led_until[slot] = member.led_before[-1][0] if member.led_before else 0
        self._seen[slot] = self.blocks[member.leader].membership[slot]

    # --- a step, in this order ----------------------------------------------------------------------------

    def announce(self, turns: Turns) -> None:
        """Say, before the forward pass, which rows it will give."""
        self._own["running"][turns.slots] = turns.stamps
        self._began = time.monotonic()
        self.mine.count("steps")
        self._tell_others()

    def post(self, turns: Turns, logits: torch.Tensor) -> None:
        """Write rows of ``logits`` [B, V'] (V' >= V) that are not there yet, then stamp them."""
        new = turns.where(self._own["row_stamp"][turns.entries] != turns.stamps)
        if not len(new):
            return
        rows = logits[:, : self.vocab_size]
        if not np.array_equal(new.rows, np.arange(len(rows))):  # else the whole batch is posted, as it lies
            (chosen,) = self.transport.to_device(new.rows)
            rows = rows.index_select(0, chosen.to(logits.device))
        self.transport.post(new.entries, rows)
        self._own["row_for"][new.entries] = new.leaders | self._whole[new.slots]
        self._own["row_stamp"][new.entries] = new.stamps
        self._tell_others()

    def bound_waits(self, turns: Turns, rows: int) -> None:
        """Say, after the forward pass, how long to wait for other hosts: without bound, if all ``rows`` of this step's
        batch need one, as ``turns`` tell. Else a slow link does not hold the others up for more than half the time that
        the step has taken so far. What has not come by then is a hold."""
        self._until = _FOREVER
        if self._far.any():
            need = (self._active[turns.slots] & self._far).any(axis=1)
            self._needs_hosts[turns.slots] = need
            if need.sum() < rows:
                now = time.monotonic()
                self._until = now + (now - self._began) * _PATIENCE

    def wait_for_rows(self, turns: Turns) -> Turns:
        """Of the turns this engine leads, those whose rows have all come. The rest are holds.

        So is a turn whose weights the gateway has no room for: it is the ring's length behind.
        """
        with self.mine.timed("row_wait_ns"):
            room = turns.stamps - self._weights_read[turns.slots] <= self._ring
            wanted = self._active[turns.slots] & room[:, None]
            wanted[:, self.expert] = False
            held = self._wait_for(wanted, turns)
        ready = room & ~held
        if not ready.all():
            holds = turns[~ready]
            self.mine.count("leader_holds", len(holds))
            self.finish(holds)  # so that no follower waits for their tokens
        return turns.where(ready)

    def weigh(self, turns: Turns) -> None:
        """Where experts have scored a prompt as they computed it: its weights, and who stays active with them."""
        first = (
            turns.positions == self._first[turns.slots]
        )  # whoever takes the lead over finds the weights there
        for slot in turns.slots[first & self._unweighed[turns.slots]].tolist():
            member = self._member(slot)
            assert member.scored is not None
            said = self._fields["prompt_sum"][:, slot] + [known for _, known in member.scored]
            log_weights = moved_on(self.log_weights[slot], said)
            self.log_weights[slot], self.budget[slot] = restricted(
                log_weights, member.top_k, member.prune, member.uniform
            )
            self._unweighed[slot] = False

    def mixed(self, turns: Turns) -> torch.Tensor:
        """Mixture logits [n, V] float32, on the transport's device, of turns whose rows have all come.

        K identical experts give exactly that expert's logits: softmax would not need it, a repetition penalty does.
        """
        log_weights = self.log_weights[turns.slots]
        rows, entries = self.transport.rows_of(turns.entries, log_weights)
        given = self.transport.to_device(entries, log_weights)
        (result,) = self._by_rule(
            turns, given, lambda rule, entries, weights: (mix_rows(rows, entries, weights, rule),)
        )
        self._note_weights(turns, log_weights)
        return result

    def decide(self, turns: Turns) -> torch.Tensor:
        """Choose and publish the tokens [n] of *plain* turns whose rows have all come, without writing the mixture.

        Returns:
            them, on the transport's device.
        """
        slots, log_weights = turns.slots, self.log_weights[turns.slots]
        draws = self._temperatures[slots], self._seeds[slots], turns.positions
        rows, entries = self.transport.rows_of(turns.entries, log_weights)
        given = self.transport.to_device(entries, log_weights, *draws)
        tokens, moved = self._by_rule(
            turns,
            given,
            lambda rule, entries, weights, *draws: decide(rows, entries, weights, rule, *draws),
        )
        self._note_weights(turns, log_weights)
        self.publish(turns, *self.transport.to_host(tokens, moved))
        return tokens

    def publish(self, turns: Turns, tokens: np.ndarray, log_weights: np.ndarray | None = None) -> None:
        """Tell the followers the tokens [n] of the turns this engine decided, and move their weights on.

        Where experts may be released, who goes on is decided first: whoever has seen a token knows who takes part next.

        Args:
            log_weights: by Bayes after the tokens, [n, K], if somebody has worked them out.
        """
        slots = turns.slots
        pruning = self.budget[slots] > 0
        beginning = (turns.positions == self._first[slots]) & self.may_release[slots]
        releasing = pruning | beginning
        self._stamp_tokens(turns, tokens, ~releasing)
        moving = self._posterior[slots]
        if moving.any() and log_weights is not None:
            self.log_weights[slots[moving]] = log_weights[moving]
        elif moving.any():
            self._move_weights(turns.where(moving), tokens[moving])
        if releasing.any():
            lightest = np.where(self._active[slots], self.log_weights[slots], np.inf).min(axis=1)
            for i in np.flatnonzero(beginning | (pruning & (np.exp(lightest) <= self.budget[slots]))):
                self._release(int(slots[i]), int(turns.positions[i]) + 1)
            self._stamp_tokens(turns, tokens, releasing)
        self.produced[slots] = turns.positions + 1
        self._tell_others()

    def adopt(self, turns: Turns) -> np.ndarray:
        """The leaders' tokens [n] for turns this engine follows, `HELD` where there is none."""
        leaders, slots, entries, stamps = turns.leaders, turns.slots, turns.entries, turns.stamps
        with self.mine.timed("token_wait_ns"):
            while True:
                running = (self._fields["running"][leaders, slots] == stamps) & (self._alive[leaders] == 1)
                if self._until < _FOREVER:
                    running &= self._waited_for(slots)
                there = self._fields["token_stamp"][leaders, entries] == stamps
                waiting = np.flatnonzero(running & ~there)
                if not len(waiting):
                    break
                i = waiting[0]
                self._wait(self.blocks[leaders[i]].token_stamp, int(leaders[i]), turns, int(i))
        self.mine.count("follower_holds", len(turns) - int(there.sum()))
        self.produced[slots[there]] = turns.positions[there] + 1
        return np.where(there, self._fields["token"][leaders, entries], HELD)

    def finish(self, turns: Turns) -> None:
        """Say that this step gives nothing more."""
        self._own["running"][turns.slots] = NOTHING
        self._tell_others()

    # --- parts of it --------------------------------------------------------------------------------------

    def _by_rule(
        self,
        turns: Turns,
        given: Sequence[torch.Tensor],
        operation: Callable[..., tuple[torch.Tensor, ...]],
    ) -> tuple[torch.Tensor, ...]:
        """What ``operation`` makes of a rule and of what is ``given``, each [n, ...], for the turns of each rule."""
        rules = self._rules[turns.slots]
        if (rules == rules[0]).all():
            return operation(RULES[rules[0]], *given)
        order = np.argsort(rules, kind="stable")
        back, *by_rule = self.transport.to_device(
            np.argsort(order), *(order[rules[order] == i] for i in np.unique(rules))
        )
        parts = [
            operation(RULES[i], *(values[chosen] for values in given))
            for i, chosen in zip(np.unique(rules), by_rule, strict=True)
        ]
        return tuple(torch.cat(results)[back] for results in zip(*parts, strict=True))

    def _note_weights(self, turns: Turns, log_weights: np.ndarray) -> None:
        """Have the gateway know by which weights [n, K] tokens are mixed."""
        places = turns.slots, turns.positions % self._ring
        self._own["log_weights"][places] = log_weights
        if "tails" in self._own:
            self._own["tails"][places] = self._tails(turns, log_weights)
        self.mine.count("mixed_tokens", len(turns))

    def _waited_for(self, slots: np.ndarray) -> np.ndarray:
        """Which of these [n] still are: those that need another host, not for too long."""
        return ~self._needs_hosts[slots] | (time.monotonic() < self._until)

    def _wait_for(self, wanted: np.ndarray, turns: Turns) -> np.ndarray:
        """Wait for the rows of the ``wanted`` experts [n, K]; which turns [n] lack one that is not coming."""
        slots, stamps = turns.slots, turns.stamps[:, None]

        def missing() -> np.ndarray:
            return wanted & (stamps != self._fields["row_stamp"][:, turns.entries].T)

        while missing().any():
            # In this order: a row that is not there once its engine no longer runs that step will not come.
            running = (stamps == self._fields["running"][:, slots].T) & (self._alive == 1)
            if self._until < _FOREVER:
                running &= self._waited_for(slots)[:, None]
            lacking = missing()
            held: np.ndarray = (lacking & ~running).any(axis=1)
            waiting = np.argwhere(lacking & ~held[:, None])
            if not len(waiting):
                return held
            i, peer = waiting[0].tolist()
            self._wait(self.blocks[peer].row_stamp, peer, turns, i)
        return np.zeros(len(turns), bool)

    def _wait(self, stamps: memoryview, peer: int, turns: Turns, i: int) -> None:
        """Wait until the ``i``-th turn's entry of ``stamps`` has its stamp, while ``peer`` runs that step and
        `_waited_for` is true of it.

        The caller looks once more afterwards.
        """
        entry, slot, stamp = int(turns.entries[i]), int(turns.slots[i]), int(turns.stamps[i])
        running, alive = self.blocks[peer].running, self._alive
        until = self._until if self._needs_hosts[slot] else _FOREVER
        spins = 0
        while stamps[entry] != stamp and running[slot] == stamp and alive[peer]:
            if until < _FOREVER and time.monotonic() >= until:
                return
            spins += 1
            if spins > _SPINS:
                self.mine.beat()
                time.sleep(_SLEEP_S)
            else:
                yield_core()

    def _stamp_tokens(self, turns: Turns, tokens: np.ndarray, chosen: np.ndarray) -> None:
        entries = turns.entries[chosen]
        self._own["token"][entries] = tokens[chosen]
        self._own["token_stamp"][entries] = turns.stamps[chosen]

    def _tails(self, turns: Turns, log_weights: np.ndarray) -> np.ndarray:
        """How far, in total variation, mixtures [n] may be from those of whole rows: see `mirror`."""
        # A row that is no distribution does not count in the mixture.
        there = np.isfinite(self._fields["log_normaliser"][:, turns.entries].T)
        weights = np.exp(log_weights) * there
        tails = np.where(there, self._fields["row_tail"][:, turns.entries].T, 0.0)
        found: np.ndarray = (weights * tails).sum(1) / np.maximum(weights.sum(1), 1e-300)
        return found

    def _move_weights(self, turns: Turns, tokens: np.ndarray) -> None:
        """Bayes. Experts that are not active have no weight to move, whatever their rows hold."""
        likelihoods = self.transport.log_likelihoods(turns.entries, tokens)
        self.log_weights[turns.slots] = moved_on(self.log_weights[turns.slots], likelihoods)

    def _release(self, slot: int, position: int) -> None:
        """Release the experts that the weights of ``position`` allow to; this engine may be one of them."""
        member = self._member(slot)
        log_weights, left = prune(self.log_weights[slot], float(self.budget[slot]))
        active = tuple(active_experts(log_weights))
        if active == member.active:
            return
        leader = member.leader if member.leader in active else int(log_weights.argmax())
        self.mine.count("pruned", len(member.active) - len(active))
        self.mine.count("handed_over", int(leader != member.leader))
        member.log_weights, member.prune = log_weights.tolist(), left
        self._own["membership_weights"][slot] = [*member.log_weights, left]
        self._own["membership_from"][slot] = position
        self._own["membership"][slot] = membership_word(member.generation, leader, active)
        follow_membership(self.blocks, member)
        self._load(slot)
