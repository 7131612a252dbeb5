"""What a script runs on: device, kernels, precision; and how records name it."""

import contextlib
import importlib.util
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from safety import BadInput

KERNELS = ("reference", "torch", "triton")
PRECISIONS = {torch.float32: "ieee", torch.bfloat16: "bf16"}  # as PyTorch's settings name them


def pick_device(name):
    """--device, or the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: PyTorch sees no GPU here; leave it out to use the CPU")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def pick_kernels(name, device):
    """--kernels, or those made for the device: Triton's for NVIDIA's GPUs from Ampere on."""
    fit = is_ampere(device) and not torch.version.hip and importlib.util.find_spec("triton")
    if name == "triton" and not fit:
        raise BadInput(
            "--kernels triton: they run on a GPU, NVIDIA's of compute capability 8.0 or later, with"
            " Triton installed; leave it out to use PyTorch's"
        )
    return name or ("triton" if fit else "torch")


def pick_dtype(name, device):
    """--dtype, of matrix products in training, or bfloat16 where the device has matrix instructions
    for it: GPUs from Ampere on, CPUs with AMX.
    """
    has_bfloat16 = is_ampere(device) if device.type == "cuda" else has_amx()
    if name == "bfloat16" and not has_bfloat16:
        raise BadInput("--dtype bfloat16: no matrix instructions for it here; leave it out")
    return getattr(torch, name or ("bfloat16" if has_bfloat16 else "float32"))


def has_amx():
    return torch.cpu.get_capabilities().get("amx_bf16", False)


@contextlib.contextmanager
def multiplying_in(dtype, device):
    """Matrix products within it are in dtype; yields the dtype that a Transformer then takes.

    On a CPU that is float32 all the same: with AMX, PyTorch rounds only what it multiplies to
    bfloat16, on the way into the product, and adds up and returns float32.
    """
    if device.type == "cuda":
        yield dtype
        return
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, PRECISIONS[dtype]
    try:
        yield torch.float32
    finally:
        matmul.fp32_precision = before


def is_ampere(device):
    """Or a later GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def describe(device, cores, world, dtype, kernels):
    """What a measured number has to travel with."""
    name = f"{cpu_name()}, {cores.count} core{'s' * (cores.count > 1)}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": name if world == 1 else f"{world} processes of {name}",
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": kernels,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit_of(Path(__file__).parent),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit_of(folder):
    """The commit that is checked out there; "-dirty" if anything but results/ has changed since.
    None if that cannot be known.
    """

    def git(*arguments):
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    if not shutil.which("git") or not (name := git("describe", "--always").stdout.strip()):
        return None
    unchanged = git("diff", "--quiet", "HEAD", "--", ".", ":!results").returncode == 0
    return name if unchanged else f"{name}-dirty"


def cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
