//! What shares of a model come to is the model: each is computed from the weights that it keeps and the same
//! residual stream, and outputs that are added to the stream add up over the shares.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use golden::{
    Config, Engine, Weights,
    config::Preset,
    engine::{LinearState, Rows, Want},
    split::{Share, Split},
    synthetic::Synthetic,
    tap::{Forced, RESIDUAL, Tap, Value},
    weights::{Meta, Part, RawTensor, WeightError},
};
use ndarray::{ArrayD, Axis, concatenate};
use reference::Model;

/// A share in which experts of others answer nothing.
struct Alone(Part<'static>, &'static Synthetic);

impl Alone {
    fn answers_nothing(&self, name: &str) -> bool {
        let shared = name.contains(".shared_expert.down_proj.") && !self.0.share().leads();
        shared || self.0.meta(name).is_none()
    }
}

impl Weights for Alone {
    fn config(&self) -> &Config {
        self.0.config()
    }

    fn origin(&self) -> String {
        self.0.origin()
    }

    fn meta(&self, name: &str) -> Option<Meta> {
        self.0.meta(name).or_else(|| self.1.meta(name))
    }

    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError> {
        if !self.answers_nothing(name) {
            return self.0.fetch(name);
        }
        let mut raw = self.1.fetch(name)?;
        raw.data.to_mut().fill(0);
        Ok(raw)
    }

    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError> {
        self.0.fetch_rows(name, rows)
    }

    fn names(&self) -> Vec<String> {
        self.1.names()
    }
}

/// Two steps of two sequences: taps of both, and the states behind them.
fn run(weights: Arc<dyn Weights>, forced: &[Arc<Forced>]) -> (Vec<Vec<Tap>>, Vec<LinearState>) {
    let mut model = Model::<f64>::new(weights);
    model.reset(2).unwrap();
    let text: Vec<u32> = (0..40).map(|i| i * 37 % 251).collect();
    let steps =
        [[text[..9].to_vec(), text[9..30].to_vec()], [text[30..31].to_vec(), text[31..].to_vec()]];
    let mut taps = Vec::new();
    for (i, tokens) in steps.iter().enumerate() {
        let forced = forced.get(i).cloned();
        let want = Want { logits: Rows::None, taps: true, forced, ..Want::default() };
        taps.push(model.forward(tokens, &want).unwrap().taps);
    }
    (taps, model.linear_states().unwrap().into_iter().flatten().collect())
}

fn numbers(taps: &[Tap]) -> BTreeMap<String, ArrayD<f64>> {
    let all = taps.iter().filter_map(|tap| match &tap.value {
        Value::Numbers(numbers) => Some((tap.name(), numbers.clone())),
        Value::Integers(_) => None,
    });
    all.collect()
}

fn near(name: &str, got: &ArrayD<f64>, want: &ArrayD<f64>) {
    let most = want.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
    assert_eq!(got.shape(), want.shape(), "{name}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-11 * most, "{name}: {got}, not {want} (most {most})");
    }
}

/// What is told by shares: sums of what is added to the stream, heads side by side, and all the rest alike.
fn check(weights: Synthetic, shares: usize) {
    /// Heads along the second axis.
    const BESIDE: [&str; 8] = [
        "linear/in_proj_qkvz",
        "linear/in_proj_ba",
        "gdn_gates/g",
        "gated_delta_rule/o",
        "rms_norm_gated/norm",
        "linear/q_proj",
        "rope/q",
        "attention/o",
    ];
    const ADDED: [&str; 5] =
        ["linear/out_proj", "linear/o_proj", "moe_experts/o", "moe_layer/o", "dense_mlp/o"];
    const ALIKE: [&str; 1] = ["moe_router/"];
    let weights: &'static Synthetic = Box::leak(Box::new(weights));
    let whole: Arc<dyn Weights> =
        Arc::new(Alone(Part::new(weights, Share::whole(weights.config())), weights));
    let (want, want_states) = run(whole, &[]);
    // The norm of a sum is computed with it, so that both are given.
    let residual = |taps: &Vec<Tap>| {
        let of_stream = taps
            .iter()
            .filter(|tap| tap.op == RESIDUAL || tap.tensor == "post_attention_layernorm");
        Arc::new(of_stream.map(|tap| (tap.name(), tap.value.clone())).collect::<Forced>())
    };
    let forced: Vec<_> = want.iter().map(residual).collect();
    let split = Split::new(weights.config(), shares).unwrap();
    let all: Vec<_> = split
        .shares()
        .into_iter()
        .map(|share| run(Arc::new(Alone(Part::new(weights, share), weights)), &forced))
        .collect();
    let mut seen = BTreeMap::new();
    for (step, want) in want.iter().enumerate() {
        let parts: Vec<_> = all.iter().map(|(taps, _)| numbers(&taps[step])).collect();
        for (name, want) in &numbers(want) {
            let op = name.split_once('/').map_or("", |(_, op)| op);
            let views: Vec<_> = parts.iter().map(|part| part[name].view()).collect();
            let kind =
                |kinds: &[&'static str]| kinds.iter().copied().find(|kind| op.starts_with(kind));
            if let Some(kind) = kind(&ADDED) {
                let sum = views.iter().fold(ArrayD::zeros(want.shape()), |sum, part| sum + part);
                near(name, &sum, want);
                *seen.entry(kind).or_insert(0) += 1;
            } else if let Some(kind) = kind(&BESIDE) {
                near(name, &concatenate(Axis(1), &views).unwrap(), want);
                *seen.entry(kind).or_insert(0) += 1;
            } else if let Some(kind) = kind(&ALIKE) {
                views.iter().for_each(|part| assert_eq!(part, want, "{name}"));
                *seen.entry(kind).or_insert(0) += 1;
            }
        }
    }
    let dense = weights.config().mlp_types.contains(&golden::config::Mlp::Dense);
    let kinds = BESIDE.iter().chain(&ADDED).chain(&ALIKE);
    for kind in kinds.filter(|kind| dense || **kind != "dense_mlp/o") {
        assert!(seen.contains_key(kind), "{kind}: {seen:?}");
    }
    // States: heads side by side, channels where the share says that they are.
    for (layer, want) in want_states.iter().enumerate() {
        let parts: Vec<_> = all.iter().map(|(_, states)| states[layer].recurrent.view()).collect();
        assert_eq!(concatenate(Axis(1), &parts).unwrap(), want.recurrent);
        for (share, (_, states)) in split.shares().iter().zip(&all) {
            let channels: Vec<usize> = share.channels().into_iter().flatten().collect();
            assert_eq!(want.conv.select(Axis(1), &channels), states[layer].conv);
        }
    }
}

#[test]
fn shares_add_up_to_the_model() {
    check("synthetic:tiny".parse().unwrap(), 2);
    check("synthetic:ragged".parse().unwrap(), 2);
}

/// Four shares of two heads of keys: two keep the same one.
#[test]
fn shares_that_keep_the_same_keys_add_up_too() {
    let mut config = Preset::Ragged.config(None, None).unwrap();
    config.linear_num_key_heads = 4;
    config.linear_num_value_heads = 12;
    config.num_attention_heads = 8;
    check(Synthetic::new(config, 5), 4);
}
