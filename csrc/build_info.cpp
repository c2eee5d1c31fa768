// Answers what CMake defined, and what the processor has.
#include "build_info.h"

#include <exception>

#include "cpu/amx/bf16x6_kernels.h"
#include "cpu/simd/level.h"

PysalBuildInfo pysal_build_info() {
  PysalBuildInfo info{};
  info.compiler = __VERSION__;
  info.build_type = PYSAL_BUILD_TYPE;
  info.sanitizer = PYSAL_SANITIZER;
  info.version = PYSAL_VERSION;
  info.torch_built_with = PYSAL_TORCH_BUILT_WITH;
  info.torch_target = PYSAL_TORCH_TARGET_VERSION;
  info.cuda_archs = PYSAL_CUDA_ARCH_LIST;
  info.cuda_version = PYSAL_CUDA_COMPILER_VERSION;
  info.simd_compiled = pysal::cpu::compiled_levels();
  try {
    info.simd = pysal::cpu::name(pysal::cpu::level());
#if defined(PYSAL_AMX)
    info.matrix_unit = pysal::cpu::level() == pysal::cpu::Level::avx512 && pysal::cpu::bf16x6_available();
#endif
  } catch (const std::exception&) {  // C++ exceptions stay inside the library; pysal._C says it
    info.simd = nullptr;
  }
  return info;
}
