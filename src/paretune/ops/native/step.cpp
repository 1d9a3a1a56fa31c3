// A whole forward step of a transformer in one call: the list of operations that a model lowered itself to, walked by a
// team of threads with light barriers. Activations and sums are fp32; weights stay as they are stored.
//
// Sums do not depend on how many rows a step has: each output is one chain of lanes over k, added up in a fixed order.
// So single, batched and many-token steps give the same bits.
//
// The compiler may not fuse multiplications and additions on its own (simd.h says where they are fused):
// flags: -ffp-contract=off
//
// Legend: M rows of a step (B sequences x K tokens), N outputs, C inputs, D head dimension.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "simd.h"

namespace {

// ---------------------------------------------------------------- what Python hands over (engine/runners/native.py)

enum Code : std::int32_t { kEmbed = 1, kLinear = 2, kAttention = 3 };
enum Norm : std::int32_t { kNoNorm = 0, kLayerNorm = 1, kRmsNorm = 2, kSameInput = 3 };
enum Epilogue : std::int32_t { kStore = 0, kAdd = 1, kActivate = 2, kGate = 3 };
enum Activation : std::int32_t { kGeluTanh = 1, kGelu = 2, kQuickGelu = 3, kRelu = 4, kSilu = 5 };
constexpr std::int32_t kLogits = -1;  // as an output: the caller's memory

extern "C" struct Matrix {
  const void* data;    // [n_out, n_in], row-major, as stored
  const float* scale;  // [n_out], or null
  std::int32_t format; // simd.h
  std::int32_t n_out, n_in;
};

extern "C" struct Op {
  std::int32_t code;
  std::int32_t in, out, out_offset;  // buffers; the first column that is written
  std::int32_t matrix, matrix2;      // matrix2: the table of positions of kEmbed, or -1
  std::int32_t norm;                 // applied to the input first
  std::int32_t epilogue, activation, other;  // other: the buffer that kGate activates and multiplies with
  std::int32_t last_only;            // only the last valid token of each sequence
  std::int32_t has_barrier;          // the next operation reads what other threads wrote
  std::int32_t layer, n_head, n_kv_head, head_dim, window;  // window: 0 is none
  float eps, scale;
  const float* gamma;  // [n_in]
  const float* beta;   // [n_in] or null
  const float* bias;   // [n_out] or null
  const float* rope;   // [head_dim / 2] inverse frequencies or null
};

extern "C" struct Step {
  const std::int64_t* tokens;   // [B, K]
  const std::int64_t* lengths;  // [B] tokens held before this step
  const std::int64_t* last;     // [B] index of the last valid token of this step
  void* const* k;               // by layer, [B, n_kv_head, capacity, head_dim]
  void* const* v;
  float* logits;                // [B, V] or [B, K, V]
  std::int32_t B, K, capacity, cache_format, all_logits;
};

// ---------------------------------------------------------------- the team

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins a while, then yields: on a machine with fewer free cores than threads the other one has to get its turn.
class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  void wait() {
    if (n_ == 1) return;
    const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 4000) relax(); else std::this_thread::yield();
    }
  }

 private:
  const int n_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

constexpr auto kSpin = std::chrono::microseconds(50);

struct Scratch {
  std::vector<float> input;   // the normalised rows of the operation at hand
  std::vector<float> scores;  // [capacity]
  std::vector<float> query;   // [head_dim]
};

struct Program {
  std::vector<Op> ops;
  std::vector<Matrix> matrices;
  std::vector<std::int32_t> widths;
  std::vector<std::vector<float>> buffers;
  std::vector<Scratch> scratch;
  std::vector<float> rope;  // cos and sin of every row of the step, [M, head_dim]
  int max_rows, n_threads;

  Barrier barrier;
  std::vector<std::thread> threads;
  alignas(64) std::atomic<std::uint64_t> ticket{0};
  std::atomic<bool> is_over{false};
  std::atomic<int> n_parked{0};
  std::mutex mutex;
  std::condition_variable wake;
  const Step* step = nullptr;

  Program(const Op* o, int n_ops, const Matrix* m, int n_matrices, const std::int32_t* w, int n_buffers, int rows, int n)
      : ops(o, o + n_ops), matrices(m, m + n_matrices), widths(w, w + n_buffers), scratch(n), max_rows(rows),
        n_threads(n), barrier(n) {
    for (std::int32_t width : widths) buffers.emplace_back(static_cast<std::size_t>(rows) * width);
    std::int32_t widest = 1, head_dim = 1;
    for (const Op& op : ops) {
      if (op.code == kLinear) widest = std::max(widest, matrices[op.matrix].n_in);
      if (op.code == kAttention) head_dim = std::max(head_dim, op.head_dim);
    }
    rope.resize(static_cast<std::size_t>(rows) * head_dim);
    for (Scratch& s : scratch) {
      s.input.resize(static_cast<std::size_t>(rows) * widest);
      s.query.resize(head_dim);
    }
    try {
      for (int t = 1; t < n; ++t) threads.emplace_back([this, t] { serve(t); });
    } catch (...) {
      stop();  // no destructor runs for an object that was not finished
      throw;
    }
  }

  ~Program() { stop(); }

  void stop() {
    is_over.store(true);
    ticket.fetch_add(1);
    { std::lock_guard<std::mutex> lock(mutex); }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }

  void serve(int t) {
    std::uint64_t seen = 0;
    for (;;) {
      const auto from = std::chrono::steady_clock::now();
      int looks = 0;
      while (ticket.load(std::memory_order_acquire) == seen) {
        relax();
        if (++looks % 256 != 0 || std::chrono::steady_clock::now() - from < kSpin) continue;
        std::unique_lock<std::mutex> lock(mutex);
        n_parked.fetch_add(1);
        wake.wait(lock, [&] { return ticket.load() != seen; });
        n_parked.fetch_sub(1);
      }
      ++seen;
      if (is_over.load()) return;
      walk(t);
    }
  }

  void run(const Step& s) {
    for (Scratch& each : scratch)
      if (each.scores.size() < static_cast<std::size_t>(s.capacity)) each.scores.resize(s.capacity);
    step = &s;
    ticket.fetch_add(1);  // sequentially consistent: a thread that is about to park sees it or is counted as parked
    if (n_parked.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex); }
      wake.notify_all();
    }
    walk(0);
    // The last operation ends with a barrier, so nobody reads `s` any more.
  }

  void walk(int t) {
    for (const Op& op : ops) {
      switch (op.code) {
        case kEmbed: embed(op, t); break;
        case kLinear: linear(op, t); break;
        case kAttention: attention(op, t); break;
      }
      if (op.has_barrier) barrier.wait();
    }
  }

  // -------------------------------------------------------------- operations

  void split(int n, int multiple, int t, int* from, int* to) const {
    const int n_parts = (n + multiple - 1) / multiple;
    *from = std::min(n, n_parts * t / n_threads * multiple);
    *to = std::min(n, n_parts * (t + 1) / n_threads * multiple);
  }

  void embed(const Op& op, int t) {
    const Step& s = *step;
    const Matrix& table = matrices[op.matrix];
    const int C = table.n_in, M = s.B * s.K;
    int from, to;
    split(M, 1, t, &from, &to);
    for (int m = from; m < to; ++m) {
      float* out = buffers[op.out].data() + static_cast<std::size_t>(m) * C;
      load_row(table.data, table.scale, table.format, s.tokens[m], C, out);
      const std::int64_t position = s.lengths[m / s.K] + m % s.K;
      if (op.matrix2 >= 0) {
        const Matrix& positions = matrices[op.matrix2];
        float* row = scratch[t].input.data();
        // Padding beyond the last position has no embedding and is never looked at.
        load_row(positions.data, positions.scale, positions.format,
                 std::min<std::int64_t>(position, positions.n_out - 1), C, row);
        for (int c = 0; c < C; ++c) out[c] += row[c];
      }
      if (op.rope != nullptr) {
        const int half = op.head_dim / 2;
        float* angles = rope.data() + static_cast<std::size_t>(m) * op.head_dim;
        for (int i = 0; i < half; ++i) {
          const float angle = static_cast<float>(position) * op.rope[i];
          angles[i] = std::cos(angle);
          angles[half + i] = std::sin(angle);
        }
      }
    }
  }

  const float* prepare(const Op& op, int t, int C, int* n_rows) {
    const Step& s = *step;
    const bool is_last = op.last_only && !s.all_logits;
    const int M = is_last ? s.B : s.B * s.K;
    *n_rows = M;
    float* input = scratch[t].input.data();
    if (op.norm == kSameInput) return input;
    const float* in = buffers[op.in].data();
    if (op.norm == kNoNorm && !is_last) return in;
    for (int m = 0; m < M; ++m) {
      const float* row = in + (is_last ? m * s.K + s.last[m] : m) * static_cast<std::int64_t>(C);
      float* out = input + static_cast<std::size_t>(m) * C;
      if (op.norm == kLayerNorm) layer_norm(row, op.gamma, op.beta, op.eps, C, out);
      else if (op.norm == kRmsNorm) rms_norm(row, op.gamma, op.eps, C, out);
      else std::memcpy(out, row, sizeof(float) * C);
    }
    return input;
  }

  void linear(const Op& op, int t) {
    const Matrix& w = matrices[op.matrix];
    int M, from, to;
    const float* x = prepare(op, t, w.n_in, &M);
    split(w.n_out, 16, t, &from, &to);
    if (from == to) return;
    const bool is_external = op.out == kLogits;
    const std::int64_t stride = is_external ? w.n_out : widths[op.out];
    float* y = (is_external ? step->logits : buffers[op.out].data()) + op.out_offset;
    const float* other = op.epilogue == kGate ? buffers[op.other].data() : nullptr;
    float sums[kMaxTile * kRowTile];
    for (int n = from; n < to; n += kRowTile) {
      const int n_rows = std::min(kRowTile, to - n);
      for (int m = 0; m < M; m += kMaxTile) {
        const int tile = std::min(kMaxTile, M - m);
        products(w.data, w.format, n, n_rows, w.n_in, x + static_cast<std::size_t>(m) * w.n_in, tile, sums);
        for (int i = 0; i < tile; ++i) {
          float* out = y + (m + i) * stride + n;
          for (int r = 0; r < n_rows; ++r) {
            float value = sums[i * kRowTile + r];
            if (w.scale != nullptr) value *= w.scale[n + r];
            if (op.bias != nullptr) value += op.bias[n + r];
            switch (op.epilogue) {
              case kStore: out[r] = value; break;
              case kAdd: out[r] += value; break;
              case kActivate: out[r] = value; break;  // activated below, a vector at a time
              case kGate: out[r] = other[(m + i) * static_cast<std::int64_t>(widths[op.other]) + n + r] * value; break;
            }
          }
        }
      }
    }
    if (op.epilogue == kActivate)
      for (int m = 0; m < M; ++m) activate(op.activation, y + m * stride + from, to - from);
  }

  // One sequence and one key/value head at a time: who writes its keys also reads them, so no barrier is needed.
  void attention(const Op& op, int t) {
    const Step& s = *step;
    const int D = op.head_dim, group = op.n_head / op.n_kv_head, n_tasks = s.B * op.n_kv_head;
    const int q_width = op.n_head * D, kv_width = op.n_kv_head * D, width = q_width + 2 * kv_width;
    const std::size_t bytes = element_bytes(s.cache_format);
    const float* qkv = buffers[op.in].data();
    float* out = buffers[op.out].data();
    int from, to;
    split(n_tasks, 1, t, &from, &to);
    for (int task = from; task < to; ++task) {
      const int b = task / op.n_kv_head, h = task % op.n_kv_head;
      const std::size_t base = static_cast<std::size_t>(b * op.n_kv_head + h) * s.capacity * D;
      char* keys = static_cast<char*>(s.k[op.layer]) + base * bytes;
      char* values = static_cast<char*>(s.v[op.layer]) + base * bytes;
      for (int j = 0; j < s.K; ++j) {
        const int m = b * s.K + j;
        const std::size_t at = static_cast<std::size_t>(s.lengths[b] + j) * D;
        const float* k = qkv + static_cast<std::size_t>(m) * width + q_width + h * D;
        if (op.rope != nullptr) {
          rotate(k, rope.data() + static_cast<std::size_t>(m) * D, D, scratch[t].query.data());
          k = scratch[t].query.data();
        }
        store(k, keys + at * bytes, s.cache_format, D);
        store(qkv + static_cast<std::size_t>(m) * width + q_width + kv_width + h * D, values + at * bytes,
              s.cache_format, D);
      }
      for (int j = 0; j < s.K; ++j) {
        const int m = b * s.K + j;
        const std::int64_t end = s.lengths[b] + j + 1;
        const std::int64_t begin = op.window > 0 ? std::max<std::int64_t>(0, end - op.window) : 0;
        for (int g = 0; g < group; ++g) {
          const int head = h * group + g;
          const float* q = qkv + static_cast<std::size_t>(m) * width + head * D;
          float* query = scratch[t].query.data();
          if (op.rope != nullptr) rotate(q, rope.data() + static_cast<std::size_t>(m) * D, D, query);
          else std::memcpy(query, q, sizeof(float) * D);
          attend(query, keys + begin * D * bytes, values + begin * D * bytes, s.cache_format, end - begin, D, op.scale,
                 scratch[t].scores.data(), out + static_cast<std::size_t>(m) * q_width + head * D);
        }
      }
    }
  }
};

}  // namespace

extern "C" {

const char* paretune_isa() { return kIsa; }
int paretune_sizes(int which) { return which == 0 ? sizeof(Op) : which == 1 ? sizeof(Matrix) : sizeof(Step); }

// Null where memory or threads are not to be had.
void* paretune_program(const Op* ops, int n_ops, const Matrix* matrices, int n_matrices, const std::int32_t* widths,
                       int n_buffers, int max_rows, int n_threads) {
  try {
    return new Program(ops, n_ops, matrices, n_matrices, widths, n_buffers, max_rows, n_threads);
  } catch (...) {
    return nullptr;
  }
}

void paretune_program_free(void* program) { delete static_cast<Program*>(program); }

std::int64_t paretune_program_bytes(const void* program) {
  const Program& p = *static_cast<const Program*>(program);
  std::size_t n = p.rope.size();
  for (const auto& buffer : p.buffers) n += buffer.size();
  for (const Scratch& s : p.scratch) n += s.input.size() + s.scores.size() + s.query.size();
  return static_cast<std::int64_t>(n * sizeof(float));
}

// 0, or 1: no rows or more than the program was made for, or no memory; 2: a token that is not in the vocabulary.
int paretune_step(void* program, const Step* step) {
  Program& p = *static_cast<Program*>(program);
  if (step->B < 1 || step->K < 1 || step->B * step->K > p.max_rows) return 1;
  const std::int64_t n_vocab = p.matrices[p.ops.front().matrix].n_out;
  for (int i = 0; i < step->B * step->K; ++i)
    if (step->tokens[i] < 0 || step->tokens[i] >= n_vocab) return 2;
  try {
    p.run(*step);
  } catch (...) {
    return 1;
  }
  return 0;
}

// For tests: y[M, n_out] = x[M, n_in] W^T without a program.
void paretune_products(const Matrix* w, const float* x, int M, float* y) {
  float sums[kMaxTile * kRowTile];
  for (int n = 0; n < w->n_out; n += kRowTile) {
    const int n_rows = std::min(kRowTile, w->n_out - n);
    for (int m = 0; m < M; m += kMaxTile) {
      const int tile = std::min(kMaxTile, M - m);
      products(w->data, w->format, n, n_rows, w->n_in, x + static_cast<std::size_t>(m) * w->n_in, tile, sums);
      for (int i = 0; i < tile; ++i)
        for (int r = 0; r < n_rows; ++r)
          y[static_cast<std::size_t>(m + i) * w->n_out + n + r] =
              sums[i * kRowTile + r] * (w->scale != nullptr ? w->scale[n + r] : 1.0f);
    }
  }
}

}  // extern "C"
