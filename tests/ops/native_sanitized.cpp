// Native programs of all shapes, to be run under the sanitizers: small random models in memory of exactly the size that
// they need, so that one byte read too many is found. The same tokens must give the same bits in any pieces and on any
// number of threads; the first run of each model is the reference.
#if defined(PARETUNE_SIMULATE)
#include "simulated_avx512.h"
#endif

#include <cstdio>
#include <cstdlib>
#include <deque>

#include "native_matrices.h"
#include "sanitized.h"
#include "step.cpp"

namespace {

constexpr int kLayers = 2, kVocab = 37, kMaxThreads = 5;

struct Shape {
  const char* name;
  bool is_llama;
  int n_head, n_kv_head, head_dim, n_inner, window, n_positions;
};

constexpr Shape kShapes[] = {
    {"gpt2", false, 4, 4, 16, 128, 0, 64},
    {"gpt2, odd", false, 3, 3, 13, 77, 0, 64},
    {"gpt2, one head, chunks", false, 1, 1, 33, 40, 0, 530},
    {"llama, grouped", true, 4, 2, 16, 96, 0, 64},
    {"llama, one key head, chunks", true, 4, 1, 16, 64, 0, 530},
    {"llama, more heads a key than fit", true, 20, 1, 6, 64, 0, 280},
    {"mistral, window, chunks", true, 2, 1, 32, 64, 300, 560},
    {"mistral, short window", true, 4, 2, 8, 33, 7, 64},
    {"llama, heads of two groups", true, 2, 1, 64, 64, 0, 280},
};

class Model {
 public:
  Shape shape;
  int n_embd;
  std::vector<Op> ops;
  std::vector<Matrix> matrices;
  std::vector<std::int32_t> widths;

  // Matrix after matrix takes the next kind that divides its inputs.
  Model(const Shape& s, std::vector<Kind> kinds, int seed)
      : shape(s), n_embd(s.n_head * s.head_dim), random_(seed), kinds_(std::move(kinds)) {
    const int kv_width = s.n_kv_head * s.head_dim, width = n_embd + 2 * kv_width;
    widths = {n_embd, width, n_embd, s.n_inner, s.n_inner};
    enum { kX, kQkv, kMixed, kInner, kGated };
    const int table = add_matrix(kVocab, n_embd);
    Op embed = op(kEmbed, 0, kX);
    embed.matrix = table;
    embed.matrix2 = s.is_llama ? -1 : add_matrix(s.n_positions, n_embd);
    const float* rope = nullptr;
    if (s.is_llama) {
      std::vector<float> frequencies;
      for (int i = 0; i < s.head_dim / 2; ++i) frequencies.push_back(std::pow(100.0f, -2.0f * i / s.head_dim));
      rope = keep(frequencies);
      embed.rope = rope, embed.head_dim = s.head_dim;
    }
    ops.push_back(embed);
    for (int layer = 0; layer < kLayers; ++layer) {
      if (s.is_llama) {
        linear(n_embd, n_embd, kX, kQkv, kRmsNorm).has_barrier = 0;
        Op& k = linear(kv_width, n_embd, kX, kQkv, kSameInput);
        k.out_offset = n_embd, k.has_barrier = 0;
        linear(kv_width, n_embd, kX, kQkv, kSameInput).out_offset = n_embd + kv_width;
      } else {
        linear(width, n_embd, kX, kQkv, kLayerNorm);
      }
      Op attention = op(kAttention, kQkv, kMixed);
      attention.layer = layer, attention.n_head = s.n_head, attention.n_kv_head = s.n_kv_head;
      attention.head_dim = s.head_dim, attention.window = s.window, attention.rope = rope;
      attention.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
      ops.push_back(attention);
      linear(n_embd, n_embd, kMixed, kX, kNoNorm).epilogue = kAdd;
      if (s.is_llama) {
        Op& gate = linear(s.n_inner, n_embd, kX, kGated, kRmsNorm);
        gate.epilogue = kActivate, gate.activation = 5, gate.has_barrier = 0;
        Op& up = linear(s.n_inner, n_embd, kX, kInner, kSameInput);
        up.epilogue = kGate, up.other = kGated;
      } else {
        Op& up = linear(s.n_inner, n_embd, kX, kInner, kLayerNorm);
        up.epilogue = kActivate, up.activation = 1 + layer;
      }
      linear(n_embd, s.n_inner, kInner, kX, kNoNorm).epilogue = kAdd;
    }
    Op head = op(kLinear, kX, kLogits);
    head.matrix = table, head.last_only = 1;  // tied
    normalise(head, s.is_llama ? kRmsNorm : kLayerNorm);
    ops.push_back(head);
    for (const Made& made : made_) matrices.push_back(made.matrix);
  }
  Model(const Model&) = delete;

  void* program(int n_threads) const {
    const auto size = [](const auto& list) { return static_cast<int>(list.size()); };
    void* out = paretune_program(ops.data(), size(ops), matrices.data(), size(matrices), widths.data(), size(widths),
                                 n_threads);
    REQUIRE(out != nullptr && paretune_program_bytes(out) > 0);
    return out;
  }

 private:
  static Op op(std::int32_t code, std::int32_t in, std::int32_t out) {
    Op made{};
    made.code = code, made.in = in, made.out = out, made.has_barrier = 1, made.eps = 1e-5f;
    return made;
  }
  int add_matrix(int N, int C) {
    const Kind& kind = kinds_[next_kind_++ % kinds_.size()];
    made_.emplace_back(kind, N, C, random_, 1.0f / std::sqrt(static_cast<float>(C)));
    return static_cast<int>(made_.size()) - 1;
  }
  const float* keep(std::vector<float> values) {
    kept_.push_back(std::move(values));
    return kept_.back().data();
  }
  void normalise(Op& o, std::int32_t norm) {
    o.norm = norm;
    if (norm == kLayerNorm || norm == kRmsNorm) o.gamma = keep(normals(random_, n_embd));
    if (norm == kLayerNorm) o.beta = keep(normals(random_, n_embd));
  }
  Op& linear(int N, int C, std::int32_t in, std::int32_t out, std::int32_t norm) {
    Op o = op(kLinear, in, out);
    o.matrix = add_matrix(N, C);
    if (!shape.is_llama) o.bias = keep(normals(random_, N));
    normalise(o, norm);
    ops.push_back(o);
    return ops.back();
  }

  Random random_;
  std::vector<Kind> kinds_;
  std::size_t next_kind_ = 0;
  std::deque<Made> made_;
  std::deque<std::vector<float>> kept_;
};

struct Cache {
  std::vector<std::vector<char>> k, v, k_scale, v_scale;
  std::vector<void*> k_at, v_at, k_scale_at, v_scale_at;
  std::vector<std::int64_t> lengths;
  std::int32_t format;
  int capacity;

  Cache(const Shape& s, int B, int n, std::int32_t f) : lengths(B), format(f), capacity(n) {
    const std::size_t rows = static_cast<std::size_t>(B) * s.n_kv_head * n;
    for (int layer = 0; layer < kLayers; ++layer) {
      for (auto* each : {&k, &v}) each->emplace_back(rows * row_bytes(f, s.head_dim), static_cast<char>(0xff));  // NaN, unless it was written
      for (auto* each : {&k_scale, &v_scale}) each->emplace_back(rows * scale_bytes(f, s.head_dim), static_cast<char>(0xff));
    }
    for (int layer = 0; layer < kLayers; ++layer) {
      k_at.push_back(k[layer].data()), v_at.push_back(v[layer].data());
      k_scale_at.push_back(k_scale[layer].data()), v_scale_at.push_back(v_scale[layer].data());
    }
  }
};

// One step; the logits [B, K or 1, V]. n_valid: tokens of each row that are held, or none for all.
std::vector<float> stepped(void* program, const Model& model, Cache& cache, const std::vector<std::int64_t>& tokens,
                           int K, bool all_logits, const std::vector<int>& n_valid = {}) {
  const int B = static_cast<int>(cache.lengths.size());
  std::vector<float> logits(static_cast<std::size_t>(B) * (all_logits ? K : 1) * kVocab, NAN);
  std::vector<std::int64_t> last(B, K - 1), best(B, -1), op_ns(model.ops.size());
  for (std::size_t b = 0; b < n_valid.size(); ++b) last[b] = std::max(n_valid[b], 1) - 1;
  REQUIRE(static_cast<int>(tokens.size()) == B * K);
  Step s{};
  s.tokens = tokens.data(), s.lengths = cache.lengths.data(), s.last = last.data();
  s.k = cache.k_at.data(), s.v = cache.v_at.data();
  if (!cache.k_scale[0].empty()) s.k_scale = cache.k_scale_at.data(), s.v_scale = cache.v_scale_at.data();
  s.logits = logits.data(), s.best = all_logits ? nullptr : best.data(), s.op_ns = K % 2 ? op_ns.data() : nullptr;
  s.B = B, s.K = K, s.capacity = cache.capacity, s.cache_format = cache.format, s.all_logits = all_logits;
  REQUIRE(paretune_step(program, &s) == 0);
  for (float value : logits) REQUIRE(std::isfinite(value));
  if (!all_logits)
    for (int b = 0; b < B; ++b)
      REQUIRE(best[b] == std::max_element(logits.begin() + b * kVocab, logits.begin() + (b + 1) * kVocab) -
                             (logits.begin() + b * kVocab));
  for (std::int64_t ns : op_ns) REQUIRE(ns >= 0);
  for (int b = 0; b < B; ++b) cache.lengths[b] += n_valid.empty() ? K : n_valid[b];
  return logits;
}

// All logits [B, n, V] of tokens [B, n] in pieces; a program of its own each time, so that its memory fits the steps.
std::vector<float> logits_of(const Model& model, const std::vector<std::int64_t>& tokens, int B,
                             const std::vector<int>& pieces, std::int32_t format, int n_threads) {
  const int n = static_cast<int>(tokens.size()) / B;
  void* program = model.program(n_threads);
  Cache cache(model.shape, B, n, format);
  std::vector<float> out(static_cast<std::size_t>(B) * n * kVocab);
  int from = 0;
  for (int K : pieces) {
    std::vector<std::int64_t> part;
    for (int b = 0; b < B; ++b) part.insert(part.end(), &tokens[b * n + from], &tokens[b * n + from] + K);
    const std::vector<float> found = stepped(program, model, cache, part, K, true);
    for (int b = 0; b < B; ++b)
      std::copy_n(found.data() + b * K * kVocab, K * kVocab, out.data() + (b * n + from) * kVocab);
    from += K;
  }
  REQUIRE(from == n);
  paretune_program_free(program);
  return out;
}

bool are_same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<std::int64_t> random_tokens(Random& random, int n) {
  std::vector<std::int64_t> out(n);
  for (std::int64_t& token : out) token = random() % kVocab;
  return out;
}

void check_pieces(const Model& model, std::int32_t format) {
  const bool is_long = model.shape.n_positions > kChunkPositions;
  const int B = is_long ? 1 : 3, n = is_long ? model.shape.n_positions : 40;
  Random random(n + format);
  const std::vector<std::int64_t> tokens = random_tokens(random, B * n);
  std::vector<std::vector<int>> ways = {{n}, {3, 17, 1, 1, n - 22}};  // 120 rows: two panels of inputs
  if (is_long) ways = {{n}, {n - 12, 1, 2, 5, 1, 3}};                // few tokens on a long context: shared by chunks
  const std::vector<float> wanted = logits_of(model, tokens, B, ways.back(), format, 1);
  for (const std::vector<int>& pieces : ways)
    for (int n_threads : {1, 2, 3, kMaxThreads})
      if (!kOnlyRaces || n_threads == 2 || n_threads == (pieces.size() > 1 ? kMaxThreads : 3))
        REQUIRE(are_same(logits_of(model, tokens, B, pieces, format, n_threads), wanted));
}

// Rows of unequal length, padded; `best`; steps that grow and shrink, on one program; threads that slept in between.
void check_batches(const Model& model, std::int32_t format, int n_threads) {
  Random random(format + 3);
  void* program = model.program(n_threads);
  for (int B : {1, 2, 5, 9}) {
    Cache cache(model.shape, B, 9 + 4 * 2, format);
    std::vector<int> n_valid;
    for (int b = 0; b < B; ++b) n_valid.push_back(1 + b % 9);
    stepped(program, model, cache, random_tokens(random, B * 9), 9, false, n_valid);
    for (int K : {1, 2, 1}) {
      if (K == 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      stepped(program, model, cache, random_tokens(random, B * K), K, false);
    }
  }
  const std::int64_t strange[] = {-1, kVocab, std::int64_t{1} << 40};
  for (const std::int64_t& token : strange) {
    Step s{};
    s.tokens = &token, s.B = s.K = 1;
    REQUIRE(paretune_step(program, &s) == 2);
    s.B = 0;
    REQUIRE(paretune_step(program, &s) == 1);
  }
  paretune_program_free(program);
}

// Programs that are freed at once, while their threads start, spin or sleep; two that run at the same time.
void check_lives(const Model& model) {
  for (int i = 0; i < 40; ++i) {
    void* program = model.program(1 + i % kMaxThreads);
    if (i % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(20 * i));
    paretune_program_free(program);
  }
  std::vector<std::thread> callers;
  for (int t = 0; t < 2; ++t)
    callers.emplace_back([&model, t] {
      for (std::int32_t format : {kBf16, kInt8}) check_batches(model, format, 2 + t);
    });
  for (std::thread& caller : callers) caller.join();
}

void check_products(const Kind& kind) {
  Random random(11);
  for (int C : {1, 7, 64, 130, 384, 1152}) {
    for (int N : {1, 16, 37, 150}) {
      const Made made(kind, N, C, random);
      std::vector<float> numbers(static_cast<std::size_t>(N) * C), row(C);
      paretune_unpack(&made.matrix, numbers.data());
      paretune_row(&made.matrix, N - 1, row.data());
      const std::vector<float> x = normals(random, static_cast<std::size_t>(100) * C);
      for (int M : {1, 2, 5, 13, 100}) {
        const std::vector<float> own(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(M) * C);
        std::vector<float> y(static_cast<std::size_t>(M) * N, NAN);
        REQUIRE(paretune_products(&made.matrix, own.data(), M, y.data()) == 0);
        for (float value : y) REQUIRE(std::isfinite(value));
      }
      // The largest values there are, of either sign, and what has to become NaN.
      std::vector<float> extreme(static_cast<std::size_t>(4) * C), y(static_cast<std::size_t>(4) * N);
      for (int c = 0; c < C; ++c) extreme[c] = 1e30f, extreme[C + c] = -1e30f, extreme[2 * C + c] = 1e-38f;
      extreme[3 * C] = INFINITY;
      REQUIRE(paretune_products(&made.matrix, extreme.data(), 4, y.data()) == 0);
    }
  }
}

}  // namespace

int main() {
  for (const Kind& kind : kKinds)
    if (!kOnlyRaces) check_products(kind);
  const std::vector<Kind> all(std::begin(kKinds), std::end(kKinds));
  int seed = 0;
  for (const Shape& shape : kShapes) {
    const Model mixed(shape, all, ++seed);
    for (std::int32_t format : {kBf16, kInt8, kFp32, kFp16, kInt4}) {
      if (format == kInt4 && shape.head_dim % 2 != 0) continue;
      if (kOnlyRaces && format != (shape.n_head % 2 ? kBf16 : kInt8) && format != kInt4) continue;
      check_pieces(mixed, format);
      if (shape.window == 0) check_batches(mixed, format, 3);
    }
    check_lives(mixed);
  }
  for (const Kind& kind : kKinds) {
    if (kOnlyRaces) break;
    for (int which : {0, 3}) {
      const Model pure(kShapes[which], {kind, kKinds[0]}, ++seed);
      check_pieces(pure, kBf16);
    }
  }
  std::fprintf(stderr, "%s: done\n", paretune_isa());
  return 0;
}
