//! What is lost in fewer bits: an engine over narrowed weights against what is right of a text, and against
//! itself in bf16.
//!
//! What is right was recorded of the official implementation in f32, or is what the reference says in f32.
//! The engine's plan says where it rounds, and [`reference::Emulated`] over the same narrowed weights says
//! what an honest engine of that plan loses. The engine may diverge twice as much: near ties of routers
//! fall the other way in one of the two, and neither is to blame. One tie is much of a short text: an engine
//! over that is held against the emulation that loses most of those that add in other orders, before it is
//! accused; and if routers chose otherwise, and all of these choices are inside what their logits may be off under
//! the plan, against the emulation that goes where the engine went.
//!
//! The reference is slow and looks at no later token: of a long text it is asked the beginning, which is
//! *judged*, and all of it is compared with the engine in bf16.

use std::sync::Arc;

use golden::{
    Engine, Error, Plan, Weights,
    compare::logits::{Allowed, Distance, Spread, distance},
    engine::{Demand, Narrowed, Routing},
    recording::{Prompt, Recording},
};
use ndarray::{Array2, Axis};
use rayon::prelude::*;
use reference::real::Rounding;

use crate::{
    ask::{Decode, Request, ask},
    emulation, verify,
};

/// A text that formats are asked.
#[derive(Clone, Debug)]
pub struct Text {
    /// What it is called.
    pub prompt: String,
    /// All of it.
    request: Request,
    /// What of it is judged.
    beginning: Request,
    /// The rows of all of it that are judged.
    judged: Vec<usize>,
    /// The token after each row, where there is one.
    next: Vec<Option<u32>>,
}

impl Text {
    /// Sequences of tokens, of each of which the first `judged` are judged.
    pub fn new(prompt: &str, tokens: Vec<Vec<u32>>, judged: usize) -> Text {
        let request = Request { tokens, ..Request::default() };
        let short = |row: &Vec<u32>| row[..row.len().min(judged)].to_vec();
        let beginning =
            Request { tokens: request.tokens.iter().map(short).collect(), ..Request::default() };
        Text::of(prompt.to_owned(), request, beginning)
    }

    fn of(prompt: String, request: Request, beginning: Request) -> Text {
        let (mut judged, mut start) = (Vec::new(), 0);
        for (all, some) in request.tokens.iter().zip(&beginning.tokens) {
            judged.extend(start..start + some.len());
            start += all.len();
        }
        let after = |row: &Vec<u32>| row.iter().skip(1).copied().map(Some).chain([None]).collect();
        let next = request.tokens.iter().flat_map(after as fn(&Vec<u32>) -> Vec<_>).collect();
        Text { prompt, request, beginning, judged, next }
    }

    /// Every prompt of a recording that has whole logits, and those.
    ///
    /// # Errors
    /// If the recording lacks what its manifest promises.
    pub fn recorded(recording: &Recording) -> Result<Vec<(Text, Array2<f32>)>, Error> {
        let mut all = Vec::new();
        for prompt in &recording.manifest.prompts {
            if let Some(want) = whole(recording, prompt)? {
                let asked = verify::request(recording, prompt)?;
                let request = Request { decode: Decode::No, mtp: false, ..asked };
                all.push((Text::of(prompt.id.clone(), request.clone(), request), want));
            }
        }
        Ok(all)
    }

    /// Tokens of it.
    pub fn tokens(&self) -> usize {
        self.next.len()
    }

    /// Tokens that are judged.
    pub fn judged(&self) -> usize {
        self.judged.len()
    }

    /// What asking an engine takes, as far as memory depends on it.
    pub fn demand(&self, narrowed: Narrowed) -> Demand {
        let rows = self.tokens();
        let context = self.request.tokens.iter().map(Vec::len).max().unwrap_or(0);
        let sequences = self.request.tokens.len();
        Demand { sequences, context, fed: rows, logits: rows, hidden: rows, drafts: 0, narrowed }
    }

    /// Bytes of what is kept beside an engine that is asked: its hidden states, twice while they are joined,
    /// and the logits of the engine in bf16.
    pub fn kept(&self, weights: &dyn Weights) -> u64 {
        let c = weights.config();
        let row = 8 * c.hidden_size * (c.num_hidden_layers() + 1) + 4 * c.vocab_size;
        self.tokens() as u64 * row as u64
    }

    /// What an engine says of all of it.
    ///
    /// # Errors
    /// If the engine cannot run it, or its listener ends it.
    pub fn asked(&self, engine: &mut dyn Engine) -> Result<Answer, Error> {
        let said = ask(engine, &self.request, &mut |_, _| true)?;
        let chosen = |routing: Option<Routing>| routing.map(|routing| routing.ids);
        Ok(Answer { logits: said.logits, experts: said.routing.into_iter().map(chosen).collect() })
    }

    /// Logits of what is judged.
    fn begun(&self, engine: &mut dyn Engine) -> Result<Array2<f32>, Error> {
        Ok(ask(engine, &self.beginning, &mut |_, _| true)?.logits)
    }

    /// Logits of what is judged, against what is right.
    fn held(&self, right: &Array2<f32>, logits: &Array2<f32>) -> Distance {
        let next: Vec<_> = self.judged.iter().map(|&row| self.next[row]).collect();
        distance(&right.view(), &logits.view(), &next, F32)
    }

    /// What the next tokens cost an engine that said this of all of it, in nats.
    pub fn nll(&self, logits: &Array2<f32>) -> Option<Spread> {
        golden::compare::logits::nll(&logits.view(), &self.next)
    }
}

/// What an engine said of a text.
#[derive(Clone, Debug)]
pub struct Answer {
    /// `[N, V]`.
    pub logits: Array2<f32>,
    /// The experts that it chose, per layer `[N, A]`; none where the text was fed in pieces.
    pub experts: Vec<Option<Array2<i64>>>,
}

fn whole(recording: &Recording, prompt: &Prompt) -> Result<Option<Array2<f32>>, Error> {
    verify::rows(recording, prompt, "logits", &recording.real_rows(prompt)?, 0)
}

/// Who says what is right of a text, or what may be lost.
pub enum Judge {
    /// The reference in f32 over these weights.
    Right(Arc<dyn Weights>),
    /// The emulation of a format's plan, over the weights as that keeps them.
    Emulated(Arc<dyn Weights>, Plan, Rounding),
}

impl Judge {
    /// What an honest engine of this number and plan loses.
    ///
    /// # Errors
    /// If weights that are narrowed already are to be narrowed again.
    pub fn emulated(weights: &Arc<dyn Weights>, number: &str, plan: Plan) -> Result<Judge, Error> {
        let kept = crate::as_kept("cpu", number, weights.clone())?;
        Ok(Judge::Emulated(kept, plan, Rounding::Nearest))
    }

    /// The same emulation, adding in other orders.
    pub fn in_other_orders(&self) -> Vec<Judge> {
        let Judge::Emulated(weights, plan, _) = self else { return Vec::new() };
        let order = |seed| Judge::Emulated(weights.clone(), plan.clone(), Rounding::Order(seed));
        (0..emulation::ORDERS).map(order).collect()
    }

    fn emulation(&self) -> Option<reference::Emulated> {
        let Judge::Emulated(weights, plan, rounding) = self else { return None };
        let mut emulated = reference::Emulated::of(weights.clone(), plan.clone());
        emulated.round(*rounding);
        Some(emulated)
    }

    fn engine(&self) -> Box<dyn Engine> {
        match (self, self.emulation()) {
            (_, Some(emulated)) => Box::new(emulated),
            (Judge::Right(weights) | Judge::Emulated(weights, ..), None) => {
                Box::new(reference::Model::<f32>::new(weights.clone()))
            }
        }
    }
}

/// Told of each layer of each text that a judge comes to; returns whether to go on.
pub type Watch = Arc<dyn Fn() -> bool + Send + Sync>;

/// What each judge says of the beginning of each text; as many at once as there are threads.
///
/// # Errors
/// If one cannot run, or is told not to go on.
pub fn judgements(
    judges: &[Judge],
    texts: &[Text],
    watch: &Watch,
) -> Result<Vec<Vec<Array2<f32>>>, Error> {
    let said = |judge: &Judge| {
        let mut engine = judge.engine();
        let watch = watch.clone();
        engine.watch(Box::new(move |_| watch()));
        texts.iter().map(|text| text.begun(&mut *engine)).collect()
    };
    judges.par_iter().map(said).collect()
}

/// What judging takes of memory beside the checkpoint's map: an upper estimate, of as many judges at once
/// as there are.
pub fn memory(weights: &dyn Weights, judges: usize, texts: &[Text]) -> u64 {
    /// Rows of the output head that the reference widens at once.
    const BAND: usize = 8192;
    /// Widened, narrowed, and once more while it is.
    const COPIES: u64 = 4;
    /// An f64 that is computed in, one that is joined, and the f32 that is answered.
    const LOGIT: u64 = 20;
    let c = weights.config();
    let d = c.hidden_size as u64;
    let delta = 2 * c.conv_dim() as u64 + 2 * c.linear_value_dim() as u64;
    let full = (3 * c.num_attention_heads + 2 * c.num_key_value_heads) as u64 * c.head_dim as u64;
    let dense = 3 * c.intermediate_size.max(c.moe_intermediate_size) as u64;
    let widest = (BAND as u64).min(c.vocab_size as u64).max(delta).max(full).max(dense);
    let rows = texts.iter().map(Text::judged).max().unwrap_or(0) as u64;
    let hidden = rows * d * (c.num_hidden_layers() as u64 + 16) * LOGIT;
    let at_once = judges.min(crate::host().threads) as u64;
    at_once * (COPIES * 4 * widest * d + LOGIT * rows * c.vocab_size as u64 + hidden)
}

/// What a format said of a text.
#[derive(Clone, Debug)]
pub struct Said {
    /// What is judged of it.
    judged: Array2<f32>,
    /// All of it, beside the engine in bf16.
    bf16: Distance,
    /// The experts of what is judged.
    experts: Vec<Option<Array2<i64>>>,
}

impl Said {
    /// Of this answer, and the logits of the engine in bf16.
    pub fn new(text: &Text, answer: &Answer, bf16: &Array2<f32>) -> Said {
        let bf16 = distance(&bf16.view(), &answer.logits.view(), &text.next, F32);
        let judged = |ids: &Array2<i64>| ids.select(Axis(0), &text.judged);
        let experts = answer.experts.iter().map(|ids| ids.as_ref().map(judged)).collect();
        Said { judged: answer.logits.select(Axis(0), &text.judged), bf16, experts }
    }
}

/// What one text came to.
#[derive(Clone, Debug)]
pub struct Told {
    /// The text.
    pub prompt: String,
    /// What is judged of the engine, against what is right.
    pub own: Distance,
    /// The emulation of its plan against what is right.
    pub emulated: Distance,
    /// All that the engine said against itself in bf16.
    pub bf16: Distance,
    /// Tokens in which the engine chose other experts than the emulation would have where it went, inside what
    /// the plan lets routers be off, and the first outside; `None` where nobody looked.
    pub flips: Option<(usize, Option<String>)>,
    experts: Vec<Option<Array2<i64>>>,
}

/// What computing in f32 alone may be off.
const F32: Allowed = Allowed { rel_rms: 2e-5, worst_row: 1e-4 };

impl Told {
    /// Of what a format said, what is right, and what its emulation said.
    pub fn new(text: &Text, said: Said, right: &Array2<f32>, emulated: &Array2<f32>) -> Told {
        let (own, emulated) = (text.held(right, &said.judged), text.held(right, emulated));
        let Said { bf16, experts, .. } = said;
        Told { prompt: text.prompt.clone(), own, emulated, bf16, flips: None, experts }
    }

    /// What the emulation said in another order of adding: what it loses is what it loses at most.
    pub fn also(&mut self, text: &Text, right: &Array2<f32>, emulated: &Array2<f32>) {
        let other = text.held(right, emulated);
        // One that is not finite counts as well.
        if 0 < other.not_finite || self.emulated.kl.mean < other.kl.mean {
            self.emulated = other;
        }
    }

    /// Lets the emulation go where the engine went, if it might have gone there itself.
    ///
    /// # Errors
    /// If the emulation cannot run, or is told not to go on.
    pub fn follow(
        &mut self,
        judge: &Judge,
        text: &Text,
        right: &Array2<f32>,
        watch: &Watch,
    ) -> Result<(), Error> {
        let Some(mut emulated) = judge.emulation().filter(|_| !self.experts.is_empty()) else {
            return Ok(());
        };
        let watch = watch.clone();
        emulated.watch(Box::new(move |_| watch()));
        let tokens = &text.beginning.tokens;
        let flips = emulation::choices(&mut emulated, tokens, &self.experts)?;
        if let (1.., None) = flips {
            let forced_routing = Some(self.experts.clone());
            let request = Request { forced_routing, ..text.beginning.clone() };
            let logits = ask(&mut emulated, &request, &mut |_, _| true)?.logits;
            self.also(text, right, &logits);
        }
        self.flips = Some(flips);
        Ok(())
    }

    /// The mean divergence that the engine may have.
    pub fn allowed(&self) -> f64 {
        let f32 = self.own.checks.iter().find(|check| check.what == "mean KL");
        2.0 * self.emulated.kl.mean + f32.map_or(0.0, |check| check.allowed)
    }

    /// Whether it has no more, and every row is numbers, the emulation's as well.
    pub fn ok(&self) -> bool {
        let finite = self.own.not_finite + self.emulated.not_finite + self.bf16.not_finite == 0;
        finite && self.own.kl.mean <= self.allowed()
    }
}

/// A mean over rows of several texts, with its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mean {
    /// Rows.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Its standard error; `None` of a single row.
    pub error: Option<f64>,
    /// The largest.
    pub max: f64,
}

impl Mean {
    /// Of rows that are told text by text; `None` of none.
    pub fn of<'a>(all: impl Iterator<Item = &'a Spread> + Clone) -> Option<Mean> {
        let n: usize = all.clone().map(|one| one.n).sum();
        if n == 0 {
            return None;
        }
        let mean = all.clone().map(|one| one.n as f64 * one.mean).sum::<f64>() / n as f64;
        // Within each text and between them.
        let squares = all.clone().map(|one| {
            let (n, error) = (one.n as f64, one.error.unwrap_or(0.0));
            n * (n - 1.0) * error * error + n * (one.mean - mean) * (one.mean - mean)
        });
        let squares: f64 = squares.sum();
        let error = (1 < n).then(|| (squares / (n as f64 * (n as f64 - 1.0))).sqrt());
        let max = all.filter(|one| 0 < one.n).map(|one| one.max);
        Some(Mean { n, mean, error, max: max.fold(f64::NEG_INFINITY, f64::max) })
    }
}

/// What was lost in all texts together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// Divergence, nats.
    pub kl: Mean,
    /// One for a row with the same most likely token, else zero.
    pub top1: Mean,
    /// Change of what the next token costs, nats; `None` where none is known.
    pub delta_nll: Option<Mean>,
}

impl Loss {
    /// Of what was found text by text; `None` of none.
    pub fn of<'a>(all: impl Iterator<Item = &'a Distance> + Clone) -> Option<Loss> {
        let kl = Mean::of(all.clone().map(|one| &one.kl))?;
        let top1 = Mean::of(all.clone().map(|one| &one.top1))?;
        Some(Loss { kl, top1, delta_nll: Mean::of(all.filter_map(|one| one.delta_nll.as_ref())) })
    }
}

/// A fault that can be planted: a format that keeps fewer bits than it says.
pub const COARSER: &str = "coarser";

/// The number that has fewer bits than this one.
///
/// # Errors
/// If none has.
pub fn coarser(number: &str) -> Result<&'static str, Error> {
    match number {
        "f32" => Ok("bf16"),
        "bf16" => Ok("int8"),
        "int8" => Ok("int4"),
        _ => Err(format!("plant {COARSER}: no number is coarser than {number}").into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use golden::{
        Config, Dtype, Weights, compare::logits::Spread, recording::Recording, synthetic::Synthetic,
    };
    use ndarray::Array2;

    use super::{Judge, Mean, Said, Text, Told, Watch, coarser, judgements};
    use crate::{Kept, Number};

    fn recorded(id: &str) -> (Recording, Arc<dyn Weights>) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/recordings").join(id);
        let recording = Recording::open(&folder).unwrap();
        let source = &recording.manifest.checkpoint;
        let config = Config::parse(&source.config.to_string(), id).unwrap();
        let weights = Synthetic::new(config.stored_as(Dtype::F32), source.seed.unwrap());
        (recording, Arc::new(weights))
    }

    /// What prompts come to of the engine in `number`, judged as if it were in `named`.
    fn told(
        number: Number<'_>,
        named: Number<'_>,
        weights: &Arc<dyn Weights>,
        recording: &Recording,
    ) -> Vec<Told> {
        let (texts, right): (Vec<Text>, Vec<Array2<f32>>) =
            Text::recorded(recording).unwrap().into_iter().unzip();
        let engine =
            |number: Number<'_>| crate::engine("cpu", number, weights.clone(), None).unwrap();
        let judge = Judge::emulated(weights, named.name, engine(named).plan()).unwrap();
        let go_on: Watch = Arc::new(|| true);
        let emulated = judgements(&[judge], &texts, &go_on).unwrap().remove(0);
        let (mut own, mut bf16) = (engine(number), engine("bf16".into()));
        let all = texts.iter().zip(&right).zip(&emulated).map(|((text, right), emulated)| {
            let bf16 = text.asked(&mut *bf16).unwrap().logits;
            let said = Said::new(text, &text.asked(&mut *own).unwrap(), &bf16);
            Told::new(text, said, right, emulated)
        });
        all.collect()
    }

    #[test]
    fn a_format_loses_what_its_plan_says_and_not_what_a_coarser_one_would() {
        let (recording, weights) = recorded("layers");
        let mut numbers = ["f32", "bf16", "int8", "int4"].map(Number::from).to_vec();
        numbers.extend(["f32", "bf16", "int4"].map(|name| Number { name, kept: Some(Kept::Int8) }));
        numbers.push(Number { name: "int8", kept: Some(Kept::F32) });
        for number in numbers {
            let all = told(number, number, &weights, &recording);
            assert!(!all.is_empty() && all.iter().all(Told::ok), "{number}: {all:#?}");
        }
        let mut coarse: Vec<(Number<'_>, Number<'_>)> = Vec::new();
        for finer in ["f32", "bf16", "int8"] {
            coarse.push((finer.into(), coarser(finer).unwrap().into()));
        }
        // Beside what bf16 loses, eight bits of keys and values are little.
        coarse.push(("f32".into(), Number { name: "f32", kept: Some(Kept::Int8) }));
        for (finer, coarser) in coarse {
            let all = told(coarser, finer, &weights, &recording);
            assert!(all.iter().all(|told| !told.ok()), "{coarser} as {finer}: {all:#?}");
        }
    }

    /// The beginning of a text is the text as far as it goes, whatever follows.
    #[test]
    fn a_text_is_judged_by_its_beginning() {
        let weights: Arc<dyn Weights> = golden::open("synthetic:tiny").unwrap();
        let tokens = vec![vec![1, 2, 3, 4, 5, 6], vec![7, 8]];
        let text = Text::new("text", tokens, 4);
        assert_eq!((text.tokens(), text.judged()), (8, 6));
        assert_eq!(text.judged, [0, 1, 2, 3, 6, 7]);
        let next = [Some(2), Some(3), Some(4), Some(5), Some(6), None, Some(8), None];
        assert_eq!(text.next, next);
        let mut engine = Judge::Right(weights).engine();
        let all = text.asked(&mut *engine).unwrap();
        let begun = text.begun(&mut *engine).unwrap();
        assert_eq!(Said::new(&text, &all, &all.logits).judged, begun);
    }

    /// A token goes to another expert than in the emulation: the router could not tell, so the emulation goes there
    /// too and loses as much. Where it could tell, nobody follows.
    #[test]
    fn a_near_tie_is_followed_and_a_wrong_choice_is_not() {
        let go_on: Watch = Arc::new(|| true);
        // Which text has a near tie that goes the other way depends on how a machine sums.
        let kept = |name| Number { name, kept: Some(Kept::Int8) };
        let asked = ["layer-types", "layers", "yarn"].into_iter().flat_map(|id| {
            ["int8".into(), "int4".into(), kept("int8"), kept("int4")].map(|number| (id, number))
        });
        let found = asked.filter_map(|(id, number)| {
            let (recording, weights) = recorded(id);
            let (texts, right): (Vec<Text>, Vec<Array2<f32>>) =
                Text::recorded(&recording).unwrap().into_iter().unzip();
            let plan = crate::engine("cpu", number, weights.clone(), None).unwrap().plan();
            let judge = Judge::emulated(&weights, number.name, plan).unwrap();
            let all = told(number, number, &weights, &recording);
            let mut all = all.into_iter().zip(texts).zip(right);
            let legal = all.find_map(|((told, text), right)| {
                let mut followed = told.clone();
                followed.follow(&judge, &text, &right, &go_on).unwrap();
                let (legal, illegal) = followed.flips.clone()?;
                assert!(illegal.is_none(), "{:?}", followed.flips);
                assert!(followed.ok(), "{} of {}", followed.own.kl.mean, followed.allowed());
                (0 < legal && 3 < text.tokens()).then_some((told, text, right))
            });
            legal.map(|legal| (legal, judge, weights))
        });
        let ((told, text, right), judge, weights) = { found }.next().expect("a near tie");
        let wrong = {
            let mut wrong = told;
            let ids = wrong.experts.iter_mut().flatten().next().unwrap();
            let (chosen, all) = (ids.row(3).to_vec(), weights.config().num_experts as i64);
            let other = (0..all).find(|id| !chosen.contains(id)).unwrap();
            // In place of the one that leads.
            ids[[3, 0]] = other;
            wrong
        };
        let mut followed = wrong;
        let before = followed.allowed();
        followed.follow(&judge, &text, &right, &go_on).unwrap();
        let illegal = followed.flips.clone().unwrap().1.unwrap();
        assert!(illegal.contains("token 3"), "{illegal}");
        assert_eq!(followed.allowed(), before);
    }

    #[test]
    fn means_of_parts_are_the_mean_of_all() {
        let parts = [vec![1.0, 4.0, 2.5], vec![-3.0], vec![], vec![0.5, 0.25]];
        let all = Spread::of(parts.concat());
        let parts = parts.map(Spread::of);
        let mean = Mean::of(parts.iter()).unwrap();
        assert_eq!((mean.n, mean.max), (all.n, all.max));
        assert!((mean.mean - all.mean).abs() <= 1e-15);
        assert!((mean.error.unwrap() - all.error.unwrap()).abs() <= 1e-15);
        assert_eq!(Mean::of([].iter()), None);
    }
}
