"""How far rounding takes us from float64, in float32 and under autocast, and what stays finite."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mmgroupmamba.models import GroupMamba, layers
from mmgroupmamba.ops import available_backends, directional_scan, selective_scan

MICRO = dict(
    stem_hidden_dim=8, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))
BACKENDS = [name for name, reason in available_backends('cpu').items() if reason is None]


def make(arch, seed=0):
    """A backbone no scale of which is 1 and no bias 0."""
    torch.manual_seed(seed)
    model = GroupMamba(arch).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize('arch', [MICRO, 'nano'], ids=['micro', 'nano'])
def test_scans_of_a_float32_backbone_against_float64(arch, monkeypatch):
    errors = []

    def compared(*args, backend, out_dtype):
        y = directional_scan(*args, backend=backend, out_dtype=out_dtype)
        exact = directional_scan(*(t.double() for t in args), backend='reference')
        assert y.dtype == torch.float32
        errors.append(relative(y, exact))
        return y

    monkeypatch.setattr(layers, 'directional_scan', compared)
    with torch.no_grad():
        make(arch)(torch.randn(2, 3, 96, 70))
    assert len(errors) > 3 and max(errors) < 1e-6


class Rounded(TorchFunctionMode):
    """Rounds what goes into a convolution or a matrix product and what comes out to a half type,
    while the arithmetic is that of the tensors: what autocast cannot but lose."""
    PRODUCTS = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm}

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.exact = False

    def round(self, value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self.dtype).to(value.dtype)
        return value

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.exact or function not in self.PRODUCTS:
            return function(*args, **kwargs)
        return self.round(function(*map(self.round, args),
                                   **{k: self.round(v) for k, v in kwargs.items()}))

    def scan(self, *args, **kwargs):
        """The scan has no part in it: step and states are exact."""
        self.exact = True
        try:
            return directional_scan(*args, **kwargs)
        finally:
            self.exact = False


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_loses_little_but_the_rounding_of_products(dtype, monkeypatch):
    """Measured for the four maps, mean over the seeds: 1.14, 1.19, 1.26, 1.26 times the error of
    rounded products in bf16; 1.13, 1.19, 1.24, 1.25 in fp16. The rest is activations, gates and
    residuals, which autocast leaves in the half type."""
    rounding = Rounded(dtype)
    errors = []
    for seed in range(5):
        model = make('nano', seed)
        image = torch.randn(2, 3, 96, 70)
        with torch.no_grad():
            with torch.autocast('cpu', dtype):
                got = model(image)
            model = copy.deepcopy(model).double()
            exact = model(image.double())
            with monkeypatch.context() as patch, rounding:
                patch.setattr(layers, 'directional_scan', rounding.scan)
                bound = model(image.double())
        errors.append([[relative(t, want) for t, want in zip(maps, exact)]
                       for maps in (got, bound)])
    ours, rounded = torch.tensor(errors).mean(0)
    assert (ours < 1.5 * rounded).all()


EXTREMES = {
    'no step': dict(bias=-200.),
    'large step': dict(bias=200.),
    'decay of 0': dict(decay=1e6),
    'decay of 1': dict(decay=1e-30, bias=-10.),
    'large input': dict(scale=1e6),
    'subnormal input': dict(scale=1e-38),
}


@pytest.mark.parametrize('case', EXTREMES)
@pytest.mark.parametrize('door', ['sequences', 'map'])
@pytest.mark.parametrize('backend', [*BACKENDS, 'mamba_ssm'])
def test_extremes_stay_finite(mamba_kernel, backend, door, case):
    """70,000 tokens, but for those that loop over them."""
    height, width = (250, 280) if backend == 'blocked' else (7, 300)
    scale, decay, bias = ({**dict(scale=1., decay=1., bias=0.), **EXTREMES[case]}[k]
                          for k in ('scale', 'decay', 'bias'))
    torch.set_flush_denormal(False)  # what Inductor of torch 2.5 compiles sets it when loaded
    torch.manual_seed(0)
    A = -decay * torch.rand(4, 1)
    D, bias = torch.ones(4), torch.full((4, ), bias)
    if door == 'map':
        inputs = [scale * torch.randn(1, height, width, 4, 1), torch.randn(1, height, width, 4, 3),
                  torch.randn(4, 1, 1), A, D, bias]

        def scan(*args, backend):
            return directional_scan(*args, backend=backend)
    else:
        length = height * width
        inputs = [scale * torch.randn(1, 4, length), torch.randn(1, 4, length), A,
                  *torch.randn(2, 1, 4, 1, length).unbind(), D, bias]

        def scan(*args, backend):
            return selective_scan(*args, delta_softplus=True, backend=backend)

    inputs = [t.requires_grad_() for t in inputs]
    y = scan(*inputs, backend=backend)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.isfinite(t).all() for t in (y, *grads))
    if backend != 'reference':
        exact = scan(*(t.detach().double() for t in inputs), backend='blocked')
        assert relative(y, exact) < 1e-5
