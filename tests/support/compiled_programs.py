"""Compiles all GPU programs of real steps for GPUs that are not here: ``python -m tests.support.compiled_programs 90``.

Prints a line of JSON for each program and target: registers, bytes spilled and kept on the stack, shared memory. Steps
run on the CPU with launches recorded instead of made, so programs are compiled exactly as they would be launched.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tailrace.training.architectures import Architecture, BatchTopK, Gated, JumpReLU, Matryoshka, TopK
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.kernels.device.adam import DeviceAdam
from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep
from tailrace.training.rows.batches import Batch

OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}

Launch = tuple[Any, tuple[tuple[str, str], ...], tuple[tuple[str, Any], ...], tuple[str, ...], int]
"""Program, signature, constants, arguments that are multiples of 16, warps."""


def launches(steps: Iterator[None]) -> list[Launch]:
    """Return what ``steps`` launch, each kind once."""
    seen: dict[Launch, None] = {}

    def record(program: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        names = program.arg_names[: len(args)]
        signature = tuple((name, kind_of(value)) for name, value in zip(names, args, strict=True))
        aligned = tuple(name for name, value in zip(names, args, strict=True) if is_aligned(value))
        warps = constants.pop("num_warps")
        del constants["enable_fp_fusion"]
        seen[program, signature, tuple(sorted(constants.items())), aligned, warps] = None

    run, JITFunction.run = JITFunction.run, record
    try:
        for _ in steps:
            pass
    finally:
        JITFunction.run = run
    return list(seen)


def kind_of(value: Any) -> str:
    """Return what Triton calls the type of an argument."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def is_aligned(value: Any) -> bool:
    """Tell whether Triton would compile for an argument that is a multiple of 16."""
    number = value.data_ptr() if isinstance(value, Tensor) else value
    return isinstance(number, int) and number % 16 == 0


def real_steps() -> Iterator[None]:
    """Take steps of few rows at the widths of real models."""
    small: list[Architecture] = [BatchTopK(k=64), JumpReLU(), Gated(input_bias=True), Matryoshka(k=64, levels=3)]
    cases: list[tuple[Architecture, int, int, bool]]
    cases = [(TopK(k=64), 768, 24_576, True), (TopK(k=64), 4096, 4096, False), (TopK(k=64), 9216, 2048, True)]
    cases += [(architecture, 768, 4096, True) for architecture in small]
    for architecture, width, d_sae, fused in cases:
        transcoder = architecture.build(width, width, d_sae)
        gradients = DeviceGradients(fused=fused)
        gradients.trusted = True
        step, optimiser = DeviceStep(gradients), DeviceAdam(transcoder, gradients, clip=None if fused else 1.0)
        rows = torch.zeros(2, width)
        step(transcoder, Batch(rows, rows), VarianceObjective(1.0), per_row=True)
        optimiser.step(1e-3)
        yield


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile one program and return what it uses of a processor."""
    program, signature, constants, aligned, warps = launch
    names = program.arg_names
    types = {name: "constexpr" for name in names} | dict(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=program, signature=types, constexprs=dict(constants), attrs=attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [folder / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, shared, local = map(int, found.groups())
    return {
        "program": program.__name__,
        "sm": capability,
        "constants": dict(constants),
        "warps": warps,
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": max(shared, made.metadata.shared),
    }


def main(capabilities: list[int]) -> None:
    """Compile everything and print what it uses."""
    recorded = launches(real_steps())
    for capability in capabilities:
        for launch in recorded:
            sys.stdout.write(json.dumps(compiled(launch, capability)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
