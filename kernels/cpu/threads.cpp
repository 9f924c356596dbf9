#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <barrier>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace falcon {

void team(std::size_t threads, const std::function<void(std::size_t, std::size_t, const Sync &)> &work) {
    std::vector<std::thread> others;
    others.reserve(threads);
    std::unique_ptr<std::barrier<>> barrier;
    std::atomic<std::size_t> count = 0; // known, and the barrier built, once it is known how many threads there are
    const Sync sync = [&] { barrier->arrive_and_wait(); };
    try {
        while (others.size() + 1 < threads)
            others.emplace_back([&, index = others.size() + 1] {
                count.wait(0);
                work(index, count, sync);
            });
    } catch (const std::system_error &) {
        // as many as there are
    }
    barrier = std::make_unique<std::barrier<>>(static_cast<std::ptrdiff_t>(others.size() + 1));
    count = others.size() + 1;
    count.notify_all();
    work(0, count, sync);
    for (std::thread &thread : others)
        thread.join();
}

void split(std::size_t threads, std::size_t items, const std::function<void(std::size_t, std::size_t)> &work) {
    team(std::max<std::size_t>(1, std::min(threads, items)), [&](std::size_t index, std::size_t count, const Sync &) {
        work(items * index / count, items * (index + 1) / count);
    });
}

} // namespace falcon
