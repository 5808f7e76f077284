"""The CUDA kernel in Triton, under the contract in `reference`. `cuda` imports it when it is needed.

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
def _kept(columns, M: tl.constexpr, N: tl.constexpr, NAN_KEY: tl.constexpr):
    """For each column, which groups keep their entry in it."""
    keys = ()
    for i in tl.static_range(M):
        if columns[i].dtype.primitive_bitwidth == 32:
            bits = columns[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF
        else:
            bits = columns[i].to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        keys = keys + (tl.where(bits > NAN_KEY, NAN_KEY, bits),)
    kept = ()
    for i in tl.static_range(M):
        rank = keys[i] * 0
        for j in tl.static_range(M):
            if j < i:
                rank += (keys[j] >= keys[i]).to(tl.int32)
            if j > i:
                rank += (keys[j] > keys[i]).to(tl.int32)
        kept = kept + (rank < N,)
    return kept


@triton.jit
def _write(w, kept, out, at, inside, scale, RESULT: tl.constexpr):
    if RESULT == KEEP:
        tl.store(out + at, tl.where(kept, w, 0.0).to(w.dtype), mask=inside)
    elif RESULT == MASK:
        tl.store(out + at, kept.to(tl.int8), mask=inside)
    else:
        target = tl.load(out + at, mask=inside, other=0.0)
        dropped = tl.where(kept, 0.0, w.to(tl.float32))
        tl.store(out + at, (target.to(tl.float32) + scale * dropped).to(target.dtype), mask=inside)


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
    NAN_KEY: tl.constexpr,
    RESULT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
):
    """RESULT goes to `out`, which lies in memory as `w` does; `scale` is a number or a pointer to one."""
    if SCALE_IS_POINTER:
        scale = tl.load(scale).to(tl.float32)
    group = tl.program_id(0) * G + tl.arange(0, G)  # offsets in entries can exceed 32 bits, group numbers do not
    if CONTIGUOUS:
        at = group.to(tl.int64)[:, None] * M + tl.arange(0, M)[None, :]
        inside = (group < groups)[:, None]
        block = tl.load(w + at, mask=inside, other=0.0)
        kept = _kept(_columns(block, G, M), M, N, NAN_KEY)
        _write(block, _rows(kept, G, M), out, at, inside, scale, RESULT)
    else:
        start = (group // inner).to(tl.int64) * (M * inner) + group % inner
        inside = group < groups
        columns = ()
        for j in tl.static_range(M):
            columns = columns + (tl.load(w + start + j * inner, mask=inside, other=0.0),)
        kept = _kept(columns, M, N, NAN_KEY)
        for j in tl.static_range(M):
            _write(columns[j], kept[j], out, start + j * inner, inside, scale, RESULT)
