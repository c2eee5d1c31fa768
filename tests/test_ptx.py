"""The translator of PTX: what it knows becomes the C++ that does it, and what it does not know ends the translation."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ptx.translate import Unknown, translated

FOLDER = Path(__file__).parent / "ptx"
KERNEL = """
.visible .entry half_sum(.param .u64 half_sum_param_0, .param .u32 half_sum_param_1)
.maxntid 64
{{
	.reg .pred %p<2>;
	.reg .b16 %rs<2>;
	.reg .b32 %r<4>;
	.reg .f32 %f<4>;
	.reg .b64 %rd<4>;
	ld.param.u64 %rd1, [half_sum_param_0];
	ld.param.u32 %r1, [half_sum_param_1];
	mov.u32 %r2, %tid.x;
	setp.ge.u32 %p1, %r2, %r1;
	@%p1 bra $L__BB0_2;
	cvta.to.global.u64 %rd2, %rd1;
	mul.wide.u32 %rd3, %r2, 4;
	add.s64 %rd3, %rd2, %rd3;
	ld.global.f32 %f1, [%rd3];
	{line}
	st.global.f32 [%rd3], %f2;
$L__BB0_2:
	ret;
}}
"""
MAIN = """
#include <cstdio>
#include "device.h"
namespace { const Kernel* found; }
Registrar::Registrar(const Kernel* kernels, size_t) { found = kernels; }
void Thread::fault(const char*, uint64_t, int, int) { std::abort(); }
int main() {
  float values[4] = {1.5f, -2.0f, 1e30f, 7.0f}, *address = values;
  unsigned count = 3;
  void* arguments[] = {&address, &count};
  Thread thread{};
  thread.arguments = arguments;
  for (unsigned i = 0; i < 4; ++i) thread.tid[0] = i, found->run(thread);
  for (float value : values) std::printf("%.9g ", value);
  std::printf("%u %d\\n", found->most_threads, found->waits);
}
"""


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("fma.rn.f32 %f2, %f1, 0f3F000000, 0f3F800000;", "1.75 0 5.00000008e+29 7 64 0"),  # 0.5 x + 1, each but the last
        ("cvt.rzi.s32.f32 %r3, %f1; cvt.rn.f32.s32 %f2, %r3;", "1 -2 2.14748365e+09 7 64 0"),  # to the nearest that there is
        ("mov.b32 %r3, %f1; shr.s32 %r3, %r3, 40; cvt.rn.f32.s32 %f2, %r3;", "0 -1 0 7 64 0"),  # further than the width
    ],
)
def test_a_kernel_does_what_its_instructions_say(line: str, answer: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.fail("no g++")
    (tmp_path / "main.cpp").write_text(translated(KERNEL.format(line=line)) + MAIN)
    build = ["g++", "-std=c++17", "-mfma", "-ffp-contract=off", f"-I{FOLDER}", "main.cpp", "-o", "main"]
    subprocess.run(build, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == answer


@pytest.mark.parametrize(
    "line",
    [
        "ex2.approx.f32 %f2, %f1;",
        "add.rm.f32 %f2, %f1, %f1;",
        "add.ftz.f32 %f2, %f1, %f1;",
        "cvt.rn.sat.f32.f32 %f2, %f1;",
        "shfl.sync.up.b32 %r3, %r2, 1, 0, -1;",
        "ld.local.f32 %f2, [%rd3];",
        "mul.hi.s32 %r3, %r1, %r2;",
    ],
)
def test_what_is_not_known_is_refused(line: str) -> None:
    with pytest.raises(Unknown):
        translated(KERNEL.format(line=line))
    with pytest.raises(Unknown, match="without kernels"):
        translated("")
