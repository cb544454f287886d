#include "amx.h"
#include "amx_tiles.h"
#include "buffers.h"
#include "memory.h"
#include "threads.h"

namespace mindpeft::amx {

#ifdef MINDPEFT_AMX

namespace {

constexpr int64_t kHalf = kSide / 2, kFewest = 3;

// Few rows of x in two parts: for each step of the depth a tile of each, or one of both where they fit beside each
// other.
void pack_few(const Side& x, int64_t m, int64_t k, bool joined, bfloat16* to) {
  alignas(64) bfloat16 parts[2 * kTile];
  for (int64_t depth = 0; depth < k; depth += kDepth) {
    pack_tile<2, false>(x, 0, m, depth, kDepth, joined ? parts : to, kTile);
    for (int64_t i = 0; joined && i < kTile; i += kDepth) {
      const auto low = _mm256_load_si256(reinterpret_cast<const __m256i*>(parts + kTile + i));
      _mm512_store_si512(to + i, _mm512_inserti64x4(_mm512_load_si512(parts + i), low, 1));
    }
    to += (joined ? 1 : 2) * kTile;
  }
}

bool all_finite(const Side& x, int64_t m, int64_t k) {
  constexpr int kNoNumber = 0x99;  // infinities, and what is not a number
  __mmask16 found = 0;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t i = 0; i < k; i += kSide) {
      found |= _mm512_fpclass_ps_mask(_mm512_loadu_ps(x.at<float>(row, i)), kNoNumber);
    }
  }
  return found == 0;
}

// Two times 16 rows of a weight, read as they lie in memory, times few rows of x: sums (2, 16, 16).
template <bool kJoined>
void multiply_few(const bfloat16* one, const bfloat16* other, int64_t stride, const bfloat16* x, int64_t k,
                  float* sums) {
  const int64_t bytes = stride * sizeof(bfloat16);
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t depth = 0; depth < k; depth += kDepth, x += (kJoined ? 1 : 2) * kTile) {
    // The processor foresees the rest of a row, but not the rows that come next.
    for (int64_t row = kPanel; row < 2 * kPanel; ++row) __builtin_prefetch(one + row * stride + depth);
    _tile_loadd(2, one + depth, bytes);
    _tile_loadd(3, other + depth, bytes);
    _tile_loadd(4, x, 64);
    if constexpr (!kJoined) {
      _tile_loadd(5, x + kTile, 64);
      _tile_dpbf16ps(0, 2, 5);
      _tile_dpbf16ps(1, 3, 5);
    }
    _tile_dpbf16ps(0, 2, 4);
    _tile_dpbf16ps(1, 3, 4);
  }
  _tile_stored(0, sums, kSide * sizeof(float));
  _tile_stored(1, sums + kSide * kSide, kSide * sizeof(float));
}

// Columns of y, from `from` to 16, of the transpose of sums (16, 16).
void put_turned(const float* sums, int64_t m, bool joined, int64_t from, float scale, float keep, float* y,
                int64_t stride) {
  Words rows[kSide];
  for (int64_t i = 0; i < kSide; ++i) rows[i] = _mm512_load_si512(sums + i * kSide);
  transpose(rows);
  const auto mask = static_cast<__mmask16>(~first(from));
  for (int64_t row = 0; row < m; ++row, y += stride) {
    __m512 value = _mm512_castsi512_ps(rows[row]);
    if (joined) value = _mm512_add_ps(value, _mm512_castsi512_ps(rows[kHalf + row]));
    value = _mm512_mul_ps(_mm512_set1_ps(scale), value);
    if (keep != 0.0f) value = _mm512_fmadd_ps(_mm512_set1_ps(keep), _mm512_maskz_loadu_ps(mask, y), value);
    _mm512_mask_storeu_ps(y, mask, value);
  }
}

}  // namespace

bool few_rows(int64_t m, int64_t n, int64_t k, float scale, const Matrix& a, const Matrix& b, float keep, float* c,
              int64_t stride) {
  if (!available() || m < kFewest || m > kSide || n < kSide || k == 0 || k % kDepth != 0) return false;
  const Side rows = side_of_a(a);
  if (!all_finite(rows, m, k)) return false;
  const bool joined = m <= kHalf;
  const Shared memory((joined ? 1 : 2) * kSide * k / 2);
  auto* packed = reinterpret_cast<bfloat16*>(memory.data());
  pack_few(rows, m, k, joined, packed);
  const auto* weight = static_cast<const bfloat16*>(b.data);
  move_to_large_pages(weight, n * b.stride * sizeof(bfloat16));
  in_parallel((n + kSide - 1) / kSide, std::max<int64_t>(1, 16384 / (kSide * k)), [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    alignas(64) float sums[2 * kSide * kSide];
    // The last 16 columns begin earlier where they would reach behind the end.
    const auto start = [&](int64_t block) { return std::min(block * kSide, n - kSide); };
    const auto put = [&](int64_t block, const float* of) {
      const int64_t column = start(block);
      put_turned(of, m, joined, block * kSide - column, scale, keep, c + column, stride);
    };
    const auto product = joined ? multiply_few<true> : multiply_few<false>;
    for (int64_t block = begin; block < end; block += 2) {
      const int64_t other = std::min(block + 1, end - 1);
      product(weight + start(block) * b.stride, weight + start(other) * b.stride, b.stride, packed, k, sums);
      put(block, sums);
      if (other != block) put(other, sums + kSide * kSide);
    }
  });
  return true;
}

#else

bool few_rows(int64_t, int64_t, int64_t, float, const Matrix&, const Matrix&, float, float*, int64_t) { return false; }

#endif

}  // namespace mindpeft::amx
