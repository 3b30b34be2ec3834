"""What the sparse step of a GPU would cost, counted: ``python -m benchmarks.gpu_step``. Nothing is measured on a GPU.

A step is taken with tensors that have no content, so any size can be counted anywhere. Counted are operators, what they
move, and the most memory that is held at a time, weights and moments included. Model times are of an H200 as it was
measured elsewhere: 790 TFLOP/s in bfloat16 products, 4.3 TB/s from memory; 8 TB/s from its cache is assumed, and 3 µs
for a kernel that does next to nothing.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tailrace.training.architectures import Architecture, BatchTopK, Gated, JumpReLU, ReLU, TopK
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.device.adam import DeviceAdam
from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep
from tailrace.training.kernels.device.traffic import TRAFFIC, Sizes
from tailrace.training.kernels.kernel import StepKernel
from tailrace.training.rows.batches import Batch

SIZES = {
    "gpt2": (768, 24_576),
    "gemma-2-2b": (2304, 65_536),
    "gemma-2-2b wide": (2304, 131_072),
    "llama-3-8b": (4096, 131_072),
}
K, ROWS = 64, 4096
CANDIDATES = 2.0
"""Pairs that are computed exactly, in times those selected: 1.5 to 2.5 were measured on a CPU."""
PRODUCT_FLOPS, FROM_MEMORY, FROM_CACHE, LAUNCH = 0.85 * 790e12, 4.3e12, 8e12, 3e-6

FREE = {
    "aten::alias", "aten::as_strided", "aten::detach", "aten::empty", "aten::empty_strided", "aten::expand",
    "aten::new_empty", "aten::permute", "aten::select", "aten::slice", "aten::squeeze", "aten::t", "aten::transpose",
    "aten::unsqueeze", "aten::view", "aten::_unsafe_view", "aten::empty_like", "aten::unbind",
}  # fmt: skip
"""Operators that start nothing on a device."""


@dataclass
class Cost:
    """What a step asks of a GPU."""

    operators: Counter[str] = field(default_factory=Counter)
    """How often each is called."""
    bytes_moved: Counter[str] = field(default_factory=Counter)
    """Between memory and cache, by operator."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Model times."""
    peak_bytes: int = 0


class Counting(TorchDispatchMode):
    """Counts what the operators inside would cost a GPU. ``sizes``: how many pairs the slots are taken to hold."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.cost, self._sizes = Cost(), sizes
        self._live: dict[int, int] = {}
        self._finalizers: list[Any] = []

    def hold(self, tensors: list[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                self._live[key] = storage.nbytes()
                tensor.__dict__["held"] = storage  # as long as the tensor, so that what becomes of it is seen
                self._finalizers.append(weakref.finalize(storage, self._live.pop, key, None))
        self.cost.peak_bytes = max(self.cost.peak_bytes, sum(self._live.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.hold(made)
        if name in FREE or name.startswith("prim::"):
            return result
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        moved = accessed = sum(int(value.nbytes) for value in [*given, *made])
        if name.startswith("tailrace::"):
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=True))
            declared = TRAFFIC[name.removeprefix("tailrace::")](named, self._sizes).values()
            moved = sum(traffic.from_memory for traffic in declared)
            accessed = sum(traffic.from_cache for traffic in declared)
        elif name == "aten::sort":
            moved = accessed = 4 * moved  # a pass for eight bits of the key
        flops = 0.0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        times = (moved / FROM_MEMORY, accessed / FROM_CACHE, flops / PRODUCT_FLOPS, LAUNCH)
        self.cost.operators[name] += 1
        self.cost.bytes_moved[name] += moved
        self.cost.seconds[name] = self.cost.seconds.get(name, 0.0) + max(times)
        return result


class DeviceObjective(VarianceObjective):
    """The objective by the operators it takes on a GPU; tensors without content pretend to lie on a CPU."""

    def reconstruction(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return mean over rows of ‖predicted − target‖² / V."""
        return F.mse_loss(predicted, target, reduction="sum") / (len(target) * self.total_variance)


def count(architecture: Architecture, width: int, d_sae: int, n_rows: int = ROWS, *, dense: bool = False) -> Cost:
    """Return the cost of a step and its update, of a run that has taken some.

    The dense step's selection counts as one read of the activations, and takes longer.
    """
    with FakeTensorMode():
        transcoder = architecture.build(width, width, d_sae)
        gradients = DeviceGradients(fused=True)
        gradients.trusted = True
        sparse, optimiser = DeviceStep(gradients), DeviceAdam(transcoder, gradients)
        sparse.n_slots = 4 * K * n_rows
        step: StepKernel = DenseStep("bfloat16") if dense else sparse
        batch = Batch(torch.empty(n_rows, width), torch.empty(n_rows, width))
        step(transcoder, batch, DeviceObjective(1.0))
        optimiser.step(1e-3)
        counting = Counting(Sizes(int(CANDIDATES * K * n_rows), K * n_rows))
        state = [*transcoder.state_dict().values(), *batch]
        state += [value for name, value in optimiser.state_tensors().items() if name != "optimiser.n_steps"]
        held = [gradients.screen.features, *(parameter.grad for parameter in transcoder.parameters())]
        with counting:
            counting.hold([*state, *(value for value in held if value is not None)])
            step(transcoder, batch, DeviceObjective(1.0))
            optimiser.step(1e-3)
    return counting.cost


def main() -> None:
    """Print the table."""
    write = sys.stdout.write
    write(f"{'model':16} {'architecture':12} {'operators':>9} {'GB moved':>9} {'peak GB':>8} {'model ms':>9}\n")
    for model, (width, d_sae) in SIZES.items():
        kinds = (TopK(k=K), BatchTopK(k=K), JumpReLU(), ReLU(), Gated())
        for architecture, dense in [*((kind, False) for kind in kinds), (TopK(k=K), True)]:
            cost = count(architecture, width, d_sae, dense=dense)
            name = f"{'dense ' * dense}{architecture.kind}"
            write(
                f"{model:16} {name:12} {cost.operators.total():9} {cost.bytes_moved.total() / 1e9:9.1f} "
                f"{cost.peak_bytes / 1e9:8.2f} {1e3 * sum(cost.seconds.values()):9.2f}\n"
            )
        largest = sorted(cost.seconds.items(), key=lambda item: -item[1])[:8]
        most = ", ".join(f"{name.split('::')[1]} {1e3 * seconds:.2f}" for name, seconds in largest)
        write(f"{'':16} of the last: {most}\n")


if __name__ == "__main__":
    main()
