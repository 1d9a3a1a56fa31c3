// Products of packed weights (packed.h) and many rows on AVX2: the same sums as products.h, bit for bit.
//
// A few rows are laid side by side (`Tiles`) and a part of a few blocks of the weight is brought into the form that the
// multiplications take (a panel, once for all rows), so that the innermost loops are nothing but loads, products and
// sums. These loops are written out: the compiler takes addresses apart and spills sums (GCC 12), at two thirds of the
// speed. Multiplications of a byte:
//
//   vpmaddwd     16-bit inputs: 16 products, added in 32 bits
//   vpmaddubsw   32 products of an unsigned and a signed byte, added in pairs to 16 bits. 8-bit weights take 7-bit
//                inputs, 0 to 127: a pair holds 2 * 127 * 128, and with numbers of the weight up to 64 two pairs fit.
//                4-bit weights, 0 to 15, take signed inputs of 8 bits: eight pairs fit. What fits is added in 16 bits
//                first, where that takes one instruction instead of two.
//
// Legend: T rows of a tile, `word` 32 bits of a row: a float, two shorts or four bytes.
#pragma once

#include <vector>

#include "products.h"

#if defined(PARETUNE_AVX2)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;  // AVX-512 has registers enough, plain code gains nothing
#endif

enum Content : std::int32_t { kFloats, kShorts, kSignedBytes, kUnsignedBytes };

inline Content content_of(const Matrix& w) {
  if (!is_integer(w.format)) return kFloats;
  if (w.format == kInt4 && w.activation_bits <= 8) return kSignedBytes;
  return w.activation_bits == 7 ? kUnsignedBytes : kShorts;
}

constexpr int kMostTiled = 192;  // rows whose sums are held at once

// Rows of a step side by side, zeros behind the last: [ceil(M / T)][words][T].
struct Tiles {
  std::vector<std::uint32_t> data;
  std::vector<float> scale;         // [ceil(M / T)][chunks][T]
  std::vector<std::int32_t> zero;   // the same: what stands for 0 in 7-bit inputs
  std::vector<std::int32_t> sums;   // [ceil(M / T)][chunks of kSumOver][T]
  Content content = kFloats;
  int T = 0, M = 0, words = 0, chunks = 0;

  // Little padding, and large tiles: they read the panel less often.
  void shape(int rows, int C, Content kind) {
    content = kind, M = rows;
    words = kind == kFloats ? C : round_up(C, kChunk) / (kind == kShorts ? 2 : 4);
    chunks = round_up(C, kChunk) / kChunk;
    T = 4;
    for (int t = 5; t <= (kind == kUnsignedBytes ? 5 : 6); ++t)
      if (round_up(M, t) * 25 <= round_up(M, T) * 26) T = t;
  }
  void reserve(int rows, int C, bool has_floats, bool has_integers) {
    const std::size_t padded = rows + 5, n_chunks = round_up(C, kChunk) / kChunk;
    // Integers are padded to whole chunks: of a narrow layer they take more words than its floats.
    const std::size_t wide = std::max<std::size_t>(has_floats ? C : 0, has_integers ? n_chunks * kChunk / 2 : 0);
    if (data.size() < padded * wide) data.resize(padded * wide);
    if (!has_integers || scale.size() >= padded * n_chunks) return;
    scale.resize(padded * n_chunks), zero.resize(padded * n_chunks), sums.resize(padded * n_chunks * (kChunk / kSumOver));
  }
  std::size_t bytes() const { return 4 * (data.size() + scale.size() + sums.size() + zero.size()); }

  int n_tiles() const { return (M + T - 1) / T; }

  // Row m, rounded where the content is integers; m may lie behind the last row.
  void set(int m, const float* x, int C, int bits) {
    const int tile = m / T, i = m % T;
    std::uint32_t* to = data.data() + static_cast<std::size_t>(tile) * words * T + i;
    if (m >= M || content == kFloats) {
      for (int k = 0; k < words; ++k) {
        if (m < M) std::memcpy(to + static_cast<std::size_t>(k) * T, x + k, 4);
        else to[static_cast<std::size_t>(k) * T] = 0;
      }
      if (content == kFloats) return;
    }
    alignas(64) std::int16_t q[kChunk] = {};
    alignas(64) std::int8_t bytes[kChunk];
    for (int chunk = 0; chunk < chunks; ++chunk) {
      std::int32_t found[kChunk / kSumOver] = {};
      const std::size_t at = (static_cast<std::size_t>(tile) * chunks + chunk) * T + i;
      scale[at] = 0.0f, zero[at] = 0;
      if (m < M) quantize_chunk(x + chunk * kChunk, std::min(kChunk, C - chunk * kChunk), bits, q, &scale[at], found, &zero[at]);
      for (int j = 0; j < kChunk / kSumOver; ++j)
        sums[((static_cast<std::size_t>(tile) * chunks + chunk) * (kChunk / kSumOver) + j) * T + i] = found[j];
      const char* from = reinterpret_cast<const char*>(q);
      int n = kChunk / 2;
      if (content != kShorts) {
        if (content == kUnsignedBytes)
          for (int k = 0; k < kChunk; ++k) q[k] = static_cast<std::int16_t>(q[k] + zero[at]);
        for (int k = 0; k < kChunk; k += 16) store_bytes(q + k, bytes + k);
        from = reinterpret_cast<const char*>(bytes), n = kChunk / 4;
      }
      for (int k = 0; k < n; ++k, to += T) std::memcpy(to, from + 4 * k, 4);
    }
  }
};

#if defined(PARETUNE_AVX2)

// ---------------------------------------------------------------- innermost loops

// Sums of T rows and 16 outputs stand in ymm0 to ymm(2T - 1). w: [n][16 outputs] words, x: [n][T] words,
// out: [T, 16] in 32 bits.
#define PARETUNE_ROWS4(R) R(0, 0, 1) R(1, 2, 3) R(2, 4, 5) R(3, 6, 7)
#define PARETUNE_ROWS5(R) PARETUNE_ROWS4(R) R(4, 8, 9)
#define PARETUNE_ROWS6(R) PARETUNE_ROWS5(R) R(5, 10, 11)
#define PARETUNE_ZERO(i, a, b)                              \
  "vpxor %%ymm" #a ", %%ymm" #a ", %%ymm" #a "\n\t"         \
  "vpxor %%ymm" #b ", %%ymm" #b ", %%ymm" #b "\n\t"
#define PARETUNE_STORE(i, a, b)                             \
  "vmovdqu %%ymm" #a ", 64*" #i "(%[out])\n\t"              \
  "vmovdqu %%ymm" #b ", 64*" #i "+32(%[out])\n\t"
#define PARETUNE_WEIGHTS                                    \
  "vmovdqu (%[w]), %%ymm14\n\t"                             \
  "vmovdqu 32(%[w]), %%ymm15\n\t"
#define PARETUNE_FLOATS(i, a, b)                            \
  "vbroadcastss 4*" #i "(%[x]), %%ymm12\n\t"                \
  "vfmadd231ps %%ymm14, %%ymm12, %%ymm" #a "\n\t"           \
  "vfmadd231ps %%ymm15, %%ymm12, %%ymm" #b "\n\t"
#define PARETUNE_SHORTS(i, a, b)                            \
  "vpbroadcastd 4*" #i "(%[x]), %%ymm12\n\t"                \
  "vpmaddwd %%ymm14, %%ymm12, %%ymm13\n\t"                  \
  "vpmaddwd %%ymm15, %%ymm12, %%ymm12\n\t"                  \
  "vpaddd %%ymm13, %%ymm" #a ", %%ymm" #a "\n\t"            \
  "vpaddd %%ymm12, %%ymm" #b ", %%ymm" #b "\n\t"
// Every pair is widened.
#define PARETUNE_PAIRS(i, a, b)                             \
  "vpbroadcastd 4*" #i "(%[x]), %%ymm12\n\t"                \
  "vpmaddubsw (%[w]), %%ymm12, %%ymm13\n\t"                 \
  "vpmaddubsw 32(%[w]), %%ymm12, %%ymm12\n\t"               \
  "vpmaddwd %%ymm15, %%ymm13, %%ymm13\n\t"                  \
  "vpmaddwd %%ymm15, %%ymm12, %%ymm12\n\t"                  \
  "vpaddd %%ymm13, %%ymm" #a ", %%ymm" #a "\n\t"            \
  "vpaddd %%ymm12, %%ymm" #b ", %%ymm" #b "\n\t"
// Two pairs first, from two words. At most five rows: six leave no registers for weights, and loads become the limit.
#define PARETUNE_FOURS_WEIGHTS                              \
  "vmovdqu (%[w]), %%ymm10\n\t"                             \
  "vmovdqu 32(%[w]), %%ymm11\n\t"
#define PARETUNE_FOURS(i, a, b)                             \
  "vpbroadcastd 4*" #i "(%[x]), %%ymm12\n\t"                \
  "vpbroadcastd 4*" #i "(%[x], %[s]), %%ymm13\n\t"          \
  "vpmaddubsw %%ymm10, %%ymm12, %%ymm14\n\t"                \
  "vpmaddubsw %%ymm11, %%ymm12, %%ymm12\n\t"                \
  "vpmaddubsw 64(%[w]), %%ymm13, %%ymm15\n\t"               \
  "vpmaddubsw 96(%[w]), %%ymm13, %%ymm13\n\t"               \
  "vpaddw %%ymm15, %%ymm14, %%ymm14\n\t"                    \
  "vpaddw %%ymm13, %%ymm12, %%ymm12\n\t"                    \
  "vpmaddwd %[ones], %%ymm14, %%ymm14\n\t"                  \
  "vpmaddwd %[ones], %%ymm12, %%ymm12\n\t"                  \
  "vpaddd %%ymm14, %%ymm" #a ", %%ymm" #a "\n\t"            \
  "vpaddd %%ymm12, %%ymm" #b ", %%ymm" #b "\n\t"
// The sums themselves are in 16 bits; here the weights are the unsigned side.
#define PARETUNE_MANY(i, a, b)                              \
  "vpbroadcastd 4*" #i "(%[x]), %%ymm12\n\t"                \
  "vpmaddubsw %%ymm12, %%ymm14, %%ymm13\n\t"                \
  "vpmaddubsw %%ymm12, %%ymm15, %%ymm12\n\t"                \
  "vpaddw %%ymm13, %%ymm" #a ", %%ymm" #a "\n\t"            \
  "vpaddw %%ymm12, %%ymm" #b ", %%ymm" #b "\n\t"
#define PARETUNE_WIDEN(i, a, b)                             \
  "vpmaddwd %[ones], %%ymm" #a ", %%ymm" #a "\n\t"          \
  "vpmaddwd %[ones], %%ymm" #b ", %%ymm" #b "\n\t"
#define PARETUNE_LOOP(ROWS, FIRST, LOADS, STEP, WORDS, LAST)                                                        \
  asm volatile(ROWS(PARETUNE_ZERO) FIRST ".p2align 5\n1:\n\t" LOADS ROWS(STEP)                                      \
               "add $64*" #WORDS ", %[w]\n\tlea (%[x], %[s], " #WORDS "), %[x]\n\tdec %[n]\n\tjnz 1b\n\t" LAST      \
               ROWS(PARETUNE_STORE)                                                                                 \
               : [w] "+r"(w), [x] "+r"(x), [n] "+r"(n)                                                              \
               : [s] "r"(stride), [out] "r"(out), [ones] "m"(*reinterpret_cast<const __m256i*>(kOnes))              \
               : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11",  \
                 "ymm12", "ymm13", "ymm14", "ymm15", "cc", "memory")

alignas(32) inline const std::int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

enum Loop { kFloatLoop, kShortLoop, kPairLoop, kFourLoop, kManyLoop };
constexpr int kManyWords = kSumOver / 4;  // of kManyLoop at once

// n > 0 words; of kFourLoop an even number, of kManyLoop at most kManyWords.
template <Loop L, int T>
inline void innermost(const char* w, const char* x, std::int64_t n, void* out) {
  const std::int64_t stride = T * 4;
#define PARETUNE_FORMS(ROWS)                                                                                            \
  if constexpr (L == kFloatLoop) PARETUNE_LOOP(ROWS, "", PARETUNE_WEIGHTS, PARETUNE_FLOATS, 1, "");                     \
  else if constexpr (L == kShortLoop) PARETUNE_LOOP(ROWS, "", PARETUNE_WEIGHTS, PARETUNE_SHORTS, 1, "");                \
  else if constexpr (L == kPairLoop) PARETUNE_LOOP(ROWS, "vmovdqa %[ones], %%ymm15\n\t", "", PARETUNE_PAIRS, 1, "");    \
  else if constexpr (L == kManyLoop)                                                                                    \
    PARETUNE_LOOP(ROWS, "", PARETUNE_WEIGHTS, PARETUNE_MANY, 1, ROWS(PARETUNE_WIDEN));
  if constexpr (L == kFourLoop) {
    static_assert(T <= 5);
    n /= 2;
    if constexpr (T == 4) PARETUNE_LOOP(PARETUNE_ROWS4, "", PARETUNE_FOURS_WEIGHTS, PARETUNE_FOURS, 2, "");
    else PARETUNE_LOOP(PARETUNE_ROWS5, "", PARETUNE_FOURS_WEIGHTS, PARETUNE_FOURS, 2, "");
  } else if constexpr (T == 4) {
    PARETUNE_FORMS(PARETUNE_ROWS4)
  } else if constexpr (T == 5) {
    PARETUNE_FORMS(PARETUNE_ROWS5)
  } else {
    static_assert(T == 6);
    PARETUNE_FORMS(PARETUNE_ROWS6)
  }
}

// ---------------------------------------------------------------- panels

constexpr int kPanelWords = 256;  // words of a panel: 64 KiB of four blocks, which stay in the second cache
constexpr int kMostGroups = kPanelWords * 4 / kSumOver;

struct Panel {
  alignas(64) char words[kPanel * kPanelWords * kBlock * 4];
  alignas(64) std::int32_t sums[kPanel][kMostGroups][kBlock];  // of the weight's numbers by group, for 7-bit inputs
  alignas(64) char dense[kPanelWords * 4 * kBlock];  // of a sparse block
};

inline __m256i bytes_of(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_bits(char* p, __m256i x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }

// Inputs `from` to `to` of a block of integers as pairs of shorts.
inline void shorts_of(const Matrix& w, const char* block, int from, int to, char* out) {
  const __m256i byte = _mm256_set1_epi16(255), nibble = _mm256_set1_epi16(15);
  // Numbers with a minimum are counted from it.
  const __m256i middle = _mm256_set1_epi16(static_cast<std::int16_t>((w.format == kInt8 ? 128 : 8) + w.lowest));
  const int Q = quantum(w.format);
  for (int k = from; k < to; k += Q, out += 32 * Q)
    for (int v = 0; v < kVecs; ++v) {
      const __m256i bits = bytes_of(block + static_cast<std::int64_t>(k / Q) * 64 + v * 32);
      char* at = out + v * 32;
      if (w.format == kInt8) {
        store_bits(at, _mm256_sub_epi16(_mm256_and_si256(bits, byte), middle));
        store_bits(at + 64, _mm256_sub_epi16(_mm256_srli_epi16(bits, 8), middle));
      } else if (w.format == kNf4) {
        const UShortVec q = (UShortVec)bits;
        store_bits(at, (__m256i)normal_codes(q & 15));
        store_bits(at + 64, (__m256i)normal_codes((q >> 8) & 15));
        store_bits(at + 128, (__m256i)normal_codes((q >> 4) & 15));
        store_bits(at + 192, (__m256i)normal_codes(q >> 12));
      } else {
        store_bits(at, _mm256_sub_epi16(_mm256_and_si256(bits, nibble), middle));
        store_bits(at + 64, _mm256_sub_epi16(_mm256_and_si256(_mm256_srli_epi16(bits, 8), nibble), middle));
        store_bits(at + 128, _mm256_sub_epi16(_mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble), middle));
        store_bits(at + 192, _mm256_sub_epi16(_mm256_srli_epi16(bits, 12), middle));
      }
    }
}

// 8-bit weights as signed bytes, and their sums over every `interval` inputs. An odd last word is followed by zeros.
inline void signed_bytes_of(const char* block, int from, int to, int interval, char* out, std::int32_t (*sums)[kBlock]) {
  static_assert(kChunk <= 128, "sums of pairs fit into 16 bits");
  const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1), sign = _mm256_set1_epi8(-128);
  const char* word = block + static_cast<std::int64_t>(from) * 16;
  for (int start = from; start < to; start += interval, ++sums) {
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int n = (std::min(start + interval, to) - start) / 4; n > 0; --n, word += 64, out += 64) {
      const __m256i a = _mm256_xor_si256(bytes_of(word), sign), b = _mm256_xor_si256(bytes_of(word + 32), sign);
      store_bits(out, a), store_bits(out + 32, b);
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(ones8, a));
      high = _mm256_add_epi16(high, _mm256_maddubs_epi16(ones8, b));
    }
    char* to_sums = reinterpret_cast<char*>(*sums);
    store_bits(to_sums, _mm256_madd_epi16(low, ones16)), store_bits(to_sums + 32, _mm256_madd_epi16(high, ones16));
  }
  if ((to - from) / 4 % 2) store_bits(out, _mm256_setzero_si256()), store_bits(out + 32, _mm256_setzero_si256());
}

// 4-bit weights as bytes from 0 to 15.
inline void nibbles_of(const char* block, int from, int to, char* out) {
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int k = from; k < to; k += 8, out += 128)
    for (int v = 0; v < kVecs; ++v) {
      const __m256i bits = bytes_of(block + static_cast<std::int64_t>(k) * 8 + v * 32);
      store_bits(out + v * 32, _mm256_and_si256(bits, nibble));
      store_bits(out + 64 + v * 32, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble));
    }
}

// ---------------------------------------------------------------- a tile

// What is unpacked next is fetched while products are computed, or reading and computing would take turns.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  int lines = 0;  // of a call

  void fetch() {
    for (int i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

template <int T>
inline void float_rows(const char* panel, const char* x, int n, float* sums, bool is_first, Ahead& ahead) {
  alignas(32) float found[T * kBlock];
  for (int start = 0; start < n; start += kSpan) {
    ahead.fetch();
    innermost<kFloatLoop, T>(panel + start * 64, x + static_cast<std::int64_t>(start) * T * 4, std::min(kSpan, n - start), found);
    for (int i = 0; i < T; ++i)
      for (int v = 0; v < kBlock; v += kLanes) {
        float* at = sums + i * kPanelRows + v;
        const Vec span = load_floats(found + i * kBlock + v);
        store_floats(at, is_first && start == 0 ? span : load_floats(at) + span);
      }
  }
}

// What integer sums become, in the order of products.h. scale, zero, total: [T].
template <Loop L, int T, bool kFirst, bool kMinimum>
inline void add_scaled(const Matrix& w, std::int64_t group, const std::int32_t* found, const std::int32_t* of_weights,
                       const float* scale, const std::int32_t* zero, const std::int32_t* total, float* sums) {
#pragma GCC unroll 2
  for (int v = 0; v < kBlock; v += kLanes) {
    const Vec weight_scale = w.group == 0 ? fill(1.0f) : group_scale(w, group + v);
    Vec minimum = {};
    if constexpr (kMinimum) minimum = load<kFp16>(w.minimum, group + v);
    IntVec correction = {};
    if constexpr (L == kPairLoop || L == kFourLoop) std::memcpy(&correction, of_weights + v, sizeof correction);
#pragma GCC unroll 6
    for (int i = 0; i < T; ++i) {
      IntVec sum;
      std::memcpy(&sum, found + i * kBlock + v, sizeof sum);
      if constexpr (L == kManyLoop) sum -= fill_int((8 + w.lowest) * total[i]);
      if constexpr (L == kPairLoop || L == kFourLoop) {
        sum -= correction * zero[i];
        if constexpr (kMinimum) sum -= fill_int(w.lowest * total[i]);
      }
      float* at = sums + i * kPanelRows + v;
      Vec out = {};
      if constexpr (!kFirst) out = load_floats(at);
      out = multiply_add(to_floats(sum) * scale[i], weight_scale, out);
      if constexpr (kMinimum) out = multiply_add(minimum, fill(scale[i] * static_cast<float>(total[i])), out);
      store_floats(at, out);
    }
  }
}

// Inputs `from` to `to` of one tile.
template <Loop L, int T>
inline void integer_rows(const Matrix& w, int block, const char* panel, const std::int32_t (*weight_sums)[kBlock],
                         int from, int to, const Tiles& in, int tile, const char* x, float* sums, Ahead& ahead) {
  constexpr int Q = L == kShortLoop ? 2 : 4;
  const int interval = w.group == 0 ? kChunk : w.group, n_groups = w.groups();
  for (int start = from; start < to; start += interval, ++weight_sums) {
    alignas(32) std::int32_t found[T * kBlock];
    const int end = std::min(start + interval, to), n = (end - start + Q - 1) / Q;
    ahead.fetch();
    const auto run = [&](int word, int n_words, std::int32_t* out) {
      const std::int64_t at = (start - from) / Q + word;
      innermost<L, T>(panel + at * 64, x + at * T * 4, n_words, out);
    };
    if constexpr (L == kManyLoop) {
      run(0, std::min(n, kManyWords), found);
      for (int word = kManyWords; word < n; word += kManyWords) {
        alignas(32) std::int32_t more[T * kBlock];
        run(word, std::min(n - word, kManyWords), more);
        for (int i = 0; i < T * kBlock; ++i) found[i] += more[i];
      }
    } else {
      run(0, L == kFourLoop ? n + n % 2 : n, found);
    }
    const std::int64_t chunk = (static_cast<std::int64_t>(tile) * in.chunks + start / kChunk) * T;
    const std::int32_t* total =
        in.sums.data() + (static_cast<std::int64_t>(tile) * in.chunks * (kChunk / kSumOver) + start / kSumOver) * T;
    std::int32_t longer[T];
    if ((L == kManyLoop || w.minimum != nullptr) && end - start > kSumOver) {
      for (int i = 0; i < T; ++i) {
        longer[i] = 0;
        for (int k = 0; k < end - start; k += kSumOver) longer[i] += total[k / kSumOver * T + i];
      }
      total = longer;
    }
    const std::int64_t group = (static_cast<std::int64_t>(block) * n_groups + start / interval) * kBlock;
    const auto add = [&]<bool kFirst, bool kMinimum>() {
      add_scaled<L, T, kFirst, kMinimum>(w, group, found, *weight_sums, in.scale.data() + chunk, in.zero.data() + chunk, total, sums);
    };
    if (w.minimum == nullptr) start == 0 ? add.template operator()<true, false>() : add.template operator()<false, false>();
    else start == 0 ? add.template operator()<true, true>() : add.template operator()<false, true>();
  }
}

// ---------------------------------------------------------------- all rows

template <Loop L, int T>
inline void tile_rows(const Matrix& w, int block, int n_blocks, int from, int to, const Panel& panel, const Tiles& in,
                      int tile_from, int tile_to, float* sums, Ahead& ahead) {
  constexpr int Q = L == kFloatLoop ? 1 : L == kShortLoop ? 2 : 4;
  const int words = (to - from + Q - 1) / Q;
  for (int tile = tile_from; tile < tile_to; ++tile) {
    const std::uint32_t* x = in.data.data() + (static_cast<std::size_t>(tile) * in.words + from / Q) * T;
    for (int b = 0; b < n_blocks; ++b) {
      float* out = sums + static_cast<std::size_t>(tile - tile_from) * T * kPanelRows + b * kBlock;
      const char* rows = w.format == kFp32
                             ? static_cast<const char*>(w.data) + block_bytes(kFp32, w.n_in) * (block + b) + static_cast<std::int64_t>(from) * 64
                             : panel.words + static_cast<std::int64_t>(b) * kPanelWords * 64;
      const char* at = reinterpret_cast<const char*>(x);
      if constexpr (L == kFloatLoop) float_rows<T>(rows, at, words, out, from == 0, ahead);
      else integer_rows<L, T>(w, block + b, rows, panel.sums[b], from, to, in, tile, at, out, ahead);
    }
  }
}

constexpr int kFewTiles = 4;  // a block of the weight after the other, in the order of memory; else a panel of them

// As `products` of products.h.
template <class Emit>
inline void tiled_products(const Matrix& w, int from, int to, const Tiles& in, float* sums, Emit emit) {
  alignas(64) static thread_local Panel panel;
  const int C = is_integer(w.format) ? round_up(w.n_in, quantum(w.format)) : w.n_in;
  const int part = kPanelWords * (in.content == kFloats ? 1 : in.content == kShorts ? 2 : 4);
  const int interval = is_integer(w.format) ? w.group == 0 ? kChunk : w.group : kSpan;
  const Loop loop = in.content == kFloats ? kFloatLoop : in.content == kShorts ? kShortLoop
                    : in.content == kSignedBytes ? kManyLoop : w.largest <= 64 ? kFourLoop : kPairLoop;
  const int at_once = kMostTiled / in.T;
  const bool is_few = in.n_tiles() <= kFewTiles;
  const std::int64_t bytes = block_bytes(w.format, w.n_in);
  const char* const data = static_cast<const char*>(w.data);
  Ahead ahead;
  for (int block = from; block < to; block += kPanel) {
    const int n_blocks = std::min(kPanel, to - block), n_rows = std::min(n_blocks * kBlock, w.n_out - block * kBlock);
    for (int tile = 0; tile < in.n_tiles(); tile += at_once) {
      const int tile_to = std::min(in.n_tiles(), tile + at_once), m = tile * in.T, n = std::min(in.M, tile_to * in.T) - m;
      const int together = is_few ? 1 : n_blocks;
      for (int first = block; first < block + n_blocks; first += together)
        for (int k = 0; k < C; k += part) {
          const int end = std::min(C, k + part);
          for (int b = 0; b < together; ++b) {
            const char* rows = data + bytes * (first + b);
            char* words = panel.words + static_cast<std::int64_t>(b) * kPanelWords * 64;
            if (w.format == kSparse8) {
              expand_block(Sparse(w), first + b, k, end, panel.dense);
              Matrix dense = w;
              dense.format = kInt8;
              if (in.content == kShorts) shorts_of(dense, panel.dense, 0, end - k, words);
              else signed_bytes_of(panel.dense, 0, end - k, interval, words, panel.sums[b]);
              continue;
            }
            if (w.format == kBf16) widen<kBf16>(w, first + b, 1, k, end, reinterpret_cast<float*>(words));
            else if (w.format == kFp16) widen<kFp16>(w, first + b, 1, k, end, reinterpret_cast<float*>(words));
            else if (in.content == kShorts) shorts_of(w, rows, k, end, words);
            else if (in.content == kUnsignedBytes) signed_bytes_of(rows, k, end, interval, words, panel.sums[b]);
            else if (in.content == kSignedBytes) nibbles_of(rows, k, end, words);
          }
          if (is_few) {
            const std::int64_t per_input = block_bytes(w.format, 8) / 8;
            ahead.at = data + bytes * first + per_input * end;
            ahead.end = std::min(ahead.at + per_input * part, data + bytes * to);
            const int calls = in.n_tiles() * ((end - k + interval - 1) / interval);
            ahead.lines = static_cast<int>((ahead.end - ahead.at + 64 * calls - 1) / (64 * calls));
          }
          const auto run = [&]<Loop L>() {
            const auto rows = [&]<int T>() {
              tile_rows<L, T>(w, first, together, k, end, panel, in, tile, tile_to, sums + (first - block) * kBlock, ahead);
            };
            switch (in.T) {
              case 4: rows.template operator()<4>(); break;
              case 5: rows.template operator()<5>(); break;
              case 6: if constexpr (L != kPairLoop && L != kFourLoop) rows.template operator()<6>(); break;
            }
          };
          switch (loop) {
            case kFloatLoop: run.template operator()<kFloatLoop>(); break;
            case kShortLoop: run.template operator()<kShortLoop>(); break;
            case kPairLoop: run.template operator()<kPairLoop>(); break;
            case kFourLoop: run.template operator()<kFourLoop>(); break;
            case kManyLoop: run.template operator()<kManyLoop>(); break;
          }
        }
      scale_sums(w, block, n_blocks, n, sums);
      emit(block * kBlock, n_rows, m, n, sums);
    }
  }
}

#endif
