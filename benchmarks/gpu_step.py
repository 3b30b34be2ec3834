"""What the sparse step of a GPU would cost, counted: ``python -m benchmarks.gpu_step``. Nothing is measured on a GPU.

``--peers FOLDER`` counts the TopK step of other projects too, which lie there (``docs/gpu.md``).

A step is taken with tensors that have no content, so any size can be counted anywhere. Counted are operators, what they
move, and the most memory that is held at a time, weights and moments included. Model times are of an H200 as it was
measured elsewhere: 790 TFLOP/s in bfloat16 products, 4.3 TB/s from memory; 8 TB/s from its cache is assumed, and 3 µs
for a kernel that does next to nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu_check import peers
from tailrace.training.architectures import Architecture, BatchTopK, Gated, JumpReLU, ReLU, TopK
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.device.adam import DeviceAdam
from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep
from tailrace.training.kernels.device.traffic import TRAFFIC, Sizes, Traffic
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
    "aten::lift_fresh", "aten::unsqueeze", "aten::view", "aten::_unsafe_view", "aten::empty_like", "aten::unbind",
}  # fmt: skip
"""Operators that start nothing on a device."""
GATHERED = {
    "aten::_embedding_bag": (0, 1, 1),
    "aten::_embedding_bag_backward": (0, 1, 1),
    "aten::_embedding_bag_per_sample_weights_backward": (1, 2, 1),
    "aten::index_add_": (0, 2, 2),
}
"""Operators that look up rows of a table: which argument is the table, which says the rows, and how often each is
accessed."""


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
    n_waits: int = 0
    """How often the host asks the device for a number. Model times leave out what that costs."""


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
        if name in FREE or name.startswith(("prim::", "profiler::")):
            return result
        given = {id(value): value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}.values()
        moved = accessed = sum(int(value.nbytes) for value in [*given, *made, *_changed(func, args)])
        if name.startswith("tailrace::"):
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=True))
            declared = TRAFFIC[name.removeprefix("tailrace::")](named, self._sizes).values()
            moved = sum(traffic.from_memory for traffic in declared)
            accessed = sum(traffic.from_cache for traffic in declared)
        elif name == "aten::sort":
            moved = accessed = 4 * moved  # a pass for eight bits of the key
        elif name in GATHERED:
            where, which, n_times = GATHERED[name]
            table, n_rows = args[where], args[which].numel()
            found = Traffic(n_times * n_rows * (table.nbytes // len(table)), table.nbytes, False, n_times == 2)
            moved += found.from_memory - n_times * table.nbytes
            accessed = moved + found.from_cache - found.from_memory
        flops = 0.0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        times = (moved / FROM_MEMORY, accessed / FROM_CACHE, flops / PRODUCT_FLOPS, LAUNCH)
        self.cost.operators[name] += 1
        self.cost.bytes_moved[name] += moved
        self.cost.seconds[name] = self.cost.seconds.get(name, 0.0) + max(times)
        return result


def _changed(func: Any, args: Any) -> list[Tensor]:
    """Return what an operator changes and does not return, as those for lists do. Adam leaves gradients as they are."""
    if func._schema.returns:
        return []
    named = zip(func._schema.arguments, args, strict=False)
    values = tree_leaves([value for argument, value in named if argument.is_write and argument.name != "grads"])
    return [value for value in values if isinstance(value, Tensor)]


class CountingPeer(Counting):
    """Counts a step that asks the device for numbers, though there are none: 1, or that no feature is dead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        if func is torch.ops.aten._foreach_add_.Tensor:  # Adam's steps, which lie on the host
            return func(*args, **(kwargs or {}))
        if func is not torch.ops.aten._local_scalar_dense.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.cost.n_waits += 1
        try:
            return func(*args)  # a constant
        except DataDependentOutputException:
            return 1.0 if args[0].is_floating_point() else 0


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


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let torch take, for tensors without content that pretend to lie on a CPU, the paths that it takes on a GPU.

    Its autocast differs in little: sums of bfloat16 stay so. Of the three projects' steps, that changes two operators.
    """
    types = [Tensor, torch.nn.Parameter, FakeTensor]
    with (
        mock.patch("torch.nn.Module._apply", lambda module, *_, **__: module),  # what is moved to the device lies there
        mock.patch("torch.optim.optimizer._foreach_supported_types", types),
        mock.patch("torch.utils._foreach_utils._foreach_supported_types", types),
        mock.patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", return_value=["cpu"]),
        mock.patch("torch.optim.adam._get_value", return_value=1.0),  # steps lie on the host: nobody waits for them
    ):
        yield


def count_peer(make: Callable[[str, int, int, int], peers.Step], width: int, d_sae: int, n_rows: int = ROWS) -> Cost:
    """Return the cost of a step that ``make`` returns, of a run that has taken one.

    As for the dense step, ``torch.topk`` counts as one read of the activations, and takes longer.
    """
    counting = CountingPeer(Sizes(0, 0))
    with as_on_a_gpu(), FakeTensorMode(), counting:
        step = make("cpu", width, d_sae, K)
        inputs, outputs = torch.empty(n_rows, width), torch.empty(n_rows, width)
        step(inputs, outputs)
        counting.cost = Cost()
        step(inputs, outputs)
    return counting.cost


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step", description=__doc__)
    parser.add_argument("--peers", type=Path, help="folder of other projects, as pip install --target makes it")
    folder = parser.parse_args().peers
    write_ours()
    if folder is not None:
        sys.path.append(str(folder))
        write_peers()


def write_peers() -> None:
    """Write the table of other projects."""
    write = sys.stdout.write
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # what lies in Triton's programs cannot be counted
    write(
        f"\n{'model':16} {'TopK of':20} {'operators':>9} {'GB moved':>9} {'peak GB':>8} {'model ms':>9} {'waits':>6}\n"
    )
    for model, (width, d_sae) in SIZES.items():
        for make in (peers.saelens, peers.dictionary_learning, peers.sparsify):
            with peers.stand_ins(peers.UNUSED), redirect_stdout(sys.stderr):
                cost = count_peer(make, width, d_sae)
            write(f"{model:16} {make.__name__:20} {numbers(cost)} {cost.n_waits:6}\n")


def numbers(cost: Cost) -> str:
    """Return what every row of a table has."""
    return (
        f"{cost.operators.total():9} {cost.bytes_moved.total() / 1e9:9.1f} "
        f"{cost.peak_bytes / 1e9:8.2f} {1e3 * sum(cost.seconds.values()):9.2f}"
    )


def write_ours() -> None:
    """Write the table of what is here."""
    write = sys.stdout.write
    write(f"{'model':16} {'architecture':12} {'operators':>9} {'GB moved':>9} {'peak GB':>8} {'model ms':>9}\n")
    for model, (width, d_sae) in SIZES.items():
        kinds = (TopK(k=K), BatchTopK(k=K), JumpReLU(), ReLU(), Gated())
        for architecture, dense in [*((kind, False) for kind in kinds), (TopK(k=K), True)]:
            cost = count(architecture, width, d_sae, dense=dense)
            name = f"{'dense ' * dense}{architecture.kind}"
            write(f"{model:16} {name:12} {numbers(cost)}\n")
        largest = sorted(cost.seconds.items(), key=lambda item: -item[1])[:8]
        most = ", ".join(f"{name.split('::')[1]} {1e3 * seconds:.2f}" for name, seconds in largest)
        write(f"{'':16} of the last: {most}\n")


if __name__ == "__main__":
    main()
