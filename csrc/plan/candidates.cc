#include "plan/candidates.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <tuple>

#include "plan/arithmetic.h"
#include "plan/registry.h"

namespace jax_nano {
namespace {

using Blocks = std::set<int64_t>;

// The grid of a block size: `total` cut into equal blocks of at most each of `most`.
Blocks Balanced(int64_t total, std::initializer_list<int64_t> most, int64_t unit) {
  Blocks out;
  for (const int64_t x : most) {
    if (x > 0) out.insert(BalancedBlock(total, x, unit));
  }
  return out;
}

// Depths that are cut by powers of two, and the whole k if that is not deeper than the deepest of these.
Blocks Depths(const KernelInfo& kernel, const Product& x) {
  return Balanced(x.k, {64, 128, 256, 512, 1024, 2048}, kernel.kr);
}

void AddBlocked(const KernelInfo& kernel, const Product& x, int64_t item_m, int64_t item_n, const Machine& machine,
                std::vector<Schedule>& out) {
  const Profile& profile = machine.profile;
  for (const int64_t kc : Depths(kernel, x)) {
    for (const bool pack_b : {false, true}) {
      const int64_t column = kc * (pack_b ? int64_t{kernel.b_panel_bytes} : ElementBytes(kernel.rhs));
      const int64_t most = std::min(profile.packing.b_max_bytes, machine.caches.l2);
      const Blocks ncs = pack_b ? Balanced(item_n, {most / 8 / column, most / 2 / column, most / column}, kernel.nr)
                                : Balanced(item_n, {most / 4 / column, item_n}, kernel.nr);
      for (const int64_t nc : ncs) {
        for (const bool pack_a : {false, true}) {
          for (const int64_t tile_rows : Balanced(item_m, {kernel.mr, CeilDiv(kernel.mr, 2)}, 1)) {
            const int64_t rows = profile.packing.a_max_bytes / PackedARow(kernel, kc);
            const Blocks mcs = pack_a ? Balanced(item_m, {rows / 4, rows}, tile_rows)
                                      : Balanced(item_m, {tile_rows, RoundUp(item_m, tile_rows)}, tile_rows);
            for (const int64_t mc : mcs) {
              out.push_back(
                  Blocked{.pack_a = pack_a, .pack_b = pack_b, .mc = mc, .kc = kc, .nc = nc, .tile_rows = tile_rows});
            }
          }
        }
      }
    }
  }
}

// The schedules of items of at most item_m x item_n, legal or not.
std::vector<Schedule> Schedules(const KernelInfo& kernel, const Product& x, int64_t item_m, int64_t item_n,
                                const Machine& machine) {
  std::vector<Schedule> out;
  for (const bool prefetch : {false, true}) {
    out.push_back(InnerProduct{x.csa != 1, x.rsb != 1, prefetch});
    out.push_back(Sweep{prefetch});
  }
  AddBlocked(kernel, x, item_m, item_n, machine, out);
  return out;
}

// Splits into about 1, 2, 4 ... items a thread: of products, rows or columns alone, and of rows and columns together.
std::vector<Split> Splits(const KernelInfo& kernel, const Product& x, int64_t products, int64_t threads) {
  const Split most = {products, CeilDiv(x.m, kernel.mr), CeilDiv(x.n, kernel.nr)};
  std::set<std::tuple<int64_t, int64_t, int64_t>> out = {{1, 1, 1}};
  constexpr int64_t kItemsPerThread = 16;
  for (int64_t items = 2; items <= (threads > 1 ? threads * kItemsPerThread : 1); items *= 2) {
    out.insert({std::min(items, most.products), 1, 1});
    out.insert({1, std::min(items, most.m), 1});
    out.insert({1, 1, std::min(items, most.n)});
    if (items >= 4) out.insert({1, std::min<int64_t>(2, most.m), std::min(items / 2, most.n)});
    if (items >= 4) out.insert({1, std::min(items / 2, most.m), std::min<int64_t>(2, most.n)});
  }
  std::vector<Split> splits;
  for (const auto& [p, m, n] : out) splits.push_back({p, m, n});
  return splits;
}

}  // namespace

std::vector<Choice> Candidates(const Contraction& contraction, const KernelInfo& kernel, int64_t threads,
                               const Machine& machine) {
  std::vector<Choice> out;
  if (contraction.empty) return out;
  const Profile& profile = machine.profile;
  const Plan planned = MakePlan(contraction, kernel, threads, machine);
  Product x = planned.product;
  x.unfinished = x.accumulates;
  const double tiles = Real(planned.products) * Real(CeilDiv(x.m, kernel.mr)) * Real(CeilDiv(x.n, kernel.nr));
  const int64_t most_slices = tiles <= Real(profile.split_k.max_tiles) ? profile.split_k.max_slices : 1;
  const auto add = [&](const Choice& choice) {
    Plan plan;
    const bool known = std::find(out.begin(), out.end(), choice) != out.end();
    if (!known && MakePlan(contraction, kernel, choice, profile, plan).empty()) out.push_back(choice);
  };
  add(ChoiceOf(planned));
  for (const Split& split : Splits(kernel, x, planned.products, threads)) {
    const int64_t item_m = std::min(x.m, CeilDiv(CeilDiv(x.m, kernel.mr), split.m) * kernel.mr);
    const int64_t item_n = std::min(x.n, CeilDiv(CeilDiv(x.n, kernel.nr), split.n) * kernel.nr);
    for (const Schedule& schedule : Schedules(kernel, x, item_m, item_n, machine)) {
      const int64_t unit = SplitKUnit(schedule, profile);
      const bool partial = NeedsPartialSums(schedule, kernel, x);
      add({schedule, partial ? SplitForPartialSums(kernel, x, split, kMaxPartialBytes) : split, 1, unit});
      for (int64_t slices = 2; slices <= most_slices; slices *= 2) add({schedule, split, slices, unit});
    }
  }
  return out;
}

}  // namespace jax_nano
