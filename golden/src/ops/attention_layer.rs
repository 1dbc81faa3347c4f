//! The full-attention mixer as a whole (official `Qwen3NextAttention`, without the norm before and
//! the residual after it):
//!
//! ```text
//! q, gate = split(q_proj x)       k = k_proj x       v = v_proj x
//! q, k    = rope(norm(q)), rope(norm(k))             zero-centred norms over each head
//! out     = o_proj(attention(q, cache + k, cache + v) * sigmoid(gate))
//! ```
//!
//! Packed layout: rows of `q_proj` are `HQ` heads of `[query H | gate H]`, not all queries and then
//! all gates; columns of `o_proj` are head-major. Keys are cached normed and rotated. The position
//! of a token is its index in its sequence, cached tokens included.
//! Source: `Qwen3NextAttention` in transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{
    Apart, Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, Tensor3,
    packed::{cu_seqlens, ragged},
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct AttentionLayer;

case! {
    /// `B` sequences of `T` new tokens, `TK` with the cached ones.
    pub struct Case {
        /// Sequences.
        "B" b,
        /// New tokens of each.
        "T" t,
        /// Tokens of each sequence, cached and new: at least `T`.
        "TK" tk,
        /// `hidden_size`.
        "D" d,
        /// `num_attention_heads`, a multiple of `HKV`.
        "HQ" hq,
        /// `num_key_value_heads`.
        "HKV" hkv,
        /// `head_dim`.
        "H" h,
        /// Rotated channels, even.
        "R" r,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` normed hidden states of the new tokens, all sequences one after another.
        pub x: Tensor2<R>,
        /// `[HQ 2 H, D]`, per head query then gate.
        pub q_proj: Tensor2<f32>,
        /// `[HKV H, D]`.
        pub k_proj: Tensor2<f32>,
        /// `[HKV H, D]`.
        pub v_proj: Tensor2<f32>,
        /// `[D, HQ H]`.
        pub o_proj: Tensor2<f32>,
        /// `[H]`, stored minus one.
        pub q_norm: Tensor1<f32>,
        /// `[H]`, stored minus one.
        pub k_norm: Tensor1<f32>,
        /// `[P, HKV, H]` normed, rotated keys of earlier tokens, all sequences one after another.
        pub k_cache: Tensor3<R>,
        /// `[P, HKV, H]` their values.
        pub v_cache: Tensor3<R>,
        /// `[S + 1]` first new token of each sequence, then `N`.
        pub cu_seqlens: Tensor1<i64>,
        /// `[S + 1]` first cached token of each sequence, then `P`.
        pub cu_seqlens_cache: Tensor1<i64>,
        /// `[R / 2]` frequencies of the rotary embedding.
        pub inv_freq: Tensor1<f32>,
        /// Factor on cosine and sine.
        pub attention_factor: f64,
        /// `rms_norm_eps`.
        pub eps: f64,
        /// `HQ`.
        pub hq: usize,
        /// `HKV`.
        pub hkv: usize,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]`.
        pub o: Tensor2<R>,
        /// `[N, HKV, H]` normed, rotated keys of the new tokens, to be cached.
        pub k: Tensor3<R>,
        /// `[N, HKV, H]` their values.
        pub v: Tensor3<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "weights of a fresh initialisation, norm weights around zero",
        cites: &[],
    },
    Fill {
        name: "packed",
        why: "sequences of 0, 1, 2, … tokens and one long one, each with its own positions",
        cites: &["https://github.com/huggingface/transformers/issues/44867"],
    },
    Fill {
        name: "yarn",
        why: "an attention factor of 1.1386: leaving it out shows",
        cites: &["https://github.com/jundot/omlx/issues/3347"],
    },
];

impl Op for AttentionLayer {
    const NAME: &'static str = "attention_layer";
    const WIDE: &'static [&'static str] = &["inv_freq"];
    const APART: &'static [Apart] = &[
        Apart {
            output: "k",
            inputs: &["q_proj", "v_proj", "o_proj", "q_norm", "k_cache", "v_cache"],
            why: "new keys are of x, k_proj and k_norm",
        },
        Apart {
            output: "v",
            inputs: &["q_proj", "k_proj", "o_proj", "q_norm", "k_norm", "k_cache", "v_cache"],
            why: "new values are of x and v_proj",
        },
    ];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(b, t, tk, d, hq, hkv, h, r)| Spec::new(Case { b, t, tk, d, hq, hkv, h, r });
        let mut specs: Vec<_> =
            [(1, 1, 1, 8, 1, 1, 4, 2), (1, 5, 9, 16, 4, 2, 8, 4)].map(new).to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((3, 5, 8, 16, 4, 2, 8, 4)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([63, 64, 65, 130].map(|t| new((1, t, t, 64, 4, 2, 32, 8))));
            specs.extend([(2, 1, 130, 64, 8, 1, 32, 8), (2, 17, 65, 48, 6, 2, 16, 16)].map(new));
            specs.extend([
                new((1, 65, 65, 64, 4, 2, 32, 8)).dtype(Dtype::Bf16),
                new((3, 9, 40, 48, 6, 2, 16, 8)).fill("packed").dtype(Dtype::Bf16),
                new((2, 17, 33, 64, 4, 2, 32, 8)).dtype(Dtype::F16),
            ]);
        }
        if set >= Set::Nightly {
            specs.push(new((1, 65, 130, 2048, 16, 2, 256, 64)));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        if !c.hq.is_multiple_of(c.hkv) {
            return Some(format!("HQ {} is no multiple of HKV {}", c.hq, c.hkv));
        }
        if !c.r.is_multiple_of(2) || c.h < c.r {
            return Some(format!("R {}: expected an even number up to H {}", c.r, c.h));
        }
        (c.tk < c.t).then(|| format!("TK {} is below T {}", c.tk, c.t))
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        let one =
            spec.case.tk == 1 && output == "o" && matches!(input, "k_proj" | "q_norm" | "k_norm");
        one.then_some("one key has the weight one")
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { b, t, tk, d, hq, hkv, h, r } = spec.case;
        let new = if spec.is("packed") { ragged(b, t, rng) } else { vec![t; b] };
        let cached = vec![tk - t; b];
        let p = b * (tk - t);
        let by_d = (d as f32).sqrt().recip();
        Inputs {
            x: spec.round(rng.normals((b * t, d), 0.0, 1.0)),
            q_proj: spec.round(rng.normals((2 * hq * h, d), 0.0, by_d)),
            k_proj: spec.round(rng.normals((hkv * h, d), 0.0, by_d)),
            v_proj: spec.round(rng.normals((hkv * h, d), 0.0, by_d)),
            o_proj: spec.round(rng.normals((d, hq * h), 0.0, ((hq * h) as f32).sqrt().recip())),
            q_norm: spec.round(rng.normals(h, 0.0, 0.2)),
            k_norm: spec.round(rng.normals(h, 0.0, 0.2)),
            k_cache: spec.round(rng.normals((p, hkv, h), 0.0, 1.0)),
            v_cache: spec.round(rng.normals((p, hkv, h), 0.0, 1.0)),
            cu_seqlens: cu_seqlens(&new),
            cu_seqlens_cache: cu_seqlens(&cached),
            inv_freq: (0..r / 2).map(|i| 1e7_f64.powf(-2.0 * i as f64 / r as f64) as f32).collect(),
            attention_factor: if spec.is("yarn") { 0.1 * 4.0_f64.ln() + 1.0 } else { 1.0 },
            eps: 1e-6,
            hq,
            hkv,
        }
    }

    fn unwritten(spec: &Spec<Case>, x: &Inputs) -> Outputs {
        let kv = (x.x.nrows(), spec.case.hkv, spec.case.h);
        Outputs { o: unwritten(x.x.raw_dim()), k: unwritten(kv), v: unwritten(kv) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { b, t, tk, d, hq, hkv, h, .. } = spec.case;
        let [b, t, tk, d, hq, hkv, h] = [b, t, tk, d, hq, hkv, h].map(|size| size as u64);
        let weights = d * h * (3 * hq + 2 * hkv);
        let seen = b * (t * (tk - t) + t * (t + 1) / 2);
        Cost {
            bytes: spec.dtype.size() as u64 * (weights + 2 * b * t * d + 2 * b * tk * hkv * h),
            flops: 2 * b * t * weights + seen * hq * 4 * h,
        }
    }
}
