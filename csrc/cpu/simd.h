/* One small vocabulary of vector operations over four instruction sets, so that each kernel is written once. (The fifth
 * is AVX-512 and one operation more.)
 *
 * The file that includes this is compiled once per instruction set, which QAD_USE_... names. Everything
 * here has internal linkage: an inline function of a common name, compiled for AVX-512 and merged by the linker, would
 * crash older machines.
 *
 * F: `width` floats. U: as many 32-bit words. D: width / 2 words of 64 bits. M: a comparison's result.
 * max_of(a, b) and min_of(a, b) return b if either is NaN. No operation contracts a product and a sum unless it says so.
 * "Halves" are the 16-bit halves of words; join_halves takes the low ones of one and the high ones of the other vector,
 * high_halves_of the high ones of one and then of the other. bfloats_of rounds one and then the other to bf16, where
 * nothing is subnormal; a NaN comes out as anything.
 * partial_max takes four vectors, finish_max width / 4 of what that gives: the largest word of each of `width` vectors.
 * partial_max_halves takes eight, and store_max_halves what that gives; load_max_halves widens `width` of them.
 * calls_in_chunk are a vector's calls of the random generator, counted from their chunk's first, in the order that
 * interleave needs, which is given pairs of words, the later one low; spread_chunks gives each what is given for its
 * chunk, and adds `step` for each call that a vector in the middle of a chunk begins after. unpack puts halves above
 * others, into two vectors of words; those of a chunk that was stored to_unpack come in order. (AVX-512 needs another
 * order in interleave for that, AVX2 in both, NEON and plain vectors in neither.)
 * convert_unsigned takes multiples of 2^15, and gives their share of 2^32 times unsigned_one.
 * Where can_stream, stream_words stores past the caches, to an address that is a multiple of a vector's size; after the
 * last comes end_of_stream.
 */
#ifndef QAD_SIMD_H
#define QAD_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(QAD_USE_AVX512BF16)
#define QAD_USE_AVX512
#if defined(__AVX512BF16__) /* not by GCC 9 and older */
#define QAD_HAS_BFLOATS
#endif
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define QAD_INLINE static inline __attribute__((always_inline))
#define QAD_MEMBER inline __attribute__((always_inline))
/* After a lambda's parameters. */
#define QAD_INLINED __attribute__((always_inline))
/* For what is called once a batch: inlined at each call it would double the time of the first build. */
#define QAD_CALLED static __attribute__((noinline))
#define QAD_CALLED_MEMBER __attribute__((noinline))

namespace {

#if defined(QAD_USE_AVX512)

constexpr int width = 16;
constexpr bool can_stream = true;
typedef __m512 F;
typedef __m512i U;
typedef __m512i D;
typedef __mmask16 M;

QAD_INLINE F load(const float *p) { return _mm512_loadu_ps(p); }
QAD_INLINE void store(float *p, F a) { _mm512_storeu_ps(p, a); }
QAD_INLINE U load_words(const void *p) { return _mm512_loadu_si512(p); }
QAD_INLINE void store_words(void *p, U a) { _mm512_storeu_si512(p, a); }
QAD_INLINE void stream_words(void *p, U a) { _mm512_stream_si512((__m512i *)p, a); }
QAD_INLINE void end_of_stream() { _mm_sfence(); }
QAD_INLINE F set(float a) { return _mm512_set1_ps(a); }
QAD_INLINE U set_words(uint32_t a) { return _mm512_set1_epi32((int)a); }
QAD_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
QAD_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
QAD_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
QAD_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
QAD_INLINE F fused_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
QAD_INLINE F add_down(F a, F b) { return _mm512_add_round_ps(a, b, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
/* For magnitudes below 2^22; not by vrndscaleps, which is two instructions in one. */
QAD_INLINE F floor_of(F a) {
    const F magic = set(12582912.0f);
    return _mm512_sub_ps(add_down(a, magic), magic);
}
QAD_INLINE F max_of(F a, F b) { return _mm512_max_ps(a, b); }
QAD_INLINE F min_of(F a, F b) { return _mm512_min_ps(a, b); }
QAD_INLINE U bits_of(F a) { return _mm512_castps_si512(a); }
QAD_INLINE F float_of(U a) { return _mm512_castsi512_ps(a); }
QAD_INLINE F convert(U a) { return _mm512_cvtepi32_ps(a); }
QAD_INLINE F convert_unsigned(U a) { return _mm512_cvtepu32_ps(a); }
constexpr float unsigned_one = 0x1p32f;
QAD_INLINE U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
QAD_INLINE U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
QAD_INLINE U bit_xor(U a, U b) { return _mm512_xor_si512(a, b); }
QAD_INLINE U add_words(U a, U b) { return _mm512_add_epi32(a, b); }
QAD_INLINE U shift_left(U a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
QAD_INLINE U shift_right(U a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
QAD_INLINE U rotate_left_1(U a) { return _mm512_rol_epi32(a, 1); }
QAD_INLINE U max_words(U a, U b) { return _mm512_max_epu32(a, b); }
QAD_INLINE U rotate_halves_left_1(U a) { return _mm512_or_si512(_mm512_add_epi16(a, a), _mm512_srli_epi16(a, 15)); }
QAD_INLINE U add_halves(U a, U b) { return _mm512_add_epi16(a, b); }
QAD_INLINE U max_halves(U a, U b) { return _mm512_max_epu16(a, b); }
QAD_INLINE uint32_t halves_below(const uint16_t *p, uint16_t limit) {
    return _mm256_cmplt_epu16_mask(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi16((short)limit));
}
QAD_INLINE void pack_words(void *to, const void *from, uint32_t which) {
    store_words(to, _mm512_maskz_compress_epi32((__mmask16)which, load_words(from)));
}
QAD_INLINE void pack_longs(uint64_t *to, const uint64_t *from, uint32_t which) {
    store_words(to, _mm512_maskz_compress_epi64((__mmask8)which, load_words(from)));
    to += __builtin_popcount(which & 0xffu);
    store_words(to, _mm512_maskz_compress_epi64((__mmask8)(which >> 8), load_words(from + 8)));
}
QAD_INLINE U min_halves(U a, U b) { return _mm512_min_epu16(a, b); }
QAD_INLINE U min_signed_halves(U a, U b) { return _mm512_min_epi16(a, b); }
QAD_INLINE U join_halves(U low, U high) { return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high); }
/* Tables of 32 entries in one register or two, looked up with the lowest 5 bits of halves or words: no other set has
 * this. */
#define QAD_HAS_LOOK_UP
QAD_INLINE U look_up_halves(U table, U index) { return _mm512_permutexvar_epi16(index, table); }
QAD_INLINE F look_up_words(F low, F high, U index) { return _mm512_permutex2var_ps(low, index, high); }
/* fp16 in the lowest halves. */
QAD_INLINE U round_half(F a) {
    return _mm512_castsi256_si512(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
QAD_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
QAD_INLINE M less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
QAD_INLINE M both(M a, M b) { return (M)(a & b); }
QAD_INLINE F keep_if(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
QAD_INLINE F choose(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
QAD_INLINE uint32_t reduce_max(U a) { return _mm512_reduce_max_epu32(a); }
QAD_INLINE U partial_max(const U *v) {
    const U a = _mm512_max_epu32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const U b = _mm512_max_epu32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}
QAD_INLINE U finish_max(const U *partial) {
    U half[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const U a = partial[2 * i], b = partial[2 * i + 1];
        half[i] = _mm512_max_epu32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee));
    }
    return _mm512_max_epu32(_mm512_shuffle_i64x2(half[0], half[1], 0x88), _mm512_shuffle_i64x2(half[0], half[1], 0xdd));
}
QAD_INLINE U partial_max_halves(const U *v) {
    U a[4], b[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        a[i] = max_halves(_mm512_unpacklo_epi16(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi16(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        b[i] = max_halves(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    return max_halves(_mm512_unpacklo_epi64(b[0], b[1]), _mm512_unpackhi_epi64(b[0], b[1]));
}
QAD_INLINE void store_max_halves(uint16_t *p, U partial) {
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(partial), _mm512_extracti64x4_epi64(partial, 1));
    _mm_storeu_si128((__m128i *)p, _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
/* In the pieces that were stored: the processor would not pass on a larger one before all of it has reached the cache. */
QAD_INLINE U load_max_halves(const uint16_t *p) {
    const __m128i *pieces = (const __m128i *)p;
    const __m256i all = _mm256_castsi128_si256(_mm_loadu_si128(pieces));
    return _mm512_cvtepu16_epi32(_mm256_inserti128_si256(all, _mm_loadu_si128(pieces + 1), 1));
}
QAD_INLINE float fold(F a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a),
                                      _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(a), 1)));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
QAD_INLINE U widen(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
QAD_INLINE void unpack(U high, U low, U *words) {
    words[0] = _mm512_unpacklo_epi16(low, high);
    words[1] = _mm512_unpackhi_epi16(low, high);
}
QAD_INLINE void narrow(uint16_t *p, U a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a)); }
/* The high halves of the words. */
QAD_INLINE void narrow_high(uint16_t *p, U a) {
    const __m512i odd = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15,
                                         13, 11, 9, 7, 5, 3, 1);
    _mm256_storeu_si256((__m256i *)p, _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, a)));
}
QAD_INLINE F load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
QAD_INLINE void store_half(uint16_t *p, F a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
QAD_INLINE U halves_of(F a, F b) {
    return _mm512_inserti64x4(round_half(a), _mm512_castsi512_si256(round_half(b)), 1);
}
/* The high halves of a's words, then of b's. */
QAD_INLINE U high_halves_of(U a, U b) {
    const __m512i high = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23,
                                          21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(a, high, b);
}
#ifdef QAD_HAS_BFLOATS
/* Halves that come one vector after the other, into the order in which unpack takes them apart. */
QAD_INLINE U pack_again(U halves) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), halves);
}
QAD_INLINE U bfloats_of(F a, F b) { return (U)_mm512_cvtne2ps_pbh(b, a); }
#endif
QAD_INLINE F load_codes(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
QAD_INLINE void store_codes(int8_t *p, F a) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

QAD_INLINE D set_long(uint64_t a) { return _mm512_set1_epi64((long long)a); }
QAD_INLINE D add_long(D a, D b) { return _mm512_add_epi64(a, b); }
template <bool to_unpack> QAD_INLINE D calls_in_chunk() { return _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3); }
QAD_INLINE D spread_chunks(const uint64_t *p, int vector, uint64_t) {
    return _mm512_broadcast_i64x2(_mm_loadu_si128((const __m128i *)(p + 2 * vector)));
}
QAD_INLINE D mul_low_words(D a, D b) { return _mm512_mul_epu32(a, b); }
QAD_INLINE D high_word(D a) { return _mm512_srli_epi64(a, 32); }
QAD_INLINE D low_as_high(D a) { return _mm512_slli_epi64(a, 32); }
QAD_INLINE D xor_2(D a, D b) { return _mm512_xor_si512(a, b); }
QAD_INLINE D xor_3(D a, D b, D c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
template <bool to_unpack> QAD_INLINE void interleave(uint16_t *p, D first, D second) {
    const __m512i packed = _mm512_setr_epi32(1, 0, 9, 8, 17, 16, 25, 24, 5, 4, 13, 12, 21, 20, 29, 28);
    const __m512i in_order = _mm512_setr_epi32(1, 0, 17, 16, 5, 4, 21, 20, 9, 8, 25, 24, 13, 12, 29, 28);
    const __m512i chunk_0 = to_unpack ? packed : in_order, chunk_1 = _mm512_add_epi32(chunk_0, set_words(2));
    _mm512_storeu_si512(p, _mm512_permutex2var_epi32(first, chunk_0, second));
    _mm512_storeu_si512(p + 32, _mm512_permutex2var_epi32(first, chunk_1, second));
}

#elif defined(QAD_USE_AVX2)

constexpr int width = 8;
constexpr bool can_stream = true;
typedef __m256 F;
typedef __m256i U;
typedef __m256i D;
typedef __m256 M;

QAD_INLINE F load(const float *p) { return _mm256_loadu_ps(p); }
QAD_INLINE void store(float *p, F a) { _mm256_storeu_ps(p, a); }
QAD_INLINE U load_words(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
QAD_INLINE void store_words(void *p, U a) { _mm256_storeu_si256((__m256i *)p, a); }
QAD_INLINE void stream_words(void *p, U a) { _mm256_stream_si256((__m256i *)p, a); }
QAD_INLINE void end_of_stream() { _mm_sfence(); }
QAD_INLINE F set(float a) { return _mm256_set1_ps(a); }
QAD_INLINE U set_words(uint32_t a) { return _mm256_set1_epi32((int)a); }
QAD_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
QAD_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
QAD_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
QAD_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
QAD_INLINE F fused_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
QAD_INLINE F floor_of(F a) { return _mm256_floor_ps(a); }
QAD_INLINE F max_of(F a, F b) { return _mm256_max_ps(a, b); }
QAD_INLINE F min_of(F a, F b) { return _mm256_min_ps(a, b); }
QAD_INLINE U bits_of(F a) { return _mm256_castps_si256(a); }
QAD_INLINE F float_of(U a) { return _mm256_castsi256_ps(a); }
QAD_INLINE F convert(U a) { return _mm256_cvtepi32_ps(a); }
QAD_INLINE F convert_unsigned(U a) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 1)); }
constexpr float unsigned_one = 0x1p31f;
QAD_INLINE U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
QAD_INLINE U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
QAD_INLINE U bit_xor(U a, U b) { return _mm256_xor_si256(a, b); }
QAD_INLINE U add_words(U a, U b) { return _mm256_add_epi32(a, b); }
QAD_INLINE U shift_left(U a, int n) { return _mm256_slli_epi32(a, n); }
QAD_INLINE U shift_right(U a, int n) { return _mm256_srli_epi32(a, n); }
QAD_INLINE U rotate_left_1(U a) { return _mm256_or_si256(_mm256_add_epi32(a, a), _mm256_srli_epi32(a, 31)); }
QAD_INLINE U max_words(U a, U b) { return _mm256_max_epu32(a, b); }
QAD_INLINE U rotate_halves_left_1(U a) { return _mm256_or_si256(_mm256_add_epi16(a, a), _mm256_srli_epi16(a, 15)); }
QAD_INLINE U add_halves(U a, U b) { return _mm256_add_epi16(a, b); }
QAD_INLINE U max_halves(U a, U b) { return _mm256_max_epu16(a, b); }
QAD_INLINE U min_halves(U a, U b) { return _mm256_min_epu16(a, b); }
QAD_INLINE U min_signed_halves(U a, U b) { return _mm256_min_epi16(a, b); }
QAD_INLINE U join_halves(U low, U high) { return _mm256_blend_epi16(low, high, 0xaa); }
QAD_INLINE M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
QAD_INLINE M less_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
QAD_INLINE M both(M a, M b) { return _mm256_and_ps(a, b); }
QAD_INLINE F keep_if(M m, F a) { return _mm256_and_ps(m, a); }
QAD_INLINE F choose(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
QAD_INLINE uint32_t reduce_max(U a) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1)));
}
QAD_INLINE U partial_max(const U *v) {
    const U a = _mm256_max_epu32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
    const U b = _mm256_max_epu32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
    return _mm256_max_epu32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}
QAD_INLINE U finish_max(const U *partial) {
    const U a = partial[0], b = partial[1];
    return _mm256_max_epu32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}
QAD_INLINE U partial_max_halves(const U *v) {
    U a[4], b[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        a[i] = max_halves(_mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]), _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        b[i] = max_halves(_mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    return max_halves(_mm256_unpacklo_epi64(b[0], b[1]), _mm256_unpackhi_epi64(b[0], b[1]));
}
QAD_INLINE void store_max_halves(uint16_t *p, U partial) {
    _mm_storeu_si128((__m128i *)p,
                     _mm_max_epu16(_mm256_castsi256_si128(partial), _mm256_extracti128_si256(partial, 1)));
}
QAD_INLINE float fold(F a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
QAD_INLINE U widen(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
QAD_INLINE void unpack(U high, U low, U *words) {
    words[0] = _mm256_unpacklo_epi16(low, high);
    words[1] = _mm256_unpackhi_epi16(low, high);
}
QAD_INLINE void narrow(uint16_t *p, U a) {
    const __m256i packed = _mm256_packus_epi32(a, a);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
QAD_INLINE void narrow_high(uint16_t *p, U a) { narrow(p, _mm256_srli_epi32(a, 16)); }
QAD_INLINE F load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
QAD_INLINE void store_half(uint16_t *p, F a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
QAD_INLINE U halves_of(F a, F b) {
    return _mm256_set_m128i(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                            _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
QAD_INLINE U high_halves_of(U a, U b) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16)), 0xd8);
}
QAD_INLINE F load_codes(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
QAD_INLINE void store_codes(int8_t *p, F a) {
    const __m256i words = _mm256_cvtps_epi32(a);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(halves, halves));
}

QAD_INLINE D set_long(uint64_t a) { return _mm256_set1_epi64x((long long)a); }
QAD_INLINE D add_long(D a, D b) { return _mm256_add_epi64(a, b); }
template <bool to_unpack> QAD_INLINE D calls_in_chunk() {
    return to_unpack ? _mm256_setr_epi64x(0, 1, 2, 3) : _mm256_setr_epi64x(0, 2, 1, 3);
}
QAD_INLINE D spread_chunks(const uint64_t *p, int vector, uint64_t) { return set_long(p[vector]); }
QAD_INLINE D mul_low_words(D a, D b) { return _mm256_mul_epu32(a, b); }
QAD_INLINE D high_word(D a) { return _mm256_srli_epi64(a, 32); }
QAD_INLINE D low_as_high(D a) { return _mm256_slli_epi64(a, 32); }
QAD_INLINE D xor_2(D a, D b) { return _mm256_xor_si256(a, b); }
QAD_INLINE D xor_3(D a, D b, D c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
template <bool to_unpack> QAD_INLINE void interleave(uint16_t *p, D first, D second) {
    first = _mm256_shuffle_epi32(first, 0xb1);
    second = _mm256_shuffle_epi32(second, 0xb1);
    store_words(p, to_unpack ? _mm256_permute2x128_si256(first, second, 0x20) : _mm256_unpacklo_epi64(first, second));
    store_words(p + 16, to_unpack ? _mm256_permute2x128_si256(first, second, 0x31) : _mm256_unpackhi_epi64(first, second));
}

#elif defined(QAD_USE_NEON)

constexpr int width = 4;
constexpr bool can_stream = false;
typedef float32x4_t F;
typedef uint32x4_t U;
typedef uint64x2_t D;
typedef uint32x4_t M;

QAD_INLINE F load(const float *p) { return vld1q_f32(p); }
QAD_INLINE void store(float *p, F a) { vst1q_f32(p, a); }
QAD_INLINE U load_words(const void *p) { return vreinterpretq_u32_u8(vld1q_u8((const uint8_t *)p)); }
QAD_INLINE void store_words(void *p, U a) { vst1q_u8((uint8_t *)p, vreinterpretq_u8_u32(a)); }
QAD_INLINE void stream_words(void *p, U a) { store_words(p, a); }
QAD_INLINE void end_of_stream() {}
QAD_INLINE F set(float a) { return vdupq_n_f32(a); }
QAD_INLINE U set_words(uint32_t a) { return vdupq_n_u32(a); }
QAD_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
QAD_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
QAD_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
QAD_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
QAD_INLINE F fused_add(F a, F b, F c) { return vfmaq_f32(c, a, b); }
QAD_INLINE F floor_of(F a) { return vrndmq_f32(a); }
QAD_INLINE F max_of(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
QAD_INLINE F min_of(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
QAD_INLINE U bits_of(F a) { return vreinterpretq_u32_f32(a); }
QAD_INLINE F float_of(U a) { return vreinterpretq_f32_u32(a); }
QAD_INLINE F convert(U a) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a)); }
QAD_INLINE F convert_unsigned(U a) { return vcvtq_f32_u32(a); }
constexpr float unsigned_one = 0x1p32f;
QAD_INLINE U bit_and(U a, U b) { return vandq_u32(a, b); }
QAD_INLINE U bit_or(U a, U b) { return vorrq_u32(a, b); }
QAD_INLINE U bit_xor(U a, U b) { return veorq_u32(a, b); }
QAD_INLINE U add_words(U a, U b) { return vaddq_u32(a, b); }
QAD_INLINE U shift_left(U a, int n) { return vshlq_u32(a, vdupq_n_s32(n)); }
QAD_INLINE U shift_right(U a, int n) { return vshlq_u32(a, vdupq_n_s32(-n)); }
QAD_INLINE U rotate_left_1(U a) { return vorrq_u32(vaddq_u32(a, a), vshrq_n_u32(a, 31)); }
QAD_INLINE U max_words(U a, U b) { return vmaxq_u32(a, b); }
QAD_INLINE U rotate_halves_left_1(U a) {
    const uint16x8_t halves = vreinterpretq_u16_u32(a);
    return vreinterpretq_u32_u16(vsraq_n_u16(vaddq_u16(halves, halves), halves, 15));
}
QAD_INLINE U add_halves(U a, U b) {
    return vreinterpretq_u32_u16(vaddq_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b)));
}
QAD_INLINE U max_halves(U a, U b) {
    return vreinterpretq_u32_u16(vmaxq_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b)));
}
QAD_INLINE U min_halves(U a, U b) {
    return vreinterpretq_u32_u16(vminq_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b)));
}
QAD_INLINE U min_signed_halves(U a, U b) {
    return vreinterpretq_u32_s16(vminq_s16(vreinterpretq_s16_u32(a), vreinterpretq_s16_u32(b)));
}
QAD_INLINE U join_halves(U low, U high) { return vbslq_u32(vdupq_n_u32(0xffff), low, high); }
QAD_INLINE M less(F a, F b) { return vcltq_f32(a, b); }
QAD_INLINE M less_equal(F a, F b) { return vcleq_f32(a, b); }
QAD_INLINE M both(M a, M b) { return vandq_u32(a, b); }
QAD_INLINE F keep_if(M m, F a) { return float_of(vandq_u32(m, bits_of(a))); }
QAD_INLINE F choose(M m, F a, F b) { return vbslq_f32(m, a, b); }
QAD_INLINE uint32_t reduce_max(U a) { return vmaxvq_u32(a); }
QAD_INLINE U partial_max(const U *v) { return vpmaxq_u32(vpmaxq_u32(v[0], v[1]), vpmaxq_u32(v[2], v[3])); }
QAD_INLINE U finish_max(const U *partial) { return partial[0]; }
QAD_INLINE U partial_max_halves(const U *v) {
    uint16x8_t a[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = vreinterpretq_u16_u32(v[i]);
#pragma GCC unroll 3
    for (int left = 4; left; left /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < left; ++i) a[i] = vpmaxq_u16(a[2 * i], a[2 * i + 1]);
    return vreinterpretq_u32_u16(a[0]);
}
QAD_INLINE void store_max_halves(uint16_t *p, U partial) { store_words(p, partial); }
QAD_INLINE float fold(F a) {
    const float32x2_t half = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(half, 0) + vget_lane_f32(half, 1);
}
QAD_INLINE U widen(const uint16_t *p) { return vmovl_u16(vld1_u16(p)); }
QAD_INLINE void unpack(U high, U low, U *words) {
    words[0] = vreinterpretq_u32_u16(vzip1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high)));
    words[1] = vreinterpretq_u32_u16(vzip2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high)));
}
QAD_INLINE void narrow(uint16_t *p, U a) { vst1_u16(p, vmovn_u32(a)); }
QAD_INLINE void narrow_high(uint16_t *p, U a) { vst1_u16(p, vshrn_n_u32(a, 16)); }
QAD_INLINE F load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
QAD_INLINE void store_half(uint16_t *p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
QAD_INLINE U halves_of(F a, F b) {
    return vreinterpretq_u32_f16(vcombine_f16(vcvt_f16_f32(a), vcvt_f16_f32(b)));
}
QAD_INLINE U high_halves_of(U a, U b) {
    return vreinterpretq_u32_u16(vuzp2q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b)));
}
QAD_INLINE F load_codes(const int8_t *p) {
    int32_t packed;
    memcpy(&packed, p, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(packed)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
QAD_INLINE void store_codes(int8_t *p, F a) {
    const int16x4_t halves = vmovn_s32(vcvtnq_s32_f32(a));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
    const int32_t packed = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    memcpy(p, &packed, 4);
}

QAD_INLINE D set_long(uint64_t a) { return vdupq_n_u64(a); }
QAD_INLINE D add_long(D a, D b) { return vaddq_u64(a, b); }
template <bool to_unpack> QAD_INLINE D calls_in_chunk() { return vcombine_u64(vcreate_u64(0), vcreate_u64(1)); }
QAD_INLINE D spread_chunks(const uint64_t *p, int vector, uint64_t step) {
    return set_long(p[vector / 2] + (uint64_t)(vector % 2) * 2 * step);
}
QAD_INLINE D mul_low_words(D a, D b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
QAD_INLINE D high_word(D a) { return vshrq_n_u64(a, 32); }
QAD_INLINE D low_as_high(D a) { return vshlq_n_u64(a, 32); }
QAD_INLINE D xor_2(D a, D b) { return veorq_u64(a, b); }
QAD_INLINE D xor_3(D a, D b, D c) { return veorq_u64(veorq_u64(a, b), c); }
template <bool to_unpack> QAD_INLINE void interleave(uint16_t *p, D first, D second) {
    const uint32x4_t a = vrev64q_u32(vreinterpretq_u32_u64(first)), b = vrev64q_u32(vreinterpretq_u32_u64(second));
    store_words(p, vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b))));
    store_words(p + 8, vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(a), vreinterpretq_u64_u32(b))));
}

#else /* any machine: the compiler's own vectors of four lanes */

constexpr int width = 4;
constexpr bool can_stream = false;
typedef float F __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int32_t Signed __attribute__((vector_size(16)));
typedef uint64_t D __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef int16_t SignedHalves __attribute__((vector_size(16)));
typedef U M;

QAD_INLINE F load(const float *p) { F r; memcpy(&r, p, sizeof r); return r; }
QAD_INLINE void store(float *p, F a) { memcpy(p, &a, sizeof a); }
QAD_INLINE U load_words(const void *p) { U r; memcpy(&r, p, sizeof r); return r; }
QAD_INLINE void store_words(void *p, U a) { memcpy(p, &a, sizeof a); }
QAD_INLINE void stream_words(void *p, U a) { store_words(p, a); }
QAD_INLINE void end_of_stream() {}
QAD_INLINE F set(float a) { return F{a, a, a, a}; }
QAD_INLINE U set_words(uint32_t a) { return U{a, a, a, a}; }
QAD_INLINE U bits_of(F a) { return (U)a; }
QAD_INLINE F float_of(U a) { return (F)a; }
QAD_INLINE U choose_words(U m, U a, U b) { return (m & a) | (~m & b); }
QAD_INLINE F choose(M m, F a, F b) { return (F)choose_words(m, (U)a, (U)b); }
QAD_INLINE F keep_if(M m, F a) { return (F)(m & (U)a); }
QAD_INLINE F add(F a, F b) { return a + b; }
QAD_INLINE F sub(F a, F b) { return a - b; }
QAD_INLINE F mul(F a, F b) { return a * b; }
QAD_INLINE F div(F a, F b) { return a / b; }
/* Callers use fused_add only where the product is exact, or where the last bit does not matter. */
QAD_INLINE F fused_add(F a, F b, F c) { return a * b + c; }
/* For magnitudes below 2^22. */
QAD_INLINE F floor_of(F a) {
    const F magic = set(12582912.0f), nearest = (a + magic) - magic;
    return nearest - keep_if((U)(a < nearest), set(1.0f));
}
QAD_INLINE F max_of(F a, F b) { return choose((U)(a > b), a, b); }
QAD_INLINE F min_of(F a, F b) { return choose((U)(a < b), a, b); }
QAD_INLINE F convert(U a) { return __builtin_convertvector((Signed)a, F); }
QAD_INLINE F convert_unsigned(U a) { return convert(a >> 1); }
constexpr float unsigned_one = 0x1p31f;
QAD_INLINE U bit_and(U a, U b) { return a & b; }
QAD_INLINE U bit_or(U a, U b) { return a | b; }
QAD_INLINE U bit_xor(U a, U b) { return a ^ b; }
QAD_INLINE U add_words(U a, U b) { return a + b; }
QAD_INLINE U shift_left(U a, int n) { return a << n; }
QAD_INLINE U shift_right(U a, int n) { return a >> n; }
QAD_INLINE U rotate_left_1(U a) { return (a << 1) | (a >> 31); }
QAD_INLINE U max_words(U a, U b) { return choose_words((U)(a > b), a, b); }
QAD_INLINE U rotate_halves_left_1(U a) { return (U)(((Halves)a << 1) | ((Halves)a >> 15)); }
QAD_INLINE U add_halves(U a, U b) { return (U)((Halves)a + (Halves)b); }
QAD_INLINE U max_halves(U a, U b) { return choose_words((U)((Halves)a > (Halves)b), a, b); }
QAD_INLINE U min_halves(U a, U b) { return choose_words((U)((Halves)a < (Halves)b), a, b); }
QAD_INLINE U min_signed_halves(U a, U b) { return choose_words((U)((SignedHalves)a < (SignedHalves)b), a, b); }
QAD_INLINE U join_halves(U low, U high) { return (low & 0xffffu) | (high & 0xffff0000u); }
QAD_INLINE M less(F a, F b) { return (U)(a < b); }
QAD_INLINE M less_equal(F a, F b) { return (U)(a <= b); }
QAD_INLINE M both(M a, M b) { return a & b; }
QAD_INLINE uint32_t reduce_max(U a) {
    const uint32_t low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
}
QAD_INLINE U partial_max(const U *v) { return U{reduce_max(v[0]), reduce_max(v[1]), reduce_max(v[2]), reduce_max(v[3])}; }
QAD_INLINE U finish_max(const U *partial) { return partial[0]; }
QAD_INLINE U partial_max_halves(const U *v) {
    uint16_t largest[8];
    for (int i = 0; i < 8; ++i) largest[i] = (uint16_t)(reduce_max(max_halves(v[i], v[i] << 16)) >> 16);
    return load_words(largest);
}
QAD_INLINE void store_max_halves(uint16_t *p, U partial) { store_words(p, partial); }
QAD_INLINE float fold(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
QAD_INLINE U widen(const uint16_t *p) {
    uint16_t four[4];
    memcpy(four, p, sizeof four);
    return U{four[0], four[1], four[2], four[3]};
}
QAD_INLINE void unpack(U high, U low, U *words) {
    uint16_t all[8], under[8], both[16];
    store_words(all, high);
    store_words(under, low);
    for (int i = 0; i < 8; ++i) {
        const uint32_t word = (uint32_t)all[i] << 16 | under[i];
        memcpy(both + 2 * i, &word, 4);
    }
    words[0] = load_words(both);
    words[1] = load_words(both + 8);
}
QAD_INLINE void narrow(uint16_t *p, U a) {
    const uint16_t four[4] = {(uint16_t)a[0], (uint16_t)a[1], (uint16_t)a[2], (uint16_t)a[3]};
    memcpy(p, four, sizeof four);
}
QAD_INLINE void narrow_high(uint16_t *p, U a) { narrow(p, a >> 16); }
/* fp16 by its definition: subnormals through an exact product, infinities and NaNs by their exponent. */
QAD_INLINE F load_half(const uint16_t *p) {
    const U half = widen(p), magnitude = half & 0x7fffu, moved = magnitude << 13;
    U bits = (U)((F)moved * set(0x1p112f));
    bits = choose_words((U)(magnitude >= 0x7c00u), moved | 0x7f800000u, bits);
    bits |= (U)(magnitude > 0x7c00u) & 0x00400000u;
    return (F)(bits | (half & 0x8000u) << 16);
}
QAD_INLINE void store_half(uint16_t *p, F a) {
    const U sign = ((U)a >> 16) & 0x8000u, magnitude = (U)a & 0x7fffffffu;
    /* Below 2^-14, adding 1/2 leaves the multiples of 2^-24 in the significand, rounded half to even. */
    const U tiny = (U)((F)magnitude + set(0.5f)) - 0x3f000000u;
    U half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    half = choose_words((U)(magnitude < 0x38800000u), tiny, half);
    half = choose_words((U)(magnitude >= 0x477ff000u), set_words(0x7c00u), half); /* rounds to 2^16 or more */
    half = choose_words((U)(magnitude > 0x7f800000u), 0x7e00u | ((magnitude >> 13) & 0x3ffu), half);
    narrow(p, half | sign);
}
QAD_INLINE U halves_of(F a, F b) {
    uint16_t halves[8];
    store_half(halves, a);
    store_half(halves + 4, b);
    return load_words(halves);
}
QAD_INLINE U high_halves_of(U a, U b) {
    uint16_t halves[8];
    narrow_high(halves, a);
    narrow_high(halves + 4, b);
    return load_words(halves);
}
QAD_INLINE F load_codes(const int8_t *p) { return F{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
QAD_INLINE void store_codes(int8_t *p, F a) {
    for (int i = 0; i < 4; ++i) p[i] = (int8_t)(int32_t)a[i];
}

QAD_INLINE D set_long(uint64_t a) { return D{a, a}; }
QAD_INLINE D add_long(D a, D b) { return a + b; }
template <bool to_unpack> QAD_INLINE D calls_in_chunk() { return D{0, 1}; }
QAD_INLINE D spread_chunks(const uint64_t *p, int vector, uint64_t step) {
    return set_long(p[vector / 2] + (uint64_t)(vector % 2) * 2 * step);
}
QAD_INLINE D mul_low_words(D a, D b) {
    return D{(a[0] & 0xffffffffu) * (b[0] & 0xffffffffu), (a[1] & 0xffffffffu) * (b[1] & 0xffffffffu)};
}
QAD_INLINE D high_word(D a) { return a >> 32; }
QAD_INLINE D low_as_high(D a) { return a << 32; }
QAD_INLINE D xor_2(D a, D b) { return a ^ b; }
QAD_INLINE D xor_3(D a, D b, D c) { return a ^ b ^ c; }
template <bool to_unpack> QAD_INLINE void interleave(uint16_t *p, D first, D second) {
    const uint64_t words[4] = {first[0], second[0], first[1], second[1]};
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 4; ++k) p[4 * i + k] = (uint16_t)(words[i] >> (16 * (k ^ 2)));
}

#endif

/* ---- the same on every instruction set ---- */

#if !defined(QAD_USE_AVX512)
QAD_INLINE U load_max_halves(const uint16_t *p) { return widen(p); }
/* A bit for each of `width` halves. */
QAD_INLINE uint32_t halves_below(const uint16_t *p, uint16_t limit) {
    uint32_t below = 0;
    for (int i = 0; i < width; ++i) below |= (uint32_t)(p[i] < limit) << i;
    return below;
}
/* Those of `width` words, or longs, for which there is a bit, without gaps; what follows them may be overwritten. */
QAD_INLINE void pack_words(void *to, const void *from, uint32_t which) {
    char *next = (char *)to;
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
        memcpy(next, (const char *)from + 4 * i, 4);
        next += (which >> i & 1) * 4;
    }
}
QAD_INLINE void pack_longs(uint64_t *to, const uint64_t *from, uint32_t which) {
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
        *to = from[i];
        to += which >> i & 1;
    }
}
#endif

QAD_INLINE F load_bfloat(const uint16_t *p) { return float_of(shift_left(widen(p), 16)); }
/* A bf16 in the high half of each word, half to even, and whatever in the low one. Not for NaNs but the quiet one: the
 * rounding would carry their payload into an infinity. */
QAD_INLINE U round_bfloat(F a) {
    const U bits = bits_of(a), odd = bit_and(shift_right(bits, 16), set_words(1));
    /* The lowest bit decides nothing but whether a tie is one: set, it makes the tie round up. */
    return add_words(bit_or(bits, odd), set_words(0x7fff));
}
QAD_INLINE void store_bfloat(uint16_t *p, F a) { narrow_high(p, round_bfloat(a)); }
#ifndef QAD_HAS_BFLOATS
QAD_INLINE U bfloats_of(F a, F b) { return high_halves_of(round_bfloat(a), round_bfloat(b)); }
#endif

} // namespace
#endif
