"""The CUDA kernels in Triton, under the contract in `reference`. `cuda` imports them when they are needed.

A program takes G groups as M columns, vectors with one entry of each group: strided groups are loaded like that,
contiguous ones in one coalesced access that is split (in registers up to M = 4). An entry's rank is the number of
entries that beat it.
"""
# Triton compiles these functions; Python's typing does not apply to them.
# mypy: ignore-errors
# ruff: noqa: RET505, RUF005

from __future__ import annotations

import triton
import triton.language as tl

KEEP = tl.constexpr(0)
MASK = tl.constexpr(1)
ADD_DROPPED = tl.constexpr(2)
SOFT = tl.constexpr(4)

COLUMNS = tl.constexpr(5)
"""Of the table of weights: address, groups, inner, first program, position among the counts of changes."""


_RUNTIME = ("programs", "table", "starts", "base", "scale", "changes")
"""Of `select_rows`: what nothing is compiled for, so that calls of one form have one compiled kernel."""


@triton.jit
def _columns(x, G: tl.constexpr, M: tl.constexpr):
    """(G, M) -> M columns (G,)."""
    if M == 1:
        return (tl.reshape(x, (G,)),)
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, (G, 2, M // 2)), (0, 2, 1)))
        return _columns(low, G, M // 2) + _columns(high, G, M // 2)


@triton.jit
def _rows(columns, G: tl.constexpr, M: tl.constexpr):
    """M columns (G,) -> (G, M)."""
    if M == 1:
        return tl.reshape(columns[0], (G, 1))
    else:
        low = _rows(columns[: M // 2], G, M // 2)
        high = _rows(columns[M // 2 :], G, M // 2)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (G, M))


@triton.jit
def _ranks(columns, M: tl.constexpr):
    """The rank of each column's entry in its group. Every NaN counts as infinity's bits plus one."""
    keys = ()
    for i in tl.static_range(M):
        if columns[i].dtype == tl.float32:
            bits = columns[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF
            keys = keys + (tl.minimum(bits, 0x7F800001),)
        else:
            bits = columns[i].to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
            keys = keys + (tl.minimum(bits, 0x7F81 if columns[i].dtype == tl.bfloat16 else 0x7C01),)
    ranks = ()
    for i in tl.static_range(M):
        rank = keys[i] * 0
        for j in tl.static_range(M):
            if j < i:
                rank += (keys[j] >= keys[i]).to(tl.int32)
            if j > i:
                rank += (keys[j] > keys[i]).to(tl.int32)
        ranks = ranks + (rank,)
    return ranks


@triton.jit
def _kept(ranks, M: tl.constexpr, N: tl.constexpr):
    """For each column, which groups keep their entry in it."""
    kept = ()
    for i in tl.static_range(M):
        kept = kept + (ranks[i] < N,)
    return kept


@triton.jit
def _softened(columns, ranks, scale, M: tl.constexpr, N: tl.constexpr):
    """`scale` times the columns, brought towards zero by the entry of rank N."""
    threshold = tl.where(ranks[0] == N, tl.abs(columns[0].to(tl.float32)), 0.0)
    for i in tl.static_range(1, M):
        threshold = tl.where(ranks[i] == N, tl.abs(columns[i].to(tl.float32)), threshold)
    soft = ()
    for i in tl.static_range(M):
        rest = tl.abs(columns[i].to(tl.float32)) - threshold
        soft = soft + (tl.where(columns[i] < 0, -rest, rest) * scale,)
    return soft


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _write(w, kept, out, at, inside, scale, RESULT: tl.constexpr):
    """Write the result; which entries of a mask changed."""
    if RESULT == KEEP or RESULT == SOFT:  # noqa: SIM109
        tl.store(out + at, tl.where(kept, w, 0.0).to(out.dtype.element_ty), mask=inside)
        return 0
    elif RESULT == MASK:
        before = tl.load(out + at, mask=inside, other=0)
        tl.store(out + at, kept.to(tl.int8), mask=inside)
        return (((before != 0) != kept) & inside).to(tl.int32)
    else:
        target = tl.load(out + at, mask=inside, other=0.0)
        dropped = tl.where(kept, 0.0, w.to(tl.float32))
        tl.store(out + at, (target.to(tl.float32) + scale * dropped).to(target.dtype), mask=inside)
        return 0


@triton.jit
def _select(
    w,
    out,
    scale,
    program,
    groups,
    inner,
    changes,
    N: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    RESULT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    group = program * G + tl.arange(0, G)  # offsets in entries can exceed 32 bits, group numbers do not
    if CONTIGUOUS:
        at = group.to(tl.int64)[:, None] * M + tl.arange(0, M)[None, :]
        inside = (group < groups)[:, None]
        block = tl.load(w + at, mask=inside, other=0.0)
        columns = _columns(block, G, M)
        ranks = _ranks(columns, M)
        kept = _kept(ranks, M, N)
        if RESULT == SOFT:
            block = _rows(_softened(columns, ranks, scale, M, N), G, M)
        changed = _write(block, _rows(kept, G, M), out, at, inside, scale, RESULT)
        if COUNTED:
            tl.atomic_add(changes, tl.reduce(tl.reshape(changed, (G * M,)), 0, _add).to(tl.int64))
    else:
        start = (group // inner).to(tl.int64) * (M * inner) + group % inner
        inside = group < groups
        columns = ()
        for j in tl.static_range(M):
            columns = columns + (tl.load(w + start + j * inner, mask=inside, other=0.0),)
        ranks = _ranks(columns, M)
        kept = _kept(ranks, M, N)
        if RESULT == SOFT:
            columns = _softened(columns, ranks, scale, M, N)
        changed = group * 0
        for j in tl.static_range(M):
            changed += _write(columns[j], kept[j], out, start + j * inner, inside, scale, RESULT)
        if COUNTED:
            tl.atomic_add(changes, tl.reduce(changed, 0, _add).to(tl.int64))


@triton.jit
def select(
    w,
    out,
    scale,
    groups,
    inner,
    N: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    RESULT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):
    """KEEP, SOFT (`scale` is a pointer) or MASK of one weight goes to `out`, which lies in memory as `w` does."""
    number = 0.0
    if RESULT == SOFT:
        number = tl.load(scale).to(tl.float32)
    _select(w, out, number, tl.program_id(0), groups, inner, out, N, M, G, RESULT, CONTIGUOUS, False)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_RUNTIME)
def select_rows(
    programs,
    table,
    starts,
    base: tl.int64,
    scale,
    changes,
    N: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    RESULT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    COUNTED: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
):
    """RESULT of every weight in `table`; of the one in row i it goes to the address ``base + UNIT * starts[i]``.

    `programs` has the row of each program. A weight whose result has no address is left out. `scale` is a number or a
    pointer to one; for SOFT, to the address of a number for each row. ALIGNED promises addresses and numbers of groups
    that are multiples of 16.
    """
    i = tl.load(programs + tl.program_id(0))
    row = table + i * COLUMNS
    w = tl.load(row)
    groups = tl.load(row + 1).to(tl.int32)
    inner = tl.load(row + 2).to(tl.int32)
    program = tl.program_id(0) - tl.load(row + 3).to(tl.int32)
    out = base + tl.load(starts + i) * UNIT
    groups = tl.where(out == 0, 0, groups)
    w = w.to(tl.pointer_type(FROM))
    out = out.to(tl.pointer_type(TO))
    if ALIGNED:
        w, out, groups = tl.multiple_of(w, 16), tl.multiple_of(out, 16), tl.multiple_of(groups, 16)
    if COUNTED:
        changes += tl.load(row + 4)
    if RESULT == SOFT:
        scale = tl.load(tl.load(scale + i).to(tl.pointer_type(tl.float32)))
    elif SCALE_IS_POINTER:
        scale = tl.load(scale).to(tl.float32)
    _select(w, out, scale, program, groups, inner, changes, N, M, G, RESULT, CONTIGUOUS, COUNTED)


@triton.jit
def apply_masks(programs, table, B: tl.constexpr, BITS: tl.constexpr):
    """Entries of the tensors in `table` whose mask is false become zero.

    `programs` has the row of each program, a row the addresses of tensor and mask, entries, and first program.
    """
    row = table + tl.load(programs + tl.program_id(0)) * 4
    block = tl.program_id(0) - tl.load(row + 3)
    at = block * B + tl.arange(0, B)
    inside = at < tl.load(row + 2)
    keep = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int8)) + at, mask=inside, other=1)
    integer: tl.constexpr = tl.int16 if BITS == 16 else tl.int32 if BITS == 32 else tl.int64
    tl.store(tl.load(row).to(tl.pointer_type(integer)) + at, tl.full((B,), 0, integer), mask=inside & (keep == 0))
