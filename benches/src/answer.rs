//! The reference of every op, in every number type, by every form. One block per op.

use std::ops::Range;

use golden::{Number, Op, ops, plan::Form};
use ndarray::{ArrayD, Ix2, Ix3};
use reference::{self as r, Probe, Real};

use crate::sequence::{self, Before, Parts};

/// How the reference answers an op.
pub(crate) trait Answer: Op {
    /// Chunk sizes in which the chunked form is checked; empty where there is no such form.
    const CHUNKS: &'static [usize] = &[];

    /// As the contract writes it.
    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R>;

    /// In another form.
    fn chunked<R: Real>(x: &Self::Inputs<R>, _: usize, _: r::Gates) -> Self::Outputs<R> {
        Self::plain(x)
    }

    /// With the experts given, where the op chooses experts: `ids` of the shape of its own.
    fn forced<R: Real>(_: &Self::Inputs<R>, _: &ArrayD<i64>) -> Option<Self::Outputs<R>> {
        None
    }

    /// A composite op, with experts given or not, each op inside shown to a probe; `None` where there
    /// is none inside.
    fn seen<R: Real>(
        _: &Self::Inputs<R>,
        _: Option<&ArrayD<i64>>,
        _: &mut Probe<'_>,
    ) -> Option<Self::Outputs<R>> {
        None
    }

    /// Experts there are to choose from.
    fn experts(_: &Self::Inputs<f32>) -> usize {
        0
    }

    /// What of it belongs to which token and sequence, where its tokens form sequences.
    const PARTS: Option<Parts> = None;

    /// The tokens `at` of sequence `i` as a problem of their own, after those `before` them.
    fn cut<R: Real>(
        _x: &Self::Inputs<R>,
        _i: usize,
        _at: Range<usize>,
        _before: Before<'_, Self::Inputs<R>, Self::Outputs<R>>,
    ) -> Option<Self::Inputs<R>> {
        None
    }

    /// The same problem with every gate one, and what an op without gates answers to it.
    fn gate_one<R: Real>(_: &Self::Inputs<R>) -> Option<(Self::Inputs<R>, Self::Outputs<R>)> {
        None
    }

    /// In the form of a plan, with experts given or not.
    fn answer<R: Real>(
        x: &Self::Inputs<R>,
        form: Form,
        experts: Option<&ArrayD<i64>>,
    ) -> Self::Outputs<R> {
        if let Some(forced) = experts.and_then(|ids| Self::forced(x, ids)) {
            return forced;
        }
        match form {
            Form::Plain => Self::plain(x),
            Form::Chunked(chunk) => Self::chunked(x, chunk, r::Gates::Between),
            Form::Prefixed(chunk) => Self::chunked(x, chunk, r::Gates::Prefix),
        }
    }

    /// Inputs in a number type, exactly.
    fn wide<R: Number>(x: &Self::Inputs<f32>) -> Self::Inputs<R> {
        Self::lift(x)
    }
}

/// How sequences are cut, as a module of [`sequence`] says.
macro_rules! sequences {
    ($sequence:ident) => {
        const PARTS: Option<Parts> = Some(sequence::$sequence::PARTS);

        fn cut<R: Real>(
            x: &Self::Inputs<R>,
            i: usize,
            at: Range<usize>,
            before: Before<'_, Self::Inputs<R>, Self::Outputs<R>>,
        ) -> Option<Self::Inputs<R>> {
            Some(sequence::$sequence::cut(x, i, at, before))
        }
    };
}

macro_rules! answers {
    ($($op:ident::$name:ident => $f:path $(, in $sequence:ident)? $(, seen $seen:path)?;)*) => {$(
        impl Answer for ops::$op::$name {
            $(sequences! { $sequence })?

            $(fn seen<R: Real>(
                x: &Self::Inputs<R>,
                _: Option<&ArrayD<i64>>,
                probe: &mut Probe<'_>,
            ) -> Option<Self::Outputs<R>> {
                Some($seen(x, probe))
            })?

            fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
                $f(x)
            }
        }
    )*};
}

answers! {
    embedding::Embedding => r::embedding;
    rms_norm::RmsNorm => r::rms_norm;
    linear::Linear => r::linear;
    causal_conv1d::CausalConv1d => r::causal_conv1d, in causal_conv1d;
    l2_norm::L2Norm => r::l2_norm;
    gdn_gates::GdnGates => r::gdn_gates;
    rms_norm_gated::RmsNormGated => r::rms_norm_gated;
    rope::Rope => r::rope;
    attention::Attention => r::attention, in attention;
    moe_experts::MoeExperts => r::moe_experts;
    shared_expert::SharedExpert => r::shared_expert;
    lm_head::LmHead => r::lm_head;
    sampling::Sampling => r::sampling;
    mtp::Mtp => r::mtp;
    fp8_dequant::Fp8Dequant => r::fp8_dequant;
    gdn_layer::GdnLayer => r::gdn_layer, in gdn_layer, seen r::gdn_layer_seen;
    attention_layer::AttentionLayer => r::attention_layer, in attention_layer, seen r::attention_layer_seen;
}

impl Answer for ops::gated_delta_rule::GatedDeltaRule {
    const CHUNKS: &'static [usize] = &[64, 7];

    sequences! { gated_delta_rule }

    fn gate_one<R: Real>(x: &Self::Inputs<R>) -> Option<(Self::Inputs<R>, Self::Outputs<R>)> {
        Some(sequence::gated_delta_rule::gate_one(x))
    }

    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
        r::gated_delta_rule(x)
    }

    fn chunked<R: Real>(x: &Self::Inputs<R>, chunk: usize, gates: r::Gates) -> Self::Outputs<R> {
        r::gated_delta_rule_chunked(x, chunk, gates)
    }
}

impl Answer for ops::moe_router::MoeRouter {
    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
        r::moe_router(x)
    }

    fn forced<R: Real>(x: &Self::Inputs<R>, ids: &ArrayD<i64>) -> Option<Self::Outputs<R>> {
        Some(r::moe_router_forced(x, &ids.clone().into_dimensionality::<Ix2>().ok()?))
    }

    fn experts(x: &Self::Inputs<f32>) -> usize {
        x.weight.nrows()
    }
}

impl Answer for ops::moe_layer::MoeLayer {
    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
        r::moe_layer(x)
    }

    fn forced<R: Real>(x: &Self::Inputs<R>, ids: &ArrayD<i64>) -> Option<Self::Outputs<R>> {
        Some(r::moe_layer_forced(x, &ids.clone().into_dimensionality::<Ix2>().ok()?))
    }

    fn seen<R: Real>(
        x: &Self::Inputs<R>,
        ids: Option<&ArrayD<i64>>,
        probe: &mut Probe<'_>,
    ) -> Option<Self::Outputs<R>> {
        let ids = ids.and_then(|ids| ids.clone().into_dimensionality::<Ix2>().ok());
        Some(r::moe_layer_seen(x, ids.as_ref(), probe))
    }

    fn experts(x: &Self::Inputs<f32>) -> usize {
        x.router.nrows()
    }
}

impl Answer for ops::model::Model {
    fn plain<R: Real>(x: &Self::Inputs<R>) -> Self::Outputs<R> {
        r::model_op(x)
    }

    fn forced<R: Real>(x: &Self::Inputs<R>, ids: &ArrayD<i64>) -> Option<Self::Outputs<R>> {
        Some(r::model_op_forced(x, &ids.clone().into_dimensionality::<Ix3>().ok()?))
    }

    fn experts(x: &Self::Inputs<f32>) -> usize {
        x.experts
    }
}
