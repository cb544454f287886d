// Products with a frozen weight (out, in) of bytes: each output's row is a factor, its scale, times whole numbers.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffers.h"
#include "few_rows.h"
#include "gemm.h"
#include "threads.h"
#include "vector_math.h"

namespace {

using mindpeft::in_parallel;
using mindpeft::Matrix;
using mindpeft::multiply_in_parallel;

// oneDNN's c = (a - zero of a) (b - zero of b), in whole numbers; see gemm.cpp about the last argument.
using ByteProduct = int (*)(char, char, char, int64_t, int64_t, int64_t, float, const uint8_t*, int64_t, uint8_t,
                            const int8_t*, int64_t, int8_t, float, int32_t*, int64_t, const int32_t*, void*);

// Processors without VNNI add pairs of products in 16 bits, which is too few.
bool multiplies_bytes() {
#ifdef __AVX512F__
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

ByteProduct find_byte_product() {
  void* library = multiplies_bytes() ? mindpeft::products_library() : nullptr;
  if (library == nullptr) return nullptr;
  const auto found = reinterpret_cast<ByteProduct>(dlsym(library, "dnnl_threadpool_interop_gemm_u8s8s32"));
  const uint8_t two = 130;
  const int8_t three = 3;
  const int32_t none = 0;
  int32_t product = 0;
  const bool works = found != nullptr && found('N', 'T', 'F', 1, 1, 1, 1, &two, 1, 128, &three, 1, 0, 0, &product, 1,
                                               &none, nullptr) == 0;
  return works && product == 6 ? found : nullptr;
}

ByteProduct byte_product() {
  static const ByteProduct found = find_byte_product();
  return found;
}

constexpr uint8_t kZero = 128;  // the code of 0 in a row of x

struct Weight {
  const int8_t* codes;  // (out, in)
  const float* scale;   // (out)
  int64_t out, in;

  Weight(const mindpeft::Arguments& arguments, int tensor)
      : codes(arguments.at<int8_t>(tensor)), scale(arguments.at(tensor + 1)), out(arguments.axis(tensor, 0)),
        in(arguments.axis(tensor, 1)) {}
};

// Parts of rows that are worth a thread.
int64_t least_rows(int64_t width) { return 16384 / (width + 1) + 1; }

// A row's codes, in 1 ... 255, and what one of their steps is: NaN for a row with NaN or infinity in it.
float encode(const float* x, int64_t width, uint8_t* codes) {
  uint32_t most = 0;  // as bits the largest number's, infinity above all numbers, NaN above that
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7FFFFFFF;
    most = bits > most ? bits : most;
  }
  const float largest = mindpeft::from_bits(most);
  const bool finite = most < 0x7F800000;
  if (!finite || largest < 1e-36f) {  // so small that the factor would overflow
    std::fill(codes, codes + width, kZero);
    return finite ? 0.0f : NAN;
  }
  const float factor = 127.0f / largest;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(x[i] * factor + (kZero + 0.5f)));
  }
  return largest / 127.0f;
}

// y = y times each column's factor, and the row's, + bias; y holds whole numbers of 32 bits, or floats.
template <typename Number>
void decode(int64_t width, float row_factor, const float* factors, const float* bias, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    Number number;
    std::memcpy(&number, y + i, sizeof(number));
    const float value = static_cast<float>(number) * (row_factor * factors[i]);
    y[i] = bias == nullptr ? value : value + bias[i];
  }
}

// Some rows of x, as codes, times some rows of the weight.
void part_of_codes(int64_t m, int64_t n, const uint8_t* codes, const float* steps, const Weight& weight,
                   int64_t first, const float* bias, float* y) {
  constexpr int64_t kSome = 256;  // rows whose products are still in the cache when they become floats
  const int32_t none = 0;
  for (int64_t row = 0; row < m; row += kSome) {
    const int64_t count = std::min(kSome, m - row);
    float* part = y + row * weight.out + first;
    byte_product()('N', 'T', 'F', count, n, weight.in, 1.0f, codes + row * weight.in, weight.in, kZero,
                   weight.codes + first * weight.in, weight.in, 0, 0.0f, reinterpret_cast<int32_t*>(part), weight.out,
                   &none, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      decode<int32_t>(n, steps[row + i], weight.scale + first, bias == nullptr ? nullptr : bias + first,
                      part + i * weight.out);
    }
  }
}

// x rounded to 8 bits, row by row, times the weight.
void product_of_codes(int64_t m, const float* x, const Weight& weight, const float* bias, float* y) {
  const int64_t in = weight.in, out = weight.out;
  const mindpeft::Shared memory(m + (m * in + 3) / 4);
  float* steps = memory.data();
  auto* codes = reinterpret_cast<uint8_t*>(memory.data() + m);
  in_parallel(m, least_rows(in), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) steps[i] = encode(x + i * in, in, codes + i * in);
  });
  const int64_t least = std::max<int64_t>(16, (1 << 16) / std::max<int64_t>(1, in * std::min(m, out)));
  if (out >= m) {
    in_parallel(out, least, [&](int64_t begin, int64_t end) {
      part_of_codes(m, end - begin, codes, steps, weight, begin, bias, y);
    });
  } else {
    in_parallel(m, least, [&](int64_t begin, int64_t end) {
      part_of_codes(end - begin, out, codes + begin * in, steps + begin, weight, 0, bias, y + begin * out);
    });
  }
}

inline void put(float value, float* to) { *to = value; }

// Of a whole number of 8 bits, all of which are in the upper half.
inline void put(float value, mindpeft::bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  *to = static_cast<mindpeft::bfloat16>(bits >> 16);
}

// Calls use(first, count, numbers) for all rows of the weight, some at a time, as exact floats or bfloat16s.
template <typename Number, typename Use>
void in_pieces(const Weight& weight, const Use& use) {
  const int64_t in = weight.in, some = std::min(weight.out, (1 << 22) / std::max<int64_t>(in, 1) + 64);
  const mindpeft::Shared memory((some * in * sizeof(Number) + sizeof(float) - 1) / sizeof(float));
  auto* numbers = reinterpret_cast<Number*>(memory.data());
  for (int64_t first = 0; first < weight.out; first += some) {
    const int64_t count = std::min(some, weight.out - first);
    in_parallel(count * in, 16384, [&](int64_t begin, int64_t end) {
      const int8_t* codes = weight.codes + first * in;
      for (int64_t i = begin; i < end; ++i) put(codes[i], numbers + i);
    });
    use(first, count, numbers);
  }
}

// y of whole numbers' products with x itself.
void scale_columns(int64_t m, const Weight& weight, const float* bias, float* y) {
  in_parallel(m, least_rows(weight.out), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) decode<float>(weight.out, 1.0f, weight.scale, bias, y + i * weight.out);
  });
}

void product(int64_t m, const float* x, const Weight& weight, const float* bias, float* y) {
  constexpr int64_t kFew = 8;
  const int64_t in = weight.in, out = weight.out;
  if (m > kFew && in > 0 && byte_product() != nullptr) return product_of_codes(m, x, weight, bias, y);
  if (m <= kFew) {
    mindpeft::few_rows(m, out, in, 1.0f, x, in, weight.codes, in, 0.0f, y, out);
  } else {
    in_pieces<float>(weight, [&](int64_t first, int64_t count, const float* rows) {
      multiply_in_parallel(m, count, in, 1.0f, Matrix(x, in), Matrix(rows, in, true), 0.0f, y + first, out);
    });
  }
  scale_columns(m, weight, bias, y);
}

template <typename Number>
void gradient(int64_t m, const float* dy, const Weight& weight, float* dx) {
  constexpr bool kBfloat = sizeof(Number) == sizeof(mindpeft::bfloat16);
  const int64_t in = weight.in, out = weight.out;
  in_pieces<Number>(weight, [&](int64_t first, int64_t count, const Number* rows) {
    multiply_in_parallel(m, in, count, 1.0f, Matrix(dy + first, out), Matrix(rows, in, false, kBfloat),
                         first == 0 ? 0.0f : 1.0f, dx, in);
  });
}

}  // namespace

// x (..., in), weight (out, in) of bytes, scale (out) -> y (..., out)
MINDPEFT_KERNEL(int8_linear) {
  product(arguments.rows(0), arguments.at(0), Weight(arguments, 1), nullptr, arguments.at(3));
}

// x, weight, scale, bias (out) -> y
MINDPEFT_KERNEL(int8_linear_bias) {
  product(arguments.rows(0), arguments.at(0), Weight(arguments, 1), arguments.at(3), arguments.at(4));
}

// dy (..., out), weight, scale -> dx (..., in)
MINDPEFT_KERNEL(int8_linear_grad) {
  const Weight weight(arguments, 1);
  const int64_t rows = arguments.rows(0);
  const float* dy = arguments.at(0);
  float* dx = arguments.at(3);
  const mindpeft::Shared memory(rows * weight.out);
  float* scaled = memory.data();
  in_parallel(rows, least_rows(weight.out), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * weight.out; i < end * weight.out; i += weight.out) {
#pragma omp simd
      for (int64_t j = 0; j < weight.out; ++j) scaled[i + j] = dy[i + j] * weight.scale[j];
    }
  });
  if (has_fast_bfloat16_products()) {
    gradient<mindpeft::bfloat16>(rows, scaled, weight, dx);
  } else {
    gradient<float>(rows, scaled, weight, dx);
  }
}

// Whether MindSpore's library of products has fast ones of bytes for this processor.
extern "C" __attribute__((visibility("default"))) int has_fast_int8_products() { return byte_product() != nullptr; }
