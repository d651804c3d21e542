#include "core/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <ctime>
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
std::atomic<bool> forked{false};

const int watched = pthread_atfork(nullptr, nullptr, [] {
  pool.store(nullptr);
  forked.store(true);
});

Pool& ThePool() {
  Pool* found = pool.load();
  if (found == nullptr) {
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

// OpenMP's entry, as GCC and Clang call it: function(argument) in so many threads, this one among them.
using OpenMpParallel = void (*)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);

// torch's, once it is loaded. In a forked child its threads are missing, and it would wait for them.
OpenMpParallel TorchsOpenMp() {
  static std::atomic<OpenMpParallel> found{nullptr};
  if (forked.load()) return nullptr;
  OpenMpParallel parallel = found.load(std::memory_order_relaxed);
  if (parallel == nullptr) {
    parallel = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(parallel, std::memory_order_relaxed);
  }
  return parallel;
}

// One of the threads that OpenMP keeps for this one, known by the clock of its CPU time.
class Teammate {
 public:
  // Whether it is spinning or at work; also where there is none that is known.
  bool MayBeAwake() const {
    if (has_helped_ && std::chrono::steady_clock::now() < helped_at_ + kRecent) return true;
    std::timespec before, after;
    if (!known_ || clock_gettime(clock_, &before) != 0) return true;
    const auto end = std::chrono::steady_clock::now() + kLook;
    while (std::chrono::steady_clock::now() < end) Pause();
    if (clock_gettime(clock_, &after) != 0) return true;
    return after.tv_sec != before.tv_sec || after.tv_nsec != before.tv_nsec;
  }

  // What it says of itself, from its own thread.
  void Introduce() { known_ = pthread_getcpuclockid(pthread_self(), &clock_) == 0; }

  // Whether it took a part of what there was to do, now that this is done.
  void Note(bool has_helped) {
    has_helped_ = has_helped;
    helped_at_ = std::chrono::steady_clock::now();
  }

 private:
  static constexpr std::chrono::microseconds kLook{1};
  // OpenMP's threads spin for several times as long, unless they are told not to.
  static constexpr std::chrono::milliseconds kRecent{3};

  bool known_ = false, has_helped_ = false;
  clockid_t clock_ = {};
  std::chrono::steady_clock::time_point helped_at_;
};

void RunInOpenMp(OpenMpParallel parallel, std::size_t chunks, int threads, const Work& work, Teammate& mate) {
  struct Shared {
    const Work& work;
    std::size_t chunks;
    Teammate& mate;
    std::thread::id caller = std::this_thread::get_id();
    std::atomic<std::size_t> next_chunk{0};
    std::atomic<int> next_thread{0};
    std::atomic<bool> introduced{false}, has_helped{false};
  } shared{work, chunks, mate};
  const auto take_chunks = [](void* argument) {
    Shared& all = *static_cast<Shared*>(argument);
    const bool helps = std::this_thread::get_id() != all.caller;
    if (helps && !all.introduced.exchange(true)) all.mate.Introduce();
    const int thread = all.next_thread.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const std::size_t chunk = all.next_chunk.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= all.chunks) return;
      if (helps) all.has_helped.store(true, std::memory_order_relaxed);
      all.work(chunk, thread);
    }
  };
  parallel(take_chunks, &shared, static_cast<unsigned>(threads), 0);
  mate.Note(shared.has_helped.load());
}

}  // namespace

void ParallelFor(std::size_t chunks, int threads, const Work& work) {
  threads = static_cast<int>(std::min(static_cast<std::size_t>(std::max(threads, 1)), chunks));
  if (threads > 1) {
    static thread_local Teammate mate;
    const OpenMpParallel parallel = TorchsOpenMp();
    if (parallel != nullptr && mate.MayBeAwake()) return RunInOpenMp(parallel, chunks, threads, work, mate);
    if (ThePool().TryRun(chunks, threads, work)) return;
  }
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) work(chunk, 0);
}

}  // namespace lago
