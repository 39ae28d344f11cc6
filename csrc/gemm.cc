#include "gemm.h"

#include <algorithm>

#include "workspace.h"

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
    args.more = pass + 1 < passes;
    plan.kernel->fn(&args);
  }
}

}  // namespace

void RunItem(const Plan& plan, const Buffers& buffers, int64_t item) {
  const Split& split = plan.split;
  const KernelInfo& kernel = *plan.kernel;
  const Range n = Piece(plan.args.n, kernel.nr, split.n, item % split.n);
  const Range m = Piece(plan.args.m, kernel.mr, split.m, item / split.n % split.m);
  const Range products = Piece(plan.products, 1, split.products, item / split.n / split.m);

  GemmArgs args = plan.args;
  args.a_pack = Workspace(plan.a_pack_bytes + plan.b_pack_bytes + plan.partial_bytes);
  args.b_pack = static_cast<char*>(args.a_pack) + plan.a_pack_bytes;
  args.partial = static_cast<char*>(args.b_pack) + plan.b_pack_bytes;
  args.m = m.size();
  args.n = n.size();
  Epilogue epilogue;
  if (buffers.epilogue != nullptr) {
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
    at.a += first * args.bsa + m.begin * args.rsa;
    at.b += first * args.bsb + n.begin * args.csb;
    at.c += first * args.bsc + m.begin * args.rsc + n.begin;
    args.c = Advance(buffers.out, at.c, plan.c_bytes);
    RunPasses(plan, args, Advance(a, at.a, plan.a_bytes), Advance(b, at.b, plan.b_bytes));
  }
}

}  // namespace jax_nano
