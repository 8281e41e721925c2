"""From nothing to three trained models: draw the shapes, train, test, draw the predictions.

Trains the nano classifier, Mask R-CNN and UperNet of ``configs/shapes`` from scratch through
``tools/train.py``, two at a time where there are two cores, evaluates them on held-out images
through ``tools/test.py``, and writes to the work dir ``classification.png``, ``detection.png``,
``segmentation.png`` and ``summary.json``.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LINE_EVERY = 15  # seconds between progress lines of one part
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
# small models use two cores better as two processes than as two threads
WORKERS = min(2, CORES)


class Metric(NamedTuple):
    """A number of summary.json: where the test's log has it, in which unit, and its target."""
    key: str
    logged: str
    scale: float
    target: float


class Task(NamedTuple):
    name: str
    config: str
    metrics: tuple[Metric, ...]
    paths: dict[str, str]  # config keys that hold paths, relative to the data dir
    quick: dict[str, int]


def dataset_paths(folder: str) -> dict[str, str]:
    return {f'{split}_dataloader.dataset.data_root': folder for split in ('train', 'val', 'test')}


TASKS = (
    Task('classification', 'groupmamba-nano_1xb16_shapes-128px.py',
         (Metric('classification/top1', 'accuracy/top1', 0.01, 0.97), ),
         dataset_paths('classification/'),
         {'train_cfg.max_epochs': 1}),
    Task('detection', 'mask-rcnn_groupmamba-nano_fpn_1xb8-8e_shapes.py',
         (Metric('detection/bbox_mAP_50', 'coco/bbox_mAP_50', 1, 0.85),
          Metric('detection/segm_mAP_50', 'coco/segm_mAP_50', 1, 0.85)),
         {**dataset_paths('detection/'),
          **{f'{split}_evaluator.ann_file': 'detection/annotations/instances_val.json'
             for split in ('val', 'test')}},
         {'train_cfg.max_epochs': 1}),
    Task('segmentation', 'groupmamba-nano_upernet_1xb8-1200_shapes-128x128.py',
         (Metric('segmentation/mIoU', 'mIoU', 0.01, 0.85), ),
         dataset_paths('segmentation/'),
         {'train_cfg.max_iters': 2}),
)


class DemoError(RuntimeError):
    """A part failed; the message is one line."""


class Progress:
    """A line now and then: two parts run at once, so none overwrites another."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.start = self.last = time.monotonic()
        self.write('starting', first=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def write(self, text: str, first: bool = False) -> None:
        now = time.monotonic()
        if first or now - self.last >= LINE_EVERY:
            self.last = now
            print(f'{self.label}  {text}', flush=True)

    def done(self, text: str) -> None:
        print(f'{self.label}  {text}', flush=True)


def progress_of(line: str) -> str:
    """What a line of mmengine's log says about where a run is, or ''."""
    found = re.search(r'(Epoch|Iter)\((?:train|test)\)\s+((?:\[[\d/ ]+\])+)\s.*?eta: (\S+)', line)
    if not found:
        return ''
    place = re.sub(r'[\[\] ]+', ' ', found[2]).split()
    epoch = f'epoch {place[0]}, ' if len(place) > 1 else ''
    loss = re.search(r'\bloss: ([\d.]+)', line)
    return f'{epoch}iteration {place[-1]}, {"loss " + loss[1] + ", " if loss else ""}eta {found[3]}'


def run(command: list[str], log: Path, label: str) -> float:
    """Run a command from the repository root, its output to ``log``; return the seconds.

    Raises:
        DemoError: It ended with an exit code other than 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(label)
    last = ''
    with log.open('w') as file, subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, text=True, errors='replace',
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, 'PYTHONUNBUFFERED': '1',
                 'OMP_NUM_THREADS': str(CORES // WORKERS),
                 # glibc keeps freed memory for the next step instead of asking for it again
                 'MALLOC_TRIM_THRESHOLD_': str(2**30),
                 'MALLOC_MMAP_THRESHOLD_': str(2**30)}) as process:
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = line.strip() or last
                if text := progress_of(line):
                    progress.write(text)
        except KeyboardInterrupt:
            process.terminate()
            raise
    if process.returncode:
        progress.done('failed')
        raise DemoError(f'{label.strip()} ended with exit code {process.returncode}: '
                        f'{last.removeprefix("error: ")} (log: {log})')
    progress.done(f'{progress.seconds:.0f} s')
    return progress.seconds


def read_metrics(test_dir: Path) -> dict:
    """The metrics of the latest ``tools/test.py`` run in a work dir."""
    logs = sorted(test_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise DemoError(f'no metrics found in {test_dir}')
    return json.loads(logs[-1].read_text())


def run_task(task: Task, args: argparse.Namespace, place: str, summary: dict) -> None:
    """Train, test and draw one task; its metrics and seconds go into ``summary``."""
    config = f'configs/shapes/{task.config}'
    work_dir = args.work_dir / task.name
    options = {key: str(args.data_dir / path) for key, path in task.paths.items()}
    settings = {**options, 'randomness.seed': args.seed, **(task.quick if args.quick else {})}
    seconds = f'seconds/{task.name}'
    label = f'{place} {task.name:<14} '

    summary[f'{seconds}/train'] = run(
        ['tools/train.py', config, '--work-dir', str(work_dir), '--no-validate',
         '--cfg-options', *(f'{key}={value}' for key, value in settings.items())],
        work_dir / 'train.log', label + 'train')
    checkpoint = (work_dir / 'last_checkpoint').read_text().strip()
    predictions = work_dir / 'predictions.pkl'
    summary[f'{seconds}/test'] = run(
        ['tools/test.py', config, checkpoint, '--work-dir', str(work_dir / 'test'),
         '--out', str(predictions),
         '--cfg-options', *(f'{key}={value}' for key, value in options.items())],
        work_dir / 'test.log', label + 'test ')
    metrics = read_metrics(work_dir / 'test')
    results = {metric.key: metrics[metric.logged] * metric.scale for metric in task.metrics}
    summary.update(results)

    reached = ', '.join(f'{key.split("/")[1]} {value:.3f}' for key, value in results.items())
    summary[f'{seconds}/draw'] = run(
        ['demo/shapes_pictures.py', config, str(predictions),
         str(args.work_dir / f'{task.name}.png'),
         f'{task.name}: GroupMamba nano, from scratch, on held-out images ({reached})',
         *(f'{key}={value}' for key, value in options.items())],
        work_dir / 'draw.log', label + 'draw ')


def print_table(summary: dict) -> None:
    print(f'\n{"task":<16}{"metric":<14}{"result":>8}{"target":>8}{"train":>9}{"test":>8}')
    for task in TASKS:
        for metric in task.metrics:
            train, test = (summary[f'seconds/{task.name}/{part}'] for part in ('train', 'test'))
            print(f'{task.name:<16}{metric.key.split("/")[1]:<14}{summary[metric.key]:>8.3f}'
                  f'{metric.target:>8.2f}{train:>7.0f} s{test:>6.0f} s')
    total = summary['seconds/total']
    print(f'in {int(total // 60)} min {int(total % 60)} s\n')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Train, test and draw the three nano models on drawn shapes.')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs/demo',
                        help='where pictures, summary.json, logs and checkpoints go')
    parser.add_argument('--data-dir', type=Path, default=ROOT / 'data/shapes')
    parser.add_argument('--seed', type=int, default=0, help='of the data and the trainings')
    parser.add_argument('--quick', action='store_true',
                        help='a few images and iterations, to see that it runs; no targets')
    return parser.parse_args()


def demo(args: argparse.Namespace) -> None:
    start = time.monotonic()
    args.work_dir, args.data_dir = args.work_dir.resolve(), args.data_dir.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    summary_file = args.work_dir / 'summary.json'
    summary_file.unlink(missing_ok=True)
    summary = {}

    numbers = ['--num-train', '8', '--num-val', '4', '--size', '64'] if args.quick else []
    summary['seconds/generate'] = run(
        ['tools/dataset_converters/make_shapes.py', '--out-dir', str(args.data_dir),
         '--seed', str(args.seed), '--overwrite', *numbers],
        args.work_dir / 'generate.log', '[1/4] shapes          draw ')
    with ThreadPoolExecutor(WORKERS) as pool:
        # the longest first
        jobs = [pool.submit(run_task, task, args, f'[{i}/4]', summary)
                for i, task in reversed(list(enumerate(TASKS, 2)))]
        for job in jobs:
            job.result()
    summary['seconds/total'] = time.monotonic() - start

    print_table(summary)
    for task in TASKS:
        print(f'pictures: {args.work_dir / task.name}.png')
    temporary = summary_file.with_suffix('.tmp')
    temporary.write_text(json.dumps(summary, indent=2) + '\n')
    temporary.rename(summary_file)
    print(f'summary:  {summary_file}')
    missed = [metric for task in TASKS for metric in task.metrics
              if not summary[metric.key] >= metric.target]
    if missed and not args.quick:
        raise DemoError('below target: ' + ', '.join(
            f'{m.key} {summary[m.key]:.3f} < {m.target}' for m in missed))


def main() -> int:
    try:
        demo(parse_args())
    except (DemoError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nerror: stopped by the user', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
