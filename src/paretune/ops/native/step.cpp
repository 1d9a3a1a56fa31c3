// A whole forward step of a transformer in one call: the list of operations that a model lowered itself to, walked by a
// team of threads with light barriers. Activations and sums are fp32; weights stay packed as they are (packed.h).
//
// Sums do not depend on how many rows a step has, so single, batched and many-token steps give the same bits.
//
// The compiler may not fuse multiplications and additions on its own (vec.h says where they are fused):
// flags: -ffp-contract=off
//
// Legend: M rows of a step (B sequences x K tokens), N outputs, C inputs, D head dimension.

#include <memory>
#include <new>
#include <string>

#include "attention.h"
#include "team.h"
#include "tiles.h"

namespace {

// ---------------------------------------------------------------- what Python hands over (ops/native/program.py)

enum Code : std::int32_t { kEmbed = 1, kLinear = 2, kAttention = 3 };
enum Norm : std::int32_t { kNoNorm = 0, kLayerNorm = 1, kRmsNorm = 2, kSameInput = 3 };
enum Epilogue : std::int32_t { kStore = 0, kAdd = 1, kActivate = 2, kGate = 3 };
constexpr std::int32_t kLogits = -1;  // as an output: the caller's memory
constexpr int kFewRows = 4;  // each thread prepares as few for itself: cheaper than a barrier

extern "C" struct Op {
  std::int32_t code;
  std::int32_t in, out, out_offset;  // buffers; the first column that is written
  std::int32_t matrix, matrix2;      // matrix2: the table of positions of kEmbed, or -1
  std::int32_t norm;                 // applied to the input first
  std::int32_t epilogue, activation, other;  // other: the buffer that kGate multiplies with
  std::int32_t last_only;            // only the last valid token of each sequence
  std::int32_t has_barrier;          // the next operation reads what other threads wrote
  // A query sees the first `prefix` positions and the last `window`, itself among them; 0: no such limit.
  std::int32_t layer, n_head, n_kv_head, head_dim, window, prefix;
  float eps, scale;
  const float* gamma;  // [C]
  const float* beta;   // [C] or null
  const float* bias;   // [N] or null
  const float* rope;   // [D / 2] inverse frequencies or null
  const float* slopes;  // [n_head] of ALiBi or null
};

extern "C" struct Step {
  const std::int64_t* tokens;   // [B, K]
  const std::int64_t* lengths;  // [B] tokens held before this step
  const std::int64_t* last;     // [B] index of the last valid token of this step
  const std::int64_t* rows;     // [B] rows of the cache, or null: the first B
  void* const* k;               // by layer, [rows, n_kv_head, capacity, D], in 4 bits two a byte
  void* const* v;
  void* const* k_scale;         // by layer, [rows, n_kv_head, capacity] of scales as in kv.h; null where there are none
  void* const* v_scale;
  float* logits;                // [B, V] or [B, K, V]
  std::int64_t* best;           // [B] index of the largest of the last token's logits, or null
  std::int64_t* op_ns;          // [n_ops] nanoseconds are added, or null
  std::int32_t B, K, capacity, cache_format, all_logits;  // capacity: slots of a row
  // ring 0: slot = position. Else positions from `prefix` on share `ring` slots (a multiple of 256) behind the first ones.
  std::int32_t prefix, ring;
};

struct Best {
  float value;
  std::int64_t index;
};

// The rows of an operation's input in the forms its weight needs.
struct Prepared {
  std::vector<float> x, scale;
  std::vector<std::int16_t> q;
  std::vector<std::int8_t> q8;
  std::vector<std::int32_t> sums;
  std::vector<std::uint16_t> pairs;

  void reserve(std::size_t rows, std::size_t C, bool has_integers, bool has_bytes, bool has_pairs) {
    const std::size_t padded = (C + kChunk - 1) / kChunk * kChunk;
    x.resize(rows * C);
    if (has_integers) q.resize(rows * padded), scale.resize(rows * padded / kChunk), sums.resize(rows * padded / kSumOver);
    if (has_bytes) q8.resize(rows * padded);
    if (has_pairs) pairs.resize(rows * (C + C % 2));
  }
  std::size_t bytes() const {
    return 4 * (x.size() + scale.size() + sums.size()) + 2 * (q.size() + pairs.size()) + q8.size();
  }
};

struct Scratch {
  Prepared prepared;
  std::vector<float> sums;      // [rows whose sums are held at once, kPanelRows]
  std::vector<float> queries;   // [kMaxQueries, D], rotated
  std::vector<float> out;       // the same, of one chunk
  std::vector<Best> best;       // [rows]
  std::vector<Gathered> state;  // of the queries at hand
  std::vector<char> has_some;
  ChunkMemory chunk;
};

// What is left to do for a linear layer's input: the layer before may have read the same.
struct Work {
  bool rounds = false, pairs = false;  // to integers, to bf16
  bool waits = false;                  // others may still read what is written over
  bool tiles = false, tiles_wait = false;  // the same of steps with rows enough for tiles
};

struct Program {
  std::vector<Op> ops;
  std::vector<Matrix> matrices;
  std::vector<std::int32_t> widths;
  std::vector<std::vector<float>> buffers;
  std::vector<Scratch> scratch;
  Prepared shared;              // of steps with many rows
  Tiles tiles;                  // instead of its rounded rows, where there are more than kMaxTile
  std::vector<float> rope;      // cos and sin of every row of the step, [M, D]
  std::vector<float> partial;   // attention by chunks, where threads share a head
  std::vector<Gathered> gathered;
  int rows = 0, widest = 1, head_dim = 1, group = 1;
  bool has_floats = false, has_integers = false, has_bytes = false, has_pairs = false;
  std::vector<Work> works;  // by operation
  const Step* step = nullptr;
  Team team;  // last: its threads must not see a half-made program

  Program(const Op* o, int n_ops, const Matrix* m, int n_matrices, const std::int32_t* w, int n_buffers, int n)
      : ops(o, o + n_ops), matrices(m, m + n_matrices), widths(w, w + n_buffers), buffers(n_buffers), scratch(n),
        team(n, [this](int t) { walk(t); }) {
    std::int32_t bits_now = 0;  // of the integers that the shared input holds
    bool pairs_now = false, tiles_are_read = false;
    int tiles_now = -1;  // content of the shared tiles
    for (const Op& op : ops) {
      works.emplace_back();
      if (op.code == kLinear) {
        const Matrix& matrix = matrices[op.matrix];
        if (op.norm != kSameInput) bits_now = 0, pairs_now = false, tiles_now = -1;
        Work& work = works.back();
        work.rounds = is_integer(matrix.format) && bits_now != matrix.activation_bits;
        work.waits = work.rounds && bits_now != 0;
        work.pairs = matrix.format == kBf16 && kHasBf16Dot && !pairs_now;
        if (is_integer(matrix.format)) bits_now = matrix.activation_bits;
        pairs_now |= work.pairs;
        const int tiles_wanted = content_of(matrix) << 8 | (is_integer(matrix.format) ? matrix.activation_bits : 0);
        work.tiles = tiles_now != tiles_wanted;
        work.tiles_wait = work.tiles && tiles_are_read;
        tiles_now = tiles_wanted;
        tiles_are_read = true;
        has_floats |= !is_integer(matrix.format);
        widest = std::max(widest, matrix.n_in);
        has_integers |= is_integer(matrix.format);
        has_bytes |= is_integer(matrix.format) && kHasByteInputs && matrix.activation_bits <= 8;
        has_pairs |= matrix.format == kBf16 && kHasBf16Dot;
      }
      if (op.has_barrier) tiles_are_read = false;
      if (op.code == kEmbed) widest = std::max(widest, matrices[op.matrix].n_in);
      if (op.code == kAttention) {
        head_dim = std::max(head_dim, op.head_dim);
        group = std::max(group, op.n_head / op.n_kv_head);
      }
    }
    for (Scratch& s : scratch) {
      s.prepared.reserve(kFewRows, widest, has_integers, has_bytes, has_pairs);
      s.queries.resize(static_cast<std::size_t>(kMaxQueries) * head_dim);
      s.out.resize(static_cast<std::size_t>(kMaxQueries + 1) * head_dim);  // and one to throw away
      s.chunk.reserve(head_dim);
    }
    reserve(1);
  }

  static constexpr int kMaxQueries = 96;  // queries of one head that are worked on together

  // Memory for steps of M rows; what is there is kept.
  void reserve(int M) {
    if (M <= rows) return;
    for (std::size_t i = 0; i < buffers.size(); ++i) buffers[i].resize(static_cast<std::size_t>(M) * widths[i]);
    rope.resize(static_cast<std::size_t>(M) * head_dim);
    if (kHasTiles && M > kMaxTile) {
      shared.reserve(kMaxTile, widest, has_integers, has_bytes, has_pairs);
      shared.x.resize(static_cast<std::size_t>(M) * widest);
      tiles.reserve(M, widest, has_floats, has_integers);
    } else if (M > kFewRows) {
      shared.reserve(M, widest, has_integers, has_bytes, has_pairs);
    }
    for (Scratch& s : scratch) {
      s.sums.resize(static_cast<std::size_t>(kHasTiles ? std::min(M + kMaxTile, kMostTiled) : std::min(M, kPanelInputs)) * kPanelRows);
      s.best.resize(M);
    }
    rows = M;
  }

  void run(const Step& s) {
    reserve(s.B * s.K);
    if (s.B * s.K * group >= pack_from(s.cache_format))
      for (Scratch& each : scratch) each.chunk.packed.reserve(head_dim);
    plan_attention(s);
    step = &s;
    team.run();
    // The last operation ends with a barrier, so nobody reads `s` any more.
    if (s.best != nullptr) {
      for (int b = 0; b < s.B; ++b) {
        Best best = scratch[0].best[b];
        for (const Scratch& other : scratch) take(&best, other.best[b]);
        s.best[b] = best.index;
      }
    }
  }

  static void take(Best* best, const Best& other) {
    // As torch.argmax: NaN is larger than everything, the first of equals wins.
    const bool is_larger = other.value > best->value || (other.value != other.value && best->value == best->value);
    const bool is_equal = other.value == best->value || (other.value != other.value && best->value != best->value);
    if (other.index >= 0 && (best->index < 0 || is_larger || (is_equal && other.index < best->index))) *best = other;
  }

  void walk(int t) {
    const Step& s = *step;
    const auto now = [] { return std::chrono::steady_clock::now().time_since_epoch().count(); };
    std::int64_t before = s.op_ns != nullptr && t == 0 ? now() : 0;
    for (std::size_t i = 0; i < ops.size(); ++i) {
      const Op& op = ops[i];
      switch (op.code) {
        case kEmbed: embed(op, t); break;
        case kLinear: linear(op, t); break;
        case kAttention: attention(op, t); break;
      }
      if (op.has_barrier) team.barrier.wait();
      if (t == 0 && s.op_ns != nullptr) {
        const std::int64_t after = now();
        s.op_ns[i] += after - before;
        before = after;
      }
    }
  }

  void split(int n, int t, int* from, int* to) const {
    *from = static_cast<int>(static_cast<std::int64_t>(n) * t / team.size);
    *to = static_cast<int>(static_cast<std::int64_t>(n) * (t + 1) / team.size);
  }

  // -------------------------------------------------------------- embedding

  void embed(const Op& op, int t) {
    const Step& s = *step;
    const Matrix& table = matrices[op.matrix];
    const int C = table.n_in;
    int from, to;
    split(s.B * s.K, t, &from, &to);
    for (int m = from; m < to; ++m) {
      float* out = buffers[op.out].data() + static_cast<std::size_t>(m) * C;
      matrix_row(table, s.tokens[m], out);
      const std::int64_t position = s.lengths[m / s.K] + m % s.K;
      if (op.matrix2 >= 0) {
        const Matrix& positions = matrices[op.matrix2];
        float* row = scratch[t].prepared.x.data();
        // Padding beyond the last position has no embedding and is never looked at.
        matrix_row(positions, std::min<std::int64_t>(position, positions.n_out - 1), row);
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

  // -------------------------------------------------------------- linear layers

  bool is_last_only(const Op& op) const { return op.last_only && !step->all_logits; }

  // Row m of a layer's input, normalised into x where it has to be.
  const float* input_row(const Op& op, const Matrix& w, int m, float* x) const {
    const std::int64_t row = is_last_only(op) ? m * step->K + step->last[m] : m;
    const float* in = buffers[op.in].data() + row * w.n_in;
    switch (op.norm) {
      case kNoNorm: return in;
      case kLayerNorm: layer_norm(in, op.gamma, op.beta, op.eps, w.n_in, x); return x;
      case kRmsNorm: rms_norm(in, op.gamma, op.eps, w.n_in, x); return x;
      default: return x;  // kSameInput: it is there
    }
  }

  // Normalises, rounds and lays side by side the input rows, each thread a part of them.
  void prepare_tiles(const Op& op, const Work& work, const Matrix& w, int t, int M) {
    if (!work.tiles) return;
    if (work.tiles_wait) team.barrier.wait();
    if (t == 0) tiles.shape(M, w.n_in, content_of(w));
    team.barrier.wait();
    int from, to;
    split(tiles.n_tiles(), t, &from, &to);
    for (int m = from * tiles.T; m < to * tiles.T; ++m) {
      float* x = shared.x.data() + static_cast<std::size_t>(std::min(m, M - 1)) * w.n_in;
      tiles.set(m, m < M ? input_row(op, w, m, x) : nullptr, w.n_in, w.activation_bits);
    }
    team.barrier.wait();
  }

  // Normalises and rounds the input rows: each thread all of them where they are few, else a part each.
  Inputs prepare(const Op& op, const Work& work, const Matrix& w, int t, int M) {
    const int C = w.n_in, padded = round_up(C, kChunk);
    const bool is_last = is_last_only(op), is_few = M <= kFewRows;
    const bool is_plain = op.norm == kNoNorm && !is_last;
    Prepared& p = is_few ? scratch[t].prepared : shared;
    const bool has_work = (op.norm != kSameInput && !is_plain) || work.rounds || work.pairs;
    if (!is_few && work.waits) team.barrier.wait();
    int from = 0, to = has_work ? M : 0;
    if (!is_few) split(to, t, &from, &to);
    for (int m = from; m < to; ++m) {
      float* x = p.x.data() + static_cast<std::size_t>(m) * C;
      const float* in = input_row(op, w, m, x);
      if (op.norm == kNoNorm && is_last) std::memcpy(x, in, sizeof(float) * C);
      if (work.rounds)
        quantize_row(in, C, w.activation_bits, p.q.data() + static_cast<std::size_t>(m) * padded,
                     has_bytes ? p.q8.data() + static_cast<std::size_t>(m) * padded : nullptr,
                     p.scale.data() + static_cast<std::size_t>(m) * (padded / kChunk),
                     p.sums.data() + static_cast<std::size_t>(m) * (padded / kSumOver));
      if (work.pairs) round_row_to_bf16(in, C, p.pairs.data() + static_cast<std::size_t>(m) * (C + C % 2));
    }
    if (!is_few && has_work) team.barrier.wait();
    Inputs out;
    out.x = is_plain ? buffers[op.in].data() : p.x.data();
    out.x_stride = C;
    out.q = p.q.data(), out.q8 = p.q8.data(), out.scale = p.scale.data(), out.sums = p.sums.data();
    out.q_stride = padded;
    out.pairs = p.pairs.data();
    return out;
  }

  void linear(const Op& op, int t) {
    const Step& s = *step;
    const Matrix& w = matrices[op.matrix];
    const int M = is_last_only(op) ? s.B : s.B * s.K;
    const bool is_tiled = kHasTiles && M > kMaxTile;
    Inputs in;
    if (is_tiled) prepare_tiles(op, works[&op - ops.data()], w, t, M);
    else in = prepare(op, works[&op - ops.data()], w, t, M);
    const bool is_logits = op.out == kLogits, wants_best = is_logits && s.best != nullptr && !s.all_logits;
    if (wants_best) std::fill_n(scratch[t].best.begin(), M, Best{-INFINITY, -1});
    int from, to;
    split(round_up(w.n_out, kBlock) / kBlock, t, &from, &to);
    if (from == to) return;
    const std::int64_t stride = is_logits ? w.n_out : widths[op.out];
    float* y = (is_logits ? s.logits : buffers[op.out].data()) + op.out_offset;
    const float* other = op.epilogue == kGate ? buffers[op.other].data() : nullptr;
    const std::int64_t other_stride = op.epilogue == kGate ? widths[op.other] : 0;
    const auto emit = [&](int n, int n_rows, int m, int n_inputs, float* sums) {
      for (int i = 0; i < n_inputs; ++i) {
        float* row = sums + static_cast<std::int64_t>(i) * kPanelRows;
        float* out = y + (m + i) * stride + n;
        if (op.bias != nullptr)
          for (int r = 0; r < n_rows; ++r) row[r] += op.bias[n + r];
        switch (op.epilogue) {
          case kAdd: for (int r = 0; r < n_rows; ++r) out[r] += row[r]; break;
          case kGate: {
            const float* gate = other + (m + i) * other_stride + n;
            for (int r = 0; r < n_rows; ++r) out[r] = gate[r] * row[r];
            break;
          }
          case kActivate: activate(op.activation, row, n_rows); [[fallthrough]];
          default: std::memcpy(out, row, sizeof(float) * n_rows);
        }
        if (wants_best)
          for (int r = 0; r < n_rows; ++r)
            if (!(row[r] <= scratch[t].best[m + i].value)) take(&scratch[t].best[m + i], {row[r], n + r});
      }
    };
#if defined(PARETUNE_AVX2)
    if (is_tiled) return tiled_products(w, from, to, tiles, scratch[t].sums.data(), emit);
#endif
    products(w, from, to, in, M, scratch[t].sums.data(), emit);
  }

  // -------------------------------------------------------------- attention

  // What a query reads comes in pieces that are merged in order: its prefix by 256 positions, then the rest by 256. Where
  // pieces begin does not depend on the step.
  struct Plan {  // decided once a step, the same for all threads
    bool appends_first = false;  // keys are stored by all before anyone reads them: many rows, or shared heads
    bool by_pieces = false;      // threads share a head, piece by piece
    int chunk_from = 0, chunk_to = 1;  // chunks of 256 positions that any query reads, prefixes aside
    int n_pieces = 1;
    int query_block = 1;         // tokens of a sequence that are worked on together
  } plan;

  static int prefix_pieces(const Op& op) { return (op.prefix + kChunkPositions - 1) / kChunkPositions; }

  static std::int64_t first_seen(const Op& op, std::int64_t position) {
    return op.window > 0 ? std::max<std::int64_t>(op.prefix, position + 1 - op.window) : op.prefix;
  }

  struct Piece {
    std::int64_t start;  // position that `from` and `to` count from
    int from, to;        // what a query sees of it; nothing where from >= to
  };

  Piece piece_of(const Op& op, std::int64_t position, int piece) const {
    const int before = prefix_pieces(op);
    const bool is_prefix = piece < before;
    const std::int64_t start = static_cast<std::int64_t>(is_prefix ? piece : plan.chunk_from + piece - before) * kChunkPositions;
    const std::int64_t from = is_prefix ? start : first_seen(op, position);
    const std::int64_t to = is_prefix ? std::min<std::int64_t>(op.prefix, position + 1) : position + 1;
    return {start, static_cast<int>(std::max<std::int64_t>(from - start, 0)),
            static_cast<int>(std::clamp<std::int64_t>(to - start, 0, kChunkPositions))};
  }

  std::int64_t slot_of(std::int64_t position) const {
    const Step& s = *step;
    return s.ring == 0 || position < s.prefix ? position : s.prefix + position % s.ring;
  }

  void plan_attention(const Step& s) {
    constexpr int kFewQueries = 16;
    std::int64_t longest = 0, shortest = s.lengths[0];
    for (int b = 0; b < s.B; ++b) longest = std::max(longest, s.lengths[b] + s.K), shortest = std::min(shortest, s.lengths[b]);
    plan = Plan{};
    int fewest = 1 << 30, n_head = 1, most_before = 0;
    plan.chunk_to = static_cast<int>((longest + kChunkPositions - 1) / kChunkPositions);
    plan.chunk_from = plan.chunk_to;
    for (const Op& op : ops)
      if (op.code == kAttention) {
        fewest = std::min(fewest, s.B * op.n_kv_head);
        n_head = std::max(n_head, op.n_head);
        most_before = std::max(most_before, prefix_pieces(op));
        // A short row has not left its prefix yet.
        const std::int64_t first = std::min(first_seen(op, shortest), longest - 1);
        plan.chunk_from = std::min(plan.chunk_from, static_cast<int>(first / kChunkPositions));
      }
    plan.n_pieces = most_before + plan.chunk_to - plan.chunk_from;
    plan.query_block = std::max(1, kMaxQueries / group);
    if (team.size == 1) return;
    plan.appends_first = s.K > std::max(1, kFewQueries / group);
    // Blocks that keep all threads busy.
    while (plan.query_block * group > 2 * kPackFrom && static_cast<std::int64_t>(fewest) * s.K < 4LL * team.size * plan.query_block)
      plan.query_block = (plan.query_block + 1) / 2;
    // A head a thread leaves threads idle: share the heads' pieces instead, once there is enough to share.
    if (!plan.appends_first && plan.n_pieces > 1 && fewest % team.size != 0 && fewest < 4 * team.size) {
      plan.appends_first = plan.by_pieces = true;
      const std::size_t n = static_cast<std::size_t>(s.B) * s.K * n_head * plan.n_pieces;
      if (partial.size() < n * head_dim) partial.resize(n * head_dim);
      if (gathered.size() < n) gathered.resize(n);
    }
  }

  // Keys and values of a head from a slot on.
  HeadCache head_cache(const Op& op, int b, int h, std::int64_t slot) const {
    const Step& s = *step;
    const std::int64_t row = s.rows == nullptr ? b : s.rows[b];
    const std::int64_t rows_before = (row * op.n_kv_head + h) * s.capacity + slot;
    const auto start = [&](void* const* layers) { return layers == nullptr ? nullptr : static_cast<char*>(layers[op.layer]); };
    return HeadCache{start(s.k), start(s.v), start(s.k_scale), start(s.v_scale), s.cache_format}.from(rows_before, op.head_dim);
  }

  void append_all(const Op& op, int t, int b, int h) {
    const Step& s = *step;
    const int D = op.head_dim, q_width = op.n_head * D, kv_width = op.n_kv_head * D, width = q_width + 2 * kv_width;
    const HeadCache cache = head_cache(op, b, h, 0);
    for (int j = 0; j < s.K; ++j) {
      const std::int64_t m = static_cast<std::int64_t>(b) * s.K + j;
      const float* k = buffers[op.in].data() + m * width + q_width + h * D;
      const float* v = k + kv_width;
      if (op.rope != nullptr) {
        rotate(k, rope.data() + m * D, D, scratch[t].queries.data());
        k = scratch[t].queries.data();
      }
      append(cache, slot_of(s.lengths[b] + j), k, v, D);
    }
  }

  // The queries of tokens j to j + n of sequence b that read key/value head h, on the pieces `from` to `to`.
  // emit(row, piece, what was gathered, [D]) is called for each query that sees some of a piece.
  template <class Emit>
  void attend(const Op& op, int t, int b, int h, int j, int n, int piece_from, int piece_to, Emit emit) {
    const Step& s = *step;
    const int D = op.head_dim, heads = op.n_head / op.n_kv_head;
    const int q_width = op.n_head * D, width = q_width + 2 * op.n_kv_head * D;
    const float* q[kMaxQueries];
    std::int64_t position[kMaxQueries], row[kMaxQueries];
    float slope[kMaxQueries];
    float* const results = scratch[t].out.data();
    // More heads a key than fit are taken a part at a time.
    for (int g0 = 0; g0 < heads; g0 += kMaxQueries) {
      const int g1 = std::min(heads, g0 + kMaxQueries);
      int n_queries = 0;
      for (int i = j; i < j + n; ++i)
        for (int g = g0; g < g1; ++g, ++n_queries) {
          const std::int64_t m = static_cast<std::int64_t>(b) * s.K + i;
          const float* from = buffers[op.in].data() + m * width + (h * heads + g) * D;
          float* to = scratch[t].queries.data() + static_cast<std::size_t>(n_queries) * D;
          if (op.rope != nullptr) rotate(from, rope.data() + m * D, D, to);
          else std::memcpy(to, from, sizeof(float) * D);
          q[n_queries] = to;
          position[n_queries] = s.lengths[b] + i;
          slope[n_queries] = op.slopes == nullptr ? 0.0f : op.slopes[h * heads + g];
          row[n_queries] = m * op.n_head + h * heads + g;
        }
      for (int piece = piece_from; piece < piece_to; ++piece) {
        const float* seen[kMaxQueries];
        float* out[kMaxQueries];
        Bias bias[kMaxQueries];
        int begin[kMaxQueries], stop[kMaxQueries], which[kMaxQueries], n_seen = 0, n_held = 0;
        std::int64_t start = 0;
        for (int i = 0; i < n_queries; ++i) {
          const Piece found = piece_of(op, position[i], piece);
          start = found.start;
          if (found.from >= found.to) continue;
          seen[n_seen] = q[i], begin[n_seen] = found.from, stop[n_seen] = found.to;
          bias[n_seen] = {slope[i], position[i]};
          out[n_seen] = results + static_cast<std::size_t>(n_seen) * D;
          n_held = std::max(n_held, found.to);
          which[n_seen++] = i;
        }
        if (n_seen == 0) continue;
        Gathered found[kMaxQueries];
        // A piece lies in one stretch of slots: rings are multiples of 256 long.
        const bool is_prefix = piece < prefix_pieces(op);
        const std::int64_t slot = s.ring == 0 || is_prefix ? start : s.prefix + start % s.ring;
        attend_chunk(n_seen, seen, head_cache(op, b, h, slot), start, n_held, begin, stop, D, op.scale,
                     op.slopes == nullptr ? nullptr : bias, found, out, scratch[t].chunk,
                     results + static_cast<std::size_t>(kMaxQueries) * D);
        for (int i = 0; i < n_seen; ++i) emit(row[which[i]], piece, found[i], out[i]);
      }
    }
  }

  // The first positions that a query of the next task reads: memory works while this task computes.
  void fetch_task(const Op& op, int task) const {
    const Step& s = *step;
    const int b = task / op.n_kv_head;
    const std::int64_t from = op.prefix > 0 ? 0 : first_seen(op, s.lengths[b]) / kChunkPositions * kChunkPositions;
    const std::int64_t n = std::min<std::int64_t>(s.lengths[b] - from, kChunkPositions);
    const HeadCache cache = head_cache(op, b, task % op.n_kv_head, slot_of(from));
    const auto fetch = [n](const char* first, const char* second, std::int64_t each) {
      for (std::int64_t at = 0; at < n * each; at += 64) __builtin_prefetch(first + at, 0, 2), __builtin_prefetch(second + at, 0, 2);
    };
    fetch(cache.k, cache.v, row_bytes(s.cache_format, op.head_dim));
    fetch(cache.k_scale, cache.v_scale, scale_bytes(s.cache_format, op.head_dim));
  }

  void finish(float* out, float total, int D) {
    const float factor = 1.0f / total;
    for (int d = 0; d < D; ++d) out[d] *= factor;
  }

  void attention(const Op& op, int t) {
    const Step& s = *step;
    const int D = op.head_dim, heads = op.n_head / op.n_kv_head, n_tasks = s.B * op.n_kv_head;
    float* mixed = buffers[op.out].data();
    if (plan.appends_first) {
      for (int task = t; task < n_tasks; task += team.size) append_all(op, t, task / op.n_kv_head, task % op.n_kv_head);
      team.barrier.wait();
    }
    const int n_pieces = prefix_pieces(op) + plan.chunk_to - plan.chunk_from;
    if (plan.by_pieces) {
      for (int task = t; task < n_tasks * n_pieces; task += team.size) {
        const int piece = task % n_pieces, b = task / n_pieces / op.n_kv_head, h = task / n_pieces % op.n_kv_head;
        for (int j = 0; j < s.K; j += plan.query_block)
          attend(op, t, b, h, j, std::min(plan.query_block, s.K - j), piece, piece + 1,
                 [&](std::int64_t row, int, const Gathered& found, const float* out) {
                   const std::size_t at = static_cast<std::size_t>(row) * plan.n_pieces + piece;
                   gathered[at] = found;
                   std::memcpy(partial.data() + at * D, out, sizeof(float) * D);
                 });
      }
      team.barrier.wait();
      int from, to;
      split(s.B * s.K * op.n_head, t, &from, &to);
      for (int row = from; row < to; ++row) {
        const int m = row / op.n_head;
        float* out = mixed + static_cast<std::size_t>(row) * D;
        Gathered all{};
        bool is_first = true;
        for (int piece = 0; piece < n_pieces; ++piece) {
          const Piece found = piece_of(op, s.lengths[m / s.K] + m % s.K, piece);
          if (found.from >= found.to) continue;
          const std::size_t at = static_cast<std::size_t>(row) * plan.n_pieces + piece;
          merge(&all, out, gathered[at], partial.data() + at * D, is_first, D);
          is_first = false;
        }
        finish(out, all.total, D);
      }
      return;
    }
    // A head's keys are stored by who reads them, so that no barrier is needed, or were stored above. The last blocks see
    // the most keys: they come first, so that the threads end together.
    const int n_blocks = (s.K + plan.query_block - 1) / plan.query_block;
    const int n_shared = plan.appends_first ? n_tasks * n_blocks : n_tasks;
    for (int task = t; task < n_shared; task += team.size) {
      const int which = task % n_tasks, b = which / op.n_kv_head, h = which % op.n_kv_head;
      if (!plan.appends_first) {
        append_all(op, t, b, h);
        if (task + team.size < n_shared) fetch_task(op, task + team.size);
      }
      const int block_from = plan.appends_first ? n_blocks - 1 - task / n_tasks : 0;
      const int block_to = plan.appends_first ? block_from + 1 : n_blocks;
      for (int block = block_from; block < block_to; ++block) {
        const int j = block * plan.query_block, n = std::min(plan.query_block, s.K - j);
        std::vector<Gathered>& all = scratch[t].state;
        std::vector<char>& has_some = scratch[t].has_some;
        all.resize(static_cast<std::size_t>(n) * heads);
        has_some.assign(all.size(), 0);
        const std::int64_t base = (static_cast<std::int64_t>(b) * s.K + j) * op.n_head;
        const auto slot = [&](std::int64_t row) {
          return (row - base) / op.n_head * heads + (row - base) % op.n_head - h * heads;
        };
        attend(op, t, b, h, j, n, 0, n_pieces, [&](std::int64_t row, int, const Gathered& found, const float* out) {
          const std::int64_t at = slot(row);
          merge(&all[at], mixed + row * D, found, out, !has_some[at], D);
          has_some[at] = 1;
        });
        for (int i = 0; i < n; ++i)
          for (int g = 0; g < heads; ++g) {
            const std::int64_t row = base + static_cast<std::int64_t>(i) * op.n_head + h * heads + g;
            finish(mixed + row * D, all[slot(row)].total, D);
          }
      }
    }
  }
};

}  // namespace

extern "C" {

const char* paretune_isa() {
  static const std::string name = std::string(kIsa) + (kHasBf16Dot ? " + bf16" : "") + (kHasByteDot ? " + vnni" : "");
  return name.c_str();
}
int paretune_sizes(int which) { return which == 0 ? sizeof(Op) : which == 1 ? sizeof(Matrix) : sizeof(Step); }

std::int64_t paretune_packed_bytes(std::int32_t format, std::int32_t N, std::int32_t C) {
  return format == kSparse8 ? sparse_bytes(N, C) : packed_bytes(format, N, C);
}
void paretune_pack(std::int32_t format, const void* src, std::int32_t N, std::int32_t C, void* dst) {
  if (format == kSparse8) pack_sparse(static_cast<const std::int8_t*>(src), N, C, dst);
  else pack_rows(format, src, N, C, 0, round_up(N, kBlock) / kBlock, dst);
}
// The stored numbers as `paretune_pack` took them.
void paretune_unpack(const Matrix* w, void* out) {
  if (w->format != kSparse8) return unpack_rows(w->format, w->data, w->n_out, w->n_in, out);
  for (std::int64_t row = 0; row < w->n_out; ++row)
    sparse_row(w->data, w->n_out, w->n_in, row, static_cast<std::int8_t*>(out) + row * w->n_in);
}
// Row `row` as numbers, [C] fp32.
void paretune_row(const Matrix* w, std::int64_t row, float* out) { matrix_row(*w, row, out); }

// Without a program: x [n, D] as a cache of this format keeps them; scales as in kv.h, or null.
void paretune_keep(std::int32_t format, const float* x, std::int64_t n, int D, char* rows, char* scales) {
  for (std::int64_t i = 0; i < n; ++i)
    append_row(format, x + i * D, rows + i * row_bytes(format, D), scales == nullptr ? nullptr : scales + i * scale_bytes(format, D), D);
}

// Null where memory or threads are not to be had.
void* paretune_program(const Op* ops, int n_ops, const Matrix* matrices, int n_matrices, const std::int32_t* widths,
                       int n_buffers, int n_threads) {
  try {
    return new Program(ops, n_ops, matrices, n_matrices, widths, n_buffers, n_threads);
  } catch (...) {
    return nullptr;
  }
}

void paretune_program_free(void* program) { delete static_cast<Program*>(program); }

std::int64_t paretune_program_bytes(const void* program) {
  const Program& p = *static_cast<const Program*>(program);
  std::size_t n = 4 * (p.rope.size() + p.partial.size()) + sizeof(Gathered) * p.gathered.size() + p.shared.bytes() + p.tiles.bytes();
  for (const auto& buffer : p.buffers) n += 4 * buffer.size();
  for (const Scratch& s : p.scratch) n += s.prepared.bytes() + 4 * (s.sums.size() + s.queries.size() + s.out.size()) + s.chunk.bytes();
  return static_cast<std::int64_t>(n);
}

// 0, or 1: no rows, or no memory; 2: a token that is not in the vocabulary.
int paretune_step(void* program, const Step* step) {
  Program& p = *static_cast<Program*>(program);
  if (step->B < 1 || step->K < 1) return 1;
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

// Without a program: y[M, N] = x[M, C] W^T. 1: no memory.
int paretune_products(const Matrix* w, const float* x, int M, float* y) {
  try {
    const int C = w->n_in, padded = round_up(C, kChunk), n_blocks = round_up(w->n_out, kBlock) / kBlock;
    const auto emit = [&](int n, int n_rows, int m, int n_inputs, float* found) {
      for (int i = 0; i < n_inputs; ++i)
        std::memcpy(y + static_cast<std::int64_t>(m + i) * w->n_out + n, found + static_cast<std::int64_t>(i) * kPanelRows,
                    sizeof(float) * n_rows);
    };
#if defined(PARETUNE_AVX2)
    if (M > kMaxTile) {
      Tiles tiles;
      tiles.reserve(M, C, !is_integer(w->format), is_integer(w->format));
      tiles.shape(M, C, content_of(*w));
      for (int m = 0; m < tiles.n_tiles() * tiles.T; ++m) tiles.set(m, x + static_cast<std::int64_t>(m) * C, C, w->activation_bits);
      std::vector<float> sums(static_cast<std::size_t>(std::min(M + kMaxTile, kMostTiled)) * kPanelRows);
      tiled_products(*w, 0, n_blocks, tiles, sums.data(), emit);
      return 0;
    }
#endif
    const bool has_bytes = kHasByteInputs && w->activation_bits <= 8;
    Prepared p;
    p.reserve(M, C, is_integer(w->format), has_bytes, true);
    for (int m = 0; m < M; ++m) {
      const float* row = x + static_cast<std::int64_t>(m) * C;
      if (is_integer(w->format))
        quantize_row(row, C, w->activation_bits, p.q.data() + static_cast<std::int64_t>(m) * padded,
                     has_bytes ? p.q8.data() + static_cast<std::int64_t>(m) * padded : nullptr,
                     p.scale.data() + m * (padded / kChunk), p.sums.data() + m * (padded / kSumOver));
      round_row_to_bf16(row, C, p.pairs.data() + static_cast<std::int64_t>(m) * (C + C % 2));
    }
    Inputs in;
    in.x = x, in.x_stride = C, in.q = p.q.data(), in.q8 = p.q8.data(), in.scale = p.scale.data();
    in.sums = p.sums.data(), in.q_stride = padded, in.pairs = p.pairs.data();
    std::vector<float> sums(static_cast<std::size_t>(std::min(M, kPanelInputs)) * kPanelRows);
    products(*w, 0, n_blocks, in, M, sums.data(), emit);
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // extern "C"
