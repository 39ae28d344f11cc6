// A timing loop over oneDNN's matmul primitive (the C interface of oneDNN 2, as in Debian 12).
#include <dnnl.h>
#include <stdio.h>
#include <stdlib.h>

#include "job.h"

#if DNNL_VERSION_MAJOR != 2
#error "written for the C interface of oneDNN 2, as in Debian 12"
#endif

typedef struct {
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  dnnl_primitive_desc_t description;
  dnnl_primitive_t primitive;
  dnnl_exec_arg_t (*args)[3];  // one set for each pair of operands
  int64_t pairs;
} Plan;

void version(char* out, int size) {
  const dnnl_version_t* v = dnnl_version();
  snprintf(out, (size_t)size, "%d.%d.%d", v->major, v->minor, v->patch);
}

void destroy(Plan* plan) {
  if (plan == NULL) return;
  for (int64_t i = 0; plan->args && i < plan->pairs; ++i) {
    for (int j = 0; j < 3; ++j) dnnl_memory_destroy(plan->args[i][j].memory);
  }
  free(plan->args);
  if (plan->primitive) dnnl_primitive_destroy(plan->primitive);
  if (plan->description) dnnl_primitive_desc_destroy(plan->description);
  if (plan->stream) dnnl_stream_destroy(plan->stream);
  if (plan->engine) dnnl_engine_destroy(plan->engine);
  free(plan);
}

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

  dnnl_memory_desc_t memory[3];
  for (int i = 0; i < 3; ++i) {
    if (dnnl_memory_desc_init_by_strides(&memory[i], rank, dims + i * rank, (dnnl_data_type_t)types[i],
                                         strides + i * rank)) {
      return Fail(plan);
    }
  }
  dnnl_matmul_desc_t matmul;
  if (dnnl_matmul_desc_init(&matmul, &memory[0], &memory[1], NULL, &memory[2])) return Fail(plan);
  if (dnnl_primitive_desc_create(&plan->description, &matmul, NULL, plan->engine, NULL)) return Fail(plan);
  if (dnnl_primitive_create(&plan->primitive, plan->description)) return Fail(plan);

  const int roles[3] = {DNNL_ARG_SRC, DNNL_ARG_WEIGHTS, DNNL_ARG_DST};
  plan->pairs = pairs;
  plan->args = calloc((size_t)pairs, sizeof(*plan->args));
  for (int64_t pair = 0; pair < pairs; ++pair) {
    void* const buffers[3] = {a[pair], b[pair], c[pair]};
    for (int i = 0; i < 3; ++i) {
      plan->args[pair][i].arg = roles[i];
      if (dnnl_memory_create(&plan->args[pair][i].memory, &memory[i], plan->engine, buffers[i])) {
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
