// The dense product with a weight (out, in), and the same with LoRA's two thin matrices beside it.
#include <algorithm>

#include "gemm.h"
#include "threads.h"

namespace {

using mindpeft::Matrix;
using mindpeft::multiply_in_parallel;

Matrix weight_of(const mindpeft::Arguments& arguments, int tensor, bool transposed) {
  return Matrix(arguments.at<void>(tensor), arguments.width(tensor), transposed, arguments.is_bfloat16(tensor));
}

// Every row of y becomes bias, or zeros.
void begin_with(const float* bias, int64_t rows, int64_t width, float* y) {
  mindpeft::in_parallel(rows, 16384 / (width + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (bias == nullptr) {
        std::fill(y + row * width, y + (row + 1) * width, 0.0f);
      } else {
        std::copy(bias, bias + width, y + row * width);
      }
    }
  });
}

// y = x weight^T + keep y, or + bias
void product(const mindpeft::Arguments& arguments, int x, int weight, float keep, int y) {
  const int64_t in = arguments.width(x), out = arguments.axis(weight, 0);
  multiply_in_parallel(arguments.rows(x), out, in, 1.0f, Matrix(arguments.at(x), in),
                       weight_of(arguments, weight, true), keep, arguments.at(y), out);
}

}  // namespace

// x (..., in), weight (out, in) -> y (..., out)
MINDPEFT_KERNEL(linear) { product(arguments, 0, 1, 0.0f, 2); }

// x, weight, bias (out) -> y
MINDPEFT_KERNEL(linear_bias) {
  begin_with(arguments.at(2), arguments.rows(0), arguments.axis(1, 0), arguments.at(3));
  product(arguments, 0, 1, 1.0f, 3);
}

// dy (..., out), weight (out, in) -> dx (..., in)
MINDPEFT_KERNEL(linear_grad) {
  const int64_t out = arguments.width(0), in = arguments.axis(1, 1);
  multiply_in_parallel(arguments.rows(0), in, out, 1.0f, Matrix(arguments.at(0), out),
                       weight_of(arguments, 1, false), 0.0f, arguments.at(2), in);
}

// x (..., in), dy (..., out) -> dweight (out, in)
MINDPEFT_KERNEL(linear_grad_weight) {
  const int64_t rows = arguments.rows(0), in = arguments.width(0), out = arguments.width(1);
  multiply_in_parallel(out, in, rows, 1.0f, Matrix(arguments.at(1), out, true), Matrix(arguments.at(0), in), 0.0f,
                       arguments.at(2), in);
}

namespace {

// x, weight, a (r, in), b (out, r), scale, bias or none -> y = x weight^T + bias + hidden b^T,
// hidden (rows, r) = scale x a^T
void lora_product(const mindpeft::Arguments& arguments, const float* bias, int y) {
  const int64_t rows = arguments.rows(0), in = arguments.width(0);
  const int64_t out = arguments.axis(1, 0), rank = arguments.axis(2, 0);
  const float *x = arguments.at(0), *a = arguments.at(2), *b = arguments.at(3), scale = *arguments.at(4);
  float *result = arguments.at(y), *hidden = arguments.at(y + 1);
  multiply_in_parallel(rows, rank, in, scale, Matrix(x, in), Matrix(a, in, true), 0.0f, hidden, rank);
  if (bias != nullptr) begin_with(bias, rows, out, result);
  multiply_in_parallel(rows, out, rank, 1.0f, Matrix(hidden, rank), Matrix(b, rank, true),
                       bias == nullptr ? 0.0f : 1.0f, result, out);
  product(arguments, 0, 1, 1.0f, y);
}

}  // namespace

MINDPEFT_KERNEL(lora_linear) { lora_product(arguments, nullptr, 5); }
MINDPEFT_KERNEL(lora_linear_bias) { lora_product(arguments, arguments.at(5), 6); }

// x, weight, a, b, scale, hidden, dy -> dx, da, db
MINDPEFT_KERNEL(lora_linear_grad) {
  const int64_t rows = arguments.rows(0), in = arguments.width(0);
  const int64_t out = arguments.axis(1, 0), rank = arguments.axis(2, 0);
  const float *x = arguments.at(0), *a = arguments.at(2), *b = arguments.at(3), scale = *arguments.at(4);
  const float *hidden = arguments.at(5), *dy = arguments.at(6);
  float *dx = arguments.at(7), *da = arguments.at(8), *db = arguments.at(9);
  const mindpeft::Shared memory(rows * rank);
  float* dhidden = memory.data();  // already times scale
  multiply_in_parallel(rows, rank, out, scale, Matrix(dy, out), Matrix(b, rank), 0.0f, dhidden, rank);
  multiply_in_parallel(out, rank, rows, 1.0f, Matrix(dy, out, true), Matrix(hidden, rank), 0.0f, db, rank);
  multiply_in_parallel(rank, in, rows, 1.0f, Matrix(dhidden, rank, true), Matrix(x, in), 0.0f, da, in);
  multiply_in_parallel(rows, in, rank, 1.0f, Matrix(dhidden, rank), Matrix(a, in), 0.0f, dx, in);
  multiply_in_parallel(rows, in, out, 1.0f, Matrix(dy, out), weight_of(arguments, 1, false), 1.0f, dx, in);
}
