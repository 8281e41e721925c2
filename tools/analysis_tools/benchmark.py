"""Time the scan, a layer, the backbone and whole models side by side, after comparing results.

    python tools/analysis_tools/benchmark.py
    python tools/analysis_tools/benchmark.py --subjects backbone --sizes detection \\
        --passes forward+backward --official ../GroupMamba --amp bf16 --json out.json
    python tools/analysis_tools/benchmark.py --subjects classifier --sizes imagenet \\
        --against swin-tiny convnext-tiny --channels-last --compile

First the gate: with fresh random weights and inputs, and uninitialised memory full of NaN, every
scan backend and the official model are compared with ours in float64, outputs and, where a pass
has a backward, gradients.
Then all take turns (A B A B ...) in this process. One table is printed.

Sizes: {presets}, or your own such as 800x1333 (with --batch).

An official checkout (--official) is imported from your folder, nothing of it is in this package.
Its column gradients, wrong for H != W, and its kernels where they are missing are replaced from
here, and the cuDNN flags that its import sets are set back; the output says so.
"""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import json
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

# torch's profiler talks of what is no trouble here: no GPU, memory that is older than it
os.environ.setdefault('KINETO_LOG_LEVEL', '5')
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmgroupmamba.benchmarking import measure
from mmgroupmamba.complexity import markdown_table
from mmgroupmamba.benchmarking.contestants import (
    OF_A_MAP,
    SUBJECTS,
    TASKS,
    Contestant,
    Official,
    Ours,
    Peer,
    Spec,
    core,
)
from mmgroupmamba.launch import LaunchError, Parser, one_line, run_tool
from mmgroupmamba.models import fuse
from mmgroupmamba.models.groupmamba import ARCHS, MIN_SIZE
from mmgroupmamba.ops import FUSED_OPS, available_backends, check_backend, check_fused_ops

PRESETS = {  # (H, W, batch)
    'imagenet': [(224, 224, 128)],
    'latency': [(224, 224, 1)],
    'segmentation': [(512, 512, 4)],
    'detection': [(800, 1344, 2)],
    'sweep': [(side, side, 1) for side in (224, 448, 896, 1344, 1792)],
    # as many pixels at once, or a few more: small images alone leave a GPU idle
    'sweep-filled': [(224, 224, 64), (448, 448, 16), (896, 896, 4), (1344, 1344, 2),
                     (1792, 1792, 1)],
}
PASSES = ('forward', 'forward+backward', 'train-step')
DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16}
GATE_BATCH = 2
# relative errors against float64: (outputs, gradients); of the scan and layer, of whole networks
TOLERANCES = {True: (1e-5, 1e-4), False: (1e-4, 1e-3)}
# what a graph gives against the same pass without: outputs, and gradients in float32 and under
# autocast. Under capture cuBLAS may take another algorithm, and what rounds otherwise in half
# precision grows with the network; so may a peer's outputs, which are not compared else
GRAPH_TOLERANCE = 1e-3
GRAPH_GRADIENT_TOLERANCES = {True: 0.2, False: 1e-2}
STEM_TOLERANCE = 1e-2  # in float32 a ReLU's input near 0 may fall on its other side
AMP_TOLERANCE = 0.5  # reported, and compared with the official one; this only stops nonsense
PROFILE_LINES = 14  # operators of each measurement
LOOP_LIMIT = 2**12  # tokens up to which the reference loop is the gate's truth


class Size(NamedTuple):
    height: int
    width: int
    batch: int

    def __str__(self) -> str:
        return f'{self.height}x{self.width} b{self.batch}'


class Mode(NamedTuple):
    """How a model is run; the flags add such rows beside the plain one."""
    with_cp: bool = False
    folded: bool = False
    fused_ops: bool = False
    channels_last: bool = False
    compiled: bool = False
    graph: bool = False

    def __str__(self) -> str:
        return ''.join(f' {name}' for name, on in self._asdict().items() if on)


class Row:
    """A contestant in one mode for one subject, on the device, and its steps."""

    def __init__(self, contestant: Contestant, mode: Mode, subject: str, args: argparse.Namespace,
                 weights: dict[str, Tensor]) -> None:
        self.label = f'{contestant.name}{mode}'
        self.contestant, self.mode, self.args = contestant, mode, args
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # the same heads for all
            self.module = contestant.build(Spec(
                subject, args.arch, args.stage, mode.with_cp,
                tuple(args.fused_ops) if mode.fused_ops else ()))
        if weights:
            contestant.load(self.module, weights)
        self.module.to(args.device)
        if mode.folded:
            fuse(self.module)
        if mode.channels_last:
            self.module.to(memory_format=torch.channels_last)
        self.subject = subject
        self.run = self.module
        if mode.compiled:
            self.run = torch.compile(self.module, mode=args.compile, dynamic=False)

    def fold_for(self, amp: Optional[str]) -> None:
        """Cast what autocast would in every pass; float32 is no way to run it afterwards."""
        if self.mode.folded and amp:
            fuse(self.module, DTYPES[amp])

    def prepare(self, x: Tensor) -> Tensor:
        """An input in the layout that this one expects."""
        if self.mode.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.module.prepare(x) if hasattr(self.module, 'prepare') else x

    def finish(self, outputs: Any) -> tuple[Tensor, ...]:
        """Outputs as all contestants have them."""
        return as_tuple(self.module.finish(outputs) if hasattr(self.module, 'finish') else outputs)

    def cast(self, x: Tensor, amp: Optional[str]) -> Tensor:
        """The scan's input comes from a convolution: in half precision where autocast is on."""
        return x.to(DTYPES[amp]) if amp and self.subject == 'scan' else x

    def autocast(self, amp: Optional[str], cache: bool = True) -> AbstractContextManager:
        if not amp:
            return nullcontext()
        return torch.autocast(self.args.device, DTYPES[amp], cache_enabled=cache)

    def step(self, which: str, x: Tensor) -> measure.Step:
        """The function of a pass; inputs rotate past the GPU's cache."""
        self.fold_for(self.args.amp)
        x = self.prepare(self.cast(x, self.args.amp)).detach()
        inputs = [x.clone() for _ in range(measure.copies_past_cache(x))]
        if which == 'forward':
            return self._forward(inputs)
        self.module.train()
        for one in inputs:
            one.requires_grad_(self.subject in OF_A_MAP)
        optimizer = None
        if which == 'train-step':
            optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6,
                                          capturable=self.mode.graph)
        cotangents: list[Tensor] = []

        def train(one: Tensor, cache: bool = True) -> None:
            self.clear(one)
            with self.autocast(self.args.amp, cache):
                outputs = as_tuple(self.run(one))
            if not cotangents:
                cotangents.extend(torch.ones_like(y) for y in outputs)
            with torch.autograd.set_multithreading_enabled(not self.args.calling_thread):
                torch.autograd.backward(outputs, cotangents)
            if optimizer is not None:
                optimizer.step()

        def step(i: int) -> None:
            train(inputs[i % len(inputs)])

        if not self.mode.graph:
            return step
        static = torch.randn_like(inputs[0]).requires_grad_(inputs[0].requires_grad)
        replay = self._capture(lambda: train(static, cache=False), static, inputs)
        replay(0)
        got = self._gradients()
        step(0)
        self._compare_graph('gradients', (got, ), (self._gradients(), ),
                            GRAPH_GRADIENT_TOLERANCES[bool(self.args.amp)])
        return replay

    def _compare_graph(self, what: str, got: tuple, want: tuple, tolerance: float) -> None:
        error = max(measure.relative_error(g, w) for g, w in zip(got, want))
        if not error < tolerance:
            raise LaunchError(f'{self.label} is wrong: the graph gives other {what}, by '
                              f'{error:.1e}')

    def _gradients(self) -> Tensor:
        """All in one: one of them alone may be noise."""
        return torch.cat([p.grad.flatten().float() for p in self.module.parameters()
                          if p.grad is not None])

    def _capture(self, run: Callable[[], Any], static: Tensor, inputs: list[Tensor]
                 ) -> measure.Step:
        """A step that replays `run`, which reads `static`, as a CUDA graph on each input in turn.

        As https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. `static` holds something
        else while it is captured, so that a graph that does not read it is found out.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()

        def replay(i: int) -> Any:
            with torch.no_grad():
                static.copy_(inputs[i % len(inputs)])
            graph.replay()
            return outputs

        replay.captured = run  # with what the graph reads besides: cotangents, AdamW's moments
        return replay

    def clear(self, *inputs: Tensor) -> None:
        for tensor in (*self.module.parameters(), *inputs):
            tensor.grad = None

    def state_bytes(self, which: str) -> int:
        """Bytes of parameters and buffers, and of AdamW's two moments in a training step."""
        parameters = sum(p.numel() * p.element_size() for p in self.module.parameters())
        buffers = sum(b.numel() * b.element_size() for b in self.module.buffers())
        return parameters * (3 if which == 'train-step' else 1) + buffers

    def _forward(self, inputs: list[Tensor]) -> measure.Step:
        self.module.eval()
        run = self.run

        def step(i: int) -> Any:
            with torch.no_grad(), self.autocast(self.args.amp):
                return run(inputs[i % len(inputs)])

        if not self.mode.graph:
            return step
        static = torch.randn_like(inputs[0])

        def once() -> Any:
            # autocast's cache of cast weights must not outlive the capture
            with torch.no_grad(), self.autocast(self.args.amp, cache=False):
                return run(static)

        replay = self._capture(once, static, inputs)
        tolerance = GRAPH_TOLERANCE
        if not self.contestant.gated:
            tolerance = GRAPH_GRADIENT_TOLERANCES[bool(self.args.amp)]
        self._compare_graph('outputs', as_tuple(replay(0)), as_tuple(step(0)), tolerance)
        return replay


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs, )


class Truth:
    """Outputs and gradients of ours in float64, and what they are the answer to."""

    def __init__(self, subject: str, args: argparse.Namespace, size: Size,
                 weights: dict[str, Tensor]) -> None:
        self.x = make_input(subject, args, size._replace(batch=min(size.batch, GATE_BATCH)))
        shape = self.x.shape
        tokens = shape[1] * shape[2] if subject in OF_A_MAP else shape[2] * shape[3] // 16
        self.backend = 'reference' if tokens <= LOOP_LIMIT else 'blocked'
        ours = Ours(self.backend)
        row = Row(ours, Mode(), subject, args, weights)
        row.module.double()
        self.output = self.evaluate(row, self.x.double())
        self.names = [name.removeprefix('backbone.') for name, _ in
                      core(row.module).named_parameters() if 'skip_scale' not in name]
        self.cotangents: list[Tensor] = []
        self.gradients = {}
        if args.passes != ['forward']:
            self.gradients = self.differentiate(row, self.x.double())

    @staticmethod
    def evaluate(row: Row, x: Tensor, amp: Optional[str] = None) -> tuple[Tensor, ...]:
        row.module.eval()
        with torch.no_grad(), row.autocast(amp):
            return row.finish(row.run(row.prepare(row.cast(x, amp))))

    def differentiate(self, row: Row, x: Tensor) -> dict[str, Tensor]:
        """Gradients by our names, and of the input."""
        row.module.train()
        for module in row.module.modules():
            if isinstance(module, _BatchNorm):
                module.eval()  # statistics of small maps make noise of the stem's gradients
        row.module.zero_grad()
        x = x.clone().requires_grad_()
        outputs = row.finish(row.run(row.prepare(x)))
        if not self.cotangents:
            self.cotangents = [torch.randn_like(y) for y in outputs]
        torch.autograd.backward(outputs, [c.to(y) for c, y in zip(self.cotangents, outputs)])
        found = {**row.contestant.gradients(row.module, self.names), 'the input': x.grad}
        row.module.zero_grad()
        return {name: found.get(name) for name in (*self.names, 'the input')}

    def check(self, row: Row, subject: str) -> float:
        """Compare one row in float32; the relative error of its output in the precision timed.

        Raises:
            LaunchError: It is wrong.
        """
        tolerances = TOLERANCES[subject in OF_A_MAP]
        with measure.poisoned_memory(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of operations without a deterministic kernel
            error = self._compare('output', self.output, self.evaluate(row, self.x), row,
                                  tolerances[0])
            gradients = {}
            if self.gradients and not row.mode.folded:
                gradients = self.differentiate(row, self.x)
            for name, got in gradients.items():
                want = self.gradients[name]
                if want is None:
                    continue
                before_relu = '.convs.' in name or name == 'the input' and subject not in OF_A_MAP
                self._compare(f'gradient of {name}', (want, ), (got, ), row,
                              STEM_TOLERANCE if before_relu else tolerances[1])
        if amp := row.args.amp:
            row.fold_for(amp)
            output = self.evaluate(row, self.x, amp)
            error = self._compare(f'{amp} output', self.output, output, row, AMP_TOLERANCE)
        return error

    def _compare(self, what: str, want: tuple, got: tuple, row: Row, tolerance: float) -> float:
        if len(got) != len(want):
            raise LaunchError(f'{row.label} is wrong: {len(got)} outputs for {len(want)}')
        error = max(measure.relative_error(g, w) for g, w in zip(got, want))
        if not error <= tolerance:
            raise LaunchError(
                f'{row.label} is wrong: {what} differs from {self.backend} in float64 by '
                f'{error:.1e}, more than {tolerance:.0e}; input {tuple(self.x.shape)}')
        return error


def make_input(subject: str, args: argparse.Namespace, size: Size) -> Tensor:
    """A random map (B, H, W, C) of the stage for scan and layer, else images (B, 3, H, W)."""
    if subject not in OF_A_MAP:
        return torch.randn(size.batch, 3, size.height, size.width, device=args.device)
    height, width = (math.ceil(side / 2**(args.stage + 1)) for side in size[:2])
    channels = Spec(subject, args.arch, args.stage).channels
    x = torch.randn(size.batch, height, width, channels, device=args.device)
    return x.to(DTYPES[args.amp]).float() if args.amp and subject == 'scan' else x


class Benchmark:
    """All measurements of a command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.notes: list[str] = []
        self.results: list[dict] = []
        self.contestants = self._contestants()
        labels = {f'{c.name}{mode}' for subject in args.subjects for c in self.of(subject)
                  for mode in self.modes(c, subject)}
        if args.baseline and args.baseline not in labels:
            raise LaunchError(f'--baseline {args.baseline}: there is no such row, only '
                              f'{", ".join(sorted(labels))}')
        dtype = DTYPES[args.amp] if args.amp else torch.float32
        self.rates = measure.measure_rates(args.device, dtype)

    def _contestants(self) -> list[Contestant]:
        args = self.args
        names = args.backends
        if names is None:
            names = [n for n, reason in available_backends(args.device).items() if reason is None]
        for name in names:
            check_backend(name, args.device)
            if name == 'auto':
                raise LaunchError("--backends auto: name what 'auto' takes, so that the table "
                                  'says it')
        contestants: list[Contestant] = []
        if args.official:
            if args.official_scan not in ('auto', 'loop'):
                check_backend(args.official_scan, args.device)
            official = Official(args.official, args.official_scan, args.device)
            self.notes += official.notes
            contestants.append(official)
        contestants += map(Ours, dict.fromkeys(names))
        contestants += map(Peer, dict.fromkeys(args.against))
        return contestants

    def of(self, subject: str) -> list[Contestant]:
        """Who takes part in a subject: the Python loop only in the scan's unless asked for."""
        return [c for c in self.contestants if subject in c.subjects and not (
            c.name == 'reference' and subject != 'scan' and self.args.backends is None)]

    def modes(self, contestant: Contestant, subject: str) -> list[Mode]:
        args = self.args
        layouts = [False, True] if args.channels_last and subject not in OF_A_MAP else [False]
        modes = [Mode(channels_last=layout, compiled=compiled)
                 for compiled in ([False, True] if args.compile else [False])
                 for layout in layouts]
        if args.with_cp and isinstance(contestant, Ours) and subject not in OF_A_MAP:
            modes.append(Mode(with_cp=True))
        if args.fuse and isinstance(contestant, Ours):
            modes.append(Mode(folded=True))
        best = Mode()
        if isinstance(contestant, Ours):
            best = Mode(folded=args.fuse, fused_ops=bool(args.fused_ops) and subject != 'scan')
        if best.fused_ops:
            modes.append(Mode(fused_ops=True))
        modes.append(best)
        if args.cuda_graph:
            modes += [Mode(graph=True), best._replace(folded=False, graph=True),
                      best._replace(graph=True)]
        return list(dict.fromkeys(modes))

    def run(self) -> None:
        for subject in self.args.subjects:
            for size in self.args.sizes:
                self._run(subject, size)

    def _run(self, subject: str, size: Size) -> None:
        args = self.args
        contestants = self.of(subject)
        if not contestants:
            raise LaunchError(f'nothing to time for {subject}: name --backends')
        print(f'{subject} {size}: {", ".join(c.name for c in contestants)}', file=sys.stderr)
        # the heads of a task are one code for all: what goes into them is compared
        gated = 'backbone' if subject in TASKS else subject
        ours = Ours('blocked')
        weights = ours.weights(ours.build(Spec(gated, args.arch, args.stage)))
        truth = Truth(gated, args, size, weights)
        rows, errors = [], {}
        for contestant in contestants:
            for mode in self.modes(contestant, subject):
                try:
                    if contestant.gated:
                        row = Row(contestant, mode, gated, args, weights)
                        errors[row.label] = truth.check(row, gated)
                    rows.append(Row(contestant, mode, subject, args, weights))
                except Exception as error:
                    self._leave_out(f'{subject} {size}', contestant, mode, error)
        del truth
        if args.compile:
            torch.compiler.reset()  # forget what the gate compiled
        x = make_input(subject, args, size)
        work = self._work(subject, size, contestants, x)
        rows = [row for row in rows if row.contestant.name in work]
        for which in args.passes:
            self._time(subject, size, which, rows, x, work, errors)

    def _work(self, subject: str, size: Size, contestants: list[Contestant],
              x: Tensor) -> dict[str, measure.Work]:
        """What each contestant's forward pass costs at least; ours counts for the official one."""
        work = {}
        for contestant in contestants:
            counted = Ours('blocked') if contestant.gated else contestant
            try:
                row = Row(counted, Mode(), subject, self.args, {})
                row.module.eval()
                work[contestant.name] = measure.count_work(
                    row.module, row.prepare(x), 2 if self.args.amp else 4)
            except Exception as error:
                self._leave_out(f'{subject} {size}', contestant, Mode(), error)
        return work

    def _time(self, subject: str, size: Size, which: str, rows: list[Row], x: Tensor,
              work: dict[str, measure.Work], errors: dict[str, float]) -> None:
        args = self.args
        steps, records = {}, {}
        for row in rows:
            if row.mode.folded and which != 'forward' or row.mode.with_cp and which == 'forward':
                continue
            record = dict(subject=subject, size=str(size), height=size.height, width=size.width,
                          batch=size.batch, pass_=which, what=row.label,
                          error=errors.get(row.label))
            try:
                start = time.perf_counter()
                step = row.step(which, x)
                step(0)
                record['first_call_s'] = time.perf_counter() - start
                row.clear()
                record['launches'] = None
                if self.args.device == 'cuda' or not row.mode.compiled:
                    record['launches'] = measure.count_launches(step, self.args.device)
                row.clear()
                record['peak_bytes'] = None
                if not self._is_graph(row):  # whose memory is taken once and for all
                    own = row.state_bytes(which) + x.numel() * x.element_size()
                    record['peak_bytes'] = own + measure.peak_memory(step, self.args.device)
            except Exception as error:
                self._leave_out(f'{subject} {size} {which}', row.contestant, row.mode, error)
                row.clear()
                continue
            if row.mode.compiled:
                self.notes.append(f'{subject} {size} {which}, {row.label}: first call '
                                  f'{record["first_call_s"]:.1f} s')
            steps[row.label], records[row.label] = step, record
        if not steps:
            return
        if args.profile:
            for label, step in steps.items():
                records[label]['operators'] = measure.operator_shares(step, args.device)
        times = measure.time_in_turn(steps, self.args.repeats, self.args.device)
        for row in rows:
            row.clear()
        base = self.args.baseline or next(iter(times))
        for label, timing in times.items():
            seconds = timing.median / 1e3
            records[label].update(
                median_ms=timing.median, p10_ms=timing.p10, p90_ms=timing.p90,
                ratio=times[base].median / timing.median if base in times else None,
                images_per_s=size.batch / seconds,
                ns_per_pixel=1e9 * seconds / (size.batch * size.height * size.width))
            if subject != 'mask-rcnn' or which == 'forward':  # it trains on other proposals
                cost = work[next(row.contestant.name for row in rows if row.label == label)]
                passes = 1 if which == 'forward' else 3  # backward is two more
                records[label].update(
                    bytes=passes * cost.bytes, flops=passes * cost.flops,
                    of_copy_rate=passes * cost.bytes / seconds / self.rates.copy,
                    of_matmul_rate=passes * cost.flops / seconds / self.rates.matmul)
            self.results.append(records[label])

    def _leave_out(self, where: str, contestant: Contestant, mode: Mode, error: Exception) -> None:
        """Note what memory does not hold, what cannot be compiled or captured, and a peer that
        does not take the size; raise the rest."""
        memory = isinstance(error, torch.cuda.OutOfMemoryError)
        if contestant.gated and (isinstance(error, LaunchError) or mode == Mode() and not memory):
            raise error
        self.notes.append(f'{where}, {contestant.name}{mode}: not timed, {type(error).__name__}: '
                          f'{one_line(error)}')

    def _is_graph(self, row: Row) -> bool:
        return row.mode.graph or row.mode.compiled and self.args.compile == 'reduce-overhead'

    def table(self) -> str:
        launches = 'launches' if self.args.device == 'cuda' else 'aten ops'
        header = ['subject', 'size', 'pass', 'what', 'median ms', 'p10', 'p90', 'ratio', 'img/s',
                  'ns/pixel', 'peak MB', launches, 'GB', 'GFLOP', '% copy', '% matmul', 'error']
        columns = [  # key, factor, format
            ('median_ms', 1, '.3f'), ('p10_ms', 1, '.3f'), ('p90_ms', 1, '.3f'),
            ('ratio', 1, '.2f'), ('images_per_s', 1, '.1f'), ('ns_per_pixel', 1, '.1f'),
            ('peak_bytes', 1e-6, '.1f'), ('launches', 1, 'd'), ('bytes', 1e-9, '.3f'),
            ('flops', 1e-9, '.2f'), ('of_copy_rate', 100, '.1f'), ('of_matmul_rate', 100, '.1f'),
            ('error', 1, '.0e')]
        rows = []
        for r in self.results:
            cells = [r['subject'], r['size'], r['pass_'], r['what']]
            cells += ['' if r.get(key) is None else f'{factor * r[key]:{style}}'
                      for key, factor, style in columns]
            rows.append(cells)
        return markdown_table(header, rows)

    def profile(self) -> str:
        """The operators' shares of each measurement, the first of each."""
        rows = []
        for r in self.results:
            for name, share in list(r['operators'].items())[:PROFILE_LINES]:
                rows.append([name, f'{100 * share:.1f}', r['subject'], r['size'], r['pass_'],
                             r['what']])
        return markdown_table(['operator', '% of the time of', 'subject', 'size', 'pass', 'what'],
                              rows)

    def report(self) -> str:
        """Machine, table, and what a reader has to know to read it."""
        args = self.args
        facts = measure.machine(args.device)
        place = f'{facts["cpu"]}, {facts["threads"]} of {facts["cores"]} cores'
        if args.device == 'cuda':
            place = facts['gpu']
        peak = ('max_memory_allocated' if args.device == 'cuda' else
                "peak of torch's allocations, oneDNN's own left out")
        tolerances = [' and '.join(f'{t:.0e}' for t in TOLERANCES[of_map])
                      for of_map in (True, False)]
        lines = [
            f'GroupMamba {args.arch}, {args.amp or "float32"}, {place}, torch {facts["torch"]}, '
            f'{datetime.now(timezone.utc):%Y-%m-%d}',
            f'copy {self.rates.copy / 1e9:.1f} GB/s, matmul {self.rates.matmul / 1e12:.3f} TFLOP/s '
            '(measured)',
            '', self.table(), '',
            f'ratio: against {args.baseline or "the first row of a pass"}. peak MB: parameters, '
            f'buffers, one input and {peak}. GB, GFLOP: what the plain model moves and computes '
            'at least, three times that with backward; % of the measured rates.',
            f'gate: in float32 against ours in float64, batch <= {GATE_BATCH}, memory full of NaN; '
            'relative tolerance of output and (where a pass has a backward) gradients '
            f"{tolerances[0]} for scan and layer, {tolerances[1]} else, the stem's gradients "
            f"{STEM_TOLERANCE}, without skip_scale, "
            f"BatchNorm in eval mode; truth is the reference loop up to {LOOP_LIMIT} tokens, above "
            'it blocked. error: of the output in the precision timed. Peers are not compared; of '
            'mask-rcnn and upernet the backbone is.']
        if args.calling_thread:
            lines.append('backward passes run on the calling thread')
        lines += dict.fromkeys(self.notes)
        if args.profile:
            lines += ['', self.profile()]
        return '\n'.join(lines)

    def write(self, path: str, command: list[str]) -> None:
        data = dict(
            command=shlex.join(command), date=datetime.now(timezone.utc).isoformat(' ', 'seconds'),
            machine=measure.machine(self.args.device), device=self.args.device,
            arch=self.args.arch, stage=self.args.stage, amp=self.args.amp,
            repeats=self.args.repeats, rates=self.rates._asdict(), notes=self.notes,
            results=[{k.rstrip('_'): v for k, v in r.items()} for r in self.results])
        Path(path).write_text(json.dumps(data, indent=1) + '\n')


class _Parser(argparse.ArgumentParser):
    error = Parser.error


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no positive whole number')
    return int(text)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    presets = '; '.join(f'{name} ({", ".join(str(Size(*size)) for size in sizes)})'
                        for name, sizes in PRESETS.items())
    parser = _Parser(description=__doc__.format(presets=presets),
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--subjects', nargs='+', choices=SUBJECTS, default=['scan', 'layer', 'backbone'],
        help='; '.join(f'{name}: {what}' for name, what in SUBJECTS.items()))
    add('--passes', nargs='+', choices=PASSES, default=list(PASSES[:2]),
        help='train-step has an AdamW step besides')
    add('--sizes', nargs='+', default=['latency'], metavar='SIZE',
        help=f'HxW of the image, or one of {", ".join(PRESETS)}')
    add('--batch', type=positive, help="in place of the presets'; 1 for your own sizes")
    add('--arch', choices=ARCHS, default='tiny')
    add('--stage', type=int, choices=(1, 2, 3, 4), default=1, help='of scan and layer')
    add('--backends', nargs='+', metavar='BACKEND',
        help='default: all that run on the device; the reference loop for scan only')
    add('--official', metavar='PATH', help='folder of an official checkout')
    add('--official-scan', default='auto', choices=['auto', 'loop', *available_backends()],
        help='what scans in the official layers; auto: their own CUDA extension, else mamba_ssm '
        'on CUDA, else a lean loop in Python, linear in L')
    add('--against', nargs='+', default=[], metavar='PEER',
        help='swin-tiny, convnext-tiny, any name of mmpretrain or timm, or FILE.py:FUNCTION')
    add('--baseline', metavar='ROW', help="what ratios are against, such as 'official compiled'")
    add('--with-cp', action='store_true', help='one more row of ours: blocks recomputed')
    add('--fuse', action='store_true',
        help='one more row of ours: folded for inference by mmgroupmamba.models.fuse')
    add('--fused-ops', nargs='*', choices=FUSED_OPS, metavar='OP',
        help='one more row of ours: these run as one Triton kernel each, all if none is named: '
        f'{", ".join(FUSED_OPS)}')
    add('--channels-last', action='store_true', help='one more row of each: channels-last images')
    add('--compile', nargs='?', const='default', metavar='MODE',
        choices=['default', 'reduce-overhead', 'max-autotune'],
        help='one more row of each: torch.compile (and with --channels-last, of both)')
    add('--cuda-graph', action='store_true',
        help='one more row of each, two of ours with --fuse or --fused-ops: the pass as a CUDA '
        'graph')
    add('--amp', choices=DTYPES, help='autocast for all')
    add('--calling-thread', action='store_true',
        help="backward passes run on the calling thread, for all: handing them to autograd's GPU "
        'thread takes as long as a short pass')
    add('--cudnn-benchmark', action='store_true', help='let cuDNN try its algorithms, for all')
    add('--device', choices=['cpu', 'cuda'],
        default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--profile', action='store_true', help='a second table: the share of each operator')
    add('--threads', type=positive, default=torch.get_num_threads())
    add('--repeats', type=positive, default=20)
    add('--seed', type=int, default=0)
    add('--json', metavar='FILE', help='write everything there')
    args = parser.parse_args(argv)
    if args.fused_ops == []:
        args.fused_ops = list(FUSED_OPS)
    args.sizes = [size for text in args.sizes for size in parse_size(text, args.batch)]
    return args


def parse_size(text: str, batch: Optional[int]) -> list[Size]:
    """The sizes that a preset or HxW stands for.

    Raises:
        LaunchError: It is neither, or too small.
    """
    if text in PRESETS:
        return [Size(h, w, batch or b) for h, w, b in PRESETS[text]]
    if not re.fullmatch(r'\d+x\d+', text):
        raise LaunchError(f'--sizes {text}: write HxW, such as 224x320, or one of '
                          f'{", ".join(PRESETS)}')
    height, width = map(int, text.split('x'))
    if min(height, width) < MIN_SIZE:
        raise LaunchError(f'--sizes {text}: GroupMamba takes images of at least '
                          f'{MIN_SIZE}x{MIN_SIZE} pixels')
    return [Size(height, width, batch or 1)]


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be timed, before anything is.

    Raises:
        LaunchError: A combination of options that makes no sense here.
    """
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise LaunchError('--device cuda: torch sees no GPU')
    check_fused_ops(args.fused_ops or (), args.device)
    if args.cuda_graph and args.device != 'cuda':
        raise LaunchError('--cuda-graph needs a GPU')
    if args.against and set(args.subjects) <= set(OF_A_MAP):
        raise LaunchError('--against: peers have no such scan or layer; name another of '
                          f'--subjects {" ".join(Peer.subjects)}')
    if args.amp and args.device == 'cpu' and 'mask-rcnn' in args.subjects:
        raise LaunchError("--amp with mask-rcnn on CPU: mmcv's NMS has float32 only there")
    if 'upernet' in args.subjects and args.passes != ['forward'] and any(
            size.batch == 1 for size in args.sizes):
        raise LaunchError('upernet trains on at least two images (BatchNorm after pooling to one '
                          'pixel): say --batch 2, or --passes forward')
    for subject, library in {**TASKS, 'classifier': 'mmpretrain'}.items():
        if subject in args.subjects and (problems := check_family(library)):
            raise LaunchError('; '.join(problems))
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise LaunchError(f'--json {args.json}: there is no such folder')
    if args.json and Path(args.json).is_dir():
        raise LaunchError(f'--json {args.json} is a folder: name a file')


def benchmark(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    check(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    bench = Benchmark(args)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # rows and sizes share their code
    bench.run()
    print(bench.report())
    if args.json:
        bench.write(args.json, sys.argv if argv is None else [__file__, *argv])


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(benchmark, argv)


if __name__ == '__main__':
    sys.exit(main())
