#include "plan/contraction.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>

#include "plan/registry.h"

namespace jax_nano {
namespace {

std::string List(std::span<const int64_t> values) {
  std::string out;
  for (int64_t v : values) {
    if (!out.empty()) out += ',';
    out += std::to_string(v);
  }
  return out;
}

[[noreturn]] void Fail(const Operand& lhs, const Operand& rhs, const Operand& out, const std::string& what) {
  throw std::invalid_argument("jax_nano dot_general(" + Describe(lhs) + ", " + Describe(rhs) + ") -> " + Describe(out) +
                              ": " + what);
}

// Row-major strides; all zero if the array has no elements, where no stride is ever used.
// Nullopt if its size in bytes does not fit in 63 bits.
std::optional<std::vector<int64_t>> DenseStrides(const Operand& x) {
  std::vector<int64_t> strides(x.shape.size(), 0);
  if (std::find(x.shape.begin(), x.shape.end(), 0) != x.shape.end()) return strides;
  int64_t count = 1, bytes = 0;
  for (size_t i = x.shape.size(); i-- > 0;) {
    strides[i] = count;
    if (__builtin_mul_overflow(count, x.shape[i], &count)) return std::nullopt;
  }
  if (__builtin_mul_overflow(count, ElementBytes(x.dtype), &bytes)) return std::nullopt;
  return strides;
}

// An operand with its strides, searchable by label.
struct Strided {
  const Operand& x;
  std::vector<int64_t> strides;

  std::optional<size_t> Find(int64_t label) const {
    const auto it = std::find(x.labels.begin(), x.labels.end(), label);
    if (it == x.labels.end()) return std::nullopt;
    return static_cast<size_t>(it - x.labels.begin());
  }
  bool Has(int64_t label) const { return Find(label).has_value(); }
  int64_t Size(int64_t label) const { return x.shape[*Find(label)]; }
  int64_t Stride(int64_t label) const {
    const auto i = Find(label);
    return i ? strides[*i] : 0;
  }
};

std::string CheckOperand(const Operand& x) {
  if (x.labels.size() != x.shape.size()) {
    return std::to_string(x.labels.size()) + " labels for " + std::to_string(x.shape.size()) + " dimensions";
  }
  for (size_t i = 0; i < x.labels.size(); ++i) {
    if (x.shape[i] < 0) return "negative size";
    if (std::count(x.labels.begin(), x.labels.end(), x.labels[i]) > 1) {
      return "label " + std::to_string(x.labels[i]) + " repeated in one array";
    }
  }
  if (ElementBytes(x.dtype) == 0) return "dtype " + std::string(x.dtype) + " is not supported";
  return "";
}

std::string CheckLabels(const Strided& lhs, const Strided& rhs, const Strided& out) {
  for (const Strided* x : {&lhs, &rhs}) {
    const Strided& other = x == &lhs ? rhs : lhs;
    for (int64_t label : x->x.labels) {
      const std::string name = "label " + std::to_string(label);
      if (!other.Has(label) && !out.Has(label)) return name + " stands in one operand only";
      for (const Strided* y : {&other, &out}) {
        if (y->Has(label) && y->Size(label) != x->Size(label)) {
          return name + " has sizes " + std::to_string(x->Size(label)) + " and " + std::to_string(y->Size(label));
        }
      }
    }
  }
  for (int64_t label : out.x.labels) {
    if (!lhs.Has(label) && !rhs.Has(label)) {
      return "result label " + std::to_string(label) + " stands in no operand";
    }
  }
  return "";
}

// Whether A should be rhs, so that the unit stride of C lies on N, the dimension that vectors run along.
// With no N (or no M) of more than 1, C's stride does not matter and the matrix operand decides: along
// its free dimension it should have unit stride as B, or else it is A. Then nothing needs packing.
// Nullopt: C's last dimension is a batch dimension although there are M or N dimensions.
std::optional<bool> ChooseRoles(const Strided& lhs, const Strided& rhs, const Strided& out) {
  std::optional<int64_t> last;
  bool has_m = false, has_n = false;
  for (int64_t label : out.x.labels) {
    if (out.Size(label) == 1) continue;
    last = label;
    has_m |= !rhs.Has(label);
    has_n |= !lhs.Has(label);
  }
  if (!has_m && !has_n) return false;
  const bool last_in_lhs = lhs.Has(*last), last_in_rhs = rhs.Has(*last);
  if (last_in_lhs && last_in_rhs) return std::nullopt;
  if (has_m && has_n) return last_in_lhs;
  const bool as_b = (last_in_lhs ? lhs : rhs).Stride(*last) == 1;
  return last_in_lhs ? as_b : !as_b;
}

// Sorts by the given stride, outermost first, and merges neighbours that are one loop in every array.
// Dense arrays have distinct strides, so only neighbours can merge.
std::vector<Loop> Collapse(std::vector<Loop> loops, int64_t Loop::* stride) {
  std::stable_sort(loops.begin(), loops.end(), [&](const Loop& x, const Loop& y) { return x.*stride > y.*stride; });
  std::vector<Loop> out;
  for (const Loop& inner : loops) {
    if (!out.empty() && out.back().a == inner.a * inner.size && out.back().b == inner.b * inner.size &&
        out.back().c == inner.c * inner.size) {
      const int64_t size = out.back().size * inner.size;
      out.back() = {size, inner.a, inner.b, inner.c};
    } else {
      out.push_back(inner);
    }
  }
  return out;
}

}  // namespace

std::string Describe(std::string_view dtype, std::span<const int64_t> shape) {
  return std::string(dtype) + "[" + List(shape) + "]";
}

std::string Describe(const Operand& operand) {
  return Describe(operand.dtype, operand.shape) + "{" + List(operand.labels) + "}";
}

Contraction Analyze(const Operand& lhs, const Operand& rhs, const Operand& out, bool last_is_n) {
  std::vector<Strided> arrays;
  for (const Operand* x : {&lhs, &rhs, &out}) {
    if (const std::string what = CheckOperand(*x); !what.empty()) Fail(lhs, rhs, out, what);
    auto strides = DenseStrides(*x);
    if (!strides) Fail(lhs, rhs, out, "larger than the address space");
    arrays.push_back({*x, std::move(*strides)});
  }
  const Strided &l = arrays[0], &r = arrays[1], &o = arrays[2];
  if (const std::string what = CheckLabels(l, r, o); !what.empty()) Fail(lhs, rhs, out, what);

  const int64_t last = out.labels.empty() ? 0 : out.labels.back();
  if (last_is_n && (out.labels.empty() || (l.Has(last) && r.Has(last)))) {
    Fail(lhs, rhs, out, "a bias needs a last dimension of the result that is not a batch dimension");
  }

  Contraction result;
  if (std::find(out.shape.begin(), out.shape.end(), 0) != out.shape.end()) {
    result.empty = true;
    return result;
  }
  const std::optional<bool> swapped = last_is_n ? std::optional(l.Has(last)) : ChooseRoles(l, r, o);
  if (!swapped) Fail(lhs, rhs, out, "the result's last dimension is a batch dimension");
  result.swapped = *swapped;
  const Strided &a = *swapped ? r : l, &b = *swapped ? l : r;

  const auto loop = [&](const Strided& owner, int64_t label) {
    return Loop{owner.Size(label), a.Stride(label), b.Stride(label), o.Stride(label)};
  };
  bool zero_k = false;
  for (int64_t label : out.labels) {
    if (o.Size(label) == 1 || (last_is_n && label == last)) continue;
    const bool in_a = a.Has(label), in_b = b.Has(label);
    (in_a && in_b ? result.batch : in_a ? result.m : result.n).push_back(loop(o, label));
  }
  for (int64_t label : a.x.labels) {
    if (o.Has(label) || a.Size(label) == 1) continue;
    zero_k |= a.Size(label) == 0;
    result.k.push_back(loop(a, label));
  }
  if (zero_k) {
    result.k = {Loop{0, 0, 0, 0}};
  }
  result.batch = Collapse(std::move(result.batch), &Loop::c);
  result.m = Collapse(std::move(result.m), &Loop::c);
  result.n = Collapse(std::move(result.n), &Loop::c);
  if (last_is_n) result.n.push_back(loop(o, last));
  result.k = Collapse(std::move(result.k), &Loop::a);
  return result;
}

Contraction Transposed(const Contraction& contraction) {
  Contraction out = contraction;
  out.swapped = !out.swapped;
  out.transposed = !out.transposed;
  std::swap(out.m, out.n);
  for (std::vector<Loop>* loops : {&out.batch, &out.m, &out.n, &out.k}) {
    for (Loop& loop : *loops) std::swap(loop.a, loop.b);
  }
  return out;
}

}  // namespace jax_nano
