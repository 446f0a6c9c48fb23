// The depthwise convolution for one instruction set: included inside its namespace after scan.h.
//
constexpr int CONV_TILE = 64;

template <class R>
constexpr int CONV_BLOCK = 128 / sizeof(R);  // channels of a task

// One direction's kernel as taps in memory order, weight[k] times x[t - before + k]: a reverse kernel is mirrored.
template <class R>
struct Taps {
    int before;
    R *weight, *bias;  // (K, CONV_BLOCK), (CONV_BLOCK,)
};

template <class R>
struct ConvScratch {
    R *memory;
    int halo;  // tokens around a tile
    explicit ConvScratch(const Conv& c, void* p) : memory(static_cast<R*>(p)), halo(c.kernel_size - 1) {}
    static int64_t bytes(const Conv& c) {
        const int64_t rows = CONV_TILE + 4 * (c.kernel_size - 1);
        return (3 * rows + 4 * (c.kernel_size + 1)) * CONV_BLOCK<R> * sizeof(R);
    }
    int64_t rows() const { return CONV_TILE + 4 * halo; }
    R* x() { return memory; }
    R* g(int i) { return memory + (1 + i) * rows() * CONV_BLOCK<R>; }
    R* taps(int i) { return memory + (3 * rows() + i * (halo + 2)) * CONV_BLOCK<R>; }
    R* gradients(int i) { return taps(2 + i); }
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

// Copies tokens [from, to), with zeros for those outside the sequence.
template <class R>
INLINE void copy_tokens(const Conv& c, const Tensor& x, int64_t batch, int64_t from, int64_t to, int64_t channel,
                        int width, R* buffer) {
    const R* data = static_cast<const R*>(x.data) + batch * x.batch_stride + channel;
    for (int64_t t = from; t < to; t++, buffer += CONV_BLOCK<R>) {
        if (t < 0 || t >= c.length)
            memset(buffer, 0, width * sizeof(R));
        else
            memcpy(buffer, data + t * x.token_stride, width * sizeof(R));
    }
}

// bias + sum_k weight[k] x[t - before + k] for the vector of channels at `x`, which points at token t.
template <class R, int K>
INLINE Vec<R> convolve(const Taps<R>& taps, int kernel_size, const R* x, int v) {
    Vec<R> sum = load(taps.bias + v);
    x -= taps.before * CONV_BLOCK<R>;
    for (int k = 0; k < (K ? K : kernel_size); k++)
        sum += load(taps.weight + k * CONV_BLOCK<R> + v) * load(x + k * CONV_BLOCK<R> + v);
    return sum;
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
            Vec<R> in = {};
            if (WHOLE) in = load(x[k + j] + v);
            else memcpy(&in, x[k + j] + v, left * sizeof(R));
            sums[j] += tap * in;
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

// Backward: a task covers a block of channels. Tokens go in tiles, copied to the L1 cache with the tokens around them, from
// which both directions are computed.
template <class R, int K>
static void conv_backward_task(const Conv& c, int64_t task, void* scratch) {
    ConvScratch<R> m(c, scratch);
    const int kernel_size = K ? K : c.kernel_size;
    const int64_t blocks = (c.channels + CONV_BLOCK<R> - 1) / CONV_BLOCK<R>;
    const int64_t channel = task % blocks * CONV_BLOCK<R>, batch = task / blocks;
    const int width = c.channels - channel < CONV_BLOCK<R> ? c.channels - channel : CONV_BLOCK<R>;
    Taps<R> taps[2];
    for (int i = 0; i < c.directions; i++) {
        taps[i] = load_taps(c, i, channel, width, CONV_BLOCK<R>, m.taps(i));
        memset(m.gradients(i), 0, (kernel_size + 1) * CONV_BLOCK<R> * sizeof(R));
    }
    for (int64_t start = 0; start < c.length; start += CONV_TILE) {
        const int64_t end = start + CONV_TILE < c.length ? start + CONV_TILE : c.length;
        copy_tokens(c, c.x, batch, start - 2 * m.halo, end + 2 * m.halo, channel, width, m.x());
        for (int i = 0; i < c.directions; i++) {
            // the gradient before the activation, also of the tokens around the tile that depend on it
            copy_tokens(c, c.direction[i].out, batch, start - m.halo, end + m.halo, channel, width, m.g(i));
            R* dw = m.gradients(i);
            R* db = dw + kernel_size * CONV_BLOCK<R>;
            for (int64_t t = start - m.halo; t < end + m.halo; t++) {
                R* g = m.g(i) + (t - start + m.halo) * CONV_BLOCK<R>;
                const R* x = m.x() + (t - start + 2 * m.halo) * CONV_BLOCK<R>;
                const bool inside = t >= start && t < end;
                for (int v = 0; v < width; v += LANES<R>) {
                    Vec<R> gt = load(g + v);
                    if (c.silu) {
                        const Vec<R> sum = convolve<R, K>(taps[i], kernel_size, x, v), gate = sigmoid<R>(sum);
                        gt *= gate * (R(1) + sum * (R(1) - gate));
                        store(g + v, gt);
                    }
                    if (!inside) continue;
                    store(db + v, load(db + v) + gt);
                    const R* inputs = x - taps[i].before * CONV_BLOCK<R> + v;
                    for (int k = 0; k < kernel_size; k++) {
                        R* to = dw + k * CONV_BLOCK<R> + v;
                        store(to, load(to) + gt * load(inputs + k * CONV_BLOCK<R>));
                    }
                }
            }
        }
        R* dx = static_cast<R*>(c.dx.data) + batch * c.dx.batch_stride + start * c.dx.token_stride + channel;
        for (int64_t t = start; t < end; t++, dx += c.dx.token_stride) {
            for (int v = 0; v < width; v += LANES<R>) {
                Vec<R> sum = {};
                for (int i = 0; i < c.directions; i++) {
                    const R* g = m.g(i) + (t - start + m.halo + taps[i].before) * CONV_BLOCK<R> + v;
                    for (int k = 0; k < kernel_size; k++)
                        sum += load(taps[i].weight + k * CONV_BLOCK<R> + v) * load(g - k * CONV_BLOCK<R>);
                }
                if (v + LANES<R> <= width)
                    store(dx + v, sum);
                else
                    memcpy(dx + v, &sum, (width - v) * sizeof(R));
            }
        }
    }
    for (int i = 0; i < c.directions; i++) {
        const ConvDirection& d = c.direction[i];
        const int64_t at = batch * c.channels + channel;
        R* dweight = static_cast<R*>(d.dweight) + at * kernel_size;
        for (int j = 0; j < width; j++) {
            for (int k = 0; k < kernel_size; k++) {
                const int from = d.reverse ? kernel_size - 1 - k : k;
                dweight[j * kernel_size + k] = m.gradients(i)[from * CONV_BLOCK<R> + j];
            }
        }
        if (d.dbias)
            memcpy(static_cast<R*>(d.dbias) + at, m.gradients(i) + kernel_size * CONV_BLOCK<R>, width * sizeof(R));
    }
}

template <class R>
static int64_t conv_backward_tasks(const Conv& c) {
    return c.batch * ((c.channels + CONV_BLOCK<R> - 1) / CONV_BLOCK<R>);
}
