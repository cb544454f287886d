// Which numbers a dropout sets to zero: told by a hash of their place, so that no mask is kept for the way back.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mindpeft {

// Spreads the bits of a number over all of them (Appleby's finaliser of MurmurHash3).
inline uint32_t mixed(uint32_t bits) {
  bits = (bits ^ (bits >> 16)) * 0x85EBCA6Bu;
  bits = (bits ^ (bits >> 13)) * 0xC2B2AE35u;
  return bits ^ (bits >> 16);
}

// Noise of one call, from four floats: the share that is set to zero, what the others are multiplied by, and two
// random numbers.
class Noise {
 public:
  explicit Noise(const float* numbers) {
    share_ = numbers[0];
    kept_ = numbers[1];
    limit_ = static_cast<uint32_t>(std::fmin(share_ * 4294967296.0, 4294967295.0));
    uint32_t seeds[2];
    std::memcpy(seeds, numbers + 2, sizeof(seeds));
    seed_ = mixed(seeds[0] ^ mixed(seeds[1] + 0x9E3779B9u));
  }

  bool any() const { return share_ > 0.0f; }

  // What tells the numbers of one row.
  uint32_t row(int64_t number) const {
    return mixed(seed_ ^ mixed(static_cast<uint32_t>(number) ^ mixed(static_cast<uint32_t>(number >> 32) + 1)));
  }

  // What a number is multiplied by: 0, or what keeps the mean.
  float factor(uint32_t row, int64_t column) const {
    const uint32_t bits = mixed(row + static_cast<uint32_t>(column) * 0x9E3779B1u);
    return bits < limit_ ? 0.0f : kept_;
  }

 private:
  float share_, kept_;
  uint32_t limit_, seed_;
};

}  // namespace mindpeft
