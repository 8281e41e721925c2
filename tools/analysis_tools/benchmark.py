"""Time the scan backends against each other in one process and print the ratios.

    python tools/analysis_tools/benchmark.py
    python tools/analysis_tools/benchmark.py --lengths 3136 16384 67200 --backends blocked mamba_ssm

Before anything is timed, every backend's output and gradients are compared with those of the
baseline. The backends then take turns (A B A B ...), and medians with the 10th and 90th
percentile are printed. The default baseline is `reference`: the definition, a Python loop that is
linear in L.
"""
import argparse
import statistics
import sys
import time

import torch

from mmgroupmamba.ops import available_backends, selective_scan


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--lengths', type=int, nargs='+', default=[3136, 16384],
                        help='sequence lengths L')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--channels', type=int, default=64, help='of all four groups together')
    parser.add_argument('--states', type=int, default=1, help='N')
    parser.add_argument('--baseline', default='reference')
    parser.add_argument('--backends', nargs='+', help='default: all that run on the device')
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    return parser.parse_args()


def make_inputs(args: argparse.Namespace, length: int) -> dict[str, torch.Tensor]:
    """Fresh inputs in the layer's layout: the channels of a token are contiguous."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=args.device)

    inputs = dict(
        u=randn(args.batch, length, args.channels).transpose(1, 2),
        delta=randn(args.batch, length, args.channels).transpose(1, 2),
        A=-torch.exp(randn(args.channels, args.states)),
        B=randn(args.batch, length, 4, args.states).permute(0, 2, 3, 1),
        C=randn(args.batch, length, 4, args.states).permute(0, 2, 3, 1),
        D=randn(args.channels),
        delta_bias=randn(args.channels) - 3)
    return {k: v.requires_grad_() for k, v in inputs.items()}


def forward(inputs: dict, backend: str) -> torch.Tensor:
    with torch.no_grad():
        return selective_scan(**inputs, delta_softplus=True, backend=backend)


def forward_backward(inputs: dict, backend: str) -> tuple[torch.Tensor, ...]:
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    return (y.detach(), *torch.autograd.grad(y.square().sum(), list(inputs.values())))


def check(args: argparse.Namespace, length: int, backends: list[str]) -> None:
    """Exit unless all backends agree on outputs and gradients."""
    inputs = make_inputs(args, length)
    want = forward_backward(inputs, args.baseline)
    for backend in backends:
        for name, got, expected in zip(('y', *inputs), forward_backward(inputs, backend), want):
            error = ((got - expected).norm() / expected.norm()).item()
            if not error < 1e-4:
                sys.exit(f'{backend} is wrong at L = {length}: {name} differs from '
                         f'{args.baseline} by {error:.1e}')


def time_in_turn(step, args: argparse.Namespace, length: int,
                 backends: list[str]) -> dict[str, list[float]]:
    """Milliseconds of each repeat of each backend, taken in turn."""
    inputs = make_inputs(args, length)
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for repeat in range(args.repeats + 2):
        for backend in backends:
            if args.device == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(inputs, backend)
            if args.device == 'cuda':
                torch.cuda.synchronize()
            if repeat >= 2:  # the first two warm up
                times[backend].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    reasons = available_backends(args.device)
    backends = args.backends or [n for n, reason in reasons.items() if reason is None]
    backends = [args.baseline, *(b for b in backends if b != args.baseline)]
    for backend in backends:
        if reasons.get(backend, 'no such backend') is not None:
            sys.exit(f'{backend}: {reasons.get(backend, "no such backend")}')

    device = f'CPU, {args.threads} threads'
    if args.device == 'cuda':
        device = torch.cuda.get_device_name()
    print(f'selective scan, {args.batch} x {args.channels} x L, N = {args.states}, float32, '
          f'{device}, torch {torch.__version__}; ratio = {args.baseline} / backend')
    print(f'{"L":>7} {"pass":<17} {"backend":<10} {"median ms":>10} {"p10":>9} {"p90":>9} '
          f'{"ratio":>7}')
    for length in args.lengths:
        check(args, length, backends[1:])
        for label, step in (('forward', forward), ('forward+backward', forward_backward)):
            times = time_in_turn(step, args, length, backends)
            base = statistics.median(times[args.baseline])
            for backend, values in times.items():
                tenths = statistics.quantiles(values, n=10)
                median = statistics.median(values)
                print(f'{length:>7} {label:<17} {backend:<10} {median:>10.2f} {tenths[0]:>9.2f} '
                      f'{tenths[-1]:>9.2f} {base / median:>7.1f}')


if __name__ == '__main__':
    main()
