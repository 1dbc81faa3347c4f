//! Between the projections of a Gated `DeltaNet` layer: convolution, norms, gates, delta rule and gated
//! norm, one key head of one sequence at a time.
//!
//! The rows of `in_proj_qkvz` are grouped per key head, and everything up to the output projection
//! stays inside a group: one task takes a chunk of tokens through all of it while it is near.

use std::{
    cell::RefCell,
    iter,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use crate::cpu::{
    aligned::Aligned,
    causal_conv1d::fast::{self as conv, convolve},
    gated_delta_rule::fast::{CHUNK, Chunk, Pairs, Room, chunk, held_len, hold, settled, steps},
    gdn_gates::fast::gates,
    l2_norm::fast::l2_norm_row,
    pool,
    rms_norm_gated::fast::rms_norm_gated_row,
    simd::Simd,
};

/// The small weights of a layer and its sizes.
pub(crate) struct Gdn<'a> {
    /// `[HK, W, 2 K + R V]`, `R = HV / HK`: taps by key head, oldest first.
    pub(crate) taps: &'a [f32],
    /// `[HV]`: `exp(A_log)`.
    pub(crate) rates: &'a [f32],
    /// `[HV]`.
    pub(crate) dt_bias: &'a [f32],
    /// `[V]`.
    pub(crate) norm: &'a [f32],
    pub(crate) hk: usize,
    pub(crate) hv: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// Taps of the convolution.
    pub(crate) w: usize,
    pub(crate) eps: f32,
}

/// eps of the L2 norms of queries and keys; the model has it fixed.
const L2_EPS: f32 = 1e-6;

/// Tokens up to which the delta rule goes token by token.
pub(crate) const STEPS: usize = 4;

/// The state of one sequence in one layer.
#[derive(Clone)]
pub(crate) struct State {
    /// `[HK, W - 1, 2 K + R V]`: the convolution's last inputs by key head, oldest first.
    pub(crate) conv: Aligned<f32>,
    /// `[HV, held]`: states of heads and what is still to be written into them.
    pub(crate) heads: Aligned<f32>,
    k: usize,
    v: usize,
}

impl State {
    /// Of a sequence of no tokens; the convolution keeps `conv` numbers.
    pub(crate) fn new(conv: usize, hv: usize, k: usize, v: usize) -> State {
        let mut heads = Aligned::zeros(hv * held_len(k, v));
        hold(&mut heads, iter::empty(), k, v);
        State { conv: Aligned::zeros(conv), heads, k, v }
    }

    /// Numbers of such a state.
    pub(crate) const fn len(conv: usize, hv: usize, k: usize, v: usize) -> usize {
        conv + hv * held_len(k, v)
    }

    /// Other states, `[HV, K, V]`, in place of its own.
    pub(crate) fn hold(&mut self, recurrent: impl Iterator<Item = f32>) {
        hold(&mut self.heads, recurrent, self.k, self.v);
    }

    /// `[HV, K, V]`.
    pub(crate) fn recurrent<S: Simd>(&self, s: S) -> impl Iterator<Item = f32> {
        self.heads
            .chunks_exact(held_len(self.k, self.v))
            .flat_map(move |head| s.run(|| settled(s, &mut head.to_vec(), self.k, self.v).to_vec()))
    }
}

impl Gdn<'_> {
    /// Value heads of a key head.
    fn group(&self) -> usize {
        self.hv / self.hk
    }

    /// Channels of a key head that the convolution sees.
    pub(crate) fn channels(&self) -> usize {
        2 * self.k + self.group() * self.v
    }

    /// Columns of `in_proj_qkvz` of a key head.
    pub(crate) fn columns(&self) -> usize {
        self.channels() + self.group() * self.v
    }

    /// `o` `[N, HV V]` from `qkvz` `[N, HK (2 K + 2 R V)]` and `ba` `[N, 2 HV]`, as projected; the
    /// states of the sequences, whose rows are `cu_seqlens`, go on.
    pub(crate) fn mix<S: Simd>(
        &self,
        s: S,
        o: &mut [f32],
        qkvz: &[f32],
        ba: &[f32],
        states: &mut [&mut State],
        cu_seqlens: &[usize],
    ) {
        let width = self.group() * self.v;
        self.walk(
            s,
            (o, width),
            (qkvz, ba),
            states,
            cu_seqlens,
            #[inline(always)]
            |task, tokens, all, desk| task.run(s, tokens, all, desk),
        );
    }

    /// The convolution alone: `o` `[N, HK (2 K + R V)]`; the windows go on.
    pub(crate) fn convolve<S: Simd>(
        &self,
        s: S,
        o: &mut [f32],
        qkvz: &[f32],
        states: &mut [&mut State],
        cu_seqlens: &[usize],
    ) {
        self.walk(
            s,
            (o, self.channels()),
            (qkvz, &[]),
            states,
            cu_seqlens,
            #[inline(always)]
            |task, tokens, _, desk| {
                task.convolve(s, tokens, desk);
                std::mem::swap(&mut desk.mixed, &mut desk.o);
            },
        );
    }

    /// Takes every key head of every sequence through its tokens, a chunk at a time: `of` is given the
    /// chunk and how many tokens there are in all, and leaves rows of `width` in [`Desk::o`].
    #[inline(always)]
    fn walk<S: Simd>(
        &self,
        s: S,
        (o, width): (&mut [f32], usize),
        (qkvz, ba): (&[f32], &[f32]),
        states: &mut [&mut State],
        cu_seqlens: &[usize],
        of: impl Fn(&mut Task<'_, '_>, Range<usize>, usize, &mut Desk) + Sync,
    ) {
        let hk = self.hk;
        let conv = (self.w - 1) * self.channels();
        let group = self.group() * held_len(self.k, self.v);
        let heads: Vec<_> = states
            .iter_mut()
            .flat_map(|state| {
                let State { conv: c, heads: h, .. } = &mut **state;
                // A convolution of one tap keeps nothing.
                let convs = (0..hk).scan(&mut c[..], move |rest, _| {
                    let (own, left) = std::mem::take(rest).split_at_mut(conv);
                    *rest = left;
                    Some(own)
                });
                convs.zip(h.chunks_exact_mut(group)).map(Mutex::new)
            })
            .collect();
        pool::parts(o, cu_seqlens, width, |sequence, mut part| {
            let head = part.columns.start / width;
            let mut state =
                heads[sequence * hk + head].lock().unwrap_or_else(PoisonError::into_inner);
            let (conv, heads) = &mut *state;
            let mut desk = DESK.take();
            s.run(
                #[inline(always)]
                || {
                    let tokens = part.rows.clone();
                    let mut task = Task { layer: self, head, qkvz, ba, conv, heads };
                    for start in tokens.clone().step_by(CHUNK) {
                        let end = (start + CHUNK).min(tokens.end);
                        of(&mut task, start..end, tokens.len(), &mut desk);
                        for (i, o) in desk.o.chunks_exact(width).enumerate() {
                            part.row(start - tokens.start + i).copy_from_slice(o);
                        }
                    }
                },
            );
            DESK.set(desk);
        });
    }
}

/// One key head of one sequence.
struct Task<'a, 'b> {
    layer: &'a Gdn<'a>,
    head: usize,
    qkvz: &'a [f32],
    ba: &'a [f32],
    conv: &'b mut [f32],
    heads: &'b mut [f32],
}

thread_local! {
    /// A task of one token takes two microseconds a head: room is not looked for anew.
    static DESK: RefCell<Desk> = RefCell::default();
}

/// Room for a chunk of tokens.
#[derive(Default)]
struct Desk {
    conv: conv::Room,
    /// `[C, channels]`: outputs of the convolution; queries and keys are normed in place.
    mixed: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    /// `[C, V]`, of one value head.
    head: Vec<f32>,
    /// `[C, R V]`.
    o: Vec<f32>,
    pairs: Pairs,
    room: Room,
}

impl Task<'_, '_> {
    #[inline(always)]
    fn run<S: Simd>(&mut self, s: S, tokens: Range<usize>, all: usize, desk: &mut Desk) {
        let Gdn { k, v, .. } = *self.layer;
        let (group, channels) = (self.layer.group(), self.layer.channels());
        let c = tokens.len();
        self.convolve(s, tokens.clone(), desk);
        let scale = 1.0 / (k as f32).sqrt();
        for row in desk.mixed.chunks_exact_mut(channels) {
            l2_norm_row(s, &mut row[..k], L2_EPS, scale);
            l2_norm_row(s, &mut row[k..2 * k], L2_EPS, 1.0);
        }
        desk.o.resize(c * group * v, 0.0);
        desk.head.resize(c * v, 0.0);
        for (r, held) in self.heads.chunks_exact_mut(held_len(k, v)).enumerate() {
            self.layer.gates(
                s,
                (&mut desk.g, &mut desk.beta),
                self.ba,
                (self.head, r),
                tokens.clone(),
            );
            let x = Chunk {
                q: &desk.mixed,
                k: &desk.mixed[k..],
                v: &desk.mixed[2 * k + r * v..],
                stride: channels,
                g: &desk.g,
                beta: &desk.beta,
                key: k,
                value: v,
            };
            if all <= STEPS {
                steps(s, &mut desk.head, held, &x);
            } else {
                if r == 0 {
                    desk.pairs.of(s, &x);
                }
                chunk(s, &mut desk.head, held, &x, &desk.pairs, &mut desk.room);
            }
            for (i, o) in desk.head.chunks_exact_mut(v).enumerate() {
                let row = (tokens.start + i) * self.layer.hk + self.head;
                let z = &self.qkvz[row * self.layer.columns() + channels + r * v..][..v];
                rms_norm_gated_row(s, o, z, self.layer.norm, self.layer.eps);
                desk.o[(i * group + r) * v..][..v].copy_from_slice(o);
            }
        }
    }

    /// The convolution of the chunk's tokens; the window goes on.
    #[inline(always)]
    fn convolve<S: Simd>(&mut self, s: S, tokens: Range<usize>, desk: &mut Desk) {
        let (w, channels, columns) = (self.layer.w, self.layer.channels(), self.layer.columns());
        let (qkvz, hk, head) = (self.qkvz, self.layer.hk, self.head);
        let taps = &self.layer.taps[head * w * channels..][..w * channels];
        desk.mixed.resize(tokens.len() * channels, 0.0);
        let rows = tokens.map(|t| &qkvz[(t * hk + head) * columns..][..channels]);
        convolve(s, &mut desk.mixed, rows, self.conv, taps, &mut desk.conv);
    }
}

impl Gdn<'_> {
    /// `g` and `beta` of value head `r` of a key head, for some tokens. Rows of `ba` are key heads of
    /// `[b R | a R]`.
    #[inline(always)]
    fn gates<S: Simd>(
        &self,
        s: S,
        (g, beta): (&mut Vec<f32>, &mut Vec<f32>),
        ba: &[f32],
        (head, r): (usize, usize),
        tokens: Range<usize>,
    ) {
        let group = self.group();
        g.clear();
        beta.clear();
        for t in tokens {
            let row = &ba[2 * (t * self.hv + head * group)..][..2 * group];
            g.push(row[group + r]);
            beta.push(row[r]);
        }
        let h = head * group + r;
        gates(s, g, beta, self.rates[h], self.dt_bias[h]);
    }
}
