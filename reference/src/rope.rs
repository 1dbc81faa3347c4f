use golden::{
    config,
    ops::rope::{Inputs, Outputs},
};

use crate::real::{Real, Site};

/// `(x_i, x_{i + R/2}) <- (x_i c_i - x_{i + R/2} s_i, x_{i + R/2} c_i + x_i s_i)` for `i < R/2`, the
/// table in f32 for every number type.
///
/// `x`, `o`: `[N, HQ, H]`; `positions`: `[N]`; `inv_freq`: `[R / 2]`.
pub fn rope<R: Real>(
    Inputs { x, positions, inv_freq, attention_factor }: &Inputs<R>,
) -> Outputs<R> {
    let half = inv_freq.len();
    let mut o = x.to_owned();
    for (mut heads, &position) in o.outer_iter_mut().zip(positions) {
        for (i, &inv_freq) in inv_freq.iter().enumerate() {
            let (cos, sin) = turn(position, inv_freq, *attention_factor);
            let (cos, sin) = (R::table(cos).at(Site::RopeTable), R::table(sin).at(Site::RopeTable));
            for mut head in heads.rows_mut() {
                let (a, b) = (head[i], head[i + half]);
                let product = |x: R, turn: R| (x * turn).at(Site::RopeProduct);
                head[i] = (product(a, cos) - product(b, sin)).at(Site::Rope);
                head[i + half] = (product(b, cos) + product(a, sin)).at(Site::Rope);
            }
        }
    }
    Outputs { o: o.into_shared() }
}

/// Cosine and sine of one entry of the table, scaled: each step rounded to f32.
fn turn(position: i64, inv_freq: f32, attention_factor: f64) -> (f32, f32) {
    let angle = f64::from(position as f32 * inv_freq);
    let scaled = |x: f64| x as f32 * attention_factor as f32;
    (scaled(angle.cos()), scaled(angle.sin()))
}

/// The frequencies of a config, `[rotary_dim / 2]` (rounded up), in torch's own f32 steps.
///
/// `1 / f32(theta^(f32(2 i) / f32(R)))`; with `YaRN`
/// `inv_i / factor * ramp_i + inv_i * (1 - ramp_i)`, `ramp_i = clamp((i - low) / (high - low), 0, 1)`
/// where `low` and `high` are the channels that turn `beta_fast` and `beta_slow` times over the
/// original context: `R ln(original / (2 pi turns)) / (2 ln theta)`.
/// Source: `_compute_default_rope_parameters`, `_compute_yarn_parameters`, transformers 5.23.0.
pub fn inv_freq(rope: &config::Rope) -> Vec<f32> {
    let dim = rope.rotary_dim;
    let pos_freqs: Vec<f32> = (0..dim.div_ceil(2))
        .map(|i| {
            let power = (2 * i) as f32 / dim as f32;
            // Rounded once: this is what torch's `pow` returns for every index of every config seen.
            rope.theta.powf(f64::from(power)) as f32
        })
        .collect();
    let Some(yarn) = rope.yarn else {
        return pos_freqs.iter().map(|p| 1.0 / p).collect();
    };
    let channel = |turns: f64| {
        let original = yarn.original_max_position_embeddings as f64;
        dim as f64 * (original / (turns * 2.0 * std::f64::consts::PI)).ln()
            / (2.0 * rope.theta.ln())
    };
    let (mut low, mut high) = (channel(yarn.beta_fast), channel(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        // The official code widens an empty ramp so that it can be divided by.
        high += 0.001;
    }
    let (low32, width) = (low as f32, (high - low) as f32);
    pos_freqs
        .iter()
        .enumerate()
        .map(|(i, &p)| {
            let ramp = ((i as f32 - low32) / width).clamp(0.0, 1.0);
            let extrapolated = 1.0 - ramp;
            let (alone, divided) = (1.0 / p, 1.0 / (yarn.factor as f32 * p));
            divided * (1.0 - extrapolated) + alone * extrapolated
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use golden::config::Rope;

    use super::inv_freq;

    /// `int(20 * 0.25)` is odd; values of `Qwen3NextRotaryEmbedding`, transformers 5.23.0.
    #[test]
    fn an_odd_number_of_channels_turns_one_more() {
        let rope = Rope { theta: 10_000.0, rotary_dim: 5, yarn: None };
        assert_eq!(inv_freq(&rope), [1.0, 0.025_118_863, 0.000_630_957_3]);
    }
}
