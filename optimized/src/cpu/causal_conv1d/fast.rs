//! The convolution on vectors: channels side by side, a chunk of tokens at a time.

use std::sync::{Mutex, PoisonError};

use golden::{
    Spec,
    ops::causal_conv1d::{Case, CausalConv1d, Inputs, Outputs},
};

use crate::cpu::{
    linear::activations::Reads,
    pool,
    portable::Planted,
    simd::{LANES, Simd, Wide, each, lanes, lanes_mut},
    vector::{Fast, flat, flat_mut},
};

/// Room for a chunk of tokens.
#[derive(Default)]
pub(crate) struct Room {
    /// `[W - 1 + T, C]`: the window, then the tokens.
    inputs: Vec<f32>,
}

/// `o = silu(sum_j taps_j x_{t - W + 1 + j})` of some tokens, the rows `x`; the window goes on.
///
/// `o`: `[T, C]`; `window`: `[W - 1, C]`, oldest first; `taps`: `[W, C]`.
#[inline(always)]
pub(crate) fn convolve<'a, S: Simd>(
    s: S,
    o: &mut [f32],
    x: impl Iterator<Item = &'a [f32]>,
    window: &mut [f32],
    taps: &[f32],
    room: &mut Room,
) {
    let c = taps.len() - window.len();
    let inputs = &mut room.inputs;
    inputs.clear();
    inputs.extend_from_slice(window);
    x.for_each(
        #[inline(always)]
        |x| inputs.extend_from_slice(x),
    );
    window.copy_from_slice(&inputs[o.len()..]);
    let mut at = 0;
    while at + LANES <= c {
        if taps.len() == 4 * c {
            column::<S, 4>(s, o, inputs, taps, c, at);
        } else {
            columns(s, o, inputs, taps, c, at);
        }
        at += LANES;
    }
    for at in at..c {
        for (t, o) in o.chunks_exact_mut(c).enumerate() {
            let terms = taps[at..].iter().step_by(c).zip(inputs[t * c + at..].iter().step_by(c));
            let sum: f32 = terms.map(|(tap, x)| x * tap).sum();
            o[at] = sum / (1.0 + (-sum).exp());
        }
    }
}

/// Sixteen channels from `at` on: taps and window stay in registers.
#[inline(always)]
fn column<S: Simd, const W: usize>(
    s: S,
    o: &mut [f32],
    inputs: &[f32],
    taps: &[f32],
    c: usize,
    at: usize,
) {
    let zero = s.splat(0.0);
    let taps: [S::F; W] = each(
        zero,
        #[inline(always)]
        |j| s.load(lanes(&taps[j * c + at..])),
    );
    // The last is the token's own.
    let mut x: [S::F; W] = each(
        zero,
        #[inline(always)]
        |j| s.load(lanes(&inputs[j * c + at..])),
    );
    for (o, new) in o[at..].chunks_mut(c).zip(inputs[(W - 1) * c + at..].chunks(c)) {
        x[W - 1] = s.load(lanes(new));
        let mut sum = zero;
        for j in 0..W {
            sum = s.fma(x[j], taps[j], sum);
        }
        s.store(lanes_mut(o), s.silu(sum));
        for j in 1..W {
            x[j - 1] = x[j];
        }
    }
}

/// The same of any number of taps.
#[inline(always)]
fn columns<S: Simd>(s: S, o: &mut [f32], inputs: &[f32], taps: &[f32], c: usize, at: usize) {
    for (t, o) in o[at..].chunks_mut(c).enumerate() {
        let mut sum = s.splat(0.0);
        for (tap, x) in taps[at..].chunks(c).zip(inputs[t * c + at..].chunks(c)) {
            sum = s.fma(s.load(lanes(x)), s.load(lanes(tap)), sum);
        }
        s.store(lanes_mut(o), s.silu(sum));
    }
}

/// Channels of a task of the op: those of a key head.
const CHANNELS: usize = 512;

/// Tokens of a chunk of the op, as an engine has them.
const CHUNK: usize = 32;

/// A problem of the op.
pub(crate) struct Packed {
    case: Case,
    /// `[N, C]`.
    x: Vec<f32>,
    /// `[W, C']` of every [`CHANNELS`], oldest first.
    taps: Vec<Vec<f32>>,
    /// `[S, C, W - 1]`.
    state: Vec<f32>,
    cu_seqlens: Vec<usize>,
}

impl Fast for CausalConv1d {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        let Case { c, w, .. } = spec.case;
        let taps = flat(&x.weight);
        let turned =
            |taps: &[f32]| (0..w).flat_map(|j| taps[j..].iter().step_by(w).copied()).collect();
        Packed {
            case: spec.case.clone(),
            x: flat(&x.x),
            taps: taps.chunks(CHANNELS.min(c) * w).map(turned).collect(),
            state: flat(&x.state),
            cu_seqlens: x.cu_seqlens.iter().map(|&at| at as usize).collect(),
        }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs, plant: Planted) {
        let state = flat_mut(&mut o.state);
        state.copy_from_slice(&x.state);
        x.run(s, flat_mut(&mut o.o), state, plant);
    }
}

impl Packed {
    /// `o`: `[N, C]`; `state`: `[S, C, W - 1]`, which goes on.
    fn run<S: Simd>(&self, s: S, o: &mut [f32], state: &mut [f32], plant: Planted) {
        let Case { c, w, .. } = self.case;
        let flipped = plant.is("taps-flipped");
        // The channels of a task lie together in the state; one tap keeps nothing.
        let mut rest = state;
        let mut states = Vec::new();
        for at in 0..(self.cu_seqlens.len() - 1) * self.taps.len() {
            let channels = self.taps[at % self.taps.len()].len() / w;
            let (own, left) = rest.split_at_mut(channels * (w - 1));
            states.push(Mutex::new(own));
            rest = left;
        }
        pool::parts(o, &self.cu_seqlens, CHANNELS, |sequence, mut part| {
            let (task, from) = (part.columns.start / CHANNELS, part.columns.start);
            let channels = part.columns.len();
            let state = states[sequence * self.taps.len() + task].lock();
            let mut state = state.unwrap_or_else(PoisonError::into_inner);
            let place = |i: usize| i % channels * (w - 1) + i / channels;
            let mut window: Vec<f32> = (0..state.len()).map(|i| state[place(i)]).collect();
            if plant.is("state-ignored") {
                window.fill(0.0);
            }
            let mut taps = self.taps[task].clone();
            if flipped {
                taps = taps.chunks_exact(channels).rev().flatten().copied().collect();
            }
            let tokens = part.rows.clone();
            s.run(
                #[inline(always)]
                || {
                    let (mut room, mut mixed) = (Room::default(), Vec::new());
                    for start in tokens.clone().step_by(CHUNK) {
                        let end = (start + CHUNK).min(tokens.end);
                        mixed.resize((end - start) * channels, 0.0);
                        let rows = (start..end).map(|t| &self.x[t * c + from..][..channels]);
                        convolve(s, &mut mixed, rows, &mut window, &taps, &mut room);
                        for (i, o) in mixed.chunks_exact(channels).enumerate() {
                            part.row(start - tokens.start + i).copy_from_slice(o);
                        }
                    }
                },
            );
            if !(plant.is("short-step-state-unwritten") && (2..=3).contains(&tokens.len())) {
                window.iter().enumerate().for_each(|(i, &x)| state[place(i)] = x);
            }
        });
    }
}
