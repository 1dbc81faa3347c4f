//! How fast a model is, beside what the machine can do.
//!
//! Engines and depths are asked in turns, and the machine's own pace is measured between the turns: what
//! a busy neighbour takes, it takes from all of them.

mod fit;

use std::{ops::Range, time::Duration};

use golden::{
    Engine, Error, Plan,
    engine::{Demand, INTERRUPTED, Narrowed, Rows, Snapshot, Traffic, Want},
    plan::{Activations, Cache, Grid, Site},
};
use optimized::{
    cpu::roof::Work,
    cuda::{peak::Products, roof::Memory},
};

pub use self::fit::Fit;
use crate::{ask, clock::time, forget_peak, peak_memory, roofline::Machine};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens that are fed at once.
    pub prefill: usize,
    /// Tokens that are fed one by one.
    pub decode: usize,
    /// Sequences side by side.
    pub batches: Vec<usize>,
    /// Where each batch is asked.
    pub depths: Vec<Depth>,
    /// How often everything is asked.
    pub rounds: usize,
    /// Whether engines compute on the GPU: then its memory is the roof.
    pub gpu: bool,
}

impl Options {
    /// Every batch at every depth.
    pub fn places(&self) -> Vec<Place> {
        let of = |&batch| self.depths.iter().map(move |&depth| Place { batch, depth });
        self.batches.iter().flat_map(of).collect()
    }

    /// Without what is asked twice.
    pub fn once(self) -> Options {
        fn once<T: Copy + PartialEq>(all: &[T]) -> Vec<T> {
            let mut own = Vec::new();
            all.iter().for_each(|x| own.extend((!own.contains(x)).then_some(*x)));
            own
        }
        Options { batches: once(&self.batches), depths: once(&self.depths), ..self }
    }

    /// What an engine is asked at a place, as far as memory depends on it.
    pub fn demand(&self, place: Place, narrowed: Narrowed) -> Demand {
        let Place { batch: sequences, depth } = place;
        let context = depth.tokens.saturating_add(self.prefill.max(self.decode));
        let before = if depth.fed { depth.tokens } else { 1 };
        let fed = self.prefill.max(before).saturating_mul(sequences);
        Demand { sequences, context, fed, logits: sequences, hidden: 0, drafts: 0, narrowed }
    }
}

/// Where it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Sequences side by side.
    pub batch: usize,
    /// What each holds before.
    pub depth: Depth,
}

/// Tokens that the states hold before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// How many.
    pub tokens: usize,
    /// Whether they were fed; else the states are made up from a seed.
    pub fed: bool,
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
    /// Operations in a second, a multiplication and an addition counting as two: of f32, of bf16 pairs, of
    /// pairs of 16 bits and of bytes; of a GPU those of bf16 alone, by tensor cores.
    pub products: [Option<Samples>; 4],
    /// Whether it is a GPU's.
    pub gpu: bool,
}

impl Roof {
    /// Of such products.
    pub(crate) fn of(&self, word: Work) -> Option<Samples> {
        let at = KINDS.iter().position(|&kind| kind == word)?;
        self.products.get(at.checked_sub(1)?).copied()?
    }
}

/// Measures the machine, one sample at a time.
#[derive(Default)]
pub struct Ceilings {
    machine: Option<Machine>,
    gpu: Option<(Memory, Products)>,
    samples: [Vec<f64>; 5],
}

/// As [`Roof`] has them.
const KINDS: [Work; 5] = [Work::Read, Work::F32, Work::Bf16, Work::Int16, Work::Int8];

impl Ceilings {
    /// Of the GPU: its memory and its tensor cores.
    ///
    /// # Errors
    /// If there is none.
    pub fn of_gpu() -> Result<Ceilings, Error> {
        Ok(Ceilings { gpu: Some((Memory::new()?, Products::new()?)), ..Ceilings::default() })
    }

    /// One more sample of each; the bytes that were read in a second.
    pub fn sample(&mut self) -> f64 {
        if let Some((memory, products)) = &mut self.gpu {
            let mut push = |at: usize, work: &mut dyn FnMut() -> Result<u64, Error>| {
                let (done, took) = time(work);
                // What fails here fails again in the engine, which says so.
                let pace = done.map_or(f64::NAN, |done| done as f64 / took.as_secs_f64());
                self.samples[at].push(pace);
                pace
            };
            push(2, &mut || products.multiply());
            return push(0, &mut || memory.read());
        }
        let machine = self.machine.get_or_insert_with(Machine::new);
        for (kind, samples) in KINDS.into_iter().zip(&mut self.samples) {
            samples.push(machine.at(kind));
        }
        *self.samples[0].last().expect("a sample of reading")
    }

    /// Of what was sampled: at least once.
    pub fn roof(&self) -> Roof {
        self.of(Vec::clone)
    }

    /// Of one sample and the next one.
    pub(crate) fn around(&self, at: usize) -> Roof {
        self.of(|samples| samples.iter().skip(at).take(2).copied().collect())
    }

    fn of(&self, some: impl Fn(&Vec<f64>) -> Vec<f64>) -> Roof {
        let [read, products @ ..] = self.samples.each_ref().map(some);
        let of = |samples: Vec<f64>| (!samples.is_empty()).then(|| Samples::of(samples));
        let products = products.map(of);
        Roof { read: Samples::of(read), products, gpu: self.gpu.is_some() }
    }
}

/// How fast an engine was at a place.
#[derive(Clone, Debug)]
pub struct Row {
    /// The engine's name.
    pub engine: String,
    /// Sequences, and tokens that the states of each held.
    pub place: Place,
    /// Bytes that the machine read in a second, between the turns at this place.
    pub read: Samples,
    /// Tokens in a second, of all sequences together, fed at once.
    pub prefill: Option<Samples>,
    /// The same, each sequence's fed one by one.
    pub decode: Option<Samples>,
    /// The samples of both as they were taken.
    pub taken: [Vec<f64>; 2],
    /// Bytes and operations of a token.
    pub traffic: Traffic,
    /// Bytes of a step of one token of each sequence.
    pub step: f64,
    /// Why slower kernels computed than those for this machine, if they did.
    pub falls_back: Option<String>,
    /// How its products read their factors, and how those of attention do.
    pub factors: [Option<Work>; 2],
    /// The most memory that the process held, in bytes, while this engine alone was asked once, states of
    /// all others given back: weights of all engines, as far as they were touched, this one's states, and
    /// everything else. `None` where the machine cannot begin to count anew.
    pub peak: Option<u64>,
}

impl Row {
    /// The least seconds that the products of a token take, each at the pace of its kind, if that is known.
    pub fn least(&self, roof: &Roof) -> Option<f64> {
        let Traffic { products, attention, .. } = self.traffic;
        let of =
            |operations: u64, word: Option<Work>| Some(operations as f64 / roof.of(word?)?.median);
        Some(of(products, self.factors[0])? + of(attention, self.factors[1])?)
    }
}

/// What products of a plan are made of, and what those of attention are.
pub(crate) fn factors(plan: &Plan) -> [Option<Work>; 2] {
    let paired = plan.round.get(&Site::Queries) == Some(&Grid::Bf16);
    let attention = match plan.cache {
        Cache::Int8ByInt16 => Work::Int16,
        _ if paired => Work::Bf16,
        _ => Work::F32,
    };
    let products = match plan.activations {
        Activations::F32 => Some(Work::F32),
        Activations::Bf16 => Some(Work::Bf16),
        Activations::Int8 => Some(Work::Int8),
        // Nothing multiplies codes in an engine.
        Activations::Fp8 => None,
    };
    [products, Some(attention)]
}

/// What was measured.
pub struct Measured {
    /// The machine's own pace.
    pub roof: Roof,
    /// By place, then by engine.
    pub rows: Vec<Row>,
    /// Of each engine and batch that were asked at enough depths, how a token's time grows with them.
    pub fits: Vec<Fit>,
}

/// Asks each engine in turn at each place, `rounds` times; `tell` is told how many turns of how many
/// are done.
///
/// # Errors
/// What an engine fails with; [`INTERRUPTED`] when `tell` returns false.
pub fn run(
    engines: &mut [Box<dyn Engine>],
    options: &Options,
    tell: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Measured, Error> {
    let places = options.places();
    // The first round warms up, and shows how much memory is held.
    let turns = places.len() * (options.rounds + 1) * engines.len();
    let mut done = 0;
    let mut ready = || {
        done += 1;
        if tell(done, turns) { Ok(()) } else { Err(Error::from(INTERRUPTED)) }
    };
    let mut peaks = Vec::new();
    for &Place { batch, depth } in &places {
        for engine in &mut *engines {
            let counts = forget_peak();
            engine.reset(batch)?;
            deepen(&mut **engine, batch, depth)?;
            let kept = engine.snapshot()?;
            turn(&mut **engine, options, batch, kept)?;
            engine.release(kept);
            peaks.push(peak_memory().filter(|_| counts));
            engine.reset(0)?;
            ready()?;
        }
    }
    let of_engine = |engine: &mut Box<dyn Engine>| {
        let of_batch = |&batch| states(&mut **engine, batch, &options.depths);
        let all = options.batches.iter().map(of_batch).collect::<Result<Vec<_>, _>>()?;
        Ok(all.concat())
    };
    let kept: Vec<Vec<Snapshot>> =
        engines.iter_mut().map(of_engine).collect::<Result<_, Error>>()?;
    let mut ceilings = if options.gpu { Ceilings::of_gpu()? } else { Ceilings::default() };
    let mut asked = vec![(Vec::new(), Vec::new()); places.len() * engines.len()];
    let mut read = vec![Vec::new(); places.len()];
    for round in 0..options.rounds {
        // Up and down, so that no place always follows the same one.
        let up = (0..places.len()).map(|i| if round % 2 == 0 { i } else { places.len() - 1 - i });
        for i in up {
            read[i].push(ceilings.sample());
            for (j, engine) in engines.iter_mut().enumerate() {
                let (prefill, decode) = turn(&mut **engine, options, places[i].batch, kept[j][i])?;
                let samples = &mut asked[i * kept.len() + j];
                samples.0.extend(prefill);
                samples.1.extend(decode);
                ready()?;
            }
        }
    }
    let mut rows = Vec::new();
    let of = |samples: Vec<f64>| (!samples.is_empty()).then(|| Samples::of(samples));
    for (i, ((prefill, decode), peak)) in asked.into_iter().zip(peaks).enumerate() {
        let (place, engine) = (places[i / engines.len()], &engines[i % engines.len()]);
        let traffic = engine.traffic(place.depth.tokens);
        let traffic = traffic.ok_or_else(|| format!("{}: tells no traffic", engine.name()))?;
        rows.push(Row {
            engine: engine.name(),
            place,
            read: Samples::of(read[i / engines.len()].clone()),
            taken: [prefill.clone(), decode.clone()],
            prefill: of(prefill),
            decode: of(decode),
            traffic,
            step: traffic.of_step(place.batch, engine.config()),
            falls_back: engine.falls_back(),
            factors: factors(&engine.plan()),
            peak,
        });
    }
    for (engine, kept) in engines.iter_mut().zip(kept) {
        kept.into_iter().for_each(|kept| engine.release(kept));
        engine.reset(0)?;
    }
    let pairs =
        engines.iter().flat_map(|engine| options.batches.iter().map(move |&batch| (engine, batch)));
    let fits = pairs.filter_map(|(engine, batch)| Fit::of(&engine.name(), batch, &rows)).collect();
    Ok(Measured { roof: ceilings.roof(), rows, fits })
}

/// The states of so many sequences at every depth, in their order. They grow from one depth to the next, so that
/// pages of keys and values are shared.
pub(crate) fn states(
    engine: &mut dyn Engine,
    batch: usize,
    depths: &[Depth],
) -> Result<Vec<Snapshot>, Error> {
    let mut order: Vec<usize> = (0..depths.len()).collect();
    order.sort_by_key(|&i| (depths[i].fed, depths[i].tokens));
    let mut kept = vec![Snapshot(0); depths.len()];
    let mut before = Depth { tokens: 0, fed: false };
    engine.reset(batch)?;
    for i in order {
        let depth = depths[i];
        if depth.fed != before.fed {
            engine.reset(batch)?;
            before = Depth { tokens: 0, fed: depth.fed };
        }
        deepen(engine, batch, Depth { tokens: depth.tokens - before.tokens, ..depth })?;
        before = depth;
        kept[i] = engine.snapshot()?;
    }
    engine.reset(0)?;
    Ok(kept)
}

/// So many more tokens, of each sequence.
pub(crate) fn deepen(engine: &mut dyn Engine, batch: usize, more: Depth) -> Result<(), Error> {
    if more.tokens == 0 {
        return Ok(());
    }
    if !more.fed {
        return engine.pretend(more.tokens, 1);
    }
    let tokens = texts(engine, batch, 0..more.tokens);
    let want = Want { logits: Rows::None, last: Rows::None, ..Want::default() };
    engine.forward(&tokens, &want).map(drop)
}

/// Some text.
pub(crate) fn token(engine: &dyn Engine, i: usize) -> u32 {
    ((i * 7919 + 13) % engine.config().vocab_size) as u32
}

/// What continuing a text asks of a step: the greedy choice where the engine makes it, else the logits.
pub(crate) fn next(engine: &dyn Engine) -> Want {
    Want { last: Rows::None, ..ask::next(engine.chooses()) }
}

/// Of each sequence another.
fn texts(engine: &dyn Engine, batch: usize, range: Range<usize>) -> Vec<Vec<u32>> {
    let text = |s: usize| range.clone().map(|i| token(engine, i + s * 1009)).collect();
    (0..batch).map(text).collect()
}

fn turn(
    engine: &mut dyn Engine,
    options: &Options,
    batch: usize,
    from: Snapshot,
) -> Result<(Option<f64>, Option<f64>), Error> {
    let want = next(engine);
    let pace = |tokens: usize, took: Duration| tokens as f64 / took.as_secs_f64();
    let mut prefill = None;
    if 0 < options.prefill {
        engine.restore(from)?;
        let tokens = texts(engine, batch, 0..options.prefill);
        let (step, took) = time(|| engine.forward(&tokens, &want));
        step?;
        prefill = Some(pace(batch * options.prefill, took));
    }
    let mut decode = None;
    if 0 < options.decode {
        engine.restore(from)?;
        if options.gpu {
            // It is told what follows in the first two steps of a batch of another size, and tells itself no more.
            for i in 0..2.min(options.decode) {
                engine.forward(&texts(engine, batch, i..i + 1), &want)?;
            }
            engine.restore(from)?;
        }
        let tokens: Vec<_> = (0..options.decode).map(|i| texts(engine, batch, i..i + 1)).collect();
        let (step, took) =
            time(|| tokens.iter().try_for_each(|token| engine.forward(token, &want).map(drop)));
        step?;
        decode = Some(pace(batch * options.decode, took));
    }
    Ok((prefill, decode))
}
