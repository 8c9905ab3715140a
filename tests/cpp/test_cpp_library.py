"""The C++ library: built without torch and Python, installed, found by a project of its own, and equal to the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from t2l_engine import AdapterBatch, HyperNetwork, ops
from t2l_engine.hypernetwork.export import export
from t2l_engine.hypernetwork.folder import resolve_checkpoint
from t2l_engine.testing.numerics import CPP_FROBENIUS, relative_frobenius, trunk_bound, u
from tests.ops.kernel_cases import LARGE, at_least

ROOT = Path(__file__).parents[2]
STEPS, ROWS = 3, 5  # of examples/cpp/main.cpp
GOLDEN = ("M-sft", "S-pos-sft", "S-rot-sft", "L-sft", "L-offset-sft", "L-recon-delta", "M-recon-z")


def tool(name):
    """Where a build tool is: beside this Python, or on the path."""
    return shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))


def run(*command, **kwargs):
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    return finished.stdout


def configuration(source, folder, *options):
    """The command that configures a build folder."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if not cmake or not tool("ctest"):
        pytest.skip("needs cmake")
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        pytest.skip("needs a C++ compiler")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    return [cmake, "-S", source, "-B", folder, *generator, *options]


def configure(source, folder, *options):
    run(*configuration(source, folder, *options))
    return folder


def build(folder, *options, left_out="^$"):
    """Configure, build and test the library, alone unless ``options`` say otherwise; its ctest builds and runs the example
    too, as a separate project.  Tests that match ``left_out`` do not run."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler")
    networks = folder.with_name("networks")
    export(HyperNetwork.from_pretrained(resolve_checkpoint("smollm2-135m-paper")), networks / "bundled.t2l")
    small = ROOT / "tests" / "data" / "golden" / "M-recon-z"
    export(HyperNetwork.from_pretrained(small, dtype=torch.bfloat16), networks / "small.t2l")
    options = [f"-DT2L_TEST_NETWORKS={networks}", *options]
    configure(ROOT, folder, "-DT2L_TORCH=OFF", "-DT2L_CORE=OFF", "-DT2L_CUDA=OFF", "-DT2L_TESTS=ON", *options)
    run(tool("cmake"), "--build", folder, "-j", os.cpu_count() or 1)
    run(tool("ctest"), "--test-dir", folder, "--output-on-failure", "--no-tests=error", "-E", left_out)
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The build folder; ``consumer/`` in it holds the installed library and the example that found it.  With the torch ops,
    for the instruction set that only builds with the tests have."""
    ops = ("-DT2L_TORCH=ON", f"-DPython_EXECUTABLE={sys.executable}")
    return build(tmp_path_factory.mktemp("cpp") / "build", *ops)


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory):
    """As ``library``, cross-compiled; its programs run in an emulator of the processor."""
    for program, package in (("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"), ("qemu-aarch64", "qemu-user")):
        if not shutil.which(program):
            pytest.skip(f"needs {program} (of Debian's {package})")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64.cmake'}"
    # Thousands of calls that end in errors: the same code on every processor, and minutes in an emulator.
    return build(tmp_path_factory.mktemp("aarch64") / "build", toolchain, left_out="test_memory|test_files")


@pytest.mark.slow
@pytest.mark.release
def test_the_oldest_compiler_of_aarch64(tmp_path):
    """Its header asks more of the target of functions with bfloat16 than those of later releases."""
    compiler = "aarch64-linux-gnu-g++-12"
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler} (of Debian's g++-12-aarch64-linux-gnu)")
    source = ROOT / "csrc" / "cpu" / "kernels_neon_bf16.cpp"
    run(compiler, "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", "-c", source, "-o", tmp_path / "kernels.o")


#: Instruction set of the example -> what qemu-aarch64 runs it as; None: this machine's best, without an emulator.
PROCESSORS = {"native": None, "neon": "neoverse-n1", "neon_bf16": "max"}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.release] if of else []) for name, of in PROCESSORS.items()])
def example(request, tmp_path):
    """Exports a network and runs the example on it; what that wrote, by file name, flat."""
    processor = PROCESSORS[request.param]
    library = request.getfixturevalue("aarch64" if processor else "library")
    emulator = ["qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu"] if processor else []

    def generate(net, task_emb, threads=2):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        export(net, tmp_path / "net.t2l")
        task_emb.numpy().tofile(out / "task_emb")
        program = library / "consumer" / "build" / "t2l_example"
        said = run(*emulator, program, tmp_path / "net.t2l", out / "task_emb", out, threads)
        assert not processor or f", {request.param}: " in said
        return {path.name: torch.from_numpy(np.fromfile(path, np.float32)) for path in out.iterdir()}

    return generate


def task_embs(config, count=3):
    return torch.randn(count, config.embed_dim, generator=torch.Generator().manual_seed(0))


def adapters(written, net, count):
    """``(module, A [N, n, r, in], B [N, n, out, r])`` of every module."""
    c = net.config
    for name in c.modules:
        shape = (count, c.num_layers, c.rank, -1)
        yield name, written[f"{name}.A"].view(shape), written[f"{name}.B"].view(shape).mT


def expected_y(written, net, count):
    """``y`` of the decode loop, from its x, base and adapters; also which rows keep the base's bits."""
    c = net.config
    slots = {name: [torch.cat((t[:1] * 0, t)) for t in pair] for name, *pair in adapters(written, net, count)}
    ranks = torch.tensor([0] + [c.rank] * count, dtype=torch.int32)
    scaling = torch.full((count + 1,), net.scaling)
    x_at = y_at = 0
    results, untouched = [], []
    for step in range(STEPS):
        ids = [(row + step) % (count + 2) - 1 for row in range(ROWS)]
        batch = AdapterBatch.from_rows(ids, seq_len=1)
        for layer in range(c.num_layers):
            for i, name in enumerate(c.modules):
                x = written["x"][x_at : x_at + ROWS * c.in_features[i]].view(ROWS, -1)
                y = written["base"][y_at : y_at + ROWS * c.out_features[i]].clone().view(ROWS, -1)
                x_at, y_at = x_at + x.numel(), y_at + y.numel()
                A, B = (t[:, layer] for t in slots[name])
                ops.lora_add_(y, x, A, B, scaling, batch.seg_indptr, batch.seg_adapters, batch.max_seg_len, ranks)
                results.append(y.flatten())
                untouched.append((torch.tensor(ids) <= 0).repeat_interleave(c.out_features[i]))
    assert x_at == len(written["x"]) and y_at == len(written["base"]) == len(written["y"])
    return torch.cat(results), torch.cat(untouched)


@pytest.mark.slow
@pytest.mark.parametrize("case", ("bundled", *GOLDEN))
def test_equals_python(example, golden, case):
    folder = resolve_checkpoint("smollm2-135m-paper") if case == "bundled" else golden / case
    net = HyperNetwork.from_pretrained(folder, dtype=torch.float32)
    task_emb = task_embs(net.config)
    written, stack = example(net, task_emb), net.generate(task_emb)
    assert list(stack.lora_A) == list(net.config.modules)
    for name, A, B in adapters(written, net, len(task_emb)):
        assert relative_frobenius(A, stack.lora_A[name]) <= CPP_FROBENIUS, name
        assert relative_frobenius(B, stack.lora_B[name]) <= CPP_FROBENIUS, name
    y, untouched = expected_y(written, net, len(task_emb))
    assert torch.equal(written["y"][untouched], written["base"][untouched]) and not untouched.all()
    # Of what was added, and the rounding of y on either side.
    allowed = CPP_FROBENIUS * (y - written["base"]).norm() + 2 * u(torch.float32) * y.norm()
    assert (written["y"] - y).norm() <= allowed and relative_frobenius(written["y"], y) <= CPP_FROBENIUS


@pytest.mark.slow
def test_bfloat16_weights(example):
    """As stored: roundings to bfloat16 fall apart here and there, so the bound is that of a plain bfloat16 computation."""
    folder = resolve_checkpoint("smollm2-135m-paper")
    net = HyperNetwork.from_pretrained(folder)
    assert net.dtype == torch.bfloat16
    task_emb = task_embs(net.config)
    plain = net.generate(task_emb)
    exact = HyperNetwork.from_pretrained(folder, dtype=torch.float64).generate(task_emb.double())
    for name, A, B in adapters(example(net, task_emb), net, len(task_emb)):
        for got, oracle, other in ((A, exact.lora_A, plain.lora_A), (B, exact.lora_B, plain.lora_B)):
            assert relative_frobenius(got, oracle[name]) <= trunk_bound(oracle[name], other[name], torch.bfloat16), name


@pytest.mark.slow
def test_threads_give_the_same_bits(example):
    net = HyperNetwork.from_pretrained(resolve_checkpoint("smollm2-135m-paper"))
    task_emb = task_embs(net.config, 1)
    one, four = example(net, task_emb, 1), example(net, task_emb, 4)
    assert all(torch.equal(one[name], four[name]) for name in one)


@pytest.mark.slow
def test_ops_on_the_model_of_amx(library):
    """The op cases under ``T2L_ISA=amx_model``; those of real models' shapes would take minutes in plain C++."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-m", "kernel_case", "--library", library / "_C.so", ROOT / "tests" / "ops",
    ]  # fmt: skip
    command += ["-k", " and ".join(f"not {word}" for word in LARGE)]
    output = run(*command, env=os.environ | {"T2L_DISABLE_NATIVE": "1", "T2L_ISA": "amx_model"}, cwd=ROOT)
    assert int(re.search(r"(\d+) passed", output)[1]) >= at_least(*LARGE), output[-2000:]


@pytest.mark.slow
def test_installed_library_is_the_library_alone(library):
    prefix = library / "consumer" / "prefix"
    files = {path.relative_to(prefix).as_posix() for path in prefix.rglob("*") if path.is_file()}
    assert {"include/t2l/t2l.h", "include/t2l/kernels.h", "include/t2l/params.h"} <= files
    assert any(name.endswith("libt2l.a") for name in files) and any(name.endswith("t2lConfig.cmake") for name in files)
    config = "".join(path.read_text() for path in prefix.rglob("*.cmake"))
    assert "torch" not in config.lower() and "python" not in config.lower() and str(ROOT) not in config


@pytest.fixture
def user(tmp_path):
    """The build folder, configured, of a program that has the library as a subdirectory."""
    (tmp_path / "main.cpp").write_text('#include "t2l/t2l.h"\nint main() { return t2l_api_version() != T2L_API_VERSION; }\n')
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(user LANGUAGES CXX)\n"
        "set(CMAKE_EXPORT_COMPILE_COMMANDS ON)\nadd_compile_options(-ffast-math)\n"
        f'add_subdirectory("{ROOT}" t2l)\nadd_executable(user main.cpp)\n'
        "target_link_libraries(user PRIVATE t2l::t2l)\n"
    )
    return configure(tmp_path, tmp_path / "build")


def test_a_parent_and_the_library_leave_each_other_alone(user):
    cache = (user / "CMakeCache.txt").read_text()
    assert all(f"{option}:BOOL=OFF" in cache for option in ("T2L_TORCH", "T2L_CORE", "T2L_INSTALL", "T2L_TESTS"))
    assert "BUILD_SHARED_LIBS" not in cache and re.search(r"^CMAKE_BUILD_TYPE:\w+=$", cache, re.M)
    commands = [entry["command"] for entry in json.loads((user / "compile_commands.json").read_text())]
    of_library = [command.split() for command in commands if f"{ROOT}/csrc/" in command]
    assert len(of_library) > 10
    assert all("-ffast-math" in words[: words.index("-fno-fast-math")] for words in of_library)


@pytest.mark.slow
@pytest.mark.release
def test_subdirectory_builds_and_runs(user):
    run(tool("cmake"), "--build", user, "-j", os.cpu_count() or 1)
    run(user / "user")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.release)])
def test_sanitizers(tmp_path, sanitizer):
    """The ctest suite, the example as a separate project included, with every finding an error."""
    if sanitizer == "thread":
        probe = subprocess.run(
            [os.environ.get("CXX", "c++"), "-fsanitize=thread", "-x", "c++", "-", "-o", tmp_path / "probe"],
            input="int main() {}",
            text=True,
            capture_output=True,
        )
        if probe.returncode or subprocess.run([tmp_path / "probe"], capture_output=True).returncode:
            pytest.skip("ThreadSanitizer does not run here")  # old ones refuse kernels with much address randomisation
    build(tmp_path / "build", f"-DT2L_SANITIZE={sanitizer}")


@pytest.mark.slow
@pytest.mark.release
def test_shared_library(tmp_path):
    """It shows exactly the functions of its two headers, and its soname is the version of the C API."""
    folder = build(tmp_path / "build", "-DBUILD_SHARED_LIBS=ON")
    c_api, kernels = ((ROOT / "csrc" / "t2l" / name).read_text() for name in ("t2l.h", "kernels.h"))
    declared = set(re.findall(r"^T2L_API [^;(]*?(\w+)\(", c_api, re.M))
    declared |= {f"t2l::{name}" for name in re.findall(r"^[\w:*& ]*[ *](\w+)\(", kernels, re.M)}
    assert {"t2l_hypernet_open", "t2l_lora_add", "t2l::lora", "t2l::detected_isa", "t2l::touch_output"} <= declared
    (shared,) = (path for path in folder.glob("libt2l.so*") if not path.is_symlink())
    assert shared.name == f"libt2l.so.{re.search(r'T2L_API_VERSION ([0-9]+)', c_api)[1]}"
    if not tool("nm"):
        pytest.skip("needs nm")
    lines = run(tool("nm"), "-D", "-C", "--defined-only", shared).splitlines()
    assert {line.split(" ", 2)[2].split("(")[0] for line in lines} == declared


LIBRARY_ALONE = ("-DT2L_TORCH=OFF", "-DT2L_CORE=OFF")
RELEASE = 'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {0}, V{0}.1"; exit; fi\n'
UNSUPPORTED = 'echo "host_config.h:143: error: #error -- unsupported GNU version!" >&2; exit 1\n'


@pytest.fixture
def stand_in(tmp_path):
    """Writes the body of a shell script that stands in for nvcc, over an earlier one; its path."""

    def write(body):
        path = tmp_path / "stand-in"
        path.write_text(f"#!/bin/sh\n{body}")
        path.chmod(0o755)
        return path

    return write


def configured(folder, nvcc, *options):
    """Status and output of a configure run of the library alone with this CUDACXX, wrapped lines joined."""
    command = configuration(ROOT, folder, *LIBRARY_ALONE, *options)
    env = {name: value for name, value in os.environ.items() if not name.startswith("CUDA")} | {"CUDACXX": str(nvcc)}
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    return finished.returncode, " ".join(finished.stdout.split())


#: What nvcc is -> why the kernels are not built, and what of it an error shows.
UNUSABLE = {
    "old": (RELEASE.format("11.8"), "expected nvcc 12.0 or later, got 11.8.1", ""),
    "broken": (
        RELEASE.format("12.4") + UNSUPPORTED,
        "does not build a kernel for 80-real;90a-real;90-virtual",
        "#error -- uns",
    ),
    "mute": ("echo no such library; exit 127\n", "that does not say its version", "no such library"),
    "none": (None, "found no program ", "none (CUDACXX)"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_nvcc_that_does_not_do_is_left_out(stand_in, tmp_path, kind):
    body, why, said = UNUSABLE[kind]
    nvcc = stand_in(body) if body else tmp_path / "none"
    status, text = configured(tmp_path / "build", nvcc, "-DT2L_CUDA=AUTO")
    assert status == 0 and "t2l: without CUDA kernels: " in text and why in text, text
    status, text = configured(tmp_path / "build", nvcc, "-DT2L_CUDA=ON")
    assert status != 0 and "T2L_CUDA=ON: " in text and why in text and said in text, text


def test_where_nvcc_is_not_looked_for(stand_in, tmp_path):
    """Beside a torch without CUDA, and for the library alone, unless asked for."""
    old = stand_in(RELEASE.format("11.8"))
    options = ("-DT2L_TORCH=ON", f"-DPython_EXECUTABLE={sys.executable}")
    status, text = configured(tmp_path / "torch", old, *options)
    why = "got 11.8.1" if torch.version.cuda else "has no CUDA (-DT2L_CUDA=ON builds them)"
    assert status == 0 and "t2l: without CUDA kernels: " in text and why in text, text
    status, text = configured(tmp_path / "alone", old)
    assert status == 0 and "CUDA" not in text, text


REFUSED = "CUDA_ARCHITECTURES: expected 80 or later (90, 90a-real, 90-virtual), got 75"


@pytest.mark.parametrize("options, message", [
    (("-DT2L_CUDA=ON", "-DT2L_CUDA_ARCHITECTURES=90a-real;75"), REFUSED),
    (("-DT2L_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90a-real;75"), REFUSED),
    (("-DT2L_EMULATOR=ON",), "T2L_EMULATOR=ON: expected T2L_TORCH=ON"),  # which holds torch ops
])  # fmt: skip
def test_options_that_are_refused(stand_in, tmp_path, options, message):
    status, text = configured(tmp_path / "build", stand_in(RELEASE.format("12.4")), *options)
    assert status != 0 and message in text, text


def find_t2l(folder, prefix, components="", program=False):
    """Configuring a C++ project that finds an installed library; its CUDA language is not enabled."""
    folder.mkdir()
    text = (
        f"cmake_minimum_required(VERSION 3.24)\nproject(user LANGUAGES CXX)\nfind_package(t2l 0.1 REQUIRED {components})\n"
    )
    if program:
        (folder / "main.cpp").write_text(CUDA_USER)
        text += "add_executable(user main.cpp)\ntarget_link_libraries(user PRIVATE t2l::t2l_cuda)\n"
    (folder / "CMakeLists.txt").write_text(text)
    return configuration(folder, folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}")


NO_TOOLKIT = "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"


@pytest.mark.slow
def test_cuda_is_a_component(library, tmp_path):
    """Whoever does not ask for it needs no CUDA toolkit, also where it is installed."""
    prefix = tmp_path / "prefix"
    shutil.copytree(library / "consumer" / "prefix", prefix)
    run(*find_t2l(tmp_path / "without", prefix), NO_TOOLKIT)
    with pytest.raises(AssertionError, match=r"component\s+cuda:\s+expected\s+a\s+t2l\s+.*without\s+CUDA\s+kernels"):
        run(*find_t2l(tmp_path / "refused", prefix, "COMPONENTS cuda"), NO_TOOLKIT)
    (config,) = prefix.rglob("t2lConfig.cmake")
    (config.parent / "t2lCudaTargets.cmake").write_text("add_library(t2l::t2l_cuda INTERFACE IMPORTED)\n")
    run(*find_t2l(tmp_path / "cpu", prefix), NO_TOOLKIT)
    run(*find_t2l(tmp_path / "optional", prefix, "OPTIONAL_COMPONENTS cuda"), NO_TOOLKIT)
    with pytest.raises(AssertionError, match=r"component\s+cuda:\s+expected\s+the\s+CUDA\s+toolkit"):
        run(*find_t2l(tmp_path / "cuda", prefix, "COMPONENTS cuda"), NO_TOOLKIT)


CUDA_USER = """
#include <cstdio>
#include "t2l/cuda_kernels.h"
int main() {
  t2l::LoraParams one{};
  one.rank = t2l::cuda::kMaxRank + 1;  // refused, where a device is found at all
  const char* error = t2l::cuda::lora(&one, 1, nullptr);
  std::puts(error ? error : "no error");
  return error == nullptr;
}
"""


@pytest.mark.slow
@pytest.mark.release
def test_cuda_library(tmp_path):
    """Found by a C++ project without a CUDA compiler of its own; runs without a driver, and says what it lacks."""
    if not tool("nvcc"):
        pytest.skip("needs nvcc")
    folder, prefix = tmp_path / "build", tmp_path / "prefix"
    status, text = configured(folder, tool("nvcc"), "-DT2L_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90a-real")
    assert status == 0 and "t2l: CUDA kernels for 90a-real, nvcc" in text, text
    run(tool("cmake"), "--build", folder, "-j", os.cpu_count() or 1)
    run(tool("cmake"), "--install", folder, "--prefix", prefix)
    run(*find_t2l(tmp_path / "cpu", prefix), NO_TOOLKIT)
    user = tmp_path / "user"
    run(*find_t2l(user, prefix, "COMPONENTS cuda", program=True))
    run(tool("cmake"), "--build", user / "build")
    assert re.search("a rank above 1024|CUDA driver|no CUDA-capable device", run(user / "build" / "user"))


def test_document_shows_the_example():
    """Every C and C++ line of docs/cpp.md stands in the example, in the same order."""
    blocks = re.findall(r"```(?:cpp|c)\n(.*?)```", (ROOT / "docs" / "cpp.md").read_text(), re.S)
    assert len(blocks) >= 4
    sources = [[line.strip() for line in path.read_text().splitlines()] for path in (ROOT / "examples" / "cpp").glob("*.*")]
    for block in blocks:
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        in_order = [all(line in source for source in [iter(s)] for line in lines) for s in sources]
        assert any(in_order), block
