// Makes one row of fp16 numbers for each token from the bf16 keys and values of all layers (gather), and goes back (scatter).
//
// DIMS is a multiple of 16. With TURNED, keys are turned by RoPE, in pairs (i, i + DIMS / 2). A unit has S tensors
// [H, T, DIMS], keys before values, at addresses [U, S], whose heads lie head_stride elements apart. Element (h, d) of tensor
// s of a token stands in its row at places[s H DIMS] + h DIMS + d. firsts [U] are the positions of the units' first tokens;
// cosines and sines are [positions, DIMS / 2]. The grid is (slices of tokens, U * S). A thread handles eight dimensions and
// the eight they are turned with, of one token and all heads.
#define HALF (DIMS / 2)
#define LANES (DIMS / 16)
#define TILE (THREADS / LANES)

struct Sixteen { float left[8], right[8]; };

__device__ __forceinline__ void unpack(float *out, uint4 v) {
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) out[2 * i] = low_of(words[i]), out[2 * i + 1] = high_of(words[i]);
}

__device__ __forceinline__ void load(float *out, const float *from) {
    float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

struct Turn {
    float cosines[8], sines[8];
    bool any;
    __device__ __forceinline__ Turn(const float *c, const float *s, i64 position, int j, bool key) : any(TURNED && key) {
        if (!any) return;
        load(cosines, c + position * HALF + 8 * j), load(sines, s + position * HALF + 8 * j);
    }
    __device__ __forceinline__ void by(Sixteen &x, float sign) const {
        if (!any) return;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float l = x.left[i], r = x.right[i], c = cosines[i], s = sign * sines[i];
            x.left[i] = l * c - r * s, x.right[i] = r * c + l * s;
        }
    }
};

// What eight bf16 add to a tensor's digest, as the words with this index and the next.
__device__ __forceinline__ u64 share(uint4 v, u64 word) {
    return mixed((u64)v.y << 32 | v.x, word) + mixed((u64)v.w << 32 | v.z, word + 1);
}

// Whether any of eight bf16 is infinite or not a number.
__device__ __forceinline__ bool odd(uint4 v) {
    const u32 low = 0x7F80, high = 0x7F800000;
    u32 words[4] = {v.x, v.y, v.z, v.w};
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; i++) found |= (words[i] & low) == low || (words[i] & high) == high;
    return found;
}

// Writes rows [U * T, stride], from which mean [P], in the order of rows, is subtracted. The tensors' digests are added to
// digests [U, S]; faults [U] are set to 1 where a value is not finite.
extern "C" __global__ void __launch_bounds__(THREADS) gather(
    const u64 *sources, i64 head_stride, i64 heads, i64 tokens, i64 tensors, const i64 *firsts, const float *cosines,
    const float *sines, const i64 *places, const float *mean, u16 *rows, i64 stride, u64 *digests, int *faults) {
    int unit = blockIdx.y / (int)tensors, s = blockIdx.y % (int)tensors, j = threadIdx.x % LANES;
    i64 t = (i64)blockIdx.x * TILE + threadIdx.x / LANES, begin = places[(i64)s * heads * DIMS] + 8 * j;
    u64 digest = 0;
    bool bad = false;
    if (t < tokens) {
        Turn turn(cosines, sines, firsts[unit] + t, j, s < tensors / 2);
        const uint4 *from = (const uint4 *)(sources[blockIdx.y] + (t * DIMS + 8 * j) * 2);
        u16 *to = rows + (unit * tokens + t) * stride + begin;
        mean += begin;
        u64 word = (t * DIMS + 8 * j) / 4;
#pragma unroll 2
        for (int h = 0; h < heads; h++, from += head_stride / 8, word += tokens * DIMS / 4, to += DIMS, mean += DIMS) {
            uint4 a = from[0], b = from[HALF / 8];
            digest += share(a, word) + share(b, word + HALF / 4);
            bad |= odd(a) | odd(b);
            Sixteen x;
            unpack(x.left, a), unpack(x.right, b);
            turn.by(x, -1);
            float m[8];
            u32 out[4];
            load(m, mean);
#pragma unroll
            for (int i = 0; i < 4; i++) out[i] = to_halves(x.left[2 * i] - m[2 * i], x.left[2 * i + 1] - m[2 * i + 1]);
            *(uint4 *)to = make_uint4(out[0], out[1], out[2], out[3]);
            load(m, mean + HALF);
#pragma unroll
            for (int i = 0; i < 4; i++) out[i] = to_halves(x.right[2 * i] - m[2 * i], x.right[2 * i + 1] - m[2 * i + 1]);
            *(uint4 *)(to + HALF) = make_uint4(out[0], out[1], out[2], out[3]);
        }
    }
    digest = warp_sum(digest);
    if (threadIdx.x % 32 == 0) atomicAdd(&digests[blockIdx.y], digest);
    if (bad) faults[unit] = 1;
}

// Reads rows [U * T, P] and adds means [sinks + 1, P]: that of each sink, and that of all other tokens. faults [U] are set to 1
// where a value is not finite.
extern "C" __global__ void __launch_bounds__(THREADS) scatter(
    const u16 *rows, const u64 *targets, i64 head_stride, i64 heads, i64 tokens, i64 tensors, const i64 *firsts,
    const float *cosines, const float *sines, const i64 *places, const float *means, i64 sinks, int *faults) {
    int unit = blockIdx.y / (int)tensors, s = blockIdx.y % (int)tensors, j = threadIdx.x % LANES;
    i64 t = (i64)blockIdx.x * TILE + threadIdx.x / LANES, size = tensors * heads * DIMS;
    if (t >= tokens) return;
    i64 position = firsts[unit] + t, begin = places[(i64)s * heads * DIMS] + 8 * j;
    Turn turn(cosines, sines, position, j, s < tensors / 2);
    const u16 *from = rows + (unit * tokens + t) * size + begin;
    const float *mean = means + (position < sinks ? position : sinks) * size + begin;
    uint4 *to = (uint4 *)(targets[blockIdx.y] + (t * DIMS + 8 * j) * 2);
    bool bad = false;
#pragma unroll 2
    for (int h = 0; h < heads; h++, from += DIMS, mean += DIMS, to += head_stride / 8) {
        uint4 a = *(const uint4 *)from, b = *(const uint4 *)(from + HALF);
        u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
        Sixteen x;
        load(x.left, mean), load(x.right, mean + HALF);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x.left[2 * i] += from_half((u16)left[i]), x.left[2 * i + 1] += from_half((u16)(left[i] >> 16));
            x.right[2 * i] += from_half((u16)right[i]), x.right[2 * i + 1] += from_half((u16)(right[i] >> 16));
        }
        turn.by(x, 1);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            left[i] = to_bf16s(x.left[2 * i], x.left[2 * i + 1]);
            right[i] = to_bf16s(x.right[2 * i], x.right[2 * i + 1]);
        }
        a = make_uint4(left[0], left[1], left[2], left[3]), b = make_uint4(right[0], right[1], right[2], right[3]);
        bad |= odd(a) | odd(b);
        to[0] = a, to[HALF / 8] = b;
    }
    if (bad) faults[unit] = 1;
}
