// A timing loop over any library that speaks cblas. The library is not linked: Python passes its
// functions, so that one loop serves BLIS (32-bit integers) and NumPy's OpenBLAS (64-bit).
#include "job.h"

enum { kRowMajor = 101, kNoTrans = 111, kTrans = 112 };

// A vector operand goes to gemv, as a user of BLAS would have it.
#define DEFINE_RUN(NAME, REAL, INTEGER)                                                                                \
  typedef void (*NAME##Gemm)(int, int, int, INTEGER, INTEGER, INTEGER, REAL, const REAL*, INTEGER, const REAL*,        \
                             INTEGER, REAL, REAL*, INTEGER);                                                           \
  typedef void (*NAME##Gemv)(int, int, INTEGER, INTEGER, REAL, const REAL*, INTEGER, const REAL*, INTEGER, REAL,       \
                             REAL*, INTEGER);                                                                          \
  double NAME(const Job* job, NAME##Gemm gemm, NAME##Gemv gemv, int64_t trips) {                                       \
    const int trans_a = job->csa == 1 ? kNoTrans : kTrans;                                                             \
    const int trans_b = job->csb == 1 ? kNoTrans : kTrans;                                                             \
    const int64_t m = job->m, n = job->n, k = job->k;                                                                  \
    const int64_t lda = trans_a == kNoTrans ? job->rsa : job->csa;                                                     \
    const int64_t ldb = trans_b == kNoTrans ? job->rsb : job->csb;                                                     \
    const double start = Seconds();                                                                                    \
    for (int64_t trip = 0; trip < trips; ++trip) {                                                                     \
      for (int64_t pair = 0; pair < job->pairs; ++pair) {                                                              \
        for (int64_t i = 0; i < job->batch; ++i) {                                                                     \
          const REAL* a = (const REAL*)job->a[pair] + job->a_offset[i];                                                \
          const REAL* b = (const REAL*)job->b[pair] + job->b_offset[i];                                                \
          REAL* c = (REAL*)job->c[pair] + job->c_offset[i];                                                            \
          if (n == 1) {                                                                                                \
            gemv(kRowMajor, trans_a, trans_a == kNoTrans ? m : k, trans_a == kNoTrans ? k : m, 1, a, lda, b, job->rsb, \
                 0, c, job->rsc);                                                                                      \
          } else if (m == 1) {                                                                                         \
            gemv(kRowMajor, trans_b == kNoTrans ? kTrans : kNoTrans, trans_b == kNoTrans ? k : n,                      \
                 trans_b == kNoTrans ? n : k, 1, b, ldb, a, job->csa, 0, c, 1);                                        \
          } else {                                                                                                     \
            gemm(kRowMajor, trans_a, trans_b, m, n, k, 1, a, lda, b, ldb, 0, c, job->rsc);                             \
          }                                                                                                            \
        }                                                                                                              \
      }                                                                                                                \
    }                                                                                                                  \
    return Seconds() - start;                                                                                          \
  }

DEFINE_RUN(run_f32_int32, float, int32_t)
DEFINE_RUN(run_f64_int32, double, int32_t)
DEFINE_RUN(run_f32_int64, float, int64_t)
DEFINE_RUN(run_f64_int64, double, int64_t)
