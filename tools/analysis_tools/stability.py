"""Train configs for some steps and show how stable that is: loss mean, variance, gradient norm.

    python tools/analysis_tools/stability.py CONFIG --steps 300 --seeds 0 1 2 --without-distillation

Each config runs the first N steps of the training that tools/train.py would give it. What each
step's loss, gradient norm (before clipping) and learning rate were goes to one CSV file a run;
stability.png and a table compare the configs. docs/stability.md says what may be compared.
"""
# ruff: noqa: E402, I001  a mixture of families may fail when imported: look before
import argparse
import csv
import functools
import math
import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

from mmgroupmamba.doctor import check_family

if problems := check_family():
    sys.exit(f'error: {"; ".join(problems)}')

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmgroupmamba.launch import (
    LaunchError,
    OptionAction,
    Parser,
    build_runner,
    check_folder,
    check_run,
    load_config,
    run_tool,
    set_training,
    tidy_work_dir,
)

Rows = list[dict[str, float]]


class EnoughSteps(Exception):
    """Ends a training, of whatever loop, after the wanted number of steps."""


class Recorder(Hook):
    """Writes down each step's losses, gradient norm and learning rate; the training stays as it is.

    Args:
        steps: Steps after which the training ends.
        distilled: Whether the model is a ``DistilledImageClassifier``; then ``loss_labels`` is
            recorded too: the head's loss on the labels, of the average of its two classifiers.

    Attributes:
        rows: One dict a step: step (from 1), the model's log variables (``loss`` and its terms),
            lr (the largest of the parameter groups) and grad_norm, the latter two NaN where
            gradients are only accumulated.
    """

    priority = 'LOWEST'  # the other hooks finish the last step

    def __init__(self, steps: int, distilled: bool = False) -> None:
        self.steps = steps
        self.distilled = distilled
        self.rows: Rows = []
        self._step: dict[str, float] = {}

    def before_train(self, runner: Runner) -> None:
        """Put the probes in place.

        Raises:
            LaunchError: The config's own training is shorter, or its gradients are out of reach.
        """
        if runner.max_iters < self.steps:
            raise LaunchError(f'the config trains {runner.max_iters} steps, --steps asks for '
                              f'{self.steps}: raise train_cfg.max_epochs or max_iters by '
                              '--cfg-options')
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            raise LaunchError(f'optim_wrapper {type(wrapper).__name__} does not show its '
                              'gradients: set optim_wrapper.type to OptimWrapper or '
                              'AmpOptimWrapper')
        update = wrapper.step

        @functools.wraps(update)  # with the mark by which torch's schedulers know it
        def step(**kwargs: Any) -> None:
            self._step.update(grad_norm=gradient_norm(wrapper), lr=max(wrapper.get_lr()['lr']))
            update(**kwargs)

        wrapper.step = step  # the one place between the gradients and their clipping
        if self.distilled:
            self._watch_labels(runner.model)

    def _watch_labels(self, model: nn.Module) -> None:
        scores: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple, score: Tensor) -> None:
            scores.append(score.detach())

        @torch.no_grad()
        def label_loss(module: nn.Module, args: tuple, kwargs: dict, output: dict) -> None:
            average = (scores.pop() + scores.pop()) / 2
            loss = model.head._get_loss(average, kwargs['data_samples'])['loss']
            self._step['loss_labels'] = float(loss)

        model.head.fc.register_forward_hook(keep)
        model.head.dist_fc.register_forward_hook(keep)
        model.register_forward_hook(label_loss, with_kwargs=True)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: Optional[dict[str, Tensor]] = None) -> None:
        """Keep the step's row.

        Raises:
            EnoughSteps: It was the last one.
        """
        row = dict(step=len(self.rows) + 1, **{k: v.item() for k, v in outputs.items()})
        self.rows.append({**row, 'grad_norm': math.nan, 'lr': math.nan, **self._step})
        self._step = {}
        if len(self.rows) == self.steps:
            raise EnoughSteps


def gradient_norm(wrapper: OptimWrapper) -> float:
    """Euclidean norm of all gradients that an optimiser wrapper holds, AMP's loss scale undone."""
    norms = [p.grad.detach().float().norm() for group in wrapper.optimizer.param_groups
             for p in group['params'] if p.grad is not None]
    scaler = getattr(wrapper, 'loss_scaler', None)
    scale = scaler.get_scale() if scaler else 1.
    return float(torch.stack(norms).norm()) / scale if norms else 0.


def is_distilled(cfg: Config) -> bool:
    kind = cfg.model.type  # a class in the configs of pure Python
    return (kind if isinstance(kind, str) else kind.__name__).endswith('DistilledImageClassifier')


def without_distillation(cfg: Config) -> Config:
    """The config with its teacher taken out: the average of the two heads learns the labels."""
    cfg = deepcopy(cfg)
    cfg.model.type = 'mmpretrain.ImageClassifier'
    for key in ('teacher', 'alpha', 'distillation', 'tau'):
        cfg.model.pop(key, None)
    return cfg


def record(cfg: Config, steps: int) -> tuple[Rows, Runner]:
    """Train a settled config's first steps.

    A run that breaks off after its loss was NaN or inf is a result and ends early; any other
    error is raised.

    Returns:
        A row a step, see :class:`Recorder`, and the runner with the trained model.
    """
    recorder = Recorder(steps, is_distilled(cfg))
    with tidy_work_dir(cfg.work_dir):
        runner = build_runner(cfg)
        runner.register_hook(recorder)
        try:
            runner.train()
        except EnoughSteps:
            pass
        except Exception as error:
            if not diverged(recorder.rows):
                raise
            print(f'broke off after step {len(recorder.rows)}: {type(error).__name__}: {error}')
    return recorder.rows, runner


def diverged(rows: Rows) -> list[int]:
    """The steps whose loss is NaN or infinite."""
    return [row['step'] for row in rows if not math.isfinite(row['loss'])]


def compared_loss(rows: Rows) -> np.ndarray:
    """The loss that runs have in common, (steps, ): on the labels, where a model is distilled."""
    return np.array([row.get('loss_labels', row['loss']) for row in rows])


def windows(values: np.ndarray, width: int) -> np.ndarray:
    """Trailing windows of a series (N, ): (N - width + 1, width), none if it is shorter."""
    if len(values) < width:
        return np.empty((0, width))
    return np.lib.stride_tricks.sliding_window_view(values, width)


def write_rows(rows: Rows, path: Path) -> None:
    """One CSV line a step; NaN and infinite values read nan and inf."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, columns, restval='nan')
        writer.writeheader()
        writer.writerows(rows)


def summarise(runs: dict[str, dict[int, Rows]], window: int) -> str:
    """A Markdown table with a row a label; runs maps label -> seed -> rows."""
    lines = [f'| config | seeds | loss mean, last {window} steps | its variance '
             '| gradient norm, median | max | diverged |', '|---|---|---|---|---|---|---|']
    for label, seeds in runs.items():
        tails = [compared_loss(rows)[-window:] for rows in seeds.values()]
        with np.errstate(invalid='ignore'):
            means, variances = zip(*((tail.mean(), tail.var()) for tail in tails))
        norms = np.array([row['grad_norm'] for rows in seeds.values() for row in rows])
        norms = norms[~np.isnan(norms)]
        median, top = (np.median(norms), norms.max()) if len(norms) else (np.nan, np.nan)
        marks = [f'{len(bad)} steps from step {bad[0]} (seed {seed})'
                 for seed, rows in seeds.items() if (bad := diverged(rows))]
        spread = f' ({min(means):.4f} to {max(means):.4f})' if len(seeds) > 1 else ''
        lines.append(f'| {label} | {len(seeds)} | {np.mean(means):.4f}{spread} '
                     f'| {np.mean(variances):.2e} '
                     f'| {median:.3g} | {top:.3g} | {"; ".join(marks) or "no"} |')
    return '\n'.join(lines)


def plot(runs: dict[str, dict[int, Rows]], window: int, path: Path) -> None:
    """Three panels beside each other: a line is the mean over seeds, its band their range.

    What is NaN or infinite is left out of both, and a dotted line stands where a loss became so.
    """
    figure = Figure(figsize=(12, 3.8), layout='constrained')
    axes = figure.subplots(1, 3)
    on_labels = any('loss_labels' in rows[0] for seeds in runs.values() for rows in seeds.values())
    name = 'loss on the labels' if on_labels else 'loss'
    for i, (label, seeds) in enumerate(runs.items()):
        steps = max(map(len, seeds.values()))
        for rows in seeds.values():
            for bad in diverged(rows)[:1]:
                for ax in axes:
                    ax.axvline(bad, color=f'C{i}', ls=':')
        losses = [windows(padded(compared_loss(rows), steps), window) for rows in seeds.values()]
        norms = [padded([row['grad_norm'] for row in rows], steps) for rows in seeds.values()]
        with np.errstate(invalid='ignore'):
            panels = [[x.mean(1) for x in losses], [x.var(1) for x in losses], norms]
        for ax, series in zip(axes, panels):
            series = np.ma.masked_invalid(series)  # (seeds, steps)
            at = np.arange(steps - series.shape[1], steps) + 1
            ax.fill_between(at, series.min(0), series.max(0), color=f'C{i}', alpha=0.2, lw=0)
            ax.plot(at, series.mean(0), color=f'C{i}', lw=1, label=label)
    titles = (f'{name}: mean of {window} steps', f'{name}: variance of {window} steps',
              'gradient norm before clipping')
    for ax, title in zip(axes, titles):
        ax.set(title=title, xlabel='step')
        ax.grid(alpha=0.3)
    for ax in axes[1:]:
        if math.isfinite(ax.dataLim.minposy):  # a log scale needs something above 0
            ax.set_yscale('log')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4,
                  frameon=False)
    figure.savefig(path, dpi=100)


def padded(values: Sequence[float], length: int) -> np.ndarray:
    """A series (N, ) with NaN behind it: (length, )."""
    return np.append(values, np.full(length - len(values), np.nan))


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument('others', nargs='*', default=[], metavar='config', help='more of them')
    parser.add_argument('--steps', type=int, required=True, help='training steps of each run')
    parser.add_argument('--seeds', type=int, nargs='+', metavar='S', default=[0],
                        help='one run of each config for each (default 0)')
    parser.add_argument('--labels', nargs='+', metavar='NAME',
                        help='names of the configs in plot and table (default the file names)')
    parser.add_argument('--window', type=int,
                        help='steps over which mean and variance are taken '
                        '(default a tenth of --steps, from 2 to 50)')
    parser.add_argument('--without-distillation', action='store_true',
                        help='run each distilled classifier also with its teacher taken out')
    parser.add_argument('--amp', action='store_true', help="mixed precision, as tools/train.py's")
    parser.add_argument('--out-dir', default='work_dirs/stability')
    parser.add_argument('--cfg-options', nargs='+', action=OptionAction, metavar='KEY=VALUE',
                        help="override values in all configs, as tools/train.py's")
    parser.set_defaults(local_rank=0)  # Parser wants it of launched tools; this one runs alone
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Settle the defaults of labels and window.

    Raises:
        LaunchError: Numbers or names that do not fit each other.
    """
    configs = [args.config, *args.others]
    if args.steps < 2:
        raise LaunchError(f'--steps {args.steps}: give 2 or more, one step has no variance')
    if args.window is None:
        args.window = min(max(args.steps // 10, 2), 50)
    if not 2 <= args.window <= args.steps:
        raise LaunchError(f'--window {args.window}: give 2 to --steps {args.steps}')
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise LaunchError(f'--seeds {" ".join(map(str, args.seeds))}: give different numbers, '
                          'none below 0')
    args.labels = args.labels or [Path(config).stem for config in configs]
    if len(args.labels) != len(configs):
        raise LaunchError(f'--labels has {len(args.labels)} names for {len(configs)} configs')
    if len(set(map(file_name, args.labels))) < len(configs):
        raise LaunchError(f'the names {", ".join(args.labels)} are not all different: set --labels')
    check_folder(args.out_dir, '--out-dir')


def file_name(label: str) -> str:
    return re.sub(r'[^\w.-]+', '-', label)


def settle(args: argparse.Namespace) -> dict[str, Config]:
    """Label -> config as tools/train.py settles it, without validation and checkpoints, checked.

    Raises:
        LaunchError: A config, or an option for it, is unfit.
    """
    configs = {}
    for label, path in zip(args.labels, [args.config, *args.others]):
        own = argparse.Namespace(
            config=path, cfg_options=args.cfg_options, work_dir=None, launcher='none', resume=None,
            amp=args.amp, auto_scale_lr=False, no_validate=True, no_pin_memory=False,
            no_persistent_workers=True)
        cfg = load_config(own)
        set_training(cfg, own)
        cfg.default_hooks.checkpoint = None
        cfg.log_level = 'WARNING'
        cfg.visualizer.vis_backends = None
        check_run(cfg, ('train', ))
        configs[label] = cfg
        if args.without_distillation and is_distilled(cfg):
            configs[f'{label}, without distillation'] = without_distillation(cfg)
    if args.without_distillation and len(configs) == len(args.labels):
        raise LaunchError('--without-distillation: no config has a model of type '
                          'mmgroupmamba.DistilledImageClassifier, there is no teacher to take out')
    return configs


def stability(argv: Optional[list[str]] = None) -> None:
    args = parse_args(argv)
    check_args(args)
    configs = settle(args)
    out_dir = Path(args.out_dir)
    runs: dict[str, dict[int, Rows]] = {label: {} for label in configs}
    for seed in args.seeds:
        for label, cfg in configs.items():
            name = f'{file_name(label)}_seed{seed}'
            cfg = deepcopy(cfg)
            cfg.merge_from_dict({'randomness.seed': seed})
            cfg.experiment_name = cfg.visualizer.name = name
            cfg.work_dir = str(out_dir / 'logs' / name)
            rows, _ = record(cfg, args.steps)
            write_rows(rows, out_dir / f'{name}.csv')
            runs[label][seed] = rows
            bad = diverged(rows)
            state = f'loss is NaN or inf from step {bad[0]}' if bad else (
                f'loss {compared_loss(rows)[-args.window:].mean():.4f}')
            print(f'{label}, seed {seed}: {len(rows)} steps, {state}', flush=True)
    plot(runs, args.window, out_dir / 'stability.png')
    print(summarise(runs, args.window))
    print(f'curves in {out_dir}/stability.png, every step in {out_dir}/*.csv')


def main(argv: Optional[list[str]] = None) -> int:
    return run_tool(stability, argv)


if __name__ == '__main__':
    sys.exit(main())
