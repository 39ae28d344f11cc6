// The entry points that XLA calls, for registration from Python.
#ifndef JAX_NANO_XLA_FFI_H_
#define JAX_NANO_XLA_FFI_H_

#include <cstdint>
#include <utility>

struct XLA_FFI_CallFrame;
struct XLA_FFI_Error;

namespace jax_nano {

XLA_FFI_Error* DotInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* DotExecute(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* LinearInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* LinearExecute(XLA_FFI_CallFrame* frame);

// Of the headers that this was compiled with: (major, minor). XLA refuses handlers newer than itself.
std::pair<int, int> FfiApiVersion();

}  // namespace jax_nano

#endif  // JAX_NANO_XLA_FFI_H_
