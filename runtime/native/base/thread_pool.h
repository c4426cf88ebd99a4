// A persistent pool of threads that shares out the items of one loop at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace bezel {

// The calling thread takes part, so ThreadPool(1) starts no thread at all. Idle helpers spin briefly, because
// the kernels of one token follow each other within microseconds, and then sleep.
//
// A helper joins a loop only while it is open, and the caller waits only for those that joined: a helper that
// the system has put aside never holds up a loop that the others can finish.
//
// After fork() the child has none of the helpers, nor whoever held a lock: there a pool computes on the calling
// thread alone, with the same results. Make a new one for speed.
class ThreadPool {
 public:
  static constexpr int kMaxThreads = 1024;

  // Threads in all, the caller's included. Throws std::invalid_argument outside 1 … kMaxThreads, and
  // std::system_error where the system refuses to start one.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const noexcept { return static_cast<int>(helpers_->threads.size()) + 1; }

  // Calls fn(begin, end) on ranges of at most `grain` items that together cover 0 … n once, in any order and on
  // any thread. Small chunks from a shared counter, since laptops mix fast and slow cores. Callers on several
  // threads wait for each other; a call from inside fn would wait for ever.
  template <class F>
  void parallel_for(int64_t n, int64_t grain, F&& fn) {
    static_assert(std::is_nothrow_invocable_v<F&, int64_t, int64_t>, "nothing may be thrown across the pool");
    const auto call = [](const void* f, int64_t begin, int64_t end) noexcept {
      (*static_cast<const std::remove_reference_t<F>*>(f))(begin, end);
    };
    run({call, std::addressof(fn), n, grain});
  }

 private:
  struct Loop {
    void (*call)(const void* fn, int64_t begin, int64_t end) noexcept;
    const void* fn;
    int64_t n, grain;
  };

  struct Helpers {
    std::vector<std::thread> threads;
    std::mutex sleep;
    std::condition_variable wake;
  };

  bool orphaned() const noexcept;
  void run(const Loop& loop) noexcept;
  void help() noexcept;
  void work() noexcept;
  uint64_t wait_for_loop(uint64_t last) noexcept;
  void stop() noexcept;

  // state_ = number of the loop << 16 | helpers inside << 2 | stop << 1 | open, in one word so that joining,
  // leaving and closing cannot miss each other. loop_ is written only while closed and nobody is inside.
  static constexpr uint64_t kOpen = 1, kStop = 2, kHelper = 4, kHelpers = 0xFFFC;
  static constexpr int kNumberShift = 16;
  static_assert(kMaxThreads * kHelper <= kHelpers);

  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};  // on its own cache line: every chunk writes it
  alignas(64) Loop loop_{};
  std::atomic<int> sleeping_{0};
  std::mutex caller_mutex_;
  std::unique_ptr<Helpers> helpers_ = std::make_unique<Helpers>();
  const int forks_;  // before this pool
};

}  // namespace bezel
