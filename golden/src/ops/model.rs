//! The whole model: token ids to logits and hidden states.
//!
//! The weights are those of the synthetic source for the `tiny` preset with `L` layers and `E`
//! experts, so that a problem is fixed by its id alone. Every fourth layer is full attention.
//! The forward pass is written out in `reference/src/model.rs`.

use crate::{Cost, DOMAIN, Fill, Number, Op, Rng, Set, Spec, Tensor2, Tensor3, tensor::unwritten};

/// The op.
#[derive(Debug)]
pub struct Model;

case! {
    /// `B` sequences of `T` tokens through `L` layers with `E` experts.
    pub struct Case {
        /// Sequences.
        "B" b,
        /// Tokens of each.
        "T" t,
        /// Layers.
        "L" l,
        /// Experts.
        "E" e,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs {
        /// `[B, T]` token ids.
        pub input_ids: Tensor2<i64>,
        /// `L`.
        pub layers: usize,
        /// `E`.
        pub experts: usize,
        /// Seed of the weights.
        pub seed: u64,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[B T, M]`.
        pub logits: Tensor2<R>,
        /// `[L + 1, B T, D]` embedding, residual stream after each layer but the last, final norm.
        pub hidden: Tensor3<R>,
        /// `[L, B T, A]` experts of every layer, most probable first.
        pub ids: Tensor3<i64>,
        /// `[L, B T, A]` what their outputs are multiplied by.
        pub weights: Tensor3<R>,
        /// `[L, B T]` see [`moe_router`](super::moe_router).
        pub margins: Tensor2<R>,
    }
}

const FILLS: &[Fill] =
    &[Fill { name: DOMAIN, why: "tokens drawn evenly from the vocabulary", cites: &[] }];

impl Op for Model {
    const NAME: &'static str = "model";
    const TOLD: &'static [&'static str] = &["margins"];
    type Case = Case;
    type Inputs<R: Number> = Inputs;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(b, t, l, e)| Spec::new(Case { b, t, l, e });
        let mut specs: Vec<_> = [(1, 1, 1, 3), (2, 5, 4, 16)].map(new).to_vec();
        if set >= Set::Ci {
            specs.extend([(1, 65, 4, 16), (1, 8, 48, 16)].map(new));
        }
        if set >= Set::Nightly {
            specs.push(new((1, 273, 8, 64)));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        let config = crate::config::Preset::Tiny.config(Some(c.l), Some(c.e));
        config
            .err()
            .or_else(|| (4096 < c.t).then(|| "T is above the context of 4096".to_owned()))
            .or_else(|| (1 << 16 < c.b * c.t).then(|| "B T is above 65536 tokens".to_owned()))
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { b, t, l, e } = spec.case;
        let input_ids = Tensor2::from_shape_simple_fn((b, t), || rng.below(256) as i64);
        Inputs { input_ids, layers: l, experts: e, seed: spec.seed }
    }

    fn unwritten(spec: &Spec<Case>, _: &Inputs) -> Outputs {
        let Case { b, t, l, e } = spec.case;
        let config = crate::config::Preset::Tiny.config(Some(l), Some(e));
        let config = config.expect("`refuse` asked the same");
        let (n, d) = (b * t, config.hidden_size);
        Outputs {
            logits: unwritten((n, config.vocab_size)),
            hidden: unwritten((l + 1, n, d)),
            ids: unwritten((l, n, config.num_experts_per_tok)),
            weights: unwritten((l, n, config.num_experts_per_tok)),
            margins: unwritten((l, n)),
        }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { b, t, l, e } = spec.case;
        let [b, t, l, e] = [b, t, l, e].map(|size| size as u64);
        // Active parameters of one tiny layer, about.
        let active = l * 45_000 + 256 * 64;
        Cost { bytes: 4 * (active + l * e), flops: 2 * b * t * active }
    }
}
