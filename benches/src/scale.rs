//! How the time and the memory of a token grow with the context.
//!
//! Contexts are asked in rounds, up and down, one token after the other from states that are restored: what a
//! busy neighbour takes, it takes from all of them, and a round is compared with itself.

mod cliff;
mod curve;

use golden::{
    Engine, Error,
    engine::{Demand, INTERRUPTED, Narrowed, Snapshot},
};

pub use self::{
    cliff::{CONTEXTS, Cliff},
    curve::{Curve, Value},
};
use crate::{
    clock::time,
    forget_peak, held,
    speed::{Ceilings, Depth, Roof, Samples, deepen, factors, next, states, token},
    stats::median,
};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens that the states hold before, rising.
    pub contexts: Vec<usize>,
    /// Tokens that are timed after each in a round.
    pub tokens: usize,
    /// How often each context is asked.
    pub rounds: usize,
    /// Whether the engine computes on the GPU: then its memory is what is read and held.
    pub gpu: bool,
}

/// Tokens that are fed before those that are timed: caches take another page for the first of them, states come
/// near, a GPU is told what follows.
const WARM: usize = 2;

/// What an engine is asked at a context, as far as memory depends on it.
pub fn demand(context: usize, tokens: usize, narrowed: Narrowed) -> Demand {
    let context = context.saturating_add(WARM.saturating_add(tokens));
    Demand { sequences: 1, context, fed: 1, logits: 1, hidden: 0, drafts: 0, narrowed }
}

/// What was measured at a context.
#[derive(Clone, Debug)]
pub struct Point {
    /// Tokens before.
    pub context: usize,
    /// Seconds of a token: the middle one of each round, and the middle of these.
    pub seconds: f64,
    /// Nanoseconds of each token, by round.
    pub samples: Vec<Vec<u64>>,
    /// The most bytes that the process held while it was asked, or that were in use on the GPU.
    pub memory: Option<u64>,
}

/// How the time of a token grows.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// `a + b T + c T^2` seconds, cliffs taken out.
    pub square: Curve,
    /// `a + b T`, the same.
    pub line: Curve,
    /// The power with which grows what grows.
    pub exponent: Option<Value>,
    /// What a context's time is off on its own, relative to itself, as rounds show.
    pub noise: f64,
}

/// What was found of an engine.
#[derive(Clone, Debug)]
pub struct Scaled {
    /// The engine's name.
    pub engine: String,
    /// Bytes that the machine read in a second, between the turns.
    pub read: Samples,
    /// By context.
    pub points: Vec<Point>,
    /// Of at least three contexts.
    pub fit: Option<Fit>,
    /// `a + b T` bytes, of at least three contexts.
    pub memory: Option<Curve>,
    /// What each token before costs a token more.
    pub grown: Grown,
    /// What it did cost over the least that it could right then: every turn by the paces before and after it, which
    /// on some machines change from one second to the next.
    pub over: Option<Value>,
    /// In the order of their contexts; `None` if there are too few to tell.
    pub cliffs: Option<Vec<Cliff>>,
}

/// What each token before costs a token more, at the least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grown {
    /// Bytes of states and caches.
    pub bytes: f64,
    /// Seconds that reading these takes, at the pace that memory was read at.
    pub read: f64,
    /// Seconds that its products take, at the pace that these were measured at; `None` of a GPU.
    pub multiplied: Option<f64>,
}

impl Grown {
    /// The more of the two.
    pub fn least(&self) -> f64 {
        self.read.max(self.multiplied.unwrap_or(0.0))
    }
}

/// Asks an engine at each context; `tell` is told how many turns of how many are done.
///
/// # Errors
/// What the engine fails with; [`INTERRUPTED`] when `tell` returns false.
pub fn run(
    engine: &mut dyn Engine,
    options: &Options,
    tell: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Scaled, Error> {
    let Options { contexts, rounds, .. } = options;
    let turns = contexts.len() * (rounds + 1);
    let mut done = 0;
    let mut ready = || {
        done += 1;
        if tell(done, turns) { Ok(()) } else { Err(Error::from(INTERRUPTED)) }
    };
    let traffic = |tokens: usize| engine.traffic(tokens).ok_or("the engine tells no traffic");
    let (none, many) = (traffic(0)?, traffic(1 << 20)?);
    let each = |none: u64, many: u64| (many - none) as f64 / f64::from(1 << 20);
    let bytes = each(none.states, many.states);
    let operations = each(none.attention, many.attention);
    // The first round warms up, and shows how much memory is held.
    let memory = memories(engine, options, &mut ready)?;
    let kept = Kept::new(engine, options)?;
    let mut ceilings = if options.gpu { Ceilings::of_gpu()? } else { Ceilings::default() };
    let mut samples = vec![Vec::new(); contexts.len()];
    let mut order = Vec::new();
    for round in 0..*rounds {
        // Up and down, so that no context always follows the same one.
        let up =
            (0..contexts.len()).map(|i| if round % 2 == 0 { i } else { contexts.len() - 1 - i });
        for i in up {
            ceilings.sample();
            kept.enter(engine, i)?;
            samples[i].push(turn(engine, options.tokens)?);
            order.push(i);
            ready()?;
        }
    }
    ceilings.sample();
    kept.give_back(engine)?;
    let middle = |samples: &Vec<u64>| {
        median(&samples.iter().map(|&ns| ns as f64 * 1e-9).collect::<Vec<_>>())
    };
    let by_round = |round: usize| samples.iter().map(|own| middle(&own[round])).collect();
    let by_rounds: Vec<Vec<f64>> = (0..*rounds).map(by_round).collect();
    let points =
        contexts.iter().zip(samples.iter().zip(memory)).map(|(&context, (samples, memory))| {
            let seconds = median(&samples.iter().map(middle).collect::<Vec<_>>());
            Point { context, seconds, samples: samples.clone(), memory }
        });
    let points: Vec<Point> = points.collect();
    let (fit, cliffs) = fit(&points, curve::noise(&by_rounds));
    let word = factors(&engine.plan())[1];
    let grown = |roof: &Roof| Grown {
        bytes,
        read: bytes / roof.read.median,
        multiplied: word.and_then(|word| roof.of(word)).map(|pace| operations / pace.median),
    };
    let mut over = vec![Vec::new(); contexts.len()];
    for (turn, &i) in order.iter().enumerate() {
        let took = middle(&samples[i][over[i].len()]);
        over[i].push(took / grown(&ceilings.around(turn)).least());
    }
    let roof = ceilings.roof();
    let clear = cliffs.is_empty();
    let memory: Option<Vec<_>> =
        points.iter().map(|point| Some((point.context, point.memory? as f64))).collect();
    Ok(Scaled {
        engine: engine.name(),
        read: roof.read,
        fit,
        memory: memory.filter(|all| 3 <= all.len()).and_then(|all| Curve::through(&all, 1, 0.0)),
        cliffs: (CONTEXTS <= points.len()).then_some(cliffs),
        points,
        grown: grown(&roof),
        // Past a cliff it is another line.
        over: if clear { slope(contexts, &over) } else { None },
    })
}

/// By what each context adds, in what is given of it round by round.
fn slope(contexts: &[usize], rounds: &[Vec<f64>]) -> Option<Value> {
    let all: Vec<_> = contexts.iter().copied().zip(rounds.iter().map(|own| median(own))).collect();
    let fits = 3 <= all.len() && all.iter().all(|(_, own)| own.is_finite());
    let by_round = (0..rounds.first()?.len()).map(|i| rounds.iter().map(|own| own[i]).collect());
    let noise = curve::noise(&by_round.collect::<Vec<_>>());
    if fits { Some(Curve::through(&all, 1, noise)?.factors[1]) } else { None }
}

fn fit(points: &[Point], noise: f64) -> (Option<Fit>, Vec<Cliff>) {
    let points: Vec<_> = points.iter().map(|point| (point.context, point.seconds)).collect();
    let cliff::Smooth { points, cliffs } = cliff::smooth(&points, noise);
    let fit = || {
        Some(Fit {
            square: Curve::through(&points, 2, noise)?,
            line: Curve::through(&points, 1, noise)?,
            exponent: curve::exponent(&points, noise),
            noise,
        })
    };
    (fit(), cliffs)
}

/// What is held at each context, states of no other being kept.
fn memories(
    engine: &mut dyn Engine,
    options: &Options,
    ready: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<Vec<Option<u64>>, Error> {
    let name = if options.gpu { "cuda" } else { "cpu" };
    let (mut all, mut before) = (Vec::new(), 0);
    engine.reset(1)?;
    for &context in &options.contexts {
        let counts = options.gpu || forget_peak();
        if options.gpu {
            // Caches that grow are copied: room for what is asked and no more.
            engine.reset(0)?;
            engine.reset(1)?;
            before = 0;
        }
        deepen(engine, 1, Depth { tokens: context - before, fed: false })?;
        before = context;
        if options.gpu {
            turn(engine, options.tokens)?;
        } else {
            let kept = engine.snapshot()?;
            turn(engine, options.tokens)?;
            engine.restore(kept)?;
            engine.release(kept);
        }
        all.push(held(name).filter(|_| counts));
        ready()?;
    }
    engine.reset(0)?;
    Ok(all)
}

/// How states of a context are had again.
enum Kept {
    /// Copies that share all that they have in common.
    Copies(Vec<Snapshot>),
    /// Made up every time: a GPU does so sooner than it copies, and would hold each copy whole.
    Anew(Vec<usize>),
}

impl Kept {
    fn new(engine: &mut dyn Engine, options: &Options) -> Result<Kept, Error> {
        let depth = |&tokens: &usize| Depth { tokens, fed: false };
        if options.gpu {
            // Room for the longest first: caches that grow are copied.
            engine.reset(1)?;
            let most = options.contexts.iter().max().map_or(0, |most| most + WARM + options.tokens);
            deepen(engine, 1, depth(&most))?;
            return Ok(Kept::Anew(options.contexts.clone()));
        }
        let depths: Vec<_> = options.contexts.iter().map(depth).collect();
        Ok(Kept::Copies(states(engine, 1, &depths)?))
    }

    fn enter(&self, engine: &mut dyn Engine, i: usize) -> Result<(), Error> {
        match self {
            Kept::Copies(all) => engine.restore(all[i]),
            Kept::Anew(contexts) => {
                engine.reset(1)?;
                deepen(engine, 1, Depth { tokens: contexts[i], fed: false })
            }
        }
    }

    fn give_back(self, engine: &mut dyn Engine) -> Result<(), Error> {
        if let Kept::Copies(all) = self {
            all.into_iter().for_each(|kept| engine.release(kept));
        }
        engine.reset(0)
    }
}

/// Nanoseconds of each of so many tokens.
fn turn(engine: &mut dyn Engine, tokens: usize) -> Result<Vec<u64>, Error> {
    let want = next(engine);
    let mut samples = Vec::new();
    for i in 0..WARM + tokens {
        let token = vec![vec![token(engine, i)]];
        let (step, took) = time(|| engine.forward(&token, &want));
        step?;
        if WARM <= i {
            samples.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use golden::{Weights, synthetic::Synthetic};

    use super::{Grown, Options, fit, run, slope};
    use crate::scale::Point;

    fn point(context: usize, seconds: f64) -> Point {
        Point { context, seconds, samples: vec![], memory: None }
    }

    #[test]
    fn a_fit_is_what_is_left_beside_a_cliff() {
        let slower = |t: usize| if t < 40_000 { 1.0 } else { 2.0 };
        let one = |i: u32| {
            let t = 1000 << i;
            // A little noise, the same every time.
            let noise = if i.is_multiple_of(2) { 1.002 } else { 0.998 };
            point(t, (0.02 + 1e-7 * t as f64) * slower(t) * noise)
        };
        let points: Vec<_> = (0..10).map(one).collect();
        let (found, cliffs) = fit(&points, 0.002);
        assert_eq!(cliffs.len(), 1);
        assert!(cliffs[0].context == 64_000 && cliffs[0].lasting, "{cliffs:?}");
        assert!((cliffs[0].factor.of / 2.0 - 1.0).abs() < 0.03, "{cliffs:?}");
        let line = found.unwrap().line;
        assert!((line.factors[1].of / 1e-7 - 1.0).abs() < 0.05, "{line:?}");
    }

    #[test]
    fn what_a_token_costs_is_a_multiple_of_the_least() {
        let contexts = [0, 10_000, 20_000, 40_000];
        // A fifth more than the least for each token before, now and then a busy neighbour.
        let turn = |t: usize, round: usize| {
            (50_000.0 + 1.2 * t as f64) * if (t + round).is_multiple_of(5) { 1.5 } else { 1.0 }
        };
        let of = |t: &usize| (0..4).map(|round| turn(*t, round)).collect();
        let rounds: Vec<Vec<f64>> = contexts.iter().map(of).collect();
        let over = slope(&contexts, &rounds).unwrap();
        assert!((over.of - 1.2).abs() < 1e-9 && 0.0 < over.error, "{over:?}");
        assert!(slope(&contexts[..2], &rounds[..2]).is_none());
        // Nothing grows, and nothing is the least.
        assert!(slope(&contexts, &vec![vec![f64::INFINITY; 5]; 4]).is_none());
    }

    #[test]
    fn an_engine_is_asked_at_every_context() {
        let weights: Arc<dyn Weights> = Arc::new("synthetic:tiny".parse::<Synthetic>().unwrap());
        let mut engine = crate::engine("cpu", "bf16", weights, None).unwrap();
        let contexts = vec![0, 700, 1024, 3000];
        let options = Options { contexts: contexts.clone(), tokens: 3, rounds: 2, gpu: false };
        let mut told = Vec::new();
        let scaled = run(&mut *engine, &options, &mut |done, all| {
            told.push((done, all));
            true
        });
        let scaled = scaled.unwrap();
        assert_eq!((told.len(), told.last()), (12, Some(&(12, 12))));
        let asked: Vec<_> = scaled.points.iter().map(|point| point.context).collect();
        assert_eq!(asked, contexts);
        for point in &scaled.points {
            assert!(point.samples.iter().all(|round| round.len() == 3) && 0.0 < point.seconds);
        }
        assert!(scaled.fit.is_some() && scaled.over.is_some() && scaled.cliffs.is_none());
        // Bytes of keys and values, in all layers of attention.
        let c = engine.config();
        let full = c.layer_types.iter().filter(|mixer| **mixer == golden::config::Mixer::Full);
        let token = 2 * c.num_key_value_heads * c.head_dim * 2 * full.count();
        let Grown { bytes, read, multiplied } = scaled.grown;
        assert!((bytes - token as f64).abs() < 1e-6, "{bytes} for {token}");
        assert!(0.0 < read && multiplied.is_some_and(|seconds| 0.0 < seconds));
        assert!(engine.lengths().is_empty());
        let mut ended = 0;
        let cut = run(&mut *engine, &options, &mut |done, _| {
            ended = done;
            done < 5
        });
        assert_eq!((cut.unwrap_err().to_string().as_str(), ended), ("interrupted", 5));
    }
}
