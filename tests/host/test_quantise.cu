/* How the quantisers' rows fall on blocks of threads, on the host: every row and dim once, whatever the sizes. */
#define FLASHCORE_STATIC
#define FLASHCORE_IMPLEMENTATION
#define FLASHCORE_NO_E4M3 /* no attention */
#define FLASHCORE_NO_E5M2
#include "flashcore_fp8.cuh"

#include "check.h"

using tile = flashcore::quantise_tile;

static flashcore_fp8_quantise_args sized(int rows, int dim, int block_rows, int transposed) {
  flashcore_fp8_quantise_args q;
  flashcore_fp8_quantise_init(&q);
  q.batch = 3, q.heads = 5, q.rows = rows, q.dim = dim, q.transposed = transposed;
  q.granularity = block_rows ? FLASHCORE_FP8_PER_BLOCK : FLASHCORE_FP8_PER_HEAD;
  q.block_rows = block_rows;
  return q;
}

/* Tiles fit the threads, the shared memory of a transposed one, and 16-byte stores; blocks cover the rows and none is without. */
static void check_plan(const flashcore_fp8_quantise_args &q) {
  const flashcore::quantise_plan p = flashcore::make_quantise_plan(q, false);
  CHECK(p.threads % 32 == 0 && p.threads <= tile::kThreads && p.step > 0 && p.step * q.dim <= p.threads * tile::kPiece);
  CHECK(p.tile.d == p.step * tile::kPieces && p.tile.d * (q.dim / 4 + 1) <= tile::kThreads * tile::kPieces * 5);
  CHECK((int64_t)p.blocks * p.block_rows >= q.rows && (int64_t)(p.blocks - 1) * p.block_rows < q.rows);
  if (q.granularity == FLASHCORE_FP8_PER_BLOCK) CHECK(p.block_rows == q.block_rows);
  else CHECK(p.block_rows == p.tile.d);
  if (q.transposed) CHECK(p.tile.d % 16 == 0 && p.strips.d * 16 == p.tile.d && p.block_rows % 16 == 0);
}

static void plans_fit_every_size(void) {
  const int rows[] = {1, 2, 15, 16, 17, 63, 64, 130, 1104, 65536, FLASHCORE_MAX_SEQ - 1, FLASHCORE_MAX_SEQ};
  for (int dim = 16; dim <= FLASHCORE_MAX_DIM; dim += 16)
    for (int n : rows)
      for (int transposed = 0; transposed < 2; ++transposed) {
        check_plan(sized(n, dim, 0, transposed));
        for (int block_rows : {1, 2, 16, 48, 64, 4096, n})
          if (n % block_rows == 0 && !(transposed && block_rows % 16)) check_plan(sized(n, dim, block_rows, transposed));
      }
}

/* Blocks that are larger than 32-bit numbers of elements and of pieces: rows are counted, not pieces. */
static void rows_of_a_huge_block_stay_below_2_31(void) {
  const flashcore_fp8_quantise_args q = sized(FLASHCORE_MAX_SEQ, FLASHCORE_MAX_DIM, FLASHCORE_MAX_SEQ, 0);
  const flashcore::quantise_plan p = flashcore::make_quantise_plan(q, false);
  const int64_t last = p.tile.quotient(q.rows - 1) * (int64_t)p.tile.d, past = (int64_t)1 << 30; /* where a thread too many has its row */
  CHECK(last < q.rows && last + p.tile.d >= q.rows);
  CHECK(last + p.tile.d + past <= INT32_MAX);
}

int main() {
  RUN(plans_fit_every_size);
  RUN(rows_of_a_huge_block_stay_below_2_31);
  return check_end();
}
