//! The linear-attention mixer as a whole (official `Qwen3NextGatedDeltaNet`, without the norm
//! before and the residual after it):
//!
//! ```text
//! q, k, v, z = ungroup(in_proj_qkvz x)     b, a = ungroup(in_proj_ba x)
//! q, k, v    = causal_conv1d([q | k | v])  g, beta = gdn_gates(a, b)
//! o          = gated_delta_rule(q, k, v, g, beta)
//! out        = out_proj(rms_norm_gated(o, z))
//! ```
//!
//! Packed layouts, the most frequent loader mistake:
//! - rows of `in_proj_qkvz` are `HK` groups, one per key head, of `[q K | k K | v (HV/HK) V |
//!   z (HV/HK) V]`; the value heads of group `j` are `j HV/HK …` in order;
//! - rows of `in_proj_ba` are `HK` groups of `[b HV/HK | a HV/HK]`;
//! - convolution channels (and the rows of `conv1d`) are *not* grouped: `[q HK K | k HK K | v HV V]`;
//! - columns of `out_proj` are head-major, `HV` heads of `V`.
//!
//! Padding: the official code multiplies the hidden states of pads by zero before `in_proj`, so that
//! they neither enter the window nor write to the state; karat leaves them out.
//! Source: `Qwen3NextGatedDeltaNet` in transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{
    Apart, Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, Tensor3,
    Tensor4,
    packed::{cu_seqlens, ragged},
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct GdnLayer;

case! {
    /// `B` sequences of `T` tokens of `D` channels.
    pub struct Case {
        /// Sequences.
        "B" b,
        /// Tokens of each.
        "T" t,
        /// `hidden_size`.
        "D" d,
        /// `linear_num_key_heads`.
        "HK" hk,
        /// `linear_num_value_heads`, a multiple of `HK`.
        "HV" hv,
        /// `linear_key_head_dim`.
        "K" k,
        /// `linear_value_head_dim`.
        "V" v,
        /// `linear_conv_kernel_dim`.
        "W" w,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` normed hidden states, all sequences one after another.
        pub x: Tensor2<R>,
        /// `[2 HK K + 2 HV V, D]`, rows grouped per key head.
        pub in_proj_qkvz: Tensor2<f32>,
        /// `[2 HV, D]`, rows grouped per key head.
        pub in_proj_ba: Tensor2<f32>,
        /// `[C, W]`, `C = 2 HK K + HV V`, channels in the order `[q | k | v]`.
        pub conv1d: Tensor2<f32>,
        /// `[HV]`.
        pub a_log: Tensor1<f32>,
        /// `[HV]`.
        pub dt_bias: Tensor1<f32>,
        /// `[V]` weight of the gated norm, shared by all heads, as it multiplies.
        pub norm: Tensor1<f32>,
        /// `[D, HV V]`.
        pub out_proj: Tensor2<f32>,
        /// `[S, C, W - 1]` raw convolution inputs before the first token.
        pub conv_state: Tensor3<R>,
        /// `[S, HV, K, V]` recurrent state before the first token.
        pub state: Tensor4<R>,
        /// `[S + 1]` first row of each sequence, then `N`.
        pub cu_seqlens: Tensor1<i64>,
        /// `rms_norm_eps` of the gated norm; the L2 norms have their own 1e-6.
        pub eps: f64,
        /// `HK`.
        pub hk: usize,
        /// `HV`.
        pub hv: usize,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]`.
        pub o: Tensor2<R>,
        /// `[S, C, W - 1]`.
        pub conv_state: Tensor3<R>,
        /// `[S, HV, K, V]`.
        pub state: Tensor4<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "weights of a fresh initialisation, normal hidden states, states left by earlier tokens",
        cites: &[],
    },
    Fill {
        name: "fresh",
        why: "no earlier tokens",
        cites: &["https://github.com/vllm-project/vllm/issues/53051"],
    },
    Fill {
        name: "packed",
        why: "sequences of 0, 1, 2, … tokens and one long one: window or state leaking into the next sequence shows",
        cites: &[
            "https://github.com/huggingface/transformers/issues/46093",
            "https://github.com/huggingface/transformers/issues/44867",
        ],
    },
];

impl Op for GdnLayer {
    const NAME: &'static str = "gdn_layer";
    const WIDE: &'static [&'static str] = &["a_log", "dt_bias", "state"];
    const APART: &'static [Apart] = &[
        Apart {
            output: "conv_state",
            inputs: &["in_proj_ba", "conv1d", "a_log", "dt_bias", "norm", "out_proj", "state"],
            why: "it holds projected inputs, before the convolution",
        },
        Apart {
            output: "state",
            inputs: &["norm", "out_proj"],
            why: "they come after the delta rule",
        },
    ];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(b, t, d, hk, hv, k, v, w)| Spec::new(Case { b, t, d, hk, hv, k, v, w });
        let mut specs: Vec<_> =
            [(1, 1, 8, 1, 1, 4, 4, 4), (1, 5, 12, 2, 4, 4, 6, 4), (2, 9, 16, 2, 6, 8, 4, 3)]
                .map(new)
                .to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((4, 9, 16, 2, 4, 8, 4, 4)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([63, 64, 65, 130].map(|t| new((1, t, 64, 2, 4, 16, 16, 4))));
            specs.extend([
                new((2, 65, 48, 2, 6, 16, 24, 4)).dtype(Dtype::Bf16),
                new((4, 17, 32, 2, 4, 16, 16, 4)).fill("packed").dtype(Dtype::Bf16),
                new((2, 33, 32, 2, 4, 16, 16, 4)).dtype(Dtype::F16),
            ]);
        }
        if set >= Set::Nightly {
            specs.push(new((1, 65, 2048, 16, 32, 128, 128, 4)));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        (!c.hv.is_multiple_of(c.hk)).then(|| format!("HV {} is no multiple of HK {}", c.hv, c.hk))
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        let Case { t, w, .. } = spec.case;
        let left =
            w <= t + 1 && !spec.is("packed") && (input, output) == ("conv_state", "conv_state");
        left.then_some("as many tokens as the window has: the old state has left it")
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { b, t, d, hk, hv, k, v, w } = spec.case;
        let lengths = if spec.is("packed") { ragged(b, t, rng) } else { vec![t; b] };
        let c = 2 * hk * k + hv * v;
        let fan_in = |d: usize| (d as f32).sqrt().recip();
        let std = if spec.is("fresh") { 0.0 } else { 1.0 };
        Inputs {
            x: spec.round(rng.normals((b * t, d), 0.0, 1.0)),
            in_proj_qkvz: spec.round(rng.normals((c + hv * v, d), 0.0, fan_in(d))),
            in_proj_ba: spec.round(rng.normals((2 * hv, d), 0.0, fan_in(d))),
            conv1d: spec.round(rng.normals((c, w), 0.0, 0.5)),
            a_log: Tensor1::from_shape_simple_fn(hv, || rng.uniform(0.01, 16.0).ln() - 3.0),
            dt_bias: rng.normals(hv, 1.0, 0.1),
            norm: spec.round(rng.normals(v, 1.0, 0.2)),
            out_proj: spec.round(rng.normals((d, hv * v), 0.0, fan_in(hv * v))),
            conv_state: spec.round(rng.normals((b, c, w - 1), 0.0, std)),
            state: rng.normals((b, hv, k, v), 0.0, 0.3 * std),
            cu_seqlens: cu_seqlens(&lengths),
            eps: 1e-6,
            hk,
            hv,
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs {
            o: unwritten(x.x.raw_dim()),
            conv_state: unwritten(x.conv_state.raw_dim()),
            state: unwritten(x.state.raw_dim()),
        }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { b, t, d, hk, hv, k, v, w } = spec.case;
        let [b, t, d, hk, hv, k, v, w] = [b, t, d, hk, hv, k, v, w].map(|size| size as u64);
        let (n, c) = (b * t, 2 * hk * k + hv * v);
        let weights = (c + hv * v + 2 * hv) * d + c * w + d * hv * v;
        let size = spec.dtype.size() as u64;
        Cost {
            bytes: size * (weights + 2 * n * d + 2 * b * c * (w - 1)) + 8 * b * hv * k * v,
            flops: n * (2 * weights + 7 * hv * k * v),
        }
    }
}
