// The attention operator on all shapes, to be run under the sanitizers: keys, values and results in memory of exactly the
// size that they need, keys that no run names poisoned. Results are those of plain loops, whatever the threads and blocks.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#include "attend.cpp"
#include "sanitized.h"

namespace {

// Somebody else's team, which comes with one thread more than was asked for.
void one_by_one(void (*work)(void*), void* self, unsigned n, unsigned) {
  for (unsigned t = 0; t <= n; ++t) work(self);
}

struct Shape {
  int B, H, Hkv, K, n, D;  // the K queries are the last of n positions
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 8},      {2, 4, 2, 1, 300, 16},  {1, 3, 3, 130, 130, 13}, {2, 4, 1, 97, 280, 26},
    {1, 2, 2, 450, 450, 32}, {1, 20, 1, 70, 77, 6}, {1, 2, 1, 256, 512, 16},
};

// Who sees whom: a window and its prefix, columns; window 0 is dense.
struct Mechanism {
  int window, prefix, stride;
  bool has_alibi;

  int begin(int i) const { return window == 0 ? 0 : std::max(0, i - window + 1); }
  bool far(int j) const { return j < prefix || (stride > 0 && j % stride == 0); }
  bool sees(int i, int j) const { return j <= i && (j >= begin(i) || far(j)); }
};

constexpr Mechanism kMechanisms[] = {{0, 0, 0, false}, {0, 0, 0, true}, {5, 0, 0, false}, {300, 0, 0, true}, {70, 3, 0, true}, {9, 70, 0, false}, {3, 0, 8, true}};

// Runs as Python plans them: far keys before any neighbourhood, then what some have in theirs, then what all have.
void plan(const Mechanism& m, int first, int K, int size, std::vector<Block>& blocks, std::vector<Run>& runs) {
  const auto add = [&](int from, int to, const std::function<int(int)>& kind) {  // 0: none, 1: all, 2: local
    for (int j = from; j < to;) {
      int end = j;
      while (end < to && kind(end) == kind(j)) ++end;
      if (kind(j) != 0) runs.push_back({j, end, kind(j) == 2});
      j = end;
    }
  };
  for (int from = first; from < first + K;) {
    const int to = std::min(from / size * size + size, first + K), low = m.begin(from), sure = m.begin(to - 1);
    const int at = static_cast<int>(runs.size());
    add(0, low, [&](int j) { return m.far(j) ? 1 : 0; });
    add(low, sure, [&](int j) { return m.far(j) ? 1 : 2; });
    add(sure, to, [](int) { return 1; });
    blocks.push_back({from - first, to - first, at, static_cast<std::int32_t>(runs.size())});
    from = to;
  }
}

// Numbers in a format, in memory of exactly their size.
template <Format F>
struct Numbers {
  std::vector<char> bytes;

  Numbers(std::size_t n, std::mt19937& random) : bytes(n * element_bytes(F)) {
    std::normal_distribution<float> draw;
    for (std::size_t i = 0; i < n; ++i) set(i, draw(random));
  }
  void set(std::size_t i, float x) { store(&x, bytes.data() + i * element_bytes(F), F, 1); }
  double at(std::size_t i) const { return load_one<F>(bytes.data() + i * element_bytes(F), 0); }
};

template <Format F>
void check(const Shape& s, const Mechanism& m, int size, int seed) {
  std::mt19937 random(seed);
  const int first = s.n - s.K, group = s.H / s.Hkv;
  const std::size_t n_q = static_cast<std::size_t>(s.B) * s.H * s.K * s.D, n_k = static_cast<std::size_t>(s.B) * s.Hkv * s.n * s.D;
  const Numbers<F> q(n_q, random);
  Numbers<F> k(n_k, random), v(n_k, random);
  std::vector<Block> blocks;
  std::vector<Run> runs;
  plan(m, first, s.K, size, blocks, runs);
  for (int j = 0; j < s.n; ++j) {  // what no query sees is never touched
    bool is_seen = false;
    for (const Run& run : runs) is_seen = is_seen || (run.start <= j && j < run.end);
    for (int b = 0; b < s.B * s.Hkv && !is_seen; ++b)
      for (int d = 0; d < s.D; ++d) k.set((static_cast<std::size_t>(b) * s.n + j) * s.D + d, NAN), v.set((static_cast<std::size_t>(b) * s.n + j) * s.D + d, NAN);
  }
  std::vector<std::int32_t> begin;
  for (int i = first; i < s.n; ++i) begin.push_back(m.begin(i));
  std::vector<float> slopes;
  for (int h = 0; h < s.H; ++h) slopes.push_back(std::exp2(-8.0f * (h + 1) / s.H));

  Numbers<F> out(n_q, random);
  const auto strides = [](std::int64_t* to, int heads, int rows, int D) {
    to[0] = static_cast<std::int64_t>(heads) * rows * D, to[1] = static_cast<std::int64_t>(rows) * D, to[2] = D;
  };
  Attend call{};
  call.q = q.bytes.data(), call.k = k.bytes.data(), call.v = v.bytes.data(), call.out = out.bytes.data();
  strides(call.q_stride, s.H, s.K, s.D), strides(call.out_stride, s.H, s.K, s.D);
  strides(call.k_stride, s.Hkv, s.n, s.D), strides(call.v_stride, s.Hkv, s.n, s.D);
  call.blocks = blocks.data(), call.runs = runs.data(), call.begin = begin.data();
  call.slopes = m.has_alibi ? slopes.data() : nullptr;
  call.B = s.B, call.H = s.H, call.Hkv = s.Hkv, call.K = s.K, call.D = s.D;
  call.n_blocks = static_cast<int>(blocks.size()), call.format = F, call.first = first, call.scale = 0.3f;

  std::vector<char> alone;
  for (int n_threads : {1, 2, 5}) {
    void* workers = paretune_workers(n_threads);
    REQUIRE(workers != nullptr);
    for (Parallel parallel : {Parallel{}, Parallel{}, Parallel{one_by_one}}) {
      std::fill(out.bytes.begin(), out.bytes.end(), static_cast<char>(0xff));  // not a number in every format
      REQUIRE(paretune_attend(workers, &call, parallel) == 0);
    }
    paretune_workers_free(workers);
    if (n_threads == 1) alone = out.bytes;
    REQUIRE(out.bytes == alone);
  }
  if (kOnlyRaces) return;
  const double allowed = F == kFp32 ? 2e-5 : F == kBf16 ? 2e-2 : 3e-3;
  std::vector<double> weights(s.n);
  for (int b = 0; b < s.B; ++b)
    for (int h = 0; h < s.H; ++h)
      for (int i = 0; i < s.K; ++i) {
        const std::size_t query = ((static_cast<std::size_t>(b) * s.H + h) * s.K + i) * s.D;
        const std::size_t keys = (static_cast<std::size_t>(b) * s.Hkv + h / group) * s.n * s.D;
        double largest = -INFINITY, total = 0;
        for (int j = 0; j < s.n; ++j) {
          weights[j] = -INFINITY;
          if (!m.sees(first + i, j)) continue;
          double score = 0;
          for (int d = 0; d < s.D; ++d) score += q.at(query + d) * k.at(keys + static_cast<std::size_t>(j) * s.D + d);
          weights[j] = score * call.scale - (m.has_alibi ? slopes[h] * (first + i - j) : 0.0);
          largest = std::max(largest, weights[j]);
        }
        for (double& w : weights) total += w = std::exp(w - largest);
        for (int d = 0; d < s.D; ++d) {
          double wanted = 0;
          for (int j = 0; j < s.n; ++j)
            if (weights[j] > 0) wanted += weights[j] / total * v.at(keys + static_cast<std::size_t>(j) * s.D + d);
          REQUIRE(std::abs(out.at(query + d) - wanted) <= allowed * (1 + std::abs(wanted)));
        }
      }
}

}  // namespace

int main() {
  int seed = 0;
  for (const Shape& shape : kShapes)
    for (const Mechanism& mechanism : kMechanisms) {
      const int size = mechanism.stride > 0 ? 64 : 192;
      check<kFp32>(shape, mechanism, size, ++seed);
      if (kOnlyRaces) continue;
      check<kBf16>(shape, mechanism, 64, ++seed);
      check<kFp16>(shape, mechanism, size, ++seed);
    }
  std::fprintf(stderr, "attend: done\n");
  return 0;
}
