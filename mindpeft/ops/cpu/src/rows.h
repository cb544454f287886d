// What kernels over rows of one width share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "threads.h"

namespace mindpeft {

// So many rows are worth a thread.
inline int64_t least_rows(int64_t width) { return 8192 / (width + 1) + 1; }

// result (width) = the rows' shares, summed: part(row, sums) adds those of one row.
template <typename Part>
void sum_over_rows(int64_t rows, int64_t width, float* result, const Part& part) {
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(thread_count(), rows / 16));
  const Shared memory(pieces * width);
  float* sums = memory.data();
  run_tasks(pieces, [&](int64_t piece) {
    float* mine = sums + piece * width;
    for (int64_t i = 0; i < width; ++i) mine[i] = 0;
    for (int64_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; ++row) part(row, mine);
  });
  for (int64_t i = 0; i < width; ++i) {
    result[i] = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) result[i] += sums[piece * width + i];
  }
}

}  // namespace mindpeft
