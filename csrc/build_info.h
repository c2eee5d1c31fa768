// What the ops' library was built with and what it runs on, for pysal._C. C types alone, so that the two need not come
// from one compiler.
#pragma once

#define PYSAL_EXPORT __attribute__((visibility("default")))

extern "C" {
struct PysalBuildInfo {
  const char *compiler, *build_type, *sanitizer, *version, *torch_built_with, *torch_target;
  const char *simd_compiled, *cuda_archs;  // separated by commas
  const char* cuda_version;
  const char* simd;  // in use; null where PYSAL_SIMD names no level
  bool matrix_unit;
};
PYSAL_EXPORT PysalBuildInfo pysal_build_info();
}
