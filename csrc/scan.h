// The selective scan for one instruction set: included inside its namespace after simd.h.
//
// A task scans one batch item for a block of channels. It goes in chunks of CHUNK_SIZE tokens; a chunk of a block is a
// tile, which stays in the L1 cache together with the block's states. Vectors run over channels. Within a tile a few
// states at a time are kept in registers and scanned over all of its tokens.

template <class R>
constexpr int BLOCK = 128 / sizeof(R);  // channels of a task

constexpr int MAX_STATES = 8;  // held in registers, forward
template <class R>
constexpr int MAX_STATES_BACKWARD = LANES<R> < 4 ? LANES<R> : 4;

// The tokens of one tile in scan order: `data` points at the first, `stride` elements lead to the next.
template <class R>
struct Rows {
    R* data;
    int64_t stride;
    R* operator[](int i) const { return data + i * stride; }
};

// A tile's place: `rows` tokens from `token` on, in steps of `step` (-1 in reverse), channels [channel, +width).
struct Tile {
    int64_t batch, token, step, channel;
    int rows, width;
};

template <class R>
INLINE Rows<R> rows_of(const Tensor& x, const Tile& tile) {
    R* data = static_cast<R*>(x.data) + tile.batch * x.batch_stride + tile.token * x.token_stride + tile.channel;
    return {data, tile.step * x.token_stride};
}

// Prefetches the rows of the next tile, which are too far apart for the hardware prefetchers.
template <class R>
struct Prefetch {
    Tile tile;  // of no rows after the last tile
    int count;
    Rows<R> tensors[8];
    INLINE_MEMBER void add(const Tensor& x) {
        if (x.data && tile.rows) tensors[count++] = rows_of<R>(x, tile);
    }
    // The part [from, to) of `steps` parts: too many requests at once would wait for one another.
    INLINE_MEMBER void fetch(int64_t from, int64_t to, int64_t steps) const {
        for (int64_t i = tile.rows * from / steps; i < tile.rows * to / steps; i++)
            for (int j = 0; j < count; j++)
                for (int v = 0; v < tile.width; v += 64 / sizeof(R)) __builtin_prefetch(tensors[j][i] + v);
    }
};

template <class R>
INLINE void copy_rows(Rows<R> from, Rows<R> to, const Tile& tile) {
    for (int i = 0; i < tile.rows; i++) memcpy(to[i], from[i], tile.width * sizeof(R));
}

// Read access to a tile in whole vectors: in place, or through `buffer` where the channels end within a vector, with
// zeros for those that are not there.
template <class R>
INLINE Rows<R> readable(const Tensor& x, const Tile& tile, R* buffer) {
    const Rows<R> rows = rows_of<R>(x, tile), copy = {buffer, BLOCK<R>};
    if (tile.width % LANES<R> == 0) return rows;
    memset(buffer, 0, tile.rows * BLOCK<R> * sizeof(R));
    copy_rows(rows, copy, tile);
    return copy;
}

// Write access likewise; `finish` must follow.
template <class R>
INLINE Rows<R> writable(const Tensor& x, const Tile& tile, R* buffer) {
    return tile.width % LANES<R> == 0 ? rows_of<R>(x, tile) : Rows<R>{buffer, BLOCK<R>};
}

template <class R>
INLINE void finish(const Tensor& x, const Tile& tile, Rows<R> rows) {
    if (tile.width % LANES<R>) copy_rows(rows, rows_of<R>(x, tile), tile);
}

// The rows of B or C that a tile meets.
template <class R>
INLINE Rows<R> states_of(const Tensor& x, const Tile& tile, int64_t group) {
    R* data = static_cast<R*>(x.data) + tile.batch * x.batch_stride + tile.token * x.token_stride;
    return {data + group * x.group_stride, tile.step * x.token_stride};
}

// Memory of a task: what does not fit in registers.
template <class R>
struct alignas(64) Scratch {
    typedef R Block[BLOCK<R>];
    typedef R TileBuffer[CHUNK_SIZE * BLOCK<R>];
    TileBuffer dt, dtu, y, buffers[5];
    Block D, bias, first;
    R *A, *h;  // (d_state, BLOCK); A is times log2(e)
    R most_A;  // the largest |A| that is not NaN

    static int64_t bytes(const Scan& s) { return sizeof(Scratch) + 2 * s.d_state * sizeof(Block); }
    static Scratch* in(void* memory, const Scan& s) {
        Scratch* m = static_cast<Scratch*>(memory);
        m->A = reinterpret_cast<R*>(m + 1);
        m->h = m->A + s.d_state * BLOCK<R>;
        return m;
    }
};

template <class R>
struct alignas(64) BackwardScratch : Scratch<R> {
    typename Scratch<R>::TileBuffer dy, du, slope, g_B, g_decay, more_buffers[3];
    typename Scratch<R>::Block dD, dbias;
    // of one vector of channels: decays, and states decayed by them
    R decay[CHUNK_SIZE * MAX_STATES_BACKWARD<R> * LANES<R>], decayed[CHUNK_SIZE * MAX_STATES_BACKWARD<R> * LANES<R>];
    // sums over channels on their way to dB and dC: a vector for each token, in which states have neighbouring lanes
    R dB[CHUNK_SIZE * LANES<R>], dC[CHUNK_SIZE * LANES<R>];
    R *g, *dA;  // (d_state, BLOCK)

    static int64_t bytes(const Scan& s) {
        return sizeof(BackwardScratch) + 4 * s.d_state * sizeof(typename Scratch<R>::Block);
    }
    static BackwardScratch* in(void* memory, const Scan& s) {
        BackwardScratch* m = static_cast<BackwardScratch*>(memory);
        const int64_t size = s.d_state * BLOCK<R>;
        m->A = reinterpret_cast<R*>(m + 1);
        m->h = m->A + size;
        m->g = m->A + 2 * size;
        m->dA = m->A + 3 * size;
        return m;
    }
};

// The blocks of one group of channels.
struct Blocks {
    int64_t group_channels, per_group;
    template <class R>
    static Blocks of(const Scan& s) {
        const int64_t channels = s.channels / s.groups;
        return {channels, (channels + BLOCK<R> - 1) / BLOCK<R>};
    }
};

template <class R>
INLINE Tile tile_of(const Scan& s, const Direction& d, int64_t batch, int64_t channel, int width, int64_t start) {
    const int64_t left = start < 0 ? 0 : s.length - start;
    const int rows = left < 0 ? 0 : left < CHUNK_SIZE ? left : CHUNK_SIZE;
    return {batch, d.reverse ? s.length - 1 - start : start, d.reverse ? -1 : 1, channel, rows, width};
}

template <class R>
INLINE void load_parameters(const Scan& s, const Direction& d, int64_t channel, int width, Scratch<R>* m) {
    constexpr R MOST = std::numeric_limits<R>::max();
    const R* A = static_cast<const R*>(d.A) + channel * s.d_state;
    m->most_A = 0;
    for (int c = 0; c < BLOCK<R>; c++) {
        for (int64_t n = 0; n < s.d_state; n++) {
            const R a = c < width ? A[c * s.d_state + n] : 0, scaled = a * R(LOG2E);
            // a finite A must not become infinite, for dt may be 0
            m->A[n * BLOCK<R> + c] = scaled > MOST && a <= MOST ? MOST : scaled < -MOST && a >= -MOST ? -MOST : scaled;
            if (scaled > m->most_A || -scaled > m->most_A) m->most_A = scaled < 0 ? -scaled : scaled;
        }
        m->D[c] = d.D && c < width ? static_cast<const R*>(d.D)[channel + c] : 0;
        m->bias[c] = d.bias && c < width ? static_cast<const R*>(d.bias)[channel + c] : 0;
    }
}

// Whether exp2_normal serves for the decays of a tile: |dt| is at most `most_dt` or NaN, which stays NaN.
template <class R>
INLINE bool exponents_are_normal(const Scratch<R>* m, Vec<R> most_dt) {
    bool normal = true;
    for (int i = 0; i < LANES<R>; i++) normal &= most_dt[i] * m->most_A < R(126);
    return normal;
}

// Runs `call<K>(n)` for states n to n + K, with K a power of two of at most MAX.
template <int MAX, class F>
INLINE void for_states(int64_t n, int64_t d_state, F f) {
    for (; n + MAX <= d_state; n += MAX) f.template operator()<MAX>(n);
    if constexpr (MAX > 1) for_states<MAX / 2>(n, d_state, f);
}

// Scans one vector of channels and K of its states over a tile: y += C . h
template <class R, int K, bool MASK, bool NORMAL>
INLINE void scan_states(
        int rows, const R* A, R* h_memory, const R* dt, const R* dtu, Rows<R> B, Rows<R> C, R* y) {
    Vec<R> h[K];
    for (int n = 0; n < K; n++) h[n] = load(h_memory + n * BLOCK<R>);
    for (int i = 0; i < rows; i++) {
        const Vec<R> step = load(dt + i * BLOCK<R>), input = load(dtu + i * BLOCK<R>);
        const R *Bi = B[i], *Ci = C[i];
        Vec<R> even = load(y + i * BLOCK<R>), odd = {};
#pragma GCC unroll 16
        for (int n = 0; n < K; n++) {
            const Vec<R> exponent = step * load(A + n * BLOCK<R>);
            const Vec<R> decayed = (NORMAL ? exp2_normal(exponent) : exp2(exponent)) * h[n];
            h[n] = decayed + input * Bi[n];
            (n % 2 ? odd : even) += (MASK ? decayed : h[n]) * Ci[n];
        }
        store(y + i * BLOCK<R>, even + odd);
    }
    for (int n = 0; n < K; n++) store(h_memory + n * BLOCK<R>, h[n]);
}

template <class R, bool MASK>
struct ScanStates {
    Scratch<R>* m;
    int rows, width;
    Rows<R> B, C;
    bool normal;
    template <int K>
    INLINE_MEMBER void operator()(int64_t n) const {
        normal ? scan<K, true>(n) : scan<K, false>(n);
    }
    template <int K, bool NORMAL>
    INLINE_MEMBER void scan(int64_t n) const {
        R *A = m->A + n * BLOCK<R>, *h = m->h + n * BLOCK<R>;
        const Rows<R> Bn = {B.data + n, B.stride}, Cn = {C.data + n, C.stride};
        for (int v = 0; v < width; v += LANES<R>)
            scan_states<R, K, MASK, NORMAL>(rows, A + v, h + v, m->dt + v, m->dtu + v, Bn, Cn, m->y + v);
    }
};

// One direction of one block. Its outputs are added to those of earlier directions; the last one applies the gate.
template <class R>
static void forward_direction(
        const Scan& s, int index, int64_t batch, int64_t group, int64_t channel, int width, Scratch<R>* m) {
    constexpr int W = LANES<R>;
    const Direction& d = s.direction[index];
    const bool last = index == s.directions - 1;
    const Tensor& sum = s.y.data ? s.y : s.out;
    R* h = m->h;
    load_parameters(s, d, channel, width, m);
    memset(h, 0, s.d_state * sizeof(typename Scratch<R>::Block));
    for (int64_t start = 0; start < s.length; start += CHUNK_SIZE) {
        const Tile tile = tile_of<R>(s, d, batch, channel, width, start);
        const Rows<R> u = readable(d.u, tile, m->buffers[0]), delta = readable(d.delta, tile, m->buffers[1]);
        if (s.residual && start == 0)
            for (int64_t n = 0; n < s.d_state; n++) memcpy(h + n * BLOCK<R>, u[0], width * sizeof(R));
        if (d.states) {
            const int64_t chunk = batch * ((s.length + CHUNK_SIZE - 1) / CHUNK_SIZE) + start / CHUNK_SIZE;
            R* to = static_cast<R*>(d.states) + chunk * s.d_state * s.channels + channel;
            for (int64_t n = 0; n < s.d_state; n++)
                memcpy(to + n * s.channels, h + n * BLOCK<R>, width * sizeof(R));
        }
        const Rows<R> before = index ? readable(sum, tile, m->buffers[2]) : Rows<R>{};
        Prefetch<R> next = {tile_of<R>(s, d, batch, channel, width, start + CHUNK_SIZE)};
        next.add(d.u);
        next.add(d.delta);
        if (index) next.add(sum);
        if (last) next.add(s.z);
        next.fetch(0, 1, 1);
        Vec<R> most_dt = {};
        for (int i = 0; i < tile.rows; i++) {
            for (int v = 0; v < width; v += W) {
                const Vec<R> x = load(delta[i] + v) + load(m->bias + v), ui = load(u[i] + v);
                const Vec<R> dt = s.softplus ? softplus<R>(x, exp_minus<R>(x)) : x;
                most_dt = at_least(absolute<R>(dt), most_dt);
                const Vec<R> skip = load(m->D + v) * ui;
                store(m->dt + i * BLOCK<R> + v, dt);
                store(m->dtu + i * BLOCK<R> + v, dt * ui);
                store(m->y + i * BLOCK<R> + v, index ? skip + load(before[i] + v) : skip);
            }
        }
        const Rows<R> B = states_of<R>(d.B, tile, group), C = states_of<R>(d.C, tile, group);
        const bool normal = exponents_are_normal(m, most_dt);
        if (d.mask_diagonal) {
            memcpy(m->first, m->y, sizeof(m->first));
            for_states<MAX_STATES>(0, s.d_state, ScanStates<R, true>{m, tile.rows, width, B, C, normal});
            if (start == 0) memcpy(m->y, m->first, sizeof(m->first));
        } else {
            for_states<MAX_STATES>(0, s.d_state, ScanStates<R, false>{m, tile.rows, width, B, C, normal});
        }
        if (last && s.z.data) {
            const Rows<R> z = readable(s.z, tile, m->buffers[3]);
            const Rows<R> out = writable(s.out, tile, m->buffers[4]);
            if (s.y.data) copy_rows(Rows<R>{m->y, BLOCK<R>}, rows_of<R>(s.y, tile), tile);
            for (int i = 0; i < tile.rows; i++) {
                for (int v = 0; v < width; v += W) {
                    store(out[i] + v, load(m->y + i * BLOCK<R> + v) * silu<R>(load(z[i] + v)));
                }
            }
            finish(s.out, tile, out);
        } else {
            copy_rows(Rows<R>{m->y, BLOCK<R>}, rows_of<R>(sum, tile), tile);
        }
    }
}

template <class R>
static int64_t forward_tasks(const Scan& s) {
    return s.batch * s.groups * Blocks::of<R>(s).per_group;
}

template <class R>
static void forward_task(const Scan& s, int64_t task, void* scratch) {
    const Blocks blocks = Blocks::of<R>(s);
    const int64_t block = task % blocks.per_group, group = task / blocks.per_group % s.groups;
    const int64_t batch = task / blocks.per_group / s.groups, left = blocks.group_channels - block * BLOCK<R>;
    const int width = left < BLOCK<R> ? left : BLOCK<R>;
    for (int i = 0; i < s.directions; i++)
        forward_direction<R>(
            s, i, batch, group, group * blocks.group_channels + block * BLOCK<R>, width, Scratch<R>::in(scratch, s));
}

// Adds up lanes of K vectors until one is left, and puts or adds that to `to`.
template <class R, int K>
INLINE void add_products(Vec<R>* products, bool first, R* to) {
    const Vec<R> sum = gather<R, K>(products);
    store(to, first ? sum : load(to) + sum);
}

// The gradients of one vector of channels and K of its states over a tile: a forward loop recomputes decays and states,
// a backward loop computes g = dL/dh by g_t = C_t dy_t + a_{t+1} g_{t+1}. `g_memory` carries a g from tile to tile.
template <class R, int K, bool MASK>
INLINE void scan_states_backward(int64_t rows, int64_t v, bool first, const R* A, const R* h_memory, R* g_memory,
                                 R* dA_memory, Rows<R> B, Rows<R> C, BackwardScratch<R>* m) {
    constexpr int W = LANES<R>;
    Vec<R> h[K], products[K];
    for (int n = 0; n < K; n++) h[n] = load(h_memory + n * BLOCK<R>);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t row = i * BLOCK<R> + v, at = i * K * W;
        const Vec<R> step = load(m->dt + row), input = load(m->dtu + row), dy = load(m->dy + row);
        const R* Bi = B[i];
#pragma GCC unroll 4
        for (int n = 0; n < K; n++) {
            const Vec<R> decay = exp2(step * load(A + n * BLOCK<R>)), decayed = decay * h[n];
            store(m->decay + at + n * W, decay);
            store(m->decayed + at + n * W, decayed);
            h[n] = decayed + input * Bi[n];
            products[n] = dy * (MASK ? decayed : h[n]);
        }
        add_products<R, K>(products, first, m->dC + i * W);
    }
    Vec<R> g[K], dA[K];
    for (int n = 0; n < K; n++) {
        g[n] = load(g_memory + n * BLOCK<R>);
        dA[n] = load(dA_memory + n * BLOCK<R>);
    }
    for (int64_t i = rows - 1; i >= 0; i--) {
        const int64_t row = i * BLOCK<R> + v, at = i * K * W;
        const Vec<R> step = load(m->dt + row), input = load(m->dtu + row), dy = load(m->dy + row);
        const R *Bi = B[i], *Ci = C[i];
        Vec<R> g_B = load(m->g_B + row), g_decay = load(m->g_decay + row);
#pragma GCC unroll 4
        for (int n = 0; n < K; n++) {
            const Vec<R> g_state = g[n] + dy * Ci[n];
            const Vec<R> g_input = MASK ? g[n] : g_state;  // MASK: a token's input reaches only later outputs
            g_B += g_input * Bi[n];
            products[n] = g_input * input;
            g[n] = load(m->decay + at + n * W) * g_state;
            const Vec<R> g_exponent = load(m->decayed + at + n * W) * g_state;
            g_decay += g_exponent * load(A + n * BLOCK<R>);
            dA[n] += g_exponent * step;
        }
        add_products<R, K>(products, first, m->dB + i * W);
        store(m->g_B + row, g_B);
        store(m->g_decay + row, g_decay);
    }
    for (int n = 0; n < K; n++) {
        store(g_memory + n * BLOCK<R>, g[n]);
        store(dA_memory + n * BLOCK<R>, dA[n]);
    }
}

template <class R, bool MASK>
struct ScanStatesBackward {
    BackwardScratch<R>* m;
    int64_t d_state;
    int rows, width;
    Rows<R> B, C, dB, dC;
    bool add;  // to dB and dC, which earlier blocks have written
    const Prefetch<R>& next;
    template <int K>
    INLINE_MEMBER void operator()(int64_t n) const {
        next.fetch(n, n + K, d_state);
        const int64_t at = n * BLOCK<R>;
        const Rows<R> Bn = {B.data + n, B.stride}, Cn = {C.data + n, C.stride};
        for (int64_t v = 0; v < width; v += LANES<R>)
            scan_states_backward<R, K, MASK>(
                rows, v, v == 0, m->A + at + v, m->h + at + v, m->g + at + v, m->dA + at + v, Bn, Cn, m);
        reduce<K>(m->dB, dB, n);
        reduce<K>(m->dC, dC, n);
    }
    template <int K>
    INLINE_MEMBER void reduce(const R* products, Rows<R> to, int64_t n) const {
        constexpr int TOKENS = LANES<R> / K;
        for (int i = 0; i < rows; i += TOKENS) {
            R sums[LANES<R>];
            store(sums, fold<R, 1, TOKENS>(products + i * LANES<R>));
            for (int j = 0; j < TOKENS && i + j < rows; j++)
                for (int k = 0; k < K; k++) {
                    R& sum = to[i + j][n + k];
                    sum = add ? sum + sums[k * TOKENS + j] : sums[k * TOKENS + j];
                }
        }
    }
};

template <class R>
static void backward_direction(const Scan& s, int index, int64_t batch, int64_t group, int64_t channel, int width,
                               int64_t part, bool add, BackwardScratch<R>* m) {
    constexpr int W = LANES<R>;
    const Direction& d = s.direction[index];
    const int64_t N = s.d_state;
    load_parameters(s, d, channel, width, m);
    memset(m->h, 0, 3 * N * sizeof(m->D));
    memset(m->dD, 0, sizeof(m->dD));
    memset(m->dbias, 0, sizeof(m->dbias));
    for (int64_t start = (s.length - 1) / CHUNK_SIZE * CHUNK_SIZE; start >= 0; start -= CHUNK_SIZE) {
        const Tile tile = tile_of<R>(s, d, batch, channel, width, start);
        const Rows<R> u = readable(d.u, tile, m->buffers[0]), delta = readable(d.delta, tile, m->buffers[1]);
        const Rows<R> grad = readable(s.out, tile, m->buffers[2]);
        const Rows<R> z = s.z.data ? readable(s.z, tile, m->buffers[3]) : Rows<R>{};
        const bool gate_gradient = s.z.data && index == 0;
        const Rows<R> y = gate_gradient ? readable(s.y, tile, m->buffers[4]) : Rows<R>{};
        const Rows<R> dz = gate_gradient ? writable(s.dz, tile, m->more_buffers[0]) : Rows<R>{};
        Prefetch<R> next = {tile_of<R>(s, d, batch, channel, width, start - CHUNK_SIZE)};
        next.add(d.u);
        next.add(d.delta);
        next.add(s.out);
        next.add(s.z);
        if (gate_gradient) next.add(s.y);
        if (gate_gradient) next.add(s.dz);
        next.add(d.du);
        next.add(d.ddelta);
        for (int i = 0; i < tile.rows; i++) {
            for (int v = 0; v < width; v += W) {
                const int at = i * BLOCK<R> + v;
                const Vec<R> ui = load(u[i] + v);
                Vec<R> dt = load(delta[i] + v) + load(m->bias + v), slope = splat(R(1));
                if (s.softplus) {
                    const Vec<R> e = exp_minus<R>(dt);
                    slope = dt > splat(R(20)) ? slope : sigmoid<R>(dt, e);
                    dt = softplus<R>(dt, e);
                }
                Vec<R> dy = load(grad[i] + v);
                if (s.z.data) {
                    const Vec<R> zi = load(z[i] + v), gate = sigmoid<R>(zi);
                    if (gate_gradient) store(dz[i] + v, dy * load(y[i] + v) * gate * (R(1) + zi * (R(1) - gate)));
                    dy *= zi * gate;
                }
                store(m->dt + at, dt);
                store(m->dtu + at, dt * ui);
                store(m->slope + at, slope);
                store(m->dy + at, dy);
                store(m->du + at, dy * load(m->D + v));
                store(m->dD + v, load(m->dD + v) + dy * ui);
                store(m->g_B + at, Vec<R>{});
                store(m->g_decay + at, Vec<R>{});
            }
        }
        if (gate_gradient) finish(s.dz, tile, dz);
        const int64_t chunk = batch * ((s.length + CHUNK_SIZE - 1) / CHUNK_SIZE) + start / CHUNK_SIZE;
        const R* h = static_cast<const R*>(d.states) + chunk * N * s.channels + channel;
        for (int64_t n = 0; n < N; n++) memcpy(m->h + n * BLOCK<R>, h + n * s.channels, width * sizeof(R));
        if (d.mask_diagonal && start == 0) memset(m->dy, 0, sizeof(m->first));
        Tile part_tile = tile;
        part_tile.batch += part * s.batch;
        const Rows<R> B = states_of<R>(d.B, tile, group), C = states_of<R>(d.C, tile, group);
        const Rows<R> dB = states_of<R>(d.dB, part_tile, group), dC = states_of<R>(d.dC, part_tile, group);
        constexpr int MOST = MAX_STATES_BACKWARD<R>;
        if (d.mask_diagonal)
            for_states<MOST>(0, N, ScanStatesBackward<R, true>{m, N, tile.rows, width, B, C, dB, dC, add, next});
        else
            for_states<MOST>(0, N, ScanStatesBackward<R, false>{m, N, tile.rows, width, B, C, dB, dC, add, next});
        const Rows<R> du = writable(d.du, tile, m->more_buffers[1]);
        const Rows<R> ddelta = writable(d.ddelta, tile, m->more_buffers[2]);
        for (int i = 0; i < tile.rows; i++) {
            for (int v = 0; v < width; v += W) {
                const int at = i * BLOCK<R> + v;
                const Vec<R> g_B = load(m->g_B + at), ui = load(u[i] + v);
                const Vec<R> g_dt = load(m->g_decay + at) * R(LN2) + g_B * ui;
                const Vec<R> g_delta = g_dt * load(m->slope + at);
                store(ddelta[i] + v, g_delta);
                store(m->dbias + v, load(m->dbias + v) + g_delta);
                store(du[i] + v, load(m->du + at) + g_B * load(m->dt + at));
            }
        }
        if (s.residual && start == 0)
            for (int64_t n = 0; n < N; n++)
                for (int c = 0; c < width; c++) du[0][c] += m->g[n * BLOCK<R> + c];
        finish(d.du, tile, du);
        finish(d.ddelta, tile, ddelta);
    }
    const int64_t at = batch * s.channels + channel;
    R* dA = static_cast<R*>(d.dA) + at * N;
    for (int c = 0; c < width; c++)
        for (int64_t n = 0; n < N; n++) dA[c * N + n] = m->dA[n * BLOCK<R> + c];
    if (d.dD) memcpy(static_cast<R*>(d.dD) + at, m->dD, width * sizeof(R));
    if (d.dbias) memcpy(static_cast<R*>(d.dbias) + at, m->dbias, width * sizeof(R));
}

template <class R>
static int64_t backward_tasks(const Scan& s) {
    return s.batch * s.groups * s.parts;
}

// A part of the blocks of a group, which share one dB and one dC.
template <class R>
static void backward_task(const Scan& s, int64_t task, void* scratch) {
    const Blocks blocks = Blocks::of<R>(s);
    const int64_t part = task % s.parts, group = task / s.parts % s.groups, batch = task / s.parts / s.groups;
    const int64_t first = blocks.per_group * part / s.parts, end = blocks.per_group * (part + 1) / s.parts;
    for (int64_t block = first; block < end; block++) {
        const int64_t left = blocks.group_channels - block * BLOCK<R>;
        const int width = left < BLOCK<R> ? left : BLOCK<R>;
        for (int i = 0; i < s.directions; i++)
            backward_direction<R>(s, i, batch, group, group * blocks.group_channels + block * BLOCK<R>, width, part,
                                  block > first, BackwardScratch<R>::in(scratch, s));
    }
}
