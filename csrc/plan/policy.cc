#include "plan/policy.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "plan/arithmetic.h"
#include "plan/registry.h"

namespace jax_nano {
namespace {

const InnerProduct* InnerOf(const Schedule& schedule) { return std::get_if<InnerProduct>(&schedule); }

// How many items of the smallest worthwhile size the work would fill; a double, as it may be huge.
double FullItems(const Product& x, int64_t products, int64_t all_k, const Profile& profile) {
  return Real(products) * Real(x.m) * Real(x.n) * Real(all_k) / Real(profile.split.min_item);
}

// From B's first row to its last, in bytes.
int64_t SpanOfB(const KernelInfo& kernel, const Product& x) { return x.k * x.rsb * ElementBytes(kernel.rhs); }

// Whether A is slow to read where it lies, an element of each of mr rows at a time: its rows are not contiguous, or all
// share their sets in L1. Columns that lie side by side in less than a line are read as they come.
bool SlowA(const KernelInfo& kernel, const Product& x, const Profile& profile) {
  if (x.rsa == 1 && x.csa == x.m && x.m * ElementBytes(kernel.lhs) <= profile.line_bytes) return false;
  const int64_t past = std::abs(x.rsa) * ElementBytes(kernel.lhs) % profile.alias_bytes;
  return x.csa != 1 || std::min(past, profile.alias_bytes - past) * kernel.mr < profile.line_bytes;
}

bool IsWide(const KernelInfo& kernel) { return int64_t{kernel.lanes} * ElementBytes(kernel.acc) == 64; }

// Whether it has microkernels of half a vector of columns (codegen/gemm.py).
bool HasHalves(const KernelInfo& kernel) { return IsWide(kernel) && kernel.direct_a; }

// Whether all columns of B are at most half a vector, for which it has microkernels.
bool IsNarrow(const KernelInfo& kernel, const Product& x) { return HasHalves(kernel) && x.n <= kernel.lanes / 2; }

// Up to how many columns of B inner products take at once, many rows at a time (codegen/inner.py); 0: it has no such
// tiles.
int64_t TallColumns(const KernelInfo& kernel) {
  const bool as_they_are = std::string_view(kernel.lhs) == kernel.acc && std::string_view(kernel.rhs) == kernel.acc;
  return kernel.inner && IsWide(kernel) && as_they_are ? 6 : 0;
}

// Whether inner products cost less than register tiles, in vector multiply-adds. Those add up the lanes of each
// element's accumulator; these fill only the lanes that have columns, and transpose a B that lies along k.
bool InnerPays(const KernelInfo& kernel, const Product& x, bool b_along_k, const Profile& all) {
  const Profile::Inner& profile = all.inner;
  const double m = Real(x.m), n = Real(x.n), k = Real(x.k) / Real(kernel.kr), lanes = Real(kernel.nr) / 2;
  const double inner = m * n * (k / lanes + profile.lane_sum);
  const double bytes = n * Real(x.k) * Real(ElementBytes(kernel.rhs));
  const bool halves = HasHalves(kernel) && !SlowA(kernel, x, all);
  const double vectors = halves ? std::ceil(2 * n / lanes) / 2 : std::ceil(n / lanes);
  return inner <= m * k * vectors + (b_along_k ? profile.transpose_byte * bytes : 0);
}

// Whether B's columns are few enough for tiles of half a vector, but not for inner products, which would read A twice,
// or all of a long B again for every few rows.
bool TilesReadLess(const KernelInfo& kernel, const Product& x, const Profile& all) {
  const Profile::Inner& profile = all.inner;
  if (!IsNarrow(kernel, x) || x.m < profile.min_met) return false;
  // Of rows that share their sets in L1 tiles are low: 512x8x4096 in 405 us by tiles, in 372 by inner products.
  const bool near = x.m * x.k * ElementBytes(kernel.lhs) <= all.out_of_cache_b_bytes;
  if (near && SlowA(kernel, x, all)) return false;
  const bool is_long = x.n * x.k * ElementBytes(kernel.rhs) > profile.max_copied_bytes;
  return TallColumns(kernel) > 0 && (x.n > TallColumns(kernel) || (x.n > profile.max_long_columns && is_long));
}

// Whether inner products serve best: both operands lie along k, or one that is small can be copied so.
bool ChooseInner(const KernelInfo& kernel, const Product& x, const Profile& all, InnerProduct& inner) {
  const Profile::Inner& profile = all.inner;
  // Against a B read where it lies, half as many as a vector has lanes: f64 1024x8x1024 557 us instead of 339.
  const int64_t half = kernel.direct_b ? kernel.nr / 4 : profile.max_copied;
  const int64_t copied = std::min(std::max(half, x.n <= x.m ? TallColumns(kernel) : 0), profile.max_copied);
  const bool b_along_k = x.rsb == 1 && (x.csb != 1 || x.n == 1);
  if ((x.csa != 1 && !b_along_k) || !InnerPays(kernel, x, b_along_k, all)) return false;
  if (TilesReadLess(kernel, x, all)) return false;
  if (x.csa == 1 && b_along_k) return std::min(x.m, x.n) <= profile.max_rows_or_columns;
  if (x.csa == 1) {
    const int64_t bytes = x.n * x.k * ElementBytes(kernel.rhs);
    return inner.pack_b = x.n <= copied && x.m >= profile.min_met && bytes <= profile.max_copied_bytes;
  }
  const int64_t bytes = x.m * x.k * ElementBytes(kernel.lhs);
  return inner.pack_a = x.m <= copied && x.n >= profile.min_met && bytes <= profile.max_copied_bytes;
}

bool SweepPays(const KernelInfo& kernel, const Product& x, const Profile& profile) {
  const Profile::SweepRows& rows = profile.sweep;
  if (x.csb != 1 || x.n < rows.min_columns) return false;
  if (kernel.direct_b) {
    return x.m <= (SpanOfB(kernel, x) > profile.tlb_reach_bytes ? rows.far_rows : rows.near_rows);
  }
  return x.m <= (ElementBytes(kernel.rhs) == 1 ? rows.packed_8 : rows.packed_16);
}

// Whether nothing is packed and many rows read B: then an item costs what it computes, however small it is.
bool ReadsUnpackedTiles(const Schedule& schedule, const KernelInfo& kernel, const Product& x, const Profile& profile) {
  return !PacksB(schedule) && x.m >= profile.packing.b_min_row_tiles * kernel.mr;
}

// Whether few rows of A meet a B out of cache: it comes no faster for fewer rows, so that these are not cut while
// columns can be.
bool FromMemory(const Schedule& schedule, const KernelInfo& kernel, const Product& x, const Profile& profile) {
  if (PacksB(schedule) || InnerOf(schedule) != nullptr || ReadsUnpackedTiles(schedule, kernel, x, profile))
    return false;
  const bool weights = std::holds_alternative<Sweep>(schedule) && MeetsWeights(kernel, x, profile);
  return SpanOfB(kernel, x) >= profile.out_of_cache_b_bytes || weights;
}

Blocked BlocksOf(Blocked x, const KernelInfo& kernel, const Product& product, int64_t item_m, int64_t item_n,
                 const Machine& machine) {
  const Profile& profile = machine.profile;
  const int64_t mr = kernel.mr, nr = kernel.nr;
  const int64_t pack_a_min_n = profile.packing.a_min_column_tiles * nr;
  const bool slow = SlowA(kernel, product, profile), reads_a = ReadsA(kernel, product);
  // Rows that share sets are read by as many at a time as have room there, if few columns meet them.
  const bool narrow = IsNarrow(kernel, product);
  const bool aliased =
      slow && reads_a && (!x.pack_b || narrow) && product.csa == 1 && item_n <= pack_a_min_n && item_m > mr;
  // Pairs are better copied than read from one set: bf16 64x64x2048 reaches 0.82 of the peak packed, else 0.64 (Zen 4).
  const bool enough_columns = item_n >= (kernel.kr > 1 ? 0 : pack_a_min_n);
  x.pack_a = !reads_a || (slow && !aliased && item_m > 1 && enough_columns);

  x.tile_rows = mr;
  const bool any_height = !x.pack_a || product.csa == 1;
  if (!x.pack_b && any_height && item_m <= profile.unpacked.even_row_tiles * mr) {
    x.tile_rows = BalancedBlock(item_m, mr, 1);
  }
  if (aliased) x.tile_rows = std::min(mr, profile.unpacked.aliased_rows);

  const bool reused = item_m > x.tile_rows;  // several tiles of rows read B
  if (x.pack_b) {
    const auto share_of_l2 = static_cast<int64_t>(profile.packing.b_share_of_l2 * Real(machine.caches.l2));
    const int64_t bytes = std::min(profile.packing.b_max_bytes, share_of_l2);
    x.nc = BalancedBlock(item_n, bytes / (x.kc * kernel.b_panel_bytes), nr);
  } else if (reused) {
    const int64_t most = profile.unpacked.reused_b_bytes / (x.kc * ElementBytes(kernel.rhs));
    x.nc = BalancedBlock(item_n, most, profile.unpacked.reused_b_tiles * nr);
  } else {
    x.nc = BalancedBlock(item_n, item_n + nr, nr);  // whole
  }

  // Each block of rows packs all of B again, so rows are cut no further than the size of packed A demands.
  const int64_t most = x.pack_a ? profile.packing.a_max_bytes / PackedARow(kernel, x.kc) : RoundUp(item_m, x.tile_rows);
  x.mc = aliased && !x.pack_b ? x.tile_rows : BalancedBlock(item_m, most, x.tile_rows);
  return x;
}

}  // namespace

Schedule ChooseOrderOfSums(const KernelInfo& kernel, const Product& product, const Profile& profile) {
  if (PairsPay(kernel, product)) return ChooseDepth(kernel, product, profile);
  InnerProduct inner;
  if (kernel.inner && !product.accumulates && ChooseInner(kernel, product, profile, inner)) return inner;
  if (kernel.sweep && SweepPays(kernel, product, profile)) return Sweep{};
  return ChooseDepth(kernel, product, profile);
}

Blocked ChooseDepth(const KernelInfo& kernel, const Product& x, const Profile& profile) {
  const int64_t span = SpanOfB(kernel, x);
  const bool narrow = IsNarrow(kernel, x);
  const int64_t rows = narrow ? std::min(x.k, profile.depth.narrow) : x.k;  // of B, that a tile reads
  const bool rows_far_apart = rows * x.rsb * ElementBytes(kernel.rhs) > profile.tlb_reach_bytes;
  const bool aliased = rows_far_apart && x.rsb * ElementBytes(kernel.rhs) % profile.alias_bytes == 0;
  const bool many_rows = x.m >= profile.packing.b_min_row_tiles * kernel.mr;
  Blocked blocked;
  blocked.pack_b = !kernel.direct_b || x.csb != 1 || (many_rows && rows_far_apart);
  const bool dense = blocked.pack_b || !rows_far_apart;
  const int64_t most = narrow && dense                        ? profile.depth.narrow
                       : blocked.pack_b                       ? profile.depth.packed_bytes / kernel.b_panel_bytes
                       : span >= profile.out_of_cache_b_bytes ? profile.depth.unpacked_out_of_cache
                       : aliased                              ? profile.depth.unpacked_aliased
                                                              : profile.depth.unpacked;
  blocked.kc = BalancedBlock(x.k, most, kernel.kr);
  return blocked;
}

int64_t SplitKUnit(const Schedule& schedule, const Profile& profile) {
  const auto* blocked = std::get_if<Blocked>(&schedule);
  return blocked != nullptr ? blocked->kc : profile.split_k.slice_unit;
}

int64_t ChooseSplitK(const Schedule& schedule, const KernelInfo& kernel, const Product& x, int64_t products,
                     int64_t passes, const Profile& profile) {
  const double tiles = Real(products) * Real(CeilDiv(x.m, kernel.mr)) * Real(CeilDiv(x.n, kernel.nr));
  // Inner products round what they have summed to the type of C, and leave no partial sums of a wider one.
  const bool impossible = InnerOf(schedule) != nullptr && kernel.narrow_out;
  if (impossible || tiles > Real(profile.split_k.max_tiles)) return 1;
  const double worthwhile = FullItems(x, products, x.k, profile) * Real(passes) / 2;
  const int64_t slice = std::max(profile.split_k.min_slice_k, SplitKUnit(schedule, profile));
  const int64_t most = std::min(profile.split_k.max_slices, x.k / slice);
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(Real(most), worthwhile)));
}

Schedule ChooseBlocks(const Schedule& schedule, const KernelInfo& kernel, const Product& product, int64_t item_m,
                      int64_t item_n, const Machine& machine) {
  if (const auto* blocked = std::get_if<Blocked>(&schedule)) {
    return BlocksOf(*blocked, kernel, product, item_m, item_n, machine);
  }
  const int64_t a = product.m * ElementBytes(kernel.lhs), b = product.n * ElementBytes(kernel.rhs);
  const double bytes = Real(std::max(a, b)) * Real(product.k) * Real(product.batch);
  const bool is_large = bytes >= machine.profile.out_of_cache_l3_share * Real(machine.caches.l3);
  const bool weights = MeetsWeights(kernel, product, machine.profile);
  const bool prefetch = weights ? PrefetchesWeights(kernel, product, machine.profile) : is_large;
  if (const auto* inner = InnerOf(schedule)) return InnerProduct{inner->pack_a, inner->pack_b, prefetch};
  return Sweep{prefetch};
}

bool MeetsWeights(const KernelInfo& kernel, const Product& x, const Profile& profile) {
  const int64_t bytes = x.n * x.k * ElementBytes(kernel.rhs);
  return ElementBytes(kernel.rhs) == 2 && x.batch == 1 && x.m <= profile.weights.max_rows &&
         bytes >= profile.weights.min_bytes;
}

bool PrefetchesWeights(const KernelInfo& kernel, const Product& x, const Profile& profile) {
  return x.rsb * ElementBytes(kernel.rhs) % profile.weights.aliased_row_bytes != 0;
}

bool WorthSplitting(const Product& product, int64_t products, int64_t all_k, const Profile& profile) {
  return FullItems(product, products, all_k, profile) >= 2;
}

int64_t ExpectedNs(const Product& product, int64_t products, int64_t all_k, const Profile& profile) {
  constexpr double kMost = 1e18;
  return static_cast<int64_t>(
      std::min(FullItems(product, products, all_k, profile) * profile.split.min_item_ns, kMost));
}

int64_t MostItems(const Schedule& schedule, const KernelInfo& kernel, const Product& x, int64_t products, int64_t all_k,
                  int64_t threads, const Profile& profile) {
  if (threads < 2 || !WorthSplitting(x, products, all_k, profile)) return 1;
  const Profile::Split& costs = profile.split;
  const bool sweep = std::holds_alternative<Sweep>(schedule);
  const int64_t per_thread = ReadsUnpackedTiles(schedule, kernel, x, profile) ? costs.items_unpacked
                             : !FromMemory(schedule, kernel, x, profile)      ? costs.items_packed
                             : sweep                                          ? costs.items_sweep
                                                                              : costs.items_out_of_cache;
  return static_cast<int64_t>(std::min(Real(threads * per_thread), FullItems(x, products, all_k, profile)));
}

Split ChooseSplit(const Schedule& schedule, const KernelInfo& kernel, const Product& x, int64_t products, int64_t all_k,
                  int64_t threads, int64_t most, const Profile& profile) {
  if (most < 2) return {};
  const Profile::Split& costs = profile.split;
  const bool pack_b = PacksB(schedule);
  const double least_rows = FromMemory(schedule, kernel, x, profile) ? profile.out_of_cache_rows : 1;
  // Each item packs its own columns of B, and its own rows of A if those are packed too.
  const bool packs_a = pack_b && (!ReadsA(kernel, x) || SlowA(kernel, x, profile));
  const double b_macs = pack_b ? costs.pack_element : costs.read_element;
  const double a_macs = packs_a ? costs.pack_element : pack_b ? 0 : costs.read_element;

  const int64_t m_units = CeilDiv(x.m, kernel.mr), n_units = CeilDiv(x.n, kernel.nr);
  const double m = Real(m_units * kernel.mr), n = Real(n_units * kernel.nr);
  // Times in multiply-adds for each value of k.
  const double depth = std::max(Real(all_k), 1.0), claim = costs.claim_item / depth,
               begin = costs.begin_product / depth;
  // Packing costs so much more that columns are cut in any case.
  const double shared_rows = pack_b ? 0 : costs.shared_row * Real(x.m) / depth;
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
        const double item = average * Real(products) / Real(sp) + claim;
        const double time = TimeOfItems(item, last, sp * sm * sn, threads, profile) + (sn > 1 ? shared_rows : 0);
        if (time < best_time) {
          best_time = time;
          best = {sp, sm, sn};
        }
      }
    }
  }
  return best;
}

int64_t ItemRows(const KernelInfo& kernel, const Product& x, const Split& split) {
  return CeilDiv(CeilDiv(x.m, kernel.mr), split.m) * kernel.mr;
}

int64_t ItemColumns(const KernelInfo& kernel, const Product& x, const Split& split) {
  return CeilDiv(CeilDiv(x.n, kernel.nr), split.n) * kernel.nr;
}

double TimeOfItems(double item, double largest, int64_t items, int64_t threads, const Profile& profile) {
  // Threads that are done take what is left, so that sizes even out over several turns, but for one item.
  return item * Real(CeilDiv(items, threads)) + (largest - item) + profile.split.tail * largest;
}

double ClaimNs(const Profile& profile) {
  return profile.split.claim_item * profile.split.min_item_ns / Real(profile.split.min_item);
}

double SharedRowNs(const Profile& profile) {
  return profile.split.shared_row * profile.split.min_item_ns / Real(profile.split.min_item);
}

Split SplitForPartialSums(const KernelInfo& kernel, const Product& x, Split split, int64_t max_bytes) {
  const int64_t m_units = CeilDiv(x.m, kernel.mr), n_units = CeilDiv(x.n, kernel.nr);
  const auto fits = [&] {
    return PartialBytes(kernel, ItemRows(kernel, x, split), ItemColumns(kernel, x, split)) <= max_bytes;
  };
  // Halve the longer side: a square item packs least.
  while (!fits()) {
    const bool tall = m_units * kernel.mr / split.m >= n_units * kernel.nr / split.n;
    int64_t& parts = tall ? split.m : split.n;
    parts = std::min(2 * parts, tall ? m_units : n_units);
  }
  return split;
}

bool PrefersTransposed(const Product& x, const Profile& profile) {
  const Profile::Transposed& least = profile.transposed;
  const int64_t rows = std::max(least.min_rows, least.rows_a_column * x.n);
  return x.rsa == 1 && x.csa != 1 && x.n > 1 && x.n <= least.max_columns && x.m >= rows && x.k >= least.min_k;
}

bool PairsPay(const KernelInfo& kernel, const Product& x) {
  if (x.accumulates || x.csa != 1 || x.csb != 1 || std::max({x.m, x.n, x.k}) > kernel.pairs_most) return false;
  // Zen 4, bfloat16: 3x7x5 takes 5 ns instead of 69, 8x8x8 9 instead of 58, 4x32x32 69 instead of 92; but 1x64x64 191
  // instead of 117, 64x1x64 599 instead of 174.
  constexpr int64_t kMostOfOneTile = 16, kShort = 32, kFewRows = 4;
  if (x.m <= kMostOfOneTile && x.n <= kernel.lanes) return std::min(x.m, x.n) > 1 || x.k <= kShort;
  return x.n > 1 && (x.m > kFewRows || (x.m > 1 && x.n <= kernel.nr));
}

bool PrefersDirectKernel(const Schedule& schedule, const KernelInfo& kernel, const Product& x, const Profile& profile) {
  if (PairsPay(kernel, x)) return false;
  if (InnerOf(schedule) != nullptr || x.csb != 1) return false;
  const bool from_memory =
      ElementBytes(kernel.rhs) == 2 && SpanOfB(kernel, x) >= profile.direct_kernel.out_of_cache_16_bytes;
  if (from_memory) return x.m > profile.sweep.far_rows && x.m <= profile.direct_kernel.out_of_cache_16_max_rows;
  return PacksB(schedule) && x.m <= profile.direct_kernel.max_rows;
}

}  // namespace jax_nano
