// Layer normalisation and its variant without a mean, over the last axis.
#include <cmath>

#include "elementwise.h"
#include "rows.h"

namespace {

using mindpeft::bfloat16;
using mindpeft::in_parallel;
using mindpeft::least_rows;
using mindpeft::number;
using mindpeft::sum_over_rows;

// x is kept for the backward pass, if the call asks for it: as one output more, in bfloat16s.
void keep_input(const mindpeft::Arguments& arguments, int output) {
  if (arguments.count() > output) mindpeft::keep(arguments.size(0), arguments.at(0), arguments.at<bfloat16>(output));
}

}  // namespace

// x, weight, eps -> y, scale (rows): 1 / sqrt(mean(x^2) + eps), and x to be kept
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
  keep_input(arguments, 5);
}

namespace {

template <typename Number>
void rms_norm_gradient(const mindpeft::Arguments& arguments, const Number* x) {
  const int64_t rows = arguments.rows(0), width = arguments.width(0);
  const float *weight = arguments.at(1), *scales = arguments.at(2), *dy = arguments.at(3);
  float* dx = arguments.at(4);
  in_parallel(rows, least_rows(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Number* in = x + row * width;
      const float *d = dy + row * width, scale = scales[row];
      float* out = dx + row * width;
      float shared = 0;
#pragma omp simd reduction(+ : shared)
      for (int64_t i = 0; i < width; ++i) shared += d[i] * weight[i] * number(in[i]);
      const float factor = shared * scale * scale / width;
      for (int64_t i = 0; i < width; ++i) out[i] = (d[i] * weight[i] - number(in[i]) * factor) * scale;
    }
  });
}

}  // namespace

// x, in floats or bfloat16s, weight, scale, dy -> dx
MINDPEFT_KERNEL(rms_norm_grad) {
  arguments.read(0, [&](const auto* x) { rms_norm_gradient(arguments, x); });
}

namespace {

template <typename Number>
void rms_norm_weight_gradient(const mindpeft::Arguments& arguments, const Number* x) {
  const int64_t width = arguments.width(0);
  const float *scales = arguments.at(1), *dy = arguments.at(2);
  sum_over_rows(arguments.rows(0), width, arguments.at(3), [=](int64_t row, float* sums) {
    const Number* in = x + row * width;
    const float *d = dy + row * width, scale = scales[row];
    for (int64_t i = 0; i < width; ++i) sums[i] += d[i] * number(in[i]) * scale;
  });
}

}  // namespace

// x, in floats or bfloat16s, scale, dy -> dweight
MINDPEFT_KERNEL(rms_norm_grad_weight) {
  arguments.read(0, [&](const auto* x) { rms_norm_weight_gradient(arguments, x); });
}

// x, weight, bias, eps -> y, mean (rows), scale (rows): 1 / sqrt(variance + eps), and x to be kept
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
  keep_input(arguments, 7);
}

namespace {

template <typename Number>
void layer_norm_gradient(const mindpeft::Arguments& arguments, const Number* x) {
  const int64_t rows = arguments.rows(0), width = arguments.width(0);
  const float *weight = arguments.at(1), *means = arguments.at(2), *scales = arguments.at(3);
  const float* dy = arguments.at(4);
  float* dx = arguments.at(5);
  in_parallel(rows, least_rows(width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Number* in = x + row * width;
      const float *d = dy + row * width, mean = means[row], scale = scales[row];
      float* out = dx + row * width;
      float sum = 0, shared = 0;
#pragma omp simd reduction(+ : sum, shared)
      for (int64_t i = 0; i < width; ++i) {
        const float part = d[i] * weight[i];
        sum += part;
        shared += part * (number(in[i]) - mean);
      }
      const float level = sum / width, factor = shared * scale * scale / width;
      for (int64_t i = 0; i < width; ++i) {
        out[i] = (d[i] * weight[i] - level - (number(in[i]) - mean) * factor) * scale;
      }
    }
  });
}

}  // namespace

// x, in floats or bfloat16s, weight, mean, scale, dy -> dx
MINDPEFT_KERNEL(layer_norm_grad) {
  arguments.read(0, [&](const auto* x) { layer_norm_gradient(arguments, x); });
}

namespace {

template <typename Number>
void layer_norm_weight_gradient(const mindpeft::Arguments& arguments, const Number* x) {
  const int64_t width = arguments.width(0);
  const float *means = arguments.at(1), *scales = arguments.at(2), *dy = arguments.at(3);
  sum_over_rows(arguments.rows(0), width, arguments.at(4), [=](int64_t row, float* sums) {
    const Number* in = x + row * width;
    const float *d = dy + row * width, mean = means[row], scale = scales[row];
    for (int64_t i = 0; i < width; ++i) sums[i] += d[i] * (number(in[i]) - mean) * scale;
  });
}

}  // namespace

// x, in floats or bfloat16s, mean, scale, dy -> dweight
MINDPEFT_KERNEL(layer_norm_grad_weight) {
  arguments.read(0, [&](const auto* x) { layer_norm_weight_gradient(arguments, x); });
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
