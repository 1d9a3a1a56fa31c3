// The team of threads that walks a step: the caller and n - 1 others, which spin a little between steps and then sleep.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins a while, then yields: on a machine with fewer free cores than threads the other one has to get its turn.
class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  void wait() {
    if (n_ == 1) return;
    const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 4000) relax(); else std::this_thread::yield();
    }
  }

 private:
  const int n_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

class Team {
 public:
  // work(t) is what every thread t does in a step. It must not return before all threads are done with what the caller
  // handed over (it ends with a barrier).
  Team(int n, std::function<void(int)> work) : barrier(n), size(n), work_(std::move(work)) {
    try {
      for (int t = 1; t < n; ++t) threads_.emplace_back([this, t] { serve(t); });
    } catch (...) {
      stop();  // no destructor runs for an object that was not finished
      throw;
    }
  }
  ~Team() { stop(); }
  Team(const Team&) = delete;

  void run() {
    ticket_.fetch_add(1);  // sequentially consistent: a thread that is about to park sees it or is counted as parked
    if (n_parked_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    work_(0);
  }

  Barrier barrier;
  const int size;

 private:
  static constexpr auto kSpin = std::chrono::microseconds(50);

  void stop() {
    is_over_.store(true);
    ticket_.fetch_add(1);
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  void serve(int t) {
    std::uint64_t seen = 0;
    for (;;) {
      const auto from = std::chrono::steady_clock::now();
      int looks = 0;
      while (ticket_.load(std::memory_order_acquire) == seen) {
        relax();
        if (++looks % 256 != 0 || std::chrono::steady_clock::now() - from < kSpin) continue;
        std::unique_lock<std::mutex> lock(mutex_);
        n_parked_.fetch_add(1);
        wake_.wait(lock, [&] { return ticket_.load() != seen; });
        n_parked_.fetch_sub(1);
      }
      ++seen;
      if (is_over_.load()) return;
      work_(t);
    }
  }

  std::function<void(int)> work_;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<std::uint64_t> ticket_{0};
  std::atomic<bool> is_over_{false};
  std::atomic<int> n_parked_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};
