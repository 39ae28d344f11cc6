// The limits of the machine: how fast the multiply-add units run when nothing else is in their way,
// and how fast memory is read. Every result is measured, on `threads` threads at once.
#include <immintrin.h>
#include <pthread.h>
#include <stdlib.h>

#include "job.h"

enum { kMaxThreads = 1024 };

// --- multiply-add units -----------------------------------------------------------------------
//
// Independent accumulators hide the latency of the units. Each is a variable of its own, since a compiler
// may keep an array in memory; the asm statement keeps it in its register and each step in the loop.

#define REPEAT12(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define REPEAT16(DO) REPEAT12(DO) DO(12) DO(13) DO(14) DO(15)

#define DECLARE(i) acc##i = x,
#define DEFINE_PEAK(NAME, TARGET, VECTOR, REPEAT, ZERO, STEP)       \
  __attribute__((target(TARGET))) static void NAME(int64_t steps) { \
    VECTOR x = ZERO, REPEAT(DECLARE) y = ZERO;                      \
    __asm__ volatile("" : "+v"(x), "+v"(y));                        \
    for (int64_t step = 0; step < steps; ++step) {                  \
      REPEAT(STEP)                                                  \
    }                                                               \
  }

#define KEEP(i) __asm__ volatile("" : "+v"(acc##i));
#define F32_512(i)                        \
  acc##i = _mm512_fmadd_ps(x, y, acc##i); \
  KEEP(i)
#define F64_512(i)                        \
  acc##i = _mm512_fmadd_pd(x, y, acc##i); \
  KEEP(i)
#define F32_256(i)                        \
  acc##i = _mm256_fmadd_ps(x, y, acc##i); \
  KEEP(i)
#define F64_256(i)                        \
  acc##i = _mm256_fmadd_pd(x, y, acc##i); \
  KEEP(i)
#define BF16_512(i)                                            \
  acc##i = _mm512_dpbf16_ps(acc##i, (__m512bh)x, (__m512bh)y); \
  KEEP(i)
#define I8_512(i)                             \
  acc##i = _mm512_dpbusd_epi32(acc##i, x, y); \
  KEEP(i)
// Without a dot product of bytes: products of 16 bits, added in pairs, added to 32 bits.
#define I8_256(i)                                             \
  acc##i = _mm256_add_epi32(y, _mm256_madd_epi16(x, acc##i)); \
  KEEP(i)

DEFINE_PEAK(PeakF32V4, "avx512f", __m512, REPEAT16, _mm512_setzero_ps(), F32_512)
DEFINE_PEAK(PeakF64V4, "avx512f", __m512d, REPEAT16, _mm512_setzero_pd(), F64_512)
DEFINE_PEAK(PeakF32V3, "avx2,fma", __m256, REPEAT12, _mm256_setzero_ps(), F32_256)
DEFINE_PEAK(PeakF64V3, "avx2,fma", __m256d, REPEAT12, _mm256_setzero_pd(), F64_256)
DEFINE_PEAK(PeakBf16, "avx512f,avx512bf16", __m512, REPEAT16, _mm512_setzero_ps(), BF16_512)
DEFINE_PEAK(PeakI8Vnni, "avx512f,avx512vnni", __m512i, REPEAT16, _mm512_setzero_si512(), I8_512)
DEFINE_PEAK(PeakI8V3, "avx2", __m256i, REPEAT12, _mm256_setzero_si256(), I8_256)

typedef struct {
  void (*loop)(int64_t steps);
  double ops_per_step;  // multiplications and additions
} Unit;

// kind: 0 f32, 1 f64, 2 bf16, 3 int8. A CPU without units of its own for bf16 computes it in f32.
static Unit FindUnit(int kind) {
  const int v4 = __builtin_cpu_supports("avx512f");
  const int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (kind == 2 && __builtin_cpu_supports("avx512bf16")) return (Unit){PeakBf16, 16 * 64.0};
  if (kind == 3 && __builtin_cpu_supports("avx512vnni")) return (Unit){PeakI8Vnni, 16 * 128.0};
  if (kind == 3 && v3) return (Unit){PeakI8V3, 12 * 32.0};
  if (kind == 1 && v4) return (Unit){PeakF64V4, 16 * 16.0};
  if (kind == 1 && v3) return (Unit){PeakF64V3, 12 * 8.0};
  if (v4) return (Unit){PeakF32V4, 16 * 32.0};
  if (v3) return (Unit){PeakF32V3, 12 * 16.0};
  return (Unit){NULL, 0};
}

// --- memory -----------------------------------------------------------------------------------

enum { kBlock = 512 };  // bytes that one step reads

// Sixteen 32-byte loads a step, each a sum of its own: the loads, not the additions, are the limit.
__attribute__((target("avx2"))) static void Read(const char* data, int64_t bytes, int64_t trips) {
  __m256i sum[16];
  for (int i = 0; i < 16; ++i) sum[i] = _mm256_setzero_si256();
  for (int64_t trip = 0; trip < trips; ++trip) {
    for (int64_t at = 0; at < bytes; at += kBlock) {
      _Pragma("GCC unroll 16") for (int i = 0; i < 16; ++i) {
        sum[i] = _mm256_or_si256(sum[i], _mm256_load_si256((const __m256i*)(data + at + 32 * i)));
      }
    }
    __asm__ volatile("" ::: "memory");
  }
  for (int i = 0; i < 16; ++i) __asm__ volatile("" ::"x"(sum[i]));
}

// --- threads ----------------------------------------------------------------------------------

typedef struct {
  pthread_barrier_t* barrier;
  void (*loop)(int64_t steps);  // or, if null, read memory:
  char* data;
  int64_t bytes;
  int64_t trips;
  double seconds;
} Task;

static void* RunTask(void* argument) {
  Task* task = argument;
  pthread_barrier_wait(task->barrier);
  const double start = Seconds();
  if (task->loop) {
    task->loop(task->trips);
  } else {
    Read(task->data, task->bytes, task->trips);
  }
  task->seconds = Seconds() - start;
  return NULL;
}

// Runs the tasks at the same time; returns the seconds of the slowest.
static double RunTasks(Task* tasks, int threads) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, NULL, (unsigned)threads);
  pthread_t ids[kMaxThreads];
  for (int i = 0; i < threads; ++i) tasks[i].barrier = &barrier;
  for (int i = 1; i < threads; ++i) pthread_create(&ids[i], NULL, RunTask, &tasks[i]);
  RunTask(&tasks[0]);
  double seconds = tasks[0].seconds;
  for (int i = 1; i < threads; ++i) {
    pthread_join(ids[i], NULL);
    if (tasks[i].seconds > seconds) seconds = tasks[i].seconds;
  }
  pthread_barrier_destroy(&barrier);
  return seconds;
}

int has_unit(int kind) { return FindUnit(kind).loop != NULL; }

// Seconds for `ops` multiplications and additions at the peak of `threads` cores.
double run_peak(int kind, int threads, double ops) {
  const Unit unit = FindUnit(kind);
  const double steps = ops / threads / unit.ops_per_step;
  const int64_t whole = (int64_t)steps + 1;
  Task tasks[kMaxThreads];
  for (int i = 0; i < threads; ++i) tasks[i] = (Task){.loop = unit.loop, .trips = whole};
  return RunTasks(tasks, threads) * steps / (double)whole;
}

// Memory for run_bandwidth: one block for each thread, `bytes` together.
char* allocate(int64_t bytes, int threads, int64_t* share) {
  *share = (bytes / threads + kBlock - 1) / kBlock * kBlock;
  char* data = aligned_alloc(4096, (size_t)((*share * threads + 4095) / 4096 * 4096));
  for (int64_t i = 0; data && i < *share * threads; ++i) data[i] = (char)i;
  return data;
}

void deallocate(char* data) { free(data); }

// Seconds for `threads` cores to read their shares, `trips` times.
double run_bandwidth(char* data, int64_t share, int threads, int64_t trips) {
  Task tasks[kMaxThreads];
  for (int i = 0; i < threads; ++i) tasks[i] = (Task){.data = data + i * share, .bytes = share, .trips = trips};
  return RunTasks(tasks, threads);
}
