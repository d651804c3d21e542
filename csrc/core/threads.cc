#include "core/threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lago {
namespace {

using Work = std::function<void(std::size_t, int)>;

// To wake a thread that sleeps takes about as long as half a minibatch's pass; the next piece of work mostly
// comes sooner.
constexpr std::chrono::microseconds kSpin(200);

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Waits for a condition without sleeping, at most kSpin; tells whether it was met. Others may have the core
// meanwhile.
template <typename Condition>
bool SpinUntil(const Condition& met) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (met()) return true;
      Pause();
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  return met();
}

class Pool {
 public:
  // False where another thread is running: nothing has been done then.
  bool TryRun(std::size_t chunks, int threads, const Work& work) {
    const std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
    if (!alone.owns_lock()) return false;
    Grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      chunks_ = chunks;
      next_chunk_.store(0, std::memory_order_relaxed);
      seats_ = threads - 1;
      next_thread_ = 1;
    }
    wake_.notify_all();
    TakeChunks(work, chunks, 0);
    {
      // Who has not woken up by now is not waited for.
      const std::lock_guard<std::mutex> lock(mutex_);
      seats_ = 0;
    }
    if (SpinUntil([this] { return busy_ == 0; })) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    return true;
  }

 private:
  void Grow(int workers) {
    for (; workers_ < workers; ++workers_) {
      try {
        std::thread([this] { Serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // as many as the system gives; the results are the same
      }
    }
  }

  void Serve() {
    for (;;) {
      const bool called = SpinUntil([this] { return seats_ > 0; });
      std::unique_lock<std::mutex> lock(mutex_);
      if (called && seats_ == 0) continue;  // too late
      wake_.wait(lock, [this] { return seats_ > 0; });
      --seats_;
      ++busy_;
      const int thread = next_thread_++;
      const Work& work = *work_;
      const std::size_t chunks = chunks_;
      lock.unlock();
      TakeChunks(work, chunks, thread);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void TakeChunks(const Work& work, std::size_t chunks, int thread) {
    for (;;) {
      const std::size_t chunk = next_chunk_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks) return;
      work(chunk, thread);
    }
  }

  std::mutex running_;
  int workers_ = 0;  // under running_
  std::atomic<std::size_t> next_chunk_{0};

  std::mutex mutex_;  // over all that follows
  std::condition_variable wake_, done_;
  const Work* work_ = nullptr;
  std::size_t chunks_ = 0;
  std::atomic<int> seats_{0};  // workers that may still join; written under mutex_, as busy_ is
  std::atomic<int> busy_{0};
  int next_thread_ = 1;
};

// Never destroyed: workers that sleep in it outlive main. A forked child has no workers and forgets the pool.
std::atomic<Pool*> pool{nullptr};

Pool& ThePool() {
  static const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  static_cast<void>(at_fork);
  Pool* found = pool.load();
  if (found == nullptr) {
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void ParallelFor(std::size_t chunks, int threads, const Work& work) {
  threads = static_cast<int>(std::min(static_cast<std::size_t>(std::max(threads, 1)), chunks));
  if (threads > 1 && ThePool().TryRun(chunks, threads, work)) return;
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) work(chunk, 0);
}

}  // namespace lago
