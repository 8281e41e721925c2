"""Measuring primitives of tools/analysis_tools/benchmark.py: time, memory, launches, work, rates.

What is compared takes turns in one process (A B A B), so that a machine that slows down slows all
alike. Everything here runs on CPU and on CUDA.
"""
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest.mock import patch

import torch
import torch.nn as nn
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mmgroupmamba.complexity import scan_flops
from mmgroupmamba.models import layers

Step = Callable[[int], Any]  # takes the number of the repeat


class Timing(NamedTuple):
    """Milliseconds of one step."""
    median: float
    p10: float
    p90: float


class Work(NamedTuple):
    """What a forward pass has to do at least.

    Attributes:
        bytes: Input and output of the scan and of every leaf module that has parameters, and every
            parameter once: as if whatever stands between two of them were fused into them.
        flops: Of products and convolutions (2 a multiply-add) and of the scan.
    """
    bytes: int
    flops: int


class Rates(NamedTuple):
    """What the machine does at best: bytes/s of a copy (read and written), FLOP/s of a product."""
    copy: float
    matmul: float


def summary(values: list[float]) -> Timing:
    """Median, 10th and 90th percentile; of a single value, itself three times."""
    if len(values) == 1:
        return Timing(*values * 3)
    tenths = statistics.quantiles(values, n=10, method='inclusive')
    return Timing(statistics.median(values), tenths[0], tenths[-1])


def time_in_turn(steps: dict[str, Step], repeats: int, device: str) -> dict[str, Timing]:
    """Time steps that are warm already, in turn: A B A B ...

    On CUDA the device is idle before each step, and events on it take the time: what the host
    needs to launch the step counts.

    Args:
        steps: Name to function.
        repeats: Steps of each.
        device: 'cpu' or 'cuda'.
    """
    clock = _cuda_ms if device == 'cuda' else _cpu_ms
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats):
        for name, step in steps.items():
            times[name].append(clock(step, repeat))
    return {name: summary(values) for name, values in times.items()}


def _cpu_ms(step: Step, repeat: int) -> float:
    start = time.perf_counter()
    step(repeat)
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(step: Step, repeat: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step(repeat)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copies_past_cache(x: Tensor) -> int:
    """How many copies of an input, taken in turn, fill the GPU's L2 cache twice; 1 on CPU."""
    if x.device.type != 'cuda':
        return 1
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    return max(1, min(1024, math.ceil(2 * cache / (x.numel() * x.element_size()))))


def peak_memory(step: Step, device: str) -> int:
    """Bytes that one step allocates at its peak, beyond what was allocated before it.

    On CUDA the allocator's own ``max_memory_allocated``. On CPU the peak of the sum of torch's
    allocations and frees, as torch.profiler records them: exact and repeatable, while a process's
    RSS counts what malloc keeps and is rounded by it. Memory that oneDNN takes for itself is not
    seen on CPU.
    """
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _profile(ProfilerActivity.CPU, profile_memory=True) as profiler:
        step(0)
    allocations = _allocations(profiler.profiler.kineto_results.experimental_event_tree())
    sizes: dict[int, int] = {}  # what the step made and still holds, by address
    allocated = peak = 0
    for _, address, size in sorted(allocations):
        if size > 0:
            sizes[address] = size
            allocated += size
        else:  # 0 for what an earlier profile saw being made: that is no memory won by this step
            allocated -= sizes.pop(address, 0)
        peak = max(peak, allocated)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and bytes (negative where freed) of what torch allocates, all levels."""
    for event in events:
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _allocations(event.children)


@contextmanager
def _profile(*activities: ProfilerActivity, **options: Any) -> Iterator[profile]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it keeps the events of one cycle
        with profile(activities=activities, **options) as profiler:
            yield profiler


def operator_shares(step: Step, device: str, repeats: int = 5) -> dict[str, float]:
    """Where a step's time goes: operator (kernel on CUDA) to its own share of it, largest first.

    Python between the operators is not in it.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == 'cuda')
    with _profile(*activities) as profiler:
        for repeat in range(repeats):
            step(repeat)
        if device == 'cuda':
            torch.cuda.synchronize()
    own = 'self_device_time_total' if device == 'cuda' else 'self_cpu_time_total'
    times = {event.key: getattr(event, own) for event in profiler.key_averages()
             if not event.key.startswith(('Profiler', '[memory]'))}
    total = sum(times.values())
    return {name: time / total for name, time in
            sorted(times.items(), key=lambda item: -item[1])}


def count_launches(step: Step, device: str) -> int:
    """Kernel launches of a step on CUDA, one for a graph; on CPU the operators of
    PyTorch's own it calls, aten's and oneDNN's.

    These are the calls from Python, from autograd and from inside custom operators, views included;
    what one aten op calls to do its work is part of it.
    """
    if device == 'cuda':
        with _profile(ProfilerActivity.CPU, ProfilerActivity.CUDA) as profiler:
            step(0)
            torch.cuda.synchronize()
        names = (e.name() for e in profiler.profiler.kineto_results.events())
        return sum('LaunchKernel' in name or 'GraphLaunch' in name for name in names)
    with _profile(ProfilerActivity.CPU) as profiler:
        step(0)
    return _outermost_aten_ops(profiler.profiler.kineto_results.experimental_event_tree())


_OPS = 'aten::', 'mkldnn::'  # PyTorch's own


def _outermost_aten_ops(events: Iterable[Any]) -> int:
    return sum(1 if event.name.startswith(_OPS) else _outermost_aten_ops(event.children)
               for event in events)


def count_work(model: nn.Module, x: Tensor, itemsize: int) -> Work:
    """Count a forward pass of a model in plain layers.

    Args:
        model: Called as ``model(x)``, without gradient.
        x: Its input.
        itemsize: Bytes of an element: 4, or 2 where autocast is on.
    """
    elements = sum(p.numel() for p in model.parameters())
    flops = 0

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal elements
        elements += _elements(args) + _elements(output)

    def counted_scan(*args, **kwargs) -> Tensor:
        nonlocal elements, flops
        y = scan(*args, **kwargs)
        elements += _elements((args, y))
        batch, height, width = y.shape[:3]
        channels, states = args[3].shape  # of A
        flops += scan_flops(batch, height * width, channels, states)
        return y

    scan = layers.directional_scan
    handles = [module.register_forward_hook(hook) for module in model.modules()
               if not list(module.children()) and list(module.parameters())]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), patch.object(layers, 'directional_scan', counted_scan), counter:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return Work(elements * itemsize, counter.get_total_flops() + flops)


def _elements(values: Any) -> int:
    if isinstance(values, Tensor):
        return values.numel()
    if isinstance(values, (list, tuple)):
        return sum(map(_elements, values))
    return 0


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """Copy 1 GiB (CPU: 128 MiB) and multiply 8192 (CPU: 1024) square matrices.

    The best of 12 times, or of as many as begin within two seconds.
    """
    numel, n = (2**28, 8192) if device == 'cuda' else (2**25, 1024)
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def best_seconds(step: Step) -> float:
        clock = _cuda_ms if device == 'cuda' else _cpu_ms
        times, end = [], time.monotonic() + 2
        while len(times) < 12 and (not times or time.monotonic() < end):
            times.append(clock(step, len(times)))
        return min(times) / 1e3

    return Rates(copy=2 * 4 * numel / best_seconds(lambda _: target.copy_(source)),
                 matmul=2 * n**3 / best_seconds(lambda _: a @ b))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` and its kin give with NaN, and keep cuDNN and cuBLAS off TF32.

    An output that a kernel did not write, or read before writing it, shows as NaN.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled(),
              torch.utils.deterministic.fill_uninitialized_memory,
              matmul.allow_tf32, cudnn.allow_tf32)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
        matmul.allow_tf32, cudnn.allow_tf32 = before[3:]


def relative_error(got: Optional[Tensor], want: Tensor) -> float:
    """Norm of the difference against the norm of `want`; the difference itself where that is 0.

    None is infinitely wrong; so is NaN, which compares as larger than any tolerance.
    """
    if got is None or got.shape != want.shape:
        return math.inf
    scale = want.norm().item() or 1.
    error = (got.to(want) - want).norm().item() / scale
    return error if math.isfinite(error) else math.inf


def machine(device: str) -> dict[str, Any]:
    """What a measurement's reader has to know of the machine and its libraries."""
    cpu = platform.processor()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        names = [line.partition(':')[2].strip() for line in info.read_text().splitlines()
                 if line.startswith('model name')]
        cpu = names[0] if names else cpu
    backends = torch.backends
    facts = dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(),
                 system=platform.platform(), python=platform.python_version(),
                 torch=torch.__version__,
                 load_average=[round(x, 2) for x in os.getloadavg()])
    if device == 'cuda':
        facts.update(
            gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda,
            cudnn=backends.cudnn.version(), cudnn_benchmark=backends.cudnn.benchmark,
            cudnn_deterministic=backends.cudnn.deterministic,
            tf32_matmul=backends.cuda.matmul.allow_tf32,
            tf32_convolution=backends.cudnn.allow_tf32)
    return facts
