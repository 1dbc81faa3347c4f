//! What `karat paths` and `karat invariance` share: rows as they come, and what they come to.

use std::collections::BTreeMap;

use benches::paths::{Difference, Row};
use serde_json::json;

use crate::{
    block::{head, quoted, told},
    ended::{self, Counts, Skips},
    exit::{Exit, fail},
    keeps::Keeps,
    out::{self, Out},
};

/// Which models, computed by what.
#[derive(Debug, clap::Args)]
pub(crate) struct Models {
    /// Models: a checkpoint folder, or synthetic:PRESET[,layers=N][,experts=E][,dtype=D][,seed=S][,yarn=F]
    #[arg(long, default_values = DEFAULT)]
    pub(crate) model: Vec<String>,
    /// What computes them: reference, cpu, the fast kernels of this machine, or cuda, its GPU
    #[arg(long, default_value = "reference", env = "KARAT_ENGINE")]
    pub(crate) engine: String,
    /// Number type: of the reference f32, f64 for the oracle, or bf16, which emulates the official code in
    /// bf16; of cpu f32 over weights as they are, or over weights narrowed to int8 or int4; of cuda f32 or
    /// bf16
    #[arg(long, default_value = "f32", env = "KARAT_NUMBER")]
    pub(crate) number: String,
    #[command(flatten)]
    pub(crate) keeps: Keeps,
}

/// All layers in step and everything equal, and nothing of it.
const DEFAULT: [&str; 2] = ["synthetic:tiny", "synthetic:ragged"];

impl Models {
    /// As it is typed, where it is not what is meant anyway.
    pub(crate) fn typed(&self) -> String {
        let mut flags = String::new();
        if self.model != DEFAULT {
            flags.extend(self.model.iter().map(|model| format!(" --model {}", quoted(model))));
        }
        flags
            + &typed("engine", &*self.engine, "reference")
            + &typed("number", &*self.number, "f32")
            + &self.keeps.typed()
    }
}

/// A flag as it is typed, where it is not what is meant anyway.
pub(crate) fn typed<T: PartialEq + std::fmt::Display + ?Sized>(
    flag: &str,
    value: &T,
    usual: &T,
) -> String {
    if value == usual { String::new() } else { format!(" --{flag} {value}") }
}

/// Rows that came, by subject and kind.
pub(crate) struct Tally<'a> {
    out: &'a Out,
    command: &'static str,
    /// What has to be typed besides the id to see a row again.
    flags: String,
    fail_fast: bool,
    /// The fault that was planted.
    plant: Option<String>,
    order: Vec<Group>,
    skips: Skips,
    sums: BTreeMap<Group, Sum>,
    all: Counts,
    exit: Exit,
}

/// Op or model, who computed, kind.
type Group = (String, String, &'static str);

#[derive(Clone, Debug, Default)]
struct Sum {
    of: Counts,
    equal: usize,
    /// Largest difference in units in the last place, and its relative RMS.
    ulp: u64,
    rel_rms: f64,
    budget: f64,
    seconds: f64,
    /// Fewest and most runs of a row.
    runs: Option<(usize, usize)>,
}

impl<'a> Tally<'a> {
    pub(crate) fn new(
        out: &'a Out,
        command: &'static str,
        flags: String,
        fail_fast: bool,
        plant: Option<String>,
        exit: Exit,
    ) -> Tally<'a> {
        Tally {
            out,
            command,
            flags,
            fail_fast,
            plant,
            order: Vec::new(),
            skips: Skips::default(),
            sums: BTreeMap::new(),
            all: Counts::default(),
            exit,
        }
    }

    /// Whether nothing more should run.
    pub(crate) fn over(&self) -> bool {
        out::interrupted() || (self.fail_fast && self.exit != Exit::Ok)
    }

    pub(crate) fn add(&mut self, row: &Row) {
        self.all.add(&row.outcome);
        let group = (row.group.clone(), row.by.clone(), row.kind);
        if !self.sums.contains_key(&group) {
            self.order.push(group.clone());
        }
        let sum = self.sums.entry(group).or_default();
        sum.of.add(&row.outcome);
        sum.equal += usize::from(row.equal());
        sum.budget = sum.budget.max(row.budget());
        sum.seconds += row.took.as_secs_f64();
        if let Some(difference) = &row.difference {
            sum.ulp = sum.ulp.max(difference.ulp);
            sum.rel_rms = sum.rel_rms.max(difference.rel_rms);
        }
        if let Some(runs) = row.runs {
            let (least, most) = sum.runs.unwrap_or((runs, runs));
            sum.runs = Some((least.min(runs), most.max(runs)));
        }
        self.skips.add(&row.outcome, &row.group, &row.by);
        let exit = ended::exit(&row.outcome, &row.by);
        let mut json = row.json();
        json["repro"] = json!(self.typed(row));
        self.out.json(&json);
        if exit != Exit::Ok {
            self.out.line(&self.block(row));
        } else if self.out.verbose {
            let what = if row.equal() { "equal" } else { row.outcome.name() };
            let far = row.difference.as_ref().map_or(String::new(), |difference| {
                format!("  {} · budget {:.3}", first(difference), row.budget())
            });
            self.out.line(&format!("{what:<11} {}{far}", row.id()));
        }
        self.exit = self.exit.gravest(exit);
    }

    /// What is wrong, where, and how to see it again.
    fn block(&self, row: &Row) -> String {
        let mut lines = head(&row.outcome, &row.id());
        if let Some(difference) = &row.difference {
            lines.push(format!("  first difference {}", first(difference)));
            lines.push(format!(
                "  {} of {} elements of {} differ, by up to {:.1e}, rel-RMS {:.1e}",
                difference.differing,
                difference.of,
                difference.output,
                difference.max_abs,
                difference.rel_rms
            ));
        }
        // One output that is over says what all after it repeat.
        lines.extend(row.outcome.findings().iter().find(|f| !f.ok).into_iter().flat_map(told));
        lines.push(format!("  repro: {}", self.typed(row)));
        lines.join("\n")
    }

    /// What to type to see a row again.
    fn typed(&self, row: &Row) -> String {
        format!("karat {} '{}'{}", self.command, row.id(), self.flags)
    }

    /// The table, the summary, and the exit code.
    pub(crate) fn end(self, what: &str) -> anyhow::Result<Exit> {
        if out::interrupted() {
            return Err(fail(Exit::Interrupted, "interrupted"));
        }
        if self.all.rows == 0 {
            return Err(fail(
                Exit::Nothing,
                format!(
                    "nothing selected; `karat {}` without a filter runs all that there is of what was given",
                    self.command
                ),
            ));
        }
        let table: Vec<Vec<String>> = self
            .order
            .iter()
            .map(|group| {
                let sum = &self.sums[group];
                let (subject, by, kind) = group;
                let within = sum.of.passed - sum.equal;
                let far = if sum.equal + sum.of.not_run() == sum.of.rows || sum.ulp == 0 {
                    String::new()
                } else {
                    format!("{} ulp, rel-RMS {:.1e}", sum.ulp, sum.rel_rms)
                };
                vec![
                    subject.clone(),
                    by.clone(),
                    (*kind).to_owned(),
                    sum.of.rows.to_string(),
                    sum.equal.to_string(),
                    within.to_string(),
                    sum.of.not_passed().to_string(),
                    sum.of.skipped.to_string(),
                    sum.of.unsupported.to_string(),
                    far,
                    if within == 0 && sum.of.passed + sum.of.not_run() == sum.of.rows {
                        String::new()
                    } else {
                        format!("{:.1} %", 100.0 * sum.budget)
                    },
                    sum.runs.map_or(String::new(), |(least, most)| {
                        if least == most { most.to_string() } else { format!("{least} … {most}") }
                    }),
                    format!("{:.1} s", sum.seconds),
                ]
            })
            .collect();
        self.out.table(
            &[
                "of",
                "by",
                what,
                "rows",
                "equal bits",
                "within bound",
                "not passed",
                "skipped",
                "unsupported",
                "largest difference",
                "worst use of bound",
                "runs",
                "time",
            ],
            &table,
        );
        let equal: usize = self.sums.values().map(|sum| sum.equal).sum();
        let Counts { rows, passed, skipped, unsupported } = self.all;
        self.skips.tell("row", self.out);
        self.out.line(&self.all.told(&format!(" ({equal} with equal bits)")));
        let exit = self.all.exit(self.exit, self.plant.as_deref(), self.out);
        self.out.json(&json!({
            "schema": "karat.result/1", "kind": "summary", "rows": rows, "passed": passed, "equal": equal,
            "skipped": skipped, "unsupported": unsupported, "exit": exit as u8,
        }));
        Ok(exit)
    }
}

/// The first element that differs, in words.
fn first(difference: &Difference) -> String {
    let at = difference.at.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    format!(
        "{}[{at}] got {:.9e} want {:.9e} ({} ulp at most)",
        difference.output, difference.got, difference.want, difference.ulp
    )
}
