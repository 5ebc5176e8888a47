"""One decode step of the lockstep: post, wait, mix, publish, adopt. Knows the plane, and nothing about vLLM.

Every engine runs this after its forward pass, for the requests it shares with others. Each wait is bounded
by what the peer is doing, never by a clock: a row or a token is worth waiting for only while the peer runs
the very step that makes it. What is not worth waiting for is a *hold*: no token this step.

Shapes: K experts, B batch rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from decar.kernels import mix_rows
from decar.router import active_experts, moved_on, prune, restricted
from decar.server.protocol.cores import yield_core
from decar.server.protocol.member import Member
from decar.server.protocol.plane import (
    NOTHING,
    Block,
    Plane,
    entry_of,
    membership_word,
    read_membership_word,
    stamp_of,
)
from decar.server.protocol.transport import Transport


@dataclass
class Turn:
    """One request's part in one step: the position to decide, and its row in this engine's batch."""

    member: Member
    position: int
    row: int = -1

    def __post_init__(self) -> None:
        self.stamp = stamp_of(self.member.generation, self.position)
        self.entry = entry_of(self.member.slot, self.stamp)
        self.leader = self.member.leader_at(self.position)


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


class Lockstep:
    """An engine's side of the plane.

    Args:
        plane: attached shared memory.
        expert: this engine's index.
        transport: where rows lie; a scheduler, which only follows stamps, has none.
    """

    def __init__(self, plane: Plane, expert: int, transport: Transport | None = None):
        self.expert = expert
        self._transport = transport
        self.vocab_size = plane.spec.vocab_size
        self.blocks = plane.blocks
        self.mine: Block = plane.blocks[expert]
        self.alive = plane.alive
        self._tenants = [0] * plane.spec.slots  # newest generation seen per slot

    @property
    def transport(self) -> Transport:
        assert self._transport is not None, "a scheduler neither posts nor mixes"
        return self._transport

    def join(self, member: Member) -> None:
        """Take part in a request. A newer tenant of a slot silences the older one, which is being aborted."""
        self._tenants[member.slot] = max(self._tenants[member.slot], member.generation)

    def holds_slot(self, member: Member) -> bool:
        return self._tenants[member.slot] == member.generation

    def announce(self, turns: Iterable[Turn]) -> None:
        """Say, before the forward pass, which rows it will give."""
        for turn in turns:
            if self.holds_slot(turn.member):
                self.mine.running[turn.member.slot] = turn.stamp
        self.mine.count("steps")

    def finish(self, turns: Sequence[Turn]) -> None:
        """Say that this step gives nothing more."""
        for turn in turns:
            self.mine.running[turn.member.slot] = NOTHING

    def post(self, turns: Sequence[Turn], logits: torch.Tensor) -> None:
        """Write rows of ``logits`` [B, V'] (V' >= V) that are not there yet, then stamp them."""
        new = [turn for turn in turns if not self.mine.has_row(turn.member.slot, turn.stamp)]
        if not new:
            return
        rows, of = logits[:, : self.vocab_size], [turn.row for turn in new]
        if of != list(range(len(rows))):  # else the whole batch is posted, as it lies
            rows = rows.index_select(0, torch.tensor(of, device=logits.device))
        self.transport.post([turn.entry for turn in new], rows)
        for turn in new:
            self.mine.row_stamp[turn.entry] = turn.stamp

    def wait_for_rows(self, turns: Sequence[Turn]) -> list[Turn]:
        """Of the turns this engine leads, those whose rows have all come. The rest are holds."""
        ready: list[Turn] = []
        held: list[Turn] = []
        with self.mine.timed("row_wait_ns"):
            for turn in turns:
                (ready if all(self._row_comes(f, turn) for f in turn.member.followers) else held).append(turn)
        self.mine.count("leader_holds", len(held))
        self.finish(held)  # so that no follower waits for their tokens
        return ready

    def weigh(self, turns: Sequence[Turn]) -> None:
        """Where experts have scored a prompt as they computed it: its weights, and who stays active with them."""
        for turn in turns:
            member = turn.member
            if turn.position or member.scored is None:
                continue
            sums = [
                known + block.prompt_sum[member.slot]
                for (_, known), block in zip(member.scored, self.blocks, strict=True)
            ]
            log_weights = moved_on(member.log_weights, sums)
            log_weights, member.prune = restricted(log_weights, member.top_k, member.prune, member.uniform)
            member.log_weights = log_weights.tolist()

    def mixed(self, turns: Sequence[Turn]) -> torch.Tensor:
        """Mixture logits [len(turns), V] float32, on the transport's device, of turns whose rows have all come.

        K identical experts give exactly that expert's logits: softmax would not need it, a repetition penalty does.
        """
        rows, device = self.transport.rows, self.transport.device
        entries = torch.tensor([turn.entry for turn in turns], device=device)
        log_weights = torch.tensor(
            [turn.member.log_weights for turn in turns], dtype=torch.float64, device=device
        )
        rules = [turn.member.rule for turn in turns]
        if len(set(rules)) == 1:
            result = mix_rows(rows, entries, log_weights, rules[0])
        else:
            result = torch.empty(len(turns), self.vocab_size, device=device)
            for rule in set(rules):
                chosen = [i for i, other in enumerate(rules) if other == rule]
                result[chosen] = mix_rows(rows, entries[chosen], log_weights[chosen], rule)
        for turn in turns:
            self.mine.log_weights[turn.member.slot, turn.position] = turn.member.log_weights
        self.mine.count("mixed_tokens", len(turns))
        return result

    def publish(self, turns: Sequence[Turn], tokens: Sequence[int]) -> None:
        """Tell the followers the token of each turn this engine decided, and move its weights on.

        Where experts may be pruned, who goes on is decided first: whoever has seen a token knows who takes part next.
        """
        pruning = [turn.member.prune > 0 or (not turn.position and turn.member.may_release) for turn in turns]
        self._stamp_tokens(turns, tokens, [not of for of in pruning])
        moving = [i for i, turn in enumerate(turns) if turn.member.posterior]
        if moving:
            self._move_weights([turns[i] for i in moving], [tokens[i] for i in moving])
        if any(pruning):
            for turn in itertools.compress(turns, pruning):
                self._prune(turn.member, turn.position + 1)
            self._stamp_tokens(turns, tokens, pruning)

    def _stamp_tokens(self, turns: Sequence[Turn], tokens: Sequence[int], chosen: Sequence[bool]) -> None:
        for turn, token in itertools.compress(zip(turns, tokens, strict=True), chosen):
            self.mine.token[turn.entry] = token
            self.mine.token_stamp[turn.entry] = turn.stamp

    def _prune(self, member: Member, position: int) -> None:
        """Release the experts that the weights of ``position`` allow to; this engine may be one of them."""
        log_weights, left = prune(member.log_weights, member.prune)
        active = tuple(active_experts(log_weights))
        if active == member.active:
            return
        leader = member.leader if member.leader in active else int(log_weights.argmax())
        self.mine.count("pruned", len(member.active) - len(active))
        self.mine.count("handed_over", int(leader != member.leader))
        member.log_weights, member.prune = log_weights.tolist(), left
        self.mine.membership_weights[member.slot] = [*member.log_weights, left]
        self.mine.membership_from[member.slot] = position
        self.mine.membership[member.slot] = membership_word(member.generation, leader, active)
        follow_membership(self.blocks, member)

    def adopt(self, turns: Sequence[Turn]) -> list[int | None]:
        """The leaders' tokens for turns this engine follows; None is a hold."""
        with self.mine.timed("token_wait_ns"):
            tokens = [self._token_comes(turn) for turn in turns]
        self.mine.count("follower_holds", tokens.count(None))
        return tokens

    def rows_may_come(self, member: Member, position: int) -> bool:
        """Whether every follower has given its row, or is about to: time to run a held turn again."""
        stamp = stamp_of(member.generation, position)
        return all(
            self.blocks[f].has_row(member.slot, stamp) or self.blocks[f].running[member.slot] == stamp
            for f in member.followers
        )

    def takes_part(self, member: Member) -> bool:
        """Whether this engine still does, as far as leaders have decided; brings ``member`` up to date."""
        follow_membership(self.blocks, member)
        return self.expert in member.active

    def decided(self, member: Member, position: int) -> int | None:
        """The leader's token for ``position``, if it has published it."""
        leader = self.blocks[member.leader_at(position)]
        return leader.published(member.slot, stamp_of(member.generation, position))

    def _row_comes(self, follower: int, turn: Turn) -> bool:
        block, slot, stamp = self.blocks[follower], turn.member.slot, turn.stamp
        self._wait(lambda: block.has_row(slot, stamp), follower, slot, stamp)
        return block.has_row(slot, stamp)

    def _token_comes(self, turn: Turn) -> int | None:
        block, slot, stamp = self.blocks[turn.leader], turn.member.slot, turn.stamp
        self._wait(lambda: block.published(slot, stamp) is not None, turn.leader, slot, stamp)
        return block.published(slot, stamp)

    def _wait(self, there: Callable[[], bool], peer: int, slot: int, stamp: int) -> None:
        """Wait while ``peer`` lives and runs the step of ``stamp``. The caller looks once more afterwards."""
        running = self.blocks[peer].running
        spins = 0
        while not there() and running[slot] == stamp and self.alive[peer]:
            spins += 1
            if spins > 200:
                time.sleep(20e-6)
            else:
                yield_core()

    def _move_weights(self, turns: Sequence[Turn], tokens: Sequence[int]) -> None:
        """Bayes. Experts that are not active have no weight to move, whatever their rows hold."""
        likelihoods = self.transport.log_likelihoods([turn.entry for turn in turns], list(tokens))
        moved = moved_on([turn.member.log_weights for turn in turns], likelihoods)
        for turn, weights in zip(turns, moved.tolist(), strict=True):
            turn.member.log_weights = weights
