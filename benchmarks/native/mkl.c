// Timing loops over what MKL has for batches and for small products, beside cblas. MKL is not linked: Python passes its
// functions, of the interface with 32-bit integers.
#include <stdlib.h>

#include "job.h"

enum { kRowMajor = 101, kNoTrans = 111, kTrans = 112 };

// cblas_?gemm_batch: all products of a batch in one call, of one group.
#define DEFINE_BATCH(NAME, REAL)                                                                                    \
  typedef void (*NAME##Gemm)(int, const int*, const int*, const int*, const int*, const int*, const REAL*,          \
                             const REAL* const*, const int*, const REAL* const*, const int*, const REAL*,           \
                             REAL* const*, const int*, int, const int*);                                            \
  double NAME(const Job* job, NAME##Gemm gemm, int64_t trips) {                                                     \
    const int trans_a = job->csa == 1 ? kNoTrans : kTrans, trans_b = job->csb == 1 ? kNoTrans : kTrans;             \
    const int m = (int)job->m, n = (int)job->n, k = (int)job->k, batch = (int)job->batch;                           \
    const int lda = (int)(trans_a == kNoTrans ? job->rsa : job->csa);                                               \
    const int ldb = (int)(trans_b == kNoTrans ? job->rsb : job->csb), ldc = (int)job->rsc;                          \
    const REAL alpha = 1, beta = 0;                                                                                 \
    const int64_t count = job->pairs * job->batch;                                                                  \
    const REAL** a = malloc((size_t)count * sizeof(*a));                                                            \
    const REAL** b = malloc((size_t)count * sizeof(*b));                                                            \
    REAL** c = malloc((size_t)count * sizeof(*c));                                                                  \
    for (int64_t at = 0; at < count; ++at) {                                                                        \
      const int64_t pair = at / job->batch, i = at % job->batch;                                                    \
      a[at] = (const REAL*)job->a[pair] + job->a_offset[i];                                                         \
      b[at] = (const REAL*)job->b[pair] + job->b_offset[i];                                                         \
      c[at] = (REAL*)job->c[pair] + job->c_offset[i];                                                               \
    }                                                                                                               \
    const double start = Seconds();                                                                                 \
    for (int64_t trip = 0; trip < trips; ++trip) {                                                                  \
      for (int64_t at = 0; at < count; at += job->batch) {                                                          \
        gemm(kRowMajor, &trans_a, &trans_b, &m, &n, &k, &alpha, a + at, &lda, b + at, &ldb, &beta, c + at, &ldc, 1, \
             &batch);                                                                                               \
      }                                                                                                             \
    }                                                                                                               \
    const double seconds = Seconds() - start;                                                                       \
    free(a);                                                                                                        \
    free(b);                                                                                                        \
    free(c);                                                                                                        \
    return seconds;                                                                                                 \
  }

DEFINE_BATCH(run_batch_f32, float)
DEFINE_BATCH(run_batch_f64, double)

// A function that MKL has compiled for one product (mkl_jit_create_?gemm), for each product of a batch.
#define DEFINE_JIT(NAME, REAL)                                                                           \
  typedef void (*NAME##Kernel)(void*, REAL*, REAL*, REAL*);                                              \
  double NAME(const Job* job, NAME##Kernel kernel, void* jitter, int64_t trips) {                        \
    const double start = Seconds();                                                                      \
    for (int64_t trip = 0; trip < trips; ++trip) {                                                       \
      for (int64_t pair = 0; pair < job->pairs; ++pair) {                                                \
        for (int64_t i = 0; i < job->batch; ++i) {                                                       \
          kernel(jitter, (REAL*)job->a[pair] + job->a_offset[i], (REAL*)job->b[pair] + job->b_offset[i], \
                 (REAL*)job->c[pair] + job->c_offset[i]);                                                \
        }                                                                                                \
      }                                                                                                  \
    }                                                                                                    \
    return Seconds() - start;                                                                            \
  }

DEFINE_JIT(run_jit_f32, float)
DEFINE_JIT(run_jit_f64, double)
