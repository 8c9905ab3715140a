"""The static check of the CUDA kernels, without a compiler: parsing, rules, the committed table."""

import copy
import re

import pytest

from bench import kernels

DTYPES = ("bf16", "f16", "float")
#: As ptxas -v and cuobjdump -sass say it of sm_90a, cut to a few lines.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3t2l6device11lora_kernelINS0_4bf16ELi1ELi1ELb0EEEvNS0_10LoraLaunchE' for 'sm_90'
ptxas info    : Function properties for _ZN3t2l6device11lora_kernelINS0_4bf16ELi1ELi1ELb0EEEvNS0_10LoraLaunchE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 108 registers, used 1 barriers
ptxas info    : Compile time = 225.007 ms
ptxas info    : Compiling entry function '_ZN3t2l6device11head_kernelIfLi2ELb0EEEvNS0_10HeadLaunchE' for 'sm_90a'
ptxas info    : Function properties for _ZN3t2l6device11head_kernelIfLi2ELb0EEEvNS0_10HeadLaunchE
    72 bytes stack frame, 168 bytes spill stores, 120 bytes spill loads
ptxas info    : Used 199 registers, used 1 barriers, 72 bytes cumulative stack size, 1024 bytes smem, 3232 bytes cmem[0]
ptxas info    : Compile time = 306.804 ms
"""
SASS = """
	code for sm_90a
	.target	sm_90a

		Function : _ZN3t2l6device11lora_kernelINS0_4bf16ELi1ELi1ELb0EEEvNS0_10LoraLaunchE
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                   /* 0x00000a00ff017b82 */
                                                                                            /* 0x000ff00000000800 */
        /*0060*/              @!P0 BRA 0x320 ;                                              /* 0x0000000000ac8947 */
        /*0c30*/                   ATOMS.ADD RZ, [R14+0x80], R15 ;                          /* 0x0000800f0eff738c */
        /*35b0*/                   HMMA.16816.F32.BF16 R24, R40, R28, R24 ;                 /* 0x0000001c2818723c */
        /*a2f0*/                   HMMA.1688.F32.TF32 R52, R24, R88, R52 ;                  /* 0x000000581834723c */
        /*a300*/               @P1 HMMA.1688.F32.TF32 R52, R28, R90, R52 ;                  /* 0x0000005a1c34723c */
		..........

		Function : _ZN3t2l6device11head_kernelIfLi2ELb0EEEvNS0_10HeadLaunchE
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*1860*/                   LDGSTS.E.BYPASS.128.ZFILL [R35], [R16.64], P0 ;          /* 0x0000000010237fae */
        /*1870*/                   STL.64 [R1+0x8], R2 ;                                    /* 0x0000080201007387 */
        /*1880*/              @!P2 LDL.64 R2, [R1+0x8] ;                                    /* 0x0000080001027983 */
        /*1890*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5 ;           /* 0x000000050200798e */
"""


@pytest.fixture
def table():
    return kernels.read(kernels.FILE)


def test_usage_is_read_from_what_the_tools_say():
    none = dict.fromkeys(("static_shared", "stack", "spills", "local", "global_atomics", "async_copies"), 0)
    none |= dict.fromkeys(("cluster_barriers", "pdl_waits", "pdl_releases", "pdl_accesses"), 0)
    products = {"HMMA.16816.F32.BF16": 1, "HMMA.1688.F32.TF32": 2}
    head = {"registers": 199, "blocks": 1, "static_shared": 1024, "stack": 72, "spills": 288, "local": 2, "instructions": 4}
    assert kernels.usages(PTXAS, SASS) == {
        "lora_kernel<bf16, 1, 1, 0>": none | {"registers": 108, "blocks": 2, "instructions": 6, "products": products},
        "head_kernel<float, 2, 0>": none | head | {"global_atomics": 1, "async_copies": 1, "products": {}},
    }


def test_a_kernel_that_only_one_tool_names_is_an_error():
    with pytest.raises(kernels.KernelError, match="ptxas names .*head_kernel.*, cuobjdump"):
        kernels.usages(PTXAS, SASS[: SASS.index("\t\t....")])


@pytest.mark.parametrize("mangled, name", [
    ("_ZN3t2l6device12trunk_kernelIfEEvNS0_11TrunkLaunchE", "trunk_kernel<float>"),
    ("_ZN3t2l6device11head_kernelINS0_3f16ELi8ELb1EEEvNS0_10HeadLaunchE", "head_kernel<f16, 8, 1>"),
])  # fmt: skip
def test_kernels_are_named_as_in_the_sources(mangled, name):
    said = "ptxas error   : Registers are spilled to local memory in function '{}', 8 bytes spill stores"
    assert kernels.demangled(said.format(mangled)) == said.format(name)


@pytest.mark.parametrize("kernel, change, fault", [
    ("trunk_kernel<float>", {"spills": 16, "stack": 8}, "16 bytes of spills"),
    ("trunk_kernel<f16>", {"local": 3}, "3 LDL and STL"),
    ("lora_kernel<f16, 1, 1, 0>", {"global_atomics": 2}, "2 atomic operations"),
    ("head_kernel<bf16, 8, 0>", {"async_copies": 0}, "no LDGSTS"),
    ("lora_kernel<bf16, 1, 2, 0>", {"products": {"HMMA.16816.F32": 8, "HMMA.1688.F32.TF32": 16}}, "HMMA.16816.F32 and"),
    ("head_kernel<f16, 2, 0>", {"registers": 130, "blocks": 1}, "130 registers"),
    ("lora_kernel<bf16, 1, 1, 1>", {"instructions": 1700}, "1700 instructions, expected 1200 at most"),
    ("lora_grad_kernel<bf16>", {"products": {"HMMA.16816.F32.BF16": 8}}, "expected HMMA.1688.F32.TF32"),
    ("head_kernel<bf16, 2, 0>", {"cluster_barriers": 2}, "2 cluster barriers, expected none"),
    ("head_kernel<bf16, 2, 0>", {"pdl_waits": 0}, "0 pdl waits, expected some"),
    ("lora_kernel<f16, 2, 1, 0>", {"pdl_releases": 1}, "1 pdl releases, expected none"),
    ("lora_kernel<bf16, 1, 1, 1>", {"pdl_accesses": 2}, "2 accesses of memory before it waits for earlier launches"),
])  # fmt: skip
def test_a_broken_rule_is_named(table, kernel, change, fault):
    table.kernels["sm_90a", kernel] |= change
    (said,) = kernels.broken_rules(table)
    assert said.startswith(f"sm_90a {kernel}: ") and fault in said


def test_a_kernel_without_rules_is_an_error(table):
    table.kernels["sm_80", "encoder_kernel<f16>"] = table.kernels["sm_80", "trunk_kernel<f16>"]
    with pytest.raises(kernels.KernelError, match="^encoder_kernel<f16>: "):
        kernels.broken_rules(table)


@pytest.mark.parametrize("version, key, most", [
    (None, "registers", lambda was: was + kernels.SLACK),
    ("13.9.1", "registers", lambda was: was + kernels.SLACK_OF_OTHERS),
    (None, "instructions", lambda was: int(was * kernels.GROWTH)),
], ids=["registers", "registers of another compiler", "instructions"])  # fmt: skip
def test_growth_is_named(table, version, key, most):
    made = copy.deepcopy(table)._replace(nvcc=version or table.nvcc)
    usage = made.kernels["sm_80", "trunk_kernel<bf16>"]
    usage[key] = most(usage[key])
    assert kernels.differences(made, table) == []
    usage[key] += 1
    (fault,) = kernels.differences(made, table)
    assert fault.startswith("sm_80 trunk_kernel<bf16>: ") and f"{key}, is {usage[key]}" in fault


def test_a_vanished_and_a_new_kernel_are_named(table):
    made = copy.deepcopy(table)
    made.kernels["sm_90a", "head_kernel<bf16, 4, 0>"] = made.kernels.pop(("sm_90a", "head_kernel<bf16, 8, 0>"))
    new, vanished = kernels.differences(made, table)
    assert new.startswith("sm_90a head_kernel<bf16, 4, 0>: not in the table")
    assert vanished.startswith("sm_90a head_kernel<bf16, 8, 0>: in the table")


def test_the_command(monkeypatch, tmp_path, table):
    file = tmp_path / "kernels.jsonl"
    monkeypatch.setattr(kernels, "measured", lambda jobs: table)
    kernels.command(check=False, jobs=1, file=file)
    assert kernels.read(file) == table and file.read_bytes() == kernels.FILE.read_bytes()
    assert "registers are allowed" not in kernels.command(check=True, jobs=1)
    monkeypatch.setattr(kernels, "measured", lambda jobs: table._replace(nvcc="13.9.1"))
    assert f"{table.nvcc}: 24 more registers are allowed" in kernels.command(check=True, jobs=1)
    file.unlink()
    with pytest.raises(kernels.KernelError, match="no such file"):
        kernels.command(check=True, jobs=1, file=file)
    table.kernels["sm_80", "trunk_kernel<bf16>"]["local"] = 1
    with pytest.raises(kernels.KernelError, match="^sm_80 trunk_kernel<bf16>: .* 1 LDL"):
        kernels.command(check=False, jobs=1, file=file)
    assert not file.exists()


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDACXX", raising=False)
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(kernels.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(kernels.KernelError, match=r"^nvcc: .*cuda-check"):
        kernels.find("nvcc")


def test_the_committed_table_keeps_the_rules(table):
    assert kernels.broken_rules(table) == []
    assert all(usage["blocks"] == kernels.blocks(usage["registers"]) for usage in table.kernels.values())


@pytest.mark.parametrize("arch", kernels.ARCHS)
def test_the_committed_table_has_every_kernel_that_is_launched(table, arch):
    tiles = {}
    for kernel in (name for of, name in table.kernels if of == arch):
        kind, dtype, of_kernel = kernels.parts(kernel)
        tiles.setdefault((kind, dtype), []).append(tuple(of_kernel))
    assert tiles.keys() == {(kind, dtype) for kind in ("lora", "lora_grad", "trunk", "head") for dtype in DTYPES}
    narrow, wide = constant("kNarrowRows") // 16, constant("kWideRows") // 16
    for dtype in DTYPES:
        assert tiles["trunk", dtype] == tiles["lora_grad", dtype] == [()]
        assert sorted(tiles["head", dtype]) == [(narrow, 0)] + [(wide, 0), (wide, 1)] * (dtype != "float")
        lora = [(m, n) for m, n, decode in tiles["lora", dtype] if not decode]
        decode = sorted((m, n) for m, n, decode in tiles["lora", dtype] if decode)
        assert decode == ([] if dtype == "float" else [(1, 1), (1, 2), (1, constant("kWideTiles"))])
        for ranks in (1, 2):  # eights of ranks: one kernel for few tokens, one for many
            few, many = sorted(m for m, n in lora if n == ranks)
            assert few == 1 < many
        assert (1, constant("kWideTiles")) in lora
        assert len(lora) == 5 + (dtype != "float")  # many tokens of more ranks: a kernel of its own in 16-bit types


def constant(name):
    """A number of csrc/cuda/config.h."""
    text = (kernels.ROOT / "csrc" / "cuda" / "config.h").read_text(encoding="utf-8")
    return int(re.search(rf"constexpr \w+ {name} = (\d+);", text)[1])


def test_the_design_is_that_of_the_sources():
    assert constant("kThreads") == kernels.THREADS
    assert [kernels.blocks(registers) for registers in (32, 96, 128, 129, 168, 255)] == [8, 2, 2, 1, 1, 1]
    heads = [f"head_kernel<{dtype}, {constant('kNarrowRows') // 16}, 0>" for dtype in DTYPES]
    assert [kernels.designed_blocks(kernel) for kernel in heads] == [2, 2, 1]
    small = [f"lora_kernel<{dtype}, 1, {n}, {decode}>" for dtype in DTYPES[:2] for n in (1, 2, 4) for decode in (0, 1)]
    assert {kernels.designed_blocks(kernel) for kernel in small} == {2}
    large = ("lora_kernel<bf16, 2, 1, 0>", "lora_kernel<float, 1, 1, 0>", "head_kernel<bf16, 8, 1>", "trunk_kernel<bf16>")
    assert {kernels.designed_blocks(kernel) for kernel in large} == {1}
