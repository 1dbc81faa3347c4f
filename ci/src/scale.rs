//! `karat scale`: how the time and the memory of a token grow with the context.

use std::sync::Arc;

use benches::{
    Kept, Number,
    scale::{self, CONTEXTS, Cliff, Curve, Grown, Options, Scaled, Value},
};
use golden::{
    Weights,
    config::Mixer,
    engine::{INTERRUPTED, Memory},
    weights::OneLayer,
};
use serde_json::{Value as Json, json};

use crate::{
    count::{shown, tokens},
    exit::{Exit, fail, of_engine, refuse},
    fit,
    out::{self, Out},
    ready::Ready,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A checkpoint folder, or synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]
    #[arg(long, env = "KARAT_MODEL")]
    model: String,
    /// What computes: cpu, the fast kernels of this machine, or cuda, its GPU
    #[arg(
        long,
        visible_alias = "device",
        default_value = "cpu",
        env = "KARAT_ENGINE",
        value_parser = ["cpu", "cuda"]
    )]
    engine: String,
    /// What projections of the engine are kept in, of cuda f32 or bf16; several are asked one after another
    #[arg(long, value_delimiter = ',', default_value = "bf16", value_name = "f32,bf16,int8,int4")]
    number: Vec<String>,
    /// What it keeps keys and values in, if not f32 for f32 and bf16 for others: of cpu f32, bf16 or int8, of cuda what
    /// its number is or fp8; several are asked one after another with each number
    #[arg(long, value_delimiter = ',', value_name = "f32,bf16,int8,fp8")]
    kv_cache: Vec<Kept>,
    /// Tokens before; their states are made up. Without it 1k, 2k, … 1M, as far as memory reaches
    #[arg(long, value_delimiter = ',', value_name = "N,Nk,NM,…", value_parser = tokens)]
    context: Vec<usize>,
    /// Tokens that are timed after each context in a round
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// How often each context is asked, beside a first time that is not counted
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Ask one layer of each kind (attention, gdn) in place of the whole model: reaches where that does not fit
    #[arg(long, conflicts_with = "cache")]
    layers: bool,
    #[command(flatten)]
    ready: Ready,
}

/// The whole model, or a layer of it.
struct Part {
    name: &'static str,
    layer: Option<usize>,
    weights: Arc<dyn Weights>,
}

impl Part {
    /// For people.
    fn said(&self) -> String {
        self.layer.map_or_else(|| self.name.to_owned(), |layer| format!("{} {layer}", self.name))
    }
}

/// A context that does not fit, and what it would take.
struct Refused {
    context: usize,
    needed: u64,
    available: u64,
}

/// An engine in front of contexts.
struct Asked<'a> {
    args: &'a Args,
    part: &'a Part,
    number: Number<'a>,
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let weights = golden::open(&args.model).map_err(refuse)?;
    args.ready.check(&args.number)?;
    let parts = parts(args, &weights)?;
    let kept: Vec<_> = args.kv_cache.iter().copied().map(Some).collect();
    let kept = if kept.is_empty() { vec![None] } else { kept };
    let number = |name| kept.iter().map(move |&kept| Number { name, kept });
    let numbers = args.number.iter().map(String::as_str).flat_map(number);
    let asked = |number| parts.iter().map(move |part| Asked { args, part, number });
    let all: Vec<Asked<'_>> = numbers.flat_map(asked).collect();
    // What cannot be asked is refused before anything runs.
    all.iter().try_for_each(|asked| asked.fitting(&[0]).map(drop))?;
    let mut exit = Exit::Ok;
    for asked in &all {
        exit = exit.gravest(asked.run(out)?);
    }
    Ok(exit)
}

fn parts(args: &Args, weights: &Arc<dyn Weights>) -> anyhow::Result<Vec<Part>> {
    if !args.layers {
        return Ok(vec![Part { name: "model", layer: None, weights: weights.clone() }]);
    }
    let first = |(name, mixer)| {
        let one = OneLayer::first(weights.clone(), mixer)?;
        Some(Part { name, layer: Some(one.layer()), weights: Arc::new(one) })
    };
    let kinds = [("attention layer", Mixer::Full), ("gdn layer", Mixer::Linear)];
    let parts: Vec<_> = kinds.into_iter().filter_map(first).collect();
    if parts.is_empty() {
        return Err(refuse(format!("{}: no layers", args.model)));
    }
    Ok(parts)
}

/// The contexts that are asked where nobody says which.
fn ladder() -> Vec<usize> {
    (10..=20).map(|power| 1 << power).collect()
}

impl Asked<'_> {
    fn run(&self, out: &Out) -> anyhow::Result<Exit> {
        let Asked { args, part, number } = *self;
        let mut contexts = if args.context.is_empty() { ladder() } else { args.context.clone() };
        contexts.sort_unstable();
        contexts.dedup();
        let (memory, refused) = self.fitting(&contexts)?;
        contexts.truncate(memory.len());
        let what = format!("{} in {number}, {}", args.engine, part.said());
        for Refused { context, needed, available } in &refused {
            out.note(&format!(
                "karat: memory: {what}, context {}: needs {}, the machine has {} available; left out",
                shown(*context),
                fit::size(*needed),
                fit::size(*available),
            ));
        }
        if contexts.is_empty() {
            return Err(fail(Exit::Unfit, format!("memory: {what}: no context fits")));
        }
        let mut engine = args.ready.engine(&args.engine, number, &part.weights, out)?;
        let options = Options {
            contexts,
            tokens: args.tokens as usize,
            rounds: args.rounds as usize,
            gpu: args.engine == "cuda",
        };
        let bar = out.bar(0, &part.said(), false);
        let ran = scale::run(&mut *engine, &options, &mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            !out::interrupted()
        });
        bar.finish_and_clear();
        let scaled = ran.map_err(|e| {
            if e.to_string() == INTERRUPTED {
                fail(Exit::Interrupted, "interrupted")
            } else {
                of_engine(&e)
            }
        })?;
        let states: Vec<u64> = memory.iter().map(|memory| memory.state + memory.cache).collect();
        out.line(&said(&part.said(), &scaled));
        out.table(
            &["context", "ms per token", "of the curve", "memory, MiB", "states, MiB"],
            &cells(&scaled, &states),
        );
        for line in told(&scaled) {
            out.line(&line);
        }
        out.json(&self.row(&scaled, &states, &refused));
        // Who named a context wanted to know of it; the ladder goes as far as it goes.
        let left_out = !args.context.is_empty() && !refused.is_empty();
        let exit = if left_out { Exit::Unfit } else { Exit::Ok };
        Ok(exit.gravest(verdict(&scaled)))
    }

    /// What each context takes, as far as they fit; and those that do not.
    fn fitting(&self, contexts: &[usize]) -> anyhow::Result<(Vec<Memory>, Vec<Refused>)> {
        let Asked { args, part, number } = *self;
        let narrowed = args.ready.narrowed(&args.engine, number.name);
        let at = |context| {
            let demand = scale::demand(context, args.tokens as usize, narrowed);
            let memory = benches::memory(&args.engine, number, &*part.weights, &demand);
            anyhow::Ok(memory.map_err(refuse)?.unwrap_or_default())
        };
        let least = at(0)?.cache;
        let available = benches::available(&args.engine).map_err(|e| of_engine(&e))?;
        let (mut fitting, mut refused) = (Vec::new(), Vec::new());
        for (i, &context) in contexts.iter().enumerate() {
            let memory = at(context)?;
            // Copies of states share the pages that are full; a GPU keeps none.
            let copies = if args.engine == "cuda" { 0 } else { i as u64 + 2 };
            let held = Memory {
                state: memory.state.saturating_mul(copies + 1),
                cache: memory.cache.saturating_add(least.saturating_mul(copies)),
                ..memory
            };
            match available {
                Some(available) if available < held.must_fit() => {
                    refused.push(Refused { context, needed: held.must_fit(), available });
                }
                _ => fitting.push(memory),
            }
        }
        Ok((fitting, refused))
    }

    fn row(&self, scaled: &Scaled, states: &[u64], refused: &[Refused]) -> Json {
        let Asked { args, part, number } = self;
        let host = benches::host();
        let points = scaled.points.iter().zip(states);
        let points: Vec<_> = points
            .map(|(point, state)| {
                json!({"context": point.context, "ms_per_token": point.seconds * 1e3,
                    "samples_ns": point.samples, "memory_bytes": point.memory, "state_bytes": state})
            })
            .collect();
        let cliff = |cliff: &Cliff| {
            json!({"context": cliff.context, "factor": cliff.factor.of, "factor_error": cliff.factor.error,
                "lasting": cliff.lasting})
        };
        let gpu =
            (args.engine == "cuda").then(|| benches::gpu().as_ref().map(|gpu| &*gpu.name).ok());
        json!({"schema": "karat.result/1", "kind": "scale", "model": args.model, "cpu": host.cpu,
            "threads": host.threads, "gpu": gpu, "engine": scaled.engine, "number": number.name,
            "kv_cache": number.keeps(&args.engine).map(Kept::name),
            "part": part.name, "layer": part.layer,
            "read_bytes_per_second": {"min": scaled.read.min, "median": scaled.read.median, "max": scaled.read.max},
            "b_over_least": scaled.over.map(|over| json!({"of": over.of, "error": over.error})),
            "points": points, "fit": scaled.fit.as_ref().map(|fit| fitted(fit, &scaled.grown)),
            "memory_fit": scaled.memory.as_ref().map(curve),
            "cliffs": scaled.cliffs.as_ref().map(|all| all.iter().map(cliff).collect::<Vec<_>>()),
            "refused": refused.iter().map(|refused| json!({"context": refused.context,
                "needed_bytes": refused.needed, "available_bytes": refused.available})).collect::<Vec<_>>()})
    }
}

/// How it ends: a cliff is an alarm.
fn verdict(scaled: &Scaled) -> Exit {
    let none = scaled.cliffs.as_ref().is_none_or(Vec::is_empty);
    if none { Exit::Ok } else { Exit::Slower }
}

/// `a + b T + …`, with errors.
fn curve(curve: &Curve) -> Json {
    let names = ["a", "b", "c"];
    let of = |value: fn(&Value) -> f64| {
        let all = names
            .iter()
            .zip(&curve.factors)
            .map(|(name, own)| ((*name).to_owned(), json!(value(own))));
        all.collect::<serde_json::Map<_, _>>()
    };
    let mut all = of(|value| value.of);
    all.insert("errors".to_owned(), of(|value| value.error).into());
    all.insert("residual".to_owned(), json!(curve.residual));
    all.insert("furthest".to_owned(), json!(curve.furthest.0));
    all.insert("furthest_context".to_owned(), json!(curve.furthest.1));
    all.into()
}

fn fitted(fit: &scale::Fit, grown: &Grown) -> Json {
    let mut all = curve(&fit.square);
    all["exponent"] = json!(fit.exponent.map(|p| p.of));
    all["exponent_error"] = json!(fit.exponent.map(|p| p.error));
    all["expected_b"] = json!(grown.read);
    all["expected_b_of_products"] = json!(grown.multiplied);
    all["noise"] = json!(fit.noise);
    all["line"] = curve(&fit.line);
    all
}

/// What stands above the table.
fn said(part: &str, scaled: &Scaled) -> String {
    let [min, median, max] =
        [scaled.read.min, scaled.read.median, scaled.read.max].map(|pace| pace * 1e-9);
    let read = format!("{median:.0} [{min:.0}..{max:.0}] GB/s");
    format!("{}, {part}; memory is read at {read}", scaled.engine)
}

fn cells(scaled: &Scaled, states: &[u64]) -> Vec<Vec<String>> {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    let row = |(point, &state): (&scale::Point, &u64)| {
        let all = point.samples.iter().flatten().map(|&ns| ns as f64 * 1e-6);
        let (min, max) = (all.clone().fold(f64::INFINITY, f64::min), all.fold(0.0, f64::max));
        let context = point.context;
        let curve = scaled.fit.as_ref().map(|fit| point.seconds / fit.square.at(context) - 1.0);
        let mut off = curve.map_or_else(|| "-".to_owned(), |off| format!("{:+.1} %", 100.0 * off));
        if scaled.cliffs.iter().flatten().any(|cliff| cliff.context == context) {
            off.push_str(", CLIFF");
        }
        vec![
            shown(context),
            format!("{:.3} [{min:.3}..{max:.3}]", point.seconds * 1e3),
            off,
            point.memory.map_or_else(|| "-".to_owned(), mib),
            mib(state),
        ]
    };
    scaled.points.iter().zip(states).map(row).collect()
}

/// What stands below it: the fit in words, and cliffs.
fn told(scaled: &Scaled) -> Vec<String> {
    let with = |value: &Value, unit: f64, digits: usize| {
        format!("{:.digits$} ± {:.digits$}", value.of * unit, value.error * unit)
    };
    let mut lines = Vec::new();
    let Some(fit) = &scaled.fit else {
        lines.push("fewer than three contexts: no curve is fitted".to_owned());
        return lines;
    };
    let [a, b, c] = &fit.square.factors[..] else { return lines };
    lines.push(format!(
        "a token after T others: {} ms + {} ns T + {} ns T (T / 1M); off by {:.1} % (rms), {:+.1} % at {}",
        with(a, 1e3, 3),
        with(b, 1e9, 2),
        with(c, 1e9 * f64::from(1 << 20), 2),
        100.0 * fit.square.residual,
        100.0 * fit.square.furthest.0,
        shown(fit.square.furthest.1),
    ));
    let slope = &fit.line.factors[1];
    let grown @ Grown { read, multiplied, .. } = scaled.grown;
    let products =
        multiplied.map_or(String::new(), |seconds| format!(", its products {:.2}", seconds * 1e9));
    let beside = scaled.over.map_or(String::new(), |over| {
        format!(", every turn by the paces beside it {}", with(&over, 1.0, 2))
    });
    let over = if 0.0 < grown.least() {
        format!(
            "; reading its bytes takes {:.2} ns{products}: {:.2} of the larger{beside}",
            read * 1e9,
            slope.of / grown.least()
        )
    } else {
        "; nothing is read for it".to_owned()
    };
    lines.push(format!(
        "as a line: {} ms + {} ns T{over}; off by {:.1} % (rms)",
        with(&fit.line.factors[0], 1e3, 3),
        with(slope, 1e9, 2),
        100.0 * fit.line.residual,
    ));
    lines.push(match &fit.exponent {
        Some(p) => format!("what grows, grows as T to the power {}", with(p, 1.0, 3)),
        None => "no exponent: nothing grows by more than its error, or too few contexts".to_owned(),
    });
    if let Some(memory) = &scaled.memory {
        lines.push(format!(
            "memory: {} MiB + {} bytes T",
            with(&memory.factors[0], 1.0 / f64::from(1 << 20), 1),
            with(&memory.factors[1], 1.0, 1),
        ));
    }
    match &scaled.cliffs {
        None => lines.push(format!("cliffs: fewer than {CONTEXTS} contexts cannot tell")),
        Some(all) if all.is_empty() => lines.push("cliffs: none".to_owned()),
        Some(all) => lines.extend(all.iter().map(|cliff| {
            format!(
                "CLIFF at {}: {} times slower than the curve through the others, {}",
                shown(cliff.context),
                with(&cliff.factor, 1.0, 2),
                if cliff.lasting { "from there on" } else { "there alone" },
            )
        })),
    }
    lines
}

#[cfg(test)]
mod tests {
    use benches::{
        scale::{Cliff, Grown, Point, Scaled, Value},
        speed::Samples,
    };

    use super::{cells, told, verdict};
    use crate::exit::Exit;

    #[test]
    fn a_cliff_is_an_alarm() {
        let point = |context, seconds| Point {
            context,
            seconds,
            samples: vec![vec![1_000_000, 3_000_000]],
            memory: Some(5 << 20),
        };
        let mut scaled = Scaled {
            engine: "cpu".to_owned(),
            read: Samples { min: 1e9, median: 2e9, max: 3e9 },
            points: vec![point(4096, 0.002), point(1 << 20, 0.004)],
            fit: None,
            memory: None,
            grown: Grown { bytes: 100.0, read: 5e-8, multiplied: None },
            over: None,
            cliffs: None,
        };
        assert_eq!(verdict(&scaled), Exit::Ok);
        scaled.cliffs = Some(vec![]);
        assert_eq!(verdict(&scaled), Exit::Ok);
        let factor = Value { of: 1.5, error: 0.02 };
        scaled.cliffs = Some(vec![Cliff { context: 1 << 20, factor, lasting: true }]);
        assert_eq!(verdict(&scaled), Exit::Slower);
        let cells = cells(&scaled, &[1 << 20, 2 << 20]);
        assert_eq!(cells[0], ["4k", "2.000 [1.000..3.000]", "-", "5.0", "1.0"]);
        assert_eq!(cells[1], ["1M", "4.000 [1.000..3.000]", "-, CLIFF", "5.0", "2.0"]);
        assert_eq!(told(&scaled), ["fewer than three contexts: no curve is fitted"]);
    }
}
