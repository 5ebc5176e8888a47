"""The mixing kernels in Triton: every expert's row is read once, where it lies. Same results as `reference`.

`_mix_kernel` walks the rows: one program per row and chunk of the vocabulary holds the K experts' values of a
block in registers, so that nothing is read twice and nothing but the result is written. It can write the
mixture, keep only the best token of its chunk (greedy, or with Gumbel noise), or both. `_decide_kernel`, one
small program per row, picks among the chunks and moves the posterior on.

Shapes: K experts, B rows, V vocabulary, E entries of a buffer, C chunks.
Sources: velocity rule arXiv 2601.03184; Philox: Salmon et al. 2011 ("Parallel random numbers: as easy as
1, 2, 3"; 7 rounds pass BigCrush); Gumbel-max sampling: Maddison et al. 2014, arXiv 1411.0030.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from decar.kernels.rows import Rows, Rule

BLOCK = 2048
BLOCKS_PER_CHUNK = 4
ROUNDS = tl.constexpr(7)


@triton.jit
def _effective_log_weights(log_weights, log_normalisers, lanes, entry, row, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Log weights [K'] normalised over the experts that take part, -inf for the others, and their log Z [K'].

    In float64, as is every number of which there is one an expert: cancelling them costs no accuracy.
    """
    there = lanes < K
    weight = tl.load(log_weights + row * K + lanes, mask=there, other=-float("inf")).to(tl.float64)
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
def _mix_kernel(  # type: ignore[no-untyped-def]
    buffers,  # [K] int64, address of each expert's buffer [E, V]
    log_normalisers,  # [K] int64, address of each expert's log Z [E] float32
    entries,  # [B] int64
    log_weights,  # [B, K]
    out,  # [B, V] float32; not touched unless WRITE
    totals,  # [B, C, 2] float32, max and sum of exponentials of what is written; not touched unless TOTAL
    best,  # [B, C] float32; not touched unless SAMPLE
    best_token,  # [B, C] int64
    temperatures,  # [B] float32, 0 is greedy
    seeds,  # [B] int64
    positions,  # [B] int64
    V,
    stride,  # elements between two entries of a buffer
    out_stride,
    K: tl.constexpr,
    LANES: tl.constexpr,  # K rounded up to a power of two
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts at a multiple of 16 bytes
    VELOCITY: tl.constexpr,
    ANCHORED: tl.constexpr,  # add the mean log Z
    WRITE: tl.constexpr,
    TOTAL: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
):
    # Rows along the first axis: CUDA allows only 65,535 programs along the second.
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.num_programs(1)
    lanes = tl.arange(0, LANES)
    entry = tl.load(entries + row)
    log_weight, normaliser, active = _effective_log_weights(
        log_weights, log_normalisers, lanes, entry, row, K
    )
    anchor = tl.sum(tl.exp(log_weight) * normaliser, axis=0) if ANCHORED else 0.0
    offset = (log_weight - normaliser + anchor).to(tl.float32)
    # At least the smallest normal number: a weight that underflows still lets its expert forbid a token.
    weight = tl.maximum(tl.exp(log_weight), 1.1754943508222875e-38).to(tl.float32)
    someone = tl.sum(active.to(tl.int32), axis=0) > 0
    base = tl.load(buffers + lanes, mask=lanes < K, other=0).to(tl.pointer_type(ELEMENT)) + entry * stride

    top = -float("inf")
    total = 0.0
    best_value = -float("inf")
    best_index = chunk * BLOCK * BLOCKS_PER_CHUNK
    for i in range(BLOCKS_PER_CHUNK):
        token = (chunk * BLOCKS_PER_CHUNK + i) * BLOCK + tl.arange(0, BLOCK)
        inside = token < V
        pointers = base[:, None] + token[None, :]
        if ALIGNED:
            pointers = tl.multiple_of(pointers, [16, 16])
        logits = tl.load(pointers, mask=active[:, None] & inside[None, :], other=-float("inf")).to(tl.float32)
        if VELOCITY:
            terms = logits + offset[:, None]
            highest = tl.max(terms, axis=0)
            shift = tl.where(highest > -float("inf"), highest, 0.0)
            mixed = shift + tl.log(tl.sum(tl.exp(terms - shift[None, :]), axis=0))
        else:
            mixed = tl.sum(tl.where(active[:, None], logits * weight[:, None], 0.0), axis=0)
            mixed = tl.where(someone, mixed, -float("inf"))
        if WRITE:
            tl.store(out + row * out_stride + token, mixed, mask=inside)
        mixed = tl.where(inside, mixed, -float("inf"))
        if TOTAL:
            new_top = tl.maximum(top, tl.max(mixed, axis=0))
            safe = tl.where(new_top > -float("inf"), new_top, 0.0)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(mixed - safe), axis=0)
            top = new_top
        if SAMPLE:
            temperature = tl.load(temperatures + row)
            if temperature > 0.0:
                seed, position = tl.load(seeds + row), tl.load(positions + row).to(tl.uint32)
                start = (chunk * BLOCKS_PER_CHUNK + i) * BLOCK
                mixed = mixed / temperature + _gumbel(seed, position, start, BLOCK)
            value, index = tl.max(mixed, axis=0, return_indices=True, return_indices_tie_break_left=True)
            better = value > best_value
            best_index = tl.where(better, (chunk * BLOCKS_PER_CHUNK + i) * BLOCK + index, best_index)
            best_value = tl.where(better, value, best_value)
    if TOTAL:
        tl.store(totals + (row * chunks + chunk) * 2, top)
        tl.store(totals + (row * chunks + chunk) * 2 + 1, total)
    if SAMPLE:
        tl.store(best + row * chunks + chunk, best_value)
        tl.store(best_token + row * chunks + chunk, best_index.to(tl.int64))


@triton.jit
def _decide_kernel(  # type: ignore[no-untyped-def]
    buffers,  # [K] int64
    log_normalisers,  # [K] int64
    entries,  # [B] int64
    log_weights,  # [B, K] float64
    best,  # [B, C] float32
    best_token,  # [B, C] int64
    tokens,  # [B] int64, written
    new_log_weights,  # [B, K] float64, written
    chunks,
    stride,
    K: tl.constexpr,
    LANES: tl.constexpr,
    ELEMENT: tl.constexpr,
    CHUNKS: tl.constexpr,  # C rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    lanes, columns = tl.arange(0, LANES), tl.arange(0, CHUNKS)
    values = tl.load(best + row * chunks + columns, mask=columns < chunks, other=-float("inf"))
    _, winner = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(best_token + row * chunks + winner)
    tl.store(tokens + row, token)

    entry = tl.load(entries + row)
    log_weight, normaliser, active = _effective_log_weights(
        log_weights, log_normalisers, lanes, entry, row, K
    )
    base = tl.load(buffers + lanes, mask=lanes < K, other=0).to(tl.pointer_type(ELEMENT)) + entry * stride
    logit = tl.load(base + token, mask=active, other=-float("inf")).to(tl.float64)
    new = log_weight + logit - normaliser
    top = tl.max(new, axis=0)
    known = top > -float("inf")  # else no expert could have given the token, and there is nothing to learn
    top = tl.where(known, top, 0.0)
    total = tl.sum(tl.exp(new - top), axis=0)
    new = new - top - tl.log(tl.where(known, total, 1.0))
    old = tl.load(log_weights + row * K + lanes, mask=lanes < K, other=-float("inf"))
    tl.store(new_log_weights + row * K + lanes, tl.where(known, new, old), mask=lanes < K)


@triton.jit
def _normalise_kernel(out, totals, V, out_stride, chunks, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Subtract each row's log-sum-exp, known from its chunks."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNKS)
    there = columns < chunks
    tops = tl.load(totals + (row * chunks + columns) * 2, mask=there, other=-float("inf"))
    sums = tl.load(totals + (row * chunks + columns) * 2 + 1, mask=there, other=0.0)
    top = tl.max(tops, axis=0)
    top = tl.where(top > -float("inf"), top, 0.0)
    total = tl.sum(sums * tl.exp(tops - top), axis=0)
    normaliser = top + tl.log(tl.where(total > 0.0, total, 1.0))
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointers = out + row * out_stride + token
    tl.store(pointers, tl.load(pointers, mask=token < V) - normaliser, mask=token < V)


def mix_rows(
    rows: Rows, entries: torch.Tensor, log_weights: torch.Tensor, rule: Rule, *, anchored: bool
) -> torch.Tensor:
    """See `decar.kernels.mix_rows`; ``anchored=False`` gives normalised log-probabilities."""
    count, vocabulary = len(entries), rows.vocab_size
    out = torch.empty(count, vocabulary, dtype=torch.float32, device=rows.device)
    total = rule == "logit" and not anchored
    chunks = triton.cdiv(vocabulary, BLOCK * BLOCKS_PER_CHUNK)
    totals = torch.empty(count, chunks, 2, dtype=torch.float32, device=rows.device) if total else out
    _launch(rows, entries, log_weights, rule, anchored=anchored, out=out, totals=totals if total else None)
    if total and count:
        _normalise_kernel[(count, triton.cdiv(vocabulary, BLOCK))](
            out,
            totals,
            vocabulary,
            out.stride(0),
            chunks,
            CHUNKS=triton.next_power_of_2(chunks),
            BLOCK=BLOCK,
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
    count = len(entries)
    chunks = triton.cdiv(rows.vocab_size, BLOCK * BLOCKS_PER_CHUNK)
    best = torch.empty(count, chunks, dtype=torch.float32, device=rows.device)
    best_token = torch.empty(count, chunks, dtype=torch.int64, device=rows.device)
    tokens = torch.empty(count, dtype=torch.int64, device=rows.device)
    log_weights = log_weights.double().contiguous()
    new_log_weights = torch.empty_like(log_weights)
    _launch(
        rows, entries, log_weights, rule, sample=(best, best_token, temperatures.float(), seeds, positions)
    )
    if count:
        _decide_kernel[(count,)](
            rows.pointers,
            rows.normaliser_pointers,
            entries,
            log_weights,
            best,
            best_token,
            tokens,
            new_log_weights,
            chunks,
            rows.stride,
            K=rows.experts,
            LANES=triton.next_power_of_2(rows.experts),
            ELEMENT=_ELEMENTS[rows.dtype],
            CHUNKS=triton.next_power_of_2(chunks),
        )
    return tokens, new_log_weights


_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _launch(
    rows: Rows,
    entries: torch.Tensor,
    log_weights: torch.Tensor,
    rule: Rule,
    *,
    anchored: bool = False,
    out: torch.Tensor | None = None,
    totals: torch.Tensor | None = None,
    sample: tuple[torch.Tensor, ...] | None = None,
) -> None:
    count = len(entries)
    if not count:
        return
    unused = entries  # a pointer that is never followed
    best, best_token, temperatures, seeds, positions = sample or (unused,) * 5
    _mix_kernel[(count, triton.cdiv(rows.vocab_size, BLOCK * BLOCKS_PER_CHUNK))](
        rows.pointers,
        rows.normaliser_pointers,
        entries,
        log_weights.contiguous(),
        out if out is not None else unused,
        totals if totals is not None else unused,
        best,
        best_token,
        temperatures,
        seeds,
        positions,
        rows.vocab_size,
        rows.stride,
        out.stride(0) if out is not None else 0,
        K=rows.experts,
        LANES=triton.next_power_of_2(rows.experts),
        ELEMENT=_ELEMENTS[rows.dtype],
        ALIGNED=rows.aligned,
        VELOCITY=rule == "velocity",
        ANCHORED=anchored,
        WRITE=out is not None,
        TOTAL=totals is not None,
        SAMPLE=sample is not None,
        BLOCK=BLOCK,
        BLOCKS_PER_CHUNK=BLOCKS_PER_CHUNK,
    )
