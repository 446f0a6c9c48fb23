// The depthwise convolution for one instruction set: included inside its namespace after scan.h.
//
// A task covers a block of channels. Tokens go in tiles, copied to the L1 cache with the tokens around them, from which
// both directions are computed.

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
INLINE Taps<R> load_taps(const Conv& c, int index, int64_t channel, int width, R* memory) {
    const ConvDirection& d = c.direction[index];
    const int K = c.kernel_size, before = c.centered ? (K - 1) / 2 : K - 1;
    R* bias = memory + K * CONV_BLOCK<R>;
    for (int j = 0; j < CONV_BLOCK<R>; j++) {
        for (int k = 0; k < K; k++) {
            const int from = d.reverse ? K - 1 - k : k;
            memory[k * CONV_BLOCK<R> + j] =
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

template <class R, int K>
static void conv_forward_task(const Conv& c, int64_t task, void* scratch) {
    ConvScratch<R> m(c, scratch);
    const int64_t tiles = (c.length + CONV_TILE - 1) / CONV_TILE;
    const int64_t blocks = (c.channels + CONV_BLOCK<R> - 1) / CONV_BLOCK<R>;
    const int64_t channel = task % blocks * CONV_BLOCK<R>, start = task / blocks % tiles * CONV_TILE;
    const int64_t batch = task / blocks / tiles;
    const int64_t end = start + CONV_TILE < c.length ? start + CONV_TILE : c.length;
    const int width = c.channels - channel < CONV_BLOCK<R> ? c.channels - channel : CONV_BLOCK<R>;
    copy_tokens(c, c.x, batch, start - m.halo, end + m.halo, channel, width, m.x());
    for (int i = 0; i < c.directions; i++) {
        const Taps<R> taps = load_taps(c, i, channel, width, m.taps(i));
        const Tensor& y = c.direction[i].out;
        R* out = static_cast<R*>(y.data) + batch * y.batch_stride + start * y.token_stride + channel;
        const R* x = m.x() + m.halo * CONV_BLOCK<R>;
        for (int64_t t = start; t < end; t++, x += CONV_BLOCK<R>, out += y.token_stride) {
            for (int v = 0; v < width; v += LANES<R>) {
                Vec<R> sum = convolve<R, K>(taps, c.kernel_size, x, v);
                if (c.silu) sum *= sigmoid<R>(sum);
                if (v + LANES<R> <= width)
                    store(out + v, sum);
                else
                    memcpy(out + v, &sum, (width - v) * sizeof(R));
            }
        }
    }
}

template <class R>
static int64_t conv_forward_tasks(const Conv& c) {
    return c.batch * ((c.length + CONV_TILE - 1) / CONV_TILE) * ((c.channels + CONV_BLOCK<R> - 1) / CONV_BLOCK<R>);
}

template <class R, int K>
static void conv_backward_task(const Conv& c, int64_t task, void* scratch) {
    ConvScratch<R> m(c, scratch);
    const int kernel_size = K ? K : c.kernel_size;
    const int64_t blocks = (c.channels + CONV_BLOCK<R> - 1) / CONV_BLOCK<R>;
    const int64_t channel = task % blocks * CONV_BLOCK<R>, batch = task / blocks;
    const int width = c.channels - channel < CONV_BLOCK<R> ? c.channels - channel : CONV_BLOCK<R>;
    Taps<R> taps[2];
    for (int i = 0; i < c.directions; i++) {
        taps[i] = load_taps(c, i, channel, width, m.taps(i));
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
