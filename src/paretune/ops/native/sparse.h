// int8 without its zeros: a bit for each weight says whether it is stored.
//
//   masks   [N / 16 blocks][C / 4] of 64 bits: of sixteen rows and four inputs in the order of packed int8 (packed.h)
//   starts  [N / 16 blocks][C / 128] where the values of a block's 128 inputs begin: a thread begins at any block, and a
//           step with many rows at any part
//   values  bytes q, 64 more behind the last
//
// A part of a few blocks is expanded in the first cache into packed int8 and multiplied there: the same sums, bit for bit,
// as those of the dense form. The mask of 64 weights is one `vpexpandb` (AVX-512 VBMI2), or eight look-ups in a table of
// shuffles, two at a time (AVX2).
#pragma once

#include "packed.h"

constexpr int kStartEvery = 128;  // inputs

struct Sparse {
  const std::uint64_t* masks;
  const std::int32_t* starts;
  const std::uint8_t* values;
  int n_quanta, n_starts;  // of a block

  Sparse(const void* data, int N, int C) {
    const std::int64_t n_blocks = round_up(N, kBlock) / kBlock;
    n_quanta = round_up(C, 4) / 4, n_starts = round_up(C, kStartEvery) / kStartEvery;
    const char* p = static_cast<const char*>(data);
    masks = reinterpret_cast<const std::uint64_t*>(p);
    starts = reinterpret_cast<const std::int32_t*>(p + 8 * n_blocks * n_quanta);
    values = reinterpret_cast<const std::uint8_t*>(p) + head_bytes(N, C);
  }
  explicit Sparse(const Matrix& w) : Sparse(w.data, w.n_out, w.n_in) {}

  // Before the values, in whole lines.
  static std::int64_t head_bytes(int N, int C) {
    const std::int64_t n_blocks = round_up(N, kBlock) / kBlock;
    const std::int64_t n = n_blocks * (2 * round_up(C, 4) + 4 * (round_up(C, kStartEvery) / kStartEvery));
    return (n + 63) / 64 * 64;
  }
};

// All but the values themselves.
inline std::int64_t sparse_bytes(int N, int C) { return Sparse::head_bytes(N, C) + 64; }

// src: int8 row-major [N, C]; dst: sparse_bytes and a byte for each number that is not zero.
inline void pack_sparse(const std::int8_t* src, int N, int C, void* dst) {
  const Sparse at(dst, N, C);
  auto* masks = const_cast<std::uint64_t*>(at.masks);
  auto* starts = const_cast<std::int32_t*>(at.starts);
  auto* values = const_cast<std::uint8_t*>(at.values);
  std::int32_t n = 0;
  for (int block = 0; block < round_up(N, kBlock) / kBlock; ++block)
    for (int i = 0; i < at.n_quanta; ++i) {
      if (i % (kStartEvery / 4) == 0) *starts++ = n;
      std::uint64_t mask = 0;
      for (int r = 0; r < kBlock; ++r) {
        std::int8_t q[4] = {};  // in the order of packed bytes
        for (int j = 0; j < 4; ++j)
          if (block * kBlock + r < N && i * 4 + j < C)
            q[kByteOf[j]] = src[static_cast<std::int64_t>(block * kBlock + r) * C + i * 4 + j];
        for (int b = 0; b < 4; ++b)
          if (q[b] != 0) mask |= std::uint64_t{1} << (r * 4 + b), values[n++] = static_cast<std::uint8_t>(q[b]);
      }
      *masks++ = mask;
    }
  std::memset(values + n, 0, 64);
}

// Row `row` as integers.
template <class Out>
inline void sparse_row(const void* data, int N, int C, std::int64_t row, Out* out) {
  const Sparse from(data, N, C);
  const std::int64_t block = row / kBlock;
  const int r = static_cast<int>(row % kBlock);
  const std::uint64_t below = (std::uint64_t{1} << (r * 4)) - 1;
  std::int64_t n = 0;
  for (int i = 0; i < from.n_quanta; ++i) {
    if (i % (kStartEvery / 4) == 0) n = from.starts[block * from.n_starts + i / (kStartEvery / 4)];
    const std::uint64_t mask = from.masks[block * from.n_quanta + i];
    std::int64_t at = n + std::popcount(mask & below);
    std::int8_t q[4] = {};
    for (int b = 0; b < 4; ++b)
      if (mask >> (r * 4 + b) & 1) q[b] = static_cast<std::int8_t>(from.values[at++]);
    for (int j = 0; j < 4 && i * 4 + j < C; ++j) out[i * 4 + j] = static_cast<Out>(q[kByteOf[j]]);
    n += std::popcount(mask);
  }
}

#if defined(PARETUNE_AVX2) || (defined(PARETUNE_AVX512) && !defined(__AVX512VBMI2__))
// For each mask of eight: which of the values goes to each byte, 128 where none does.
struct Shuffles {
  alignas(64) std::uint64_t of[256];
};
constexpr Shuffles kShuffles = [] {
  Shuffles out{};
  for (int mask = 0; mask < 256; ++mask) {
    std::uint64_t n = 0;
    for (int i = 0; i < 8; ++i) out.of[mask] |= (mask >> i & 1 ? n++ : std::uint64_t{128}) << (8 * i);
  }
  return out;
}();
#endif

// 64 weights as packed int8 (q + 128); gives where the next values are.
inline const std::uint8_t* expand(std::uint64_t mask, const std::uint8_t* values, char* out) {
#if defined(PARETUNE_AVX512) && defined(__AVX512VBMI2__)
  const __m512i q = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
  _mm512_storeu_si512(out, _mm512_xor_si512(q, _mm512_set1_epi8(-128)));
  return values + std::popcount(mask);
#elif defined(PARETUNE_AVX2) || defined(PARETUNE_AVX512)
  const __m128i sign = _mm_set1_epi8(-128);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, mask >>= 16, out += 16) {
    const std::uint64_t first = mask & 255, n_first = std::popcount(first);
    // Places of the second eight lie behind the first ones; 128 stays above 127 with at most eight added.
    const __m128i places = _mm_set_epi64x(
        static_cast<long long>(kShuffles.of[mask >> 8 & 255] + n_first * 0x0101010101010101u),
        static_cast<long long>(kShuffles.of[first]));
    const __m128i q = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), places);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_xor_si128(q, sign));
    values += std::popcount(mask & 0xffffu);
  }
  return values;
#else
  for (int i = 0; i < 64; ++i) out[i] = static_cast<char>(mask >> i & 1 ? *values++ ^ 128 : 128);
  return values;
#endif
}

// Inputs `from` (a multiple of kStartEvery) to `to` of a block as packed int8.
inline void expand_block(const Sparse& w, std::int64_t block, int from, int to, char* out) {
  const std::uint64_t* masks = w.masks + block * w.n_quanta + from / 4;
  const std::uint8_t* values = w.values + w.starts[block * w.n_starts + from / kStartEvery];
  for (int n = (to - from + 3) / 4; n > 0; --n, out += 64) {
    if (n % 8 == 0) {  // what the next part of this block reads
      __builtin_prefetch(masks + kStartEvery / 4);
      __builtin_prefetch(values + 1024), __builtin_prefetch(values + 1088);
      __builtin_prefetch(values + 1152), __builtin_prefetch(values + 1216);
    }
    values = expand(*masks++, values, out);
  }
}

// A row of the matrix as fp32: an embedding, and the reference that tests hold the products to.
inline void matrix_row(const Matrix& w, std::int64_t row, float* out) {
  if (w.format == kSparse8) sparse_row(w.data, w.n_out, w.n_in, row, out);
  for (int c = 0; c < w.n_in; ++c) {
    float value = w.format == kSparse8 ? out[c] : stored(w.data, w.format, w.n_in, row, c);
    if (w.format == kNf4) value = kNormalCodes[static_cast<int>(value)] * (1.0f / kNormalSteps);
    if (w.group != 0) {
      const std::int64_t at = group_at(w, row, c);
      value -= static_cast<float>(w.lowest);
      value *= from_fp16(static_cast<const std::uint16_t*>(w.scale)[at]);
      if (w.minimum != nullptr) value += from_fp16(static_cast<const std::uint16_t*>(w.minimum)[at]);
    } else if (w.scale != nullptr) {
      value *= static_cast<const float*>(w.scale)[row];
    }
    out[c] = value;
  }
}
