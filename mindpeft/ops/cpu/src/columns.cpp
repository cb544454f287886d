// Rows whose columns have a factor each.
#include "arguments.h"
#include "rows.h"

// x (..., width), factors (width) -> y; with dy in the place of x, dx
MINDPEFT_KERNEL(scale_columns) {
  const int64_t rows = arguments.rows(0), width = arguments.width(0);
  const float *x = arguments.at(0), *factors = arguments.at(1);
  float* y = arguments.at(2);
  mindpeft::in_parallel(rows, mindpeft::least_rows(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* in = x + row * width;
      float* out = y + row * width;
      for (int64_t i = 0; i < width; ++i) out[i] = in[i] * factors[i];
    }
  });
}

// x, dy -> dfactors
MINDPEFT_KERNEL(scale_columns_grad) {
  const int64_t width = arguments.width(0);
  const float *x = arguments.at(0), *dy = arguments.at(1);
  mindpeft::sum_over_rows(arguments.rows(0), width, arguments.at(2), [=](int64_t row, float* sums) {
    const float *in = x + row * width, *d = dy + row * width;
    for (int64_t i = 0; i < width; ++i) sums[i] += d[i] * in[i];
  });
}
