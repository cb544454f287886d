// Dropout (Srivastava et al., 2014).
#include "arguments.h"
#include "noise.h"
#include "threads.h"

// x, noise (4) -> y; with dy in the place of x, dx
MINDPEFT_KERNEL(dropout) {
  constexpr int64_t kRow = 4096;
  const float* x = arguments.at(0);
  float* y = arguments.at(2);
  const mindpeft::Noise noise(arguments.at(1));
  const int64_t count = arguments.size(0);
  mindpeft::in_parallel((count + kRow - 1) / kRow, 4, [=](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const uint32_t row = noise.row(number);
      const int64_t first = number * kRow, width = std::min(kRow, count - first);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) y[first + i] = x[first + i] * noise.factor(row, i);
    }
  });
}
