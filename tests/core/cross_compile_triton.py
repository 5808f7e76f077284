"""Compile the Triton kernels to machine code for sm_80 and sm_90, without a GPU; print what the PTX says."""

from __future__ import annotations

import itertools
from typing import Any

from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from nm_sparsity.core.masks import triton_kernel
from nm_sparsity.core.masks.cuda import BLOCK, RESULTS, groups_per_program

TYPES = (tl.float32, tl.bfloat16, tl.float16)


def ptx(target: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: int) -> str:
    """The PTX of `kernel`, whose first `aligned` arguments are multiples of 16."""
    source = ASTSource(
        kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(position,): [["tt.divisibility", 16]] for position in range(aligned)},
    )
    compiled = compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


def one(target: int, w: str, m: int, result: str, contiguous: bool, out: str | None = None) -> str:
    form = {"N": m // 2, "M": m, "G": groups_per_program(m), "RESULT": RESULTS[result], "CONTIGUOUS": contiguous}
    return ptx(
        target,
        triton_kernel.select,
        {"w": w, "out": out or w, "scale": "*fp32", "groups": "i32", "inner": "i32"},
        form,
        aligned=2,
    )


def rows(
    target: int,
    w: Any,
    m: int,
    result: str,
    contiguous: bool,
    out: Any = None,
    aligned: bool = True,
    pointer: bool = False,
) -> str:
    counted, fresh = result == "mask", result in ("keep", "soft")
    constants = {
        "N": m // 2,
        "M": m,
        "G": groups_per_program(m),
        "RESULT": RESULTS[result],
        "CONTIGUOUS": contiguous,
        "FROM": w,
        "TO": tl.int8 if counted else out or w,
        "UNIT": (out or w).primitive_bitwidth // 8 if fresh else 1,
        "ALIGNED": aligned,
        "COUNTED": counted,
        "SCALE_IS_POINTER": pointer,
    }
    signature = {"programs": "*i32", "table": "*i64", "starts": "*i64", "base": "i64"}
    signature |= {"scale": "*i64" if result == "soft" else "*fp32" if pointer else "fp32", "changes": "*i64"}
    return ptx(target, triton_kernel.select_rows, signature, constants, aligned=0)


def wide_loads(code: str) -> int:
    return code.count("ld.global.v4.b32") + code.count("ld.global.v2.b32")


if __name__ == "__main__":
    for target in (80, 90):
        for w, m in itertools.product(TYPES, (2, 4, 8)):
            code = rows(target, w, m, "keep", contiguous=True)
            print(
                f"sm_{target} {w} M={m}: {wide_loads(code)} vector loads, {code.count('ld.shared')} from shared memory"
            )
            if m == 4:  # the common pattern stays in registers, with the widest loads
                assert wide_loads(code)
                assert not code.count("ld.shared")
        assert wide_loads(rows(target, tl.float32, 4, "keep", contiguous=True, out=tl.bfloat16))
        assert wide_loads(rows(target, tl.float32, 4, "add", contiguous=True, pointer=True))
        assert wide_loads(one(target, "*fp32", 4, "keep", contiguous=True, out="*fp16"))
        assert wide_loads(rows(target, tl.float32, 4, "soft", contiguous=True, out=tl.bfloat16))
        rows(target, tl.float16, 4, "soft", contiguous=True)
        rows(target, tl.float32, 8, "soft", contiguous=False)
        rows(target, tl.float32, 4, "mask", contiguous=True)
        rows(target, tl.float16, 4, "mask", contiguous=False)
        rows(target, tl.float32, 4, "keep", contiguous=False, aligned=False)
        rows(target, tl.bfloat16, 16, "keep", contiguous=True)
        rows(target, tl.float32, 32, "add", contiguous=False)
        rows(target, tl.bfloat16, 4, "add", contiguous=False, pointer=True)
        assert wide_loads(one(target, "*fp32", 4, "soft", contiguous=True))
        one(target, "*bf16", 4, "mask", contiguous=False, out="*i8")
        for bits in (16, 32, 64):
            tables = {"programs": "*i32", "table": "*i64"}
            ptx(target, triton_kernel.apply_masks, tables, {"B": BLOCK, "BITS": bits}, aligned=2)
    rows(90, tl.float32, 32, "keep", contiguous=True)  # seconds each
    print("compiled for sm_80 and sm_90")
