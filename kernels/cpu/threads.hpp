// A team of threads for one call. Threads are started for each call and joined before it returns: no pool that a fork
// would leave behind, and no second OpenMP runtime beside the one torch ships.
#pragma once

#include <cstddef>
#include <functional>

namespace falcon {

// Waits until every thread of the team has come to the same place.
using Sync = std::function<void()>;

// Runs work(index, count, sync) on `count` threads at once, the caller's among them; fewer than `threads` where the system
// gives no more. `work` must not throw, and its results must not depend on `count`.
void team(std::size_t threads, const std::function<void(std::size_t index, std::size_t count, const Sync &)> &work);

// Splits [0, items) evenly over a team.
void split(std::size_t threads, std::size_t items, const std::function<void(std::size_t first, std::size_t last)> &work);

} // namespace falcon
