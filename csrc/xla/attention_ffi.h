// The entry points of attention that XLA calls, for registration from Python.
#ifndef JAX_NANO_XLA_ATTENTION_FFI_H_
#define JAX_NANO_XLA_ATTENTION_FFI_H_

struct XLA_FFI_CallFrame;
struct XLA_FFI_Error;

namespace jax_nano {

XLA_FFI_Error* AttentionInstantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* AttentionExecute(XLA_FFI_CallFrame* frame);

}  // namespace jax_nano

#endif  // JAX_NANO_XLA_ATTENTION_FFI_H_
