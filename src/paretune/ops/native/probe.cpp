// What this machine can do at most: bytes read per second from a buffer, and multiply-adds per second in registers.
//
// The buffer is kept between calls, so that a 15 ms probe allocates nothing. Threads live for one call (creating one
// takes tens of microseconds, outside the timed region): nothing spins beside PyTorch's pool afterwards.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr std::size_t kWidth = 64;
#elif defined(__AVX__)
constexpr std::size_t kWidth = 32;
#else
constexpr std::size_t kWidth = 16;
#endif
// aligned(8) and may_alias: a slice may start anywhere, and the buffer has no type of its own.
typedef std::uint64_t Words __attribute__((vector_size(kWidth), aligned(8), may_alias));
typedef float Floats __attribute__((vector_size(kWidth)));

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kStride = 8 * kWidth;            // bytes of one round of the eight accumulators
constexpr std::size_t kBetweenLooks = std::size_t{256} << 10;  // bytes between two looks at the clock, 5 to 25 us

using Clock = std::chrono::steady_clock;

struct Probe {
    char* data;
    std::size_t n_bytes;
    std::atomic<std::uint64_t> sink{0};  // keeps the sums alive
};

struct Slice {
    const char* begin;
    std::size_t n_bytes;
};

Slice slice_of(const Probe& probe, int n_threads, int thread) {
    const std::size_t n = probe.n_bytes / n_threads / kStride * kStride;
    return {probe.data + n * thread, n};
}

std::uint64_t sum(const char* p, std::size_t n_bytes) {
    Words s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{};
    for (const char* end = p + n_bytes; p < end; p += kStride) {
        const Words* w = reinterpret_cast<const Words*>(p);
        s0 += w[0]; s1 += w[1]; s2 += w[2]; s3 += w[3];
        s4 += w[4]; s5 += w[5]; s6 += w[6]; s7 += w[7];
    }
    s0 += s1 + s2 + s3 + s4 + s5 + s6 + s7;
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < kWidth / 8; ++i) total += s0[i];
    return total;
}

// Runs work(0 .. n-1) on the caller and n-1 new threads, all started together. Gives false where the system refuses
// a thread.
template <class Work>
bool run_team(int n_threads, Clock::time_point* start, const Work& work) {
    std::atomic<int> n_ready{0};
    std::atomic<int> go{0};  // 1: work, -1: leave
    std::vector<std::thread> team;
    bool ok = true;
    try {
        team.reserve(n_threads - 1);
        for (int i = 1; i < n_threads; ++i)
            team.emplace_back([&, i] {
                n_ready.fetch_add(1);
                int order;
                while ((order = go.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
                if (order > 0) work(i);
            });
    } catch (const std::exception&) {
        ok = false;
    }
    if (ok) {
        while (n_ready.load() < n_threads - 1) std::this_thread::yield();
        *start = Clock::now();
    }
    go.store(ok ? 1 : -1, std::memory_order_release);
    if (ok) work(0);
    for (std::thread& thread : team) thread.join();
    return ok;
}

double seconds_between(Clock::time_point a, Clock::time_point b) {
    return std::chrono::duration<double>(b - a).count();
}

}  // namespace

extern "C" {

// A buffer of at least n_bytes, each part first touched by the thread number that will read it. Null: no memory.
void* paretune_probe_new(std::size_t n_bytes, int n_threads) {
    if (n_threads < 1) return nullptr;
    const std::size_t least = kStride * n_threads;
    if (n_bytes < least) n_bytes = least;
    const std::size_t n_whole = (n_bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = nullptr;
    if (posix_memalign(&data, kHugePage, n_whole) != 0) return nullptr;
#if defined(__linux__)
    madvise(data, n_whole, MADV_HUGEPAGE);  // a wish: without it the page walks of 4 KiB pages cost bandwidth
#endif
    Probe* probe = new (std::nothrow) Probe{static_cast<char*>(data), n_bytes};
    Clock::time_point start;
    if (probe == nullptr || !run_team(n_threads, &start, [&](int i) {
            const Slice slice = slice_of(*probe, n_threads, i);
            std::memset(const_cast<char*>(slice.begin), i + 1, slice.n_bytes);
        })) {
        delete probe;
        std::free(data);
        return nullptr;
    }
    return probe;
}

void paretune_probe_free(void* handle) {
    Probe* probe = static_cast<Probe*>(handle);
    if (probe != nullptr) std::free(probe->data);
    delete probe;
}

// Reads the buffer again and again for about `seconds`; bytes per second of all threads together. 0: no threads.
// n_threads is at most what the buffer was made for (the bytes that each has are then at least one stride).
double paretune_probe_read(void* handle, int n_threads, double seconds) {
    Probe& probe = *static_cast<Probe*>(handle);
    std::vector<std::uint64_t> n_read(n_threads, 0);
    Clock::time_point start;
    const bool ok = run_team(n_threads, &start, [&](int i) {
        const Slice slice = slice_of(probe, n_threads, i);
        std::uint64_t total = 0, count = 0;
        std::size_t offset = 0, since_look = 0;
        for (;;) {
            const std::size_t left = slice.n_bytes - offset;
            const std::size_t n = left < kBetweenLooks ? left : kBetweenLooks;
            total += sum(slice.begin + offset, n);
            offset = offset + n == slice.n_bytes ? 0 : offset + n;
            count += n;
            since_look += n;
            if (since_look >= kBetweenLooks) {
                since_look = 0;
                if (seconds_between(start, Clock::now()) >= seconds) break;
            }
        }
        n_read[i] = count;
        probe.sink.fetch_add(total, std::memory_order_relaxed);
    });
    const double elapsed = seconds_between(start, Clock::now());
    if (!ok) return 0.0;
    double sum_read = 0;
    for (std::uint64_t n : n_read) sum_read += static_cast<double>(n);
    return sum_read / elapsed;
}

// fp32 multiply-adds on registers alone, as FLOP/s (a multiply-add counts 2) of all threads together. 0: no threads.
double paretune_probe_fma(int n_threads, double seconds) {
    constexpr int kChains = 12;   // latency 4 x two units, and room to spare; fits 16 registers
    constexpr int kRounds = 4096;
    std::vector<std::uint64_t> n_rounds(n_threads, 0);
    std::atomic<std::uint64_t> sink{0};
    Clock::time_point start;
    const bool ok = run_team(n_threads, &start, [&](int i) {
        Floats a[kChains];
        for (int c = 0; c < kChains; ++c) a[c] = Floats{} + static_cast<float>(c + i + 1);
        const Floats scale = Floats{} + 0.999f, shift = Floats{} + 0.001f;
        std::uint64_t count = 0;
        do {
            for (int r = 0; r < kRounds; ++r)
                for (int c = 0; c < kChains; ++c) a[c] = a[c] * scale + shift;
            count += kRounds;
        } while (seconds_between(start, Clock::now()) < seconds);
        float total = 0;
        for (int c = 0; c < kChains; ++c) total += a[c][0];
        n_rounds[i] = count;
        sink.fetch_add(static_cast<std::uint64_t>(total));
    });
    const double elapsed = seconds_between(start, Clock::now());
    if (!ok) return 0.0;
    double rounds = 0;
    for (std::uint64_t n : n_rounds) rounds += static_cast<double>(n);
    return rounds * kChains * (kWidth / sizeof(float)) * 2 / elapsed + (sink.load() == 1 ? 1e-9 : 0.0);
}

}  // extern "C"
