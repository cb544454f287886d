// The dense product with a weight (out, in), and the same with LoRA's two thin matrices beside it. Kernels with
// "turned" in their names take weights (in, out).
#include <algorithm>

#include "buffers.h"
#include "elementwise.h"
#include "gemm.h"
#include "noise.h"
#include "rows.h"
#include "threads.h"

namespace {

using mindpeft::Matrix;
using mindpeft::multiply_in_parallel;

// A weight: as it lies in memory, and how many numbers go in and out.
struct Weight {
  const void* data;
  bool bfloat, turned;
  int64_t out, in;

  Weight(const mindpeft::Arguments& arguments, int tensor, bool turned)
      : data(arguments.at<void>(tensor)), bfloat(arguments.is_bfloat16(tensor)), turned(turned),
        out(arguments.axis(tensor, turned ? 1 : 0)), in(arguments.axis(tensor, turned ? 0 : 1)) {}

  Matrix to_out() const { return Matrix(data, turned ? out : in, !turned, bfloat); }  // (in, out)
  Matrix to_in() const { return Matrix(data, turned ? out : in, turned, bfloat); }    // (out, in)
};

// y = x weight^T + keep y
void product(const mindpeft::Arguments& arguments, const Weight& weight, float keep, float* y) {
  multiply_in_parallel(arguments.rows(0), weight.out, weight.in, 1.0f, Matrix(arguments.at(0), weight.in),
                       weight.to_out(), keep, y, weight.out);
}

void product_with_bias(const mindpeft::Arguments& arguments, const Weight& weight) {
  mindpeft::fill_rows(arguments.at(2), arguments.rows(0), weight.out, arguments.at(3));
  product(arguments, weight, 1.0f, arguments.at(3));
}

// dx = dy weight + keep dx
void gradient(int64_t rows, const float* dy, const Weight& weight, float keep, float* dx) {
  multiply_in_parallel(rows, weight.in, weight.out, 1.0f, Matrix(dy, weight.out), weight.to_in(), keep, dx,
                       weight.in);
}

}  // namespace

// x (..., in), weight (out, in) -> y (..., out)
MINDPEFT_KERNEL(linear) { product(arguments, Weight(arguments, 1, false), 0.0f, arguments.at(2)); }
MINDPEFT_KERNEL(linear_turned) { product(arguments, Weight(arguments, 1, true), 0.0f, arguments.at(2)); }

// x, weight, bias (out) -> y
MINDPEFT_KERNEL(linear_bias) { product_with_bias(arguments, Weight(arguments, 1, false)); }
MINDPEFT_KERNEL(linear_turned_bias) { product_with_bias(arguments, Weight(arguments, 1, true)); }

// dy (..., out), weight (out, in) -> dx (..., in)
MINDPEFT_KERNEL(linear_grad) {
  gradient(arguments.rows(0), arguments.at(0), Weight(arguments, 1, false), 0.0f, arguments.at(2));
}
MINDPEFT_KERNEL(linear_turned_grad) {
  gradient(arguments.rows(0), arguments.at(0), Weight(arguments, 1, true), 0.0f, arguments.at(2));
}

// x (..., in), dy (..., out) -> dweight (out, in); with both exchanged, that of a turned weight
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
  Weight weight;
  int64_t rows, in, out, rank;
  const void* x;  // of floats, or as it was kept in bfloat16s
  bool kept;
  const float *a, *b;
  float scale;
  mindpeft::Noise noise;
  mindpeft::Shared memory;

  Lora(const mindpeft::Arguments& arguments, bool turned)
      : weight(arguments, 1, turned), rows(arguments.rows(0)), in(weight.in), out(weight.out),
        rank(arguments.axis(2, 0)), x(arguments.at<void>(0)), kept(arguments.is_bfloat16(0)), a(arguments.at(2)),
        b(arguments.at(3)), scale(*arguments.at(4)), noise(arguments.at(5)),
        memory(noise.any() || kept ? rows * in : 0) {}

  // x as LoRA sees it.
  const float* dropped() const {
    const float* numbers = static_cast<const float*>(x);
    if (kept) {
      mindpeft::restore(rows * in, static_cast<const mindpeft::bfloat16*>(x), memory.data());
      numbers = memory.data();
    }
    if (!noise.any()) return numbers;
    drop(numbers, rows, in, noise, memory.data());
    return memory.data();
  }

  // The gradient of hidden, times scale: dy (rows, out) -> dhidden (rows, r)
  void to_hidden(const float* dy, float* dhidden) const {
    multiply_in_parallel(rows, rank, out, scale, Matrix(dy, out), Matrix(b, rank), 0.0f, dhidden, rank);
  }
};

// Lora's inputs, bias or none, and perhaps x as it is kept, which is not read
// -> y = x weight^T + bias + hidden b^T, hidden (rows, r) = scale dropped(x) a^T
void lora_product(const mindpeft::Arguments& arguments, bool turned, const float* bias) {
  const Lora lora(arguments, turned);
  float *result = arguments.at(arguments.count() - 2), *hidden = arguments.at(arguments.count() - 1);
  multiply_in_parallel(lora.rows, lora.rank, lora.in, lora.scale, Matrix(lora.dropped(), lora.in),
                       Matrix(lora.a, lora.in, true), 0.0f, hidden, lora.rank);
  if (bias != nullptr) mindpeft::fill_rows(bias, lora.rows, lora.out, result);
  multiply_in_parallel(lora.rows, lora.out, lora.rank, 1.0f, Matrix(hidden, lora.rank),
                       Matrix(lora.b, lora.rank, true), bias == nullptr ? 0.0f : 1.0f, result, lora.out);
  product(arguments, lora.weight, 1.0f, result);
}

void lora_gradient(const mindpeft::Arguments& arguments, bool turned) {
  const Lora lora(arguments, turned);
  const int64_t rows = lora.rows, in = lora.in, rank = lora.rank;
  const float* dy = arguments.at(7);
  float* dx = arguments.at(8);
  const mindpeft::Shared memory(rows * rank);
  lora.to_hidden(dy, memory.data());
  multiply_in_parallel(rows, in, rank, 1.0f, Matrix(memory.data(), rank), Matrix(lora.a, in), 0.0f, dx, in);
  if (lora.noise.any()) drop(dx, rows, in, lora.noise, dx);
  gradient(rows, dy, lora.weight, 1.0f, dx);
}

void lora_gradient_pair(const mindpeft::Arguments& arguments, bool turned) {
  const Lora lora(arguments, turned);
  const int64_t rows = lora.rows, in = lora.in, out = lora.out, rank = lora.rank;
  const float *hidden = arguments.at(6), *dy = arguments.at(7);
  float *da = arguments.at(8), *db = arguments.at(9);
  const mindpeft::Shared memory(rows * rank);
  lora.to_hidden(dy, memory.data());
  multiply_in_parallel(out, rank, rows, 1.0f, Matrix(dy, out, true), Matrix(hidden, rank), 0.0f, db, rank);
  multiply_in_parallel(rank, in, rows, 1.0f, Matrix(memory.data(), rank, true), Matrix(lora.dropped(), in), 0.0f,
                       da, in);
}

}  // namespace

MINDPEFT_KERNEL(lora_linear) { lora_product(arguments, false, nullptr); }
MINDPEFT_KERNEL(lora_linear_bias) { lora_product(arguments, false, arguments.at(6)); }
MINDPEFT_KERNEL(lora_linear_turned) { lora_product(arguments, true, nullptr); }
MINDPEFT_KERNEL(lora_linear_turned_bias) { lora_product(arguments, true, arguments.at(6)); }

// x -> the same in bfloat16s
MINDPEFT_KERNEL(narrow) { mindpeft::keep(arguments.size(0), arguments.at(0), arguments.at<mindpeft::bfloat16>(1)); }

// Lora's inputs, with x in floats or bfloat16s, hidden, dy -> dx
MINDPEFT_KERNEL(lora_linear_grad) { lora_gradient(arguments, false); }
MINDPEFT_KERNEL(lora_linear_turned_grad) { lora_gradient(arguments, true); }

// Lora's inputs, hidden, dy -> da, db
MINDPEFT_KERNEL(lora_linear_grad_pair) { lora_gradient_pair(arguments, false); }
MINDPEFT_KERNEL(lora_linear_turned_grad_pair) { lora_gradient_pair(arguments, true); }
