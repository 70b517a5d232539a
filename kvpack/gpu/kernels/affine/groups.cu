// KIVI's codes (arXiv 2402.02750, section 3) of bf16 tensors [N, T, DIMS]: a scale and a zero for each group of GROUP values.
//
// BITS is 1 to 8, DIMS a multiple of 32. Scales and zeros are fp16. A code takes STEP bits, in row-major order: 8, or BITS if
// that is 2 or 4. A thread handles eight dimensions: of all tokens of a group if groups run along tokens, of one token if they
// run along dimensions.
#define EIGHTS (DIMS / 8)
#define LEVELS ((1 << BITS) - 1)
#if STEP == 8
typedef u64 Packed;
#elif STEP == 4
typedef u32 Packed;
#else
typedef u16 Packed;
#endif

struct Eight { float x[8]; };

__device__ __forceinline__ Eight unpack(uint4 v) {
    u32 words[4] = {v.x, v.y, v.z, v.w};
    Eight out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.x[2 * i] = low_of(words[i]), out.x[2 * i + 1] = high_of(words[i]);
    return out;
}

__device__ __forceinline__ void include(Eight &low, Eight &high, const Eight &v) {
#pragma unroll
    for (int i = 0; i < 8; i++) low.x[i] = fminf(low.x[i], v.x[i]), high.x[i] = fmaxf(high.x[i], v.x[i]);
}

struct Parameters { u32 scale, zero; };  // the bits of fp16 numbers

__device__ __forceinline__ Parameters parameters(float low, float high) {
    return {to_halves((high - low) / LEVELS, 0) & 0xFFFF, to_halves(__fadd_rn(low, 0), 0) & 0xFFFF};
}

__device__ __forceinline__ u32 code_of(float x, Parameters p) {
    float scale = from_half((u16)p.scale), code = rintf((x - from_half((u16)p.zero)) / scale);
    return scale > 0 ? (u32)fminf(fmaxf(code, 0), LEVELS) : 0;
}

__device__ __forceinline__ float value_of(u32 code, u32 scale, u32 zero) {
    return __fadd_rn(__fmul_rn((float)code, from_half((u16)scale)), from_half((u16)zero));
}

__device__ __forceinline__ uint4 pairs(const u32 *p) { return make_uint4(p[0], p[1], p[2], p[3]); }

// scales and zeros are [N, ceil(T / GROUP), DIMS]. A thread handles the groups of eight channels.
extern "C" __global__ void __launch_bounds__(128) compress_tokens(
    const u16 *values, i64 count, i64 tokens, Packed *codes, u16 *scales, u16 *zeros) {
    i64 groups = (tokens + GROUP - 1) / GROUP, i = (i64)blockIdx.x * 128 + threadIdx.x;
    if (i >= count * groups * EIGHTS) return;
    i64 n = i / (groups * EIGHTS), g = i / EIGHTS % groups, first = n * tokens + g * GROUP;
    int d = (int)(i % EIGHTS), rows = (int)(tokens - g * GROUP < GROUP ? tokens - g * GROUP : GROUP);
    const uint4 *from = (const uint4 *)values + first * EIGHTS + d;
    Eight low = unpack(from[0]), high = low;
#pragma unroll 8
    for (int t = 1; t < rows; t++) include(low, high, unpack(from[t * EIGHTS]));
    Parameters p[8];
    u32 scale[4], zero[4];
#pragma unroll
    for (int k = 0; k < 8; k++) p[k] = parameters(low.x[k], high.x[k]);
#pragma unroll
    for (int k = 0; k < 4; k++)
        scale[k] = p[2 * k].scale | p[2 * k + 1].scale << 16, zero[k] = p[2 * k].zero | p[2 * k + 1].zero << 16;
    ((uint4 *)scales)[i] = pairs(scale), ((uint4 *)zeros)[i] = pairs(zero);
#pragma unroll 4
    for (int t = 0; t < rows; t++) {
        Eight v = unpack(from[t * EIGHTS]);
        Packed packed = 0;
#pragma unroll
        for (int k = 0; k < 8; k++) packed |= (Packed)code_of(v.x[k], p[k]) << STEP * k;
        codes[(first + t) * EIGHTS + d] = packed;
    }
}

// scales and zeros are [N, T, DIMS / GROUP]. Four threads handle one group.
extern "C" __global__ void __launch_bounds__(256) compress_channels(
    const u16 *values, i64 count, i64 tokens, Packed *codes, u16 *scales, u16 *zeros) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x, all = count * tokens * EIGHTS;
    Eight v = unpack(((const uint4 *)values)[i < all ? i : all - 1]);
    float low = v.x[0], high = v.x[0];
#pragma unroll
    for (int k = 1; k < 8; k++) low = fminf(low, v.x[k]), high = fmaxf(high, v.x[k]);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        low = fminf(low, __uint_as_float(__shfl_xor_sync(ALL, __float_as_uint(low), step)));
        high = fmaxf(high, __uint_as_float(__shfl_xor_sync(ALL, __float_as_uint(high), step)));
    }
    if (i >= all) return;
    Parameters p = parameters(low, high);
    if (i % 4 == 0) scales[i / 4] = (u16)p.scale, zeros[i / 4] = (u16)p.zero;
    Packed packed = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) packed |= (Packed)code_of(v.x[k], p) << STEP * k;
    codes[i] = packed;
}

__device__ __forceinline__ uint4 restored(Packed packed, const u32 *scale, const u32 *zero) {
    u32 out[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
        out[k] = to_bf16s(value_of((u32)(packed >> 2 * STEP * k) & LEVELS, scale[k] & 0xFFFF, zero[k] & 0xFFFF),
                          value_of((u32)(packed >> (2 * k + 1) * STEP) & LEVELS, scale[k] >> 16, zero[k] >> 16));
    return pairs(out);
}

extern "C" __global__ void __launch_bounds__(256) decompress_tokens(
    const Packed *codes, const u16 *scales, const u16 *zeros, i64 count, i64 tokens, u16 *values) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x, groups = (tokens + GROUP - 1) / GROUP;
    if (i >= count * tokens * EIGHTS) return;
    i64 n = i / (tokens * EIGHTS), t = i / EIGHTS % tokens, at = (n * groups + t / GROUP) * EIGHTS + i % EIGHTS;
    uint4 s = ((const uint4 *)scales)[at], z = ((const uint4 *)zeros)[at];
    u32 scale[4] = {s.x, s.y, s.z, s.w}, zero[4] = {z.x, z.y, z.z, z.w};
    ((uint4 *)values)[i] = restored(codes[i], scale, zero);
}

extern "C" __global__ void __launch_bounds__(256) decompress_channels(
    const Packed *codes, const u16 *scales, const u16 *zeros, i64 count, i64 tokens, u16 *values) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= count * tokens * EIGHTS) return;
    u32 s = scales[i / 4] * 0x10001u, z = zeros[i / 4] * 0x10001u, scale[4] = {s, s, s, s}, zero[4] = {z, z, z, z};
    ((uint4 *)values)[i] = restored(codes[i], scale, zero);
}
