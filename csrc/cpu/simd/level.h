// The instruction set the CPU kernels run on, chosen once: what the CPU has, capped by PYSAL_SIMD.
#pragma once

namespace pysal::cpu {
enum class Level { baseline, avx2, avx512 };
Level level();                  // throws std::runtime_error where PYSAL_SIMD names no level
const char* name(Level level);  // "baseline" (SSE2 on x86-64), "avx2", "avx512"
const char* compiled_levels();  // separated by commas
}  // namespace pysal::cpu

// In <stem>_kernels.h: declares the table of every compiled ISA.
// In csrc/cpu/<stem>.cpp: PYSAL_PICK(<stem>) is the table for this CPU.
#if defined(PYSAL_X86)
#define PYSAL_PICK(stem)                                                              \
  (::pysal::cpu::level() == ::pysal::cpu::Level::avx512 ? ::pysal::cpu::stem##_avx512 \
   : ::pysal::cpu::level() == ::pysal::cpu::Level::avx2 ? ::pysal::cpu::stem##_avx2   \
                                                        : ::pysal::cpu::stem##_baseline)
#else
#define PYSAL_PICK(stem) (::pysal::cpu::level(), ::pysal::cpu::stem##_baseline)
#endif
