"""Configs, and what the runner builds of them, on the meta device: no memory, no data, no GPU."""
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p.relative_to(ROOT / 'configs').as_posix() for p in ROOT.glob('configs/*/*.py'))
CONFIGS = [name for name in CONFIGS if not name.startswith('_base_')]


def load(name: str) -> Config:
    """A config below configs/, its scope made the default."""
    cfg = Config.fromfile(ROOT / 'configs' / name)
    init_default_scope(cfg.default_scope)
    return cfg


def build_model(cfg: Config) -> torch.nn.Module:
    """The model on the meta device; a nano classifier stands in for the teacher's download."""
    model = deepcopy(cfg.model)
    model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    if 'teacher' in model:
        model.teacher = dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(
                type='mmgroupmamba.GroupMamba', arch='nano', out_indices=(3, ), final_norm=False),
            neck=dict(type='mmgroupmamba.ClassBlockNeck', embed_dim=96),
            head=dict(type='LinearClsHead', num_classes=model.head.num_classes, in_channels=96))
    with torch.device('meta'):
        return MODELS.build(model)


def build_optimizer(cfg: Config, model: torch.nn.Module) -> OptimWrapper:
    """The optimiser wrapper; AMP's needs a GPU, and groups parameters as the plain one does."""
    wrapper = deepcopy(cfg.optim_wrapper)
    wrapper.type = 'OptimWrapper'
    return build_optim_wrapper(model, wrapper)


def parameter_settings(model: torch.nn.Module,
                       wrapper: OptimWrapper) -> dict[str, SimpleNamespace]:
    """Parameter name -> lr and weight_decay; every parameter stands in one group."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    settings = {}
    for group in wrapper.optimizer.param_groups:
        for p in group['params']:
            name = names.pop(id(p))
            settings[name] = SimpleNamespace(lr=group['lr'], weight_decay=group['weight_decay'])
    assert not names, f'not optimised: {list(names.values())}'
    return settings


def learning_rates(cfg: Config, epoch_length: int) -> list[float]:
    """The LR of each iteration of a run, as the runner's hooks step the schedulers."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=cfg.optim_wrapper.optimizer.lr)
    iters = cfg.train_cfg.get('max_iters') or cfg.train_cfg.max_epochs * epoch_length
    schedulers = build_schedulers(cfg, OptimWrapper(optimizer), epoch_length)
    optimizer.step()  # torch warns where a scheduler steps before the optimiser ever did
    rates = []
    for i in range(iters):
        rates.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or (i + 1) % epoch_length == 0:
                scheduler.step()
    return rates


def build_schedulers(cfg: Config, wrapper: OptimWrapper, epoch_length: int) -> list:
    """The schedulers with the runner's default end."""
    ends = {True: cfg.train_cfg.get('max_epochs'), False: cfg.train_cfg.get('max_iters')}
    if ends[False] is None:
        ends[False] = ends[True] * epoch_length
    return [
        PARAM_SCHEDULERS.build(
            {'end': ends[row.get('by_epoch', True)], **row},
            default_args=dict(optimizer=wrapper, epoch_length=epoch_length))
        for row in cfg.param_scheduler
    ]
