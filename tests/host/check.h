/* The whole test framework: CHECK a condition, CHECK_NEAR two numbers, RUN a test named for the property it proves, return check_end() from main. */
#ifndef FLASHCORE_TESTS_CHECK_H
#define FLASHCORE_TESTS_CHECK_H

#include <math.h>
#include <stdio.h>

static const char *check_name = "";
static int check_failures, check_tests_passed, check_tests_failed;

#define CHECK(condition)            check_that((condition) ? 1 : 0, #condition, __FILE__, __LINE__)
#define CHECK_NEAR(x, y, tolerance) check_near((x), (y), (tolerance), #x " near " #y, __FILE__, __LINE__)
#define RUN(test)                   check_run(#test, test)
#define CHECK_MOST_FAILURES_PRINTED 20

static inline int check_that(int holds, const char *what, const char *file, int line) {
  if (holds) return 1;
  if (check_failures++ < CHECK_MOST_FAILURES_PRINTED) printf("  %s: %s:%d: not true: %s\n", check_name, file, line, what);
  return 0;
}

/* Equal infinities are near; NaN is near nothing. The tolerance is absolute below 1 and relative above. */
static inline int check_near(double x, double y, double tolerance, const char *what, const char *file, int line) {
  const int holds = x == y || fabs(x - y) <= tolerance * (fabs(y) > 1.0 ? fabs(y) : 1.0);
  if (!holds && check_failures < CHECK_MOST_FAILURES_PRINTED) printf("  %s: %.9g against %.9g\n", check_name, x, y);
  return check_that(holds, what, file, line);
}

static inline void check_run(const char *name, void (*test)(void)) {
  const int before = check_failures;
  check_name = name;
  test();
  printf("%s %s\n", check_failures == before ? "ok" : "FAIL", name);
  if (check_failures == before) ++check_tests_passed;
  else ++check_tests_failed;
}

static inline int check_end(void) {
  printf("%d passed, %d failed\n", check_tests_passed, check_tests_failed);
  return check_tests_failed != 0 || check_tests_passed == 0;
}

#endif
