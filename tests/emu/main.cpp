// Runs the cases of tests/emu/*.cpp: main [order of threads [prefix of the cases' names]]; see csrc/emu/cuda_emu.h.
// Exits 1 on a wrong result, 3 on an exception.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "../../csrc/emu/cuda_emu.h"
#include "harness.h"

namespace emu_test {
namespace {
const Case* cases = nullptr;
const char* current = "";
int failures = 0;
}  // namespace

Case::Case(const char* name_, void (*run_)()) : name(name_), run(run_), next(cases) { cases = this; }

void failed(const char* condition, const char* file, int line, const std::string& detail) {
  ++failures;
  std::printf("FAILED %s: %s:%d: %s %s\n", current, file, line, condition, detail.c_str());
}
}  // namespace emu_test

void racy_kernel_for_tsan();

int main(int argc, char** argv) {
  using namespace emu_test;
  if (argc > 1 && std::strcmp(argv[1], "race") == 0) {
    racy_kernel_for_tsan();
    return 0;
  }
  pysal::emu::set_order(argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 0);
  int count = 0;
  const char* const prefix = argc > 2 ? argv[2] : "";
  for (const Case* c = cases; c != nullptr; c = c->next) {
    if (std::strncmp(c->name, prefix, std::strlen(prefix)) != 0) continue;
    ++count;
    current = c->name;
    try {
      c->run();
    } catch (const std::exception& error) {
      std::printf("EXCEPTION %s: %s\n", c->name, error.what());
      return 3;
    }
  }
  std::printf("%d cases, %d failures\n", count, failures);
  return failures != 0 || count == 0;
}
