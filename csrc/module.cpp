// pysal._C. Importing it runs the static initialisers of csrc/cpu/*.cpp, which register the CPU kernels; the module
// itself answers what was built. It must not see torch's headers: torch bundles a pybind11 that refuses, in some
// versions, to be included where TORCH_TARGET_VERSION is defined.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/amx/bf16x6_kernels.h"
#include "cpu/simd/level.h"

namespace {
std::vector<std::string> split(const std::string& commas) {
  std::vector<std::string> parts;
  std::istringstream stream(commas);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["build_type"] = PYSAL_BUILD_TYPE;
  info["sanitizer"] = PYSAL_SANITIZER;
  info["version_built"] = PYSAL_VERSION;
  info["torch_built_with"] = PYSAL_TORCH_BUILT_WITH;
  info["torch_target"] = PYSAL_TORCH_TARGET_VERSION;
  info["simd"] = pysal::cpu::name(pysal::cpu::level());
  info["simd_compiled"] = pysal::cpu::compiled_levels();
#if defined(PYSAL_AMX)
  info["matrix_unit"] = pysal::cpu::level() == pysal::cpu::Level::avx512 && pysal::cpu::bf16x6_available();
#else
  info["matrix_unit"] = false;
#endif
  info["cuda_archs"] = split(PYSAL_CUDA_ARCH_LIST);
  info["cuda_version"] = PYSAL_CUDA_COMPILER_VERSION;
  return info;
}
}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of pysal and what they were built with.";
  module.def("build_info", &build_info);
}
