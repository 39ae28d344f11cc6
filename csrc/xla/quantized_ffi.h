// The entry points of products with quantised weights that XLA calls, for registration from Python.
#ifndef JAX_NANO_XLA_QUANTIZED_FFI_H_
#define JAX_NANO_XLA_QUANTIZED_FFI_H_

struct XLA_FFI_CallFrame;
struct XLA_FFI_Error;

namespace jax_nano {

XLA_FFI_Error* QuantizedInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* QuantizedExecute(XLA_FFI_CallFrame* frame);

}  // namespace jax_nano

#endif  // JAX_NANO_XLA_QUANTIZED_FFI_H_
