// Symbols that code compiled against a newer glibc needs, implemented with those of glibc 2.28 (cmake/manylinux.cmake).
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

extern "C" {
#pragma GCC visibility push(hidden)

extern void* __dso_handle;
int __cxa_atexit(void (*)(void*), void*, void*) __attribute__((visibility("default")));

// glibc 2.32: lets shared_ptr skip atomics in single-threaded processes.  0 (multi-threaded) is always correct.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;

// glibc links it statically into every library; cudart uses it to clean up at exit or dlclose.
int atexit(void (*function)()) { return __cxa_atexit(reinterpret_cast<void (*)(void*)>(function), nullptr, &__dso_handle); }

// glibc 2.33; libstdc++'s files.  Kernel and glibc have one struct stat on 64-bit Linux.
int fstat(int file, void* result) { return static_cast<int>(syscall(SYS_fstat, file, result)); }
int fstat64(int file, void* result) { return fstat(file, result); }

// glibc 2.38; libstdc++'s pool of exceptions, for a setting in the environment.
unsigned long strtoul(const char*, char**, int) __attribute__((visibility("default")));  // <cstdlib> would rename it
unsigned long __isoc23_strtoul(const char* text, char** end, int base) { return strtoul(text, end, base); }

// glibc 2.36; libstdc++'s random_device.
uint32_t arc4random() {
  uint32_t value = 0;
  while (getrandom(&value, sizeof value, 0) != sizeof value) {
  }
  return value;
}

#pragma GCC visibility pop
}
