"""Every kernel compiles for every GPU it is meant for, without spilling registers, and needs what
the committed table says.
"""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton here")


def python(*arguments):
    """In a process of its own, because compiling for a GPU that is not there sets Triton's driver
    for good.
    """
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_kernels_compile_clean_and_need_what_the_table_says():
    run = python("-m", "tests.compiled_kernels", "--quick")
    assert run.returncode == 0, run.stderr


def test_there_is_a_table_for_the_pinned_version():
    pinned = [
        line.split(";")[0].partition("==")[2]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.startswith("triton")
    ]
    assert (ROOT / f"tests/compiled_kernels_{pinned[0]}.txt").exists()


FAULTS = {
    "spills": {"spills": 1},
    "a stack": {"stack": 8},
    "more registers than there are": {"warps": 16, "registers": 168},
    "more shared memory than there is": {"shared": 233_000},
    "more than consumer chips have": {"arch": 80, "shared": 102_000, "HMMA": 8, "HGMMA": 0},
    "Ampere's instructions on Hopper": {"HMMA": 8},
    "no matrix instructions": {"HGMMA": 0},
    "no copy engine": {"TMA": 0},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    from tests.compiled_kernels import Resources

    good = Resources(
        arch=90, kernel="a", case="b", warps=8, registers=255, shared=200_000, tensor_columns=0,
        stack=0, spills=0, HMMA=0, HGMMA=4, UTCMMA=0, TMA=6, async_copies=0,
        has_16_bit_products=True, has_descriptors=True,
    )  # fmt: skip
    assert not list(good.faults()) and good.programs == 1
    assert len(list(dataclasses.replace(good, **FAULTS[fault]).faults())) == 1


def test_a_tile_too_large_for_the_registers_is_seen_to_spill():
    run = python(
        "-c",
        "from tests.compiled_kernels import compiled_by, cross_entropy_triton as module\n"
        "module.TILES[80] = (256, 128, 16, 4, 1)\n"
        "print(*compiled_by((80, 'loss bfloat16'))[0].faults())",
    )
    assert "spills" in run.stdout, run.stderr
