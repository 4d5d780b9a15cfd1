// Work shared among threads without a thread pool of our own: torch's idle OpenMP workers spin for a while after each of its loops,
// and a second pool would fight them for the cores. The binding passes in GOMP_parallel of the runtime that torch uses (libomp and
// libiomp5 have that entry too); where there is none, threads are started for each call.
#pragma once

#include <atomic>
#include <cstdint>

using Task = void (*)(void*);

// Runs `task(argument)` on each of up to `threads` threads, the calling one among them, and returns when all are done.
__attribute__((visibility("hidden"))) void run_on_threads(Task task, void* argument, int threads);

// body(begin, end) for consecutive pieces of 0 .. n. Whoever is free takes the next piece, so that which thread does what varies;
// results do not, as long as each piece writes only what is its own.
template <class Body>
void for_pieces(int64_t n, int64_t piece, int threads, const Body& body) {
    if (threads <= 1 || n <= piece) {
        if (n > 0) body(int64_t{0}, n);
        return;
    }
    struct Shared {
        const Body& body;
        int64_t n, piece;
        std::atomic<int64_t> next{0};
    } shared{body, n, piece};
    run_on_threads(
        [](void* argument) {
            Shared& shared = *static_cast<Shared*>(argument);
            while (true) {
                const int64_t begin = shared.next.fetch_add(shared.piece, std::memory_order_relaxed);
                if (begin >= shared.n) return;
                shared.body(begin, begin + shared.piece < shared.n ? begin + shared.piece : shared.n);
            }
        },
        &shared, threads);
}
