// What all kernels share: types, the checksum's mix, positions in a part. Compiled by NVRTC, so without headers.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define ALL 0xFFFFFFFFu
#define GOLDEN 0x9E3779B97F4A7C15ull

// SplitMix64's finaliser of word + (index + 1) * GOLDEN: a word's share of the checksum (docs/format.md).
__device__ __forceinline__ u64 mixed(u64 word, u64 index) {
    u64 z = word + (index + 1) * GOLDEN;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ u64 warp_sum(u64 value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// Position of a channel's first token in a part whose heads lie head_stride elements apart.
__device__ __forceinline__ i64 channel_offset(int channel, int dims, i64 head_stride) {
    return (i64)(channel / dims) * head_stride + channel % dims;
}
