/* The implementation of one header. The command line gives FLASHCORE_TEST_HEADER and the macro that compiles its bodies in. */
#include FLASHCORE_TEST_HEADER
