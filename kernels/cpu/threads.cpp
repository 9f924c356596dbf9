#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace falcon {

namespace {

constexpr int kSpins = 10000; // some 10 us; a task of several phases takes 10 to 100

struct Tasks {
    const std::function<void(std::size_t, std::size_t)> &task;
    std::size_t phases, tasks;
    alignas(64) std::atomic<std::size_t> next = 0; // of all phases' tasks, one after the other
    alignas(64) std::atomic<std::size_t> done = 0;

    static void work(void *argument) {
        auto &self = *static_cast<Tasks *>(argument);
        for (std::size_t i; (i = self.next.fetch_add(1, std::memory_order_relaxed)) < self.phases * self.tasks;) {
            const std::size_t phase = i / self.tasks;
            for (int spins = 0; self.done.load(std::memory_order_acquire) < phase * self.tasks; ++spins)
                if (spins > kSpins) // whoever has the last task may be waiting for this core
                    std::this_thread::yield();
            self.task(phase, i % self.tasks);
            self.done.fetch_add(1, std::memory_order_release);
        }
    }
};

// void GOMP_parallel(function, argument, threads, flags): runs function(argument) on each thread of a team.
using Region = void (*)(void (*)(void *), void *, unsigned, unsigned);

Region openmp() {
    static const auto found = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

void start_threads(std::size_t threads, Tasks &tasks) {
    std::vector<std::thread> others;
    try {
        while (others.size() + 1 < threads)
            others.emplace_back(Tasks::work, &tasks);
    } catch (const std::system_error &) {
        // as many as there are
    }
    Tasks::work(&tasks);
    for (std::thread &thread : others)
        thread.join();
}

bool forked = false;
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Free {
    void operator()(void *memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

struct Buffer {
    std::unique_ptr<void, Free> memory;
    std::size_t bytes = 0;
};

thread_local Buffer buffers[static_cast<std::size_t>(Use::kCount)];

} // namespace

void parallel(std::size_t threads, std::size_t phases, std::size_t count,
              const std::function<void(std::size_t, std::size_t)> &task, Team team) {
    Tasks tasks = {task, phases, count};
    if (std::min(threads, count) <= 1 || forked)
        Tasks::work(&tasks);
    else if (const Region region = team == Team::kTorchs ? openmp() : nullptr)
        region(Tasks::work, &tasks, static_cast<unsigned>(threads), 0); // always this number: libgomp restarts a team that grows
    else
        start_threads(std::min(threads, count), tasks);
}

std::vector<int> team_members(std::size_t threads) {
    struct Members {
        std::vector<int> numbers;
        std::atomic<std::size_t> next = 0;
        static void note(void *argument) {
            auto &self = *static_cast<Members *>(argument);
            if (const std::size_t i = self.next.fetch_add(1); i < self.numbers.size())
                self.numbers[i] = static_cast<int>(syscall(SYS_gettid));
        }
    };
    const Region region = threads > 1 && !forked ? openmp() : nullptr;
    Members members;
    members.numbers.resize(region ? threads : 1);
    if (region)
        region(Members::note, &members, static_cast<unsigned>(threads), 0);
    else
        Members::note(&members);
    members.numbers.resize(std::min(members.numbers.size(), members.next.load())); // OMP_THREAD_LIMIT may allow fewer
    return std::move(members.numbers);
}

void *scratch_bytes(Use use, std::size_t bytes) {
    Buffer &buffer = buffers[static_cast<std::size_t>(use)];
    if (buffer.bytes < bytes) {
        buffer.memory.reset(); // before the larger one is allocated: never both at once
        buffer.bytes = 0;
        buffer.memory.reset(::operator new(bytes, std::align_val_t(64)));
        buffer.bytes = bytes;
    }
    return buffer.memory.get();
}

std::size_t scratch_kept() {
    std::size_t bytes = 0;
    for (const Buffer &buffer : buffers)
        bytes += buffer.bytes;
    return bytes;
}

} // namespace falcon
