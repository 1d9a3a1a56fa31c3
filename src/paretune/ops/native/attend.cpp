// Attention of any pattern as one operator: queries in blocks, each with the runs of keys that it reads; what is in no run
// is never touched. The arithmetic is that of attention.h: fp32 sums, an online softmax over chunks of 256 keys; no step of
// another width has to give the same bits, so products are added one after the other (`Sums::kChain`).
//
// The compiler may not fuse multiplications and additions on its own (vec.h says where they are fused):
// flags: -ffp-contract=off
//
// Legend: B batch, H query heads, Hkv key/value heads, K queries, n keys, D head dimension.

#include <atomic>
#include <memory>

#include "attention.h"
#include "team.h"

namespace {

// Keys `start` to `end` in order; query i sees those from begin[i] on where `is_local`, else all; none later than itself.
extern "C" struct Run {
  std::int32_t start, end, is_local;
};

// Queries `from` to `to` (counted from the first one) and their runs.
extern "C" struct Block {
  std::int32_t from, to, run_from, run_to;
};

// Element (b, h, i, d) of a tensor is at b * stride[0] + h * stride[1] + i * stride[2] + d elements.
extern "C" struct Attend {
  const void* q;  // [B, H, K, D]
  const void* k;  // [B, Hkv, n, D]
  const void* v;
  void* out;      // [B, H, K, D]
  std::int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  const Block* blocks;
  const Run* runs;
  const std::int32_t* begin;  // [K] first key of a query's own run
  const float* slopes;        // [H] of ALiBi or null
  std::int32_t B, H, Hkv, K, D, n_blocks, format, first;  // first: position of query 0
  // ring 0: key j is at position j. Else positions from `prefix` on share `ring` slots behind the first ones.
  std::int32_t prefix, ring;
  float scale;
};

// Rows that lie anywhere, to be packed.
template <Format F> struct Scattered {
  struct Factors {};
  const char* const* rows;

  Factors factors(int, int) const { return {}; }
  Vec at(int p, int d, Factors) const { return load<F>(rows[p], d); }
  float one(int p, int d) const { return load_one<F>(rows[p], d); }
};

struct Memory {
  PackedChunk chunk;
  const char* k_rows[kChunkPositions];  // where each position of it is
  const char* v_rows[kChunkPositions];
  std::vector<float> q, out, part, spare;
  std::vector<Gathered> all;
  std::vector<char> has_some;
};

constexpr int kBlockQueries = 192;  // more are taken a part at a time

struct Attention {
  const Attend& a;
  std::atomic<int> next{0};

  template <Format F>
  void work(Memory& m) {
    const int heads = a.H / a.Hkv, n_tasks = a.B * a.Hkv * a.n_blocks;
    m.chunk.reserve(a.D);
    m.q.resize(static_cast<std::size_t>(kBlockQueries) * a.D);
    m.out.resize(m.q.size()), m.part.resize(m.q.size());
    m.spare.resize(a.D);
    m.all.resize(kBlockQueries), m.has_some.resize(kBlockQueries);
    for (int task = next.fetch_add(1); task < n_tasks; task = next.fetch_add(1)) {
      // The last blocks read the most keys: they come first, so that the threads end together.
      const Block& block = a.blocks[a.n_blocks - 1 - task / (a.B * a.Hkv)];
      const int b = task % (a.B * a.Hkv) / a.Hkv, h = task % a.Hkv;
      const int tokens = std::max(1, kBlockQueries / heads);
      for (int from = block.from; from < block.to; from += tokens)
        for (int g = 0; g < heads; g += kBlockQueries)
          part<F>(m, block, b, h, from, std::min(from + tokens, block.to), h * heads + g,
                  h * heads + std::min(heads, g + kBlockQueries));
    }
  }

  // Tokens `from` to `to`, query heads `h0` to `h1`, which share key head h.
  template <Format F>
  void part(Memory& m, const Block& block, int b, int h, int from, int to, int h0, int h1) {
    const int D = a.D, n_heads = h1 - h0, n = (to - from) * n_heads, size = static_cast<int>(element_bytes(F));
    const float* q[kBlockQueries];
    std::int64_t position[kBlockQueries];
    for (int i = 0; i < n; ++i) {
      const int token = from + i / n_heads, head = h0 + i % n_heads;
      float* to_q = m.q.data() + static_cast<std::size_t>(i) * D;
      const char* at = static_cast<const char*>(a.q) + (b * a.q_stride[0] + head * a.q_stride[1] + token * a.q_stride[2]) * size;
      for (int d = 0; d < D; ++d) to_q[d] = load_one<F>(at, d);
      q[i] = to_q;
      position[i] = a.first + token;
      m.has_some[i] = 0;
    }
    const char* k = static_cast<const char*>(a.k) + (b * a.k_stride[0] + h * a.k_stride[1]) * size;
    const char* v = static_cast<const char*>(a.v) + (b * a.v_stride[0] + h * a.v_stride[1]) * size;
    const std::int64_t last = a.first + to - 1, lowest = a.begin[from];
    // Keys of the runs fill chunks, in order of their positions.
    std::int32_t at[kChunkPositions];
    Stretch local[kChunkPositions];
    int n_held = 0, n_local = 0;
    for (int r = block.run_from; r < block.run_to; ++r) {
      const Run& run = a.runs[r];
      // These tokens alone may need less than their block.
      std::int64_t p = run.is_local ? std::max<std::int64_t>(run.start, lowest) : run.start;
      const std::int64_t end = std::min<std::int64_t>(run.end, last + 1);
      while (p < end) {
        const int take = static_cast<int>(std::min<std::int64_t>(end - p, kChunkPositions - n_held));
        if (run.is_local) local[n_local++] = {static_cast<std::int32_t>(p), n_held, n_held + take};
        for (int i = 0; i < take; ++i, ++p) {
          at[n_held + i] = static_cast<std::int32_t>(p);
          const std::int64_t slot = a.ring == 0 || p < a.prefix ? p : a.prefix + p % a.ring;
          m.k_rows[n_held + i] = k + slot * a.k_stride[2] * size;
          m.v_rows[n_held + i] = v + slot * a.v_stride[2] * size;
        }
        n_held += take;
        if (n_held == kChunkPositions) {
          chunk<F>(m, n, q, position, from, h0, n_heads, at, n_held, local, n_local);
          n_held = n_local = 0;
        }
      }
    }
    if (n_held > 0) chunk<F>(m, n, q, position, from, h0, n_heads, at, n_held, local, n_local);
    for (int i = 0; i < n; ++i) {
      const int token = from + i / n_heads, head = h0 + i % n_heads;
      float* row = m.out.data() + static_cast<std::size_t>(i) * D;
      const float factor = m.has_some[i] ? 1.0f / m.all[i].total : 0.0f;
      for (int d = 0; d < D; ++d) row[d] = m.has_some[i] ? row[d] * factor : 0.0f;
      store(row, static_cast<char*>(a.out) + (b * a.out_stride[0] + head * a.out_stride[1] + token * a.out_stride[2]) * size, F, D);
    }
  }

  // Keys of a chunk that queries see only from their own begin on: positions from `position`, slots from `from` to `to`.
  struct Stretch {
    std::int32_t position, from, to;
  };

  template <Format F>
  void chunk(Memory& m, int n, const float* const* q, const std::int64_t* position, int token, int h0, int n_heads,
             const std::int32_t* at, int n_held, const Stretch* local, int n_local) {
    const float* seen[kBlockQueries];
    Bias bias[kBlockQueries];
    int begin[kBlockQueries], end[kBlockQueries], which[kBlockQueries], n_seen = 0;
    float* out[kBlockQueries];
    const bool is_dense = at[n_held - 1] - at[0] == n_held - 1;  // its positions follow each other
    for (int i = 0; i < n; ++i) {
      // Queries see no later key; keys that only later queries see lie at the end, or before the first local one.
      const int stop = static_cast<int>(std::upper_bound(at, at + n_held, position[i]) - at);
      int first = 0;
      if (n_local > 0 && local[0].from == 0) first = hidden(local[0], token + i / n_heads);
      if (first >= stop) continue;
      seen[n_seen] = q[i], begin[n_seen] = first, end[n_seen] = stop;
      bias[n_seen] = {a.slopes == nullptr ? 0.0f : a.slopes[h0 + i % n_heads], position[i]};
      out[n_seen] = m.part.data() + static_cast<std::size_t>(n_seen) * a.D;
      which[n_seen++] = i;
    }
    if (n_seen == 0) return;
    pack_chunk<Sums::kChain>(m.chunk, Scattered<F>{m.k_rows}, Scattered<F>{m.v_rows}, *std::min_element(begin, begin + n_seen),
                             n_held, a.D);
    float where[kChunkPositions];
    if (a.slopes != nullptr)
      for (int p = 0; p < n_held; ++p) where[p] = static_cast<float>(at[p]);
    Gathered found[kBlockQueries];
    in_tiles(n_seen, seen, begin, end, bias, found, out, m.spare.data(),
             [&](int from, const float* const* tq, const int* b, const int* e, const Bias* tb, Gathered* of, float* const* to) {
               const bool adds = a.slopes != nullptr && is_dense;
               tile_on_chunk<Sums::kChain>(m.chunk, tq, at[0], b, e, a.D, a.scale, nullptr, nullptr, adds ? tb : nullptr, of, to,
                             [&](int i, float* scores) {
                               if (a.slopes != nullptr && !is_dense) {
                                 const float here = static_cast<float>(tb[i].position), slope = tb[i].slope;
                                 for (int p = b[i]; p < e[i]; ++p) scores[p] += slope * (where[p] - here);
                               }
                               const int query = which[from + i < n_seen ? from + i : from];
                               for (int s = 0; s < n_local; ++s)
                                 for (int p = local[s].from, to_hide = p + hidden(local[s], token + query / n_heads); p < to_hide; ++p)
                                   scores[p] = -INFINITY;
                             });
             });
    for (int i = 0; i < n_seen; ++i) {
      if (!(found[i].total > 0.0f) && found[i].largest == -INFINITY) continue;  // all of it was hidden
      const int query = which[i];
      merge(&m.all[query], m.out.data() + static_cast<std::size_t>(query) * a.D, found[i], out[i], !m.has_some[query], a.D);
      m.has_some[query] = 1;
    }
  }

  // How many of the first keys of a stretch lie before the query's own run.
  int hidden(const Stretch& s, int token) const { return std::clamp(a.begin[token] - s.position, 0, s.to - s.from); }
};

struct Workers {
  std::vector<Memory> memory;
  Attention* job = nullptr;
  Team team;  // last: its threads must not see a half-made object

  explicit Workers(int n) : memory(n), team(n, [this](int t) {
    work(t);
    team.barrier.wait();
  }) {}

  void work(int t) {
    switch (job->a.format) {
      case kFp32: job->work<kFp32>(memory[t]); break;
      case kBf16: job->work<kBf16>(memory[t]); break;
      case kFp16: job->work<kFp16>(memory[t]); break;
    }
  }
};

// What a thread of somebody else's team is handed. However many come, each takes a memory of its own or goes.
struct Borrowed {
  Workers* workers;
  std::atomic<int> turn{0};

  static void work(void* self) {
    Borrowed& b = *static_cast<Borrowed*>(self);
    const int t = b.turn.fetch_add(1);
    if (t < static_cast<int>(b.workers->memory.size())) b.workers->work(t);
  }
};

// GNU OpenMP's entry: runs a function on that many threads, the caller among them, and returns when all are done.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

}  // namespace

extern "C" {

int paretune_attend_size(int which) { return which == 0 ? sizeof(Attend) : which == 1 ? sizeof(Block) : sizeof(Run); }

// Null where threads are not to be had.
void* paretune_workers(int n) {
  try {
    return new Workers(n);
  } catch (...) {
    return nullptr;
  }
}

void paretune_workers_free(void* workers) { delete static_cast<Workers*>(workers); }

// 0, or 1: no memory. One call at a time on the same workers. With `parallel` it runs on the threads behind that.
int paretune_attend(void* workers, const Attend* call, Parallel parallel) {
  Workers& w = *static_cast<Workers*>(workers);
  try {
    for (Memory& m : w.memory) {  // here, where a failure can be told
      m.chunk.reserve(call->D);
      m.q.reserve(static_cast<std::size_t>(kBlockQueries) * call->D);
      m.out.reserve(m.q.capacity()), m.part.reserve(m.q.capacity()), m.spare.reserve(call->D);
      m.all.reserve(kBlockQueries), m.has_some.reserve(kBlockQueries);
    }
    Attention job{*call};
    w.job = &job;
    if (parallel) {
      Borrowed borrowed{&w};
      parallel(Borrowed::work, &borrowed, static_cast<unsigned>(w.memory.size()), 0);
    } else {
      w.team.run();
    }
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // extern "C"
