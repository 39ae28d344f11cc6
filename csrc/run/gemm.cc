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

// Piece `i` of `pieces` of [0, total), cut at multiples of `unit`, sizes differing by one unit at most.
Range Piece(int64_t total, int64_t unit, int64_t pieces, int64_t i) {
  const int64_t units = (total + unit - 1) / unit;
  const int64_t base = units / pieces, extra = units % pieces;
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
    args.more = plan.k_pieces > 1 || pass + 1 < passes;
    plan.kernel->fn(&args);
  }
}

// Gives the arguments this thread's workspace.
void TakeWorkspace(GemmArgs& args, int64_t a_pack_bytes, int64_t b_pack_bytes, int64_t partial_bytes) {
  args.a_pack = Workspace(a_pack_bytes + b_pack_bytes + partial_bytes);
  args.b_pack = static_cast<char*>(args.a_pack) + a_pack_bytes;
  args.partial = static_cast<char*>(args.b_pack) + b_pack_bytes;
}

void* SumsOf(const Plan& plan, void* sums, int64_t product, int64_t piece) {
  return Advance(sums, product * plan.k_pieces + piece, plan.sums_bytes);
}

// to = x + y, rows of n elements. Integers wrap around, as the kernels' do.
template <typename T>
void AddRows(int64_t m, int64_t n, const void* x, const void* y, int64_t rs_sums, void* to, int64_t rs_to) {
  for (int64_t i = 0; i < m; ++i) {
    const T* xs = static_cast<const T*>(x) + i * rs_sums;
    const T* ys = static_cast<const T*>(y) + i * rs_sums;
    T* sum = static_cast<T*>(to) + i * rs_to;
    for (int64_t j = 0; j < n; ++j) sum[j] = xs[j] + ys[j];
  }
}

auto* AdderOf(const KernelInfo& kernel) {
  return WithAdderOf(kernel.acc, [](auto zero) { return &AddRows<decltype(zero)>; });
}

}  // namespace

void RunItem(const Plan& plan, const Buffers& buffers, void* sums, int64_t item) {
  const Split& split = plan.split;
  const KernelInfo& kernel = *plan.kernel;
  const Range n = Piece(plan.args.n, kernel.nr, split.n, item % split.n);
  const Range m = Piece(plan.args.m, kernel.mr, split.m, item / split.n % split.m);
  const int64_t piece = item / split.n / split.m % plan.k_pieces;
  const Range k = Piece(plan.args.k, plan.k_unit, plan.k_pieces, piece);
  const Range products = Piece(plan.products, 1, split.products, item / split.n / split.m / plan.k_pieces);

  GemmArgs args = plan.args;
  TakeWorkspace(args, plan.a_pack_bytes, plan.b_pack_bytes, plan.partial_bytes);
  args.m = m.size();
  args.n = n.size();
  args.k = k.size();
  Epilogue epilogue;
  if (buffers.epilogue != nullptr && sums == nullptr) {
    epilogue = *buffers.epilogue;
    if (epilogue.bias != nullptr) epilogue.bias = Advance(epilogue.bias, n.begin, plan.c_bytes);
    args.epilogue = &epilogue;
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
    if (sums != nullptr) {
      // A kernel that is not narrow leaves unfinished sums in C.
      void*& to = kernel.narrow ? args.partial : args.c;
      (kernel.narrow ? args.rs_partial : args.rsc) = plan.rs_sums;
      to = Advance(SumsOf(plan, sums, p, piece), m.begin * plan.rs_sums + n.begin, ElementBytes(kernel.acc));
    }
    RunPasses(plan, args, Advance(a, at.a, plan.a_bytes), Advance(b, at.b, plan.b_bytes));
  }
}

void AddPieces(const Plan& plan, const Buffers& buffers, void* sums) {
  const KernelInfo& kernel = *plan.kernel;
  const auto add = AdderOf(kernel);
  const int64_t m = plan.args.m, n = plan.args.n, rs = plan.rs_sums;
  // The kernel adds products over an empty k to the sums, and so finishes them.
  GemmArgs args = plan.args;
  args.k = args.inner = args.sweep = 0;
  args.csb = 1;
  args.pack_a = !kernel.direct_a;
  args.pack_b = !kernel.direct_b;
  args.mc = args.panel = kernel.mr;
  args.kc = kernel.kr;
  args.nc = kernel.nr;
  args.accumulate = 1;
  args.epilogue = buffers.epilogue;
  args.rs_partial = rs;
  TakeWorkspace(args, PackedABytes(kernel, args), PackedBBytes(kernel, args), 0);
  for (int64_t p = 0; p < plan.products; ++p) {
    args.c = Advance(buffers.out, PointAt(plan.outer, p).c, plan.c_bytes);
    const auto piece = [&](int64_t i) { return SumsOf(plan, sums, p, i); };
    // Neighbours first, so that errors grow with the logarithm of the number of pieces.
    int64_t step = 1;
    for (; 2 * step < plan.k_pieces; step *= 2) {
      for (int64_t i = 0; i + step < plan.k_pieces; i += 2 * step)
        add(m, n, piece(i), piece(i + step), rs, piece(i), rs);
    }
    args.partial = piece(0);
    void* const whole = kernel.narrow ? args.partial : args.c;
    add(m, n, piece(0), piece(step), rs, whole, kernel.narrow ? rs : args.rsc);
    if (kernel.narrow || args.epilogue != nullptr) kernel.fn(&args);
  }
}

}  // namespace jax_nano
