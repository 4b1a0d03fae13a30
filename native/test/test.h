// A small test harness: TEST(name) { ... } registers a test, CHECK* record failures with file, line and values and let the test go on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace tandem::test {

struct TestCase {
  const char* name;
  void (*run)();
};

std::vector<TestCase>& AllTests();
void Fail(const char* file, int line, const std::string& what);
// Says on stdout that a part of the running test is left out, and why. Does not make the test fail or count differently.
void Skip(const std::string& what);

struct Registration {
  Registration(const char* name, void (*run)()) { AllTests().push_back({name, run}); }
};

template <typename A, typename B>
void CheckEqual(const char* file, int line, const char* a_text, const char* b_text, const A& a, const B& b) {
  if (a == b) return;
  std::ostringstream out;
  out.precision(17);
  out << a_text << " == " << b_text << ": " << a << " against " << b;
  Fail(file, line, out.str());
}

// |a - b| <= bound; NaN on either side fails.
inline void CheckNear(const char* file, int line, const std::string& what, double a, double b, double bound) {
  if (std::abs(a - b) <= bound) return;
  std::ostringstream out;
  out.precision(9);
  out << what << ": " << a << " against " << b << ", difference " << std::abs(a - b) << ", allowed " << bound;
  Fail(file, line, out.str());
}

// Same bits, so that 0 and -0 differ and NaN may equal itself.
inline void CheckSameBits(const char* file, int line, const std::string& what, const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i, b + i, sizeof(float)) == 0) continue;
    std::ostringstream out;
    out.precision(9);
    out << what << ": element " << i << " is " << a[i] << " against " << b[i] << ", the bits must be the same";
    Fail(file, line, out.str());
    return;
  }
}

}  // namespace tandem::test

#define TEST(name)                                                           \
  static void Test_##name();                                                 \
  static const ::tandem::test::Registration registration_##name(#name, Test_##name); \
  static void Test_##name()

#define CHECK(condition)                                                                          \
  do {                                                                                            \
    if (!(condition)) ::tandem::test::Fail(__FILE__, __LINE__, "not true: " #condition);          \
  } while (false)
#define CHECK_EQ(a, b) ::tandem::test::CheckEqual(__FILE__, __LINE__, #a, #b, (a), (b))
#define CHECK_NEAR(what, a, b, bound) ::tandem::test::CheckNear(__FILE__, __LINE__, (what), (a), (b), (bound))
#define CHECK_SAME_BITS(what, a, b, count) ::tandem::test::CheckSameBits(__FILE__, __LINE__, (what), (a), (b), (count))
// The statement throws a tandem::Error with this code (include core/error.h).
#define CHECK_THROWS(statement, expected_code)                                                                                  \
  do {                                                                                                                          \
    bool threw = false;                                                                                                         \
    try {                                                                                                                       \
      statement;                                                                                                                \
    } catch (const ::tandem::Error& error) {                                                                                    \
      threw = true;                                                                                                             \
      if (error.code() != (expected_code)) ::tandem::test::Fail(__FILE__, __LINE__, "wrong error code: " + std::string(error.what())); \
    }                                                                                                                           \
    if (!threw) ::tandem::test::Fail(__FILE__, __LINE__, "no error was thrown by: " #statement);                                \
  } while (false)
