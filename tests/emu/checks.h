// What programs of checks share: <program> <name> prints "ok", or what differs and exits with 1.
#pragma once
#include <cstdio>
#include <cstring>
#include <string>

// A check returns "" or what differs.
#define EXPECT(condition, ...) \
  if (!(condition)) return #condition + describe(__VA_ARGS__)

inline std::string describe() { return ""; }
inline std::string describe(double value) { return ", at " + std::to_string(value); }

struct Check {
  const char* name;
  std::string (*run)();
};

template <int kCount>
int run_check(const Check (&checks)[kCount], int argc, char** argv) {
  if (argc != 2) return 2;
  for (const Check& check : checks)
    if (std::strcmp(argv[1], check.name) == 0) {
      const std::string difference = check.run();
      std::printf("%s\n", difference.empty() ? "ok" : difference.c_str());
      return difference.empty() ? 0 : 1;
    }
  return 2;
}
