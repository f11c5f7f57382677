"""Builds the native core with ninja: one object per source and instruction set.

Environment:

- CXX names the compiler, CXXFLAGS adds flags.
- FASTOPT_CUDA=auto|on|off: build the CUDA kernels where nvcc is found, always, or never.
- FASTOPT_CUDA_ARCHS: for which cards, "80 86 89 90a 100" by default; PTX of the newest is added.
- FASTOPT_SANITIZE=1 instruments the objects with AddressSanitizer and UndefinedBehaviorSanitizer.
- FASTOPT_HOST_SIM=1 also builds the CUDA kernels for csrc/host_sim, for tests.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# -fno-math-errno and -fno-trapping-math: no loop with a square root vectorises without them.
COMPILE_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
]
LINK_FLAGS = ["-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]
SANITIZE_FLAGS = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"),
    *("-O1", "-fexpensive-optimizations"),  # the latter fuses most products and sums, as -O3 does
]

# From the plainest to the widest; csrc/cpu/dispatch.cpp picks at import.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    # GCC's own AVX-512 header raises the warning that is turned off (its bug 105593).
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    avx512 += ["-mprefer-vector-width=512", "-Wno-maybe-uninitialized"]
    ISA_FLAGS |= {"avx2": avx2, "avx512": avx512, "avx512bf16": [*avx512, "-mavx512bf16"]}

PER_ISA_SOURCES = [
    "csrc/cpu/optimizer_step.cpp",
    "csrc/cpu/layerwise_step.cpp",
    "csrc/cpu/grad_norm.cpp",
    "csrc/cpu/lstm.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/cross_entropy.cpp",
]
CPU_SOURCES = [
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/lstm_schedule.cpp",
    "csrc/cpu/threads.cpp",
    "csrc/bindings/gradient_list.cpp",
    "csrc/bindings/optimizer_plan.cpp",
    "csrc/bindings/triton_plan.cpp",
    "csrc/bindings/lstm_calls.cpp",
    "csrc/bindings/attention_calls.cpp",
    "csrc/bindings/cross_entropy_calls.cpp",
    "csrc/bindings/cpu_module.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/optimizer_step.cu",
    "csrc/cuda/coded_step.cu",
    "csrc/cuda/layerwise_step.cu",
    "csrc/cuda/grad_norm.cu",
    "csrc/cuda/attention_forward.cu",
    "csrc/cuda/attention_backward.cu",
    "csrc/cuda/attention_query_gradients.cu",
    "csrc/cuda/lstm_forward.cu",
    "csrc/cuda/lstm_backward.cu",
    "csrc/cuda/lstm_cell.cu",
    "csrc/cuda/cross_entropy.cu",
    "csrc/cuda/device.cu",
    "csrc/bindings/cuda_plan.cpp",
    "csrc/bindings/cuda_attention_calls.cpp",
    "csrc/bindings/cuda_lstm_calls.cpp",
    "csrc/bindings/cuda_cross_entropy_calls.cpp",
    "csrc/bindings/cuda_module.cpp",
]
SHARED_SOURCES = [
    "csrc/bindings/torch_access.cpp",
    "csrc/bindings/layout.cpp",
    "csrc/bindings/attention_tensors.cpp",
    "csrc/bindings/cross_entropy_tensors.cpp",
    "csrc/bindings/group_rules.cpp",
    "csrc/bindings/step_plan.cpp",
    "csrc/bindings/card_plan.cpp",
]
SIMULATOR_SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in Path(ROOT, "csrc/host_sim").glob("*.cpp")
)

CUDA_ARCHS = "80 86 89 90a 100"
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xptxas",
    "-v",
    "-Xfatbin",
    "-compress-all",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
]
# nvcc knows where its libraries are.
CUDA_LINK_FLAGS = ["-shared", "-cudart", "static"]
CUDA_LINK_FLAGS += ["-Xlinker", "--exclude-libs,ALL,--gc-sections,--strip-all"]


class BuildError(SystemExit):
    """Ends the build with a message instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nfastopt: {message}\n")


def find_compiler() -> list[str]:
    """Returns the C++ compiler's command once it has compiled a small OpenMP program.

    Raises:
        BuildError: No compiler was found, or it failed; the message says what to install.
    """
    advice = (
        "Install GCC 9 or newer with OpenMP (Debian, Ubuntu: apt-get install g++; Fedora: dnf "
        "install gcc-c++; conda: conda install -c conda-forge gxx), or name one in CXX."
    )
    command = shlex.split(os.environ.get("CXX", "g++"))
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler: {' '.join(command) or 'CXX is empty'}. {advice}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\n#include <tuple>\nint main() { return 0; }\n")
        probe = [*command, *COMPILE_FLAGS, str(source), "-o", str(Path(folder, "probe"))]
        result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(
            f"the C++ compiler {' '.join(command)} failed on a small program. {advice}\n"
            f"{' '.join(probe)}\n{result.stderr}"
        )
    return command


def quote(words: list[str]) -> str:
    """Joins words for a ninja variable that a shell will read."""
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def find_nvcc() -> Path | None:
    """Returns nvcc, or None where the CUDA kernels are not to be built.

    Raises:
        BuildError: FASTOPT_CUDA is none of its values, or "on" and there is no nvcc.
    """
    wanted = os.environ.get("FASTOPT_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise BuildError(f"FASTOPT_CUDA must be auto, on or off, got {wanted!r}")
    if wanted == "off":
        return None
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [str(Path(home, "bin")) for home in homes if home]
    search = os.pathsep.join([*places, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None and wanted == "on":
        raise BuildError(
            "FASTOPT_CUDA=on and no nvcc. Install NVIDIA's CUDA toolkit 12.1 or newer and put nvcc "
            "on PATH or its folder into CUDA_HOME."
        )
    return None if nvcc is None else Path(nvcc).resolve()


def gencode_flags() -> list[str]:
    """Machine code for each architecture, and PTX of the newest for cards to come."""
    archs = os.environ.get("FASTOPT_CUDA_ARCHS", CUDA_ARCHS).replace(";", " ").split()
    for arch in archs:
        if not arch.rstrip("af").isdigit():
            raise BuildError(f"FASTOPT_CUDA_ARCHS must list numbers as in '80 90a', got {arch!r}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max(archs, key=lambda arch: int(arch.rstrip("af")))
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


class NinjaFile:
    """The text of a ninja file that builds one module."""

    def __init__(self, compiler: list[str], defines: list[str]) -> None:
        """Writes the rules; objects are added later."""
        import pybind11

        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = [
            *COMPILE_FLAGS,
            *(f"-I{include}" for include in includes),
            *defines,
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        self.link_flags = [*LINK_FLAGS]
        if os.environ.get("FASTOPT_SANITIZE") == "1":
            flags += SANITIZE_FLAGS
            self.link_flags += SANITIZE_FLAGS
        else:
            self.link_flags += ["-s"]
        self.linker = "$compiler"
        self.objects: list[str] = []
        self.lines = [
            f"compiler = {quote(compiler)}",
            f"flags = {quote(flags)}",
            "rule compile",
            "  command = $compiler $flags $more -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $out",
        ]

    def compile(self, source: str, name: str | None = None, more: list[str] | None = None) -> None:
        """Adds an object from a source."""
        self.objects.append(f"{name or Path(source).stem}.o")
        self.lines += [
            f"build {self.objects[-1]}: compile {ROOT / source}",
            f"  more = {quote(more or [])}",
        ]

    def use_nvcc(self, nvcc: Path) -> None:
        """Adds the rule for CUDA sources; what ptxas reports of each lies beside its object."""
        flags = [*NVCC_FLAGS, f"-I{ROOT / 'csrc'}", *gencode_flags()]
        report = "2> $out.ptxas || (cat $out.ptxas >&2; exit 1)"
        self.lines += [
            f"nvcc = {quote([str(nvcc)])}",
            f"nvcc_flags = {quote(flags)}",
            "rule compile_cuda",
            f"  command = $nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out {report}",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compiling $out for CUDA",
        ]
        self.linker = "$nvcc"
        self.link_flags = CUDA_LINK_FLAGS

    def compile_cuda(self, source: str) -> None:
        """Adds an object from a CUDA source."""
        self.objects.append(f"{Path(source).stem}.cu.o")
        self.lines.append(f"build {self.objects[-1]}: compile_cuda {ROOT / source}")

    def text(self, target: Path) -> str:
        """The file that links `target`."""
        link = [
            "rule link",
            f"  command = {self.linker} $in -o $out {quote(self.link_flags)}",
            "  description = linking $out",
            f"build {target}: link {' '.join(self.objects)}",
        ]
        return "\n".join([*self.lines, *link, ""])


def cpu_module(compiler: list[str]) -> NinjaFile:
    """Describes the CPU kernels, once for each instruction set."""
    for_each_isa = " ".join(f"X({isa})" for isa in ISA_FLAGS)
    file = NinjaFile(compiler, [f"-DFASTOPT_FOR_EACH_ISA(X)={for_each_isa}"])
    for source in PER_ISA_SOURCES:
        for isa, isa_flags in ISA_FLAGS.items():
            more = [f"-DFASTOPT_ISA={isa}", *isa_flags]
            file.compile(source, f"{Path(source).stem}.{isa}", more)
    for source in CPU_SOURCES + SHARED_SOURCES:
        file.compile(source)
    return file


def cuda_module(compiler: list[str], nvcc: Path) -> NinjaFile:
    """Describes the CUDA kernels for cards."""
    file = NinjaFile(compiler, [])
    file.use_nvcc(nvcc)
    for source in CUDA_SOURCES + SHARED_SOURCES:
        if source.endswith(".cu"):
            file.compile_cuda(source)
        else:
            file.compile(source)
    return file


def simulated_module(compiler: list[str]) -> NinjaFile:
    """Describes the CUDA kernels for the host simulator."""
    file = NinjaFile(compiler, ["-DFASTOPT_HOST_SIM"])
    for source in CUDA_SOURCES + SHARED_SOURCES + SIMULATOR_SOURCES:
        as_cpp = ["-x", "c++", "-Wno-unknown-pragmas"] if source.endswith(".cu") else []
        # The simulator's launch.cpp and the kernels' device.cu have namesakes.
        file.compile(source, source.replace("/", "_").rsplit(".", 1)[0], as_cpp)
    return file


class NinjaBuild(build_ext):
    """Replaces setuptools' compiler driver by one ninja run."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links `ext`, in parallel and only what has changed."""
        compiler = find_compiler()
        if ext.name.endswith("_native_cpu"):
            file = cpu_module(compiler)
        elif ext.name.endswith("_native_cuda_sim"):
            file = simulated_module(compiler)
        else:
            nvcc = find_nvcc()
            assert nvcc is not None
            file = cuda_module(compiler, nvcc)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, "build.ninja").write_text(file.text(target))
        command = [sys.executable, "-m", "ninja", "-C", str(folder)]
        if subprocess.run(command).returncode != 0:
            raise BuildError(
                f"the native core did not compile with {' '.join(compiler)}: see the compiler's "
                "messages above. GCC 9 or newer with C++17 and OpenMP is needed, and nvcc 12.1 or "
                "newer for CUDA; FASTOPT_CUDA=off builds without it."
            )


names = ["fastopt._native_cpu"]
if find_nvcc() is not None and os.environ.get("FASTOPT_SANITIZE") != "1":
    gencode_flags()  # refuses wrong ones before anything is compiled
    names.append("fastopt._native_cuda")
if os.environ.get("FASTOPT_HOST_SIM") == "1":
    names.append("fastopt._native_cuda_sim")

setup(
    ext_modules=[Extension(name, sources=[]) for name in names],
    cmdclass={"build_ext": NinjaBuild},
)
