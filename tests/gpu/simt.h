// Runs CUDA kernels on a CPU: one block after another, and a fiber for each thread. This tests their logic; it finds no races
// and says nothing about speed.
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Dim { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
static Dim gridDim, blockDim, blockIdx, threadIdx;

namespace simt {
struct Barrier { int arrived = 0, alive = 0; unsigned generation = 0; };
static const int MAX_THREADS = 1024, STACK = 64 << 10;
static ucontext_t fibers[MAX_THREADS];
static jmp_buf scheduler, places[MAX_THREADS];  // fibers are switched by setjmp, because swapcontext calls the operating system each time
static bool begun[MAX_THREADS];
static char *stacks;
static bool done[MAX_THREADS];
static int current;
static Barrier block, warps[MAX_THREADS / 32];
static uint64_t values[MAX_THREADS / 32][2][32];
alignas(1024) static char dynamic[256 << 10];
static void *function;
static const uint64_t *arguments;

__attribute__((noinline)) inline void leave() {
    if (!_setjmp(places[current])) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void enter() {
    if (_setjmp(scheduler)) return;
    if (begun[current]) _longjmp(places[current], 1);
    begun[current] = true;
    setcontext(&fibers[current]);
}
inline void release(Barrier &barrier) {
    if (barrier.arrived && barrier.arrived == barrier.alive) barrier.arrived = 0, barrier.generation++;
}
inline void wait(Barrier &barrier) {
    unsigned generation = barrier.generation;
    barrier.arrived++;
    release(barrier);
    while (barrier.generation == generation) leave();
}
// Hands in a lane's value and returns the values of all lanes of its warp.
inline uint64_t *exchange(uint64_t value) {
    Barrier &warp = warps[current / 32];
    uint64_t *mine = values[current / 32][warp.generation % 2];
    mine[current % 32] = value;
    wait(warp);
    return mine;
}
inline void body() {
    const uint64_t *a = arguments;
    ((void (*)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
               uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
               uint64_t, uint64_t, uint64_t, uint64_t))function)(
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
        a[17], a[18], a[19], a[20], a[21], a[22], a[23]);
    done[current] = true;
    block.alive--, warps[current / 32].alive--;
    release(block), release(warps[current / 32]);
    leave();
}
inline void run_block() {
    int threads = blockDim.x;
    memset(dynamic, 0xA5, sizeof dynamic);
    block = Barrier(), block.alive = threads;
    for (int w = 0; w < (threads + 31) / 32; w++) warps[w] = Barrier(), warps[w].alive = threads - w * 32 < 32 ? threads - w * 32 : 32;
    for (int i = 0; i < threads; i++) {
        done[i] = begun[i] = false;
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks + (size_t)i * STACK;
        fibers[i].uc_stack.ss_size = STACK;
        makecontext(&fibers[i], (void (*)())body, 0);
    }
    while (block.alive)
        for (int i = 0; i < threads; i++)
            if (!done[i]) {
                current = i;
                threadIdx = {(unsigned)i, 0, 0};
                enter();
            }
}
}  // namespace simt

inline void __syncthreads() { simt::wait(simt::block); }
inline void __syncwarp() { simt::wait(simt::warps[simt::current / 32]); }
inline unsigned __ballot_sync(unsigned, bool value) {
    uint64_t *all = simt::exchange(value);
    unsigned mask = 0;
    for (int i = 0; i < 32; i++) mask |= (unsigned)(all[i] & 1) << i;
    return mask;
}
template <typename T> inline T __shfl_xor_sync(unsigned, T value, int step) {
    return (T)simt::exchange((uint64_t)value)[(simt::current % 32) ^ step];
}
template <typename T> inline T __shfl_down_sync(unsigned, T value, int step) {
    int from = simt::current % 32 + step;
    return (T)simt::exchange((uint64_t)value)[from < 32 ? from : simt::current % 32];
}
template <typename T> inline T __shfl_up_sync(unsigned, T value, int step) {
    int from = simt::current % 32 - step;
    return (T)simt::exchange((uint64_t)value)[from >= 0 ? from : simt::current % 32];
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    uint64_t *all = simt::exchange(value);
    unsigned sum = 0;
    for (int i = 0; i < 32; i++) sum += (unsigned)all[i];
    return sum;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    uint64_t *all = simt::exchange(value);
    for (int i = 0; i < 32; i++) value = (unsigned)all[i] > value ? (unsigned)all[i] : value;
    return value;
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
    uint64_t *all = simt::exchange(value);
    for (int i = 0; i < 32; i++) value = (unsigned)all[i] < value ? (unsigned)all[i] : value;
    return value;
}
template <typename T> inline T __shfl_sync(unsigned, T value, int lane) { return (T)simt::exchange((uint64_t)value)[lane]; }
template <typename T, typename U> inline T atomicAdd(T *at, U value) { T old = *at; *at += value; return old; }
template <typename T, typename U> inline T atomicOr(T *at, U value) { T old = *at; *at |= value; return old; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}
inline unsigned dot_low(unsigned two, unsigned bytes, unsigned sum) {
    return sum + (two & 0xFFFF) * (bytes & 255) + (two >> 16) * (bytes >> 8 & 255);
}
inline unsigned dot_high(unsigned two, unsigned bytes, unsigned sum) { return dot_low(two, bytes >> 16, sum); }

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __shfl_xor_sync(unsigned mask, float value, int step) {
    return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(value), step));
}
inline float bf16_of(unsigned pair, int half) { return __uint_as_float(half ? pair & 0xFFFF0000u : pair << 16); }
// The instruction mma.sync.m16n8k16 of bf16 numbers (see rotated.cu).
inline void multiply(float *sum, const unsigned *a, unsigned b0, unsigned b1) {
    float rows[2][16], columns[2][16];
    int g = simt::current % 32 / 4, t = simt::current % 4;
    for (int i = 0; i < 4; i++) {  // of matrix a, rows g and g + 8: the elements from 2 t and from 2 t + 8 on
        uint64_t *all = simt::exchange(a[i]);
        for (int k = 0; k < 8; k++) rows[i % 2][i / 2 * 8 + k] = bf16_of((unsigned)all[4 * g + k / 2], k % 2);
    }
    for (int i = 0; i < 2; i++) {  // of matrix b, columns 2 t and 2 t + 1
        uint64_t *all = simt::exchange(i ? b1 : b0);
        for (int c = 0; c < 2; c++)
            for (int k = 0; k < 8; k++) columns[c][i * 8 + k] = bf16_of((unsigned)all[4 * (2 * t + c) + k / 2], k % 2);
    }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) sum[i] += rows[i / 2][k] * columns[i % 2][k];
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float from_half(unsigned short half) {
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : ldexpf(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    return half >> 15 ? -value : value;
}
// The nearest fp16 number; of two equally near ones that whose last bit is 0, as rintf chooses.
inline unsigned to_half(float value) {
    unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    float size = fabsf(value);
    if (!(size < 65520)) return sign | (size != size ? 0x7E00 : 0x7C00);
    int exponent = size < 6.103515625e-5f ? -14 : ilogbf(size);
    unsigned steps = (unsigned)rintf(ldexpf(size, 10 - exponent));
    return sign | (steps + ((exponent + 14) << 10));
}
inline unsigned to_bf16(float value) {
    unsigned bits = __float_as_uint(value);
    return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline unsigned to_halves(float low, float high) { return to_half(low) | to_half(high) << 16; }
inline unsigned to_bf16s(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

inline unsigned shared_address(const void *at) { return (unsigned)((const char *)at - simt::dynamic); }
inline unsigned shared_word(unsigned address) { return *(unsigned *)(simt::dynamic + address); }
inline unsigned shared_half(unsigned address) { return *(unsigned short *)(simt::dynamic + address); }
inline unsigned device_word(const unsigned *at) { return *at; }
template <typename T> inline T pin_register(T value) { return value; }
template <typename T> inline T __ldg(const T *at) { return *at; }

extern "C" void simt_launch(void *function, const unsigned *grid, const unsigned *block, const uint64_t *arguments) {
    if (!simt::stacks) simt::stacks = (char *)malloc((size_t)simt::MAX_THREADS * simt::STACK);
    simt::function = function, simt::arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], 1, 1};
    for (unsigned y = 0; y < grid[1]; y++)
        for (unsigned x = 0; x < grid[0]; x++) blockIdx = {x, y, 0}, simt::run_block();
}
