"""CUDA C++ beside these modules: compiled for the GPU at hand at its first use, launched on the current stream.

By NVRTC and the driver through `cuda.bindings`, which torch for CUDA brings along from 2.11; no compiler is needed.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


@cache
def has_nvrtc(device: torch.device) -> bool:
    """Whether CUDA C++ can be compiled for that device."""
    return device.type == "cuda" and find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. function: the driver's handle; module: what keeps it loaded."""

    function: Any
    module: Any

    def __call__(self, blocks: int, threads: int, *arguments: torch.Tensor | int) -> None:
        """Launch; tensors are passed as their addresses, numbers as int32. Raises RuntimeError when it is refused."""
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

        held = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in arguments]
        table = (ctypes.c_void_p * len(held))(*(ctypes.addressof(argument) for argument in held))
        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        _checked(
            driver.cuLaunchKernel(self.function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(table), 0)
        )


@cache
def kernel(file: str, name: str, device: torch.device) -> Kernel:
    """The kernel `name` of a file beside this module, for a device. Raises RuntimeError with the compiler's message."""
    from cuda.bindings import driver, nvrtc  # pyright: ignore[reportMissingImports]

    source = (Path(__file__).parent / file).read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, file.encode(), 0, [], []))
    target = "--gpu-architecture=sm_{}{}".format(*torch.cuda.get_device_capability(device))
    try:
        _checked(nvrtc.nvrtcCompileProgram(program, 2, [target.encode(), b"--std=c++17"]))
    except RuntimeError as error:
        message = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, message))
        raise RuntimeError(f"{file}: {message.decode(errors='replace')}") from error
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    image = ctypes.create_string_buffer(binary)
    with torch.cuda.device(device):
        module = _checked(driver.cuModuleLoadData(ctypes.addressof(image)))
    return Kernel(_checked(driver.cuModuleGetFunction(module, name.encode())), module)


def _checked(found: tuple[Any, ...]) -> Any:
    """What a call of the bindings returned after its status."""
    status, *rest = found
    if int(status) != 0:
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return rest[0] if rest else None
