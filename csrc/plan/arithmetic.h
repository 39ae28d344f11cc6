// Integer arithmetic of blocks.
#ifndef JAX_NANO_PLAN_ARITHMETIC_H_
#define JAX_NANO_PLAN_ARITHMETIC_H_

#include <algorithm>
#include <cstdint>

namespace jax_nano {

constexpr int64_t CeilDiv(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t RoundUp(int64_t x, int64_t unit) { return CeilDiv(x, unit) * unit; }
constexpr double Real(int64_t x) { return static_cast<double>(x); }

// The size of the equal blocks of at most `most` into which `total` is cut, a multiple of `unit`: no block is tiny.
constexpr int64_t BalancedBlock(int64_t total, int64_t most, int64_t unit) {
  most = std::max(unit, most / unit * unit);
  total = std::max(total, int64_t{1});
  return RoundUp(CeilDiv(total, CeilDiv(total, most)), unit);
}

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_ARITHMETIC_H_
