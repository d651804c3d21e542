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
#include <vector>

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

// The chunks of one loop. Each thread has a range of its own, the same from loop to loop, so that what the
// last one left in its core's caches is still there; then it takes what the others have left.
class Chunks {
 public:
  Chunks(std::size_t chunks, int threads) : ranges_(static_cast<std::size_t>(threads)) {
    const std::size_t n = ranges_.size();
    for (std::size_t i = 0; i < n; ++i) {
      ranges_[i].next.store(chunks * i / n, std::memory_order_relaxed);
      ranges_[i].end = chunks * (i + 1) / n;
    }
  }

  // Tells whether there was something left.
  bool Take(const Work& work, int thread) {
    bool has_taken = false;
    for (std::size_t i = 0; i < ranges_.size(); ++i) {
      Range& range = ranges_[(static_cast<std::size_t>(thread) + i) % ranges_.size()];
      for (;;) {
        const std::size_t chunk = range.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= range.end) break;
        has_taken = true;
        work(chunk, thread);
      }
    }
    return has_taken;
  }

 private:
  struct alignas(64) Range {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
  };

  std::vector<Range> ranges_;
};

class Pool {
 public:
  // False where another thread is running: nothing has been done then.
  bool TryRun(std::size_t chunks, int threads, const Work& work) {
    const std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
    if (!alone.owns_lock()) return false;
    Grow(threads - 1);
    Chunks shared(chunks, threads);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      chunks_ = &shared;
      seats_ = threads - 1;
      next_thread_ = 1;
    }
    wake_.notify_all();
    shared.Take(work, 0);
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
      Chunks& chunks = *chunks_;
      lock.unlock();
      chunks.Take(work, thread);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex running_;
  int workers_ = 0;  // under running_

  std::mutex mutex_;  // over all that follows
  std::condition_variable wake_, done_;
  const Work* work_ = nullptr;
  Chunks* chunks_ = nullptr;
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

// OpenMP's entry, as GCC and Clang call it: function(argument) in so many threads, this one among them. And
// which of these a thread is: 0 is this one, the others keep their numbers.
using OpenMpParallel = void (*)(void (*function)(void*), void* argument, unsigned threads, unsigned flags);
using OpenMpThread = int (*)();

template <typename Function>
Function Found(std::atomic<Function>& function, const char* name) {
  Function found = function.load(std::memory_order_relaxed);
  if (found == nullptr) {
    found = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
    function.store(found, std::memory_order_relaxed);
  }
  return found;
}

struct OpenMp {
  OpenMpParallel parallel;
  OpenMpThread thread;
};

// torch's, once it is loaded. In a forked child its threads are missing, and it would wait for them.
OpenMp TorchsOpenMp() {
  static std::atomic<OpenMpParallel> parallel{nullptr};
  static std::atomic<OpenMpThread> thread{nullptr};
  if (forked.load()) return {};
  return {Found(parallel, "GOMP_parallel"), Found(thread, "omp_get_thread_num")};
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

void RunInOpenMp(const OpenMp& open_mp, std::size_t chunks, int threads, const Work& work, Teammate& mate) {
  struct Shared {
    const Work& work;
    Chunks chunks;
    Teammate& mate;
    OpenMpThread thread;
    std::atomic<bool> introduced{false}, has_helped{false};
  } shared{work, {chunks, threads}, mate, open_mp.thread};
  const auto take_chunks = [](void* argument) {
    Shared& all = *static_cast<Shared*>(argument);
    const int thread = all.thread();
    if (thread != 0 && !all.introduced.exchange(true)) all.mate.Introduce();
    const bool has_taken = all.chunks.Take(all.work, thread);
    if (thread != 0 && has_taken) all.has_helped.store(true, std::memory_order_relaxed);
  };
  open_mp.parallel(take_chunks, &shared, static_cast<unsigned>(threads), 0);
  mate.Note(shared.has_helped.load());
}

}  // namespace

void ParallelFor(std::size_t chunks, int threads, const Work& work) {
  threads = static_cast<int>(std::min(static_cast<std::size_t>(std::max(threads, 1)), chunks));
  if (threads > 1) {
    static thread_local Teammate mate;
    const OpenMp open_mp = TorchsOpenMp();
    const bool found = open_mp.parallel != nullptr && open_mp.thread != nullptr;
    if (found && mate.MayBeAwake()) return RunInOpenMp(open_mp, chunks, threads, work, mate);
    if (ThePool().TryRun(chunks, threads, work)) return;
  }
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) work(chunk, 0);
}

}  // namespace lago
