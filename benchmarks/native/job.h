// What Python hands to every library's timing loop: one product, possibly a batch of them, over one or
// more sets of buffers. peers/in_c.py has the same fields in the same order.
#ifndef JAX_NANO_BENCHMARKS_JOB_H_
#define JAX_NANO_BENCHMARKS_JOB_H_

#include <stdint.h>
#include <time.h>

typedef struct {
  int64_t m, n, k;                                // C[m, n] = A[m, k] B[k, n], C with unit stride along n
  int64_t rsa, csa, rsb, csb, rsc;                // strides in elements
  int64_t batch;                                  // number of products
  const int64_t *a_offset, *b_offset, *c_offset;  // where each of them starts, in elements
  int64_t pairs;                                  // sets of buffers, gone through in turn
  void **a, **b, **c;
} Job;

static inline double Seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#endif  // JAX_NANO_BENCHMARKS_JOB_H_
