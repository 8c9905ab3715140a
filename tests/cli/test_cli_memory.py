"""Memory that a process keeps is not faulted in again."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from t2l_engine.cli.common import keep_freed_memory
torch.set_num_threads(1)
x = torch.ones(1 << 20)
def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        y = x + 1
        z = y * 2
        del y, z
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(faults(20))
keep_freed_memory()
faults(2)
print(faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    """20 times two results of 4 MiB, 1,024 pages each (fewer faults where the system has huge pages)."""
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    fresh, kept = map(int, out.stdout.split())
    assert kept < 40 and fresh > 40, out.stdout
