#include "plan/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "plan/registry.h"

namespace jax_nano {
namespace {

// Cache blocking. The macrokernel's loops are
//     for ic by mc, for pc by kc, for jc by nc, [pack B], for ir by mr, [pack A], for jr by nr
// so a panel of A (mr x kc) stays in L1 while the block of B (kc x nc) streams past it from L2, and the next panel
// of A comes from L3 meanwhile, prefetched a row for each tile: nc wants at least mr tiles.
constexpr int64_t kKcBytes = 2048;     // of one column of a panel of B: 512 f32, 1024 bf16
constexpr double kBlockBOfL2 = 0.875;  // the rest of L2 is for A, C and what passes through
constexpr int64_t kMaxBlockABytes = 4 << 20;
constexpr int64_t kMaxBlockBBytes = 2 << 20;
constexpr int64_t kMaxPartialBytes = 3 << 19;  // 1.5 MiB; with the blocks above it stays below kMaxWorkspaceBytes

// B where it lies is as fast as packed while its rows are near each other or few rows of A read it.
constexpr int64_t kPackBMinTiles = 8;         // register tiles of rows that pay for packing
constexpr int64_t kTlbReachBytes = 64 << 12;  // L1 data TLB: rows of B further apart than this in sum
constexpr int64_t kDirectMaxKc = 1024;
constexpr int64_t kAliasBytes = 4096;  // rows this far apart share their sets in L1
constexpr int64_t kLineBytes = 64;
// A few rows of A against a large B: memory is the bottleneck, and B is best read by rows, from end to end, once.
// Times on Zen 4, 22 November 2026, f32: 1x1024x1024 by sweeps 50 us, by tiles of 16 rows 71, of all rows 75;
// 4x1024x1024: 124, 146, 138; 4x1000x777 67 and 94, 5x1024x1024 146 and 119; small: 1x64x64 0.22 and 0.25,
// 2x256x256 4.7 and 3.8. bf16, 4x1024x1024: swept 67 us, packed 123; int8 53 and 86, 8 rows as fast either way.
constexpr int64_t kSweepRows = 4;      // up to which sweeps read B where it lies faster than register tiles do,
constexpr int64_t kSweepNearRows = 1;  // if its rows are near each other,
constexpr int64_t kSweepPairRows = 8;  // and faster than packing pairs of rows,
constexpr int64_t kSweepByteRows = 4;  // or quads of bytes, which sweeps widen
constexpr int64_t kSweepMinCols = 16;
constexpr int64_t kLargeBBytes = 8 << 20;  // more than the caches near a core hold
// Register tiles read B by so many of its rows side by side. A large B: 16x4096x4096 in 5.8 ms by 128, fetched into L2
// ahead of the tiles, 11.4 by 64 without. One whose rows alias: 32x1024x1024 in 635 us by 64, 848 by all.
constexpr int64_t kLargeKc = 128;
constexpr int64_t kAliasedKc = 64;
constexpr int64_t kStreamBytes = 256 << 10;  // of an unpacked B that several panels of A find in L2
constexpr int64_t kStreamTiles = 3;    // nr of a kernel: a multiple of the columns of its tiles for 7 rows or more
constexpr int64_t kStreamMaxRows = 8;  // up to which a kernel without packing beats one with better instructions
// From memory up to so many where those want pairs of rows, and from more rows than one sweep takes: bf16 5x4096x4096
// in 2.0 ms instead of 4.0, 8x: 3.1 and 4.4, 16x: 5.2 and 6.5, 24x: 9.8 both; 16x4096x1024 as fast, 16x1024x1024 1.4
// times as long (Zen 4).
constexpr int64_t kPairsFromMemoryMaxRows = 20;
constexpr int64_t kPairsFromMemoryBytes = 16 << 20;
// Inner products and sweeps fetch ahead what lies in memory: an operand that is too large for its share of L3.
constexpr double kOfL3InMemory = 0.5;
// Both operands contiguous along K: packing B would transpose it, which few rows or columns do not pay for.
constexpr int64_t kInnerMaxRows = 16;
// One operand contiguous along K: so many vectors of the other one are worth a copy along K, if they meet many.
constexpr int64_t kInnerMaxCopied = 8;
constexpr int64_t kInnerMinMet = 32;
constexpr int64_t kInnerMaxCopiedBytes = 1 << 20;
// Times of both ways meet, for 2048 rows of A against 4, 8 and 16 columns, at K of 16, 60 and 300 in float32, 28, 66
// and 260 in bfloat16, 64, 200 and 512 in int8; for 4, 8 and 16 rows against 1024 columns along K at 35, 100 and 300,
// in float64 16, 32 and 100, in bfloat16 128, 400 and 480 (Zen 4).
constexpr double kLaneSum = 3;              // adding up the lanes of an accumulator
constexpr double kTransposeByte = 1 / 16.;  // of B
constexpr int64_t kPackAMinTiles = 4;       // an A that is awkward to read, read by this many tiles of columns
// An A whose rows share their sets in L1, and up to kPackAMinTiles tiles of an unpacked B: A is read where it lies, by
// as many rows as have room there. float64 1024x8x1024 in 339 us instead of 496, x16 in 692 instead of 803, packed 1021
// and 1435; float32 x16 in 313 instead of 518, x128 in 2485 instead of 3160, packed 2735 (Zen 4).
constexpr int64_t kAliasedRows = 7;
constexpr int64_t kEvenPanels = 4;  // so many panels of A are equally high: 16 rows are 8 and 8, not 14 and 2

// Results of few tiles from long sums: k is cut instead, on one thread as on many, so that all add up alike.
constexpr int64_t kFewTiles = 16;
constexpr int64_t kMinPieceK = 1024;
constexpr int64_t kMaxPieces = 16;
constexpr int64_t kPieceUnit = 64;  // where k is not in blocks: of lines of bytes

// Splitting over threads.
constexpr int64_t kMinItemMacs = 128 << 10;  // less is not worth handing to another thread
constexpr double kMinItemNs = 2000;          // what so much takes, about
constexpr double kLongestNs = 1e18;
constexpr int64_t kItemsPerThread = 4;       // at most: more balance better and pack more often
constexpr int64_t kFineItemsPerThread = 16;  // where nothing is packed
// Where few rows of A meet a large B that is not packed: memory brings long pieces of its rows faster. Two cores, f32,
// in 2, 4, 8 and 16 items: 1x4096x4096 33, 32, 26 and 24 GB/s; 16x14336x4096 150, 147, 137 and 136 GFLOP/s (Zen 4).
constexpr int64_t kSweepItemsPerThread = 1;
constexpr int64_t kStreamItemsPerThread = 2;
constexpr double kPackMacs = 12;             // cost of packing one element, in multiply-adds
constexpr double kReadMacs = 0.5;            // and of reading it once more where nothing is packed
constexpr double kSharedRowMacs = 500;       // cost of a row of C that two cores write parts of
constexpr double kRowsOfMemory = 20;         // of A that an element of B serves in the time in which memory brings one
constexpr double kItemMacs = 32 << 10;       // cost of claiming an item, and of caches that know nothing of it
constexpr double kProductMacs = 1.5 * 1024;  // cost of beginning a product, or a piece of it, inside an item: 25 ns
constexpr double kTail = 0.04;               // the last item finishes late by this part of itself

int64_t CeilDiv(int64_t x, int64_t y) { return (x + y - 1) / y; }
int64_t RoundUp(int64_t x, int64_t y) { return CeilDiv(x, y) * y; }

// Cuts `total` into equal blocks of at most `most`, each a multiple of `unit`, so that no block is tiny.
int64_t BalancedBlock(int64_t total, int64_t most, int64_t unit) {
  most = std::max(unit, most / unit * unit);
  total = std::max(total, int64_t{1});
  return RoundUp(CeilDiv(total, CeilDiv(total, most)), unit);
}

// Bytes of a row of packed A: an odd number of cache lines, as the kernels lay them out.
int64_t PackedARow(const KernelInfo& kernel, int64_t kc) { return (CeilDiv(kc * kernel.a_panel_bytes, 64) | 1) * 64; }

double Real(int64_t x) { return static_cast<double>(x); }

// How many items of the smallest worthwhile size the work would fill; a double, as it may be huge.
double FullItems(int64_t products, int64_t m, int64_t n, int64_t k) {
  return Real(products) * Real(m) * Real(n) * Real(k) / Real(kMinItemMacs);
}

// What pieces of k are multiples of, after ChooseSums.
int64_t KUnit(const GemmArgs& args) { return args.inner || args.sweep ? kPieceUnit : args.kc; }

// Takes the loop of the largest size out of `loops`; the innermost of equals. Size 1 if there is none.
Loop TakeLargest(std::vector<Loop>& loops) {
  if (loops.empty()) return {1, 0, 0, 0};
  auto best = loops.begin();
  for (auto it = loops.begin(); it != loops.end(); ++it) {
    if (it->size >= best->size) best = it;
  }
  const Loop loop = *best;
  loops.erase(best);
  return loop;
}

// Whether A is better not read where it lies, an element of each of mr rows at a time: rows are not contiguous, or all
// in one set of L1. 512x512x1023 reaches 0.65 of the peak so, 0.88 packed; 512x512x1022 0.89 and 0.88 (Zen 4).
bool AwkwardA(const KernelInfo& kernel, const GemmArgs& args) {
  const int64_t past = std::abs(args.rsa) * ElementBytes(kernel.lhs) % kAliasBytes;
  return args.csa != 1 || std::min(past, kAliasBytes - past) * kernel.mr < kLineBytes;
}

// Whether products along K cost less than register tiles, in vectors of multiply-adds: those sum each element's lanes,
// these fill only the lanes that have columns, and B along K is transposed for them, which counts for `transposed`.
bool InnerPays(const KernelInfo& kernel, const GemmArgs& args, bool transposed) {
  const double m = Real(args.m), n = Real(args.n), k = Real(args.k) / Real(kernel.kr), lanes = Real(kernel.nr) / 2;
  const double inner = m * n * (k / lanes + kLaneSum);
  const double bytes = n * Real(args.k) * Real(ElementBytes(kernel.rhs));
  return inner <= m * k * std::ceil(n / lanes) + (transposed ? kTransposeByte * bytes : 0);
}

// Whether products along K serve best: both operands lie along it, or one that is small can be copied so.
bool ChooseInner(const KernelInfo& kernel, GemmArgs& args) {
  // Against B read where it lies, half as many as a vector has lanes: float64 1024x8x1024 557 us instead of 339.
  const int64_t copied = kernel.direct_b ? std::min<int64_t>(kernel.nr / 4, kInnerMaxCopied) : kInnerMaxCopied;
  const bool b_along_k = args.rsb == 1 && (args.csb != 1 || args.n == 1);
  if ((args.csa != 1 && !b_along_k) || !InnerPays(kernel, args, b_along_k)) return false;
  if (args.csa == 1 && b_along_k) {
    args.inner = std::min(args.m, args.n) <= kInnerMaxRows;
  } else if (args.csa == 1) {
    const int64_t bytes = args.n * args.k * ElementBytes(kernel.rhs);
    args.inner = args.pack_b = args.n <= copied && args.m >= kInnerMinMet && bytes <= kInnerMaxCopiedBytes;
  } else {
    const int64_t bytes = args.m * args.k * ElementBytes(kernel.lhs);
    args.inner = args.pack_a = args.m <= copied && args.n >= kInnerMinMet && bytes <= kInnerMaxCopiedBytes;
  }
  return args.inner;
}

}  // namespace

int64_t PackedABytes(const KernelInfo& kernel, const GemmArgs& args) {
  if (args.inner) return args.pack_a ? RoundUp(args.m * args.k * ElementBytes(kernel.lhs), 64) : 0;
  return args.pack_a ? args.mc * PackedARow(kernel, args.kc) + kPackSlackBytes : 0;
}

int64_t PackedBBytes(const KernelInfo& kernel, const GemmArgs& args) {
  if (args.inner) return args.pack_b ? RoundUp(args.n * args.k * ElementBytes(kernel.rhs), 64) : 0;
  const int64_t column = args.kc * kernel.b_panel_bytes + kernel.b_header_bytes;
  return args.pack_b ? RoundUp(args.nc * column, 64) + kPackSlackBytes : 0;
}

int64_t PartialBytes(const KernelInfo& kernel, int64_t m, int64_t rs_partial) {
  return RoundUp(m * rs_partial * ElementBytes(kernel.acc), 64);
}

bool ReadsA(const KernelInfo& kernel, const GemmArgs& args) {
  return kernel.direct_a && (kernel.kr == 1 || (args.csa == 1 && args.k % kernel.kr == 0 && args.rsa % kernel.kr == 0));
}

void ChooseSums(const KernelInfo& kernel, int64_t passes, GemmArgs& args) {
  args.inner = args.sweep = args.pack_a = args.pack_b = args.kc = 0;
  if (kernel.inner && passes == 1 && ChooseInner(kernel, args)) return;

  const int64_t b_bytes = ElementBytes(kernel.rhs), b_span = args.k * args.rsb * b_bytes;
  const bool rows_far_apart = b_span > kTlbReachBytes, large = b_span >= kLargeBBytes;
  if (kernel.sweep && args.csb == 1 && args.n >= kSweepMinCols) {
    const int64_t unpacked = rows_far_apart ? kSweepRows : kSweepNearRows;
    args.sweep = args.m <= (kernel.direct_b ? unpacked : b_bytes == 1 ? kSweepByteRows : kSweepPairRows);
    if (args.sweep) return;
  }

  const bool b_aliases = rows_far_apart && args.rsb * b_bytes % kAliasBytes == 0;
  args.pack_b = !kernel.direct_b || args.csb != 1 || (args.m >= kPackBMinTiles * kernel.mr && rows_far_apart);
  if (args.pack_b) {
    args.kc = BalancedBlock(args.k, kKcBytes / kernel.b_panel_bytes, kernel.kr);
  } else {
    args.kc = BalancedBlock(args.k, large ? kLargeKc : b_aliases ? kAliasedKc : kDirectMaxKc, kernel.kr);
  }
}

int64_t ChooseKPieces(const KernelInfo& kernel, int64_t products, const GemmArgs& args, int64_t passes) {
  const double tiles = Real(products) * Real(CeilDiv(args.m, kernel.mr)) * Real(CeilDiv(args.n, kernel.nr));
  // The inner products of a narrow kernel leave no unfinished sums.
  if (tiles > Real(kFewTiles) || (args.inner && kernel.narrow)) return 1;
  const double worthwhile = FullItems(products, args.m, args.n, args.k) * Real(passes) / 2;
  const int64_t most = std::min(kMaxPieces, args.k / std::max(kMinPieceK, KUnit(args)));
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(Real(most), worthwhile)));
}

void ChooseBlocks(const KernelInfo& kernel, const Caches& caches, int64_t item_m, int64_t item_n, GemmArgs& args) {
  const int64_t a_bytes = ElementBytes(kernel.lhs);
  args.ahead = 0;
  if (args.inner || args.sweep) {
    args.mc = args.nc = args.panel = 0;
    const double read = Real(std::max(args.m * a_bytes, args.n * ElementBytes(kernel.rhs))) * Real(args.k);
    args.ahead = read * Real(args.batch) >= kOfL3InMemory * Real(caches.l3);
    return;
  }
  const bool awkward = AwkwardA(kernel, args);
  const bool reads_a = ReadsA(kernel, args), direct = reads_a && !args.pack_b;
  const bool few = awkward && direct && args.csa == 1 && item_n <= kPackAMinTiles * kernel.nr && item_m > kernel.mr;
  // Pairs are better copied than read from one set: bf16 64x64x2048 reaches 0.82 of the peak packed, else 0.64 (Zen 4).
  const int64_t least_n = kernel.kr > 1 ? 0 : kPackAMinTiles * kernel.nr;
  args.pack_a = !reads_a || (awkward && !few && item_m > 1 && item_n >= least_n);

  const int64_t b_column = args.kc * kernel.b_panel_bytes, a_row = PackedARow(kernel, args.kc);
  const int64_t b_block = std::min(kMaxBlockBBytes, static_cast<int64_t>(kBlockBOfL2 * Real(caches.l2)));
  args.panel = kernel.mr;
  const bool divisible = !args.pack_a || args.csa == 1;
  if (!args.pack_b && divisible && item_m <= kEvenPanels * kernel.mr) args.panel = BalancedBlock(item_m, kernel.mr, 1);
  if (few) args.panel = std::min(int64_t{kernel.mr}, kAliasedRows);
  // Unpacked columns are cut where several panels are to find them in L2.
  const bool again = !args.pack_b && item_m > args.panel;
  const int64_t b_row = args.kc * ElementBytes(kernel.rhs);
  const int64_t unit = again ? kStreamTiles * kernel.nr : kernel.nr;
  args.nc = BalancedBlock(item_n,
                          args.pack_b ? b_block / b_column
                          : again     ? kStreamBytes / b_row
                                      : item_n + unit,
                          unit);
  // Each block of rows packs all of B again, so unpacked rows are not cut at all.
  const int64_t mc_most = args.pack_a ? kMaxBlockABytes / a_row : RoundUp(item_m, args.panel);
  args.mc = BalancedBlock(item_m, mc_most, args.panel);
  if (few) args.mc = args.panel;
}

Split SplitForPartialSums(const KernelInfo& kernel, int64_t m, int64_t n, Split split) {
  const int64_t m_units = CeilDiv(m, kernel.mr), n_units = CeilDiv(n, kernel.nr);
  const auto fits = [&] {
    const int64_t item_m = CeilDiv(m_units, split.m) * kernel.mr, item_n = CeilDiv(n_units, split.n) * kernel.nr;
    return PartialBytes(kernel, item_m, item_n) <= kMaxPartialBytes;
  };
  // Halve the longer side: a square item packs least.
  while (!fits()) {
    const bool tall = m_units * kernel.mr / split.m >= n_units * kernel.nr / split.n;
    int64_t& pieces = tall ? split.m : split.n;
    pieces = std::min(2 * pieces, tall ? m_units : n_units);
  }
  return split;
}

bool WorthSplitting(int64_t products, int64_t m, int64_t n, int64_t k) { return FullItems(products, m, n, k) >= 2; }

Split ChooseSplit(const KernelInfo& kernel, int64_t products, const GemmArgs& args, int64_t k, int64_t threads) {
  if (threads < 2 || !WorthSplitting(products, args.m, args.n, k)) return {};
  // Unpacked, a piece costs what it computes; but few rows of A stream B, which wants long rows.
  const bool fine = !args.pack_b && args.m >= kPackBMinTiles * kernel.mr;
  // A large B comes no faster for fewer rows of A, so that these are not cut while columns can be.
  const bool streams =
      !args.pack_b && !args.inner && !fine && args.k * args.rsb * ElementBytes(kernel.rhs) >= kLargeBBytes;
  const double least_rows = streams ? kRowsOfMemory : 1;
  // Each item packs its own columns of B, and its own rows of A if those are packed too.
  const bool packs_a = args.pack_b && (!ReadsA(kernel, args) || AwkwardA(kernel, args));
  const double b_macs = args.pack_b ? kPackMacs : kReadMacs;
  const double a_macs = packs_a ? kPackMacs : args.pack_b ? 0 : kReadMacs;
  const int64_t unpacked = fine ? kFineItemsPerThread : args.sweep ? kSweepItemsPerThread : kStreamItemsPerThread;
  const int64_t per_thread = fine || streams ? unpacked : kItemsPerThread;
  const double full_items = FullItems(products, args.m, args.n, k);
  const int64_t most = static_cast<int64_t>(std::min(Real(threads * per_thread), full_items));

  const int64_t m_units = CeilDiv(args.m, kernel.mr), n_units = CeilDiv(args.n, kernel.nr);
  const double m = Real(m_units * kernel.mr), n = Real(n_units * kernel.nr);
  // Times in multiply-adds for each value of k.
  const double depth = std::max(Real(k), 1.0), claim = kItemMacs / depth, begin = kProductMacs / depth;
  // Packed panels cost so much more that columns are cut in any case.
  const double shared_rows = args.pack_b ? 0 : kSharedRowMacs * Real(args.m) / depth;
  const auto cost = [&](double rows, double cols) {
    return std::max(rows, least_rows) * cols + a_macs * rows + b_macs * cols + begin;
  };
  Split best;
  double best_time = std::numeric_limits<double>::infinity();
  // Of equal times the first found wins: the one that cuts the single products least.
  for (int64_t sn = 1; sn <= std::min(n_units, most); ++sn) {
    for (int64_t sm = 1; sm <= std::min(m_units, most / sn); ++sm) {
      const double largest = cost(Real(CeilDiv(m_units, sm) * kernel.mr), Real(CeilDiv(n_units, sn) * kernel.nr));
      const double average = cost(m / Real(sm), n / Real(sn));
      for (int64_t sp = 1; sp <= std::min(products, most / sn / sm); ++sp) {
        const double last = largest * Real(CeilDiv(products, sp)) + claim;
        const double turns = Real(CeilDiv(sp * sm * sn, threads));
        const double item = average * Real(products) / Real(sp) + claim;
        // Threads that are done take what is left, so that sizes even out over several turns, but for one item.
        const double time = item * turns + (last - item) + kTail * last + (sn > 1 ? shared_rows : 0);
        if (time < best_time) {
          best_time = time;
          best = {sp, sm, sn};
        }
      }
    }
  }
  return best;
}

Plan MakePlan(const Contraction& contraction, const KernelInfo& kernel, int64_t threads, const Caches& caches) {
  Plan plan;
  plan.kernel = &kernel;
  plan.swapped = contraction.swapped;
  plan.empty = contraction.empty;
  plan.a_bytes = ElementBytes(kernel.lhs);
  plan.b_bytes = ElementBytes(kernel.rhs);
  plan.c_bytes = ElementBytes(kernel.out);
  if (plan.empty) return plan;

  std::vector<Loop> m = contraction.m, n = contraction.n, k = contraction.k;
  const Loop inner_m = TakeLargest(m);
  const Loop inner_k = TakeLargest(k);
  Loop inner_n = {1, 0, 0, 1};
  if (!n.empty()) {  // the only one that C's unit stride allows
    inner_n = n.back();
    n.pop_back();
  }
  plan.k_outer = std::move(k);
  plan.outer = contraction.batch;
  plan.outer.insert(plan.outer.end(), m.begin(), m.end());
  plan.outer.insert(plan.outer.end(), n.begin(), n.end());
  std::stable_sort(plan.outer.begin(), plan.outer.end(), [](const Loop& x, const Loop& y) { return x.c > y.c; });
  for (const Loop& loop : plan.outer) plan.products *= loop.size;

  GemmArgs& args = plan.args;
  args.m = inner_m.size;
  args.n = inner_n.size;
  args.k = inner_k.size;
  args.rsa = inner_m.a;
  args.csa = inner_k.size > 1 ? inner_k.a : 1;
  args.rsb = inner_k.b;
  args.csb = inner_n.size > 1 ? inner_n.b : 1;
  args.rsc = inner_m.c;

  // A pass over an outer contracting dimension is not worth a thread of its own, but is work.
  int64_t passes = 1;
  for (const Loop& loop : plan.k_outer) passes *= loop.size;
  const int64_t all_k = args.k * passes;
  plan.divisible = WorthSplitting(plan.products, args.m, args.n, all_k);
  const double ns = FullItems(plan.products, args.m, args.n, all_k) * kMinItemNs;
  plan.expected = std::chrono::nanoseconds(static_cast<int64_t>(std::min(ns, kLongestNs)));
  ChooseSums(kernel, passes, args);
  plan.k_unit = KUnit(args);
  plan.k_pieces = ChooseKPieces(kernel, plan.products, args, passes);
  const bool in_pieces = plan.k_pieces > 1;

  // Unfinished sums of one product lie in workspace: of a narrow kernel until its last pass.
  const bool one_by_one = in_pieces || (kernel.narrow && !plan.k_outer.empty());
  const Loop batch = one_by_one ? Loop{1, 0, 0, 0} : TakeLargest(plan.outer);
  args.batch = batch.size;
  args.bsa = batch.a;
  args.bsb = batch.b;
  args.bsc = batch.c;

  plan.split = ChooseSplit(kernel, plan.products, args, all_k, CeilDiv(threads, plan.k_pieces));
  const bool partial = kernel.narrow && !in_pieces && (passes > 1 || args.sweep || (!args.inner && args.k > args.kc));
  if (partial) plan.split = SplitForPartialSums(kernel, args.m, args.n, plan.split);
  const int64_t item_m = CeilDiv(CeilDiv(args.m, kernel.mr), plan.split.m) * kernel.mr;
  const int64_t item_n = CeilDiv(CeilDiv(args.n, kernel.nr), plan.split.n) * kernel.nr;
  ChooseBlocks(kernel, caches, std::min(item_m, args.m), std::min(item_n, args.n), args);
  plan.a_pack_bytes = PackedABytes(kernel, args);
  plan.b_pack_bytes = PackedBBytes(kernel, args);
  args.rs_partial = partial ? item_n : 0;
  plan.partial_bytes = PartialBytes(kernel, item_m, args.rs_partial);
  if (in_pieces) {
    plan.rs_sums = RoundUp(args.n, kernel.nr);
    plan.sums_bytes = PartialBytes(kernel, RoundUp(args.m, kernel.mr), plan.rs_sums);
  }
  return plan;
}

Plan MakePlan(const Operand& lhs, const Operand& rhs, const Operand& out, std::string_view algorithm,
              std::span<const Target* const> targets, int64_t threads, const Caches& caches, bool last_is_n) {
  const Contraction contraction = Analyze(lhs, rhs, out, last_is_n);
  const Operand &a = contraction.swapped ? rhs : lhs, &b = contraction.swapped ? lhs : rhs;
  const auto select = [&](bool direct_b) {
    return SelectKernel(targets, a.dtype, b.dtype, out.dtype, algorithm, direct_b);
  };
  const KernelInfo* kernel = select(false);
  if (kernel == nullptr) {
    throw std::invalid_argument("jax_nano has no kernel on this machine for " + Describe(lhs) + ", " + Describe(rhs) +
                                " -> " + Describe(out) + ", algorithm " + std::string(algorithm));
  }
  Plan plan = MakePlan(contraction, *kernel, threads, caches);
  // A few rows of A do not pay for packing B: a kernel that multiplies more slowly, but reads B where it lies, wins.
  const GemmArgs& args = plan.args;
  const int64_t b_bytes = ElementBytes(kernel->rhs);
  const bool pairs_from_memory = b_bytes == 2 && args.k * args.rsb * b_bytes >= kPairsFromMemoryBytes;
  const bool few = pairs_from_memory ? args.m > kSweepRows && args.m <= kPairsFromMemoryMaxRows
                                     : args.pack_b && args.m <= kStreamMaxRows;
  if (!plan.empty && few && !args.inner && args.csb == 1) {
    const KernelInfo* direct = select(true);
    if (direct != nullptr && direct != kernel) return MakePlan(contraction, *direct, threads, caches);
  }
  return plan;
}

}  // namespace jax_nano
