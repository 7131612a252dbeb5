"""A GPU that is not there: scripts go their whole way on it, and the CPU computes.

Tensors say on which device they are. What a GPU refuses is refused: operations on tensors of both
devices, and arrays of tensors that are on the GPU. It is too old for Triton's kernels, so that
scripts take PyTorch's; Triton's have their interpreter (tests/interpreted).
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ANSWERS = {"is_available": True, "device_count": 1, "get_device_capability": (7, 5)}
ANSWERS |= {"set_device": None, "get_device_name": "a GPU that is not there"}
NOT_OF_TENSORS = {torch.device, torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type}
INDEXED = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
ARRAYS = {torch.Tensor.numpy, torch.Tensor.__array__}


@contextlib.contextmanager
def pretended_gpu():
    """Within it "cuda" is a device like any other."""
    future = torch.__future__
    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer: a))
        # module.to("cuda") gives it other parameters instead of other data, as data say not where
        stack.callback(
            future.set_overwrite_module_params_on_conversion,
            future.get_overwrite_module_params_on_conversion(),
        )
        future.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(Pretending())
        yield


class OnGPU(torch.Tensor):
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return call(function, args, kwargs or {})


class Pretending(TorchFunctionMode):
    """For calls without a tensor on the GPU, such as `torch.zeros(3, device="cuda")`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return OnGPU.__torch_function__(function, types, args, kwargs)


def call(function, args, kwargs):
    if function in NOT_OF_TENSORS:
        return function(*args, **kwargs)
    if function is torch.Tensor.cpu:
        function, args = torch.Tensor.to, (*args, CPU)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = any(isinstance(x, OnGPU) for x in tensors)
    on_both = on_gpu and any(x.dim() and not isinstance(x, OnGPU) for x in tensors)
    named = [torch.device(x) for x in (*args[1:2], kwargs.get("device")) if is_device(x)]
    if named:
        on_gpu, on_both = named[0] == GPU, False
    elif function is torch.Tensor.copy_ or (function in INDEXED and isinstance(args[0], OnGPU)):
        on_gpu, on_both = isinstance(args[0], OnGPU), False  # indices may be on the CPU
    if on_both:
        raise RuntimeError(f"{function.__name__}: some tensors are on the GPU and some are not")
    if on_gpu and function in ARRAYS and not kwargs.get("force"):
        raise TypeError("a tensor on the GPU cannot become an array")
    if on_gpu and function is torch.Tensor.__deepcopy__:
        return copy_of(args[0])
    if on_gpu and function is torch.Tensor.__reduce_ex__:  # what is written to a file
        args = args[0].detach().as_subclass(torch.Tensor), *args[1:]
    args, kwargs = tree_map(lambda x: CPU if is_device(x) and x != "meta" else x, (args, kwargs))
    result = function(*args, **kwargs)

    def placed(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnGPU) == on_gpu:
            return x
        moved = x.clone() if function is torch.Tensor.to else x  # not the same memory
        return moved.as_subclass(OnGPU if on_gpu else torch.Tensor)

    return result if isinstance(result, torch.Size) else tree_map(placed, result)


def is_device(x):
    return isinstance(x, torch.device) or (isinstance(x, str) and x in ("cpu", "cuda"))


def copy_of(tensor):
    copy = tensor.detach().clone().as_subclass(OnGPU)
    copy.__dict__.update(tensor.__dict__)  # says whether it is a parameter
    return copy.requires_grad_(tensor.requires_grad)
