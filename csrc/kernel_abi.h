// The contract between the generated kernels and the runtime.
//
// A generated GEMM computes, for each of `batch` independent products,
//
//     C[m, n]  (+)=  A[m, k] * B[k, n]        C is row-major: its column stride is 1
//
// All sizes and strides are in elements of the operand they belong to, never in bytes. Strides may be
// zero or negative. `jax_nano/codegen/macrokernel.py` reads the fields of GemmArgs by position, so the
// order below and `GEMM_ARGS` there are one list kept in two languages; a test compares them.
#ifndef JAX_NANO_KERNEL_ABI_H_
#define JAX_NANO_KERNEL_ABI_H_

#include <cstdint>

namespace jax_nano {

struct GemmArgs {
  const void* a;
  const void* b;
  void* c;
  void* a_pack;         // workspace for packed A, 64-byte aligned, PackedBytes(mc * kc * a_panel_bytes); unused unless pack_a
  void* b_pack;         // workspace for packed B, 64-byte aligned, PackedBytes(kc * nc * b_panel_bytes); unused unless pack_b
  int64_t m, n, k;      // any of them may be 0; k == 0 stores zeros (or leaves C alone when accumulating)
  int64_t rsa, csa;     // A: stride between rows (m), between columns (k)
  int64_t rsb, csb;     // B: stride between rows (k), between columns (n); csb == 1 unless pack_b
  int64_t rsc;          // C: stride between rows (m)
  int64_t batch;        // number of products, at least 1
  int64_t bsa, bsb, bsc;  // strides between products
  int64_t accumulate;   // 0: C = A*B, C is not read; 1: C += A*B
  int64_t pack_a;       // 1: copy blocks of A into the workspace
  int64_t pack_b;       // 1: copy blocks of B into the workspace (required unless csb == 1)
  int64_t mc, kc, nc;   // cache blocking; mc multiple of mr, nc multiple of nr, kc multiple of kr
};

// Packing stores whole vectors, so a packed block may be overrun by less than this.
inline constexpr int64_t kPackSlackBytes = 8192;

// Workspace for a packed block of so many payload bytes. `kc` counts as rounded up to a multiple of kr.
inline constexpr int64_t PackedBytes(int64_t payload) { return (payload + 63) / 64 * 64 + kPackSlackBytes; }

using GemmFn = void (*)(const GemmArgs*);

// One generated GEMM: a target and a signature, with every micro-kernel behind it.
struct KernelInfo {
  const char* name;       // e.g. "gemm_f32_f32_f32_f32_14x32_x86-64-v4"
  const char* target;     // e.g. "x86-64-v4"
  const char* lhs;        // element types by their NumPy / ml_dtypes names: "float32", "bfloat16", "int8", ...
  const char* rhs;
  const char* acc;
  const char* out;
  int32_t mr, nr, kr;     // register tile, and K values interleaved in a packed row of B
  int32_t a_panel_bytes;  // bytes of one element of packed A
  int32_t b_panel_bytes;  // and of packed B
  GemmFn fn;
};

}  // namespace jax_nano

#endif  // JAX_NANO_KERNEL_ABI_H_
