//! `karat compare`: logits of any engine against a recording or another file.

mod asked;
pub(crate) mod read;
mod tell;

use std::path::PathBuf;

use benches::verify::Rule;
use golden::{
    compare::{
        Bound,
        listed::{self, Row},
        logits::{Allowed, Distance, distance},
    },
    recording::{Noise, Recording},
};
use ndarray::{Array2, Array3, s};
use serde_json::json;

use crate::{
    exit::{Exit, fail, refuse},
    out::Out,
};
use asked::{Asked, Want};
use read::{File, Part, Said};

/// Hold the logits of any engine against a recording, or against another file.
///
/// GOT is safetensors as `karat logits` writes it: logits f32 [B, T, V], and input_ids i64 [B, T] that
/// say which tokens were fed. An engine that lists the most likely tokens only writes topk_ids
/// i64 [B, T, K] (-1 where fewer are listed) and topk_logprobs f32 [B, T, K] in place of logits. One that
/// answers some positions only adds positions i64 [B, R], the columns that its R rows stand for. Of a
/// recording with several prompts the names begin with the prompt: P/logits, P/input_ids. Where the
/// recording has them, step_logits (with generated) and mtp_logits are compared too. docs/compare.md has a
/// script for each engine.
///
/// What is allowed follows from the recording's own noise: `karat explain plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// safetensors of the engine
    got: PathBuf,
    /// safetensors to compare with: logits f32 [B, T, V], optionally input_ids and attention_mask
    #[arg(required_unless_present = "golden", conflicts_with = "golden")]
    want: Option<PathBuf>,
    /// A recording to compare with
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,
    /// Which prompts of the recording, instead of all
    #[arg(long, requires = "golden", value_name = "P", value_delimiter = ',')]
    prompt: Vec<String>,
    /// How the engine computes: what it may be off follows from this and from the recording
    #[arg(long, value_enum, default_value = "f32")]
    plan: Plan,
}

/// What the engine computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Plan {
    /// Weights widened, everything in f32: four times the recording's noise against double.
    F32,
    /// Everything in double: twice that noise.
    F64,
    /// Activations in bf16: twice as far off as the official bf16 run was.
    Bf16,
}

impl Plan {
    fn name(self) -> &'static str {
        match self {
            Plan::F32 => "f32",
            Plan::F64 => "f64",
            Plan::Bf16 => "bf16",
        }
    }

    /// The rule, and which of the recorded noises it multiplies.
    fn rule(self) -> (Rule, &'static str) {
        match self {
            Plan::F32 => (Rule::F32, "f64"),
            Plan::F64 => (Rule::F64, "f64"),
            Plan::Bf16 => (Rule::BF16, "bf16"),
        }
    }

    fn allowed(self, noise: Noise) -> Allowed {
        match self.rule().0.bound(noise) {
            Bound::Relative { rel_rms, worst_token } => Allowed { rel_rms, worst_row: worst_token },
            // A rule on noise is relative; what is not would allow nothing.
            Bound::Exact | Bound::Twice { .. } | Bound::Derived { .. } => {
                Allowed { rel_rms: 0.0, worst_row: 0.0 }
            }
        }
    }
}

/// One tap of one prompt, compared.
struct Compared {
    prompt: Option<String>,
    tap: &'static str,
    plan: Plan,
    /// The noise that the plan multiplies.
    noise: Noise,
    allowed: Allowed,
    distance: Distance,
    /// Sequence and column of each row.
    places: Vec<(usize, usize)>,
}

/// Taps that hold logits.
const TAPS: [&str; 3] = ["logits", "step_logits", "mtp_logits"];

pub(crate) fn run(args: &Args, out: &Out) -> anyhow::Result<Exit> {
    let got = File::open(&args.got)?;
    got.check()?;
    let mut all = Vec::new();
    match (&args.golden, &args.want) {
        (Some(dir), _) => {
            let recording =
                Recording::open(dir).map_err(|e| fail(Exit::Recording, e.to_string()))?;
            for id in prompts(args, &recording, &got)? {
                let part = got.part(Some(&id))?;
                for tap in TAPS {
                    // The logits of the prompt have to be there; the others are extras.
                    if tap != "logits" && !part.has(tap) {
                        continue;
                    }
                    let Some(asked) = Asked::recorded(&recording, &id, tap)? else {
                        out.note(&format!("{id}/{tap}: not in the recording, not compared"));
                        continue;
                    };
                    fed(&part, &asked, tap, out)?;
                    let (_, kind) = args.plan.rule();
                    let name = format!("{id}/{tap}");
                    let noise = recording.noise_of(&name, kind);
                    if args.plan == Plan::Bf16 && noise.is_none() {
                        return Err(refuse(format!(
                            "--plan bf16: {}: no bf16 run of {name} was recorded, so nothing says what bf16 may be off",
                            dir.display()
                        )));
                    }
                    let noise = noise.unwrap_or_default();
                    all.push(compare(args.plan, Some(id.clone()), tap, &part, &asked, noise)?);
                }
            }
        }
        (None, Some(path)) => {
            if args.plan == Plan::Bf16 {
                return Err(refuse(
                    "--plan bf16: a file has no noise of its own; --golden DIR names a recording that has",
                ));
            }
            let (file, part) = (File::open(path)?, got.part(None)?);
            let other = file.part(None)?;
            for tap in TAPS {
                if tap != "logits" && !(part.has(tap) && other.has(tap)) {
                    continue;
                }
                let asked = Asked::said(&other, &part, tap)?;
                fed(&part, &asked, tap, out)?;
                all.push(compare(args.plan, None, tap, &part, &asked, Noise::default())?);
            }
        }
        (None, None) => return Err(refuse("compare: a file or --golden")),
    }
    let right = all.iter().filter(|compared| compared.distance.ok()).count();
    for compared in &all {
        tell::tell(out, compared);
    }
    if 1 < all.len() {
        out.line(&format!("{right} of {} the same", all.len()));
        out.json(&json!({"schema": "karat.result/1", "kind": "summary", "rows": all.len(), "passed": right}));
    }
    Ok(if right == all.len() { Exit::Ok } else { Exit::Wrong })
}

/// The prompts that are meant: those that were named, all of a recording where the file names them,
/// the only one there is.
fn prompts(args: &Args, recording: &Recording, got: &File) -> anyhow::Result<Vec<String>> {
    let known: Vec<String> =
        recording.manifest.prompts.iter().map(|prompt| prompt.id.clone()).collect();
    let refused = |what: &str| {
        let dir = recording.dir.display();
        refuse(format!("{dir}: --prompt: {what}expected one of {}", known.join(", ")))
    };
    if known.is_empty() {
        let dir = recording.dir.display();
        return Err(refuse(format!("{dir}: a recording of no whole model: it has no logits")));
    }
    if let Some(other) = args.prompt.iter().find(|id| !known.contains(id)) {
        return Err(refused(&format!("no prompt {other}, ")));
    }
    let plain = got.is_plain()?;
    match (&args.prompt[..], &known[..]) {
        ([_], _) => Ok(args.prompt.clone()),
        ([], [_]) => Ok(known),
        // Nameless logits are of one prompt.
        _ if plain => Err(refused("")),
        ([], _) => Ok(known),
        _ => Ok(args.prompt.clone()),
    }
}

/// Whether the engine was fed what was asked, as far as its file says.
fn fed(part: &Part<'_>, asked: &Asked, tap: &str, out: &Out) -> anyhow::Result<()> {
    let name = part.name("input_ids");
    if let (Some(mine), Some(want)) = (part.prompt()?, &asked.prompt) {
        if (mine.tokens.len(), mine.columns) != (want.tokens.len(), want.columns) {
            return Err(part.wrong(format!(
                "tensor {name}: expected shape [{}, {}], got [{}, {}]",
                want.tokens.len(),
                want.columns,
                mine.tokens.len(),
                mine.columns
            )));
        }
        if let Some(row) = (0..mine.tokens.len()).find(|&i| mine.padding[i] != want.padding[i]) {
            return Err(part.wrong(format!(
                "tensor {}: row {row}: {} columns of padding, {} were asked",
                part.name("attention_mask"),
                mine.padding[row],
                want.padding[row]
            )));
        }
        for (row, (mine, want)) in mine.tokens.iter().zip(&want.tokens).enumerate() {
            if let Some(at) = (0..mine.len()).find(|&at| mine[at] != want[at]) {
                return Err(part.wrong(format!(
                    "tensor {name}: row {row}: token {at} is {}, {} was asked: logits after other tokens cannot be compared",
                    mine[at], want[at]
                )));
            }
        }
    } else if asked.prompt.is_some() && tap == "logits" {
        out.note(&format!("{name}: missing, so that the right tokens were fed is taken on trust"));
    }
    if tap == "step_logits"
        && let Some(want) = &asked.generated
    {
        let name = part.name("generated");
        match part.integers("generated")? {
            None => out.note(&format!(
                "{name}: missing, so that the right tokens were fed is taken on trust"
            )),
            Some(mine) if mine != *want => {
                return Err(part.wrong(format!(
                    "tensor {name}: other tokens were generated than asked: logits after them cannot be compared; feed those of the recording"
                )));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Pairs the rows of both, and measures.
fn compare(
    plan: Plan,
    prompt: Option<String>,
    tap: &'static str,
    part: &Part<'_>,
    asked: &Asked,
    noise: Noise,
) -> anyhow::Result<Compared> {
    let said = part.said(tap)?;
    let pairs = pair(tap, part, asked, &said)?;
    let allowed = plan.allowed(noise);
    let next: Vec<Option<u32>> =
        pairs.iter().map(|&(i, column, _)| asked.next[i][column]).collect();
    let distance = match (&asked.want, &said) {
        (Want::Logits(want), Said::Logits(got)) => {
            if got.dim().2 != want.dim().2 {
                return Err(part.wrong(format!(
                    "tensor {}: vocabulary of {}, expected {}, shape {:?}; rows that only pad a head are cut off first",
                    part.name(tap),
                    got.dim().2,
                    want.dim().2,
                    want.shape()
                )));
            }
            let want = gather(want, pairs.iter().map(|&(i, column, _)| (i, column)));
            let got = gather(got, pairs.iter().map(|&(i, _, row)| (i, row)));
            distance(&want.view(), &got.view(), &next, allowed)
        }
        (want, got) => {
            let (mut rows, mut scales) = (Vec::new(), Vec::new());
            for &(i, column, _) in &pairs {
                let (row, scale) = want.row(i, column);
                rows.push(row);
                scales.push(scale);
            }
            let mine: Vec<Row> = pairs
                .iter()
                .map(|&(i, _, row)| match got {
                    Said::Logits(x) => {
                        Row::Logits(x.slice(s![i, row, ..]).iter().map(|&x| f64::from(x)).collect())
                    }
                    Said::Listed(rows) => rows[i][row].clone(),
                })
                .collect();
            if let Some(at) =
                mine.iter().position(|row| matches!(row, Row::Listed(x) if x.is_empty()))
            {
                let (i, column, _) = pairs[at];
                return Err(part.wrong(format!(
                    "{}: row {i}, column {column}: nothing is listed; leave it out and name the others in positions",
                    part.name(tap)
                )));
            }
            let outside = |row: &Row| match row {
                Row::Listed(entries) => entries
                    .iter()
                    .find(|(id, _)| want.vocabulary().is_some_and(|v| v <= *id as usize))
                    .map(|(id, _)| *id),
                Row::Logits(_) => None,
            };
            if let Some(id) = mine.iter().find_map(outside) {
                return Err(part.wrong(format!(
                    "{}: token {id} is outside the vocabulary of {}",
                    part.name(tap),
                    want.vocabulary().unwrap_or(0)
                )));
            }
            listed::distance(&rows, &mine, &scales, &next, allowed)
        }
    };
    let places = pairs.iter().map(|&(i, column, _)| (i, column)).collect();
    Ok(Compared { prompt, tap, plan, noise, allowed, distance, places })
}

/// Sequence, column and the engine's row of everything that is compared.
fn pair(
    tap: &str,
    part: &Part<'_>,
    asked: &Asked,
    said: &Said,
) -> anyhow::Result<Vec<(usize, usize, usize)>> {
    let ((b, t), (mine, r)) = (asked.want.dim(), said.dim());
    let positions = if tap == "logits" { part.integers("positions")? } else { None };
    let shape = |dim: (usize, usize)| match (said, asked.want.vocabulary()) {
        (Said::Logits(x), v) => vec![dim.0, dim.1, v.unwrap_or(x.dim().2)],
        (Said::Listed(_), _) => vec![dim.0, dim.1],
    };
    let got = match said {
        Said::Logits(x) => x.shape().to_vec(),
        Said::Listed(_) => vec![mine, r],
    };
    let Some(positions) = positions else {
        if (mine, r) != (b, t) {
            return Err(part.wrong(format!(
                "tensor {}: expected shape {:?}, got {got:?}; positions would say which columns {r} rows stand for",
                part.name(tap),
                shape((b, t)),
            )));
        }
        let all = (0..b).flat_map(|i| (asked.padding[i]..t).map(move |column| (i, column, column)));
        return Ok(all.collect());
    };
    let name = part.name("positions");
    if positions.dim() != (mine, r) || mine != b {
        return Err(part.wrong(format!(
            "tensor {name}: expected shape [{b}, {r}], got {:?}, beside logits of shape {got:?}",
            positions.shape()
        )));
    }
    let mut pairs = Vec::new();
    for ((i, row), &column) in positions.indexed_iter() {
        let inside = usize::try_from(column).ok().filter(|&c| asked.padding[i] <= c && c < t);
        let Some(column) = inside else {
            return Err(part.wrong(format!(
                "tensor {name}: row {i}: column {column} is no token, expected {} to {}",
                asked.padding[i],
                t - 1
            )));
        };
        if positions.row(i).iter().take(row).any(|&c| c == column as i64) {
            return Err(part.wrong(format!("tensor {name}: row {i}: column {column} twice")));
        }
        pairs.push((i, column, row));
    }
    Ok(pairs)
}

/// Rows of `[B, T, V]`, one under another.
fn gather(x: &Array3<f32>, rows: impl ExactSizeIterator<Item = (usize, usize)>) -> Array2<f32> {
    let mut all = Array2::zeros((rows.len(), x.dim().2));
    for (mut row, (i, at)) in all.rows_mut().into_iter().zip(rows) {
        row.assign(&x.slice(s![i, at, ..]));
    }
    all
}
