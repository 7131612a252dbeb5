"""Rows spread over the cores of a CPU (threads) and over processes (torchrun).

A training step of a small model is two hundred small operations. Splitting each of them over the
cores, as PyTorch does by itself, costs a barrier an operation; giving every core its own rows and
one thread costs one barrier a step. On two cores that is a quarter more tokens a second.
"""

import datetime
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from safety import BadInput

# as PyTorch found it: the machine's cores, or OMP_NUM_THREADS, which torchrun sets to 1
AVAILABLE_CORES = torch.get_num_threads()
# with the first process, which may be fetching a corpus of 20 GB
PATIENCE = datetime.timedelta(days=1)


class Cores:
    """`cores(function, *tensors)` calls function on one part of the rows for each core; results in
    the rows' order, none of no rows. `cores.run` takes jobs of unequal size.
    """

    def __init__(self, device, count=AVAILABLE_CORES):
        self.count = count if device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.count) if self.count > 1 else None
        if self.pool:
            torch.set_num_threads(1)

    def __call__(self, function, *rows):
        if not len(rows[0]):
            return []
        if self.pool is None:
            return [function(*rows)]
        parts = min(self.count, len(rows[0]))
        return list(self.pool.map(function, *(tensor.tensor_split(parts) for tensor in rows)))

    def run(self, *groups):
        """Calls functions without arguments, the next whenever a core is free: lists of them ->
        lists of what they return.
        """
        apply = self.pool.map if self.pool else map
        results = apply(lambda function: function(), [job for group in groups for job in group])
        return [list(itertools.islice(results, len(group))) for group in groups]


class Ranks:
    """This process among those that torchrun started; alone if none did."""

    def __init__(self, device):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.is_first = self.rank == 0
        on_gpu = device.type == "cuda"
        if on_gpu:
            take_gpu(int(os.environ.get("LOCAL_RANK", 0)))
        if self.world > 1:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)

    def sum(self, tensor):
        """Adds `tensor` up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def share(self, rows):
        """This process's part of the rows; `gather` puts what all made of theirs back in order."""
        return rows.tensor_split(self.world)[self.rank]

    def gather(self, tensor):
        if self.world == 1:
            return tensor
        parts = [None] * self.world
        dist.all_gather_object(parts, tensor.cpu())
        return torch.cat(parts)

    def wait(self):
        """Until all processes have come here."""
        if self.world > 1:
            dist.barrier()

    def first_then_all(self, function):
        """Calls function in the first process and, when that is done, in the others: for what
        prepares files.
        """
        result = function() if self.is_first else None
        self.wait()
        return result if self.is_first else function()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.world > 1:
            dist.destroy_process_group()


def take_gpu(number):
    """Makes that GPU the one that "cuda" means in this process."""
    if number >= torch.cuda.device_count():
        raise BadInput(
            f"process {number + 1} of this machine has no GPU: there are"
            f" {torch.cuda.device_count()}; start torchrun with --nproc-per-node"
            f" {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(number)
