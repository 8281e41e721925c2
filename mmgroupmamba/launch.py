"""What tools/train.py and tools/test.py share: arguments, checks before anything is built, and
errors told in one line.

Everything a user can get wrong is looked for before the work_dir exists; what only shows later is
still told in one line, and :func:`tidy_work_dir` takes back the work_dir it left.
"""
import argparse
import difflib
import inspect
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional

import torch.distributed
from mmengine import fileio
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.registry import (
    DATASETS,
    MODELS,
    OPTIMIZERS,
    RUNNERS,
    Registry,
    init_default_scope,
)
from mmengine.runner import FlexibleRunner, Runner, find_latest_checkpoint

from mmgroupmamba.checkpoint import CheckpointError, read_checkpoint, use_safe_reader
from mmgroupmamba.data_check import check_coco
from mmgroupmamba.doctor import check_family

TRACEBACK = 'MMGROUPMAMBA_TRACEBACK'


class Task(NamedTuple):
    """What differs between the libraries when a model is drawn or tested."""
    visualizer: str
    visualization_hook: str
    tta_model: dict


TASKS = {
    'mmpretrain': Task('UniversalVisualizer', 'VisualizationHook', dict(type='AverageClsScoreTTA')),
    'mmdet': Task('DetLocalVisualizer', 'DetVisualizationHook', dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5),
                                         max_per_img=100))),
    'mmseg': Task('SegLocalVisualizer', 'SegVisualizationHook',
                  dict(type='mmgroupmamba.SegLogitsTTA')),
}

# top-level keys that the libraries read besides the runner's own arguments
MORE_KEYS = {'activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval',
             'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model',
             'tta_pipeline'}


class LaunchError(ValueError):
    """A tool was asked for what cannot be done; the message is one line and says what to do."""


def one_line(error: BaseException) -> str:
    """First line of a message, without mmengine's wrapping and the quotes of a KeyError."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if 'Original Traceback' in text:  # re-raised from a dataloader worker: its last line counts
        text = text.strip().splitlines()[-1]
    text = re.sub(r'^class `\w+` in \S+: ', '', text.strip()).split('\n')[0]
    return text or type(error).__name__


def explain(error: BaseException) -> Optional[str]:
    """One line for an error that the user can mend, None for one that needs its traceback.

    The user's are: what this package and its tools refuse, names and arguments that a config
    gives and a registry or a constructor does not take, and files that are not there.
    """
    frames = traceback.extract_tb(error.__traceback__)
    message = one_line(error)
    names = [frame.name for frame in frames]
    ours = Path(frames[-1].filename).is_relative_to(Path(__file__).parent) if frames else False
    where = f'({TRACEBACK}=1 shows where)'
    if isinstance(error, (LaunchError, CheckpointError)) or ours and isinstance(error, ValueError):
        return message
    if isinstance(error, OSError):
        return f'{message} {where}'
    if 'build_from_cfg' not in names:
        return None
    culprit = None
    if isinstance(error, KeyError) and 'registry' in message:
        culprit = f'{message.split(". Please")[0]}; check its spelling'
    elif isinstance(error, TypeError) and re.search(r'unexpected keyword|missing \d', message):
        culprit = message
    elif '__init__' in names[names.index('build_from_cfg'):]:
        # a constructor got a value that it cannot work with
        culprit = f'{type(error).__name__}: {message}'
        if 'serialize_data' in ''.join(names):  # mmengine packs nothing
            return ('a data set is empty: no image fits its data_root, data_prefix, ann_file, '
                    f'suffixes and filter_cfg {where}')
        if isinstance(error, (ValueError, AssertionError)) and names[-1] == '__init__':
            culprit = message
    return culprit and f'the config does not build: {culprit} {where}'


def run_tool(tool: Callable[[Optional[list[str]]], Any], argv: Optional[list[str]] = None) -> int:
    """Run a tool's body; tell a user's error in one line on stderr and return 2 for it."""
    code = 0
    try:
        tool(argv)
    except Exception as error:
        line = explain(error)
        if line is None or os.environ.get(TRACEBACK):
            raise
        print(f'error: {line}', file=sys.stderr)
        code = 2
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        if get_device() == 'cpu':
            # gloo's threads abort some interpreters at exit, when all is written
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


@contextmanager
def tidy_work_dir(work_dir: str) -> Iterator[None]:
    """Remove a work_dir that a refused run created, unless it holds a checkpoint by then."""
    path = Path(work_dir).absolute()
    created = [p for p in (path, *path.parents) if not p.exists()]
    try:
        yield
    except Exception as error:
        if explain(error) and path in created and is_main_process() and not any(path.glob('*.pth')):
            shutil.rmtree(path, ignore_errors=True)
            for parent in created[1:]:
                if parent.exists() and not any(parent.iterdir()):
                    parent.rmdir()
        raise


class OptionAction(DictAction):
    """mmengine's KEY=VALUE action, with a word for what is no such pair."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: Any, option_string: Optional[str] = None) -> None:
        for pair in values:
            key, equals, _ = pair.partition('=')
            if not equals or not all(re.fullmatch(r'[\w-]+', part) for part in key.split('.')):
                parser.error(f'--cfg-options {pair!r} is no key=value pair: write '
                             'model.backbone.arch=tiny, without spaces around =')
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:
            parser.error(f'--cfg-options: {error}')


class Parser(argparse.ArgumentParser):
    """An argument parser with the options of both tools, whose errors are one line."""

    def __init__(self, description: str, inputs: str = '') -> None:
        super().__init__(description=description)
        if inputs:
            self.add_argument('inputs', nargs='+', metavar='INPUT', type=Path, help=inputs)
        self.add_argument('config', help='config file')

    def add_shared_options(self) -> None:
        self.add_argument(
            '--work-dir',
            help='folder for logs, checkpoints and metrics (default work_dirs/<config name>)')
        self.add_argument(
            '--cfg-options', nargs='+', action=OptionAction, metavar='KEY=VALUE',
            help='override config values: model.backbone.with_cp=True, key="[a,b]", '
            'key="[(a,b),(c,d)]" (no spaces inside)')
        self.add_argument(
            '--no-pin-memory', action='store_true', help='turn pin_memory off in all dataloaders')
        self.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                          default='none', help='job launcher')
        # torch.distributed.launch passes --local-rank, older ones --local_rank
        self.add_argument('--local_rank', '--local-rank', type=int, default=0,
                          help=argparse.SUPPRESS)

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        parsed = super().parse_args(*args, **kwargs)
        os.environ.setdefault('LOCAL_RANK', str(parsed.local_rank))
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message} ({self.prog} --help lists the options)\n')


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, apply --cfg-options, and settle scope, work_dir and launcher.

    Raises:
        LaunchError: The libraries, the file, an option or the scope is unfit.
    """
    if not Path(args.config).is_file():
        raise LaunchError(f'config file {args.config} does not exist: give the path of a .py file, '
                          'such as one of configs/')
    try:
        cfg = Config.fromfile(args.config)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        where = f', line {error.lineno}' if isinstance(error, SyntaxError) else ''
        raise LaunchError(f'config file {args.config} cannot be read: '
                          f'{type(error).__name__}: {one_line(error)}{where}') from error
    merge_options(cfg, args.cfg_options or {})

    scope = cfg.get('default_scope')
    if scope not in TASKS:
        raise LaunchError(f'config file {args.config} has default_scope {scope!r}: set '
                          f'default_scope to one of {", ".join(TASKS)}, it picks the task')
    if problems := check_family(scope):
        raise LaunchError('; '.join(problems))
    use_safe_reader()
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise LaunchError('--launcher pytorch is for processes that torchrun starts: use '
                          'tools/dist_train.sh or tools/dist_test.sh, or leave it out')

    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(
        Path('work_dirs') / Path(args.config).stem)
    check_folder(cfg.work_dir, '--work-dir')
    # whatever runtime the config has: nothing may load without a check
    cfg.setdefault('default_hooks', {})
    cfg.default_hooks.setdefault('checkpoint_guard', dict(type='mmgroupmamba.CheckpointHook'))
    cfg.default_hooks.setdefault('data_guard', dict(type='mmgroupmamba.DataCheckHook'))
    cfg.setdefault('visualizer', dict(type=TASKS[scope].visualizer, name='visualizer',
                                      vis_backends=[dict(type='LocalVisBackend')]))
    if get_device() == 'cpu' and args.launcher != 'none':
        cfg.setdefault('model_wrapper_cfg', dict(
            type='MMDistributedDataParallel', broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False)))
        cfg.model_wrapper_cfg.device_ids = None
        replace_sync_bn(cfg.model)
    return cfg


def check_folder(path: str, option: str) -> None:
    """Raise where a folder is to be written and a file stands in the way."""
    for part in (Path(path), *Path(path).parents):
        if part.exists() and not part.is_dir():
            raise LaunchError(f'{option} {path}: {part} is a file: name a folder')


def replace_sync_bn(node: Any) -> None:
    """Turn SyncBN into BN all over a model's config: torch has it on GPUs only."""
    if isinstance(node, dict):
        if node.get('type') in ('SyncBN', 'MMSyncBN'):
            node['type'] = 'BN'
        node = node.values()
    if not isinstance(node, str) and isinstance(node, Iterable):
        for value in node:
            replace_sync_bn(value)


def merge_options(cfg: Config, options: dict[str, Any]) -> None:
    """Apply --cfg-options; refuse a key that would change nothing."""
    known = {*inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters,
             *MORE_KEYS}
    for key in options:
        top = key.split('.')[0]
        if top in known:
            continue
        if top in cfg:
            raise LaunchError(
                f'--cfg-options {key} changes nothing: {top} is a variable inside the config file, '
                'used up before options apply; set the places that use it, such as '
                'train_dataloader.dataset.data_root')
        close = difflib.get_close_matches(top, sorted(known), 1)
        hint = f'did you mean {close[0]}?' if close else 'see the keys of the config'
        raise LaunchError(f'--cfg-options {key}: there is no key {top}: {hint}')
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LaunchError(f'--cfg-options {" ".join(options)} do not fit the config: '
                          f'{one_line(error)[:200]}') from error


def set_dataloaders(cfg: Config, pin_memory: bool, persistent_workers: bool = True) -> None:
    """Give the dataloaders what each library's own tools give them."""
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        if cfg.default_scope == 'mmpretrain':
            loader.setdefault('pin_memory', True)
            loader.setdefault('persistent_workers', True)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        # neither means anything without a GPU or without workers, and torch complains
        if not pin_memory or get_device() == 'cpu':
            loader.pin_memory = False
        if not persistent_workers or not loader.get('num_workers'):
            loader.persistent_workers = False


def set_amp(cfg: Config, wanted: bool) -> None:
    """Switch the optimiser wrapper to mixed precision, in the form that the device can run."""
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if wanted and kind == 'OptimWrapper':
        kind = wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    elif wanted and kind not in ('AmpOptimWrapper', 'mmgroupmamba.CPUAmpOptimWrapper'):
        raise LaunchError(f'--amp switches OptimWrapper to AmpOptimWrapper, but the config has '
                          f'optim_wrapper.type={kind}: leave --amp out or change the type')
    if kind == 'AmpOptimWrapper' and get_device() == 'cpu':
        if cfg.default_scope == 'mmdet':
            raise LaunchError("mixed precision: mmcv's NMS and RoIAlign know no bfloat16 on CPU: "
                              'leave --amp out and set optim_wrapper.type=OptimWrapper, or use a '
                              'GPU')
        print_log('AMP on CPU: bfloat16 autocast, no loss scaling')
        wrapper.type = 'mmgroupmamba.CPUAmpOptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)


def set_training(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the options of tools/train.py to a config."""
    for key in ('optim_wrapper', 'train_cfg', 'train_dataloader'):
        if cfg.get(key) is None:
            raise LaunchError(f'{args.config} has no {key}: it is no config to train from')
    set_amp(cfg, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise LaunchError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in '
                              'the config: the batch size that the learning rate was set for')
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    set_dataloaders(cfg, not args.no_pin_memory, not args.no_persistent_workers)


def check_run(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check data, checkpoint and model of a run before anything is written.

    Args:
        cfg: The settled config.
        splits: Of 'train', 'val', 'test', those that the run reads.

    Raises:
        LaunchError, CheckpointError, ValueError: Told in one line by :func:`run_tool`.
    """
    init_default_scope(cfg.default_scope)
    for split in splits:
        if cfg.get(f'{split}_dataloader') is None:
            raise LaunchError(f'the config has no {split}_dataloader')
    check_data(cfg, splits)
    checkpoint = cfg.get('load_from')
    if cfg.get('resume') and checkpoint is None:
        checkpoint = find_latest_checkpoint(cfg.work_dir)
        if checkpoint is None:
            print_log(f'no checkpoint in {cfg.work_dir} to resume from: training starts anew')
    if checkpoint is not None and not Path(checkpoint).is_dir():  # as DeepSpeed's are
        try:
            read_checkpoint(checkpoint)
        except CheckpointError as error:
            if cfg.get('resume') and cfg.get('load_from') is None:
                raise LaunchError(f'{one_line(error)}; name another one of {cfg.work_dir} by '
                                  '--resume CKPT') from error
            raise
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer', {}).get('type')
    if 'train' in splits and optimizer and registered(OPTIMIZERS, optimizer) is None:
        raise LaunchError(f'optim_wrapper.optimizer.type={optimizer} is not in the optimizer '
                          'registry: check its spelling')
    # a wrong arch, key or backend shows here, not after the work_dir is made
    model = deepcopy(cfg.model)
    if cfg.get('data_preprocessor'):
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    MODELS.build(model)


def registered(registry: Registry, kind: Any) -> Any:
    """The class of a config's ``type``, looked for in the default scope; None if there is none."""
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as scoped:
        return scoped.get(kind)


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Name the data paths that are missing, and the options that set them."""
    missing = {}
    for split in splits:
        for key, dataset in leaf_datasets(cfg[f'{split}_dataloader'].dataset,
                                          f'{split}_dataloader.dataset'):
            missing.update(missing_paths(key, dataset))
        evaluators = cfg.get(f'{split}_evaluator') or []
        several = isinstance(evaluators, (list, tuple))
        for i, metric in enumerate(evaluators if several else [evaluators]):
            path = metric.get('ann_file')
            if path and not fileio.exists(path, backend_args=metric.get('backend_args')):
                missing[f'{split}_evaluator.{f"{i}." if several else ""}ann_file'] = path
    if missing:
        culprits = ', '.join(dict.fromkeys(missing.values()))
        options = ' '.join(f'{option}=PATH' for option in missing)
        raise LaunchError(f'data not found: {culprits}; put it there or set '
                          f'--cfg-options {options}')
    if cfg.default_scope == 'mmdet' and int(os.environ.get('RANK', 0)) == 0:
        for split in splits:
            for _, dataset in leaf_datasets(cfg[f'{split}_dataloader'].dataset, ''):
                check_annotations(dataset)


def check_annotations(dataset: ConfigDict) -> None:
    """Check a COCO data set's file; other kinds pass."""
    from mmdet.datasets import CocoDataset
    if registered(DATASETS, dataset.type) is not CocoDataset:
        return
    built = DATASETS.build({**deepcopy(dataset), 'lazy_init': True})
    if not Path(built.ann_file).is_file():  # one of another storage
        return
    with_mask = any(step.get('with_mask') for step in dataset.get('pipeline', ()))
    for note in check_coco(built.ann_file, built.metainfo['classes'], with_mask):
        print_log(note)


def leaf_datasets(dataset: ConfigDict, key: str) -> Iterator[tuple[str, ConfigDict]]:
    """Walk through wrappers such as RepeatDataset and ConcatDataset; yields (key, dataset)."""
    if 'dataset' in dataset:
        yield from leaf_datasets(dataset.dataset, f'{key}.dataset')
    elif 'datasets' in dataset:
        for i, inner in enumerate(dataset.datasets):
            yield from leaf_datasets(inner, f'{key}.datasets.{i}')
    else:
        yield key, dataset


def missing_paths(key: str, dataset: ConfigDict) -> dict[str, str]:
    """Option -> path for what a dataset needs and does not find.

    The dataset itself joins its paths, by a lazy build that reads no annotation.
    """
    cls = registered(DATASETS, dataset.type)
    if cls is not None:
        parameters = inspect.signature(cls).parameters
        downloads = 'download' in parameters and dataset.get('download', True)
        if downloads or not {'lazy_init', 'kwargs', 'args'} & set(parameters):
            return {}
    if dataset.get('data_root') and not _exists(dataset.data_root, dataset):
        return {f'{key}.data_root': dataset.data_root}
    built = DATASETS.build({**deepcopy(dataset), 'lazy_init': True})
    paths = {f'{key}.ann_file': built.ann_file}
    for name, prefix in built.data_prefix.items():
        paths[f'{key}.data_prefix.{name}'] = prefix
    return {option: path for option, path in paths.items() if path and not _exists(path, dataset)}


def _exists(path: str, dataset: ConfigDict) -> bool:
    return fileio.exists(path, backend_args=dataset.get('backend_args'))


def build_runner(cfg: Config) -> Runner:
    """Build the runner the config asks for; on CPU, processes talk through gloo."""
    if cfg.launcher != 'none' and get_device() == 'cpu':
        if cfg.launcher != 'pytorch':
            raise LaunchError(f'--launcher {cfg.launcher} needs GPUs: on CPU use torchrun and '
                              '--launcher pytorch')
        print_log('no GPU: the processes talk through gloo instead of nccl, and any SyncBN is BN')
        torch.distributed.init_process_group('gloo')
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)
