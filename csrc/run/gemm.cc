#include "run/gemm.h"

#include <algorithm>
#include <string_view>

#include "plan/registry.h"
#include "run/workspace.h"

namespace jax_nano {
namespace {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `i` of `parts` of [0, total), cut at multiples of `unit`, sizes differing by one unit at most.
Range Part(int64_t total, int64_t unit, int64_t parts, int64_t i) {
  const int64_t units = (total + unit - 1) / unit;
  const int64_t base = units / parts, extra = units % parts;
  const auto edge = [&](int64_t j) { return std::min(total, (base * j + std::min(j, extra)) * unit); };
  return {edge(i), edge(i + 1)};
}

// Element offsets of one point of a loop nest.
struct Offsets {
  int64_t a = 0, b = 0, c = 0;
};

Offsets PointAt(const std::vector<Loop>& loops, int64_t index) {
  Offsets at;
  for (auto loop = loops.rbegin(); loop != loops.rend(); ++loop) {
    const int64_t i = index % loop->size;
    index /= loop->size;
    at.a += i * loop->a;
    at.b += i * loop->b;
    at.c += i * loop->c;
  }
  return at;
}

template <typename T>
T* Advance(T* base, int64_t elements, int64_t element_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(base) + elements * element_bytes;
}

// All passes over the outer contracting dimensions for one kernel call; the first one stores, the others add.
void RunPasses(const Plan& plan, GemmArgs& args, const void* a, const void* b) {
  int64_t passes = 1;
  for (const Loop& loop : plan.k_outer) passes *= loop.size;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const Offsets at = PointAt(plan.k_outer, pass);
    args.a = Advance(a, at.a, plan.a_bytes);
    args.b = Advance(b, at.b, plan.b_bytes);
    args.accumulate = pass > 0;
    args.more = plan.split_k.slices > 1 || pass + 1 < passes;
    plan.kernel->fn(&args);
  }
}

// Gives the arguments this thread's workspace.
void TakeWorkspace(GemmArgs& args, int64_t a_pack_bytes, int64_t b_pack_bytes, int64_t partial_bytes) {
  args.a_pack = Workspace(a_pack_bytes + b_pack_bytes + partial_bytes);
  args.b_pack = static_cast<char*>(args.a_pack) + a_pack_bytes;
  args.partial = static_cast<char*>(args.b_pack) + b_pack_bytes;
}

// Where the sums of one slice of k of one product are.
void* SliceAt(const Plan& plan, void* slices, int64_t product, int64_t slice) {
  return Advance(slices, product * plan.split_k.slices + slice, plan.split_k.slice_bytes);
}

// to = x + y, rows of n elements. Integers wrap around, as the kernels' do.
template <typename T>
void AddRows(int64_t m, int64_t n, const void* x, const void* y, int64_t rs, void* to, int64_t rs_to) {
  for (int64_t i = 0; i < m; ++i) {
    const T* xs = static_cast<const T*>(x) + i * rs;
    const T* ys = static_cast<const T*>(y) + i * rs;
    T* sum = static_cast<T*>(to) + i * rs_to;
    for (int64_t j = 0; j < n; ++j) sum[j] = xs[j] + ys[j];
  }
}

// to = the transpose of m x n elements.
template <typename T>
void TransposeRows(int64_t m, int64_t n, const void* from, int64_t rs, void* to, int64_t rs_to) {
  for (int64_t j = 0; j < n; ++j) {
    const T* column = static_cast<const T*>(from) + j;
    T* row = static_cast<T*>(to) + j * rs_to;
    for (int64_t i = 0; i < m; ++i) row[i] = column[i * rs];
  }
}

// Of a plan that computes C^T: writes C from an item's block of workspace, and finishes it, which is done on C as it
// lies, as sums over an empty k that are added to it.
void StoreTransposed(const Plan& plan, const GemmArgs& block, void* out, const Epilogue* epilogue) {
  const bool wide = plan.c_bytes == 8;
  (wide ? TransposeRows<uint64_t> : TransposeRows<uint32_t>)(block.m, block.n, block.c, block.rsc, out,
                                                             plan.out_rows_apart);
  if (epilogue == nullptr) return;
  const KernelInfo& kernel = *plan.kernel;
  Product product;
  product.m = block.n;
  product.n = block.m;
  product.rsc = plan.out_rows_apart;
  GemmArgs args =
      Arguments(Blocked{.mc = kernel.mr, .kc = kernel.kr, .nc = kernel.nr, .tile_rows = kernel.mr}, product);
  args.a = block.a;
  args.b = block.b;
  args.c = out;
  args.accumulate = 1;
  args.epilogue = epilogue;
  kernel.fn(&args);
}

auto* AdderOf(const KernelInfo& kernel) {
  return WithAdderOf(kernel.acc, [](auto zero) { return &AddRows<decltype(zero)>; });
}

}  // namespace

void RunItem(const Plan& plan, const Buffers& buffers, void* slices, int64_t item) {
  const Split& split = plan.split;
  const SplitK& split_k = plan.split_k;
  const KernelInfo& kernel = *plan.kernel;
  const Range n = Part(plan.args.n, kernel.nr, split.n, item % split.n);
  const Range m = Part(plan.args.m, kernel.mr, split.m, item / split.n % split.m);
  const int64_t slice = item / split.n / split.m % split_k.slices;
  const Range k = Part(plan.args.k, split_k.unit, split_k.slices, slice);
  const Range products = Part(plan.products, 1, split.products, item / split.n / split.m / split_k.slices);

  GemmArgs args = plan.args;
  TakeWorkspace(args, plan.a_pack_bytes, plan.b_pack_bytes, plan.partial_bytes);
  args.m = m.size();
  args.n = n.size();
  args.k = k.size();
  Epilogue epilogue;
  if (buffers.epilogue != nullptr && slices == nullptr) {
    epilogue = *buffers.epilogue;
    const int64_t column = plan.transposed ? m.begin : n.begin;
    if (epilogue.bias != nullptr) epilogue.bias = Advance(epilogue.bias, column, plan.c_bytes);
    if (!plan.transposed) args.epilogue = &epilogue;
  }
  const void* a = plan.swapped ? buffers.rhs : buffers.lhs;
  const void* b = plan.swapped ? buffers.lhs : buffers.rhs;
  // Products are numbered with the kernel's own batch loop innermost; a range may begin and end inside it.
  for (int64_t p = products.begin; p < products.end; p += args.batch) {
    const int64_t first = p % plan.args.batch;
    args.batch = std::min(plan.args.batch - first, products.end - p);
    Offsets at = PointAt(plan.outer, p / plan.args.batch);
    at.a += first * args.bsa + m.begin * args.rsa + k.begin * args.csa;
    at.b += first * args.bsb + n.begin * args.csb + k.begin * args.rsb;
    at.c += first * args.bsc + m.begin * plan.args.rsc + n.begin;
    args.c = Advance(buffers.out, at.c, plan.c_bytes);
    if (plan.transposed) {
      args.c = args.partial;
      args.rsc = n.size();
    }
    if (slices != nullptr) {
      // A kernel leaves unfinished sums in `partial`, or in C if that is wide enough.
      void*& to = kernel.narrow_out ? args.partial : args.c;
      (kernel.narrow_out ? args.rs_partial : args.rsc) = split_k.row_stride;
      to = Advance(SliceAt(plan, slices, p, slice), m.begin * split_k.row_stride + n.begin, ElementBytes(kernel.acc));
    }
    RunPasses(plan, args, Advance(a, at.a, plan.a_bytes), Advance(b, at.b, plan.b_bytes));
    if (plan.transposed) {
      const int64_t first_of_p = PointAt(plan.outer, p).c + n.begin * plan.out_rows_apart + m.begin;
      StoreTransposed(plan, args, Advance(buffers.out, first_of_p, plan.c_bytes),
                      buffers.epilogue != nullptr ? &epilogue : nullptr);
    }
  }
}

void RunOneCall(const Plan& plan, GemmArgs& args, const Buffers& buffers) {
  if (plan.workspace_bytes() > 0) TakeWorkspace(args, plan.a_pack_bytes, plan.b_pack_bytes, plan.partial_bytes);
  args.a = plan.swapped ? buffers.rhs : buffers.lhs;
  args.b = plan.swapped ? buffers.lhs : buffers.rhs;
  args.c = buffers.out;
  args.epilogue = buffers.epilogue;
  plan.kernel->fn(&args);
}

void RunAlone(const Plan& plan, const Buffers& buffers) {
  if (plan.empty) return;
  if (plan.one_call) {
    GemmArgs args = plan.args;
    return RunOneCall(plan, args, buffers);
  }
  void* const slices = SharedWorkspace(plan.shared_bytes());
  for (int64_t item = 0; item < plan.items(); ++item) RunItem(plan, buffers, slices, item);
  if (plan.split_k.slices > 1) ReduceSlices(plan, buffers, slices);
}

void ReduceSlices(const Plan& plan, const Buffers& buffers, void* slices) {
  const KernelInfo& kernel = *plan.kernel;
  const auto add = AdderOf(kernel);
  const int64_t m = plan.args.m, n = plan.args.n, count = plan.split_k.slices, rs = plan.split_k.row_stride;
  // The kernel finishes the sums (rounds them, applies the epilogue) by adding products over an empty k to them.
  Product product = plan.product;
  product.k = product.rsa = 0;
  product.csa = product.csb = 1;
  product.rs_partial = rs;
  const Schedule schedule = Blocked{.pack_a = !kernel.direct_a,
                                    .pack_b = !kernel.direct_b,
                                    .mc = kernel.mr,
                                    .kc = kernel.kr,
                                    .nc = kernel.nr,
                                    .tile_rows = kernel.mr};
  GemmArgs args = Arguments(schedule, product);
  args.accumulate = 1;
  args.epilogue = buffers.epilogue;
  TakeWorkspace(args, PackedABytes(schedule, kernel, product), PackedBBytes(schedule, kernel, product), 0);
  for (int64_t p = 0; p < plan.products; ++p) {
    args.c = Advance(buffers.out, PointAt(plan.outer, p).c, plan.c_bytes);
    const auto slice = [&](int64_t i) { return SliceAt(plan, slices, p, i); };
    // Pairwise, so that errors grow with the logarithm of the number of slices.
    int64_t step = 1;
    for (; 2 * step < count; step *= 2) {
      for (int64_t i = 0; i + step < count; i += 2 * step) add(m, n, slice(i), slice(i + step), rs, slice(i), rs);
    }
    args.partial = slice(0);
    void* const sums = kernel.narrow_out ? args.partial : args.c;
    add(m, n, slice(0), slice(step), rs, sums, kernel.narrow_out ? rs : args.rsc);
    if (kernel.narrow_out || args.epilogue != nullptr) kernel.fn(&args);
  }
}

}  // namespace jax_nano
