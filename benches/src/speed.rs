//! How fast a model is, beside what the machine can do.
//!
//! Engines are asked in turns, and the machine's own pace is measured between the turns: what a busy
//! neighbour takes, it takes from all of them.

use std::time::Duration;

use golden::{
    Engine, Error,
    engine::{Demand, INTERRUPTED, Narrowed, Rows, Traffic, Want},
};
use optimized::cpu::roof::{self, Work};

use crate::{clock::time, forget_peak, peak_memory};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens that are fed at once.
    pub prefill: usize,
    /// Tokens that are fed one by one.
    pub decode: usize,
    /// Tokens that the states hold before; of more than none they are made up from a seed.
    pub depths: Vec<usize>,
    /// How often everything is asked.
    pub rounds: usize,
}

impl Options {
    /// What an engine is asked at a depth, as far as memory depends on it.
    pub fn demand(&self, depth: usize, narrowed: Narrowed) -> Demand {
        let context = depth.saturating_add(self.prefill.max(self.decode));
        let fed = self.prefill.max(1);
        Demand { sequences: 1, context, fed, logits: 1, hidden: 0, drafts: 0, narrowed }
    }
}

/// Least, middle and most of some samples.
#[derive(Clone, Copy, Debug)]
pub struct Samples {
    /// The least.
    pub min: f64,
    /// The median.
    pub median: f64,
    /// The most.
    pub max: f64,
}

impl Samples {
    /// Of at least one.
    pub fn of(mut samples: Vec<f64>) -> Samples {
        samples.sort_by(f64::total_cmp);
        let (n, last) = (samples.len(), samples.len() - 1);
        let median = f64::midpoint(samples[last / 2], samples[n / 2]);
        Samples { min: samples[0], median, max: samples[last] }
    }
}

/// The machine's own pace, on the threads that kernels use.
#[derive(Clone, Copy, Debug)]
pub struct Roof {
    /// Bytes read in a second.
    pub read: Samples,
    /// Operations in a second, a multiplication and an addition counting as two.
    pub f32: Samples,
    /// The same of products of bf16 pairs.
    pub bf16: Samples,
    /// The same of products of bytes.
    pub int8: Samples,
}

/// Measures the machine, one sample at a time.
#[derive(Default)]
pub struct Ceilings {
    memory: Option<roof::Memory>,
    samples: [Vec<f64>; 4],
}

/// As [`Roof`] has them.
const KINDS: [Work; 4] = [Work::Read, Work::F32, Work::Bf16, Work::Int8];

impl Ceilings {
    /// One more sample of each.
    pub fn sample(&mut self) {
        let memory = self.memory.get_or_insert_with(|| roof::Memory::new(1 << 29));
        for (kind, samples) in KINDS.into_iter().zip(&mut self.samples) {
            let (work, took) = time(|| roof::work(kind, memory));
            samples.push(work as f64 / took.as_secs_f64());
        }
    }

    /// Gives the memory back that is read, until the next sample.
    pub fn rest(&mut self) {
        self.memory = None;
    }

    /// Of what was sampled: at least once.
    pub fn roof(&self) -> Roof {
        let [read, f32, bf16, int8] = self.samples.clone().map(Samples::of);
        Roof { read, f32, bf16, int8 }
    }
}

/// How fast an engine was at a depth.
#[derive(Clone, Debug)]
pub struct Row {
    /// The engine's name.
    pub engine: String,
    /// Tokens that the states held.
    pub depth: usize,
    /// Tokens in a second, fed at once.
    pub prefill: Option<Samples>,
    /// Tokens in a second, fed one by one.
    pub decode: Option<Samples>,
    /// Bytes and operations of a token.
    pub traffic: Traffic,
    /// The most memory that the process held, in bytes, while this engine alone was asked once, states of
    /// all others given back: weights of all engines, as far as they were touched, this one's states, and
    /// everything else. `None` where the machine cannot begin to count anew.
    pub peak: Option<u64>,
}

/// Asks each engine in turn, `rounds` times; `tell` is told how many turns of how many are done.
///
/// # Errors
/// What an engine fails with; [`INTERRUPTED`] when `tell` returns false.
pub fn run(
    engines: &mut [Box<dyn Engine>],
    options: &Options,
    tell: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<(Roof, Vec<Row>), Error> {
    let mut ceilings = Ceilings::default();
    let mut rows = Vec::new();
    let turns = options.depths.len() * options.rounds * engines.len();
    let mut done = 0;
    for &depth in &options.depths {
        let mut samples = vec![(Vec::new(), Vec::new()); engines.len()];
        // The first round warms up, and shows how much memory is held.
        ceilings.rest();
        let mut peaks = Vec::new();
        for engine in &mut *engines {
            let counts = forget_peak();
            turn(&mut **engine, options, depth)?;
            peaks.push(peak_memory().filter(|_| counts));
            engine.reset(0)?;
            if !tell(done, turns) {
                return Err(INTERRUPTED.into());
            }
        }
        for _ in 0..options.rounds {
            ceilings.sample();
            for (engine, samples) in engines.iter_mut().zip(&mut samples) {
                let (prefill, decode) = turn(&mut **engine, options, depth)?;
                samples.0.extend(prefill);
                samples.1.extend(decode);
                done += 1;
                if !tell(done, turns) {
                    return Err(INTERRUPTED.into());
                }
            }
        }
        engines.iter_mut().try_for_each(|engine| engine.reset(0))?;
        for ((engine, (prefill, decode)), peak) in engines.iter().zip(samples).zip(peaks) {
            let of = |samples: Vec<f64>| (!samples.is_empty()).then(|| Samples::of(samples));
            let traffic = engine.traffic(depth);
            let traffic = traffic.ok_or_else(|| format!("{}: tells no traffic", engine.name()))?;
            rows.push(Row {
                engine: engine.name(),
                depth,
                prefill: of(prefill),
                decode: of(decode),
                traffic,
                peak,
            });
        }
    }
    Ok((ceilings.roof(), rows))
}

fn turn(
    engine: &mut dyn Engine,
    options: &Options,
    depth: usize,
) -> Result<(Option<f64>, Option<f64>), Error> {
    let vocab = engine.config().vocab_size;
    let token = |i: usize| ((i * 7919 + 13) % vocab) as u32;
    let want = Want { logits: Rows::Last, last: Rows::None, ..Want::default() };
    engine_at(engine, depth)?;
    let pace = |tokens: usize, took: Duration| tokens as f64 / took.as_secs_f64();
    let mut prefill = None;
    if 0 < options.prefill {
        let tokens = vec![(0..options.prefill).map(token).collect()];
        let (step, took) = time(|| engine.forward(&tokens, &want));
        step?;
        prefill = Some(pace(options.prefill, took));
        engine_at(engine, depth)?;
    }
    let mut decode = None;
    if 0 < options.decode {
        let (step, took) = time(|| {
            (0..options.decode).try_for_each(|i| engine.forward(&[vec![token(i)]], &want).map(drop))
        });
        step?;
        decode = Some(pace(options.decode, took));
    }
    Ok((prefill, decode))
}

fn engine_at(engine: &mut dyn Engine, depth: usize) -> Result<(), Error> {
    engine.reset(1)?;
    if 0 < depth { engine.pretend(depth, 1) } else { Ok(()) }
}
