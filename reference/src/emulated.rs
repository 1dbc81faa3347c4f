//! The model as a precision plan computes it.

use std::sync::Arc;

use golden::{
    Claims, Config, Dtype, Engine, Error, Plan, Weights,
    engine::{LinearState, Listener, Snapshot, Step, Want},
    weights::Rounded,
};
use ndarray::Array2;

use crate::{
    Model, Plant,
    real::{Planned, Rounding, under},
};

/// The reference in [`Planned`] numbers, rounded to the nearest: what an honest engine of a plan says
/// that adds in the plain reference's order.
pub struct Emulated {
    model: Model<Planned>,
    plan: Plan,
    rounding: Rounding,
    name: &'static str,
}

impl Emulated {
    /// The model cast to bf16, as the official code computes it: [`Plan::hf_bf16`] over weights and
    /// rotary frequencies in bf16 (a cast takes buffers with it, and these are one).
    pub fn hf_bf16(weights: Arc<dyn Weights>, plant: Option<Plant>) -> Emulated {
        let model = Model::new(Arc::new(Rounded::new(weights, Dtype::Bf16))).with_plant(plant);
        let model = model.with_frequencies_in(Dtype::Bf16);
        Emulated { model, plan: Plan::hf_bf16(), rounding: Rounding::Nearest, name: "bf16" }
    }

    /// A model as any plan computes it.
    pub fn of(weights: Arc<dyn Weights>, plan: Plan) -> Emulated {
        let model = Model::new(weights);
        Emulated { model, plan, rounding: Rounding::Nearest, name: "emulated" }
    }

    /// The same, under another plan.
    #[must_use]
    pub fn with_plan(self, plan: Plan) -> Emulated {
        Emulated { plan, ..self }
    }

    /// The same, with rotary frequencies as another type holds them.
    #[must_use]
    pub fn with_frequencies(self, dtype: Dtype) -> Emulated {
        Emulated { model: self.model.with_frequencies_in(dtype), ..self }
    }

    /// How it rounds from now on: to the nearest, unless told otherwise.
    pub fn round(&mut self, rounding: Rounding) {
        self.rounding = rounding;
    }

    fn run<T>(&mut self, f: impl FnOnce(&mut Model<Planned>) -> T) -> T {
        under(&self.plan, None, self.rounding, || f(&mut self.model))
    }
}

impl Engine for Emulated {
    fn name(&self) -> String {
        format!("reference/{}", self.name)
    }

    fn config(&self) -> &Config {
        self.model.config()
    }

    fn plan(&self) -> Plan {
        self.plan.clone()
    }

    fn claims(&self) -> Claims {
        self.model.claims()
    }

    fn forces(&self) -> bool {
        self.model.forces()
    }

    fn reset(&mut self, sequences: usize) -> Result<(), Error> {
        self.model.reset(sequences)
    }

    fn lengths(&self) -> Vec<usize> {
        self.model.lengths()
    }

    fn forward(&mut self, tokens: &[Vec<u32>], want: &Want) -> Result<Step, Error> {
        self.run(|model| model.forward(tokens, want))
    }

    fn snapshot(&mut self) -> Result<Snapshot, Error> {
        self.model.snapshot()
    }

    fn restore(&mut self, snapshot: Snapshot) -> Result<(), Error> {
        self.model.restore(snapshot)
    }

    fn release(&mut self, snapshot: Snapshot) {
        self.model.release(snapshot);
    }

    fn rollback(&mut self, keep: &[usize]) -> Result<(), Error> {
        self.run(|model| model.rollback(keep))
    }

    fn linear_states(&self) -> Result<Vec<Option<LinearState>>, Error> {
        self.model.linear_states()
    }

    fn watch(&mut self, listener: Listener) {
        self.model.watch(listener);
    }

    fn has_mtp(&self) -> bool {
        self.model.has_mtp()
    }

    fn mtp(&mut self, tokens: &[Vec<u32>], hidden: &Array2<f32>) -> Result<Step, Error> {
        self.run(|model| model.mtp(tokens, hidden))
    }

    fn mtp_lengths(&self) -> Vec<usize> {
        self.model.mtp_lengths()
    }

    fn mtp_truncate(&mut self, keep: &[usize]) -> Result<(), Error> {
        self.model.mtp_truncate(keep)
    }
}
