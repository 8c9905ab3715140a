"""Checks of the CUDA kernels on a GPU (``pytest -m cuda``); on the CPU the same checks run over its kernels, and so test
the checks."""

import contextlib

import pytest
import torch

from tests import backends


class Device:
    """Where a check runs: on the CPU a captured graph is the call itself, and there is one stream."""

    def __init__(self, name):
        self.torch, self.on_gpu = torch.device(name), name == "cuda"

    def capture(self, call):
        """What replays ``call``, which runs once or more before."""
        if not self.on_gpu:
            return call
        with self.streams(1)[0]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def streams(self, count):
        """Contexts of ``count`` new streams that wait for what came before."""
        if not self.on_gpu:
            return [contextlib.nullcontext() for _ in range(count)]
        streams = [torch.cuda.Stream() for _ in range(count)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        return [torch.cuda.stream(stream) for stream in streams]

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()


@pytest.fixture
def gpu():
    """Skips where torch sees no GPU; fails where it does and the kernels were not built for CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return backends.select("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield Device(request.param)
    torch.set_num_threads(threads)
