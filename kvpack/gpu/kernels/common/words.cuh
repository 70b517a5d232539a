// The words of a group while a warp decodes them: a ring in shared memory holds those that come next, and each lane has
// already loaded a part of those behind them.
// A ring has RING bytes, in two halves. It begins at a multiple of RING, so kernels that use it have no static shared memory.

struct Words {
    const u64 *next;  // what this lane will load after `ahead`
    u64 ahead;        // this lane's part of the half that follows those in the ring
    u64 *ring;
    u32 base;  // the ring's address in shared memory
    u32 at;    // position of the next word, in bytes from the beginning of the ring's first turn
    u32 full;  // end of the half in which that word is, in the same bytes
};

// Fills the ring of a warp with the words from `first` on.
__device__ __forceinline__ Words open_words(const u16 *first, u64 *ring) {
    int l = threadIdx.x % 32;
    u64 address = (u64)first;
    const u64 *aligned = pin_register((const u64 *)(address & ~7ull) + l);
    ring[l] = aligned[0], ring[32 + l] = aligned[32];
    __syncwarp();
    return {aligned + 96, aligned[64], ring, pin_register(shared_address(ring)), (u32)(address & 7), RING / 2};
}

// Fills the half of the ring that is used up, and loads what follows. It must be called at least every four codes.
__device__ __forceinline__ void refill(Words &words) {
    if (words.at < words.full) return;
    __syncwarp();
    words.ring[(words.full - RING / 2) % RING / 8 + threadIdx.x % 32] = words.ahead;
    words.ahead = *words.next;
    words.next += 32;
    words.full += RING / 2;
    __syncwarp();
}

// Hands the next words to the lanes that are due, in the order of lanes; `below` has the bits of the lanes before this one.
// Returns x shifted up by a word with the new word in its lower half, or x itself in a lane that is not due.
__device__ __forceinline__ u32 take(Words &words, u32 x, bool due, u32 below) {
    u32 mask = __ballot_sync(ALL, due);
    u32 word = shared_half((words.at + 2 * __popc(mask & below)) & (RING - 1) | words.base);
    words.at += 2 * __popc(mask);
    return due ? x << 16 | word : x;
}
