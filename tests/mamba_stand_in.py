"""A stand-in on the CPU for ``selective_scan_cuda``, the module that mamba-ssm compiles.

It asserts the kernel's own terms, and gives what the kernel gives in the kernel's shapes, dtypes
and memory layouts. It runs inside operators, below autograd: its backward is written out.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F

CHUNK = 2048


def check_terms(u, delta, A, B, C, D, bias):
    assert u.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert {delta.dtype, B.dtype, C.dtype} == {u.dtype}
    for tensor in (u, delta, B, C):
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        if u.shape[-1] % 128 == 0:  # read 16 bytes at once
            strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
            assert not any(n % 16 for n in (tensor.data_ptr(), *strides))
    for tensor in (A, D, bias):
        assert tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous())
    batch, channels, length = u.shape
    groups, states = B.shape[1:3]
    assert channels % groups == 0 and A.shape == (channels, states) and states <= 256
    assert delta.shape == u.shape and B.shape == C.shape == (batch, groups, states, length)
    assert channels < 2**16 and batch * channels * -(-length // CHUNK) * states < 2**31


def by_tokens(u, delta, A, B, C, bias, softplus):
    """u, step, B, C, decay and h in float32, (batch, channels, L) and with N behind it."""
    repeats = u.shape[1] // B.shape[1]
    B, C = (t.float().repeat_interleave(repeats, 1).transpose(2, 3) for t in (B, C))
    u, step = u.float(), delta.float()
    if bias is not None:
        step = step + bias[:, None]
    if softplus:
        step = F.softplus(step)
    decay = torch.exp(step[..., None] * A[:, None])
    return u, step, B, C, decay, recurrence(decay, (step * u)[..., None] * B)


def recurrence(decay, drive):
    h, states = torch.zeros_like(drive[:, :, 0]), []
    for decay_t, drive_t in zip(decay.unbind(2), drive.unbind(2)):
        h = decay_t * h + drive_t
        states.append(h)
    return torch.stack(states, 2)


def fwd(u, delta, A, B, C, D, z, bias, softplus):
    assert z is None
    check_terms(u, delta, A, B, C, D, bias)
    x, _, _, C, _, h = by_tokens(u, delta, A, B, C, bias, softplus)
    y = (h * C).sum(-1)
    if D is not None:
        y = y + D[:, None] * x
    chunks = -(-u.shape[2] // CHUNK)
    kept = u.new_zeros(*u.shape[:2], chunks, 2 * A.shape[1], dtype=torch.float32)
    return [torch.empty_like(delta).copy_(y), kept]


def bwd(u, delta, A, B, C, D, z, bias, dout, kept, out, dz, softplus, recompute_out_z):
    assert z is None and out is None and dz is None and recompute_out_z is False
    check_terms(u, delta, A, B, C, D, bias)
    check_terms(dout, delta, A, B, C, D, bias)
    assert kept.shape == (*u.shape[:2], -(-u.shape[2] // CHUNK), 2 * A.shape[1])
    assert kept.dtype == torch.float32 and kept.is_contiguous()
    x, step, b, c, decay, h = by_tokens(u, delta, A, B, C, bias, softplus)
    dout = dout.float()
    following = F.pad(decay[:, :, 1:], (0, 0, 0, 1))
    dh = recurrence(following.flip(2), (dout[..., None] * c).flip(2)).flip(2)
    exponent = dh * decay * F.pad(h[:, :, :-1], (0, 0, 1, 0))
    dinput = (dh * b).sum(-1)  # of step * u
    dstep = dinput * x + (exponent * A[:, None]).sum(-1)
    if softplus:
        before = delta.float() if bias is None else delta.float() + bias[:, None]
        dstep = dstep * torch.sigmoid(before)
    du = dinput * step
    if D is not None:
        du = du + D[:, None] * dout

    def of_groups(grad, like):
        grad = grad.transpose(2, 3).unflatten(1, (like.shape[1], -1)).sum(2)
        return torch.empty_like(like, dtype=torch.float32).copy_(grad).to(like.dtype)

    return [
        torch.empty_like(u).copy_(du), torch.empty_like(delta).copy_(dstep),
        (exponent * step[..., None]).sum((0, 2)), of_groups(dh * (step * x)[..., None], B),
        of_groups(h * dout[..., None], C), None if D is None else (dout * x).sum((0, 2)),
        None if bias is None else dstep.sum((0, 2))
    ]


def install(monkeypatch):
    """Let the adapter run here, and count its launches.

    Returns:
        The names of the kernels in the order they ran.
    """
    import sys

    from mmgroupmamba.ops import scan_mamba_ssm, selective_scan

    launches = []

    def counted(function):
        def launch(*args):
            launches.append(function.__name__)
            return function(*args)
        return launch

    monkeypatch.setitem(sys.modules, 'selective_scan_cuda',
                        SimpleNamespace(fwd=counted(fwd), bwd=counted(bwd)))
    monkeypatch.setattr(scan_mamba_ssm, 'why_not', lambda device_type: None)
    monkeypatch.setattr(sys.modules[selective_scan.__module__], '_resolved', {})
    return launches
