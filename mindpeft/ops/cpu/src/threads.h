// A small pool of threads that sleep between kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace mindpeft {

// How many threads work at once.
int thread_count();

// Calls task(0), ..., task(count - 1), in any order and several at once. While the pool works for another
// caller, the calls are made one after the other: MindSpore may run several operators at the same time.
void run_tasks(int64_t count, const std::function<void(int64_t)>& task);

// Calls part(begin, end) for pieces of 0 ... count, of at least `least` each but the last.
template <typename Part>
void in_parallel(int64_t count, int64_t least, const Part& part) {
  if (count <= 0) return;
  const int64_t pieces = std::clamp<int64_t>(count / std::max<int64_t>(least, 1), 1, thread_count());
  if (pieces == 1) {
    part(int64_t{0}, count);
    return;
  }
  run_tasks(pieces, [&](int64_t i) { part(count * i / pieces, count * (i + 1) / pieces); });
}

}  // namespace mindpeft

// Lets that many threads work at once, from the first kernel on.
extern "C" void use_threads(int count);
extern "C" int threads_in_use();
