// What code compiled beside a newer glibc asks for and glibc 2.28 lacks, in terms of what that has (cmake/manylinux.cmake).
#include <sys/random.h>

#include <cstdint>

extern "C" {
#pragma GCC visibility push(hidden)

extern void* __dso_handle;
int __cxa_atexit(void (*)(void*), void*, void*) __attribute__((visibility("default")));
int __fxstat64(int, int, void*) __attribute__((visibility("default")));

// glibc 2.32: lets shared_ptr count without atomics while a process has one thread.  "Several" is always right.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// Linked statically into every library: for cudart, at the end of the process or when this library is closed.
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
