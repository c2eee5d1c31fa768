from typing import TypedDict

class _BuildInfo(TypedDict):
    compiler: str
    build_type: str
    sanitizer: str
    version_built: str
    torch_built_with: str
    torch_target: str
    simd: str
    simd_compiled: list[str]
    cuda_archs: list[str]
    cuda_version: str

def build_info() -> _BuildInfo: ...
