// Vectors and elementary functions for one instruction set.
//
// Included once per instruction set, inside its namespace and target, with VECTOR_BYTES defined: no include guard.

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

template <class R>
struct Simd;

template <>
struct Simd<float> {
    // I holds bits: unsigned, since lanes that nobody reads may overflow
    typedef float V __attribute__((vector_size(VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    typedef uint32_t I __attribute__((vector_size(VECTOR_BYTES)));
};

template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    typedef uint64_t I __attribute__((vector_size(VECTOR_BYTES)));
};

template <class R>
using Vec = typename Simd<R>::V;

template <class R>
constexpr int LANES = VECTOR_BYTES / sizeof(R);

template <class R>
INLINE Vec<R> load(const R* p) {
    return *reinterpret_cast<const typename Simd<R>::Unaligned*>(p);
}

template <class R>
INLINE void store(R* p, Vec<R> x) {
    *reinterpret_cast<typename Simd<R>::Unaligned*>(p) = x;
}

// Lanes of a and b by number, b's after a's.
template <class R, int... LANE>
INLINE Vec<R> shuffle(Vec<R> a, Vec<R> b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, LANE...);
#else
    return __builtin_shuffle(a, b, typename Simd<R>::I{LANE...});
#endif
}

// x - 0 and not {x, x, ...}: compilers turn this into one broadcast
template <class R>
INLINE Vec<R> splat(R x) {
    return x - Vec<R>{};
}

typedef Vec<float> Vf;
typedef Vec<double> Vd;

// x, or the limit if x is beyond it; x if it is NaN. Compilers make a compare and a blend of the plain expression.
#if defined(__x86_64__)
#if VECTOR_BYTES == 64
#define INTRINSIC(NAME) _mm512_##NAME
#elif VECTOR_BYTES == 32
#define INTRINSIC(NAME) _mm256_##NAME
#else
#define INTRINSIC(NAME) _mm_##NAME
#endif
INLINE Vf at_least(Vf limit, Vf x) { return INTRINSIC(max_ps)(limit, x); }
INLINE Vf at_most(Vf limit, Vf x) { return INTRINSIC(min_ps)(limit, x); }
#undef INTRINSIC
#else
INLINE Vf at_least(Vf limit, Vf x) { return x < limit ? limit : x; }
INLINE Vf at_most(Vf limit, Vf x) { return x > limit ? limit : x; }
#endif
INLINE Vd at_least(Vd limit, Vd x) { return x < limit ? limit : x; }
INLINE Vd at_most(Vd limit, Vd x) { return x > limit ? limit : x; }

// 2^x with a relative error below 2e-7, exact for integers and close to 1 for small x, which is NaN or between -126 and
// 126. (The 512-bit one takes any x as `exp2` does.)
//
// x = k + r, where k is the nearest multiple of a step and goes into the exponent, or into a table of the powers between
// two integers and the exponent; 2^r is a polynomial. Adding 1.5 * 2^23 steps leaves the multiple in the low bits.
INLINE Vf exp2_normal(Vf x) {
    typedef Simd<float>::I I;
#if VECTOR_BYTES == 64
    alignas(64) static const float POWERS[32] = {
        0x1p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
        0x1.29e9ep+0f, 0x1.306fep+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
        0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f,
        0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f77p+0f,
        0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};
    const Vf k = _mm512_roundscale_ps(x, 5 << 4), r = x - k;  // 5 bits after the point
    const I index = (I)(k + 0x1.8p18f);
    const Vf power = _mm512_permutex2var_ps(load(POWERS), (__m512i)index, load(POWERS + 16));
    Vf p = r * 2.4022653e-1f + 6.9315733e-1f;
    p = p * r + 1.f;
    return _mm512_scalef_ps(p * power, k);  // for infinite x, too, where r is NaN
#elif VECTOR_BYTES == 32
    // the bits of 2^(j / 8), less the j that shifting the multiple into the exponent leaves below it
    alignas(32) static const uint32_t POWERS[8] = {
        0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    const float shift = 0x1.8p20f;
    const Vf t = x + shift, r = x - (t - shift);
    const I power = (I)_mm256_permutevar8x32_epi32(*(const __m256i*)POWERS, (__m256i)t);
    Vf p = r * 5.5502136e-2f + 2.4023429e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.f;
    return p * (Vf)(power + ((I)t << 20));
#else
    const float shift = 0x1.8p23f;
    const Vf t = x + shift, r = x - (t - shift);
    Vf p = r * 1.3264727e-3f + 9.6715126e-3f;
    p = p * r + 5.5507337e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314698e-1f;
    p = p * r + 1.f;
    return (Vf)((I)p + ((I)t << 23));
#endif
}

// 2^x for any x. Where 2^x is no normal number the result may be 0 or infinity, as it may be infinity from 2^127.9 on.
INLINE Vf exp2(Vf x) {
#if VECTOR_BYTES < 64
    x = at_most(splat(128.f), at_least(splat(-127.f), x));
#endif
    return exp2_normal(x);
}

// log(1 + x) for x in [0, 1], with a relative error below 4e-8
INLINE Vf log1p(Vf x) {
    Vf p = x * 5.2326927e-3f - 2.9505232e-2f;
    p = p * x + 7.8225941e-2f;
    p = p * x - 1.3663245e-1f;
    p = p * x + 1.9106006e-1f;
    p = p * x - 2.4842982e-1f;
    p = p * x + 3.3319097e-1f;
    p = p * x - 4.9999493e-1f;
    p = p * x + 9.9999997e-1f;
    return p * x;
}

// float64 is for checking gradients: the C library's functions, lane by lane
INLINE Vd exp2(Vd x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = __builtin_exp2(x[i]);
    return x;
}

INLINE Vd exp2_normal(Vd x) { return exp2(x); }

INLINE Vd log1p(Vd x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = __builtin_log1p(x[i]);
    return x;
}

constexpr double LOG2E = 1.4426950408889634074, LN2 = 0.69314718055994530942;

template <class R>
INLINE Vec<R> absolute(Vec<R> x) {
    typedef typename Simd<R>::I I;
    return (Vec<R>)((I)x & ~(I)splat(R(-0.)));
}

// exp(-|x|)
template <class R>
INLINE Vec<R> exp_minus(Vec<R> x) {
    typedef typename Simd<R>::I I;
    return exp2(at_least(splat(R(-1e4)), (Vec<R>)((I)x | (I)splat(R(-0.))) * R(LOG2E)));
}

template <class R>
INLINE Vec<R> sigmoid(Vec<R> x, Vec<R> exp_minus_x) {
    return (x < Vec<R>{} ? exp_minus_x : splat(R(1))) / (R(1) + exp_minus_x);
}

template <class R>
INLINE Vec<R> sigmoid(Vec<R> x) {
    return sigmoid<R>(x, exp_minus<R>(x));
}

// e^-x may be infinite where the result is 0
template <class R>
INLINE Vec<R> silu(Vec<R> x) {
    return x / (R(1) + exp2(x * R(-LOG2E)));
}

// linear above 20 as in PyTorch
template <class R>
INLINE Vec<R> softplus(Vec<R> x, Vec<R> exp_minus_x) {
    const Vec<R> y = at_least(Vec<R>{}, x) + log1p(exp_minus_x);
    return x > splat(R(20)) ? x : y;
}

// {a[0] + a[S], b[0] + b[S], ...}: pairs of lanes S apart are added, a's sums going where S is not in the lane number.
template <class R, int S, int... LANE>
INLINE Vec<R> add_pairs(Vec<R> a, Vec<R> b, std::integer_sequence<int, LANE...>) {
    constexpr int W = LANES<R>;
    return shuffle<R, (LANE & S ? W + LANE : LANE)...>(a, b) + shuffle<R, (LANE & S ? W + LANE - S : LANE + S)...>(a, b);
}

// A tree that adds up the lanes of LANES vectors, so that lane i of its root is the sum of the lanes of vector i. On its
// level S, lanes i and i + S of vectors j and j + S become one.

// The upper levels, for vectors 0, LANES / K, 2 LANES / K, ... of the tree. Overwrites them.
template <class R, int K, int S = LANES<R> / 2>
INLINE Vec<R> gather(Vec<R>* in) {
    if constexpr (K == 1) {
        return in[0];
    } else {
        for (int k = 0; k < K / 2; k++)
            in[k] = add_pairs<R, S>(in[k], in[k + K / 2], std::make_integer_sequence<int, LANES<R>>());
        return gather<R, K / 2, S / 2>(in);
    }
}

// The levels below N: of N vectors one after another at `in`.
template <class R, int S, int N>
INLINE Vec<R> fold(const R* in) {
    if constexpr (S == N)
        return load(in);
    else
        return add_pairs<R, S>(fold<R, 2 * S, N>(in), fold<R, 2 * S, N>(in + S * LANES<R>),
                               std::make_integer_sequence<int, LANES<R>>());
}
