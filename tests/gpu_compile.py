"""Compiles the Triton kernels for sm_90 without a GPU and prints what came out, as JSON.

    python -m tests.gpu_compile

Per kernel: registers, bytes of stack (spilled registers) and instructions. Per rate and side: the
instructions that a thread executes per element in the loop that decodes and multiplies.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nexusquant.kernels.gpu import attend, encode, merge, queries
from nexusquant.kernels.gpu.code import codewords
from nexusquant.kernels.gpu.parts import TILE

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "*i64": ("PARTS",),
    "*i32": (
        "PLACES",
        "PAGE_OF",
        "WORK",
        "SPLIT_PART",
        "ROTARY",
        "RATES",
        "FIRST",
        "BAD",
        "CHUNKS",
    ),
    "*fp16": ("Q", "P"),
    "*u8": ("CODES", "DATA", "GAPS", "BITMAP"),
    "*i1": ("EMPTY",),
}


@triton.jit
def key_loop(
    DATA, FIRST, Q, TABLE, OUT, stride, n, tokens, BITS: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The loop of `attend.logits` at one rate."""
    t, c, lane = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, N), tl.arange(0, 16)
    x, half = tl.zeros((BN, N), tl.float32), tl.arange(0, 2)
    for i in range(n):
        rows = tl.where(half == 0, tl.load(FIRST + 2 * i), tl.load(FIRST + 2 * i + 1))
        q = tl.load(Q + i * 16 * N + lane[:, None] + c[None, :] * 16)
        x = tl.dot(codewords(DATA, rows, stride, t, t < tokens, BITS, TABLE), q, x)
    tl.store(OUT + t[:, None] * N + c[None, :], x)


@triton.jit
def value_loop(
    DATA, P, TABLE, OUT, stride, n, tokens, row_0, row_1, BITS: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The loop of `attend.values` at one rate."""
    c, lane, x = tl.arange(0, N), tl.arange(0, 16), tl.zeros((16, N), tl.float32)
    rows = tl.where(tl.arange(0, 2) == 0, row_0, row_1)
    for i in range(n):
        t = i * BN + tl.arange(0, BN)
        at = P + i * BN * 4 + c[None, :] * BN + tl.arange(0, BN)[:, None]
        p = tl.load(at, mask=(c < 4)[None, :], other=0.0)
        x += tl.dot(tl.trans(codewords(DATA, rows, stride, t, t < tokens, BITS, TABLE)), p)
    tl.store(OUT + lane[:, None] * N + c[None, :], x)


def compiled(fn: Any, constants: dict[str, Any], warps: int, **types: str) -> list[str]:
    """What nvdisasm and the resource report say about a kernel."""
    known = {name: kind for kind, names in POINTERS.items() for name in names}
    known |= {"limit": "fp32", "softcap": "fp32"} | types
    names = fn.arg_names
    signature = {
        name: "constexpr" if name in constants
        else known.get(name, "*fp32" if name.isupper() else "i32")
        for name in names
    }  # fmt: skip
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names) if signature[name].startswith("*")
    }  # fmt: skip
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn, signature, constexprs=values, attrs=aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 3}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        return [_tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)]


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """All of them, and where labels point."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(found)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(code.group(1))
    return found, labels


def longest_loop(sass: str) -> int:
    """Instructions of the longest backward jump."""
    found, labels = instructions(sass)
    longest = 0
    for i, code in enumerate(found):
        jump = re.search(r"BRA.*?(\.L_x_\d+)", code)
        if jump and labels[jump.group(1)] <= i:
            longest = max(longest, i + 1 - labels[jump.group(1)])
    return longest


def kernel(fn: Any, warps: int, types: dict[str, str] | None = None, **constants: Any) -> Any:
    """Resources of one kernel."""
    usage, sass = compiled(fn, constants, warps, **(types or {}))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump reports no registers and stack: {usage}")
    registers, stack = map(int, found.groups())
    return {"registers": registers, "stack": stack, "instructions": len(instructions(sass)[0])}


def main() -> None:
    """Compile everything and print."""
    plain = {"HAS_BIAS": False, "HAS_CAP": False}
    rows = {"ROWS": 4, "Q_LEN": 1, "RP": 4}
    result: dict[str, Any] = {
        "logits": kernel(attend.logits, 1, NP=4, BN=TILE, **rows, **plain),
        "logits, masked": kernel(
            attend.logits, 1, NP=4, BN=TILE, **rows, HAS_BIAS=True, HAS_CAP=True
        ),
        "values": kernel(attend.values, 1, RP=4, RV=16, BN=TILE),
        "exact": kernel(
            attend.exact, 4, DP=128, DVP=128, BN=32, DTYPE=tl.bfloat16, **rows, **plain
        ),
        "merge": kernel(
            merge.merge, 4, RM=16, DP=128, CB=32, HAS_SCALE=True, HAS_MEAN=True, HAS_SINKS=True,
            **rows,
        ),
        "page_queries": kernel(
            queries.page_queries, 8, {"OUT": "*fp16"}, ROWS=4, RP=4, PB=16, WP=128,
            HAS_SCALE=True, HAS_MEAN=True,
        ),
        "positions_of_gaps": kernel(queries.positions_of_gaps, 4, {"OUT": "*i32"}, BLOCK=1024),
        "positions_of_bits": kernel(queries.positions_of_bits, 4, {"OUT": "*i32"}, BLOCK=1024),
        "encode": kernel(
            encode.encode, 8, {"X": "*bf16", "OUT": "*u8"}, BT=16, DP=128, ENTER=True,
            HAS_SCALE=True, HAS_EMPTY=False,
        ),
        "decode": kernel(encode.decode, 1, {"ROWS": "*u8"}, BT=64),
    }  # fmt: skip
    per_element: dict[str, dict[int, float]] = {}
    for side, fn in (("keys", key_loop), ("values", value_loop)):
        for bits in (1, 2, 3, 4):
            _, sass = compiled(fn, {"BITS": bits, "N": 16, "BN": TILE}, 1)
            per_element.setdefault(side, {})[bits] = longest_loop(sass) * 32 / (TILE * 16)
    sys.stdout.write(json.dumps({"kernels": result, "per_element": per_element}) + "\n")


if __name__ == "__main__":
    main()
