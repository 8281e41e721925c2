"""GroupMamba, the backbone: arch table, four stages, a pyramid; nothing of any task.

Shaker et al., "GroupMamba: Efficient Group-Based Visual State Space Model", CVPR 2025.
"""
from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmgroupmamba.checkpoint import load_backbone
from mmgroupmamba.ops import check_backend, check_fused_ops
from mmgroupmamba.registry import MODELS

from .layers import (
    GROUPS,
    Block,
    Downsample,
    LayerNorm,
    Pending,
    Stem,
    init_weights,
    is_plain,
    norm_twice,
)

MIN_SIZE = 32

ARCHS = {
    # ours, for the demo and the tests: not in the paper
    'nano': dict(
        stem_hidden_dim=16, embed_dims=(32, 48, 64, 96), depths=(1, 1, 2, 1),
        mlp_ratios=(4, 4, 4, 4)),
    # the paper's
    'tiny': dict(
        stem_hidden_dim=32, embed_dims=(64, 128, 348, 448), depths=(3, 4, 9, 3),
        mlp_ratios=(8, 8, 4, 4)),
    'small': dict(
        stem_hidden_dim=64, embed_dims=(64, 128, 348, 512), depths=(3, 4, 16, 3),
        mlp_ratios=(8, 8, 4, 4)),
    'base': dict(
        stem_hidden_dim=64, embed_dims=(96, 192, 424, 512), depths=(3, 6, 21, 3),
        mlp_ratios=(8, 8, 4, 4)),
}


def resolve_arch(arch: Union[str, dict]) -> dict:
    """The arch's row as a dict, checked.

    Raises:
        ValueError: Unknown name or key, or values that make no GroupMamba; names the culprit.
    """
    keys = tuple(ARCHS['tiny'])
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'unknown arch {arch!r}: choose one of {", ".join(ARCHS)}, '
                             f'or a dict with the keys {", ".join(keys)}')
        return ARCHS[arch]
    if not isinstance(arch, dict):
        raise ValueError(f'arch must be a name or a dict, got {type(arch).__name__}')
    if set(arch) != set(keys):
        unknown, missing = sorted(set(arch) - set(keys)), sorted(set(keys) - set(arch))
        raise ValueError(f'a dict arch has exactly the keys {", ".join(keys)}; '
                         f'unknown: {unknown or "none"}, missing: {missing or "none"}')
    for key in keys[1:]:
        if not isinstance(arch[key], (list, tuple)) or len(arch[key]) != 4:
            raise ValueError(f'arch {key} must hold one value for each of the four stages, '
                             f'got {arch[key]!r}')
        kinds = {int, float} if key == 'mlp_ratios' else {int}  # a bool is neither
        if not all(type(value) in kinds for value in arch[key]):
            raise ValueError(f'arch {key} must be {"" if float in kinds else "whole "}numbers, '
                             f'got {tuple(arch[key])}')
        if any(value <= 0 for value in arch[key]):
            raise ValueError(f'arch {key} must be positive, got {tuple(arch[key])}')
    if not isinstance(arch['stem_hidden_dim'], int) or arch['stem_hidden_dim'] <= 0:
        raise ValueError('arch stem_hidden_dim must be a positive whole number, got '
                         f'{arch["stem_hidden_dim"]!r}')
    for dim in arch['embed_dims']:
        if dim % GROUPS or dim < 16:
            raise ValueError(f'arch embed_dims must be divisible by {GROUPS} (one quarter of the '
                             f'channels a scan direction) and at least 16, got {dim} in '
                             f'{tuple(arch["embed_dims"])}')
    return dict(arch)


class Stage(nn.Module):
    """Patch embedding, blocks and the norm through which the map leaves the stage.

    Attributes:
        crop: Takes padding channels from the map for whoever is outside the backbone; see
            :func:`~.fuse.pad_channels`.
        joins_norms: Whether the first two norms are one in inference; see ``models/joined.py``.
    """

    def __init__(self, embed: nn.Module, blocks: list[Block], norm: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.crop = nn.Identity()
        self.joins_norms = False

    def forward(self, x: Tensor, with_cp: bool = False) -> Tensor:
        recompute = with_cp and torch.is_grad_enabled()
        # the stream and, where sums go with the next norm, what is left to be added to it
        maps = norm_twice(self.embed, self.blocks[0], x) if self.joins_norms else None
        if maps is None:
            maps = (self.embed(x), )
        for block in self.blocks:
            if isinstance(maps[-1], Pending) and not is_plain(block, {Block}):
                maps = maps[0], maps[1].settle()
            maps = checkpoint(block, *maps, use_reentrant=False) if recompute else block(*maps)
            if isinstance(maps, Tensor):
                maps = (maps, )
        if len(maps) == 1:
            return self.norm(maps[0])
        x, branch = maps
        plain = isinstance(self.norm, LayerNorm) and is_plain(self.norm)
        if isinstance(branch, Pending):
            if plain:
                return branch.sum_and_norm(x, self.norm)[1]
            branch = branch.settle()
        return self.norm.of_sum(branch, x)[1] if plain else self.norm(x + branch)


@MODELS.register_module()
class GroupMamba(BaseModule):
    """GroupMamba backbone.

    Args:
        arch: 'nano' (ours), 'tiny', 'small', 'base' (the paper's), or a dict with exactly the
            keys ``stem_hidden_dim`` (int) and ``embed_dims``, ``depths``, ``mlp_ratios`` (four
            values each). embed_dims are divisible by 4.
        out_indices: Stages whose maps are returned, ascending, of 0 to 3. Stages after the last
            of them are not built.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and stages 1 to k: no gradient,
            norms in eval mode.
        norm_eval: Keep the stem's BatchNorm in eval mode while training.
        with_cp: Recompute the blocks in the backward pass: less memory, more time.
        final_norm: Norm stage 4's map. ImageNet classification turns it off: there the norm
            belongs to the class token (:class:`~.classification.ClassBlockNeck`).
        scan_backend: 'auto', 'reference', 'blocked', 'mamba_ssm' or 'triton'; see
            :func:`mmgroupmamba.ops.selective_scan`.
        fused_ops: 'all', or of 'depthwise_conv' (with bias and activation; the feed-forward's is
            computed again in the backward pass), 'layer_norm', 'add_layer_norm' (residual sum and
            norm), 'channel_affinity' (mean, both linear maps and sigmoid), 'modulate_layer_norm'
            (the groups' product with the layer's input and its norm) and 'gated_layer_norm' (the
            groups' norms and gate): those that run as Triton kernels on CUDA, one each but for the
            affinity's two. The others run as PyTorch defines them. With 'all', a block trains as
            one function (:func:`mmgroupmamba.ops.training_block`), unless a module in it was
            replaced or has a hook.
        init_cfg: As in mmengine. ``dict(type='Pretrained', checkpoint=FILE)`` takes official
            checkpoints as they are and our own; see :func:`mmgroupmamba.checkpoint.load_backbone`.

    Raises:
        ValueError: An argument is none of the above.
        BackendUnavailableError: `scan_backend` or `fused_ops` names what cannot run here.
    """

    def __init__(self,
                 arch: Union[str, dict] = 'tiny',
                 out_indices: tuple[int, ...] = (0, 1, 2, 3),
                 drop_path_rate: float = 0.,
                 frozen_stages: int = -1,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 final_norm: bool = True,
                 scan_backend: str = 'auto',
                 fused_ops: Union[str, Sequence[str]] = (),
                 init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.arch = resolve_arch(arch)
        if not isinstance(out_indices, (list, tuple)):
            raise ValueError(f'out_indices must be a list of stages, such as (3, ), got '
                             f'{out_indices!r}')
        out_indices = tuple(out_indices)
        if not out_indices or sorted(set(out_indices) & set(range(4))) != list(out_indices):
            raise ValueError(f'out_indices must be ascending and of 0, 1, 2, 3, got {out_indices}')
        if frozen_stages not in range(-1, 5):
            raise ValueError(f'frozen_stages must be -1 to 4, got {frozen_stages}')
        if not isinstance(drop_path_rate, (int, float)) or not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
        check_backend(scan_backend)
        fused_ops = check_fused_ops(fused_ops)
        if (isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained'
                and not isinstance(init_cfg.get('checkpoint'), str)):
            raise ValueError(f'init_cfg of type Pretrained needs checkpoint=FILE, got {init_cfg}')
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

        dims, depths = self.arch['embed_dims'], self.arch['depths']
        rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').split(list(depths))
        self.stages = nn.ModuleList()
        for i in range(out_indices[-1] + 1):
            embed = (
                Downsample(dims[i - 1], dims[i], fused_ops) if i else
                Stem(self.arch['stem_hidden_dim'], dims[0], fused_ops))
            blocks = [
                Block(dims[i], self.arch['mlp_ratios'][i], rate, scan_backend, fused_ops)
                for rate in rates[i].tolist()
            ]
            norm = (
                LayerNorm(dims[i], 1e-6, i not in out_indices, fused_ops)
                if i < 3 or final_norm else nn.Identity())
            self.stages.append(Stage(embed, blocks, norm))
        self.apply(init_weights)
        self._freeze()

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; fresh weights are drawn at construction.

        Raises:
            CheckpointError: The file cannot be read or does not fit this backbone.
        """
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Pretrained':
            load_backbone(self, self.init_cfg['checkpoint'], self.init_cfg.get('prefix'))
            self._is_init = True
        else:
            super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature pyramid of an image batch.

        Args:
            x: (B, 3, H, W), H and W at least 32.

        Returns:
            A map (B, C_i, ceil(H / 2**(i + 2)), ceil(W / 2**(i + 2))) for each i of out_indices,
            normed and contiguous: mmcv's RoIAlign reads channels-last memory as if it were not.

        Raises:
            ValueError: An image is smaller than 32 pixels.
        """
        if min(x.shape[-2:]) < MIN_SIZE:
            raise ValueError(f'GroupMamba needs images of at least {MIN_SIZE}x{MIN_SIZE} pixels, '
                             f'got {x.shape[-2]}x{x.shape[-1]} (H x W): resize or pad them')
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x, self.with_cp and self.training)
            if i in self.out_indices:
                outs.append(stage.crop(x).permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def _freeze(self) -> None:
        frozen = list(self.stages[:self.frozen_stages]) if self.frozen_stages > 0 else []
        if self.frozen_stages >= 0:
            frozen.append(self.stages[0].embed)
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'GroupMamba':
        """As ``nn.Module.train``, except for frozen stages and, with norm_eval, BatchNorm."""
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay (mmpretrain's constructor).

        Args:
            param_name: Name of the parameter in the model.
            prefix: What stands before this backbone's own names, such as 'backbone.'.

        Returns:
            (depth, number of depths): the stem is 0, block k of all blocks is k + 1 with the
            downsampling before it and the stage norm after it, what is outside is the last.
        """
        depths = self.arch['depths']
        num_layers = sum(depths) + 2
        if not param_name.startswith(prefix + 'stages.'):
            return num_layers - 1, num_layers
        stage, part, *rest = param_name[len(prefix + 'stages.'):].split('.')
        stage = int(stage)
        before = sum(depths[:stage])
        if part == 'embed':
            return (before + 1 if stage else 0), num_layers
        if part == 'norm':
            return before + depths[stage], num_layers
        return before + int(rest[0]) + 1, num_layers
