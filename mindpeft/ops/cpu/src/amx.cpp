#include "amx.h"

#include "threads.h"

#if defined(__AVX512F__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MINDPEFT_AMX
#endif

#ifdef MINDPEFT_AMX

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace mindpeft::amx {
namespace {

// A tile register holds 16 rows of 64 bytes: 16 x 16 floats of a sum, 16 rows of a with 32 columns each, or 32 rows
// of b with 16 columns each, where two rows that follow each other are interlaced.
constexpr int64_t kSide = 16, kDepth = 32, kTile = kSide * kDepth;
constexpr int64_t kPanel = 2 * kSide;  // rows of a, or columns of b, that are multiplied together

bool processor_has_it() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBfloats = 1u << 22, kTiles = 1u << 24;
  if ((d & kBfloats) == 0 || (d & kTiles) == 0) return false;
  constexpr unsigned kRounding = 1u << 5;  // instructions that make bfloat16s of floats
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kRounding) != 0;
}

bool system_permits_it() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// All registers as large as they can be, for as long as this lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

using Words = __m512i;  // 16 pairs of bfloat16s

// The transpose of 16 x 16 words.
inline void transpose(Words* rows) {
  Words other[kSide];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

// The first `count` of 16 numbers.
inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kSide)) - 1u);
}

// Two times 16 floats become a line of bfloat16s, one after the other or interlaced: rounded, or three lines that
// hold every bit. Returns whether all of them are finite; if they are only rounded, no one needs to know.
template <int kParts>
bool to_line(__m512 left, __m512 right, bool interlaced, Words* line);

template <>
inline bool to_line<1>(__m512 left, __m512 right, bool interlaced, Words* line) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(line[0]) : "v"(left), "v"(right));
  if (interlaced) line[0] = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), line[0]);
  return true;
}

template <>
inline bool to_line<3>(__m512 left, __m512 right, bool interlaced, Words* line) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  constexpr int kNoNumber = 0x99;  // infinities, and what is not a number
  const Words half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const auto rounded = [&](__m512 x) { return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper); };
  bool finite = true;
  for (int i = 0; i < 3; ++i) {
    const Words a = rounded(left), b = rounded(right);
    if (i == 0) {  // a number near the largest may be rounded to infinity
      finite = (_mm512_fpclass_ps_mask(_mm512_castsi512_ps(a), kNoNumber) |
                _mm512_fpclass_ps_mask(_mm512_castsi512_ps(b), kNoNumber)) == 0;
    }
    line[i] = interlaced ? _mm512_or_si512(_mm512_srli_epi32(a, 16), b)
                         : _mm512_permutex2var_epi16(a, _mm512_load_si512(kUpper), b);
    left = _mm512_sub_ps(left, _mm512_castsi512_ps(a));
    right = _mm512_sub_ps(right, _mm512_castsi512_ps(b));
  }
  return finite;
}

// What is packed: rows of a or columns of b, `across` apart in memory, and their depth, `along` apart; one is 1.
struct Side {
  const void* data;
  int64_t across, along;
  bool bfloat;

  template <typename Number>
  const Number* at(int64_t place, int64_t depth) const {
    return static_cast<const Number*>(data) + place * across + depth * along;
  }
};

// One line of a tile as it lies in memory, in each of its parts; returns whether all are finite.
template <int kParts>
inline bool read_deep(const Side& side, int64_t place, int64_t depth, int64_t deep, Words* line) {
  if (side.bfloat) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << std::min(deep, kDepth)) - 1);
    line[0] = _mm512_maskz_loadu_epi16(mask, side.at<bfloat16>(place, depth));
    return true;
  }
  const float* from = side.at<float>(place, depth);
  return to_line<kParts>(_mm512_maskz_loadu_ps(first(deep), from),
                         _mm512_maskz_loadu_ps(first(deep - kSide), from + kSide), false, line);
}

template <int kParts>
inline bool read_wide(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, Words* line) {
  const __mmask16 even = deep > 0 ? first(wide) : 0, odd = deep > 1 ? first(wide) : 0;
  if (side.bfloat) {
    const bfloat16* from = side.at<bfloat16>(place, depth);
    const Words low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, from));
    const Words high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + side.along));
    line[0] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    return true;
  }
  const float* from = side.at<float>(place, depth);
  return to_line<kParts>(_mm512_maskz_loadu_ps(even, from), _mm512_maskz_loadu_ps(odd, from + side.along), true, line);
}

// Packs `wide` rows of a (or columns of b) from `place` on, and `deep` of their depth; what the tile has more is
// zero. `lines` tells that a tile's rows are those of a, rather than interlaced rows of b.
template <int kParts>
bool pack_tile(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, bool lines,
               bfloat16* to, int64_t part_step) {
  Words rows[kParts][kSide];
  bool finite = true;
  const bool contiguous = side.along == 1;
  for (int64_t i = 0; i < kSide; ++i) {
    Words line[kParts] = {};
    if (contiguous) {
      if (i < wide) finite &= read_deep<kParts>(side, place + i, depth, deep, line);
    } else if (2 * i < deep) {
      finite &= read_wide<kParts>(side, place, wide, depth + 2 * i, deep - 2 * i, line);
    }
    for (int part = 0; part < kParts; ++part) rows[part][i] = line[part];
  }
  for (int part = 0; part < kParts; ++part) {
    if (contiguous != lines) transpose(rows[part]);
    for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(to + part * part_step + i * kDepth, rows[part][i]);
  }
  return finite;
}

// Packs a panel: for each step of the depth its parts, of each two tiles.
template <int kParts>
bool pack_panel(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, bool lines,
                bfloat16* to) {
  bool finite = true;
  for (int64_t d = 0; d < deep; d += kDepth, to += 2 * kParts * kTile) {
    for (int64_t half = 0; half < 2; ++half) {
      finite &= pack_tile<kParts>(side, place + half * kSide, std::clamp<int64_t>(wide - half * kSide, 0, kSide),
                                  depth + d, std::min(kDepth, deep - d), lines, to + half * kTile, 2 * kTile);
    }
  }
  return finite;
}

#define MINDPEFT_LOAD_A(part)                    \
  _tile_loadd(4, a + (part) * 2 * kTile, 64); \
  _tile_loadd(5, a + (part) * 2 * kTile + kTile, 64)
#define MINDPEFT_LOAD_B(part)                    \
  _tile_loadd(6, b + (part) * 2 * kTile, 64); \
  _tile_loadd(7, b + (part) * 2 * kTile + kTile, 64)
#define MINDPEFT_ADD_PRODUCTS \
  _tile_dpbf16ps(0, 4, 6);    \
  _tile_dpbf16ps(1, 4, 7);    \
  _tile_dpbf16ps(2, 5, 6);    \
  _tile_dpbf16ps(3, 5, 7)

// The product of two panels: sums (kPanel, kPanel).
template <int kParts>
void multiply_panels(const bfloat16* a, const bfloat16* b, int64_t steps, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, a += 2 * kParts * kTile, b += 2 * kParts * kTile) {
    MINDPEFT_LOAD_A(0);
    if constexpr (kParts == 3) {  // in an order in which each product needs one new pair of tiles
      MINDPEFT_LOAD_B(2);
      MINDPEFT_ADD_PRODUCTS;
      MINDPEFT_LOAD_B(1);
      MINDPEFT_ADD_PRODUCTS;
      MINDPEFT_LOAD_A(1);
      MINDPEFT_ADD_PRODUCTS;
      MINDPEFT_LOAD_B(0);
      MINDPEFT_ADD_PRODUCTS;
      MINDPEFT_LOAD_A(2);
      MINDPEFT_ADD_PRODUCTS;
      MINDPEFT_LOAD_A(0);
    } else {
      MINDPEFT_LOAD_B(0);
    }
    MINDPEFT_ADD_PRODUCTS;
  }
  constexpr int64_t kRow = kPanel * sizeof(float);
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kSide, kRow);
  _tile_stored(2, sums + kSide * kPanel, kRow);
  _tile_stored(3, sums + kSide * kPanel + kSide, kRow);
}

// c = scale sums + keep c
void put(const float* sums, int64_t rows, int64_t columns, float scale, float keep, float* c, int64_t stride) {
  const __m512 factor = _mm512_set1_ps(scale), kept = _mm512_set1_ps(keep);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kSide) {
      const __mmask16 mask = first(columns - j);
      float* to = c + i * stride + j;
      __m512 value = _mm512_mul_ps(factor, _mm512_load_ps(sums + i * kPanel + j));
      if (keep != 0.0f) value = _mm512_fmadd_ps(kept, _mm512_maskz_loadu_ps(mask, to), value);
      _mm512_mask_storeu_ps(to, mask, value);
    }
  }
}

Side side_of_a(const Matrix& a) { return {a.data, a.transposed ? 1 : a.stride, a.transposed ? a.stride : 1, a.bfloat}; }
Side side_of_b(const Matrix& b) { return {b.data, b.transposed ? b.stride : 1, b.transposed ? 1 : b.stride, b.bfloat}; }

template <int kParts>
void multiply_in_parts(int64_t m, int64_t n, int64_t k, float scale, const Matrix& a, const Matrix& b, float keep,
                       float* c, int64_t stride) {
  // As much as stays in the second cache, of 2 MB: 1.5 MB, or 1.2 MB.
  constexpr int64_t kRows = kParts == 1 ? 512 : 256, kDeep = kParts == 1 ? 1536 : 768;
  const Tiles tiles;
  const Side rows = side_of_a(a), columns = side_of_b(b);
  const int64_t most = std::min((k + kDepth - 1) / kDepth * kDepth, kDeep), panel_size = kPanel * most * kParts;
  const int64_t panels = (std::min(m, kRows) + kPanel - 1) / kPanel;
  auto* packed_a = reinterpret_cast<bfloat16*>(scratch(8, panels * panel_size / 2));
  auto* packed_b = reinterpret_cast<bfloat16*>(scratch(9, panel_size / 2));
  alignas(64) float sums[kPanel * kPanel];
  for (int64_t depth = 0; depth < k; depth += kDeep, keep = 1.0f) {
    const int64_t deep = std::min(kDeep, k - depth), steps = (deep + kDepth - 1) / kDepth;
    for (int64_t row = 0; row < m; row += kRows) {
      const int64_t tall = std::min(kRows, m - row);
      bool finite = true;
      for (int64_t i = 0; i < tall; i += kPanel) {
        finite &= pack_panel<kParts>(rows, row + i, std::min(kPanel, tall - i), depth, deep, true,
                                     packed_a + i / kPanel * panel_size);
      }
      for (int64_t column = 0; column < n; column += kPanel) {
        const int64_t wide = std::min(kPanel, n - column);
        float* to = c + row * stride + column;
        const bool all_finite = pack_panel<kParts>(columns, column, wide, depth, deep, false, packed_b) && finite;
        if (!all_finite) {  // an infinity's smaller parts would be no numbers
          mindpeft::multiply(tall, wide, deep, scale, a.from(row, depth), b.from(depth, column), keep, to, stride);
          continue;
        }
        for (int64_t i = 0; i < tall; i += kPanel) {
          multiply_panels<kParts>(packed_a + i / kPanel * panel_size, packed_b, steps, sums);
          put(sums, std::min(kPanel, tall - i), wide, scale, keep, to + i * stride, stride);
        }
      }
    }
  }
}

}  // namespace

bool available() {
  static const bool found = processor_has_it() && system_permits_it();
  return found;
}

bool worthwhile(int64_t m, int64_t n, int64_t k, bool bfloat) {
  static const char* wanted = std::getenv("MINDPEFT_AMX");
  static const bool floats = wanted != nullptr && std::strcmp(wanted, "float32") == 0;
  return available() && (bfloat || floats) && std::min({m, n, k}) >= (bfloat ? 1 : 2) * kPanel;
}

void multiply(int64_t m, int64_t n, int64_t k, float scale, Matrix a, Matrix b, float keep, float* c,
              int64_t stride) {
  const auto product = b.bfloat ? multiply_in_parts<1> : multiply_in_parts<3>;
  product(m, n, k, scale, a, b, keep, c, stride);
}

}  // namespace mindpeft::amx

#else

namespace mindpeft::amx {

bool available() { return false; }
bool worthwhile(int64_t, int64_t, int64_t, bool) { return false; }
void multiply(int64_t, int64_t, int64_t, float, Matrix, Matrix, float, float*, int64_t) {}

}  // namespace mindpeft::amx

#endif
