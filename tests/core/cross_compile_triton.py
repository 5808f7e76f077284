"""Compile the Triton kernel to machine code for sm_80 and sm_90, without a GPU; print what the PTX says."""

from __future__ import annotations

import itertools

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from nm_sparsity.core.masks import triton_kernel
from nm_sparsity.core.masks.cuda import BLOCK, LEAST_GROUPS

TYPES = {"*fp32": 0x7F800001, "*bf16": 0x7F81, "*fp16": 0x7C01}


def ptx(target: int, w: str, m: int, result: str, contiguous: bool, pointer: bool = False) -> str:
    constants = {
        "N": m // 2,
        "M": m,
        "G": max(BLOCK // m, LEAST_GROUPS),
        "NAN_KEY": TYPES[w],
        "RESULT": getattr(triton_kernel, result).value,
        "CONTIGUOUS": contiguous,
        "SCALE_IS_POINTER": pointer,
    }
    signature = {
        "w": w,
        "out": "*i8" if result == "MASK" else w,
        "scale": "*fp32" if pointer else "fp32",
        "groups": "i32",
        "inner": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = {(position,): [["tt.divisibility", 16]] for position in (0, 1)}
    source = ASTSource(triton_kernel.select, signature=signature, constexprs=constants, attrs=aligned)
    compiled = compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


if __name__ == "__main__":
    for target in (80, 90):
        for w, m in itertools.product(TYPES, (2, 4, 8)):
            code = ptx(target, w, m, "KEEP", contiguous=True)
            wide = code.count("ld.global.v4.b32") + code.count("ld.global.v2.b32")
            print(f"sm_{target} {w} M={m}: {wide} vector loads, {code.count('ld.shared')} from shared memory")
            if m == 4:  # the common pattern stays in registers, with the widest loads
                assert wide
                assert not code.count("ld.shared")
        ptx(target, "*fp32", 4, "MASK", contiguous=True)
        ptx(target, "*fp32", 4, "KEEP", contiguous=False)
        ptx(target, "*bf16", 16, "KEEP", contiguous=True)
        ptx(target, "*fp16", 4, "MASK", contiguous=False)
        ptx(target, "*fp32", 32, "ADD_DROPPED", contiguous=False)
        ptx(target, "*fp32", 4, "ADD_DROPPED", contiguous=True)
        ptx(target, "*bf16", 4, "ADD_DROPPED", contiguous=False, pointer=True)
    ptx(90, "*fp32", 32, "KEEP", contiguous=True)  # seconds each
    print("compiled for sm_80 and sm_90")
