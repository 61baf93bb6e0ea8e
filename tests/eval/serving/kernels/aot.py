"""Compile a Triton kernel for sm_90 without a GPU, and read from PTX and machine code what the compiler made of it."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Compiled:
    """A kernel for sm_90. ptx: its assembly; cubin: its machine code; shared: bytes of shared memory a program;
    cooperative: whether the driver is told to start all programs at once."""

    ptx: str
    cubin: bytes
    shared: int
    cooperative: bool

    @cached_property
    def _resources(self) -> dict[str, int]:
        """cuobjdump's counts: REG, STACK (bytes a thread, spills among them), LOCAL ..."""
        text = self._dump("--dump-resource-usage")
        return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text.split("Function")[-1])}

    @property
    def registers(self) -> int:
        """Registers a thread."""
        return self._resources["REG"]

    @property
    def spilled(self) -> int:
        """Bytes a thread in local memory."""
        return self._resources["STACK"] + self._resources["LOCAL"]

    @cached_property
    def sass(self) -> str:
        """Machine code."""
        return self._dump("--dump-sass")

    @property
    def tensor_core(self) -> Counter[str]:
        """Tensor-core instructions in the PTX by kind: `wgmma` (operands in shared memory) or `mma` (in registers)."""
        return Counter(re.findall(r"\b(wgmma|mma)\.(?:mma_async|sync)\.", self.ptx))

    @property
    def load_bytes(self) -> Counter[int]:
        """Bytes that a thread loads at once from global memory -> instructions; copies to shared memory count."""
        widths: Counter[int] = Counter()
        for modifiers in re.findall(r"\bld\.(?:volatile\.)?global((?:\.[\w:]+)+)", self.ptx):
            lanes = re.search(r"\.v(\d)", modifiers)
            bits = re.search(r"\.[busf](\d+)$", modifiers)
            widths[(int(lanes[1]) if lanes else 1) * int(bits[1]) // 8] += 1
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+|\d+)", self.ptx):
            widths[int(size, 0)] += 1
        return widths

    def _dump(self, what: str) -> str:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(self.cubin)
            return subprocess.run([TOOLS / "cuobjdump", what, path], capture_output=True, text=True, check=True).stdout


def compile_sm90(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> Compiled:
    """Compile a `@triton.jit` function for an H100.

    signature: its other arguments' types in Triton's spelling (`*fp16`, `*u8`, `i32`; a trailing `:16` says that the
    value or address is a multiple of 16); constants: its tl.constexpr arguments; options: num_warps, num_stages ...
    """
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    aligned = [name for name, kind in signature.items() if kind.endswith(":16")]
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(places[name],): value for name, value in constants.items()},
        attrs={(places[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=HOPPER, options=options)
    found = compiled.metadata
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], found.shared, found.launch_cooperative_grid)
