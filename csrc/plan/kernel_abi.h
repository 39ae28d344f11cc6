// The contract between the generated kernels and the runtime.
//
// A generated GEMM computes, for each of `batch` independent products,
//
//     C[m, n]  (+)=  A[m, k] * B[k, n]        C is row-major: its column stride is 1
//
// and where GemmArgs::epilogue is given, from the finished sums,
//
//     C[m, n] = activation(scale * sum + bias[n]) + residual[m, n]
//
// in the accumulator's type, rounded to C's once; bias and residual have C's type.
//
// All sizes and strides are in elements of the operand they belong to, never in bytes. Strides may be
// zero or negative. Kernels read the fields of GemmArgs and Epilogue by position, as words of 8 bytes. These structs,
// KernelInfo and what names stand for are declared in spec.h, which the build writes from jax_nano/_core/spec.py.
#ifndef JAX_NANO_PLAN_KERNEL_ABI_H_
#define JAX_NANO_PLAN_KERNEL_ABI_H_

#include "spec.h"

#endif  // JAX_NANO_PLAN_KERNEL_ABI_H_
