"""CUDA devices that are none: tensors say they lie on cuda:0, and their numbers lie in host memory and are real.

So everything runs to the end and can be compared with the CPU, while what would fail or wait on a GPU does so here:
tensors of two devices in one operator raise, and so does NumPy; every wait for the device and every copy is recorded
with the line that asked for it. What only a GPU can tell stays open: speed, races, the last bits of its products.

Import this before torch is imported, in a process of its own (``python -m tests.support.gpu_cases``): torch looks only
once for what the shim beside this module adds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

N_DEVICES = 4


def _load_shim() -> None:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_folder = Path(spec.origin).parent
    includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    libraries = torch_folder / "lib"
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder) / "shim.so"
        compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
        command = [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", *(f"-I{path}" for path in includes)]
        command += [str(Path(__file__).with_suffix(".cpp")), "-o", str(shim)]
        command += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
        subprocess.run(command, check=True)
        if ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL).pretend() != 1:
            raise RuntimeError("torch was imported before tests.support.pretended_gpu and has no CUDA hooks")


_load_shim()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._mode_utils import no_dispatch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

CPU = torch.device("cpu")

WAITS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_dim",
}
"""Operators after which the host waits for a number, or a size, from the device."""
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
FUSED = {"aten::_fused_adam_", "aten::_fused_adamw_"}


@dataclass
class Record:
    """What a GPU would have been asked for."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often the host would have waited, by operator and line."""
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Copies between host and device: "to the device" or "to the host", and the line."""
    operators: Counter[str] = field(default_factory=Counter)
    """Operators on the device, by name."""
    is_kept: ClassVar[bool] = True
    """What stands for this beside a real GPU says False."""

    def clear(self) -> None:
        """Start anew."""
        for counter in (self.waits, self.copies, self.operators):
            counter.clear()


record = Record()


class Stream:
    """A stream of its own: copies asked for on it are made when somebody waits for them, as late as a GPU may be.

    So what is used too early, or overwritten too early on the host, is not what was copied, and a test sees it.
    """

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._asked: list[Callable[[], Any]] = []
        self._n_made = 0

    def ask(self, copy: Callable[[], Any]) -> None:
        """Make a copy later."""
        with self._lock:
            self._asked.append(copy)

    def make(self, n: int | None = None) -> None:
        """Make the first ``n`` copies that were ever asked for, or all, if that was not done."""
        with self._lock:
            while self._n_made < (len(self._asked) if n is None else n):
                self._asked[self._n_made]()
                self._n_made += 1

    @property
    def n_asked(self) -> int:
        """Copies ever asked for."""
        return len(self._asked)

    def wait_event(self, event: Event) -> None:
        """Let what is asked for later see what was asked for before ``event``."""
        event.make()

    def wait_stream(self, other: Stream) -> None:
        """Let what is asked for later see what ``other`` was asked for."""
        other.make()

    def synchronize(self) -> None:
        """Let the host wait."""
        record.waits["stream", _line()] += 1
        self.make()


class Event:
    """A point in a stream."""

    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        self._point: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Stand behind what ``stream`` was asked for so far."""
        stream = current_stream() if stream is None else stream
        self._point = (stream, stream.n_asked)

    def make(self) -> None:
        """Make the copies before this point."""
        if self._point is not None:
            self._point[0].make(self._point[1])

    def synchronize(self) -> None:
        """Let the host wait; for what was never recorded, nobody does."""
        if self._point is not None:
            record.waits["event", _line()] += 1
            self.make()


_COMPUTING = Stream()
_streams = threading.local()


def current_stream(device: Any = None) -> Stream:
    """Return the stream of this thread."""
    return getattr(_streams, "current", _COMPUTING)


@contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    """Ask ``chosen`` inside."""
    before, _streams.current = current_stream(), chosen
    try:
        yield
    finally:
        _streams.current = before


class CUDAGraph:
    """What was asked of a device while it was recorded; done again, on the same memory, when it is replayed."""

    def __init__(self) -> None:
        self._asked: list[tuple[Any, Any, Any, Any]] = []

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keep a call and where its results lie, all on the host."""
        self._asked.append((func, args, kwargs, result))

    def replay(self) -> None:
        """Ask for everything again."""
        record.operators["graph"] += 1
        for func, args, kwargs, result in self._asked:
            for before, now in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(before, Tensor) and before is not now:
                    before.copy_(now)


_graphs = threading.local()


def _recording() -> CUDAGraph | None:
    return getattr(_graphs, "recording", None)


@contextmanager
def graph(recorded: CUDAGraph, **_: Any) -> Iterator[None]:
    """Record what is asked for inside; what needs an answer from the device is refused."""
    _graphs.recording = recorded
    try:
        yield
    finally:
        _graphs.recording = None


def _refuse_while_recording(what: str) -> None:
    if _recording() is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what} at {_line()})")


_pinned: list[Tensor] = []
"""Kept, so that nothing else comes to lie there."""
limits = SimpleNamespace(can_pin=True, free_bytes=80 << 30, allocated_bytes=0)
"""What the pretended machine has."""


def limit(**machine: Any) -> None:
    """Give the machine other limits, inside ``pretended_gpu``."""
    vars(limits).update(machine)


def _is_pinned(tensor: Tensor) -> bool:
    start = tensor.untyped_storage().data_ptr()
    return any(start == pinned.untyped_storage().data_ptr() for pinned in _pinned)


class DeviceTensor(Tensor):
    """A tensor on a pretended device; ``numbers`` is its content in host memory."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=device,
        )
        made.numbers = numbers
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.device}: {self.numbers!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.detach().clone()
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Raise as CUDA does."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        """Return the values, after a copy to the host."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has a function without the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do on the host what ``func`` would do on the device, with the errors that the device has."""
    name: str = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not on_device and (wanted is None or wanted.type == "cpu"):
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        if not limits.can_pin:
            raise RuntimeError("CUDA error: out of memory")
        _pinned.append(func(*args, **{**kwargs, "pin_memory": False}))
        return _pinned[-1]
    record.operators[name] += 1
    _check_devices(name, args, tensors, on_device)
    if isinstance(generator := kwargs.get("generator"), torch.Generator) and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
    if name in WAITS or _is_boolean_index(name, args):
        _refuse_while_recording(name)
        record.waits[name, _line()] += 1
    first = args[0].device if name == "aten::copy_" else (on_device[0].device if on_device else CPU)
    target = first if wanted is None else wanted
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", 0)
    if name in COPIES:
        source = {tensor.device.type for tensor in tensors} | {target.type}
        if len(source) == 2:
            way = "to the host" if target.type == "cpu" else "to the device"
            is_free = all(map(_is_pinned, (t for t in tensors if t.device.type == "cpu"))) and (
                kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            )
            if not is_free:
                _refuse_while_recording(f"a copy {way}")
            record.copies[f"{way}, without a wait" if is_free else way, _line()] += 1
            if is_free and name == "aten::copy_" and current_stream() is not _COMPUTING:
                source_numbers, target_numbers = _numbers(args[1]), _numbers(args[0])
                current_stream().ask(lambda: target_numbers.copy_(source_numbers))
                return args[0]
    wrappers = {id(tensor.numbers): tensor for tensor in on_device}
    host_args, host_kwargs = tree_map(_numbers, args), tree_map(_numbers, kwargs)
    host_kwargs |= {key: CPU for key in ("device",) if wanted is not None}
    host_kwargs |= {key: False for key in ("pin_memory", "non_blocking") if kwargs.get(key)}
    if func in (torch.ops.aten.mm.dtype, torch.ops.aten.bmm.dtype):  # of CUDA alone: operands in bfloat16, sums wider
        func, wide = getattr(torch.ops.aten, name.removeprefix("aten::")).default, host_args[2]
        host_args = tuple(operand.to(wide) for operand in host_args[:2])
    result = func(*host_args, **host_kwargs)
    if (recorded := _recording()) is not None:
        recorded.note(func, host_args, host_kwargs, result)
    if torch.Tag.inplace_view in func.tags:
        _change_shape(func, args, kwargs)

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DeviceTensor):
            return value
        if id(value) in wrappers:
            return wrappers[id(value)]
        return value if target.type == "cpu" else DeviceTensor(value, target)

    return tree_map(wrap, result)


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, DeviceTensor) else value


def _check_devices(name: str, args: tuple[Any, ...], tensors: list[Tensor], on_device: list[DeviceTensor]) -> None:
    """Raise where CUDA would: two devices in one operator. Scalars of the host are passed by value."""
    if name in COPIES or not on_device:
        return
    if name in FUSED:  # its kernel reads every state, the step count too, through a pointer
        tensors = [tensor for part in args[:6] for tensor in part]
        foreign = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    else:
        foreign = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.ndim]
    if (
        foreign
        and name in INDEXING
        and isinstance(args[0], DeviceTensor)
        and not any(v is foreign[0] for v in args[2:])
    ):
        record.waits[f"{name} with an index on the host", _line()] += 1
        return
    devices = {str(tensor.device) for tensor in [*on_device, *foreign]}
    if len(devices) > 1:
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(devices))}, at {_line()}"
        )


def _is_boolean_index(name: str, args: tuple[Any, ...]) -> bool:
    """Tell whether the size of a selection must reach the host; putting one number through one mask needs none."""
    if name not in INDEXING:
        return False
    indices = [index for index in args[1] if index is not None]
    if not any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return False
    return not (len(args) > 2 and args[2].numel() == 1 and len(indices) == 1)


def _change_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the wrapper itself the new sizes of ``squeeze_`` and the like."""
    with no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def _line() -> str:
    """Return the innermost line of the project that is running, as file:line, and whether not in the main thread."""
    beside = "" if threading.current_thread() is threading.main_thread() else " (in another thread)"
    frame = sys._getframe(1)
    while frame is not None:
        folder, _, name = frame.f_code.co_filename.rpartition("/tailrace/")
        if folder:
            return f"{name}:{frame.f_lineno}{beside}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "outside the project"


class _Mode(TorchDispatchMode):
    """Sees what makes tensors, too, where no argument is on a device yet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


_run_thread = threading.Thread.run


def _run_thread_in_mode(thread: threading.Thread) -> None:
    torch._C._set_only_lift_cpu_tensors(True)  # of this thread; so is the mode
    with _Mode():
        _run_thread(thread)


# Inference tensors cannot be wrapped. Decorators take the function on import of their module, so it is replaced now.
torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()  # type: ignore[assignment,misc,return-value]

_PROPERTIES = SimpleNamespace(
    name="pretended", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0, gcnArchName=""
)
_IN_TORCH = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: N_DEVICES,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.set_device": lambda device: None,
    "torch.cuda.get_device_properties": lambda *_: _PROPERTIES,
    "torch.cuda.get_device_name": lambda *_: "pretended GPU",
    "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
    "torch.cuda.is_current_stream_capturing": lambda: _recording() is not None,
    "torch.cuda.CUDAGraph": CUDAGraph,
    "torch.cuda.graph": graph,
    "torch.cuda.synchronize": lambda *_: record.waits.update([("synchronize", _line())]),
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda.Stream": Stream,
    "torch.cuda.Event": Event,
    "torch.cuda.stream": stream,
    "torch.cuda.current_stream": current_stream,
    "torch.cuda.mem_get_info": lambda *_: (limits.free_bytes, 80 << 30),
    "torch.cuda.memory_allocated": lambda *_: limits.allocated_bytes,
    "torch.cuda.max_memory_allocated": lambda *_: limits.allocated_bytes,
    "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "threading.Thread.run": _run_thread_in_mode,
}


@contextmanager
def pretended_gpu() -> Iterator[Record]:
    """Offer four CUDA devices inside; yield the record of what they are asked for, begun anew."""
    record.clear()
    _pinned.clear()
    lifted = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for name, replacement in _IN_TORCH.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.callback(limits.__dict__.update, vars(limits).copy())
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_Mode())
        yield record
