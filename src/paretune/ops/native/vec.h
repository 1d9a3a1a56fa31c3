// Vectors of this processor in the compiler's own vector extension: one source for AVX-512, AVX2, NEON and plain code.
// The width is fixed when the file is compiled, which happens on the machine that runs it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define PARETUNE_AVX512
#include <immintrin.h>
constexpr int kLanes = 16;
constexpr const char* kIsa = "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
#define PARETUNE_AVX2
#include <immintrin.h>
constexpr int kLanes = 8;
constexpr const char* kIsa = "avx2";
#else
constexpr int kLanes = 4;
constexpr const char* kIsa = "portable";
#endif

enum Format : std::int32_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kInt8 = 3, kInt4 = 4, kNf4 = 5, kSparse8 = 6 };

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline std::size_t element_bytes(std::int32_t format) { return format == kFp32 ? 4 : format == kInt8 ? 1 : 2; }

// ---------------------------------------------------------------- one element

inline float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40);  // NaN stays NaN
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);                  // to nearest even
}

inline float from_fp16(std::uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  const std::uint32_t sign = (x & 0x8000u) << 16, exponent = (x >> 10) & 31, fraction = x & 1023u;
  std::uint32_t bits;
  if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
  else if (exponent != 0) bits = sign | (exponent + 112) << 23 | fraction << 13;
  else {
    float value = static_cast<float>(fraction) * 0x1p-24f;  // subnormal, exact
    return sign ? -value : value;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

inline std::uint16_t to_fp16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7e00;
  if (size >= 0x477ff000u) return sign | 0x7c00;  // rounds beyond 65504
  if (size < 0x38800000u) {                       // subnormal: the addition rounds to nearest even
    float value;
    std::memcpy(&value, &size, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    return sign | static_cast<std::uint16_t>(bits - 0x3f000000u);
  }
  return sign | static_cast<std::uint16_t>((size - 0x38000000u + 0xfffu + ((size >> 13) & 1)) >> 13);
#endif
}

// ---------------------------------------------------------------- a vector from memory of each format

inline Vec load_floats(const float* p) {
  Vec out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline void store_floats(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

template <Format F> inline Vec load(const void* data, std::int64_t at);

template <> inline Vec load<kFp32>(const void* data, std::int64_t at) {
  return load_floats(static_cast<const float*>(data) + at);
}
template <> inline Vec load<kBf16>(const void* data, std::int64_t at) {
  const std::uint16_t* p = static_cast<const std::uint16_t*>(data) + at;
#if defined(PARETUNE_AVX512)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
#elif defined(PARETUNE_AVX2)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = from_bf16(p[i]);
  return out;
#endif
}
template <> inline Vec load<kFp16>(const void* data, std::int64_t at) {
  const std::uint16_t* p = static_cast<const std::uint16_t*>(data) + at;
#if defined(PARETUNE_AVX512)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(PARETUNE_AVX2) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = from_fp16(p[i]);
  return out;
#endif
}
template <> inline Vec load<kInt8>(const void* data, std::int64_t at) {
  const std::int8_t* p = static_cast<const std::int8_t*>(data) + at;
  // The compiler's own conversion of a byte vector goes through single elements (GCC 12), ten times slower.
#if defined(PARETUNE_AVX512)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(PARETUNE_AVX2)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = p[i];
  return out;
#endif
}

// Two a byte, the even one in the low half; numbers from 0 to 15. at: even.
template <> inline Vec load<kInt4>(const void* data, std::int64_t at) {
  const std::uint8_t* p = static_cast<const std::uint8_t*>(data) + (at >> 1);
#if defined(PARETUNE_AVX512) || defined(PARETUNE_AVX2)
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  std::int32_t words[kLanes / 8];
  std::memcpy(words, p, sizeof words);
#endif
#if defined(PARETUNE_AVX512)
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(words[0])), _mm256_set1_epi32(words[1]), 1);
  const __m512i all_shifts = _mm512_inserti64x4(_mm512_castsi256_si512(shifts), shifts, 1);
  return (Vec)_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(both, all_shifts), _mm512_set1_epi32(15)));
#elif defined(PARETUNE_AVX2)
  const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(words[0]), shifts);
  return (Vec)_mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(15)));
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<float>(p[i / 2] >> i % 2 * 4 & 15);
  return out;
#endif
}

template <Format F> inline float load_one(const void* data, std::int64_t at) {
  if constexpr (F == kInt4) return static_cast<float>(static_cast<const std::uint8_t*>(data)[at >> 1] >> (at & 1) * 4 & 15);
  else if constexpr (F == kFp32) return static_cast<const float*>(data)[at];
  else if constexpr (F == kBf16) return from_bf16(static_cast<const std::uint16_t*>(data)[at]);
  else if constexpr (F == kFp16) return from_fp16(static_cast<const std::uint16_t*>(data)[at]);
  else return static_cast<const std::int8_t*>(data)[at];
}

// a * b + c, always fused or never: left to the compiler, the same sum would be rounded differently in each loop.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(PARETUNE_AVX512)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PARETUNE_AVX2)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline float multiply_add(float a, float b, float c) {
#if defined(PARETUNE_AVX512) || defined(PARETUNE_AVX2)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec fill(float x) { return x - Vec{}; }

// Neighbours first, always in this order, also where `sums_of_four` adds four vectors at once.
inline float sum(Vec x) {
  float p[kLanes];
  store_floats(p, x);
  if constexpr (kLanes == 16)
    for (int i = 0; i < 8; ++i) p[i] += p[i + 8];
  if constexpr (kLanes == 4) return (p[0] + p[1]) + (p[2] + p[3]);
  else return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
}

inline void sums_of_four(Vec a, Vec b, Vec c, Vec d, float* out) {
#if defined(PARETUNE_AVX512) || defined(PARETUNE_AVX2)
#if defined(PARETUNE_AVX512)
  const auto halves = [](Vec x) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)));
  };
  const __m256 p = halves(a), q = halves(b), r = halves(c), s = halves(d);
#else
  const __m256 p = (__m256)a, q = (__m256)b, r = (__m256)c, s = (__m256)d;
#endif
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(p, q), _mm256_hadd_ps(r, s));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// ---------------------------------------------------------------- rows

inline void store(const float* from, void* to, std::int32_t format, int n) {
  switch (format) {
    case kFp32: std::memcpy(to, from, sizeof(float) * n); break;
    case kBf16: for (int i = 0; i < n; ++i) static_cast<std::uint16_t*>(to)[i] = to_bf16(from[i]); break;
    case kFp16: for (int i = 0; i < n; ++i) static_cast<std::uint16_t*>(to)[i] = to_fp16(from[i]); break;
  }
}

// Two passes: the mean first, because x^2 - mean^2 cancels.
inline void layer_norm(const float* x, const float* gamma, const float* beta, float eps, int C, float* out) {
  Vec total = {};
  int c = 0;
  for (; c + kLanes <= C; c += kLanes) total += load_floats(x + c);
  float mean = sum(total);
  for (; c < C; ++c) mean += x[c];
  mean /= C;
  Vec squares = {};
  for (c = 0; c + kLanes <= C; c += kLanes) {
    const Vec d = load_floats(x + c) - mean;
    squares += d * d;
  }
  float variance = sum(squares);
  for (; c < C; ++c) variance += (x[c] - mean) * (x[c] - mean);
  const float factor = 1.0f / std::sqrt(variance / C + eps);
  for (c = 0; c < C; ++c) out[c] = (x[c] - mean) * factor * gamma[c] + (beta != nullptr ? beta[c] : 0.0f);
}

inline void rms_norm(const float* x, const float* gamma, float eps, int C, float* out) {
  Vec squares = {};
  int c = 0;
  for (; c + kLanes <= C; c += kLanes) squares += load_floats(x + c) * load_floats(x + c);
  float total = sum(squares);
  for (; c < C; ++c) total += x[c] * x[c];
  const float factor = 1.0f / std::sqrt(total / C + eps);
  for (c = 0; c < C; ++c) out[c] = x[c] * factor * gamma[c];
}

// Rotary positions of Llama: the two halves of a head are the two coordinates.
inline void rotate(const float* x, const float* angles, int D, float* out) {
  const int half = D / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i], c = angles[i], s = angles[half + i];
    out[i] = a * c - b * s;
    out[half + i] = b * c + a * s;
  }
}

// ---------------------------------------------------------------- exp and the activations

// e^x to about 2 ulp: x = n ln 2 + r, a polynomial for r (Cephes, expf.c), n into the exponent.
inline Vec exp_vec(Vec x) {
  const Vec low = fill(-87.3f), high = fill(88.3f);
  x = x < low ? low : x;
  x = x > high ? high : x;  // NaN passes through both
  const Vec magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504088896341f + magic) - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline Vec tanh_vec(Vec x) { return 1.0f - 2.0f / (exp_vec(2.0f * x) + 1.0f); }

// Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline Vec erf_vec(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec t = 1.0f / (1.0f + 0.3275911f * size);
  const Vec p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const Vec y = 1.0f - p * exp_vec(-size * size);
  return x < 0.0f ? -y : y;
}

inline Vec activated(std::int32_t kind, Vec x) {
  switch (kind) {
    case 1: return 0.5f * x * (1.0f + tanh_vec(0.7978845608f * (x + 0.044715f * x * x * x)));
    case 2: return 0.5f * x * (1.0f + erf_vec(x * 0.70710678118f));
    case 3: return x / (1.0f + exp_vec(-1.702f * x));
    case 4: return x < 0.0f ? fill(0.0f) : x;
    default: return x / (1.0f + exp_vec(-x));
  }
}

inline void activate(std::int32_t kind, float* x, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store_floats(x + i, activated(kind, load_floats(x + i)));
  if (i == n) return;
  float rest[kLanes] = {};
  std::memcpy(rest, x + i, sizeof(float) * (n - i));
  store_floats(rest, activated(kind, load_floats(rest)));
  std::memcpy(x + i, rest, sizeof(float) * (n - i));
}

