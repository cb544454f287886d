#include "buffers.h"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace mindpeft {
namespace {

constexpr int kSlots = 10;
constexpr std::size_t kAlignment = 64;

float* allocate(int64_t floats) {
  const std::size_t bytes = (floats * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
  return static_cast<float*>(::operator new(std::max<std::size_t>(bytes, kAlignment), std::align_val_t(kAlignment)));
}

void release(float* data) { ::operator delete(data, std::align_val_t(kAlignment)); }

struct Buffer {
  float* data = nullptr;
  int64_t floats = 0;
  ~Buffer() { release(data); }
};

// Buffers that no kernel uses now. Given back to the C library, those of a middling size would leave holes in its
// heap, which small objects that live longer soon share: a step's heap grew by 80 MB for the 15 MB in use at once.
// Larger ones (mindpeft/memory.py sets that limit) are no part of the heap.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kLargest = 0;  // so that it sees where a buffer ends
#else
constexpr int64_t kLargest = (4 << 20) / sizeof(float);
#endif
constexpr int64_t kSmallest = 16384;

class Spares {
 public:
  bool keeps(int64_t floats) const { return floats >= kSmallest && floats <= kLargest; }

  // The smallest that is large enough; where none is, the largest makes room for a new one.
  float* take(int64_t* floats) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(buffers_.begin(), buffers_.end(),
                                    [&](const Spare& spare) { return spare.floats >= *floats; });
    if (found == buffers_.end()) {
      if (!buffers_.empty()) {
        release(buffers_.back().data);
        buffers_.pop_back();
      }
      return allocate(*floats);
    }
    const Spare spare = *found;
    buffers_.erase(found);
    *floats = spare.floats;
    return spare.data;
  }

  void give(float* data, int64_t floats) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place = std::find_if(buffers_.begin(), buffers_.end(),
                                    [&](const Spare& spare) { return spare.floats >= floats; });
    buffers_.insert(place, {data, floats});
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Spare {
    float* data;
    int64_t floats;
  };

  std::mutex mutex_;
  std::vector<Spare> buffers_;  // from the smallest to the largest
};

Spares& the_spares();

// A child could not release a lock that a thread of its parent's held.
int mind_forks() {
  return pthread_atfork([] { the_spares().mutex().lock(); }, [] { the_spares().mutex().unlock(); },
                        [] { the_spares().mutex().unlock(); });
}

// Never destroyed: kernels may still work when the process ends.
Spares& the_spares() {
  static Spares* const spares = new Spares;
  return *spares;
}

}  // namespace

float* scratch(int slot, int64_t floats) {
  thread_local Buffer buffers[kSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.floats < floats) {
    release(buffer.data);
    buffer.data = nullptr;
    buffer.data = allocate(floats);
    buffer.floats = floats;
  }
  return buffer.data;
}

Shared::Shared(int64_t floats) : floats_(floats) {
  static const int minded = mind_forks();
  static_cast<void>(minded);
  data_ = the_spares().keeps(floats) ? the_spares().take(&floats_) : allocate(floats);
}

Shared::~Shared() {
  if (the_spares().keeps(floats_)) {
    the_spares().give(data_, floats_);
  } else {
    release(data_);
  }
}

}  // namespace mindpeft
