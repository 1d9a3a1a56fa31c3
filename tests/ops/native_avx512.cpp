// Products and attention against sums in double, whatever instruction set this is compiled for (simulated_avx512.h has
// the one that few test machines have). Prints a line with a digest for each product, so that builds can be compared.
#if defined(PARETUNE_SIMULATE)
#include "simulated_avx512.h"
#endif

#include <cstdio>

#include "attention.h"
#include "native_matrices.h"

namespace {

int n_failures = 0;

#define CHECK(condition, ...)                                                  \
  do {                                                                         \
    if (!(condition) && ++n_failures < 20) {                                   \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);     \
      std::fprintf(stderr, __VA_ARGS__);                                       \
      std::fprintf(stderr, "\n");                                              \
    }                                                                          \
  } while (false)

std::uint64_t digest(const std::vector<float>& values) {
  std::uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (float value : values) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}

bool are_same(const float* a, const float* b, std::size_t n) { return std::memcmp(a, b, n * sizeof(float)) == 0; }

// ---------------------------------------------------------------- products

// The inputs as `kind` sees them, in double.
std::vector<double> seen(const Kind& kind, const std::vector<float>& x, int M, int C) {
  std::vector<double> out(x.begin(), x.end());
  if (kind.format == kBf16 && kHasBf16Dot)
    for (std::size_t i = 0; i < x.size(); ++i) out[i] = from_bf16(to_bf16(x[i]));
  if (!is_integer(kind.format)) return out;
  const bool has_zero = kind.activation_bits == 7;  // 128 steps from the smallest to the largest
  const float limit = kind.activation_bits == 16 ? 32767.0f : 127.0f;
  for (int m = 0; m < M; ++m)
    for (int from = 0; from < C; from += kChunk) {
      const int to = std::min(C, from + kChunk);
      float low = 0.0f, high = 0.0f;
      for (int c = from; c < to; ++c) low = std::min(low, x[m * C + c]), high = std::max(high, x[m * C + c]);
      const float range = has_zero ? high - low : std::max(high, -low);
      const double least = has_zero ? std::nearbyint(low * (limit / range)) : -limit;
      for (int c = from; c < to; ++c) {
        const double q = std::nearbyint(x[m * C + c] * (limit / range));
        out[m * C + c] = std::clamp(q, least, has_zero ? least + limit : limit) * (range / limit);
      }
    }
  return out;
}

// y [M, N] as `paretune_products` (step.cpp), all memory of its exact size.
std::vector<float> multiplied(const Matrix& w, const float* x, int M) {
  const int C = w.n_in, padded = round_up(C, kChunk);
  const bool has_bytes = kHasByteInputs && w.activation_bits <= 8;
  const std::size_t n_inputs = static_cast<std::size_t>(M) * padded;
  std::vector<float> own(x, x + static_cast<std::size_t>(M) * C), scale(n_inputs / kChunk);
  std::vector<std::int16_t> q(n_inputs);
  std::vector<std::int8_t> q8(has_bytes ? n_inputs : 0);
  std::vector<std::int32_t> sums(n_inputs / kSumOver);
  std::vector<std::uint16_t> pairs(static_cast<std::size_t>(M) * (C + C % 2));
  for (int m = 0; m < M; ++m) {
    quantize_row(x + m * C, C, w.activation_bits, q.data() + m * padded, has_bytes ? q8.data() + m * padded : nullptr,
                 scale.data() + m * (padded / kChunk), sums.data() + m * (padded / kSumOver));
    round_row_to_bf16(x + m * C, C, pairs.data() + m * (C + C % 2));
  }
  Inputs in;
  in.x = own.data(), in.x_stride = C, in.q = q.data(), in.q8 = q8.data(), in.scale = scale.data();
  in.sums = sums.data(), in.q_stride = padded, in.pairs = pairs.data();
  std::vector<float> held(static_cast<std::size_t>(std::min(M, kPanelInputs)) * kPanelRows), y(M * w.n_out);
  products(w, 0, round_up(w.n_out, kBlock) / kBlock, in, M, held.data(),
           [&](int n, int n_rows, int m, int n_in, const float* found) {
             for (int i = 0; i < n_in; ++i)
               std::memcpy(y.data() + (m + i) * w.n_out + n, found + i * kPanelRows, sizeof(float) * n_rows);
           });
  return y;
}

void check_products(const Kind& kind, int N, int C) {
  Random random(N * 10000 + C);
  const Made made(kind, N, C, random);
  constexpr int kMost = 100;
  const std::vector<float> x = normals(random, kMost * C);
  const std::vector<double> inputs = seen(kind, x, kMost, C);
  std::vector<double> exact(kMost * N);
  for (int m = 0; m < kMost; ++m)
    for (int n = 0; n < N; ++n) {
      double sum = 0.0;
      for (int c = 0; c < C; ++c) sum += inputs[m * C + c] * made.exact[static_cast<std::size_t>(n) * C + c];
      exact[m * N + n] = sum;
    }
  std::vector<float> row(C);
  for (int n = 0; n < N; ++n) {
    matrix_row(made.matrix, n, row.data());
    for (int c = 0; c < C; ++c)
      CHECK(std::fabs(row[c] - made.exact[static_cast<std::size_t>(n) * C + c]) <= 1e-6, "%s [%d, %d]", kind.name,
            n, c);
  }
  std::vector<float> alone;
  for (int m = 0; m < kMost; ++m) {
    const std::vector<float> y = multiplied(made.matrix, x.data() + m * C, 1);
    alone.insert(alone.end(), y.begin(), y.end());
  }
  // As in test_native.py: a chain of n fp32 sums of unit normals is off by about n * 2^-24 / sqrt(2).
  const double bound = 4.0 * std::min(C, 256) * std::sqrt(std::max(1.0, C / 256.0)) * 0x1p-24 + 0x1p-20;
  for (int i = 0; i < kMost * N; ++i)
    CHECK(std::fabs(alone[i] - exact[i]) < bound, "%s N %d C %d row %d: %g for %g", kind.name, N, C, i / N, alone[i],
          exact[i]);
  for (int M : {1, 2, 3, 4, 6, 7, 13, 100}) {
    const std::vector<float> y = multiplied(made.matrix, x.data(), M);
    CHECK(are_same(y.data(), alone.data(), y.size()), "%s N %d C %d M %d", kind.name, N, C, M);
  }
  std::printf("%s: %d x %d: %016llx\n", kind.name, N, C, static_cast<unsigned long long>(digest(alone)));
}

// A NaN or an infinity reaches the sums it is part of, and no others.
void check_poison(const Kind& kind) {
  Random random(7);
  const int N = 20, C = 256, M = 9;
  const Made made(kind, N, C, random);
  std::vector<float> x = normals(random, M * C);
  x[4 * C + 200] = NAN, x[6 * C + 3] = INFINITY;
  const std::vector<float> y = multiplied(made.matrix, x.data(), M);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      CHECK(std::isfinite(y[m * N + n]) == (m != 4 && m != 6), "%s row %d: %g", kind.name, m, y[m * N + n]);
}

// The largest sums there are: all inputs and weights at their limits, of either sign.
void check_extremes(const Kind& kind) {
  if (!is_integer(kind.format)) return;
  const int N = 33, C = 256;
  Random random(3);
  Made made(kind, N, C, random);
  for (int lowest : {1, 0}) {
    const bool is_half = is_nibbles(kind.format);
    const int q = is_half ? (lowest ? -8 : 7) : (lowest ? -128 : 127);
    const std::uint8_t byte = static_cast<std::uint8_t>(is_half ? (q + 8) * 17 : q);
    std::vector<std::uint8_t> source(is_half ? N * C / 2 : N * C, byte);
    pack_rows(kind.format, source.data(), N, C, 0, round_up(N, kBlock) / kBlock, made.packed.data());
    for (float sign : {1.0f, -1.0f}) {
      const std::vector<float> x(static_cast<std::size_t>(7) * C, 3.0f * sign);
      const std::vector<float> y = multiplied(made.matrix, x.data(), 7);
      for (int n = 0; n < N; ++n) {
        double total = 0.0;
        for (int c = 0; c < C; ++c) {
          const std::int64_t at = kind.group == 0 ? 0 : group_at(made.matrix, n, c);
          const double factor = kind.group == 0 ? made.row_scale[n] : from_fp16(made.scale[at]);
          total += (number_of(kind.format, q) - kind.lowest) * factor;
          if (kind.has_minimum) total += from_fp16(made.minimum[at]);
        }
        // Inputs of 7 bits that are all alike are their own step: as exact as the others.
        const double exact = total * 3.0 * sign;
        for (int m = 0; m < 7; ++m)
          CHECK(std::fabs(y[m * N + n] - exact) <= 1e-5 * std::max(std::fabs(exact), kind.has_minimum ? 3.0 * C : 0.0),
                "%s: %g for %g", kind.name, y[m * N + n], exact);
      }
    }
  }
}

// ---------------------------------------------------------------- attention

struct Keys {
  std::vector<char> k, v, k_scale, v_scale;
  HeadCache cache;

  Keys(std::int32_t format, int n, int D)
      : k(n * row_bytes(format, D)), v(k.size()), k_scale(n * scale_bytes(format, D)), v_scale(k_scale.size()) {
    point(format);
  }
  void point(std::int32_t format) {
    const bool has_scales = !k_scale.empty();
    cache = {k.data(), v.data(), has_scales ? k_scale.data() : nullptr, has_scales ? v_scale.data() : nullptr, format};
  }
  static double at(const std::vector<char>& data, const std::vector<char>& scale, std::int32_t format, int D, int p,
                   int d) {
    const std::int64_t i = static_cast<std::int64_t>(p) * D + d;
    if (format == kInt4) {
      const int byte = static_cast<unsigned char>(data[i / 2]), G = kv_groups(D);
      const std::int64_t group = static_cast<std::int64_t>(p) * G + d / (D / G);
      return static_cast<double>(i % 2 ? byte >> 4 : byte & 15) * load_one<kFp16>(scale.data(), 2 * group) +
             load_one<kFp16>(scale.data(), 2 * group + 1);
    }
    switch (format) {
      case kFp32: return load_one<kFp32>(data.data(), i);
      case kBf16: return load_one<kBf16>(data.data(), i);
      case kFp16: return load_one<kFp16>(data.data(), i);
      default: return static_cast<double>(load_one<kInt8>(data.data(), i)) * load_one<kFp32>(scale.data(), p);
    }
  }
  double key(int D, int p, int d) const { return at(k, k_scale, cache.format, D, p, d); }
  double value(int D, int p, int d) const { return at(v, v_scale, cache.format, D, p, d); }
};

template <Format F, int T>
void check_parts(const Keys& keys, const std::vector<std::vector<float>>& queries, int n, int D) {
  const float* q[T];
  float* scores[T];
  float* outs[T];
  std::vector<std::vector<float>> found(T, std::vector<float>(n)), out(T, std::vector<float>(D, 0.5f));
  static float weights[T][kChunkPositions];
  for (int i = 0; i < T; ++i) {
    q[i] = queries[i].data(), scores[i] = found[i].data(), outs[i] = out[i].data();
    for (int p = 0; p < n; ++p) weights[i][p] = static_cast<float>((p * 7 + i * 3) % 11) / 11.0f;
  }
  const std::size_t n_scales = F == kInt4 ? keys.k_scale.size() / 2 : 0;
  std::vector<float> k_scales(n_scales), v_scales(n_scales);
  widen(keys.cache.k_scale, k_scales.data(), static_cast<int>(n_scales));
  widen(keys.cache.v_scale, v_scales.data(), static_cast<int>(n_scales));
  const Rows<F> k_rows(keys.cache.k, k_scales.data(), D), v_rows(keys.cache.v, v_scales.data(), D);
  scores_of<F, T>(q, k_rows, reinterpret_cast<const float*>(keys.cache.k_scale), n, D, 0.25f, scores);
  const int from = n / 3;
  add_values<F, T>(v_rows, from, n, D, weights, outs);
  for (int i = 0; i < T; ++i) {
    for (int p = 0; p < n; ++p) {
      double exact = 0.0;
      for (int d = 0; d < D; ++d) exact += q[i][d] * keys.key(D, p, d);
      CHECK(std::fabs(found[i][p] - exact * 0.25) < 4.0 * D * 0x1p-24 + 0x1p-20, "score %g for %g, D %d, format %d",
            found[i][p], exact * 0.25, D, F);
    }
    for (int d = 0; d < D; ++d) {
      double exact = 0.5;
      // Scales of int8 are part of the weights (attention.h).
      for (int p = from; p < n; ++p)
        exact += weights[i][p] * (F == kInt8 ? load_one<kInt8>(keys.v.data(), static_cast<std::int64_t>(p) * D + d)
                                             : keys.value(D, p, d));
      CHECK(std::fabs(out[i][d] - exact) < (F == kInt8 ? 127.0 : 1.0) * (4.0 * n * 0x1p-24 + 0x1p-20),
            "value %g for %g, D %d, format %d", out[i][d], exact, D, F);
    }
  }
}

void check_attention(std::int32_t format, int D, int length, int n_queries) {
  Random random(format * 1000 + D * 10 + length + n_queries);
  const std::int64_t start = length > kChunkPositions ? kChunkPositions : 0;
  Keys keys(format, length, D);
  for (int p = 0; p < length; ++p) append(keys.cache, p, normals(random, D).data(), normals(random, D).data(), D);
  std::vector<std::vector<float>> queries, out;
  std::vector<int> begin, end;
  for (int i = 0; i < std::max(n_queries, kQueryTile); ++i) queries.push_back(normals(random, D));
  const int n = static_cast<int>(length - start);
  for (int i = 0; i < n_queries; ++i) {
    // Growing ends as of the tokens of a step, or windows, some of which have no position in common.
    const bool has_window = length % 2 == 1;
    end.push_back(has_window ? 1 + static_cast<int>(random() % n) : std::max(1, n - n_queries + 1 + i));
    begin.push_back(has_window ? static_cast<int>(random() % end[i]) : 0);
    out.emplace_back(D);
  }
  std::vector<const float*> q;
  std::vector<float*> outs;
  for (int i = 0; i < n_queries; ++i) q.push_back(queries[i].data()), outs.push_back(out[i].data());
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
  std::vector<Gathered> gathered(n_queries);
  ChunkMemory memory;
  memory.reserve(D), memory.packed.reserve(D);
  std::vector<float> spare(D);
  // ALiBi from far behind, on every other shape.
  std::vector<Bias> bias(n_queries);
  for (int i = 0; i < n_queries; ++i) bias[i] = {1.0f / static_cast<float>(2 + i % 5), length + i};
  const Bias* const biases = D % 3 == 1 ? bias.data() : nullptr;
  attend_chunk(n_queries, q.data(), keys.cache.from(start, D), start, n, begin.data(), end.data(), D, scale,
               biases, gathered.data(), outs.data(), memory, spare.data());
  for (int i = 0; i < n_queries; ++i) {
    std::vector<double> weight(n), exact(D);
    double total = 0.0;
    for (int p = begin[i]; p < end[i]; ++p) {
      for (int d = 0; d < D; ++d) weight[p] += q[i][d] * keys.key(D, static_cast<int>(start) + p, d);
      const double distance = biases == nullptr ? 0.0 : static_cast<double>(bias[i].position - start - p);
      total += weight[p] = std::exp(weight[p] * scale - bias[i].slope * distance);
    }
    for (int p = begin[i]; p < end[i]; ++p)
      for (int d = 0; d < D; ++d) exact[d] += weight[p] * keys.value(D, static_cast<int>(start) + p, d);
    const double found = gathered[i].largest + std::log(gathered[i].total);
    CHECK(std::fabs(found - std::log(total)) < 1e-5, "total %g for %g, D %d, format %d", found, std::log(total), D,
          format);
    for (int d = 0; d < D; ++d)
      CHECK(std::fabs(out[i][d] / gathered[i].total - exact[d] / total) < 1e-5,
            "%g for %g, D %d, format %d, query %d of %d", out[i][d] / gathered[i].total, exact[d] / total, D, format,
            i, n_queries);
    // Alone the same bits, and what lies behind its end is not read.
    Keys poisoned = keys;
    poisoned.point(format);
    const std::int64_t n_seen = start + end[i];
    for (auto* each : {&poisoned.k, &poisoned.v})  // NaN in all float formats
      std::fill(each->begin() + n_seen * row_bytes(format, D), each->end(), static_cast<char>(0xff));
    for (auto* each : {&poisoned.k_scale, &poisoned.v_scale})
      std::fill(each->begin() + n_seen * scale_bytes(format, D), each->end(), static_cast<char>(0xff));
    std::vector<float> own(D);
    float* const own_out = own.data();
    Gathered found_alone;
    attend_chunk(1, &q[i], poisoned.cache.from(start, D), start, end[i], &begin[i], &end[i], D, scale,
                 biases == nullptr ? nullptr : &bias[i], &found_alone, &own_out, memory, spare.data());
    CHECK(are_same(own.data(), out[i].data(), D) && are_same(&found_alone.total, &gathered[i].total, 1) &&
              are_same(&found_alone.largest, &gathered[i].largest, 1),
          "query %d of %d, D %d, format %d", i, n_queries, D, format);
  }
  if (start == 0) {
    const auto check = [&]<Format F>() {
      check_parts<F, 1>(keys, queries, n, D);
      check_parts<F, kQueryTile>(keys, queries, n, D);
    };
    switch (format) {
      case kFp32: check.template operator()<kFp32>(); break;
      case kBf16: check.template operator()<kBf16>(); break;
      case kFp16: check.template operator()<kFp16>(); break;
      case kInt8: check.template operator()<kInt8>(); break;
      case kInt4: check.template operator()<kInt4>(); break;
    }
  }
}

// ---------------------------------------------------------------- rows

void check_rows(int C) {
  Random random(C);
  const std::vector<float> x = normals(random, C), gamma = normals(random, C), beta = normals(random, C);
  std::vector<float> out(C);
  double mean = 0.0, squares = 0.0, variance = 0.0;
  for (float v : x) mean += v, squares += static_cast<double>(v) * v;
  mean /= C;
  for (float v : x) variance += (v - mean) * (v - mean);
  layer_norm(x.data(), gamma.data(), beta.data(), 1e-5f, C, out.data());
  for (int c = 0; c < C; ++c) {
    const double exact = (x[c] - mean) / std::sqrt(variance / C + 1e-5) * gamma[c] + beta[c];
    CHECK(std::fabs(out[c] - exact) < 2e-5, "layer norm of %d: %g for %g", C, out[c], exact);
  }
  rms_norm(x.data(), gamma.data(), 1e-5f, C, out.data());
  for (int c = 0; c < C; ++c)
    CHECK(std::fabs(out[c] - x[c] / std::sqrt(squares / C + 1e-5) * gamma[c]) < 2e-5, "RMS norm of %d", C);
  for (int kind = 1; kind <= 5; ++kind) {
    out = x;
    for (int c = 0; c < C; ++c) out[c] *= static_cast<float>(c % 9);
    const std::vector<float> in = out;
    activate(kind, out.data(), C);
    for (int c = 0; c < C; ++c) {
      const double v = in[c];
      const double exact = kind == 1   ? 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)))
                           : kind == 2 ? 0.5 * v * (1 + std::erf(v / std::sqrt(2)))
                           : kind == 3 ? v / (1 + std::exp(-1.702 * v))
                           : kind == 4 ? std::max(v, 0.0)
                                       : v / (1 + std::exp(-v));
      CHECK(std::fabs(out[c] - exact) < 1e-6 * std::max(1.0, std::fabs(v)) + 1e-6,
            "activation %d of %g: %g for %g", kind, v, out[c], exact);
    }
  }
}

}  // namespace

int main() {
  for (const Kind& kind : kKinds) {
    for (int C : {1, 63, 72, 100, 128, 129, 576, 768, 1023, 1152}) {
      for (int N : {1, 17, 63, 200}) check_products(kind, N, C);
    }
    check_poison(kind);
    check_extremes(kind);
  }
  for (std::int32_t format : {kFp32, kBf16, kFp16, kInt8, kInt4})
    for (int D : {1, 2, 6, 13, 16, 40, 64, 80, 96, 128})
      for (int length : {1, 5, 100, 131, 256, 277, 400})
        for (int n : {1, 2, 5, 8, 16, 29})
          if (format != kInt4 || D % 2 == 0) check_attention(format, D, length, n);
  for (int C : {1, 15, 16, 63, 768}) check_rows(C);
  std::fprintf(stderr, "%s%s%s: %d failures\n", kIsa, kHasBf16Dot ? " + bf16" : "", kHasByteDot ? " + vnni" : "",
               n_failures);
  return n_failures == 0 ? 0 : 1;
}
