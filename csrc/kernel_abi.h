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

// What is applied to a finished sum before it becomes an element of C, 0 of GemmArgs::epilogue: nothing.
enum class Activation : int64_t { kNone = 1, kRelu, kGeluTanh, kGeluErf, kSilu, kTanh, kSigmoid };

// C[m, n] = activation(scale * sum + bias[n]) + residual[m, n], in the accumulator's type, rounded to C's once.
// bias and residual have C's type. `jax_nano/codegen/epilogue.py` reads the fields by position.
struct Epilogue {
  Activation activation;
  double scale;             // rounded to the accumulator's type
  const void* bias;         // n elements; null: none
  int64_t has_residual;     // 1: there is a residual
  int64_t residual_offset;  // bytes from an element of C to its element of the residual, which has C's strides
};

struct GemmArgs {
  const void* a;
  const void* b;
  void* c;
  void* a_pack;           // workspace for packed A, 64-byte aligned, PackedABytes(); unused unless pack_a
  void* b_pack;           // workspace for packed B, 64-byte aligned, PackedBBytes(); unused unless pack_b
  void* partial;          // unfinished sums of a narrow kernel, m rows of accumulators, rs_partial apart; else unused
  int64_t m, n, k;        // any of them may be 0; k == 0 stores zeros (or leaves C alone when accumulating)
  int64_t rsa, csa;       // A: stride between rows (m), between columns (k)
  int64_t rsb, csb;       // B: stride between rows (k), between columns (n); csb == 1 unless pack_b
  int64_t rsc;            // C: stride between rows (m)
  int64_t rs_partial;     // partial: stride between rows, at least n rounded up to nr
  int64_t batch;          // number of products, at least 1
  int64_t bsa, bsb, bsc;  // strides between products
  int64_t accumulate;     // 1: add to the sums so far: C, or `partial` of a narrow kernel; 0: neither is read
  int64_t more;           // 1: the sum over k is not finished by this call: a narrow kernel leaves it in `partial`
  int64_t pack_a;         // 1: copy blocks of A into the workspace (required unless ReadsA of plan.h)
  int64_t pack_b;         // 1: copy blocks of B into the workspace (required unless direct_b and csb == 1)
  int64_t inner;          // 1: the inner-product path (KernelInfo::inner; k whole, csa == 1 and rsb == 1 unless
                          //    pack_a, pack_b: then a copy along k of the operand goes to the workspace)
  int64_t sweep;          // 1: the sweep path (KernelInfo::sweep; csb == 1, nothing packed; `partial` if narrow)
  int64_t ahead;          // 1: these two paths fetch what they read next: it lies in memory, not in a cache
  int64_t mc, kc, nc;     // cache blocking; mc multiple of panel or below it, nc and kc of nr and kr
  int64_t panel;          // rows of A that are multiplied at once, at most mr; mr if pack_a, unless csa == 1
  const Epilogue* epilogue;  // applied when the sum over k is finished; null: C is the sum
};

// Packing stores whole vectors, so a packed block may be overrun by less than this.
inline constexpr int64_t kPackSlackBytes = 8192;

using GemmFn = void (*)(const GemmArgs*);

// One generated GEMM: a target and a signature, with every microkernel behind it.
struct KernelInfo {
  const char* name;    // e.g. "gemm_f32_f32_f32_f32_14x32_x86-64-v4"
  const char* target;  // e.g. "x86-64-v4"
  const char* lhs;     // element types by their NumPy / ml_dtypes names: "float32", "bfloat16", "int8", ...
  const char* rhs;
  const char* acc;
  const char* out;
  const char* algorithm;   // DotAlgorithm preset that it computes, or "default"
  int32_t mr, nr, kr;      // register tile, and K values that are packed side by side
  int32_t a_panel_bytes;   // bytes of packed A for one element of A
  int32_t b_panel_bytes;   // and of packed B
  int32_t b_header_bytes;  // bytes in front of each packed column of B
  bool direct_a;           // whether A can be read where it lies; if kr > 1, where csa == 1 and kr divides k and rsa
  bool direct_b;           // whether B can, if its columns are 1 apart
  bool inner;              // whether it has an inner-product path
  bool sweep;              // whether it has a path for few rows of A and a row-major B
  bool narrow;             // whether C cannot hold unfinished sums: these live in GemmArgs::partial
  bool epilogue;           // whether it takes GemmArgs::epilogue
  GemmFn fn;
};

}  // namespace jax_nano

#endif  // JAX_NANO_KERNEL_ABI_H_
