#include "plan/search.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <set>

#include "plan/arithmetic.h"
#include "plan/cost.h"
#include "plan/policy.h"
#include "plan/registry.h"

namespace jax_nano {
namespace {

using Blocks = std::set<int64_t>;

struct Costs {
  const CostNs& ns;
  CoreModel core;
};

// The caches as a product meets them: with none beyond L2 if its B is weights, which others have displaced there.
CoreModel Met(CoreModel core, const KernelInfo& kernel, const Product& product, const Profile& profile) {
  if (MeetsWeights(kernel, product, profile)) core.near = core.far = 0;
  return core;
}

// With the caches that the costs are for: those that numeric decisions follow.
std::optional<Costs> CostsOf(const KernelInfo& kernel, const Machine& machine) {
  const CostNs* ns = machine.cpu == nullptr ? nullptr : machine.cpu->Of(kernel.name);
  if (ns == nullptr) return std::nullopt;
  return Costs{*ns, machine.cpu->core};
}

// Costs that were not measured decide nothing: they only tell what to expect.
bool Decides(const Machine& machine) { return machine.cpu != nullptr && machine.cpu->measured; }

// For decisions that only move data: what was measured here, or the built-in costs with the caches of this machine.
std::optional<Costs> CostsHere(const KernelInfo& kernel, const Machine& machine) {
  if (machine.measured != nullptr) {
    if (const CostNs* ns = machine.measured->Of(kernel.name)) return Costs{*ns, machine.measured->core};
  }
  std::optional<Costs> costs = Decides(machine) ? CostsOf(kernel, machine) : std::nullopt;
  if (costs) {
    costs->core.l1d = machine.caches.l1d;
    costs->core.l2 = machine.caches.l2;
  }
  return costs;
}

// What is left open in a schedule, filled in in all ways that are worth considering.
std::vector<Schedule> Fillings(const Blocked& open, const KernelInfo& kernel, const Product& x, const CoreModel& core,
                               const Profile& profile) {
  std::vector<Schedule> out;
  const int64_t mr = kernel.mr, nr = kernel.nr;
  Blocks ncs;
  if (open.pack_b) {
    const int64_t column = open.kc * kernel.b_panel_bytes;
    const auto most = static_cast<int64_t>(profile.packing.b_share_of_l2 * Real(core.l2));
    for (const int64_t parts : {8, 4, 2, 1}) {
      ncs.insert(BalancedBlock(x.n, std::min(profile.packing.b_max_bytes, most / parts) / column, nr));
    }
  } else {
    const int64_t row = open.kc * ElementBytes(kernel.rhs), unit = profile.unpacked.reused_b_tiles * nr;
    for (const int64_t parts : {8, 4, 2}) ncs.insert(BalancedBlock(x.n, core.l2 / parts / row, unit));
    ncs.insert(BalancedBlock(x.n, x.n + nr, nr));  // whole
  }
  const auto even = [&](int64_t most) { return BalancedBlock(x.m, most, 1); };
  for (const bool pack_a : {false, true}) {
    if (!pack_a && !ReadsA(kernel, x)) continue;
    const bool any_height = !pack_a || x.csa == 1;
    const Blocks heights = any_height ? Blocks{even(mr), even(CeilDiv(mr, 2)), std::min(x.m, mr)} : Blocks{mr};
    for (const int64_t tile_rows : heights) {
      const int64_t rows = profile.packing.a_max_bytes / PackedARow(kernel, open.kc);
      const int64_t mc = BalancedBlock(x.m, pack_a ? rows : RoundUp(x.m, tile_rows), tile_rows);
      for (const int64_t nc : ncs) {
        out.push_back(Blocked{
            .pack_a = pack_a, .pack_b = open.pack_b, .mc = mc, .kc = open.kc, .nc = nc, .tile_rows = tile_rows});
      }
    }
  }
  return out;
}

std::vector<Schedule> Fillings(const InnerProduct& open, const KernelInfo&, const Product&, const CoreModel&,
                               const Profile&) {
  return {InnerProduct{open.pack_a, open.pack_b, false}, InnerProduct{open.pack_a, open.pack_b, true}};
}

std::vector<Schedule> Fillings(const Sweep&, const KernelInfo& kernel, const Product& x, const CoreModel&,
                               const Profile& profile) {
  if (MeetsWeights(kernel, x, profile)) return {Sweep{PrefetchesWeights(kernel, x, profile)}};
  return {Sweep{false}, Sweep{true}};
}

// The fastest of them that is legal; none if none is.
std::optional<Scored> Fastest(const Schedule& open, const KernelInfo& kernel, const Product& x, const Costs& costs,
                              const Profile& profile) {
  std::optional<Scored> best;
  const auto fillings = [&](const auto& path) { return Fillings(path, kernel, x, costs.core, profile); };
  for (const Schedule& schedule : std::visit(fillings, open)) {
    if (!Validate(schedule, kernel, x).empty()) continue;
    const double ns = PredictedNs(CountCosts(schedule, kernel, x, 1, costs.core), costs.ns);
    if (!best || ns < best->ns) best = {schedule, ns};
  }
  return best;
}

// Orders of sums with all else open.
std::vector<Schedule> OpenOrders(const KernelInfo& kernel, const Product& x, const Profile& profile) {
  std::vector<Schedule> out;
  const bool pack_a = x.csa != 1, pack_b = x.rsb != 1;
  const int64_t copied =
      (pack_a ? x.m * x.k * ElementBytes(kernel.lhs) : 0) + (pack_b ? x.n * x.k * ElementBytes(kernel.rhs) : 0);
  if (copied <= profile.inner.max_copied_bytes) out.push_back(InnerProduct{pack_a, pack_b});
  out.push_back(Sweep{});
  for (const bool packed : {false, true}) {
    Blocks depths;
    for (const int64_t most : {64, 128, 256, 512, 1024, 2048}) depths.insert(BalancedBlock(x.k, most, kernel.kr));
    for (const int64_t kc : depths) out.push_back(Blocked{.pack_b = packed, .kc = kc});
  }
  return out;
}

// Splits into the same number of items for each thread, 1 to at most `most` in all, along all three directions; where
// one of these has fewer parts, into all that it has. Those that cut single products least come first.
std::vector<Split> EvenSplits(const KernelInfo& kernel, const Product& x, int64_t most, int64_t threads) {
  const Split parts = {x.batch, CeilDiv(x.m, kernel.mr), CeilDiv(x.n, kernel.nr)};
  std::vector<Split> out = {Split{}};
  for (const int64_t a_thread : {1, 2, 3, 4, 6, 8, 12, 16}) {
    const int64_t items = threads * a_thread;
    for (int64_t n = 1; n <= items; ++n) {
      if (items % n != 0) continue;
      for (int64_t m = 1; m <= items / n; ++m) {
        if (items / n % m != 0) continue;
        const Split split = {std::min(items / n / m, parts.products), std::min(m, parts.m), std::min(n, parts.n)};
        const bool known = std::find(out.begin(), out.end(), split) != out.end();
        if (!known && split.items() <= most) out.push_back(split);
      }
    }
  }
  return out;
}

}  // namespace

std::vector<Scored> OrdersOfSums(const KernelInfo& kernel, const Product& product, const Machine& machine) {
  std::vector<Scored> out;
  std::optional<Costs> costs = CostsOf(kernel, machine);
  if (!costs) return out;
  costs->core = Met(costs->core, kernel, product, machine.profile);
  Product x = product;
  x.rs_partial = RoundUp(x.n, kernel.nr);
  for (const Schedule& open : OpenOrders(kernel, x, machine.profile)) {
    if (std::optional<Scored> best = Fastest(open, kernel, x, *costs, machine.profile)) out.push_back(*best);
  }
  return out;
}

std::optional<Schedule> FastestOrderOfSums(const KernelInfo& kernel, const Product& product, const Machine& machine) {
  if (!Decides(machine)) return std::nullopt;
  const std::vector<Scored> orders = OrdersOfSums(kernel, product, machine);
  if (orders.empty()) return std::nullopt;
  return std::min_element(orders.begin(), orders.end(), [](const Scored& x, const Scored& y) { return x.ns < y.ns; })
      ->schedule;
}

std::optional<Schedule> FastestBlocks(const Schedule& schedule, const KernelInfo& kernel, const Product& product,
                                      int64_t item_m, int64_t item_n, const Machine& machine) {
  std::optional<Costs> costs = CostsHere(kernel, machine);
  if (!costs) return std::nullopt;
  costs->core = Met(costs->core, kernel, product, machine.profile);
  Product item = product;
  item.m = item_m;
  item.n = item_n;
  item.rs_partial = RoundUp(item_n, kernel.nr);
  const std::optional<Scored> best = Fastest(schedule, kernel, item, *costs, machine.profile);
  return best ? std::optional(best->schedule) : std::nullopt;
}

std::optional<Split> FastestSplit(const Schedule& schedule, const KernelInfo& kernel, const Product& x, int64_t most,
                                  int64_t threads, const Machine& machine) {
  std::optional<Costs> costs = CostsHere(kernel, machine);
  if (!costs) return std::nullopt;
  if (most < 2) return Split{};
  const Profile& profile = machine.profile;
  costs->core = Met(costs->core, kernel, x, profile);
  const double claim = ClaimNs(profile);
  // Packing costs so much more that columns are cut in any case.
  const double shared_rows = PacksB(schedule) ? 0 : SharedRowNs(profile) * Real(x.m);

  Split best;
  double best_ns = std::numeric_limits<double>::infinity();
  for (const Split& split : EvenSplits(kernel, x, most, threads)) {
    Product item = x;
    item.batch = CeilDiv(x.batch, split.products);
    item.m = std::min(x.m, ItemRows(kernel, x, split));
    item.n = std::min(x.n, ItemColumns(kernel, x, split));
    item.rs_partial = RoundUp(item.n, kernel.nr);
    const Schedule filled = ChooseBlocks(schedule, kernel, item, item.m, item.n, machine);
    const double largest = PredictedNs(CountCostsOfPart(filled, kernel, item, x, costs->core), costs->ns);
    const double average = largest * Real(x.batch) / Real(item.batch) * Real(x.m) / Real(item.m) * Real(x.n) /
                           Real(item.n) / Real(split.items());
    const double ns = TimeOfItems(average + claim, largest + claim, split.items(), threads, profile) +
                      Real(split.n - 1) * shared_rows;
    if (ns < best_ns) {
      best_ns = ns;
      best = split;
    }
  }
  return best;
}

}  // namespace jax_nano
