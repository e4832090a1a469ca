"""The build: what the machine code uses and contains, how the module links, and what setup.py does without nvcc."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.cuda import extension

needs_nvcc = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

# Kernel → (threads a block, blocks that must find registers on one SM): the launch bounds of the sources.
RESIDENT = {
    "grouped_gemm_sm80": (256, 2), "grouped_wgrad_sm80": (256, 2), "grouped_gemm_sm90": (384, 1),
    "grouped_wgrad_sm90": (384, 1), "router_fwd": (256, 2), "count_choices": (256, 4), "scatter_slots": (256, 4),
    "gate_wgrad": (256, 3), "gate_dgrad": (256, 4), "gate_sums": (256, 4),
    "combine_fwd": (128, 3), "combine_fwd_any": (128, 8), "combine_bwd": (512, 1), "combine_bwd_any": (256, 3),
    "bias_sums": (256, 4), "gather_sum": (128, 4), "zero_tail": (128, 4),
}  # fmt: skip
STATIC_SHARED_LIMIT = 48 * 1024


@cache
def tool(name: str) -> str | None:
    """cuobjdump or c++filt: from PATH, the toolkit, or Triton, which ships the first."""
    places = [shutil.which(name)]
    if os.environ.get("CUDA_HOME"):
        places.append(Path(os.environ["CUDA_HOME"], "bin", name))
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    except ImportError:
        pass
    return next((str(p) for p in places if p and Path(p).exists()), None)


def cuobjdump(*options: str, file: str = "") -> str:
    """What cuobjdump says about the module, or about an object file of its build, with readable kernel names."""
    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with Triton")
    module = extension.path("static")
    what = module.parents[1] / file if file else module
    done = subprocess.run([tool("cuobjdump"), *options, str(what)], capture_output=True, text=True, check=True)
    function = re.compile(r"(Function(?: :)?) (\w+)")
    names = [mangled for _, mangled in function.findall(done.stdout)]
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {m: re.sub(r".*?\(anonymous namespace\)::(\w+).*", r"\1", p) for m, p in zip(names, plain, strict=True)}
    return function.sub(lambda found: f"{found[1]} {short[found[2]]}", done.stdout)


@needs_nvcc
def test_registers_shared_memory_and_spills(capsys):
    """From the cubins: nothing in local memory, and the registers the launch bounds promise."""
    table = defaultdict(lambda: defaultdict(list))
    arch = None
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            kernel = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            table[kernel][arch].append((registers, shared))
            assert stack == local == 0, f"{kernel} of {arch} keeps {stack} + {local} bytes in local memory"
            threads, blocks = RESIDENT[kernel]
            granted = -(-registers // 8) * 8  # the hardware hands them out by eights
            assert granted * threads * blocks <= 65536, f"{kernel} of {arch} takes {registers} registers"
            assert shared <= STATIC_SHARED_LIMIT
    assert set(table) == set(RESIDENT)
    lines = [f"{'kernel (largest instance)':26}{'registers / static shared bytes':>40}"]
    for kernel, archs in table.items():
        lines.append(f"  {kernel:24}" + "".join(f"{a:>8} {max(c)[0]:3} / {max(c)[1]:5}" for a, c in archs.items()))
    (extension.path("static").parents[1] / "resources.txt").write_text("\n".join(lines) + "\n")
    with capsys.disabled():
        print("", *lines, sep="\n")


@needs_nvcc
def test_the_instructions_that_make_it_fast():
    """Tensor cores, asynchronous copies and TMA in the machine code, and no wgmma waited for one by one."""
    wanted = {
        ("sm_80", "grouped_gemm_sm80"): ("HMMA", "LDSM", "LDGSTS"),
        ("sm_80", "grouped_wgrad_sm80"): ("HMMA", "LDSM", "LDGSTS"),
        ("sm_90a", "grouped_gemm_sm90"): ("HGMMA", "UTMALDG", "LDGSTS", "USETMAXREG", "SYNCS"),
        ("sm_90a", "grouped_wgrad_sm90"): ("HGMMA", "LDGSTS", "USETMAXREG", "SYNCS"),
    }
    for arch in ("sm_80", "sm_90a"):
        file = f"grouped_gemm_{arch.rstrip('a').replace('_', '')}.cu.o"
        functions = cuobjdump("-sass", "-arch", arch, file=file).split("Function : ")[1:]
        seen = set()
        for text in functions:
            kernel = text.split()[0]
            for instruction in wanted.get((arch, kernel), ()):
                assert instruction in text, f"no {instruction} in {kernel} of {arch}"
            products = re.findall(r"HGMMA\.64x(?:64|128|160|192|256)x16.*", text)
            # A batch of four is awaited once; the compiler serialises them (gsb0 on each) when it cannot follow.
            assert sum("gsb0" in p for p in products) * 4 <= len(products), f"{kernel} waits for each wgmma"
            seen.add(kernel)
        assert {k for a, k in wanted if a == arch} <= seen


@needs_nvcc
def test_clusters_load_for_both_blocks_without_a_fence_of_the_device():
    """Both products have kernels for clusters. Their arrival at the other block's barrier is not a release over the
    cluster, which would wait for all memory."""
    multicast = {"grouped_gemm_sm90": "UTMALDG.3D.MULTICAST", "grouped_wgrad_sm90": "UTMALDG.2D.MULTICAST"}
    found = set()
    for text in cuobjdump("-sass", "-arch", "sm_90a", file="grouped_gemm_sm90.cu.o").split("Function : ")[1:]:
        kernel = text.split()[0]
        assert ("MULTICAST" in text) == ("UCGABAR_WAIT" in text), f"{kernel}: a cluster starts together"
        if multicast[kernel] in text:
            found.add(kernel)
        assert not re.search(r"MEMBAR\.\w+\.(GPU|SYS)", text), f"{kernel} waits for all memory"
    assert found == set(multicast)


@needs_nvcc
@pytest.mark.parametrize(("arch", "prefetch", "gemm"), [("sm_80", "CCTL.E.PF2", "80"), ("sm_90a", "UBLKPF.L2", "90")])
def test_the_compiler_drops_no_prefetch(arch, prefetch, gemm):
    """Which nothing depends on."""
    found = {text.split()[0] for text in cuobjdump("-sass", "-arch", arch).split("Function : ")[1:] if prefetch in text}
    assert {"router_fwd", "combine_bwd", "combine_bwd_any", f"grouped_gemm_sm{gemm}"} <= found


@needs_nvcc
def test_every_kernel_waits_for_the_launch_before_it():
    """With programmatic dependent launch a block may run before the data it reads are there, until it has waited."""
    kernels = 0
    for text in cuobjdump("-sass", "-arch", "sm_90a").split("Function : ")[1:]:
        lines = text.splitlines()
        kernel, waits = lines[0], [n for n, line in enumerate(lines) if "ACQBULK" in line]
        assert waits, f"{kernel} does not wait"
        early = [line for line in lines[: waits[0]] if re.search(r"\b(LDG|STG|LDGSTS|UTMALDG|ATOMG|RED|EXIT)\b", line)]
        assert not early, f"{kernel}, before its wait: {early[0].strip()}"
        kernels += 1
    assert kernels >= len(RESIDENT)


@needs_nvcc
def test_a_release_links_no_cuda_library_and_imports_without_a_driver():
    needed = subprocess.run(["readelf", "-d", extension.path("static")], capture_output=True, text=True, check=True)
    assert "cuda" not in needed.stdout.lower(), "the runtime should be linked statically, the driver not at all"
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.build_info()['cudart_linkage'] == 'static'\n"
        "try: module.device_arch()\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, extension.path("static")],
        capture_output=True, text=True, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout.startswith("llama_smop._C.device_arch: "), "a call without a device says so"


@needs_nvcc
def test_build_info():
    info = extension.static().build_info()
    assert info["architectures"] == extension.ARCHS
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["nvcc"])
    assert info["cudart"] >= 12000
    assert info["cxx"].startswith("g++ ")


def test_a_compiler_that_fails_is_an_error(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'kernel.cu: error: broken' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CXX", "true")
    pytest.importorskip("pybind11")
    with pytest.raises(RuntimeError, match=r"building the CUDA extension failed(?s:.*)error: broken"):
        extension.csrc.build(nvcc, tmp_path / "build", {"static": tmp_path / "_C.so"}, "80")


def test_nvcc_of_a_wrong_cuda_home_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="has no bin/nvcc"):
        extension.csrc.find_nvcc()


@pytest.mark.parametrize("archs", ["sm_90", "80,90a", "fast"])
def test_architectures_are_checked(archs, monkeypatch):
    monkeypatch.setenv("LLAMA_SMOP_CUDA_ARCHS", archs)
    with pytest.raises(ValueError, match='must look like "80;90a"'):
        extension.csrc.requested_archs()


def run_setup(tmp_path: Path, choice: str) -> subprocess.CompletedProcess:
    """`setup.py build_ext` where there is no nvcc."""
    env = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"}
    env |= {"LLAMA_SMOP_BUILD_CUDA": choice, "PATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    return subprocess.run(command, cwd=extension.REPOSITORY, env=env, capture_output=True, text=True)


def test_without_nvcc_the_package_installs_as_pure_python_and_says_so(tmp_path):
    done = run_setup(tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("installing without the CUDA extension") == 1


def test_without_nvcc_a_demanded_extension_is_an_error(tmp_path):
    done = run_setup(tmp_path, "1")
    assert done.returncode != 0
    assert "no nvcc: set CUDA_HOME or put nvcc on PATH" in done.stderr


def test_an_unknown_choice_is_an_error(tmp_path):
    done = run_setup(tmp_path, "maybe")
    assert done.returncode != 0
    assert 'must be "0", "1" or "auto"' in done.stderr
