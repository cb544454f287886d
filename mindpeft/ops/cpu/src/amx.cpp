#include "amx.h"

#include "amx_tiles.h"
#include "buffers.h"

#ifdef MINDPEFT_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace mindpeft::amx {
namespace {

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

// Packs a panel: for each step of the depth its parts, of each two tiles.
template <int kParts, bool kLines>
void pack_panel(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, bfloat16* to) {
  for (int64_t d = 0; d < deep; d += kDepth, to += 2 * kParts * kTile) {
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t places = std::clamp<int64_t>(wide - half * kSide, 0, kSide);
      pack_tile<kParts, kLines>(side, place + half * kSide, places, depth + d, std::min(kDepth, deep - d),
                                to + half * kTile, 2 * kTile);
    }
  }
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
  constexpr int64_t kStep = 2 * kParts * kTile;
  for (int64_t step = 0; step < steps; ++step, a += kStep, b += kStep) {
    if constexpr (kParts == 1) {  // three parts take long enough to multiply
      for (int64_t line = 0; line < kStep; line += kDepth) __builtin_prefetch(a + 2 * kStep + line);
    }
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

bool has_no_number(const float* sums) {
  __mmask16 found = 0;
  for (int64_t i = 0; i < kPanel * kPanel; i += kSide) {
    const __m512 some = _mm512_load_ps(sums + i);
    found |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
  }
  return found != 0;
}

template <int kParts>
void multiply_in_parts(int64_t m, int64_t n, int64_t k, float scale, const Matrix& a, const Matrix& b, float keep,
                       float* c, int64_t stride) {
  // As much as stays in the second cache, of 2 MB: 1 MB, or 1.2 MB.
  constexpr int64_t kRows = 512, kDeep = kParts == 1 ? 1024 : 384;
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
      for (int64_t i = 0; i < tall; i += kPanel) {
        pack_panel<kParts, true>(rows, row + i, std::min(kPanel, tall - i), depth, deep,
                                 packed_a + i / kPanel * panel_size);
      }
      for (int64_t column = 0; column < n; column += kPanel) {
        const int64_t wide = std::min(kPanel, n - column);
        pack_panel<kParts, false>(columns, column, wide, depth, deep, packed_b);
        for (int64_t i = 0; i < tall; i += kPanel) {
          const int64_t high = std::min(kPanel, tall - i);
          const Matrix some_a = a.from(row + i, depth), some_b = b.from(depth, column);
          float* to = c + (row + i) * stride + column;
          multiply_panels<kParts>(packed_a + i / kPanel * panel_size, packed_b, steps, sums);
          if (kParts > 1 && has_no_number(sums)) {  // an infinity's smaller parts are none
            mindpeft::multiply(high, wide, deep, scale, some_a, some_b, keep, to, stride);
          } else {
            put(sums, high, wide, scale, keep, to, stride);
          }
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
