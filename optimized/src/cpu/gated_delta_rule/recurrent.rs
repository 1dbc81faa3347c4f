//! Token by token, with the state in f32.

use golden::Dtype;

use super::{Algorithm, CHUNK, Head, Normed, Planted, Sizes};
use crate::cpu::{stored::Stored, sums::add_scaled};

/// Token by token.
pub(crate) struct Recurrent;

/// Of the current token.
pub(crate) struct Room {
    /// `[K]`, scaled.
    q: Vec<f32>,
    /// `[V]`: what the state says of the key, then what is written.
    d: Vec<f32>,
}

impl Algorithm for Recurrent {
    type Normed = f32;
    type Workspace = Room;

    fn workspace(Sizes { k, v, .. }: Sizes) -> Room {
        Room { q: vec![0.0; k], d: vec![0.0; v] }
    }

    fn head<E: Stored>(head: Head<'_>, x: &Normed<'_, E>, room: &mut Room, plant: Planted) {
        let Sizes { k, v, .. } = x.x.sizes;
        let Room { q: scaled, d } = room;
        let scale = if plant.is("query-not-scaled") { 1.0 } else { 1.0 / (k as f32).sqrt() };
        let narrow = plant.is("state-in-bf16");
        let answer_first = plant.is("answer-before-write");
        let last = head.tokens.len().wrapping_sub(1);
        for t in 0..head.tokens.len() {
            let n = head.tokens.start + t;
            let (q, key) = x.query_key(n, head.h, plant);
            for (scaled, q) in scaled.iter_mut().zip(q) {
                *scaled = q * scale;
            }
            let Token { decay, on_value, on_prediction } = token(x, &head, t, plant);
            if t == CHUNK && plant.is("state-reset-at-one-chunk") {
                head.state.fill(0.0);
            }
            let before =
                (t == last && plant.is("final-state-off-by-one")).then(|| head.state.to_vec());
            let o = &mut head.o[t * v..][..v];
            forget_and_predict(head.state, decay, key, d);
            for (d, value) in d.iter_mut().zip(x.value(n, head.h)) {
                *d = on_value * value.load() - on_prediction * *d;
            }
            o.fill(0.0);
            if answer_first {
                answer(head.state, scaled, o);
                write(head.state, key, d);
            } else {
                write_and_answer(head.state, key, d, scaled, o);
            }
            if narrow {
                head.state.iter_mut().for_each(|s| *s = Dtype::Bf16.round(*s));
            }
            if let Some(before) = before {
                head.state.copy_from_slice(&before);
            }
        }
        if plant.is("decay-after-write") && !head.tokens.is_empty() {
            let decay = x.gates(&head, last, plant).0.exp();
            head.state.iter_mut().for_each(|s| *s *= decay);
        }
    }
}

/// Factors of one token: `d = on_value v - on_prediction S' k`.
struct Token {
    decay: f32,
    on_value: f32,
    on_prediction: f32,
}

fn token<E: Stored>(x: &Normed<'_, E>, head: &Head<'_>, t: usize, plant: Planted) -> Token {
    let (g, beta) = x.gates(head, t, plant);
    let honest = Token { decay: g.exp(), on_value: beta, on_prediction: beta };
    match plant.0 {
        Some("no-delta-rule") => Token { on_prediction: 0.0, ..honest },
        Some("beta-on-value-only") => Token { on_prediction: 1.0, ..honest },
        Some("beta-on-prediction-only") => Token { on_value: 1.0, ..honest },
        Some("prediction-before-decay") => Token { on_prediction: beta / honest.decay, ..honest },
        Some("decay-dropped-at-one-chunk") if t == CHUNK => Token { decay: 1.0, ..honest },
        Some("decay-dropped-at-each-chunk") if t.is_multiple_of(CHUNK) => {
            Token { decay: 1.0, ..honest }
        }
        // The decay of a token after its write is one before the write of the next.
        Some("decay-after-write") if t == 0 => Token { decay: 1.0, ..honest },
        Some("decay-after-write") => Token { decay: x.gates(head, t - 1, plant).0.exp(), ..honest },
        _ => honest,
    }
}

/// `S <- decay S`, `prediction = S' k`.
fn forget_and_predict(state: &mut [f32], decay: f32, k: &[f32], prediction: &mut [f32]) {
    prediction.fill(0.0);
    for (row, k) in state.chunks_exact_mut(prediction.len()).zip(k) {
        for (s, prediction) in row.iter_mut().zip(&mut *prediction) {
            *s *= decay;
            *prediction += *s * k;
        }
    }
}

/// `S <- S + k d'`, `o += S' q`.
fn write_and_answer(state: &mut [f32], k: &[f32], d: &[f32], q: &[f32], o: &mut [f32]) {
    for (row, (k, q)) in state.chunks_exact_mut(d.len()).zip(k.iter().zip(q)) {
        for ((s, d), o) in row.iter_mut().zip(d).zip(&mut *o) {
            *s += k * d;
            *o += *s * q;
        }
    }
}

/// `o += S' q`.
fn answer(state: &[f32], q: &[f32], o: &mut [f32]) {
    for (row, &q) in state.chunks_exact(o.len()).zip(q) {
        add_scaled(o, q, row);
    }
}

/// `S <- S + k d'`.
fn write(state: &mut [f32], k: &[f32], d: &[f32]) {
    for (row, &k) in state.chunks_exact_mut(d.len()).zip(k) {
        add_scaled(row, k, d);
    }
}
