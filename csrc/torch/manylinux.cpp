// Symbols that code compiled against a newer glibc needs, implemented with those of glibc 2.28 (cmake/manylinux.cmake).
#include <sys/random.h>

#include <cstdint>

extern "C" {
#pragma GCC visibility push(hidden)

extern void* __dso_handle;
int __cxa_atexit(void (*)(void*), void*, void*) __attribute__((visibility("default")));
int __fxstat64(int, int, void*) __attribute__((visibility("default")));

// glibc 2.32: lets shared_ptr skip atomics in single-threaded processes.  0 (multi-threaded) is always correct.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// glibc links it statically into every library; cudart uses it to clean up at exit or dlclose.
int atexit(void (*function)()) { return __cxa_atexit(reinterpret_cast<void (*)(void*)>(function), nullptr, &__dso_handle); }

// glibc 2.33; libstdc++'s files.
int fstat64(int file, void* result) { return __fxstat64(1, file, result); }

// glibc 2.36; libstdc++'s random_device.
uint32_t arc4random() {
  uint32_t value = 0;
  while (getrandom(&value, sizeof value, 0) != sizeof value) {
  }
  return value;
}

#pragma GCC visibility pop
}
