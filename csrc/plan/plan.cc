#include "plan/plan.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "plan/arithmetic.h"
#include "plan/registry.h"
#include "plan/search.h"

namespace jax_nano {
namespace {

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

// A contraction as a kernel's product and the loops around it.
struct Nest {
  Product product;
  std::vector<Loop> outer, k_outer;
  int64_t products = 1;        // of `outer` and the kernel's batch loop
  int64_t passes = 1;          // of `k_outer`
  bool transposed = false;     // C is a block of workspace, not the result
  int64_t out_rows_apart = 0;  // of a transposed nest: the result's stride along n

  int64_t all_k() const { return product.k * passes; }
};

// All but the kernel's batch loop, which is one of `outer` still.
Nest MakeNest(const Contraction& contraction) {
  Nest nest;
  std::vector<Loop> m = contraction.m, n = contraction.n, k = contraction.k;
  const Loop inner_m = TakeLargest(m);
  const Loop inner_k = TakeLargest(k);
  Loop inner_n = {1, 0, 0, 1};
  if (!n.empty()) {  // the only one that C's unit stride allows
    inner_n = n.back();
    n.pop_back();
  }
  nest.k_outer = std::move(k);
  nest.outer = contraction.batch;
  nest.outer.insert(nest.outer.end(), m.begin(), m.end());
  nest.outer.insert(nest.outer.end(), n.begin(), n.end());
  std::stable_sort(nest.outer.begin(), nest.outer.end(), [](const Loop& x, const Loop& y) { return x.c > y.c; });
  for (const Loop& loop : nest.outer) nest.products *= loop.size;
  for (const Loop& loop : nest.k_outer) nest.passes *= loop.size;

  Product& x = nest.product;
  x.m = inner_m.size;
  x.n = inner_n.size;
  x.k = inner_k.size;
  x.rsa = inner_m.a;
  x.csa = inner_k.size > 1 ? inner_k.a : 1;
  x.rsb = inner_k.b;
  x.csb = inner_n.size > 1 ? inner_n.b : 1;
  x.rsc = contraction.transposed ? inner_n.size : inner_m.c;
  x.accumulates = nest.passes > 1;
  nest.transposed = contraction.transposed;
  nest.out_rows_apart = contraction.transposed ? inner_n.c : 0;
  return nest;
}

// Completes the product: k in so many slices, and a batch loop inside the kernel, where partial sums allow it. There is
// room for those of one product only: of a slice of k, or of a kernel with a narrow C until its last pass; or all of a
// product's sums are transposed at the end.
void TakeBatch(const KernelInfo& kernel, int64_t split_k, Nest& nest) {
  const bool one_by_one = split_k > 1 || nest.transposed || (kernel.narrow_out && !nest.k_outer.empty());
  const Loop batch = one_by_one ? Loop{1, 0, 0, 0} : TakeLargest(nest.outer);
  nest.product.batch = batch.size;
  nest.product.bsa = batch.a;
  nest.product.bsb = batch.b;
  nest.product.bsc = batch.c;
  nest.product.unfinished = nest.passes > 1 || split_k > 1;
}

// All products as the batch of one, wherever they lie.
Product WholeProduct(const Nest& nest) {
  Product x = nest.product;
  x.batch = nest.products;
  x.bsa = x.m * x.k;
  x.bsb = x.n * x.k;
  return x;
}

// The largest item, with room for its partial sums.
Product LargestItem(const KernelInfo& kernel, const Product& product, const Choice& choice) {
  Product item = product;
  item.rs_partial = ItemColumns(kernel, product, choice.split);
  item.m = std::min(product.m, ItemRows(kernel, product, choice.split));
  item.n = std::min(product.n, item.rs_partial);
  return item;
}

// Why a choice is illegal, "" if it is not. Reasons of the schedule are Validate's.
std::string WhyIllegal(const KernelInfo& kernel, const Nest& nest, const Choice& choice) {
  const Product& x = nest.product;
  const Split& split = choice.split;
  const auto between = [](int64_t parts, int64_t most) { return parts >= 1 && parts <= std::max(most, int64_t{1}); };
  if (!between(split.products, nest.products) || !between(split.m, CeilDiv(x.m, kernel.mr)) ||
      !between(split.n, CeilDiv(x.n, kernel.nr))) {
    return "split must be at least 1 and at most the number of products, of mr in m and of nr in n";
  }
  if (const std::string why = Validate(choice.schedule, kernel, LargestItem(kernel, x, choice)); !why.empty()) {
    return why;
  }
  if (nest.transposed && choice.split_k != 1) return "split_k must be 1 if C is transposed";
  if (choice.split_k_unit < 1 || choice.split_k_unit % kernel.kr != 0) return "split_k_unit must be a multiple of kr";
  if (!between(choice.split_k, CeilDiv(x.k, choice.split_k_unit))) {
    return "split_k must be at least 1 and at most the number of units in k";
  }
  return "";
}

// The plan of a legal choice.
Plan Assemble(const Contraction& contraction, const KernelInfo& kernel, Nest nest, const Choice& choice,
              const Profile& profile) {
  Plan plan;
  plan.kernel = &kernel;
  plan.swapped = contraction.swapped;
  plan.transposed = nest.transposed;
  plan.out_rows_apart = nest.out_rows_apart;
  plan.a_bytes = ElementBytes(kernel.lhs);
  plan.b_bytes = ElementBytes(kernel.rhs);
  plan.c_bytes = ElementBytes(kernel.out);

  plan.product = nest.product;
  plan.schedule = choice.schedule;
  plan.products = nest.products;
  plan.divisible = WorthSplitting(nest.product, nest.products, nest.all_k(), profile);
  plan.expected = std::chrono::nanoseconds(ExpectedNs(nest.product, nest.products, nest.all_k(), profile));
  plan.outer = std::move(nest.outer);
  plan.k_outer = std::move(nest.k_outer);

  plan.split = choice.split;
  plan.split_k = {choice.split_k, choice.split_k_unit};
  Product& x = plan.product;
  if (choice.split_k > 1) {
    plan.split_k.row_stride = RoundUp(x.n, kernel.nr);
    plan.split_k.slice_bytes = PartialBytes(kernel, RoundUp(x.m, kernel.mr), plan.split_k.row_stride);
  } else if (NeedsPartialSums(choice.schedule, kernel, x)) {
    x.rs_partial = ItemColumns(kernel, x, choice.split);
  }
  plan.args = Arguments(plan.schedule, x);
  plan.a_pack_bytes = PackedABytes(plan.schedule, kernel, x);
  plan.b_pack_bytes = PackedBBytes(plan.schedule, kernel, x);
  const int64_t item_rows = ItemRows(kernel, x, choice.split);
  plan.partial_bytes = nest.transposed ? PartialBytes(kernel, item_rows, ItemColumns(kernel, x, choice.split))
                                       : PartialBytes(kernel, item_rows, x.rs_partial);
  plan.one_call = plan.items() == 1 && plan.outer.empty() && plan.k_outer.empty() && !plan.transposed;
  return plan;
}

// Takes the kernel that was composed for this product, if there is one that can compute the plan's parts of it.
void Specialize(const Contraction& contraction, const SpecializedKernels& kernels, bool epilogue,
                const Machine& machine, Plan& plan) {
  const SpecializedKernel* const found = kernels.Find(plan, epilogue);
  if (found == nullptr) return;
  Plan specialized;
  const Choice choice = {found->schedule, plan.split, 1, plan.split_k.unit};
  if (!MakePlan(contraction, found->kernel, choice, machine.profile, specialized).empty()) return;
  plan = std::move(specialized);
  plan.specialized = found;
}

// The plan of a result without elements.
Plan EmptyPlan(const Contraction& contraction, const KernelInfo& kernel) {
  Plan plan;
  plan.kernel = &kernel;
  plan.swapped = contraction.swapped;
  plan.empty = true;
  plan.a_bytes = ElementBytes(kernel.lhs);
  plan.b_bytes = ElementBytes(kernel.rhs);
  plan.c_bytes = ElementBytes(kernel.out);
  return plan;
}

}  // namespace

Plan MakePlan(const Contraction& contraction, const KernelInfo& kernel, int64_t threads, const Machine& machine) {
  if (contraction.empty) return EmptyPlan(contraction, kernel);
  const Profile& profile = machine.profile;
  Nest nest = MakeNest(contraction);
  const Product& x = nest.product;
  const int64_t all_k = nest.all_k();

  Choice choice;
  // Known costs decide; else thresholds.
  std::optional<Schedule> fastest;
  if (!PairsPay(kernel, x)) fastest = FastestOrderOfSums(kernel, WholeProduct(nest), machine);
  choice.schedule = fastest ? *fastest : ChooseOrderOfSums(kernel, x, profile);
  choice.split_k_unit = SplitKUnit(choice.schedule, profile);
  choice.split_k = nest.transposed ? 1 : ChooseSplitK(choice.schedule, kernel, x, nest.products, nest.passes, profile);
  TakeBatch(kernel, choice.split_k, nest);
  // Slices of k occupy threads too. A pass over an outer contracting dimension is not worth one, but is work.
  const int64_t threads_of_a_slice = CeilDiv(threads, choice.split_k);
  const int64_t most = MostItems(choice.schedule, kernel, x, nest.products, all_k, threads_of_a_slice, profile);
  Product whole = WholeProduct(nest);
  whole.k = CeilDiv(whole.k, choice.split_k);
  const std::optional<Split> split = FastestSplit(choice.schedule, kernel, whole, most, threads_of_a_slice, machine);
  choice.split =
      split ? *split : ChooseSplit(choice.schedule, kernel, x, nest.products, all_k, threads_of_a_slice, most, profile);
  if (nest.transposed || (choice.split_k == 1 && NeedsPartialSums(choice.schedule, kernel, x))) {
    choice.split = SplitForPartialSums(kernel, x, choice.split, kMaxPartialBytes);
  }
  const Product item = LargestItem(kernel, x, choice);
  const std::optional<Schedule> blocks = FastestBlocks(choice.schedule, kernel, x, item.m, item.n, machine);
  choice.schedule = blocks ? *blocks : ChooseBlocks(choice.schedule, kernel, x, item.m, item.n, machine);
  if (const std::string why = WhyIllegal(kernel, nest, choice); !why.empty()) {
    throw std::logic_error("jax_nano planned what its kernel " + std::string(kernel.name) + " cannot run: " + why);
  }
  return Assemble(contraction, kernel, std::move(nest), choice, profile);
}

std::vector<Scored> ConsideredOrders(const Contraction& contraction, const KernelInfo& kernel, const Machine& machine) {
  if (contraction.empty) return {};
  const Nest nest = MakeNest(contraction);
  std::vector<Scored> orders = OrdersOfSums(kernel, WholeProduct(nest), machine);
  for (Scored& x : orders) x.ns *= Real(nest.passes);
  return orders;
}

bool MayTranspose(const Contraction& contraction, const KernelInfo& kernel) {
  const bool either_role = kernel.direct_a && kernel.direct_b && std::string_view(kernel.lhs) == kernel.rhs;
  return contraction.m.size() == 1 && contraction.n.size() == 1 && either_role && !kernel.narrow_out;
}

Plan MakePlan(const Operand& lhs, const Operand& rhs, const Operand& out, std::string_view algorithm,
              std::span<const Target* const> targets, int64_t threads, const Machine& machine, const Finish& finish) {
  const Contraction contraction = Analyze(lhs, rhs, out, finish.bias);
  const Operand &a = contraction.swapped ? rhs : lhs, &b = contraction.swapped ? lhs : rhs;
  const auto select = [&](bool direct_b) {
    return SelectKernel(targets, a.dtype, b.dtype, out.dtype, algorithm, direct_b);
  };
  const KernelInfo* kernel = select(false);
  if (kernel == nullptr) {
    throw std::invalid_argument("jax_nano has no kernel on this machine for " + Describe(lhs) + ", " + Describe(rhs) +
                                " -> " + Describe(out) + ", algorithm " + std::string(algorithm));
  }
  if (MayTranspose(contraction, *kernel) && PrefersTransposed(MakeNest(contraction).product, machine.profile)) {
    return MakePlan(Transposed(contraction), *kernel, threads, machine);
  }
  Plan plan = MakePlan(contraction, *kernel, threads, machine);
  if (!plan.empty && PrefersDirectKernel(plan.schedule, *kernel, plan.product, machine.profile)) {
    const KernelInfo* direct = select(true);
    if (direct != nullptr && direct != kernel) plan = MakePlan(contraction, *direct, threads, machine);
  }
  if (machine.specialized != nullptr) Specialize(contraction, *machine.specialized, finish.epilogue, machine, plan);
  return plan;
}

std::string MakePlan(const Contraction& contraction, const KernelInfo& kernel, const Choice& choice,
                     const Profile& profile, Plan& plan) {
  if (contraction.empty) {
    plan = EmptyPlan(contraction, kernel);
    return "";
  }
  Nest nest = MakeNest(contraction);
  TakeBatch(kernel, choice.split_k, nest);
  if (const std::string why = WhyIllegal(kernel, nest, choice); !why.empty()) return why;
  constexpr double kMostItems = std::numeric_limits<int32_t>::max();
  const Split& split = choice.split;
  if (Real(split.products) * Real(split.m) * Real(split.n) * Real(choice.split_k) > kMostItems) {
    return "more than 2^31 items";
  }
  plan = Assemble(contraction, kernel, std::move(nest), choice, profile);
  if (plan.workspace_bytes() > kMaxWorkspaceBytes || plan.shared_bytes() > kMaxWorkspaceBytes) {
    return "more workspace than the " + std::to_string(kMaxWorkspaceBytes >> 20) + " MiB that a plan may take";
  }
  return "";
}

Choice ChoiceOf(const Plan& plan) { return {plan.schedule, plan.split, plan.split_k.slices, plan.split_k.unit}; }

}  // namespace jax_nano
