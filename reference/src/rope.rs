use golden::ops::rope::{Inputs, Outputs};

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
