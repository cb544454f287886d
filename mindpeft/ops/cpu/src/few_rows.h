// Products of few rows with the transpose of a weight, which is read once, at the speed of the memory.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"
#include "threads.h"

namespace mindpeft {
namespace few {

typedef int8_t ByteLanes __attribute__((vector_size(kLanes), aligned(1)));
typedef int16_t ShortLanes __attribute__((vector_size(kLanes * sizeof(int16_t))));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * sizeof(int32_t))));

// GCC makes of one step from 8 bits to 32 a step for each number.
inline Lanes load(const int8_t* from) {
#ifdef __AVX512F__
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  const ShortLanes shorts = __builtin_convertvector(*reinterpret_cast<const ByteLanes*>(from), ShortLanes);
  return __builtin_convertvector(__builtin_convertvector(shorts, IntLanes), Lanes);
#endif
}

inline float number(int8_t value) { return value; }
using mindpeft::load;
using mindpeft::number;

// Products of kRows rows of x with kColumns of weight, all of length k.
template <int kRows, int kColumns, typename Weight>
inline void dot(const float* x, int64_t x_stride, const Weight* weight, int64_t weight_stride, int64_t k,
                float scale, float keep, float* y, int64_t y_stride) {
  Lanes sums[kRows][kColumns] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    Lanes columns[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      columns[c] = load(weight + c * weight_stride + i);
      // The processor foresees the rest of a row, but not the rows that come next.
      __builtin_prefetch(weight + (c + kColumns) * weight_stride + i);
    }
    for (int r = 0; r < kRows; ++r) {
      const Lanes row = load(x + r * x_stride + i);
      for (int c = 0; c < kColumns; ++c) sums[r][c] += row * columns[c];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      float sum = total(sums[r][c]);
      for (int64_t j = i; j < k; ++j) sum += x[r * x_stride + j] * number(weight[c * weight_stride + j]);
      float& target = y[r * y_stride + c];
      target = keep == 0.0f ? scale * sum : scale * sum + keep * target;
    }
  }
}

// Columns begin ... end of x weight^T, for a few rows; the tile fills the registers of AVX-512.
template <int kRows, typename Weight>
void stream(const float* x, int64_t x_stride, const Weight* weight, int64_t weight_stride, int64_t k,
            int64_t begin, int64_t end, float scale, float keep, float* y, int64_t y_stride) {
  constexpr int kColumns = kRows >= 8 ? 2 : 4;
  int64_t n = begin;
  for (; n + kColumns <= end; n += kColumns) {
    dot<kRows, kColumns>(x, x_stride, weight + n * weight_stride, weight_stride, k, scale, keep, y + n, y_stride);
  }
  for (; n < end; ++n) {
    dot<kRows, 1>(x, x_stride, weight + n * weight_stride, weight_stride, k, scale, keep, y + n, y_stride);
  }
}

}  // namespace few

// y (m, n) = scale x (m, k) weight^T + keep y; the weight (n, k) is of floats, bfloat16s or bytes.
template <typename Weight>
void few_rows(int64_t m, int64_t n, int64_t k, float scale, const float* x, int64_t x_stride,
              const Weight* weight, int64_t weight_stride, float keep, float* y, int64_t y_stride) {
  move_to_large_pages(weight, n * weight_stride * sizeof(Weight));
  in_parallel(n, std::max<int64_t>(1, 16384 / std::max<int64_t>(k, 1)), [&](int64_t begin, int64_t end) {
    int64_t row = 0;
    const auto next = [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      for (; row + kRows <= m; row += kRows) {
        few::stream<kRows>(x + row * x_stride, x_stride, weight, weight_stride, k, begin, end, scale, keep,
                           y + row * y_stride, y_stride);
      }
    };
    next(std::integral_constant<int, 8>());
    next(std::integral_constant<int, 4>());
    next(std::integral_constant<int, 2>());
    next(std::integral_constant<int, 1>());
  });
}

}  // namespace mindpeft
