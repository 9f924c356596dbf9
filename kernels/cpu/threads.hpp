// Threads for the sweeps: torch's own OpenMP threads where torch is loaded.
//
// The extension does not link with OpenMP: its compiler's libgomp would be a second copy, besides the one in torch's wheel. For
// milliseconds after a parallel operation torch's threads spin, and all other threads share their cores with them: a
// Hadamard step at (128, 2048, 16384) took 7.7 ms with a pool of our own, no faster than one thread, and takes 4.2 with
// torch's. So the loaded runtime is looked up (GOMP_parallel, which LLVM's and Intel's have as well).
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace falcon {

// Runs task(phase, 0) ... task(phase, tasks - 1) of each phase, each once, on `threads` threads, the caller's among them, and
// returns when all are done. A free thread takes the next task. A phase begins when all tasks of the one before are done, not when
// all threads have arrived, so a thread that another process keeps off its core delays only the end. In a forked child, which
// has none of OpenMP's threads, the caller does everything. Without OpenMP, threads are started for the call. Tasks must not
// throw, and no result may depend on which thread ran a task.
//
// Team::kOwn always starts threads for the call. After a call torch's threads also spin, for milliseconds in which DALI could
// decode. If a call takes tens of milliseconds, starting threads is better (two 224 px views of full-size JPEGs on two cores,
// batches of 64: 900 images/s cropped instead of 795, 690 augmented instead of 600).
enum class Team { kTorchs, kOwn };
void parallel(std::size_t threads, std::size_t phases, std::size_t tasks,
              const std::function<void(std::size_t phase, std::size_t task)> &task, Team team = Team::kTorchs);

// The team for this number of pixels in views: 2^22 take 10 ms on two threads.
constexpr Team team_for(std::size_t pixels) { return pixels < (std::size_t(1) << 22) ? Team::kTorchs : Team::kOwn; }

// The kernel's numbers (gettid) of torch's OpenMP threads, the caller's among them, in a team of `threads`.
std::vector<int> team_members(std::size_t threads);

// At least `count` T, uninitialised and aligned to 64 bytes, owned by the calling thread and kept for its next call. New memory
// from the system costs 1.5 us per page here, 0.8 ms for the 2 MiB of a Hadamard segment's logits. Buffers in use at the same
// time need different values of `Use`. T must be trivial.
enum class Use { kLogits, kQuantised, kScale, kPanel, kRows, kDiagonals, kView, kCount };
void *scratch_bytes(Use, std::size_t bytes);
template <typename T> T *scratch(Use use, std::size_t count) {
    return static_cast<T *>(scratch_bytes(use, count * sizeof(T)));
}
// Bytes that the calling thread keeps.
std::size_t scratch_kept();

} // namespace falcon
