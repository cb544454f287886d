#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace mindpeft {
namespace {

constexpr int kMostThreads = 256;
int told = 0;  // how many threads, by use_threads

int wanted_threads() {
  const char* value = std::getenv("MINDPEFT_NUM_THREADS");
  const int number = told > 0 ? told : value == nullptr ? 0 : std::atoi(value);
  if (number > 0) return std::min(number, kMostThreads);
#ifdef __linux__
  cpu_set_t mine;  // a container or taskset may leave fewer cores than the machine has
  if (sched_getaffinity(0, sizeof(mine), &mine) == 0) return std::max(1, CPU_COUNT(&mine));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) std::thread([this] { serve(); }).detach();
  }

  int threads() const { return threads_; }

  void run(int64_t count, const std::function<void(int64_t)>& task) {
    std::unique_lock<std::mutex> mine(caller_, std::try_to_lock);
    if (count <= 1 || threads_ == 1 || !mine.owns_lock()) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0);
      ++number_;
    }
    const int64_t helpers = std::min<int64_t>(count, threads_) - 1;  // no more need to wake up
    for (int64_t i = 0; i < helpers; ++i) wake_.notify_one();
    work(task, count);
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = nullptr;  // who wakes up later finds nothing to do
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work(const std::function<void(int64_t)>& task, int64_t count) {
    for (int64_t i = next_.fetch_add(1); i < count; i = next_.fetch_add(1)) task(i);
  }

  void serve() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return task_ != nullptr && number_ != seen; });
      seen = number_;
      const auto* task = task_;
      const int64_t count = count_;
      ++busy_;
      lock.unlock();
      work(*task, count);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const int threads_;
  std::mutex caller_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  uint64_t number_ = 0;
  int busy_ = 0;
};

// Never destroyed: its threads may still sleep when the process ends.
Pool* pool = nullptr;
std::mutex making;

// A child has none of its parent's threads, and a lock that one of them held would never be released.
int mind_forks() {
  return pthread_atfork([] { making.lock(); }, [] { making.unlock(); },
                        [] {
                          pool = nullptr;
                          making.unlock();
                        });
}

Pool& the_pool() {
  static const int minded = mind_forks();  // once: handlers are a child's, too
  static_cast<void>(minded);
  std::lock_guard<std::mutex> lock(making);
  if (pool == nullptr) pool = new Pool(wanted_threads());
  return *pool;
}

}  // namespace

int thread_count() { return the_pool().threads(); }

void run_tasks(int64_t count, const std::function<void(int64_t)>& task) { the_pool().run(count, task); }

}  // namespace mindpeft

extern "C" __attribute__((visibility("default"))) void use_threads(int count) { mindpeft::told = count; }

extern "C" __attribute__((visibility("default"))) int threads_in_use() { return mindpeft::thread_count(); }
