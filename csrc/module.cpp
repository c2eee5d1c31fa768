// pysal._C, the one library that knows Python, so the one that is compiled for each version of it. It answers what
// _C_cpu.so, which holds the ops, was built with. It must not see torch's headers: torch bundles a pybind11 that
// refuses, in some versions, to be included where TORCH_TARGET_VERSION is defined.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"

namespace {
std::vector<std::string> split(const std::string& commas) {
  std::vector<std::string> parts;
  std::istringstream stream(commas);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

pybind11::dict build_info() {
  const PysalBuildInfo of_ops = pysal_build_info();
  if (of_ops.simd == nullptr)
    throw std::runtime_error(std::string("pysal: PYSAL_SIMD must be baseline, avx2 or avx512, got ") +
                             std::getenv("PYSAL_SIMD"));
  pybind11::dict info;
  info["compiler"] = of_ops.compiler;
  info["build_type"] = of_ops.build_type;
  info["sanitizer"] = of_ops.sanitizer;
  info["version_built"] = of_ops.version;
  info["torch_built_with"] = of_ops.torch_built_with;
  info["torch_target"] = of_ops.torch_target;
  info["simd"] = of_ops.simd;
  info["simd_compiled"] = split(of_ops.simd_compiled);
  info["matrix_unit"] = of_ops.matrix_unit;
  info["cuda_archs"] = split(of_ops.cuda_archs);
  info["cuda_version"] = of_ops.cuda_version;
  return info;
}
}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What the native libraries of pysal were built with.";
  module.def("build_info", &build_info);
}
