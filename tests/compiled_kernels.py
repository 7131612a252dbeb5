"""Compiles every kernel for GPUs that are not there and tells what it needs of them.

    python -m tests.compiled_kernels            checks everything, against the committed table too
    python -m tests.compiled_kernels --quick    heads of 64 and the loss in 16 bits: the test
    python -m tests.compiled_kernels --write    writes the table instead

The library's own functions run on small CPU tensors while Triton is told that the GPU is an A100
(80), an H100 or H200 (90), a B200 (100) or a consumer's Blackwell (120), and every launch stops
after compiling. So what is compiled is what would be launched: the same configuration, specialised
in the same way. The machine code comes from NVIDIA's assembler, which is part of Triton's wheel,
and is read with `cuobjdump`, from there too.

Each version of Triton has a table of its own; a version without one is checked all the same. For a
second version:

    python -m venv other && . other/bin/activate
    pip install -r requirements.txt && pip install triton==3.6.0
    python -m tests.compiled_kernels

Triton keeps what it compiled in its cache (TRITON_CACHE_DIR), and this file its counts beside it.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import attention_triton, cross_entropy_triton, frozen_triton

ARCHITECTURES = (80, 90, 100, 120)
TABLE = Path(__file__).with_name(f"compiled_kernels_{triton.__version__}.txt")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WORKERS = 2

# of a multiprocessor, by architecture
REGISTERS = 65536
WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024, 120: 100 * 1024}
RESERVED_BYTES = 1024  # of shared memory, for each program
# that a program can have; 80: of consumer chips (86, 89), which are given its configurations
MOST_SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_COLUMNS = 512  # of tensor memory (100)
# the instruction that multiplies 16-bit tiles
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA", 120: "HMMA"}
MATRIX_INSTRUCTIONS = sorted(set(MATRIX_INSTRUCTION.values()))


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs, and which instructions it is made of."""

    arch: int
    kernel: str
    case: str  # what it was compiled for
    warps: int
    registers: int  # for each thread
    shared: int  # bytes for each program
    tensor_columns: int
    stack: int  # bytes for each thread
    spills: int  # instructions that save registers to memory or fetch them back
    HMMA: int
    HGMMA: int
    UTCMMA: int
    TMA: int  # loads of a tile by the copy engine
    async_copies: int  # loads that a program need not wait for, of 16 bytes a thread
    has_16_bit_products: bool
    has_descriptors: bool

    @property
    def programs(self):
        """How many fit on a multiprocessor at once."""
        each_thread = -(-self.registers // 8) * 8
        limits = [
            WARPS[self.arch] // self.warps,
            REGISTERS // (each_thread * 32 * self.warps),
            SHARED_BYTES[self.arch] // (self.shared + RESERVED_BYTES),
        ]
        if self.tensor_columns:
            limits.append(TENSOR_COLUMNS // self.tensor_columns)
        return min(limits)

    def faults(self):
        """What must not be, one line each."""
        if self.spills or self.stack:
            yield f"{self.spills} spills, a stack of {self.stack} bytes"
        if self.programs == 0 or self.shared > MOST_SHARED_BYTES[self.arch]:
            yield "does not fit on a multiprocessor"
        if self.has_16_bit_products:
            for name in MATRIX_INSTRUCTIONS:
                wanted = name == MATRIX_INSTRUCTION[self.arch]
                if wanted != (getattr(self, name) > 0):
                    yield f"{getattr(self, name)} {name} instructions"
        if self.has_descriptors and not self.TMA:
            yield "descriptors, but no TMA loads"

    def line(self):
        """Its line of the table."""
        matrix = ", ".join(
            f"{getattr(self, name)} {name}" for name in MATRIX_INSTRUCTIONS if getattr(self, name)
        )
        return (
            f"{self.arch:>4}  {self.kernel:<20}  {self.case:<32}  {self.warps:>5}"
            f"  {self.registers:>9}  {self.shared:>7}  {self.tensor_columns:>6}"
            f"  {self.programs:>8}  {self.TMA:>3}  {self.async_copies:>6}  {matrix or '-'}"
        )


HEADER = (
    f"{'arch':>4}  {'kernel':<20}  {'case':<32}  {'warps':>5}  {'registers':>9}  {'shared':>7}"
    f"  {'tensor':>6}  {'programs':>8}  {'TMA':>3}  {'copies':>6}  matrix instructions"
)


# --- what to run: cases call the library's functions as a user would


def loss(dtype):
    resid = torch.zeros(256, 64, dtype=dtype, requires_grad=True)
    W_U = torch.zeros(64, 1024, dtype=dtype, requires_grad=True)
    targets = torch.zeros(256, dtype=torch.long)
    cross_entropy_triton.linear_cross_entropy(resid, W_U, targets).sum().backward()


def heads(d_head, dtype, *shape):
    """Queries, keys or values as the model makes them: [..., head, pos, d_head], a view of
    [..., pos, head, d_head].
    """
    x = torch.zeros(*shape, 2, 256, 2, d_head, dtype=dtype, requires_grad=True)
    return x.transpose(-3, -2)


def attention(d_head, dtype, smear=False, windows=None):
    q, k, v = (heads(d_head, dtype) for _ in range(3))
    alpha = torch.zeros(2, requires_grad=True) if smear else None
    z, _ = attention_triton.attention(q, k, v, alpha, windows)
    z.sum().backward()


@torch.no_grad()
def recorded(d_head, dtype, windows):
    """What is done with the recorded pattern of another run."""
    q, k, values = heads(d_head, dtype), heads(d_head, dtype), heads(d_head, dtype, 8)
    lse, tokens = torch.zeros(2, 2, 256), torch.zeros(2, 256, dtype=torch.long)
    frozen_triton.frozen_attention(q, k, lse, values, None, windows)
    frozen_triton.head_mass(q, k, lse, tokens, None, windows)
    frozen_triton.index_attention(tokens[:, None].expand(2, 2, 256), values)


def all_cases():
    """Every shipped configuration; with the head sizes that models have, 64 and 128, also without
    what windows and smeared keys add.
    """
    windows = (5, 100)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"loss {name}", functools.partial(loss, dtype)
        for d_head in (16, 32, 64, 128):
            of = functools.partial(functools.partial, d_head=d_head, dtype=dtype, windows=windows)
            yield f"{name} {d_head} windows smeared", of(attention, smear=True)
            yield f"{name} {d_head} windows recorded", of(recorded)
            if d_head >= 64 and dtype != torch.float32:
                yield f"{name} {d_head}", of(attention, windows=None)


CASES = dict(all_cases())
QUICK_CASES = [name for name in CASES if re.match("loss bfloat16|bfloat16 64", name)]


# --- compiling without a GPU


class PretendedGPU:
    """What Triton asks a driver for up to the point where it would launch."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps one table of kernels for each

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name):
        return name


def compiled_by(arch_and_case):
    """Resources of the kernels that the case launches on that GPU, each once, in order."""
    arch, case = arch_and_case
    launch, kernels = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels[kernel.hash] = (self.fn.__name__, kernel)
        return kernel

    driver.set_active(PretendedGPU(arch))
    JITFunction.run = compile_only
    try:
        CASES[case]()
    finally:
        JITFunction.run = launch
    return [resources(kernel, arch, name, case) for name, kernel in kernels.values()]


def resources(kernel, arch, name, case):
    code = kernel.asm["ttir"]
    return Resources(
        arch=arch,
        kernel=name.strip("_"),
        case=case,
        warps=kernel.metadata.num_warps,
        shared=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        has_16_bit_products=bool(re.search(r"tt\.dot .*x(f16|bf16)>", code)),
        has_descriptors="tt.descriptor_load" in code,
        **machine_code_counts(kernel.asm["cubin"]),
    )


def machine_code_counts(cubin):
    """Registers, stack and counts of instructions; kept in Triton's cache."""
    how = inspect.getsource(machine_code_counts).encode()
    cache = get_cache_manager(hashlib.sha256(cubin + how).hexdigest())
    if known := cache.get_file("counts.json"):
        return json.loads(Path(known).read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-sass", "-res-usage", file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)"
    instructions = re.findall(instruction, run.stdout, re.MULTILINE)

    def count(name):
        return sum(bool(re.fullmatch(name, found)) for found in instructions)

    counts = {
        "registers": int(re.search(r"REG:(\d+)", run.stdout + run.stderr)[1]),
        "stack": int(re.search(r"STACK:(\d+)", run.stdout + run.stderr)[1]),
        "spills": count("LDL|STL"),
        "HMMA": count("HMMA"),
        "HGMMA": count("HGMMA"),
        "UTCMMA": count(r"UTC\w*MMA"),
        "TMA": count("UTMALDG"),
        "async_copies": count("LDGSTS"),
    }
    cache.put(json.dumps(counts), "counts.json", binary=False)
    return counts


def compile_everything(cases):
    """Resources of all kernels, in the order of the table."""
    torch.set_num_threads(1)
    triton.knobs.compilation.disable_line_info = True  # half of the files; the code is the same
    work = [
        (arch, case)
        for arch, case in itertools.product(ARCHITECTURES, cases)
        # there the assembler spills a few values of float32's small tiles at 72 of 255 registers
        if not (arch == 120 and "float32" in case)
    ]
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=fork) as pool:
        return [row for rows in pool.map(compiled_by, work) for row in rows]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--quick", action="store_true", help="heads of 64 and the loss, 16 bits")
    args = parser.parse_args()
    rows = compile_everything(QUICK_CASES if args.quick else CASES)
    lines = [f"Triton {triton.__version__}", HEADER, *(row.line() for row in rows)]
    print("\n".join(lines))
    complaints = [f"{row.line()}\n    {fault}" for row in rows for fault in row.faults()]
    if args.write:
        TABLE.write_text("\n".join(lines) + "\n")
    elif TABLE.exists():
        table = TABLE.read_text().splitlines()
        complaints += [f"{line}\n    not in {TABLE.name}" for line in lines if line not in table]
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
