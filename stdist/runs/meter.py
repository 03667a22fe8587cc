"""Runs code on shapes alone, and counts the operations and the memory that it would take.

Floats are tensors of torch's device ``meta``: a shape, a dtype, a storage without bytes. Integers and masks are real,
since code branches on them; those that would depend on floats are zeros. So a model of any size goes through its own
code, forward, backward and the optimizer's step, in seconds and in next to no memory. PyTorch's FakeTensorMode does
that for floats, but knows no integer's value, which the vision tower's windows and sampling need.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from stdist.training.fused_accumulation import set_fused_accumulation

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
# torch counts products, but not those added in place, which the head's tiles are.
FLOPS = {**flop_registry, aten.addmm_: flop_registry[aten.addmm]}


class Meter(TorchDispatchMode):
    """``flops``: operations so far, as ``torch.utils.flop_counter`` counts them (two a multiply-add). ``live``: bytes
    of the floats that are alive now, beside ``weights``; ``peak``: the most that they were."""

    def __init__(self, weights: Iterable[Tensor] = ()):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._known = {weight.untyped_storage()._cdata for weight in weights}
        # Layers repeat: the shapes that an operation gave for the same arguments before, and its operations.
        self._cache: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_meta = [x.is_meta for x in _tensors((*args, *kwargs.values()))]
        if any(is_meta):
            if func is aten._local_scalar_dense.default:
                return 0.0
            if not all(is_meta):
                if func is aten.masked_select.default:
                    return self._count(args[0].new_empty(int(args[1].expand(args[0].shape).sum())))
                args, kwargs = [_as_meta(x) for x in args], {name: _as_meta(x) for name, x in kwargs.items()}
            return self._run(func, args, kwargs)
        if kwargs.get("device") == META and not _dtype(func, args, kwargs).is_floating_point:
            kwargs = kwargs | {"device": CPU}
        out = func(*args, **kwargs)
        self.flops += _flops(func, args, kwargs, out)
        return self._counted(out)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation on shapes, or what it gave of such shapes before."""
        if not _is_functional(func):
            out = func(*args, **kwargs)
            self.flops += _flops(func, args, kwargs, out)
            return self._counted(out)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if key not in self._cache:
            out = func(*args, **kwargs)
            outs = out if isinstance(out, (tuple, list)) else [out]
            self._cache[key] = (
                type(out),
                [x if not isinstance(x, Tensor) else (x.shape, x.stride(), x.dtype) for x in outs],
                _flops(func, args, kwargs, out),
            )
        kind, outs, flops = self._cache[key]
        self.flops += flops
        fresh = [self._count(_fresh(*x)) if isinstance(x, tuple) else x for x in outs]
        return kind(fresh) if kind in (tuple, list) else fresh[0]

    def _counted(self, out: Any) -> Any:
        if isinstance(out, Tensor):
            return self._count(out)
        return type(out)(map(self._counted, out)) if isinstance(out, (tuple, list)) else out

    def _count(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
        if tensor.layout != torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number not in self._known:
            self._known.add(number)
            weakref.finalize(storage, self._gone, number, size)
            self.live += size
            self.peak = max(self.peak, self.live)
        return tensor

    def _gone(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.live -= size


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, is_causal: bool = False, **options: Any) -> Tensor:
    """The fused kernel of a GPU, which keeps no matrix of scores; by itself torch takes attention on shapes apart."""
    flash = aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, is_causal, False, scale=options.get("scale"))[0]


def _tensor(data: Any, *, device: Any = None, make: Callable[..., Tensor] = torch.tensor, **options: Any) -> Tensor:
    """On the device ``meta`` torch.tensor forgets what integers it is given."""
    tensor = make(data, **options)
    return tensor if device is None else tensor.to(device)


@contextmanager
def metered(module: nn.Module, *inputs: Tensor, fused: bool = False) -> Iterator[Meter]:
    """Counts what runs inside, on a module whose gradients are there already, as from a second micro-batch on;
    ``fused``: kernels may add to them, as under the engine of plain torch."""
    set_fused_accumulation(module.parameters(), fused)
    gradients = {parameter: torch.zeros_like(parameter) for parameter in module.parameters() if parameter.requires_grad}
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    with (
        Meter([*module.parameters(), *module.buffers(), *gradients.values(), *inputs]) as meter,
        patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        patch.object(torch, "tensor", _tensor),
    ):
        yield meter
    module.zero_grad()


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _as_meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x if x.is_meta else x.to(META)
    if not isinstance(x, (list, tuple)):
        return x
    # A mask among indices stands for the places where it is True.
    is_mask = [isinstance(i, Tensor) and i.dtype == torch.bool and not i.is_meta for i in x]
    return [
        _as_meta(i) for i, mask in zip(x, is_mask, strict=True) for i in (i.nonzero(as_tuple=True) if mask else [i])
    ]


def _dtype(func: Any, args: Any, kwargs: Any) -> torch.dtype:
    """Returns the dtype of the tensor that a factory function makes."""
    if kwargs.get("dtype"):
        return kwargs["dtype"]
    tensor = next(_tensors(args), None)
    if tensor is not None:
        return tensor.dtype
    numbers = {aten.arange: args, aten.full: args[1:]}.get(func.overloadpacket, [0.0])
    return torch.int64 if all(isinstance(x, int) for x in numbers) else torch.get_default_dtype()


def _is_functional(func: Any) -> bool:
    """Its results are new tensors, and its arguments stay as they are."""
    schema = func._schema
    return not schema.is_mutable and all(result.alias_info is None for result in schema.returns)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    count: Callable[..., int] | None = FLOPS.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


def _key(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_key, x)) if isinstance(x, (list, tuple)) else (type(x), x)


def _fresh(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=META)
