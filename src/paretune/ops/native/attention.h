// Exact attention over the cache in chunks of 256 positions (online softmax, Milakov & Gimelshein 2018; flash attention,
// Dao et al. 2022): no matrix of scores in memory, and chunks can be shared out among threads.
//
// Chunks begin at multiples of 256 whatever the step, lanes and order within them are fixed, and they are merged in order:
// a query gets the same bits alone, in a batch, in a long step, and on any number of threads.
//
// Few queries read keys and values where they are. Many get a chunk packed for them (`PackedChunk`): lanes are then
// neighbouring positions instead of neighbouring dimensions, with the same sums in the same order, so the same bits.
//
// Legend: D head dimension, T queries that read the same keys together.
#pragma once

#include <vector>

#include "kv.h"

constexpr int kChunkPositions = 256;
constexpr int kQueryTile = kLanes == 16 ? 4 : 2;

// What a query has gathered: sums relative to the largest score.
struct Gathered {
  float largest, total;
};

// scores[i][p] = q[i] . k[p] * scale for n positions.
template <Format F, int T>
inline void scores_of(const float* const* q, const Rows<F>& keys, const float* k_scale, int n, int D, float scale,
                      float* const* scores) {
  int p = 0;
  for (; p + 4 <= n; p += 4) {
    Vec acc[T][4] = {};
    int d = 0;
    if constexpr (F == kInt4) {
      // Two positions at a time: factors of four would leave no registers for the sums.
      for (; d + kKvGroup <= D; d += kKvGroup) {
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
          const auto first = keys.factors(p + j, d), second = keys.factors(p + j + 1, d);
#pragma GCC unroll 8
          for (int n = d; n < d + kKvGroup; n += kLanes) {
            const Vec row = keys.at(p + j, n, first), other = keys.at(p + j + 1, n, second);
#pragma GCC unroll 4
            for (int i = 0; i < T; ++i) {
              const Vec x = load_floats(q[i] + n);
              acc[i][j] = multiply_add(row, x, acc[i][j]), acc[i][j + 1] = multiply_add(other, x, acc[i][j + 1]);
            }
          }
        }
      }
    }
    for (; d + kLanes <= D; d += kLanes) {
      Vec rows[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) rows[j] = keys.at(p + j, d, keys.factors(p + j, d));
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
          scores[i][p + j] = multiply_add(keys.one(p + j, c), q[i][c], scores[i][p + j]);
    }
  }
  for (; p < n; ++p) {
    for (int i = 0; i < T; ++i) {
      Vec acc = {};
      int d = 0;
      for (; d + kLanes <= D; d += kLanes)
        acc = multiply_add(keys.at(p, d, keys.factors(p, d)), load_floats(q[i] + d), acc);
      float dot = sum(acc);
      for (; d < D; ++d) dot = multiply_add(keys.one(p, d), q[i][d], dot);
      scores[i][p] = dot;
    }
  }
  for (int i = 0; i < T; ++i)
    for (p = 0; p < n; ++p) scores[i][p] *= F == kInt8 ? scale * k_scale[p] : scale;
}

// out[i] += sum over the positions `from` to `to` of weights[i][p] * v[p].
template <Format F, int T>
inline void add_values(const Rows<F>& values, int from, int to, int D, const float (*weights)[kChunkPositions], float* const* out) {
  constexpr int kWide = 4;
  int d = 0;
  for (; d + kWide * kLanes <= D; d += kWide * kLanes) {
    Vec acc[T][kWide];
    for (int i = 0; i < T; ++i)
      for (int j = 0; j < kWide; ++j) acc[i][j] = load_floats(out[i] + d + j * kLanes);
    for (int p = from; p < to; ++p) {
      typename Rows<F>::Factors factors;
      Vec rows[kWide];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        if (j * kLanes % kKvGroup == 0) factors = values.factors(p, d + j * kLanes);
        rows[j] = values.at(p, d + j * kLanes, factors);
      }
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
        acc = multiply_add(values.at(p, c, values.factors(p, c)), fill(weights[i][p]), acc);
      store_floats(out[i] + c, acc);
    }
    for (; c < D; ++c)
      for (int p = from; p < to; ++p)
        out[i][c] = multiply_add(values.one(p, c), weights[i][p], out[i][c]);
  }
}

// ALiBi: the score of a key `n` positions before the query falls by n * slope.
struct Bias {
  float slope = 0.0f;
  std::int64_t position = 0;  // of the query
};

inline void add_bias(const Bias& bias, std::int64_t start, float* scores, int from, int to) {
  const float base = static_cast<float>(start - bias.position);  // whole numbers: exact
  for (int p = from; p < to; ++p) scores[p] += bias.slope * (base + static_cast<float>(p));
}

// e^x for x <= 0 as `exp_vec` (vec.h), with fused steps; below -87 zero, so a masked score of minus infinity weighs nothing.
inline Vec exp_of_negative(Vec x) {
  const Vec magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  const Vec shifted = multiply_add(x, fill(1.44269504088896341f), magic);
  const Vec n = shifted - magic;
  const Vec r = multiply_add(n, fill(2.12194440e-4f), multiply_add(n, fill(-0.693359375f), x));
  Vec p = multiply_add(fill(1.9875691500e-4f), r, fill(1.3981999507e-3f));
  p = multiply_add(p, r, fill(8.3334519073e-3f));
  p = multiply_add(p, r, fill(4.1665795894e-2f));
  p = multiply_add(p, r, fill(1.6666665459e-1f));
  p = multiply_add(p, r, fill(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? Vec{} : p * power;  // NaN stays
}

// scores[begin..end) become weights relative to the largest of them. What is not visible weighs nothing.
inline Gathered soften(float* scores, int begin, int end) {
  // Lanes of the sums below count from the chunk's start.
  const int from = begin / kLanes * kLanes;
  for (int p = from; p < begin; ++p) scores[p] = -INFINITY;
  for (int p = end; p < (end + kLanes - 1) / kLanes * kLanes; ++p) scores[p] = -INFINITY;
  Vec largest = fill(-INFINITY), other = largest;  // two chains: one would wait for itself
  int at = from;
  for (; at + kLanes < end; at += 2 * kLanes) {
    const Vec s = load_floats(scores + at), t = load_floats(scores + at + kLanes);
    largest = s > largest ? s : largest;
    other = t > other ? t : other;
  }
  if (at < end) {
    const Vec s = load_floats(scores + at);
    largest = s > largest ? s : largest;
  }
  largest = other > largest ? other : largest;
  float top = largest[0];
  for (int j = 1; j < kLanes; ++j) top = std::max(top, largest[j]);
  Vec total = {};
  for (int p = from; p < end; p += kLanes) {
    const Vec s = load_floats(scores + p);
    const Vec e = exp_of_negative(s - top);
    total += e;
    store_floats(scores + p, e);
  }
  return {top, sum(total)};
}

// The positions that all of T queries see, and those that any of them does.
struct Extent {
  int first, last, common_from, common_to;
};

inline Extent extent_of(const int* begin, const int* end, int T) {
  Extent e{begin[0], end[0], begin[0], end[0]};
  for (int i = 1; i < T; ++i) {
    e.first = std::min(e.first, begin[i]), e.last = std::max(e.last, end[i]);
    e.common_from = std::max(e.common_from, begin[i]), e.common_to = std::min(e.common_to, end[i]);
  }
  return e;
}

// One chunk for T queries; query i sees the positions begin[i] to end[i] of it (relative, end > begin for all).
// k_scale, v_scale: of each position of int8. out[i]: [D], written. The values behind a query's end are never read for it:
// they may be garbage.
template <Format F, int T>
inline void chunk_as(const float* const* q, const Rows<F>& keys, const Rows<F>& values, const float* k_scale,
                     const float* v_scale, std::int64_t start, const int* begin, const int* end, int D, float scale,
                     const Bias* bias, Gathered* gathered, float* const* out) {
  alignas(64) float scores[T][kChunkPositions];
  const Extent e = extent_of(begin, end, T);
  float* at[T];
  for (int i = 0; i < T; ++i) at[i] = scores[i] + e.first;
  scores_of<F, T>(q, keys.from(e.first), F == kInt8 ? k_scale + e.first : nullptr, e.last - e.first, D, scale, at);
  for (int i = 0; i < T; ++i) {
    if (bias != nullptr) add_bias(bias[i], start, scores[i], begin[i], end[i]);
    gathered[i] = soften(scores[i], begin[i], end[i]);
    if constexpr (F == kInt8)
      for (int p = begin[i]; p < end[i]; ++p) scores[i][p] *= v_scale[p];
    std::memset(out[i], 0, sizeof(float) * D);
  }
  if (e.common_from >= e.common_to) {
    for (int i = 0; i < T; ++i) add_values<F, 1>(values, begin[i], end[i], D, scores + i, out + i);
    return;
  }
  for (int i = 0; i < T; ++i) add_values<F, 1>(values, begin[i], e.common_from, D, scores + i, out + i);
  add_values<F, T>(values, e.common_from, e.common_to, D, scores, out);
  for (int i = 0; i < T; ++i) add_values<F, 1>(values, e.common_to, end[i], D, scores + i, out + i);
}

// ---------------------------------------------------------------- many queries on one chunk

constexpr int kKeyPanel = 2 * kLanes;  // positions, or dimensions of values, that lie side by side
constexpr int kQueries = 6;            // queries at once: 12 vectors of sums, which fill the pipes of every processor here
constexpr int kPackFrom = 12;          // queries that pay for packing
constexpr int pack_from(std::int32_t format) { return format == kInt4 ? kQueries : kPackFrom; }  // 4 bits are slow to read

// `sum` adds the lanes of a vector as a tree. Leaf u of it, left to right, is this lane.
inline int leaf_lane(int u) { return kLanes == 16 ? u / 2 + u % 2 * 8 : u; }

// How the products of a query and a key are added.
enum class Sums {
  kTree,   // as a single query adds them, lane by lane: the same bits in decode and prefill
  kChain,  // one after the other, which takes fewer instructions
};

// A chunk's keys and values as fp32: keys [position / kKeyPanel][D, in the order of their sums][kKeyPanel], values
// [D / kKeyPanel, rounded up][position][kKeyPanel].
struct PackedChunk {
  std::vector<float> keys, values;

  void reserve(int D) {
    keys.resize(static_cast<std::size_t>(kChunkPositions) * D);
    values.resize(static_cast<std::size_t>(kChunkPositions) * ((D + kKeyPanel - 1) / kKeyPanel * kKeyPanel));
  }
  std::size_t bytes() const { return 4 * (keys.size() + values.size()); }
};

// Row p + i, dimension d + j -> to[j * stride + i]: eight positions' eight dimensions, the other way round.
template <class Rows>
inline void transpose_eight(const Rows& rows, int p, int d, float* to, std::int64_t stride) {
#if defined(PARETUNE_AVX2)
  __m256 r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = (__m256)rows.at(p + i, d, rows.factors(p + i, d));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps(to + (4 + i) * stride, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) to[j * stride + i] = rows.one(p + i, d + j);
#endif
}

// Packs the positions `from` to n; what is left of the last panel is zero. Rows: as in kv.h.
template <Sums S, class Rows>
inline void pack_chunk(PackedChunk& c, const Rows& k_rows, const Rows& v_rows, int from, int n, int D) {
  const int J = D / kLanes, wide = J * kLanes, panels = (n + kKeyPanel - 1) / kKeyPanel;
  // Dimension d lies in row key_row(d).
  const auto key_row = [&](int d) {
    if constexpr (S == Sums::kChain) return d;
    const int lane = d % kLanes, u = kLanes == 16 ? lane % 8 * 2 + lane / 8 : lane;
    return d < wide ? u * J + d / kLanes : d;
  };
  from = from / kKeyPanel * kKeyPanel;
  for (int panel = from / kKeyPanel; panel < panels; ++panel) {
    float* keys = c.keys.data() + static_cast<std::size_t>(panel) * D * kKeyPanel;
    const int first = panel * kKeyPanel, held = std::min(kKeyPanel, n - first);
    int d = 0;
    if (held == kKeyPanel && kLanes >= 8) {
      // Eight dimensions that follow each other are as many rows apart as their leaves are.
      const std::int64_t stride = static_cast<std::int64_t>(S == Sums::kChain ? 1 : kLanes == 16 ? 2 * J : J) * kKeyPanel;
      for (; d + 8 <= wide; d += 8)
        for (int p = 0; p < kKeyPanel; p += 8)
          transpose_eight(k_rows, first + p, d, keys + static_cast<std::int64_t>(key_row(d)) * kKeyPanel + p, stride);
    }
    for (; d < D; ++d) {
      float* to = keys + static_cast<std::int64_t>(key_row(d)) * kKeyPanel;
      for (int p = 0; p < kKeyPanel; ++p) to[p] = p < held ? k_rows.one(first + p, d) : 0.0f;
    }
  }
  for (int d = 0; d < D; d += kKeyPanel) {
    float* to = c.values.data() + static_cast<std::size_t>(d) * kChunkPositions;
    if (d + kKeyPanel <= D) {
      for (int p = from; p < n; ++p) {
        const auto factors = v_rows.factors(p, d);  // kKeyPanel divides kKvGroup
        store_floats(to + p * kKeyPanel, v_rows.at(p, d, factors));
        store_floats(to + p * kKeyPanel + kLanes, v_rows.at(p, d + kLanes, factors));
      }
    } else {
      for (int p = from; p < n; ++p)
        for (int j = 0; j < kKeyPanel; ++j) to[p * kKeyPanel + j] = d + j < D ? v_rows.one(p, d + j) : 0.0f;
    }
  }
}

// dots[i][p] = q[i] . key p of a panel: for each lane a chain over its dimensions, then the tree of `sum`, then the rest.
// Steps: D / kLanes where it is known when this is compiled, or 0.
template <int Steps>
inline void panel_scores_as(const float* keys, const float* const* q, int D, Vec (*dots)[2]) {
  const int J = Steps > 0 ? Steps : D / kLanes;
  constexpr int kDepth = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
  Vec parts[kDepth + 1][kQueries][2];
  for (int u = 0; u < kLanes; ++u) {
    Vec acc[kQueries][2] = {};
#pragma GCC unroll 8
    for (int j = 0, d = leaf_lane(u); j < J; ++j, d += kLanes, keys += kKeyPanel) {
      const Vec a = load_floats(keys), b = load_floats(keys + kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < kQueries; ++i) {
        const Vec x = fill(q[i][d]);
        acc[i][0] = multiply_add(a, x, acc[i][0]);
        acc[i][1] = multiply_add(b, x, acc[i][1]);
      }
    }
    int level = 0;
    for (int n = u; n & 1; n >>= 1, ++level) {
#pragma GCC unroll 6
      for (int i = 0; i < kQueries; ++i)
        for (int v = 0; v < 2; ++v) acc[i][v] = parts[level][i][v] + acc[i][v];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kQueries; ++i)
      for (int v = 0; v < 2; ++v) parts[level][i][v] = acc[i][v];
  }
  for (int i = 0; i < kQueries; ++i)
    for (int v = 0; v < 2; ++v) dots[i][v] = parts[kDepth][i][v];
  for (int d = J * kLanes; d < D; ++d, keys += kKeyPanel) {
    const Vec a = load_floats(keys), b = load_floats(keys + kLanes);
    for (int i = 0; i < kQueries; ++i) {
      const Vec x = fill(q[i][d]);
      dots[i][0] = multiply_add(a, x, dots[i][0]);
      dots[i][1] = multiply_add(b, x, dots[i][1]);
    }
  }
}

// The same where every sum is one chain.
inline void panel_scores_chain(const float* keys, const float* const* q, int D, Vec (*dots)[2]) {
  Vec acc[kQueries][2] = {};
  for (int d = 0; d < D; ++d, keys += kKeyPanel) {
    const Vec a = load_floats(keys), b = load_floats(keys + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kQueries; ++i) {
      const Vec x = fill(q[i][d]);
      acc[i][0] = multiply_add(a, x, acc[i][0]);
      acc[i][1] = multiply_add(b, x, acc[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kQueries; ++i) dots[i][0] = acc[i][0], dots[i][1] = acc[i][1];
}

template <Sums S>
inline void panel_scores(const float* keys, const float* const* q, int D, Vec (*dots)[2]) {
  if constexpr (S == Sums::kChain) panel_scores_chain(keys, q, D, dots);
  else if (D == 64) panel_scores_as<64 / kLanes>(keys, q, D, dots);
  else if (D == 128) panel_scores_as<128 / kLanes>(keys, q, D, dots);
  else panel_scores_as<0>(keys, q, D, dots);
}

// out[i] += sum over the positions `from` to `to` of weights[i][p] * v[p], for T queries.
template <int T>
inline void panel_values(const PackedChunk& c, int from, int to, int D, const float (*weights)[kChunkPositions], float* const* out) {
  for (int d = 0; d < D; d += kKeyPanel) {
    const float* values = c.values.data() + static_cast<std::size_t>(d) * kChunkPositions;
    const int n = std::min(kKeyPanel, D - d);
    float edge[T][kKeyPanel] = {};
    Vec acc[T][2];
    for (int i = 0; i < T; ++i) {
      if (n < kKeyPanel) std::memcpy(edge[i], out[i] + d, sizeof(float) * n);
      const float* at = n < kKeyPanel ? edge[i] : out[i] + d;
      acc[i][0] = load_floats(at), acc[i][1] = load_floats(at + kLanes);
    }
    for (int p = from; p < to; ++p) {
      const Vec a = load_floats(values + p * kKeyPanel), b = load_floats(values + p * kKeyPanel + kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < T; ++i) {
        const Vec x = fill(weights[i][p]);
        acc[i][0] = multiply_add(a, x, acc[i][0]);
        acc[i][1] = multiply_add(b, x, acc[i][1]);
      }
    }
    for (int i = 0; i < T; ++i) {
      float* at = n < kKeyPanel ? edge[i] : out[i] + d;
      store_floats(at, acc[i][0]), store_floats(at + kLanes, acc[i][1]);
      if (n < kKeyPanel) std::memcpy(out[i] + d, edge[i], sizeof(float) * n);
    }
  }
}

// As `chunk_as`, for kQueries queries on a packed chunk. k_scale, v_scale: of each position, or null.
// hide(i, scores): sets what else query i does not see to minus infinity.
template <Sums S, class Hide>
inline void tile_on_chunk(const PackedChunk& c, const float* const* q, std::int64_t start, const int* begin, const int* end,
                          int D, float scale, const float* k_scale, const float* v_scale, const Bias* bias,
                          Gathered* gathered, float* const* out, Hide hide) {
  alignas(64) float scores[kQueries][kChunkPositions];
  const Extent e = extent_of(begin, end, kQueries);
  for (int p = e.first / kKeyPanel * kKeyPanel; p < e.last; p += kKeyPanel) {
    Vec dots[kQueries][2];
    panel_scores<S>(c.keys.data() + static_cast<std::size_t>(p) * D, q, D, dots);
    for (int v = 0; v < 2; ++v) {
      Vec factor = fill(scale);
      if (k_scale != nullptr) {
        float scales[kLanes] = {};
        for (int j = 0; j < kLanes && p + v * kLanes + j < e.last; ++j) scales[j] = k_scale[p + v * kLanes + j];
        factor = scale * load_floats(scales);
      }
      for (int i = 0; i < kQueries; ++i) store_floats(scores[i] + p + v * kLanes, dots[i][v] * factor);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    if (bias != nullptr) add_bias(bias[i], start, scores[i], begin[i], end[i]);
    hide(i, scores[i]);
    gathered[i] = soften(scores[i], begin[i], end[i]);
    if (v_scale != nullptr)
      for (int p = begin[i]; p < end[i]; ++p) scores[i][p] *= v_scale[p];
    std::memset(out[i], 0, sizeof(float) * D);
  }
  const bool is_shared = e.common_from < e.common_to;
  for (int i = 0; i < kQueries; ++i) panel_values<1>(c, begin[i], is_shared ? e.common_from : end[i], D, scores + i, out + i);
  if (!is_shared) return;
  panel_values<kQueries>(c, e.common_from, e.common_to, D, scores, out);
  for (int i = 0; i < kQueries; ++i) panel_values<1>(c, e.common_to, end[i], D, scores + i, out + i);
}

// The n queries in tiles; the last tile is filled up with its first query, whose result is thrown away.
template <class Run>
inline void in_tiles(int n, const float* const* q, const int* begin, const int* end, const Bias* bias, Gathered* gathered,
                     float* const* out, float* spare, Run run) {
  for (int from = 0; from < n; from += kQueries) {
    const float* tile_q[kQueries];
    int tile_begin[kQueries], tile_end[kQueries];
    Bias tile_bias[kQueries];
    Gathered found[kQueries];
    float* tile_out[kQueries];
    for (int i = 0; i < kQueries; ++i) {
      const int at = from + i < n ? from + i : from;
      tile_q[i] = q[at], tile_begin[i] = begin[at], tile_end[i] = end[at];
      if (bias != nullptr) tile_bias[i] = bias[at];
      tile_out[i] = from + i < n ? out[at] : spare;
    }
    run(from, tile_q, tile_begin, tile_end, bias == nullptr ? nullptr : tile_bias, found, tile_out);
    for (int i = 0; i < kQueries && from + i < n; ++i) gathered[from + i] = found[i];
  }
}

// What a thread needs for a chunk.
struct ChunkMemory {
  PackedChunk packed;                    // of many queries
  std::vector<float> k_scales, v_scales;  // of a 4-bit cache: scales and minima of each position

  void reserve(int D) {
    k_scales.resize(static_cast<std::size_t>(kChunkPositions) * 2 * std::max(1, D / kKvGroup));
    v_scales.resize(k_scales.size());
  }
  std::size_t bytes() const { return packed.bytes() + 4 * (k_scales.size() + v_scales.size()); }
};

// One chunk for n queries. c: of the chunk's first position, `start`. n_held: positions of it that are stored.
// memory: reserved, its packed part too where n is pack_from(format) or more. spare: [D].
inline void attend_chunk(int n, const float* const* q, const HeadCache& c, std::int64_t start, int n_held, const int* begin,
                         const int* end, int D, float scale, const Bias* bias, Gathered* gathered, float* const* out,
                         ChunkMemory& memory, float* spare) {
  const auto run = [&]<Format F>() {
    const int from = *std::min_element(begin, begin + n) / kKeyPanel * kKeyPanel;
    if constexpr (F == kInt4) {
      const HeadCache seen = c.from(from, D);
      const int each = 2 * kv_groups(D), n_seen = (n_held - from) * each;
      widen(seen.k_scale, memory.k_scales.data() + from * each, n_seen);
      widen(seen.v_scale, memory.v_scales.data() + from * each, n_seen);
    }
    const Rows<F> keys(c.k, memory.k_scales.data(), D), values(c.v, memory.v_scales.data(), D);
    const float* const k_scale = F == kInt8 ? reinterpret_cast<const float*>(c.k_scale) : nullptr;
    const float* const v_scale = F == kInt8 ? reinterpret_cast<const float*>(c.v_scale) : nullptr;
    if (n >= pack_from(F)) {
      pack_chunk<Sums::kTree>(memory.packed, keys, values, from, n_held, D);
      in_tiles(n, q, begin, end, bias, gathered, out, spare,
               [&](int, const float* const* tq, const int* b, const int* e, const Bias* tb, Gathered* found, float* const* to) {
                 tile_on_chunk<Sums::kTree>(memory.packed, tq, start, b, e, D, scale, k_scale, v_scale, tb, found, to, [](int, float*) {});
               });
      return;
    }
    int i = 0;
    for (; i + kQueryTile <= n; i += kQueryTile)
      chunk_as<F, kQueryTile>(q + i, keys, values, k_scale, v_scale, start, begin + i, end + i, D, scale,
                              bias == nullptr ? nullptr : bias + i, gathered + i, out + i);
    for (; i < n; ++i)
      chunk_as<F, 1>(q + i, keys, values, k_scale, v_scale, start, begin + i, end + i, D, scale,
                     bias == nullptr ? nullptr : bias + i, gathered + i, out + i);
  };
  switch (c.format) {
    case kFp32: run.template operator()<kFp32>(); break;
    case kBf16: run.template operator()<kBf16>(); break;
    case kFp16: run.template operator()<kFp16>(); break;
    case kInt8: run.template operator()<kInt8>(); break;
    case kInt4: run.template operator()<kInt4>(); break;
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
  // One of the two is 1.
  const float a = all->largest == largest ? 1.0f : std::exp(all->largest - largest);
  const float b = part.largest == largest ? 1.0f : std::exp(part.largest - largest);
  all->largest = largest;
  all->total = all->total * a + part.total * b;
  for (int d = 0; d < D; ++d) out[d] = out[d] * a + part_out[d] * b;
}
