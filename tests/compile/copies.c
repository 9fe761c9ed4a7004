/* Two vendored copies in one process: each answers for itself. */
#include <stdio.h>

int first_copy_works(void);
int second_copy_works(void);

int main(void) {
  const int first = first_copy_works(), second = second_copy_works();
  if (!first || !second) printf("first copy %s, second copy %s\n", first ? "works" : "fails", second ? "works" : "fails");
  return first && second ? 0 : 1;
}
