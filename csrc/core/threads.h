// A loop over chunks of work on several threads.
#ifndef LAGO_CORE_THREADS_H_
#define LAGO_CORE_THREADS_H_

#include <cstddef>
#include <functional>

namespace lago {

// Calls work(chunk, thread) once for each chunk in [0, chunks), on at most `threads` threads, this one among
// them; `thread` is in [0, threads), and no two calls with the same one overlap. Each thread
// has a part of the chunks of its own, and helps the others when it is done: what the work computes must not
// depend on who takes what. `work` must not throw.
//
// The threads are those of torch's OpenMP, which spin for some milliseconds after each of torch's own loops:
// others would have to share the cores with them. Where there is none, and in a forked child, the threads are
// this library's: they spin for a moment between calls, then sleep; a second call while one runs, from
// another thread, does its work alone.
void ParallelFor(std::size_t chunks, int threads, const std::function<void(std::size_t, int)>& work);

}  // namespace lago

#endif  // LAGO_CORE_THREADS_H_
