//! The gated delta rule, token by token. Per sequence and value head, with a state `S: [K, V]`:
//!
//! `S <- exp(g) S`, `d = beta (v - S' k)`, `S <- S + k d'`, `o = S' q`.
//!
//! `q`, `k`: `[N, HK, K]`, normalised here; `v`, `o`: `[N, HV, V]`; `g`, `beta`: `[N, HV]`; `state`:
//! `[B, HV, K, V]`; `cu_seqlens`: `[B + 1]`. Value head `h` reads query and key head `h / (HV / HK)`.

mod karat;

use karat::{Call, Kernel};

struct GatedDeltaRule;

fn normalised(x: &[f32], eps: f32, scale: f32) -> Vec<f32> {
    let norm = (x.iter().map(|x| x * x).sum::<f32>() + eps).sqrt();
    x.iter().map(|x| x / norm * scale).collect()
}

impl Kernel for GatedDeltaRule {
    fn run(call: &Call) -> Result<(), String> {
        let [hk, hv, key_dim, value_dim] = ["HK", "HV", "K", "V"].map(|letter| call.size(letter));
        let input = |name: &str| call.input::<f32>(name).ok_or(format!("{name}: only f32"));
        let (q_all, k_all, v_all) = (input("q")?, input("k")?, input("v")?);
        let (g, beta) = (input("g")?, input("beta")?);
        let starts = call.input::<i64>("cu_seqlens").ok_or("cu_seqlens")?;
        let o_all = call.output::<f32>("o").ok_or("o")?;
        let state = call.output::<f32>("state").ok_or("state")?;
        let eps = call.scalar("eps") as f32;
        state.copy_from_slice(input("state")?);
        for (at, s) in state.chunks_mut(key_dim * value_dim).enumerate() {
            let (b, h) = (at / hv, at % hv);
            for t in starts[b] as usize..starts[b + 1] as usize {
                let key = (t * hk + h / (hv / hk)) * key_dim;
                let value = (t * hv + h) * value_dim;
                let q = normalised(&q_all[key..key + key_dim], eps, 1.0 / (key_dim as f32).sqrt());
                let k = normalised(&k_all[key..key + key_dim], eps, 1.0);
                let decay = g[t * hv + h].exp();
                let mut d = vec![0.0; value_dim];
                for (row, k) in s.chunks_mut(value_dim).zip(&k) {
                    for (s, d) in row.iter_mut().zip(&mut d) {
                        *s *= decay;
                        *d += *s * k;
                    }
                }
                for (d, v) in d.iter_mut().zip(&v_all[value..]) {
                    *d = beta[t * hv + h] * (v - *d);
                }
                let o = &mut o_all[value..value + value_dim];
                o.fill(0.0);
                for ((row, k), q) in s.chunks_mut(value_dim).zip(&k).zip(&q) {
                    for ((s, d), o) in row.iter_mut().zip(&d).zip(&mut *o) {
                        *s += k * d;
                        *o += *s * q;
                    }
                }
            }
        }
        Ok(())
    }
}

karat::export!(GatedDeltaRule, karat_gated_delta_rule);
