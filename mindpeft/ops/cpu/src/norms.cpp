// Layer normalisation and its variant without a mean, over the last axis, also of a sum of two tensors.
#include <cmath>
#include <type_traits>

#include "elementwise.h"
#include "lanes.h"
#include "rows.h"

namespace {

using mindpeft::Arguments;
using mindpeft::bfloat16;
using mindpeft::dot;
using mindpeft::in_parallel;
using mindpeft::least_rows;
using mindpeft::narrow;
using mindpeft::number;
using mindpeft::sum;
using mindpeft::sum_of;
using mindpeft::sum_over_rows;

// LayerNorm is centred: it takes the mean away, and has a bias. RMSNorm is not, and its mean counts as 0.
constexpr bool kLayer = true, kRms = false;

// Row by row, the tensors of one forward pass; null where a norm has none.
struct Norm {
  int64_t width;
  const float *x, *residual, *weight, *bias;
  float eps;
  float *y, *means, *scales, *sums;
  bfloat16* kept;
};

// x, then residual if it is of a sum, weight, bias if it is centred, eps
// -> y, mean if it is centred, scale, and of what is normalised: the sum, a copy in bfloat16, or both, if asked for
Norm norm_of(const Arguments& arguments, bool centred, bool of_sum) {
  Norm norm{};
  int next = 0;
  norm.width = arguments.width(0);
  norm.x = arguments.at(next++);
  if (of_sum) norm.residual = arguments.at(next++);
  norm.weight = arguments.at(next++);
  if (centred) norm.bias = arguments.at(next++);
  norm.eps = *arguments.at(next++);
  norm.y = arguments.at(next++);
  if (centred) norm.means = arguments.at(next++);
  norm.scales = arguments.at(next++);
  for (; next < arguments.count(); ++next) {
    if (arguments.is_bfloat16(next)) {
      norm.kept = arguments.at<bfloat16>(next);
    } else {
      norm.sums = arguments.at(next);
    }
  }
  return norm;
}

// What is normalised. A sum that nobody asked for stands where its norm will.
const float* input_row(const Norm& norm, int64_t row) {
  const int64_t begin = row * norm.width;
  const float* x = norm.x + begin;
  if (norm.residual == nullptr) return x;
  const float* residual = norm.residual + begin;
  float* sum = (norm.sums == nullptr ? norm.y : norm.sums) + begin;
#pragma omp simd
  for (int64_t i = 0; i < norm.width; ++i) sum[i] = x[i] + residual[i];
  return sum;
}

float mean_square(const float* x, float mean, int64_t width) {
  return sum_of(width, [=](int64_t i, auto load) {
    const auto distance = load(x + i) - mean;
    return distance * distance;
  }) / width;
}

template <bool centred>
void norm_row(const Norm& norm, int64_t row) {
  const int64_t width = norm.width;
  const float *in = input_row(norm, row), *weight = norm.weight, *bias = norm.bias;
  float* out = norm.y + row * width;
  if (norm.kept != nullptr) {
    bfloat16* kept = norm.kept + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) kept[i] = narrow(in[i]);
  }
  const float mean = centred ? sum(in, width) / width : 0;
  const float scale = 1.0f / std::sqrt(mean_square(in, mean, width) + norm.eps);
  if (centred) norm.means[row] = mean;
  norm.scales[row] = scale;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float normed = (in[i] - mean) * scale * weight[i];
    out[i] = centred ? normed + bias[i] : normed;
  }
}

template <bool centred>
void forward(const Arguments& arguments, bool of_sum) {
  const Norm norm = norm_of(arguments, centred, of_sum);
  in_parallel(arguments.rows(0), least_rows(norm.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) norm_row<centred>(norm, row);
  });
}

// The tensors of one backward pass; null where there are none.
template <typename Number>
struct Gradient {
  int64_t width;
  const Number* x;
  const float *weight, *means, *scales, *dy, *dsum;
  float* dx;
};

template <bool centred, typename Number>
void gradient_row(const Gradient<Number>& gradient, int64_t row) {
  const int64_t width = gradient.width, begin = row * width;
  const Number* in = gradient.x + begin;
  const float *d = gradient.dy + begin, *weight = gradient.weight;
  const float mean = centred ? gradient.means[row] : 0, scale = gradient.scales[row];
  float* out = gradient.dx + begin;
  const float shared = sum_of(width, [=](int64_t i, auto load) {
    return load(d + i) * load(weight + i) * (load(in + i) - mean);
  });
  const float level = centred ? dot(d, weight, width) / width : 0, factor = shared * scale * scale / width;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    out[i] = (d[i] * weight[i] - level - (number(in[i]) - mean) * factor) * scale;
  }
  if (gradient.dsum == nullptr) return;
  const float* more = gradient.dsum + begin;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] += more[i];
}

// x, in floats or bfloat16s, weight, mean if it is centred, scale, dy, dsum if x went elsewhere too -> dx
template <bool centred>
void backward(const Arguments& arguments) {
  arguments.read(0, [&](const auto* x) {
    Gradient<std::decay_t<decltype(*x)>> gradient{};
    int next = 1;
    gradient.width = arguments.width(0);
    gradient.x = x;
    gradient.weight = arguments.at(next++);
    if (centred) gradient.means = arguments.at(next++);
    gradient.scales = arguments.at(next++);
    gradient.dy = arguments.at(next++);
    if (next + 1 < arguments.count()) gradient.dsum = arguments.at(next++);
    gradient.dx = arguments.at(next);
    in_parallel(arguments.rows(0), least_rows(gradient.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) gradient_row<centred>(gradient, row);
    });
  });
}

// x, in floats or bfloat16s, mean if it is centred, scale, dy -> dweight
template <bool centred>
void backward_weight(const Arguments& arguments) {
  const int64_t width = arguments.width(0);
  const float *means = arguments.at(1), *scales = arguments.at(centred + 1), *dy = arguments.at(centred + 2);
  float* dweight = arguments.at(centred + 3);
  arguments.read(0, [&](const auto* x) {
    sum_over_rows(arguments.rows(0), width, dweight, [=](int64_t row, float* sums) {
      const auto* in = x + row * width;
      const float *d = dy + row * width, mean = centred ? means[row] : 0, scale = scales[row];
      for (int64_t i = 0; i < width; ++i) sums[i] += d[i] * (number(in[i]) - mean) * scale;
    });
  });
}

}  // namespace

// x, weight, eps -> y, scale (rows): 1 / sqrt(mean(x^2) + eps), and a copy of x
MINDPEFT_KERNEL(rms_norm) { forward<kRms>(arguments, false); }

// x, weight, bias, eps -> y, mean (rows), scale (rows): 1 / sqrt(variance + eps), and a copy of x
MINDPEFT_KERNEL(layer_norm) { forward<kLayer>(arguments, false); }

// x, residual, and what a norm of their sum takes -> what that gives; the sum and a copy of it are asked for singly
MINDPEFT_KERNEL(rms_norm_of_sum) { forward<kRms>(arguments, true); }
MINDPEFT_KERNEL(layer_norm_of_sum) { forward<kLayer>(arguments, true); }

// x, weight, scale, dy, and dsum -> dx
MINDPEFT_KERNEL(rms_norm_grad) { backward<kRms>(arguments); }

// x, weight, mean, scale, dy, and dsum -> dx
MINDPEFT_KERNEL(layer_norm_grad) { backward<kLayer>(arguments); }

// x, scale, dy -> dweight
MINDPEFT_KERNEL(rms_norm_grad_weight) { backward_weight<kRms>(arguments); }

// x, mean, scale, dy -> dweight
MINDPEFT_KERNEL(layer_norm_grad_weight) { backward_weight<kLayer>(arguments); }

// x -> the sum over all axes but the last: the gradient of a bias
MINDPEFT_KERNEL(sum_rows) {
  const int64_t width = arguments.width(0);
  const float* x = arguments.at(0);
  sum_over_rows(arguments.rows(0), width, arguments.at(1), [=](int64_t row, float* sums) {
    const float* in = x + row * width;
    for (int64_t i = 0; i < width; ++i) sums[i] += in[i];
  });
}
