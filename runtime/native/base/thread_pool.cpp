#include "base/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace bezel {
namespace {

constexpr auto kSpin = std::chrono::microseconds(100);  // several times the gap between two kernels of a token
constexpr int kPausesPerLook = 64;                      // between looks at the clock

void pause() noexcept {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ volatile("yield");
#endif
}

// How often this process and its ancestors were forked since the first pool.
std::atomic<int>& forks() {
  static std::atomic<int> count{0};
#if !defined(_WIN32)
  static const int watched = pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(watched);
#endif
  return count;
}

}  // namespace

ThreadPool::ThreadPool(int threads) : forks_(forks().load(std::memory_order_relaxed)) {
  if (threads < 1 || threads > kMaxThreads)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 to " +
                                std::to_string(kMaxThreads));
  helpers_->threads.reserve(static_cast<size_t>(threads) - 1);
  try {
    while (this->threads() < threads) helpers_->threads.emplace_back([this] { help(); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

bool ThreadPool::orphaned() const noexcept { return forks().load(std::memory_order_relaxed) != forks_; }

void ThreadPool::stop() noexcept {
  if (orphaned()) {
    static_cast<void>(helpers_.release());  // what waits for threads that are gone would wait for ever
    return;
  }
  state_.fetch_or(kStop);
  { std::lock_guard<std::mutex> lock(helpers_->sleep); }  // nobody is now between its last look and its sleep
  helpers_->wake.notify_all();
  for (std::thread& helper : helpers_->threads) helper.join();
}

void ThreadPool::run(const Loop& loop) noexcept {
  if (loop.n <= 0) return;
  if (orphaned()) {
    for (int64_t i = 0; i < loop.n; i += loop.grain) loop.call(loop.fn, i, std::min(i + loop.grain, loop.n));
    return;
  }
  std::lock_guard<std::mutex> lock(caller_mutex_);
  loop_ = loop;
  next_.store(0, std::memory_order_relaxed);
  if (helpers_->threads.empty() || loop.n <= loop.grain) return work();

  // Sequentially consistent here and in wait_for_loop: either this thread sees the sleeper, or the sleeper
  // sees the loop.
  const uint64_t number = (state_.load(std::memory_order_relaxed) >> kNumberShift) + 1;
  state_.store(number << kNumberShift | kOpen);
  if (sleeping_.load() > 0) {
    { std::lock_guard<std::mutex> sleep_lock(helpers_->sleep); }
    helpers_->wake.notify_all();
  }
  work();
  state_.fetch_and(~kOpen, std::memory_order_relaxed);
  for (int i = 1; (state_.load(std::memory_order_acquire) & kHelpers) != 0; ++i)
    i % kPausesPerLook == 0 ? std::this_thread::yield() : pause();
}

void ThreadPool::work() noexcept {
  for (;;) {
    const int64_t begin = next_.fetch_add(loop_.grain, std::memory_order_relaxed);
    if (begin >= loop_.n) return;
    loop_.call(loop_.fn, begin, std::min(begin + loop_.grain, loop_.n));
  }
}

void ThreadPool::help() noexcept {
  for (uint64_t last = 0;;) {
    uint64_t state = wait_for_loop(last);
    if (state & kStop) return;
    last = state >> kNumberShift;
    while (state & kOpen && state >> kNumberShift == last) {
      if (!state_.compare_exchange_weak(state, state + kHelper, std::memory_order_acquire)) continue;
      work();
      state_.fetch_sub(kHelper, std::memory_order_release);
      break;
    }
  }
}

// The state that holds an open loop other than number `last`, or the order to stop.
uint64_t ThreadPool::wait_for_loop(uint64_t last) noexcept {
  uint64_t state;
  const auto found = [&] {
    state = state_.load();
    return state & kStop || (state & kOpen && state >> kNumberShift != last);
  };
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerLook; ++i, pause())
      if (found()) return state;
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < until);

  std::unique_lock<std::mutex> lock(helpers_->sleep);
  ++sleeping_;
  helpers_->wake.wait(lock, found);
  --sleeping_;
  return state;
}

}  // namespace bezel
