"""A GPU without a GPU: tensors that say they are on `fakegpu:0` or `fakegpu:1`, and compute on the CPU.

Every operation checks what a real GPU would: all tensors with a dimension are on one device, and random numbers come
from a generator of the device. What is made without a device is on the CPU, and fails where it meets the others.
Registering the device changes what torch takes for the accelerator of the process, so it needs one of its own.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


NAME = "fakegpu"
aten = torch.ops.aten
# Operations whose tensors may be on different devices, as with CUDA.
_ACROSS = {
    aten._to_copy.default,
    aten.copy_.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
}


def register() -> None:
    """Makes `torch.device("fakegpu")` known to torch."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.fakegpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]


class OnDevice(torch.Tensor):
    """A tensor on a fake device; `held` has its values on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> "OnDevice":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) not in memo:
            copy = OnDevice(self.held.clone(), self.device).requires_grad_(self.requires_grad)
            copy._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copy
        return memo[id(self)]


class FakeGpu(TorchDispatchMode):
    """While it is active, tensors can be made on and moved to fake devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class MakesTensors(torch.overrides.TorchFunctionMode):
    """What makes a tensor from numbers makes it on the CPU and moves it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_fake(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].held.tolist()
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])  # (an index may be on the CPU)
        return func(*args, **kwargs)


def _is_fake(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    on_device = [x for x in tensors if isinstance(x, OnDevice)]
    devices = {x.device for x in on_device}
    on_cpu = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim > 0]
    if func not in _ACROSS and (len(devices) > 1 or (devices and on_cpu)):
        raise RuntimeError(f"{func}: tensors on {sorted(map(str, devices))} and {len(on_cpu)} on the CPU")
    device = kwargs.get("device")
    if device is None and func is not aten._local_scalar_dense.default and on_device:
        device = on_device[0].device
    if device is not None and _is_fake(device):
        device = torch.device(NAME, torch.device(device).index or 0)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != NAME:
            raise RuntimeError(f"{func}: a {generator.device} generator for a tensor on {device}")
    if "device" in kwargs and _is_fake(kwargs["device"]):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    owners = {id(x.held): x for x in on_device}
    held_args, held_kwargs = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, kwargs))
    result = func(*held_args, **held_kwargs)
    if func is aten._to_copy.default and _is_fake(device):
        result = result.clone() if any(result is x for x in tensors) else result

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice) or not _is_fake(device):
            return x
        return owners[id(x)] if id(x) in owners else OnDevice(x, device)

    return tree_map(wrap, result)
