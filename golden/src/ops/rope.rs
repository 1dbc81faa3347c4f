//! Partial rotary position embedding of queries and keys:
//!
//! `(x_i, x_{i + R/2}) <- (x_i c_i - x_{i + R/2} s_i, x_{i + R/2} c_i + x_i s_i)`, `i < R/2`,
//!
//! over the first `R` channels of each head; the others pass through untouched. Half-split pairing
//! (`NeoX`), after the query and key norms, keys before they are cached.
//!
//! The table is *defined* in f32, whatever the arithmetic around it is:
//! `inv_freq_i = 1 / f32(theta^(f32(2 i) / f32(R)))`, `angle = f32(position) * inv_freq_i` with one
//! rounding, `c = f32(f32(cos angle) * attention_factor)`, the sine alike. At position 262143 an
//! angle in bf16, or frequencies in it, are off by whole turns.
//!
//! `YaRN` changes the frequencies (channels that turn less than `beta_slow` times over the original
//! context are divided by `factor`, those that turn more than `beta_fast` times are left alone, a
//! ramp between) and scales cosine *and* sine by `attention_factor = 0.1 ln(factor) + 1`, so that
//! only the rotated part of a score is scaled. It is static: it applies at every length.
//! Source: `Qwen3NextRotaryEmbedding`, `apply_rotary_pos_emb` in `modeling_qwen3_next.py` and
//! `_compute_yarn_parameters` in `modeling_rope_utils.py`, transformers 5.23.0.

use crate::{
    Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor3, tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct Rope;

case! {
    /// `N` tokens, `HQ` heads of `H` channels, `R` of them rotated.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// Heads.
        "HQ" hq,
        /// `head_dim`.
        "H" h,
        /// Rotated channels, even.
        "R" r,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, HQ, H]` normed queries or keys.
        pub x: Tensor3<R>,
        /// `[N]` position of each token in its sequence.
        pub positions: Tensor1<i64>,
        /// `[R / 2]` frequencies, radians per token.
        pub inv_freq: Tensor1<f32>,
        /// Factor on cosine and sine; 1 without `YaRN`.
        pub attention_factor: f64,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, HQ, H]`.
        pub o: Tensor3<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill { name: DOMAIN, why: "positions 0 … N - 1, theta 1e7", cites: &[] },
    Fill {
        name: "far",
        why: "positions around 262143 and 1048575: bf16 positions or frequencies, and poor range reduction, show",
        cites: &["https://github.com/NVIDIA-NeMo/Automodel/issues/3233"],
    },
    Fill {
        name: "yarn",
        why: "an attention factor of 1.1386: leaving it out shows",
        cites: &["https://github.com/jundot/omlx/issues/3347"],
    },
];

impl Op for Rope {
    const NAME: &'static str = "rope";
    const WIDE: &'static [&'static str] = &["inv_freq"];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, hq, h, r)| Spec::new(Case { n, hq, h, r });
        let mut specs: Vec<_> = [(1, 1, 2, 2), (5, 2, 32, 8), (7, 3, 16, 16)].map(new).to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((9, 2, 256, 64)).fill(fill.name)));
        if set >= Set::Ci {
            specs.push(new((273, 4, 64, 16)));
            specs.push(new((65, 16, 256, 64)).dtype(Dtype::Bf16));
            specs.push(new((33, 4, 256, 64)).dtype(Dtype::Bf16).fill("far"));
            specs.push(new((33, 4, 256, 64)).dtype(Dtype::F16).fill("yarn"));
        }
        if set >= Set::Nightly {
            specs.push(new((4096, 16, 256, 64)));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        if !c.r.is_multiple_of(2) {
            return Some(format!("R {} is odd", c.r));
        }
        (c.h < c.r).then(|| format!("R {} is above H {}", c.r, c.h))
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, hq, h, r } = spec.case;
        let positions = (0..n).map(|i| match (spec.fill.as_str(), i % 2) {
            ("far", 0) => 262_143 + i as i64,
            ("far", _) => 1_048_575 - i as i64,
            _ => i as i64,
        });
        // Frequencies as a table, not by the formula: the op is handed them.
        let inv_freq =
            (0..r / 2).map(|i| 1e7_f64.powf(-2.0 * i as f64 / r as f64) as f32).collect();
        Inputs {
            x: spec.round(rng.normals((n, hq, h), 0.0, 1.0)),
            positions: positions.collect(),
            inv_freq,
            attention_factor: if spec.is("yarn") { 0.1 * 4.0_f64.ln() + 1.0 } else { 1.0 },
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.x.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { n, hq, h, r } = spec.case;
        let [n, hq, h, r] = [n, hq, h, r].map(|size| size as u64);
        Cost { bytes: 2 * spec.dtype.size() as u64 * n * hq * h + 8 * n, flops: 3 * n * hq * r }
    }
}
