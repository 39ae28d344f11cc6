// A timing loop over libxsmm's JIT-compiled small products. libxsmm is column-major, so our C = A B is
// its C' = B' A' : the operands change places.
#include <libxsmm.h>
#include <stddef.h>

#include "job.h"

const char* version(void) { return LIBXSMM_VERSION; }

typedef union {
  libxsmm_smmfunction f32;
  libxsmm_dmmfunction f64;
} Kernel;

static Kernel Dispatch(const Job* job, int is_double) {
  const libxsmm_blasint m = (libxsmm_blasint)job->n, n = (libxsmm_blasint)job->m, k = (libxsmm_blasint)job->k;
  int flags = LIBXSMM_GEMM_FLAG_NONE;
  if (job->csb != 1) flags |= LIBXSMM_GEMM_FLAG_TRANS_A;
  if (job->csa != 1) flags |= LIBXSMM_GEMM_FLAG_TRANS_B;
  const libxsmm_blasint lda = (libxsmm_blasint)(job->csb == 1 ? job->rsb : job->csb);
  const libxsmm_blasint ldb = (libxsmm_blasint)(job->csa == 1 ? job->rsa : job->csa);
  const libxsmm_blasint ldc = (libxsmm_blasint)job->rsc;
  const int prefetch = LIBXSMM_GEMM_PREFETCH_NONE;
  Kernel kernel = {NULL};
  if (is_double) {
    const double alpha = 1, beta = 0;
    kernel.f64 = libxsmm_dmmdispatch(m, n, k, &lda, &ldb, &ldc, &alpha, &beta, &flags, &prefetch);
  } else {
    const float alpha = 1, beta = 0;
    kernel.f32 = libxsmm_smmdispatch(m, n, k, &lda, &ldb, &ldc, &alpha, &beta, &flags, &prefetch);
  }
  return kernel;
}

// Whether libxsmm compiles a kernel for this product; `is_double` selects f64.
int compiles(const Job* job, int is_double) { return Dispatch(job, is_double).f32 != NULL; }

double run(const Job* job, int is_double, int64_t trips) {
  const Kernel kernel = Dispatch(job, is_double);
  const double start = Seconds();
  for (int64_t trip = 0; trip < trips; ++trip) {
    for (int64_t pair = 0; pair < job->pairs; ++pair) {
      for (int64_t i = 0; i < job->batch; ++i) {
        const int64_t a = job->a_offset[i], b = job->b_offset[i], c = job->c_offset[i];
        if (is_double) {
          kernel.f64((const double*)job->b[pair] + b, (const double*)job->a[pair] + a, (double*)job->c[pair] + c);
        } else {
          kernel.f32((const float*)job->b[pair] + b, (const float*)job->a[pair] + a, (float*)job->c[pair] + c);
        }
      }
    }
  }
  return Seconds() - start;
}
