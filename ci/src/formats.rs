//! `karat formats`: what a model loses in fewer bits.

mod tell;

use std::{path::PathBuf, sync::Arc};

use benches::{
    Kept, Number,
    formats::{Answer, COARSER, Judge, Said, Text, Told, Watch, coarser, judgements, memory},
};
use golden::{
    Engine, Error, Plan, Rng, Weights,
    engine::{INTERRUPTED, Memory},
};
use indicatif::ProgressBar;
use ndarray::Array2;

pub(crate) use self::tell::{tell, why};
use crate::{
    ended::unseen,
    exit::{Exit, fail, of_engine, refuse},
    fit,
    keeps::Keeps,
    logits::Prompt,
    out::{self, Out},
    ready::Ready,
};

/// Say what a model loses in fewer bits, and whether that is what its formats have to lose.
///
/// Each format of the cpu engine is asked a text. Its beginning is judged against the reference in f32: the
/// mean divergence may be twice that of the emulation of the same plan over the same narrowed weights. All
/// of it is compared with the engine in bf16: divergence, top-1 agreement, and what the next tokens cost
/// more. A model that does not predict its text, as one of random weights, pays about ln V for each token in
/// any format: there the change says little. Recordings are asked by `karat golden verify --engine cpu
/// --number bf16,int8,int4`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A checkpoint folder, or synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]
    #[arg(long, env = "KARAT_MODEL")]
    model: String,
    /// Formats; bf16,int8,int4 without, and bf16 of a checkpoint in FP8, whose weights stay as they are
    #[arg(long, value_delimiter = ',', value_name = "f32,bf16,int8,int4")]
    number: Vec<String>,
    /// safetensors with input_ids i64 [B, T] and optionally attention_mask i64 [B, T]; drawn tokens without
    #[arg(long, value_name = "FILE", conflicts_with_all = ["random", "seed"])]
    tokens: Option<PathBuf>,
    /// So many tokens are drawn
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    random: u32,
    /// Seed of the tokens that are drawn
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// So many tokens at the beginning of each sequence are judged: the reference takes its time for each
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    judged: u32,
    /// The checkpoint that says what is right and what bf16 is, for one that was narrowed; the model itself
    /// without
    #[arg(long, value_name = "DIR")]
    against: Option<String>,
    /// Plant this fault, to see that it is caught: coarser, fewer bits than the format says
    #[arg(long, value_name = "NAME", conflicts_with = "cache")]
    plant: Option<String>,
    #[command(flatten)]
    keeps: Keeps,
    #[command(flatten)]
    ready: Ready,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let weights = golden::open(&args.model).map_err(refuse)?;
    let right = match &args.against {
        None => weights.clone(),
        Some(model) => golden::open(model).map_err(refuse)?,
    };
    let (own, other) = (weights.config().vocab_size, right.config().vocab_size);
    if own != other {
        return Err(refuse(format!("--against: a vocabulary of {other}, the model has {own}")));
    }
    let tokens = if let Some(path) = &args.tokens {
        let prompt = Prompt::read(path)?;
        prompt.check(path, &*weights, 0)?;
        prompt.check(path, &*right, 0)?;
        prompt.tokens
    } else {
        let n = args.random as usize;
        let limit = weights.config().context_limit().min(right.config().context_limit());
        if limit < n {
            return Err(refuse(format!("--random {n}: the context has {limit} tokens")));
        }
        let mut rng = Rng::keyed("formats", args.seed);
        vec![(0..n).map(|_| rng.below(own) as u32).collect()]
    };
    let numbers = numbers(args, &*weights);
    args.ready.check(&numbers)?;
    let asked = Asked {
        engine: "cpu",
        name: &args.model,
        numbers: &numbers,
        keeps: args.keeps,
        texts: vec![Text::new("text", tokens, args.judged as usize)],
        right: Right::Reference(right),
        weights,
        plant: args.plant.as_deref(),
        ready: Some(&args.ready),
        blame: &|error| refuse(error),
    };
    let watch = benches::clock::Stopwatch::new();
    let formats = formats(&asked, out)?;
    let text = &asked.texts[0];
    out.line(&format!(
        "{}: {} tokens, {} of them judged against the reference in f32",
        args.model,
        text.tokens(),
        text.judged()
    ));
    tell(&args.model, &formats, &|number| again(args, number), out);
    let peak = benches::peak_memory().map_or(String::new(), |peak| {
        format!(
            ", peak memory {:.2} GB, pages of the map that were read included",
            peak as f64 / 1e9
        )
    });
    out.line(&format!("{:.1} s{peak}", watch.elapsed().as_secs_f64()));
    let exit = formats.iter().fold(Exit::Ok, |exit, one| exit.gravest(one.exit()));
    Ok(unseen(args.plant.as_deref(), exit, out))
}

/// The formats that are asked.
fn numbers(args: &Args, weights: &dyn Weights) -> Vec<String> {
    let all: &[&str] = match weights.config().fp8 {
        _ if !args.number.is_empty() => return args.number.clone(),
        Some(_) => &["bf16"],
        None => &["bf16", "int8", "int4"],
    };
    all.iter().map(|&number| number.to_owned()).collect()
}

/// What has to be typed to see a format again.
fn again(args: &Args, number: &str) -> String {
    let text = match &args.tokens {
        Some(path) => format!(" --tokens {}", path.display()),
        None => format!(" --random {} --seed {}", args.random, args.seed),
    };
    let given = [("against", &args.against), ("plant", &args.plant)];
    let given = given.map(|(name, value)| {
        value.as_ref().map_or(String::new(), |value| format!(" --{name} {value}"))
    });
    format!(
        "karat formats --model {} --number {number}{text} --judged {}{}",
        args.model,
        args.judged,
        args.keeps.typed() + &given.concat()
    )
}

/// Formats, what they are asked, and who says what is right.
pub(crate) struct Asked<'a> {
    /// Which engine is asked.
    pub(crate) engine: &'a str,
    /// What the model is called.
    pub(crate) name: &'a str,
    pub(crate) weights: Arc<dyn Weights>,
    pub(crate) numbers: &'a [String],
    /// What all but the plain engine in bf16 keep keys and values in.
    pub(crate) keeps: Keeps,
    pub(crate) texts: Vec<Text>,
    pub(crate) right: Right,
    pub(crate) plant: Option<&'a str>,
    /// How engines are made ready; plainly without.
    pub(crate) ready: Option<&'a Ready>,
    /// Who is to blame where an engine cannot be asked.
    pub(crate) blame: &'a dyn Fn(&Error) -> anyhow::Error,
}

/// Who says what is right.
pub(crate) enum Right {
    /// It was recorded, text by text.
    Recorded(Vec<Array2<f32>>),
    /// The reference in f32 over these weights.
    Reference(Arc<dyn Weights>),
}

impl Asked<'_> {
    /// The weights in bf16 that all is compared with.
    fn plain(&self) -> &Arc<dyn Weights> {
        match &self.right {
            Right::Recorded(_) => &self.weights,
            Right::Reference(weights) => weights,
        }
    }

    fn engine(&self, number: &str, out: &Out) -> anyhow::Result<Box<dyn Engine>> {
        let number = self.keeps.number(number);
        if let Some(ready) = self.ready {
            return ready.engine(self.engine, number, &self.weights, out);
        }
        let engine = benches::engine(self.engine, number, self.weights.clone(), None);
        engine.map_err(|e| of_engine(&e))
    }

    /// What one engine needs; refused where the machine does not have it, with what is kept beside it.
    fn stated(
        &self,
        engine: &str,
        weights: &Arc<dyn Weights>,
        number: Number<'_>,
    ) -> anyhow::Result<Memory> {
        let narrowed =
            self.ready.map(|ready| ready.narrowed(engine, number.name)).unwrap_or_default();
        let mut most = Memory::default();
        for text in &self.texts {
            let demand = text.demand(narrowed);
            let memory = fit::check(engine, number, &**weights, &demand)?.unwrap_or_default();
            let kept: u64 = self.texts.iter().map(|text| text.kept(&**weights)).sum();
            let memory = Memory { scratch: memory.scratch.saturating_add(kept), ..memory };
            if most.must_fit() <= memory.must_fit() {
                most = memory;
            }
        }
        if engine == "cpu" {
            fits(&format!("cpu in {number}"), &most)?;
        }
        Ok(most)
    }

    /// What all is made of; everything that can be refused is, before anything runs.
    fn check(&self) -> anyhow::Result<Vec<Memory>> {
        for number in self.numbers {
            benches::as_kept(self.engine, number, self.weights.clone()).map_err(refuse)?;
        }
        let stated: Vec<Memory> = self
            .numbers
            .iter()
            .map(|number| self.stated(self.engine, &self.weights, self.keeps.number(number)))
            .collect::<anyhow::Result<_>>()?;
        self.stated("cpu", self.plain(), BF16.into())?;
        match self.plant {
            None => {}
            Some(COARSER) => {
                for number in self.numbers {
                    let other = coarser(number).map_err(refuse)?;
                    self.stated(self.engine, &self.weights, self.keeps.number(other))?;
                }
            }
            Some(plant) => return Err(refuse(format!("--plant {plant}: expected {COARSER}"))),
        }
        let judges = self.numbers.len() + usize::from(matches!(self.right, Right::Reference(_)));
        let scratch = memory(&**self.plain(), judges, &self.texts);
        fits("the reference", &Memory { scratch, ..Memory::default() })?;
        Ok(stated)
    }
}

fn fits(what: &str, memory: &Memory) -> anyhow::Result<()> {
    fit::fits(what, memory, benches::available_memory()).map_err(|line| fail(Exit::Unfit, line))
}

/// What formats are compared with.
const BF16: &str = "bf16";

/// What a format came to.
pub(crate) struct Format {
    pub(crate) number: String,
    /// What it keeps keys and values in.
    pub(crate) kept: Option<Kept>,
    /// What its engine needs, of several models the most.
    pub(crate) memory: Memory,
    /// What the next tokens cost the engine in bf16, nats, if they are known.
    pub(crate) nll: Option<f64>,
    /// The logarithm of how many tokens there are: what one costs that nothing is known of.
    pub(crate) ln_vocabulary: f64,
    pub(crate) told: Vec<Told>,
}

impl Format {
    /// Bytes of the weights as it has them.
    pub(crate) fn weights(&self) -> u64 {
        self.memory.mapped.saturating_add(self.memory.owned)
    }

    pub(crate) fn ok(&self) -> bool {
        self.told.iter().all(Told::ok)
    }

    /// The same format over other weights too: what its tokens cost is then no one number.
    pub(crate) fn join(&mut self, other: Format) {
        if self.memory.must_fit() < other.memory.must_fit() {
            self.memory = other.memory;
        }
        self.nll = None;
        self.told.extend(other.told);
    }

    pub(crate) fn exit(&self) -> Exit {
        if self.ok() { Exit::Ok } else { Exit::Wrong }
    }
}

/// Asks every format every text, one engine at a time, and then those who judge, at once.
pub(crate) fn formats(asked: &Asked<'_>, out: &Out) -> anyhow::Result<Vec<Format>> {
    let stated = asked.check()?;
    let judges = asked.numbers.len() + usize::from(matches!(asked.right, Right::Reference(_)));
    let layers = asked.weights.config().num_hidden_layers();
    let steps = (asked.numbers.len() + 1 + judges) * asked.texts.len() * layers;
    let bar = out.bar(steps as u64, asked.name, false);
    let ended = formats_under(asked, &stated, &bar, out);
    bar.finish_and_clear();
    ended
}

fn formats_under(
    asked: &Asked<'_>,
    stated: &[Memory],
    bar: &ProgressBar,
    out: &Out,
) -> anyhow::Result<Vec<Format>> {
    let blame = |error: Error| {
        if error.to_string() == INTERRUPTED {
            fail(Exit::Interrupted, INTERRUPTED)
        } else {
            (asked.blame)(&error)
        }
    };
    let watch: Watch = Arc::new({
        let bar = bar.clone();
        move || {
            bar.inc(1);
            !out::interrupted()
        }
    });
    let all = |engine: &mut dyn Engine| {
        let watch = watch.clone();
        engine.watch(Box::new(move |_| watch()));
        let said = asked.texts.iter().map(|text| text.asked(engine)).collect::<Result<_, _>>();
        said.map_err(blame)
    };
    let plain = benches::engine("cpu", BF16, asked.plain().clone(), None);
    let bf16: Vec<Answer> = all(&mut *plain.map_err(refuse)?)?;
    let bf16: Vec<Array2<f32>> = bf16.into_iter().map(|answer| answer.logits).collect();
    let mut said: Vec<Vec<Said>> = Vec::new();
    let mut judges = Vec::new();
    for number in asked.numbers {
        let mut engine = asked.engine(number, out)?;
        let plan: Plan = engine.plan();
        if asked.plant.is_some() {
            drop(engine);
            engine = asked.engine(coarser(number).map_err(refuse)?, out)?;
        }
        let own: Vec<Answer> = all(&mut *engine)?;
        let beside = asked.texts.iter().zip(&own).zip(&bf16);
        said.push(beside.map(|((text, own), bf16)| Said::new(text, own, bf16)).collect());
        judges.push(Judge::emulated(&asked.weights, number, plan).map_err(refuse)?);
    }
    let nll: Vec<_> =
        asked.texts.iter().zip(&bf16).filter_map(|(text, bf16)| text.nll(bf16)).collect();
    let nll = benches::formats::Mean::of(nll.iter()).map(|nll| nll.mean);
    drop(bf16);
    if let Right::Reference(weights) = &asked.right {
        judges.push(Judge::Right(weights.clone()));
    }
    let mut judged = judgements(&judges, &asked.texts, &watch).map_err(blame)?;
    let right = match &asked.right {
        Right::Recorded(right) => right.clone(),
        Right::Reference(_) => judged.pop().unwrap_or_default(),
    };
    let ln_vocabulary = (asked.weights.config().vocab_size as f64).ln();
    let all = asked.numbers.iter().zip(stated).zip(said).zip(judged);
    let format = |(((number, stated), said), emulated): (((&String, &Memory), Vec<Said>), _)| {
        let emulated: Vec<Array2<f32>> = emulated;
        let each = asked.texts.iter().zip(said).zip(&right).zip(&emulated);
        let told =
            each.map(|(((text, said), right), emulated)| Told::new(text, said, right, emulated));
        let kept = asked.keeps.number(number).keeps(asked.engine);
        let (number, told) = (number.clone(), told.collect());
        Format { number, kept, memory: *stated, nll, ln_vocabulary, told }
    };
    let mut formats: Vec<Format> = all.map(format).collect();
    for (format, judge) in formats.iter_mut().zip(&judges) {
        let over = format.told.iter().enumerate().filter(|(_, told)| !told.ok());
        let over: Vec<usize> = over.map(|(i, _)| i).collect();
        let texts: Vec<Text> = over.iter().map(|&i| asked.texts[i].clone()).collect();
        if texts.is_empty() {
            continue;
        }
        for said in judgements(&judge.in_other_orders(), &texts, &watch).map_err(blame)? {
            for ((&i, text), emulated) in over.iter().zip(&texts).zip(&said) {
                format.told[i].also(text, &right[i], emulated);
            }
        }
        for (&i, text) in over.iter().zip(&texts) {
            if !format.told[i].ok() {
                format.told[i].follow(judge, text, &right[i], &watch).map_err(blame)?;
            }
        }
    }
    Ok(formats)
}
