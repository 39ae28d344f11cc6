// Calls of products that one thread computes, without XLA's typed FFI: C functions of custom call API version 3. XLA
// gives them the addresses of buffers and the string that stands in the program (`opaque`), nothing else: no dtypes, no
// shapes, no thread pool. So `opaque` describes the whole call, and it costs a fraction of a typed one.
//
//   jax_nano abi=1 call=dot_general algorithm=default lhs=float32[8,4]{0,1} rhs=float32[4,8]{1,2} out=float32[8,8]{0,2}
//     check=0123456789abcdef
//
// on one line. abi, algorithm and labels mean what they do in ffi.cc. A call "jax_nano_linear" has, before `check`,
//
//   activation=gelu scale=3f800000 bias=1 residual=0
//
// with the bits of a float32 as the scale. `check` is FNV-1a of all that stands before it. A description that is not
// exactly what DescribeCall() writes is refused, with an error of the program's run.
#ifndef JAX_NANO_XLA_UNTYPED_H_
#define JAX_NANO_XLA_UNTYPED_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace jax_nano {

struct XlaCustomCallStatus;

// What XLA calls: `out` is the result's buffer, `in` are those of the operands.
void DotUntyped(void* out, const void** in, const char* opaque, size_t size, XlaCustomCallStatus* status);
void LinearUntyped(void* out, const void** in, const char* opaque, size_t size, XlaCustomCallStatus* status);

struct CallArray {
  std::string dtype;
  std::vector<int64_t> shape, labels;
};

// What a call of "jax_nano_linear" does with the product.
struct CallEpilogue {
  std::string activation;
  float scale = 1;
  bool bias = false, residual = false;
};

struct CallDescription {
  std::string algorithm;
  std::array<CallArray, 3> arrays;       // lhs, rhs, out
  std::optional<CallEpilogue> epilogue;  // of "jax_nano_linear"
};

// What is to stand in the program; nullopt if the call must be a typed one: on this machine several threads would
// compute it, or it cannot be planned.
std::optional<std::string> DescribeCall(const CallDescription& call);

// Reads a description. `name` is that of the call which it stands at. Throws std::invalid_argument if it is none.
CallDescription ReadDescription(std::string_view opaque, std::string_view name);

}  // namespace jax_nano

#endif  // JAX_NANO_XLA_UNTYPED_H_
