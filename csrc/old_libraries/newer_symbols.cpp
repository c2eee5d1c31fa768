// What this compiler's headers call and older C and C++ libraries do not have (PYSAL_GLIBC in CMakeLists.txt). It is
// defined here instead, and hidden, so that the libraries run with those of glibc 2.28 and GCC 8 as well: what GCC's
// own libstdc++_nonshared.a does on the distributions that ship a new compiler beside old libraries.
#include <new>
#include <sstream>

// Says whether shared counts may skip their atomics. No: this process has threads, and skipping would win nothing here.
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;  // glibc 2.32
}

#if defined(__GLIBCXX__)
namespace std {
// GCC 11. Weak, for where libstdc++ is linked statically and has it.
__attribute__((weak)) void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GCC 9
template basic_ostringstream<char>::basic_ostringstream();
template basic_istringstream<char>::basic_istringstream();
template basic_stringstream<char>::basic_stringstream();
}  // namespace std
#endif
