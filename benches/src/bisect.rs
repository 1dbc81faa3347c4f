//! Where an answer goes wrong: layer, then op, then head, chunk or expert, then element.
//!
//! An engine is walked three times beside the oracle, its tokens fed in pieces so that states are carried:
//!
//! - *free*: on its own. How far its residual stream is from the oracle's is the error that a layer
//!   *inherits* (before it) and leaves (after it).
//! - *by layer*: every layer is fed the residual stream of the oracle. What is off then, it added itself.
//! - *by op*: every op is fed what the oracle has there, states too. What is off then, that op did.
//!
//! An engine that does not go on with what it is given ([`golden::Engine::forces`]), and a kernel, is
//! taken as it runs, and the oracle is fed what *it* had: the same question from the other side.
//! What is off is judged by the bound of the engine's precision plan around the oracle, which gets exactly
//! the same inputs: runs of the reference in stochastic arithmetic along the same walk
//! ([`crate::spread`]). A layer is to blame if it is over its bound by layer, an op if it is over it by op;
//! the first of them, in the order of the computation, is named.
//!
//! Where a dozen runs of a text are too dear ([`crate::dear`]), two emulations of the plan stand for them, free
//! and by layer: an engine may err twice as much. Its loss on the whole is then held to theirs as well.

mod answers;
mod element;
mod file;
mod model;
mod op;
mod parts;
mod progress;
mod recorded;
#[cfg(test)]
mod tests;
mod walk;

use golden::{Engine, compare::Finding, tap::Part};
use serde_json::{Value, json};

pub use self::{
    answers::Answers,
    element::First,
    file::{File, against_file},
    model::{Asked, against_reference, answers_against_reference},
    progress::Progress,
    recorded::against_recording,
};
pub(crate) use self::{
    op::{Kernel, kernel},
    recorded::streams,
};
use crate::report::{finding_json, number};

/// What a bisection came to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Who was held against whom.
    pub subject: String,
    /// One per part of the model, in the order of the computation; empty for a kernel.
    pub rows: Vec<Row>,
    /// Ops that are over their bound when fed the right inputs, in the order of the computation.
    pub ops: Vec<Op>,
    /// What the logits of the engine on its own lose; only where the rule is relative.
    pub loss: Option<Loss>,
    /// What cannot be told, and why.
    pub unknown: Vec<String>,
}

/// Mean `KL(oracle || …)` of logits, nats a token, each on its own but with the oracle's experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// The engine's.
    pub kl: f64,
    /// That of the reference as it rounds to the nearest under the engine's plan.
    pub emulated: f64,
    /// What is allowed: twice that, or the most of emulations that add in other orders.
    pub allowed: f64,
}

impl Loss {
    /// Whether it is no more than is allowed.
    pub fn ok(&self) -> bool {
        self.kl <= self.allowed
    }
}

/// A part of a model, and whose error it has.
#[derive(Clone, Debug)]
pub struct Row {
    /// The part.
    pub part: Part,
    /// What else is in it that cannot be told from the part, all of it in words; `None` if nothing is.
    pub span: Option<String>,
    /// Error of the residual stream that it got, relative RMS; `None` if unknown.
    pub inherited: Option<f64>,
    /// Error of what it left of the right input.
    pub local: Option<f64>,
    /// What is allowed of that.
    pub allowed: Option<f64>,
    /// Error of what it left on its own.
    pub after: Option<f64>,
    /// Whether what decides here holds: the local error where it is known, else the one after it.
    pub ok: bool,
    /// In which terms it was judged.
    pub finding: Option<Finding>,
}

/// An op that is to blame.
#[derive(Clone, Debug)]
pub struct Op {
    /// Where it stands.
    pub part: Part,
    /// The op.
    pub op: String,
    /// Which of its tensors is over.
    pub tensor: String,
    /// How far, and in which pattern.
    pub finding: Finding,
    /// The first element over.
    pub first: Option<First>,
    /// What the places of the errors have in common beyond that: an expert, a piece.
    pub notes: Vec<String>,
}

impl Row {
    /// What it tells of.
    pub fn name(&self) -> String {
        self.span.clone().unwrap_or_else(|| self.part.to_string())
    }
}

impl Report {
    /// Of an engine that nothing was asked yet.
    fn against_reference(engine: &dyn Engine) -> Report {
        let subject = format!("{} against reference/f64", engine.name());
        Report { subject, ..Report::default() }
    }

    /// Blames a part that is over on its own, though nothing is that was fed what is right.
    fn adds_up(&mut self, part: Part) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.part == part) {
            row.ok = false;
        }
        self.unknown.push(format!(
            "nothing is over its bound that is fed what is right, yet the whole is from {part} on: errors within \
             their bounds add up"
        ));
    }

    /// Whether nothing is to blame.
    pub fn ok(&self) -> bool {
        let lost = self.loss.is_some_and(|loss| !loss.ok());
        !lost && self.ops.is_empty() && self.rows.iter().all(|row| row.ok)
    }

    /// The first part that is to blame.
    pub fn part(&self) -> Option<Part> {
        let row = self.rows.iter().find(|row| !row.ok).map(|row| row.part);
        let op = self.ops.first().map(|op| op.part);
        match (row, op) {
            (Some(row), Some(op)) => Some(row.min(op)),
            (row, op) => row.or(op),
        }
    }

    /// The same in words: as narrow as it can be told, which is the part where an op in it is to blame.
    pub fn blame(&self) -> Option<String> {
        let part = self.part()?;
        let row = self.rows.iter().find(|row| !row.ok && row.part == part);
        let told = self.ops.first().is_some_and(|op| op.part == part);
        Some(row.filter(|_| !told).map_or_else(|| part.to_string(), Row::name))
    }

    /// Its ops that are to blame, each once.
    pub fn blamed(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for op in self.ops.iter().filter(|op| Some(op.part) == self.part()) {
            if !names.contains(&op.op.as_str()) {
                names.push(&op.op);
            }
        }
        names
    }

    /// One object per row and per op.
    pub fn json(&self) -> Vec<Value> {
        let optional = |x: Option<f64>| x.map_or(Value::Null, number);
        let rows = self.rows.iter().map(|row| {
            json!({
                "schema": "karat.result/1", "kind": "bisect", "subject": self.subject, "part": row.name(),
                "inherited": optional(row.inherited), "local": optional(row.local), "allowed": optional(row.allowed),
                "after": optional(row.after), "ok": row.ok,
            })
        });
        let loss = self.loss.iter().map(|loss| {
            json!({
                "schema": "karat.result/1", "kind": "bisect", "subject": self.subject, "part": "logits",
                "kl_own": number(loss.kl), "kl_emulated": number(loss.emulated), "kl_allowed": number(loss.allowed),
                "ok": loss.ok(),
            })
        });
        let ops = self.ops.iter().map(|op| {
            json!({
                "schema": "karat.result/1", "kind": "bisect", "subject": self.subject, "part": op.part.to_string(),
                "op": op.op, "tensor": op.tensor, "ok": false, "findings": [finding_json(&op.finding)],
                "first": op.first.as_ref().map(First::json), "notes": op.notes,
            })
        });
        rows.chain(loss).chain(ops).collect()
    }
}
