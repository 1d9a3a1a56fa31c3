// Products of packed weights (packed.h) and a few or many inputs: one kernel for decode and prefill.
//
// Every sum is a chain over 256 inputs in their order, and such spans are added in their order, whatever the number of
// rows, blocks or threads: decode, batches, verification and prefill give the same bits. Integer formats take inputs
// rounded to 16 (or 8 or 7) bits with a scale for each 128 of them; their inner sums are exact integers, the same on
// every processor.
//
// Legend: T inputs and NB blocks of 16 rows of one register tile, k position in the input.
#pragma once

#include "sparse.h"

constexpr int kVecs = kBlock / kLanes;
constexpr int kPanel = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;  // blocks that a single input walks at once
constexpr int kPanelRows = kPanel * kBlock;
constexpr int kMaxTile = kLanes == 4 ? 3 : 6;  // as many sums as the registers hold beside what a product needs
constexpr int kChunk = 128;   // inputs that share a scale
constexpr int kSumOver = 32;  // inputs whose sum is known: the smallest group
constexpr int kSpan = 256;    // inputs of one chain of fp32 sums: short chains lose less
constexpr int kPrefetch = 512;

// Rows of a step, in the forms that its weights need.
struct Inputs {
  const float* x = nullptr;  // [M, x_stride]
  std::int64_t x_stride = 0;
  const std::int16_t* q = nullptr;  // [M, q_stride], zeros behind the inputs
  const std::int8_t* q8 = nullptr;  // the same in bytes, in the order of packed int8 (packed.h)
  const float* scale = nullptr;     // [M, q_stride / kChunk]
  const std::int32_t* sums = nullptr;  // [M, q_stride / kSumOver]
  std::int64_t q_stride = 0;           // a multiple of kChunk
  const std::uint16_t* pairs = nullptr;  // bf16, [M, x_stride rounded up to 2]

  Inputs rows_from(std::int64_t m) const {
    Inputs out = *this;
    if (x != nullptr) out.x += m * x_stride;
    if (q != nullptr) out.q += m * q_stride;
    if (q8 != nullptr) out.q8 += m * q_stride;
    if (scale != nullptr) out.scale += m * (q_stride / kChunk);
    if (sums != nullptr) out.sums += m * (q_stride / kSumOver);
    if (pairs != nullptr) out.pairs += m * (x_stride + x_stride % 2);
    return out;
  }
};

#if defined(__AVX512BF16__) && defined(PARETUNE_AVX512)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif
#if defined(__AVX512VNNI__) && defined(PARETUNE_AVX512)
constexpr bool kHasByteDot = true;
#else
constexpr bool kHasByteDot = false;
#endif
#if defined(PARETUNE_AVX2)
constexpr bool kHasByteInputs = true;  // for 4-bit weights: `vpmaddubsw` holds 8 products of them and a byte
#else
constexpr bool kHasByteInputs = kHasByteDot;
#endif

// ---------------------------------------------------------------- inputs

// 16 numbers that fit, as shorts.
inline void store_shorts(const Vec* from, std::int16_t* to) {
#if defined(PARETUNE_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)from[0])));
#elif defined(PARETUNE_AVX2)
  const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)from[0]), _mm256_cvtps_epi32((__m256)from[1]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(both, 0xd8));
#else
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::int16_t>(from[i / kLanes][i % kLanes]);
#endif
}

// 16 shorts that fit, as bytes in the order of packed int8.
inline void store_bytes(const std::int16_t* from, std::int8_t* to) {
#if defined(PARETUNE_AVX512) || defined(PARETUNE_AVX2)
  const __m128i* p = reinterpret_cast<const __m128i*>(from);
  const __m128i bytes = _mm_packs_epi16(_mm_loadu_si128(p), _mm_loadu_si128(p + 1));
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, order));
#else
  for (int i = 0; i < 16; ++i) to[i / 4 * 4 + kByteOf[i % 4]] = static_cast<std::int8_t>(from[i]);
#endif
}

// At most kChunk inputs x -> q * scale, |q| <= 32767 or 127, zeros behind them. 7 bits are 128 steps from the smallest to
// the largest input, 0 among them; `zero` is added to q for numbers from 0 to 127. A NaN or infinity makes the scale NaN,
// and so every sum it is part of.
inline void quantize_chunk(const float* x, int n, int bits, std::int16_t* q, float* scale, std::int32_t* sums,
                           std::int32_t* zero) {
  float row[kChunk] = {};
  std::memcpy(row, x, sizeof(float) * n);
  Vec highs = {}, lows = {}, poison = {};
  for (int i = 0; i < kChunk; i += kLanes) {
    const Vec v = load_floats(row + i);
    highs = v > highs ? v : highs;
    lows = v < lows ? v : lows;
    poison += v * 0.0f;
  }
  float high = 0.0f, low = 0.0f;
  for (int i = 0; i < kLanes; ++i) high = std::max(high, highs[i]), low = std::min(low, lows[i]);
  const float nan = sum(poison), limit = bits == 16 ? 32767.0f : 127.0f, range = bits == 7 ? high - low : std::max(high, -low);
  const bool is_zero = !(range > 1e-30f) || nan != 0.0f;
  *scale = is_zero ? nan : range / limit;
  const float factor = is_zero ? 0.0f : limit / range;
  const Vec magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
  const auto round = [&](Vec v) { return (v * factor + magic) - magic; };
  const Vec least = is_zero || bits != 7 ? fill(-limit) : round(fill(low));
  const Vec most = is_zero || bits != 7 ? fill(limit) : least + limit;
  *zero = is_zero || bits != 7 ? 0 : static_cast<std::int32_t>(-least[0]);
  for (int i = 0; i < kChunk; i += 16) {
    Vec rounded[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const Vec found = is_zero ? Vec{} : round(load_floats(row + i + v * kLanes));
      rounded[v] = found > most ? most : found < least ? least : found;
    }
    store_shorts(rounded, q + i);
  }
  for (int i = 0; i < kChunk; i += kSumOver) {
    std::int32_t total = 0;
    for (int j = 0; j < kSumOver; ++j) total += q[i + j];
    sums[i / kSumOver] = total;
  }
}

inline void quantize_row(const float* x, int C, int bits, std::int16_t* q, std::int8_t* q8, float* scale,
                         std::int32_t* sums) {
  for (int k = 0; k < round_up(C, kChunk); k += kChunk) {
    std::int32_t zero;
    quantize_chunk(x + k, std::min(kChunk, C - k), bits, q + k, scale + k / kChunk, sums + k / kSumOver, &zero);
    if (q8 != nullptr)
      for (int i = 0; i < kChunk; i += 16) store_bytes(q + k + i, q8 + k + i);
  }
}

inline void round_row_to_bf16(const float* x, int C, std::uint16_t* out) {
  for (int c = 0; c < C; ++c) out[c] = to_bf16(x[c]);
  if (C % 2) out[C] = 0;
}

// ---------------------------------------------------------------- integer vectors

typedef std::int16_t ShortVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t UShortVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t UIntVec __attribute__((vector_size(kLanes * 4)));

inline UIntVec load_bits(const char* p) {
  UIntVec out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline std::int32_t load_int(const void* p) {
  std::int32_t out;
  std::memcpy(&out, p, 4);
  return out;
}
inline IntVec fill_int(std::int32_t x) { return x - IntVec{}; }

// kNormalCodes of the indices 0 to 15.
inline UShortVec normal_codes(UShortVec index) {
#if (defined(PARETUNE_AVX512) && defined(__AVX512BW__)) || defined(PARETUNE_AVX2)
  // Two look-ups of bytes: an index with its highest bit set gives zero, which leaves room for the other half.
  alignas(16) static constexpr auto kHalves = [] {
    struct { std::uint8_t low[16], high[16]; } out{};
    for (int i = 0; i < 16; ++i) {
      out.low[i] = static_cast<std::uint8_t>(kNormalCodes[i] & 255);
      out.high[i] = static_cast<std::uint8_t>(kNormalCodes[i] >> 8 & 255);
    }
    return out;
  }();
  const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(kHalves.low));
  const __m128i high = _mm_load_si128(reinterpret_cast<const __m128i*>(kHalves.high));
  const UShortVec below = index | 0x8000, above = (index << 8) | 0x80;
#if defined(PARETUNE_AVX512)
  return (UShortVec)_mm512_or_si512(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(low), (__m512i)below),
                                    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(high), (__m512i)above));
#else
  return (UShortVec)_mm256_or_si256(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(low), (__m256i)below),
                                    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(high), (__m256i)above));
#endif
#else
  UShortVec out;
  for (int i = 0; i < kLanes * 2; ++i) out[i] = static_cast<std::uint16_t>(kNormalCodes[index[i]]);
  return out;
#endif
}

// Scales of a group's 16 rows; those of NF4 count in steps of its codes.
inline Vec group_scale(const Matrix& w, std::int64_t at) {
  const Vec scale = load<kFp16>(w.scale, at);
  return w.format == kNf4 ? scale * (1.0f / kNormalSteps) : scale;
}

// c + the sum of the two products of 16-bit numbers in each lane.
inline IntVec add_products(UIntVec a, IntVec b, IntVec c) {
#if defined(PARETUNE_AVX512) && defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(PARETUNE_AVX512) && defined(__AVX512BW__)
  return c + (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(PARETUNE_AVX2)
  // The pair as one: GCC 12 takes products and sums apart, holds all products of a tile at once and spills the sums.
  __m256i product;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(product) : "x"((__m256i)a), "x"((__m256i)b));
  return c;
#else
  const IntVec high = (IntVec)a >> 16, low = (IntVec)(a << 16) >> 16;
  return c + low * ((IntVec)((UIntVec)b << 16) >> 16) + high * (b >> 16);
#endif
}

inline Vec to_floats(IntVec x) { return __builtin_convertvector(x, Vec); }

// ---------------------------------------------------------------- one register tile

// What a single input will read soon: further on in each block of the panel, or the start of the panel after it, where
// the hardware's own prefetcher does not look.
template <int NB>
inline void prefetch_blocks(const char* base, std::int64_t bytes, std::int64_t at) {
  at += kPrefetch;
  const char* p = base + at + (at >= bytes ? (NB - 1) * bytes : 0);
#pragma GCC unroll 8
  for (int b = 0; b < NB; ++b) __builtin_prefetch(p + b * bytes);
}

// The same pointer, which the compiler does not know: it would rather keep a loaded vector than load it again from the
// first cache, and spill a sum for it.
inline const char* again(const char* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// sums: [T, kPanelRows], read unless `is_first`. At most kSpan inputs.
template <Format F, int T, int NB>
inline void float_span(const Matrix& w, int block, int from, int to, const Inputs& in, float* sums, bool is_first) {
  constexpr int Q = F == kBf16 ? 2 : 1;
  const std::int64_t bytes = block_bytes(F, w.n_in);
  const char* base = static_cast<const char*>(w.data) + bytes * block;
  Vec acc[T][NB * kVecs];
  for (int i = 0; i < T; ++i)
    for (int b = 0; b < NB * kVecs; ++b)
      acc[i][b] = Vec{};
  const auto weight = [&](const char* from, int k, int j, int b) -> Vec {
    const char* p = from + (b / kVecs) * bytes;
    const std::int64_t at = static_cast<std::int64_t>(k / Q) * kBlock + b % kVecs * kLanes;
    if constexpr (F == kFp32) return load_floats(reinterpret_cast<const float*>(p) + at);
    else if constexpr (F == kFp16) return load<kFp16>(p, at);
    else {
      const UIntVec pair = load_bits(p + at * 4);
      return j == 0 ? (Vec)(pair << 16) : (Vec)(pair & 0xffff0000u);
    }
  };
  const auto add = [&](int k, int j) {
    Vec rows[NB * kVecs];
    const char* from = Q == 2 && T > 1 ? again(base) : base;
#pragma GCC unroll 16
    for (int b = 0; b < NB * kVecs; ++b) rows[b] = weight(from, k, j, b);
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) {
      const Vec x = fill(in.x[i * in.x_stride + k + j]);
#pragma GCC unroll 16
      for (int b = 0; b < NB * kVecs; ++b) acc[i][b] = multiply_add(rows[b], x, acc[i][b]);
    }
  };
  int k = from;
  for (; k + Q <= to; k += Q) {
    if constexpr (T == 1) prefetch_blocks<NB>(base, bytes, static_cast<std::int64_t>(k) * (F == kFp32 ? 64 : 32));
    add(k, 0);
    if constexpr (Q == 2) add(k, 1);
  }
  if (k < to) add(k, 0);  // an odd width: the pair's second half is padding
  for (int i = 0; i < T; ++i)
    for (int b = 0; b < NB * kVecs; ++b) {
      float* at = sums + i * kPanelRows + b * kLanes;
      store_floats(at, is_first ? acc[i][b] : load_floats(at) + acc[i][b]);
    }
}

#if defined(__AVX512BF16__) && defined(PARETUNE_AVX512)
// bf16 weights and inputs rounded to bf16, two products an instruction.
template <int T, int NB>
inline void bf16_dot_span(const Matrix& w, int block, int from, int to, const Inputs& in, float* sums, bool is_first) {
  const std::int64_t bytes = block_bytes(kBf16, w.n_in), stride = in.x_stride + in.x_stride % 2;
  const char* base = static_cast<const char*>(w.data) + bytes * block;
  __m512 acc[T][NB];
  for (int i = 0; i < T; ++i)
    for (int b = 0; b < NB; ++b)
      acc[i][b] = _mm512_setzero_ps();
  for (int k = from; k < to; k += 2) {
    if constexpr (T == 1) prefetch_blocks<NB>(base, bytes, static_cast<std::int64_t>(k) * 32);
    __m512i rows[NB];
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) {
      const char* p = base + b * bytes + static_cast<std::int64_t>(k) * 32;
      rows[b] = _mm512_loadu_si512(p);
    }
#pragma GCC unroll 8
    for (int i = 0; i < T; ++i) {
      const __m512i x = _mm512_set1_epi32(load_int(in.pairs + i * stride + k));
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) acc[i][b] = _mm512_dpbf16_ps(acc[i][b], (__m512bh)rows[b], (__m512bh)x);
    }
  }
  for (int i = 0; i < T; ++i)
    for (int b = 0; b < NB; ++b) {
      float* at = sums + i * kPanelRows + b * kLanes;
      _mm512_storeu_ps(at, is_first ? acc[i][b] : _mm512_add_ps(_mm512_loadu_ps(at), acc[i][b]));
    }
}
#endif

template <Format F, int T, int NB>
inline void float_tile(const Matrix& w, int block, int from, int to, const Inputs& in, float* sums, bool is_first) {
  for (int start = from; start < to; start += kSpan) {
    const int end = std::min(start + kSpan, to);
#if defined(__AVX512BF16__) && defined(PARETUNE_AVX512)
    if constexpr (F == kBf16) bf16_dot_span<T, NB>(w, block, start, end, in, sums, is_first && start == from);
    else
#endif
    float_span<F, T, NB>(w, block, start, end, in, sums, is_first && start == from);
  }
}

template <Format F, int T, int NB>
inline void int_tile(const Matrix& w, int block, int from, int to, const Inputs& in, float* sums, bool is_first) {
  constexpr int Q = quantum(F), kOffset = F == kInt4 ? 8 : F == kInt8 ? 128 : 0;
  const std::int64_t bytes = block_bytes(F, w.n_in), n_groups = w.groups();
  const char* base = static_cast<const char*>(w.data) + bytes * block;
  const int interval = w.group == 0 ? kChunk : w.group;
  const std::int32_t zero = kOffset + w.lowest;  // what stands for 0 among the stored numbers
  for (int start = from; start < to; start += interval) {
    const int end = std::min(start + interval, to);
    IntVec acc[T][NB * kVecs];
    std::int32_t total[T];
    for (int i = 0; i < T; ++i) {
      total[i] = 0;
      for (int k = start; k < end; k += kSumOver) total[i] += in.sums[i * (in.q_stride / kSumOver) + k / kSumOver];
      for (int b = 0; b < NB * kVecs; ++b) acc[i][b] = fill_int(-zero * total[i]);
    }
#if defined(__AVX512VNNI__) && defined(PARETUNE_AVX512)
    if (w.activation_bits <= 8) {  // 8-bit inputs have an instruction of their own here
      for (int k = start; k < end; k += Q) {
        if constexpr (T == 1) prefetch_blocks<NB>(base, bytes, static_cast<std::int64_t>(k) * (F == kInt8 ? 16 : 8));
        __m512i rows[NB], high[NB];
        for (int b = 0; b < NB; ++b) {
          const char* p = base + b * bytes + static_cast<std::int64_t>(k) * (F == kInt8 ? 16 : 8);
          rows[b] = _mm512_loadu_si512(p);
          if constexpr (F == kInt4) {
            high[b] = _mm512_and_si512(_mm512_srli_epi16(rows[b], 4), _mm512_set1_epi8(15));
            rows[b] = _mm512_and_si512(rows[b], _mm512_set1_epi8(15));
          }
        }
        for (int i = 0; i < T; ++i) {
          const std::int8_t* q = in.q8 + i * in.q_stride + k;
          const __m512i x = _mm512_set1_epi32(load_int(q));
          for (int b = 0; b < NB; ++b) acc[i][b] = (IntVec)_mm512_dpbusd_epi32((__m512i)acc[i][b], rows[b], x);
          if constexpr (F == kInt4) {
            const __m512i y = _mm512_set1_epi32(load_int(q + 4));
            for (int b = 0; b < NB; ++b) acc[i][b] = (IntVec)_mm512_dpbusd_epi32((__m512i)acc[i][b], high[b], y);
          }
        }
      }
    } else
#elif defined(PARETUNE_AVX2)
    if (F == kInt4 && w.activation_bits <= 8) {
      const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
      for (int part = start; part < end; part += kSumOver) {  // 8 sums of two products of 15 * 127 stay below 2^15
        __m256i shorts[T][NB * kVecs];
        for (int i = 0; i < T; ++i)
          for (int b = 0; b < NB * kVecs; ++b) shorts[i][b] = _mm256_setzero_si256();
        for (int k = part; k < std::min(part + kSumOver, end); k += Q) {
          if constexpr (T == 1) prefetch_blocks<NB>(base, bytes, static_cast<std::int64_t>(k) * 8);
#pragma GCC unroll 16
          for (int b = 0; b < NB * kVecs; ++b) {
            const char* p = base + b / kVecs * bytes + static_cast<std::int64_t>(k) * 8 + b % kVecs * kLanes * 4;
            const __m256i row = (__m256i)load_bits(p);
            const __m256i low = _mm256_and_si256(row, nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(row, 4), nibble);
#pragma GCC unroll 8
            for (int i = 0; i < T; ++i) {
              const std::int8_t* q = in.q8 + i * in.q_stride + k;
              const __m256i x = _mm256_set1_epi32(load_int(q)), y = _mm256_set1_epi32(load_int(q + 4));
              const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(low, x), _mm256_maddubs_epi16(high, y));
              shorts[i][b] = _mm256_add_epi16(shorts[i][b], both);
            }
          }
        }
        for (int i = 0; i < T; ++i)
          for (int b = 0; b < NB * kVecs; ++b) acc[i][b] += (IntVec)_mm256_madd_epi16(shorts[i][b], ones);
      }
    } else
#endif
    for (int k = start; k < end; k += Q) {
      if constexpr (T == 1) prefetch_blocks<NB>(base, bytes, static_cast<std::int64_t>(k) * (F == kInt8 ? 16 : 8));
      const auto bits = [&](const char* p, int b) {
        return load_bits(p + b / kVecs * bytes + static_cast<std::int64_t>(k / Q) * kBlock * 4 + b % kVecs * kLanes * 4);
      };
      // Two inputs at a time against one 16-bit part of every lane.
      const auto add = [&](int pair, const auto& part) {
        UIntVec rows[NB * kVecs];
        const char* p = T > 1 ? again(base) : base;
#pragma GCC unroll 16
        for (int b = 0; b < NB * kVecs; ++b) rows[b] = (UIntVec)part((UShortVec)bits(p, b));
#pragma GCC unroll 8
        for (int i = 0; i < T; ++i) {
          const IntVec x = fill_int(load_int(in.q + i * in.q_stride + k + pair * 2));
#pragma GCC unroll 16
          for (int b = 0; b < NB * kVecs; ++b) acc[i][b] = add_products(rows[b], x, acc[i][b]);
        }
      };
      if constexpr (F == kInt8) {
        add(0, [](UShortVec v) { return v & 255; });
        add(1, [](UShortVec v) { return v >> 8; });
      } else if constexpr (F == kNf4) {
        add(0, [](UShortVec v) { return normal_codes(v & 15); });
        add(2, [](UShortVec v) { return normal_codes((v >> 4) & 15); });
        add(1, [](UShortVec v) { return normal_codes((v >> 8) & 15); });
        add(3, [](UShortVec v) { return normal_codes(v >> 12); });
      } else {
        add(0, [](UShortVec v) { return v & 15; });
        add(2, [](UShortVec v) { return (v >> 4) & 15; });
        add(1, [](UShortVec v) { return (v >> 8) & 15; });
        add(3, [](UShortVec v) { return v >> 12; });
      }
    }
    for (int b = 0; b < NB * kVecs; ++b) {
      const std::int64_t group = ((block + b / kVecs) * n_groups + start / std::max(w.group, 1)) * kBlock + b % kVecs * kLanes;
      const Vec weight_scale = w.group == 0 ? fill(1.0f) : group_scale(w, group);
      for (int i = 0; i < T; ++i) {
        const float scale = in.scale[i * (in.q_stride / kChunk) + start / kChunk];
        float* at = sums + i * kPanelRows + b * kLanes;
        Vec out = is_first && start == from ? Vec{} : load_floats(at);
        out = multiply_add(to_floats(acc[i][b]) * scale, weight_scale, out);
        if (w.minimum != nullptr)
          out = multiply_add(load<kFp16>(w.minimum, group), fill(scale * static_cast<float>(total[i])), out);
        store_floats(at, out);
      }
    }
  }
}

// ---------------------------------------------------------------- panels

template <Format F, int T>
inline void tiles(const Matrix& w, int block, int n_blocks, int from, int to, const Inputs& in, float* sums,
                  bool is_first) {
  constexpr int kWide = T == 1 ? kPanel : kLanes == 16 ? 4 : kLanes == 8 && T <= 3 ? 2 : 1;  // what the registers hold
  const auto run = [&]<int NB>(int b) {
    float* out = sums + b * kBlock;
    if constexpr (is_integer(F)) int_tile<F, T, NB>(w, block + b, from, to, in, out, is_first);
    else float_tile<F, T, NB>(w, block + b, from, to, in, out, is_first);
  };
  int b = 0;
  for (; b + kWide <= n_blocks; b += kWide) run.template operator()<kWide>(b);
  if constexpr (kWide > 2)
    for (; b + 2 <= n_blocks; b += 2) run.template operator()<2>(b);
  for (; b < n_blocks; ++b) run.template operator()<1>(b);
}

template <Format F>
inline void rows_of_tiles(const Matrix& w, int block, int n_blocks, int from, int to, const Inputs& in, int M, float* sums,
                          bool is_first) {
  const int n_tiles = (M + kMaxTile - 1) / kMaxTile;
  for (int t = 0; t < n_tiles; ++t) {
    const int first = M * t / n_tiles, n = M * (t + 1) / n_tiles - first;
    const Inputs rows = in.rows_from(first);
    float* out = sums + static_cast<std::int64_t>(first) * kPanelRows;
    switch (n) {
      case 1: tiles<F, 1>(w, block, n_blocks, from, to, rows, out, is_first); break;
      case 2: tiles<F, 2>(w, block, n_blocks, from, to, rows, out, is_first); break;
      case 3: tiles<F, 3>(w, block, n_blocks, from, to, rows, out, is_first); break;
      case 4: if constexpr (kMaxTile > 3) tiles<F, 4>(w, block, n_blocks, from, to, rows, out, is_first); break;
      case 5: if constexpr (kMaxTile > 3) tiles<F, 5>(w, block, n_blocks, from, to, rows, out, is_first); break;
      case 6: if constexpr (kMaxTile > 3) tiles<F, 6>(w, block, n_blocks, from, to, rows, out, is_first); break;
    }
  }
}

constexpr int kPart = std::max(kSpan, (96 << 10) / (4 * kPanelRows) / kSpan * kSpan);  // inputs of an fp32 panel, 64 KiB

// Inputs `from` to `to` of some blocks as packed fp32, [n_blocks, to - from, 16].
template <Format F>
inline void widen(const Matrix& w, int block, int n_blocks, int from, int to, float* out) {
  const std::int64_t bytes = block_bytes(F, w.n_in);
  for (int b = 0; b < n_blocks; ++b) {
    const char* p = static_cast<const char*>(w.data) + bytes * (block + b);
    for (int k = from; k < to; ++k, out += kBlock)
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (F == kBf16) {
          const UIntVec pair = load_bits(p + static_cast<std::int64_t>(k / 2) * kBlock * 4 + v * kLanes * 4);
          store_floats(out + v * kLanes, k % 2 == 0 ? (Vec)(pair << 16) : (Vec)(pair & 0xffff0000u));
        } else {
          store_floats(out + v * kLanes, load<F>(p, static_cast<std::int64_t>(k) * kBlock + v * kLanes));
        }
      }
  }
}

// A scale a row is multiplied with whole sums.
inline void scale_sums(const Matrix& w, int block, int n_blocks, int M, float* sums) {
  if (w.group != 0 || w.scale == nullptr) return;
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < n_blocks * kBlock; r += kLanes) {
      float* at = sums + static_cast<std::int64_t>(m) * kPanelRows + r;
      store_floats(at, load_floats(at) * load_floats(static_cast<const float*>(w.scale) + block * kBlock + r));
    }
}

// int8 without zeros: part after part is expanded in the first cache and multiplied there, many rows read larger parts.
inline void sparse_panel(const Matrix& w, int block, int n_blocks, const Inputs& in, int M, float* sums) {
  constexpr int kMost = 4 * kChunk;
  static_assert(kChunk % kStartEvery == 0);
  alignas(64) static thread_local char dense[kMost * kPanelRows];
  const Sparse from(w);
  const int C = round_up(w.n_in, 4), part = M <= 2 * kMaxTile ? kChunk : kMost;
  for (int k = 0; k < C; k += part) {
    const int n = std::min(part, C - k);
    for (int b = 0; b < n_blocks; ++b) expand_block(from, block + b, k, k + n, dense + static_cast<std::int64_t>(b) * n * kBlock);
    const Matrix expanded{dense, nullptr, nullptr, kInt8, kPanelRows, n, 0, w.activation_bits, w.largest, 0};
    Inputs rest = in;
    rest.q += k, rest.scale += k / kChunk, rest.sums += k / kSumOver;
    if (rest.q8 != nullptr) rest.q8 += k;
    rows_of_tiles<kInt8>(expanded, 0, n_blocks, 0, n, rest, M, sums, k == 0);
  }
  scale_sums(w, block, n_blocks, M, sums);
}

template <Format F>
inline void panel(const Matrix& w, int block, int n_blocks, const Inputs& in, int M, float* sums) {
  const int C = is_integer(F) ? round_up(w.n_in, quantum(F)) : w.n_in;
  constexpr bool kWidens = F == kFp16 || (F == kBf16 && !kHasBf16Dot);
  if (M <= 2 * kMaxTile) {
    rows_of_tiles<F>(w, block, n_blocks, 0, C, in, M, sums, true);
  } else {
    // Many rows read a panel again and again: a part of it that stays in the second cache at a time.
    const int part = kWidens ? kPart : kPart * 4 / std::max(1, static_cast<int>(block_bytes(F, kChunk) / kChunk / kBlock));
    for (int from = 0; from < C; from += part) {
      const int to = std::min(C, from + part);
      if constexpr (kWidens) {  // converted once, not for every tile
        alignas(64) static thread_local float wide[kPart * kPanelRows];
        widen<F>(w, block, n_blocks, from, to, wide);
        const Matrix converted{wide, nullptr, nullptr, kFp32, kPanelRows, to - from, 0, 16, 0};
        Inputs rest = in;
        rest.x += from;
        rows_of_tiles<kFp32>(converted, 0, n_blocks, 0, to - from, rest, M, sums, from == 0);
      } else {
        rows_of_tiles<F>(w, block, n_blocks, from, to, in, M, sums, from == 0);
      }
    }
  }
  scale_sums(w, block, n_blocks, M, sums);
}

constexpr int kPanelInputs = 96;  // rows whose sums are held at once

// Calls emit(first row of the weight, number of rows, first input, number of inputs, sums [inputs, kPanelRows]) for the
// blocks `from` to `to`.
template <class Emit>
inline void products(const Matrix& w, int from, int to, const Inputs& in, int M, float* sums, Emit emit) {
  for (int block = from; block < to; block += kPanel) {
    const int n_blocks = std::min(kPanel, to - block), n_rows = std::min(n_blocks * kBlock, w.n_out - block * kBlock);
    for (int m = 0; m < M; m += kPanelInputs) {
      const int n = std::min(kPanelInputs, M - m);
      const Inputs rows = in.rows_from(m);
      switch (w.format) {
        case kFp32: panel<kFp32>(w, block, n_blocks, rows, n, sums); break;
        case kBf16: panel<kBf16>(w, block, n_blocks, rows, n, sums); break;
        case kFp16: panel<kFp16>(w, block, n_blocks, rows, n, sums); break;
        case kInt8: panel<kInt8>(w, block, n_blocks, rows, n, sums); break;
        case kInt4: panel<kInt4>(w, block, n_blocks, rows, n, sums); break;
        case kNf4: panel<kNf4>(w, block, n_blocks, rows, n, sums); break;
        case kSparse8: sparse_panel(w, block, n_blocks, rows, n, sums); break;
      }
      emit(block * kBlock, n_rows, m, n, sums);
    }
  }
}
