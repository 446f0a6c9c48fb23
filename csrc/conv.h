// The depthwise convolution for one instruction set: included inside its namespace after scan.h.
//
constexpr int CONV_TILE = 64;

// One direction's kernel as taps in memory order, weight[k] times x[t - before + k]: a reverse kernel is mirrored.
template <class R>
struct Taps {
    int before;
    R *weight, *bias;  // (K, width), (width,), where width is padded to whole vectors
};

template <class R>
INLINE Taps<R> load_taps(const Conv& c, int index, int64_t channel, int width, int64_t padded, R* memory) {
    const ConvDirection& d = c.direction[index];
    const int K = c.kernel_size, before = c.centered ? (K - 1) / 2 : K - 1;
    R* bias = memory + K * padded;
    for (int j = 0; j < padded; j++) {
        for (int k = 0; k < K; k++) {
            const int from = d.reverse ? K - 1 - k : k;
            memory[k * padded + j] =
                j < width ? static_cast<const R*>(d.weight)[(channel + j) * K + from] : 0;
        }
        bias[j] = d.bias && j < width ? static_cast<const R*>(d.bias)[channel + j] : 0;
    }
    return {d.reverse ? K - 1 - before : before, memory, bias};
}

// A vector, or its first `left` lanes and zeros.
template <class R, bool WHOLE>
INLINE Vec<R> load_some(const R* p, int64_t left) {
    if (WHOLE) return load(p);
    Vec<R> x = {};
    memcpy(&x, p, left * sizeof(R));
    return x;
}

// Forward: a task covers a tile of tokens and a block of channels. Rows are read in place, zeros standing in for tokens
// outside the sequence. A few tokens at a time share the taps and most of their rows.
constexpr int CONV_TOKENS = 4;

template <class R>
struct ConvBlocks {
    static constexpr int64_t WIDEST = 1024 / sizeof(R);
    int64_t tiles, blocks, width;
    explicit ConvBlocks(const Conv& c)
        : tiles((c.length + CONV_TILE - 1) / CONV_TILE), blocks((c.channels + WIDEST - 1) / WIDEST),
          width(((c.channels + blocks - 1) / blocks + LANES<R> - 1) / LANES<R> * LANES<R>) {}
    // for taps, bias and the pointers to rows of both directions, and for a row of zeros and one that nobody reads
    static int64_t bytes(const Conv& c) {
        return 2 * ((c.kernel_size + 1) * WIDEST * sizeof(R) + (c.kernel_size + CONV_TOKENS) * sizeof(R*))
            + 2 * WIDEST * sizeof(R);
    }
};

// One vector of channels of CONV_TOKENS tokens: y[j] = silu(bias + sum_k weight[k] x[k + j]), or without silu.
template <class R, int K, bool WHOLE>
INLINE void convolve_tokens(const R* taps, int kernel_size, int64_t width, const R* const* x, R* const* y,
                            bool activate, int64_t v, int64_t left) {
    Vec<R> sums[CONV_TOKENS];
    const Vec<R> bias = load(taps + kernel_size * width + v);
    for (int j = 0; j < CONV_TOKENS; j++) sums[j] = bias;
#pragma GCC unroll 8
    for (int k = 0; k < (K ? K : kernel_size); k++) {
        const Vec<R> tap = load(taps + k * width + v);
#pragma GCC unroll 8
        for (int j = 0; j < CONV_TOKENS; j++) {
            sums[j] += tap * load_some<R, WHOLE>(x[k + j] + v, left);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < CONV_TOKENS; j++) {
        if (activate) sums[j] = silu<R>(sums[j]);
        if (WHOLE) store(y[j] + v, sums[j]);
        else memcpy(y[j] + v, &sums[j], left * sizeof(R));
    }
}

template <class R, int K>
static void conv_forward_task(const Conv& c, int64_t task, void* scratch) {
    const ConvBlocks<R> b(c);
    const int kernel_size = K ? K : c.kernel_size;
    const int64_t channel = task % b.blocks * b.width, start = task / b.blocks % b.tiles * CONV_TILE;
    const int64_t batch = task / b.blocks / b.tiles, left = c.channels - channel;
    if (left <= 0) return;
    const int64_t end = start + CONV_TILE < c.length ? start + CONV_TILE : c.length;
    const int64_t width = left < b.width ? left : b.width, whole = width / LANES<R> * LANES<R>;
    R *zeros = static_cast<R*>(scratch), *unused = zeros + b.width, *memory = unused + b.width;
    memset(zeros, 0, b.width * sizeof(R));
    Taps<R> taps[2];
    for (int i = 0; i < c.directions; i++, memory += (kernel_size + 1) * b.width)
        taps[i] = load_taps<R>(c, i, channel, width, b.width, memory);
    const R** x = reinterpret_cast<const R**>(memory);
    const R* in = static_cast<const R*>(c.x.data) + batch * c.x.batch_stride + channel;
    for (int64_t t = start; t < end; t += CONV_TOKENS) {
        for (int i = 0; i < c.directions; i++) {
            const Tensor& out = c.direction[i].out;
            R* y[CONV_TOKENS];
            for (int j = 0; j < CONV_TOKENS; j++)
                y[j] = t + j < end
                    ? static_cast<R*>(out.data) + batch * out.batch_stride + (t + j) * out.token_stride + channel : unused;
            for (int k = 0; k < kernel_size + CONV_TOKENS - 1; k++) {
                const int64_t from = t - taps[i].before + k;
                x[k] = from >= 0 && from < c.length ? in + from * c.x.token_stride : zeros;
            }
            for (int64_t v = 0; v < whole; v += LANES<R>)
                convolve_tokens<R, K, true>(taps[i].weight, kernel_size, b.width, x, y, c.silu, v, 0);
            if (whole < width)
                convolve_tokens<R, K, false>(taps[i].weight, kernel_size, b.width, x, y, c.silu, whole, width - whole);
        }
    }
}

template <class R>
static int64_t conv_forward_tasks(const Conv& c) {
    const ConvBlocks<R> b(c);
    return c.batch * b.tiles * b.blocks;
}

// Backward: a task covers a block of channels and walks over all tokens of a batch item in tiles. It computes the gradients
// before the activation, each once, and from those of a tile and of the K - 1 tokens before it a tile of x's gradient.
template <class R>
struct ConvGradientTile {
    static constexpr int64_t WIDTH = 256 / sizeof(R), TOKENS = 32;
    static int64_t rows(const Conv& c) { return TOKENS + c.kernel_size - 1; }
    // for gradients, taps and the taps' gradients of both directions, a row of zeros, and the pointers to rows
    static int64_t bytes(const Conv& c) {
        return (2 * rows(c) + 4 * (c.kernel_size + 1) + 1) * WIDTH * sizeof(R)
            + (2 * rows(c) + c.kernel_size - 1) * sizeof(R*);
    }
};

// One vector of channels of some tokens: g = grad * silu'(bias + sum_k weight[k] x[k + j]), or without silu; adds to the
// gradients of the taps and of the bias, `sums`.
template <class R, int K, bool WHOLE>
INLINE void activation_gradients(const R* taps, int kernel_size, int64_t width, const R* const* x, const R* const* grad,
                                 R* g, int tokens, bool activate, R* sums, int64_t v, int64_t left) {
    Vec<R> dweight[K ? K : 1], dbias = load(sums + kernel_size * width + v);
    for (int k = 0; k < K; k++) dweight[k] = load(sums + k * width + v);
    const Vec<R> bias = load(taps + kernel_size * width + v);
    for (int j = 0; j < tokens; j++) {
        Vec<R> gj = load_some<R, WHOLE>(grad[j] + v, left);
        if (activate) {
            Vec<R> y = bias;
#pragma GCC unroll 8
            for (int k = 0; k < (K ? K : kernel_size); k++)
                y += load(taps + k * width + v) * load_some<R, WHOLE>(x[k + j] + v, left);
            const Vec<R> gate = R(1) / (R(1) + exp2(y * R(-LOG2E)));
            gj *= gate * (R(1) + y * (R(1) - gate));
        }
        store(g + j * width + v, gj);
        dbias += gj;
#pragma GCC unroll 8
        for (int k = 0; k < (K ? K : kernel_size); k++) {
            const Vec<R> product = gj * load_some<R, WHOLE>(x[k + j] + v, left);
            if (K) dweight[k] += product;
            else store(sums + k * width + v, load(sums + k * width + v) + product);
        }
    }
    for (int k = 0; k < K; k++) store(sums + k * width + v, dweight[k]);
    store(sums + kernel_size * width + v, dbias);
}

template <class R, int K>
static void conv_backward_task(const Conv& c, int64_t task, void* scratch) {
    constexpr int64_t WIDTH = ConvGradientTile<R>::WIDTH, TOKENS = ConvGradientTile<R>::TOKENS;
    const int kernel_size = K ? K : c.kernel_size, halo = kernel_size - 1;
    const int64_t blocks = (c.channels + WIDTH - 1) / WIDTH, rows = TOKENS + halo;
    const int64_t channel = task % blocks * WIDTH, batch = task / blocks;
    const int64_t width = c.channels - channel < WIDTH ? c.channels - channel : WIDTH;
    const int64_t whole = width / LANES<R> * LANES<R>;
    R *zeros = static_cast<R*>(scratch), *memory = zeros + WIDTH;
    memset(zeros, 0, WIDTH * sizeof(R));
    Taps<R> taps[2];
    R *g[2], *sums[2];
    for (int i = 0; i < c.directions; i++) {
        taps[i] = load_taps<R>(c, i, channel, width, WIDTH, memory);
        sums[i] = memory + (kernel_size + 1) * WIDTH;
        memset(sums[i], 0, (kernel_size + 1) * WIDTH * sizeof(R));
        g[i] = sums[i] + (kernel_size + 1) * WIDTH;
        memory = g[i] + rows * WIDTH;
    }
    const R **x = reinterpret_cast<const R**>(memory), **grad = x + rows + halo;
    const auto row_of = [&](const Tensor& tensor, int64_t t) -> const R* {
        if (t < 0 || t >= c.length) return zeros;
        return static_cast<const R*>(tensor.data) + batch * tensor.batch_stride + t * tensor.token_stride + channel;
    };
    for (int64_t start = 0; start < c.length; start += TOKENS) {
        const int tokens = start + TOKENS < c.length ? TOKENS : c.length - start;
        for (int j = 0; j < tokens + 2 * halo; j++) x[j] = row_of(c.x, start - halo + j);
        for (int i = 0; i < c.directions; i++) {
            // row j of g belongs to this token, and to row j + k of x
            const int64_t first = start + taps[i].before - halo;
            const int known = start ? halo : 0;
            memmove(g[i], g[i] + TOKENS * WIDTH, known * WIDTH * sizeof(R));
            for (int j = known; j < tokens + halo; j++) grad[j] = row_of(c.direction[i].out, first + j);
            R* to = g[i] + known * WIDTH;
            const int count = tokens + halo - known;
            for (int64_t v = 0; v < whole; v += LANES<R>)
                activation_gradients<R, K, true>(taps[i].weight, kernel_size, WIDTH, x + known, grad + known, to, count,
                                                 c.silu, sums[i], v, 0);
            if (whole < width)
                activation_gradients<R, K, false>(taps[i].weight, kernel_size, WIDTH, x + known, grad + known, to, count,
                                                  c.silu, sums[i], whole, width - whole);
        }
        R* dx = static_cast<R*>(c.dx.data) + batch * c.dx.batch_stride + start * c.dx.token_stride + channel;
        for (int j = 0; j < tokens; j++, dx += c.dx.token_stride) {
            for (int64_t v = 0; v < width; v += LANES<R>) {
                Vec<R> sum = {};
                for (int i = 0; i < c.directions; i++) {
#pragma GCC unroll 8
                    for (int k = 0; k < kernel_size; k++)
                        sum += load(taps[i].weight + k * WIDTH + v) * load(g[i] + (j + halo - k) * WIDTH + v);
                }
                if (v < whole) store(dx + v, sum);
                else memcpy(dx + v, &sum, (width - v) * sizeof(R));
            }
        }
    }
    for (int i = 0; i < c.directions; i++) {
        const ConvDirection& d = c.direction[i];
        const int64_t at = batch * c.channels + channel;
        R* dweight = static_cast<R*>(d.dweight) + at * kernel_size;
        for (int j = 0; j < width; j++)
            for (int k = 0; k < kernel_size; k++)
                dweight[j * kernel_size + k] = sums[i][(d.reverse ? kernel_size - 1 - k : k) * WIDTH + j];
        if (d.dbias) memcpy(static_cast<R*>(d.dbias) + at, sums[i] + kernel_size * WIDTH, width * sizeof(R));
    }
}

template <class R>
static int64_t conv_backward_tasks(const Conv& c) {
    return c.batch * ((c.channels + ConvGradientTile<R>::WIDTH - 1) / ConvGradientTile<R>::WIDTH);
}
