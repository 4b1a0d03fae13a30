// Runs the tests whose names contain one of the arguments, or all. The last line of output is "N passed, N failed".
#include <cstdio>
#include <exception>

#include "core/cpu_features.h"
#include "test/test.h"

namespace tandem::test {

namespace {
constexpr int kMaxReported = 10;  // failures printed for one test
int failures_of_this_test = 0;
}  // namespace

std::vector<TestCase>& AllTests() {
  static std::vector<TestCase> tests;
  return tests;
}

void Fail(const char* file, int line, const std::string& what) {
  if (++failures_of_this_test <= kMaxReported) std::printf("  %s:%d: %s\n", file, line, what.c_str());
}

void Skip(const std::string& what) { std::printf("  skipped: %s\n", what.c_str()); }

static bool IsSelected(const char* name, int argc, char** argv) {
  if (argc <= 1) return true;
  for (int i = 1; i < argc; ++i) {
    if (std::strstr(name, argv[i]) != nullptr) return true;
  }
  return false;
}

static int RunAll(int argc, char** argv) {
  std::printf("instruction set: %s\n", IsaName(BestIsa()));
  int passed = 0, failed = 0;
  for (const TestCase& test : AllTests()) {
    if (!IsSelected(test.name, argc, argv)) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    failures_of_this_test = 0;
    try {
      test.run();
    } catch (const std::exception& error) {
      Fail(test.name, 0, std::string("exception: ") + error.what());
    }
    if (failures_of_this_test > kMaxReported) std::printf("  and %d more failures\n", failures_of_this_test - kMaxReported);
    if (failures_of_this_test > 0) std::printf("  FAILED\n");
    ++(failures_of_this_test > 0 ? failed : passed);
  }
  const bool nothing_ran = passed + failed == 0;
  if (nothing_ran) std::printf("no test has such a name\n");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed > 0 || nothing_ran ? 1 : 0;
}

}  // namespace tandem::test

int main(int argc, char** argv) { return tandem::test::RunAll(argc, argv); }
