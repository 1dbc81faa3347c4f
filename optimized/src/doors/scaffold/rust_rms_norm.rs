//! `h = x + residual`, `o = h * rsqrt(mean(h^2) + eps) * (1 + weight)`.
//!
//! `x`, `residual`, `o`, `h`: `[N, D]`; `weight`: `[D]`, stored minus one. `residual` and `h` are absent
//! in some problems.

mod karat;

use karat::{Call, Kernel};

struct RmsNorm;

impl Kernel for RmsNorm {
    fn run(call: &Call) -> Result<(), String> {
        let x = call.input::<f32>("x").ok_or("only f32")?;
        let residual = call.input::<f32>("residual");
        let weight = call.input::<f32>("weight").ok_or("weight")?;
        let o = call.output::<f32>("o").ok_or("o")?;
        let mut h = call.output::<f32>("h");
        let eps = call.scalar("eps") as f32;
        let d = weight.len();
        for (i, o) in o.chunks_mut(d).enumerate() {
            let row = i * d..(i + 1) * d;
            o.copy_from_slice(&x[row.clone()]);
            if let Some(residual) = residual {
                o.iter_mut().zip(&residual[row.clone()]).for_each(|(o, r)| *o += r);
            }
            if let Some(h) = &mut h {
                h[row].copy_from_slice(o);
            }
            let mean = o.iter().map(|o| o * o).sum::<f32>() / d as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            o.iter_mut().zip(weight).for_each(|(o, w)| *o *= scale * (1.0 + w));
        }
        Ok(())
    }
}

karat::export!(RmsNorm, karat_rms_norm);
