// Layer normalisation and its variant without a mean, over the last axis.
#include <cmath>

#include "arguments.h"
#include "rows.h"

namespace {

using mindpeft::in_parallel;
using mindpeft::least_rows;
using mindpeft::sum_over_rows;

}  // namespace

// x, weight, eps -> y, scale (rows): 1 / sqrt(mean(x^2) + eps)
MINDPEFT_KERNEL(rms_norm) {
  const int64_t rows = arguments.rows(0), width = arguments.width(0);
  const float *x = arguments.at(0), *weight = arguments.at(1), eps = *arguments.at(2);
  float *y = arguments.at(3), *scales = arguments.at(4);
  in_parallel(rows, least_rows(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* in = x + row * width;
      float* out = y + row * width;
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) squares += in[i] * in[i];
      const float scale = 1.0f / std::sqrt(squares / width + eps);
      scales[row] = scale;
      for (int64_t i = 0; i < width; ++i) out[i] = in[i] * scale * weight[i];
    }
  });
}

// x, weight, scale, dy -> dx
MINDPEFT_KERNEL(rms_norm_grad) {
  const int64_t rows = arguments.rows(0), width = arguments.width(0);
  const float *x = arguments.at(0), *weight = arguments.at(1), *scales = arguments.at(2), *dy = arguments.at(3);
  float* dx = arguments.at(4);
  in_parallel(rows, least_rows(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *in = x + row * width, *d = dy + row * width, scale = scales[row];
      float* out = dx + row * width;
      float shared = 0;
#pragma omp simd reduction(+ : shared)
      for (int64_t i = 0; i < width; ++i) shared += d[i] * weight[i] * in[i];
      const float factor = shared * scale * scale / width;
      for (int64_t i = 0; i < width; ++i) out[i] = (d[i] * weight[i] - in[i] * factor) * scale;
    }
  });
}

// x, scale, dy -> dweight
MINDPEFT_KERNEL(rms_norm_grad_weight) {
  const int64_t width = arguments.width(0);
  const float *x = arguments.at(0), *scales = arguments.at(1), *dy = arguments.at(2);
  sum_over_rows(arguments.rows(0), width, arguments.at(3), [=](int64_t row, float* sums) {
    const float *in = x + row * width, *d = dy + row * width, scale = scales[row];
    for (int64_t i = 0; i < width; ++i) sums[i] += d[i] * in[i] * scale;
  });
}

// x, weight, bias, eps -> y, mean (rows), scale (rows): 1 / sqrt(variance + eps)
MINDPEFT_KERNEL(layer_norm) {
  const int64_t rows = arguments.rows(0), width = arguments.width(0);
  const float *x = arguments.at(0), *weight = arguments.at(1), *bias = arguments.at(2), eps = *arguments.at(3);
  float *y = arguments.at(4), *means = arguments.at(5), *scales = arguments.at(6);
  in_parallel(rows, least_rows(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* in = x + row * width;
      float* out = y + row * width;
      float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < width; ++i) sum += in[i];
      const float mean = sum / width;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) squares += (in[i] - mean) * (in[i] - mean);
      const float scale = 1.0f / std::sqrt(squares / width + eps);
      means[row] = mean;
      scales[row] = scale;
      for (int64_t i = 0; i < width; ++i) out[i] = (in[i] - mean) * scale * weight[i] + bias[i];
    }
  });
}

// x, weight, mean, scale, dy -> dx
MINDPEFT_KERNEL(layer_norm_grad) {
  const int64_t rows = arguments.rows(0), width = arguments.width(0);
  const float *x = arguments.at(0), *weight = arguments.at(1), *means = arguments.at(2), *scales = arguments.at(3);
  const float* dy = arguments.at(4);
  float* dx = arguments.at(5);
  in_parallel(rows, least_rows(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *in = x + row * width, *d = dy + row * width, mean = means[row], scale = scales[row];
      float* out = dx + row * width;
      float sum = 0, shared = 0;
#pragma omp simd reduction(+ : sum, shared)
      for (int64_t i = 0; i < width; ++i) {
        const float part = d[i] * weight[i];
        sum += part;
        shared += part * (in[i] - mean);
      }
      const float level = sum / width, factor = shared * scale * scale / width;
      for (int64_t i = 0; i < width; ++i) {
        out[i] = (d[i] * weight[i] - level - (in[i] - mean) * factor) * scale;
      }
    }
  });
}

// x, mean, scale, dy -> dweight
MINDPEFT_KERNEL(layer_norm_grad_weight) {
  const int64_t width = arguments.width(0);
  const float *x = arguments.at(0), *means = arguments.at(1), *scales = arguments.at(2), *dy = arguments.at(3);
  sum_over_rows(arguments.rows(0), width, arguments.at(4), [=](int64_t row, float* sums) {
    const float *in = x + row * width, *d = dy + row * width, mean = means[row], scale = scales[row];
    for (int64_t i = 0; i < width; ++i) sums[i] += d[i] * (in[i] - mean) * scale;
  });
}

// x -> the sum over all axes but the last: the gradient of a bias
MINDPEFT_KERNEL(sum_rows) {
  const int64_t width = arguments.width(0);
  const float* x = arguments.at(0);
  sum_over_rows(arguments.rows(0), width, arguments.at(1), [=](int64_t row, float* sums) {
    const float* in = x + row * width;
    for (int64_t i = 0; i < width; ++i) sums[i] += in[i];
  });
}
