//! Pieces in memory, on the widest instruction set that there is.

use golden::Rng;

use super::{
    A, D, E, F, Format, H, HK, HKV, HQ, HV, K, Kept, Kind, Piece, Prepared, QKVZ, STATES, TURNED,
    V, W,
};
use crate::cpu::{
    aligned::Arena,
    attention::fast::{Cached, Sizes, attention},
    gated_delta_rule::fast::{CHUNK, Chunk, Pairs, Room, chunk, held_len, steps},
    gdn_layer::fast::{Gdn, STEPS, State},
    l2_norm::fast::l2_norm_row,
    linear::{activations::Reads, fast::linear},
    moe_experts::fast::{Expert, Groups, moe_experts},
    moe_router::fast::route,
    pool,
    rms_norm::fast::add_rms_norm,
    rms_norm_gated::fast::rms_norm_gated,
    roof::AWAY,
    room::room,
    rope::fast::rope as turn,
    simd::Simd,
    weight::Weight,
};

/// Value heads of a key head.
const R: usize = HV / HK;
/// Channels of a key head that the convolution sees.
const CHANNELS: usize = 2 * K + R * V;
const EPS: f32 = 1e-6;

impl Piece {
    /// The piece in memory, filled from a seed.
    pub fn prepare(&self) -> Prepared {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(s) = crate::cpu::avx512::Avx512::new() {
                return self.on(s);
            }
            if let Some(s) = crate::cpu::avx2::Avx2::new() {
                return self.on(s);
            }
        }
        self.on(crate::cpu::simd::Plain)
    }

    fn on<S: Simd>(&self, s: S) -> Prepared {
        let n = self.tokens;
        let fill = &mut Fill(Rng::keyed(self.op, 1));
        match self.kind {
            Kind::DeltaRule => delta_rule(s, n, fill),
            Kind::Mix => mix(s, n, fill),
            Kind::Convolution => convolution(s, n, fill),
            Kind::Attention { depth, kept } => attend(s, n, depth, kept, fill),
            Kind::Experts(format) => experts(s, n, format, fill),
            Kind::Linear(format, rows) => projection(s, n, rows, format, fill),
            Kind::Router => router(s, n, fill),
            Kind::Norm => norm(s, n, fill),
            Kind::GatedNorm => gated_norm(s, n, fill),
            Kind::Rope => rope(s, n, fill),
        }
    }
}

/// Plausible numbers.
struct Fill(Rng);

impl Fill {
    fn between(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| self.0.uniform(low, high)).collect()
    }

    /// Activations.
    fn numbers(&mut self, n: usize) -> Vec<f32> {
        self.between(n, -1.0, 1.0)
    }

    fn weight(&mut self, format: Format, rows: usize, d: usize) -> Weight {
        let reads = if format == Format::Wide { Reads::F32 } else { Reads::Bf16 };
        let w = self.between(rows * d, -0.04, 0.04);
        Weight::of(&format.spec(1, rows, d), reads, &w, d)
    }

    fn state(&mut self) -> State {
        let mut state = State::new((W - 1) * HK * CHANNELS, HV, K, V);
        state.conv.fill_with(|| self.0.uniform(-1.0, 1.0));
        state.hold(std::iter::repeat_with(|| self.0.uniform(-0.1, 0.1)));
        state
    }
}

/// One after the other, and again.
struct Turns<T> {
    all: Vec<T>,
    at: usize,
}

impl<T> Turns<T> {
    /// So many of `bytes` each that caches do not hold them; of none, one.
    fn beyond_caches(bytes: usize, one: impl FnMut() -> T) -> Turns<T> {
        Turns::of(AWAY.checked_div(bytes).unwrap_or(0) + 1, one)
    }

    fn of(n: usize, mut one: impl FnMut() -> T) -> Turns<T> {
        Turns { all: (0..n).map(|_| one()).collect(), at: 0 }
    }

    fn next(&mut self) -> &mut T {
        self.at = (self.at + 1) % self.all.len();
        &mut self.all[self.at]
    }
}

/// Bytes of numbers, if memory is to set the pace.
fn bytes(tokens: usize, numbers: usize) -> usize {
    if tokens == 1 { 0 } else { tokens * numbers * size_of::<f32>() }
}

fn prepared(o: usize, run: impl FnMut(&mut [f32]) + 'static) -> Prepared {
    Prepared { o: vec![0.0; o], run: Box::new(run) }
}

/// The rule alone, in the tasks and chunks that the layer has; queries and keys are normed before.
fn delta_rule<S: Simd>(s: S, n: usize, fill: &mut Fill) -> Prepared {
    // [HK, N, 2 K + R V]
    let mut rows = fill.numbers(HK * n * CHANNELS);
    for row in rows.chunks_exact_mut(CHANNELS) {
        l2_norm_row(s, &mut row[..K], EPS, 1.0 / (K as f32).sqrt());
        l2_norm_row(s, &mut row[K..2 * K], EPS, 1.0);
    }
    // [HV, N]
    let (g, beta) = (fill.between(HV * n, -0.1, -0.001), fill.between(HV * n, 0.1, 0.9));
    let away = if n == 1 { STATES } else { 0 };
    let mut states = Turns::beyond_caches(away, || fill.state().heads);
    // [HK, R, N, V]
    prepared(HV * n * V, move |o| {
        let heads = &mut states.next()[..];
        pool::pieces2((o, R * n * V), (heads, R * held_len(K, V)), |head, o, heads| {
            s.run(
                #[inline(always)]
                || {
                    let (mut pairs, mut room) = (Pairs::default(), Room::default());
                    for start in (0..n).step_by(CHUNK) {
                        let end = (start + CHUNK).min(n);
                        let from = &rows[(head * n + start) * CHANNELS..];
                        for (r, held) in heads.chunks_exact_mut(held_len(K, V)).enumerate() {
                            let own = (head * R + r) * n;
                            let x = Chunk {
                                q: from,
                                k: &from[K..],
                                v: &from[2 * K + r * V..],
                                stride: CHANNELS,
                                g: &g[own + start..own + end],
                                beta: &beta[own + start..own + end],
                                key: K,
                                value: V,
                            };
                            let o = &mut o[(r * n + start) * V..(r * n + end) * V];
                            if n <= STEPS {
                                steps(s, o, held, &x);
                            } else {
                                if r == 0 {
                                    pairs.of(s, &x);
                                }
                                chunk(s, o, held, &x, &pairs, &mut room);
                            }
                        }
                    }
                },
            );
        });
    })
}

/// The small weights of a layer.
struct Small {
    taps: Vec<f32>,
    rates: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
}

impl Small {
    fn new(fill: &mut Fill) -> Small {
        Small {
            taps: fill.between(W * HK * CHANNELS, -0.5, 0.5),
            rates: fill.between(HV, 0.05, 2.0),
            dt_bias: fill.between(HV, -4.0, 0.0),
            norm: fill.between(V, 0.5, 1.5),
        }
    }

    fn layer(&self) -> Gdn<'_> {
        Gdn {
            taps: &self.taps,
            rates: &self.rates,
            dt_bias: &self.dt_bias,
            norm: &self.norm,
            hk: HK,
            hv: HV,
            k: K,
            v: V,
            w: W,
            eps: EPS,
        }
    }
}

fn mix<S: Simd>(s: S, n: usize, fill: &mut Fill) -> Prepared {
    let (qkvz, ba) = (fill.numbers(n * QKVZ), fill.numbers(n * 2 * HV));
    let away = if n == 1 { STATES } else { 0 };
    let mut layers = Turns::beyond_caches(away, || (Small::new(fill), fill.state()));
    prepared(n * HV * V, move |o| {
        let (small, state) = layers.next();
        small.layer().mix(s, o, &qkvz, &ba, &mut [state], &[0, n]);
    })
}

fn convolution<S: Simd>(s: S, n: usize, fill: &mut Fill) -> Prepared {
    let small = Small::new(fill);
    let mut rows = Turns::beyond_caches(bytes(n, QKVZ), || fill.numbers(n * QKVZ));
    let mut state = fill.state();
    prepared(n * HK * CHANNELS, move |o| {
        small.layer().convolve(s, o, rows.next(), &mut [&mut state], &[0, n]);
    })
}

/// `depth`: keys that there are, those of the new tokens among them.
fn attend<S: Simd>(s: S, n: usize, depth: usize, kept: Kept, fill: &mut Fill) -> Prepared {
    let (q, gate) = (fill.numbers(n * HQ * H), fill.numbers(n * HQ * H));
    // A few rows in turn: what is timed does not depend on what they say.
    let rows: Vec<_> = (0..61).map(|_| (fill.numbers(HKV * H), fill.numbers(HKV * H))).collect();
    let away = if n == 1 { depth * kept.token(HKV, H) } else { 0 };
    let mut caches = Turns::beyond_caches(away, || {
        let mut cache = kept.cache(HKV, H);
        for i in 0..depth {
            let (k, v) = &rows[i % rows.len()];
            cache.push(k, v);
        }
        cache
    });
    prepared(n * HQ * H, move |o| {
        let sizes = Sizes { hq: HQ, hkv: HKV, h: H };
        attention(s, o, (&q, &gate), &[&*caches.next()], &[0, n], sizes);
    })
}

/// All experts of a layer, each in memory of its own.
fn experts<S: Simd>(s: S, n: usize, format: Format, fill: &mut Fill) -> Prepared {
    let one = [(F, D), (F, D), (D, F)].map(|(rows, d)| fill.weight(format, rows, d));
    let arena = Arena::default();
    let bank: Vec<[Weight; 3]> =
        (0..E).map(|_| one.each_ref().map(|weight| weight.copied(&arena))).collect();
    let x = fill.numbers(n * D);
    let weights = fill.between(n * A, 0.05, 0.15);
    // Experts in an order that says nothing of their places, taken in turn.
    let mut order: Vec<usize> = (0..E).collect();
    for i in (1..E).rev() {
        order.swap(i, fill.0.below(i + 1));
    }
    let mut at = 0;
    prepared(n * D, move |o| {
        let ids: Vec<i64> = (0..n * A).map(|i| order[(at + i) % E] as i64).collect();
        at += n * A;
        let groups = Groups::new(&ids, A, E);
        o.fill(0.0);
        moe_experts(s, o, &x, &groups, &weights, |e| {
            let [gate_proj, up_proj, down_proj] = &bank[e];
            Expert { gate_proj, up_proj, down_proj }
        });
    })
}

fn projection<S: Simd>(s: S, n: usize, rows: usize, format: Format, fill: &mut Fill) -> Prepared {
    let one = fill.weight(format, rows, D);
    let away = if n == 1 { one.bytes() } else { 0 };
    let arena = Arena::default();
    let mut layers = Turns::beyond_caches(away, || one.copied(&arena));
    let x = fill.numbers(n * D);
    prepared(n * rows, move |o| linear(s, o, &x, layers.next()))
}

/// Logits and the choice; answers with the weights of the chosen.
fn router<S: Simd>(s: S, n: usize, fill: &mut Fill) -> Prepared {
    let one = fill.weight(Format::Wide, E, D);
    let away = if n == 1 { one.bytes() } else { 0 };
    let arena = Arena::default();
    let mut layers = Turns::beyond_caches(away, || one.copied(&arena));
    let x = fill.numbers(n * D);
    prepared(n * A, move |o| {
        let mut logits = room(n * E);
        linear(s, &mut logits, &x, layers.next());
        o.copy_from_slice(&route(s, &logits, E, A, true, None).weights);
    })
}

/// With the sum that stands before it.
fn norm<S: Simd>(s: S, n: usize, fill: &mut Fill) -> Prepared {
    let weight = fill.between(D, -0.5, 0.5);
    let mut rows =
        Turns::beyond_caches(bytes(n, 2 * D), || (fill.numbers(n * D), fill.numbers(n * D)));
    prepared(n * D, move |o| {
        let (h, x) = rows.next();
        // Added over and over, it stays a number for longer than anybody waits.
        add_rms_norm(s, o, h, x, &weight, EPS);
    })
}

fn gated_norm<S: Simd>(s: S, n: usize, fill: &mut Fill) -> Prepared {
    let weight = fill.between(V, 0.5, 1.5);
    let width = HV * V;
    let mut rows = Turns::beyond_caches(bytes(n, 2 * width), || {
        (fill.numbers(n * width), fill.between(n * width, 0.5, 2.0))
    });
    prepared(V, move |o| {
        let (x, z) = rows.next();
        rms_norm_gated(s, x, z, &weight, EPS);
        o.copy_from_slice(&x[..V]);
    })
}

/// Of the queries.
fn rope<S: Simd>(s: S, n: usize, fill: &mut Fill) -> Prepared {
    let mut turns = vec![0.0; n * TURNED];
    for turns in turns.chunks_exact_mut(TURNED) {
        let (cos, sin) = turns.split_at_mut(TURNED / 2);
        let angles = fill.between(cos.len(), 0.0, std::f32::consts::TAU);
        for ((cos, sin), x) in cos.iter_mut().zip(sin).zip(angles) {
            (*sin, *cos) = x.sin_cos();
        }
    }
    let mut rows = Turns::beyond_caches(bytes(n, HQ * H), || fill.numbers(n * HQ * H));
    prepared(H, move |o| {
        let x = rows.next();
        turn(s, x, &turns, HQ, H);
        o.copy_from_slice(&x[..H]);
    })
}
