"""A block's training pass as one function: the same kernels and matrix products as its modules, the
backward written out.

The modules of ``models/layers.py`` are the definition. In eager training the host's time for each
operation, its autograd node and the casts of its weights outweighs a GPU's. Here all weights of a
block are cast at once, gradients that meet are summed by the products that make them, and one node
stands for some sixty. Of the wide maps, the one behind the feed-forward's convolution is computed
again in the backward.
"""
from functools import lru_cache
from math import prod
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from . import around_scan_triton as around
from . import scan_triton
from .directions import DIRECTIONS
from .operator import traced
from .precision import linear_dtype, without_autocast
from .selective_scan import resolve_backend

_GROUPED = 4  # of the weights, how many are grouped linear maps
_HALF = 9  # how many have gradients in the products' dtype
_LINEAR = 10  # and how many stand in products
_ALIGN = 8  # values in 16 bytes of half precision: where a large matrix starts


class BlockWeights(NamedTuple):
    """Weights of a block, as its modules hold them; (4, out, in) are grouped linear maps.

    The large matrices come first: cast together, they then start at multiples of 16 bytes.
    """
    in_proj: Tensor  # (4, d, d)
    gate_proj: Tensor  # (4, d, d)
    x_proj: Tensor  # (4, R + 2N, d)
    out_proj: Tensor  # (4, d, d)
    proj: Tensor  # (C, C)
    fc1: Tensor  # (D, C)
    fc2: Tensor  # (C, D)
    fc1_bias: Tensor
    fc2_bias: Tensor
    proj_bias: Tensor
    # from here on, what kernels read
    squeeze: Tensor  # the affinity's, (C / 16, C)
    squeeze_bias: Tensor
    excite: Tensor  # (C, C / 16)
    excite_bias: Tensor
    skip_scale: Tensor  # (1,)
    norm: Tensor
    norm_bias: Tensor
    conv: Tensor  # (C, 1, 3, 3)
    conv_bias: Tensor
    dt_proj: Tensor  # (4, d, R)
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    group_norm: Tensor  # (4, d)
    group_norm_bias: Tensor
    ffn_norm: Tensor
    ffn_norm_bias: Tensor
    ffn_conv: Tensor  # (D, 1, 3, 3)
    ffn_conv_bias: Tensor


class _Layer(NamedTuple):
    """What the layer's backward takes, maps (B, H, W, C) but where it says otherwise."""
    total: Tensor  # what was normed
    normed: Tensor
    joint: Tensor  # before convolution and gate, (B, H, W, 2C)
    convolved: Tensor
    rows: Tensor  # step, B and C, (B, H, W, 4, R + 2N)
    states: Tensor  # that the scan's backward starts from
    scanned: Tensor  # (B, H, W, 4, d)
    gated: Tensor
    out: Tensor
    mean: Tensor  # (B, C), like what follows in float32
    squeezed: Tensor  # (B, C / 16)
    affinity: Tensor  # (B, C)
    factor: Tensor  # (B, 1, 1, C)
    modulated: Tensor


class _FeedForward(NamedTuple):
    """Likewise the feed-forward's."""
    total: Tensor
    normed: Tensor
    wide: Tensor  # before the convolution, (B, H, W, D)


def trains_whole(x: Tensor, weights: BlockWeights, scan_backend: str) -> bool:
    """Whether :func:`training_block` runs on a map, with gradients, in eager PyTorch."""
    return (torch.is_grad_enabled() and not traced()
            and all(t.dtype != torch.float64 for t in (x, *weights))
            and len(weights.squeeze) < len(weights.norm)  # a row for sums of both
            and resolve_backend(scan_backend, x.device.type, x.dtype) == 'triton'
            and weights.A_log.shape[1] <= scan_triton.MAX_STATES
            and weights.dt_proj.shape[2] <= scan_triton.MAX_RANK)


def training_block(x: Tensor, branch: Optional[Tensor], keep: Optional[Tensor],
                   weights: BlockWeights, eps: float, ffn_eps: float) -> tuple[Tensor, Tensor]:
    """A block of GroupMamba: layer and feed-forward, each with its residual and, before it, norm.

    Args:
        x: The stream, (B, H, W, C).
        branch: What the block before this one left to be added to it, or None.
        keep: Stochastic depth: factors of the layer's output and of the feed-forward's,
            (2, B, 1, 1, 1), or None.
        weights: Of the block. Products are in autocast's dtype.
        eps, ffn_eps: Of the norms.

    Returns:
        The stream, and what is left to be added to it, both (B, H, W, C).

    Raises:
        ValueError: Shapes or devices do not fit together.
    """
    channels = len(weights.norm)
    if x.dim() != 4 or 0 in x.shape or x.shape[3] != channels:
        raise ValueError(f'training_block: x must be (B, H, W, {channels}) and not empty, got '
                         f'{tuple(x.shape)}')
    if len(weights.squeeze) >= channels:
        raise ValueError(f'training_block: squeeze must have fewer rows than the {channels} '
                         f'channels, got {tuple(weights.squeeze.shape)}')
    for name, tensor, shape in (('branch', branch, x.shape), ('keep', keep, (2, len(x), 1, 1, 1))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f'training_block: {name} must be {tuple(shape)}, got '
                             f'{tuple(tensor.shape)}')
    for name, tensor in (('the weights are', weights.norm), ('branch is', branch),
                         ('keep is', keep)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f'training_block: {name} on {tensor.device}, x on {x.device}')
    x = x.contiguous()
    branch, keep = (t if t is None else t.contiguous() for t in (branch, keep))
    return _TrainingBlock.apply(x, branch, keep, eps, ffn_eps, *weights)


class _TrainingBlock(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x: Tensor, branch: Optional[Tensor], keep: Optional[Tensor], eps: float,
                ffn_eps: float, *weights: Tensor) -> tuple[Tensor, Tensor]:
        dtype = linear_dtype(x)
        with without_autocast(x.device.type):
            w = _prepare(weights, dtype)
            layer, y = _layer_forward(x, branch, w, eps, dtype)
            if keep is not None:
                y.mul_(keep[0])
            ffn, z = _ffn_forward(layer.total, y, w, ffn_eps, dtype)
            if keep is not None:
                z.mul_(keep[1])
        ctx.eps, ctx.ffn_eps = eps, ffn_eps
        ctx.map_dtypes = x.dtype, None if branch is None else branch.dtype
        ctx.shapes = tuple(t.shape for t in weights[:_GROUPED])
        ctx.dtypes = [t.dtype for t in weights]
        ctx.save_for_backward(keep, *layer, *ffn, *w)
        return ffn.total, z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        keep, *saved = ctx.saved_tensors
        layer_keep, ffn_keep = (None, None) if keep is None else keep
        layer, ffn = _Layer(*saved[:14]), _FeedForward(*saved[14:17])
        w = BlockWeights(*saved[17:])
        of: dict[str, Tensor] = {}
        with without_autocast(grad.device.type):
            dtype = ffn.wide.dtype
            grad_total, grad = _ffn_backward(_scaled(grad, ffn_keep, dtype), grad_total,
                                             layer_keep, ffn, w, ctx.ffn_eps, of)
            of_x, of_branch = _layer_backward(grad, grad_total, ctx.map_dtypes[1], layer, w,
                                              ctx.eps, of)
            grads = _of_weights(of, w, ctx.shapes, ctx.dtypes)
            of_x = of_x.to(ctx.map_dtypes[0])
            if ctx.map_dtypes[1] is None:
                of_branch = None
        return (of_x, of_branch, None, None, None, *grads)


def _layer_forward(x: Tensor, branch: Optional[Tensor], w: BlockWeights, eps: float,
                   dtype: torch.dtype) -> tuple[_Layer, Tensor]:
    """The modulated layer (equations 5 to 9) of x + branch, and what its backward takes."""
    channels = x.shape[-1]
    if branch is None:
        total, normed = x, around.NORM.forward(x, w.norm, w.norm_bias, eps, dtype, None)
    else:
        total, normed = around.ADD_NORM.forward(branch, x, w.norm, w.norm_bias, eps, dtype, None)
    joint = F.linear(normed, w.in_proj)
    convolved = around.CONV.forward(joint[..., :channels], w.conv, w.conv_bias, 'silu')
    rows = _grouped(F.linear(convolved, w.x_proj))
    scanned, states = scan_triton.MAPS.forward(
        _grouped(convolved), rows, w.dt_proj, w.A_log, w.D, w.dt_bias, True, dtype)
    gated = around.GATE.forward(scanned, joint[..., channels:], w.group_norm, w.group_norm_bias,
                                 1e-5, None)
    out = F.linear(gated, w.out_proj)
    factor, mean, squeezed, affinity = around.affinity_forward(
        normed, w.squeeze, w.squeeze_bias, w.excite, w.excite_bias, w.skip_scale)
    factor = factor.view(-1, 1, 1, channels)
    modulated = around.MODULATE.forward(out, normed, factor, w.norm, w.norm_bias, eps, dtype, None)
    layer = _Layer(total, normed, joint, convolved, rows, states, scanned, gated, out, mean,
                   squeezed, affinity, factor, modulated)
    return layer, F.linear(modulated, w.proj, w.proj_bias)


def _ffn_forward(x: Tensor, branch: Tensor, w: BlockWeights, eps: float, dtype: torch.dtype
                 ) -> tuple[_FeedForward, Tensor]:
    total, normed = around.ADD_NORM.forward(branch, x, w.ffn_norm, w.ffn_norm_bias, eps, dtype,
                                             None)
    wide = F.linear(normed, w.fc1, w.fc1_bias)
    activated = around.CONV.forward(wide, w.ffn_conv, w.ffn_conv_bias, 'gelu')
    return _FeedForward(total, normed, wide), F.linear(activated, w.fc2, w.fc2_bias)


def _ffn_backward(grad: Tensor, grad_total: Tensor, keep: Optional[Tensor], ffn: _FeedForward,
                  w: BlockWeights, eps: float, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient of the sum before the feed-forward, and times `keep` in the dtype of products;
    those of weights go into `of`."""
    conv = ffn.wide, w.ffn_conv, w.ffn_conv_bias
    of['fc2'] = _of_weight(grad, around.CONV.forward(*conv, 'gelu'))
    of['fc2_bias'] = _rows(grad).sum(0)
    grad, sums = around.CONV.backward(grad @ w.fc2, *conv, 'gelu')
    of['ffn_conv'], of['ffn_conv_bias'] = _taps(sums), sums[9]
    of['fc1'], of['fc1_bias'] = _of_weight(grad, ffn.normed), _rows(grad).sum(0)
    branch = grad.new_empty(ffn.total.shape)
    grad, sums = around.norm_backward(grad_total, grad @ w.fc1, ffn.total, w.ffn_norm, eps, None,
                                      keep=keep, branch=branch)
    of['ffn_norm'], of['ffn_norm_bias'], of['proj_bias'] = sums
    return grad, branch


def _layer_backward(grad: Tensor, grad_total: Tensor, branch_dtype: Optional[torch.dtype],
                    layer: _Layer, w: BlockWeights, eps: float, of: dict[str, Tensor]
                    ) -> tuple[Tensor, Tensor]:
    """The gradient of the sum before the layer, and the same in the branch's dtype, if there is a
    branch; those of weights go into `of`."""
    batch, height, width, channels = grad.shape
    of['proj'] = _of_weight(grad, layer.modulated)
    image_sums = layer.mean.new_empty(batch, 5, channels)
    grad, dnormed = around.modulate_backward(grad @ w.proj, layer.out, layer.normed, layer.factor,
                                             w.norm, eps, None, image_sums[:, :3])
    shift = around.affinity_backward(image_sums, layer.affinity, layer.squeezed, w.squeeze,
                                     w.excite, w.skip_scale, height * width)
    (of['squeeze'], of['squeeze_bias'], of['excite'], of['excite_bias'], of['skip_scale'],
     image_sums) = around.affinity_gradients(image_sums, layer.mean, layer.squeezed)

    of['out_proj'] = _of_weight(grad, layer.gated)
    djoint = torch.empty_like(layer.joint)
    (before_conv, gate), (dbefore_conv, dgate) = (t.chunk(2, -1) for t in (layer.joint, djoint))
    grad, sums = around.gate_backward(grad @ w.out_proj, layer.scanned, gate, w.group_norm,
                                      w.group_norm_bias, 1e-5, None, dgate)
    of['group_norm'], of['group_norm_bias'] = sums
    grad, drows, sums = scan_triton.MAPS.backward(
        grad, _grouped(layer.convolved), layer.rows, w.dt_proj, w.A_log, w.D, w.dt_bias,
        layer.states)
    of['A_log'], of['D'], of['dt_bias'], dt_proj = scan_triton.of_sums(sums, w.A_log.shape[1])
    of['dt_proj'] = dt_proj.view(w.dt_proj.shape)
    grad, drows = grad.flatten(3), drows.flatten(3)
    of['x_proj'] = _of_weight(drows, layer.convolved)
    _rows(grad).addmm_(_rows(drows), w.x_proj)
    sums = around.conv_backward(grad, before_conv, w.conv, w.conv_bias, 'silu', dbefore_conv)
    of['conv'], of['conv_bias'] = _taps(sums), sums[9]
    of['in_proj'], of['gate_proj'] = _of_weight(djoint, layer.normed).chunk(2)
    _rows(dnormed).addmm_(_rows(djoint), w.in_proj)
    branch = None
    if branch_dtype not in (None, layer.total.dtype):
        branch = dnormed.new_empty(dnormed.shape, dtype=branch_dtype)
    grad, sums = around.norm_backward(grad_total, dnormed, layer.total, w.norm, eps, None,
                                      shift=shift, branch=branch)
    of['norm'], of['norm_bias'] = sums[:2] + image_sums[:2]
    return grad, grad if branch is None else branch


def _scaled(x: Tensor, factor: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    if factor is None:
        return x.to(dtype)
    return torch.mul(x, factor, out=x.new_empty(x.shape, dtype=dtype))


def _taps(sums: Tensor) -> Tensor:
    """The gradient of a convolution's weight from those of its nine taps, first in (10, C)."""
    return sums[:9].t().view(-1, 1, 3, 3)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _grouped(x: Tensor) -> Tensor:
    return x.view(*x.shape[:3], len(DIRECTIONS), -1)


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    return _rows(grad).t() @ _rows(x)


@lru_cache(maxsize=64)
def _places(shapes: tuple[torch.Size, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of grouped maps (G, out, in) that lie one behind the other, with zeros after them: where
    each value of their block-diagonal matrices is, and where in the matrices each of theirs is."""
    zero = sum(prod(shape) for shape in shapes)
    sources, targets = [], []
    first = start = 0
    for groups, outputs, inputs in shapes:
        count = groups * outputs * inputs
        source = torch.full((groups, outputs, groups, inputs), zero)
        target = torch.arange(start, start + source.numel()).view(source.shape)
        source.diagonal(dim1=0, dim2=2).copy_(
            torch.arange(first, first + count).view(groups, outputs, inputs).permute(1, 2, 0))
        sources.append(source.flatten())
        targets.append(target.diagonal(dim1=0, dim2=2).permute(2, 0, 1).flatten())
        first, start = first + count, start + source.numel()
    return torch.cat(sources).to(device), torch.cat(targets).to(device)


@lru_cache(maxsize=64)
def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=dtype, device=device)


def _prepare(weights: tuple[Tensor, ...], dtype: torch.dtype) -> BlockWeights:
    """The weights as products and kernels want them: grouped maps as block-diagonal matrices, with
    gate_proj below in_proj and None in its place; what stands in products in `dtype`, cast
    together; of the rest, the scan's in float32."""
    grouped, linear = weights[:_GROUPED], weights[_GROUPED:_LINEAR]
    first = grouped[0]
    count = sum(t.numel() for t in grouped)
    zeros = _zeros(_ALIGN - count % _ALIGN, first.dtype, first.device)
    flat = _flatten_dense_tensors((*grouped, zeros, *linear)).to(dtype)
    shapes = tuple(t.shape for t in grouped)
    source, _ = _places(shapes, first.device)
    sizes = [(groups * outputs, groups * inputs) for groups, outputs, inputs in shapes]
    sizes[:2] = [(2 * sizes[0][0], sizes[0][1])]
    matrices = flat.take(source).split([rows * columns for rows, columns in sizes])
    joint, x_proj, out_proj = (m.view(size) for m, size in zip(matrices, sizes))
    linear = _unflatten_dense_tensors(flat[count + len(zeros):], linear)
    w = BlockWeights(joint, None, x_proj, out_proj, *linear,
                     *(t.contiguous() for t in weights[_LINEAR:]))
    return w._replace(dt_proj=w.dt_proj.float(), dt_bias=w.dt_bias.float(),
                      A_log=w.A_log.float(), D=w.D.float())


def _of_weights(of: dict[str, Tensor], w: BlockWeights, shapes: tuple[torch.Size, ...],
                dtypes: list[torch.dtype]) -> list[Tensor]:
    """Gradients of the weights as they were given, in their order.

    Args:
        of: By name; those of grouped maps are of the matrices.
        w: As prepared.
        shapes: Of the grouped maps.
        dtypes: Of the weights.
    """
    grads = [of[name] for name in BlockWeights._fields]
    _, target = _places(shapes, grads[0].device)
    grouped = _flatten_dense_tensors(grads[:_GROUPED]).take(target)
    flat = _flatten_dense_tensors([grouped, *grads[_GROUPED:_HALF]]).to(dtypes[0])
    grouped = flat[:len(grouped)].split([prod(shape) for shape in shapes])
    grads = (*(t.view(shape) for t, shape in zip(grouped, shapes)),
             *_unflatten_dense_tensors(flat[sum(map(len, grouped)):], w[_GROUPED:_HALF]),
             *grads[_HALF:])
    return [t if t.dtype == dtype else t.to(dtype) for t, dtype in zip(grads, dtypes)]
