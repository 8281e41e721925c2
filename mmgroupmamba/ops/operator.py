"""An operator with a launch forward and one backward, for eager PyTorch and for torch.compile."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_NAMESPACE = 'mmgroupmamba'


def traced() -> bool:
    """Whether somebody looks at the operators themselves: torch.compile, fake tensors, or a mode
    such as a counter of FLOPs."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def infers_on_cpu(x: Tensor) -> bool:
    """Whether what is done with a tensor is plain eager inference on a CPU: no gradients of either
    mode, no autocast, no torch.func, nobody who looks on. Results may then be written in place."""
    return (x.device.type == 'cpu' and not torch.is_grad_enabled() and not traced()
            and not torch.is_autocast_enabled('cpu') and not torch.jit.is_tracing()
            and forward_ad._current_level < 0
            and torch._C._functorch.peek_interpreter_stack() is None)


class Operator:
    """A differentiable operator that either caller enters by the door that suits it.

    torch.compile sees no graph break where an operator is known to torch.library; but that door
    takes the host 100 microseconds forward and 300 backward, more than most kernels here take a
    GPU. Eager PyTorch goes in by an autograd.Function, and straight where nothing needs a gradient.

    Args:
        name: In torch.library; the backward's has ``_backward`` behind it.
        forward, backward: The launches, annotated as torch.library wants them. The backward's
            results share no memory with its arguments or each other.
        fake, fake_backward: Likewise, results without values.
        save: ``(ctx, inputs, output)``, keeps what the backward needs.
        differentiate: ``(ctx, backward, *grads)``, a gradient for each input, by calling
            `backward`: the function or, compiled, the operator.

    Attributes:
        op, backward_op: What torch.library calls.
    """

    def __init__(self, name: str, forward: Callable, backward: Callable, fake: Callable,
                 fake_backward: Callable, save: Callable, differentiate: Callable) -> None:
        self.forward, self.backward = forward, backward
        self.save, self.differentiate = save, differentiate
        backward_name = f'{name}_backward'
        for operator, function, meta in ((name, forward, fake),
                                         (backward_name, backward, fake_backward)):
            torch.library.custom_op(f'{_NAMESPACE}::{operator}', function, mutates_args=())
            torch.library.register_fake(f'{_NAMESPACE}::{operator}', meta)
        namespace = getattr(torch.ops, _NAMESPACE)
        self.op = getattr(namespace, name).default
        self.backward_op = getattr(namespace, backward_name).default
        torch.library.register_autograd(
            f'{_NAMESPACE}::{name}',
            lambda ctx, *grads: differentiate(ctx, self.backward_op, *grads), setup_context=save)

    def __call__(self, *inputs: Any) -> Any:
        if traced():
            return self.op(*inputs)
        if torch.is_grad_enabled() and any(
                isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return _Eager.apply(self, *inputs)
        return self.forward(*inputs)


class InferenceOperator:
    """An operator without a backward, with the two doors of :class:`Operator`.

    Args:
        name: In torch.library.
        forward: The launch, annotated as torch.library wants it.
        fake: Likewise, results without values.
    """

    def __init__(self, name: str, forward: Callable, fake: Callable) -> None:
        self.name, self.forward = name, forward
        torch.library.custom_op(f'{_NAMESPACE}::{name}', forward, mutates_args=())
        torch.library.register_fake(f'{_NAMESPACE}::{name}', fake)
        self.op = getattr(getattr(torch.ops, _NAMESPACE), name).default

    def __call__(self, *inputs: Any) -> Any:
        """
        Raises:
            RuntimeError: A gradient is wanted.
        """
        if torch.is_grad_enabled() and any(
                isinstance(t, Tensor) and t.requires_grad for t in inputs):
            raise RuntimeError(f"{self.name} has no gradient: use backend='torch' or no_grad()")
        return self.op(*inputs) if traced() else self.forward(*inputs)


class _Eager(torch.autograd.Function):

    @staticmethod
    def forward(ctx, operator: Operator, *inputs: Any) -> Any:
        output = operator.forward(*inputs)
        operator.save(ctx, inputs, output)
        ctx.operator = operator
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Any) -> tuple:
        operator = ctx.operator
        return (None, *operator.differentiate(ctx, operator.backward, *grads))
