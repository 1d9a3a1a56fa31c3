// Random packed matrices for the tests of native code, each in memory of its exact size, with its numbers in double.
#pragma once

#include <random>
#include <vector>

#include "products.h"

struct Kind {
  const char* name;
  std::int32_t format, group, activation_bits;
  bool has_minimum;
  std::int32_t lowest = 0;  // what the minimum stands for
};

constexpr Kind kKinds[] = {
    {"fp32", kFp32, 0, 16, false},
    {"bf16", kBf16, 0, 16, false},
    {"fp16", kFp16, 0, 16, false},
    {"int8", kInt8, 0, 16, false},
    {"int8, 8-bit inputs", kInt8, 0, 8, false},
    {"int8 in 32", kInt8, 32, 16, false},
    {"int8 in 128, 8-bit inputs", kInt8, 128, 8, false},
    {"int8 in 64 with minimum", kInt8, 64, 16, true, -128},
    {"int8 in 128 with minimum", kInt8, 128, 16, true, -128},
    {"int8 in 32 with minimum, 7-bit inputs", kInt8, 32, 7, true, -128},
    {"int8 in 128, 7-bit inputs", kInt8, 128, 7, false},
    {"int4 in 32", kInt4, 32, 16, false},
    {"int4 in 128 with minimum", kInt4, 128, 16, true, -8},
    {"int4 in 32 with the minimum of an older folder", kInt4, 32, 16, true, 0},
    {"int4 in 32, 8-bit inputs", kInt4, 32, 8, false},
    {"int4 in 64 with minimum, 8-bit inputs", kInt4, 64, 8, true, -8},
    {"nf4 in 64", kNf4, 64, 16, false},
};

inline bool is_nibbles(std::int32_t format) { return format == kInt4 || format == kNf4; }

// What an integer of a format stands for, scales aside.
inline double number_of(std::int32_t format, int q) {
  return format == kNf4 ? kNormalCodes[q + 8] / static_cast<double>(kNormalSteps) : q;
}

typedef std::mt19937 Random;

inline float normal(Random& random) { return std::normal_distribution<float>()(random); }

inline std::vector<float> normals(Random& random, std::size_t n, float size = 1.0f) {
  std::vector<float> out(n);
  for (float& v : out) v = normal(random) * size;
  return out;
}

// `size` is about the standard deviation of its numbers.
struct Made {
  std::vector<std::uint8_t> packed;
  std::vector<float> row_scale;
  std::vector<std::uint16_t> scale, minimum;
  std::vector<double> exact;  // [N, C]
  Matrix matrix{};

  Made(const Kind& kind, int N, int C, Random& random, float size = 1.0f)
      : packed(packed_bytes(kind.format, N, C)), exact(static_cast<std::size_t>(N) * C) {
    const int padded = round_up(N, kBlock), g = kind.group == 0 ? C : kind.group, groups = (C + g - 1) / g;
    const int limit = is_nibbles(kind.format) ? 7 : 127;
    const double largest = kind.format == kNf4 ? 1.0 : limit;
    if (kind.group != 0) {
      scale.resize(static_cast<std::size_t>(padded) * groups);
      if (kind.has_minimum) minimum.resize(scale.size());
    } else if (kind.format == kInt8) {
      row_scale.resize(padded);
    }
    const std::size_t row_bytes =
        is_nibbles(kind.format) ? (C + 1) / 2 : static_cast<std::size_t>(C) * element_bytes(kind.format);
    std::vector<std::uint8_t> source(N * row_bytes);
    std::uniform_real_distribution<float> uniform(0.5f, 1.0f);
    for (int n = 0; n < N; ++n) {
      for (int part = 0; part < groups; ++part) {
        float factor = 2.0f * size * uniform(random) / largest, least = 0.0f;
        if (kind.group != 0) {
          const std::size_t at = (static_cast<std::size_t>(n / kBlock) * groups + part) * kBlock + n % kBlock;
          scale[at] = to_fp16(factor), factor = from_fp16(scale[at]);
          if (kind.has_minimum) minimum[at] = to_fp16(normal(random) * size), least = from_fp16(minimum[at]);
        } else if (kind.format == kInt8) {
          row_scale[n] = factor;
        }
        for (int c = part * g; c < std::min(C, (part + 1) * g); ++c) {
          std::uint8_t* at = source.data() + n * row_bytes + (is_nibbles(kind.format) ? c / 2 : c * row_bytes / C);
          const float value = normal(random) * size;
          double& number = exact[static_cast<std::size_t>(n) * C + c];
          if (kind.format == kFp32) {
            std::memcpy(at, &value, 4), number = value;
          } else if (kind.format == kBf16 || kind.format == kFp16) {
            const std::uint16_t bits = kind.format == kBf16 ? to_bf16(value) : to_fp16(value);
            std::memcpy(at, &bits, 2), number = kind.format == kBf16 ? from_bf16(bits) : from_fp16(bits);
          } else {
            // All values, the extreme ones (-128, -8) too.
            const int q = static_cast<int>(random() % (2 * limit + 2)) - limit - 1;
            if (kind.format == kInt8) *at = static_cast<std::uint8_t>(q);
            else source[n * row_bytes + c / 2] |= static_cast<std::uint8_t>((q + 8) << (c % 2 * 4));
            number = (number_of(kind.format, q) - kind.lowest) * factor + least;
          }
        }
      }
    }
    pack_rows(kind.format, source.data(), N, C, 0, padded / kBlock, packed.data());
    const void* scales = kind.group != 0                ? static_cast<const void*>(scale.data())
                         : kind.format == kInt8 ? static_cast<const void*>(row_scale.data())
                                                : nullptr;
    matrix = {packed.data(), scales, kind.has_minimum ? minimum.data() : nullptr, kind.format, N, C, kind.group,
              kind.activation_bits, 128, kind.lowest};
  }
  Made(Made&&) = default;
};
