// What kernels over rows of one width share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "threads.h"

namespace mindpeft {

// So many rows are worth a thread.
inline int64_t least_rows(int64_t width) { return 8192 / (width + 1) + 1; }

// Every row of y becomes `values`.
inline void fill_rows(const float* values, int64_t rows, int64_t width, float* y) {
  in_parallel(rows, 16384 / (width + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) std::copy(values, values + width, y + row * width);
  });
}

// result (width) = the shares of pieces of the rows, summed: part(begin, end, sums) adds those of some rows, of which
// `least` are worth a thread.
template <typename Part>
void sum_over_pieces(int64_t rows, int64_t least, int64_t width, float* result, const Part& part) {
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(thread_count(), rows / least));
  const Shared memory(pieces * width);
  float* sums = memory.data();
  run_tasks(pieces, [&](int64_t piece) {
    float* mine = sums + piece * width;
    for (int64_t i = 0; i < width; ++i) mine[i] = 0;
    part(rows * piece / pieces, rows * (piece + 1) / pieces, mine);
  });
  for (int64_t i = 0; i < width; ++i) {
    result[i] = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) result[i] += sums[piece * width + i];
  }
}

// The same where part(row, sums) adds those of one row.
template <typename Part>
void sum_over_rows(int64_t rows, int64_t width, float* result, const Part& part) {
  sum_over_pieces(rows, 16, width, result, [&](int64_t begin, int64_t end, float* sums) {
    for (int64_t row = begin; row < end; ++row) part(row, sums);
  });
}

}  // namespace mindpeft
