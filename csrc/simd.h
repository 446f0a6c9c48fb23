// Vectors and elementary functions for one instruction set.
//
// Included once per instruction set, inside its namespace and target, with VECTOR_BYTES defined: no include guard.

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

template <class R>
struct Simd;

template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(VECTOR_BYTES)));
    typedef float Loose __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
};

template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES)));
    typedef double Loose __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
};

template <class R>
using Vec = typename Simd<R>::V;

template <class R>
constexpr int LANES = VECTOR_BYTES / sizeof(R);

template <class R>
INLINE Vec<R> load(const R* p) {
    return *reinterpret_cast<const typename Simd<R>::Loose*>(p);
}

template <class R>
INLINE void store(R* p, Vec<R> x) {
    *reinterpret_cast<typename Simd<R>::Loose*>(p) = x;
}

// x - 0 and not {x, x, ...}: compilers turn this into one broadcast
template <class R>
INLINE Vec<R> splat(R x) {
    return x - Vec<R>{};
}

typedef Vec<float> Vf;
typedef Vec<double> Vd;

// 2^x, within 1e-7 of it, exact at 0; 0 below -127, infinite from 128 on.
//
// x = k + r with k the nearest integer; 2^r is a polynomial, k goes into the exponent. Adding `shift` leaves k in the low
// bits of a float. NaN survives, which `a < b ? b : a` sees to.
INLINE Vf exp2(Vf x) {
    const float shift = 0x1.8p23f;
    x = x < splat(-127.f) ? splat(-127.f) : x;
    x = x > splat(128.f) ? splat(128.f) : x;
    const Vf t = x + shift;
    const Vf r = x - (t - shift);
    Vf p = r * 1.3264727e-3f + 9.6715126e-3f;
    p = p * r + 5.5507337e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314698e-1f;
    p = p * r + 1.f;
    return (Vf)((Simd<float>::I)p + ((Simd<float>::I)t << 23));
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

INLINE Vd log1p(Vd x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = __builtin_log1p(x[i]);
    return x;
}

constexpr double LOG2E = 1.4426950408889634074, LN2 = 0.69314718055994530942;

template <class R>
INLINE Vec<R> sigmoid(Vec<R> x) {
    return R(1) / (R(1) + exp2(x * R(-LOG2E)));
}

// softplus(x), linear above 20 as in PyTorch
template <class R>
INLINE Vec<R> softplus(Vec<R> x) {
    const Vec<R> positive = x > Vec<R>{} ? x : Vec<R>{};
    const Vec<R> y = positive + log1p(exp2((x > Vec<R>{} ? -x : x) * R(LOG2E)));
    return x > splat(R(20)) ? x : y;
}

// The sum over each of n * LANES vectors at `in`, one after another in `out`.
//
// Half the lanes of one vector and half of another are swapped and added until each lane holds one vector's sum, so
// that LANES sums take LANES - 1 steps.
template <class R>
INLINE void lane_sums(const R* in, int n, R* out) {
    constexpr int W = LANES<R>;
    for (int i = 0; i < n; i++, in += W * W, out += W) {
        for (int j = 0; j < W; j++) {
            R sum = 0;
            for (int k = 0; k < W; k++) sum += in[j * W + k];
            out[j] = sum;
        }
    }
}
