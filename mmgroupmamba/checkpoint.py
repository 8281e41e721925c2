"""Official names and ours, and safe, strict reading of checkpoint files.

Our modules stack what the official code keeps in four modules ``mamba_g1`` to ``mamba_g4``.
:func:`official_name` says for each of our parameters where it stands in an official file; loading
and writing official files both follow from it.
"""
import os
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import nullcontext
from itertools import count
from typing import Any, Callable, Iterable, Optional

import numpy as np
import torch
import torch.nn as nn
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .registry import HOOKS, MODELS

OFFICIAL_SOURCE = ('the authors link theirs at https://github.com/Amshaker/GroupMamba'
                   '#model-weights')
_WRAPPERS = ('state_dict', 'model_ema', 'model')

# ours -> official, for what is renamed only; {i} counts stages from 0 here and from 1 there
_RENAMES = (
    (r'^stages\.0\.embed\.convs\.', 'patch_embed1.conv.'),
    (r'^stages\.(\d)\.embed\.', r'patch_embed<\1>.'),
    (r'^stages\.(\d)\.blocks\.(\d+)\.', r'block<\1>.\2.'),
    (r'^stages\.(\d)\.norm\.', r'norm<\1>.'),
    (r'^neck\.norm\.', 'norm4.'),
    (r'^neck\.', 'post_network.0.'),
    (r'^head\.fc\.', 'head.'),
    (r'^head\.dist_fc\.', 'dist_head.'),
    (r'\.mixer\.affinity\.', '.attn.'),
    (r'\.mixer\.ssm\.', '.attn.mamba_g#.'),
    (r'\.mixer\.', '.attn.'),
    (r'\.ffn\.conv\.', '.mlp.dwconv.dwconv.'),
    (r'\.ffn\.', '.mlp.'),
    (r'^(block<\d>\.\d+)\.norm\.', r'\1.norm2.'),
)
# inside an SSM, where '#' stands for the group 1 to 4
_SSM_RENAMES = {
    'gate_proj.weight': 'in_proj.weight',  # the lower half of it
    'conv.weight': 'conv2d.weight',
    'conv.bias': 'conv2d.bias',
    'x_proj.weight': 'x_proj_weight',
    'dt_proj.weight': 'dt_projs_weight',
    'dt_bias': 'dt_projs_bias',
    'A_log': 'A_logs',
    'D': 'Ds',
    'norm.weight': 'out_norm.weight',
    'norm.bias': 'out_norm.bias',
}
# the official tensors of these start with a dimension for the number of scans, always 1
_WITH_SCAN_COUNT = r'ssm\.(x_proj|dt_proj|dt_bias)'
# four groups one after the other; the other tensors get a dimension for the group
_CONCATENATED = r'ssm\.(conv|dt_bias|A_log|D\b)'
_CLASSIFICATION_ONLY = ('post_network.', 'head.', 'dist_head.')


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read or does not fit the model; one line says why."""


class _YacsConfig:
    """Takes the place of the yacs config that official training checkpoints carry.

    It becomes an OrderedDict, which torch's weights-only reader knows how to fill.
    """

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


def _history_method(owner: type, name: str):
    """Takes the place of ``getattr``, which mmengine's history needs for its own methods only."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL getattr of {owner}')
    return getattr(owner, name)


def read_checkpoint(path: str, remedy: str = '') -> dict:
    """Read a checkpoint file without running any code from it.

    Args:
        path: A local file, plain or with ``~``.
        remedy: What else the error for a missing file should say.

    Returns:
        What the file holds, its tensors on the CPU.

    Raises:
        CheckpointError: Missing, truncated, no checkpoint at all, or one that holds pickled
            objects other than those of torch, mmengine's history and yacs' config.
    """
    if '://' in path:
        raise CheckpointError(f'checkpoint {path} is an address: download it and give the file')
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise CheckpointError(
            f'checkpoint not found: {path}; put the file there or name another one{remedy}')
    # the context came with torch 2.5; torch.load falls back on its own list before
    safe_globals = getattr(torch.serialization, 'safe_globals', None)
    context = safe_globals(_safe_globals()) if safe_globals else nullcontext()
    try:
        with context:
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r'(?:GLOBAL|global)\s+`?([\w.]+)', str(error))
        if refused is None and not zipfile.is_zipfile(path):
            raise CheckpointError(f'{path} is no torch checkpoint, or damaged: fetch it '
                                  'again') from None
        culprit = f' ({refused[1]})' if refused else ''
        raise CheckpointError(
            f'{path} holds pickled objects{culprit}, which could run code when loaded; if '
            'you trust its source, keep its tensors only: python -c "import torch; '
            f"c = torch.load('{path}', weights_only=False); torch.save(c.get('model_ema', "
            "c.get('model', c.get('state_dict', c))), 'tensors_only.pth')\"") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f'{path} is truncated or damaged ({reason}): fetch it '
                              'again') from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}, no checkpoint: '
                              f'expected a state dict, plain or under {" / ".join(_WRAPPERS)}')
    return checkpoint


def use_safe_reader() -> None:
    """Make mmengine read local files by :func:`read_checkpoint`, for this process.

    Its own reader unpickles what the weights-only one refuses. ``load_from``, resuming and every
    ``init_cfg`` go through it.
    """
    CheckpointLoader.register_scheme(
        '', lambda filename, map_location: read_checkpoint(filename), force=True)


def _safe_globals() -> list:
    core = np.core if int(np.__version__.split('.')[0]) < 2 else np._core
    dtypes = {type(np.dtype(t)) for t in (*np.sctypeDict.values(), ) if t is not np.void}
    aliases = {
        'yacs.config.CfgNode': _YacsConfig,
        '__builtin__.getattr': _history_method,
        'builtins.getattr': _history_method,
    }
    for package in ('numpy.core', 'numpy._core'):  # before numpy 2 and since
        for name in ('_reconstruct', 'scalar'):
            aliases[f'{package}.multiarray.{name}'] = getattr(core.multiarray, name)
    return [
        HistoryBuffer, np.ndarray, np.dtype, *dtypes, OrderedDict, defaultdict,
        *(_alias(target, name) for name, target in aliases.items())
    ]


def _alias(target: Callable, name: str) -> Callable:
    """`target` under the full name that a file gives it; torch's reader goes by names."""
    module, _, attribute = name.rpartition('.')
    if isinstance(target, type):
        return type(attribute, (target, ), dict(__module__=module, __qualname__=attribute))

    def alias(*args: Any) -> Any:
        return target(*args)

    alias.__module__, alias.__name__, alias.__qualname__ = module, attribute, attribute
    return alias


def extract_state_dict(checkpoint: dict, path: str = 'checkpoint') -> dict[str, Tensor]:
    """The state dict of a checkpoint: under ``state_dict``, ``model_ema``, ``model``, or plain.

    A DataParallel prefix ``module.`` is taken off.

    Raises:
        CheckpointError: There is none.
    """
    state = next((checkpoint[key] for key in _WRAPPERS
                  if isinstance(checkpoint.get(key), dict) and checkpoint[key]), checkpoint)
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if not state:
        raise CheckpointError(f'{path} holds no state dict, neither plain nor under '
                              f'{" / ".join(_WRAPPERS)}: is it a checkpoint of a model?')
    if all(k.startswith('module.') for k in state):
        state = {k[len('module.'):]: v for k, v in state.items()}
    return state


def is_official(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is in the official layout."""
    return 'patch_embed1.proj.weight' in state


def official_name(name: str) -> str:
    """Where a parameter or buffer of ours stands in an official file.

    Args:
        name: Our name in a backbone ('stages.0.embed.proj.weight') or in a classifier's 'neck.'
            or 'head.'.

    Returns:
        The official name; '#' in it stands for the groups 1 to 4.
    """
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r'<(\d)>', lambda m: str(int(m[1]) + 1), name)
    start, mark, inner = name.partition('mamba_g#.')
    return start + mark + _SSM_RENAMES.get(inner, inner)


def from_official(official: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Our tensors made of official ones.

    Args:
        official: State dict in the official layout.
        names: Our names that are wanted.

    Returns:
        Our name to tensor, for those whose official tensors are all there.
    """
    ours = {}
    for name in names:
        source = official_name(name)
        if '#' not in source:
            if source in official:
                ours[name] = official[source]
            continue
        groups = [official.get(source.replace('#', str(g))) for g in (1, 2, 3, 4)]
        if all(group is not None for group in groups):
            ours[name] = _stack(name, groups)
    return ours


def _stack(name: str, groups: list[Tensor]) -> Tensor:
    """Four groups' official tensors as one of ours."""
    if re.search(_WITH_SCAN_COUNT, name):
        groups = [group.squeeze(0) for group in groups]
    if '.in_proj.' in name:
        groups = [group.chunk(2)[0] for group in groups]
    elif '.gate_proj.' in name:
        groups = [group.chunk(2)[1] for group in groups]
    if re.search(_CONCATENATED, name):
        return torch.cat(groups)
    return torch.stack(groups)


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors made of ours: the inverse of :func:`from_official`, bit for bit.

    Args:
        state: Names to tensors of a backbone, or of a classifier's neck and head beside it.

    Returns:
        Official name to tensor.
    """
    official = {}
    for name, tensor in state.items():
        target = official_name(name)
        if '#' not in target:
            official[target] = tensor
        elif not name.endswith('ssm.gate_proj.weight'):
            gate = state.get(name.replace('.in_proj.', '.gate_proj.'), tensor)
            for g, group in enumerate(_unstack(name, tensor, gate), 1):
                official[target.replace('#', str(g))] = group
    return official


def _unstack(name: str, tensor: Tensor, gate: Tensor) -> list[Tensor]:
    """The inverse of :func:`_stack`; `gate` is the other half of an in_proj."""
    if re.search(_CONCATENATED, name):
        groups = list(tensor.chunk(4))
    else:
        groups = list(tensor)
    if name.endswith('ssm.in_proj.weight'):
        groups = [torch.cat(halves) for halves in zip(groups, gate)]
    if re.search(_WITH_SCAN_COUNT, name):
        groups = [group[None] for group in groups]
    return [group.clone() for group in groups]


def _used_official_names(names: Iterable[str]) -> set[str]:
    return {
        source.replace('#', g)
        for source in map(official_name, names) for g in ('1234' if '#' in source else '0')
    }


def infer_arch(state: dict[str, Tensor]) -> Optional[dict]:
    """The dict arch that the shapes of a backbone's state dict tell, in either layout.

    Args:
        state: Names to tensors, ours without a prefix.

    Returns:
        A dict with the keys of the arch table, None where a part of the backbone is missing.
    """
    from .models.groupmamba import ARCHS
    name = official_name if is_official(state) else str

    def rows(of: str) -> int:
        return len(state[name(of)])

    try:
        depths = [
            next(j for j in count() if name(f'stages.{i}.blocks.{j}.norm.weight') not in state)
            for i in range(4)
        ]
        dims = [rows(f'stages.{i}.blocks.0.norm.weight') for i in range(4)]
        hidden = [rows(f'stages.{i}.blocks.0.ffn.fc1.weight') for i in range(4)]
        arch = dict(
            stem_hidden_dim=rows('stages.0.embed.convs.0.weight'),
            embed_dims=tuple(dims),
            depths=tuple(depths),
            mlp_ratios=tuple(h // d if h % d == 0 else h / d for h, d in zip(hidden, dims)))
    except KeyError:
        return None
    return next((dict(row) for row in ARCHS.values() if row == arch), arch)


def arch_of(state: dict[str, Tensor]) -> Optional[str]:
    """Name of the variant a backbone state dict is of, None where it is none of the table."""
    from .models.groupmamba import ARCHS
    arch = infer_arch(state)
    return next((name for name, row in ARCHS.items() if row == arch), None)


def check_match(model_state: dict[str, Tensor], state: dict[str, Tensor], what: str,
                unexpected: Iterable[str] = ()) -> None:
    """Raise unless `state` has every key of `model_state` in its shape and there are no others.

    Args:
        model_state: What the model holds.
        state: What the file holds, under our names.
        what: Start of the error's line, such as 'tiny.pth does not fit GroupMamba'.
        unexpected: Further keys of the file that the model lacks.

    Raises:
        CheckpointError: Names what is missing, unexpected or of another shape.
    """
    missing = [k for k in model_state if k not in state]
    unexpected = [*unexpected, *(k for k in state if k not in model_state)]
    mismatched = [
        f'{k} (file {tuple(state[k].shape)}, model {tuple(v.shape)})'
        for k, v in model_state.items() if k in state and state[k].shape != v.shape
    ]
    parts = [
        f'{len(keys)} {kind}: {", ".join(keys[:3])}{", ..." if len(keys) > 3 else ""}'
        for kind, keys in (('missing', missing), ('unexpected', unexpected),
                           ('of another shape', mismatched)) if keys
    ]
    if parts:
        raise CheckpointError(f'{what}: {"; ".join(parts)}')


def load_backbone(backbone: nn.Module, path: str, prefix: Optional[str] = None) -> None:
    """Load a GroupMamba backbone from an official checkpoint or one of ours, strictly.

    Official files are taken as published: what belongs to classification only (class block and
    heads) is set aside, everything else must match. Of our own checkpoints (classifier, detector,
    segmenter or backbone alone) the keys under `prefix` are taken.

    Args:
        backbone: A :class:`mmgroupmamba.models.GroupMamba`.
        path: Local file.
        prefix: What stands before the backbone's names in a checkpoint of ours; None finds out
            whether it is 'backbone.' or nothing.

    Raises:
        CheckpointError: The file is unreadable, holds another model or another variant.
    """
    remedy = (f' (model.backbone.init_cfg.checkpoint=FILE; {OFFICIAL_SOURCE}); '
              'model.backbone.init_cfg=None trains from scratch')
    state = extract_state_dict(read_checkpoint(path, remedy), path)
    wanted = backbone.state_dict()
    translated, unexpected = _backbone_state(state, wanted, prefix)
    _check_backbone(backbone, wanted, translated, unexpected, state, path)
    backbone.load_state_dict(translated)
    print_log(f'loaded {len(translated)} of {len(wanted)} backbone tensors from {path}',
              logger='current')


def _backbone_state(state: dict[str, Tensor], wanted: dict[str, Tensor],
                    prefix: Optional[str]) -> tuple[dict[str, Tensor], list[str]]:
    """What `state` holds for a backbone, under its names, and what it holds beyond."""
    if is_official(state):
        used = _used_official_names(wanted)
        aside = list(_CLASSIFICATION_ONLY)
        built = 1 + max(int(name.split('.')[1]) for name in wanted)
        aside += [f'{part}{i + 1}.' for i in range(built, 4) for part in ('patch_embed', 'block')]
        aside += [f'norm{i + 1}.' for i in range(4) if f'stages.{i}.norm.weight' not in wanted]
        unexpected = [k for k in state if k not in used and not k.startswith(tuple(aside))]
        return from_official(state, wanted), unexpected
    if prefix is None:
        prefix = 'backbone.' if any(k.startswith('backbone.') for k in state) else ''
    elif prefix and not prefix.endswith('.'):
        prefix += '.'
    own = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    translated = {k: v for k, v in own.items() if k in wanted}
    # a classifier keeps the last norm in its neck, a dense model in its backbone
    for part in ('weight', 'bias'):
        if f'stages.3.norm.{part}' in wanted and f'neck.norm.{part}' in state:
            translated.setdefault(f'stages.3.norm.{part}', state[f'neck.norm.{part}'])
    built = {int(name.split('.')[1]) for name in wanted}
    aside = ['stages.3.norm.', *(f'stages.{i}.' for i in range(4) if i not in built)]
    unexpected = [
        prefix + k for k in own if k not in wanted and not k.startswith(tuple(aside))
    ]
    return translated, unexpected


def _check_backbone(backbone: nn.Module, wanted: dict[str, Tensor], translated: dict[str, Tensor],
                    unexpected: list[str], state: dict[str, Tensor], path: str) -> None:
    from .models.groupmamba import ARCHS
    mine = next((name for name, row in ARCHS.items() if row == backbone.arch), 'of a dict')
    if not translated:
        raise CheckpointError(f"{path} holds no GroupMamba: not one of the backbone's "
                              f'{len(wanted)} tensors is in it (it starts with '
                              f'{", ".join(list(state)[:3])}); {OFFICIAL_SOURCE}')
    theirs = arch_of(state)
    if not is_official(state) and theirs is None:
        theirs = arch_of(translated)
    hint = f' (the file is of arch {theirs!r})' if theirs and theirs != mine else ''
    check_match(wanted, translated, f'{path} does not fit GroupMamba arch {mine!r}{hint}',
                unexpected)


def load_model(model: nn.Module, path: str, remedy: str = '') -> dict:
    """Load a whole model from an official checkpoint or one of ours; every key must match.

    Args:
        model: A classifier, detector or segmenter, of our backbone or another.
        path: Local file.
        remedy: As in :func:`read_checkpoint`.

    Returns:
        The checkpoint, for what it holds beside the weights (``meta``).

    Raises:
        CheckpointError: The file is unreadable or does not fit the model.
    """
    checkpoint = read_checkpoint(path, remedy)
    model.load_state_dict(fit_model(model, extract_state_dict(checkpoint, path), path))
    return checkpoint


def fit_model(model: nn.Module, state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """A file's state dict under the names of a whole model.

    Args:
        model: As in :func:`load_model`.
        state: What :func:`extract_state_dict` found.
        path: The file's name, for the error.

    Raises:
        CheckpointError: A key is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    translated, unexpected = _model_state(model, state)
    check_match(wanted, translated,
                f'{path} does not fit {type(model).__name__}{_head_hint(wanted, state)}',
                unexpected)
    return translated


def _has_own_backbone(model: nn.Module) -> bool:
    return isinstance(getattr(model, 'backbone', None), MODELS.get('GroupMamba'))


def _below_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k[len('backbone.'):]: v for k, v in state.items() if k.startswith('backbone.')}


def _model_state(model: nn.Module, state: dict[str, Tensor],
                 starting: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """`state` under the names of `model`, and the official keys it holds beyond."""
    if not _has_own_backbone(model):
        return state, []
    wanted = model.state_dict()
    backbone_keys = _below_backbone(wanted)
    backbone, unexpected = _backbone_state(state, backbone_keys, None)
    translated = {f'backbone.{k}': v for k, v in backbone.items()}
    if not is_official(state):
        # a dense model takes its last norm from a classifier's neck
        rest = {k: v for k, v in state.items()
                if not (starting and k.startswith('backbone.'))}
        return {**rest, **translated}, []
    if any(k.startswith('neck.mixer.') for k in wanted):
        rest = [k for k in wanted if k.startswith(('neck.', 'head.'))]
        translated.update(from_official(state, rest))
        used = _used_official_names([*rest, *backbone_keys])
        unexpected += [k for k in state if k not in used and k not in unexpected]
    return translated, unexpected


def _head_hint(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What to do where one of model and file has the distillation head and the other has not."""
    distilled = 'head.dist_fc.weight' in state or 'dist_head.weight' in state
    if distilled and 'head.fc.weight' in wanted and 'head.dist_fc.weight' not in wanted:
        return " (the file has two heads: set model.head.type='mmgroupmamba.DistilledLinearHead')"
    if not distilled and 'head.dist_fc.weight' in wanted and 'head.fc.weight' in state:
        return " (the file has one head: set model.head.type='LinearClsHead')"
    return ''


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Checks what ``load_from``, ``--resume`` and ``tools/test.py`` load, and takes official files.

    mmengine loads what matches and passes over the rest with a warning at most. With this hook

    - an official file is translated to the model's names before it is loaded;
    - to test or resume, every key must match; to train from ``load_from``, every key of the
      backbone must, and what else is new or left over is named in the log.

    Raises:
        CheckpointError: The checkpoint does not fit; one line names the culprits.
    """

    priority = 'VERY_HIGH'  # before EMAHook copies the state dict

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Translate and check `checkpoint`, in place."""
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        wanted = model.state_dict()
        path = str(getattr(runner, '_load_from', None) or 'checkpoint')
        state = extract_state_dict(checkpoint, path)
        training = isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict))
        if not training:
            # the state dict is the average already; EMAHook would swap in what TTA cannot load
            checkpoint.pop('ema_state_dict', None)
        if training and not runner._resume:
            translated, unexpected = _model_state(model, state, starting=True)
            if _has_own_backbone(model):
                found, backbone_keys = _below_backbone(translated), _below_backbone(wanted)
                extra = [k for k in unexpected if not k.startswith(_CLASSIFICATION_ONLY)]
                _check_backbone(model.backbone, backbone_keys, found, extra, state, path)
            self._log_rest(wanted, translated, path)
        else:
            translated = fit_model(model, state, path)
        checkpoint['state_dict'] = translated

    @staticmethod
    def _log_rest(wanted: dict[str, Tensor], state: dict[str, Tensor], path: str) -> None:
        new = [k for k in wanted if k not in state or state[k].shape != wanted[k].shape]
        left = [k for k in state if k not in wanted]
        if new:
            print_log(f'{len(new)} tensors are not taken from {path} and start anew: '
                      f'{", ".join(new)}', logger='current')
        if left:
            print_log(f'{len(left)} tensors of {path} are not used: {", ".join(left)}',
                      logger='current')
