// The AVX-512 code of the native headers on a processor that has AVX2 only: SIMDe's portable form of the instructions,
// and stand-ins with the semantics of Intel's manual for those that Debian's version of it (0.7.4) does not have.
// Compiled with -mavx2 -mfma -mf16c; PARETUNE_SIMULATE names what the simulated processor has:
// 1 AVX-512F, 2 also BW (Skylake), 3 also VNNI and BF16 (Sapphire Rapids, Zen 4).
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace simulated {

// The vectors as memory; one lane at a time says what the manual says, and nothing about how.
template <class To, class From, class Lane>
inline void lanes(To* to, const From* from, int n, Lane lane) {
  for (int i = 0; i < n; ++i) to[i] = lane(from[i]);
}

template <class Out, class To, class From, class In, class Lane>
inline Out convert(In in, int n, Lane lane) {
  From from[sizeof in / sizeof(From)];
  To to[sizeof(Out) / sizeof(To)];
  std::memcpy(from, &in, sizeof in);
  lanes(to, from, n, lane);
  Out out;
  std::memcpy(&out, to, sizeof out);
  return out;
}

inline simde__m512i cvtepu16_epi32(__m256i x) {
  return convert<simde__m512i, std::uint32_t, std::uint16_t>(x, 16, [](std::uint16_t v) { return std::uint32_t{v}; });
}
inline simde__m512i cvtepi8_epi32(__m128i x) {
  return convert<simde__m512i, std::int32_t, std::int8_t>(x, 16, [](std::int8_t v) { return std::int32_t{v}; });
}
inline simde__m512 cvtepi32_ps(simde__m512i x) {
  return convert<simde__m512, float, std::int32_t>(x, 16, [](std::int32_t v) { return static_cast<float>(v); });
}
inline simde__m512i cvtps_epi32(simde__m512 x) {  // to nearest even; what does not fit is 0x80000000
  return convert<simde__m512i, std::int32_t, float>(x, 16, [](float v) {
    return std::fabs(v) < 0x1p31f ? static_cast<std::int32_t>(std::nearbyint(v)) : INT32_MIN;
  });
}
inline __m256i cvtepi32_epi16(simde__m512i x) {  // the low half, no saturation
  return convert<__m256i, std::uint16_t, std::uint32_t>(
      x, 16, [](std::uint32_t v) { return static_cast<std::uint16_t>(v); });
}
inline simde__m512 cvtph_ps(__m256i x) {
  return convert<simde__m512, float, std::uint16_t>(x, 16, [](std::uint16_t v) { return _cvtsh_ss(v); });
}

// Flushes subnormal inputs and results to zero; the odd product is added first, each addition rounded once.
template <class In>
inline simde__m512 dpbf16_ps(simde__m512 sums, In a, In b) {
  float out[16];
  std::uint16_t x[32], y[32];
  std::memcpy(out, &sums, 64), std::memcpy(x, &a, 64), std::memcpy(y, &b, 64);
  const auto flushed = [](float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; };
  const auto number = [&](std::uint16_t v) {
    const std::uint32_t bits = static_cast<std::uint32_t>(v) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return flushed(value);
  };
  for (int i = 0; i < 16; ++i)
    for (int j : {2 * i + 1, 2 * i}) out[i] = flushed(std::fma(number(x[j]), number(y[j]), flushed(out[i])));
  std::memcpy(&sums, out, 64);
  return sums;
}

}  // namespace simulated

#define _mm512_cvtepu16_epi32 simulated::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 simulated::cvtepi8_epi32
#define _mm512_cvtepi32_ps simulated::cvtepi32_ps
#define _mm512_cvtps_epi32 simulated::cvtps_epi32
#define _mm512_cvtepi32_epi16 simulated::cvtepi32_epi16
#define _mm512_cvtph_ps simulated::cvtph_ps
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps simulated::dpbf16_ps
#undef _mm512_madd_epi16  // SIMDe 0.7.4 gives the name to the masked form
#define _mm512_madd_epi16 simde_mm512_madd_epi16

// Only now: SIMDe would take the instructions for real.
#define __AVX512F__ 1
#if PARETUNE_SIMULATE >= 2
#define __AVX512BW__ 1
#endif
#if PARETUNE_SIMULATE >= 3
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#endif
