// Kernels for inference on a CPU: products with quantised matrices, and the small pieces between.
//
// How to read this file. A processor adds or multiplies many numbers by one instruction. Everything
// here counts in 16 "lanes": `Floats` is 16 floats and `Ints` 16 integers of 32 bits, be that one
// register (AVX-512), two (AVX2) or four (NEON). A matrix lies in tiles of 16 rows (tiles.py), so
// lane l of every register belongs to row l of the tile, and a product never sums across lanes.
//
//   1  lanes         Floats and Ints, and the few steps that need a processor's own instructions
//   2  threads       a pool that splits work into tasks
//   3  activations   the left side of a product, as 16-bit integers
//   4  weights       bytes of a tile -> codes, scales, offsets
//   5  products      y = x W^T
//   6  pieces        norm, rotation, cache, attention, gate
//
// Each kernel takes one struct of arguments, so that a list of calls can be replayed (run_program).
// Letters: n rows of x (tokens), h heads, k key-value heads, d features of a head.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#ifndef _WIN32
#include <unistd.h>
#endif

#if defined(SCRATCHLM_PLAIN)  // for tests: what a processor without these instructions computes
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define WITH_AVX512
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define WITH_AVX2
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define WITH_NEON
#endif
#ifdef WITH_NEON
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// =============================================================================== 1 lanes

constexpr int LANES = 16;
#if defined(WITH_AVX512)
constexpr int WIDTH = 64;  // bytes of a register
constexpr int ROWS_AT_ONCE = 8;  // rows of x that share an unpacked weight: what registers can hold
#elif defined(WITH_AVX2)
constexpr int WIDTH = 32;
constexpr int ROWS_AT_ONCE = 4;
#else
constexpr int WIDTH = 16;
constexpr int ROWS_AT_ONCE = 4;
#endif
constexpr int PARTS = 64 / WIDTH;

typedef float FloatPart __attribute__((vector_size(WIDTH)));
typedef int32_t IntPart __attribute__((vector_size(WIDTH)));

template <class Part>
struct Lanes {
    Part part[PARTS];
};
using Floats = Lanes<FloatPart>;
using Ints = Lanes<IntPart>;

#define LANEWISE(op)                                                            \
    template <class Part>                                                       \
    INLINE Lanes<Part> operator op(Lanes<Part> a, const Lanes<Part>& b) {       \
        for (int p = 0; p < PARTS; p++) a.part[p] = a.part[p] op b.part[p];     \
        return a;                                                               \
    }
LANEWISE(+)
LANEWISE(-)
LANEWISE(*)
LANEWISE(/)
LANEWISE(&)
LANEWISE(|)
LANEWISE(^)

INLINE Ints operator<<(Ints a, int bits) {
    for (int p = 0; p < PARTS; p++) a.part[p] = a.part[p] << bits;
    return a;
}
INLINE Ints operator>>(Ints a, int bits) {  // callers mask the sign away
    for (int p = 0; p < PARTS; p++) a.part[p] = a.part[p] >> bits;
    return a;
}

INLINE Floats same(float x) {
    Floats r;
    for (int p = 0; p < PARTS; p++) r.part[p] = x - FloatPart{};
    return r;
}
INLINE Ints same_int(int32_t x) {
    Ints r;
    for (int p = 0; p < PARTS; p++) r.part[p] = x - IntPart{};
    return r;
}
template <class T>
INLINE T load(const void* from) {
    T r;
    std::memcpy(&r, from, sizeof(T));
    return r;
}
// Register by register: as one copy of 64 bytes, some compilers take a detour through memory.
INLINE Floats load_floats(const void* from) {
    Floats r;
    for (int p = 0; p < PARTS; p++) r.part[p] = load<FloatPart>((const char*)from + p * WIDTH);
    return r;
}
INLINE Ints load_ints(const void* from) {
    Ints r;
    for (int p = 0; p < PARTS; p++) r.part[p] = load<IntPart>((const char*)from + p * WIDTH);
    return r;
}
INLINE void store(void* to, const Floats& x) {
    for (int p = 0; p < PARTS; p++) std::memcpy((char*)to + p * WIDTH, &x.part[p], WIDTH);
}
INLINE void store(void* to, const Ints& x) {
    for (int p = 0; p < PARTS; p++) std::memcpy((char*)to + p * WIDTH, &x.part[p], WIDTH);
}
INLINE Floats load_some(const float* from, int64_t count) {  // lanes behind `count` are 0
    if (count >= LANES) return load_floats(from);
    float t[LANES] = {};
    for (int l = 0; l < count; l++) t[l] = from[l];
    return load_floats(t);
}
INLINE void store_some(float* to, const Floats& x, int64_t count) {
    if (count >= LANES) return store(to, x);
    float t[LANES];
    store(t, x);
    for (int l = 0; l < count; l++) to[l] = t[l];
}
INLINE Ints bits_of(const Floats& x) {
    Ints r;
    for (int p = 0; p < PARTS; p++) r.part[p] = (IntPart)x.part[p];
    return r;
}
INLINE Floats as_floats(const Ints& x) {
    Floats r;
    for (int p = 0; p < PARTS; p++) r.part[p] = (FloatPart)x.part[p];
    return r;
}
INLINE Floats to_floats(const Ints& x) {
    Floats r;
    for (int p = 0; p < PARTS; p++) r.part[p] = __builtin_convertvector(x.part[p], FloatPart);
    return r;
}
INLINE Floats larger(Floats a, const Floats& b) {
    for (int p = 0; p < PARTS; p++) a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
    return a;
}
INLINE Floats smaller(Floats a, const Floats& b) {
    for (int p = 0; p < PARTS; p++) a.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
    return a;
}
// x in the lanes `from` to `to`, `other` in the rest.
INLINE Floats within(int from, int to, Floats x, float other) {
    float t[LANES];
    store(t, x);
    for (int l = 0; l < LANES; l++) t[l] = l >= from && l < to ? t[l] : other;
    return load_floats(t);
}
INLINE Floats magnitude(const Floats& a) { return as_floats(bits_of(a) & same_int(0x7fffffff)); }

// To the nearest integer: adding 1.5 * 2^23 pushes the fraction out of the mantissa.
INLINE Ints nearest(const Floats& x) {
    const Floats magic = same(12582912.0f);
    return bits_of(x + magic) - bits_of(magic);
}

INLINE float sum(const Floats& x) {
#if defined(WITH_AVX512)
    return _mm512_reduce_add_ps((__m512)x.part[0]);
#endif
    FloatPart s = x.part[0];
    for (int p = 1; p < PARTS; p++) s += x.part[p];
    float t[WIDTH / 4];
    std::memcpy(t, &s, WIDTH);
    for (int w = WIDTH / 8; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] += t[i + w];
    return t[0];
}
INLINE float largest(const Floats& x) {
#if defined(WITH_AVX512)
    return _mm512_reduce_max_ps((__m512)x.part[0]);
#endif
    float t[LANES];
    store(t, x);
    for (int w = LANES / 2; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] = std::max(t[i], t[i + w]);
    return t[0];
}

// e^x with a relative error of 2e-7: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
INLINE Floats exponential(Floats x) {
    x = smaller(same(88.0f), larger(same(-87.0f), x));
    const Ints n = nearest(x * same(1.44269504f));
    const Floats whole = to_floats(n);
    const Floats r = x - whole * same(0.693359375f) + whole * same(2.12194440e-4f);
    Floats y = same(1.9875691500e-4f);
    y = y * r + same(1.3981999507e-3f);
    y = y * r + same(8.3334519073e-3f);
    y = y * r + same(4.1665795894e-2f);
    y = y * r + same(1.6666665459e-1f);
    y = y * r + same(5.0000001201e-1f);
    y = y * r * r + r + same(1.0f);
    return y * as_floats((n + same_int(127)) << 23);
}
INLINE Floats hyperbolic_tangent(const Floats& x) {
    const Floats one = same(1.0f), e = exponential(x + x);
    return one - same(2.0f) / (e + one);
}

// 16 numbers of two bytes as integers.
INLINE Ints load_halves(const void* from) {
    typedef uint16_t Half __attribute__((vector_size(WIDTH / 2)));
    Ints r;
    for (int p = 0; p < PARTS; p++)
        r.part[p] = __builtin_convertvector(
            load<Half>((const char*)from + p * sizeof(Half)), IntPart);
    return r;
}
INLINE Ints load_bytes(const uint8_t* from) {
    int32_t t[LANES];
    for (int l = 0; l < LANES; l++) t[l] = from[l];
    return load_ints(t);
}
INLINE Ints load_signed_bytes(const uint8_t* from) {
    int32_t t[LANES];
    for (int l = 0; l < LANES; l++) t[l] = (int8_t)from[l];
    return load_ints(t);
}
INLINE Floats load_fp16(const void* from) {
#if defined(WITH_AVX512)
    return {(FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from))};
#elif defined(WITH_AVX2)
    const __m128i* h = (const __m128i*)from;
    return {(FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(h)),
            (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
#else
    // Exponent and mantissa in their fp32 places; 2^112 corrects the exponent's bias, for the
    // smallest (denormal) numbers as well. The largest exponent is that of what is not finite.
    const Ints h = load_halves(from), rest = h & same_int(0x7fff);
    const Floats size = as_floats(rest << 13) * same(5.192296858534828e33f);
    const Ints odd = ((rest + same_int(0x0400)) >> 15) * same_int(0x7f800000);
    return as_floats(bits_of(size) | odd | ((h & same_int(0x8000)) << 16));
#endif
}
INLINE Floats load_bf16(const void* from) { return as_floats(load_halves(from) << 16); }

// 16 entries of a table of 16, by the low four bits of each lane.
INLINE Floats look_up(const Floats& table, const Ints& index) {
#if defined(WITH_AVX512)
    return {(FloatPart)_mm512_permutexvar_ps((__m512i)index.part[0], (__m512)table.part[0])};
#elif defined(WITH_AVX2)
    Floats r;  // entries 0 to 7 and 8 to 15; bit 3, moved to the sign, chooses
    for (int p = 0; p < PARTS; p++) {
        const __m256i i = (__m256i)index.part[p];
        const __m256 low = _mm256_permutevar8x32_ps((__m256)table.part[0], i);
        const __m256 high = _mm256_permutevar8x32_ps((__m256)table.part[1], i);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
        r.part[p] = (FloatPart)_mm256_blendv_ps(low, high, upper);
    }
    return r;
#else
    float t[LANES], r[LANES];
    int32_t i[LANES];
    store(t, table);
    store(i, index);
    for (int l = 0; l < LANES; l++) r[l] = t[i[l] & 15];
    return load_floats(r);
#endif
}

// Lane l of the result is the sum over the lanes of x[l]: 16 sums for the price of a few.
INLINE Floats sums_of_each(const Floats x[LANES]) {
#if defined(WITH_AVX512)
    __m512 four[4];  // four[j] has in each quarter the four partial sums of x[4j] to x[4j + 3]
    for (int j = 0; j < 4; j++) {
        const __m512 a = (__m512)x[4 * j].part[0], b = (__m512)x[4 * j + 1].part[0];
        const __m512 c = (__m512)x[4 * j + 2].part[0], d = (__m512)x[4 * j + 3].part[0];
        const __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
        const __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
        four[j] = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
    }
    const __m512 low = _mm512_shuffle_f32x4(four[0], four[1], 0x88) +
                       _mm512_shuffle_f32x4(four[0], four[1], 0xdd);
    const __m512 high = _mm512_shuffle_f32x4(four[2], four[3], 0x88) +
                        _mm512_shuffle_f32x4(four[2], four[3], 0xdd);
    return {(FloatPart)(_mm512_shuffle_f32x4(low, high, 0x88) +
                        _mm512_shuffle_f32x4(low, high, 0xdd))};
#else
    float r[LANES];
    for (int l = 0; l < LANES; l++) r[l] = sum(x[l]);
    return load_floats(r);
#endif
}

// Four neighbouring inputs, ready to meet a vector of codes (four inputs of 16 rows, a byte each).
// An activation is a 16-bit integer. Processors that multiply bytes take it as two: 256 high + low.
struct Quad {
#if defined(WITH_AVX512) || defined(WITH_NEON)
    int8_t high[4], low[4];
#elif defined(WITH_AVX2)
    int16_t even[2], odd[2];
#else
    int16_t x[4];
#endif
};

INLINE void store_quads(const Ints& x, Quad* to) {  // 16 inputs
#if defined(WITH_AVX512)
    const __m128i high = _mm512_cvtepi32_epi8((__m512i)((x + same_int(128)) >> 8).part[0]);
    const __m128i low = _mm512_cvtepi32_epi8((__m512i)x.part[0]);
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi32(high, low));
    _mm_storeu_si128((__m128i*)(to + 2), _mm_unpackhi_epi32(high, low));
#else
    int32_t t[LANES];
    store(t, x);
    for (int i = 0; i < LANES; i++) {
        Quad& q = to[i / 4];
#if defined(WITH_NEON)
        q.high[i % 4] = (int8_t)((t[i] + 128) >> 8);
        q.low[i % 4] = (int8_t)t[i];
#elif defined(WITH_AVX2)
        int16_t* half = i % 2 ? q.odd : q.even;
        half[i % 4 / 2] = (int16_t)t[i];
#else
        q.x[i % 4] = (int16_t)t[i];
#endif
    }
#endif
}

// A running sum of codes times activations, exact: 32 products of 8 and 16 bits fit into 32.
#if defined(WITH_AVX512) || defined(WITH_NEON)
struct Sum {
    Ints high, low;
};
INLINE Ints total(const Sum& s) { return (s.high << 8) + s.low; }
#else
struct Sum {
    Ints all;
};
INLINE Ints total(const Sum& s) { return s.all; }
#endif

// What NEON takes from codes of 8 bits, because it multiplies signed bytes only.
#if defined(WITH_NEON)
constexpr int TAKEN_FROM_BYTES = 128;
#else
constexpr int TAKEN_FROM_BYTES = 0;
#endif

INLINE void add_product(Sum& s, const Ints& codes, const Quad& x) {
#if defined(WITH_AVX512)
    const __m512i w = (__m512i)codes.part[0];
    const __m512i high = _mm512_set1_epi32(load<int32_t>(x.high));
    const __m512i low = _mm512_set1_epi32(load<int32_t>(x.low));
    s.high.part[0] = (IntPart)_mm512_dpbusd_epi32((__m512i)s.high.part[0], w, high);
    s.low.part[0] = (IntPart)_mm512_dpbusd_epi32((__m512i)s.low.part[0], w, low);
#elif defined(WITH_AVX2)
    // Codes 0 and 2 of each four as 16-bit numbers, then codes 1 and 3: no product can overflow.
    const __m256i even = _mm256_set1_epi32(load<int32_t>(x.even));
    const __m256i odd = _mm256_set1_epi32(load<int32_t>(x.odd));
    for (int p = 0; p < PARTS; p++) {
        const __m256i w = (__m256i)codes.part[p];
        const __m256i w02 = _mm256_and_si256(w, _mm256_set1_epi16(255));
        const __m256i w13 = _mm256_srli_epi16(w, 8);
        s.all.part[p] += (IntPart)_mm256_madd_epi16(w02, even);
        s.all.part[p] += (IntPart)_mm256_madd_epi16(w13, odd);
    }
#elif defined(WITH_NEON)
    const int8x16_t high = vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(x.high)));
    const int8x16_t low = vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(x.low)));
    for (int p = 0; p < PARTS; p++) {
        const int8x16_t w = (int8x16_t)codes.part[p];
        s.high.part[p] = (IntPart)vdotq_s32((int32x4_t)s.high.part[p], w, high);
        s.low.part[p] = (IntPart)vdotq_s32((int32x4_t)s.low.part[p], w, low);
    }
#else
    for (int i = 0; i < 4; i++)
        s.all = s.all + ((codes >> (8 * i)) & same_int(255)) * same_int(x.x[i]);
#endif
}

// ============================================================================= 2 threads

INLINE void rest_a_moment() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Looks again and again whether something has come, for `most` microseconds; after `alone` of them
// it lets others have the core between two looks.
template <class Come>
static bool watch(int64_t alone, int64_t most, const Come& come) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    for (;;) {
        for (int turn = 0; turn < 64; turn++, rest_a_moment())
            if (come()) return true;
        const auto past = Clock::now() - start;
        if (past >= std::chrono::microseconds(most)) return false;
        if (past >= std::chrono::microseconds(alone)) std::this_thread::yield();
    }
}

static long this_process() {
#ifdef _WIN32
    return 0;
#else
    return (long)getpid();
#endif
}

// Workers watch for a job for a while, longer than the time between two layers or two tokens, and
// then go to sleep. A job is closed by its caller as soon as no task is left, so a worker that is
// late, because it slept or another program has its core, costs nothing. The caller waits only for
// workers that are at a task; if that takes long it sleeps, so that they get a core.
class Pool {
public:
    using Body = void (*)(const void*, int64_t);
    const long process = this_process();

    void run(int64_t threads, int64_t tasks, Body body, const void* context) {
        const std::unique_lock<std::mutex> ours(in_use, std::try_to_lock);
        if (!ours) {  // another thread of the program has the pool
            for (int64_t i = 0; i < tasks; i++) body(context, i);
            return;
        }
        try {
            for (; (int64_t)started < threads - 1; started++)
                std::thread(&Pool::work, this, started).detach();
        } catch (const std::exception&) {  // the system gives no more of them: fewer do as well
        }
        job_body = body, job_context = context, job_tasks = tasks;
        next.store(0);
        helpers_wanted = threads - 1;
        state.store((state.load() & ~(STEP - 1)) + STEP + OPEN);
        if (sleeping.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex); }
            wake.notify_all();
        }
        take_tasks();
        state.fetch_sub(OPEN);
        const auto finished = [&] { return !(state.load() & (OPEN - 1)); };
        if (finished() || watch(500, 500, finished)) return;
        std::unique_lock<std::mutex> lock(mutex);
        asleep.store(true);
        done.wait(lock, finished);
        asleep.store(false);
    }

private:
    // `state` is one number: the job's number, whether it is open, and how many helpers are in it.
    static constexpr uint64_t OPEN = 1 << 16, STEP = 1 << 17;
    std::atomic<uint64_t> state{0};
    std::atomic<int64_t> next{0};
    std::atomic<int> sleeping{0};  // workers
    std::atomic<bool> asleep{false};  // the caller
    std::mutex in_use, mutex;
    std::condition_variable wake, done;
    size_t started = 0;
    Body job_body = nullptr;
    const void* job_context = nullptr;
    int64_t job_tasks = 0;
    std::atomic<int64_t> helpers_wanted{0};

    void take_tasks() {
        for (int64_t i; (i = next.fetch_add(1)) < job_tasks;) job_body(job_context, i);
    }

    bool enter(uint64_t& last, size_t number) {
        uint64_t now = state.load();
        while ((now & OPEN) && now / STEP != last) {
            if ((int64_t)number >= helpers_wanted.load()) return false;
            if (state.compare_exchange_weak(now, now + 1)) {
                last = now / STEP;
                return true;
            }
        }
        return false;
    }

    void leave() {
        state.fetch_sub(1);
        if (asleep.load()) {
            { std::lock_guard<std::mutex> lock(mutex); }
            done.notify_one();
        }
    }

    void work(size_t number) {
        for (uint64_t last = 0;;) {
            const auto come = [&] { return enter(last, number); };
            if (!watch(50, 1000, come)) {
                std::unique_lock<std::mutex> lock(mutex);
                sleeping.fetch_add(1);
                wake.wait(lock, come);
                sleeping.fetch_sub(1);
            }
            take_tasks();
            leave();
        }
    }
};

// Never destroyed, as workers may outlive main. A forked process has none of the workers of the
// first one, which may have held the pool's locks, and makes a pool of its own.
static Pool* pool() {
    static std::atomic<Pool*> pool{nullptr};
    Pool* found = pool.load();
    if (found && found->process == this_process()) return found;
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(found, fresh)) return fresh;
    delete fresh;  // another thread was faster
    return found;
}

template <class Body>
static void in_parallel(int64_t threads, int64_t tasks, const Body& body) {
    threads = std::min(threads, tasks);
    if (threads < 2) {
        for (int64_t i = 0; i < tasks; i++) body(i);
        return;
    }
    pool()->run(threads, tasks,
                [](const void* context, int64_t i) { (*(const Body*)context)(i); }, &body);
}

// A hand-over to another core costs some microseconds, in which a core does a million products.
static int64_t worth(int64_t threads, int64_t products) {
    return products < 1 << 20 ? 1 : threads;
}

// Rows in tasks that are worth a hand-over to another thread.
template <class Body>
static void for_rows(int64_t threads, int64_t rows, int64_t width, const Body& body) {
    const int64_t some = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
    in_parallel(threads, (rows + some - 1) / some, [&](int64_t i) {
        for (int64_t r = i * some; r < std::min((i + 1) * some, rows); r++) body(r);
    });
}

// ========================================================================= 3 activations

// A row of x as integers of 16 bits, each unit of 16 or 32 inputs with its own scale:
// x = scale * integer. Rounded so finely (one part in 32,512 of the unit's largest), the answers
// are those of fp32; integers of 8 bits would change a few tokens in a hundred.
constexpr float FINEST = 127 * 256;  // the largest of which 256 high + low exists

struct UnitScale {
    float scale, sum;  // and the sum of the unit's inputs, scaled, for the weights' offsets
};

template <int UNIT>
static void quantise_row(const float* x, int64_t width, Quad* quads, UnitScale* units) {
    for (int64_t u = 0; u < width / UNIT; u++, x += UNIT) {
        Floats size = same(0), odd = same(0);
        for (int i = 0; i < UNIT; i += LANES) {
            const Floats v = load_floats(x + i);
            size = larger(magnitude(v), size);
            odd = odd + v * same(0);  // NaN if anything is not finite: it must stay visible
        }
        const float most = largest(size);
        const Floats finer = same(most > 1e-33f ? FINEST / most : 0);  // less is as good as nothing
        Ints count = same_int(0);
        for (int i = 0; i < UNIT; i += LANES) {
            const Ints q = nearest(load_floats(x + i) * finer);
            count = count + q;
            store_quads(q, quads);
            quads += LANES / 4;
        }
        units[u].scale = most / FINEST + sum(odd);
        units[u].sum = units[u].scale * sum(to_floats(count));
    }
}

// ============================================================================= 4 weights

enum ScaleType { FP16, BF16, FP32 };
enum OffsetKind { SAME_ZERO, ZEROS, OFFSETS };

struct Matrix {  // MatrixHandle in kernels.py; the fields are those of Layout in tiles.py
    const uint8_t* data;
    const float* table;
    int32_t out_features, in_features, bits, group, unit, scale, offset, zero, super, is_signed;
    int32_t unit_bytes, group_bytes;

    int64_t tiles() const { return (out_features + LANES - 1) / LANES; }
    bool dense() const { return bits >= 16; }  // plain numbers of type `scale`, no codes
    int64_t groups() const { return in_features / group; }
    int scale_bytes() const { return LANES * (scale == FP32 ? 4 : 2); }
    int header_bytes() const {
        return scale_bytes() + (offset == OFFSETS ? scale_bytes() : offset == ZEROS ? LANES : 0);
    }
    int small_bytes() const { return !super ? 0 : offset == OFFSETS ? 2 * LANES : LANES; }
    const uint8_t* tile(int64_t t) const { return data + t * groups() * group_bytes; }
};

INLINE Floats load_numbers(const uint8_t* at, int type) {
    return type == FP16 ? load_fp16(at) : type == BF16 ? load_bf16(at) : load_floats(at);
}

// The scale and the offset of 16 rows: weight = scale * code + offset.
struct Scales {
    Floats scale, offset;
};

INLINE Scales group_scales(const Matrix& m, const uint8_t* group) {
    Scales s;
    s.scale = load_numbers(group, m.scale);
    if (m.offset == OFFSETS)
        s.offset = load_numbers(group + m.scale_bytes(), m.scale);
    else if (m.offset == ZEROS)
        s.offset = s.scale * (same(0) - to_floats(load_bytes(group + m.scale_bytes())));
    else
        s.offset = s.scale * same((float)-m.zero);
    return s;
}

// In the K formats each unit refines the group's scale by a small integer.
INLINE Scales unit_scales(const Matrix& m, const Scales& group, const uint8_t* unit) {
    if (!m.super) return group;
    const Ints small = m.is_signed ? load_signed_bytes(unit) : load_bytes(unit);
    Scales s;
    s.scale = group.scale * to_floats(small);
    s.offset = m.offset == OFFSETS
                   ? same(0) - group.offset * to_floats(load_bytes(unit + LANES))
                   : s.scale * same((float)-m.zero);
    return s;
}

// Vector i of a unit's codes (inputs 4i to 4i + 3 of 16 rows), a byte each.
template <int BITS, int UNIT>
INLINE Ints codes_of(const uint8_t* codes, int i) {
    if (BITS == 8) {
        const Ints w = load_ints(codes + 64 * i);
        return TAKEN_FROM_BYTES ? w ^ same_int((int32_t)0x80808080) : w;
    }
    Ints w = load_ints(codes + 64 * (i / 2));
    w = (i % 2 ? w >> 4 : w) & same_int(0x0f0f0f0f);
    if (BITS == 4) return w;
    const Ints rest = load_ints(codes + 64 * (UNIT / 8));
    if (BITS == 5) return w | ((i < 4 ? rest << (4 - i) : rest >> (i - 4)) & same_int(0x10101010));
    return w | ((i < 2 ? rest << (4 - 2 * i) : rest >> (2 * i - 4)) & same_int(0x30303030));
}

// ============================================================================ 5 products

struct Prepared {  // the rows of x on their way through the kernel
    const Quad* quads;
    const UnitScale* units;
    const float* x;
    int64_t x_stride;
};

// One tile times ROWS rows of x, in integers. Within a unit the sum of code * integer is exact;
// scale and offset join it once a unit:  y += scale_w * scale_x * sum(code * x) + offset * sum(x).
template <int BITS, int UNIT, int ROWS>
static void integer_tile(const Matrix& m, const uint8_t* at, const Prepared& p, int64_t row,
                         Floats* y) {
    const int64_t n_quads = m.in_features / 4, n_units = m.in_features / UNIT;
    const Quad* quads = p.quads + row * n_quads;
    const UnitScale* units = p.units + row * n_units;
    Floats acc[ROWS];
    for (int r = 0; r < ROWS; r++) acc[r] = same(0);
    for (int64_t g = m.groups(); g; g--) {
        const Scales group = group_scales(m, at);
        at += m.header_bytes();
        for (int u = m.group / UNIT; u; u--, at += m.unit_bytes, quads += UNIT / 4, units++) {
            Scales s = unit_scales(m, group, at);
            if (BITS == 8 && TAKEN_FROM_BYTES)
                s.offset = s.offset + s.scale * same(TAKEN_FROM_BYTES);
            const uint8_t* codes = at + m.small_bytes();
            Sum sums[ROWS] = {};
#pragma GCC unroll 8
            for (int i = 0; i < UNIT / 4; i++) {
                const Ints w = codes_of<BITS, UNIT>(codes, i);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) add_product(sums[r], w, quads[r * n_quads + i]);
            }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const UnitScale x = units[r * n_units];
                acc[r] = acc[r] + to_floats(total(sums[r])) * (s.scale * same(x.scale)) +
                         s.offset * same(x.sum);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) y[r] = acc[r];
}

// One tile times ROWS rows, in floats: weights that are entries of a table (NF4).
template <int ROWS>
static void table_tile(const Matrix& m, const uint8_t* at, const Prepared& p, int64_t row,
                       Floats* y) {
    constexpr int CHAINS = ROWS_AT_ONCE / ROWS;  // sums that take turns: each waits for its last
    const Floats table = load_floats(m.table);
    const float* x = p.x + row * p.x_stride;
    Floats acc[ROWS];
    for (int r = 0; r < ROWS; r++) acc[r] = same(0);
    for (int64_t g = m.groups(); g; g--) {
        const Floats scale = load_numbers(at, m.scale);
        Floats part[ROWS][CHAINS];
        for (auto& row_parts : part)
            for (Floats& chain : row_parts) chain = same(0);
        at += m.header_bytes();
        for (int i = 0; i < m.group; i += 8, at += 64, x += 8) {
            const Ints codes = load_ints(at);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {  // inputs 0 to 3 are low nibbles, 4 to 7 high ones
                const Floats w = look_up(table, codes >> (j < 4 ? 8 * j : 8 * j - 28));
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    Floats& chain = part[r][j % CHAINS];
                    chain = chain + w * same(x[r * p.x_stride + j]);
                }
            }
        }
        for (int r = 0; r < ROWS; r++) {
            for (int c = 1; c < CHAINS; c++) part[r][0] = part[r][0] + part[r][c];
            acc[r] = acc[r] + part[r][0] * scale;
        }
    }
    for (int r = 0; r < ROWS; r++) y[r] = acc[r];
}

// One tile times ROWS rows, in floats: weights that are plain numbers of a ScaleType.
template <int TYPE, int ROWS>
static void dense_tile(const Matrix& m, const uint8_t* at, const Prepared& p, int64_t row,
                       Floats* y) {
    constexpr int CHAINS = ROWS_AT_ONCE / ROWS, BYTES = LANES * (TYPE == FP32 ? 4 : 2);
    const float* x = p.x + row * p.x_stride;
    Floats part[ROWS][CHAINS];
    for (auto& row_parts : part)
        for (Floats& chain : row_parts) chain = same(0);
    int i = 0;
    for (; i + CHAINS <= m.in_features; i += CHAINS) {
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c++, at += BYTES) {
            const Floats w = load_numbers(at, TYPE);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                part[r][c] = part[r][c] + w * same(x[r * p.x_stride + i + c]);
        }
    }
    for (; i < m.in_features; i++, at += BYTES)
        for (int r = 0; r < ROWS; r++)
            part[r][0] = part[r][0] + load_numbers(at, TYPE) * same(x[r * p.x_stride + i]);
    for (int r = 0; r < ROWS; r++) {
        for (int c = 1; c < CHAINS; c++) part[r][0] = part[r][0] + part[r][c];
        y[r] = part[r][0];
    }
}

using TileKernel = void (*)(const Matrix&, const uint8_t*, const Prepared&, int64_t, Floats*);

template <int ROWS>
static TileKernel kernel_for(const Matrix& m) {
    if (m.table) return table_tile<ROWS>;
    if (m.dense())
        return m.scale == FP16   ? dense_tile<FP16, ROWS>
               : m.scale == BF16 ? dense_tile<BF16, ROWS>
                                 : dense_tile<FP32, ROWS>;
    switch (m.bits) {
        case 4: return integer_tile<4, 32, ROWS>;
        case 5: return integer_tile<5, 32, ROWS>;
        case 6: return integer_tile<6, 16, ROWS>;
        default: return integer_tile<8, 32, ROWS>;
    }
}

struct LinearCall {
    const Matrix* matrix;
    const float* x;
    float* y;
    const float* bias;  // may be null
    int64_t rows, x_stride, y_stride, add, threads;  // add: y += x W^T instead of y = x W^T
};

static void finish(const LinearCall& c, int64_t row, int64_t tile, Floats y) {
    const int64_t first = tile * LANES;
    const int64_t count = c.matrix->out_features - first;
    float* to = c.y + row * c.y_stride + first;
    if (c.bias) y = y + load_some(c.bias + first, count);
    if (c.add) y = y + load_some(to, count);
    store_some(to, y, count);
}

// Rows of x are taken in chunks that stay, as do their results, in the nearest caches while the
// tiles pass by.
static void tiles_times_rows(const LinearCall& c, const Prepared& p, int64_t first, int64_t last) {
    constexpr int64_t CHUNK = 16;
    const Matrix& m = *c.matrix;
    const TileKernel one = kernel_for<1>(m), two = kernel_for<2>(m), four = kernel_for<4>(m);
    const TileKernel most = kernel_for<ROWS_AT_ONCE>(m);
    Floats y[ROWS_AT_ONCE];
    for (int64_t start = 0; start < c.rows; start += CHUNK) {
        const int64_t end = std::min(start + CHUNK, c.rows);
        for (int64_t t = first; t < last; t++) {
            for (int64_t row = start, step; row < end; row += step) {
                const int64_t left = end - row;
                step = left >= ROWS_AT_ONCE ? ROWS_AT_ONCE : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                (step == 1   ? one
                 : step == 2 ? two
                 : step == 4 ? four
                             : most)(m, m.tile(t), p, row, y);
                for (int r = 0; r < step; r++) finish(c, row + r, t, y[r]);
            }
        }
    }
}

static void product(const LinearCall& c) {
    const Matrix& m = *c.matrix;
    thread_local std::vector<Quad> quads;  // kept between calls: no memory is asked for
    thread_local std::vector<UnitScale> units;
    Prepared p{nullptr, nullptr, c.x, c.x_stride};
    if (!m.table && !m.dense()) {
        const int64_t n_quads = m.in_features / 4, n_units = m.in_features / m.unit;
        if ((int64_t)quads.size() < c.rows * n_quads) quads.resize(c.rows * n_quads);
        if ((int64_t)units.size() < c.rows * n_units) units.resize(c.rows * n_units);
        p.quads = quads.data(), p.units = units.data();
        Quad* const all_quads = quads.data();
        UnitScale* const all_units = units.data();
        const int64_t some = 8;  // rows of a task
        const int64_t threads = worth(c.threads, 32 * c.rows * m.in_features);
        in_parallel(threads, (c.rows + some - 1) / some, [&](int64_t i) {
            for (int64_t r = i * some; r < std::min((i + 1) * some, c.rows); r++)
                (m.unit == 32 ? quantise_row<32> : quantise_row<16>)(
                    c.x + r * c.x_stride, m.in_features, all_quads + r * n_quads,
                    all_units + r * n_units);
        });
    }
    // Few large tasks keep each thread at its own part of the matrix; many small ones level out
    // what disturbs a long product.
    const int64_t threads = worth(c.threads, (int64_t)m.out_features * m.in_features * c.rows);
    const int64_t each = c.rows > 16 ? 4 : 1;
    const int64_t tasks = std::min(m.tiles(), threads < 2 ? 1 : each * threads);
    in_parallel(threads, tasks, [&](int64_t i) {
        tiles_times_rows(c, p, m.tiles() * i / tasks, m.tiles() * (i + 1) / tasks);
    });
}

// So many rows at a time that the memory kept for their integers stays small.
extern "C" void linear(const LinearCall* call) {
    constexpr int64_t ROWS = 1024;
    for (int64_t start = 0; start < call->rows; start += ROWS) {
        LinearCall some = *call;
        some.rows = std::min(ROWS, call->rows - start);
        some.x += start * call->x_stride, some.y += start * call->y_stride;
        product(some);
    }
}

// Rows of the matrix as numbers: what an embedding looks up. Every step is rounded as in tiles.py.
struct RowsCall {
    const Matrix* matrix;
    const int64_t* ids;
    float* y;
    int64_t rows, y_stride, threads;
    int64_t unknown;  // how many ids have no row; theirs are left alone
};

template <int BITS, int UNIT>
static void number_row(const Matrix& m, int64_t id, float* y) {
    const int lane = id % LANES;
    const uint8_t* at = m.tile(id / LANES);
    const auto of_lane = [&](const auto& x) { return load<float>((const float*)&x + lane); };
    for (int64_t g = m.groups(); g; g--) {
        const Scales group = group_scales(m, at);
        const int zero = m.offset == ZEROS ? at[m.scale_bytes() + lane] : m.zero;
        at += m.header_bytes();
        for (int u = m.group / UNIT; u; u--, at += m.unit_bytes) {
            const Scales s = unit_scales(m, group, at);
            const float scale = of_lane(s.scale), offset = of_lane(s.offset);
            for (int i = 0; i < UNIT / 4; i++) {
                const Ints w = codes_of<BITS, UNIT>(at + m.small_bytes(), i);
                for (int j = 0; j < 4; j++) {
                    int code = ((const uint8_t*)&w)[4 * lane + j];
                    if (BITS == 8 && TAKEN_FROM_BYTES) code ^= 128;
                    if (m.table) *y++ = m.table[code] * scale;
                    else if (m.offset != OFFSETS) *y++ = (float)(code - zero) * scale;
                    else *y++ = (float)((double)code * scale) + offset;
                }
            }
        }
    }
}

static void dense_row(const Matrix& m, int64_t id, float* y) {
    const uint8_t* at = m.tile(id / LANES);
    for (int64_t i = 0; i < m.in_features; i++, at += LANES * m.bits / 8) {
        const Floats w = load_numbers(at, m.scale);
        y[i] = load<float>((const float*)&w + id % LANES);
    }
}

extern "C" void rows(RowsCall* call) {
    const RowsCall& c = *call;
    const Matrix& m = *c.matrix;
    const auto number = m.dense()     ? dense_row
                        : m.bits == 4 ? number_row<4, 32>
                        : m.bits == 5 ? number_row<5, 32>
                        : m.bits == 6 ? number_row<6, 16>
                                      : number_row<8, 32>;
    const auto known = [&](int64_t r) { return c.ids[r] >= 0 && c.ids[r] < m.out_features; };
    call->unknown = 0;
    for (int64_t r = 0; r < c.rows; r++) call->unknown += !known(r);
    for_rows(c.threads, c.rows, m.in_features, [&](int64_t r) {
        if (known(r)) number(m, c.ids[r], c.y + r * c.y_stride);
    });
}

// ============================================================================== 6 pieces

// y = x / sqrt(mean(x^2) + eps) * weight (or * (1 + weight)).
struct NormCall {
    const float *x, *weight;
    float* y;
    int64_t rows, width, x_stride, y_stride, plus_one, threads;
    float eps;
};

extern "C" void rms_norm(const NormCall* call) {
    const NormCall& c = *call;
    for_rows(c.threads, c.rows, c.width, [&](int64_t r) {
        const float* x = c.x + r * c.x_stride;
        float* y = c.y + r * c.y_stride;
        Floats squares = same(0);
        for (int64_t i = 0; i < c.width; i += LANES) {
            const Floats v = load_some(x + i, c.width - i);
            squares = squares + v * v;
        }
        const float factor = 1 / std::sqrt(sum(squares) / (float)c.width + c.eps);
        const float one = c.plus_one ? 1.0f : 0.0f;
        for (int64_t i = 0; i < c.width; i++) y[i] = x[i] * factor * (one + c.weight[i]);
    });
}

// Cosines and sines of the rows' positions, each pair's angle twice: `angles` in positions.py.
struct AnglesCall {
    const int32_t* position;
    const float* frequencies;  // (turned / 2,)
    float* cos_sin;  // (rows, 2, turned)
    int64_t rows, turned, threads;
    float loudness;
};

extern "C" void angles(const AnglesCall* call) {
    const AnglesCall& c = *call;
    for_rows(c.threads, c.rows, 16 * c.turned, [&](int64_t r) {
        const int64_t half = c.turned / 2;
        float* cosine = c.cos_sin + r * 2 * c.turned;
        float* sine = cosine + c.turned;
        for (int64_t i = 0; i < half; i++) {
            const float angle = (float)c.position[r] * c.frequencies[i];
            cosine[i] = cosine[half + i] = std::cos(angle) * c.loudness;
            sine[i] = sine[half + i] = std::sin(angle) * c.loudness;
        }
    });
}

// In place: features i and i + turned/2 of each head, turned by the angle of the row's position.
struct RopeCall {
    float* x;
    const float* cos_sin;  // (rows, 2, turned)
    int64_t rows, heads, head_dim, turned, x_stride, threads;
};

extern "C" void rope(const RopeCall* call) {
    const RopeCall& c = *call;
    for_rows(c.threads, c.rows, c.heads * c.head_dim, [&](int64_t r) {
        const int64_t half = c.turned / 2;
        const float* cosine = c.cos_sin + r * 2 * c.turned;
        const float* sine = cosine + c.turned;
        for (int64_t h = 0; h < c.heads; h++) {
            float* a = c.x + r * c.x_stride + h * c.head_dim;
            float* b = a + half;
            for (int64_t i = 0; i < half; i++) {
                const float first = a[i], second = b[i];
                a[i] = first * cosine[i] - second * sine[i];
                b[i] = second * cosine[half + i] + first * sine[half + i];
            }
        }
    });
}

// The cache is a pool of slots, one position each, (k, slots, d) for keys and the same for values;
// 16 consecutive slots are a page, and a text has a list of pages.
enum PoolType { POOL_FP32, POOL_BF16, POOL_INT8 };
constexpr int PAGE = 16;

INLINE uint16_t to_bf16(float x) {
    const uint32_t bits = load<uint32_t>(&x);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, halves to even
}

// Writes one head of one position; an int8 slot has its own scale, so that 127 is its largest.
static void write_slot(const float* x, int64_t d, int64_t type, void* pool, float* scales,
                       int64_t slot) {
    if (type == POOL_FP32) {
        std::memcpy((float*)pool + slot * d, x, d * sizeof(float));
    } else if (type == POOL_BF16) {
        uint16_t* to = (uint16_t*)pool + slot * d;
        for (int64_t i = 0; i < d; i++) to[i] = to_bf16(x[i]);
    } else {
        int8_t* to = (int8_t*)pool + slot * d;
        float most = 0, odd = 0;  // NaN if anything is not finite: it must stay visible
        for (int64_t i = 0; i < d; i++) most = std::max(most, std::fabs(x[i])), odd += x[i] * 0;
        const float finer = most > 1e-33f ? 127 / most : 0;
        scales[slot] = most / 127 + odd;
        for (int64_t i = 0; i < d; i++)
            to[i] = odd == 0 ? (int8_t)std::nearbyint(x[i] * finer) : (int8_t)0;
    }
}

struct WriteCall {
    const float *k, *v;  // (n, kv_heads, head_dim)
    void *keys, *values;
    float *key_scales, *value_scales;  // (kv_heads, slots), of an int8 pool
    const int32_t* slots_n;
    int64_t rows, kv_heads, head_dim, slots, type, k_stride, v_stride, threads;
};

extern "C" void kv_write(const WriteCall* call) {
    const WriteCall& c = *call;
    for_rows(c.threads, c.rows, c.kv_heads * c.head_dim, [&](int64_t r) {
        for (int64_t h = 0; h < c.kv_heads; h++) {
            const int64_t slot = h * c.slots + c.slots_n[r], at = h * c.head_dim;
            write_slot(c.k + r * c.k_stride + at, c.head_dim, c.type, c.keys, c.key_scales, slot);
            write_slot(c.v + r * c.v_stride + at, c.head_dim, c.type, c.values, c.value_scales,
                       slot);
        }
    });
}

// Attention of each query to the positions of its text up to its own, read page by page.
struct AttendCall {
    const float* q;  // (n, heads, head_dim)
    float* y;
    const void *keys, *values;
    const float *key_scales, *value_scales;
    const int32_t *pages, *text, *position;  // (texts, page_stride), (n,), (n,)
    int64_t rows, heads, kv_heads, head_dim, slots, type, page_stride, q_stride, y_stride, window;
    int64_t threads;
    float scale, softcap;  // 0 for no softcap and no window
};

// Slots `slot` to `slot + 16` as fp32 rows of `padded` features: in place where they are that.
static const float* page_of(const AttendCall& c, const void* pool, const float* scales,
                            int64_t slot, int64_t padded, float* scratch) {
    const int64_t d = c.head_dim;
    if (c.type == POOL_FP32 && d == padded) return (const float*)pool + slot * d;
    for (int64_t s = slot; s < slot + PAGE; s++, scratch += padded) {
        if (c.type == POOL_FP32) {
            std::memcpy(scratch, (const float*)pool + s * d, d * sizeof(float));
        } else if (c.type == POOL_BF16) {
            const uint16_t* from = (const uint16_t*)pool + s * d;
            uint32_t* to = (uint32_t*)scratch;
            for (int64_t i = 0; i < d; i++) to[i] = (uint32_t)from[i] << 16;
        } else {
            const int8_t* from = (const int8_t*)pool + s * d;
            const float scale = scales[s];
            for (int64_t i = 0; i < d; i++) scratch[i] = (float)from[i] * scale;
        }
    }
    return scratch - PAGE * padded;
}

// q k^T for the 16 keys of a page: lane l belongs to key l. The width of a head is D where it is
// known to the compiler, which then knows every address, else `width`.
template <int D>
INLINE Floats scores_of(const float* q, const float* keys, int64_t width) {
    const int64_t padded = D ? D : width;
    constexpr int AT_ONCE = WIDTH == 64 ? 16 : 4;  // keys whose sums fit into registers
    Floats each[PAGE];
    for (int first = 0; first < PAGE; first += AT_ONCE) {
        Floats some[AT_ONCE];
        for (Floats& s : some) s = same(0);
        for (int64_t i = 0; i < padded; i += LANES) {
            const Floats part = load_floats(q + i);
#pragma GCC unroll 16
            for (int k = 0; k < AT_ONCE; k++)
                some[k] = some[k] + part * load_floats(keys + (first + k) * padded + i);
        }
        for (int k = 0; k < AT_ONCE; k++) each[first + k] = some[k];
    }
    return sums_of_each(each);
}

// Softmax over pages that come one by one (arXiv:1805.02867): `most` is the largest score so far,
// and what was summed under an earlier, smaller one is scaled down when a larger comes.
struct Look {  // one query vector on its way through the pages
    const float* q;
    float* y;
    int64_t position;
    int from, to;  // what it sees of the page at hand
    float most;
    Floats seen;  // the sum of its weights, in 16 parts
    float weights[PAGE];  // for the page at hand: its scores, then what the softmax makes of them
};

// From scores to weights.
static void weigh(Look& look, int64_t padded, float softcap) {
    Floats s = load_floats(look.weights);
    if (softcap > 0) s = hyperbolic_tangent(s * same(1 / softcap)) * same(softcap);
    const bool whole = look.from == 0 && look.to == PAGE;
    if (!whole) s = within(look.from, look.to, s, -INFINITY);
    const float most = std::max(look.most, largest(s));
    if (most > look.most) {
        const float shrink = std::exp(look.most - most);
        look.seen = look.seen * same(shrink);
        for (int64_t i = 0; i < padded; i += LANES)
            store(look.y + i, load_floats(look.y + i) * same(shrink));
        look.most = most;
    }
    Floats weight = exponential(s - same(most));
    if (!whole) weight = within(look.from, look.to, weight, 0);
    look.seen = look.seen + weight;
    store(look.weights, weight);
}

// y += weights V of one page, for N queries at once so that each value is fetched once for them.
template <int D, int N>
static void add_values(Look* looks, const float* values, int64_t width, int from, int to) {
    const int64_t padded = D ? D : width;
    for (int64_t i = 0; i < padded; i += LANES) {
        Floats y[N];
        for (int j = 0; j < N; j++) y[j] = load_floats(looks[j].y + i);
        for (int k = from; k < to; k++) {
            const Floats v = load_floats(values + k * padded + i);
            for (int j = 0; j < N; j++) y[j] = y[j] + v * same(looks[j].weights[k]);
        }
        for (int j = 0; j < N; j++) store(looks[j].y + i, y[j]);
    }
}

template <int D>
static void attend_page(std::vector<Look>& looks, const float* keys, const float* values,
                        int64_t padded, int64_t page, const AttendCall& c) {
    size_t first = looks.size(), end = 0;  // the queries that see any of this page
    bool whole = true, gap = false;  // whether all of these see all of it; one that sees nothing
    for (size_t i = 0; i < looks.size(); i++) {
        Look& look = looks[i];
        const int64_t last = look.position - page * PAGE;
        look.to = (int)std::min<int64_t>(PAGE, last + 1);
        look.from = c.window > 0 ? (int)std::max<int64_t>(0, last - c.window + 1) : 0;
        if (look.from >= look.to) {
            gap = end > 0;
            continue;
        }
        first = std::min(first, i), end = i + 1;
        whole = whole && !gap && look.from == 0 && look.to == PAGE;
    }
    // One phase for all of them, then the next: while one query waits for its sum, others go on.
    for (size_t i = first; i < end; i++)
        store(looks[i].weights, scores_of<D>(looks[i].q, keys, padded));
    for (size_t i = first; i < end; i++)
        if (looks[i].from < looks[i].to) weigh(looks[i], padded, c.softcap);
    for (size_t i = first; i < end;) {
        Look* look = &looks[i];
        const size_t left = whole ? end - i : 1;
        if (left >= 4) add_values<D, 4>(look, values, padded, 0, PAGE);
        else if (left == 3) add_values<D, 3>(look, values, padded, 0, PAGE);
        else if (left == 2) add_values<D, 2>(look, values, padded, 0, PAGE);
        else add_values<D, 1>(look, values, padded, look->from, look->to);
        i += std::min<size_t>(left, 4);
    }
}

// `count` queries of one text from `first` on, with the query heads `head` to `head + heads`, which
// share a key-value head: each page is fetched once for all of them.
static void attend_block(const AttendCall& c, int64_t first, int64_t count, int64_t head,
                         int64_t heads) {
    const int64_t d = c.head_dim, padded = (d + LANES - 1) / LANES * LANES, n = count * heads;
    thread_local std::vector<float> scratch;
    thread_local std::vector<Look> looks;
    scratch.assign((2 * n + 2 * PAGE) * padded, 0.0f);
    looks.resize(n);
    float *q = scratch.data(), *y = q + n * padded, *page_room = y + n * padded;
    int64_t newest = 0, oldest = INT32_MAX;
    for (int64_t i = 0; i < n; i++, q += padded, y += padded) {
        const int64_t row = first + i / heads, position = c.position[row];
        const float* from = c.q + row * c.q_stride + (head + i % heads) * d;
        for (int64_t j = 0; j < d; j++) q[j] = from[j] * c.scale;
        looks[i].q = q, looks[i].y = y, looks[i].position = position;
        looks[i].most = -INFINITY, looks[i].seen = same(0);
        newest = std::max(newest, position), oldest = std::min(oldest, position);
    }
    const auto one_page = padded == 64    ? attend_page<64>
                          : padded == 128 ? attend_page<128>
                                          : attend_page<0>;
    const int32_t* pages = c.pages + c.text[first] * c.page_stride;
    const int64_t kv_base = head / (c.heads / c.kv_heads) * c.slots;
    const int64_t start = c.window > 0 ? std::max<int64_t>(0, oldest - c.window + 1) / PAGE : 0;
    for (int64_t page = start; page <= newest / PAGE; page++) {
        const int64_t slot = kv_base + (int64_t)pages[page] * PAGE;
        const float* keys = page_of(c, c.keys, c.key_scales, slot, padded, page_room);
        const float* values = page_of(c, c.values, c.value_scales, slot, padded,
                                      page_room + PAGE * padded);
        one_page(looks, keys, values, padded, page, c);
    }
    for (int64_t i = 0; i < n; i++) {
        const float all = 1 / sum(looks[i].seen);
        float* to = c.y + (first + i / heads) * c.y_stride + (head + i % heads) * d;
        for (int64_t j = 0; j < d; j++) to[j] = looks[i].y[j] * all;
    }
}

extern "C" void attend(const AttendCall* call) {
    const AttendCall& c = *call;
    constexpr int64_t QUERIES = 16;  // of one text that look at a page together
    struct Block {
        int64_t first, count;
    };
    std::vector<Block> blocks;
    for (int64_t r = 0; r < c.rows; r++) {
        const bool joins = !blocks.empty() && c.text[r] == c.text[blocks.back().first] &&
                           blocks.back().count < QUERIES;
        joins ? (void)blocks.back().count++ : blocks.push_back({r, 1});
    }
    int64_t seen = 0;
    for (int64_t r = 0; r < c.rows; r++) seen += c.position[r] + 1;
    const int64_t threads = worth(c.threads, 2 * seen * c.heads * c.head_dim);
    const int64_t group = c.heads / c.kv_heads, n = blocks.size();
    // With few blocks, the heads that share keys are split, so that each thread has its part.
    const int64_t together = n * c.kv_heads >= 2 * threads || threads < 2 ? group : 1;
    const int64_t parts = c.heads / together;
    in_parallel(threads, n * parts, [&](int64_t i) {
        const Block& b = blocks[n - 1 - i / parts];  // the last see most: they come first
        attend_block(c, b.first, b.count, i % parts * together, together);
    });
}

// y = activation(gate) * up.
struct GateCall {
    const float *gate, *up;
    float* y;
    int64_t rows, width, gate_stride, up_stride, y_stride, gelu, threads;
};

extern "C" void gated(const GateCall* call) {
    const GateCall& c = *call;
    for_rows(c.threads, c.rows, c.width, [&](int64_t r) {
        const float *gate = c.gate + r * c.gate_stride, *up = c.up + r * c.up_stride;
        float* y = c.y + r * c.y_stride;
        for (int64_t i = 0; i < c.width; i += LANES) {
            const Floats x = load_some(gate + i, c.width - i), u = load_some(up + i, c.width - i);
            // silu(x) = x sigmoid(x); gelu's tanh form is x sigmoid(2 * 0.798 (x + 0.0447 x^3))
            const Floats z = !c.gelu ? x : (x + x * x * x * same(0.044715f)) * same(1.595769122f);
            const Floats a = x / (same(1.0f) + exponential(same(0) - z)) * u;
            store_some(y + i, a, c.width - i);
        }
    });
}

// y += x: a branch that was normed after its last matrix joins the stream.
struct AddCall {
    const float* x;
    float* y;
    int64_t rows, width, x_stride, y_stride, threads;
};

extern "C" void add(const AddCall* call) {
    const AddCall& c = *call;
    for_rows(c.threads, c.rows, c.width, [&](int64_t r) {
        const float* x = c.x + r * c.x_stride;
        float* y = c.y + r * c.y_stride;
        for (int64_t i = 0; i < c.width; i++) y[i] += x[i];
    });
}

// A list of calls, one after the other: a layer or a whole model for one trip from Python.
struct Step {
    void (*kernel)(const void*);
    const void* call;
};

extern "C" void run_program(const Step* steps, int64_t count) {
    for (int64_t i = 0; i < count; i++) steps[i].kernel(steps[i].call);
}

// The instructions that this library was built for.
extern "C" const char* instructions() {
#if defined(WITH_AVX512)
    return "avx512";
#elif defined(WITH_AVX2)
    return "avx2";
#elif defined(WITH_NEON)
    return "neon";
#else
    return "plain";
#endif
}
