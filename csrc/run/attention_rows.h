// What attention and its gradients share: where a query's rows are in the caller's arrays, which keys it may see, and
// the parts of a thread's workspace.
#ifndef JAX_NANO_RUN_ATTENTION_ROWS_H_
#define JAX_NANO_RUN_ATTENTION_ROWS_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "plan/arithmetic.h"
#include "run/attention.h"

namespace jax_nano {

inline constexpr int64_t kLine = 64;  // bytes

template <typename T>
T* Advance(T* base, int64_t elements, int64_t element_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(base) + elements * element_bytes;
}

// The row of position t of head n, of queries, of results or of their cotangents.
template <typename T>
T* RowAt(T* base, const AttentionShape::Strides& strides, int64_t batch, int64_t t, int64_t n, int64_t element_bytes) {
  return Advance(base, batch * strides[0] + t * strides[1] + n * strides[2], element_bytes);
}

// The row of a bias or a mask for the scores of a query; null if there is none.
template <typename T>
const T* OfScores(const T* base, const std::array<int64_t, 3>& strides, int64_t batch, int64_t t, int64_t n) {
  return base == nullptr ? nullptr : base + batch * strides[0] + n * strides[1] + t * strides[2];
}

// Rows of logarithms: position t of head n.
inline int64_t StatisticAt(const AttentionShape& shape, int64_t batch, int64_t t, int64_t n) {
  return (batch * shape.queries + t) * shape.heads + n;
}

// How many of `all` queries or keys a batch has.
inline int64_t Length(const int32_t* lengths, int64_t batch, int64_t all) {
  return lengths == nullptr ? all : std::clamp<int64_t>(lengths[batch], 0, all);
}

// The keys lo <= s < hi that the window leaves to position t, of so many.
struct Window {
  int64_t lo, hi;
};

inline Window WindowAt(const AttentionShape& shape, int64_t t, int64_t keys) {
  const int64_t lo = std::max<int64_t>(0, t - shape.left);
  return {lo, std::max(lo, std::min(keys, t + shape.right + 1))};
}

// Whether more is done to scores than a multiplication by a number above 0: then they are rounded as jax.nn's.
inline bool IsGeneral(const AttentionShape& shape, const float* bias, const uint8_t* mask) {
  return bias != nullptr || mask != nullptr || !(shape.scale > 0);
}

// Whether a row's maximum, in natural units, is too large for exponents of one step, score * scale * log2(e) - maximum:
// that product is not rounded but the maximum was, by up to half a unit in its last place. Exponents are all off by it,
// which cancels as long as it is small; from here on it is more than 1/2, and soon no float32 holds the weights. Scores
// are then rounded before the subtraction, as jax.nn's.
inline bool IsCoarse(double maximum) { return !(std::abs(maximum) < 0x1p23); }

// The arguments that say how operands lie, by the names that both kernels have for them.
template <typename Args>
void SetOperands(const AttentionShape& shape, Args& x) {
  x.depth = shape.depth;
  x.width = shape.width;
  x.csq = shape.q[3];
  x.rsk = shape.k[1];
  x.csk = shape.k[3];
  x.rsv = shape.v[1];
  x.csv = shape.v[3];
}

// Keys that are packed at once: so many bytes of them, whole units, and no more than `most` or there are.
inline int64_t BlockOfKeys(int64_t bytes, int64_t key_bytes, int64_t unit, int64_t most, int64_t keys) {
  const int64_t block = std::clamp(bytes / key_bytes / unit * unit, unit, RoundUp(most, unit));
  return std::min(block, RoundUp(keys, unit));
}

inline int64_t WholeLines(int64_t bytes) { return RoundUp(bytes, kLine); }

// Floats between rows of scores of so many keys: an odd number of lines, so that no two rows share L1 sets.
inline int64_t ScoresRow(int64_t keys) { return (CeilDiv(keys * 4, kLine) | 1) * kLine / 4; }

// Parts of some memory, one behind the other.
class Parts {
 public:
  explicit Parts(void* memory) : at_(static_cast<char*>(memory)) {}

  template <typename T = char>
  T* Next(int64_t bytes) {
    char* const here = at_;
    at_ += bytes;
    return reinterpret_cast<T*>(here);
  }

 private:
  char* at_;
};

}  // namespace jax_nano

#endif  // JAX_NANO_RUN_ATTENTION_ROWS_H_
