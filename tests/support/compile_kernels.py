"""Compile every kernel to machine code of an H100, as ``tests/decide/test_triton.py`` runs it: no GPU is needed.

Triton's interpreter takes programs that its compiler refuses (a variable that changes its type in a loop, say).
"""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from torch_sap.decide import kernels, triton_backend

POINTERS = dict.fromkeys(("table", "histograms", "groups", "chosen", "kept", "ties", "counts_to_go"), "*i64")
TYPES = {**POINTERS, "item_of": "*i32", "sums": "*fp64", "exponents": "*fp64", "total": "i64", "done": "i32"}
TARGET = GPUTarget("cuda", 90, 32)
FLOAT16, FLOAT32, FLOAT64, MIXED = kernels.FLOAT16, kernels.FLOAT32, kernels.FLOAT64, kernels.MIXED
SIZES = {"BLOCK": triton_backend.BLOCK, "STEPS": triton_backend.BLOCKS}
ROWS = {name: getattr(triton_backend, name) for name in ("ROWS", "WIDTH", "STEPS")}


def compiled(kernel, **constants):
    """Machine code of a kernel."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return compile(source, target=TARGET).asm["cubin"]


def main():
    codes = [compiled(kernels.store_zeros, BLOCK=triton_backend.BLOCK)]
    for source, target, passes, bits in (
        (FLOAT16, FLOAT16, 2, 8),
        (FLOAT32, FLOAT32, 4, 8),
        (FLOAT64, FLOAT64, 5, 13),
        (MIXED, FLOAT32, 4, 8),
    ):
        given = {"SOURCE": source, "TARGET": target, "PASSES": passes}
        codes.append(compiled(kernels.measure, **given, P=kernels.ROOT, Q=kernels.SAME, BITS=bits, **ROWS))
        codes.append(compiled(kernels.write, **given, BITS=bits, **SIZES))
        codes.append(compiled(kernels.narrow, **given, BITS=bits, **SIZES))
        if bits == 8:
            codes.append(compiled(kernels.take_ties, **given, BITS=bits, **SIZES))
            codes.append(compiled(kernels.write_rows, **given, BLOCK=triton_backend.ROW_BLOCK))
    codes.append(compiled(kernels.measure, **given, P=kernels.POWER, Q=kernels.SQUARE, BITS=0, **ROWS))
    assert all(codes)
    print(len(codes), "kernels")


if __name__ == "__main__":
    main()
