// Timing loops over oneDNN: its matmul primitive, and its sgemm. For the C interfaces of oneDNN 2, as in Debian 12, and
// of oneDNN 3, which differ in how memory and primitives are described.
#include <dnnl.h>
#include <stdio.h>
#include <stdlib.h>

#include "job.h"

#if DNNL_VERSION_MAJOR != 2 && DNNL_VERSION_MAJOR != 3
#error "written for the C interfaces of oneDNN 2 and 3"
#endif

// A description of memory is a value in oneDNN 2 and an object in oneDNN 3.
#if DNNL_VERSION_MAJOR == 2
typedef const dnnl_memory_desc_t* MemoryArgument;
#else
typedef const_dnnl_memory_desc_t MemoryArgument;
#endif

typedef struct {
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  dnnl_memory_desc_t memory[3];
  dnnl_primitive_desc_t description;
  dnnl_primitive_t primitive;
  dnnl_exec_arg_t (*args)[3];  // one set for each pair of operands
  int64_t pairs;
} Plan;

// The version, and what its CPU engine runs its threads with.
void version(char* out, int size) {
  const dnnl_version_t* v = dnnl_version();
  const char* runtime = "";
  switch (v->cpu_runtime) {
    case DNNL_RUNTIME_SEQ:
      runtime = "sequential";
      break;
    case DNNL_RUNTIME_OMP:
      runtime = "OpenMP";
      break;
    case DNNL_RUNTIME_TBB:
      runtime = "TBB";
      break;
    case DNNL_RUNTIME_SYCL:
      runtime = "SYCL";
      break;
    default:
      runtime = "another runtime";
      break;
  }
  snprintf(out, (size_t)size, "%d.%d.%d, %s", v->major, v->minor, v->patch, runtime);
}

void destroy(Plan* plan) {
  if (plan == NULL) return;
  for (int64_t i = 0; plan->args && i < plan->pairs; ++i) {
    for (int j = 0; j < 3; ++j) dnnl_memory_destroy(plan->args[i][j].memory);
  }
  free(plan->args);
  if (plan->primitive) dnnl_primitive_destroy(plan->primitive);
  if (plan->description) dnnl_primitive_desc_destroy(plan->description);
#if DNNL_VERSION_MAJOR == 3
  for (int i = 0; i < 3; ++i) {
    if (plan->memory[i]) dnnl_memory_desc_destroy(plan->memory[i]);
  }
#endif
  if (plan->stream) dnnl_stream_destroy(plan->stream);
  if (plan->engine) dnnl_engine_destroy(plan->engine);
  free(plan);
}

#if DNNL_VERSION_MAJOR == 2
static MemoryArgument Argument(const dnnl_memory_desc_t* memory) { return memory; }

static dnnl_status_t Describe(dnnl_memory_desc_t* memory, int rank, const int64_t* dims, dnnl_data_type_t type,
                              const int64_t* strides) {
  return dnnl_memory_desc_init_by_strides(memory, rank, dims, type, strides);
}

static dnnl_status_t DescribeMatmul(Plan* plan) {
  dnnl_matmul_desc_t matmul;
  const dnnl_status_t status =
      dnnl_matmul_desc_init(&matmul, &plan->memory[0], &plan->memory[1], NULL, &plan->memory[2]);
  if (status) return status;
  return dnnl_primitive_desc_create(&plan->description, &matmul, NULL, plan->engine, NULL);
}
#else
static MemoryArgument Argument(const dnnl_memory_desc_t* memory) { return *memory; }

static dnnl_status_t Describe(dnnl_memory_desc_t* memory, int rank, const int64_t* dims, dnnl_data_type_t type,
                              const int64_t* strides) {
  return dnnl_memory_desc_create_with_strides(memory, rank, dims, type, strides);
}

static dnnl_status_t DescribeMatmul(Plan* plan) {
  return dnnl_matmul_primitive_desc_create(&plan->description, plan->engine, plan->memory[0], plan->memory[1], NULL,
                                           plan->memory[2], NULL);
}
#endif

static Plan* Fail(Plan* plan) {
  destroy(plan);
  return NULL;
}

// `dims` and `strides` hold A, B and C in turn, `rank` numbers each; `types` holds dnnl_data_type_t.
// Returns null where oneDNN has no such product.
Plan* create(int rank, const int64_t* dims, const int64_t* strides, const int* types, int64_t pairs, void** a, void** b,
             void** c) {
  Plan* plan = calloc(1, sizeof(Plan));
  if (dnnl_engine_create(&plan->engine, dnnl_cpu, 0) != dnnl_success) return Fail(plan);
  if (dnnl_stream_create(&plan->stream, plan->engine, dnnl_stream_default_flags)) return Fail(plan);

  for (int i = 0; i < 3; ++i) {
    if (Describe(&plan->memory[i], rank, dims + i * rank, (dnnl_data_type_t)types[i], strides + i * rank)) {
      return Fail(plan);
    }
  }
  if (DescribeMatmul(plan)) return Fail(plan);
  if (dnnl_primitive_create(&plan->primitive, plan->description)) return Fail(plan);

  const int roles[3] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST};
  plan->pairs = pairs;
  plan->args = calloc((size_t)pairs, sizeof(*plan->args));
  for (int64_t pair = 0; pair < pairs; ++pair) {
    void* const buffers[3] = {a[pair], b[pair], c[pair]};
    for (int i = 0; i < 3; ++i) {
      plan->args[pair][i].arg = roles[i];
      if (dnnl_memory_create(&plan->args[pair][i].memory, Argument(&plan->memory[i]), plan->engine, buffers[i])) {
        return Fail(plan);
      }
    }
  }
  return plan;
}

// The name of the implementation that oneDNN chose, e.g. "brg:avx512_core".
const char* implementation(const Plan* plan) {
  const char* name = "";
  dnnl_primitive_desc_query(plan->description, dnnl_query_impl_info_str, 0, (void*)&name);
  return name;
}

double run(Plan* plan, int64_t trips) {
  const double start = Seconds();
  for (int64_t trip = 0; trip < trips; ++trip) {
    for (int64_t pair = 0; pair < plan->pairs; ++pair) {
      dnnl_primitive_execute(plan->primitive, plan->stream, 3, plan->args[pair]);
      dnnl_stream_wait(plan->stream);
    }
  }
  return Seconds() - start;
}

// The same for dnnl_sgemm, which needs no primitive and no stream: one call for each product of a batch.
double run_sgemm(const Job* job, int64_t trips) {
  const char trans_a = job->csa == 1 ? 'N' : 'T', trans_b = job->csb == 1 ? 'N' : 'T';
  const int64_t lda = trans_a == 'N' ? job->rsa : job->csa, ldb = trans_b == 'N' ? job->rsb : job->csb;
  const double start = Seconds();
  for (int64_t trip = 0; trip < trips; ++trip) {
    for (int64_t pair = 0; pair < job->pairs; ++pair) {
      for (int64_t i = 0; i < job->batch; ++i) {
        dnnl_sgemm(trans_a, trans_b, job->m, job->n, job->k, 1, (const float*)job->a[pair] + job->a_offset[i], lda,
                   (const float*)job->b[pair] + job->b_offset[i], ldb, 0, (float*)job->c[pair] + job->c_offset[i],
                   job->rsc);
      }
    }
  }
  return Seconds() - start;
}
