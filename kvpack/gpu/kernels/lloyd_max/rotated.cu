// TurboQuant (arXiv 2504.19874, algorithm 1) on tensor cores: rotation and Lloyd-Max codes in one pass. The instruction is
// mma.sync m16n8k16, which multiplies bf16 numbers and adds float32.
//
// DIMS is 64 or 128, BITS is 1 to 4. A code takes STEP bits: 8, or 3 if BITS is 3. A vector's codes take DIMS * STEP / 8 bytes,
// at an address divisible by 4. The rotation is given as two bf16 matrices [2, DIMS, DIMS], row-major, whose sum has 16 of its
// bits; a row makes one output. For decompress it is transposed. A warp handles ROWS vectors at a time.
#define PADDED (DIMS + PADDING)
#define TILES (DIMS / 8)
#define WORDS (DIMS * STEP / 32)
#define BOUNDS ((1 << BITS) - 1)

#ifdef __CUDA_ARCH__
__device__ __forceinline__ void multiply(float *sum, const u32 *a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

__device__ __forceinline__ void load_matrix(const u32 *matrix, u32 *held) {
    for (int i = threadIdx.x; i < DIMS * DIMS; i += WARPS * 32) {  // both matrices, in words of two elements
        int row = i / (DIMS / 2), column = i % (DIMS / 2);
        held[row * (PADDED / 2) + column] = matrix[i];
    }
    __syncthreads();
}

// Multiplies ROWS vectors by both matrices. With g = lane / 4 and t = lane % 4, sums[j] gets columns 8 j + 2 t and 8 j + 2 t + 1
// of row g, then of row g + 8. vectors(k, a, low) gives the fragments of elements 16 k to 16 k + 15; with TWO a vector is the
// sum of two bf16 vectors, a and low. They are loaded one k ahead.
template <bool TWO, typename Vectors>
__device__ __forceinline__ void rotate(Vectors vectors, const u32 *held, float (*sums)[4]) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    u32 a[4], low[4], next[4], next_low[4];
    vectors(0, a, low);
#pragma unroll
    for (int j = 0; j < TILES; j++) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0;
#pragma unroll 2
    for (int k = 0; k < DIMS / 16; k++) {
        if (k + 1 < DIMS / 16) vectors(k + 1, next, next_low);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const u32 *b = held + (8 * j + g) * (PADDED / 2) + 8 * k + t, *rest = b + DIMS * (PADDED / 2);
            u32 b0 = b[0], b1 = b[4];
            multiply(sums[j], a, b0, b1);
            if (TWO) multiply(sums[j], low, b0, b1);
            multiply(sums[j], a, rest[0], rest[4]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = next[i], low[i] = next_low[i];
    }
}

__device__ __forceinline__ u32 code_of(float value, const float *bounds) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < BOUNDS; i++) code += value > bounds[i];
    return code;
}

// Stores the codes of one row, of which a lane has a pair in each tile. Codes of three bits are packed: four neighbouring lanes
// make three whole words of the 96 bits of four tiles.
__device__ __forceinline__ void store_codes(const u32 *pairs, u32 *out, bool live) {
    int t = threadIdx.x % 4;
#if STEP == 8
#pragma unroll
    for (int j = 0; j < TILES; j++)
        if (live) ((u16 *)out)[4 * j + t] = (u16)pairs[j];
#else
#pragma unroll
    for (int j = 0; j < TILES; j += 4) {
        u32 b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b[i] = pairs[j + i] << 6 * t;
            b[i] |= __shfl_xor_sync(ALL, b[i], 1);
            b[i] |= __shfl_xor_sync(ALL, b[i], 2);
        }
        u32 word = t == 0 ? b[0] | b[1] << 24 : t == 1 ? b[1] >> 8 | b[2] << 16 : b[2] >> 16 | b[3] << 8;
        if (live && t < 3) out[j / 4 * 3 + t] = word;
    }
#endif
}

// A lane's pair of codes in one half (0 or 1) of a row's elements 16 k to 16 k + 15, as an index of 2 * BITS bits.
__device__ __forceinline__ u32 load_codes(const u32 *row, int k, int half, int t) {
#if STEP == 8
    u32 pair = ((const u16 *)row)[8 * k + 4 * half + t];
    return (pair | pair >> (8 - BITS)) & ((1 << 2 * BITS) - 1);
#else
    int bit = 48 * k + 24 * half + 6 * t;
    const u32 *word = row + bit / 32;
    u32 next = bit % 32 > 26 ? word[1] : 0;
    return __funnelshift_r(word[0], next, bit) & 63;
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) compress(
    const u32 *vectors, i64 count, const u32 *matrix, const float *bounds_, u32 *codes, u16 *norms) {
    extern __shared__ u32 held[];
    load_matrix(matrix, held);
    float bounds[BOUNDS];
    for (int i = 0; i < BOUNDS; i++) bounds[i] = bounds_[i];
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (i64 first = ((i64)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS; first < count; first += (i64)gridDim.x * WARPS * ROWS) {
        i64 rows[2] = {first + g, first + g + 8};
        const u32 *x = vectors + (rows[0] < count ? rows[0] : 0) * (DIMS / 2), *y = vectors + (rows[1] < count ? rows[1] : 0) * (DIMS / 2);
        float sums[TILES][4];
        rotate<false>([&](int k, u32 *a, u32 *) {
            a[0] = x[8 * k + t], a[1] = y[8 * k + t], a[2] = x[8 * k + t + 4], a[3] = y[8 * k + t + 4];
        }, held, sums);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float square = 0;
#pragma unroll
            for (int j = 0; j < TILES; j++) square += sums[j][2 * r] * sums[j][2 * r] + sums[j][2 * r + 1] * sums[j][2 * r + 1];
            square += __shfl_xor_sync(ALL, square, 1);
            square += __shfl_xor_sync(ALL, square, 2);
            u16 norm = (u16)to_halves(sqrtf(square), 0);
            float scale = norm ? 1 / from_half(norm) : 1;
            u32 pairs[TILES];
#pragma unroll
            for (int j = 0; j < TILES; j++)
                pairs[j] = code_of(sums[j][2 * r] * scale, bounds) | code_of(sums[j][2 * r + 1] * scale, bounds) << STEP;
            bool live = rows[r] < count;
            store_codes(pairs, codes + rows[r] * WORDS, live);
            if (live && t == 0) norms[rows[r]] = norm;
        }
    }
}

// pairs_ [4 ** BITS] has, for every pair of codes, the nearest bf16 numbers to their levels, and those nearest to the rest.
extern "C" __global__ void __launch_bounds__(WARPS * 32) decompress(
    const u32 *codes, const u16 *norms, i64 count, const u32 *matrix, const u64 *pairs_, u32 *vectors) {
    extern __shared__ u32 held[];
    __shared__ u64 pairs[1 << 2 * BITS];
    if (threadIdx.x < 1 << 2 * BITS) pairs[threadIdx.x] = pairs_[threadIdx.x];
    load_matrix(matrix, held);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (i64 first = ((i64)blockIdx.x * WARPS + threadIdx.x / 32) * ROWS; first < count; first += (i64)gridDim.x * WARPS * ROWS) {
        i64 rows[2] = {first + g, first + g + 8};
        float sums[TILES][4], scales[2];
        const u32 *from[2];
        for (int r = 0; r < 2; r++) {
            i64 row = rows[r] < count ? rows[r] : 0;
            from[r] = codes + row * WORDS, scales[r] = from_half(norms[row]);
        }
        rotate<true>([&](int k, u32 *a, u32 *low) {
#pragma unroll
            for (int i = 0; i < 4; i++) {  // rows g, g + 8 at 16 k + 2 t, then at 16 k + 8 + 2 t
                u64 pair = pairs[load_codes(from[i % 2], k, i / 2, t)];
                a[i] = (u32)pair, low[i] = (u32)(pair >> 32);
            }
        }, held, sums);
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (rows[r] < count)
#pragma unroll
                for (int j = 0; j < TILES; j++)
                    vectors[rows[r] * (DIMS / 2) + 4 * j + t] = to_bf16s(sums[j][2 * r] * scales[r], sums[j][2 * r + 1] * scales[r]);
    }
}
