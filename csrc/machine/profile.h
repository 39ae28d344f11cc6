// What the planner knows of a CPU beyond its cache sizes: thresholds and costs, each with the measurement behind it.
//
// These are policy. Whatever stands here, plans are legal (plan/schedule.h) and results correct; other values make
// other plans faster. Times are of one core in f32 unless told otherwise; all were measured on Zen 4.
//
// Groups marked NUMERIC decide the order in which sums are taken, so a result's bits: they must be the same on all
// machines with the same target. The others only move data.
#ifndef JAX_NANO_MACHINE_PROFILE_H_
#define JAX_NANO_MACHINE_PROFILE_H_

#include <cstdint>

namespace jax_nano {

struct Profile {
  // Geometry that CPUID does not give the planner.
  int64_t line_bytes = 64;
  int64_t alias_bytes = 4096;           // rows this far apart share their sets in L1
  int64_t tlb_reach_bytes = 64 * 4096;  // what the L1 data TLB maps: 64 pages

  // Operands that lie in memory, not in a cache.
  int64_t out_of_cache_b_bytes = 8 << 20;  // NUMERIC. A B that spans more than the caches near a core hold
  double out_of_cache_l3_share = 0.5;      // an operand above this share of L3 is prefetched (inner products, sweeps)
  double out_of_cache_rows = 20;  // rows of A that an element of B serves in the time in which memory brings the next

  // NUMERIC. A B that few rows of A meet is weights, of which a program has more than caches hold: so one of 16-bit
  // elements and at least this size is planned for as if it lay in memory. bf16 1x2304x768 takes 226 us from memory by
  // sweeps that prefetch and 518 by register tiles, 102 and 98 from L3; two rows 306 and 532, 137 and 144; four rows
  // 406 and 443, 259 and 239 (Zen 3, docs/experiments/0090).
  struct Weights {
    int64_t max_rows = 2;
    int64_t min_bytes = 1 << 20;
    // Rows so far apart share too few sets for sweeps to fetch the next ones: 1x8192x768 1254 us with, 971 without;
    // rows of 8 KiB 642 and 640, of 12 KiB 739 and 840, of 16640 bytes 809 and 931.
    int64_t aliased_row_bytes = 16 << 10;
  } weights;

  // NUMERIC. Depth of a block, kc: values of k that a register tile sums before it goes back to C.
  struct Depth {
    int64_t packed_bytes = 2048;  // of one packed column of B: 512 f32, 1024 bf16
    int64_t unpacked = 1024;
    // A B out of cache is read by this many of its rows at a time: 16x4096x4096 in 5.8 ms with 128, 11.4 with 64.
    int64_t unpacked_out_of_cache = 128;
    int64_t unpacked_aliased = 64;  // a B whose rows share L1 sets: 32x1024x1024 in 635 us with 64, 848 with 1024
    // A B of at most half a vector of columns, whose block is small however deep; A's rows are read in longer runs.
    // 3000x8x3000 from memory, GB/s of A: 22.5 with 4096, 20.5 with 2048, 18.5 with 1024.
    int64_t narrow = 4096;
  } depth;

  // When operands of the blocked path are packed, and how large a packed block is.
  struct Packing {
    // NUMERIC, as kc follows from it. B read where it lies is as fast as packed, unless its rows are spread over more
    // than the TLB reaches and this many register tiles of rows read it.
    int64_t b_min_row_tiles = 8;
    double b_share_of_l2 = 0.875;  // of a packed block of B; the rest of L2 is for A, C and what passes through
    int64_t b_max_bytes = 2 << 20;
    int64_t a_max_bytes = 4 << 20;
    // An A that is slow to read (not contiguous along k, or its rows share L1 sets) is packed if this many register
    // tiles of columns read it. 512x512x1023 reaches 0.65 of the peak unpacked, 0.88 packed; 512x512x1022 0.89, 0.88.
    int64_t a_min_column_tiles = 4;
  } packing;

  // How the blocked path reads operands where they lie.
  struct Unpacked {
    // Rows whose addresses share L1 sets, against few columns: A is read by as many rows at a time as L1 has ways.
    // f64 1024x8x1024 in 339 us instead of 496 (packed 1021), f32 1024x16x1024 in 313 instead of 518.
    int64_t aliased_rows = 7;
    int64_t even_row_tiles = 4;  // up to so many tiles of rows are made equally high: 16 rows are 8 + 8, not 14 + 2
    // Columns of a B that several tiles of rows read are cut to blocks of this size, which stay in L2. A block is a
    // multiple of this many nr: so of the width of the tiles of 7 rows or more.
    int64_t reused_b_bytes = 256 << 10;
    int64_t reused_b_tiles = 3;
  } unpacked;

  // NUMERIC. Up to how many rows of A a sweep reads B where it lies faster than register tiles do.
  // 1x1024x1024 in 50 us by sweeps, 71 by tiles of 16 rows of B, 75 of all; 4x1024x1024 124, 146, 138; 5x1024x1024 146
  // and 119; 1x64x64 0.22 and 0.25, 2x256x256 4.7 and 3.8. bf16 4x1024x1024 67 swept, 123 packed; int8 53 and 86.
  struct SweepRows {
    int64_t far_rows = 4;   // B's rows are spread over more than the TLB reaches
    int64_t near_rows = 1;  // they are not
    int64_t packed_16 = 8;  // tiles would need a packed B of 16-bit elements
    int64_t packed_8 = 4;   // of 8-bit ones, which sweeps widen
    int64_t min_columns = 16;
  } sweep;

  // NUMERIC. When inner products along k are faster than register tiles. The times of both meet for 2048 rows of A
  // against 4, 8, 16 columns at a k of 16, 60, 300 in f32, 28, 66, 260 in bf16, 64, 200, 512 in int8; for 4, 8, 16 rows
  // against 1024 columns along k at 35, 100, 300, in f64 16, 32, 100, in bf16 128, 400, 480.
  struct Inner {
    int64_t max_rows_or_columns = 16;  // of the smaller operand, where both lie along k
    int64_t max_copied = 8;            // rows or columns that are copied along k first, if they do not lie so,
    int64_t min_met = 16;              // and meet at least this many of the other operand,
    int64_t max_copied_bytes = 1 << 20;
    // A larger B than that meets tiles of many rows if its columns are more than this, and fill half a vector at most:
    // 300x8x50000, GB/s of A: 21 by tiles, 12 by inner products; 300x4x50000 20 and 25.
    int64_t max_long_columns = 4;
    double lane_sum = 3;              // adding up the lanes of an accumulator, in vector multiply-adds
    double transpose_byte = 1 / 16.;  // transposing a byte of B for register tiles, in the same
  } inner;

  // NUMERIC. Up to how many columns C^T is computed instead of C where the columns of A are contiguous: its vectors run
  // along these, and are full. TN 1024x4x16384 3.0 ms instead of 44, 2000x12x3000 1.4 and 3.8, 1024x16x4096 1.24 and
  // 1.69; in cache 29x2x128 0.33 us instead of 0.65, 128x8x128 3.0 and 3.6.
  struct Transposed {
    int64_t max_columns = 16;
    int64_t min_rows = 16;
    int64_t rows_a_column = 4;  // at least, or the last vector of each of C^T's rows counts
    int64_t min_k = 64;
  } transposed;

  // NUMERIC. When a kernel that multiplies more slowly but reads B where it lies beats the best one, which packs B.
  // From memory, for 16-bit elements and more rows than one sweep takes: bf16 5x4096x4096 in 2.0 ms instead of 4.0,
  // 8x 3.1 and 4.4, 16x 5.2 and 6.5, 24x 9.8 both; 16x1024x1024 takes 1.4 times as long.
  struct DirectKernel {
    int64_t max_rows = 8;
    int64_t out_of_cache_16_max_rows = 20;
    int64_t out_of_cache_16_bytes = 16 << 20;
  } direct_kernel;

  // NUMERIC. Split-K: a result of few register tiles from long sums cannot be split any other way.
  struct SplitK {
    int64_t max_tiles = 16;
    int64_t min_slice_k = 1024;
    int64_t max_slices = 16;
    int64_t slice_unit = 64;  // slices are multiples of this where k is not cut into blocks: whole cache lines of bytes
  } split_k;

  // Splitting over threads. Costs in multiply-adds.
  struct Split {
    int64_t min_item = 128 << 10;  // less is not worth another thread
    double min_item_ns = 2000;     // what so much takes on one thread, roughly
    // Items per thread: more balance better, and repeat more packing and reading.
    int64_t items_packed = 4;
    int64_t items_unpacked = 16;
    // Where few rows of A meet a B out of cache: memory brings long pieces of B's rows faster. Two cores, in 2, 4, 8,
    // 16 items: 1x4096x4096 33, 32, 26, 24 GB/s; 16x14336x4096 150, 147, 137, 136 GFLOP/s.
    int64_t items_sweep = 1;
    int64_t items_out_of_cache = 2;
    double pack_element = 12;           // packing one element
    double read_element = 0.5;          // reading it once more where it lies
    double shared_row = 500;            // a row of C that two cores write parts of
    double claim_item = 32 << 10;       // claiming an item, and caches that know nothing of it
    double begin_product = 1.5 * 1024;  // beginning a product, or a part of it, inside an item: 25 ns
    double tail = 0.04;                 // the last item finishes late by this share of itself
  } split;
};

}  // namespace jax_nano

#endif  // JAX_NANO_MACHINE_PROFILE_H_
