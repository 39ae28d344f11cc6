#include "plan/schedule.h"

#include <limits>

#include "plan/arithmetic.h"
#include "plan/registry.h"

namespace jax_nano {
namespace {

constexpr int64_t kLineBytes = 64;

// Whether a product of sizes is too large for anything in memory, and would overflow in the sums below.
bool IsHuge(int64_t x, int64_t y, int64_t bytes) {
  return Real(x) * Real(y) * Real(bytes) > Real(std::numeric_limits<int64_t>::max() / 16);
}

std::string Why(const Blocked& x, const KernelInfo& kernel, const Product& product) {
  if (x.mc <= 0 || x.kc <= 0 || x.nc <= 0 || x.tile_rows <= 0) return "mc, kc, nc and tile_rows must be positive";
  if (!x.pack_a && !ReadsA(kernel, product)) return "this kernel needs pack_a";
  if (!x.pack_b && !kernel.direct_b) return "this kernel needs pack_b";
  if (!x.pack_b && product.csb != 1) return "csb must be 1 unless pack_b";
  // Packed A whose rows lie in the order of the source (csa == 1) may have any number of them.
  if (x.tile_rows > kernel.mr || (x.tile_rows < kernel.mr && x.pack_a && product.csa != 1)) {
    return "tile_rows must not be above mr, nor below it with pack_a unless csa is 1";
  }
  if ((x.mc > x.tile_rows && x.mc % x.tile_rows != 0) || x.kc % kernel.kr != 0 || x.nc % kernel.nr != 0) {
    return "mc, kc, nc must be multiples of tile_rows, kr, nr, or mc below tile_rows";
  }
  if ((x.pack_a && IsHuge(x.mc, x.kc, kernel.a_panel_bytes)) ||
      (x.pack_b && IsHuge(x.nc, x.kc, kernel.b_panel_bytes))) {
    return "packed blocks are larger than the address space";
  }
  return "";
}

std::string Why(const InnerProduct& x, const KernelInfo& kernel, const Product& product) {
  if (!kernel.inner) return "this kernel has no inner-product path";
  if ((product.csa != 1 && !x.pack_a) || (product.rsb != 1 && !x.pack_b)) {
    return "csa and rsb must be 1 for the inner-product path, unless pack_a and pack_b";
  }
  // It stores what it has summed: C as wide as the accumulator may be added to others' later, but holds nothing before.
  if (product.accumulates || (product.unfinished && (kernel.narrow_out || product.epilogue))) {
    return "the inner-product path takes the whole of k";
  }
  return "";
}

std::string Why(const Sweep&, const KernelInfo& kernel, const Product& product) {
  if (!kernel.sweep) return "this kernel has no sweep path";
  if (product.csb != 1) return "csb must be 1 for the sweep path";
  return "";
}

}  // namespace

std::string Validate(const Schedule& schedule, const KernelInfo& kernel, const Product& product) {
  if (product.m < 0 || product.n < 0 || product.k < 0 || product.batch < 0) return "sizes must not be negative";
  if (product.epilogue && !kernel.epilogue) return "this kernel has no epilogue";
  if (std::string why = std::visit([&](const auto& path) { return Why(path, kernel, product); }, schedule);
      !why.empty()) {
    return why;
  }
  if (NeedsPartialSums(schedule, kernel, product) && product.rs_partial < RoundUp(product.n, kernel.nr)) {
    return "rs_partial must be at least n rounded up to nr";
  }
  return "";
}

bool PacksB(const Schedule& schedule) {
  if (const auto* blocked = std::get_if<Blocked>(&schedule)) return blocked->pack_b;
  const auto* inner = std::get_if<InnerProduct>(&schedule);
  return inner != nullptr && inner->pack_b;
}

bool ReadsA(const KernelInfo& kernel, const Product& x) {
  return kernel.direct_a && (kernel.kr == 1 || (x.csa == 1 && x.k % kernel.kr == 0 && x.rsa % kernel.kr == 0));
}

bool NeedsPartialSums(const Schedule& schedule, const KernelInfo& kernel, const Product& product) {
  if (!kernel.narrow_out) return false;
  const auto* blocked = std::get_if<Blocked>(&schedule);
  return product.accumulates || product.unfinished || std::holds_alternative<Sweep>(schedule) ||
         (blocked != nullptr && product.k > blocked->kc);
}

int64_t PackedARow(const KernelInfo& kernel, int64_t kc) {
  return (CeilDiv(kc * kernel.a_panel_bytes, kLineBytes) | 1) * kLineBytes;
}

int64_t PackedABytes(const Schedule& schedule, const KernelInfo& kernel, const Product& product) {
  if (const auto* x = std::get_if<Blocked>(&schedule)) {
    // Where columns are contiguous, a panel is packed a column at a time and has room for all rows of a tile.
    return x->pack_a ? RoundUp(x->mc, x->tile_rows) * PackedARow(kernel, x->kc) + kPackSlackBytes : 0;
  }
  const auto* x = std::get_if<InnerProduct>(&schedule);
  const bool copies = x != nullptr && x->pack_a;
  return copies ? RoundUp(product.m * product.k * ElementBytes(kernel.lhs), kLineBytes) : 0;
}

int64_t PackedBBytes(const Schedule& schedule, const KernelInfo& kernel, const Product& product) {
  if (const auto* x = std::get_if<Blocked>(&schedule)) {
    const int64_t column = x->kc * kernel.b_panel_bytes + kernel.b_header_bytes;
    return x->pack_b ? RoundUp(x->nc * column, kLineBytes) + kPackSlackBytes : 0;
  }
  const auto* x = std::get_if<InnerProduct>(&schedule);
  const bool copies = x != nullptr && x->pack_b;
  return copies ? RoundUp(product.n * product.k * ElementBytes(kernel.rhs), kLineBytes) : 0;
}

int64_t PartialBytes(const KernelInfo& kernel, int64_t m, int64_t rs_partial) {
  return RoundUp(m * rs_partial * ElementBytes(kernel.acc), kLineBytes);
}

GemmArgs Arguments(const Schedule& schedule, const Product& product) {
  GemmArgs args = {};
  args.m = product.m;
  args.n = product.n;
  args.k = product.k;
  args.rsa = product.rsa;
  args.csa = product.csa;
  args.rsb = product.rsb;
  args.csb = product.csb;
  args.rsc = product.rsc;
  args.batch = product.batch;
  args.bsa = product.bsa;
  args.bsb = product.bsb;
  args.bsc = product.bsc;
  args.rs_partial = product.rs_partial;
  if (const auto* blocked = std::get_if<Blocked>(&schedule)) {
    args.pack_a = blocked->pack_a;
    args.pack_b = blocked->pack_b;
    args.mc = blocked->mc;
    args.kc = blocked->kc;
    args.nc = blocked->nc;
    args.tile_rows = blocked->tile_rows;
  } else if (const auto* inner = std::get_if<InnerProduct>(&schedule)) {
    args.inner = 1;
    args.pack_a = inner->pack_a;
    args.pack_b = inner->pack_b;
    args.prefetch = inner->prefetch;
  } else {
    args.sweep = 1;
    args.prefetch = std::get<Sweep>(schedule).prefetch;
  }
  return args;
}

}  // namespace jax_nano
