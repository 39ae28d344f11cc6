// What instructions beyond x86-64-v3 compute, from Intel's descriptions of them (Software Developer's Manual, vol. 2).
//
// emulate.py puts calls of these in the place of LLVM's intrinsics. Every vector and tile comes by pointer, because C
// passes wide vectors in other places than LLVM does; the result is written to `r`, which aliases no argument.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("hidden")))
#define APART __attribute__((noipa))  // neither inlined nor looked into: it runs between two writes of MXCSR

static float FromBf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// bf16 products round to nearest even, take subnormal operands as zero and flush subnormal results, not asking MXCSR.
static unsigned EnterBf16(void) {
  enum { kExceptionsMasked = 0x1f80, kDenormalsAreZero = 0x40, kFlushToZero = 0x8000 };
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kExceptionsMasked | kDenormalsAreZero | kFlushToZero);
  return before;
}

// --- vectors of `lanes` results of 32 bits ---

// VDPBF16PS: the odd elements first, one rounding for each of the two steps. The same bits as Zen 4's in 9.6 million
// random cases, subnormal ones and NaN among them.
APART static void Bf16Lanes(float* r, const float* acc, const uint16_t* a, const uint16_t* b, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) {
    const float odd = fmaf(FromBf16(a[2 * i + 1]), FromBf16(b[2 * i + 1]), acc[i]);
    r[i] = fmaf(FromBf16(a[2 * i]), FromBf16(b[2 * i]), odd);
  }
}

EXPORT void jax_nano_vdpbf16ps(float* r, const float* acc, const uint16_t* a, const uint16_t* b, int64_t lanes) {
  const unsigned before = EnterBf16();
  Bf16Lanes(r, acc, a, b, lanes);
  _mm_setcsr(before);
}

static uint16_t RoundToBf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t high = bits >> 16;
  switch (fpclassify(x)) {
    case FP_NAN:
      return high | 0x40;  // quiet
    case FP_SUBNORMAL:
      return high & 0x8000;
    default:
      return (bits + 0x7fff + (high & 1)) >> 16;
  }
}

// VCVTNEPS2BF16
EXPORT void jax_nano_vcvtneps2bf16(uint16_t* r, const float* x, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) r[i] = RoundToBf16(x[i]);
}

// VCVTNE2PS2BF16: the first operand's are the higher lanes.
EXPORT void jax_nano_vcvtne2ps2bf16(uint16_t* r, const float* higher, const float* lower, int64_t lanes) {
  jax_nano_vcvtneps2bf16(r, lower, lanes / 2);
  jax_nano_vcvtneps2bf16(r + lanes / 2, higher, lanes / 2);
}

// Integers wrap around, so all sums are taken in unsigned arithmetic.

// VPMADDWD: only -32768 * -32768, twice, leaves int32.
EXPORT void jax_nano_vpmaddwd(uint32_t* r, const int16_t* a, const int16_t* b, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) {
    r[i] = (uint32_t)(a[2 * i] * b[2 * i]) + (uint32_t)(a[2 * i + 1] * b[2 * i + 1]);
  }
}

// VPDPWSSD
EXPORT void jax_nano_vpdpwssd(uint32_t* r, const uint32_t* acc, const int16_t* a, const int16_t* b, int64_t lanes) {
  jax_nano_vpmaddwd(r, a, b, lanes);
  for (int64_t i = 0; i < lanes; ++i) r[i] += acc[i];
}

// VPDPBUSD: unsigned bytes of a times signed bytes of b.
EXPORT void jax_nano_vpdpbusd(uint32_t* r, const uint32_t* acc, const uint8_t* a, const int8_t* b, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) {
    r[i] = acc[i];
    for (int64_t j = 4 * i; j < 4 * i + 4; ++j) r[i] += (uint32_t)(a[j] * b[j]);
  }
}

// VPSHUFB: within each 16 bytes. `lanes` counts bytes.
EXPORT void jax_nano_vpshufb(uint8_t* r, const uint8_t* x, const uint8_t* places, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) r[i] = places[i] & 0x80 ? 0 : x[i / 16 * 16 + places[i] % 16];
}

// VPERMPS, VPERMW: of a place only the lowest bits count.
EXPORT void jax_nano_vpermps(uint32_t* r, const uint32_t* x, const uint32_t* places, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) r[i] = x[places[i] % lanes];
}

// VPERMI2W: of two registers.
EXPORT void jax_nano_vpermi2w(uint16_t* r, const uint16_t* x, const uint16_t* places, const uint16_t* y,
                              int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t place = places[i] % (2 * lanes);
    r[i] = place < lanes ? x[place] : y[place - lanes];
  }
}

EXPORT void jax_nano_vpermw(uint16_t* r, const uint16_t* x, const uint16_t* places, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) r[i] = x[places[i] % lanes];
}

// --- tiles: 16 rows of 64 bytes, of which `rows` and `bytes` are used; the rest is zero ---

enum { kRows = 16, kRowBytes = 64, kUnits = kRowBytes / 4 };

// TILEZERO
EXPORT void jax_nano_tilezero(char* r, int16_t rows, int16_t bytes) { memset(r, 0, kRows * kRowBytes); }

// TILELOADD
EXPORT void jax_nano_tileloadd(char* r, int16_t rows, int16_t bytes, const char* base, int64_t stride) {
  memset(r, 0, kRows * kRowBytes);
  for (int64_t i = 0; i < rows; ++i) memcpy(r + i * kRowBytes, base + i * stride, bytes);
}

// TILESTORED
EXPORT void jax_nano_tilestored(int16_t rows, int16_t bytes, char* base, int64_t stride, const char* tile) {
  for (int64_t i = 0; i < rows; ++i) memcpy(base + i * stride, tile + i * kRowBytes, bytes);
}

// TDPBF16PS: the sums over even and over odd elements apart, then both together, then added to the accumulator.
APART static void Bf16Tiles(float* r, int64_t rows, int64_t columns, int64_t steps, const float* acc, const uint16_t* a,
                            const uint16_t* b) {
  for (int64_t i = 0; i < rows; ++i) {
    float even[kUnits] = {0}, odd[kUnits] = {0};
    for (int64_t s = 0; s < steps; ++s) {
      const float a_even = FromBf16(a[2 * (i * kUnits + s)]), a_odd = FromBf16(a[2 * (i * kUnits + s) + 1]);
      for (int64_t j = 0; j < columns; ++j) {
        even[j] = fmaf(a_even, FromBf16(b[2 * (s * kUnits + j)]), even[j]);
        odd[j] = fmaf(a_odd, FromBf16(b[2 * (s * kUnits + j) + 1]), odd[j]);
      }
    }
    for (int64_t j = 0; j < columns; ++j) r[i * kUnits + j] = acc[i * kUnits + j] + (even[j] + odd[j]);
  }
}

EXPORT void jax_nano_tdpbf16ps(float* r, int16_t rows, int16_t bytes, int16_t depth, const float* acc,
                               const uint16_t* a, const uint16_t* b) {
  jax_nano_tilezero((char*)r, rows, bytes);
  const unsigned before = EnterBf16();
  Bf16Tiles(r, rows, bytes / 4, depth / 4, acc, a, b);
  _mm_setcsr(before);
}

// TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD: quads of bytes, each operand signed or not.
#define JAX_NANO_TDPB(signs, A, B)                                                                                  \
  EXPORT void jax_nano_tdpb##signs##d(uint32_t* r, int16_t rows, int16_t bytes, int16_t depth, const uint32_t* acc, \
                                      const A* a, const B* b) {                                                     \
    jax_nano_tilezero((char*)r, rows, bytes);                                                                       \
    for (int64_t i = 0; i < rows; ++i) {                                                                            \
      for (int64_t j = 0; j < bytes / 4; ++j) {                                                                     \
        uint32_t sum = acc[i * kUnits + j];                                                                         \
        for (int64_t s = 0; s < depth / 4; ++s) {                                                                   \
          for (int64_t q = 0; q < 4; ++q) {                                                                         \
            sum += (uint32_t)(a[4 * (i * kUnits + s) + q] * b[4 * (s * kUnits + j) + q]);                           \
          }                                                                                                         \
        }                                                                                                           \
        r[i * kUnits + j] = sum;                                                                                    \
      }                                                                                                             \
    }                                                                                                               \
  }

JAX_NANO_TDPB(ss, int8_t, int8_t)
JAX_NANO_TDPB(su, int8_t, uint8_t)
JAX_NANO_TDPB(us, uint8_t, int8_t)
JAX_NANO_TDPB(uu, uint8_t, uint8_t)
