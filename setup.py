"""Package layout and native extensions. Metadata, dependencies and tool settings are in pyproject.toml.

    pip install -e . --no-build-isolation

builds against the torch of the current environment. Builds are not isolated, because extensions must use the
same torch at run time. Three libraries are built into the package folder:

    cat_fast._bindings   pybind11, no torch: the packer's core, the CPU feature report
    cat_fast._ops        torch operators on the CPU, through torch's stable ABI (one build, any torch >= 2.10)
    cat_fast._ops_cuda   their CUDA kernels, separate so that _ops also loads without CUDA libraries

Environment: CAT_FAST_CUDA=auto|0|1 (auto builds CUDA if nvcc and a CUDA build of torch match, 1 fails if they
do not), CAT_FAST_BUILD=0 (pure Python with the reference backend), TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-Xptxas=-v", "-Xcompiler=-fvisibility=hidden"]
STABLE_ABI_FLAG = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
DEFAULT_ARCHITECTURES = ("8.0", "9.0+PTX")
"""A100 and H100; newer GPUs compile the PTX when the kernels are loaded."""


def main() -> None:
    """Pass the packages and, unless CAT_FAST_BUILD=0, the extensions to setuptools."""
    build = {} if os.environ.get("CAT_FAST_BUILD", "1") == "0" else native_extensions()
    setup(
        packages=[
            *find_packages(include=["cat_fast", "cat_fast.*"]),
            "cat_fast.kernels",
            *(f"cat_fast.kernels.{name}" for name in find_packages("kernels")),
            "cat_fast.configs",
        ],
        package_dir={"cat_fast.kernels": "kernels", "cat_fast.configs": "configs"},
        **build,
    )


def native_extensions() -> dict:
    """Return the `ext_modules` and `cmdclass` arguments of setup()."""
    cuda_home = find_toolkit()
    if cuda_home is not None:
        os.environ["CUDA_HOME"] = str(cuda_home)  # read by torch when its cpp_extension is imported
    # pip may run without the environment's bin folder, which contains ninja, on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if shutil.which("ninja") is None:
        raise SystemExit("cat-fast: building needs ninja: pip install ninja")
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"cat-fast: building needs {error.name} in this environment: install torch and pybind11 first, "
            "then `pip install -e . --no-build-isolation` (or set CAT_FAST_BUILD=0 for pure Python)"
        ) from None

    bindings = Extension(
        "cat_fast._bindings",
        ["csrc/bindings.cpp"],
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args={"cxx": CXX_FLAGS},
        language="c++",
    )
    ops = CppExtension(
        "cat_fast._ops",
        ["csrc/ops.cpp", *sorted(glob("csrc/*/cpu.cpp"))],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI_FLAG]},
        py_limited_api=True,
    )
    extensions = [bindings, ops]
    if build_cuda(torch.version.cuda, cuda_home):
        architectures = os.environ.setdefault(
            "TORCH_CUDA_ARCH_LIST", architectures_for(local_capabilities(torch))
        )
        ops_cuda = CUDAExtension(
            "cat_fast._ops_cuda",
            [
                "csrc/cuda_architectures.cpp",
                *sorted(glob("csrc/*/cuda.cu")),
                *sorted(glob("csrc/*/cuda_binding.cpp")),
            ],
            include_dirs=[str(ROOT / "csrc"), *wheel_includes(torch)],
            extra_compile_args={
                "cxx": [
                    *CXX_FLAGS,
                    STABLE_ABI_FLAG,
                    "-DUSE_CUDA",
                    f'-DCAT_FAST_CUDA_ARCHITECTURES="{architectures}"',
                ],
                "nvcc": NVCC_FLAGS,
            },
            py_limited_api=True,
        )
        extensions.append(ops_cuda)
    return {"ext_modules": extensions, "cmdclass": {"build_ext": incremental_build()}}


def local_capabilities(torch) -> list[tuple[int, int]]:
    """Return the compute capabilities of the GPUs of this machine."""
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def architectures_for(capabilities: list[tuple[int, int]]) -> str:
    """Return DEFAULT_ARCHITECTURES and the given ones, in the form of TORCH_CUDA_ARCH_LIST."""
    known = {name.removesuffix("+PTX") for name in DEFAULT_ARCHITECTURES}
    local = sorted({f"{major}.{minor}" for major, minor in capabilities} - known)
    return ";".join([*local, *DEFAULT_ARCHITECTURES])


def incremental_build() -> type:
    """Return torch's build_ext with a fixed folder of objects per extension.

    Otherwise editable installs compile in a new temporary folder and never reuse an object.
    """
    from torch.utils.cpp_extension import BuildExtension

    class IncrementalBuild(BuildExtension):  # type: ignore[misc, valid-type]
        def build_extension(self, ext: Extension) -> None:
            self.build_temp = str(ROOT / "build" / "objects" / ext.name)
            super().build_extension(ext)

    return IncrementalBuild


def find_toolkit() -> Path | None:
    """Return the CUDA toolkit: $CUDA_HOME, else that of the nvcc on PATH, else /usr/local/cuda.

    The nvcc on PATH may be a script elsewhere that calls the real one, so its dry run gives the location.
    """
    if "CUDA_HOME" in os.environ:
        candidates = [Path(os.environ["CUDA_HOME"])]
    else:
        candidates = [Path("/usr/local/cuda")]
        if nvcc := shutil.which("nvcc"):
            command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
            dry_run = subprocess.run(command, capture_output=True, text=True, check=False)
            if top := re.search(r"TOP=(\S+)", dry_run.stderr):
                candidates.insert(0, Path(top[1]).resolve())
    return next((home for home in candidates if (home / "bin" / "nvcc").exists()), None)


def build_cuda(torch_cuda: str | None, cuda_home: Path | None) -> bool:
    """Return True if CUDA kernels are wanted and can be built; exit if they are required but cannot be.

    A GPU is not required, because build machines rarely have one.
    """
    wanted = os.environ.get("CAT_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"cat-fast: CAT_FAST_CUDA={wanted} is unknown: use auto, 0 or 1")
    if wanted == "0":
        return False
    if torch_cuda is None:
        reason = "this torch is built without CUDA"
    elif cuda_home is None:
        reason = "nvcc was not found (set CUDA_HOME to the CUDA toolkit)"
    elif (toolkit := toolkit_version(cuda_home)).split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"nvcc has CUDA {toolkit}, torch has CUDA {torch_cuda}: the major versions must match"
    else:
        return True
    if wanted == "1":
        raise SystemExit(f"cat-fast: CAT_FAST_CUDA=1, but {reason}")
    print(f"cat-fast: the CUDA kernels are not built: {reason}", file=sys.stderr)
    return False


def toolkit_version(cuda_home: Path) -> str:
    """Return the toolkit's version, such as "13.0"."""
    command = [cuda_home / "bin" / "nvcc", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def wheel_includes(torch) -> list[str]:
    """Return the CUDA headers of torch's pip dependencies; a toolkit without its libraries lacks some."""
    site_packages = Path(torch.__file__).parents[1]
    folder = site_packages / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}" / "include"
    return [str(folder)] if folder.is_dir() else []


if __name__ == "__main__":
    main()
