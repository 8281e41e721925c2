"""The scan contract: shapes, checks, the table of backends and ``'auto'``.

The shapes are those of mamba-ssm's ``selective_scan_fn``, and they are checked here and nowhere
else. Each backend is a module with two functions::

    why_not(device_type: str) -> str | None   # None: it runs on such a device
    scan(u, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor

and, where it reads a map better than through sequences, a third, as :mod:`.directional_scan` says.
A new backend is one such module and one row of ``_BACKENDS``.
"""
from importlib import import_module
from types import ModuleType
from typing import Optional

import torch
from mmengine.logging import print_log
from torch import Tensor

_BACKENDS = {
    'reference': 'scan_reference',
    'blocked': 'scan_blocked',
    'mamba_ssm': 'scan_mamba_ssm',
    'triton': 'scan_triton',
}
# 'auto' takes the first that runs on the device; docs/performance.md has the measurements
_PREFERENCE = {'cuda': ('triton', 'mamba_ssm', 'blocked')}


class BackendUnavailableError(ValueError):
    """A scan backend was asked for by name and cannot run here; the message says why."""


# plain dicts: torch.compile reads them without a graph break
_modules: dict[str, ModuleType] = {}
_resolved: dict[tuple[str, str], str] = {}


def backend_module(name: str) -> ModuleType:
    """The module of a backend of the table, imported when it is first asked for."""
    if name not in _modules:
        _modules[name] = import_module(f'.{_BACKENDS[name]}', __package__)
    return _modules[name]


def default_device() -> str:
    """'cuda' where there is a GPU, else 'cpu'."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def available_backends(device_type: Optional[str] = None) -> dict[str, Optional[str]]:
    """Tell for each backend whether it runs on a device.

    Args:
        device_type: 'cpu', 'cuda', ...; None means CUDA where there is a GPU, else CPU.

    Returns:
        Backend name to None (it runs) or to the reason why not with the remedy.
    """
    device_type = device_type or default_device()
    return {name: backend_module(name).why_not(device_type) for name in _BACKENDS}


def check_backend(name: str, device_type: Optional[str] = None) -> None:
    """Raise unless `name` is 'auto' or a backend that runs on `device_type`.

    Raises:
        ValueError: The name is unknown; the message lists the legal ones.
        BackendUnavailableError: It cannot run; the message says why and what mends it.
    """
    if name == 'auto':
        return
    if name not in _BACKENDS:
        raise ValueError(f'unknown scan backend {name!r}: choose one of '
                         f'{", ".join(["auto", *_BACKENDS])}')
    reason = backend_module(name).why_not(device_type or default_device())
    if reason is not None:
        raise BackendUnavailableError(f'scan backend {name!r} cannot run: {reason}')


def resolve_backend(name: str, device_type: str, dtype: Optional[torch.dtype] = None) -> str:
    """Turn 'auto' into the name of the backend that runs, and check any other name.

    Args:
        name: 'auto' or a backend's name.
        device_type: Device of the tensors: 'cpu', 'cuda', ...
        dtype: Theirs, if it is known: for float64 'auto' is 'blocked', which has it.

    Returns:
        The backend's name. What 'auto' takes is logged once per device type.

    Raises:
        ValueError, BackendUnavailableError: As :func:`check_backend`.
    """
    if name == 'auto' and dtype == torch.float64:
        return 'blocked'
    if (name, device_type) not in _resolved:
        _resolved[name, device_type] = _resolve(name, device_type)
    return _resolved[name, device_type]


# what torch.compiler.assume_constant_result does, which would import torch._dynamo here. Traced,
# the first call would guard the graph by the absence of its own entry, and the second recompile.
resolve_backend._dynamo_marked_constant = True


def _resolve(name: str, device_type: str) -> str:
    if name != 'auto':
        check_backend(name, device_type)
        return name
    candidates = _PREFERENCE.get(device_type, ('blocked', ))
    chosen = next(c for c in candidates if backend_module(c).why_not(device_type) is None)
    print_log(f'selective_scan: auto takes {chosen!r} on {device_type}', logger='current')
    return chosen


def selective_scan(u: Tensor,
                   delta: Tensor,
                   A: Tensor,
                   B: Tensor,
                   C: Tensor,
                   D: Optional[Tensor] = None,
                   delta_bias: Optional[Tensor] = None,
                   delta_softplus: bool = False,
                   backend: str = 'auto') -> Tensor:
    r"""Selective state-space scan of G groups of channels at once.

    For each channel c of group g and each token t, with
    :math:`\Delta_t = \mathrm{softplus}(\delta_t + \mathrm{bias})` (softplus and bias optional):

    .. math::
        h_t = \exp(\Delta_t A) \odot h_{t-1} + \Delta_t u_t B_t, \qquad
        y_t = \langle C_t, h_t \rangle + D u_t, \qquad h_{-1} = 0

    (Mamba, equations 2 and 4; GroupMamba, equation 1.) The arithmetic is float32 inside,
    float64 for float64 input, whatever autocast says.

    Args:
        u: Input, (batch, G * d, L), floating.
        delta: Step sizes before bias and softplus, (batch, G * d, L).
        A: State matrix, negative in practice, (G * d, N).
        B: Input matrix, (batch, G, N, L).
        C: Output matrix, (batch, G, N, L).
        D: Skip, (G * d,).
        delta_bias: (G * d,).
        delta_softplus: Whether softplus is applied to delta + delta_bias.
        backend: 'auto', 'reference', 'blocked', 'mamba_ssm' or 'triton'.

    Returns:
        y of shape (batch, G * d, L) in u's dtype. Any memory layout may come in or out.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend is unknown.
        BackendUnavailableError: The backend asked for by name cannot run on this device.
    """
    _check(u, delta, A, B, C, D, delta_bias)
    name = resolve_backend(backend, u.device.type, u.dtype)
    return backend_module(name).scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor],
           delta_bias: Optional[Tensor]) -> None:
    if u.dim() != 3 or B.dim() != 4:
        raise ValueError('selective_scan: u must be (batch, G * d, L) and B (batch, G, N, L), '
                         f'got {tuple(u.shape)} and {tuple(B.shape)}')
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    if min(u.shape) == 0 or min(B.shape) == 0 or channels % groups:
        raise ValueError('selective_scan: the channels of u must be a positive multiple of the '
                         f'groups of B, got {tuple(u.shape)} and {tuple(B.shape)}')
    expected = dict(
        delta=(delta, (batch, channels, length)),
        A=(A, (channels, states)),
        B=(B, (batch, groups, states, length)),
        C=(C, (batch, groups, states, length)),
        D=(D, (channels, )),
        delta_bias=(delta_bias, (channels, )))
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f'selective_scan: {name} must be {shape}, got {tuple(tensor.shape)}')
        if tensor.device != u.device:
            raise ValueError(f'selective_scan: {name} is on {tensor.device}, u on {u.device}')
        if not tensor.is_floating_point():
            raise ValueError(f'selective_scan: {name} must be real floating, got {tensor.dtype}')
    if not u.is_floating_point():
        raise ValueError(f'selective_scan: u must be real floating, got {u.dtype}')
