//! Causal depthwise convolution with `SiLU`, over the channels of `[q | k | v]`:
//!
//! `o[t, c] = silu(sum_j weight[c, j] * x[t - (W - 1) + j, c])`, `j = 0 .. W`.
//!
//! A cross-correlation: the last tap multiplies the current token. No bias. Before the first token
//! of a sequence stand the `W - 1` columns of `state`, zeros for a fresh sequence. The new state is
//! the last `W - 1` raw inputs (before the convolution) of *old state followed by new tokens*, also
//! when a step has fewer than `W - 1` tokens. `z`, `b` and `a` are not convolved.
//!
//! The official code keeps `W` columns; `W - 1` suffice, and vLLM, `SGLang` and mlx keep those.
//! Source: `torch_causal_conv1d_update` and the prefill path of `Qwen3NextGatedDeltaNet.forward`
//! in transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{
    Apart, Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, Tensor3,
    packed::{cu_seqlens, ragged},
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct CausalConv1d;

case! {
    /// `B` sequences of `T` tokens, `C` channels, `W` taps.
    pub struct Case {
        /// Sequences.
        "B" b,
        /// Tokens of each.
        "T" t,
        /// Channels, `2 HK K + HV V`.
        "C" c,
        /// `linear_conv_kernel_dim`.
        "W" w,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, C]` raw projections, all sequences one after another.
        pub x: Tensor2<R>,
        /// `[C, W]` taps, oldest first.
        pub weight: Tensor2<f32>,
        /// `[S, C, W - 1]` raw inputs before the first token, oldest first.
        pub state: Tensor3<R>,
        /// `[S + 1]` first row of each sequence, then `N`.
        pub cu_seqlens: Tensor1<i64>,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, C]`, after `SiLU`.
        pub o: Tensor2<R>,
        /// `[S, C, W - 1]` raw inputs before the next token, oldest first.
        pub state: Tensor3<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "normal projections and taps, a window left by earlier tokens",
        cites: &[],
    },
    Fill {
        name: "fresh",
        why: "no earlier tokens: garbage in an unused window shows",
        cites: &["https://github.com/vllm-project/vllm/issues/55766"],
    },
    Fill {
        name: "packed",
        why: "sequences of 0, 1, 2, … tokens and one long one: a window that leaks into the next sequence shows",
        cites: &[
            "https://github.com/huggingface/transformers/issues/46093",
            "https://github.com/modelscope/ms-swift/issues/9618",
        ],
    },
    Fill {
        name: "outlier",
        why: "one token 1e4 times the others: it must be seen by exactly W outputs and then be forgotten",
        cites: &["https://github.com/AI-Hypercomputer/maxtext/issues/5295"],
    },
];

impl Op for CausalConv1d {
    const NAME: &'static str = "causal_conv1d";
    const APART: &'static [Apart] =
        &[Apart { output: "state", inputs: &["weight"], why: "the state holds inputs, not sums" }];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(b, t, c, w)| Spec::new(Case { b, t, c, w });
        let mut specs: Vec<_> =
            [(1, 1, 1, 1), (1, 1, 8, 4), (1, 2, 8, 4), (1, 3, 8, 4), (2, 5, 6, 2), (2, 65, 8, 4)]
                .map(new)
                .to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((4, 7, 6, 4)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([63, 64, 127, 128, 129, 273].map(|t| new((1, t, 24, 4))));
            specs.extend([(3, 9, 10, 3), (2, 4, 10, 7)].map(new));
            specs.push(new((5, 33, 16, 4)).fill("packed"));
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((2, 65, 32, 4)).dtype(dtype)));
            specs.push(new((5, 33, 16, 4)).fill("packed").dtype(Dtype::Bf16));
        }
        if set >= Set::Nightly {
            specs.extend([(1, 1, 8192, 4), (1, 4096, 8192, 4), (64, 1, 8192, 4)].map(new));
        }
        specs
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        let Case { t, w, .. } = spec.case;
        match (input, output) {
            ("x", "state") if w == 1 => Some("a window of one token keeps nothing"),
            ("state", "state") if w <= t + 1 && !spec.is("packed") => {
                Some("as many tokens as the window has: the old state has left it")
            }
            _ => None,
        }
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { b, t, c, w } = spec.case;
        let lengths = if spec.is("packed") { ragged(b, t, rng) } else { vec![t; b] };
        let mut x = rng.normals((b * t, c), 0.0, 1.0);
        if spec.is("outlier") {
            x.row_mut(t / 2).mapv_inplace(|v| v * 1e4);
        }
        let std = if spec.is("fresh") { 0.0 } else { 1.0 };
        Inputs {
            x: spec.round(x),
            weight: spec.round(rng.normals((c, w), 0.0, 0.5)),
            state: spec.round(rng.normals((b, c, w - 1), 0.0, std)),
            cu_seqlens: cu_seqlens(&lengths),
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.x.raw_dim()), state: unwritten(x.state.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { b, t, c, w } = spec.case;
        let [b, t, c, w] = [b, t, c, w].map(|size| size as u64);
        let size = spec.dtype.size() as u64;
        // Read and write each activation and each window, read the taps.
        Cost {
            bytes: size * (2 * b * t * c + 2 * b * c * (w - 1) + c * w),
            flops: b * t * c * (2 * w + 5),
        }
    }
}
