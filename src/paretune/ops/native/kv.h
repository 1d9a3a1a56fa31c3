// How a cache keeps keys and values: what is stored of a head, and how its rows are read back. Of engine/cache_formats.py,
// bit for bit.
//
// Legend: D head dimension, G groups of a head in 4 bits.
#pragma once

#include "vec.h"

constexpr int kKvGroup = 32;  // neighbouring dimensions that share a scale and a minimum in 4 bits

// A head that 32 does not divide is one group.
inline int kv_groups(int D) { return D % kKvGroup == 0 ? D / kKvGroup : 1; }

// Bytes of a position of a head: its numbers, and what stands beside them. 4 bits: D is even.
inline std::int64_t row_bytes(std::int32_t format, int D) {
  return format == kInt4 ? D / 2 : D * static_cast<std::int64_t>(element_bytes(format));
}
inline std::int64_t scale_bytes(std::int32_t format, int D) {
  return format == kInt8 ? 4 : format == kInt4 ? 4 * kv_groups(D) : 0;
}

// Keys and values of one head, side by side. Scales: fp32 for each position of int8; fp16 [G, 2] for each of 4 bits, the
// minimum beside the scale; else none.
struct HeadCache {
  char* k;
  char* v;
  char* k_scale;
  char* v_scale;
  std::int32_t format;

  HeadCache from(std::int64_t position, int D) const {
    const std::int64_t rows = position * row_bytes(format, D), scales = position * scale_bytes(format, D);
    return {k + rows, v + rows, k_scale == nullptr ? nullptr : k_scale + scales,
            v_scale == nullptr ? nullptr : v_scale + scales, format};
  }
};

// ---------------------------------------------------------------- storing

inline void quantize_head(const float* x, std::int8_t* to, float* scale, int D) {
  Vec absmaxes = {}, poisons = {};
  int d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    const Vec v = load_floats(x + d), size = v < 0.0f ? -v : v;
    absmaxes = size > absmaxes ? size : absmaxes;
    poisons += v * 0.0f;
  }
  float absmax = 0.0f, poison = sum(poisons);
  for (int i = 0; i < kLanes; ++i) absmax = std::max(absmax, absmaxes[i]);
  for (int c = d; c < D; ++c) absmax = std::max(absmax, std::fabs(x[c])), poison += x[c] * 0.0f;
  const bool is_zero = !(absmax > 1e-30f) || poison != 0.0f;
  *scale = is_zero ? poison : absmax / 127.0f;
  if (is_zero) {
    std::memset(to, 0, D);
    return;
  }
  const Vec magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
  for (d = 0; d + kLanes <= D; d += kLanes) {
    const IntVec q = __builtin_convertvector((load_floats(x + d) / *scale + magic) - magic, IntVec);
    for (int i = 0; i < kLanes; ++i) to[d + i] = static_cast<std::int8_t>(q[i]);
  }
  for (; d < D; ++d) to[d] = static_cast<std::int8_t>(std::nearbyint(x[d] / *scale));
}

// A group of n (even) numbers to 4 bits from its smallest to its largest, two a byte, the first in the low half. What fp16
// does not hold, infinity and NaN make the scale NaN.
inline void quantize_group(const float* x, std::uint8_t* to, std::uint16_t* scale_and_minimum, int n) {
  constexpr std::uint16_t kNan = 0x7e00;
  Vec lows = fill(INFINITY), highs = fill(-INFINITY);
  IntVec nans = {};
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const Vec v = load_floats(x + c);
    lows = v < lows ? v : lows;
    highs = v > highs ? v : highs;
    nans |= v != v;
  }
  float low = INFINITY, high = -INFINITY;
  bool has_nan = false;
  for (int i = 0; i < kLanes; ++i) low = std::min(low, lows[i]), high = std::max(high, highs[i]), has_nan |= nans[i] != 0;
  for (; c < n; ++c) low = std::min(low, x[c]), high = std::max(high, x[c]), has_nan |= x[c] != x[c];
  if (has_nan) low = high = NAN;
  const std::uint16_t low_bits = to_fp16(low), scale_bits = to_fp16((high - low) / 15.0f);
  const float minimum = from_fp16(low_bits), scale = from_fp16(scale_bits), step = scale > 0.0f ? scale : 1.0f;
  scale_and_minimum[0] = std::isfinite(minimum) && std::isfinite(scale) ? scale_bits : kNan;
  scale_and_minimum[1] = low_bits;
  for (int from = 0; from < n; from += kKvGroup) {
    const int held = std::min(kKvGroup, n - from);
    std::int32_t q[kKvGroup];
    for (c = 0; c + kLanes <= held; c += kLanes) {
      Vec v = (load_floats(x + from + c) - minimum) / step;
      v = v > 0.0f ? v : Vec{};  // NaN becomes 0; to clamp before rounding is as good as after
      v = v < 15.0f ? v : fill(15.0f);
      const Vec magic = fill(12582912.0f);  // as above
      const IntVec whole = __builtin_convertvector((v + magic) - magic, IntVec);
      std::memcpy(q + c, &whole, sizeof whole);
    }
    for (; c < held; ++c) {
      const float v = (x[from + c] - minimum) / step;
      q[c] = static_cast<std::int32_t>(std::nearbyint(v > 0.0f ? std::min(v, 15.0f) : 0.0f));
    }
    for (int i = 0; i < held / 2; ++i) to[from / 2 + i] = static_cast<std::uint8_t>(q[2 * i] | q[2 * i + 1] << 4);
  }
}

inline void append_row(std::int32_t format, const float* x, char* to, char* scale, int D) {
  if (format == kInt8) {
    quantize_head(x, reinterpret_cast<std::int8_t*>(to), reinterpret_cast<float*>(scale), D);
  } else if (format == kInt4) {
    const int G = kv_groups(D), n = D / G;
    for (int g = 0; g < G; ++g)
      quantize_group(x + g * n, reinterpret_cast<std::uint8_t*>(to) + g * n / 2, reinterpret_cast<std::uint16_t*>(scale) + 2 * g, n);
  } else {
    store(x, to, format, D);
  }
}

inline void append(const HeadCache& c, std::int64_t position, const float* k, const float* v, int D) {
  const HeadCache at = c.from(position, D);
  append_row(c.format, k, at.k, at.k_scale, D);
  append_row(c.format, v, at.v, at.v_scale, D);
}

// ---------------------------------------------------------------- reading

// Rows of D numbers that follow each other. int8: without the scales, which scores and weights take up.
//
// Reading a vector takes the factors of its position and dimension, which hold for the rest of its kKvGroup dimensions.
template <Format F> struct Rows {
  struct Factors {};
  const char* data;
  int D;

  Rows(const char* rows, const float*, int n) : data(rows), D(n) {}
  Rows from(int p) const { return {data + p * row_bytes(F, D), nullptr, D}; }
  Factors factors(int, int) const { return {}; }
  Vec at(int p, int d, Factors) const { return load<F>(data, static_cast<std::int64_t>(p) * D + d); }
  float one(int p, int d) const { return load_one<F>(data, static_cast<std::int64_t>(p) * D + d); }
};

// 4 bits; the product is exact, so these are the numbers of `dequantize_groups`, fused or not.
template <> struct Rows<kInt4> {
  struct Factors {
    Vec scale, minimum;
  };
  const char* data;
  const float* scales;  // [position, G, 2]
  int D, half, G, shift;

  Rows(const char* rows, const float* s, int n)
      : data(rows), scales(s), D(n), half(n / 2), G(kv_groups(n)), shift(n % kKvGroup == 0 ? std::countr_zero(unsigned{kKvGroup}) : 31) {}
  Rows from(int p) const { return {data + p * row_bytes(kInt4, D), scales + static_cast<std::int64_t>(p) * 2 * G, D}; }
  const float* pair(int p, int d) const { return scales + 2 * (static_cast<std::int64_t>(p) * G + (d >> shift)); }
  Factors factors(int p, int d) const { return {fill(pair(p, d)[0]), fill(pair(p, d)[1])}; }
  Vec at(int p, int d, const Factors& f) const {
    return multiply_add(load<kInt4>(data + static_cast<std::int64_t>(p) * half, d), f.scale, f.minimum);
  }
  float one(int p, int d) const {
    return multiply_add(load_one<kInt4>(data + static_cast<std::int64_t>(p) * half, d), pair(p, d)[0], pair(p, d)[1]);
  }
};

// n fp16 numbers as fp32.
inline void widen(const char* from, float* to, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store_floats(to + i, load<kFp16>(from, i));
  for (; i < n; ++i) to[i] = load_one<kFp16>(from, i);
}
