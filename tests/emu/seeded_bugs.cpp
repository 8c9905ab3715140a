// Small kernels with one bug each, and their correct twins: the emulator has to tell them apart.
//
//   seeded_bugs <name>    the kernel with its bug; after a failed launch also its twin, on the same machine
//   seeded_bugs --fixed   every twin, and then all of them on two OS threads at once
//
// Prints what came of each.  Exits with 0 if all is right, 1 if a launch failed, 3 if only its results are wrong, 4 if a
// twin did not work after a failure, 2 if it was called wrongly.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "seeded_cases.h"

namespace {

using namespace seeded;

std::vector<Case> cases() {
  std::vector<Case> all = block_cases();
  for (const Case& c : cluster_cases()) all.push_back(c);
  return all;
}

struct Outcome {
  int code;
  std::string text;
};

Outcome try_case(const Case& c, bool fixed) {
  constexpr int kCount = kBlocks * kThreads;
  const auto x = std::make_unique<float[]>(kCount), y = std::make_unique<float[]>(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = static_cast<float>(i + 1);
  if (const char* error = c.run(fixed, x.get(), y.get())) return Outcome{1, error};
  for (int i = 0; i < kCount; ++i) {
    const float expected = c.expected(i / kThreads, i % kThreads);
    if (y[i] != expected)
      return Outcome{
          3, "wrong: y[" + std::to_string(i) + "] = " + std::to_string(y[i]) + ", expected " + std::to_string(expected)};
  }
  return Outcome{0, "ok"};
}

int run_twins() {
  int code = 0;
  for (const Case& c : cases()) {
    const Outcome outcome = try_case(c, true);
    std::printf("%s: %s\n", c.name, outcome.text.c_str());
    if (outcome.code) code = outcome.code;
  }
  return code;
}

int run_bug(const Case& c) {
  const Outcome outcome = try_case(c, false);
  std::printf("%s\n", outcome.text.c_str());
  std::fflush(stdout);
  if (outcome.code == 1) {
    const Outcome after = try_case(c, true);
    if (after.code) {
      std::printf("afterwards, its twin: %s\n", after.text.c_str());
      return 4;
    }
  }
  return outcome.code;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  if (std::strcmp(argv[1], "--fixed") == 0) {
    int codes[3] = {run_twins(), 0, 0};
    std::thread first([&] { codes[1] = run_twins(); }), second([&] { codes[2] = run_twins(); });
    first.join();
    second.join();
    return codes[0] ? codes[0] : codes[1] ? codes[1] : codes[2];
  }
  for (const Case& c : cases())
    if (std::strcmp(argv[1], c.name) == 0) return run_bug(c);
  return 2;
}
