//! `karat bench model`: how fast a model is, beside what the machine can do.

use benches::{
    Kept, Number,
    speed::{self, Depth, Fit, Measured, Options, Place, Row, Samples},
};
use golden::{
    Weights,
    engine::{INTERRUPTED, Memory},
};
use serde_json::json;

use crate::{
    count::tokens,
    exit::{Exit, fail, of_engine, refuse},
    fit,
    out::{self, Out},
    ready::Ready,
};

#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// A checkpoint folder, or synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]
    #[arg(long, env = "KARAT_MODEL")]
    pub(super) model: Option<String>,
    /// What computes: cpu, the fast kernels of this machine, or cuda, its GPU
    #[arg(long, default_value = "cpu", env = "KARAT_ENGINE", value_parser = ["cpu", "cuda"])]
    engine: String,
    /// What projections of the engine are kept in, of cuda f32 or bf16; several are asked in turns
    #[arg(long, value_delimiter = ',', default_value = "bf16", value_name = "f32,bf16,int8,int4")]
    number: Vec<String>,
    /// What it keeps keys and values in, if not f32 for f32 and bf16 for others: of cpu f32, bf16 or int8, of cuda what
    /// its number is or fp8; several are asked in turns with each number
    #[arg(long, value_delimiter = ',', value_name = "f32,bf16,int8,fp8")]
    kv_cache: Vec<Kept>,
    /// Sequences side by side; several are asked in turns
    #[arg(long, value_delimiter = ',', default_value = "1", value_name = "N,N,…", value_parser = sequences)]
    batch: Vec<usize>,
    /// Tokens of each sequence that are fed at once; 0 for none
    #[arg(long, default_value_t = 512, value_name = "N")]
    prefill: usize,
    /// Tokens of each that are fed one by one; 0 for none
    #[arg(long, default_value_t = 64, value_name = "N")]
    decode: usize,
    /// Tokens that the states of each hold before; those states are made up
    #[arg(long, value_delimiter = ',', default_value = "0", value_name = "N,Nk,NM,…", value_parser = tokens)]
    depth: Vec<usize>,
    /// The same, but the states come from feeding so many tokens, as a check of those that are made up
    #[arg(long, value_delimiter = ',', value_name = "N,Nk,NM,…", value_parser = tokens)]
    fed: Vec<usize>,
    /// How often each is asked, beside a first time that is not counted
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    #[command(flatten)]
    ready: Ready,
}

impl Args {
    /// The same on a device, if one is named: its engine has its name.
    pub(super) fn on(&self, device: Option<&str>) -> Args {
        let engine = device.unwrap_or(&self.engine).to_owned();
        Args { engine, ..self.clone() }
    }

    /// The engines that are asked.
    fn numbers(&self) -> Vec<Number<'_>> {
        let kept: Vec<_> = self.kv_cache.iter().copied().map(Some).collect();
        let kept = if kept.is_empty() { vec![None] } else { kept };
        let of = |name| kept.iter().map(move |&kept| Number { name, kept });
        self.number.iter().map(String::as_str).flat_map(of).collect()
    }
}

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let model = args.model.as_deref();
    let model = model.ok_or_else(|| refuse("bench model: expected --model DIR or synthetic:…"))?;
    let weights = golden::open(model).map_err(refuse)?;
    let at = |fed| move |&tokens: &usize| Depth { tokens, fed };
    let options = Options {
        prefill: args.prefill,
        decode: args.decode,
        batches: args.batch.clone(),
        depths: args.depth.iter().map(at(false)).chain(args.fed.iter().map(at(true))).collect(),
        rounds: args.rounds as usize,
        gpu: args.engine == "cuda",
    }
    .once();
    args.ready.check(&args.number)?;
    let numbers = args.numbers();
    let stated = stated(args, &numbers, &options, &*weights)?;
    let mut engines = Vec::new();
    for &number in &numbers {
        engines.push(args.ready.engine(&args.engine, number, &weights, out)?);
    }
    let bar = out.bar(0, "bench", false);
    let ran = speed::run(&mut engines, &options, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        !out::interrupted()
    });
    bar.finish_and_clear();
    let measured = ran.map_err(|e| {
        if e.to_string() == INTERRUPTED {
            fail(Exit::Interrupted, "interrupted")
        } else {
            of_engine(&e)
        }
    })?;
    tell(model, [args.prefill, args.decode], &measured, &stated, out);
    Ok(Exit::Ok)
}

/// What each engine will need at each place, in the order of the rows; refused if not all fits that is
/// held together: weights of all engines, their keys and values at the largest depth of every batch, and
/// states of every place.
fn stated(
    args: &Args,
    numbers: &[Number<'_>],
    options: &Options,
    weights: &dyn Weights,
) -> anyhow::Result<Vec<Stated>> {
    let mut stated = Vec::new();
    let places = options.places();
    for &place in &places {
        let of = |number: &Number<'_>| {
            let demand = options.demand(place, args.ready.narrowed(&args.engine, number.name));
            let memory =
                benches::memory(&args.engine, *number, weights, &demand).map_err(refuse)?;
            anyhow::Ok(memory.unwrap_or_default())
        };
        let own = numbers.iter().map(of).collect::<anyhow::Result<Vec<_>>>()?;
        let all = own.iter().fold(Memory::default(), |all, one| both(&all, one));
        stated.extend(own.into_iter().zip(numbers).map(|(memory, number)| Stated {
            kept: number.keeps(&args.engine),
            memory,
            held: Memory { state: memory.state, cache: memory.cache, ..all },
        }));
    }
    // What is held beside weights: of every batch the pages of its deepest states, which all its depths share, but
    // for those that were fed; and recurrent states of every place, and of one that is going on. A GPU shares nothing:
    // keys and values of every place, and of the one that is going on.
    let (mut cache, mut state) = (0_u64, 0_u64);
    let mut deepest: Option<(Place, &[Stated])> = None;
    let rows: Vec<_> = places.iter().copied().zip(stated.chunks(numbers.len())).collect();
    for own in rows.chunk_by(|(a, _), (b, _)| a.batch == b.batch) {
        let of_kind = |fed| {
            let own = own.iter().filter(move |(place, _)| place.depth.fed == fed);
            own.max_by_key(|(place, _)| place.depth.tokens)
        };
        for (place, stated) in [false, true].into_iter().filter_map(of_kind) {
            cache = cache.saturating_add(caches(stated));
            let size = |place: Place| {
                (place.batch.saturating_mul(place.depth.tokens), place.batch, place.depth.tokens)
            };
            if deepest.is_none_or(|(before, _)| size(before) <= size(*place)) {
                deepest = Some((*place, stated));
            }
        }
        let copies = own.len() as u64 + 1;
        let one = own.first().into_iter().flat_map(|(_, stated)| *stated);
        let one = one.map(|stated| stated.memory.state).fold(0, u64::saturating_add);
        state = state.saturating_add(one.saturating_mul(copies));
    }
    if let Some((place, stated)) = deepest {
        if options.gpu {
            let all = rows.iter().map(|(_, stated)| caches(stated));
            let kept = all.clone().fold(0, u64::saturating_add);
            cache = kept.saturating_add(all.max().unwrap_or_default());
        }
        let scratch = rows.iter().flat_map(|(_, stated)| *stated).map(|one| one.memory.scratch);
        let scratch = scratch.max().unwrap_or_default();
        let all = stated.iter().fold(Memory::default(), |all, one| both(&all, &one.memory));
        let all = Memory { cache, state, scratch, ..all };
        let named: Vec<_> = numbers.iter().map(ToString::to_string).collect();
        let many =
            if place.batch == 1 { String::new() } else { format!("{} sequences ", place.batch) };
        let depth = place.depth.tokens;
        let what = format!("{} in {}, {many}at depth {depth}", args.engine, named.join("; "));
        let available = benches::available(&args.engine).map_err(|e| of_engine(&e))?;
        fit::fits(&what, &all, available).map_err(|line| fail(Exit::Unfit, line))?;
    }
    Ok(stated)
}

/// Keys and values of all engines at a place.
fn caches(stated: &[Stated]) -> u64 {
    stated.iter().map(|one| one.memory.cache).fold(0, u64::saturating_add)
}

/// What two engines of one model hold.
fn both(a: &Memory, b: &Memory) -> Memory {
    Memory {
        // The same map, but for narrowed weights in a file.
        mapped: a.mapped.max(b.mapped),
        owned: a.owned.saturating_add(b.owned),
        state: a.state.saturating_add(b.state),
        cache: a.cache.saturating_add(b.cache),
        scratch: a.scratch.max(b.scratch),
    }
}

/// What was said in advance.
struct Stated {
    /// What keys and values are kept in.
    kept: Option<Kept>,
    /// Of the engine of a row.
    memory: Memory,
    /// What the process holds while it is asked alone: weights of all engines, states of this one.
    held: Memory,
}

impl Stated {
    /// What the process held beyond weights and states; of a GPU these lie elsewhere.
    fn beyond(&self, row: &Row, gpu: bool) -> Option<i64> {
        row.peak.filter(|_| !gpu).map(|peak| peak as i64 - self.held.held() as i64)
    }
}

/// `fed`: tokens that were fed at once, and one by one.
fn tell(model: &str, fed: [usize; 2], measured: &Measured, stated: &[Stated], out: &Out) {
    let Measured { roof, rows, fits } = measured;
    let host = benches::host();
    match (roof.gpu, benches::gpu()) {
        (true, Ok(gpu)) => out.line(&gpu.name),
        _ => out.line(&format!("{}, {} threads", host.cpu, host.threads)),
    }
    out.line(&format!("memory is read at: {} GB/s", shown(roof.read, 1e-9, 0)));
    let kinds = ["f32", "bf16 pairs", "pairs of 16 bits", "bytes"];
    for (kind, samples) in kinds.iter().zip(roof.products) {
        let Some(samples) = samples else { continue };
        out.line(&format!("products of {kind}: {} Gop/s", shown(samples, 1e-9, 0)));
    }
    let cells = |row: &Row| {
        let operations = (row.traffic.products + row.traffic.attention) as f64;
        let steps = |pace: f64| pace / row.place.batch as f64;
        let decode = row.decode.map(|s| (shown(s, 1.0, 1), steps(s.median) * row.step));
        let prefill = row.prefill.map(|s| (shown(s, 1.0, 0), s.median));
        let none = || "-".to_owned();
        let share = |x: f64| format!("{:.0} %", 100.0 * x);
        vec![
            row.engine.clone(),
            row.place.batch.to_string(),
            depth(row),
            prefill.as_ref().map_or_else(none, |(text, _)| text.clone()),
            prefill.map_or_else(none, |(_, pace)| {
                let of = row.least(roof).map(|least| format!(", {}", share(pace * least)));
                format!("{:.0} Gop/s{}", pace * operations / 1e9, of.unwrap_or_default())
            }),
            decode.as_ref().map_or_else(none, |(text, _)| text.clone()),
            decode.map_or_else(none, |(_, pace)| {
                format!("{:.1} GB/s, {}", pace / 1e9, share(pace / row.read.median))
            }),
        ]
    };
    out.table(
        &[
            "engine",
            "batch",
            "depth",
            "prefill, tokens/s",
            "of the products",
            "decode, tokens/s",
            "of memory",
        ],
        &rows.iter().map(cells).collect::<Vec<_>>(),
    );
    let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
    let memory = |(row, stated): (&Row, &Stated)| {
        let Memory { mapped, owned, state, cache, scratch } = stated.memory;
        let none = || "-".to_owned();
        let mut cells = vec![row.engine.clone(), row.place.batch.to_string(), depth(row)];
        cells.extend([mapped, owned, state, cache, scratch].map(|bytes| mib(bytes as f64)));
        cells.push(row.peak.map_or_else(none, |peak| mib(peak as f64)));
        cells.push(stated.beyond(row, roof.gpu).map_or_else(none, |beyond| mib(beyond as f64)));
        cells
    };
    out.line(
        "memory, MiB; the peak is of the whole process, pages of the map that were read included",
    );
    out.table(
        &[
            "engine",
            "batch",
            "depth",
            "weights, mapped",
            "weights, own",
            "states",
            "keys, values",
            "intermediates, at most",
            "peak RSS",
            "peak RSS - (weights + states)",
        ],
        &rows.iter().zip(stated).map(memory).collect::<Vec<_>>(),
    );
    let product = |kind: usize| roof.products[kind].map(samples);
    for (row, stated) in rows.iter().zip(stated) {
        out.json(&json!({"schema": "karat.result/1", "kind": "bench", "model": model,
            "cpu": host.cpu, "threads": host.threads, "engine": row.engine,
            "falls_back": row.falls_back, "kv_cache": stated.kept.map(Kept::name),
            "batch": row.place.batch, "depth": row.place.depth.tokens, "fed": row.place.depth.fed,
            "gpu": roof.gpu.then(|| benches::gpu().as_ref().map(|gpu| &*gpu.name).ok()),
            "read_bytes_per_second": samples(row.read), "f32_per_second": product(0),
            "bf16_per_second": product(1), "int16_per_second": product(2),
            "int8_per_second": product(3),
            "prefill_tokens_per_second": row.prefill.map(samples),
            "decode_tokens_per_second": row.decode.map(samples), "traffic": row.traffic,
            "step_bytes": row.step, "prefill": fed[0], "decode": fed[1],
            "prefill_samples": row.taken[0], "decode_samples": row.taken[1],
            "least_prefill_seconds_per_token": row.least(roof),
            "memory_needed": stated.memory, "peak_rss_bytes": row.peak,
            "peak_rss_beyond_bytes": stated.beyond(row, roof.gpu)}));
    }
    lines(fits, &rows.iter().zip(stated).collect::<Vec<_>>(), out);
}

fn depth(row: &Row) -> String {
    let Depth { tokens, fed } = row.place.depth;
    format!("{tokens}{}", if fed { ", fed" } else { "" })
}

/// As many as a grid of blocks takes.
fn sequences(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(many @ 1..=65_535) => Ok(many),
        _ => Err("expected a number of sequences from 1 to 65535".to_owned()),
    }
}

/// How the time of a token grows with the context.
fn lines(fits: &[Fit], rows: &[(&Row, &Stated)], out: &Out) {
    if fits.is_empty() {
        return;
    }
    out.line("the time of a step of one token of each sequence after T others, as a + b T");
    let cells = |fit: &Fit| {
        vec![
            fit.engine.clone(),
            fit.batch.to_string(),
            format!("{:.2} ms", fit.a * 1e3),
            format!("{:.2} ns", fit.b * 1e9),
            format!("{:.2} ns, {:.2}", fit.bytes * 1e9, fit.b / fit.bytes),
            format!("{:+.1} % at {}", fit.worst.0 * 100.0, fit.worst.1),
        ]
    };
    out.table(
        &["engine", "batch", "a", "b", "b of the bytes, b over it", "furthest from the line"],
        &fits.iter().map(cells).collect::<Vec<_>>(),
    );
    let kept = |fit: &Fit| {
        let own = rows.iter().find(|(row, _)| row.engine == fit.engine);
        own.and_then(|(_, stated)| stated.kept).map(Kept::name)
    };
    for fit in fits {
        out.json(&json!({"schema": "karat.result/1", "kind": "bench_fit", "engine": fit.engine,
            "kv_cache": kept(fit), "batch": fit.batch, "depths": fit.depths, "seconds_at_none": fit.a, "seconds_per_token": fit.b,
            "seconds_per_token_of_bytes": fit.bytes, "furthest": fit.worst.0,
            "furthest_depth": fit.worst.1}));
    }
}

fn samples(x: Samples) -> serde_json::Value {
    json!({"min": x.min, "median": x.median, "max": x.max})
}

/// Median, least and most.
fn shown(samples: Samples, unit: f64, digits: usize) -> String {
    let [min, median, max] = [samples.min, samples.median, samples.max].map(|x| x * unit);
    format!("{median:.digits$} [{min:.digits$}..{max:.digits$}]")
}
