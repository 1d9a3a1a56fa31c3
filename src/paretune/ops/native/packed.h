// Weights as they lie in memory: sixteen rows side by side, so that a vector holds the same input of neighbouring rows.
// Sums need no horizontal additions, one stream is read per block, and every processor reads the same bytes.
//
//   [N / 16 blocks][C / quantum][16 rows][quantum inputs]
//
//   fp32, fp16  quantum 1
//   bf16        quantum 2: the pair (k0, k1) is one 32-bit lane, as `vdpbf16ps` wants it
//   int8        quantum 4, bytes q + 128 in the order k0 k2 k1 k3: the lane's even bytes are the pair (k0, k1), its odd
//               bytes (k2, k3), each one mask or shift away from 16 bits; `vpdpbusd` takes the bytes as they are
//   int4        quantum 8, nibbles q in 0..15 for q - 8, two 16-bit halves: k0 k4 k2 k6 | k1 k5 k3 k7, lowest first
//   nf4         as int4, for kNormalCodes[q] / kNormalSteps
//   sparse int8 int8 without its zeros, in a layout of its own (sparse.h)
//
// Missing rows and inputs at the ends are zeros (128, 8 and 7 in the integer formats). The last group of a row is shorter
// where groups do not divide the inputs.
//
// Legend: N outputs, C inputs, g size of a group.
#pragma once

#include "vec.h"

constexpr int kBlock = 16;

extern "C" struct Matrix {
  const void* data;     // packed
  const void* scale;    // group 0: fp32 [N rounded up to 16] or null; else fp16 [N / 16][C / g, rounded up][16]
  const void* minimum;  // fp16 as the scales, or null: w = (q - lowest) * scale + minimum
  std::int32_t format, n_out, n_in;
  std::int32_t group;            // 0 (one scale a row), 32, 64 or 128
  std::int32_t activation_bits;  // of the integer formats: inputs are rounded to 16, 8 or 7 bits, a scale per 128 of them
  std::int32_t largest;          // no number of int8 is larger; 128 where nobody asked
  std::int32_t lowest;           // the integer that the minimum stands for; 0 without one

  // Of a row; 0 where the whole row shares a scale.
  int groups() const { return group == 0 ? 0 : (n_in + group - 1) / group; }
};

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

constexpr int quantum(std::int32_t format) {
  return format == kInt4 || format == kNf4 ? 8 : format == kInt8 || format == kSparse8 ? 4 : format == kBf16 ? 2 : 1;
}

constexpr bool is_integer(std::int32_t format) {
  return format == kInt8 || format == kInt4 || format == kNf4 || format == kSparse8;
}

// The normal floats of NF4 as integers: 64 products with 16-bit inputs fit into 32 bits, and half a step of 1/1023 is
// less than a hundredth of the distance between two of them.
constexpr int kNormalSteps = 1023;
constexpr std::int16_t kNormalCodes[16] = {-1023, -712, -537, -404, -291, -189, -93, 0,
                                           81,    165,  252,  346,  451,  576,  740, 1023};

constexpr std::int64_t block_bytes(std::int32_t format, int C) {
  const std::int64_t padded = round_up(C, quantum(format));
  switch (format) {
    case kFp32: return padded * 4 * kBlock;
    case kInt8: return padded * kBlock;
    case kSparse8: return 0;  // blocks differ (sparse.h)
    case kInt4:
    case kNf4: return padded / 2 * kBlock;
    default: return padded * 2 * kBlock;
  }
}

inline std::int64_t packed_bytes(std::int32_t format, int N, int C) {
  return block_bytes(format, C) * (round_up(N, kBlock) / kBlock);
}

// Where input k of a quantum of int8 lies, and the same for int4 as the shift of its nibble in 32 bits.
constexpr int kByteOf[4] = {0, 2, 1, 3};
constexpr int kShiftOf[8] = {0, 16, 8, 24, 4, 20, 12, 28};

// src: as PyTorch stores it, row-major [N, C]; int4 [N, C / 2 rounded up], even inputs in the low nibble.
inline void pack_rows(std::int32_t format, const void* src, int N, int C, int block_from, int block_to, void* dst) {
  const int Q = quantum(format), n_quanta = round_up(C, Q) / Q;
  for (int block = block_from; block < block_to; ++block) {
    char* out = static_cast<char*>(dst) + block_bytes(format, C) * block;
    for (int r = 0; r < kBlock; ++r) {
      const std::int64_t row = block * static_cast<std::int64_t>(kBlock) + r;
      for (int i = 0; i < n_quanta; ++i) {
        const std::int64_t lane = static_cast<std::int64_t>(i) * kBlock + r;
        const auto is_there = [&](int j) { return row < N && i * Q + j < C; };
        switch (format) {
          case kFp32: {
            static_cast<float*>(static_cast<void*>(out))[lane] =
                is_there(0) ? static_cast<const float*>(src)[row * C + i] : 0.0f;
            break;
          }
          case kFp16: {
            reinterpret_cast<std::uint16_t*>(out)[lane] =
                is_there(0) ? static_cast<const std::uint16_t*>(src)[row * C + i] : 0;
            break;
          }
          case kBf16: {
            for (int j = 0; j < 2; ++j)
              reinterpret_cast<std::uint16_t*>(out)[lane * 2 + j] =
                  is_there(j) ? static_cast<const std::uint16_t*>(src)[row * C + i * 2 + j] : 0;
            break;
          }
          case kInt8: {
            for (int j = 0; j < 4; ++j)
              reinterpret_cast<std::uint8_t*>(out)[lane * 4 + kByteOf[j]] = static_cast<std::uint8_t>(
                  128 + (is_there(j) ? static_cast<const std::int8_t*>(src)[row * C + i * 4 + j] : 0));
            break;
          }
          case kInt4:
          case kNf4: {
            std::uint32_t bits = 0;
            for (int j = 0; j < 8; ++j) {
              const int k = i * 8 + j;
              std::uint32_t q = format == kInt4 ? 8 : 7;
              if (is_there(j)) {
                const std::uint8_t byte = static_cast<const std::uint8_t*>(src)[row * ((C + 1) / 2) + k / 2];
                q = k % 2 ? byte >> 4 : byte & 15;
              }
              bits |= q << kShiftOf[j];
            }
            reinterpret_cast<std::uint32_t*>(out)[lane] = bits;
            break;
          }
        }
      }
    }
  }
}

// The opposite of `pack_rows`: all rows as they were given.
inline void unpack_rows(std::int32_t format, const void* data, int N, int C, void* dst) {
  const int Q = quantum(format), n_quanta = round_up(C, Q) / Q;
  const std::int64_t n_bytes = (C + 1) / 2;  // of a row of int4
  for (std::int64_t row = 0; row < N; ++row) {
    const char* block = static_cast<const char*>(data) + block_bytes(format, C) * (row / kBlock);
    const int r = static_cast<int>(row % kBlock);
    for (int i = 0; i < n_quanta; ++i) {
      const std::int64_t lane = static_cast<std::int64_t>(i) * kBlock + r;
      const int n = C - i * Q < Q ? C - i * Q : Q;
      switch (format) {
        case kFp32: {
          static_cast<float*>(dst)[row * C + i] = reinterpret_cast<const float*>(block)[lane];
          break;
        }
        case kFp16: {
          static_cast<std::uint16_t*>(dst)[row * C + i] = reinterpret_cast<const std::uint16_t*>(block)[lane];
          break;
        }
        case kBf16: {
          for (int j = 0; j < n; ++j)
            static_cast<std::uint16_t*>(dst)[row * C + i * 2 + j] =
                reinterpret_cast<const std::uint16_t*>(block)[lane * 2 + j];
          break;
        }
        case kInt8: {
          for (int j = 0; j < n; ++j)
            static_cast<std::int8_t*>(dst)[row * C + i * 4 + j] = static_cast<std::int8_t>(
                reinterpret_cast<const std::uint8_t*>(block)[lane * 4 + kByteOf[j]] - 128);
          break;
        }
        default: {
          const std::uint32_t bits = reinterpret_cast<const std::uint32_t*>(block)[lane];
          for (int j = 0; j < n; j += 2) {
            const std::uint32_t low = bits >> kShiftOf[j] & 15;
            const std::uint32_t high = j + 1 < n ? bits >> kShiftOf[j + 1] & 15 : 0;  // half a byte is left over
            static_cast<std::uint8_t*>(dst)[row * n_bytes + i * 4 + j / 2] =
                static_cast<std::uint8_t>(low | high << 4);
          }
        }
      }
    }
  }
}

// One stored value as it is: a float, the integer of an integer format, or the index of an NF4 code.
inline float stored(const void* data, std::int32_t format, int C, std::int64_t row, int k) {
  const char* block = static_cast<const char*>(data) + block_bytes(format, C) * (row / kBlock);
  const int Q = quantum(format), j = k % Q;
  const std::int64_t lane = static_cast<std::int64_t>(k / Q) * kBlock + row % kBlock;
  switch (format) {
    case kFp32: return load_one<kFp32>(block, lane);
    case kFp16: return load_one<kFp16>(block, lane);
    case kBf16: return load_one<kBf16>(block, lane * 2 + j);
    case kInt8: return static_cast<float>(reinterpret_cast<const std::uint8_t*>(block)[lane * 4 + kByteOf[j]] - 128);
    default: {
      const int q = static_cast<int>(reinterpret_cast<const std::uint32_t*>(block)[lane] >> kShiftOf[j] & 15);
      return static_cast<float>(format == kInt4 ? q - 8 : q);
    }
  }
}

inline std::int64_t group_at(const Matrix& w, std::int64_t row, int k) {
  return (row / kBlock * w.groups() + k / w.group) * kBlock + row % kBlock;
}
