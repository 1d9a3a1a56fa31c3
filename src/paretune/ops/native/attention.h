// Exact attention over the cache in chunks of 256 positions (online softmax, Milakov & Gimelshein 2018; flash attention,
// Dao et al. 2022): no matrix of scores in memory, and chunks can be shared out among threads.
//
// Chunks begin at multiples of 256 whatever the step, lanes and order within them are fixed, and they are merged in order:
// a query gets the same bits alone, in a batch, in a long step, and on any number of threads.
//
// Legend: D head dimension, T queries that read the same keys together.
#pragma once

#include "vec.h"

constexpr int kChunkPositions = 256;
constexpr int kQueryTile = kLanes == 16 ? 4 : 2;

// Keys and values of one head, position 0 first; int8 has a scale for each position.
struct HeadCache {
  char* k;
  char* v;
  float* k_scale;
  float* v_scale;
  std::int32_t format;
};

// What a query has gathered: sums relative to the largest score.
struct Gathered {
  float largest, total;
};

inline void quantize_head(const float* x, std::int8_t* to, float* scale, int D) {
  float absmax = 0.0f, poison = 0.0f;
  for (int d = 0; d < D; ++d) absmax = std::max(absmax, std::fabs(x[d])), poison += x[d] * 0.0f;
  const bool is_zero = !(absmax > 1e-30f) || poison != 0.0f;
  *scale = is_zero ? poison : absmax / 127.0f;
  for (int d = 0; d < D; ++d) to[d] = is_zero ? 0 : static_cast<std::int8_t>(std::nearbyint(x[d] / *scale));
}

inline void append(const HeadCache& c, std::int64_t position, const float* k, const float* v, int D) {
  if (c.format == kInt8) {
    quantize_head(k, reinterpret_cast<std::int8_t*>(c.k) + position * D, c.k_scale + position, D);
    quantize_head(v, reinterpret_cast<std::int8_t*>(c.v) + position * D, c.v_scale + position, D);
    return;
  }
  const std::int64_t at = position * D * static_cast<std::int64_t>(element_bytes(c.format));
  store(k, c.k + at, c.format, D);
  store(v, c.v + at, c.format, D);
}

// scores[i][p] = q[i] . k[p] * scale for n positions.
template <Format F, int T>
inline void scores_of(const float* const* q, const char* keys, const float* k_scale, int n, int D, float scale,
                      float* const* scores) {
  int p = 0;
  for (; p + 4 <= n; p += 4) {
    Vec acc[T][4] = {};
    int d = 0;
    for (; d + kLanes <= D; d += kLanes) {
      Vec rows[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) rows[j] = load<F>(keys, static_cast<std::int64_t>(p + j) * D + d);
#pragma GCC unroll 4
      for (int i = 0; i < T; ++i) {
        const Vec x = load_floats(q[i] + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[i][j] = multiply_add(rows[j], x, acc[i][j]);
      }
    }
    for (int i = 0; i < T; ++i) {
      sums_of_four(acc[i][0], acc[i][1], acc[i][2], acc[i][3], scores[i] + p);
      for (int c = d; c < D; ++c)
        for (int j = 0; j < 4; ++j)
          scores[i][p + j] = multiply_add(load_one<F>(keys, static_cast<std::int64_t>(p + j) * D + c), q[i][c], scores[i][p + j]);
    }
  }
  for (; p < n; ++p) {
    for (int i = 0; i < T; ++i) {
      Vec acc = {};
      int d = 0;
      for (; d + kLanes <= D; d += kLanes)
        acc = multiply_add(load<F>(keys, static_cast<std::int64_t>(p) * D + d), load_floats(q[i] + d), acc);
      float dot = sum(acc);
      for (; d < D; ++d) dot = multiply_add(load_one<F>(keys, static_cast<std::int64_t>(p) * D + d), q[i][d], dot);
      scores[i][p] = dot;
    }
  }
  for (int i = 0; i < T; ++i)
    for (p = 0; p < n; ++p) scores[i][p] *= F == kInt8 ? scale * k_scale[p] : scale;
}

// out[i] += sum over the positions `from` to `to` of weights[i][p] * v[p].
template <Format F, int T>
inline void add_values(const char* values, int from, int to, int D, const float (*weights)[kChunkPositions], float* const* out) {
  constexpr int kWide = 4;
  int d = 0;
  for (; d + kWide * kLanes <= D; d += kWide * kLanes) {
    Vec acc[T][kWide];
    for (int i = 0; i < T; ++i)
      for (int j = 0; j < kWide; ++j) acc[i][j] = load_floats(out[i] + d + j * kLanes);
    for (int p = from; p < to; ++p) {
      Vec rows[kWide];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) rows[j] = load<F>(values, static_cast<std::int64_t>(p) * D + d + j * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < T; ++i) {
        const Vec x = fill(weights[i][p]);
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) acc[i][j] = multiply_add(rows[j], x, acc[i][j]);
      }
    }
    for (int i = 0; i < T; ++i)
      for (int j = 0; j < kWide; ++j) store_floats(out[i] + d + j * kLanes, acc[i][j]);
  }
  for (int i = 0; i < T; ++i) {
    int c = d;
    for (; c + kLanes <= D; c += kLanes) {
      Vec acc = load_floats(out[i] + c);
      for (int p = from; p < to; ++p)
        acc = multiply_add(load<F>(values, static_cast<std::int64_t>(p) * D + c), fill(weights[i][p]), acc);
      store_floats(out[i] + c, acc);
    }
    for (; c < D; ++c)
      for (int p = from; p < to; ++p)
        out[i][c] = multiply_add(load_one<F>(values, static_cast<std::int64_t>(p) * D + c), weights[i][p], out[i][c]);
  }
}

// One chunk for T queries; query i sees the positions begin[i] to end[i] of it (relative, end > begin for all).
// out[i]: [D], written. The values behind a query's end are never read for it: they may be garbage.
template <Format F, int T>
inline void chunk_as(const float* const* q, const HeadCache& c, std::int64_t start, const int* begin, const int* end,
                     int D, float scale, Gathered* gathered, float* const* out) {
  alignas(64) float scores[T][kChunkPositions];
  int first = begin[0], last = end[0], common_from = begin[0], common_to = end[0];
  for (int i = 1; i < T; ++i) {
    first = std::min(first, begin[i]), last = std::max(last, end[i]);
    common_from = std::max(common_from, begin[i]), common_to = std::min(common_to, end[i]);
  }
  const char* keys = c.k + start * D * static_cast<std::int64_t>(element_bytes(F));
  const char* values = c.v + start * D * static_cast<std::int64_t>(element_bytes(F));
  float* at[T];
  for (int i = 0; i < T; ++i) at[i] = scores[i] + first;
  scores_of<F, T>(q, keys + static_cast<std::int64_t>(first) * D * element_bytes(F),
                  c.k_scale == nullptr ? nullptr : c.k_scale + start + first, last - first, D, scale, at);
  for (int i = 0; i < T; ++i) {
    // Lanes of the sums below count from the chunk's start: what is not visible weighs nothing.
    for (int p = begin[i] / kLanes * kLanes; p < begin[i]; ++p) scores[i][p] = -INFINITY;
    for (int p = end[i]; p < (end[i] + kLanes - 1) / kLanes * kLanes; ++p) scores[i][p] = -INFINITY;
    const int from = begin[i] / kLanes * kLanes;
    Vec largest = fill(-INFINITY);
    for (int p = from; p < end[i]; p += kLanes) {
      const Vec s = load_floats(scores[i] + p);
      largest = s > largest ? s : largest;
    }
    float top = largest[0];
    for (int j = 1; j < kLanes; ++j) top = std::max(top, largest[j]);
    Vec total = {};
    for (int p = from; p < end[i]; p += kLanes) {
      const Vec s = load_floats(scores[i] + p);
      Vec e = exp_vec(s - top);
      e = s == -INFINITY ? Vec{} : e;  // the exponential of a masked score is small, not zero
      total += e;
      store_floats(scores[i] + p, e);
    }
    gathered[i] = {top, sum(total)};
    if constexpr (F == kInt8)
      for (int p = begin[i]; p < end[i]; ++p) scores[i][p] *= c.v_scale[start + p];
    std::memset(out[i], 0, sizeof(float) * D);
  }
  if (common_from >= common_to) {
    for (int i = 0; i < T; ++i) add_values<F, 1>(values, begin[i], end[i], D, scores + i, out + i);
    return;
  }
  for (int i = 0; i < T; ++i) add_values<F, 1>(values, begin[i], common_from, D, scores + i, out + i);
  add_values<F, T>(values, common_from, common_to, D, scores, out);
  for (int i = 0; i < T; ++i) add_values<F, 1>(values, common_to, end[i], D, scores + i, out + i);
}

inline void attend_chunk(int n, const float* const* q, const HeadCache& c, std::int64_t start, const int* begin,
                         const int* end, int D, float scale, Gathered* gathered, float* const* out) {
  const auto run = [&]<Format F>() {
    int i = 0;
    for (; i + kQueryTile <= n; i += kQueryTile)
      chunk_as<F, kQueryTile>(q + i, c, start, begin + i, end + i, D, scale, gathered + i, out + i);
    for (; i < n; ++i) chunk_as<F, 1>(q + i, c, start, begin + i, end + i, D, scale, gathered + i, out + i);
  };
  switch (c.format) {
    case kFp32: run.template operator()<kFp32>(); break;
    case kBf16: run.template operator()<kBf16>(); break;
    case kFp16: run.template operator()<kFp16>(); break;
    case kInt8: run.template operator()<kInt8>(); break;
  }
}

// What was gathered so far (out, all) and one chunk more.
inline void merge(Gathered* all, float* out, const Gathered& part, const float* part_out, bool is_first, int D) {
  if (is_first) {
    *all = part;
    std::memcpy(out, part_out, sizeof(float) * D);
    return;
  }
  const float largest = std::max(all->largest, part.largest);
  const float a = std::exp(all->largest - largest), b = std::exp(part.largest - largest);
  all->largest = largest;
  all->total = all->total * a + part.total * b;
  for (int d = 0; d < D; ++d) out[d] = out[d] * a + part_out[d] * b;
}
