#include "gemm.h"

#include <dlfcn.h>

#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "buffers.h"
#include "few_rows.h"
#include "threads.h"
#include "vector_math.h"

namespace mindpeft {
namespace {

// oneDNN's products (https://github.com/uxlfoundation/oneDNN), of the library that MindSpore has loaded. The
// last argument is a pool of threads: with none a product stays on the calling thread.
using FloatProduct = int (*)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*,
                             int64_t, float, float*, int64_t, void*);
using BfloatProduct = int (*)(char, char, int64_t, int64_t, int64_t, float, const bfloat16*, int64_t,
                              const bfloat16*, int64_t, float, float*, int64_t, void*);

// Elsewhere oneDNN emulates products of bfloat16s, at less than half the speed of those of floats, or has none.
bool multiplies_bfloats() {
#ifdef __AVX512F__
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

struct Products {
  FloatProduct floats = nullptr;
  BfloatProduct bfloats = nullptr;  // only where it is fast

  Products() {
    void* library = products_library();
    if (library == nullptr) return;
    floats = reinterpret_cast<FloatProduct>(dlsym(library, "dnnl_threadpool_interop_sgemm"));
    if (!multiplies_bfloats()) return;
    bfloats = reinterpret_cast<BfloatProduct>(dlsym(library, "dnnl_threadpool_interop_gemm_bf16bf16f32"));
    const bfloat16 one = narrow(1.0f);
    float product = 0;
    if (bfloats != nullptr && bfloats('N', 'N', 1, 1, 1, 1, &one, 1, &one, 1, 0, &product, 1, nullptr) != 0) {
      bfloats = nullptr;
    }
  }
};

const Products& products() {
  static const Products found;
  return found;
}

// Where no library was found: a plain product of floats over blocks that stay in the cache.
float element(const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t place = matrix.transposed ? column * matrix.stride + row : row * matrix.stride + column;
  return static_cast<const float*>(matrix.data)[place];
}

void plain_product(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
                   int64_t stride) {
  constexpr int64_t kBlock = 64;
  float* piece = scratch(7, kBlock * kBlock);
  for (int64_t i = 0; i < m; ++i) {
    float* row = c + i * stride;
    for (int64_t j = 0; j < n; ++j) row[j] = keep == 0.0f ? 0.0f : row[j] * keep;
  }
  for (int64_t p = 0; p < k; p += kBlock) {
    for (int64_t j = 0; j < n; j += kBlock) {
      const int64_t deep = std::min(kBlock, k - p), wide = std::min(kBlock, n - j);
      for (int64_t r = 0; r < deep; ++r) {
        for (int64_t s = 0; s < wide; ++s) piece[r * wide + s] = element(b, p + r, j + s);
      }
      for (int64_t i = 0; i < m; ++i) {
        float* row = c + i * stride + j;
        for (int64_t r = 0; r < deep; ++r) {
          const float factor = scale * element(a, i, p + r);
          for (int64_t s = 0; s < wide; ++s) row[s] += factor * piece[r * wide + s];
        }
      }
    }
  }
}

void split_product(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
                   int64_t stride) {
  const int64_t least = std::max<int64_t>(16, (1 << 16) / std::max<int64_t>(1, k * std::min(m, n)));
  if (n >= m) {
    in_parallel(n, least, [&](int64_t begin, int64_t end) {
      multiply(m, end - begin, k, scale, a, b.from(0, begin), keep, c + begin, stride);
    });
  } else {
    in_parallel(m, least, [&](int64_t begin, int64_t end) {
      multiply(end - begin, n, k, scale, a.from(begin, 0), b, keep, c + begin * stride, stride);
    });
  }
}

// On the processor's matrix units: a rectangle of c for each thread, so shaped that little is packed twice.
void matrix_unit_product(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
                         int64_t stride) {
  using amx::kPanel;
  const int64_t threads = thread_count(), tall = (m + kPanel - 1) / kPanel, wide = (n + kPanel - 1) / kPanel;
  int64_t down = threads;
  for (int64_t i = 1; i <= threads; ++i) {
    if (threads % i == 0 && m / i + n / (threads / i) < m / down + n / (threads / down)) down = i;
  }
  const int64_t beside = threads / down;
  run_tasks(threads, [&](int64_t task) {
    const int64_t i = task / beside, j = task % beside;
    const int64_t row = tall * i / down * kPanel, column = wide * j / beside * kPanel;
    const int64_t rows = std::min(m, tall * (i + 1) / down * kPanel) - row;
    const int64_t columns = std::min(n, wide * (j + 1) / beside * kPanel) - column;
    if (rows <= 0 || columns <= 0) return;
    amx::multiply(rows, columns, k, scale, a.from(row, 0), b.from(0, column), keep, c + row * stride + column, stride);
  });
}

// Whether the library was found and has done it.
bool fast_product(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
                  int64_t stride) {
  const auto call = [&](auto function, auto* type) {
    using Number = const std::remove_pointer_t<decltype(type)>;
    return function != nullptr &&
           function(a.transposed ? 'T' : 'N', b.transposed ? 'T' : 'N', m, n, k, scale,
                    static_cast<Number*>(a.data), a.stride, static_cast<Number*>(b.data), b.stride, keep, c, stride,
                    nullptr) == 0;
  };
  return a.bfloat ? call(products().bfloats, static_cast<bfloat16*>(nullptr))
                  : call(products().floats, static_cast<float*>(nullptr));
}

// a rounded to bfloat16s, times b of the same.
void rounded_product(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
                     int64_t stride) {
  const int64_t rows = a.transposed ? k : m, columns = a.transposed ? m : k;
  const Shared memory((rows * columns + 1) / 2);
  auto* rounded = reinterpret_cast<bfloat16*>(memory.data());
  const float* x = static_cast<const float*>(a.data);
  in_parallel(rows, 16384 / std::max<int64_t>(columns, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < columns; ++j) rounded[i * columns + j] = narrow(x[i * a.stride + j]);
    }
  });
  split_product(m, n, k, scale, Matrix(rounded, columns, a.transposed, true), b, keep, c, stride);
}

// a times b of bfloat16s, which become floats some rows (as they lie in memory) at a time.
void widened_product(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
                     int64_t stride) {
  const int64_t rows = b.transposed ? n : k, columns = b.transposed ? k : n;
  const int64_t some = std::min(rows, (1 << 20) / std::max<int64_t>(columns, 1) + 64);
  const Shared memory(some * columns);
  const auto* numbers = static_cast<const bfloat16*>(b.data);
  int64_t first = 0;
  do {
    const int64_t count = std::min(some, rows - first);
    in_parallel(count, 16384 / std::max<int64_t>(columns, 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < columns; ++j) memory.data()[i * columns + j] = widen(numbers[(first + i) * b.stride + j]);
      }
    });
    const Matrix piece(memory.data(), columns, b.transposed);
    if (b.transposed) {
      split_product(m, count, k, scale, a, piece, keep, c + first, stride);
    } else {
      split_product(m, n, count, scale, a.from(0, first), piece, first == 0 ? keep : 1.0f, c, stride);
    }
    first += count;
  } while (first < rows);
}

}  // namespace

void* products_library() {
  for (const char* name : {"libdnnl.so.3", "libdnnl.so.2"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD); library != nullptr) return library;
  }
  return nullptr;
}

void multiply(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
              int64_t stride) {
  if (m == 0 || n == 0) return;
  if (k == 0 || !fast_product(m, n, k, scale, a, b, keep, c, stride)) {
    plain_product(m, n, k, scale, a, b, keep, c, stride);
  }
}

void multiply_in_parallel(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep,
                          float* c, int64_t stride) {
  const bool by_rows = !a.transposed && !a.bfloat && b.transposed;
  if (by_rows && b.bfloat && amx::few_rows(m, n, k, scale, a, b, keep, c, stride)) return;
  constexpr int64_t kFew = 8;
  if (by_rows && m <= kFew) {
    const float* x = static_cast<const float*>(a.data);
    if (b.bfloat) {
      few_rows(m, n, k, scale, x, a.stride, static_cast<const bfloat16*>(b.data), b.stride, keep, c, stride);
    } else {
      few_rows(m, n, k, scale, x, a.stride, static_cast<const float*>(b.data), b.stride, keep, c, stride);
    }
    return;
  }
  if (!a.bfloat && amx::worthwhile(m, n, k, b.bfloat)) {
    return matrix_unit_product(m, n, k, scale, a, b, keep, c, stride);
  }
  const auto product = !b.bfloat ? split_product : products().bfloats ? rounded_product : widened_product;
  product(m, n, k, scale, a, b, keep, c, stride);
}

}  // namespace mindpeft

extern "C" __attribute__((visibility("default"))) int has_fast_products() {
  return mindpeft::products().floats != nullptr;
}

extern "C" __attribute__((visibility("default"))) int has_matrix_units() { return mindpeft::amx::available(); }

extern "C" __attribute__((visibility("default"))) int has_fast_bfloat16_products() {
  return mindpeft::products().bfloats != nullptr || mindpeft::amx::available();
}
