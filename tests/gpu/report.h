/* Counts and prints test results: one line a test, "N passed, N failed" at the end, and the exit code. */
#ifndef FLASHCORE_TESTS_REPORT_H
#define FLASHCORE_TESTS_REPORT_H

#include <stdio.h>
#include <stdlib.h>
#include <string>

struct Report {
  int passed = 0, failed = 0;

  void ok(const std::string &name, const std::string &note = "") {
    ++passed;
    printf("ok %s%s%s\n", name.c_str(), note.empty() ? "" : "  # ", note.c_str());
    fflush(stdout);
  }
  void fail(const std::string &name, const std::string &why) {
    ++failed;
    printf("FAIL %s: %s\n", name.c_str(), why.c_str());
    fflush(stdout);
  }
  void expect(const std::string &name, bool good, const std::string &why) {
    if (good) ok(name);
    else fail(name, why);
  }
  int finish() const { // a run in which nothing was tested is a failure
    printf("%d passed, %d failed\n", passed, failed);
    fflush(stdout);
    return failed > 0 || passed == 0;
  }
};

inline Report &report() {
  static Report the_report;
  return the_report;
}

/* After a CUDA error the context may be lost: say where, count it, end the program. */
[[noreturn]] inline void fatal(const std::string &what, const std::string &why) {
  report().fail(what, why);
  exit(report().finish());
}

#define CUDA_OK(call)                                                                                                                                \
  do {                                                                                                                                               \
    const cudaError_t cuda_ok_status = (call);                                                                                                       \
    if (cuda_ok_status != cudaSuccess) fatal(#call, std::string(cudaGetErrorString(cuda_ok_status)) + "; " + current_case());                        \
  } while (0)

/* What the program was doing, for the message of a fatal error: a command that reproduces it. */
inline std::string &current_case() {
  static std::string text;
  return text;
}

inline std::string format(const char *pattern, ...) __attribute__((format(printf, 1, 2)));
#include <stdarg.h>
inline std::string format(const char *pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

#endif
