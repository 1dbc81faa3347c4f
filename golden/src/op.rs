//! The contract through which an op's question and its answers meet.

use std::{error, fmt, str::FromStr};

use ndarray::{ArcArray, Dimension};

use crate::{
    Dtype, Narrow, Number, Plan, Rng, Tensors,
    plan::{Grid, Site},
    tap::Tap,
    tensor::Read,
};

/// A question the model asks: its cases, its inputs, and the least work of an answer.
///
/// Holds no arithmetic of the answer.
pub trait Op: Sized + 'static {
    /// Field-standard name, equal to the module name in every crate.
    const NAME: &'static str;
    /// Outputs that are told but not compared, because they say nothing that a compared output does
    /// not: a margin is the difference of two logits, and as small as it likes.
    const TOLD: &'static [&'static str] = &[];
    /// Floating-point inputs that are stored in f32 whatever the storage dtype of the problem: decays,
    /// recurrent states, frequencies.
    const WIDE: &'static [&'static str] = &[];
    /// Whether its weight matrices come narrowed, too: to FP8, eight or four bits.
    const NARROW: bool = false;
    /// Inputs and outputs of which the formula does not let the one move the other. Otherwise every
    /// output depends on every input.
    const APART: &'static [Apart] = &[];
    /// The sizes that fix one problem.
    type Case: Case;
    /// Named input tensors; activations are of number type `R`.
    type Inputs<R: Number>: Tensors + Read + Clone + Send + Sync;
    /// Named output tensors.
    type Outputs<R: Number>: Tensors + Read + Clone + Send + Sync;

    /// The fills this op can draw, the model's own domain first.
    fn fills() -> &'static [Fill];
    /// The problems of a set, cheapest first.
    fn specs(set: Set) -> Vec<Spec<Self::Case>>;
    /// Why sizes that are all positive are still no problem of this op, if so: heads that do not
    /// divide, more active experts than experts.
    fn refuse(_: &Self::Case) -> Option<String> {
        None
    }
    /// Whether this is a problem at all. Called before [`inputs`](Self::inputs), which relies on it.
    fn check(spec: &Spec<Self::Case>) -> Result<(), String> {
        let why = Self::unfit(spec);
        why.map_or(Ok(()), |why| Err(format!("{}/{spec}: {why}", Self::NAME)))
    }
    /// What [`check`](Self::check) found.
    fn unfit(spec: &Spec<Self::Case>) -> Option<String> {
        let Spec { case, dtype, fill, weights, .. } = spec;
        let fills = Self::fills();
        if !fills.iter().any(|known| known.name == fill) {
            let known: Vec<_> = fills.iter().map(|fill| fill.name).collect();
            return Some(format!("no fill {fill:?}; there are {}", known.join(", ")));
        }
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) {
            return Some(format!("dtype {dtype}: expected f32, f16 or bf16"));
        }
        if let Some(narrow) = weights {
            if !Self::NARROW {
                return Some(format!(
                    "weights {narrow}: {} has none that are narrowed",
                    Self::NAME
                ));
            }
            if *dtype != Dtype::F32 {
                return Some(format!("weights {narrow}: go with dtype f32, got {dtype}"));
            }
        }
        let sizes = case.sizes();
        if let Some(at) = sizes.iter().position(|&size| size == 0) {
            return Some(format!("{} is 0, expected at least 1", Self::Case::LETTERS[at]));
        }
        // So that no product of sizes in a cost can overflow.
        if 56.0 < sizes.iter().map(|&size| (size as f64).log2()).sum::<f64>() {
            return Some("the product of all sizes is above 2^56".to_owned());
        }
        if let Some(why) = Self::refuse(case) {
            return Some(why);
        }
        let bytes = Self::cost(spec).bytes;
        (MAX_BYTES < bytes)
            .then(|| format!("moves {} GiB, more than {} GiB", bytes >> 30, MAX_BYTES >> 30))
    }
    /// Why an output does not feel an input that it depends on, as this fill draws or at these sizes:
    /// a gate of -60 forgets, one key has the weight one whatever its score.
    fn unfelt(_spec: &Spec<Self::Case>, _input: &str, _output: &str) -> Option<&'static str> {
        None
    }
    /// Inputs drawn as the fill says, already rounded to the storage dtype.
    fn inputs(spec: &Spec<Self::Case>, rng: &mut Rng) -> Self::Inputs<f32>;
    /// Outputs of the shapes that an answer has, before anybody wrote them: NaN, and the least integer.
    fn unwritten(spec: &Spec<Self::Case>, inputs: &Self::Inputs<f32>) -> Self::Outputs<f32>;
    /// What an output is stored in under a plan.
    fn grid(output: &str, plan: &Plan) -> Grid {
        match output {
            "state" => plan.state,
            // Routing weights are f32 unless a plan says otherwise, whatever activations are stored in.
            "weights" => plan.round.get(&Site::RouterWeights).copied().unwrap_or(Grid::F32),
            output if Self::TOLD.contains(&output) => Grid::F32,
            _ => plan.output,
        }
    }
    /// The same inputs in another number type, exactly.
    fn lift<R: Number>(inputs: &Self::Inputs<f32>) -> Self::Inputs<R>;
    /// The least work any implementation must do.
    fn cost(spec: &Spec<Self::Case>) -> Cost;
}

/// The sizes of one problem, round-tripping through `B1-T65-HK16`.
pub trait Case: Clone + Eq + fmt::Debug + Send + Sync + 'static {
    /// Letters in the order of the id.
    const LETTERS: &'static [&'static str];
    /// One size per letter.
    fn sizes(&self) -> Vec<usize>;
    /// From one size per letter.
    fn from_sizes(sizes: &[usize]) -> Self;
}

/// One problem: sizes, storage dtype, fill and seed; prints as
/// `B1-T65-HK16;dtype=bf16;weights=int8;fill=tiny-norm-k;seed=7` with defaults left out, and parses back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec<C> {
    /// The sizes.
    pub case: C,
    /// Storage dtype of activations (and of weights where the checkpoint's would be).
    pub dtype: Dtype,
    /// What weight matrices are narrowed to, if they are.
    pub weights: Option<Narrow>,
    /// Name of the fill; `domain` is the default.
    pub fill: String,
    /// Seed of the draw.
    pub seed: u64,
}

/// The fill of a spec that names none.
pub const DOMAIN: &str = "domain";

impl<C: Case> Spec<C> {
    /// Sizes with the default dtype `f32`, fill `domain`, seed 0.
    pub fn new(case: C) -> Self {
        Spec { case, dtype: Dtype::F32, weights: None, fill: DOMAIN.to_owned(), seed: 0 }
    }

    /// With another fill.
    #[must_use]
    pub fn fill(self, fill: &str) -> Self {
        Spec { fill: fill.to_owned(), ..self }
    }

    /// The tensor as the storage dtype would hold it.
    pub fn round<D: Dimension>(&self, x: ArcArray<f32, D>) -> ArcArray<f32, D> {
        match self.dtype {
            Dtype::F32 => x,
            dtype => x.map(|&x| dtype.round(x)).into_shared(),
        }
    }

    /// A weight matrix, or several, as the problem has them: `[…, rows, columns]`.
    pub fn weight<D: Dimension>(&self, w: ArcArray<f32, D>) -> ArcArray<f32, D> {
        let Some(narrow) = self.weights else { return self.round(w) };
        let shape = w.shape();
        let d = shape.last().copied().unwrap_or(1).max(1);
        let rows = shape.iter().rev().nth(1).copied().unwrap_or(1).max(1);
        let mut w = w.as_standard_layout().into_owned();
        for matrix in w.as_slice_mut().into_iter().flat_map(|w| w.chunks_mut(rows * d)) {
            narrow.round(matrix, d);
        }
        w.into_shared()
    }

    /// Bytes of a weight matrix as the problem has it.
    pub fn weight_bytes(&self, rows: u64, d: u64) -> u64 {
        self.weights.map_or(self.dtype.size() as u64 * rows * d, |narrow| narrow.bytes(rows, d))
    }

    /// Whether the fill is `name`.
    pub fn is(&self, name: &str) -> bool {
        self.fill == name
    }

    /// With another storage dtype.
    #[must_use]
    pub fn dtype(self, dtype: Dtype) -> Self {
        Spec { dtype, ..self }
    }

    /// With narrowed weights.
    #[must_use]
    pub fn weights(self, narrow: Narrow) -> Self {
        Spec { weights: Some(narrow), ..self }
    }
}

impl<C: Case> fmt::Display for Spec<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = self.case.sizes();
        for (i, (letter, size)) in C::LETTERS.iter().zip(sizes).enumerate() {
            write!(f, "{}{letter}{size}", if i == 0 { "" } else { "-" })?;
        }
        if self.dtype != Dtype::F32 {
            write!(f, ";dtype={}", self.dtype)?;
        }
        if let Some(narrow) = self.weights {
            write!(f, ";weights={narrow}")?;
        }
        if self.fill != DOMAIN {
            write!(f, ";fill={}", self.fill)?;
        }
        if self.seed != 0 {
            write!(f, ";seed={}", self.seed)?;
        }
        Ok(())
    }
}

/// The largest size a letter may have: products of all letters are still checked by the op.
pub const MAX_SIZE: usize = 1 << 24;

/// The most that one problem may move.
const MAX_BYTES: u64 = 1 << 36;

impl<C: Case> FromStr for Spec<C> {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut parts = s.split(';');
        let mut sizes = Vec::with_capacity(C::LETTERS.len());
        let mut given = parts.next().unwrap_or("").split('-');
        for letter in C::LETTERS {
            let size = given.next().and_then(|part| part.strip_prefix(letter));
            let size = size.and_then(|n| n.parse::<usize>().ok()).filter(|&n| n <= MAX_SIZE);
            sizes.push(size.ok_or_else(|| {
                format!(
                    "case {s:?}: expected {letter}<n> with n up to {MAX_SIZE} (letters: {})",
                    C::LETTERS.join(" ")
                )
            })?);
        }
        if let Some(extra) = given.next() {
            return Err(format!("case {s:?}: unexpected {extra:?} after {}", C::LETTERS.join("-")));
        }
        let mut spec = Spec::new(C::from_sizes(&sizes));
        for part in parts {
            match part.split_once('=') {
                Some(("dtype", value)) => spec.dtype = value.parse()?,
                Some(("weights", value)) => spec.weights = Some(value.parse()?),
                Some(("fill", value)) => value.clone_into(&mut spec.fill),
                Some(("seed", value)) => {
                    spec.seed = value
                        .parse()
                        .map_err(|_| format!("case {s:?}: seed {value:?} is no number"))?;
                }
                _ => {
                    return Err(format!(
                        "case {s:?}: unexpected {part:?}, expected dtype=, weights=, fill= or seed="
                    ));
                }
            }
        }
        Ok(spec)
    }
}

/// A named way to draw inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Name in a case id.
    pub name: &'static str,
    /// What it draws, and which mistake that exposes.
    pub why: &'static str,
    /// Public reports of that mistake; empty only for the model's own domain.
    pub cites: &'static [&'static str],
}

/// Inputs that an output does not depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Apart {
    /// The output.
    pub output: &'static str,
    /// The inputs.
    pub inputs: &'static [&'static str],
    /// Why, by the formula.
    pub why: &'static str,
}

/// Least bytes moved and operations done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that must cross the memory bus.
    pub bytes: u64,
    /// Floating-point operations.
    pub flops: u64,
}

/// A named group of problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Set {
    /// Seconds on a laptop.
    Smoke,
    /// Every length, ratio and fill at sizes that a merge gate can afford; contains `Smoke`.
    Ci,
    /// The model's own sizes; contains `Ci`.
    Nightly,
}

/// One way to compute an [`Op`], fast.
pub trait Variant<O: Op>: Send + Sync {
    /// `device/algorithm`, for example `cuda/chunk`.
    fn name(&self) -> &str;
    /// Why it does not compute a problem, on any machine, if so.
    fn unfit(&self, _spec: &Spec<O::Case>) -> Option<String> {
        None
    }
    /// Why this host cannot run it, if so.
    fn skip(&self, host: &Host, spec: &Spec<O::Case>) -> Option<String>;
    /// How it rounds: the bound it is held to follows from this.
    fn plan(&self, spec: &Spec<O::Case>) -> Plan;
    /// What it promises beyond its plan.
    fn claims(&self) -> Claims {
        Claims::default()
    }
    /// Faults that can be planted in it, to show that a check sees them.
    fn plants(&self) -> &'static [Plant] {
        &[]
    }
    /// The same variant with the fault of that name.
    fn planted(&self, _name: &str) -> Option<Box<dyn Variant<O>>> {
        None
    }
    /// Uploads, compiles and allocates. Never timed.
    fn prepare(
        &self,
        spec: &Spec<O::Case>,
        inputs: &O::Inputs<f32>,
    ) -> Result<Box<dyn Prepared<O>>, Error>;
}

/// A fault put in on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plant {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it does.
    pub what: &'static str,
    /// A public report of the same mistake.
    pub cite: &'static str,
}

/// What a variant or an engine promises beyond its plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// Two runs give equal bits, on any number of threads.
    pub deterministic: bool,
    /// A sequence or token gets equal bits whatever else is in the batch.
    pub batch_invariant: bool,
    /// A sequence gets equal bits whole and in pieces, its states carried from piece to piece, if it
    /// is cut at multiples of so many tokens: 1 is anywhere.
    pub cuts: Option<usize>,
}

/// A loaded problem. The timed call and the checked call are the same call.
pub trait Prepared<O: Op> {
    /// Fills outputs and scratch with NaN (integers with their least value), so that what is not
    /// written shows.
    fn poison(&mut self) -> Result<(), Error>;
    /// The inputs as they are now: an honest kernel leaves them alone.
    fn inputs(&mut self) -> Result<O::Inputs<f32>, Error>;
    /// Computes every output once from the original inputs.
    fn execute(&mut self) -> Result<(), Error>;
    /// Waits for the last [`execute`](Self::execute) and returns its outputs.
    fn outputs(&mut self) -> Result<O::Outputs<f32>, Error>;
    /// Replaces the inputs by others of the same shapes in the same memory; false if it cannot.
    fn load(&mut self, _inputs: &O::Inputs<f32>) -> Result<bool, Error> {
        Ok(false)
    }
    /// Times calls where they are made: of what is called through a pipe, or on another device, a clock
    /// around [`execute`](Self::execute) would time the way there as well. The outputs are those of the last
    /// call. `None` where `execute` is the call and nothing else.
    fn clocked(&mut self, _calls: &Calls) -> Result<Option<Clocked>, Error> {
        Ok(None)
    }
    /// What was written outside of the outputs, if it looks and finds something.
    fn strayed(&mut self) -> Result<Option<String>, Error> {
        Ok(None)
    }
    /// What a composite op held between inputs and outputs in the last [`execute`](Self::execute),
    /// under the reference's names and in the order of the computation. One that tells nothing can be
    /// found wrong, but not where.
    fn inside(&mut self) -> Result<Vec<Tap>, Error> {
        Ok(Vec::new())
    }
}

/// Calls of which the time is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calls {
    /// How many times.
    pub times: usize,
    /// Of how many calls in a row each.
    pub group: usize,
    /// Bytes that are walked before each call, so that caches hold nothing of it.
    pub away: Option<usize>,
}

/// Times of calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Clocked {
    /// Nanoseconds of a call, each the mean of a group.
    pub ns: Vec<f64>,
    /// By which clock.
    pub clock: Clock,
}

/// Who held the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The process that makes the call, around it.
    Host,
    /// The foreign program that computes, around the call: its word for it.
    Program,
    /// The device, by events before and after the work.
    Events,
    /// The same, around replays of a graph of the call: launches are not in it.
    Replays,
}

impl Clock {
    /// Every one: first the one that karat holds itself.
    pub const ALL: [Clock; 4] = [Clock::Host, Clock::Program, Clock::Events, Clock::Replays];

    /// As rows have it.
    pub fn name(self) -> &'static str {
        match self {
            Clock::Host => "host clock",
            Clock::Program => "program clock",
            Clock::Events => "device events",
            Clock::Replays => "graph replays",
        }
    }

    /// The one of a name.
    pub fn named(name: &str) -> Option<Clock> {
        Clock::ALL.into_iter().find(|clock| clock.name() == name)
    }
}

/// Facts about the machine, gathered once.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Processor name.
    pub cpu: String,
    /// Hardware threads that may be used.
    pub threads: usize,
    /// Memory in bytes, 0 if the machine does not tell.
    pub memory: u64,
    /// Instruction-set extensions that matter here, as the processor names them.
    pub features: Vec<&'static str>,
}

/// A failure to run, as opposed to a wrong answer.
pub type Error = Box<dyn error::Error + Send + Sync>;
