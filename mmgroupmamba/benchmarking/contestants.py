"""What tools/analysis_tools/benchmark.py times side by side: ours, an official checkout, peers.

A contestant builds a module for each subject. The module maps one tensor to one or several; where
its layouts are its own, ``prepare(x)`` makes its input of the common one, and ``finish(outputs)``
the common output of its own, both outside what is timed. A part ``core`` has the weights where the
module itself has not.

An official checkout is imported from the user's folder; nothing of it is in this package.
"""
import difflib
import importlib
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from mmgroupmamba.checkpoint import from_official, to_official
from mmgroupmamba.launch import LaunchError, one_line, replace_sync_bn
from mmgroupmamba.models import GroupMamba
from mmgroupmamba.models.groupmamba import ARCHS
from mmgroupmamba.models.layers import GROUPS, ModulatedGroupMamba, init_weights
from mmgroupmamba.ops import (
    DIRECTIONS,
    available_backends,
    selective_scan,
)

SUBJECTS = {
    'scan': 'of four directions, from the map after the convolution to the merged map',
    'layer': 'the modulated layer',
    'backbone': 'image to four maps',
    'classifier': 'image to logits, class block and both heads included',
    'mask-rcnn': "loss; forward is mmdet's tensor mode",
    'upernet': "loss; forward is mmseg's tensor mode",
}
OF_A_MAP = ('scan', 'layer')
TASKS = {'mask-rcnn': 'mmdet', 'upernet': 'mmseg'}
NUM_CLASSES = 1000
_CONFIGS = Path(__file__).parents[2] / 'configs/_base_/models'


class Spec(NamedTuple):
    """What to build.

    Attributes:
        subject: Of :data:`SUBJECTS`.
        arch: Of the arch table; peers have their own.
        stage: 1 to 4, whose channels a scan or layer has.
        with_cp: Whether ours recomputes its blocks in the backward pass.
        fused_ops: What of ours runs as Triton kernels around the scan.
    """
    subject: str
    arch: str = 'tiny'
    stage: int = 1
    with_cp: bool = False
    fused_ops: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return ARCHS[self.arch]['embed_dims'][self.stage - 1]


class Scan(nn.Module):
    """(B, H, W, C) -> (B, H, W, C): all between a layer's depthwise convolution and its norm."""

    def __init__(self, mixer: ModulatedGroupMamba) -> None:
        super().__init__()
        self.core = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.core.ssm.scan(x).flatten(-2)


class Classifier(nn.Module):
    """Image -> logits of both heads while training, else their average."""

    def __init__(self, backbone: GroupMamba, scan_backend: str) -> None:
        super().__init__()
        from mmgroupmamba.models.classification import ClassBlockNeck, DistilledLinearHead
        channels = backbone.arch['embed_dims'][-1]
        self.backbone = backbone
        self.neck = ClassBlockNeck(channels, scan_backend=scan_backend)
        self.head = DistilledLinearHead(NUM_CLASSES, channels)

    def forward(self, x: Tensor) -> Any:
        feats = self.neck(self.backbone(x))
        return self.head.logits(feats) if self.training else self.head(feats)


class TaskModel(nn.Module):
    """Detector or segmentor around a pyramid: images -> loss while training, else raw outputs.

    The heads are those of our Mask R-CNN and UperNet configs.
    """

    def __init__(self, subject: str, pyramid: nn.Module, channels: list[int]) -> None:
        super().__init__()
        name = dict(mmdet='mask-rcnn_groupmamba_fpn.py', mmseg='upernet_groupmamba.py')
        self.scope = TASKS[subject]
        cfg = Config.fromfile(_CONFIGS / name[self.scope]).model
        cfg.backbone = dict(type='mmgroupmamba.GroupMamba', arch='nano')  # replaced below
        if self.scope == 'mmdet':
            cfg.neck.in_channels = channels
        else:
            cfg.decode_head.in_channels = channels
            cfg.auxiliary_head.in_channels = channels[cfg.auxiliary_head.in_index]
            cfg.data_preprocessor.size = None
        replace_sync_bn(cfg)
        with DefaultScope.overwrite_default_scope(self.scope), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # mmseg's, of losses
            self.model = MODELS.build(cfg)
        self.model.backbone = pyramid

    @property
    def core(self) -> nn.Module:
        return core(self.model.backbone)

    def prepare(self, x: Tensor) -> Tensor:
        """Make data samples for a batch, and pad it as the detector's preprocessor does."""
        batch, _, height, width = x.shape
        if self.scope == 'mmdet':
            from mmdet.testing import demo_mm_inputs
            data = demo_mm_inputs(batch, (3, height, width), [8] * batch, 80, with_mask=True,
                                  device=x.device)
            self.samples = self.model.data_preprocessor(data, True)['data_samples']
            return F.pad(x, (0, -width % 32, 0, -height % 32))
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        shape = (height, width)
        self.samples = []
        for _ in range(batch):
            labels = torch.randint(0, 150, (1, *shape), device=x.device)
            self.samples.append(SegDataSample(
                gt_sem_seg=PixelData(data=labels),
                metainfo=dict(ori_shape=shape, img_shape=shape, pad_shape=shape)))
        return x

    def forward(self, x: Tensor) -> Any:
        mode = 'loss' if self.training else 'tensor'
        outputs = self.model(x, self.samples, mode=mode)
        return self.model.parse_losses(outputs)[0] if self.training else outputs


class Contestant:
    """What is timed under one name.

    Attributes:
        name: Its name in the table.
        gated: Whether the gate compares it with our weights.
        subjects: Those it can be built for.
    """
    gated = True
    subjects = tuple(SUBJECTS)

    def __init__(self, name: str) -> None:
        self.name = name

    def build(self, spec: Spec) -> nn.Module:
        """The subject's module, float32, on CPU, with weights of its own."""
        if spec.subject in TASKS:
            pyramid = self.build(spec._replace(subject='backbone'))
            return TaskModel(spec.subject, pyramid, self._channels(spec, pyramid))
        return self._build(spec)

    def _channels(self, spec: Spec, pyramid: nn.Module) -> list[int]:
        return list(ARCHS[spec.arch]['embed_dims'])

    def _build(self, spec: Spec) -> nn.Module:
        raise NotImplementedError

    def load(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        """Take weights that stand under our names."""

    def gradients(self, module: nn.Module, names: list[str]) -> dict[str, Tensor]:
        """Gradients under our names."""
        raise NotImplementedError


def core(module: nn.Module) -> nn.Module:
    """The part of a subject's module that has the weights."""
    return getattr(module, 'core', module)


class Ours(Contestant):
    """GroupMamba with one of the scan backends, which is its name."""

    def _build(self, spec: Spec) -> nn.Module:
        if spec.subject in OF_A_MAP:
            mixer = ModulatedGroupMamba(spec.channels, self.name, spec.fused_ops)
            mixer.apply(init_weights)
            return Scan(mixer) if spec.subject == 'scan' else mixer
        pyramid = spec.subject == 'backbone'
        options = {} if pyramid else dict(out_indices=(3, ), final_norm=False)
        backbone = GroupMamba(spec.arch, with_cp=spec.with_cp, scan_backend=self.name,
                              fused_ops=spec.fused_ops, **options)
        return backbone if pyramid else Classifier(backbone, self.name)

    def load(self, module, weights):
        core(module).load_state_dict(
            {k: weights[k.removeprefix('backbone.')] for k in core(module).state_dict()})

    def gradients(self, module, names):
        return {k.removeprefix('backbone.'): p.grad for k, p in core(module).named_parameters()}

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Its weights, stirred so that no scale is 1 and no bias 0."""
        return {k.removeprefix('backbone.'): v + 0.02 * torch.randn_like(v) * (v.dim() > 0)
                if 'running' not in k and v.is_floating_point() else v.clone()
                for k, v in core(module).state_dict().items()}


class _Absent(types.ModuleType):
    """Stands in for a module that is not installed, as long as nothing of it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise LaunchError(f'the official code calls {self.__name__}.{name}: install '
                              f'{self.__name__.split(".")[0]}')

        return missing


def import_official(folder: str) -> tuple[types.ModuleType, types.ModuleType, list[str]]:
    """Import classification/models/groupmamba.py of a checkout, and leave no flag changed.

    Returns:
        Its groupmamba and its ss2d module (the module itself where there is none), and notes on
        what was done to them.

    Raises:
        LaunchError: There is no such file, or it cannot be imported.
    """
    path = Path(folder) / 'classification/models'
    if not (path / 'groupmamba.py').is_file():
        raise LaunchError(f'--official {folder}: there is no classification/models/groupmamba.py '
                          'in it: name the folder of a checkout')
    name = '_official_groupmamba'
    for loaded in [m for m in sys.modules if m == name or m.startswith(f'{name}.')]:
        del sys.modules[loaded]
    package = types.ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package
    notes, absent = [], []
    cudnn = torch.backends.cudnn
    flags = {k: getattr(cudnn, k) for k in ('enabled', 'benchmark', 'deterministic')}
    try:
        while True:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    module = importlib.import_module(f'{name}.groupmamba')
                break
            except ModuleNotFoundError as error:
                while isinstance(error.__context__, ModuleNotFoundError):
                    error = error.__context__  # a bare except may hide the first one
                if error.name in sys.modules:
                    raise
                sys.modules[error.name] = _Absent(error.name)
                absent.append(error.name)
    except Exception as error:
        raise LaunchError(f'--official {folder} cannot be imported: {type(error).__name__}: '
                          f'{one_line(error)}') from error
    finally:
        for stub in absent:
            sys.modules.pop(stub, None)
        changed = [f'{k}={getattr(cudnn, k)}' for k in flags if getattr(cudnn, k) != flags[k]]
        for k, value in flags.items():
            setattr(cudnn, k, value)
    if absent:
        notes.append(f'official: not installed and left out of its imports: {", ".join(absent)}')
    if changed:
        notes.append(f'official: its import set cudnn {", ".join(changed)}; set back')
    return module, sys.modules.get(f'{name}.ss2d', module), notes


def with_right_gradient(scan: Any, reverse: bool) -> type:
    """The official unrolling along columns (B, d, H, W) -> (B, 1, d, L) with a right backward."""

    class ColumnScan(torch.autograd.Function):

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.shape = x.shape
            return scan.forward(ctx, x)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            height, width = ctx.shape[2:]
            grad = grad[:, 0].flip(-1) if reverse else grad[:, 0]
            return grad.unflatten(-1, (width, height)).transpose(2, 3).contiguous()

    return ColumnScan


def plain_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
               delta_bias: Tensor, delta_softplus: bool) -> Tensor:
    """The scan as a fair stand-in for a kernel that a CPU lacks: one operation a token.

    Shapes as :func:`mmgroupmamba.ops.selective_scan`, with one group. The reference backend reads
    as the formula instead, and takes ten.
    """
    delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    tokens_first = delta.permute(2, 0, 1)[..., None]  # (L, batch, d, 1)
    decay = torch.exp(tokens_first * A)  # (L, batch, d, N)
    drive = tokens_first * u.permute(2, 0, 1)[..., None] * B.permute(3, 0, 1, 2)
    h = torch.zeros_like(drive[0])
    states = []
    for decay_t, drive_t in zip(decay.unbind(), drive.unbind()):
        h = torch.addcmul(drive_t, decay_t, h)
        states.append(h)
    y = (torch.stack(states) * C.permute(3, 0, 1, 2)).sum(-1)  # (L, batch, d)
    return y.permute(1, 2, 0) + D[:, None] * u


class ScanKernel:
    """A scan of ours where the official code looks for its CUDA extension: 'loop' or a backend."""

    def __init__(self, name: str) -> None:
        self.scan = plain_loop if name == 'loop' else partial(selective_scan, backend=name)

    def apply(self, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, *_) -> Tensor:
        return self.scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


class OfficialLayer(nn.Module):

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.core = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x.flatten(1, 2), *x.shape[1:3]).unflatten(1, x.shape[1:3])


class OfficialScan(nn.Module):
    """The four official scans in turn, each from its (B, d, H, W) to its (B, H, W, d)."""

    def __init__(self, layer: nn.Module, crossings: list[tuple[type, type]]) -> None:
        super().__init__()
        self.core = layer
        self.crossings = crossings
        self.parts = [getattr(layer, f'mamba_g{g}') for g in range(1, GROUPS + 1)]
        for part in self.parts:
            part.out_norm = nn.Identity()  # ours is outside the scan

    def prepare(self, x: Tensor) -> Tensor:
        """What the official convolution gives: group by group, channels first."""
        return x.unflatten(-1, (GROUPS, -1)).permute(3, 0, 4, 1, 2).contiguous()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.forward_core(group, CrossScan=scan, CrossMerge=merge)
                     for part, group, (scan, merge) in zip(self.parts, x, self.crossings))

    def finish(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(outputs, -1)


class OfficialPyramid(nn.Module):
    """The official stages as a backbone: each stage's normed map, channels first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name in ('post_network', 'head', 'dist_head'):
            if hasattr(model, name):
                delattr(model, name)
        self.core = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = []
        for i in range(1, 5):
            embed, blocks, norm = (getattr(self.core, f'{part}{i}')
                                   for part in ('patch_embed', 'block', 'norm'))
            x, height, width = embed(x)
            for block in blocks:
                x = block(x, height, width)
            x = norm(x).unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()
            outs.append(x)
        return tuple(outs)


class Official(Contestant):
    """The model of an official checkout.

    Args:
        folder: The checkout.
        scan: What scans in place of its CUDA extension: 'loop', one of our backends, or 'auto':
            the extension itself where that is installed, or else mamba-ssm's kernel on CUDA, or
            else the loop.
        device: 'cpu' or 'cuda'.
    """
    # where our names and the official ones have a layer
    ours_at, theirs_at = 'stages.0.blocks.0.mixer.', 'block1.0.attn.'

    def __init__(self, folder: str, scan: str, device: str) -> None:
        super().__init__('official')
        self.module, ss2d, self.notes = import_official(folder)
        fixed = []
        for g, direction in enumerate(DIRECTIONS, 1):
            name = f'CrossScan_{g}'
            if direction.by_columns and hasattr(self.module, name):
                unrolling = getattr(self.module, name)
                setattr(self.module, name, with_right_gradient(unrolling, direction.backward))
                fixed.append(name)
        self.notes.append(f'official: backward of {", ".join(fixed) or "no scan"} replaced by the '
                          'right one')
        own = importlib.util.find_spec('selective_scan_cuda_core') and device == 'cuda'
        if scan == 'auto' and not own:
            scan = 'mamba_ssm' if available_backends(device)['mamba_ssm'] is None else 'loop'
        if scan == 'auto':
            self.notes.append('official: scans with its own CUDA extension')
        else:
            ss2d.SelectiveScanCore = ScanKernel(scan)
            self.notes.append(f'official: scans with our {scan!r} in place of its CUDA extension, '
                              'four times a layer')

    def _build(self, spec: Spec) -> nn.Module:
        if spec.subject in OF_A_MAP:
            layer = self.module.GroupMambaLayer(spec.channels, spec.channels)
            if spec.subject == 'layer':
                return OfficialLayer(layer)
            return OfficialScan(layer, [
                tuple(getattr(self.module, f'Cross{kind}_{g}') for kind in ('Scan', 'Merge'))
                for g in range(1, GROUPS + 1)])
        model = self.module.GroupMamba(
            num_classes=NUM_CLASSES, norm_layer=partial(nn.LayerNorm, eps=1e-6),
            **ARCHS[spec.arch])
        return OfficialPyramid(model) if spec.subject == 'backbone' else model

    def _prefixes(self, names: list[str]) -> tuple[str, str]:
        whole = any(name.startswith('stages.') for name in names)
        return ('', '') if whole else (self.ours_at, self.theirs_at)

    def load(self, module, weights):
        ours, theirs = self._prefixes(list(weights))
        state = to_official({ours + k: v for k, v in weights.items()})
        state = {k.removeprefix(theirs): v for k, v in state.items()}
        wanted = core(module).state_dict()
        core(module).load_state_dict({k: state[k] for k in wanted if k in state}, strict=not (
            isinstance(module, OfficialScan)))  # whose norms are outside

    def gradients(self, module, names):
        ours, theirs = self._prefixes(names)
        grads = {theirs + k: p.grad for k, p in core(module).named_parameters()
                 if p.grad is not None}
        found = from_official(grads, [ours + name for name in names])
        return {k.removeprefix(ours): v for k, v in found.items()}


class Peer(Contestant):
    """Another model for scale: of mmpretrain, of timm, or made by a function of a file."""
    gated = False
    subjects = tuple(s for s in SUBJECTS if s not in OF_A_MAP)

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.make = self._from_file() if ':' in name else self._from_library()

    def _from_file(self) -> Callable[[bool], nn.Module]:
        path, _, factory = self.name.rpartition(':')
        if not Path(path).is_file():
            raise LaunchError(f'--against {self.name}: there is no file {path}')
        # a module that can be imported by its name again: torch.compile does
        module = types.ModuleType(re.sub(r'\W', '_', str(Path(path).resolve())))
        module.__file__ = path
        sys.modules[module.__name__] = module
        try:
            exec(compile(Path(path).read_bytes(), path, 'exec'), vars(module))
            make = getattr(module, factory, None)
        except Exception as error:
            del sys.modules[module.__name__]
            raise LaunchError(f'--against {self.name} does not load: {type(error).__name__}: '
                              f'{one_line(error)}') from error
        if not callable(make):
            raise LaunchError(f'--against {self.name}: {path} has no function {factory}')
        self.name = f'{Path(path).stem}:{factory}'
        return lambda pyramid: make()

    def _from_library(self) -> Callable[[bool], nn.Module]:
        import timm
        from mmpretrain import ModelHub, list_models
        known = list_models()
        # 'swin-tiny' is the first config of that name for ImageNet-1K, 'swin-tiny_16xb64_in1k'
        full = [n for n in known if n == self.name] or sorted(
            (n for n in known if re.fullmatch(rf'{re.escape(self.name)}_\d+xb\d+_in1k', n)))
        if full:
            def from_mmpretrain(pyramid: bool) -> nn.Module:
                cfg = deepcopy(ModelHub.get(full[0]).config.model)
                backbone = cfg.backbone
                if backbone.type == 'SwinTransformer':
                    backbone.pad_small_map = True  # maps smaller than a window
                if pyramid:
                    backbone.out_indices = (0, 1, 2, 3)
                    if backbone.type == 'ConvNeXt':
                        backbone.gap_before_final_norm = False
                cfg.train_cfg = cfg.backbone.init_cfg = None
                with DefaultScope.overwrite_default_scope('mmpretrain'):
                    return MODELS.build(backbone if pyramid else cfg)

            return from_mmpretrain
        if timm.is_model(self.name):
            return lambda pyramid: timm.create_model(self.name, pretrained=False,
                                                     **dict(features_only=True) if pyramid else {})
        close = difflib.get_close_matches(self.name, [*known, *timm.list_models()], 3)
        raise LaunchError(f'--against {self.name}: neither mmpretrain nor timm has such a model'
                          f'{f" (did you mean {chr(44).join(close)}?)" if close else ""}, and a '
                          'file is named FILE.py:FUNCTION')

    def _build(self, spec: Spec) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return self.make(spec.subject == 'backbone')

    def _channels(self, spec: Spec, pyramid: nn.Module) -> list[int]:
        pyramid.eval()
        with torch.no_grad():
            maps = pyramid(torch.zeros(1, 3, 64, 64))
        shapes = [tuple(m.shape[1:]) for m in maps]
        if [shape[1:] for shape in shapes] != [(16, 16), (8, 8), (4, 4), (2, 2)]:
            raise LaunchError(f'{self.name}: {spec.subject} needs four maps of strides 4 to 32, of '
                              f'64 x 64 pixels it makes {shapes}')
        return [shape[0] for shape in shapes]
