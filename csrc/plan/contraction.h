// From labelled shapes to loops: what a product of two dense arrays means, before any decision about how
// to compute it. Pure functions. All sizes and strides are in elements.
#ifndef JAX_NANO_PLAN_CONTRACTION_H_
#define JAX_NANO_PLAN_CONTRACTION_H_

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace jax_nano {

// One dense row-major array with one label per dimension. Labels are einsum's letters as integers: in
// lhs, rhs and out: batch; in lhs and rhs only: contracting; in lhs and out: M; in rhs and out: N.
struct Operand {
  std::string_view dtype;
  std::span<const int64_t> shape;
  std::span<const int64_t> labels;
};

// One loop: its size, and its stride in each array; 0 in an array that lacks the dimension.
struct Loop {
  int64_t size;
  int64_t a, b, c;
};

// C[batch, m, n] = sum over k of A[batch, m, k] * B[batch, k, n]. Each list is outermost first, without
// loops of size 1 and with neighbours merged wherever their strides allow it in every array; an empty
// list means the size 1. In `n`, the last loop has c == 1, unless C is transposed.
struct Contraction {
  bool swapped = false;     // A is rhs and B is lhs
  bool transposed = false;  // what is computed is C's transpose: `m` runs along a row of the result, `n` down a column
  bool empty = false;       // C has no elements; the lists are not filled then
  std::vector<Loop> batch, m, n, k;
};

// Throws std::invalid_argument, naming shapes and dtypes, if the arrays do not fit together.
//
// last_is_n: out's last dimension is to be the last loop of `n`, alone and whatever its size, so that something that
// runs along it (a bias) runs along B's columns. An error if it is a batch dimension or there is none.
Contraction Analyze(const Operand& lhs, const Operand& rhs, const Operand& out, bool last_is_n = false);

// The same sums with the roles of A and B exchanged. It must be one loop of `m` and one of `n`.
Contraction Transposed(const Contraction& contraction);

// "float32[3,4]", with labels "float32[3,4]{0,1}".
std::string Describe(std::string_view dtype, std::span<const int64_t> shape);
std::string Describe(const Operand& operand);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_CONTRACTION_H_
