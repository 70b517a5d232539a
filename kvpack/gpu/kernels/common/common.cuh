// What all kernels share: types, the function that mixes a word for the checksum, and single instructions as functions.
// NVRTC compiles this, and has no header files to include.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define ALL 0xFFFFFFFFu
#define GOLDEN 0x9E3779B97F4A7C15ull

// What a word adds to the checksum (docs/format.md): the last step of SplitMix64, of word + key. The key of the word with
// this index is (index + 1) * GOLDEN.
__device__ __forceinline__ u64 mixed_by(u64 word, u64 key) {
    u64 z = word + key;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ u64 mixed(u64 word, u64 index) { return mixed_by(word, (index + 1) * GOLDEN); }

// The sum of the values of all lanes of a warp, in every lane.
__device__ __forceinline__ u64 warp_sum(u64 value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// The element of a part at which a channel's first token stands, if heads lie head_stride elements apart.
__device__ __forceinline__ i64 channel_offset(int channel, int dims, i64 head_stride) {
    return (i64)(channel / dims) * head_stride + channel % dims;
}

// Single instructions. Shared memory is read by 32-bit addresses; device_word reads what nobody writes during the kernel.
#ifdef __CUDA_ARCH__
__device__ __forceinline__ u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }
__device__ __forceinline__ u32 shared_word(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}
__device__ __forceinline__ u32 shared_half(u32 address) {
    u32 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
__device__ __forceinline__ u32 device_word(const u32 *at) {
    u32 value;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(at));
    return value;
}
// Makes the compiler keep a value in a register; it would compute the value again at every use otherwise.
template <typename T> __device__ __forceinline__ T *pin_register(T *at) {
    asm("" : "+l"(at));
    return at;
}
__device__ __forceinline__ u32 pin_register(u32 value) {
    asm("" : "+r"(value));
    return value;
}
// sum + (lower half of two) * (byte 0) + (upper half of two) * (byte 1).
__device__ __forceinline__ u32 dot_low(u32 two, u32 bytes, u32 sum) {
    u32 found;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(found) : "r"(two), "r"(bytes), "r"(sum));
    return found;
}
// The same with bytes 2 and 3.
__device__ __forceinline__ u32 dot_high(u32 two, u32 bytes, u32 sum) {
    u32 found;
    asm("dp2a.hi.u32.u32 %0, %1, %2, %3;" : "=r"(found) : "r"(two), "r"(bytes), "r"(sum));
    return found;
}
__device__ __forceinline__ float from_half(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
__device__ __forceinline__ u32 to_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ u32 to_bf16s(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

// The floats of the lower and of the upper bf16 of a word.
__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
