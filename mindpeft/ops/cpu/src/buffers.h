// Memory that kernels work in.
#pragma once

#include <cstdint>

namespace mindpeft {

// Memory of this thread that is kept from call to call; `slot` tells buffers that are in use together apart.
float* scratch(int slot, int64_t floats);

// The same, for one that all threads of a kernel work on; it is given back when the kernel ends.
class Shared {
 public:
  explicit Shared(int64_t floats);
  ~Shared();
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  float* data() const { return data_; }

 private:
  int64_t floats_;
  float* data_;
};

}  // namespace mindpeft
