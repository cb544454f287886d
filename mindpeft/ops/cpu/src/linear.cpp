// The dense product with a weight (out, in), and the same with LoRA's two thin matrices beside it.
#include <algorithm>

#include "gemm.h"
#include "noise.h"
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

// LoRA's input, with dropout: rows (count, width).
void drop(const float* x, int64_t rows, int64_t width, const mindpeft::Noise& noise, float* y) {
  mindpeft::in_parallel(rows, 16384 / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint32_t mine = noise.row(row);
      const int64_t first = row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) y[first + i] = x[first + i] * noise.factor(mine, i);
    }
  });
}

// The sizes of a layer with LoRA, and its inputs: x, weight, a (r, in), b (out, r), scale, noise (4).
struct Lora {
  int64_t rows, in, out, rank;
  const float *x, *a, *b;
  float scale;
  mindpeft::Noise noise;
  mindpeft::Shared memory;

  explicit Lora(const mindpeft::Arguments& arguments)
      : rows(arguments.rows(0)), in(arguments.width(0)), out(arguments.axis(1, 0)), rank(arguments.axis(2, 0)),
        x(arguments.at(0)), a(arguments.at(2)), b(arguments.at(3)), scale(*arguments.at(4)),
        noise(arguments.at(5)), memory(noise.any() ? rows * in : 0) {}

  // x as LoRA sees it.
  const float* dropped() const {
    if (!noise.any()) return x;
    drop(x, rows, in, noise, memory.data());
    return memory.data();
  }
};

// Lora's inputs, bias or none -> y = x weight^T + bias + hidden b^T, hidden (rows, r) = scale dropped(x) a^T
void lora_product(const mindpeft::Arguments& arguments, const float* bias, int y) {
  const Lora lora(arguments);
  float *result = arguments.at(y), *hidden = arguments.at(y + 1);
  multiply_in_parallel(lora.rows, lora.rank, lora.in, lora.scale, Matrix(lora.dropped(), lora.in),
                       Matrix(lora.a, lora.in, true), 0.0f, hidden, lora.rank);
  if (bias != nullptr) begin_with(bias, lora.rows, lora.out, result);
  multiply_in_parallel(lora.rows, lora.out, lora.rank, 1.0f, Matrix(hidden, lora.rank),
                       Matrix(lora.b, lora.rank, true), bias == nullptr ? 0.0f : 1.0f, result, lora.out);
  product(arguments, 0, 1, 1.0f, y);
}

}  // namespace

MINDPEFT_KERNEL(lora_linear) { lora_product(arguments, nullptr, 6); }
MINDPEFT_KERNEL(lora_linear_bias) { lora_product(arguments, arguments.at(6), 7); }

// Lora's inputs, hidden, dy -> dx, da, db
MINDPEFT_KERNEL(lora_linear_grad) {
  const Lora lora(arguments);
  const int64_t rows = lora.rows, in = lora.in, out = lora.out, rank = lora.rank;
  const float *hidden = arguments.at(6), *dy = arguments.at(7);
  float *dx = arguments.at(8), *da = arguments.at(9), *db = arguments.at(10);
  const mindpeft::Shared memory(rows * rank);
  float* dhidden = memory.data();  // already times scale
  multiply_in_parallel(rows, rank, out, lora.scale, Matrix(dy, out), Matrix(lora.b, rank), 0.0f, dhidden, rank);
  multiply_in_parallel(out, rank, rows, 1.0f, Matrix(dy, out, true), Matrix(hidden, rank), 0.0f, db, rank);
  multiply_in_parallel(rank, in, rows, 1.0f, Matrix(dhidden, rank, true), Matrix(lora.dropped(), in), 0.0f, da, in);
  multiply_in_parallel(rows, in, rank, 1.0f, Matrix(dhidden, rank), Matrix(lora.a, in), 0.0f, dx, in);
  if (lora.noise.any()) drop(dx, rows, in, lora.noise, dx);
  multiply_in_parallel(rows, in, out, 1.0f, Matrix(dy, out), weight_of(arguments, 1, false), 1.0f, dx, in);
}
