//! Input of the multi-token-prediction head:
//!
//! `o = fc( concat[ norm_embedding(embedding), norm_hidden(hidden) ] )`.
//!
//! `embedding` is that of the *next* token, `hidden` the main model's output for this one *after*
//! its final norm (what `lm_head` sees); the embedding comes first. Both norms are zero-centred
//! (see [`rms_norm`](super::rms_norm)). A full-attention decoder layer, `mtp.norm` and the main
//! model's `lm_head` follow; the logits predict the token after the next. A wrong choice never
//! spoils the text, only the acceptance of drafts.
//! Source: `qwen3_next_mtp.py` of vLLM and `SGLang`, which agree; transformers ignores `mtp.*`.

use crate::{
    Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct Mtp;

case! {
    /// `N` tokens of `D` channels.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// `hidden_size`.
        "D" d,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` embedding of the token after each.
        pub embedding: Tensor2<R>,
        /// `[N, D]` main hidden state after the final norm.
        pub hidden: Tensor2<R>,
        /// `[D]` `mtp.pre_fc_norm_embedding`, stored minus one.
        pub norm_embedding: Tensor1<f32>,
        /// `[D]` `mtp.pre_fc_norm_hidden`, stored minus one.
        pub norm_hidden: Tensor1<f32>,
        /// `[D, 2 D]` `mtp.fc`.
        pub fc: Tensor2<f32>,
        /// `rms_norm_eps`.
        pub eps: f64,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]`.
        pub o: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "embedding and hidden state of different scale and different norms, so that neither order nor norm can be swapped",
        cites: &[],
    },
    Fill {
        name: "small-gamma",
        why: "norm weights well below zero, as trained: a loader that guesses the convention from their mean is wrong",
        cites: &[
            "https://github.com/jundot/omlx/issues/3750",
            "https://github.com/jundot/omlx/issues/1507",
        ],
    },
];

impl Op for Mtp {
    const NAME: &'static str = "mtp";
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, d)| Spec::new(Case { n, d });
        let mut specs = vec![new((1, 1)), new((3, 16)), new((3, 16)).fill("small-gamma")];
        if set >= Set::Ci {
            specs.push(new((65, 64)));
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((9, 64)).dtype(dtype)));
        }
        if set >= Set::Nightly {
            specs.push(new((4, 2048)));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        // `fc` is D by 2 D: the product of all letters, which is bounded, has only one of them.
        (1 << 16 < c.d).then(|| format!("D {}: expected at most 65536", c.d))
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, d } = spec.case;
        let mean = if spec.is("small-gamma") { -0.7 } else { 0.0 };
        Inputs {
            embedding: spec.round(rng.normals((n, d), 0.0, 0.02)),
            hidden: spec.round(rng.normals((n, d), 0.0, 2.0)),
            norm_embedding: spec.round(rng.normals(d, mean, 0.2)),
            norm_hidden: spec.round(rng.normals(d, mean / 2.0, 0.2)),
            fc: spec.round(rng.normals((d, 2 * d), 0.0, (2.0 * d as f32).sqrt().recip())),
            eps: 1e-6,
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.hidden.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let (n, d, size) = (spec.case.n as u64, spec.case.d as u64, spec.dtype.size() as u64);
        Cost { bytes: size * (3 * n * d + 2 * d * d + 2 * d), flops: n * (4 * d * d + 8 * d) }
    }
}
