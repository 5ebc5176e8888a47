"""The mixing kernels in Triton: every expert's row is read once, where it lies. Same results as `reference`.

One program per row and chunk of the vocabulary holds the K experts' values of a block in registers, so that nothing is
read twice and nothing but the result is written. `_mix_kernel` writes the mixture. `_decide_kernel` keeps the best
token of its chunk (greedy, or with Gumbel noise). What is left to do of a row once all its chunks are there, the last
of its programs to finish does: to normalise, or to pick among the chunks and move the posterior on. So each is one
launch, and numbers are converted as they are loaded: a launch takes as long as reading 10 MB.

Shapes: K experts, B rows, V vocabulary, E entries of a buffer, C chunks.
Sources: velocity rule arXiv 2601.03184; Philox: Salmon et al. 2011 ("Parallel random numbers: as easy as
1, 2, 3"; 7 rounds pass BigCrush); Gumbel-max sampling: Maddison et al. 2014, arXiv 1411.0030.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from decar.kernels.rows import Rows, Rule

CHUNK = 8192
MIX_BLOCK, DECIDE_BLOCK = 2048, 1024
"""Tokens of a program, and those that it reads at a time. To decide takes more registers a token: with blocks of 2048
they leave an H100's multiprocessor room for 12 warps, with these for 20 (K=2; by `cuobjdump`, not run)."""
ROUNDS = tl.constexpr(7)


@triton.jit
def _effective_log_weights(log_weights, log_normalisers, lanes, entry, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Log weights [K'] normalised over the experts that take part, -inf for the others, and their log Z [K'].

    In float64, as is every number of which there is one an expert: cancelling them costs no accuracy.

    Args:
        log_weights: pointers [K'] to a row's.
    """
    there = lanes < K
    weight = tl.load(log_weights, mask=there, other=-float("inf")).to(tl.float64)
    pointer = tl.load(log_normalisers + lanes, mask=there, other=0).to(tl.pointer_type(tl.float32))
    active = there & (weight > -float("inf")) & (weight < float("inf"))
    normaliser = tl.load(pointer + entry, mask=active, other=0.0).to(tl.float64)
    active = active & (normaliser > -float("inf")) & (normaliser < float("inf"))
    weight = tl.where(active, weight, -float("inf"))
    normaliser = tl.where(active, normaliser, 0.0)
    top = tl.max(weight, axis=0)
    top = tl.where(top > -float("inf"), top, 0.0)
    total = tl.sum(tl.exp(weight - top), axis=0)
    return weight - top - tl.log(tl.where(total > 0.0, total, 1.0)), normaliser, active


@triton.jit
def _gumbel(seed, position, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gumbel noise of the BLOCK tokens from ``start`` (a multiple of 4) on, fine where the noise is large.

    Token v takes word v % 4 of Philox(key=seed, counter=(v // 4, position, 0, 0)).
    """
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter, position, 0, 0, n_rounds=ROUNDS)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    uniform = tl.minimum(uniform, 0.99999994)  # float32's last value below 1
    # -log(1 - u): its small values make the largest noise, and 1 - u would round them to multiples of 2^-24.
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.33333334))
    return -tl.log(tl.where(uniform < 1e-3, series, -tl.log(1.0 - uniform)))


@triton.jit
def _load_logits(base, token, inside, active, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The experts' logits [K', BLOCK] float32 of these tokens, -inf for experts that take no part."""
    pointers = base[:, None] + token[None, :]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16, 16])
    return tl.load(pointers, mask=active[:, None] & inside[None, :], other=-float("inf")).to(tl.float32)


@triton.jit
def _log_of_sum(logits, offset):  # type: ignore[no-untyped-def]
    """The velocity rule: log sum_k exp(logit_k + offset_k) [BLOCK]."""
    terms = logits + offset[:, None]
    highest = tl.max(terms, axis=0)
    shift = tl.where(highest > -float("inf"), highest, 0.0)
    return shift + tl.log(tl.sum(tl.exp(terms - shift[None, :]), axis=0))


@triton.jit
def _weighted_sum(logits, weight, active):  # type: ignore[no-untyped-def]
    """The logit rule: sum_k w_k logit_k [BLOCK], -inf where no expert takes part."""
    mixed = tl.sum(tl.where(active[:, None], logits * weight[:, None], 0.0), axis=0)
    someone = tl.sum(active.to(tl.int32), axis=0) > 0
    return tl.where(someone, mixed, -float("inf"))


@triton.jit
def _positive_weights(log_weight):  # type: ignore[no-untyped-def]
    """At least the smallest normal number: a weight that underflows still lets its expert forbid a token."""
    return tl.maximum(tl.exp(log_weight), 1.1754943508222875e-38).to(tl.float32)


@triton.jit
def _is_last(finished, programs):  # type: ignore[no-untyped-def]
    """Whether all ``programs`` of a row have come here, and what they wrote before can be read. The count is left at 0,
    as the next launch wants it."""
    tl.debug_barrier()  # the count is one thread's, and tells of what all threads of this program have written
    last = tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(finished, 0)
    return last


@triton.jit
def _mix_kernel(  # type: ignore[no-untyped-def]
    buffers,  # [K] int64, address of each expert's buffer [E, V]
    log_normalisers,  # [K] int64, address of each expert's log Z [E] float32
    entries,  # [B] int64
    log_weights,  # [B, K] floating point
    out,  # [B, V] float32, written
    totals,  # [B, C, 2] float32, max and sum of exponentials of a chunk; not touched unless NORMALISE
    finished,  # [B] int32, 0; not touched unless NORMALISE
    V,
    stride,  # elements between two entries of a buffer
    weights_stride,  # elements between two rows of log_weights
    K: tl.constexpr,
    LANES: tl.constexpr,  # K rounded up to a power of two
    CHUNKS: tl.constexpr,  # C rounded up to a power of two
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts at a multiple of 16 bytes
    VELOCITY: tl.constexpr,
    ANCHORED: tl.constexpr,  # add the mean log Z
    NORMALISE: tl.constexpr,  # subtract the row's log-sum-exp
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
):
    # Rows along the first axis: CUDA allows only 65,535 programs along the second.
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lanes = tl.arange(0, LANES)
    entry = tl.load(entries + row)
    log_weight, normaliser, active = _effective_log_weights(
        log_weights + row * weights_stride + lanes, log_normalisers, lanes, entry, K
    )
    anchor = tl.sum(tl.exp(log_weight) * normaliser, axis=0) if ANCHORED else 0.0
    offset = (log_weight - normaliser + anchor).to(tl.float32)
    weight = _positive_weights(log_weight)
    base = tl.load(buffers + lanes, mask=lanes < K, other=0).to(tl.pointer_type(ELEMENT)) + entry * stride

    top = -float("inf")
    total = 0.0
    for i in range(BLOCKS_PER_CHUNK):
        token = (chunk * BLOCKS_PER_CHUNK + i) * BLOCK + tl.arange(0, BLOCK)
        inside = token < V
        logits = _load_logits(base, token, inside, active, ALIGNED)
        mixed = _log_of_sum(logits, offset) if VELOCITY else _weighted_sum(logits, weight, active)
        tl.store(out + row * V + token, mixed, mask=inside)
        if NORMALISE:
            mixed = tl.where(inside, mixed, -float("inf"))
            new_top = tl.maximum(top, tl.max(mixed, axis=0))
            safe = tl.where(new_top > -float("inf"), new_top, 0.0)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(mixed - safe), axis=0)
            top = new_top
    if NORMALISE:
        tl.store(totals + (row * chunks + chunk) * 2, top)
        tl.store(totals + (row * chunks + chunk) * 2 + 1, total)
        if _is_last(finished + row, chunks):
            columns = tl.arange(0, CHUNKS)
            there = columns < chunks
            tops = tl.load(totals + (row * chunks + columns) * 2, mask=there, other=-float("inf"))
            sums = tl.load(totals + (row * chunks + columns) * 2 + 1, mask=there, other=0.0)
            highest = tl.max(tops, axis=0)
            highest = tl.where(highest > -float("inf"), highest, 0.0)
            of_all = tl.sum(sums * tl.exp(tops - highest), axis=0)
            log_total = highest + tl.log(tl.where(of_all > 0.0, of_all, 1.0))
            for start in range(0, V, BLOCK):
                token = start + tl.arange(0, BLOCK)
                pointers = out + row * V + token
                tl.store(pointers, tl.load(pointers, mask=token < V) - log_total, mask=token < V)


@triton.jit
def _decide_kernel(  # type: ignore[no-untyped-def]
    buffers,  # [K] int64, address of each expert's buffer [E, V]
    log_normalisers,  # [K] int64, address of each expert's log Z [E] float32
    entries,  # [B] int64
    log_weights,  # [B, K] floating point
    temperatures,  # [B] floating point, 0 is greedy
    seeds,  # [B] int64
    positions,  # [B] int64
    best,  # [B, C] float32, the highest score of each chunk
    best_token,  # [B, C] int32, and whose it is
    finished,  # [B] int32, 0
    tokens,  # [B] int64, written
    new_log_weights,  # [B, K] float64, written
    V,
    stride,  # elements between two entries of a buffer
    weights_stride,  # elements between two rows of log_weights
    K: tl.constexpr,
    LANES: tl.constexpr,  # K rounded up to a power of two
    CHUNKS: tl.constexpr,  # C rounded up to a power of two
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts at a multiple of 16 bytes
    VELOCITY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
):
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    lanes = tl.arange(0, LANES)
    entry = tl.load(entries + row)
    given = log_weights + row * weights_stride + lanes
    log_weight, normaliser, active = _effective_log_weights(given, log_normalisers, lanes, entry, K)
    offset = (log_weight - normaliser).to(tl.float32)
    weight = _positive_weights(log_weight)
    base = tl.load(buffers + lanes, mask=lanes < K, other=0).to(tl.pointer_type(ELEMENT)) + entry * stride
    temperature = tl.load(temperatures + row).to(tl.float32)
    seed, position = tl.load(seeds + row), tl.load(positions + row).to(tl.uint32)

    # The best of each column over the chunk's blocks: one reduction a chunk.
    best_of_column = tl.full([BLOCK], -float("inf"), tl.float32)
    token_of_column = chunk * BLOCKS_PER_CHUNK * BLOCK + tl.arange(0, BLOCK)
    for i in range(BLOCKS_PER_CHUNK):
        start = (chunk * BLOCKS_PER_CHUNK + i) * BLOCK
        token = start + tl.arange(0, BLOCK)
        inside = token < V
        logits = _load_logits(base, token, inside, active, ALIGNED)
        if temperature > 0.0:
            mixed = _log_of_sum(logits, offset) if VELOCITY else _weighted_sum(logits, weight, active)
            score = mixed / temperature + _gumbel(seed, position, start, BLOCK)
        elif VELOCITY:
            # The greedy token of a sum is that of its logarithm. Nothing overflows, since these are probabilities, and
            # what underflows is not the best: that has at least 1 / V.
            score = tl.sum(tl.exp(logits + offset[:, None]), axis=0)
        else:
            score = _weighted_sum(logits, weight, active)
        better = inside & (score > best_of_column)
        best_of_column = tl.where(better, score, best_of_column)
        token_of_column = tl.where(better, token, token_of_column)
    highest = tl.max(best_of_column, axis=0)
    # Columns are no order of tokens: the smallest of those that are as good.
    first = tl.min(tl.where(best_of_column == highest, token_of_column, V), axis=0)
    tl.store(best + row * chunks + chunk, highest)
    tl.store(best_token + row * chunks + chunk, first)

    if _is_last(finished + row, chunks):
        columns = tl.arange(0, CHUNKS)
        values = tl.load(best + row * chunks + columns, mask=columns < chunks, other=-float("inf"))
        _, winner = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.load(best_token + row * chunks + winner)
        tl.store(tokens + row, chosen.to(tl.int64))

        logit = tl.load(base + chosen, mask=active, other=-float("inf")).to(tl.float64)
        new = log_weight + logit - normaliser
        top = tl.max(new, axis=0)
        known = top > -float(
            "inf"
        )  # else no expert could have given the token, and there is nothing to learn
        top = tl.where(known, top, 0.0)
        total = tl.sum(tl.exp(new - top), axis=0)
        new = new - top - tl.log(tl.where(known, total, 1.0))
        old = tl.load(given, mask=lanes < K, other=-float("inf")).to(tl.float64)
        tl.store(new_log_weights + row * K + lanes, tl.where(known, new, old), mask=lanes < K)


def mix_rows(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule, *, anchored: bool
) -> torch.Tensor:
    """See `decar.kernels.mix_rows`; ``anchored=False`` gives normalised log-probabilities."""
    count = len(entries)
    out = torch.empty(count, rows.vocab_size, dtype=torch.float32, device=rows.device)
    normalise = rule == "logit" and not anchored
    unused = entries  # a pointer that is never followed
    if count:
        chunks, log_weights = _chunks(rows), _rows_of(log_weights)
        _mix_kernel[(count, chunks)](
            rows.pointers,
            rows.normaliser_pointers,
            entries,
            log_weights,
            out,
            torch.empty(count, chunks, 2, device=rows.device) if normalise else unused,
            rows.counters(count) if normalise else unused,
            rows.vocab_size,
            rows.stride,
            log_weights.stride(0),
            ANCHORED=anchored,
            NORMALISE=normalise,
            **_constants(rows, rule, MIX_BLOCK),
        )
    return out


def decide(
    rows: Rows,
    entries: torch.Tensor,
    log_weights: torch.Tensor,
    rule: Rule,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `decar.kernels.decide`."""
    count, chunks = len(entries), _chunks(rows)
    tokens = torch.empty(count, dtype=torch.int64, device=rows.device)
    new_log_weights = torch.empty(count, rows.experts, dtype=torch.float64, device=rows.device)
    if count:
        log_weights = _rows_of(log_weights)
        _decide_kernel[(count, chunks)](
            rows.pointers,
            rows.normaliser_pointers,
            entries,
            log_weights,
            temperatures,
            seeds,
            positions,
            torch.empty(count, chunks, dtype=torch.float32, device=rows.device),
            torch.empty(count, chunks, dtype=torch.int32, device=rows.device),
            rows.counters(count),
            tokens,
            new_log_weights,
            rows.vocab_size,
            rows.stride,
            log_weights.stride(0),
            **_constants(rows, rule, DECIDE_BLOCK),
        )
    return tokens, new_log_weights


_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _chunks(rows: Rows) -> int:
    return int(triton.cdiv(rows.vocab_size, CHUNK))


def _rows_of(log_weights: torch.Tensor) -> torch.Tensor:
    """[B, K] whose rows may lie anywhere, and are contiguous: most often, what is given."""
    return log_weights if log_weights.stride(1) == 1 else log_weights.contiguous()


def _constants(rows: Rows, rule: Rule, block: int) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "K": rows.experts,
        "LANES": triton.next_power_of_2(rows.experts),
        "CHUNKS": triton.next_power_of_2(_chunks(rows)),
        "ELEMENT": _ELEMENTS[rows.dtype],
        "ALIGNED": rows.aligned,
        "VELOCITY": rule == "velocity",
        "BLOCK": block,
        "BLOCKS_PER_CHUNK": CHUNK // block,
    }
