"""What GPUs this machine has, and whether kernels compiled for some architectures run on them.

NVIDIA's management library is asked, which torch brings up too: it makes no context, so `import pysal` costs no GPU memory and
a process may still fork afterwards.
"""

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Version = tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """The GPUs that torch can use, and their driver.

    Attributes:
        capabilities: compute capability of each GPU, in the order of its index.
        driver: the newest CUDA that the driver knows.
    """

    capabilities: tuple[Version, ...]
    driver: Version


def machine() -> Machine | None:
    """Return the GPUs of this machine; None where there are none, or nothing that tells of them."""
    if torch.version.cuda is None:
        return None
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() == 0:
            try:
                return _described(library)
            finally:
                library.nvmlShutdown()
    return None


def _described(library: ctypes.CDLL) -> Machine | None:
    count, driver = ctypes.c_uint(), ctypes.c_int()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) or library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(driver)):
        return None
    capabilities = []
    for index in _visible(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            continue
        if library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0:
            capabilities.append((major.value, minor.value))
    return Machine(tuple(capabilities), (driver.value // 1000, driver.value % 1000 // 10)) if capabilities else None


def _visible(count: int) -> list[int]:
    """Return the indices that CUDA_VISIBLE_DEVICES leaves; names of GPUs are not looked up, all are taken then."""
    chosen = torch.cuda._parse_visible_devices()
    if chosen and isinstance(chosen[0], str):
        return list(range(count))
    return [index for index in chosen if isinstance(index, int) and index < count]


def runs_on(capability: Version, archs: Sequence[str], ptx: bool = True) -> bool:
    """Return whether code of some architectures runs on a GPU: on later ones of its major number, through PTX on any later.

    Args:
        capability: of the GPU, (8, 6).
        archs: as CMAKE_CUDA_ARCHITECTURES has them: "80-real", "90-virtual", "90" for both.
        ptx: whether the driver compiles the PTX.
    """
    for arch in archs:
        number, _, kind = arch.partition("-")
        major, minor = divmod(int(number.rstrip("af")), 10)
        exactly = number[-1] in "af"  # sm_90a and the like run nowhere else
        if kind != "virtual" and (
            capability == (major, minor) or (not exactly and capability[0] == major and capability[1] >= minor)
        ):
            return True
        if kind != "real" and ptx and not exactly and capability >= (major, minor):
            return True
    return False


def refused(found: Machine, archs: Sequence[str], compiler: str) -> str | None:
    """Return why kernels do not run on the GPUs of a machine, None where they do.

    GPUs that torch itself has no code for do not count.

    Args:
        found: the machine.
        archs: what the kernels were compiled for; see `runs_on`.
        compiler: version of nvcc, "13.0.88", which is that of the CUDA runtime in the library.
    """
    built = _version(compiler)
    if found.driver[0] < built[0]:
        return (
            f"they need a driver of CUDA {built[0]}, and this machine's has {_dotted(found.driver)}: update it, or compile "
            f"with the nvcc of torch's CUDA {torch.version.cuda}"
        )
    torch_archs = [flag.replace("sm_", "").replace("compute_", "") for flag in (torch._C._cuda_getArchFlags() or "").split()]
    for capability in found.capabilities:
        if torch_archs and not runs_on(capability, torch_archs):
            continue
        if not runs_on(capability, archs, ptx=found.driver >= built):
            later = runs_on(capability, archs)
            return (
                f"they were compiled for {', '.join(archs)}, and a GPU of this machine has compute capability "
                f"{_dotted(capability)}: "
                + (
                    f"its driver must know CUDA {_dotted(built)} for that, and knows {_dotted(found.driver)}"
                    if later
                    else f'compile with PYSAL_CMAKE_ARGS="-DPYSAL_CUDA_ARCHS={capability[0]}{capability[1]}"'
                )
            )
    return None


def how_to_compile() -> str:
    """Return what brings the nvcc that compiles kernels for the CUDA of this torch."""
    cuda = torch.version.cuda or ""
    if cuda and _version(cuda)[0] < 13:  # older ones are on PyPI without the compiler's driver program
        return f"install the CUDA toolkit {cuda} and set CUDA_HOME"
    packages = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl")
    return "pip install " + " ".join(f'"{package}=={cuda}.*"' for package in packages)


def _version(text: str) -> Version:
    major, minor, *_ = (*text.split("."), "0")
    return int(major), int(minor)


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
